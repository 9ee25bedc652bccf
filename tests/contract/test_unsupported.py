"""What PEFT offers and this method does not raises, and is never ignored."""

from __future__ import annotations

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from peft_childtune import (
    ChildTuningConfig,
    TargetError,
    UnsupportedError,
    select_child_network,
)
from tests.contract.families import (
    FAMILIES,
    config_of,
    output,
    same_bits,
    train,
    with_two_adapters,
    wrap,
)


def test_mixed_models_raise():
    family = FAMILIES["gpt2"]
    with pytest.raises((ValueError, NotImplementedError)):
        get_peft_model(family.build(), config_of(family), mixed=True)


def test_another_method_on_the_same_model_raises():
    family = FAMILIES["llama"]
    model = wrap(family.build(), family)
    with pytest.raises(ValueError):
        model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


def test_hotswapping_raises_and_leaves_the_adapter(saved_adapter):
    saved = saved_adapter("gpt2")
    model = PeftModel.from_pretrained(saved.fresh(), saved.folder)
    with pytest.raises((ValueError, NotImplementedError)):
        hotswap_adapter(model, str(saved.folder), adapter_name="default")
    assert same_bits(output(model, saved.batch), saved.logits)


def test_hotswapping_in_transformers_raises_and_leaves_the_adapter(saved_adapter):
    saved = saved_adapter("gpt2")
    model = saved.fresh()
    model.load_adapter(str(saved.folder), adapter_name="default")
    with pytest.raises((ValueError, NotImplementedError)):
        model.load_adapter(str(saved.folder), adapter_name="default", hotswap=True)
    assert same_bits(output(model, saved.batch), saved.logits)


def test_a_batch_over_several_adapters_raises():
    model = with_two_adapters("gpt2")
    batch = FAMILIES["gpt2"].batch()
    with pytest.raises(UnsupportedError, match="adapter_names"):
        model(**batch, adapter_names=["one", "two", "one"])
    with pytest.raises(UnsupportedError, match="adapter_names"):
        model.generate(batch["input_ids"], adapter_names=["one", "two", "one"], max_new_tokens=2)


def test_target_parameters_raise():
    with pytest.raises(UnsupportedError, match="target_parameters"):
        ChildTuningConfig(target_parameters=["mlp.up_proj.weight"])


def test_quantised_weights_raise():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    base[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match="int8"):
        get_peft_model(base, ChildTuningConfig(target_modules=["0"], score="random"))
    assert type(base[0]) is nn.Linear


def test_weighted_combinations_of_adapters_raise():
    model = with_two_adapters("gpt2")
    with pytest.raises((AttributeError, NotImplementedError, TypeError)):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both")


def test_training_before_the_child_is_selected_shows_the_call_to_make():
    family = FAMILIES["bert"]
    model = get_peft_model(family.build(), ChildTuningConfig(task_type="SEQ_CLS", score="fisher")).train()
    with pytest.raises(RuntimeError, match=r"select_child_network\(model, train_dataloader\)"):
        model(**family.batch())


def test_selecting_again_after_training_is_refused():
    family = FAMILIES["bert"]
    model = wrap(family.build(), family)
    train(model, family.batches(), steps=1)
    with pytest.raises(RuntimeError, match="trained already"):
        select_child_network(model, family.batches(), show_progress=False)
