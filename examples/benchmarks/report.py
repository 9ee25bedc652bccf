"""Run the benchmarks, draw their plots, and write the table of the README.

python examples/benchmarks/report.py                       # everything, about 25 minutes on two idle cores
python examples/benchmarks/report.py --only step memory    # some of it; the other results stay as they are
python examples/benchmarks/report.py --plots-only          # plots and table from the result files as they are
python examples/benchmarks/report.py --device cuda         # on a GPU: results, plots and a table of its own
python examples/benchmarks/report.py --quick               # shows that every script runs; writes nothing
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from marked import insert  # noqa: E402
from table import Row, readme_block  # noqa: E402

README = HERE.parents[1] / "README.md"
SCRIPTS = ("codec", "selection", "file_size", "step", "memory", "switch", "inference")
ON_GPU = ("step", "memory", "switch", "inference")  # the others have nothing to do there


def run(script: str, *flags: str) -> None:
    """Run one script and show what it prints; raise if it fails."""
    start = time.perf_counter()
    print(f"--- {script}", flush=True)
    subprocess.run([sys.executable, str(HERE / f"{script}.py"), *flags], check=True)
    print(f"--- {script}: {time.perf_counter() - start:.0f} s", flush=True)


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the content of every result file by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def draw(results: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Draw the plot of every result file that has one."""
    from plots import FIGURES, save_figure  # matplotlib is not needed to run the benchmarks

    rows: dict[str, Sequence[Row]] = {name: result["rows"] for name, result in results.items()}
    return [
        save_figure(FIGURES[kind](rows[name]), folder / f"{name}.png")
        for name in rows
        if (kind := name.removesuffix("_cuda")) in FIGURES
    ]


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=SCRIPTS, help="in this order")
    arguments.add_argument("--quick", action="store_true", help="tiny shapes; writes nothing")
    arguments.add_argument("--plots-only", action="store_true", help="measure nothing")
    arguments.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments.add_argument(
        "--results", type=Path, default=HERE / "results", metavar="FOLDER", help="of the result files"
    )
    arguments.add_argument("--readme", type=Path, default=README, metavar="FILE", help="where the tables go")
    options = arguments.parse_args(argv)
    if not options.plots_only:
        gpu = options.device != "cpu"
        flags = ["--quick"] if options.quick else []
        flags += ["--device", options.device] if gpu else []
        flags += ["--results", str(options.results)]
        for script in options.only or (ON_GPU if gpu else SCRIPTS):
            run(script, *flags)
    if options.quick:
        return
    results = load(options.results)
    if not results:
        raise SystemExit(f"no result files in {options.results}; measure first, without --plots-only")
    for path in draw(results, options.results):
        print(f"saved {path}")
    options.readme.write_text(insert(options.readme.read_text(), readme_block(results), name="benchmarks"))
    print(f"wrote the table in {options.readme}")


if __name__ == "__main__":
    main()
