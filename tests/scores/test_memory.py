"""What a scoring pass keeps in memory: the scores once, and one gradient at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from peft_childtune.errors import ScoreError
from peft_childtune.scores import score_parameters
from peft_childtune.scores.gradients import for_each_gradient
from peft_childtune.scores.sums import ScoreSums

WIDTH, LAYERS, BYTES = 96, 6, 4


class Peak(TorchDispatchMode):
    """Counts the bytes of all living storages that operations met inside the block, without those of `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = {p.untyped_storage()._cdata for p in model.parameters()}
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, Tensor) and item.layout == torch.strided:
                self._see(item.untyped_storage())
        return result

    def _see(self, storage) -> None:
        key = storage._cdata
        if key in self.model:
            return
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))


def deep_model() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("score", ["fisher", "fisher_batch", "gradient"])
def test_beyond_the_scores_there_is_never_more_than_one_gradient(score):
    model, batches = deep_model(), [(torch.randn(4, WIDTH), torch.randn(4, WIDTH)) for _ in range(2)]
    with Peak(model) as memory:
        score_parameters(
            model, dict(model.named_parameters()), batches, score=score, loss_fn=loss, show_progress=False
        )
    weight = WIDTH * WIDTH * BYTES
    activations = 4 * 4 * WIDTH * BYTES * LAYERS  # inputs, outputs and their gradients, of four examples
    assert LAYERS * weight <= memory.peak <= (LAYERS + 1) * weight + activations


def test_a_gradient_is_dropped_before_the_next_one_comes():
    model = deep_model()
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def count(name: str, grad: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(grad))
        most = max(most, sum(reference() is not None for reference in alive))

    for_each_gradient(
        loss(model, (torch.randn(4, WIDTH), torch.randn(4, WIDTH))), dict(model.named_parameters()), use=count
    )
    assert (len(alive), most) == (LAYERS, 1)


def test_a_gradient_is_the_sum_over_all_uses_of_its_parameter():
    layer, x = nn.Linear(3, 3, bias=False), torch.randn(2, 3)
    total = layer(torch.tanh(layer(x))).square().sum()
    (expected,) = torch.autograd.grad(total, [layer.weight], retain_graph=True)
    found: list[Tensor] = []
    for_each_gradient(total, {"w": layer.weight}, use=lambda name, grad: found.append(grad))
    assert len(found) == 1 and torch.equal(found[0], expected) and layer.weight.grad is None


@pytest.mark.parametrize("score", ["fisher", "fisher_batch", "gradient"])
def test_the_scores_are_kept_where_they_are_wanted(score, monkeypatch):
    model, batches = deep_model(), [(torch.randn(4, WIDTH), torch.randn(4, WIDTH)) for _ in range(2)]
    weights = dict(model.named_parameters())
    options = {"score": score, "loss_fn": loss, "show_progress": False}
    expected = score_parameters(model, weights, batches, **options).scores
    moved = []

    def elsewhere(self: ScoreSums, name: str, device: torch.device) -> bool:
        moved.append(name)
        return False

    # as if the model were on an accelerator: every batch is added up beside it, then moved
    monkeypatch.setattr(ScoreSums, "_is_there", elsewhere)
    found = score_parameters(model, weights, batches, scores_device="cpu", **options).scores
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores)
    assert set(moved) == (set(weights) if score == "fisher" else set())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("score", ["fisher", "fisher_batch", "gradient"])
def test_a_model_on_a_gpu_is_scored_into_the_memory_of_the_host(score):
    model = deep_model().cuda()
    batches = [(torch.randn(4, WIDTH).cuda(), torch.randn(4, WIDTH).cuda())]
    options = {"score": score, "loss_fn": loss, "show_progress": False}
    here = score_parameters(model, dict(model.named_parameters()), batches, **options).scores
    there = score_parameters(model, dict(model.named_parameters()), batches, scores_device="cpu", **options).scores
    for name, scores in here.items():
        assert there[name].device.type == "cpu"
        torch.testing.assert_close(there[name], scores.cpu(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("size", [9, 16, 21])
def test_a_large_batch_is_scored_in_parts_of_at_most_eight_examples(size, loop_fisher):
    model, seen = deep_model(), []
    batches = [(torch.randn(size, WIDTH), torch.randn(size, WIDTH)) for _ in range(2)]
    expected = loop_fisher(model, batches, loss)
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    result = score_parameters(model, dict(model.named_parameters()), batches, loss_fn=loss, show_progress=False)
    assert max(seen) <= 8 and result.num_examples == 2 * size
    assert result.loss == pytest.approx(sum(float(loss(model, batch)) for batch in batches) / 2, rel=1e-5)
    for name, scores in expected.items():
        torch.testing.assert_close(result.scores[name].double(), scores, rtol=1e-4, atol=1e-12)  # fp32 sums


def test_a_bad_example_is_named_by_its_place_in_the_whole_batch():
    x = torch.randn(16, WIDTH)
    x[11] = float("inf")
    model = deep_model()
    with pytest.raises(ScoreError, match="batch 0: the loss of example 11 is"):
        score_parameters(
            model,
            dict(model.named_parameters()),
            [(x, torch.randn(16, WIDTH))],
            loss_fn=loss,
            show_progress=False,
        )
