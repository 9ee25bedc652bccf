"""The seal vouches for every bit of an adapter and for the base it was made for."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from peft_childtune import BaseMismatchError, DeltaError, FormatError, IntegrityError
from peft_childtune.seal import Sealed, make_seal
from peft_childtune.verification import skip_verification, verify_seal
from peft_childtune.weights import fingerprint

from .sealing import BASES, CONFIG, HEADS, children, seal


def test_what_was_sealed_is_accepted():
    verify_seal(seal(), children(), HEADS)


def test_the_order_of_the_tensors_does_not_matter():
    turned = {name: children()[name] for name in reversed(BASES)}
    assert torch.equal(make_seal(turned, dict(reversed(HEADS.items())), config=CONFIG), seal())
    verify_seal(seal(), turned, HEADS)


@pytest.mark.parametrize(
    "children",
    [
        children(codes={"b": [1, 3]}),
        children(codes={"b": [1, 2, 0]}),
        children(values={"b": [1.0, 0.0, 3.0]}),
        children(values={"b": [1.0, -0.0, 3.0000002]}),
        children(codes={"b": []}, values={"b": []}),
    ],
    ids=["code", "longer code", "sign of zero", "last bit", "gone"],
)
def test_a_changed_child_is_refused_by_name(children):
    with pytest.raises(IntegrityError, match="^b: "):
        verify_seal(seal(), children, HEADS)


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
        verify_seal(seal(), children(), HEADS | {name: tensor})


def test_two_heads_of_the_same_size_cannot_be_exchanged():
    heads = {"one": torch.randn(3), "two": torch.randn(3)}
    seal = make_seal(children(), heads, config=CONFIG)
    with pytest.raises(IntegrityError):
        verify_seal(seal, children(), {"one": heads["two"], "two": heads["one"]})


def test_two_children_of_the_same_size_cannot_be_exchanged():
    base = {"one": torch.ones(5), "two": torch.ones(5)}
    code, indices = torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([0])
    children = {
        n: Sealed(code, torch.tensor([v]), partial(fingerprint, base[n], indices))
        for n, v in [("one", 1.0), ("two", 2.0)]
    }
    seal = make_seal(children, {}, config=CONFIG)
    with pytest.raises(IntegrityError):
        verify_seal(seal, {"one": children["two"], "two": children["one"]}, {})


@pytest.mark.parametrize("name", ["a.weight", "a.bias", "b"])
def test_another_base_is_refused_by_name(name):
    other = dict(BASES)
    other[name] = other[name].clone()
    other[name].view(-1)[0] += 0.5
    with pytest.raises(BaseMismatchError, match=f"^{name}: "):
        verify_seal(seal(), children(bases=other), HEADS)


def test_missing_and_surplus_tensors_are_refused():
    fewer, more = dict(children()), dict(children())
    fewer.pop("b")
    more["c"] = more["b"]
    for found in (fewer, more):
        with pytest.raises(IntegrityError):
            verify_seal(seal(), found, HEADS)
    for heads in ({}, {"head.weight": HEADS["head.weight"]}, HEADS | {"more": torch.zeros(1)}):
        with pytest.raises(IntegrityError):
            verify_seal(seal(), children(), heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_saved_narrow_are_accepted_when_a_loader_widens_them(dtype):
    seal = make_seal(children(dtype=dtype), {}, config=CONFIG)
    verify_seal(seal, children(dtype=dtype), {})
    widened = {
        name: Sealed(entry.code, entry.values.to(torch.float32), entry.fingerprint)
        for name, entry in children(dtype=dtype).items()
    }
    verify_seal(seal, widened, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_recognised_and_said_to_be_rounded(dtype, caplog):
    with caplog.at_level(logging.WARNING, logger="peft_childtune.verification"):
        verify_seal(seal(), children(), HEADS)
        assert not caplog.text
        verify_seal(seal(), children(bases={n: b.to(dtype) for n, b in BASES.items()}), HEADS)
    assert "a.weight and 2 more tensors of the base have another precision" in caplog.text


def test_bfloat16_against_float16_warns_that_nothing_was_verified(caplog):
    seal = make_seal(children(bases={n: b.bfloat16() for n, b in BASES.items()}), {}, config=CONFIG)
    with caplog.at_level(logging.WARNING, logger="peft_childtune.verification"):
        verify_seal(seal, children(bases={n: b.half() for n, b in BASES.items()}), {})
    assert "could not be verified" in caplog.text
    assert "2 more" in caplog.text


def test_a_base_is_looked_at_only_after_the_file_proved_sound():
    def explode():
        raise AssertionError("decoded a code that was not verified")

    damaged = {n: Sealed(e.code + 1, e.values, explode) for n, e in children().items()}
    with pytest.raises(IntegrityError):
        verify_seal(seal(), damaged, HEADS)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_delta_that_is_not_finite_is_refused_by_name(number):
    odd = children(values={"b": [1.0, number, 3.0]})
    with pytest.raises(DeltaError, match="^b: 1 of its 3 deltas are not finite"):
        verify_seal(make_seal(odd, {}, config=CONFIG), odd, {})


def test_subnormals_and_the_sign_of_zero_are_part_of_a_delta():
    small = children(values={"b": [1e-45, -0.0, 0.0]})
    saved = make_seal(small, {}, config=CONFIG)
    verify_seal(saved, small, {})
    for values in ([0.0, -0.0, 0.0], [1e-45, 0.0, 0.0]):
        with pytest.raises(IntegrityError, match="^b: "):
            verify_seal(saved, children(values={"b": values}), {})


def test_a_configuration_of_another_save_is_refused():
    verify_seal(seal(), children(), HEADS, config=CONFIG)
    with pytest.raises(IntegrityError, match=r"adapter_config\.json: .*do not belong together"):
        verify_seal(seal(), children(), HEADS, config=bytes(16))


def test_the_base_that_an_adapter_was_made_for_is_named():
    other = {**BASES, "b": BASES["b"] * 1.01}
    with pytest.raises(BaseMismatchError, match="^b: .*load it onto 'org/model', revision 'v2'"):
        verify_seal(seal(), children(bases=other), HEADS, made_for="'org/model', revision 'v2'")


@pytest.mark.parametrize(
    ("saved", "found", "said"),
    [
        (seal(), children(bases={**BASES, "b": BASES["b"] * 1.01}), "b: the base weights differ"),
        (seal(), children(values={"b": [1.0, 2.0, 3.0]}), "b: the stored child differs"),
        (seal()[:9], children(), "is not a seal"),
        (seal(), {"b": children()["b"]}, "2 of the 3 base tensors"),
    ],
)
def test_verification_is_skipped_only_on_request_and_says_what_it_found(saved, found, said, caplog):
    with pytest.raises((FormatError, BaseMismatchError), match=said):
        verify_seal(saved, found, HEADS)
    with caplog.at_level(logging.WARNING, logger="peft_childtune.verification"), skip_verification():
        verify_seal(saved, found, HEADS)
    assert "skip_verification: adapters are loaded here even if" in caplog.text
    assert said in caplog.text
    with pytest.raises((FormatError, BaseMismatchError), match=said):
        verify_seal(saved, found, HEADS)


def test_a_code_that_cannot_be_decoded_is_refused_even_without_verification():
    def broken():
        raise FormatError("b: the code is cut off")

    odd = {n: Sealed(e.code, e.values, broken if n == "b" else e.fingerprint) for n, e in children().items()}
    with skip_verification(), pytest.raises(FormatError, match="cut off"):
        verify_seal(seal(), odd, HEADS)
