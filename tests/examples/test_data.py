"""Rows come from any source with the same numbering of labels, and train and test never share one."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from data import Rows, by_length, load_rows, mean_pooled, tokenize, train_test
from transformers import AutoTokenizer


def load(path, **options):
    return load_rows(str(path), **{"text_columns": ["text"], "label_column": "label", **options})


def test_string_labels_are_numbered_in_alphabetical_order(table_file):
    (rows,) = load(table_file)
    assert (rows.texts[0], rows.labels[0]) == (("the film is bad",), 0)
    assert (rows.texts[-1], rows.labels[-1]) == (("the script is very very lovely",), 1)


def test_numbers_spelt_in_a_csv_are_numbered_by_value(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,10\nb,9\nc,10\n")
    assert load(path)[0].labels == [1, 0, 1]


def test_floats_are_kept_to_be_regressed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a", "label": value}) for value in (0.5, 3.25)))
    assert load(path)[0].labels == [0.5, 3.25]


def test_two_columns_make_pairs(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("one\ttwo\tlabel\nfilm\tplot\t0\n")
    assert load(path, text_columns=["one", "two"])[0].texts == [("film", "plot")]


def test_a_missing_column_is_named(table_file):
    with pytest.raises(ValueError, match="no column 'stars'; the data has text, label"):
        load(table_file, label_column="stars")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="no rows"):
        load(tmp_path / "a.csv")


def hub(monkeypatch, **splits):
    parts = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: datasets.DatasetDict(parts))


def test_validation_rows_stand_in_for_a_test_split_without_labels(monkeypatch):
    train, validation = {"text": ["a", "b"], "label": [0, 1]}, {"text": ["c"], "label": [1]}
    hub(monkeypatch, train=train, validation=validation, test={"text": ["d"], "label": [-1]})
    assert load("some/set") == [Rows([("a",), ("b",)], [0, 1]), Rows([("c",)], [1])]


def test_a_hub_set_without_held_out_labels_is_one_part(monkeypatch):
    hub(monkeypatch, train={"text": ["a", "b"], "label": ["x", "y"], "more": [1, 2]})
    assert load("some/set") == [Rows([("a",), ("b",)], [0, 1])]


def test_train_and_test_never_overlap():
    rows = Rows([(str(i),) for i in range(100)], list(range(100)))
    train, test = train_test([rows], train=70, test=30)
    assert sorted(train.labels + test.labels) == list(range(100))


def test_own_test_rows_are_used_where_there_are_some():
    parts = [Rows([("a",)] * 5, [0] * 5), Rows([("b",)] * 5, [1] * 5)]
    train, test = train_test(parts, train=None, test=3)
    assert (train.labels, test.labels) == ([0] * 5, [1] * 3)


def test_too_few_rows_for_a_test_are_refused():
    with pytest.raises(ValueError, match="5 rows leave none to train on beside 5 test rows"):
        train_test([Rows([("a",)] * 5, [0] * 5)], train=1, test=5)


def test_records_are_unpadded_cut_and_ordered_by_length(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = Rows([("the film is very very good",), ("the film",)], [1, 0])
    records = by_length(tokenize(rows, tokenizer, max_length=6))
    assert [(len(record["input_ids"]), record["labels"]) for record in records] == [(4, 0), (6, 1)]


def test_padding_takes_no_part_in_the_mean_over_a_text():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]]], dtype=torch.bfloat16)
    pooled = mean_pooled(hidden, torch.tensor([[1, 1, 0]]))
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == [[2.0, 3.0]]
