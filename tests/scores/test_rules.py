"""Rules for single modules, and the parts that only another device than the CPU would reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_childtune.scores.rules import _add_squared_products_, add_squares_, example_gradients, has_rule
from peft_childtune.scores.uses import Owner, Use


def used(module: nn.Module, inputs: Tensor) -> tuple[Use, list[dict[str, Tensor]]]:
    """Return one use of a module with a random output gradient, and the gradients of each example by autograd."""
    output = module(inputs)
    grad = torch.randn_like(output)
    expected = []
    for i in range(len(inputs)):
        one = module(inputs[i : i + 1])
        grads = torch.autograd.grad(one, list(module.parameters()), grad_outputs=grad[i : i + 1])
        expected.append(dict(zip(dict(module.named_parameters()), grads, strict=True)))
    owner = Owner("module", module, {name: name for name, _ in module.named_parameters()})
    return Use(owner, (inputs,), {}, len(inputs), grads={0: grad}), expected


MODULES = {
    "linear": (lambda: nn.Linear(5, 4), lambda: torch.randn(3, 7, 5)),
    "linear of vectors": (lambda: nn.Linear(5, 4), lambda: torch.randn(3, 5)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((4, 5)), lambda: torch.randn(3, 2, 4, 5)),
    "embedding": (lambda: nn.Embedding(6, 4, padding_idx=2), lambda: torch.randint(0, 6, (3, 7))),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_rule_gives_the_gradients_of_autograd(name):
    make_module, make_inputs = MODULES[name]
    use, expected = used(make_module(), make_inputs())
    assert has_rule(use)
    for index, grads in enumerate(expected):
        for own, grad in example_gradients(use, index).items():
            torch.testing.assert_close(grad, grads[own])


@pytest.mark.parametrize("name", MODULES)
def test_a_rule_adds_squares_times_factors_to_what_is_there(name):
    make_module, make_inputs = MODULES[name]
    use, expected = used(make_module(), make_inputs())
    factors = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    for own in use.owner.names:
        total = torch.ones_like(expected[0][own])
        with torch.no_grad():
            add_squares_(total, use, own, factors)
        wanted = 1 + 0.5 * expected[0][own] ** 2 + 2 * expected[2][own] ** 2
        torch.testing.assert_close(total, wanted)


def test_tokens_without_gradient_are_left_out_and_change_nothing():
    use, _ = used(nn.Linear(5, 4), torch.randn(2, 6, 5))
    use.grads[0][:, 2:] = 0.0
    with_nan = use.args[0].clone()
    with_nan[:, 2:] = float("nan")  # were these rows read, the result would be NaN
    poisoned = Use(use.owner, (with_nan,), {}, 2, grads=use.grads)
    total = torch.zeros(4, 5)
    add_squares_(total, poisoned, "weight", torch.ones(2))
    torch.testing.assert_close(total, sum(example_gradients(use, i)["weight"] ** 2 for i in range(2)))


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_batched_products_equal_products_one_by_one(block, monkeypatch):
    monkeypatch.setattr("peft_childtune.scores.rules._GPU_BLOCK", block)
    left, right, factors = torch.randn(5, 7, 4), torch.randn(5, 7, 3), torch.rand(5, dtype=torch.float64)
    total = torch.ones(4, 3)
    _add_squared_products_(total, left, right, factors)
    expected = 1 + sum(f * (a.T @ b) ** 2 for f, a, b in zip(factors.float(), left, right, strict=True))
    torch.testing.assert_close(total, expected)


@pytest.mark.gpu
def test_fisher_on_a_gpu_equals_fisher_on_the_cpu():
    from peft_childtune.scores import score_parameters

    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    batches = [(torch.randn(4, 6), torch.randint(0, 3, (4,))), (torch.randn(3, 6), torch.randint(0, 3, (3,)))]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    expected = score_parameters(model, dict(model.named_parameters()), batches, loss_fn=loss, show_progress=False)
    model.cuda()
    found = score_parameters(model, dict(model.named_parameters()), batches, loss_fn=loss, show_progress=False)
    for name, scores in expected.scores.items():
        torch.testing.assert_close(found.scores[name].cpu(), scores, rtol=1e-3, atol=1e-6)  # other matmul kernels
