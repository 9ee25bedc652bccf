"""What is adapted when nobody says, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

from peft_childtune import ChildTuningConfig, TargetError, get_child_network
from peft_childtune.tuner.targets import block_names, block_of, default_targets, unsupported_reason


def _names(prefix: str, blocks: int, *modules: str) -> set[str]:
    return {f"{prefix}.{i}.{module}" for i in range(blocks) for module in modules}


_ATTENTION = [f"attention.self.{n}" for n in ("query", "key", "value")]
_EXPECTED = {
    "bert": _names(
        "bert.encoder.layer",
        2,
        *_ATTENTION,
        *("attention.output.dense", "attention.output.LayerNorm"),
        *("intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
    "gpt2": _names("transformer.h", 2, "ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
    "llama": _names(
        "model.layers",
        2,
        *(f"self_attn.{n}_proj" for n in "qkvo"),
        *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
        *("input_layernorm", "post_attention_layernorm"),
    ),
    "t5": {
        *_names(
            "encoder.block",
            2,
            *(f"layer.0.SelfAttention.{n}" for n in "qkvo"),
            *("layer.0.layer_norm", "layer.1.layer_norm", "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
        ),
        *_names(
            "decoder.block",
            2,
            *(f"layer.0.SelfAttention.{n}" for n in "qkvo"),
            *(f"layer.1.EncDecAttention.{n}" for n in "qkvo"),
            *(f"layer.{i}.layer_norm" for i in range(3)),
            *("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
        ),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    },
    "vit": _names(
        "vit.layers",
        2,
        *(f"attention.{n}_proj" for n in "qkvo"),
        *("layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"),
    ),
    "mixtral": _names(
        "model.layers",
        2,
        *(f"self_attn.{n}_proj" for n in "qkvo"),
        *("mlp.gate", "mlp.experts"),  # the experts own three-dimensional weights; all they hold is an activation
        *("input_layernorm", "post_attention_layernorm"),
    ),
    "albert": _names(
        "albert.encoder.albert_layer_groups.0.albert_layers",
        1,
        *(f"attention.{n}" for n in ("query", "key", "value", "dense", "LayerNorm")),
        *("ffn", "ffn_output", "full_layer_layer_norm"),
    ),
}


@pytest.mark.parametrize("name", _EXPECTED)
def test_by_default_everything_inside_the_blocks_is_adapted_and_nothing_else(family, name):
    model = family(name)
    found = default_targets(model)
    assert len(found) == len(set(found))
    assert set(found) == _EXPECTED[name]


@pytest.mark.parametrize("name", _EXPECTED)
def test_the_child_covers_weights_biases_and_norms_of_the_blocks(family, name):
    expected = {
        n: tuple(p.shape) for n, p in family(name).named_parameters() if n.rpartition(".")[0] in _EXPECTED[name]
    }
    model = get_peft_model(family(name), ChildTuningConfig(score="magnitude"))
    assert get_child_network(model).shapes == expected


def test_a_model_without_blocks_asks_for_names(bits):
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    before = bits(base)
    with pytest.raises(TargetError, match=r"target_modules"):
        get_peft_model(base, ChildTuningConfig(score="magnitude"))
    assert bits(base) == before
    assert all(p.requires_grad for p in base.parameters())


def _block() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def test_blocks_are_the_items_of_the_outermost_lists():
    model = nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
            "body": nn.ModuleDict({"stage": nn.ModuleList([nn.ModuleDict({"inner": nn.ModuleList([_block()])})])}),
            "heads": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
            "empty": nn.ModuleList(),
        }
    )
    assert block_names(model) == ["body.stage.0"]


@pytest.mark.parametrize(
    ("name", "block"),
    [("layers.1.fc.weight", "layers.1"), ("layers.10.fc", "layers.10"), ("layers.1", ""), ("xlayers.1.fc", "")],
)
def test_a_tensor_lies_in_the_block_whose_whole_name_it_starts_with(name, block):
    assert block_of(name, ["layers.1", "layers.10"]) == block


class _Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2))
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(x) * self.gain


def test_what_cannot_be_adapted_is_left_out_with_a_warning(caplog):
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(_Bare(), nn.LSTM(2, 2)) for _ in range(2)])})
    assert default_targets(model) == ["layers.0.0.fc", "layers.1.0.fc"]
    assert "layers.0.1 is left out" in caplog.text
    assert "layers.0.0 is left out" in caplog.text


def _int8() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    return layer


def _old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(2, 2))


def _own_forward() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: 2 * nn.functional.linear(x, layer.weight, layer.bias)
    return layer


_REFUSED = {
    "own forward": (_own_forward, "mod", "set on the instance"),
    "int8": (_int8, "mod", "int8"),
    "parametrised": (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "mod", "parametri"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(2, 2)), "mod", "parametri"),
    "old weight norm": (_old_weight_norm, "mod", "parametri"),
    "recurrent": (lambda: nn.GRU(2, 2), "mod", "fused call"),
    "max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0), "mod", "max_norm"),
    "bag max_norm": (lambda: nn.EmbeddingBag(3, 2, max_norm=1.0), "mod", "max_norm"),
    "no weights": (nn.ReLU, "mod", "no weights of its own"),
    "container": (lambda: nn.Sequential(nn.Linear(2, 2)), "mod", "no weights of its own"),
}


@pytest.mark.parametrize("what", _REFUSED)
def test_a_module_that_would_be_adapted_wrongly_is_refused_and_the_model_restored(what, bits):
    make, target, message = _REFUSED[what]
    base = nn.ModuleDict({"first": nn.Linear(2, 2), "mod": make()})
    base["first"].bias.requires_grad_(False)
    before, flags = bits(base), [p.requires_grad for p in base.parameters()]
    kinds = [type(m) for m in base.modules()]
    with pytest.raises(TargetError, match=message) as caught:
        get_peft_model(base, ChildTuningConfig(score="magnitude", target_modules=["first", target]))
    assert target in str(caught.value)
    assert bits(base) == before
    assert [p.requires_grad for p in base.parameters()] == flags
    assert [type(m) for m in base.modules()] == kinds
    assert not hasattr(base, "peft_config")


def test_one_absent_name_among_several_is_refused_and_the_model_restored(toy, bits):
    base = toy()
    base.embed.weight.requires_grad_(False)
    before, flags = bits(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(TargetError, match="'fcc'"):
        get_peft_model(base, ChildTuningConfig(score="magnitude", target_modules=["fc", "fcc"]))
    assert bits(base) == before
    assert [p.requires_grad for p in base.parameters()] == flags
    assert get_peft_model(base, ChildTuningConfig(score="magnitude", target_modules=["fc"]))


def test_names_that_match_nothing_at_all_are_refused(toy):
    with pytest.raises(ValueError, match="fcc"):
        get_peft_model(toy(), ChildTuningConfig(score="magnitude", target_modules=["fcc"]))


_FIRST, _LAST = {"layers.0.fc", "layers.0.norm"}, {"layers.1.fc", "layers.1.norm"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["fc"]}, {"layers.0.fc", "layers.1.fc"}),
        ({"target_modules": ["body.layers.1.fc"]}, {"layers.1.fc"}),
        ({"target_modules": r".*\.0\.(fc|norm)"}, _FIRST),
        ({"target_modules": ["fc"], "layers_to_transform": [1]}, {"layers.1.fc"}),
        ({"target_modules": ["fc"], "layers_to_transform": 0}, {"layers.0.fc"}),
        ({"target_modules": ["fc"], "layers_to_transform": [0], "layers_pattern": "layers"}, {"layers.0.fc"}),
        (
            {"target_modules": ["body.layers.0.fc", "body.layers.1.fc"], "layers_to_transform": [1]},
            {"layers.1.fc"},
        ),
        ({"target_modules": ["fc"], "exclude_modules": ["layers.0.fc"]}, {"layers.1.fc"}),
        ({"target_modules": ["fc"], "exclude_modules": r".*\.0\..*"}, {"layers.1.fc"}),
        ({"layers_to_transform": [1]}, _LAST),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, _FIRST),
        ({"layers_to_transform": 0, "layers_pattern": ["h", "layers"]}, _FIRST),
        ({"exclude_modules": ["norm"]}, {"layers.0.fc", "layers.1.fc"}),
        ({"target_modules": ["embed", "head"]}, {"embed", "head"}),
    ],
)
def test_names_blocks_and_exclusions_are_honoured(toy, options, expected):
    model = get_peft_model(nn.ModuleDict({"body": toy()}), ChildTuningConfig(score="magnitude", **options))
    assert {name.rpartition(".")[0].removeprefix("body.") for name in get_child_network(model).shapes} == expected


@pytest.mark.parametrize("targets", [None, ["fc", "norm"]])
def test_blocks_can_be_numbered_where_their_list_is_at_the_top_of_the_model(toy, targets):
    config = ChildTuningConfig(score="magnitude", target_modules=targets, layers_to_transform=[1])
    model = get_peft_model(toy(), config)
    assert {name.rpartition(".")[0] for name in get_child_network(model).shapes} == _LAST


@pytest.mark.parametrize(
    "options", [{"layers_to_transform": [7]}, {"layers_to_transform": [0], "layers_pattern": "h"}]
)
def test_blocks_that_do_not_exist_are_refused(toy, options):
    with pytest.raises(TargetError, match="layers_to_transform"):
        get_peft_model(toy(), ChildTuningConfig(score="magnitude", **options))


def test_all_linear_leaves_the_head_of_a_classifier_out(family):
    model = get_peft_model(
        family("bert"), ChildTuningConfig(task_type="SEQ_CLS", score="magnitude", target_modules="all-linear")
    )
    covered = {name.rpartition(".")[0] for name in get_child_network(model).shapes}
    linears = {n for n, m in family("bert").named_modules() if isinstance(m, nn.Linear)}
    assert covered == linears - {"classifier"}


def test_a_second_adapter_covers_the_same_modules_by_default(toy):
    config = ChildTuningConfig(score="magnitude")
    model = get_peft_model(toy(), config)
    model.add_adapter("other", ChildTuningConfig(score="random"))
    assert get_child_network(model, "other").shapes == get_child_network(model).shapes


def test_half_precision_weights_can_be_adapted_and_complex_ones_cannot():
    assert unsupported_reason(nn.Linear(2, 2).half()) is None
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    assert "complex" in unsupported_reason(layer)


def test_a_mixture_of_experts_works_with_its_router_and_experts_adapted(family):
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    config = ChildTuningConfig(
        score="random", density=0.2, init_weights=False, target_modules=["gate", "experts", "q_proj"]
    )
    base = family("mixtral")
    expected = base(input_ids=ids, labels=ids, output_router_logits=True)
    model = get_peft_model(family("mixtral"), config).eval()
    out = model(input_ids=ids, labels=ids, output_router_logits=True)
    assert len(out.router_logits) == len(expected.router_logits) == 2
    assert not torch.equal(out.logits, expected.logits)
    merged = model.merge_and_unload()(input_ids=ids, labels=ids, output_router_logits=True)
    assert torch.equal(merged.logits, out.logits)
    assert torch.equal(merged.aux_loss, out.aux_loss)
