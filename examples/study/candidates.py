"""Scores that the study tries, each registered under the name that `protocol.toml` calls it by."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from peft_childtune import ScoreInputs, register_score

Scores = dict[str, Tensor]

_known: dict[tuple[object, str], Scores] = {}  # by (run, score)
_current: list[object] = [None]


def remember(run: object) -> None:
    """Say for which task, seed and head scores are wanted next: methods that differ in nothing else share them."""
    if run != _current[0]:
        _current[0] = run
        _known.clear()


def known(inputs: ScoreInputs, score: str) -> Scores:
    """Return a built-in score, computed once a task, seed and head."""
    key = (_current[0], score)
    if key not in _known:
        _known[key] = inputs.compute(score).scores
    return _known[key]


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.dim() > 1


def _root(inputs: ScoreInputs) -> Scores:
    return {name: scores.sqrt() for name, scores in known(inputs, "fisher").items()}


def relative(inputs: ScoreInputs) -> Scores:
    """Return the root of the Fisher information over the weight's size (GEM, Kang et al. 2025)."""
    root = _root(inputs)
    return {name: root[name] / (w.detach().abs() + w.detach().std()) for name, w in inputs.parameters.items()}


def saliency(inputs: ScoreInputs) -> Scores:
    """Return the root of the Fisher information times the weight's size (SNIP, Lee et al. 2019)."""
    root = _root(inputs)
    return {name: root[name] * w.detach().abs() for name, w in inputs.parameters.items()}


def balanced(inputs: ScoreInputs) -> Scores:
    """Return Fisher information over the mean of its row and of its column (RIA's idea, Zhang et al. 2024)."""
    found = {}
    for name, f in known(inputs, "fisher").items():
        if _is_matrix(f):
            f = f / (f.mean(0, keepdim=True) + 1e-30) / (f.mean(1, keepdim=True) + 1e-30)
        else:
            f = f / (f.mean() + 1e-30)
        found[name] = f
    return found


def shared(inputs: ScoreInputs) -> Scores:
    """Return Fisher information over the root of its row's and column's means: half way to `balanced`."""
    found = {}
    for name, f in known(inputs, "fisher").items():
        if _is_matrix(f):
            f = f / ((f.mean(0, keepdim=True) * f.mean(1, keepdim=True)).sqrt() + 1e-30)
        else:
            f = f / (f.mean() + 1e-30)
        found[name] = f
    return found


def small_first(inputs: ScoreInputs) -> Scores:
    """Return the mean gradient over the weight's size (GaLLoP, 2025)."""
    g = known(inputs, "gradient")
    return {
        name: g[name] / (w.detach().abs() + 1e-3 * w.detach().abs().mean()) for name, w in inputs.parameters.items()
    }


def drawn(inputs: ScoreInputs) -> Scores:
    """Return a random draw with chances in proportion to the fourth root of the Fisher information (Gumbel top-k)."""
    generator = torch.Generator().manual_seed(torch.initial_seed() % (1 << 31))
    found = {}
    for name, f in known(inputs, "fisher").items():
        uniform = torch.rand(f.shape, generator=generator).clamp_(1e-12, 1 - 1e-7)
        found[name] = 0.25 * (f + 1e-38).log() - (-uniform.log()).log()
    return found


def consistent(inputs: ScoreInputs) -> Scores:
    """Return the mean gradient over the root mean square of batch gradients: AdamW's own step, summed up in place."""
    mean, square = known(inputs, "gradient"), known(inputs, "fisher_batch")
    return {name: g / (square[name].sqrt() + 1e-12) for name, g in mean.items()}


def steady(inputs: ScoreInputs) -> Scores:
    """Return the mean gradient over the fourth root of batch Fisher information: size and consistency."""
    mean, square = known(inputs, "gradient"), known(inputs, "fisher_batch")
    return {name: g / (square[name].pow(0.25) + 1e-12) for name, g in mean.items()}


def allotted(inputs: ScoreInputs) -> Scores:
    """Return a random draw in which a tensor's weights have chances in proportion to its mean root Fisher information.

    Budgets per layer as in GEM (Kang et al. 2025), positions by chance (Efraimidis and Spirakis 2006).
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() % (1 << 31))
    fisher = known(inputs, "fisher")
    weights = {name: float(f.sqrt().mean()) for name, f in fisher.items()}
    mean = sum(weights.values()) / len(weights)
    return {
        name: torch.rand(f.shape, generator=generator, dtype=torch.float64).log() / (weights[name] / mean + 1e-6)
        for name, f in fisher.items()
    }


def mixed(inputs: ScoreInputs) -> Scores:
    """Return a random draw with chances in proportion to `movement_short`: chosen and random ones (Gumbel top-k)."""
    generator = torch.Generator().manual_seed(torch.initial_seed() % (1 << 31))
    found = {}
    for name, moved in movement_short(inputs).items():
        uniform = torch.rand(moved.shape, generator=generator).clamp_(1e-12, 1 - 1e-7)
        found[name] = (moved + 1e-38).log() - (-uniform.log()).log()
    return found


def movement_short(inputs: ScoreInputs) -> Scores:
    """Return how far weights move in a single epoch, at half the rate of `movement`."""
    return inputs.compute("movement", epochs=1, learning_rate=1e-4).scores


def movement_long(inputs: ScoreInputs) -> Scores:
    """Return how far weights move in three epochs, at half the rate of `movement`."""
    return inputs.compute("movement", epochs=3, learning_rate=1e-4).scores


def movement_by_block(inputs: ScoreInputs) -> Scores:
    """Return how far weights move in an epoch that trains their own block alone: a sixth of the optimizer's memory."""
    blocks: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in inputs.parameters.items():
        blocks.setdefault(name.split(".layer.")[1].split(".")[0], {})[name] = parameter
    found: Scores = {}
    for block in blocks.values():
        found |= movement_short(replace(inputs, parameters=block))
    return found


def biased(inputs: ScoreInputs) -> Scores:
    """Return a random draw that takes all biases and norms first (BitFit, Ben Zaken et al. 2022)."""
    generator = torch.Generator().manual_seed(torch.initial_seed() % (1 << 31))
    return {
        name: torch.rand(w.shape, generator=generator) + (0.0 if _is_matrix(w) else 1.0)
        for name, w in inputs.parameters.items()
    }


def small(inputs: ScoreInputs) -> Scores:
    """Return how near to zero each weight is."""
    return {name: -w.detach().abs().float() for name, w in inputs.parameters.items()}


_OF_DATA = (
    *(relative, saliency, balanced, shared, small_first, drawn, consistent, steady, allotted),
    *(mixed, movement_short, movement_long, movement_by_block),
)
for _score in _OF_DATA:
    register_score(_score.__name__, _score, replace=True)
for _score in (biased, small):
    register_score(_score.__name__, _score, needs_data=False, replace=True)
for _name in ("fisher", "gradient"):
    register_score(f"known {_name}", partial(known, score=_name), replace=True)
