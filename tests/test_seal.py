"""The seal vouches for every bit of an adapter and for the base it was made for."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
import xxhash

from peft_childtune import BaseMismatchError, FormatError, IntegrityError
from peft_childtune.seal import Sealed, make_seal, seal_bytes, verify_seal
from peft_childtune.weights import fingerprint

_BASES = {"a.weight": torch.linspace(-1, 1, 12).view(3, 4), "a.bias": torch.linspace(2, 3, 3), "b": torch.randn(5)}
_INDICES = {"a.weight": [1, 7], "a.bias": [], "b": [0, 1, 4]}
_CODES = {"a.weight": [9, 8, 7], "a.bias": [], "b": [1, 2]}
_VALUES = {"a.weight": [0.5, -0.25], "a.bias": [], "b": [1.0, -0.0, 3.0]}
_HEADS = {"head.weight": torch.linspace(0, 1, 6).view(2, 3), "head.steps": torch.tensor(7)}


def _children(bases=None, codes=None, values=None, dtype=torch.float32):
    bases, codes, values = (bases or _BASES), _CODES | (codes or {}), _VALUES | (values or {})
    return {
        name: Sealed(
            torch.tensor(codes[name], dtype=torch.uint8),
            torch.tensor(values[name], dtype=torch.float32).to(dtype),
            partial(fingerprint, base, torch.tensor(_INDICES[name], dtype=torch.int64)),
        )
        for name, base in bases.items()
    }


def _seal():
    return make_seal(_children(), _HEADS)


def test_what_was_sealed_is_accepted():
    verify_seal(_seal(), _children(), _HEADS)


def test_the_order_of_the_tensors_does_not_matter():
    turned = {name: _children()[name] for name in reversed(_BASES)}
    assert torch.equal(make_seal(turned, dict(reversed(_HEADS.items()))), _seal())
    verify_seal(_seal(), turned, _HEADS)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (1, 0), (3, 2)])
def test_the_length_follows_from_the_layout(n, m):
    children = dict(list(_children().items())[:n])
    heads = dict(list(_HEADS.items())[:m])
    assert make_seal(children, heads).numel() == seal_bytes(n, m) == 24 + 49 * n + 33 * m


def test_the_bytes_are_laid_out_as_documented():
    raw = bytes(_seal().tolist())
    assert raw[:8] == b"CTSEAL\0\x01"
    assert (int.from_bytes(raw[8:12], "little"), int.from_bytes(raw[12:16], "little")) == (3, 2)
    keys = sorted(xxhash.xxh3_64_digest(name.encode()) for name in _BASES)
    assert [raw[16 + 49 * i : 24 + 49 * i] for i in range(3)] == keys
    heads = sorted(xxhash.xxh3_64_digest(name.encode()) for name in _HEADS)
    assert [raw[163 + 33 * i : 171 + 33 * i] for i in range(2)] == heads
    assert raw[-8:] == xxhash.xxh3_64_digest(raw[:-8])


def test_every_flipped_bit_of_the_seal_is_refused():
    seal = _seal()
    accepted = []
    for at in range(seal.numel()):
        for bit in range(8):
            damaged = seal.clone()
            damaged[at] ^= 1 << bit
            try:
                verify_seal(damaged, _children(), _HEADS)
            except FormatError:
                continue
            accepted.append((at, bit))
    assert accepted == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s[:0],
        lambda s: s[:15],
        lambda s: s[:-1],
        lambda s: torch.cat([s, s[:1]]),
        lambda s: s.to(torch.int32),
        torch.zeros_like,
    ],
    ids=["empty", "no counts", "short", "long", "int32", "zeros"],
)
def test_a_malformed_seal_is_a_format_error(damage):
    with pytest.raises(FormatError, match="child_tuning_seal"):
        verify_seal(damage(_seal()), _children(), _HEADS)


def test_counts_that_ask_for_gigabytes_are_refused_at_once():
    seal = _seal()
    seal[8:16] = 255
    with pytest.raises(FormatError, match="need"):
        verify_seal(seal, _children(), _HEADS)


@pytest.mark.parametrize(
    "children",
    [
        _children(codes={"b": [1, 3]}),
        _children(codes={"b": [1, 2, 0]}),
        _children(values={"b": [1.0, 0.0, 3.0]}),
        _children(values={"b": [1.0, -0.0, 3.0000002]}),
        _children(codes={"b": []}, values={"b": []}),
    ],
    ids=["code", "longer code", "sign of zero", "last bit", "gone"],
)
def test_a_changed_child_is_refused_by_name(children):
    with pytest.raises(IntegrityError, match="^b: "):
        verify_seal(_seal(), children, _HEADS)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("head.weight", torch.linspace(0, 1, 6).view(2, 3).nextafter(torch.tensor(9.0))),
        ("head.steps", torch.tensor(8)),
        ("head.weight", torch.linspace(0, 1, 6)[:5]),
    ],
)
def test_a_changed_head_is_refused_by_name(name, tensor):
    with pytest.raises(IntegrityError, match=f"^{name}: "):
        verify_seal(_seal(), _children(), _HEADS | {name: tensor})


def test_two_heads_of_the_same_size_cannot_be_exchanged():
    heads = {"one": torch.randn(3), "two": torch.randn(3)}
    seal = make_seal(_children(), heads)
    with pytest.raises(IntegrityError):
        verify_seal(seal, _children(), {"one": heads["two"], "two": heads["one"]})


def test_two_children_of_the_same_size_cannot_be_exchanged():
    base = {"one": torch.ones(5), "two": torch.ones(5)}
    code, indices = torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([0])
    children = {
        n: Sealed(code, torch.tensor([v]), partial(fingerprint, base[n], indices))
        for n, v in [("one", 1.0), ("two", 2.0)]
    }
    seal = make_seal(children, {})
    with pytest.raises(IntegrityError):
        verify_seal(seal, {"one": children["two"], "two": children["one"]}, {})


@pytest.mark.parametrize("name", ["a.weight", "a.bias", "b"])
def test_another_base_is_refused_by_name(name):
    other = dict(_BASES)
    other[name] = other[name].clone()
    other[name].view(-1)[0] += 0.5
    with pytest.raises(BaseMismatchError, match=f"^{name}: "):
        verify_seal(_seal(), _children(bases=other), _HEADS)


def test_missing_and_surplus_tensors_are_refused():
    fewer, more = dict(_children()), dict(_children())
    fewer.pop("b")
    more["c"] = more["b"]
    for children in (fewer, more):
        with pytest.raises(IntegrityError):
            verify_seal(_seal(), children, _HEADS)
    for heads in ({}, {"head.weight": _HEADS["head.weight"]}, _HEADS | {"more": torch.zeros(1)}):
        with pytest.raises(IntegrityError):
            verify_seal(_seal(), _children(), heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_saved_narrow_are_accepted_when_a_loader_widens_them(dtype):
    seal = make_seal(_children(dtype=dtype), {})
    verify_seal(seal, _children(dtype=dtype), {})
    widened = {
        name: Sealed(entry.code, entry.values.to(torch.float32), entry.fingerprint)
        for name, entry in _children(dtype=dtype).items()
    }
    verify_seal(seal, widened, {})


def test_a_base_in_half_precision_is_recognised():
    verify_seal(_seal(), _children(bases={n: b.bfloat16() for n, b in _BASES.items()}), _HEADS)
    verify_seal(_seal(), _children(bases={n: b.half() for n, b in _BASES.items()}), _HEADS)


def test_bfloat16_against_float16_warns_that_nothing_was_verified(caplog):
    seal = make_seal(_children(bases={n: b.bfloat16() for n, b in _BASES.items()}), {})
    with caplog.at_level(logging.WARNING, logger="peft_childtune.seal"):
        verify_seal(seal, _children(bases={n: b.half() for n, b in _BASES.items()}), {})
    assert "could not be verified" in caplog.text
    assert "2 more" in caplog.text


def test_a_base_is_looked_at_only_after_the_file_proved_sound():
    def explode():
        raise AssertionError("decoded a code that was not verified")

    children = {n: Sealed(e.code + 1, e.values, explode) for n, e in _children().items()}
    with pytest.raises(IntegrityError):
        verify_seal(_seal(), children, _HEADS)
