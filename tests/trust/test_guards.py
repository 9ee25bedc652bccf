"""The fault table speaks of the code as it is."""

from __future__ import annotations

import pytest

from .guards import _ROOT, ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault)
def test_every_guard_of_the_fault_table_is_there_once_and_its_tests_are(row):
    assert (_ROOT / "peft_childtune" / row.file).read_text().count(row.guard) == 1
    files, _, _ = row.tests.partition(" -k ")
    assert all((_ROOT / name).is_file() for name in files.split())
