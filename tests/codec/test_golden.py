"""Codes of released versions stay readable, and FORMAT.md says how."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import peft_childtune.codec
from peft_childtune.codec import FORMAT_VERSION, decode_child, encode_child
from peft_childtune.sparse import ResampledUnits, SeededUnits, TensorChild, UnitGrid

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "children_v1.json").read_text())
FORMAT = (Path(peft_childtune.codec.__file__).parent / "FORMAT.md").read_text()


def as_code(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def child_of(case: dict) -> TensorChild:
    grid = UnitGrid(tuple(case["shape"]), case["granularity"], case["block_size"], case["transposed"])
    if "listed" in case:
        return TensorChild(grid, torch.tensor(case["listed"], dtype=torch.int64))
    return TensorChild(grid, (SeededUnits if "threshold" in case["rule"] else ResampledUnits)(**case["rule"]))


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_a_code_of_version_1_is_readable_forever(case):
    child, decoded = child_of(case), decode_child(as_code(case["code"]), shape=tuple(case["shape"]))
    assert decoded.grid == child.grid
    if "listed" in case:
        assert decoded.units.tolist() == case["listed"]
    else:
        assert decoded.units == child.units


@pytest.mark.parametrize(
    "case", [c for c in GOLDEN if c["coding"] != "lzma"], ids=[c["name"] for c in GOLDEN if c["coding"] != "lzma"]
)
def test_the_same_child_is_written_as_the_same_bytes(case):
    # not for LZMA: another release of liblzma may compress differently
    assert bytes(encode_child(child_of(case)).tolist()).hex() == case["code"]


def test_the_golden_codes_cover_every_coding():
    assert {case["coding"] for case in GOLDEN} == {
        "raw", "rice", "block_rice", "bitmap", "lzma", "seeded", "resampled"
    }  # fmt: skip


@pytest.mark.parametrize("case", [c for c in GOLDEN if c["coding"] == "seeded"], ids=lambda case: case["name"])
def test_a_seeded_code_draws_the_same_entries_in_every_release(case):
    assert decode_child(as_code(case["code"]), shape=tuple(case["shape"])).indices().tolist() == case["indices"]


def test_the_example_in_the_format_text_is_a_code():
    example = re.search(r"```hex\n(.*?)\n```", FORMAT, re.S).group(1)
    child = TensorChild(UnitGrid((2, 8)), torch.tensor([3, 4, 9]))
    assert decode_child(as_code(example), shape=(2, 8)).units.tolist() == [3, 4, 9]
    assert encode_child(child).numel() <= len(bytes.fromhex(example))


def test_the_format_text_is_about_the_version_that_is_written():
    assert FORMAT.startswith(f"# The code of a child, version {FORMAT_VERSION}\n")
