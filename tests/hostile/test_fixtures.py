"""The damaged files that are committed: each is refused by the error it must raise, forever."""

from __future__ import annotations

import pytest
from peft import PeftModel

import peft_childtune
from peft_childtune import BaseMismatchError, ChildNetwork, get_child_network, get_deltas
from tests.hostile.artifacts import photograph
from tests.hostile.make_fixtures import ADAPTERS, FOLDER, NETWORKS, plain


def test_the_sound_adapter_from_which_the_others_were_made_still_loads():
    model = PeftModel.from_pretrained(plain(), FOLDER / "sound")
    assert get_child_network(model).nnz == 4
    assert get_deltas(model)["layers.0.0.weight"].values.tolist() == [1 / 8, 2 / 8, 3 / 8]


def test_the_sound_adapter_is_refused_on_another_base():
    with pytest.raises(BaseMismatchError, match=r"^layers\.0\.0\.weight: "):
        PeftModel.from_pretrained(plain(scale=1.01), FOLDER / "sound")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_damaged_adapter_is_refused_by_the_error_it_must_raise(kind):
    _, error, message = ADAPTERS[kind]
    base = plain()
    before = photograph(base)
    with pytest.raises(getattr(peft_childtune, error), match=message) as caught:
        PeftModel.from_pretrained(base, FOLDER / kind)
    assert type(caught.value).__name__ == error
    assert photograph(base) == before


def test_the_sound_child_network_still_loads():
    network = ChildNetwork.load(FOLDER / "network_sound.safetensors")
    assert network.indices["a.weight"].tolist() == [0, 5, 23]
    assert network.indices["b.weight"].tolist() == [4]


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_damaged_child_network_is_refused_by_the_error_it_must_raise(kind):
    _, error, message = NETWORKS[kind]
    with pytest.raises(getattr(peft_childtune, error), match=message) as caught:
        ChildNetwork.load(FOLDER / f"network_{kind}.safetensors")
    assert type(caught.value).__name__ == error


def test_every_committed_file_has_its_test():
    assert {path.stem.removeprefix("network_") for path in FOLDER.glob("*.safetensors")} == {"sound", *NETWORKS}
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == {"sound", *ADAPTERS}
