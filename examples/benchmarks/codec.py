"""How fast indices are coded, and how many bytes each kept weight takes, on random and on real children.

    python examples/benchmarks/codec.py

Three questions, three result files. `codec_speed`: kept weights coded a second, end to end from a child to its bytes
and back to int64 positions, in tensors of about 100 M weights together, beside plain int32 bytes and, for one of these
tensors and once, since they take seconds, zlib of the int32 bytes and lzma of the bitmap. `index_size`: index bytes
per kept weight of random children against their entropy. `fisher_index_size`: the same for the Fisher child of the
pinned encoder on pinned sentences, coding by coding.
"""

from __future__ import annotations

import lzma
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from harness import Value, finish, interleave, parse, parser

from peft_childtune import ChildTuningConfig, select_child_network
from peft_childtune.codec import decode_child, encode_child
from peft_childtune.codec.rice import gaps_of, plan_block_rice, plan_rice
from peft_childtune.sparse import TensorChild, UnitGrid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Shape = tuple[int, int]
Positions = np.ndarray[Any, np.dtype[np.int64]]
Encode, Decode = Callable[[Positions], Any], Callable[[Any], Positions]
BERT, LLAMA = (768, 3072), (4096, 11008)  # feed-forward weights of BERT-base and of a 7B Llama
DENSITIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
CODINGS = {0: "raw", 1: "Rice", 2: "block Rice", 3: "bitmap", 4: "lzma"}


def entropy_bytes(count: int, numel: int) -> float:
    """Return the bytes that independent positions of this density take at least."""
    p = count / numel
    return 0.0 if p in (0, 1) else -numel * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8


def random_child(shape: Shape, density: float, *, seed: int) -> Positions:
    """Return independent positions."""
    return np.flatnonzero(np.random.default_rng(seed).random(math.prod(shape), dtype=np.float32) < density)


def clustered_child(shape: Shape, density: float, *, seed: int) -> Positions:
    """Return positions that prefer some rows and some columns: log-normal odds of both, as in real children."""
    random = np.random.default_rng(seed)
    rows, columns = (np.exp(1.5 * random.standard_normal(size)) for size in shape)
    odds = np.outer(rows, columns)
    chance = np.minimum(odds * (density / odds.mean()), 1.0)
    return np.flatnonzero(random.random(shape) < chance)


def row_child(shape: Shape, density: float, *, seed: int) -> Positions:
    """Return all entries of some rows."""
    rows = np.sort(np.random.default_rng(seed).permutation(shape[0])[: max(round(density * shape[0]), 1)])
    return (rows[:, None] * shape[1] + np.arange(shape[1])).ravel()


CHILDREN = {"random": random_child, "clustered": clustered_child, "rows": row_child}


def bitmap_of(positions: Positions, numel: int) -> bytes:
    """Return a bit for each entry."""
    mask = np.zeros(numel, dtype=np.uint8)
    mask[positions] = 1
    return np.packbits(mask).tobytes()


def ours(shape: Shape) -> tuple[Encode, Decode]:
    """Return our encoder and our decoder."""
    grid = UnitGrid(shape)
    return (
        lambda positions: encode_child(TensorChild(grid, torch.from_numpy(positions))),
        lambda code: decode_child(code, shape=shape).indices().numpy(),
    )


def formats(shape: Shape) -> dict[str, tuple[Encode, Decode]]:
    """Return the encoder and the decoder of each format."""
    numel = math.prod(shape)
    return {
        "ours": ours(shape),
        "int32": (
            lambda positions: positions.astype("<i4").tobytes(),
            lambda code: np.frombuffer(code, dtype="<i4").astype(np.int64),
        ),
        "zlib of int32": (
            lambda positions: zlib.compress(positions.astype("<i4").tobytes(), 6),
            lambda code: np.frombuffer(zlib.decompress(code), dtype="<i4").astype(np.int64),
        ),
        "lzma of bitmap": (
            lambda positions: lzma.compress(bitmap_of(positions, numel)),
            lambda code: np.flatnonzero(np.unpackbits(np.frombuffer(lzma.decompress(code), np.uint8), count=numel)),
        ),
    }


def speed(shape: Shape, children: Sequence[Positions], *, repeats: int) -> list[dict[str, Value]]:
    """Return one row for each format: millions of kept weights coded and decoded a second, bytes for each."""
    seconds: dict[str, tuple[float, float]] = {}
    kept: dict[str, int] = {}
    size: dict[str, int] = {}
    fast: dict[str, Callable[[], object]] = {}
    for name, (encode, decode) in formats(shape).items():
        some = children if name in ("ours", "int32") else children[:1]  # the others take seconds for each
        start = time.perf_counter()
        codes = [encode(positions) for positions in some]
        middle = time.perf_counter()
        decoded = [decode(code) for code in codes]
        seconds[name] = middle - start, time.perf_counter() - middle
        if not all(map(np.array_equal, decoded, some)):
            raise SystemExit(f"{name}: other positions come back")
        kept[name], size[name] = sum(map(len, some)), sum(map(len, codes))
        if some is children:
            fast[f"{name} encode"] = partial(_each, encode, some)
            fast[f"{name} decode"] = partial(_each, decode, codes)
    timed = interleave(fast, repeats=repeats)
    for name in ("ours", "int32"):
        seconds[name] = median(timed[f"{name} encode"]), median(timed[f"{name} decode"])
    return [
        {
            "format": name,
            "kept": kept[name],
            "encoded_M_per_s": kept[name] / seconds[name][0] / 1e6,
            "decoded_M_per_s": kept[name] / seconds[name][1] / 1e6,
            "bytes_per_weight": size[name] / kept[name],
        }
        for name in kept
    ]


def _each(function: Callable[[Any], object], items: Sequence[Any]) -> None:
    for item in items:
        function(item)


def random_sizes(shape: Shape, *, seed: int) -> list[dict[str, Value]]:
    """Return one row for each density: bytes per kept weight of a random child, headers included."""
    rows: list[dict[str, Value]] = []
    for density in DENSITIES:
        positions = random_child(shape, density, seed=seed)
        code = encode_child(TensorChild(UnitGrid(shape), torch.from_numpy(positions)))
        entropy = entropy_bytes(positions.size, math.prod(shape))
        rows.append(
            {
                "shape": "x".join(map(str, shape)),
                "density": density,
                "kept": positions.size,
                "entropy": entropy / positions.size,
                "ours": code.numel() / positions.size,
                "ours_to_entropy": code.numel() / entropy,
                "coding": CODINGS[int(code[3])],
                "int32": 4.0,
                "SHiRA": 8.0,
            }
        )
    return rows


def fisher_sizes(densities: Sequence[float]) -> list[dict[str, Value]]:
    """Return one row for each density: bytes per kept weight of a real child, by coding, without headers."""
    rows: list[dict[str, Value]] = []
    for density in densities:
        total: dict[str, float] = dict.fromkeys(("entropy", "rice", "block_rice", "by_column", "lzma", "chosen"), 0.0)
        kept = numel = 0
        for shape, positions in fisher_child(density):
            down, across = shape[0], math.prod(shape[1:])
            gaps = gaps_of(positions)
            by_column = gaps_of(np.sort(positions % across * down + positions // across))
            code = encode_child(TensorChild(UnitGrid(shape), torch.from_numpy(positions)))
            bitmap = bitmap_of(positions, down * across)
            total["rice"] += plan_rice(gaps)[1]
            total["block_rice"] += plan_block_rice(gaps)[1]
            total["by_column"] += plan_block_rice(by_column)[1]
            total["lzma"] += len(lzma.compress(bitmap, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]))
            total["chosen"] += code.numel()
            kept += positions.size
            numel += down * across
            # of each tensor's own density; that of the whole model's is larger
            total["entropy"] += entropy_bytes(positions.size, down * across)
        sizes = {name: size / kept for name, size in total.items()}
        rows.append(
            {
                "density": density,
                "kept": kept,
                "entropy": entropy_bytes(kept, numel) / kept,
                "entropy_by_tensor": sizes.pop("entropy"),
                **sizes,
                "chosen_to_entropy": total["chosen"] / entropy_bytes(kept, numel),
            }
        )
    return rows


def fisher_child(density: float) -> list[tuple[tuple[int, ...], Positions]]:
    """Return the shape and the positions of every tensor that keeps some, as chosen on labelled movie sentences."""
    import assets
    from data import by_length, load_rows, tokenize, train_test
    from peft import get_peft_model
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

    folder = str(assets.encoder_dir())
    parts = load_rows("vader:movieReviewSnippets", text_columns=["text"], label_column="label")
    texts, _ = train_test(parts, train=500, test=1000)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loader: DataLoader[Any] = DataLoader(
        by_length(tokenize(texts, tokenizer, 64)), batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer)
    )
    set_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = get_peft_model(base, ChildTuningConfig(task_type="SEQ_CLS", score="fisher", density=density))
    network = select_child_network(model, loader, show_progress=False)
    return [
        (tuple(network.shapes[name]), indices.numpy()) for name, indices in network.indices.items() if indices.numel()
    ]


def main(argv: list[str] | None = None) -> None:
    """Run the three benchmarks."""
    arguments = parser(__doc__, repeats=9)
    arguments.set_defaults(threads=1)
    arguments.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.02, 0.005], help="of the real child")
    options = parse(arguments, argv)
    shapes: tuple[Shape, ...] = ((64, 96),) if options.quick else (BERT, LLAMA)
    speeds: list[dict[str, Value]] = []
    for shape in shapes:
        tensors = 2 if options.quick else -(-100_000_000 // math.prod(shape))
        for kind, draw in CHILDREN.items():
            for density in (0.1, 0.01, 0.001):
                children = [draw(shape, density, seed=options.seed + i) for i in range(tensors)]
                case = {"shape": "x".join(map(str, shape)), "child": kind, "density": density}
                speeds += [case | row for row in speed(shape, children, repeats=options.repeats)]
    finish("codec_speed", speeds, options=options)
    finish("index_size", [row for shape in shapes for row in random_sizes(shape, seed=options.seed)], options=options)
    if not options.quick:  # a quick run fetches nothing
        finish("fisher_index_size", fisher_sizes(options.densities), options=options)


if __name__ == "__main__":
    main()
