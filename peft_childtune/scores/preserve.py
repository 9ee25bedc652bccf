"""A scoring pass leaves no trace: what it switches on a model, it switches back, also when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from peft_childtune.errors import ScoreError

__all__ = ["preserved"]


@contextmanager
def preserved(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block with `model` in eval mode, no parameter trainable and gradients on; then put everything back.

    Put back are every module's `training`, every parameter's `requires_grad` and gradient, every buffer (running
    statistics) and torch's random state (a shuffling dataloader draws from it). Flags are set one by one, not with
    `model.eval()`: a module whose `train()` does more than set a flag, such as merging an adapter, would do it behind
    the caller's back.

    Raises:
        ScoreError: inside `torch.inference_mode()`, or with parameters that were made there: no gradients exist.
    """
    if torch.is_inference_mode_enabled():
        raise ScoreError("Scores need gradients, which torch.inference_mode() rules out; call this outside of it.")
    parameters = list(model.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        raise ScoreError("The model was built inside torch.inference_mode() and has no gradients; build it outside.")
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    random_state = torch.get_rng_state()
    device_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        for module, _ in training:
            module.training = False
        for parameter in parameters:
            parameter.requires_grad, parameter.grad = False, None
        with torch.enable_grad():
            yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for parameter, was_trainable, grad in trainable:
            parameter.requires_grad, parameter.grad = was_trainable, grad
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer  # a forward may have put another one there
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        torch.set_rng_state(random_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)
