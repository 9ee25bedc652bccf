"""Seconds of a forward pass without gradients: the plain base, merged adapters, unmerged adapters.

    python examples/benchmarks/inference.py

All cases in one process, in turns; a ratio of 1 is the speed of the base without any adapter. At few tokens ours keeps
its composed weights from one pass to the next; `uncached` shows the price of not doing so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import Value, finish, interleave, parse, parser, ratio
from peers import Base, Batch, base_arguments, base_of, randomise, wrap
from torch import nn

from peft_childtune.kernels import use_kernels

SHAPES = ("1x1", "1x16", "1x128", "16x128")
CASES = (
    ("base", None),
    ("element merged", 0.01),
    ("lora_r8 merged", None),
    ("element", 0.01),
    ("element uncached", 0.01),
    ("element", 0.1),
    ("rows", 0.1),
    ("lora_r8", None),
    ("shira", 0.01),
    ("supertuning", 0.01),
)


def build(case: str, base: Base, *, density: float | None) -> nn.Module:
    """Return the model of one case, its adapter filled with random values."""
    method, _, state = case.partition(" ")
    if method == "base":
        return base.build().eval()
    model = wrap(method, base.build(), **({"density": density} if density else {}), head=False)
    randomise(model)
    if state == "merged":
        model.merge_adapter()
    return model.eval()


def forward(model: nn.Module, batch: Batch, *, cached: bool, mode: type) -> None:
    with mode(), use_kernels(compose_cache=cached):
        model(**batch)


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, repeats=10)
    arguments.add_argument("--shapes", nargs="+", default=None, help="rows x tokens, for example 1x16")
    base_arguments(arguments, layers=4)
    arguments.add_argument("--inference-mode", action="store_true", help="instead of torch.no_grad")
    options = parse(arguments, argv, keeps_memory=True)
    mode = torch.inference_mode if options.inference_mode else torch.no_grad
    base = base_of(options)
    models = {case: build(case[0], base, density=case[1]) for case in CASES if base.supports(case[0])}
    rows: list[dict[str, Value]] = []
    for shape in options.shapes or (("1x1", "2x8") if options.quick else SHAPES):
        print(f"{shape} ...", flush=True)
        count, tokens = (int(number) for number in shape.split("x"))
        batch = base.batch(count, tokens)
        del batch["labels"]
        calls: dict[str, Callable[[], object]] = {
            f"{case[0]}:{case[1]}": partial(forward, model, batch, cached="uncached" not in case[0], mode=mode)
            for case, model in models.items()
        }
        # a short pass is also a noisy one
        repeats = options.repeats if options.quick or count * tokens >= 1024 else 5 * options.repeats
        seconds = interleave(calls, repeats=repeats, warmup=2, device=options.device)
        for name, density in models:
            compared = ratio(seconds, f"{name}:{density}", to="base:None")
            row: dict[str, Value] = {**base.record, "grad_mode": mode.__name__}
            row |= {"case": name, "density": density, "rows": count, "tokens": tokens}
            row["seconds"] = sorted(seconds[f"{name}:{density}"])[repeats // 2]
            row |= {"to_base": compared["median"], "to_base_low": compared["low"], "to_base_high": compared["high"]}
            rows.append(row)
    finish("inference", rows, options=options)


if __name__ == "__main__":
    main()
