"""The study's tasks: small training sets, drawn anew for each seed, and test rows that are the same for all."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import assets
from data import Rows

TRAIN_ROWS, TEST_ROWS = 300, 1000
_COMPUTERS = ("comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware")

TASKS: dict[str, Callable[[], assets.Labelled]] = {
    "movie": lambda: assets.vader("movieReviewSnippets"),
    "amazon": lambda: assets.uci("amazon"),
    "yelp": lambda: assets.uci("yelp"),
    "computers": lambda: assets.newsgroups(_COMPUTERS),
    "nyt": lambda: assets.vader("nytEditorialSnippets"),
    "tweets": lambda: assets.vader("tweets"),
    "imdb": lambda: assets.uci("imdb"),
    "candidates": lambda: assets.election_tweets(),
}


@dataclass(frozen=True)
class Split:
    """What one run trains and is tested on."""

    train: Rows
    test: Rows
    num_labels: int


def load(name: str, *, seed: int, train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS) -> Split:
    """Return a task: the test rows depend on nothing, the training rows on the seed; they never overlap.

    `"imdb to movie"` trains on the one and tests on the other.

    Raises:
        KeyError: there is no such task.
        ValueError: it has too few rows, or the two have different numbers of labels.
    """
    name, _, other = name.partition(" to ")
    if other:
        source, target = (
            load(name, seed=seed, train_rows=train_rows, test_rows=test_rows),
            load(other, seed=seed, train_rows=train_rows, test_rows=test_rows),
        )
        if source.num_labels != target.num_labels:
            raise ValueError(f"{name} has {source.num_labels} labels, {other} {target.num_labels}.")
        return Split(source.train, target.test, source.num_labels)
    texts, labels = TASKS[name]()
    rows = Rows([(text,) for text in texts], list(labels))
    order = random.Random(0).sample(range(len(rows)), len(rows))
    count = min(test_rows, len(rows) - train_rows - 50)  # training sets of different seeds have to differ
    if count < 1:
        raise ValueError(f"{name}: {len(rows)} rows are too few for {train_rows} to train on.")
    drawn = random.Random(seed).sample(order[count:], train_rows)
    return Split(rows.take(drawn), rows.take(order[:count]), len(set(labels)))
