"""What a language model learns from a text, and what it forgets of others: a child against full fine-tuning and LoRA.

    python examples/study/forgetting.py           # 30 to 60 minutes on two cores; goes on where it was broken off
    python examples/study/forgetting.py --table   # only put the table into `README.md`

SmolLM2-135M is trained on tales of the brothers Grimm; its loss is measured on other tales, and on texts that have
nothing to do with them. Each method is run at several learning rates, as the one loss can be bought with the other.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import assets  # noqa: E402
import torch  # noqa: E402
from causal_lm import batches, blocks, perplexity  # noqa: E402
from marked import insert  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from run import RESULTS, origin, read_lines  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging  # noqa: E402

from peft_childtune import ChildTuningConfig, select_child_network  # noqa: E402

STEPS, BLOCK, BATCH, TEST_BLOCKS = 40, 128, 4, 24
FILE = RESULTS / "forgetting.jsonl"
CHILDREN: dict[str, dict[str, Any]] = {
    "random-2": {"score": "random"},
    "fisher-global-2": {"score": "fisher", "scope": "global"},
    "movement-tensor-2": {"score": "movement", "scope": "tensor"},
}
RATES = {
    "full": (3e-5, 1e-4),
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


def pretrained(device: str) -> nn.Module:
    """Return the base, whose forward computes in bf16."""
    set_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(assets.smollm2_dir(), dtype=torch.float32).to(device)
    model.forward = torch.autocast(device, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    return model


def fine_tuned(method: str, rate: float, rows: Tensor, device: str) -> nn.Module:
    """Return the base after training by one of the methods."""
    model = pretrained(device)
    rows = rows[torch.randperm(len(rows))][: STEPS * BATCH]
    loader = batches(rows, BATCH)
    if method == "lora":
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(model, config)
    elif method != "full":
        config = ChildTuningConfig(task_type="CAUSAL_LM", density=0.02, **CHILDREN[method])
        model = get_peft_model(model, config)
        if config.needs_data:
            select_child_network(model, loader, num_batches=STEPS // 4, show_progress=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    model.train()
    for batch in loader:
        batch = {name: each.to(device) for name, each in batch.items()}
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def losses(model: nn.Module, rows: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean loss of a token on each text, in nats."""
    return {name: round(math.log(perplexity(model, each, BATCH)), 5) for name, each in rows.items()}


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table: how much lower or higher each loss is than that of the base."""
    base = next(line["losses"] for line in lines if line["method"] == "base")
    others = [name for name in base if name != "tales"]
    rows = [["method", "rate", "other tales", *others, "mean of the unrelated"]]
    rows += [["---"] + ["---:"] * (len(rows[0]) - 1)]
    rows += [["base: loss", "", *(f"{base[name]:.3f}" for name in ["tales", *others]), ""]]
    for line in sorted(lines, key=lambda line: list(RATES).index(line["method"]) if line["method"] in RATES else -1):
        if line["method"] != "base":
            change = {name: line["losses"][name] - base[name] for name in base}
            mean = sum(change[name] for name in others) / len(others)
            figures = [*(change[name] for name in ["tales", *others]), mean]
            rows += [[f"`{line['method']}`", f"{line['rate']:g}", *(f"{each:+.3f}" for each in figures)]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the result file does not hold yet, and write the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--table", action="store_true", help="run nothing")
    p.add_argument("--methods", nargs="+", choices=sorted(RATES), default=list(RATES), help="default: all")
    options = p.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # peft 0.21
    wanted = [("base", 0.0), *((method, rate) for method in options.methods for rate in RATES[method])]
    done = {(line["method"], line["rate"]) for line in read_lines(FILE)}
    if not options.table:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        train, test = rows_of()
        for method, rate in tqdm([each for each in wanted if each not in done], unit="run"):
            model = pretrained(device) if method == "base" else fine_tuned(method, rate, train, device)
            line = {"method": method, "rate": rate, "losses": losses(model, test), "steps": STEPS} | origin()
            with FILE.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            del model
    page = HERE / "README.md"
    text = insert(page.read_text(encoding="utf-8"), table(read_lines(FILE)), name="forgetting")
    page.write_text(text, encoding="utf-8")
    print(table(read_lines(FILE)))


if __name__ == "__main__":
    main()
