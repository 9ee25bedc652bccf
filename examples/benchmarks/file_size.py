"""Bytes on disk per trained weight, ours and the peers', on a model of BERT-base width.

    python examples/benchmarks/file_size.py

Every delta is filled with random values: zeros would flatter a compressor. `limit` is the entropy of independent
positions plus the bytes of a value: what a file needs if positions have no structure and values cannot be compressed.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from harness import Value, finish, parse, parser
from peers import Base, config, randomise, trainable
from peft import get_peft_model

from peft_childtune import select_child_network

DENSITIES = (0.3, 0.1, 0.03, 0.01, 0.001)
# label, method, options
CHILDREN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fisher", "element", {"score": "fisher"}),
    ("fisher, bfloat16", "element", {"score": "fisher", "save_dtype": "bfloat16"}),
    ("magnitude", "element", {"score": "magnitude"}),
    ("seeded random", "element", {"score": "random"}),
    ("fisher rows", "rows", {"score": "fisher"}),
    ("shira", "shira", {}),
    ("supertuning", "supertuning", {}),
    ("lora_r8", "lora_r8", {}),
)


def limit(density: float, value_bytes: int) -> float:
    """Return the bytes per kept weight of independent positions and incompressible values."""
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density
    return entropy / 8 + value_bytes


def measure(
    base: Base, method: str, *, density: float, score: str = "random", save_dtype: str | None = None
) -> tuple[int, int]:
    """Return the trained weights and the bytes of the saved file."""
    plain = base.build()
    chosen = config(method, plain, density=density, score=score, head=False)
    if save_dtype is not None:
        chosen.save_dtype = save_dtype
    model = get_peft_model(plain, chosen)
    if score == "fisher":
        batches = [base.batch(8, 32) for _ in range(2)]
        select_child_network(model, batches, show_progress=False)
    randomise(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return sum(p.numel() for p in trainable(model)), size


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, repeats=1)
    arguments.add_argument("--layers", type=int, default=2)
    options = parse(arguments, argv)
    layers, vocab = (1, 50) if options.quick else (options.layers, 1000)
    base = Base("bert", layers, vocab, quick=options.quick, seed=options.seed)
    rows: list[dict[str, Value]] = []
    for density in (0.1,) if options.quick else DENSITIES:
        print(f"density {density} ...", flush=True)
        for label, method, chosen in CHILDREN:
            count, size = measure(base, method, density=density, **chosen)
            value_bytes = 2 if "save_dtype" in chosen else 4
            row: dict[str, Value] = {"child": label, "density": None if method == "lora_r8" else density}
            row |= {"trained": count, "bytes": size, "bytes_each": size / count}
            row["limit"] = None if method == "lora_r8" else limit(density, value_bytes)
            if row not in rows:  # LoRA's file is the same at every density
                rows.append(row)
    finish("file_size", rows, options=options)


if __name__ == "__main__":
    main()
