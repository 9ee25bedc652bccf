"""Child-Tuning of a causal language model on a text: perplexity before and after, then the saved file reloaded.

    python examples/causal_lm.py                                     # SmolLM2-135M on tales of the brothers Grimm
    python examples/causal_lm.py --model openai-community/gpt2 --text my.txt --density 0.02 --steps 500
    accelerate launch --multi_gpu --num_processes 2 examples/causal_lm.py --block 1024 --steps 500

The default run is small enough for two CPU cores; on a GPU raise `--steps`, `--block` and `--selection-blocks`. The
training loop is a plain accelerate loop: under `accelerate launch` every process scores, trains and measures on its
share of the blocks, and only the first one prints and saves.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import assets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from accelerated import add_flags, make_accelerator
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup
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


def batches(rows: Tensor, batch_size: int, **options: Any) -> DataLoader[Any]:
    """Return a loader of batches that a causal language model takes; it shifts the labels itself."""

    def collate(part: list[Tensor]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack(part), "labels": torch.stack(part)}

    return DataLoader(rows, batch_size, collate_fn=collate, **options)  # type: ignore[arg-type]


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, batch_size: int, accelerator: Accelerator | None = None) -> float:
    """Return exp of the mean loss over all predicted tokens.

    With an accelerator every process measures its share of the rows, all of them must call, and all get the answer.
    """
    model.eval()
    loader: Any = batches(rows, batch_size)
    if accelerator is not None:
        loader = accelerator.prepare_data_loader(loader)
    losses = []
    for batch in loader:
        tokens = batch["input_ids"].to(next(model.parameters()).device)
        with accelerator.autocast() if accelerator is not None else nullcontext():
            logits = model(input_ids=tokens).logits[:, :-1].float()
        targets = tokens[:, 1:].flatten()
        # over the last dimension: torch adds up others one by one, and 1e-4 of a large vocabulary's sum is lost
        losses_of_tokens = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        row_losses = losses_of_tokens.view(len(tokens), -1).mean(1)
        if accelerator is not None:
            # the last batches are filled up with repeated rows, so that all processes have as many; these are dropped
            row_losses = accelerator.gather_for_metrics(row_losses)
        losses.append(row_losses.double())
    return math.exp(torch.cat(losses).mean().item())


def train(accelerator: Accelerator, model: nn.Module, rows: Tensor, args: argparse.Namespace) -> nn.Module:
    """Train every trainable parameter with AdamW, a short warm-up and clipped gradients; return the prepared model.

    Raises:
        ValueError: there are fewer rows than one step takes.
    """
    optimizer: Any = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        weight_decay=0.0,
    )
    order = torch.Generator().manual_seed(args.seed)
    loader: Any = batches(rows, args.batch_size, shuffle=True, drop_last=True, generator=order)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if len(loader) == 0:
        needed = args.batch_size * accelerator.num_processes
        raise ValueError(f"{len(rows)} blocks to train on, a step takes {needed}; use more text or smaller batches.")
    # Not prepared: it steps once an optimizer step, however many processes there are.
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, args.steps // 10), args.steps)
    model.train()
    step = 0
    while step < args.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients or accelerator.optimizer_step_was_skipped:
                continue
            step += 1
            mean_loss = accelerator.reduce(loss.detach(), "mean").item()
            accelerator.log({"loss": mean_loss, "learning rate": schedule.get_last_lr()[0]}, step=step)
            schedule.step()
            if step == 1 or step % 10 == 0 or step == args.steps:
                accelerator.print(f"  step {step}/{args.steps}: loss {mean_loss:.3f}", flush=True)
            if step == args.steps:
                break
    return model


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=None, help="a hub model or a folder; default: SmolLM2-135M of assets.py")
    p.add_argument("--text", type=Path, default=None, help="a text file, documents parted by blank lines")
    p.add_argument("--density", type=float, default=0.01, help="kept fraction of the weights in the blocks")
    p.add_argument("--block", type=int, default=128, help="tokens")
    p.add_argument("--batch-size", type=int, default=4, help="blocks a process and step")
    p.add_argument("--steps", type=int, default=30, help="optimizer steps")
    p.add_argument("--learning-rate", type=float, default=1e-3)
    p.add_argument(
        "--selection-blocks", type=int, default=32, help="blocks of the training text to choose the child on"
    )
    p.add_argument("--train-blocks", type=int, default=None, help="default: all")
    p.add_argument("--test-blocks", type=int, default=32, help="blocks of held-out documents to measure on")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, default=None, help="folder to keep the adapter in; default: a temporary one")
    add_flags(p)
    return p


def run(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Choose a child, train it, save it, load it, and print the perplexities."""
    start = time.perf_counter()
    with accelerator.main_process_first():  # one process downloads, the others find the files
        name = args.model or str(assets.smollm2_dir())
        texts = read_texts(args.text)
    tokenizer = AutoTokenizer.from_pretrained(name)
    cut = max(1, len(texts) * 4 // 5)  # whole documents are held out, not pieces of those trained on
    train_rows = blocks(texts[:cut], tokenizer, args.block)
    train_rows = train_rows[torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(args.seed))]
    train_rows = train_rows[: args.train_blocks]
    test_rows = blocks(texts[cut:], tokenizer, args.block)[: args.test_blocks]
    accelerator.print(
        f"{len(train_rows)} blocks to train on, {len(test_rows)} held out, on {accelerator.device}, "
        f"{accelerator.num_processes} process(es)",
        flush=True,
    )

    set_seed(args.seed)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(accelerator.device)
    before = perplexity(base, test_rows, args.batch_size, accelerator)
    accelerator.print(f"perplexity of the base: {before:.3f}", flush=True)

    # not by the default, movement: that would train the whole model, in the memory which that takes
    config = ChildTuningConfig(task_type="CAUSAL_LM", score="fisher", density=args.density, seed=args.seed)
    model: nn.Module = get_peft_model(base, config)
    rows_to_see = batches(train_rows[: args.selection_blocks], args.batch_size)
    child = select_child_network(model, accelerator.prepare_data_loader(rows_to_see))
    accelerator.print(f"child: {child.nnz:,} of {child.numel:,} weights", flush=True)
    model = train(accelerator, model, train_rows, args)
    after = perplexity(model, test_rows, args.batch_size, accelerator)
    accelerator.log({"perplexity before": before, "perplexity": after}, step=args.steps)

    state = accelerator.get_state_dict(model)  # on every process: sharded weights are gathered
    if accelerator.is_main_process:
        with tempfile.TemporaryDirectory() as scratch:
            folder = args.output or Path(scratch)
            accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            fresh = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(accelerator.device)
            with accelerator.autocast():
                reloaded = perplexity(PeftModel.from_pretrained(fresh, folder), test_rows, args.batch_size)
        print(f"perplexity after {args.steps} steps: {after:.3f}; saved in {size:,} bytes; reloaded: {reloaded:.3f}")
        # one process computes the same again; several shared the last batches out in another way, and rounded so
        if not math.isclose(reloaded, after, rel_tol=0.0 if accelerator.num_processes == 1 else 1e-2):
            raise SystemExit("the reloaded adapter gives another perplexity: please report this as a bug")
        print(f"{time.perf_counter() - start:.0f} s in all")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    args = parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # peft 0.21
    accelerator = make_accelerator(args, "causal_lm")
    run(args, accelerator)
    accelerator.free_memory()  # a wrapped model that outlives its process group may hang when it is freed at last
    accelerator.end_training()


if __name__ == "__main__":
    main()
