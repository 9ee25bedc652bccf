"""Which modules a configuration covers."""

from __future__ import annotations

import pytest
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)

from peft_childtune import (
    get_child_network,
)
from tests.contract.families import (
    FAMILIES,
    add_noise,
    config_of,
    differing,
    output,
    same_bits,
    snapshot,
    train,
    wrap,
)


def covered_modules(model):
    return {name.rpartition(".")[0] for name in get_child_network(model).shapes}


LLAMA_LAYER = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
LLAMA_NORMS = {"input_layernorm", "post_attention_layernorm"}
TARGETS = {
    "default": ({}, {f"model.layers.{i}.{n}" for i in (0, 1) for n in LLAMA_LAYER | LLAMA_NORMS}),
    "all-linear": ({"target_modules": "all-linear"}, {f"model.layers.{i}.{n}" for i in (0, 1) for n in LLAMA_LAYER}),
    "names": (
        {"target_modules": ["q_proj", "mlp.up_proj"]},
        {f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")},
    ),
    "full name": ({"target_modules": ["model.layers.1.mlp.up_proj"]}, {"model.layers.1.mlp.up_proj"}),
    "regex": (
        {"target_modules": r".*\.1\..*(q|v)_proj"},
        {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"},
    ),
    "regex for one": ({"target_modules": r"model\.layers\.0\.mlp\.down_proj"}, {"model.layers.0.mlp.down_proj"}),
    "layers of names": (
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"model.layers.1.self_attn.q_proj"},
    ),
    "layers of full names": (
        {
            "target_modules": ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"],
            "layers_to_transform": [0],
        },
        {"model.layers.0.mlp.up_proj"},
    ),
    "layers of the default": (
        {"layers_to_transform": [1]},
        {f"model.layers.1.{n}" for n in LLAMA_LAYER | LLAMA_NORMS},
    ),
    "layers by pattern": (
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"model.layers.0.self_attn.q_proj"},
    ),
    "excluded from the default": (
        {"exclude_modules": ["up_proj", "input_layernorm"]},
        {
            f"model.layers.{i}.{n}"
            for i in (0, 1)
            for n in (LLAMA_LAYER | LLAMA_NORMS) - {"mlp.up_proj", "input_layernorm"}
        },
    ),
    "excluded by regex": (
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*|.*mlp.*"},
        {f"model.layers.1.self_attn.{n}_proj" for n in "qkvo"},
    ),
}


@pytest.mark.parametrize(("options", "expected"), TARGETS.values(), ids=TARGETS)
def test_targets_are_those_that_the_configuration_names(options, expected, tmp_path):
    family = FAMILIES["llama"]
    model = add_noise(wrap(family.build(), family, score="random", **options))
    assert covered_modules(model) == expected
    model.save_pretrained(tmp_path)  # and the saved configuration names the same
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    assert covered_modules(loaded) == expected
    assert same_bits(output(loaded, family.batch()), output(model, family.batch()))


DEFAULTS = {
    "bert": (r"bert\.encoder\.layer\.\d\.", "bert.encoder.layer."),
    "gpt2": (r"transformer\.h\.\d\.", "transformer.h."),
    "t5": (r"(en|de)coder\.block\.\d\.", ".block."),
    "vit": (r"vit\.layers\.\d\.", "vit.layers."),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_covers_every_tensor_of_the_blocks_and_none_outside(name):
    family = FAMILIES[name]
    base = family.build()
    expected = {key for key, _ in base.named_parameters() if DEFAULTS[name][1] in key}
    assert expected
    assert set(get_child_network(wrap(base, family, score="random")).shapes) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "nowhere"]},
        {"target_modules": ["nowhere"]},
        {"target_modules": "nowhere.*"},
        {"layers_to_transform": [7]},
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
        {"target_modules": ["mlp"]},
    ],
    ids=str,
)
def test_targets_that_match_nothing_or_cannot_be_adapted_raise_and_leave_the_base_as_it_was(options):
    family = FAMILIES["llama"]
    base = family.build()
    before, kinds = snapshot(base), [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match="(?i)target.modules|weights of its own"):
        get_peft_model(base, config_of(family, **options))
    assert differing(base, before) == []
    assert [type(module) for module in base.modules()] == kinds
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_the_head_of_a_classifier_is_saved_whole_and_trained():
    family = FAMILIES["bert"]
    base = family.build()
    before = snapshot(base)
    model = wrap(base, family)
    assert {"classifier", "score"} <= set(model.modules_to_save)
    train(model, family.batches(), steps=3)
    head = model.base_model.model.classifier
    assert not same_bits(head.modules_to_save["default"].weight, before["classifier.weight"])
    assert same_bits(head.original_module.weight, before["classifier.weight"])
    assert "base_model.model.classifier.weight" in get_peft_model_state_dict(model)
