"""Scores by name: the built-in ones, and those that users register."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from peft_childtune.errors import ConfigError, ScoreError
from peft_childtune.scores.inputs import ScoreInputs
from peft_childtune.scores.movement import movement_scores
from peft_childtune.scores.preserve import preserved
from peft_childtune.scores.result import ScoreResult
from peft_childtune.scores.score import DATA_SCORES

__all__ = ["ScoreFunction", "compute_scores", "is_score", "register_score", "score_names", "sees_data"]


ScoreFunction = Callable[[ScoreInputs], Mapping[str, Tensor]]


@dataclass(frozen=True)
class _Registered:
    function: ScoreFunction
    needs_data: bool


_BUILT_IN = (*sorted(DATA_SCORES), "movement", "magnitude", "random")
_registered: dict[str, _Registered] = {}


def register_score(name: str, function: ScoreFunction, *, needs_data: bool = True, replace: bool = False) -> None:
    """Make `ChildTuningConfig(score=name)` choose the child by a function of your own.

    Register it in every process, before the configuration is made. A saved adapter loads without it.

    Args:
        name: any that is not taken.
        function: takes `ScoreInputs`, returns one floating-point tensor per parameter, of its shape; higher = worth
            training. With several processes each calls it on its own share of the data, and all have to return the
            same scores: children that differ are refused. (`inputs.compute` returns the same on all.)
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
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"score={name!r} is no name; give a string.")
    if name in _BUILT_IN:
        raise ConfigError(f"score={name!r} is built in; give your own score another name.")
    if name in _registered and not replace:
        raise ConfigError(f"score={name!r} is registered already; give another name, or replace=True.")
    if not callable(function):
        raise ConfigError(f"score={name!r}: {type(function).__name__} cannot be called; give a function.")
    _registered[name] = _Registered(function, needs_data)


def score_names() -> list[str]:
    """Return the names that `ChildTuningConfig.score` may have: the built-in ones, then the registered ones."""
    return [*_BUILT_IN, *_registered]


def is_score(name: object) -> bool:
    """Return whether a score goes by this name."""
    return name in _BUILT_IN or name in _registered


def sees_data(name: str) -> bool:
    """Return whether a score looks at data; False for one that is not known here, as in a loaded configuration."""
    return name in (*DATA_SCORES, "movement") or (name in _registered and _registered[name].needs_data)


def compute_scores(name: str, inputs: ScoreInputs) -> ScoreResult:
    """Return the scores that go by a name, checked.

    Raises:
        ScoreError: a registered function has returned other names, shapes or types than it should, or NaN; or a score
            of data has failed, see `score_parameters`.
    """
    if name not in _registered and name != "movement":
        return inputs.compute(name)
    home = next(iter(inputs.parameters.values())).device
    with preserved(inputs.model, home):
        if name == "movement":
            return movement_scores(inputs)
        found = _registered[name].function(inputs)
    return ScoreResult(_checked(name, found, inputs.parameters), num_examples=0, num_batches=0, loss=float("nan"))


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
        if bool(scores.isnan().any()):
            raise ScoreError(f"{name}: score={score!r} has returned NaN; look for 0 / 0 in it, and at the data.")
        checked[name] = scores.detach()
    return checked
