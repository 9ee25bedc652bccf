"""Fine-tune a pretrained encoder in eight ways on the same rows, print one table, reload the smallest file.

    python examples/quickstart.py                     # pinned encoder and movie sentences, 500 rows to train on
    python examples/quickstart.py --model bert-base-uncased --dataset stanfordnlp/imdb
    python examples/quickstart.py --dataset my.csv    # columns `text` and `label`

A child network is chosen by what moves in full fine-tuning (the default), by the Fisher information of the training
rows (Child-Tuning-D), drawn anew at every step (Child-Tuning-F), or drawn once (the control). Beside it: a linear
probe on frozen features, LoRA with about as many trained weights as the 2 % child, and full fine-tuning. The learning
rates are the best of `examples/study`, which has more seeds and tasks.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import assets
import numpy as np
import torch
from data import by_length, load_rows, mean_pooled, tokenize, train_test
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from peft_childtune import ChildNetwork, ChildTuningConfig, fit_head, get_child_network, select_child_network

Record = dict[str, Any]
Wrap = Callable[[nn.Module], nn.Module]
DEFAULT = "child by movement 2 %"


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    method: str
    accuracy: float
    trained: int  # weights
    file_bytes: int
    seconds: float  # choosing the child and training; not the test


@dataclass(frozen=True)
class Job:
    """What all methods share: the model's name, the rows, and how to train."""

    model: str
    num_labels: int
    train: list[Record]
    test: list[Record]
    collate: DataCollatorWithPadding
    epochs: float
    batch_size: int
    seed: int
    out: Path

    def base(self) -> nn.Module:
        """Return a fresh base; its new head is the same one for every method."""
        set_seed(self.seed)
        model: nn.Module = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=self.num_labels)
        return model.to(device())

    def folder(self, method: str) -> Path:
        """Return where a method's file goes."""
        return self.out / re.sub(r"\W+", "-", method).strip("-")

    def loader(self, records: Sequence[Record], batch_size: int = 32) -> DataLoader[Any]:
        """Return batches of rows of similar length."""
        return DataLoader(by_length(records), batch_size=batch_size, collate_fn=self.collate)


def device() -> torch.device:
    """Return the first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_bf16() -> bool:
    """Return whether to compute in bf16 (autocast): on a GPU that can."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


@torch.no_grad()
def predict(model: nn.Module, job: Job) -> Tensor:
    """Return the test rows' logits, `(rows, labels)`, in the order of `by_length`."""
    model.eval()
    logits = []
    for batch in job.loader(job.test):
        batch = {key: value.to(device()) for key, value in batch.items() if key != "labels"}
        with torch.autocast(device().type, torch.bfloat16, enabled=use_bf16()):
            logits.append(model(**batch).logits.float().cpu())
    return torch.cat(logits)


def accuracy(logits: Tensor, job: Job) -> float:
    """Return the share of test rows whose label has the largest logit."""
    labels = torch.tensor([record["labels"] for record in by_length(job.test)])
    return (logits.argmax(dim=-1) == labels).double().mean().item()


def train(job: Job, method: str, *, wrap: Wrap, learning_rate: float) -> tuple[Result, nn.Module, Tensor]:
    """Wrap a fresh base, train it, test it and save it; return the table's row, the model and the test logits."""
    folder = job.folder(method)
    announce(method)
    base = job.base()
    start = time.perf_counter()
    model = wrap(base)
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=learning_rate,
        num_train_epochs=job.epochs,
        per_device_train_batch_size=job.batch_size,
        train_sampling_strategy="group_by_length",
        warmup_steps=0.1,  # below 1: a share of all steps
        weight_decay=0.0,
        seed=job.seed,
        bf16=use_bf16(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=job.train, data_collator=job.collate)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seconds = time.perf_counter() - start
    logits = predict(model, job)
    model.save_pretrained(folder)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = Result(method, accuracy(logits, job), trained, stored_bytes(folder), seconds)
    report(result)
    return result, model, logits


def stored_bytes(folder: Path) -> int:
    """Return the size of all weights files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def child(job: Job, density: float, **options: Any) -> Wrap:
    """Return a wrapper that lets the training rows choose a child network: by options, or, with none, as is best.

    That is with a head that has been fitted first, and by the default, movement.
    """

    def wrap(base: nn.Module) -> nn.Module:
        model = get_peft_model(base, ChildTuningConfig(task_type="SEQ_CLS", density=density, **options))
        if not options:
            fit_head(model, job.loader(job.train), show_progress=False)
        select_child_network(model, job.loader(job.train), show_progress=False)
        return model

    return wrap


def task_free(density: float, *, resample: bool, seed: int) -> Wrap:
    """Return a wrapper that draws the child at random, at every step or once."""

    def wrap(base: nn.Module) -> nn.Module:
        config = ChildTuningConfig(
            task_type="SEQ_CLS", mode="task_free", density=density, resample=resample, seed=seed
        )
        return get_peft_model(base, config)

    return wrap


def lora_like(network: ChildNetwork) -> Wrap:
    """Return a wrapper for LoRA on the matrices a child covers, of the rank that trains about as many weights."""
    matrices = {name: shape for name, shape in network.shapes.items() if len(shape) == 2}
    rank = max(1, round(network.nnz / sum(sum(shape) for shape in matrices.values())))
    modules = [name.removesuffix(".weight") for name in matrices]

    def wrap(base: nn.Module) -> nn.Module:
        config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=modules)
        return get_peft_model(base, config)

    return wrap


def linear_probe(job: Job) -> Result:
    """Fit a logistic regression on frozen, mean-pooled features."""
    announce("linear probe")
    start = time.perf_counter()
    encoder = AutoModel.from_pretrained(job.model).to(device()).eval()
    features, labels = pooled_features(encoder, job.loader(job.train))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(features, labels)
    seconds = time.perf_counter() - start
    score = probe.score(*pooled_features(encoder, job.loader(job.test)))
    head = probe[-1]
    folder = job.folder("linear probe")
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"coef": head.coef_, "intercept": head.intercept_, "mean": probe[0].mean_, "scale": probe[0].scale_}
    save_file({name: array.astype(np.float32) for name, array in arrays.items()}, folder / "probe.safetensors")
    result = Result("linear probe", score, head.coef_.size + head.intercept_.size, stored_bytes(folder), seconds)
    report(result)
    return result


@torch.no_grad()
def pooled_features(encoder: nn.Module, loader: DataLoader[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of the last hidden states over each text's own tokens, `(rows, width)`, and the labels."""
    features, labels = [], []
    for batch in loader:
        labels.append(batch.pop("labels"))
        batch = batch.to(device())
        features.append(mean_pooled(encoder(**batch).last_hidden_state, batch["attention_mask"]).cpu())
    return torch.cat(features).numpy(), torch.cat(labels).numpy()


def announce(method: str) -> None:
    """Begin a progress line: what comes takes up to a minute."""
    print(f"  {method} ...", end=" ", flush=True)


def report(result: Result) -> None:
    """End a progress line."""
    print(f"{result.accuracy:.3f} in {result.seconds:.0f} s", flush=True)


def table(results: Sequence[Result]) -> str:
    """Return the results as an aligned Markdown table."""
    head = ("method", "accuracy", "trained weights", "file, bytes", "seconds")
    rows = [
        (r.method, f"{r.accuracy:.3f}", f"{r.trained:,}", f"{r.file_bytes:,}", f"{r.seconds:.0f}") for r in results
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    aligns = [str.ljust] + [str.rjust] * (len(head) - 1)
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = [
        [align(cell, width) for align, cell, width in zip(aligns, row, widths, strict=True)]
        for row in (head, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=None, help="a hub model or a folder; default: the pinned encoder")
    p.add_argument(
        "--dataset", default="vader:movieReviewSnippets", help="see `load_rows` in data.py: pinned, local file or hub"
    )
    p.add_argument("--subset", help="the configuration of a hub dataset, such as `sst2` of `nyu-mll/glue`")
    p.add_argument("--text-column", default="text")
    p.add_argument("--label-column", default="label")
    p.add_argument("--train-rows", type=int, default=500)
    p.add_argument("--test-rows", type=int, default=1000)
    p.add_argument("--epochs", type=float, default=4)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--max-length", type=int, default=64, help="tokens")
    p.add_argument("--seed", type=int, default=0, help="of the head, the batches and the random children")
    p.add_argument("--output", type=Path, default=None, help="folder to keep the files in; default: a temporary one")
    return p


def make_job(args: argparse.Namespace, out: Path) -> Job:
    """Fetch the model and the rows that the command line names."""
    model = args.model or str(assets.encoder_dir())
    parts = load_rows(
        args.dataset, text_columns=[args.text_column], label_column=args.label_column, subset=args.subset
    )
    train_rows, test_rows = train_test(parts, train=args.train_rows, test=args.test_rows)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Job(
        model=model,
        num_labels=max(max(part.labels) for part in parts) + 1,
        train=tokenize(train_rows, tokenizer, args.max_length),
        test=tokenize(test_rows, tokenizer, args.max_length),
        collate=DataCollatorWithPadding(tokenizer),
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        out=out,
    )


def compare(job: Job) -> tuple[list[Result], bool]:
    """Run all eight methods; return the table's rows, and whether the reloaded 2 % child predicts the same bits."""
    results = [linear_probe(job)]

    def run(method: str, wrap: Wrap, learning_rate: float) -> tuple[nn.Module, Tensor]:
        result, model, logits = train(job, method, wrap=wrap, learning_rate=learning_rate)
        results.append(result)
        return model, logits

    small, logits = run(DEFAULT, child(job, 0.02), 2e-3)
    network = get_child_network(small)
    run("Child-Tuning-D 30 %", child(job, 0.3, score="fisher"), 3e-4)
    run("Child-Tuning-D 2 %", child(job, 0.02, score="fisher"), 1e-3)
    run("Child-Tuning-F 30 %", task_free(0.3, resample=True, seed=job.seed), 6e-4)
    run("fixed random child 2 %", task_free(0.02, resample=False, seed=job.seed), 6e-3)
    run("LoRA", lora_like(network), 2e-3)
    run("full fine-tuning", lambda base: base, 2e-4)

    set_seed(job.seed + 1)  # another random head, so that nothing but the file can make the predictions equal
    fresh = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=job.num_labels)
    reloaded = PeftModel.from_pretrained(fresh, job.folder(DEFAULT)).to(device())
    return results, torch.equal(predict(reloaded, job), logits)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison that the command line asks for."""
    args = parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("peft_childtune").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # peft 0.21
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        job = make_job(args, args.output or Path(scratch))
        print(f"{len(job.train)} rows to train on, {len(job.test)} held out, on {device()}", flush=True)
        results, identical = compare(job)
        print(f"\n{table(results)}\n")
        if not identical:
            raise SystemExit("the reloaded adapter predicts differently: please report this as a bug")
        print(f"{DEFAULT}, saved and loaded onto a fresh base: all {len(job.test)} predictions are identical.")
        print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
