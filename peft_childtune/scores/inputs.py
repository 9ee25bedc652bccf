"""What a score is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_childtune.errors import ScoreError
from peft_childtune.scores.movement import movement_scores
from peft_childtune.scores.result import ScoreResult, magnitude_scores
from peft_childtune.scores.score import DATA_SCORES, score_parameters

__all__ = ["ScoreInputs"]


@dataclass(frozen=True, eq=False)
class ScoreInputs:
    """What a score is computed from.

    Attributes:
        model: in eval mode, no parameter trainable, every adapter off and unmerged. A score that changes weights puts
            them back; modes, `requires_grad`, gradients, buffers and the random state are put back for it.
        parameters: the covered base parameters, by the base model's own names.
        heads: what is trained whole beside the child, by name: a fresh head.
        dataloader: as given to `select_child_network`, in each process its own; None for a score without data.
        num_batches: read at most so many batches; None for all.
        loss_fn: takes the model and a batch, returns a scalar; None for `model(**batch).loss`.
        scores_device: where to keep scores; None for beside each parameter.
        show_progress: whether to show a progress bar.
    """

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    heads: Mapping[str, nn.Parameter] = field(default_factory=dict)
    dataloader: Iterable[Any] | None = None
    num_batches: int | None = None
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None
    scores_device: torch.device | str | None = None
    show_progress: bool = True

    def compute(self, score: str, *, epochs: int | None = None, learning_rate: float | None = None) -> ScoreResult:
        """Return a built-in score of the same parameters on the same data, to build upon.

        Args:
            score: `fisher`, `fisher_batch`, `gradient`, `magnitude` or `movement`.
            epochs: of `movement` only: how often the data are read; None for 4.
            learning_rate: of `movement` only, which trains all weights; None for 2e-4.

        Raises:
            ScoreError: it is another one, has no such options, or needs data where there are none.
        """
        options: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate}
        options = {name: value for name, value in options.items() if value is not None}
        known = (*sorted(DATA_SCORES), "movement")
        if score not in (*known, "magnitude"):
            raise ScoreError(f"score={score!r}: only {', '.join(known)} and magnitude can be built upon.")
        if options and score != "movement":
            raise ScoreError(f"score={score!r} takes no {' and no '.join(options)}; only 'movement' trains.")
        if score != "magnitude" and self.dataloader is None:
            raise ScoreError(f"score={score!r} looks at data; register what uses it with `needs_data=True`.")
        return replace(self._computed(score, **options), source=score)

    def _computed(self, score: str, **options: Any) -> ScoreResult:
        if score == "magnitude":
            return ScoreResult(magnitude_scores(self.parameters))
        if score == "movement":
            return movement_scores(self, **options)
        assert self.dataloader is not None  # it was checked
        return score_parameters(
            self.model,
            self.parameters,
            self.dataloader,
            score=score,
            num_batches=self.num_batches,
            loss_fn=self.loss_fn,
            scores_device=self.scores_device,
            show_progress=self.show_progress,
        )
