"""Child-Tuning of a causal language model on a text: perplexity before and after, then the saved file reloaded.

    python examples/causal_lm.py                                     # SmolLM2-135M on tales of the brothers Grimm
    python examples/causal_lm.py --model openai-community/gpt2 --text my.txt --density 0.02 --steps 500

The default run is small enough for two CPU cores; on a GPU raise `--steps`, `--block` and `--selection-blocks`. The
training loop is plain PyTorch: nothing but an optimizer over the trainable parameters is needed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import assets
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup, set_seed
from transformers.utils import logging as transformers_logging

from peft_childtune import ChildTuningConfig, select_child_network


def read_texts(path: Path | None) -> list[str]:
    """Return the documents of a text file, parted by blank lines, or the tales."""
    if path is None:
        return assets.grimm()
    documents = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n")]
    return [document for document in documents if document]


def blocks(texts: Sequence[str], tokenizer: Any, size: int) -> Tensor:
    """Return all texts as one token stream cut into blocks, `(blocks, size)`; a rest at the end is dropped.

    Raises:
        ValueError: the texts do not fill a single block.
    """
    end = tokenizer.eos_token or "\n"
    stream = tokenizer(end.join(texts), return_tensors="pt", verbose=False)["input_ids"][0]
    if len(stream) < size:
        raise ValueError(f"the text has {len(stream)} tokens, a block needs {size}; use more text or smaller blocks.")
    return stream[: len(stream) // size * size].view(-1, size)


def batches(rows: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Return the rows in order, as batches that a causal language model takes; it shifts the labels itself."""
    return [{"input_ids": part, "labels": part} for part in rows.split(batch_size)]


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, batch_size: int) -> float:
    """Return exp of the mean loss over all predicted tokens."""
    model.eval()
    total = sum(
        model(input_ids=part, labels=part).loss.double().item() * len(part)
        for part in rows.to(device()).split(batch_size)
    )
    return math.exp(total / len(rows))


def train(model: nn.Module, rows: Tensor, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    """Train every trainable parameter with AdamW, a short warm-up and clipped gradients."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    order = torch.Generator().manual_seed(seed)
    loader: Any = DataLoader(rows, batch_size, shuffle=True, drop_last=True, generator=order)
    done = 0
    while done < steps:
        for part in loader:
            part = part.to(device())
            with torch.autocast(device().type, torch.bfloat16, enabled=use_bf16()):
                loss = model(input_ids=part, labels=part).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            done += 1
            if done == 1 or done % 10 == 0 or done == steps:
                print(f"  step {done}/{steps}: loss {loss.item():.3f}", flush=True)
            if done == steps:
                break


def device() -> torch.device:
    """Return the first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def use_bf16() -> bool:
    """Return whether to compute in bf16 (autocast): on a GPU that can."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=None, help="a hub model or a folder; default: SmolLM2-135M of assets.py")
    p.add_argument("--text", type=Path, default=None, help="a text file, documents parted by blank lines")
    p.add_argument("--density", type=float, default=0.01, help="kept fraction of the weights in the blocks")
    p.add_argument("--block", type=int, default=128, help="tokens")
    p.add_argument("--batch-size", type=int, default=4, help="blocks")
    p.add_argument("--steps", type=int, default=30, help="optimizer steps")
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument(
        "--selection-blocks", type=int, default=32, help="blocks of the training text to choose the child on"
    )
    p.add_argument("--train-blocks", type=int, default=None, help="default: all")
    p.add_argument("--test-blocks", type=int, default=32, help="blocks of held-out documents to measure on")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, default=None, help="folder to keep the adapter in; default: a temporary one")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Choose a child, train it, save it, load it, and print the perplexities."""
    args = parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # peft 0.21
    start = time.perf_counter()
    name = args.model or str(assets.smollm2_dir())
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = read_texts(args.text)
    cut = max(1, len(texts) * 4 // 5)  # whole documents are held out, not pieces of those trained on
    train_rows = blocks(texts[:cut], tokenizer, args.block)
    train_rows = train_rows[torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(args.seed))]
    train_rows = train_rows[: args.train_blocks]
    test_rows = blocks(texts[cut:], tokenizer, args.block)[: args.test_blocks]
    print(f"{len(train_rows)} blocks to train on, {len(test_rows)} held out, on {device()}", flush=True)

    set_seed(args.seed)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device())
    before = perplexity(base, test_rows, args.batch_size)
    print(f"perplexity of the base: {before:.3f}", flush=True)

    model = get_peft_model(base, ChildTuningConfig(task_type="CAUSAL_LM", density=args.density, seed=args.seed))
    child = select_child_network(model, batches(train_rows[: args.selection_blocks], args.batch_size))
    print(f"child: {child.nnz:,} of {child.numel:,} weights", flush=True)
    train(
        model,
        train_rows,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    after = perplexity(model, test_rows, args.batch_size)

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.output or Path(scratch)
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        fresh = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device())
        reloaded = perplexity(PeftModel.from_pretrained(fresh, folder), test_rows, args.batch_size)
    print(f"perplexity after {args.steps} steps: {after:.3f}; saved in {size:,} bytes; reloaded: {reloaded:.3f}")
    if reloaded != after:
        raise SystemExit("the reloaded adapter gives another perplexity: please report this as a bug")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
