"""Time the selection of a child: an exact global threshold over many scores, and the pass that computes the scores.

Threshold: ours returns the positions of the largest scores of many tensors. The peers are given one concatenation for
free and return a bound only (`torch.topk` the positions): `torch.kthvalue`, numpy's `partition`, and the percentile of
a concatenation that the authors take, on a part of the scores with its seconds multiplied up (column `scaled_by`).
Extra memory, for the concatenation too, is measured in a process of its own.

Fisher: one batch of 16 x 128 tokens, per example, against a plain forward and backward pass of the same weights, and
against the authors' square of the whole batch's gradient; and how much of the exact top 10 % that square finds.

    python examples/benchmarks/selection.py [--quick] [--only threshold fisher]
"""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import Value, finish, interleave, parse, parser, ratio
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from peft_childtune.scores import score_parameters
from peft_childtune.scores.batch import loss_of
from peft_childtune.scores.fisher import PerExampleFisher
from peft_childtune.scores.preserve import preserved
from peft_childtune.sparse import UnitGrid, select_children

Scores = dict[str, Tensor]
REFERENCE = "torch.kthvalue"


def scores_of(kind: str, *, total: int, tensors: int) -> Scores:
    """Return squares of normal numbers; if `heavy`, rows and columns differ by many orders of magnitude."""
    columns = 1000
    rows = total // tensors // columns
    found = {}
    for number in range(tensors):
        scores = torch.randn(rows, columns).square_()
        if kind == "heavy":
            scores *= torch.randn(rows, 1).mul_(4).exp_()
            scores *= torch.randn(1, columns).mul_(3).exp_()
        found[f"layer.{number}.weight"] = scores
    return found


def select_ours(scores: Scores, density: float, scope: str = "global") -> object:
    grids = {name: UnitGrid(tuple(tensor.shape)) for name, tensor in scores.items()}
    return select_children(scores, grids=grids, density=density, scope=scope)  # type: ignore[arg-type]


def concatenated(scores: Scores) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in scores.values()])


def threshold_peers(merged: Tensor, *, kept: int, part: int) -> dict[str, Callable[[], object]]:
    """Return the peers; `part` is how many scores the percentile gets."""
    array = merged.numpy()
    return {
        REFERENCE: lambda: torch.kthvalue(merged, merged.numel() - kept + 1),
        "torch.topk": lambda: torch.topk(merged, kept, sorted=False),
        "numpy.partition": lambda: np.partition(array, len(array) - kept),
        "numpy.percentile (authors)": lambda: np.percentile(
            np.concatenate(np.array_split(array[:part], 50)),
            100 * (1 - kept / len(array)),
        ),
    }


def time_thresholds(options: object, *, total: int, tensors: int, part: int) -> list[dict[str, Value]]:
    rows: list[dict[str, Value]] = []
    for kind, density in (("normal", 0.3), ("normal", 0.01), ("heavy", 0.3), ("heavy", 0.01)):
        print(f"threshold of {total:,} {kind} scores at density {density} ...", flush=True)
        scores = scores_of(kind, total=total, tensors=tensors)
        merged = concatenated(scores)
        kept = round(density * merged.numel())
        cases: dict[str, Callable[[], object]] = {
            "ours": partial(select_ours, scores, density),
            "ours, per output neuron": partial(select_ours, scores, density, "row"),
        }
        cases |= threshold_peers(merged, kept=kept, part=part)
        seconds = interleave(cases, repeats=options.repeats, warmup=0)  # type: ignore[attr-defined]
        for name in cases:
            scaled_by = merged.numel() / part if "percentile" in name else 1.0
            seconds[name] = [scaled_by * each for each in seconds[name]]
            compared = ratio(seconds, name, to=REFERENCE)
            rows.append(
                {"method": name, "scores": merged.numel(), "kind": kind, "density": density, "scaled_by": scaled_by}
                | {"seconds": float(np.median(seconds[name])), "to_kthvalue": compared["median"]}
                | {"to_kthvalue_low": compared["low"], "to_kthvalue_high": compared["high"]}
            )
        del scores, merged, cases
        gc.collect()
    return rows


def extra_memory(method: str, *, total: int, tensors: int, density: float, part: int) -> float:
    """Return by how many bytes a score the memory of this process rises at most; for a process that does just this."""
    scores = scores_of("normal", total=total, tensors=tensors)
    before = _peak()
    if method.startswith("ours"):
        select_ours(scores, density, "row" if "neuron" in method else "global")
    else:
        merged = concatenated(scores)
        threshold_peers(merged, kept=round(density * merged.numel()), part=merged.numel())[method]()
    return (_peak() - before) / total


def _peak() -> int:
    """Return the peak resident memory so far, in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def memory_rows(options: object, rows: list[dict[str, Value]], *, total: int, tensors: int, part: int) -> None:
    """Add the extra memory of every method at one density, each measured in a process of its own."""
    density = 0.01
    for row in rows:
        if row["density"] != density or row["kind"] != "normal":
            continue
        if options.quick and row["method"] != "ours":  # type: ignore[attr-defined]
            continue
        size = part if "percentile" in str(row["method"]) else total
        arguments = ["--memory-of", str(row["method"]), "--scores", str(size), "--tensors", str(tensors)]
        quick = ["--quick"] if options.quick else []  # type: ignore[attr-defined]
        done = subprocess.run([sys.executable, __file__, *arguments, *quick], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        row["extra_bytes_per_score"] = float(done.stdout.split()[-1])


def fisher_model(architecture: str, *, layers: int, width: int) -> tuple[nn.Module, str]:
    """Return a model with random weights, in eval mode, and what the names of its blocks' weights contain."""
    heads = max(1, width // 64)
    if architecture == "bert":
        config = BertConfig(
            vocab_size=3000,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
        return BertForSequenceClassification(config).eval(), ".layer."
    gpt2 = GPT2Config(vocab_size=3000, n_embd=width, n_layer=layers, n_head=heads, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(gpt2)
    model.loss_type = "ForCausalLM"  # transformers 5.23 finds none for this class, and warns
    return model.eval(), ".h."


def time_fisher(options: object, *, layers: int, width: int, size: int, tokens: int) -> list[dict[str, Value]]:
    rows: list[dict[str, Value]] = []
    device = torch.device(options.device)  # type: ignore[attr-defined]
    for architecture in ("bert", "gpt2"):
        print(f"Fisher pass of {architecture}, {layers} layers of width {width}, {size} x {tokens} ...", flush=True)
        model, blocks = fisher_model(architecture, layers=layers, width=width)
        model.to(device)
        weights = {name: p for name, p in model.named_parameters() if blocks in name}
        batches = []
        for _ in range(2):
            ids = torch.randint(3, 3000, (size, tokens), device=device)
            labels = torch.randint(0, 2, (size,), device=device) if architecture == "bert" else ids
            batches.append({"input_ids": ids, "labels": labels})

        def gradients(model: nn.Module = model, weights: Scores = weights, batch: Scores = batches[0]) -> Scores:
            for parameter in weights.values():
                parameter.requires_grad_(True)
            found = torch.autograd.grad(model(**batch).loss, list(weights.values()))
            for parameter in weights.values():
                parameter.requires_grad_(False)
            return dict(zip(weights, found, strict=True))

        sums = {name: torch.zeros_like(p) for name, p in weights.items()}

        def batch_squared(sums: Scores = sums, gradients: Callable[[], Scores] = gradients) -> None:
            for name, grad in gradients().items():
                sums[name] += grad**2

        model.requires_grad_(False)
        fisher = PerExampleFisher(model, weights, partial(_loss, model))
        with preserved(model, device):
            fisher.add(batches[0], 0)  # the first batch is scored both ways

        def per_example(
            model: nn.Module = model, fisher: PerExampleFisher = fisher, batch: Scores = batches[0]
        ) -> None:
            with preserved(model, device):
                fisher.add(batch, 1)

        cases = {"forward + backward": gradients, "ours": per_example, "batch squared (authors)": batch_squared}
        seconds = interleave(cases, repeats=options.repeats, device=device.type)  # type: ignore[attr-defined]
        del fisher, sums
        shared = shared_with_exact(model, weights, batches, density=0.1)
        for name in cases:
            compared = ratio(seconds, name, to="forward + backward")
            rows.append(
                {"method": name, "architecture": architecture, "layers": layers, "width": width}
                | {"examples": size, "tokens": tokens, "seconds": float(np.median(seconds[name]))}
                | {"to_plain": compared["median"], "to_plain_low": compared["low"], "to_plain_high": compared["high"]}
                | {"share_of_exact_top_10": {"ours": 1.0, "batch squared (authors)": shared}.get(name)}
            )
    return rows


def _loss(model: nn.Module, batch: object, index: int) -> Tensor:
    return loss_of(model, batch, loss_fn=None, index=index)


def shared_with_exact(model: nn.Module, weights: Scores, batches: list[Scores], *, density: float) -> float:
    """Return which share of the per-example child the batch-squared child has as well."""
    chosen = []
    for score in ("fisher", "fisher_batch"):
        scores = score_parameters(model, weights, batches, score=score, show_progress=False).scores  # type: ignore[arg-type]
        grids = {name: UnitGrid(tuple(tensor.shape)) for name, tensor in scores.items()}
        chosen.append(select_children(scores, grids=grids, density=density))
    exact, estimate = chosen
    both = sum(int(torch.isin(exact[name].indices(), estimate[name].indices()).sum()) for name in exact)
    return both / sum(child.nnz for child in exact.values())


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, repeats=3)
    arguments.add_argument("--only", nargs="+", choices=("threshold", "fisher"), default=("threshold", "fisher"))
    arguments.add_argument("--scores", type=int, help="how many (default 100 million)")
    arguments.add_argument("--tensors", type=int, default=50)
    arguments.add_argument("--percentile-scores", type=int, help="how many of them the percentile gets (a tenth)")
    arguments.add_argument("--layers", type=int, help="of the Fisher models (default 4)")
    arguments.add_argument("--memory-of", help="print only the extra bytes a score of one method")
    options = parse(arguments, argv)
    total = options.scores or (500_000 if options.quick else 100_000_000)
    tensors = math.gcd(options.tensors, total // 1000)
    sizes = {"total": total, "tensors": tensors, "part": options.percentile_scores or total // 10}
    if options.memory_of:
        print(extra_memory(options.memory_of, density=0.01, **sizes))
        return
    if "threshold" in options.only:
        rows = time_thresholds(options, **sizes)
        memory_rows(options, rows, **sizes)
        finish("selection", rows, options=options)
    if "fisher" in options.only:
        shape = {"width": 64, "size": 4, "tokens": 16} if options.quick else {"width": 768, "size": 16, "tokens": 128}
        finish(
            "fisher",
            time_fisher(options, layers=options.layers or (1 if options.quick else 4), **shape),
            options=options,
        )


if __name__ == "__main__":
    main()
