"""Bytes on disk per trained weight, ours and the peers', on a model of BERT-base width.

Run: python examples/benchmarks/file_size.py [--layers 2]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from peft import ShiraConfig, SupertuningConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from peft_childtune import ChildTuningConfig, select_child_network


def build(layers: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, vocab_size=1000))


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, (count, 8, 32), generator=generator)
    labels = torch.randint(2, (count, 8), generator=generator)
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]


def bytes_per_weight(model: torch.nn.Module) -> tuple[int, float]:
    """Return trained weights and the file's bytes for each, with random deltas: zeros would flatter a compressor."""
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n]
    for values in trained:
        torch.nn.init.normal_(values.data, std=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    count = sum(p.numel() for p in trained)
    return count, size / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    layers = parser.parse_args().layers
    print(f"{'child':<38}{'trained':>10}{'bytes each':>12}{'entropy + value':>17}")
    for density in (0.1, 0.01):
        entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) / density / 8
        rows = {
            "fisher, float32": {"score": "fisher"},
            "fisher, bfloat16": {"score": "fisher", "save_dtype": "bfloat16"},
            "magnitude, float32": {"score": "magnitude"},
            "fixed random, float32": {"mode": "task_free"},
            "fisher rows, float32": {"score": "fisher", "granularity": "row"},
        }
        for name, options in rows.items():
            model = get_peft_model(build(layers), ChildTuningConfig(density=density, **options))
            if options.get("score") == "fisher":
                select_child_network(model, batches(), show_progress=False)
            count, each = bytes_per_weight(model)
            value = 2 if options.get("save_dtype") else 4
            print(f"{f'{density:.0%} {name}':<38}{count:>10,}{each:>12.3f}{entropy + value:>17.3f}")
        linear = ["query", "key", "value", "dense"]
        budget = int(768 * density / 2)  # SHiRA trains r (in + out) weights of each matrix
        peers = {
            "SHiRA": ShiraConfig(r=max(1, budget), target_modules=linear),
            "Super-Tuning": SupertuningConfig(sparsity=1 - density, target_modules=linear),
        }
        for name, config in peers.items():
            count, each = bytes_per_weight(get_peft_model(build(layers), config))
            print(f"{f'{density:.0%} {name}, float32':<38}{count:>10,}{each:>12.3f}{entropy + 4:>17.3f}")


if __name__ == "__main__":
    main()
