"""Children to bytes and back, and how many bytes."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_childtune.codec.indices as indices_module
from peft_childtune.codec import decode_child, encode_child
from peft_childtune.codec.indices import BITMAP, BLOCK_RICE, LZMA, RAW, RICE
from peft_childtune.errors import FormatError
from peft_childtune.sparse import (
    ResampledUnits,
    SeededUnits,
    TensorChild,
    UnitGrid,
    hash_positions,
    select_random_children,
)

grids = st.builds(
    UnitGrid,
    st.lists(st.integers(0, 20), max_size=4).map(tuple),
    st.sampled_from(["element", "row", "column", "block"]),
    block_size=st.integers(1, 200),
    transposed=st.booleans(),
)


def assert_same(decoded: TensorChild, child: TensorChild) -> None:
    assert decoded.grid == child.grid
    if isinstance(child.units, torch.Tensor):
        assert decoded.units.dtype == torch.int64 and torch.equal(decoded.units, child.units)
    else:
        assert decoded.units == child.units


def random_units(shape: tuple[int, ...], density: float) -> torch.Tensor:
    numel = math.prod(shape)
    order = torch.randperm(numel, generator=torch.Generator().manual_seed(0))
    return order[: round(density * numel)].sort().values


def rows_units(shape: tuple[int, int], share: float) -> torch.Tensor:
    """Entries of some whole rows, so that they cluster."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[random_units((shape[0],), share)] = True
    return mask.flatten().nonzero().flatten()


@given(grids, st.data())
@settings(deadline=None, max_examples=300)
def test_listed_units_come_back(grid, data):
    units = sorted(data.draw(st.sets(st.integers(0, grid.num_units - 1)))) if grid.num_units else []
    child = TensorChild(grid, torch.tensor(units, dtype=torch.int64))
    assert_same(decode_child(encode_child(child), shape=grid.shape), child)


@given(grids.filter(lambda grid: grid.num_units > 0), st.integers(0, 2**64 - 1), st.floats(0.3, 1))
@settings(deadline=None)
def test_seeded_units_come_back(grid, seed, density):
    threshold = int(density * 2**63)
    hashes = hash_positions(torch.arange(grid.num_units), seed=seed, stream=2).tolist()
    child = TensorChild(grid, SeededUnits(seed, 2, threshold, 0, sum(value < threshold for value in hashes)))
    assert_same(decode_child(encode_child(child), shape=grid.shape), child)


@given(grids, st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.floats(0, 1, exclude_min=True))
@settings(deadline=None)
def test_resampled_units_come_back(grid, seed, stream, density):
    child = TensorChild(grid, ResampledUnits(seed, stream, density))
    assert_same(decode_child(encode_child(child), shape=grid.shape), child)


@pytest.mark.parametrize(
    ("down", "across", "by_column"), [(37, 53, False), (37, 53, True), (1, 1961, False), (1961, 1, False)]
)
@pytest.mark.parametrize("density", [0.01, 0.3, 0.9, 1.0])
def test_each_coding_gives_the_units_back(down, across, by_column, density):
    units = random_units((down, across), density).numpy()
    ordered = units % across * down + units // across if by_column else units.copy()
    ordered.sort()
    gaps = indices_module.gaps_of(ordered)
    parameter, parameters = indices_module.plan_rice(gaps)[0], indices_module.plan_block_rice(gaps)[0]
    bitmap = indices_module.pack_positions(ordered, length=down * across)
    payloads = {
        RAW: indices_module.pack_fields(ordered, (down * across - 1).bit_length()).tobytes(),
        RICE: indices_module.encode_rice(gaps, parameter),
        BLOCK_RICE: indices_module.encode_block_rice(gaps, parameters),
        BITMAP: bitmap.tobytes(),
        LZMA: indices_module.compress_bitmap(bitmap),
    }
    for coding, payload in payloads.items():
        array = torch.tensor(list(payload), dtype=torch.uint8).numpy()
        decoded = indices_module.decode_units(
            array, coding=coding, by_column=by_column, count=units.size, units_shape=(down, across)
        )
        assert decoded.tolist() == units.tolist(), coding


@pytest.mark.parametrize(
    ("units", "coding"),
    [
        (torch.tensor([77_777]), RAW),
        (random_units((512, 512), 0.1), RICE),
        (torch.cat([random_units((4000,), 0.3), 4000 + random_units((512, 500), 0.002)]), BLOCK_RICE),
        (random_units((512, 512), 0.5), BITMAP),
        (rows_units((512, 512), 0.2), LZMA),
    ],
    ids=["raw", "rice", "block rice", "bitmap", "lzma"],
)
def test_the_shortest_coding_is_chosen(units, coding):
    assert int(encode_child(TensorChild(UnitGrid((512, 512)), units))[3]) == coding


def test_children_that_cluster_in_columns_are_coded_by_column():
    mask = torch.zeros(300, 400, dtype=torch.bool)
    mask[:, 17] = True
    mask[::2, 200] = True
    by_row = TensorChild(UnitGrid((400, 300)), mask.t().flatten().nonzero().flatten())
    by_column = TensorChild(UnitGrid((300, 400)), mask.flatten().nonzero().flatten())
    assert abs(encode_child(by_column).numel() - encode_child(by_row).numel()) <= 2


@pytest.mark.parametrize("density", [0.3, 0.1, 0.01, 0.001])
def test_a_random_child_takes_hardly_more_than_its_entropy(density):
    shape, numel = (1024, 1024), 1 << 20
    units = random_units(shape, density)
    entropy_bits = -numel * (density * math.log2(density) + (1 - density) * math.log2(1 - density))
    assert encode_child(TensorChild(UnitGrid(shape), units)).numel() * 8 <= 1.02 * entropy_bits


@pytest.mark.parametrize("density", [0.5, 0.3, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("shape", [(768, 3072), (64, 4096), (4096, 64), (200_000,)])
def test_a_random_child_is_never_given_to_the_compressor_nor_sorted_by_column(monkeypatch, shape, density):
    # either takes longer than all else
    monkeypatch.setattr(indices_module, "compress_bitmap", lambda bitmap: pytest.fail("compressed"))
    code = encode_child(TensorChild(UnitGrid(shape), random_units(shape, density)))
    assert int(code[4]) == 0


def columns_units(shape: tuple[int, int], share: float) -> torch.Tensor:
    """Entries of some whole columns."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, random_units((shape[1],), share)] = True
    return mask.flatten().nonzero().flatten()


def every(step: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.arange(0, math.prod(shape), step)


def alike_rows(shape: tuple[int, int], share: float) -> torch.Tensor:
    """The same random half of the entries in most rows, and others in the rest."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, random_units((shape[1],), share)] = True
    return (
        (mask & (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.97)).flatten().nonzero().flatten()
    )


@pytest.mark.parametrize(
    "units",
    [columns_units((512, 2048), 0.02), every(50, (512, 2048)), alike_rows((512, 2048), 0.5)],
    ids=["whole columns", "every fiftieth", "alike rows"],
)
def test_a_child_with_a_pattern_is_found_out_by_the_samples(units):
    numel = 512 * 2048
    density = units.numel() / numel
    entropy_bits = -numel * (density * math.log2(density) + (1 - density) * math.log2(1 - density))
    assert encode_child(TensorChild(UnitGrid((512, 2048)), units)).numel() * 8 <= 0.4 * entropy_bits


@pytest.mark.parametrize("share", [0.3, 0.1, 0.02])
def test_a_child_of_whole_rows_takes_a_fiftieth_of_the_entropy_of_single_entries(share):
    units = rows_units((1024, 1024), share)
    density = units.numel() / (1 << 20)
    entropy_bits = -(1 << 20) * (density * math.log2(density) + (1 - density) * math.log2(1 - density))
    assert encode_child(TensorChild(UnitGrid((1024, 1024)), units)).numel() * 8 <= 0.02 * entropy_bits


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_a_random_child_kept_as_a_seed_takes_at_most_48_bytes(seed):
    grid = UnitGrid((50_000, 4096), "block", block_size=16)
    child = select_random_children(grids={"w": grid}, density=0.1, seed=seed)["w"]
    assert encode_child(child).numel() <= 48
    assert encode_child(TensorChild(grid, ResampledUnits(seed, 2**31, 0.3))).numel() <= 48


def test_an_empty_child_is_little_more_than_a_header():
    empty = torch.empty(0, dtype=torch.int64)
    assert encode_child(TensorChild(UnitGrid((768, 3072)), empty)).numel() <= 12


def test_the_front_of_a_code_takes_at_most_24_bytes():
    one = encode_child(TensorChild(UnitGrid((50_000, 4096)), torch.tensor([2**27 + 1])))
    assert one.numel() <= 24


@pytest.mark.parametrize("limit", [2**31 - 1, 2**31, 2**31 + 1])
@pytest.mark.parametrize("clustered", [False, True])
def test_children_around_the_limit_of_int32_come_back(limit, clustered):
    units = torch.arange(0, limit, limit // 5000) if not clustered else torch.arange(limit - 5000, limit)
    units = torch.cat([units[units < limit - 1], torch.tensor([limit - 1])])
    child = TensorChild(UnitGrid((limit,)), units)
    assert_same(decode_child(encode_child(child), shape=(limit,)), child)


@pytest.mark.parametrize("count", [32_767, 32_768, 32_769, 70_000])
def test_children_of_several_chunks_come_back(count):
    units = random_units((1000, 1000), count / 1_000_000)
    assert units.numel() == count
    child = TensorChild(UnitGrid((1000, 1000)), units)
    assert_same(decode_child(encode_child(child), shape=(1000, 1000)), child)


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
def test_positions_beyond_2_to_the_31_come_back(granularity):
    grid = UnitGrid((70_000, 70_000), granularity, block_size=2)
    last = grid.num_units - 1
    units = torch.tensor(sorted({0, 5, last // 2, last // 2 + 1, last - 1, last}))
    child = TensorChild(grid, units)
    assert_same(decode_child(encode_child(child), shape=grid.shape), child)


def test_many_positions_beyond_2_to_the_31_come_back():
    generator = torch.Generator().manual_seed(0)
    units = torch.randint(0, 70_000**2, (100_000,), generator=generator).unique()
    child = TensorChild(UnitGrid((70_000, 70_000)), units)
    assert_same(decode_child(encode_child(child), shape=(70_000, 70_000)), child)


def test_units_of_a_strided_tensor_come_back():
    units = torch.arange(20)[::2]
    assert_same(
        decode_child(encode_child(TensorChild(UnitGrid((20,)), units)), shape=(20,)),
        TensorChild(UnitGrid((20,)), units),
    )


def test_encoding_leaves_the_units_as_they_were():
    units = random_units((40, 50), 0.4)
    before = units.clone()
    encode_child(TensorChild(UnitGrid((40, 50)), units))
    assert torch.equal(units, before)


def test_encoding_twice_gives_the_same_bytes():
    child = TensorChild(UnitGrid((200, 200)), random_units((200, 200), 0.2))
    assert torch.equal(encode_child(child), encode_child(child))


def test_a_weight_too_large_for_the_format_is_refused():
    with pytest.raises(FormatError, match="above the limits"):
        encode_child(TensorChild(UnitGrid((1 << 32, 1 << 31)), torch.tensor([0])))


def test_a_million_entries_are_coded_within_seconds():
    child = TensorChild(UnitGrid((1024, 1024)), random_units((1024, 1024), 0.3))
    start = time.process_time()
    decode_child(encode_child(child), shape=(1024, 1024))
    assert time.process_time() - start < 3.0  # measured: 0.1
