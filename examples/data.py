"""Texts and labels for the classification examples: the pinned sets of `assets.py`, local files, any hub dataset."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import assets
from torch import Tensor

UNLABELLED = -1  # what public test splits carry in place of a withheld label


@dataclass(frozen=True)
class Rows:
    """Labelled texts. A row holds one text, or a pair of them; its label is a class number, or a float to regress."""

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Iterable[int]) -> Rows:
        """Return the rows at these positions, in that order."""
        order = list(positions)
        return Rows([self.texts[i] for i in order], [self.labels[i] for i in order])


def load_rows(name: str, *, text_columns: Sequence[str], label_column: str, subset: str | None = None) -> list[Rows]:
    """Return `[train, test]`, or `[all]` where the source has no labelled test rows of its own.

    Args:
        name: `vader:<domain>` or `uci:<domain>` of `assets.py`, a local `.csv`, `.tsv`, `.jsonl` or `.json` file, or a
            hub dataset, of which `validation` stands in for a `test` split without labels.
        text_columns: one column, or two for sentence pairs.
        label_column: integers or strings, which are numbered in ascending order, or floats.
        subset: the configuration of a hub dataset, such as `rte` of `glue`.

    Raises:
        ValueError: a column is missing, or a file is empty or of an unknown type.
    """
    source, _, domain = name.partition(":")
    if source == "vader" and domain in get_args(assets.VaderDomain):
        return [_from_lists(assets.vader(domain))]
    if source == "uci" and domain in get_args(assets.UciDomain):
        return [_from_lists(assets.uci(domain))]
    if Path(name).suffix in (".csv", ".tsv", ".jsonl", ".json"):
        return _from_records([_read_table(Path(name))], text_columns, label_column)
    import datasets

    splits = datasets.load_dataset(name, subset)
    held_out = [key for key in ("test", "validation", "validation_matched") if key in splits]
    labelled = [key for key in held_out if _has_labels(splits[key], label_column)]
    parts = [_records(splits[key], (*text_columns, label_column)) for key in ("train", *labelled[:1])]
    return _from_records(parts, text_columns, label_column)


def train_test(parts: Sequence[Rows], *, train: int | None, test: int, seed: int = 0) -> tuple[Rows, Rows]:
    """Return at most `train` and at most `test` rows, drawn once with a seed and never overlapping.

    Raises:
        ValueError: there are too few rows to have both.
    """
    rng = random.Random(seed)
    orders = [rng.sample(range(len(part)), len(part)) for part in parts]
    if len(parts) > 1:
        return parts[0].take(orders[0][:train]), parts[1].take(orders[1][:test])
    if len(parts[0]) <= test:
        raise ValueError(
            f"{len(parts[0])} rows leave none to train on beside {test} test rows; test on fewer (--test-rows)."
        )
    return parts[0].take(orders[0][test:][:train]), parts[0].take(orders[0][:test])


def tokenize(rows: Rows, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Return one record a row, unpadded, as a `DataCollatorWithPadding` takes them."""
    encoded = tokenizer(*map(list, zip(*rows.texts, strict=True)), truncation=True, max_length=max_length)
    return [{**{key: encoded[key][i] for key in encoded}, "labels": label} for i, label in enumerate(rows.labels)]


def by_length(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records from short to long, so that batches need little padding."""
    return sorted(records, key=lambda record: len(record["input_ids"]))


def mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over each text's own tokens, `(rows, width)`, of states `(rows, tokens, width)` in float32."""
    mask = mask.unsqueeze(-1)
    return (hidden.float() * mask).sum(1) / mask.sum(1)


def _from_lists(labelled: assets.Labelled) -> Rows:
    texts, labels = labelled
    return Rows([(text,) for text in texts], labels)


def _has_labels(split: Any, label_column: str) -> bool:
    return label_column in split.column_names and any(label != UNLABELLED for label in split[:100][label_column])


def _records(split: Any, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the wanted columns of a hub split; reading column by column is much faster than row by row."""
    found = [column for column in columns if column in split.column_names] or split.column_names
    return [dict(zip(found, row, strict=True)) for row in zip(*(split[column] for column in found), strict=True)]


def _from_records(parts: Sequence[list[dict[str, Any]]], text_columns: Sequence[str], label_column: str) -> list[Rows]:
    for record in (part[0] for part in parts):
        for column in (*text_columns, label_column):
            if column not in record:
                raise ValueError(f"no column {column!r}; the data has {', '.join(map(str, record))}.")
    labels = [[_number(record[label_column]) for record in part] for part in parts]
    seen = {label for part in labels for label in part}
    if not any(isinstance(label, float) for label in seen):
        names = sorted(seen) if all(isinstance(label, int) for label in seen) else sorted(map(str, seen))
        numbers = {label: i for i, label in enumerate(names)}
        textual = isinstance(names[0], str)
        labels = [[numbers[str(label) if textual else label] for label in part] for part in labels]
    texts = [[tuple(str(record[column]) for column in text_columns) for record in part] for part in parts]
    return [Rows(t, y) for t, y in zip(texts, labels, strict=True)]


def _number(label: Any) -> Any:
    """Return a label that a text file spelt out as the integer it is; any other label as it came."""
    return int(label) if isinstance(label, str) and label.strip().lstrip("-").isdecimal() else label


def _read_table(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix in (".csv", ".tsv"):
            rows: list[dict[str, Any]] = list(csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t"))
        else:
            rows = [json.loads(line) for line in file if line.strip()]  # one object a line
    if not rows:
        raise ValueError(f"{path}: no rows.")
    return rows
