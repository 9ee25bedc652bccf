"""The child network as an object and as a file."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_childtune import ChildNetwork, DeltaError, FormatError, IntegrityError
from peft_childtune.codec import encode_child
from peft_childtune.files import load_tensors, save_tensors
from peft_childtune.sparse import ResampledUnits, TensorChild, UnitGrid, select_random_children

_SHAPES = {"a.weight": (4, 6), "a.bias": (4,), "b.weight": (2, 3, 2), "scale": ()}
_INDICES = {
    "a.weight": torch.tensor([0, 5, 23]),
    "a.bias": torch.tensor([], dtype=torch.int64),
    "b.weight": torch.tensor([11]),
    "scale": torch.tensor([0]),
}


def _network() -> ChildNetwork:
    return ChildNetwork.from_indices(_INDICES, _SHAPES)


def test_a_network_tells_what_it_was_made_of():
    network = _network()
    assert network.shapes == _SHAPES
    assert {n: i.tolist() for n, i in network.indices.items()} == {n: i.tolist() for n, i in _INDICES.items()}
    assert all(i.dtype == torch.int64 for i in network.indices.values())
    assert (network.nnz, network.numel, network.density) == (5, 24 + 4 + 12 + 1, 5 / 41)


def test_an_empty_network_has_density_zero():
    assert ChildNetwork({}).density == 0.0


@pytest.mark.parametrize(
    ("indices", "shapes", "message"),
    [
        ({"w": [0]}, {"v": (2,)}, "different tensors"),
        ({"w": [1, 0]}, {"w": (2,)}, "w: .*increas"),
        ({"w": [0, 0]}, {"w": (2,)}, "w: .*increas"),
        ({"w": [2]}, {"w": (2,)}, r"w: .*2"),
        ({"w": [-1]}, {"w": (2,)}, r"w: "),
    ],
)
def test_positions_that_are_no_child_are_refused(indices, shapes, message):
    with pytest.raises(DeltaError, match=message):
        ChildNetwork.from_indices({n: torch.tensor(i) for n, i in indices.items()}, shapes)


@pytest.mark.parametrize("positions", [torch.tensor([0.0]), torch.tensor([0], dtype=torch.int32), torch.tensor([[0]])])
def test_positions_of_another_type_are_refused(positions):
    with pytest.raises(DeltaError, match="int64"):
        ChildNetwork.from_indices({"w": positions}, {"w": (2,)})


@given(st.sets(st.integers(0, 19)), st.sets(st.integers(0, 19)))
def test_overlap_is_the_shared_part_of_the_smaller_child(one, two):
    networks = [
        ChildNetwork.from_indices({"w": torch.tensor(sorted(s), dtype=torch.int64)}, {"w": (20,)}) for s in (one, two)
    ]
    expected = len(one & two) / min(len(one), len(two)) if one and two else 0.0
    assert networks[0].overlap(networks[1]) == expected
    assert networks[1].overlap(networks[0]) == expected


def test_overlap_counts_over_all_tensors():
    other = dict(_INDICES) | {"a.weight": torch.tensor([5, 7]), "b.weight": torch.tensor([11])}
    assert _network().overlap(ChildNetwork.from_indices(other, _SHAPES)) == 3 / 4


def test_networks_of_other_tensors_have_no_overlap():
    other = ChildNetwork.from_indices({"a.weight": torch.tensor([0])}, {"a.weight": (4, 6)})
    with pytest.raises(DeltaError, match=r"a\.bias|b\.weight|scale"):
        _network().overlap(other)


def test_the_digest_does_not_depend_on_the_order_of_the_tensors():
    digests = {
        ChildNetwork.from_indices({n: _INDICES[n] for n in names}, {n: _SHAPES[n] for n in names}).digest()
        for names in itertools.permutations(_INDICES)
    }
    assert len(digests) == 1
    assert len(digests.pop()) == 32


def test_the_digest_does_not_depend_on_how_the_positions_are_described():
    seeded = ChildNetwork(select_random_children(grids={"w": UnitGrid((8, 8))}, density=0.25, seed=3))
    listed = ChildNetwork.from_indices(seeded.indices, {"w": (8, 8)})
    rows = ChildNetwork({"w": TensorChild(UnitGrid((8, 8), "row"), torch.tensor([1, 6]))})
    listed_rows = ChildNetwork.from_indices(
        {"w": torch.cat([torch.arange(8, 16), torch.arange(48, 56)])}, {"w": (8, 8)}
    )
    everything = ChildNetwork({"w": TensorChild(UnitGrid((8, 8)), ResampledUnits(1, 0, 0.3))})
    listed_all = ChildNetwork.from_indices({"w": torch.arange(64)}, {"w": (8, 8)})
    for one, other in [(seeded, listed), (rows, listed_rows), (everything, listed_all)]:
        assert one.digest() == other.digest()
        assert one == other


@pytest.mark.parametrize("change", ["position", "name", "shape"])
def test_the_digest_depends_on_names_shapes_and_positions(change):
    indices, shapes = {"w": torch.tensor([1])}, {"w": (2, 3)}
    reference = ChildNetwork.from_indices(indices, shapes)
    other = {
        "position": lambda: ChildNetwork.from_indices({"w": torch.tensor([2])}, shapes),
        "name": lambda: ChildNetwork.from_indices({"v": torch.tensor([1])}, {"v": (2, 3)}),
        "shape": lambda: ChildNetwork.from_indices(indices, {"w": (3, 2)}),
    }[change]()
    assert other.digest() != reference.digest()
    assert other != reference


def test_a_network_cannot_be_hashed_by_accident():
    with pytest.raises(TypeError):
        hash(_network())


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
def test_a_saved_network_loads_equal_in_every_granularity(tmp_path, granularity):
    grids = {name: UnitGrid(shape, granularity, 2) for name, shape in _SHAPES.items()}
    network = ChildNetwork({n: TensorChild(g, torch.arange(0, g.num_units, 2)) for n, g in grids.items()})
    network.save(tmp_path / "child.safetensors")
    loaded = ChildNetwork.load(tmp_path / "child.safetensors")
    assert loaded == network
    assert loaded.shapes == _SHAPES
    assert {n: c.grid for n, c in loaded.children.items()} == grids


def test_rules_are_saved_as_rules(tmp_path):
    seeded = select_random_children(grids={"w": UnitGrid((200, 200))}, density=0.25, seed=3)
    network = ChildNetwork(seeded | {"r": TensorChild(UnitGrid((300, 300)), ResampledUnits(1, 1, 0.3))})
    network.save(tmp_path / "child")
    assert (tmp_path / "child").stat().st_size < 1000
    assert ChildNetwork.load(tmp_path / "child") == network


def test_a_network_without_tensors_is_saved_too(tmp_path):
    ChildNetwork({}).save(tmp_path / "child")
    assert ChildNetwork.load(tmp_path / "child") == ChildNetwork({})


def test_a_single_number_is_saved_too(tmp_path):
    network = ChildNetwork.from_indices({"scale": torch.tensor([0])}, {"scale": ()})
    network.save(tmp_path / "child")
    assert ChildNetwork.load(tmp_path / "child") == network


def test_a_missing_file_is_reported_as_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        ChildNetwork.load(tmp_path / "absent")


def test_another_file_is_refused_with_the_way_to_load_it(tmp_path):
    save_tensors({"w": torch.zeros(2)}, tmp_path / "f", {"format": "pt"})
    with pytest.raises(FormatError, match="PeftModel.from_pretrained"):
        ChildNetwork.load(tmp_path / "f")


def _resave(path, change) -> None:
    tensors, metadata = load_tensors(path)
    change(tensors, metadata)
    save_tensors(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t, m: m.pop("shapes"), FormatError),
        (lambda t, m: m.update(shapes="4,x;;1;2"), FormatError),
        (lambda t, m: m.update(shapes="4;4,6;2,3,2"), FormatError),
        (lambda t, m: m.update(shapes="4;6,4;2,3,2;"), FormatError),
        (lambda t, m: m.update(shapes="4;-4,-6;2,3,2;"), FormatError),
        (lambda t, m: t.pop("a.weight"), FormatError),
        (lambda t, m: t.update({"a.weight": torch.zeros(3)}), FormatError),
        (lambda t, m: t.update({"a.weight": torch.zeros(0, dtype=torch.uint8)}), FormatError),
        (lambda t, m: m.pop("digest"), IntegrityError),
        (lambda t, m: m.update(digest="0" * 32), IntegrityError),
    ],
    ids=[
        "no shapes",
        "no numbers",
        "few shapes",
        "other shape",
        "negative",
        "few codes",
        "floats",
        "empty",
        "no digest",
        "other digest",
    ],
)
def test_damage_is_refused(tmp_path, change, error):
    _network().save(tmp_path / "f")
    _resave(tmp_path / "f", change)
    with pytest.raises(error):
        ChildNetwork.load(tmp_path / "f")


@pytest.mark.parametrize(
    ("shape", "child"),
    [
        ((2, 1 << 45), TensorChild(UnitGrid((2, 1 << 45), "row"), torch.tensor([1]))),
        ((1 << 45,), TensorChild(UnitGrid((1 << 45,)), ResampledUnits(0, 0, 0.5))),
    ],
    ids=["one huge row", "everything"],
)
def test_a_small_file_cannot_ask_for_terabytes(tmp_path, shape, child):
    metadata = {
        "format": "peft_childtune.child_network.v1",
        "digest": "0" * 32,
        "shapes": ",".join(map(str, shape)),
    }
    save_tensors({"w": encode_child(child)}, tmp_path / "f", metadata)
    with pytest.raises(FormatError):
        ChildNetwork.load(tmp_path / "f")


def test_a_flipped_bit_never_yields_other_positions(tmp_path):
    path = tmp_path / "f"
    network = _network()
    network.save(path)
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    refused = 0
    for at in range(header, len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1
        path.write_bytes(bytes(damaged))
        try:
            # a bias is divided alike by element and by row, so one bit of its code may say either
            assert ChildNetwork.load(path) == network
        except FormatError:
            refused += 1
    assert refused > 0.9 * (len(raw) - header)


def test_positions_are_on_the_cpu_and_the_summary_is_short():
    network = ChildNetwork.from_indices({"w": torch.tensor([1, 2])}, {"w": (4,)})
    assert network.indices["w"].device.type == "cpu"
    assert repr(network) == "ChildNetwork(1 tensors, 2 of 4 entries, density 0.5)"


def test_a_folder_is_refused_with_what_loads_it(tmp_path):
    with pytest.raises(FormatError, match="from_pretrained"):
        ChildNetwork.load(tmp_path)
