"""A tiny encoder with a tokenizer and a small labelled file, all made here."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

collect_ignore = ["file_tracker.py"]  # a program that other processes run

SUBJECTS = ("film", "plot", "cast", "score", "scene", "script")
GOOD = ("good", "fine", "great", "lovely")
BAD = ("bad", "dull", "awful", "weak")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "is", "and", "very", *SUBJECTS, *GOOD, *BAD)


def sentences() -> list[tuple[str, str]]:
    """Return 96 sentences of three lengths whose adjective decides the label."""
    return [
        (f"the {subject} is {filler}{word}", label)
        for label, words in (("neg", BAD), ("pos", GOOD))
        for word in words
        for subject in SUBJECTS
        for filler in ("", "very very ")
    ]


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(word, WORDS.index(word)) for word in ("[CLS]", "[SEP]")],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def log_levels_stay_here() -> Iterator[None]:
    """An example's `main` quietens loggers for its own process; here other tests run in it afterwards."""
    levels = {name: logging.getLogger(name).level for name in ("peft_childtune", "transformers")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **size)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language_model")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=1, max_position_embeddings=32, **size)
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def table_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sentences.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *sentences()])
    return path
