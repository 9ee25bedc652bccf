"""What surrounds an adapted model: inference mode, replicas, optimizers, changes in place, patched forwards."""

from __future__ import annotations

import sys
from types import MethodType

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_childtune import (
    ChildNetwork,
    ChildTuningConfig,
    ConfigError,
    SelectionError,
    UnsupportedError,
    get_child_network,
    get_deltas,
    select_child_network,
)


def _wrapped(base, **options):
    return get_peft_model(base, ChildTuningConfig(**({"score": "magnitude", "density": 0.4} | options)))


def test_a_model_that_answered_in_inference_mode_can_be_trained(toy, batches):
    model = _wrapped(toy())
    with torch.inference_mode():
        model.eval()(**batches[0])
    model.train()(**batches[0]).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "child_tuning_values" in n)


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_of_a_linear_layer_may_be_changed_in_place(bias):
    base = nn.ModuleDict({"fc": nn.Linear(4, 4, bias=bias)})
    layer = _wrapped(base, target_modules=["fc"], init_weights=False).base_model.model["fc"]
    x = torch.randn(2, 3, 4)
    expected = layer(x).relu()
    assert torch.equal(layer(x).relu_(), expected)


def test_a_replica_of_data_parallel_is_refused_with_the_way_out(toy, batches, monkeypatch):
    module = sys.modules["torch.nn.parallel.replicate"]
    copies = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    replica = module.replicate(_wrapped(toy()), [0, 1])[1]
    with pytest.raises(UnsupportedError, match="accelerate launch"):
        replica(**batches[0])


def test_an_optimizer_of_a_child_that_was_replaced_is_refused_at_its_next_step(toy, batches):
    model = _wrapped(toy())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    select_child_network(
        model, network=get_child_network(_wrapped(toy(), score="random", scope="tensor", density=0.2))
    )
    model.train()(**batches[0]).loss.backward()
    with pytest.raises(SelectionError, match="after `select_child_network`"):
        optimizer.step()


def test_an_optimizer_of_a_child_of_the_same_sizes_trains_the_new_one(toy, batches):
    model = _wrapped(toy(), scope="tensor", score="random")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    other: ChildNetwork = get_child_network(_wrapped(toy(), scope="tensor", score="random", seed=1))
    select_child_network(model, network=other)
    model.train()(**batches[0]).loss.backward()
    optimizer.step()
    assert all(bool(delta.values.any()) for delta in get_deltas(model).values())


def test_a_child_copied_into_the_buffers_in_place_is_the_one_that_is_used(toy, batches):
    """As DistributedDataParallel does from its first process to the others."""
    first, second = (
        _wrapped(toy(), score="random", scope="tensor", seed=seed, init_weights=False).eval() for seed in (0, 1)
    )
    second(**batches[0])
    with torch.no_grad():
        for name, tensor in first.state_dict().items():
            second.state_dict()[name].copy_(tensor)
    assert torch.equal(second(**batches[0]).logits, first(**batches[0]).logits)


def test_a_forward_that_others_bind_to_the_layer_sees_the_delta(toy, batches):
    """As Liger kernels do: its norm reads `self.weight`."""
    model = _wrapped(toy(), init_weights=False).eval()
    expected = model(**batches[0]).logits
    norm = model.base_model.model.layers[0].norm
    norm.forward = MethodType(lambda self, x: F.layer_norm(x, (6,), self.weight, self.bias, self.eps), norm)
    assert torch.equal(model(**batches[0]).logits, expected)


@pytest.mark.parametrize("child", [[1], "text", 3])
def test_a_damaged_list_of_sizes_is_refused(child):
    with pytest.raises(ConfigError, match="^child=.*table of sizes"):
        ChildTuningConfig(child=child)
