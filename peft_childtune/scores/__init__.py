"""Scores: how much each weight matters for the task, by its data or by itself. Works on any `nn.Module`."""

from __future__ import annotations

from peft_childtune.scores.batch import batch_size, examples
from peft_childtune.scores.result import ScoreResult, magnitude_scores
from peft_childtune.scores.score import DATA_SCORES, score_parameters

__all__ = ["DATA_SCORES", "ScoreResult", "batch_size", "examples", "magnitude_scores", "score_parameters"]
