"""What a language model learns from a text, and what it forgets of others: a child against full fine-tuning and LoRA.

    python examples/study/forgetting.py           # 20 minutes a seed on two cores; goes on where it was broken off
    python examples/study/forgetting.py --table   # only the table in `README.md`, and the plot

SmolLM2-135M is trained on tales of the brothers Grimm; its loss is measured on other tales, and on texts that have
nothing to do with them. Each method is run at several learning rates, as the one loss can be bought with the other.
Full fine-tuning also trains the embeddings; all others, `blocks` too, train in the transformer blocks only.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import assets  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import set_seed  # noqa: E402
from causal_lm import batches, blocks, perplexity, train  # noqa: E402
from figures import draw_forgetting  # noqa: E402
from marked import insert  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from run import RESULTS, origin, read_lines  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils import logging  # noqa: E402

from peft_childtune import ChildTuningConfig, register_score, select_child_network  # noqa: E402

STEPS, BLOCK, BATCH, TEST_BLOCKS = 40, 128, 4, 24
FILE = RESULTS / "forgetting.jsonl"
Line = dict[str, Any]
CHILDREN: dict[str, dict[str, Any]] = {
    "blocks": {"density": 1.0, "score": "random"},
    "random-2": {"density": 0.02, "score": "random"},
    "fisher-global-2": {"density": 0.02, "score": "fisher", "scope": "global"},
    "movement-tensor-2": {"density": 0.02, "score": "gentle", "scope": "tensor"},
}
RATES = {
    "full": (3e-5, 1e-4),
    "blocks": (3e-5, 1e-4),
    "lora": (5e-4, 2e-3),
    "random-2": (1e-3, 4e-3),
    "fisher-global-2": (4e-4, 1.5e-3),
    "movement-tensor-2": (1e-3, 4e-3),
}


def texts() -> dict[str, list[str]]:
    """Return the tales, and texts that are none: newsgroups on computers, editorials, restaurant reviews."""
    groups = ("comp.graphics", "comp.os.ms-windows.misc")
    return {
        "tales": assets.grimm(),
        "newsgroups": assets.newsgroups(groups)[0],
        "editorials": assets.vader("nytEditorialSnippets")[0],
        "restaurants": assets.uci("yelp")[0],
    }


def rows_of(size: int = BLOCK) -> tuple[Tensor, dict[str, Tensor]]:
    """Return blocks to train on, and blocks of each text to measure on; the tales of the two are different ones."""
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2_dir())
    found = texts()
    cut = len(found["tales"]) * 4 // 5
    train = blocks(found["tales"][:cut], tokenizer, size)
    found["tales"] = found["tales"][cut:]
    return train, {name: blocks(each, tokenizer, size)[:TEST_BLOCKS] for name, each in found.items()}


def pretrained() -> nn.Module:
    """Return the base."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(assets.smollm2_dir(), dtype=torch.float32)
    return model


def fine_tuned(method: str, rate: float, seed: int, rows: Tensor, accelerator: Accelerator) -> nn.Module:
    """Return the base after training by one of the methods; the seed decides which rows, their order and all draws."""
    set_seed(seed)
    model = pretrained().to(accelerator.device)
    rows = rows[torch.randperm(len(rows))][: STEPS * BATCH]
    if method == "lora":
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        )
    elif method != "full":
        config = ChildTuningConfig(task_type="CAUSAL_LM", seed=seed, **CHILDREN[method])
        model = get_peft_model(model, config)
        if config.needs_data:
            with accelerator.autocast():
                select_child_network(model, batches(rows, BATCH), num_batches=STEPS // 4, show_progress=False)
    return train(accelerator, model, rows, Namespace(learning_rate=rate, batch_size=BATCH, steps=STEPS, seed=seed))


def losses(model: nn.Module, rows: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Return the mean loss of a token on each text, in nats."""
    return {name: round(math.log(perplexity(model, each, BATCH, accelerator)), 5) for name, each in rows.items()}


def changes(lines: Sequence[Line]) -> dict[tuple[str, float], list[dict[str, float]]]:
    """Return how much lower or higher each loss is than that of the base, a dict a seed, by method and rate.

    `unrelated` is the mean over all texts but the tales.
    """
    base = next(line["losses"] for line in lines if line["method"] == "base")
    found: dict[tuple[str, float], list[dict[str, float]]] = {}
    for line in sorted(lines, key=lambda line: (*RATES, "base").index(line["method"])):
        if line["method"] != "base":
            change = {name: line["losses"][name] - base[name] for name in base}
            change["unrelated"] = sum(change[name] for name in base if name != "tales") / (len(base) - 1)
            found.setdefault((line["method"], line["rate"]), []).append(change)
    return found


def spread(values: Sequence[float]) -> str:
    """Return the mean, and the standard deviation if there is one."""
    return f"{statistics.fmean(values):+.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(lines: Sequence[Line]) -> str:
    """Return the Markdown table: the base's losses, then how each method changed them, mean and sd."""
    base = next(line["losses"] for line in lines if line["method"] == "base")
    rows = [["method", "rate", "seeds", "other tales", *(name for name in base if name != "tales"), "unrelated, mean"]]
    rows += [["---"] + ["---:"] * (len(rows[0]) - 1)]
    rows += [["base: loss", "", "", *(f"{base[name]:.3f}" for name in base), ""]]
    for (method, rate), found in changes(lines).items():
        rows += [
            [f"`{method}`", f"{rate:g}", str(len(found)), *(spread([e[name] for e in found]) for name in found[0])]
        ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the result file does not hold yet; write the table and the plot."""
    p = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    p.add_argument("--table", action="store_true", help="run nothing")
    p.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES), help="default: all")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    options = p.parse_args(argv)
    register_score("gentle", lambda inputs: inputs.compute("movement", learning_rate=3e-5))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # peft 0.21
    if not options.table:
        wanted = [("base", 0.0, 0)]
        wanted += [(name, rate, seed) for seed in options.seeds for name in options.methods for rate in RATES[name]]
        done = {(line["method"], line["rate"], line["seed"]) for line in read_lines(FILE)}
        accelerator = Accelerator(mixed_precision="bf16")
        rows, test = rows_of()
        for method, rate, seed in tqdm([each for each in wanted if each not in done], unit="run"):
            base = method == "base"
            model = pretrained() if base else fine_tuned(method, rate, seed, rows, accelerator)
            found = losses(model.to(accelerator.device), test, accelerator)
            line = {"method": method, "rate": rate, "seed": seed, "losses": found, "steps": STEPS} | origin()
            with FILE.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            del model
            accelerator.free_memory()
            gc.collect()
    if not (lines := read_lines(FILE)):
        raise SystemExit(f"{FILE}: nothing has been run yet; leave --table out.")
    page = HERE / "README.md"
    page.write_text(insert(page.read_text(encoding="utf-8"), table(lines), name="forgetting"), encoding="utf-8")
    draw_forgetting(changes(lines), RESULTS / "forgetting.png")
    print(table(lines))


if __name__ == "__main__":
    main()
