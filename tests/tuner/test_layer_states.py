"""The states of an adapted module: not selected, active, merged, disabled, several adapters, copies."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from peft_childtune import (
    ChildNetwork,
    ChildTuningConfig,
    SelectionError,
    UnsupportedError,
    get_child_network,
    get_deltas,
    select_child_network,
)
from peft_childtune.tuner import ChildTuningLayer

_KINDS = {
    "linear": (lambda: nn.Linear(4, 5), lambda: torch.randn(3, 4)),
    "conv1d of gpt2": (lambda: Conv1D(5, 4), lambda: torch.randn(2, 3, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 7, 7)),
    "embedding": (lambda: nn.Embedding(6, 4, padding_idx=1), lambda: torch.tensor([[0, 1, 5], [5, 5, 2]])),
    "layer norm": (lambda: nn.LayerNorm(4), lambda: torch.randn(2, 3, 4)),
}


class _Host(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.mod = module

    def forward(self, *args):
        return self.mod(*args)


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


def test_before_the_selection_training_raises_with_the_call_to_make_and_evaluating_gives_the_base():
    module = _module("linear")
    model = _wrap(module, score="fisher")
    x = _inputs("linear")
    with pytest.raises(SelectionError, match=r"select_child_network\(model, train_dataloader\)"):
        model(x)
    assert torch.equal(model.eval()(x), module(x))
    for call in (lambda: model.merge_and_unload(), lambda: get_child_network(model), lambda: get_deltas(model)):
        with pytest.raises(SelectionError, match=r"select_child_network\(model"):
            call()


def test_the_advice_names_the_adapter_that_lacks_a_child():
    model = _wrap(_module("linear"))
    model.add_adapter("second", ChildTuningConfig(target_modules=["mod"], score="fisher"))
    model.set_adapter("second")
    with pytest.raises(SelectionError, match="adapter_name='second'"):
        model.train()(_inputs("linear"))


def test_disabled_comes_before_merged_and_merged_before_active():
    module = _module("linear")
    base_bits = module.weight.detach().clone()
    model = _wrap(module, train=False)
    x = _inputs("linear")
    active, base = model(x), _Host(copy.deepcopy(module))(x)
    assert not torch.equal(active, base)
    model.merge_adapter()
    assert not torch.equal(module.weight, base_bits)
    assert torch.equal(model(x), active)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
        assert torch.equal(module.weight, base_bits)  # unmerged on the way, as PEFT's own layers do


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_and_unmerging_any_number_of_times_restores_the_base_bit_for_bit(dtype):
    module = _module("linear", dtype)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    model = _wrap(module, train=False)
    for _ in range(4):
        model.merge_adapter()
        model.unmerge_adapter()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.view(torch.uint8), before[name].view(torch.uint8))


def _two(dtype=torch.float32):
    module = _module("linear", dtype)
    model = _wrap(module, train=False, seed=1)
    model.add_adapter(
        "second", ChildTuningConfig(target_modules=["mod"], score="random", density=0.6, seed=2, init_weights=False)
    )
    for layer in model.modules():
        if isinstance(layer, ChildTuningLayer):
            layer.set_adapter(["default", "second"])
    return module, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]])
def test_two_active_adapters_are_composed_in_order_with_a_rounding_after_each(dtype, order):
    module, model = _two(dtype)
    _layer(model).set_adapter(order)
    reference = _with_delta(_with_delta(module, get_deltas(model, order[0])), get_deltas(model, order[1]))
    x = _inputs("linear", dtype)
    assert torch.equal(model(x), reference(x))
    before = module.weight.detach().clone()
    model.base_model.merge_adapter(order)
    assert torch.equal(module.weight, reference.weight)
    assert torch.equal(model(x), reference(x))
    model.unmerge_adapter()
    assert torch.equal(module.weight, before)


def test_an_adapter_that_is_not_active_takes_no_part():
    _, model = _two()
    x = _inputs("linear")
    both = model(x)
    model.set_adapter("second")
    second = model(x)
    model.delete_adapter("default")
    assert not torch.equal(both, second)
    assert torch.equal(model(x), second)


def test_a_merge_that_is_not_finite_leaves_the_layer_as_it_was():
    module = _module("linear")
    before = module.weight.detach().clone()
    model = _wrap(module, train=False)
    with torch.no_grad():
        _layer(model).child_tuning_values["default"].get("weight")[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.base_model.merge_adapter(safe_merge=True)
    assert torch.equal(module.weight, before)
    assert not _layer(model).merged
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(module.weight, before)


def test_merging_twice_and_unmerging_without_a_merge_warn():
    model = _wrap(_module("linear"), train=False)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="lready"):
        model.merge_adapter()


@pytest.mark.parametrize("kind", ["linear", "conv1d of gpt2", "conv2d", "embedding", "layer norm"])
def test_the_delta_weight_is_dense_and_zero_outside_the_child(kind):
    module = _module(kind)
    model = _wrap(module)
    delta = get_deltas(model)["mod.weight"]
    expected = torch.zeros(module.weight.numel())
    expected[delta.indices] = delta.values
    found = _layer(model).get_delta_weight("default")
    assert torch.equal(found, expected.view(module.weight.shape))
    assert 0 < found.count_nonzero() < found.numel()


@pytest.mark.parametrize(
    ("kind", "features"),
    [
        ("linear", (4, 5)),
        ("conv1d of gpt2", (4, 5)),
        ("conv2d", (4, 6)),
        ("embedding", (6, 4)),
        ("layer norm", (4, 4)),
    ],
)
def test_a_layer_knows_its_features(kind, features):
    layer = _layer(_wrap(_module(kind)))
    assert (layer.in_features, layer.out_features) == features


def test_attributes_of_the_module_can_be_read_through_the_layer():
    layer = _layer(_wrap(_module("embedding")))
    assert (layer.num_embeddings, layer.padding_idx) == (6, 1)
    assert layer.weight.shape == layer.get_base_layer().weight.shape
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


@pytest.mark.parametrize(
    ("kind", "name"), [("linear", "Linear"), ("conv1d of gpt2", "Linear"), ("layer norm", "Module")]
)
def test_linear_layers_are_called_so(kind, name):
    assert type(_layer(_wrap(_module(kind)))).__name__ == name


def test_the_deltas_stay_float32_on_a_half_precision_base():
    model = _wrap(_module("linear", torch.bfloat16))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    assert {p.ndim for p in trainable} == {1}
    assert sum(p.numel() for p in trainable) == get_child_network(model).nnz


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_computes_the_same_and_shares_nothing(copied):
    model = _plain()
    x = torch.randn(3, 4)
    expected = model(x)
    other = copied(model)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(x), expected)


def _plain():
    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    config = ChildTuningConfig(target_modules=["0", "1"], score="random", density=0.5, init_weights=False)
    return get_peft_model(base, config).eval()


def test_adapter_names_in_a_batch_are_refused():
    model = _plain()
    with pytest.raises(UnsupportedError, match="set_adapter"):
        model(torch.randn(1, 4), adapter_names=["default"])


def test_a_new_adapter_changes_nothing_and_one_with_random_values_does():
    x, module = _inputs("linear"), _module("linear")
    fresh = _wrap(copy.deepcopy(module), init_weights=True)
    assert torch.equal(fresh(x), module(x))
    assert not torch.equal(_wrap(copy.deepcopy(module))(x), module(x))


def test_a_tensor_of_which_nothing_was_kept_owns_no_parameter():
    model = _wrap(_module("linear"), score="fisher", init_weights=True)
    empty = torch.zeros(0, dtype=torch.int64)
    shapes = {"mod.weight": (5, 4), "mod.bias": (5,)}
    for indices in (
        {"mod.weight": torch.tensor([2]), "mod.bias": empty},
        {"mod.weight": empty, "mod.bias": torch.tensor([2])},
    ):
        select_child_network(model, network=ChildNetwork.from_indices(indices, shapes))
        assert [p.numel() for p in model.parameters() if p.requires_grad] == [1]
        x = _inputs("linear")
        assert torch.equal(model(x), F.linear(x, _layer(model).weight, _layer(model).bias))
        model(x).sum().backward()
    assert get_deltas(model)["mod.weight"].nnz == 0


def test_moving_a_model_casts_neither_code_nor_cache_wrongly():
    module = _module("linear")
    model = _wrap(module, train=False)
    before = get_child_network(model).digest()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.to(torch.bfloat16)
    assert get_child_network(model).digest() == before
    assert model(_inputs("linear", torch.bfloat16)).dtype == torch.bfloat16


def test_layers_that_share_their_input_with_a_sibling_are_told_so():
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40
    )
    model = get_peft_model(BertModel(config), ChildTuningConfig(density=0.5, score="magnitude"))
    owns = {
        name.rpartition("layer.0.")[2]: m._owns_input for name, m in model.named_modules() if hasattr(m, "_owns_input")
    }
    assert owns == {
        "attention.self.query": False,
        "attention.self.key": False,
        "attention.self.value": False,
        "attention.output.dense": True,
        "intermediate.dense": True,
        "output.dense": True,
    }


def test_a_convolution_that_standardises_its_weight_keeps_its_own_forward():
    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight / weight.std(), bias)

    base = nn.Sequential(Standardised(2, 3, 3))
    x = torch.randn(1, 2, 5, 5)
    expected = base(x)
    model = get_peft_model(base, ChildTuningConfig(density=0.5, score="magnitude", target_modules=["0"])).train()
    assert torch.equal(model(x), expected)
