"""How a child spreads: counted by hand on a small model."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peft_childtune import (
    ChildNetwork,
    ChildTuningConfig,
    SelectionError,
    diagnose_selection,
    select_child_network,
)
from peft_childtune.tuner.diagnosis import diagnosis_of, warnings_of


def _diagnosis(indices, shapes, *, groups=None):
    network = ChildNetwork.from_indices(
        {name: torch.tensor(at, dtype=torch.int64) for name, at in indices.items()}, shapes
    )
    return diagnosis_of(network, groups=groups or dict.fromkeys(shapes, ""), total=1000)


def test_entries_are_counted_by_block_kind_and_tensor():
    shapes = {f"h.{i}.fc.weight": (2, 4) for i in range(3)} | {"norm.bias": (4,)}
    indices = {"h.0.fc.weight": [0, 1], "h.1.fc.weight": [7], "h.2.fc.weight": [], "norm.bias": [3]}
    found = _diagnosis(indices, shapes, groups={name: name[:3] if name.startswith("h") else "" for name in shapes})
    assert (found.nnz, found.covered, found.total) == (4, 28, 1000)
    assert found.blocks == {"h.0": (2, 8), "h.1": (1, 8), "h.2": (0, 8), "outside blocks": (1, 4)}
    assert found.kinds == {"fc.weight": (3, 24), "norm.bias": (1, 4)}
    assert found.empty == ["h.2.fc.weight"]
    assert found.largest == ("h.0.fc.weight", 0.5, 8 / 28)


def test_the_share_of_lines_that_hold_half_tells_an_even_child_from_one_in_few_columns():
    even = [row * 10 + row for row in range(10)]
    column = [row * 10 + 3 for row in range(10)]
    assert _diagnosis({"w": even}, {"w": (10, 10)}).lines == {"rows": 0.5, "columns": 0.5}
    assert _diagnosis({"w": column}, {"w": (10, 10)}).lines == {"rows": 0.5, "columns": 0.1}


def test_matrices_of_different_shapes_count_by_what_they_keep():
    shapes = {"wide": (2, 40), "square": (10, 10), "bias": (10,)}
    indices = {"wide": list(range(80)), "square": [row * 10 for row in range(10)], "bias": [1]}
    assert _diagnosis(indices, shapes).lines == {"rows": 0.5, "columns": pytest.approx((80 * 0.5 + 10 * 0.1) / 90)}


def test_without_matrices_there_are_no_lines():
    found = _diagnosis({"a": [0], "b": []}, {"a": (3,), "b": (4, 4)})
    assert found.lines == {} and "rows" not in str(found)


def test_rows_are_outputs_in_a_transposed_layer_too():
    model = get_peft_model(
        nn.Sequential(Conv1D(6, 5)), ChildTuningConfig(target_modules=["0"], score="random", density=0.1)
    )
    first_output = torch.arange(5) * 6  # of a weight of shape (inputs, outputs)
    network = ChildNetwork.from_indices(
        {"0.weight": first_output, "0.bias": torch.zeros(0, dtype=torch.int64)}, _shapes(model)
    )
    select_child_network(model, network=network)
    assert diagnose_selection(model).lines == {"rows": 1 / 6, "columns": 3 / 5}


def _shapes(model):
    return {"0.weight": tuple(model.base_model.model[0].base_layer.weight.shape), "0.bias": (6,)}


@pytest.mark.parametrize(
    ("kept", "warned"),
    [
        ({"a": 60, "b": 40}, True),
        ({"a": 48, "b": 52}, False),
        ({"a": 0, "b": 100}, False),
        ({"a": 0, "b": 0}, False),
        ({"a": 6, "b": 4}, False),  # chance
    ],
)
def test_a_tensor_is_warned_of_if_it_holds_much_more_than_its_share(kept, warned):
    sizes = {"a": 100, "b": 9900}
    found = warnings_of({name: (kept[name], sizes[name]) for name in sizes})
    assert bool(found) == warned
    assert all("a: holds 60% of the child and 1.0%" in each and "scope=" in each for each in found)


def test_a_selection_by_data_warns_and_a_given_or_random_child_does_not():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100), nn.Linear(100, 5, bias=False))
    batch = [(torch.randn(8, 100), torch.randint(5, (8,)))]
    config = ChildTuningConfig(target_modules=["0", "1", "2"], score="fisher", density=0.01)
    with torch.no_grad():
        base[2].weight.mul_(1e-6)  # its own gradient is then far above all others
    model = get_peft_model(base, config)
    loss = {"loss_fn": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), "show_progress": False}
    with pytest.warns(UserWarning, match=r"2\.weight: holds 100% of the child"):
        child = select_child_network(model, batch, **loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_child_network(model, network=child)


def test_the_text_names_what_is_to_be_looked_at():
    found = _diagnosis({"a": list(range(90)), "b": list(range(10))}, {"a": (9, 10), "b": (100, 10)})
    text = str(found)
    assert "2 of 2 tensors have a part in it; the largest part, 90.0%, is in a (8.3% of the covered weights)." in text
    assert text.splitlines()[-1].startswith("Look at this: a: holds 90%")


def test_a_model_without_a_child_is_refused(caplog):
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), ChildTuningConfig(target_modules=["0"], score="fisher"))
    with caplog.at_level(logging.INFO), pytest.raises(SelectionError):
        diagnose_selection(model)
