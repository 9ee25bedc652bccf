"""Each bit of a small artifact flipped: a named error, or the same model, and never a signal."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.hostile.artifacts import save

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CHUNK = 1000  # bits in a process
_STEP = 31  # in the share of every run: coprime to 8, so that all places in a byte have their turn
_GOOD = ("same", "refused: ")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flipped")
    save(folder)
    return folder


@pytest.fixture
def share(artifact, in_a_process):
    """Return a function that says what became of a share of the bits of a file."""

    def of(file: str) -> dict[str, list[int]]:
        bits = 8 * (artifact / file).stat().st_size
        found: dict[str, list[int]] = json.loads(in_a_process("tests.hostile.flips", artifact, file, 0, bits, _STEP))
        return found

    return of


def _describe(folder: Path, file: str, bits: list[int]) -> list[str]:
    lines = []
    for bit in bits[:5]:
        damaged = bytearray((folder / file).read_bytes())
        damaged[bit // 8] ^= 1 << bit % 8
        lines.append(repr(bytes(damaged[max(0, bit // 8 - 20) : bit // 8 + 20])))
    return lines


def _check(folder: Path, file: str, outcomes: dict[str, list[int]]) -> None:
    bad = {name: _describe(folder, file, bits) for name, bits in outcomes.items() if not name.startswith(_GOOD)}
    assert not bad, bad


def _outside_of_tensors(folder: Path) -> set[int]:
    """Return the bits of the weights file that mean nothing: what the writer says of itself, and padding."""
    raw = (folder / _WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    start = raw.index(b'"__metadata__"')
    stop = raw.index(b"}", start) + 1
    padding = range(8 + len(raw[8 : 8 + length].rstrip()), 8 + length)
    return {8 * byte + bit for byte in [*range(start, stop), *padding] for bit in range(8)}


def test_a_share_of_the_bits_of_the_weights_file(share, artifact):
    outcomes = share(_WEIGHTS)
    _check(artifact, _WEIGHTS, outcomes)
    assert set(outcomes.get("same", [])) <= _outside_of_tensors(artifact)
    assert sum(map(len, outcomes.values())) == len(range(0, 8 * (artifact / _WEIGHTS).stat().st_size, _STEP))


def test_a_share_of_the_bits_of_the_configuration(share, artifact):
    _check(artifact, _CONFIG, share(_CONFIG))


def _all(artifact, in_a_process, file) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    bits = 8 * (artifact / file).stat().st_size
    for first in range(0, bits, _CHUNK):
        printed = in_a_process("tests.hostile.flips", artifact, file, first, min(first + _CHUNK, bits), 1)
        for name, some in json.loads(printed).items():
            found.setdefault(name, []).extend(some)
    assert sorted(bit for some in found.values() for bit in some) == list(range(bits))
    print(file, Counter({name: len(some) for name, some in found.items()}))
    return found


@pytest.mark.long
def test_every_bit_of_the_weights_file(artifact, in_a_process):
    outcomes = _all(artifact, in_a_process, _WEIGHTS)
    _check(artifact, _WEIGHTS, outcomes)
    assert set(outcomes.get("same", [])) <= _outside_of_tensors(artifact)


@pytest.mark.long
def test_every_bit_of_the_configuration(artifact, in_a_process):
    _check(artifact, _CONFIG, _all(artifact, in_a_process, _CONFIG))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "task_free"),
        ("density", 0.31),
        ("score", "random"),
        ("scope", "layer"),
        ("granularity", "row"),
        ("block_size", 17),
        ("resample", True),
        ("seed", 4),
        ("save_dtype", "float16"),
        ("init_weights", True),
    ],
)
def test_an_own_field_with_another_sound_value_is_refused(field, value, tmp_path):
    from tests.hostile.artifacts import Loading

    save(tmp_path)
    loading = Loading(tmp_path)
    config = json.loads((tmp_path / _CONFIG).read_text()) | {field: value}
    if field in ("mode", "resample"):
        config |= {"mode": "task_free", "score": "random"}
    (tmp_path / _CONFIG).write_text(json.dumps(config))
    assert loading.outcome().startswith("refused: ")
