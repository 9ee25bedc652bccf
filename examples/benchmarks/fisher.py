"""Time per-example Fisher information against a plain forward and backward pass of the same batches.

Runs an encoder of BERT-base's width with random weights. Each repetition times both on the same batch, one right after
the other, and the median of the paired ratios is printed: a machine that is slow for a while is slow for both.

    python examples/benchmarks/fisher.py --layers 4 --repeats 7
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import BertConfig, BertForSequenceClassification

from peft_childtune.scores.batch import loss_of
from peft_childtune.scores.fisher import PerExampleFisher
from peft_childtune.scores.preserve import preserved


def main() -> None:
    """Time both and print one line."""
    parser = argparse.ArgumentParser(description="Per-example Fisher information against forward + backward.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--padding", action="store_true", help="lengths spread evenly between 1 and --tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    device = torch.device(options.device)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=options.layers)).to(device).eval()
    blocks = {name: p for name, p in model.named_parameters() if ".layer." in name}
    tokens = torch.randint(1, 30000, (options.batch_size, options.tokens))
    lengths = torch.full((options.batch_size,), options.tokens)
    if options.padding:
        lengths = torch.linspace(1, options.tokens, options.batch_size).long()
    kept = torch.arange(options.tokens) < lengths[:, None]
    labels = torch.randint(0, 2, (options.batch_size,))
    batch = {"input_ids": tokens * kept, "attention_mask": kept.long(), "labels": labels}
    batch = {key: value.to(device) for key, value in batch.items()}

    fisher = PerExampleFisher(model, blocks, lambda batch, index: loss_of(model, batch, loss_fn=None, index=index))
    with preserved(model, device):
        fisher.add(batch, 0)  # the first batch is scored both ways

    def score() -> None:
        with preserved(model, device):
            fisher.add(batch, 1)

    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in blocks
    weights = list(blocks.values())

    def plain() -> None:
        torch.autograd.grad(model(**batch).loss, weights, allow_unused=True)

    plain(), score()
    pairs = [(_seconds(plain, device), _seconds(score, device)) for _ in range(options.repeats)]
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    seconds = statistics.median(ours for _, ours in pairs)
    print(
        f"per-example Fisher / (forward + backward) = {ratio:.3f} "
        f"(median of {len(pairs)} pairs, {seconds:.2f} s a batch; "
        f"{options.layers} layers of width 768, {options.batch_size} x {options.tokens} tokens, {device.type}, "
        f"{options.threads} threads, torch {torch.__version__})"
    )


def _seconds(function: object, device: torch.device) -> float:
    assert callable(function)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
