"""Readers of a folder into which another process saves get the old adapter, the new one, or a named error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_childtune import ChildTuningError, get_deltas
from tests.hostile.artifacts import photograph, small
from tests.hostile.writing import adapter

_ROOT = Path(__file__).parents[2]
# PEFT writes the configuration in place, and opens it before any code of this method runs; safetensors opens the
# weights twice by their name, and torch refuses the second file where it is shorter than the first one was
_OF_PEFT = (json.JSONDecodeError, KeyError, RuntimeError)


def _read_while_writing(folder: Path, seconds: float) -> Counter[str]:
    known = [{name: delta.values for name, delta in get_deltas(adapter(number)).items()} for number in (0, 1)]
    adapter(0).save_pretrained(folder)
    before = photograph(small())
    outcomes: Counter[str] = Counter()
    writer = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.hostile.writing", folder, str(seconds)],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while writer.poll() is None:
            base = small()
            try:
                found = get_deltas(PeftModel.from_pretrained(base, folder))
            except ChildTuningError as error:
                outcomes[type(error).__name__] += 1
                assert photograph(base) == before
                continue
            except _OF_PEFT as error:
                if isinstance(error, RuntimeError) and "mapping size" not in str(error):
                    raise
                outcomes[f"PEFT: {type(error).__name__}"] += 1
                continue
            of = [
                all(torch.equal(delta.values, one[name]) for name, delta in found.items() if name in one)
                and {name: len(values) for name, values in one.items()}
                == {name: delta.nnz for name, delta in found.items()}
                for one in known
            ]
            assert sum(of) == 1, "a mixture of two adapters was loaded"
            outcomes[f"adapter {of.index(True)}"] += 1
    finally:
        writer.kill()
        printed = writer.communicate()[0]
    assert writer.returncode == 0
    outcomes["saves"] = int(printed)
    return outcomes


def test_a_reader_gets_the_old_or_the_new_adapter_or_a_named_error(tmp_path):
    outcomes = _read_while_writing(tmp_path, 3)
    assert outcomes["saves"] > 1
    assert outcomes["adapter 0"] + outcomes["adapter 1"] > 0


@pytest.mark.long
def test_a_reader_gets_the_old_or_the_new_adapter_or_a_named_error_for_a_minute(tmp_path):
    outcomes = _read_while_writing(tmp_path, 60)
    print(outcomes)
    assert outcomes["adapter 0"] > 10 and outcomes["adapter 1"] > 10
