"""Child networks from strangers: what a few bytes may ask for, and the way to load more."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from peft_childtune import ChildNetwork, ChildTuningConfig, DeltaError, FormatError, select_child_network
from peft_childtune.codec import decode_child, encode_child, measure_child
from peft_childtune.sparse import ResampledUnits, SeededUnits, TensorChild, UnitGrid, select_random_children
from tests.hostile.artifacts import small

_LARGE = (1 << 13, 1 << 13)  # 2^26 entries


def test_what_is_too_large_for_a_stranger_loads_with_the_shapes_of_a_model(tmp_path):
    network = ChildNetwork({"w": TensorChild(UnitGrid(_LARGE), ResampledUnits(1, 0, 0.3))})
    code = encode_child(network.children["w"])
    metadata = {"format": "peft_childtune.child_network.v1", "digest": "0", "shapes": "8192,8192"}
    save_file({"w": code}, tmp_path / "f", metadata=metadata)
    with pytest.raises(FormatError, match=r"w of shape \(8192, 8192\).*shapes=.*network=path"):
        ChildNetwork.load(tmp_path / "f")


def test_the_limits_leave_room_for_the_models_that_the_method_was_made_for(tmp_path):
    """A random child of 30 % of BERT-base, in some hundred bytes."""
    grids = {f"{i}": UnitGrid((3072, 2304)) for i in range(12)}
    network = ChildNetwork(
        {name: TensorChild(grid, torch.arange(0, grid.numel, 100)) for name, grid in grids.items()}
        | {"r": TensorChild(UnitGrid((5000, 6000)), ResampledUnits(1, 0, 0.3))}
    )
    network.save(tmp_path / "f")
    loaded = ChildNetwork.load(tmp_path / "f")
    assert (loaded.nnz, loaded.numel) == (network.nnz, network.numel)


def test_given_shapes_must_be_those_of_the_file(tmp_path):
    network = ChildNetwork.from_indices({"w": torch.tensor([1])}, {"w": (2, 3)})
    network.save(tmp_path / "f")
    assert ChildNetwork.load(tmp_path / "f", shapes={"w": (2, 3), "v": (1,)}) == network
    with pytest.raises(DeltaError, match=r"w: has the shape \(2, 3\) in .*, and \(3, 2\) in the model"):
        ChildNetwork.load(tmp_path / "f", shapes={"w": (3, 2)})
    with pytest.raises(DeltaError, match="and None in the model"):
        ChildNetwork.load(tmp_path / "f", shapes={})


def test_a_selection_lends_the_file_the_shapes_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_childtune.network._MAX_UNLISTED", 0)
    config = ChildTuningConfig(target_modules=["layers.0.0"], mode="task_free", resample=True)
    model = get_peft_model(small(), config)
    shapes = {"layers.0.0.weight": (3, 4), "layers.0.0.bias": (3,)}
    rule = {n: TensorChild(UnitGrid(s), ResampledUnits(1, 0, 0.3)) for n, s in shapes.items()}
    big = {n: TensorChild(UnitGrid((600, 600)), ResampledUnits(1, 0, 0.3)) for n in shapes}
    ChildNetwork(rule).save(tmp_path / "f")
    ChildNetwork(big).save(tmp_path / "big")
    select_child_network(model, network=tmp_path / "f")
    with pytest.raises(FormatError):
        ChildNetwork.load(tmp_path / "big")
    with pytest.raises(DeltaError, match=r"\(600, 600\)"):
        select_child_network(model, network=tmp_path / "big")


def test_the_position_of_each_bit_of_a_child_network_counts(tmp_path):
    path = tmp_path / "f"
    seeded = select_random_children(grids={"s": UnitGrid((8, 8))}, density=0.25, seed=3)
    network = ChildNetwork(seeded | {"w": TensorChild(UnitGrid((4, 6)), torch.tensor([0, 5, 23]))})
    network.save(path)
    raw = path.read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    loaded = []
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(damaged))
        try:
            assert ChildNetwork.load(path) == network
            loaded.append(bit // 8)
        except FormatError:
            pass
    padding = range(len(header.rstrip()), len(header))
    name = header.index(b'"codes"')
    # an unknown key in place of the digest's leaves the older digest, of the positions, to tell
    assert set(loaded) <= {*padding, *range(name, name + 7)}


@pytest.mark.parametrize(
    ("child", "scanned", "nnz"),
    [
        (TensorChild(UnitGrid((4, 6)), torch.tensor([1, 2])), 0, 2),
        (TensorChild(UnitGrid((4, 6), "row"), torch.tensor([1, 2])), 0, 12),
        (TensorChild(UnitGrid((4, 6), "block", block_size=5), torch.tensor([0])), 0, 24),
        (TensorChild(UnitGrid((4, 6)), ResampledUnits(1, 2, 0.5)), 0, 24),
        (TensorChild(UnitGrid((4, 6)), SeededUnits(1, 2, 1 << 63, 0, 24)), 24, 24),
        (TensorChild(UnitGrid((50, 100)), (torch.arange(5000) // 50 % 3 == 0).nonzero().flatten()), 5000, 1700),
    ],
)
def test_the_demands_of_a_code_are_read_from_its_header(child, scanned, nnz):
    demand = measure_child(encode_child(child), shape=child.grid.shape)
    assert (demand.scanned, demand.nnz) == (scanned, nnz)


@pytest.mark.parametrize("wrong", [-1, 1])
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_a_code_of_more_or_fewer_entries_than_there_are_values_is_refused_by_its_header(granularity, wrong):
    child = TensorChild(UnitGrid((4, 6), granularity), torch.tensor([1, 2]))
    code = encode_child(child)
    assert decode_child(code, shape=(4, 6), nnz=child.nnz).nnz == child.nnz
    with pytest.raises(FormatError, match="^count: 2 units are not"):
        decode_child(code, shape=(4, 6), nnz=child.nnz + wrong)


@pytest.mark.parametrize("nnz", [0, 10])
def test_tiles_that_are_cut_at_the_edge_leave_a_range(nnz):
    child = TensorChild(UnitGrid((4, 4), "block", block_size=3), torch.tensor([3]))  # one entry of nine
    code = encode_child(child)
    assert decode_child(code, shape=(4, 4), nnz=1).nnz == 1
    with pytest.raises(FormatError, match="^count: "):
        decode_child(code, shape=(4, 4), nnz=nnz)
