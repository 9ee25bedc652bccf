"""Child-Tuning on a text classification task: GLUE by name, any hub dataset or local files, over several seeds.

    python examples/text_classification.py --task rte --model bert-base-uncased --density 0.1 --seeds 0 1 2
    python examples/text_classification.py --dataset my.csv --text-columns text --mode task_free --resample
    accelerate launch --multi_gpu --num_processes 2 examples/text_classification.py --dataset vader:tweets

The training loop is a plain accelerate loop: it runs on one CPU, one GPU, or several processes under
`accelerate launch`, where every process scores and trains on its share of the rows and only the first one prints.
The trained adapter of each seed is kept in `--output`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import assets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from accelerated import add_flags, make_accelerator
from data import Rows, load_rows, tokenize, train_test
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)
from transformers.utils import logging as transformers_logging

from peft_childtune import ChildTuningConfig, fit_head, select_child_network, suggest_learning_rate
from peft_childtune.scores import score_names

GLUE_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}

# The options of ChildTuningConfig, as flags; their help comes from the configuration itself.
CHILD_FLAGS: dict[str, dict[str, Any]] = {
    "mode": {"choices": ("task_driven", "task_free")},
    "density": {"type": float},
    "score": {"choices": tuple(score_names())},
    "scope": {"choices": ("global", "layer", "tensor", "row")},
    "granularity": {"choices": ("element", "row", "column", "block")},
    "block_size": {"type": int},
    "resample": {"action": argparse.BooleanOptionalAction},
    "init_weights": {"action": argparse.BooleanOptionalAction},
    "save_dtype": {"choices": ("float32", "bfloat16", "float16")},
    "target_modules": {"nargs": "+"},
    "exclude_modules": {"nargs": "+"},
    "layers_to_transform": {"nargs": "+", "type": int},
    "layers_pattern": {"nargs": "+"},
    "modules_to_save": {"nargs": "+"},
}


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = p.add_argument_group("data")
    data.add_argument("--task", choices=sorted(GLUE_COLUMNS), help="a GLUE task; or give --dataset")
    data.add_argument("--dataset", help="see `load_rows` in data.py; default: vader:movieReviewSnippets")
    data.add_argument("--subset", help="the configuration of a hub dataset")
    data.add_argument("--text-columns", nargs="+", default=["text"], help="one column, or two for sentence pairs")
    data.add_argument("--label-column", default="label")
    data.add_argument("--train-rows", type=int, default=None, help="default: all")
    data.add_argument("--test-rows", type=int, default=1000)
    data.add_argument("--max-length", type=int, default=128, help="tokens")
    training = p.add_argument_group("training")
    training.add_argument("--model", default=None, help="a hub model or a folder; default: the pinned encoder")
    training.add_argument("--method", choices=("child", "full"), default="child", help="full: the usual fine-tuning")
    training.add_argument("--seeds", type=int, nargs="+", default=[0])
    training.add_argument("--epochs", type=int, default=3)
    training.add_argument("--batch-size", type=int, default=16, help="rows a process and step")
    training.add_argument(
        "--learning-rate", type=float, default=None, help="default: suggest_learning_rate, up to 1e-2; 1e-4 for full"
    )
    training.add_argument("--weight-decay", type=float, default=0.0, help="pulls towards the base, not towards zero")
    training.add_argument("--warmup", type=float, default=0.1, help="share of all steps")
    training.add_argument("--max-grad-norm", type=float, default=1.0)
    training.add_argument("--selection-rows", type=int, default=None, help="rows to choose the child on; default: all")
    training.add_argument(
        "--fit-head",
        action=argparse.BooleanOptionalAction,
        help="fit the head on the frozen base first; default: if data choose the child",
    )
    training.add_argument("--output", type=Path, default=Path("out"))
    add_flags(p)
    child = p.add_argument_group("child network (ChildTuningConfig; its seed is the run's seed)")
    options = {field.name: field for field in fields(ChildTuningConfig)}
    for name, how in CHILD_FLAGS.items():
        help_text = str(options[name].metadata["help"]).replace("%", "%%")
        child.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=help_text, **how)
    return p


def child_config(args: argparse.Namespace, seed: int) -> ChildTuningConfig:
    """Return the configuration that the command line spells; what it leaves out keeps the library's default."""
    given = {name: value for name, value in vars(args).items() if name in CHILD_FLAGS}
    for name in ("target_modules", "exclude_modules"):
        value = given.get(name)
        if value and len(value) == 1 and (value[0] == "all-linear" or not re.fullmatch(r"[\w.]+", value[0])):
            given[name] = value[0]  # the shorthand, or a regular expression: PEFT wants these as they are
    return ChildTuningConfig(task_type="SEQ_CLS", seed=seed, **given)


def learning_rate(args: argparse.Namespace, config: ChildTuningConfig) -> float:
    """Return the asked-for learning rate, or one that suits what the chosen child holds of the gradient."""
    if args.learning_rate is not None:
        return float(args.learning_rate)
    return 1e-4 if args.method == "full" else min(suggest_learning_rate(config, full=1e-4), 1e-2)


def load_task(args: argparse.Namespace) -> tuple[Rows, Rows]:
    """Return train and test rows; the test rows of a GLUE task are its validation split."""
    if args.task:
        parts = load_rows("nyu-mll/glue", subset=args.task, text_columns=GLUE_COLUMNS[args.task], label_column="label")
    else:
        name = args.dataset or "vader:movieReviewSnippets"
        parts = load_rows(name, text_columns=args.text_columns, label_column=args.label_column, subset=args.subset)
    return train_test(parts, train=args.train_rows, test=args.test_rows)


def metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return accuracy and Matthews correlation of classes, or the correlation of regressed values."""
    if predictions.shape[1] == 1:
        return {"pearson": float(np.corrcoef(predictions[:, 0], labels)[0, 1])}
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    classes = predictions.argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(labels, classes)),
        "f1": float(f1_score(labels, classes, average="macro")),
        "matthews": float(matthews_corrcoef(labels, classes)),
    }


def run(args: argparse.Namespace, accelerator: Accelerator, rows: tuple[Rows, Rows], seed: int) -> dict[str, float]:
    """Train and test one seed, and save it."""
    name = args.model or str(assets.encoder_dir())
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, test = (tokenize(part, tokenizer, args.max_length) for part in rows)
    labels = [label for part in rows for label in part.labels]
    num_labels = 1 if isinstance(labels[0], float) else int(max(labels)) + 1

    set_seed(seed)  # the same head on every process, and a child that belongs to it
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(name, num_labels=num_labels)
    collate: Any = DataCollatorWithPadding(tokenizer)
    config = child_config(args, seed)
    if args.method == "child":
        model = get_peft_model(model.to(accelerator.device), config)
        fits_head = config.needs_data if args.fit_head is None else args.fit_head
        if fits_head or config.needs_data:
            rows_to_see: Any = DataLoader(train[: args.selection_rows], args.batch_size, collate_fn=collate)
            rows_to_see = accelerator.prepare_data_loader(rows_to_see)
        if fits_head:
            fit_head(model, rows_to_see, show_progress=False)
        if config.needs_data:
            select_child_network(model, rows_to_see, show_progress=False)
        config = model.peft_config["default"]  # which knows now what was chosen
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=learning_rate(args, config),
        weight_decay=args.weight_decay,
    )
    train_loader: Any = DataLoader(train, args.batch_size, shuffle=True, collate_fn=collate)
    test_loader: Any = DataLoader(test, 4 * args.batch_size, collate_fn=collate)
    model, optimizer, train_loader, test_loader = accelerator.prepare(model, optimizer, train_loader, test_loader)
    # Not prepared: it steps once an optimizer step, and those are counted on the loader of this process.
    steps = args.epochs * math.ceil(len(train_loader) / accelerator.gradient_accumulation_steps)
    schedule = get_linear_schedule_with_warmup(optimizer, int(args.warmup * steps), steps)
    step = args.seeds.index(seed) * steps  # trackers want steps that grow from seed to seed

    for _ in range(args.epochs):
        model.train()
        for batch in train_loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                step += 1
                mean_loss = accelerator.reduce(loss.detach(), "mean").item()
                rate = schedule.get_last_lr()[0]
                accelerator.log({f"seed {seed}/loss": mean_loss, f"seed {seed}/learning rate": rate}, step=step)
                schedule.step()

    model.eval()
    predictions, targets = [], []
    for batch in test_loader:
        with torch.no_grad():
            logits = model(**batch).logits
        gathered = accelerator.gather_for_metrics((logits.float(), batch["labels"]))  # repeated rows are dropped
        predictions.append(gathered[0].cpu())
        targets.append(gathered[1].cpu())
    result = metrics(torch.cat(predictions).numpy(), torch.cat(targets).numpy())
    accelerator.log({f"seed {seed}/{name}": value for name, value in result.items()}, step=step)

    state = accelerator.get_state_dict(model)  # on every process: sharded weights are gathered
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output / f"seed-{seed}", state_dict=state)
    accelerator.free_memory()
    return {**result, "trained weights": count}


def table(results: dict[int, dict[str, float]]) -> str:
    """Return one Markdown row a seed, and the mean and standard deviation over them."""
    names = list(next(iter(results.values())))

    def line(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    def cell(name: str, value: float) -> str:
        return f"{value:,.0f}" if name == "trained weights" else f"{value:.4f}"

    lines = [line("seed", *names), line("---", *("---:" for _ in names))]
    lines += [line(str(seed), *(cell(n, row[n]) for n in names)) for seed, row in results.items()]
    lines.append(line("mean", *(cell(n, statistics.mean(row[n] for row in results.values())) for n in names)))
    if len(results) > 1:
        lines.append(line("sd", *(cell(n, statistics.stdev(row[n] for row in results.values())) for n in names)))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Train every seed that the command line asks for."""
    args = parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # peft 0.21
    accelerator = make_accelerator(args, "text_classification")
    with accelerator.main_process_first():  # one process downloads, the others find the files
        rows = load_task(args)
    accelerator.print(
        f"{len(rows[0])} rows to train on, {len(rows[1])} held out, {accelerator.num_processes} process(es)"
    )
    results: dict[int, dict[str, float]] = {}
    for seed in args.seeds:
        results[seed] = run(args, accelerator, rows, seed)
        accelerator.print(f"seed {seed}: {json.dumps(results[seed])}")
    accelerator.print(f"\n{table(results)}\n\nsaved in {args.output}/seed-*")
    accelerator.end_training()


if __name__ == "__main__":
    main()
