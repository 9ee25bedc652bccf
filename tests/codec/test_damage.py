"""Damaged codes: a named error, or a valid child, and never much memory."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_childtune.codec import decode_child, encode_child
from peft_childtune.errors import FormatError
from peft_childtune.sparse import ResampledUnits, TensorChild, UnitGrid, select_random_children

FRONT = "43 54 01"
SHAPE = "02 02 08"  # (2, 8)
SEEDED = "00 00 0000000000000080 00"


def as_code(data: bytes | str) -> torch.Tensor:
    data = bytes.fromhex(data) if isinstance(data, str) else data
    return torch.tensor(list(data), dtype=torch.uint8)


def small_codes() -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def drawn(numel, count):
        return torch.randperm(numel, generator=generator)[:count].sort().values

    clustered = torch.arange(5000) // 50 % 3 == 0
    children = {
        "raw": TensorChild(UnitGrid((40, 50)), torch.tensor([1234])),
        "rice": TensorChild(UnitGrid((20, 30)), drawn(600, 60)),
        "block rice": TensorChild(UnitGrid((9000,)), torch.cat([drawn(128, 64), 128 + drawn(8872, 64)])),
        "by column": TensorChild(UnitGrid((30, 40)), torch.arange(7, 1200, 40)),
        "bitmap": TensorChild(UnitGrid((4, 8)), torch.tensor([0, 1, 3, 6, 7, 8, 11, 15, 17, 18, 20, 23, 25, 28, 29])),
        "lzma": TensorChild(UnitGrid((50, 100)), clustered.nonzero().flatten()),
        "block": TensorChild(UnitGrid((10, 11), "block", block_size=3), torch.tensor([1, 5, 15])),
        "row": TensorChild(UnitGrid((6, 4), "row", transposed=True), torch.tensor([1, 2])),
        "seeded": select_random_children(grids={"w": UnitGrid((20, 20))}, density=0.2, seed=77)["w"],
        "resampled": TensorChild(UnitGrid((6, 4)), ResampledUnits(1, 2, 0.3)),
    }
    return {name: (encode_child(child), child.grid.shape) for name, child in children.items()}


CODES = small_codes()
CODING_IDS = {"raw": 0, "rice": 1, "block rice": 2, "bitmap": 3, "lzma": 4, "seeded": 8, "resampled": 9}


def assert_valid_or_refused(code: torch.Tensor, shape: tuple[int, ...]) -> None:
    try:
        child = decode_child(code, shape=shape)
    except FormatError:
        return
    indices = child.indices()
    assert child.grid.shape == shape and child.nnz == indices.numel()
    assert bool((indices[1:] > indices[:-1]).all())
    assert indices.numel() == 0 or (int(indices[0]) >= 0 and int(indices[-1]) < child.grid.numel)


@pytest.mark.parametrize("name", CODES)
def test_every_single_bit_flip_is_refused_or_gives_a_valid_child(name):
    code, shape = CODES[name]
    for byte in range(code.numel()):
        for bit in range(8):
            damaged = code.clone()
            damaged[byte] ^= 1 << bit
            assert_valid_or_refused(damaged, shape)


@pytest.mark.parametrize("name", CODES)
def test_every_truncation_is_refused(name):
    code, shape = CODES[name]
    for length in range(code.numel()):
        with pytest.raises(FormatError):
            decode_child(code[:length], shape=shape)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("surplus", [1, 8])
def test_bytes_after_the_end_are_refused(name, surplus):
    code, shape = CODES[name]
    with pytest.raises(FormatError):
        decode_child(torch.cat([code, torch.zeros(surplus, dtype=torch.uint8)]), shape=shape)


@pytest.mark.parametrize("name", CODES)
def test_the_code_of_another_weight_is_refused(name):
    code, shape = CODES[name]
    with pytest.raises(FormatError, match="of another weight"):
        decode_child(code, shape=(*shape, 1))


@pytest.mark.parametrize("name", CODING_IDS)
def test_the_samples_cover_every_coding(name):
    assert int(CODES[name][0][3]) == CODING_IDS[name]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "magic: 2 bytes where 0 are left"),
        ("00 00 00 00 00", "magic: not b'CT'"),
        (f"43 54 02 01 00 {SHAPE} 03 01 01 26", "version: 2, above its limit 1; a newer release"),
        (f"{FRONT} 05 00 {SHAPE} 03 01 01 26", "coding: 5 is unknown"),
        (f"{FRONT} 01 10 {SHAPE} 03 01 01 26", "flags: 16, above its limit 15"),
        (f"{FRONT} 01 00 21", "dimensions: at least 33, above its limit 32"),
        (f"{FRONT} 01 00 02 02 07 03 01 01 26", "shape: (2, 7) where the weight has (2, 8)"),
        (f"{FRONT} 01 00 02 02 88 00 03 01 01 26", "shape: 8 is not in its shortest form"),
        (f"{FRONT} 01 03 {SHAPE} 00 03 01 01 26", "block size: 0, below its limit 1"),
        (f"{FRONT} 01 00 {SHAPE} 11 01 01 26", "count: at least 17, above its limit 16"),
        (f"{FRONT} 01 09 {SHAPE} 01 00 01", "flags: column order where units have one order only"),
        (f"{FRONT} 08 08 {SHAPE} 00 {SEEDED}", "flags: column order"),
        (f"{FRONT} 00 00 {SHAPE} 01 13", "payload: a bit after the last of 4 is set"),
        (f"{FRONT} 00 00 {SHAPE} 02 33", "payload: units are not strictly increasing below 16"),
        (f"{FRONT} 00 00 {SHAPE} 01 03 00", "payload: 2 bytes where 4 bits need 1"),
        (f"{FRONT} 01 00 {SHAPE} 0c", "count: 12 units in a payload of 0 bytes"),
        (f"{FRONT} 01 00 {SHAPE} 03 06 01 26", "Rice parameter: 6, too large for 16 positions"),
        (f"{FRONT} 01 00 {SHAPE} 03 01 09 26", "payload: a bit after the last of 3 is set"),
        (f"{FRONT} 01 00 {SHAPE} 03 01 01 06", "unary part: 2 numbers where the header declares 3"),
        (f"{FRONT} 01 00 {SHAPE} 03 01 01 66", "unary part: 4 numbers where the header declares 3"),
        (f"{FRONT} 01 00 {SHAPE} 03 01 01 26 00", "unary part: 2 bytes, some after its end"),
        (f"{FRONT} 01 00 {SHAPE} 02 00 81 80", "unary part: 3 numbers where"),
        (f"{FRONT} 01 00 {SHAPE} 01 00 00 00 01", "payload: a position is outside of [0, 16)"),
        (f"{FRONT} 01 00 {SHAPE} 01 04 00 04", "payload: a gap is larger than all 16 positions"),
        (f"{FRONT} 02 00 {SHAPE} 03 01 07 00 01 26", "width of the Rice parameters: 7 bits, above its limit 6"),
        (f"{FRONT} 02 00 {SHAPE} 03 06 00 00 00 01", "Rice parameter: 6, too large for 16 positions"),
        (f"{FRONT} 02 00 {SHAPE} 03 01 01 02 01 26", "payload: a bit after the last of 1 is set"),
        (f"{FRONT} 03 00 {SHAPE} 03 18", "payload: 1 bytes where 16 bits need 2"),
        (f"{FRONT} 03 00 {SHAPE} 03 18 00", "payload: 2 units where the header declares 3"),
        (f"{FRONT} 04 00 {SHAPE} 03 7f ff ff", "payload: not an LZMA2 stream"),
        (f"{FRONT} 04 00 {SHAPE} 03 01 00 00 18 00", "payload: does not hold a bitmap of exactly 2 bytes"),
        (f"{FRONT} 04 00 {SHAPE} 03 01 00 02 18 02 00 00", "payload: does not hold a bitmap of exactly 2 bytes"),
        (f"{FRONT} 04 00 {SHAPE} 03 01 00 01 18 02 00 00", "payload: does not hold a bitmap of exactly 2 bytes"),
        (f"{FRONT} 08 00 {SHAPE} 01 {SEEDED}", "seeded child: seed=0, stream=0 draws 16 of 16 units where 1 were"),
        (f"{FRONT} 08 00 {SHAPE} 01 00 00 0100000000000080 00", "seeded child: threshold=9223372036854775809 is out"),
        (
            f"{FRONT} 08 00 {SHAPE} 10 00 00 0000000000000080 01",
            "seeded child: threshold=9223372036854775808 with ties",
        ),
        (f"{FRONT} 08 00 {SHAPE} 01 00 00 0000000000000000 02", "seeded child: ties=2 of count=1"),
        (f"{FRONT} 08 00 {SHAPE} 01 00 00 0000", "threshold or density: 8 bytes where 2 are left"),
        (f"{FRONT} 09 00 {SHAPE} 00 00 0000000000000000 00000000 00000000 0000000000000000", "density=0.0 is out"),
        (f"{FRONT} 09 00 {SHAPE} 00 00 000000000000f87f 000000000000 0000000000000000", "density=nan is out"),
        (f"{FRONT} 09 00 {SHAPE} 00 00 000000000000e03f 000001000000 0000000000000000", "padding: not zero"),
        (f"{FRONT} 09 00 {SHAPE} 00 00 000000000000e03f 000000000000 0000000000000080", "step: negative"),
        (f"{FRONT} 09 00 {SHAPE} 00 00 000000000000e03f 00 0000000000000000", "code: 27 bytes, not a multiple of 8"),
    ],
)
def test_a_damaged_code_is_refused_with_what_is_wrong(code, message):
    with pytest.raises(FormatError) as refused:
        decode_child(as_code(code), shape=(2, 8))
    assert message in str(refused.value)


@pytest.mark.parametrize("code", [torch.zeros(9), torch.zeros(3, 3, dtype=torch.uint8), torch.tensor(1).byte()])
def test_a_tensor_that_is_no_code_is_refused(code):
    with pytest.raises(FormatError, match="1-D uint8"):
        decode_child(code, shape=(2, 8))


@given(st.binary(max_size=60), st.sampled_from([0, 1, 2, 3, 4, 8, 9]), st.integers(0, 15))
@settings(deadline=None, max_examples=500)
def test_arbitrary_bytes_are_refused_or_give_a_valid_child(data, coding, flags):
    header = bytes.fromhex(f"{FRONT} {coding:02x} {flags:02x} {SHAPE}")
    assert_valid_or_refused(as_code(header + data), (2, 8))


@pytest.mark.parametrize("front", ["3e", "3e 00"], ids=["rice", "block rice"])
@pytest.mark.parametrize("count", range(2, 10))
def test_positions_whose_sums_wrap_around_are_refused(front, count):
    # fields of 62 ones in a weight of 2^62 entries: each gap is as large as the weight, so their sums pass 2^64
    fields = (2 ** (62 * count) - 1).to_bytes(-(-62 * count // 8), "little")
    coding = len(bytes.fromhex(front))
    header = bytes.fromhex(f"{FRONT} {coding:02x} 00 02") + 2 * bytes.fromhex("8080808008") + bytes([count])
    unary = (2**count - 1).to_bytes(-(-count // 8), "little")
    with pytest.raises(FormatError, match="outside of"):
        decode_child(as_code(header + bytes.fromhex(front) + fields + unary), shape=(1 << 31, 1 << 31))


@pytest.mark.parametrize("coding", [0, 1, 2, 3, 4])
def test_a_huge_declared_count_is_refused_without_its_memory(coding):
    # 2^40 units declared by a code of 33 bytes; their bitmap would take 128 GiB
    header = (
        bytes.fromhex(f"{FRONT} {coding:02x} 00") + bytes([2]) + bytes.fromhex("8080c001") + bytes.fromhex("8080c001")
    )
    shape = (3 << 20, 3 << 20)
    code = as_code(header + bytes.fromhex("808080808020") + b"\x01" + bytes(15))
    tracemalloc.start()
    with pytest.raises(FormatError):
        decode_child(code, shape=shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20  # of which the dictionary of coding 4 takes one half


def test_a_compressed_bomb_is_cut_off_at_the_size_of_the_bitmap():
    large = encode_child(TensorChild(UnitGrid((1 << 26,)), torch.arange(1 << 22, 1 << 23)))
    assert int(large[3]) == 4
    payload = large[5 + 1 + 4 + 4 :]
    small = torch.cat([as_code(f"{FRONT} 04 00 {SHAPE} 03"), payload])
    tracemalloc.start()
    with pytest.raises(FormatError, match="exactly 2 bytes"):
        decode_child(small, shape=(2, 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20  # of which the dictionary takes one half
