"""A selection keeps its scores where it is told, and nothing of them afterwards."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_childtune import ChildTuningConfig, select_child_network
from peft_childtune.tuner import choosing, selection


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("score", ["fisher", "fisher_batch", "gradient"])
def test_the_scores_are_gone_before_the_child_is_installed(score, monkeypatch):
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model = get_peft_model(base, ChildTuningConfig(target_modules=["0", "2"], density=0.2, score=score))
    seen: list[weakref.ref[Tensor]] = []
    devices: list[object] = []
    compute, install = choosing.compute_scores, selection.install_children

    def watched(*args, **options):
        result = compute(*args, **options)
        seen.extend(weakref.ref(scores) for scores in result.scores.values())
        devices.append(args[1].scores_device)
        return result

    def installed(*args, **options):
        assert len(seen) == 4 and not any(reference() is not None for reference in seen)
        return install(*args, **options)

    monkeypatch.setattr(choosing, "compute_scores", watched)
    monkeypatch.setattr(selection, "install_children", installed)
    batches = [(torch.randn(8, 4), torch.randint(2, (8,)))]
    select_child_network(model, batches, loss_fn=loss, scores_device="cpu", show_progress=False)
    assert devices == ["cpu"]
