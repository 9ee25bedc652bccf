"""The language model example: blocks and perplexity by definition, and the whole run on a tiny Llama."""

from __future__ import annotations

import math
import re

import causal_lm
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"the {word} is very good and the plot is fine" for word in ("film", "cast") * 20))
    return path


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        causal_lm.main(["--help"])
    assert "--block" in capsys.readouterr().out


def test_documents_are_parted_by_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\n\n\ntwo\n")
    assert causal_lm.read_texts(tmp_path / "a.txt") == ["one\nline", "two"]


def test_blocks_cut_one_stream_and_drop_the_rest(language_model):
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    rows = causal_lm.blocks(["the film is good and", "the plot"], tokenizer, 4)
    stream = tokenizer("the film is good and[SEP]the plot")["input_ids"]
    assert rows.tolist() == [stream[:4], stream[4:8]]


def test_a_text_shorter_than_a_block_is_refused(language_model):
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    with pytest.raises(ValueError, match="4 tokens, a block needs 128"):
        causal_lm.blocks(["the film"], tokenizer, 128)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_is_exp_of_the_mean_loss_over_all_predicted_tokens(language_model, batch_size):
    model = AutoModelForCausalLM.from_pretrained(language_model)
    rows = torch.arange(40).view(5, 8) % 18
    logits = model.eval()(rows).logits.double()
    losses = [-math.log(logits[r, t].softmax(0)[rows[r, t + 1]].item()) for r in range(len(rows)) for t in range(7)]
    # the model's own loss is a float32 mean
    assert causal_lm.perplexity(model, rows, batch_size) == pytest.approx(math.exp(sum(losses) / 35), rel=1e-6)


def test_the_run_lowers_the_perplexity_and_reloads_the_same(language_model, text, tmp_path, capsys):
    line = f"--model {language_model} --text {text} --block 8 --steps 20 --density 0.1 --learning-rate 0.01"
    causal_lm.main([*line.split(), "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    before, after, reloaded = (
        float(re.search(pattern, out)[1]) for pattern in (r"base: ([\d.]+)", r"steps: ([\d.]+)", r"reloaded: ([\d.]+)")
    )
    assert after < before and reloaded == after
