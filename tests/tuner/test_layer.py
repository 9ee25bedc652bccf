"""One adapted module: its forward and gradients, against the module with the delta written into its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from peft_childtune import (
    ChildTuningConfig,
    UnsupportedError,
    get_deltas,
)
from peft_childtune.tuner import ChildTuningLayer
from peft_childtune.tuner.layer import child_layers


class _Affine(nn.Module):
    """A module of nobody's library that reads its weights by attribute, one of them twice."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x, scale=1.0):
        return torch.tanh(x @ self.weight) @ self.weight.t() * self.gain * scale


def _x(*shape):
    return lambda: torch.randn(*shape)


class _Named(nn.Module):
    """A module whose weights have other names than `weight` and `bias`, and three dimensions, as experts have."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 4, 3))
        self.down = nn.Parameter(torch.randn(2, 3, 4))
        self.act = nn.SiLU()

    def forward(self, x):
        return sum(self.act(x @ self.up[i]) @ self.down[i] for i in range(2))


_KINDS = {
    "linear": (lambda: nn.Linear(4, 5), _x(3, 4)),
    "linear without bias": (lambda: nn.Linear(4, 5, bias=False), _x(2, 3, 4)),
    "conv1d of gpt2": (lambda: Conv1D(5, 4), _x(2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), _x(2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), _x(2, 4, 7, 7)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), _x(2, 4, 7, 7)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), _x(2, 4, 5, 5)),
    "conv2d same reflect": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), _x(2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), _x(1, 2, 4, 4, 4)),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), _x(2, 4, 3, 3)),
    "embedding": (lambda: nn.Embedding(6, 4, padding_idx=1), lambda: torch.tensor([[0, 1, 5], [5, 5, 2]])),
    "sparse embedding": (lambda: nn.Embedding(6, 4, sparse=True), lambda: torch.tensor([[0, 1, 5], [5, 5, 2]])),
    "embedding bag": (lambda: nn.EmbeddingBag(6, 4), lambda: torch.tensor([[0, 1, 5], [5, 5, 2]])),
    "layer norm": (lambda: nn.LayerNorm(4), _x(2, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), _x(2, 4, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(4), _x(6, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), _x(2, 3, 4)),
    "rms norm of llama": (lambda: LlamaRMSNorm(4), _x(2, 3, 4)),
    "bilinear": (lambda: nn.Bilinear(4, 4, 3), _x(2, 4)),
    "prelu": (lambda: nn.PReLU(4), _x(6, 4)),
    "custom": (_Affine, _x(3, 4)),
    "custom names": (_Named, _x(3, 4)),
}


class _Host(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.mod = module

    def forward(self, *args, **kwargs):
        if isinstance(getattr(self.mod, "base_layer", self.mod), nn.Bilinear):
            args = (*args, *args)
        return self.mod(*args, **kwargs)


def _module(kind, dtype=torch.float32):
    torch.manual_seed(0)
    module = _KINDS[kind][0]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.to(dtype)


def _wrap(module, *, train=True, **options):
    options = {"score": "random", "density": 0.4, "init_weights": False} | options
    model = get_peft_model(_Host(module), ChildTuningConfig(target_modules=["mod"], **options))
    return model.train(train)


def _layer(model) -> ChildTuningLayer:
    return next(m for m in model.modules() if isinstance(m, ChildTuningLayer))


def _with_delta(module, deltas):
    """A copy of the module with float(W) + delta, rounded once, in its weights, which all require gradients."""
    out = copy.deepcopy(module)
    for name, parameter in out.named_parameters(recurse=False):
        delta = deltas[f"mod.{name}"]
        flat = parameter.detach().clone().view(-1)
        flat[delta.indices] = (flat[delta.indices].float() + delta.values).to(flat.dtype)
        out._parameters[name] = nn.Parameter(flat.view(parameter.shape))
    return out


def _inputs(kind, dtype=torch.float32):
    torch.manual_seed(1)
    x = _KINDS[kind][1]()
    return x.to(dtype) if x.is_floating_point() else x


def _loss(out):
    torch.manual_seed(2)
    return (out.float() * torch.randn(out.shape)).sum()


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_equals_the_module_with_the_delta_in_its_weights(kind, dtype):
    module = _module(kind, dtype)
    if kind == "sparse embedding" and dtype == torch.bfloat16:
        dtype = torch.float32
        module = _module(kind, dtype)
    model = _wrap(module, train=False)
    reference = _Host(_with_delta(module, get_deltas(model)).eval())
    x = _inputs(kind, dtype)
    out = model(x)
    assert torch.equal(out, reference(x))
    assert torch.equal(out, copy.deepcopy(model).merge_and_unload()(x))
    with model.disable_adapter():
        assert torch.equal(model(x), _Host(module.eval())(x))
    assert not torch.equal(out, _Host(module)(x))


@pytest.mark.parametrize("kind", _KINDS)
def test_gradients_equal_those_of_the_dense_module_at_the_childs_positions(kind):
    module = _module(kind)
    model = _wrap(module)
    deltas = get_deltas(model)
    reference = _with_delta(module, deltas).train()
    x = _inputs(kind)
    one, other = (x.clone().requires_grad_(x.is_floating_point()) for _ in range(2))
    _loss(model(one)).backward()
    _loss(_Host(reference)(other)).backward()
    for name, parameter in reference.named_parameters():
        dense = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        values = _layer(model).child_tuning_values["default"].get(name)
        if values is None:
            assert deltas[f"mod.{name}"].nnz == 0
            continue
        expected = dense.view(-1)[deltas[f"mod.{name}"].indices]
        # the same products in another order of summation: some units in the last place of float32
        torch.testing.assert_close(values.grad, expected, rtol=1e-5, atol=1e-5)
    if x.is_floating_point():
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("kind", ["linear", "conv1d of gpt2", "conv2d", "layer norm", "embedding", "custom"])
def test_under_autocast_outputs_and_gradients_agree_with_the_dense_module(kind):
    module = _module(kind)
    model = _wrap(module)
    deltas = get_deltas(model)
    reference = _with_delta(module, deltas)
    x = _inputs(kind)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(x), _Host(reference)(x)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)
    _loss(out).backward()
    _loss(expected).backward()
    for name, parameter in reference.named_parameters():
        values = _layer(model).child_tuning_values["default"].get(name)
        if values is not None:
            assert values.grad.dtype == torch.float32
            kept = parameter.grad.view(-1)[deltas[f"mod.{name}"].indices]
            # products of bfloat16 numbers, 8 bits of mantissa, in either order
            torch.testing.assert_close(values.grad, kept, rtol=3e-2, atol=3e-2)


def test_the_statistics_of_a_batch_norm_are_updated_in_the_base_as_ever():
    module = _module("batch norm")
    reference = _with_delta(module, get_deltas(_wrap(copy.deepcopy(module)))).train()
    model = _wrap(module)
    for _ in range(3):
        x = torch.randn(6, 4)
        model(x)
        reference(x)
    assert torch.equal(module.running_mean, reference.running_mean)
    assert torch.equal(module.running_var, reference.running_var)
    assert module.num_batches_tracked.item() == 3


class _Ignores(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.alias = [self.weight]

    def forward(self, x):
        return x * self.alias[0]


def test_a_module_that_reads_its_weight_by_another_way_is_refused_instead_of_ignored():
    model = _wrap(_Ignores())
    with pytest.raises(UnsupportedError, match=r"^mod: .*`weight`"):
        model(torch.randn(2, 4))


def test_a_forward_that_reads_a_weight_only_sometimes_is_judged_by_what_it_reads():
    class Sometimes(_Affine):
        def forward(self, x, use_gain=True):
            return x @ self.weight * (self.gain if use_gain else 1.0)

    model = _wrap(Sometimes())
    model(torch.randn(2, 4))
    with_gain = model(torch.ones(1, 4))
    assert not torch.equal(model(torch.ones(1, 4), use_gain=False), with_gain)


@pytest.mark.parametrize("kind", ["linear", "conv1d of gpt2", "conv2d", "layer norm", "embedding"])
def test_hooks_on_the_module_run_whether_an_adapter_is_active_or_not(kind):
    module, seen = _module(kind), []
    module.register_forward_hook(lambda _m, _args, out: seen.append(out))
    model, x = _wrap(module, train=False), _inputs(kind)
    with model.disable_adapter():
        model(x)
    assert len(seen) == 1
    out = model(x)
    assert len(seen) == 2
    assert torch.equal(seen[1], out)


def test_arguments_and_keywords_reach_the_module():
    model = _wrap(_module("custom"))
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x, scale=2.0), 2 * model(x))


def test_a_base_weight_that_was_offloaded_is_refused_by_name():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), ChildTuningConfig(target_modules=["0"], score="random", density=0.5)
    )
    model.base_model.model[0].base_layer.to("meta")
    with pytest.raises(UnsupportedError, match=r"0\.weight: the base weight is on the meta device"):
        model(torch.randn(1, 4))


def test_adapted_layers_are_found_once_in_the_order_of_the_model_and_inside_of_each_other():
    shared = nn.Linear(4, 4)
    base = nn.ModuleDict({"b": shared, "a": nn.MultiheadAttention(4, 2), "c": nn.Sequential(shared)})
    config = ChildTuningConfig(target_modules=["b", "a", "out_proj"], score="random", density=0.5)
    model = get_peft_model(base, config)
    expected = [m for m in model.modules() if isinstance(m, ChildTuningLayer)]
    assert [id(layer) for layer in child_layers(model)] == [id(layer) for layer in expected]
    assert len(expected) == 3
