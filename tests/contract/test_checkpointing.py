"""Recomputing activations changes no gradient."""

from __future__ import annotations

import pytest
import torch
from peft import (
    prepare_model_for_kbit_training,
)

from peft_childtune import (
    get_deltas,
)
from tests.contract.families import (
    FAMILIES,
    add_noise,
    base_state,
    layers_in,
    same_bits,
    snapshot,
    train,
    wrap,
)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # by another name
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", [{"score": "magnitude"}, {"mode": "task_free", "resample": True}], ids=["D", "F"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_gradient_checkpointing_gives_the_same_gradients(name, options, use_reentrant):
    family = FAMILIES[name]

    def gradients(checkpointing):
        base = family.build()
        if checkpointing:
            base.config.use_cache = False
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            base.enable_input_require_grads()
        model = add_noise(wrap(base, family, **options)).train()
        for seed in range(2):  # accumulated
            model(**family.batch(seed)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain and all(gradient is not None for gradient in plain.values())
    assert set(plain) == set(checkpointed)
    for key, gradient in plain.items():
        # T5's decoder layers add up their gradients of the encoder's output in another order, as in the dense model
        atol = 1e-6 * float(gradient.abs().max()) if name == "t5" else 0.0
        torch.testing.assert_close(checkpointed[key], gradient, rtol=0, atol=atol)


def test_a_model_prepared_for_low_bit_training_trains_the_child_alone():
    family = FAMILIES["llama"]
    base = prepare_model_for_kbit_training(
        family.build().to(torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    before = snapshot(base)
    base.config.use_cache = False
    model = wrap(base, family, score="magnitude")
    train(model, family.batches(), steps=2)
    assert all(same_bits(before[key], tensor) for key, tensor in base_state(model).items())
    assert any(bool(delta.values.any()) for delta in get_deltas(model).values())
    assert layers_in(model)
