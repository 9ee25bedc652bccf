"""Seconds of one whole training step: forward, loss, backward, AdamW, zero_grad.

    python examples/benchmarks/step.py
    python examples/benchmarks/step.py --plan bert:16x128:0.1,0.01 gpt2:4x128:0.01 --dtype bfloat16

One process; for each density all methods are built anew and timed in turns. `fisher` is the paper's child, chosen by
Fisher information; all other children, the authors' masks and SHiRA's are random: positions without
structure are the slowest. Super-Tuning's are the largest weights. Behind a colon: the path that is forced, or `torch`
for torch's operations alone, without the C extension.
"""

from __future__ import annotations

from functools import partial

from harness import Value, finish, interleave, parse, parser, ratio
from peers import Base, Batch, Trainee, base_arguments, base_of, random_masks, trainee, wrap

from peft_childtune import select_child_network
from peft_childtune.kernels import use_kernels

REFERENCES = ("full", "authors", "lora_r8")  # in every group, so that every ratio is a paired one
FEW, SOME, MANY = "0.1,0.01", "0.1,0.01,0.001", "0.3,0.1,0.03,0.01,0.001"
PLANS = {
    "cpu": [f"bert:16x128:{MANY}", f"bert:4x64:{FEW}", f"bert:1x16:{FEW}", f"gpt2:4x128:{FEW}"],
    "cuda": [f"bert:16x128:{MANY}", f"bert:1x16:{FEW}", f"gpt2:16x128:{FEW}", f"llama:4x512:{SOME}"],
}
QUICK = ["bert:2x8:0.1", "gpt2:2x8:0.1"]


def methods(density: float) -> list[str]:
    """Return what is timed beside the references at one density."""
    names = ["shira", "supertuning", "fisher", "element"]
    if density in (0.1, 0.01):
        names += ["rows", "columns", "block16", "element:sampled", "element:gather", "element:torch"]
    return names + ["lora_r16"] * (density == 0.1)


def run(case: Trainee, batch: Batch, path: str) -> None:
    without_extension = path == "torch"
    forced = None if without_extension else path or None  # None: the library chooses
    with use_kernels(weight_gradient=forced, extension=not without_extension):
        case.step(batch)


def group(base: Base, batch: Batch, *, density: float, repeats: int) -> list[dict[str, Value]]:
    """Time all methods at one density."""
    cases: dict[str, Trainee] = {}
    steps = {}
    for method in [*REFERENCES, *methods(density)]:
        name, _, path = method.partition(":")
        if not base.supports(name):
            continue
        if name == "fisher":
            model = wrap("element", base.build(), density=density, score="fisher")
            select_child_network(model, [base.batch(4, 32)], show_progress=False)
        else:
            model = wrap(name, base.build(), density=density)
        masks = random_masks(model, density) if name == "authors" else None
        cases[method] = trainee(name, model, masks=masks)
        steps[method] = partial(run, cases[method], batch, path)
    seconds = interleave(steps, repeats=repeats, device=base.device)
    rows: list[dict[str, Value]] = []
    for method, case in cases.items():
        row: dict[str, Value] = {"method": method, "density": density, "trained": case.trained}
        row["seconds"] = sorted(seconds[method])[repeats // 2]
        for reference in REFERENCES:
            compared = ratio(seconds, method, to=reference)
            row[f"to_{reference}"] = compared["median"]
            if reference == "full":
                row |= {"to_full_low": compared["low"], "to_full_high": compared["high"]}
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, repeats=5)
    arguments.add_argument("--plan", nargs="+", help="architecture:rows x tokens:densities, for example bert:4x64:0.1")
    base_arguments(arguments, layers=3, architecture=False)
    options = parse(arguments, argv, keeps_memory=True)
    rows: list[dict[str, Value]] = []
    for entry in options.plan or (QUICK if options.quick else PLANS[options.device]):
        architecture, shape, densities = entry.split(":")
        count, tokens = (int(number) for number in shape.split("x"))
        base = base_of(options, architecture=architecture)
        # a short step is also a noisy one
        repeats = options.repeats if options.quick or count * tokens >= 1024 else 2 * options.repeats
        for density in densities.split(","):
            print(f"{entry.rpartition(':')[0]}, density {density} ...", flush=True)
            found = group(base, base.batch(count, tokens), density=float(density), repeats=repeats)
            rows += [base.record | {"rows": count, "tokens": tokens} | row for row in found]
    finish("step", rows, options=options)


if __name__ == "__main__":
    main()
