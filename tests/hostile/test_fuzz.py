"""The property of the fuzz target, in every run, and the target itself where atheris is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile import fuzz_decoder

_SEEDS = fuzz_decoder.seeds()


@st.composite
def _damaged(draw) -> bytes:
    """A sound code with some bytes exchanged, cut out or put in."""
    data = bytearray(draw(st.sampled_from(_SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


@given(st.one_of(st.binary(max_size=80), _damaged()))
@settings(max_examples=400)
def test_any_bytes_are_refused_by_name_or_give_a_valid_child(data):
    fuzz_decoder.check(data)


@pytest.mark.parametrize("data", _SEEDS)
def test_the_inputs_that_fuzzing_begins_with_are_sound(data):
    code = fuzz_decoder.torch.tensor(list(bytes.fromhex("435401") + data[1:]), dtype=fuzz_decoder.torch.uint8)
    assert fuzz_decoder.decode_child(code, shape=fuzz_decoder.SHAPES[data[0]]).nnz > 0
    fuzz_decoder.check(data)


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed (pip install atheris)"
)
def test_two_minutes_of_fuzzing_find_nothing(tmp_path):
    for number, data in enumerate(_SEEDS):
        (tmp_path / str(number)).write_bytes(data)
    target = Path(fuzz_decoder.__file__)
    done = subprocess.run(
        [sys.executable, target, "-max_total_time=120", "-rss_limit_mb=2048", "-timeout=5", tmp_path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
