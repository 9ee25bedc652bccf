"""Training changes the child and nothing else, bit for bit: the promise of the method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_childtune import get_child_network
from tests.contract.families import FAMILIES, base_state, bits, same_bits, snapshot, train, wrap

CHOICES = {
    "fisher": {"score": "fisher"},
    "fisher_batch": {"score": "fisher_batch"},
    "gradient": {"score": "gradient"},
    "magnitude": {"score": "magnitude"},
    "random": {"score": "random"},
    "task_free": {"mode": "task_free"},
}
GRANULARITIES = ("element", "row", "column", "block")
CAUSES = [(c, g) for c in CHOICES for g in GRANULARITIES]


def changed_positions(before: Tensor, after: Tensor) -> set[int]:
    """Return the flat positions at which two fp32 tensors differ in any bit."""
    return set((bits(before).view(-1, 4) != bits(after).view(-1, 4)).any(1).nonzero().flatten().tolist())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize(("choice", "granularity"), CAUSES)
def test_twenty_steps_of_decaying_clipped_adamw_change_the_child_and_no_other_bit(name, choice, granularity):
    family = FAMILIES[name]
    base = family.build()
    before = snapshot(base)
    model = wrap(base, family, granularity=granularity, block_size=8, **CHOICES[choice])
    child = get_child_network(model).indices

    train(model, family.batches(), steps=20)

    untouched = base_state(model)
    assert set(untouched) == set(before)
    assert [n for n in before if not same_bits(before[n], untouched[n])] == []
    merged = model.merge_and_unload().state_dict()
    assert set(merged) == set(before)
    moved = 0
    for key in before:
        if key.startswith(family.heads):
            continue
        outside = changed_positions(before[key], merged[key]) - set(child.get(key, torch.zeros(0)).tolist())
        assert not outside, key
        moved += len(changed_positions(before[key], merged[key]))
    assert moved > 0.9 * sum(len(indices) for indices in child.values())  # the child itself was trained


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_child_resampled_at_each_step_leaves_everything_that_is_not_covered_bit_equal(name):
    family = FAMILIES[name]
    base = family.build()
    before = snapshot(base)
    model = wrap(base, family, mode="task_free", resample=True)
    covered = get_child_network(model).shapes

    train(model, family.batches(), steps=20)

    untouched = base_state(model)
    assert [n for n in before if not same_bits(before[n], untouched[n])] == []
    merged = model.merge_and_unload().state_dict()
    changed = {key for key in before if not same_bits(before[key], merged[key]) and not key.startswith(family.heads)}
    assert changed == set(covered)


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_structured_child_keeps_whole_neurons_inputs_or_tiles(name, granularity):
    family = FAMILIES[name]
    model = wrap(family.build(), family, granularity=granularity, block_size=8)
    network = get_child_network(model)
    transposed = name == "gpt2"  # Conv1D stores (in, out)
    partial = 0
    for key, shape in network.shapes.items():
        if len(shape) != 2:
            continue
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[network.indices[key]] = True
        if granularity == "block":
            tiles = mask.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2)
        else:
            tiles = mask.t() if (granularity == "column") != transposed else mask
        assert bool((tiles.all(-1) | ~tiles.any(-1)).all()), key
        partial += bool(tiles.any()) and not bool(tiles.all())
    assert partial  # some tensor is kept in part, so that the claim says something
