"""Programs write their tables into pages between two markers, and touch nothing else."""

from __future__ import annotations

import pytest
from marked import insert

BEGIN, END = "<!-- t:begin -->", "<!-- t:end -->"


def test_only_what_is_between_the_markers_is_replaced():
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert insert(text, "new\n", name="t") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no markers", "is there 0 times"),
        (BEGIN, "t:end --> is there 0 times"),
        (BEGIN * 2 + END, "is there 2 times"),
        (END + BEGIN, "comes before"),
    ],
)
def test_a_readme_without_the_two_markers_in_order_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        insert(text, "new", name="t")
