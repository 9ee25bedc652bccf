"""Choosing the child network: which entries, of what."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_childtune import (
    ChildTuningConfig,
    get_child_network,
    select_child_network,
)


def _config(**options):
    return ChildTuningConfig(**({"score": "fisher", "density": 0.25} | options))


def _wrapped(base, **options):
    return get_peft_model(base, _config(**options))


def _select(model, data=None, **options):
    return select_child_network(model, data, show_progress=False, **options)


def _covered(base):
    """The tensors inside the toy's blocks, in the model's order."""
    return {name: p.detach() for name, p in base.named_parameters() if name.startswith("layers.")}


def _best(scores, count):
    """The slow way: all entries of some tensors in one sorted list; equals go to the earlier tensor and position."""
    ranked = sorted(
        (-value, order, position, name)
        for order, (name, tensor) in enumerate(scores.items())
        for position, value in enumerate(tensor.flatten().tolist())
    )
    kept = {name: [] for name in scores}
    for _, _, position, name in ranked[:count]:
        kept[name].append(position)
    return {name: sorted(positions) for name, positions in kept.items()}


def _listed(network):
    return {name: indices.tolist() for name, indices in network.indices.items()}


def test_a_global_budget_takes_the_best_of_all_tensors(toy):
    scores = {name: p.abs() for name, p in _covered(toy()).items()}
    child = get_child_network(_wrapped(toy(), score="magnitude"))
    assert _listed(child) == _best(scores, round(0.25 * 108))


def test_a_budget_per_layer_is_that_of_each_block(toy):
    scores = {name: p.abs() for name, p in _covered(toy()).items()}
    expected = {}
    for block in ("layers.0.", "layers.1."):
        expected |= _best({n: s for n, s in scores.items() if n.startswith(block)}, round(0.3 * 54))
    child = get_child_network(_wrapped(toy(), score="magnitude", scope="layer", density=0.3))
    assert _listed(child) == expected


def test_tensors_outside_the_blocks_share_one_budget_of_their_own(toy):
    scores = {n: p.detach().abs() for n, p in toy().named_parameters() if n.split(".")[0] in ("embed", "head")}
    model = _wrapped(toy(), score="magnitude", scope="layer", target_modules=["embed", "head", "fc"])
    child = _listed(get_child_network(model))
    numel = sum(s.numel() for s in scores.values())
    assert {n: i for n, i in child.items() if n in scores} == _best(scores, round(0.25 * numel))


def test_a_budget_per_tensor_is_that_of_each_tensor(toy):
    expected = {}
    for name, p in _covered(toy()).items():
        expected |= _best({name: p.abs()}, round(0.3 * p.numel()))
    child = get_child_network(_wrapped(toy(), score="magnitude", scope="tensor", density=0.3))
    assert _listed(child) == expected


def test_a_budget_per_row_is_even_over_output_neurons(toy):
    child = get_child_network(_wrapped(toy(), score="magnitude", scope="row", density=0.3))
    for name, p in _covered(toy()).items():
        assert len(child.indices[name]) == round(0.3 * p.numel())
        if p.ndim == 2:  # floor(0.3 * 6) = 1 each, and the 11 - 6 left over go to the best runners-up
            rows = [sorted((-v, i) for i, v in enumerate(row.abs().tolist())) for row in p]
            second = sorted((row[1][0], r) for r, row in enumerate(rows))[:5]
            expected = [r * 6 + row[0][1] for r, row in enumerate(rows)] + [r * 6 + rows[r][1][1] for _, r in second]
            assert child.indices[name].tolist() == sorted(expected)


def test_the_output_neurons_of_gpt2_are_the_columns_of_its_weights(family):
    model = get_peft_model(family("gpt2"), _config(score="magnitude", scope="row", target_modules=["c_attn"]))
    for name, indices in get_child_network(model).indices.items():
        if name.endswith("weight"):
            counts = torch.bincount(indices % 48, minlength=48)  # (in, out) = (16, 48)
            assert counts.tolist() == [4] * 48


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
@pytest.mark.parametrize("options", [{"score": "magnitude"}, {"score": "random"}, {"mode": "task_free"}, {}])
def test_units_are_kept_whole_or_not_at_all(toy, batches, granularity, options):
    model = _wrapped(toy(), granularity=granularity, block_size=4, density=0.5, **options)
    child = _select(model, batches) if not options else get_child_network(model)
    kept = 0
    for name, p in _covered(toy()).items():
        mask = torch.zeros(p.numel(), dtype=torch.bool)
        mask[child.indices[name]] = True
        mask = mask.view(p.shape)
        kept += int(mask.sum())
        if p.ndim < 2:
            continue
        units = {
            "row": list(mask),
            "column": list(mask.t()),
            "block": [mask[i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)],
        }[granularity]
        assert all(bool(unit.all()) or not bool(unit.any()) for unit in units)
    assert 0 < kept == child.nnz <= 54


def test_the_units_of_best_mean_score_are_taken(toy):
    child = get_child_network(
        _wrapped(toy(), score="magnitude", granularity="row", density=0.5, target_modules=["fc"])
    )
    units = []
    for order, (name, p) in enumerate((n, p) for n, p in _covered(toy()).items() if ".fc." in n):
        for number, row in enumerate(p.abs() if p.ndim == 2 else p.abs()[:, None]):
            units.append((-row.mean().item(), order, number, name, row.numel()))
    budget, kept = round(0.5 * 84), {name: [] for name in child.shapes}
    for _, _, number, name, size in sorted(units):
        if size > budget:
            break
        budget -= size
        kept[name] += range(number * size, (number + 1) * size)
    assert _listed(child) == {name: sorted(positions) for name, positions in kept.items()}


def test_the_fisher_child_is_that_of_a_loop_over_single_examples(toy, batches):
    base = toy()
    parameters = _covered(base)
    scores = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
    for batch in batches:
        for i in range(4):
            base.zero_grad()
            base(x=batch["x"][i : i + 1], labels=batch["labels"][i : i + 1]).loss.backward()
            for name, p in base.named_parameters():
                if name in scores:
                    scores[name] += p.grad.double().square()
    child = _select(_wrapped(toy(), density=0.2), batches)
    assert _listed(child) == _best(scores, round(0.2 * 108))


@pytest.mark.parametrize("options", [{"score": "random"}, {"mode": "task_free"}])
def test_a_random_child_depends_on_the_seed_and_not_on_the_weights(toy, options):
    other = toy()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3).add_(1)
    one = get_child_network(_wrapped(toy(), seed=5, **options))
    assert one == get_child_network(_wrapped(other, seed=5, **options))
    assert one.nnz == round(0.25 * 108)
    different = get_child_network(_wrapped(toy(), seed=6, **options))
    assert one.overlap(different) < 0.6


@pytest.mark.parametrize(
    "options", [{"score": "magnitude"}, {"score": "random", "scope": "row"}, {"mode": "task_free"}]
)
def test_children_that_need_no_data_are_there_at_once_and_selecting_again_gives_the_same(toy, options):
    model = _wrapped(toy(), **options)
    before = get_child_network(model)
    assert _select(model) == before == get_child_network(model)


@pytest.mark.parametrize("options", [{}, {"score": "magnitude"}, {"mode": "task_free"}, {"granularity": "block"}])
def test_a_reloaded_adapter_has_the_same_child_without_data(toy, batches, tmp_path, options):
    model = _wrapped(toy(), **options)
    chosen = _select(model, batches if model.peft_config["default"].needs_data else None)
    model.save_pretrained(tmp_path)
    assert get_child_network(PeftModel.from_pretrained(toy(), tmp_path)) == chosen


def test_entries_of_tensors_that_take_no_part_in_the_loss_are_named(caplog):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    config = ChildTuningConfig(target_modules=["used", "idle"], score="fisher", scope="tensor", density=0.5)
    model = get_peft_model(Idle(), config)
    data = [torch.randn(4, 4)]
    select_child_network(model, data, loss_fn=lambda m, x: m(x).square().mean(), show_progress=False)
    assert [record.getMessage()[:47] for record in caplog.records] == [
        "2 tensors have scores of zero only, so what was"
    ]
    assert "idle." in caplog.text


def test_the_selection_is_recorded_in_the_configuration(toy, batches, tmp_path):
    model = _wrapped(toy())
    child = _select(model, batches)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "adapter_config.json").read_text())["selection"]
    assert (record["source"], record["examples"], record["digest"]) == ("fisher", 12, child.digest())
    losses = [toy()(**batch).loss.item() for batch in batches]
    assert record["loss"] == pytest.approx(sum(losses) / 3)


@pytest.mark.parametrize("score", ["fisher", "fisher_batch", "gradient", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_child_is_chosen_on_a_half_precision_base_and_leaves_it_as_it_is(toy, batches, bits, dtype, score):
    base = toy().to(dtype)
    photograph = bits(base)
    half = [{"x": b["x"].to(dtype), "labels": b["labels"]} for b in batches]
    model = _wrapped(base, score=score)
    child = _select(model, half if score != "magnitude" else None)
    assert child.nnz == 27
    reference = _select(_wrapped(toy(), score=score), batches if score != "magnitude" else None)
    assert child.overlap(reference) > 0.7  # rounding to 8 bits moves the order of near equals, no more
    assert {n: b for n, b in bits(model.merge_and_unload()).items()} == photograph


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.fc(self.embed(ids)))


@pytest.mark.parametrize("targets", [["embed", "fc"], ["head", "fc"], ["embed", "head", "fc"]])
def test_a_tied_weight_is_covered_and_counted_once(targets):
    model = _wrapped(_Tied(), target_modules=targets, score="magnitude", density=0.5)
    child = get_child_network(model)
    assert sorted(child.shapes.values()) == [(4,), (4, 4), (7, 4)]
    assert child.nnz == round(0.5 * 48)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == child.nnz


def test_a_tied_weight_is_scored_by_all_its_uses():
    torch.manual_seed(0)
    base, ids = _Tied(), torch.tensor([0, 3, 3, 6])

    def loss_fn(model, batch):
        return model(batch).square().mean()

    base.zero_grad()
    total = torch.zeros(7, 4, dtype=torch.float64)
    for i in range(4):
        (gradient,) = torch.autograd.grad(loss_fn(base, ids[i : i + 1]), [base.embed.weight])
        total += gradient.double().square()
    model = _wrapped(base, target_modules=["embed"], density=0.3)
    child = _select(model, [ids], loss_fn=loss_fn)
    assert child.indices["embed.weight"].tolist() == _best({"w": total}, round(0.3 * 28))["w"]
