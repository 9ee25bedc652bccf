"""The fault table: each fault, the guard against it, and the tests that must fail without that guard.

    python -m tests.trust.guards [WORD]

copies the project, takes out one guard at a time, runs the tests of its row, and prints what failed; with a word, only
the rows that hold it. A row whose tests pass without their guard proves nothing: the program then ends with status 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        fault: what happens to an adapter, a base or a process.
        outcome: what must come of it.
        file: of the guard, in the package.
        guard: its text.
        without: what stands there once it is taken out.
        tests: the tests that inject the fault, as pytest's arguments.
    """

    fault: str
    outcome: str
    file: str
    guard: str
    without: str
    tests: str


_VERIFICATION, _SEAL, _LAYER = "verification.py", "seal.py", "tuner/layer.py"
ROWS = [
    Row(
        "a bit of a code or delta flipped",
        "IntegrityError naming the tensor",
        _VERIFICATION,
        "if child_digest(name, children[name]) != digest:",
        "if False:",
        "tests/test_verification.py",
    ),
    Row(
        "a bit of a head flipped",
        "IntegrityError naming the tensor",
        _VERIFICATION,
        "if (same := matches(fingerprint, head_fingerprint(tensor))) is False:",
        "if (same := True) is False:",
        "tests/test_verification.py",
    ),
    Row(
        "a bit of the seal flipped",
        "IntegrityError",
        _SEAL,
        "if xxhash.xxh3_64_digest(raw[:-8]) != raw[-8:]:",
        "if False:",
        "tests/test_seal.py",
    ),
    Row(
        "a seal of another length than its counts say",
        "FormatError before memory is asked for",
        _SEAL,
        "if major == _MAJOR and len(raw) != seal_bytes(n, m):",
        "if False:",
        "tests/test_seal.py",
    ),
    Row(
        "a newer major version", "FormatError: update", _SEAL, "if major != _MAJOR:", "if False:", "tests/test_seal.py"
    ),
    Row(
        "an unknown required feature",
        "FormatError: update",
        _SEAL,
        "if unknown := features & ~_FEATURES:",
        "if unknown := 0:",
        "tests/test_seal.py",
    ),
    Row(
        "a field of the configuration changed; configuration and weights of two saves",
        "IntegrityError: they do not belong together",
        _VERIFICATION,
        "if config is not None and config != saved.config:",
        "if False:",
        "tests/hostile/test_flips.py tests/trust/test_durable_saving.py -k own_field or another_score",
    ),
    Row(
        "a tensor too many or too few",
        "IntegrityError",
        _VERIFICATION,
        'yield from _names("base tensor", saved.children, children)',
        "pass",
        "tests/test_verification.py",
    ),
    Row(
        "another base: one tensor x 1.01",
        "BaseMismatchError naming tensor, base and revision",
        _VERIFICATION,
        "if (same := matches(then, now)) is False:",
        "if (same := True) is False:",
        "tests/tuner/test_base_check.py tests/contract/test_refusals.py -k other_base or scaled",
    ),
    Row(
        "another base, between the samples",
        "BaseMismatchError from verify_base(full=True)",
        "tuner/base_check.py",
        "elif now.whole != then.whole:",
        "elif False:",
        "tests/tuner/test_base_check.py",
    ),
    Row(
        "a code that stands for more entries than there are values",
        "FormatError before they are listed",
        _SEAL,
        ", nnz=values.numel())",
        ")",
        "tests/test_seal.py",
    ),
    Row(
        "a delta that is not finite, loaded",
        "DeltaError naming the tensor",
        _VERIFICATION,
        "check_finite(name, children[name].values)",
        "pass",
        "tests/test_verification.py",
    ),
    Row(
        "a delta that is not finite, saved",
        "DeltaError, the old file stays",
        "tuner/saving.py",
        "check_finite(name, values)",
        "pass",
        "tests/tuner/test_saving.py -k finite",
    ),
    Row(
        "a delta of the wrong length, saved",
        "SelectionError",
        "tuner/saving.py",
        "if kept not in (None, values.numel()):",
        "if False:",
        "tests/tuner/test_saving.py -k another_length",
    ),
    Row(
        "a seal missing",
        "IntegrityError",
        "tuner/adopting.py",
        "if len(seals) != 1:",
        "if False:",
        "tests/tuner/test_loading.py",
    ),
    Row(
        "a tensor that matches nothing",
        "IntegrityError naming it",
        "tuner/adopting.py",
        "if left:",
        "if False:",
        "tests/contract/test_refusals.py -k belongs_nowhere",
    ),
    Row(
        "base weights in the file",
        "IntegrityError before they are written",
        "tuner/adopting.py",
        "if key not in heads and path not in passing and",
        "if False and",
        "tests/contract/test_refusals.py -k base_weights",
    ),
    Row(
        "a code without its delta",
        "IntegrityError naming the tensor",
        "tuner/adopting.py",
        "if (code is None) != (values is None):",
        "if False:",
        "tests/tuner/test_loading.py -k half_a_pair",
    ),
    Row(
        "transformers' own loader, which ignores tensors too many",
        "IntegrityError before anything is written",
        "tuner/model.py",
        "watch(pending)",
        "pass",
        "tests/hostile/test_native.py",
    ),
    Row(
        "a pickle beside a configuration that knows of none",
        "UnsupportedError",
        "tuner/config_file.py",
        "elif pickle.exists() and not pickled:",
        "elif False:",
        "tests/hostile/test_native.py -k pickle",
    ),
    Row(
        "fields of the wrong type",
        "ConfigError naming field and value",
        "tuner/config.py",
        "check_types(",
        "len(",
        "tests/hostile/test_configs.py",
    ),
    Row(
        "a header of two entries with one name",
        "FormatError",
        "untrusted.py",
        "if len(found) != len(pairs):",
        "if False:",
        "tests/hostile/test_bombs.py tests/hostile/test_fixtures.py",
    ),
    Row(
        "a child network file that asks for gigabytes",
        "FormatError within 5 s and 200 MB",
        "network.py",
        "_check_demands(path, codes, found, _MAX_UNSEALED if seal is None else _MAX_UNLISTED)",
        "pass",
        "tests/hostile/test_networks.py",
    ),
    Row(
        "a save that fails before its bytes are on the disk",
        "the old file stays whole",
        "files.py",
        "os.replace(name, target)",
        "target.write_bytes(data); os.fsync(os.open(target, os.O_RDONLY)); os.replace(name, target)",
        "tests/test_files.py",
    ),
    Row(
        "a power cut after a save",
        "file and folder are flushed",
        "files.py",
        "            os.fsync(file.fileno())\n",
        "",
        "tests/test_files.py tests/trust/test_durable_saving.py -k flushed or disk",
    ),
    Row(
        "weights that PEFT has written unflushed, with mode 0600",
        "flushed, as the umask asks",
        "tuner/config_file.py",
        "settle(weights)",
        "pass",
        "tests/trust/test_durable_saving.py -k umask or flushed",
    ),
    Row(
        "a killed save's temporary files",
        "removed by the next save, those of living writers not",
        "files.py",
        "and not _may_be_written(path)",
        "",
        "tests/trust/test_durable_saving.py -k removes or renamed",
    ),
    Row(
        "a reader that opens a temporary file while another process sweeps it",
        "neither of them is ended by a signal",
        "files.py",
        "fcntl.F_RDLCK",
        "fcntl.F_WRLCK",
        "tests/trust/test_durable_saving.py -k reader",
    ),
    Row(
        "a head of another shape than the model's",
        "refused before any of the adapter is in the model",
        "tuner/adopting.py",
        "if own.shape != state_dict[key].shape:",
        "if False:",
        "tests/tuner/test_loading.py -k head_of_another",
    ),
    Row(
        "a merge broken off while it writes",
        "the base bit for bit",
        _LAYER,
        "self.unmerge_to(before)\n                raise",
        "raise",
        "tests/trust/test_transactions.py -k by_itself",
    ),
    Row(
        "a merge broken off after it has written",
        "the base bit for bit",
        "weights.py",
        "    if record is not None:\n        record(replaced)\n    if indices is None:\n",
        "    if indices is None:\n",
        "tests/trust/test_transactions.py -k merge",
    ),
    Row(
        "a merge broken off before it has read what it replaces",
        "the base bit for bit",
        "weights.py",
        "    if not replaced.is_written.value:\n        return\n",
        "",
        "tests/trust/test_transactions.py -k merge",
    ),
    Row(
        "an unmerge broken off in a layer",
        "everything merged still, bit for bit",
        _LAYER,
        "self.merge_back(before)\n                raise",
        "raise",
        "tests/trust/test_transactions.py -k unmerge",
    ),
    Row(
        "an unmerge broken off between layers",
        "everything merged still, bit for bit",
        "tuner/model.py",
        "layer.merge_back(merged)",
        "pass",
        "tests/trust/test_transactions.py -k unmerge",
    ),
    Row(
        "an unloading broken off",
        "the wrapped model as it was",
        "tuner/model.py",
        "setattr(parent, name, module)",
        "pass",
        "tests/trust/test_transactions.py -k unload",
    ),
]


def without(row: Row, project: Path) -> str:
    """Take a guard out of a copy of the project; return the file's text as it was."""
    path = project / "peft_childtune" / row.file
    text = path.read_text()
    if row.guard not in text:
        raise SystemExit(f"{row.file}: holds no {row.guard!r}; the table is out of date.")
    path.write_text(text.replace(row.guard, row.without))
    return text


def failing(row: Row, project: Path) -> list[str]:
    """Return the names of the tests of a row that fail in a project."""
    files, _, words = row.tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *files.split()]
    run = subprocess.run(
        [*command, *(["-k", words] if words else [])],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return re.findall(r"^(?:FAILED|ERROR) (?:\S+::)?(\S+)", run.stdout, re.MULTILINE)


def main(word: str = "") -> int:
    """Print a line for each row; return how many guards nothing misses."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        shutil.copytree(_ROOT, project, ignore=shutil.ignore_patterns(".git", ".*_cache", "*.png", "__pycache__"))
        for row in ROWS:
            if word not in f"{row.fault} {row.file} {row.guard}":
                continue
            text = without(row, project)
            red = failing(row, project)
            (project / "peft_childtune" / row.file).write_text(text)
            missed += not red
            shown = f"{len(red)} red, for example {red[0]}" if red else "NOTHING RED"
            print(f"{row.fault} -> {row.outcome}\n    without `{row.guard.strip()}`: {shown}", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:2])))
