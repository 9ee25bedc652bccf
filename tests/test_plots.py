"""The picture of a child shows each tensor's density in its place."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from peft_childtune import SelectionDiagnosis, UnsupportedError
from peft_childtune.plots import plot_child

_DIAGNOSIS = SelectionDiagnosis(
    nnz=6,
    covered=40,
    total=50,
    blocks={"h.0": (5, 20), "h.1": (0, 12), "outside blocks": (1, 8)},
    kinds={"fc.weight": (4, 24), "fc.bias": (1, 8), "norm.weight": (1, 8)},
    tensors={"h.0.fc.weight": (4, 12), "h.0.fc.bias": (1, 8), "h.1.fc.weight": (0, 12), "norm.weight": (1, 8)},
    lines={"rows": 0.5, "columns": 0.5},
)


def test_every_density_is_drawn_in_the_row_of_its_block_and_the_column_of_its_kind():
    ax = plot_child(_DIAGNOSIS)
    drawn = np.ma.filled(ax.images[0].get_array(), 0)
    np.testing.assert_allclose(drawn, [[4 / 12, 1 / 8, 0], [0, 0, 0], [0, 0, 1 / 8]])
    assert [label.get_text() for label in ax.get_xticklabels()] == list(_DIAGNOSIS.kinds)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(_DIAGNOSIS.blocks)


def test_it_is_drawn_where_asked_and_can_be_saved(tmp_path):
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 2)
    assert plot_child(_DIAGNOSIS, ax=axes[1]) is axes[1]
    axes[1].figure.savefig(tmp_path / "child.png")
    assert (tmp_path / "child.png").stat().st_size > 1000


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(UnsupportedError, match="pip install"):
        plot_child(_DIAGNOSIS)
