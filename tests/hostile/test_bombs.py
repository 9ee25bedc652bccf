"""Files made to exhaust, confuse or trick a loader: a named error, soon, within bounds, and nothing has changed."""

from __future__ import annotations

import json

import pytest

from tests.hostile.bombs import OF_PEFT, cases

_NAMES = [name for name, *_ in cases()]
_PATHS_OF_THE_SHARE = ("PeftModel", "native")
_SHARE = [name for name in _NAMES if name.startswith(("code: ", "network: ")) or name.endswith(_PATHS_OF_THE_SHARE)]
_SECONDS, _BYTES = 5, 200_000_000


@pytest.fixture(scope="module")
def found(in_a_process, tmp_path_factory):
    """Return what came of each hostile file, by its name; many in one process, whose start takes longest."""
    known: dict[str, dict] = {}

    def of(name: str, others: list[str]) -> dict:
        if name not in known:
            printed = in_a_process("tests.hostile.bombs", tmp_path_factory.mktemp("bombs"), json.dumps(others))
            known.update({entry["name"]: entry for entry in map(json.loads, printed.splitlines())})
        return known[name]

    return of


def _check(name: str, entry: dict) -> None:
    of_peft = next((error for damage, error in OF_PEFT.items() if name.startswith(damage)), None)
    assert entry["named"] or entry["error"] == of_peft, entry["trace"]
    assert entry["unchanged"], "the model is not as it was"
    assert not entry["sprung"], "the pickle was opened"
    assert entry["message"].isprintable() or of_peft, "a name from the file reached the terminal as it is"
    assert len(entry["message"]) < 2000
    # processor time, of which a hostile file may take so much: that other programs run does not count
    assert entry["seconds"] < _SECONDS
    assert entry["bytes"] < entry["file"] + _BYTES


@pytest.mark.parametrize("name", _SHARE)
def test_a_hostile_file_is_refused_by_name_soon_and_in_little_memory(name, found):
    _check(name, found(name, _SHARE))


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(_NAMES) - set(_SHARE)))
def test_a_hostile_file_is_refused_on_the_other_paths_too(name, found):
    _check(name, found(name, sorted(set(_NAMES) - set(_SHARE))))
