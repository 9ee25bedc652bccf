"""How much memory Child-Tuning takes, for each weight and for three Llamas, computed without loading any weight.

    python examples/accelerate/how_big.py

What stays on a device from step to step is counted: weights, the delta with gradients and optimizer state, the child.
Activations are not, nor is what comes and goes within a step, except in a column of its own. Full fine-tuning and LoRA
are counted by the same rules, for comparison.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_childtune import ChildTuningConfig, estimate_memory

DENSITIES = (0.3, 0.1, 0.01)
RANK = 16
DEVICES = 8
GIB = 1 << 30
COMMON = {"vocab_size": 128256, "num_key_value_heads": 8}
SHAPES = {  # those of Llama 3: 3.2-1B, 3.1-8B cut to 7B by the vocabulary of Llama 2, 3.1-70B
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | COMMON
    | {"tie_word_embeddings": True},
    "7B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | COMMON
    | {"vocab_size": 32000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | COMMON,
}


def llama(size: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return a Llama of a size, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[size]), dtype=dtype)  # type: ignore[no-any-return]


def child_bytes(density: float, optimizer_bytes: float) -> float:
    """Return the bytes of a child for each covered weight: delta, gradient, optimizer, positions, and its code."""
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    return density * (4 + 4 + optimizer_bytes + 4) + 1.05 * entropy / 8


def lora_weights(model: nn.Module) -> int:
    """Return the weights of LoRA on every linear layer of the blocks."""
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]
    return sum(RANK * (layer.in_features + layer.out_features) for layer in layers)


def table(rows: list[list[str]]) -> str:
    """Return a Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]])


def per_weight() -> Iterator[list[str]]:
    """Yield the rows of the first table."""
    yield ["bytes a weight", "float32, AdamW", "float32, 8-bit AdamW", "bfloat16, AdamW", "bfloat16, 8-bit AdamW"]
    settings = [(base, optimizer) for base in (4, 2) for optimizer in (8, 2)]
    yield ["full fine-tuning", *(f"{2 * base + optimizer:.2f}" for base, optimizer in settings)]
    model = llama("7B")
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    share = lora_weights(model) / blocks
    yield [f"LoRA r{RANK} (7B)", *(f"{base + share * (4 + 4 + optimizer):.2f}" for base, optimizer in settings)]
    for density in DENSITIES:
        cells = [f"{base + child_bytes(density, optimizer):.2f}" for base, optimizer in settings]
        yield [f"child of {density:.0%}", *cells]


def llamas() -> Iterator[list[str]]:
    """Yield the rows of the second table."""
    yield [
        "GiB",
        "trained weights, M",
        "one device",
        f"each of {DEVICES}",
        "comes and goes",
        f"the same, of {DEVICES}",
        "choosing",
        "scores on the host",
        "the host then",
    ]
    for size in SHAPES:
        model = llama(size)
        weights, base = sum(p.numel() for p in model.parameters()), sum(2 * p.numel() for p in model.parameters())
        trained = lora_weights(model)
        for name, count, stays in (("full", weights, base + 10 * weights), ("LoRA", trained, base + 16 * trained)):
            cells = [f"{count / 1e6:,.0f}", f"{stays / GIB:,.1f}", f"{stays / DEVICES / GIB:,.1f}"]
            yield [f"{size}, {name}{f' r{RANK}' if name == 'LoRA' else ''}", *cells, *["–"] * 5]
        for density in DENSITIES:
            config = ChildTuningConfig(task_type="CAUSAL_LM", score="fisher", density=density)
            one, each = estimate_memory(model, config), estimate_memory(model, config, shards=DEVICES)
            there = estimate_memory(model, config, scores_on_host=True)
            sizes = (one.kept, each.kept, one.working, each.working)
            sizes = (*sizes, one.selection, there.selection, there.selection_host)
            yield [
                f"{size}, child of {density:.0%}",
                f"{one.nnz / 1e6:,.0f}",
                *(f"{size / GIB:,.1f}" for size in sizes),
            ]


def main() -> None:
    """Print both tables."""
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # peft 0.21
    print(f"{table(list(per_weight()))}\n\n{table(list(llamas()))}")


if __name__ == "__main__":
    main()
