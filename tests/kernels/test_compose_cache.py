"""Composed weights that are kept between evaluations: never a stale one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from peft_childtune.kernels import ComposeCache, Edit, compose_parameter, use_kernels


def _case():
    base = torch.nn.Parameter(torch.randn(4, 6), requires_grad=False)
    edits = [Edit(torch.randn(3), torch.tensor([0, 7, 23], dtype=torch.int32))]
    return base, edits


def test_what_is_kept_is_used_again():
    kept, (base, edits) = ComposeCache(), _case()
    first = kept.compose("weight", base, edits)
    assert torch.equal(first, compose_parameter(base, edits))
    assert kept.compose("weight", base, edits) is first


_CHANGES = {
    "a value": lambda base, edits: edits[0].values.add_(1),
    "a value through .data": lambda base, edits: edits[0].values.data.add_(1),
    "a value through its storage": lambda base, edits: edits[0].values.numpy().__setitem__(1, 9.0),
    "the base": lambda base, edits: base.mul_(2),
    "the storage of the base": lambda base, edits: setattr(base, "data", base.data * 2),
    "the dtype of the base": lambda base, edits: setattr(base, "data", base.data.bfloat16()),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_it_is_composed_again_after_a_change_of(change):
    kept, (base, edits) = ComposeCache(), _case()
    with torch.no_grad():
        kept.compose("weight", base, edits)
        _CHANGES[change](base, edits)
    assert torch.equal(kept.compose("weight", base, edits), compose_parameter(base, edits))


def test_storages_can_still_be_resized_as_fsdp2_does_after_every_forward():
    kept, (base, edits) = ComposeCache(), _case()
    for _ in range(2):
        kept.compose("weight", base, edits)
    assert base.untyped_storage().resizable() and edits[0].values.untyped_storage().resizable()


def test_other_edits_are_other_weights():
    kept, (base, edits) = ComposeCache(), _case()
    kept.compose("weight", base, edits)
    others = [
        [*edits, Edit(torch.randn(1), torch.tensor([2]))],
        [Edit(edits[0].values, torch.tensor([1, 2, 3], dtype=torch.int32))],
        [Edit(edits[0].values.clone(), edits[0].indices)],
        [],
    ]
    for other in others:
        assert torch.equal(kept.compose("weight", base, other), compose_parameter(base, other))


def test_what_was_kept_in_inference_mode_serves_outside_of_it():
    kept, (base, edits) = ComposeCache(), _case()
    with torch.inference_mode():
        weight = kept.compose("weight", base, edits)
    assert not weight.is_inference()
    assert kept.compose("weight", base, edits) is weight


def test_copies_and_pickles_keep_nothing():
    kept, (base, edits) = ComposeCache(), _case()
    weight = kept.compose("weight", base, edits)
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert other.compose("weight", base, edits) is not weight


def test_nothing_is_kept_where_that_is_switched_off():
    kept, (base, edits) = ComposeCache(), _case()
    with use_kernels(compose_cache=False):
        assert kept.compose("weight", base, edits) is not kept.compose("weight", base, edits)


def test_new_storage_at_the_old_address_is_noticed():
    kept, (base, edits) = ComposeCache(), _case()
    with torch.no_grad():
        kept.compose("weight", base, edits)
        for _ in range(20):  # an allocator likes to give out the address that was freed last
            values = torch.randn(4, 6)
            base.data = values
            assert torch.equal(kept.compose("weight", base, edits), compose_parameter(base, edits))
            del values
            base.data = torch.empty(0)


def test_nothing_is_kept_of_a_base_that_is_trained():
    kept, (base, edits) = ComposeCache(), _case()
    base.requires_grad_()
    with torch.no_grad():
        assert kept.compose("weight", base, edits) is not kept.compose("weight", base, edits)
