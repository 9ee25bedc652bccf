"""The movement score: what a plain training loop on a copy gives, and nothing is left of it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_childtune import ChildTuningConfig, ScoreError, select_child_network
from peft_childtune.scores import ScoreInputs, movement_scores


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x))


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 6, generator=generator), torch.randint(2, (4,), generator=generator)) for _ in range(count)
    ]


def _inputs(model, **options):
    covered = {f"body.{name}": p for name, p in model.body.named_parameters()}
    heads = {f"head.{name}": p for name, p in model.head.named_parameters()}
    given = {"dataloader": _batches(), "loss_fn": _loss, "show_progress": False}
    return ScoreInputs(model, covered, **({"heads": heads} | given | options))


def _moved(model, *, epochs=4, rate=2e-4, batches=None):
    """Return how far a plain loop moves the weights of a copy."""
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(epochs):
        for batch in batches or _batches():
            optimizer.zero_grad()
            _loss(twin, batch).backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            optimizer.step()
    return {
        f"body.{name}": (p - old).abs().detach()
        for (name, p), old in zip(twin.body.named_parameters(), model.body.parameters(), strict=True)
    }


@pytest.mark.parametrize(("epochs", "rate"), [(1, 1e-4), (3, 1e-2)])
def test_scores_are_what_a_plain_training_loop_moves(epochs, rate):
    model = _Net()
    found = movement_scores(_inputs(model), epochs=epochs, learning_rate=rate)
    for name, expected in _moved(model, epochs=epochs, rate=rate).items():
        torch.testing.assert_close(found.scores[name], expected, rtol=1e-4, atol=1e-9)  # the order of clipped norms
    assert (found.num_examples, found.num_batches) == (12, 3)


def test_every_weight_and_gradient_is_what_it_was_bit_for_bit():
    model = _Net()
    model.head.weight.grad = torch.ones(2, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    movement_scores(_inputs(model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model.head.weight.grad, torch.ones(2, 4))
    assert model.body[0].weight.grad is None


def test_a_training_that_breaks_off_is_taken_back_too():
    model = _Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bad = [*_batches(2), (torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(ScoreError, match="batch 2: the loss is nan"):
        movement_scores(_inputs(model, dataloader=bad))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_only_so_many_batches_are_read():
    model = _Net()
    found = movement_scores(_inputs(model, dataloader=_batches(5), num_batches=4))
    for name, expected in _moved(model, batches=_batches(5)[:4]).items():
        torch.testing.assert_close(found.scores[name], expected, rtol=1e-4, atol=1e-9)


class _Once:
    """What can be read once only, without being an iterator: a DataLoader over a stream."""

    def __init__(self, batches):
        self.left = iter(batches)

    def __iter__(self):
        return self.left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataloader": []}, "yields no batch"),
        ({"dataloader": iter([])}, "yields no batch"),
        ({"dataloader": None}, "NoneType, not an iterable"),
        ({"dataloader": {"x": 1}}, "dict, not an iterable"),
        ({"num_batches": 0}, "reads no data"),
        ({"dataloader": _Once(_batches())}, "yields no batch when it is read again"),
        ({"loss_fn": lambda model, batch: torch.ones(())}, "does not depend on any"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(options, message):
    with pytest.raises(ScoreError, match=message):
        movement_scores(_inputs(_Net(), **options))


def test_the_copy_of_the_weights_is_kept_where_scores_are_wanted():
    model = _Net()
    found = movement_scores(_inputs(model, scores_device="cpu"))
    assert all(each.device.type == "cpu" for each in found.scores.values())


def test_sparse_gradients_and_running_statistics_are_no_trouble():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    before = [buffer.clone() for buffer in model.buffers()]
    batches = [(torch.randint(9, (4, 2)), torch.randint(2, (4,))) for _ in range(3)]
    found = movement_scores(
        ScoreInputs(model, {"0.weight": model[0].weight}, dataloader=batches, loss_fn=_loss, show_progress=False)
    )
    assert bool(found.scores["0.weight"].any())
    assert all(map(torch.equal, model.buffers(), before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_move_by_less_than_their_next_number(dtype):
    model = _Net().to(dtype)
    batches = [(x.to(dtype), y) for x, y in _batches(8)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = movement_scores(_inputs(model, dataloader=batches))
    expected = torch.cat([each.flatten() for each in _moved(_Net(), batches=_batches(8)).values()])
    scores = torch.cat([each.flatten() for each in found.scores.values()])
    assert scores.dtype is torch.float32
    assert torch.corrcoef(torch.stack([scores, expected]))[0, 1] > 0.95
    assert scores.unique().numel() > 0.9 * len(scores)  # steps on the weights themselves would all be of a few sizes
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_batches_of_an_iterator_are_kept_for_every_epoch():
    found = movement_scores(_inputs(_Net(), dataloader=iter(_batches(5)), num_batches=4))
    for name, expected in movement_scores(_inputs(_Net(), dataloader=_batches(5)[:4])).scores.items():
        assert torch.equal(found.scores[name], expected)


def test_a_batch_without_a_label_that_counts_is_left_out():
    def batches(labels):
        return [{"x": x, "labels": y} for x, y in [*_batches(), (torch.ones(4, 6), labels)]]

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["labels"])

    model = _Net()
    found = movement_scores(_inputs(model, dataloader=batches(torch.full((4,), -100)), loss_fn=loss))
    for name, expected in movement_scores(_inputs(model)).scores.items():
        assert torch.equal(found.scores[name], expected)


def test_a_gradient_that_is_not_finite_is_the_fault_of_its_own_batch():
    def loss(model, batch):
        rooted = model(batch[0]).sum()
        return _loss(model, batch) + (rooted - rooted.detach()).clamp(min=0).sqrt()  # 0, of infinite slope

    with pytest.raises(ScoreError, match="batch 0: the gradient's norm is (nan|inf) after 0 steps"):
        movement_scores(_inputs(_Net(), loss_fn=loss))


def test_steps_are_seen_inside_a_callers_autocast():
    model, scores = _Net(), []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=enabled):
            scores.append(movement_scores(_inputs(model), epochs=10, learning_rate=1e-2).scores)
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


def test_small_gradients_of_float16_are_not_lost():
    model = _Net().half()
    batches = [(x.half(), y) for x, y in _batches(8)]
    scores = [
        movement_scores(_inputs(model, dataloader=batches, loss_fn=lambda m, b, s=s: s * _loss(m, b).float())).scores
        for s in (1.0, 2.0**-13)
    ]
    flat = torch.stack([torch.cat([each.flatten() for each in found.values()]) for found in scores])
    assert torch.corrcoef(flat)[0, 1] > 0.95


@pytest.mark.parametrize(("epochs", "rate"), [(0, 1e-4), (1, 0.0), (1, float("nan"))])
def test_a_training_of_no_steps_is_refused(epochs, rate):
    with pytest.raises(ScoreError, match=f"epochs={epochs}, learning_rate={rate}"):
        movement_scores(_inputs(_Net()), epochs=epochs, learning_rate=rate)


def test_a_buffer_that_a_forward_replaces_is_put_back():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 2)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
            return self.fc(x)

    model = Averaging()
    mean = model.mean
    movement_scores(
        ScoreInputs(model, {"fc.weight": model.fc.weight}, dataloader=_batches(), loss_fn=_loss, show_progress=False)
    )
    assert model.mean is mean and not mean.any()


def test_a_single_batch_is_read_as_often_as_weights_need_to_part():
    model = _Net()
    found = movement_scores(_inputs(model, num_batches=1), epochs=1)
    for name, expected in _moved(model, epochs=3, batches=_batches(1)).items():
        torch.testing.assert_close(found.scores[name], expected, rtol=1e-4, atol=1e-9)


def test_a_child_is_chosen_by_movement_with_the_head_in_training_and_the_model_as_it_was_after():
    model = get_peft_model(
        _Net(),
        ChildTuningConfig(target_modules=["0", "2"], modules_to_save=["head"], scope="global", density=0.2),
    ).eval()
    plain = _Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters() if "child_tuning" not in name}
    child = select_child_network(model, _batches(), loss_fn=_loss, show_progress=False)
    scores = _moved(plain)
    top = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values[: child.nnz]
    kept = torch.cat([scores[name].flatten()[at] for name, at in child.indices.items()]).sort(descending=True).values
    torch.testing.assert_close(kept, top, rtol=1e-3, atol=1e-8)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], old) for name, old in before.items() if name in after)
    assert {name: after[name].requires_grad for name in flags} == flags
    assert not model.training


@pytest.mark.parametrize(("rate", "told"), [(1e-2, False), (0.3, True), (50.0, True)])
def test_a_training_that_learns_nothing_is_told_of(rate, told, caplog):
    movement_scores(_inputs(_Net(), dataloader=_batches(8)), learning_rate=rate)
    assert ("has learnt nothing" in caplog.text) is told
    assert (f"learning_rate={rate / 10:g}))" in caplog.text) is told


def test_the_loss_before_training_is_that_of_the_base(caplog):
    model, batches = _Net(), _batches(8)
    start = sum(_loss(model, batch).item() for batch in batches) / len(batches)
    found = movement_scores(_inputs(model, dataloader=batches), learning_rate=50.0)
    assert f"{start:.4g} before it, and {found.loss:.4g} in" in caplog.text
    assert (found.num_batches, found.num_examples) == (8, 32)
