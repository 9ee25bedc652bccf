"""Seconds to replace one merged adapter by another, and whether the base is itself again afterwards.

    python examples/benchmarks/switch.py

`unmerge_adapter`, `set_adapter`, `merge_adapter` on a model of BERT-base size with two adapters of random values.
After the last switch everything is unmerged, and the entries of the base that differ from the original are counted.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import Value, finish, interleave, parse, parser, ratio
from peers import Base, base_arguments, base_of, config, randomise, trainable
from peft import get_peft_model
from torch import Tensor, nn

from peft_childtune.kernels import use_kernels

METHODS = ("lora_r8", "shira", "supertuning", "element", "element:torch", "rows")  # torch: without the C extension


class Switched:
    """A model with the adapters `default` and `b`, the first of them merged."""

    def __init__(self, method: str, base: Base, *, density: float) -> None:
        method, _, self.without_extension = method.partition(":")
        plain = base.build()
        self.original = {name: value.clone() for name, value in plain.state_dict().items()}
        first, second = (config(method, plain, density=density, seed=seed, head=False) for seed in (0, 1))
        self.model = get_peft_model(plain, first)
        self.model.add_adapter("b", second)
        for name in ("b", "default"):
            self.model.set_adapter(name)
            randomise(self.model)
        self.trained = sum(p.numel() for p in trainable(self.model))
        self.names = ["b", "default"]
        self.model.merge_adapter()

    def switch(self) -> None:
        with use_kernels(extension=not self.without_extension):
            self.model.unmerge_adapter()
            self.model.set_adapter(self.names[0])
            self.model.merge_adapter()
        self.names.reverse()

    def differing(self) -> int:
        """Unmerge; return how many entries of the base are not what they were."""
        self.model.unmerge_adapter()
        return differing(self.model, self.original)


def differing(model: nn.Module, original: dict[str, Tensor]) -> int:
    """Return how many entries of a wrapped model's base differ from `original`.

    Every tensor of the original has to be found: a renamed one would otherwise count as unchanged.
    """
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
    }
    return sum(int((found[name] != value).sum()) for name, value in original.items())


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, repeats=15)
    base_arguments(arguments, layers=12)
    arguments.add_argument("--density", type=float, default=0.01, help="of the sparse adapters (default 0.01)")
    options = parse(arguments, argv, keeps_memory=True)
    base = base_of(options)
    cases = {method: Switched(method, base, density=options.density) for method in METHODS if base.supports(method)}
    calls: dict[str, Callable[[], object]] = {method: case.switch for method, case in cases.items()}
    seconds = interleave(calls, repeats=options.repeats, device=options.device)
    references = [name for name in ("lora_r8", "shira") if name in cases]
    rows: list[dict[str, Value]] = []
    for method, case in cases.items():
        rows.append(
            base.record
            | {
                "method": method,
                "density": None if method == "lora_r8" else options.density,
                "trained": case.trained,
                "seconds": sorted(seconds[method])[options.repeats // 2],
                "base_entries_changed": case.differing(),
            }
            | {f"to_{name}": ratio(seconds, method, to=name)["median"] for name in references}
        )
    finish("switch", rows, options=options)


if __name__ == "__main__":
    main()
