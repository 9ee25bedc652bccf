"""Scores: how much each weight matters for the task, by its data or by itself. Works on any `nn.Module`."""

from __future__ import annotations

from peft_childtune.scores.batch import batch_size, examples, loss_of
from peft_childtune.scores.inputs import ScoreInputs
from peft_childtune.scores.movement import movement_scores
from peft_childtune.scores.preserve import preserved
from peft_childtune.scores.registry import (
    MAX_NAME,
    ScoreFunction,
    compute_scores,
    is_score,
    register_score,
    score_names,
    sees_data,
)
from peft_childtune.scores.result import ScoreResult, magnitude_scores
from peft_childtune.scores.score import DATA_SCORES, check_data, score_parameters
from peft_childtune.scores.steps import ShortTraining, check_schedule, rereadable

__all__ = [
    "DATA_SCORES",
    "MAX_NAME",
    "ScoreFunction",
    "ScoreInputs",
    "ScoreResult",
    "ShortTraining",
    "batch_size",
    "check_data",
    "check_schedule",
    "compute_scores",
    "examples",
    "is_score",
    "loss_of",
    "magnitude_scores",
    "movement_scores",
    "preserved",
    "register_score",
    "rereadable",
    "score_names",
    "score_parameters",
    "sees_data",
]
