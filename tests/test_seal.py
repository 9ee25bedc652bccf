"""The seal holds what its layout says, and is refused when a bit of it changes."""

from __future__ import annotations

import pytest
import torch
import xxhash

from peft_childtune import FormatError, IntegrityError
from peft_childtune.codec import encode_child
from peft_childtune.seal import make_seal, read_seal, seal_bytes, sealed_file_tensor
from peft_childtune.sparse import TensorChild, UnitGrid
from peft_childtune.weights import fingerprint

from .sealing import BASES, CONFIG, HEADS, INDICES, children, seal


def _resealed(raw):
    """Return a seal of those bytes, with the checksum that belongs to them."""
    body = bytes(raw)[:-8]
    return torch.tensor(list(body + xxhash.xxh3_64_digest(body)), dtype=torch.uint8)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (1, 0), (3, 2)])
def test_the_length_follows_from_the_layout(n, m):
    some, heads = dict(list(children().items())[:n]), dict(list(HEADS.items())[:m])
    assert make_seal(some, heads, config=CONFIG).numel() == seal_bytes(n, m) == 56 + 57 * n + 41 * m


def test_the_bytes_are_laid_out_as_documented():
    raw = bytes(seal().tolist())
    assert raw[:8] == b"CTSEAL\0\x01"
    assert raw[8:16] == bytes(8)  # minor version 0, no required features
    assert (int.from_bytes(raw[16:20], "little"), int.from_bytes(raw[20:24], "little")) == (3, 2)
    assert (raw[24:40], raw[40:48]) == (CONFIG, bytes(8))
    keys = sorted(xxhash.xxh3_64_digest(name.encode()) for name in BASES)
    assert [raw[48 + 57 * i : 56 + 57 * i] for i in range(3)] == keys
    heads = sorted(xxhash.xxh3_64_digest(name.encode()) for name in HEADS)
    assert [raw[219 + 41 * i : 227 + 41 * i] for i in range(2)] == heads
    assert raw[-8:] == xxhash.xxh3_64_digest(raw[:-8])


def test_what_is_read_is_what_was_written():
    found = read_seal(seal())
    assert found.config == CONFIG
    assert set(found.heads) == {xxhash.xxh3_64_digest(name.encode()) for name in HEADS}
    for name, base in BASES.items():
        _, saved = found.children[xxhash.xxh3_64_digest(name.encode())]
        assert saved == fingerprint(base, torch.tensor(INDICES[name], dtype=torch.int64), whole=True)
        assert saved.whole == xxhash.xxh3_64_intdigest(base.numpy().tobytes())


def test_every_flipped_bit_of_the_seal_is_refused():
    sound = seal()
    accepted = []
    for at in range(sound.numel()):
        for bit in range(8):
            damaged = sound.clone()
            damaged[at] ^= 1 << bit
            try:
                read_seal(damaged)
            except FormatError:
                continue
            accepted.append((at, bit))
    assert accepted == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s[:0],
        lambda s: s[:47],
        lambda s: s[:-1],
        lambda s: torch.cat([s, s[:1]]),
        lambda s: s.to(torch.int32),
        torch.zeros_like,
    ],
    ids=["empty", "no header", "short", "long", "int32", "zeros"],
)
def test_a_malformed_seal_is_a_format_error(damage):
    with pytest.raises(FormatError, match="child_tuning_seal"):
        read_seal(damage(seal()))


def test_counts_that_ask_for_gigabytes_are_refused_at_once():
    damaged = seal()
    damaged[16:24] = 255
    with pytest.raises(FormatError, match="need"):
        read_seal(damaged)


def test_a_newer_major_version_is_refused_with_the_way_out():
    raw = bytearray(seal().tolist())
    raw[7] = 2
    with pytest.raises(FormatError, match="format version 2.*reads version 1.*update"):
        read_seal(_resealed(raw + bytes(100)))  # of whatever length


def test_a_newer_minor_version_is_read():
    raw = bytearray(seal().tolist())
    raw[8], raw[10], raw[44] = 7, 1, 9
    assert read_seal(_resealed(raw)) == read_seal(seal())


@pytest.mark.parametrize("byte", [12, 15])
def test_a_required_feature_that_is_not_known_is_refused(byte):
    raw = bytearray(seal().tolist())
    raw[byte] = 0x80
    with pytest.raises(FormatError, match="needs features.*update"):
        read_seal(_resealed(raw))


def test_a_changed_seal_of_another_version_is_called_damaged():
    raw = bytearray(seal().tolist())
    raw[7] = 2
    with pytest.raises(IntegrityError, match="damaged"):
        read_seal(torch.tensor(list(raw), dtype=torch.uint8))


def test_a_code_that_stands_for_more_entries_than_there_are_values_is_refused_before_they_are_listed():
    code = encode_child(TensorChild(UnitGrid((4, 6)), torch.tensor([1, 5, 7])))
    found = sealed_file_tensor("w", code, torch.ones(2), base=lambda: torch.ones(4, 6))
    with pytest.raises(FormatError, match="^w: count: 3 units are not 2 entries"):
        found.fingerprint()
