"""Scores by name: the built-in ones, and those that users register."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from peft_childtune.errors import ConfigError, ScoreError
from peft_childtune.scores.inputs import ScoreInputs
from peft_childtune.scores.preserve import preserved
from peft_childtune.scores.result import ScoreResult
from peft_childtune.scores.score import DATA_SCORES
from peft_childtune.untrusted import shown

__all__ = ["MAX_NAME", "ScoreFunction", "compute_scores", "is_score", "register_score", "score_names", "sees_data"]


ScoreFunction = Callable[[ScoreInputs], Mapping[str, Tensor] | ScoreResult]
MAX_NAME = 128  # characters; a name comes from files, too


@dataclass(frozen=True)
class _Score:
    needs_data: bool
    function: ScoreFunction | None = None  # None for those of `ScoreInputs.compute`


_BUILT_IN = {
    **{name: _Score(needs_data=True) for name in sorted(DATA_SCORES)},
    "movement": _Score(needs_data=True),
    "magnitude": _Score(needs_data=False),
    "random": _Score(needs_data=False),
}
_registered: dict[str, _Score] = {}


def register_score(name: str, function: ScoreFunction, *, needs_data: bool = True, replace: bool = False) -> None:
    """Make `ChildTuningConfig(score=name)` choose the child by a function of your own.

    Register it in every process, before the configuration is made. A saved adapter loads without it.

    Args:
        name: any that is not taken.
        function: takes `ScoreInputs`, returns one floating-point tensor per parameter, of its shape; higher = worth
            training, -inf = never before any other. With several processes each calls it on its own share of the data,
            and all have to return the same scores: children that differ are refused. (`inputs.compute` returns the
            same on all.)
        needs_data: whether it looks at `inputs.dataloader`. If not, `get_peft_model` alone chooses the child.
        replace: whether it may replace a score that was registered under that name before.

    Raises:
        ConfigError: the name is none, is a built-in one, or is taken.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_childtune import ChildTuningConfig, get_child_network, register_score
        >>> def smallest(inputs):
        ...     return {name: -weight.detach().abs() for name, weight in inputs.parameters.items()}
        >>> register_score("smallest", smallest, needs_data=False)
        >>> base = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> config = ChildTuningConfig(target_modules=["0", "2"], score="smallest", density=0.25)
        >>> get_child_network(get_peft_model(base, config))
        ChildNetwork(4 tensors, 12 of 46 entries, density 0.261)
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or name != name.strip() or not name.isprintable():
        raise ConfigError(f"score={shown(name)} is no name; give a string of up to {MAX_NAME} printable characters.")
    if name in _BUILT_IN:
        raise ConfigError(f"score={name!r} is built in; give your own score another name.")
    if name in _registered and not replace:
        raise ConfigError(f"score={name!r} is registered already; give another name, or replace=True.")
    if not callable(function):
        raise ConfigError(f"score={name!r}: {type(function).__name__} cannot be called; give a function.")
    _registered[name] = _Score(needs_data, function)


def score_names() -> list[str]:
    """Return the names that `ChildTuningConfig.score` may have: the built-in ones, then the registered ones."""
    return [*_BUILT_IN, *_registered]


def is_score(name: str) -> bool:
    """Return whether a score goes by this name."""
    return name in _BUILT_IN or name in _registered


def sees_data(name: str) -> bool:
    """Return whether a score looks at data; False for one that is not known here, as in a loaded configuration."""
    return is_score(name) and _find(name).needs_data


def compute_scores(name: str, inputs: ScoreInputs) -> ScoreResult:
    """Return the scores that go by a name, checked.

    Raises:
        ConfigError: no score goes by it.
        ScoreError: a registered function has returned other names, shapes or types than it should, or what cannot be
            ranked; or a score of data has failed, see `score_parameters`.
    """
    function = _find(name).function
    if function is None:
        return inputs.compute(name)
    with preserved(inputs.model, next(inputs.model.parameters()).device):
        found = function(inputs)
    result = found if isinstance(found, ScoreResult) else ScoreResult(found)  # type: ignore[arg-type]  # checked next
    return replace(result, scores=_checked(name, result.scores, inputs.parameters))


def _find(name: str) -> _Score:
    if not is_score(name):
        raise ConfigError(
            f"score={shown(name)} is not registered here: peft_childtune.register_score(name, function), or install a "
            "child that was chosen before: select_child_network(model, network=...)."
        )
    return _BUILT_IN.get(name) or _registered[name]


def _checked(score: str, found: object, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    way_out = "return one floating-point tensor per parameter of `inputs.parameters`, of its shape"
    if not isinstance(found, Mapping):
        raise ScoreError(f"score={score!r} has returned a {type(found).__name__}; {way_out}, in a dict.")
    if differing := sorted(map(str, set(found) ^ set(parameters))):
        side = "no scores came back for it" if differing[0] in parameters else "is no covered parameter"
        raise ScoreError(f"{differing[0]}: score={score!r}: {side}; {way_out}.")
    checked: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        scores = found[name]
        if not isinstance(scores, Tensor) or scores.shape != parameter.shape or not scores.is_floating_point():
            what = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ScoreError(f"{name}: score={score!r} has returned {what} for {tuple(parameter.shape)}; {way_out}.")
        if scores.layout is not torch.strided or scores.is_meta:
            raise ScoreError(f"{name}: score={score!r} has returned a sparse or meta tensor; {way_out}, dense.")
        if bool(scores.isnan().any()) or bool(scores.isposinf().any()):
            raise ScoreError(
                f"{name}: score={score!r} has returned NaN or +inf; look for divisions by zero in it, and at the data."
            )
        checked[name] = scores.detach()
    return checked
