"""One storage has one child, whichever module reaches it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from torch import nn

from peft_childtune import (
    ChildTuningConfig,
    get_child_network,
    get_deltas,
)
from tests.contract.families import (
    FAMILIES,
    add_noise,
    base_state,
    differing,
    output,
    same_bits,
    snapshot,
    wrap,
)

TIED = [
    ("gpt2", ["wte"], "transformer.wte.weight"),
    ("gpt2", ["lm_head"], "transformer.wte.weight"),
    ("gpt2", ["wte", "lm_head"], "transformer.wte.weight"),
    ("t5", ["shared"], "shared.weight"),
    ("t5", ["lm_head"], "shared.weight"),
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(("name", "targets", "tied"), TIED, ids=[f"{n} {'+'.join(t)}" for n, t, _ in TIED])
class TestTiedWeights:
    def build(self, name, targets):
        family = FAMILIES[name]
        base = family.build()
        head = base.get_output_embeddings().weight
        assert head is base.get_input_embeddings().weight  # tied, or the tests say nothing
        return family, wrap(base, family, score="random", target_modules=targets, density=0.5)

    def test_one_storage_has_one_child_that_all_its_users_follow(self, name, targets, tied):
        family, model = self.build(name, targets)
        assert list(get_child_network(model).shapes.values()) == [(64, 32)]
        add_noise(model)
        delta = next(iter(get_deltas(model).values())).to_dense()
        twin = family.build()
        with torch.no_grad():
            twin.get_input_embeddings().weight.add_(delta)
        assert same_bits(output(model, family.batch()), output(twin, family.batch()))

    def test_a_second_adapter_leaves_the_first_one_its_child(self, name, targets, tied):
        family, model = self.build(name, targets)
        add_noise(model)
        alone = output(model, family.batch())
        config = ChildTuningConfig(score="random", target_modules=targets, density=0.25, seed=1)
        model.add_adapter("second", config)
        model.set_adapter("default")
        assert same_bits(output(model, family.batch()), alone)
        assert get_child_network(model, "second").nnz == 512
        model.merge_adapter()
        assert same_bits(output(model, family.batch()), alone)

    def test_merged_equals_unmerged_and_unmerge_restores_the_base(self, name, targets, tied):
        family, model = self.build(name, targets)
        add_noise(model)
        before = base_state(copy.deepcopy(model))
        unmerged = output(model, family.batch())
        model.merge_adapter()
        assert same_bits(output(model, family.batch()), unmerged)
        model.unmerge_adapter()
        assert same_bits(output(model, family.batch()), unmerged)
        assert all(same_bits(before[key], tensor) for key, tensor in base_state(model).items())
        unloaded = model.merge_and_unload()
        assert unloaded.get_output_embeddings().weight is unloaded.get_input_embeddings().weight
        assert same_bits(output(unloaded, family.batch()), unmerged)

    def test_the_gradient_sums_over_all_uses_as_it_does_in_the_dense_model(self, name, targets, tied):
        family, model = self.build(name, targets)
        dense = family.build().train()
        dense(**family.batch()).loss.backward()
        expected = dense.get_input_embeddings().weight.grad.reshape(-1)
        model.train()(**family.batch()).loss.backward()
        (values,) = [p for p in model.parameters() if p.requires_grad]
        (indices,) = get_child_network(model).indices.values()
        # two sums added in another order: a rounding of the larger one
        torch.testing.assert_close(values.grad, expected[indices], rtol=1e-5, atol=1e-7)

    def test_an_adapter_that_is_saved_while_merged_is_not_applied_twice_when_loaded(
        self, name, targets, tied, tmp_path
    ):
        family, model = self.build(name, targets)
        unmerged = output(add_noise(model), family.batch())
        model.merge_adapter()
        model.save_pretrained(tmp_path)
        assert same_bits(output(PeftModel.from_pretrained(family.build(), tmp_path), family.batch()), unmerged)

    def test_a_saved_adapter_holds_the_child_and_not_the_embeddings(self, name, targets, tied, tmp_path):
        family, model = self.build(name, targets)
        add_noise(model).save_pretrained(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 64 * 32 * 4
        loaded = PeftModel.from_pretrained(family.build(), tmp_path)
        native = family.build()
        native.load_adapter(str(tmp_path))
        assert same_bits(output(loaded, family.batch()), output(model, family.batch()))
        assert same_bits(output(native, family.batch()), output(model, family.batch()))


class Shared(nn.Module):
    """One linear module under two names, called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("targets", [["first"], ["first", "second"]], ids="+".join)
def test_a_module_that_is_registered_twice_has_one_child(targets):
    base = Shared()
    before = snapshot(base)
    x = torch.randn(5, 4)
    dense = copy.deepcopy(base)
    model = get_peft_model(base, ChildTuningConfig(target_modules=targets, score="random", density=0.6))
    network = get_child_network(model)
    assert sorted(network.shapes.values()) == [(4,), (4, 4)]
    add_noise(model)
    with torch.no_grad():
        for key, delta in get_deltas(model).items():
            dense.get_parameter(key).add_(delta.to_dense())
    unmerged = model(x)
    assert same_bits(unmerged, dense(x))
    model.merge_adapter()
    assert same_bits(model(x), unmerged)
    model.unmerge_adapter()
    unloaded = model.unload()
    assert differing(unloaded, before) == []
    assert unloaded.first is unloaded.second
