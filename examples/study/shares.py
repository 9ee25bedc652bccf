"""What share of the gradient each child holds, and what its best learning rate times that share comes to.

    python examples/study/shares.py

If `suggest_learning_rate` is right, the product is the same for all children: the rate of full fine-tuning. Shares are
of the roots of the Fisher information at the start of training, whatever the child was chosen by.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import torch  # noqa: E402
from protocol import best_rates, read_protocol  # noqa: E402
from run import RESULTS, read_lines  # noqa: E402
from training import child_of  # noqa: E402
from transformers.utils import logging  # noqa: E402

from peft_childtune.scores import score_parameters  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    """Print and save the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tasks", nargs="+", help="of development; default: all")
    p.add_argument("--methods", nargs="+", help="default: all children that ran")
    options = p.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    protocol = read_protocol()
    rates = best_rates(read_lines(RESULTS / "development.jsonl"))
    phase = protocol.phases["development"]
    seed = phase.seeds[0]
    methods = {
        name: method
        for name, method in protocol.methods.items()
        if name in rates
        and name in (options.methods or rates)
        and method.kind == "child"
        and "resample" not in method.options
    }
    found: dict[str, list[float]] = {name: [] for name in methods}
    tasks = options.tasks or phase.tasks
    for task in tasks:
        for name, method in sorted(methods.items(), key=lambda item: item[1].fits_head):
            base, parameters, batches, child = child_of(method, task=task, seed=seed)
            if (task, method.fits_head) not in _roots:
                fisher = score_parameters(base, parameters, batches, show_progress=False).scores
                _roots.clear()
                _roots[task, method.fits_head] = {key: each.sqrt() for key, each in fisher.items()}
            roots = _roots[task, method.fits_head]
            kept = sum(float(roots[key].flatten()[at].sum()) for key, at in child.indices.items())
            found[name].append(kept / sum(float(each.sum()) for each in roots.values()))
    shares = {name: sum(each) / len(each) for name, each in found.items()}
    rows = {name: {"share": shares[name], "rate": rates[name]} for name in methods}
    (RESULTS / "shares.json").write_text(
        json.dumps({"seed": seed, "tasks": tasks, "full": rates.get("full"), "rows": rows}, indent=1)
    )
    for name, row in rows.items():
        print(f"{name:28s} share {row['share']:.3f}  rate {row['rate']:.0e}  product {row['share'] * row['rate']:.1e}")


_roots: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}

if __name__ == "__main__":
    main()
