"""Batches of any make can be measured, moved and cut into examples."""

from __future__ import annotations

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from peft_childtune.errors import ScoreError
from peft_childtune.scores.batch import batch_size, detached_to, examples, label_counts, lacks_labels, loss_of

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"x": torch.zeros(5, 2), "labels": torch.zeros(3)}, 3),
        ({"scale": torch.tensor(2.0), "x": torch.zeros(5, 2)}, 5),
        ((torch.zeros(4), torch.zeros(4)), 4),
        ({"texts": ["a", "b"]}, 2),
        ([{"x": torch.zeros(7)}, {"x": torch.zeros(9)}, {"x": torch.zeros(7)}], 3),
        (BatchEncoding({"input_ids": torch.zeros(6, 2)}), 6),
        ({"x": {"deep": [torch.zeros(2, 2)]}}, 2),
        ({"scale": 3}, None),
        (7, None),
    ],
)
def test_the_size_comes_from_the_labels_or_else_from_the_first_tensor(batch, size):
    assert batch_size(batch) == size


def test_an_example_is_cut_from_everything_that_has_one_part_per_example():
    batch = {
        "x": torch.arange(6).view(3, 2),
        "deep": ({"y": torch.tensor([1, 2, 3])}, [torch.tensor([4, 5, 6])]),
        "names": ["a", "b", "c"],
        "pictures": [torch.zeros(1), torch.ones(2), torch.zeros(5)],
        "table": torch.zeros(2, 3),
        "flag": True,
    }
    one = examples(batch, slice(1, 2), size=3)
    assert one["x"].tolist() == [[2, 3]]
    assert one["deep"][0]["y"].tolist() == [2] and one["deep"][1][0].tolist() == [5]
    assert one["names"] == ["b"] and [p.tolist() for p in one["pictures"]] == [[1.0, 1.0]]
    assert one["table"] is batch["table"] and one["flag"] is True


def test_containers_keep_their_types():
    batch = (Pair(torch.zeros(2), torch.ones(2)), BatchEncoding({"input_ids": torch.zeros(2, 3)}))
    pair, encoding = examples(batch, slice(0, 1), size=2)
    assert isinstance(pair, Pair) and pair.y.tolist() == [1.0]
    assert isinstance(encoding, BatchEncoding) and encoding.input_ids.shape == (1, 3)
    assert batch[1].input_ids.shape == (2, 3)


def test_a_list_of_mappings_is_a_list_of_examples():
    batch = [{"x": torch.zeros(7)}, {"x": torch.ones(9)}]
    assert examples(batch, slice(1, 2), size=2) == [batch[1]]


def test_tensors_are_moved_at_any_depth_and_detached():
    x = torch.zeros(2, requires_grad=True)
    moved = detached_to(UserDict({"a": [x, (x, "text")]}), torch.device("meta"))
    assert isinstance(moved, UserDict) and moved["a"][1][1] == "text"
    for tensor in (moved["a"][0], moved["a"][1][0]):
        assert tensor.device.type == "meta" and not tensor.requires_grad


def test_labels_are_counted_with_and_without_the_first_position():
    batch = {"labels": torch.tensor([[3, -100, 4], [5, -100, -100]])}
    assert label_counts(batch, size=2).tolist() == [2, 1]
    assert label_counts(batch, size=2, shifted=True).tolist() == [1, 0]


@pytest.mark.parametrize("labels", [torch.zeros(2, 3), torch.zeros(4, dtype=torch.long), None, [1, 2]])
def test_what_are_no_class_labels_is_not_counted(labels):
    assert label_counts({"labels": labels}, size=2) is None


@pytest.mark.parametrize(
    ("labels", "lacking"), [([[-100, -100]], True), ([[7, -100]], True), ([[-100, 7]], False), ([0], False)]
)
def test_an_example_lacks_labels_if_none_counts_or_only_the_first(labels, lacking):
    assert lacks_labels({"labels": torch.tensor(labels)}) is lacking


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


class WithLoss:
    loss = torch.tensor(2.0)


@pytest.mark.parametrize(
    "outputs",
    [{"loss": torch.tensor(2.0)}, WithLoss(), (torch.tensor(2.0), torch.zeros(3)), UserDict(loss=torch.tensor([2.0]))],
    ids=["mapping", "attribute", "tuple", "one element"],
)
def test_the_loss_is_found_in_whatever_a_model_returns(outputs):
    loss = loss_of(Returns(outputs), {"x": 1}, loss_fn=None, index=0)
    assert loss.shape == () and loss == 2


@pytest.mark.parametrize("outputs", [{"logits": torch.zeros(3)}, (torch.zeros(3),), torch.zeros(3), (), None])
def test_outputs_without_a_loss_raise_and_say_what_to_do(outputs):
    with pytest.raises(ScoreError, match=r"batch 4: the model returned no loss; pass labels in the batch or loss_fn="):
        loss_of(Returns(outputs), {"x": 1}, loss_fn=None, index=4)
