"""What share of the gradient each child holds, and what its best learning rate times that share comes to.

    python examples/study/shares.py

If `suggest_learning_rate` is right, the product is the same for all children: the rate of full fine-tuning. Shares are
of the roots of the Fisher information with a fresh head, the mean over the development tasks. It computes them for the
children that are chosen by Fisher information or at random, and puts a table into `README.md`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from marked import insert  # noqa: E402
from protocol import best_rates, read_protocol  # noqa: E402
from run import RESULTS, read_lines  # noqa: E402
from torch import Tensor  # noqa: E402
from training import Method, fisher_of  # noqa: E402
from transformers.utils import logging  # noqa: E402

from peft_childtune.sparse import UnitGrid, select_children, select_random_children  # noqa: E402
from peft_childtune.tuner.learning_rate import gradient_share  # noqa: E402


def share(method: Method, scores: Mapping[str, Tensor], *, seed: int) -> float:
    """Return the share of the gradient that a method's child holds.

    Args:
        method: a child by Fisher information or at random, of single entries.
        scores: Fisher information.
        seed: of the random ones.
    """
    grids = {name: UnitGrid(tuple(each.shape)) for name, each in scores.items()}
    budget = {"density": method.options["density"], "scope": method.options.get("scope", "global")}
    if method.options["score"] == "random":
        child = select_random_children(grids=grids, seed=seed, **budget)
    else:
        child = select_children(scores, grids=grids, **budget)
    return gradient_share(scores, child, squared=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the shares and write the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", nargs="+", help="of development; default: all")
    options = p.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    protocol = read_protocol()
    rates = best_rates(read_lines(RESULTS / "development.jsonl"))
    phase = protocol.phases["development"]
    methods = {
        name: method
        for name, method in protocol.methods.items()
        if name in rates
        and method.options.get("score") in ("fisher", "random")
        and not {"granularity"} & set(method.options)
        and not method.fits_head
        and method.stage == "before"
        and not method.weight_decay
    }
    found: dict[str, list[float]] = {name: [] for name in methods}
    for task in options.tasks or phase.tasks:
        scores = fisher_of(task, seed=phase.seeds[0])
        for name, method in methods.items():
            found[name].append(share(method, scores, seed=phase.seeds[0]))
    rows = [["method", "share of the gradient", "best rate", "product"], ["---", "---:", "---:", "---:"]]
    rows.append(["`full`", "1", f"{rates['full']:g}", f"{rates['full']:.1e}"])
    for name, shares in found.items():
        mean = sum(shares) / len(shares)
        rows.append([f"`{name}`", f"{mean:.3f}", f"{rates[name]:g}", f"{mean * rates[name]:.1e}"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    page = HERE / "README.md"
    page.write_text(insert(page.read_text(encoding="utf-8"), table, name="shares"), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
