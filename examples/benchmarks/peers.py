"""Every method of the benchmarks, built on the same base.

All weights are random: speed and memory do not depend on them. Embeddings are frozen but in `full` and `authors`; a
classification head is trained in all. LoRA, SHiRA and Super-Tuning take every linear layer of the blocks; ours takes
the biases and norms too, as is its default.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from peft_childtune import ChildTuningConfig

transformers_logging.set_verbosity_error()
warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)  # peft 0.21 reads it
torch.sparse.check_sparse_tensor_invariants.disable()  # the default, said aloud: SHiRA's layers would warn

IN_BLOCKS = re.compile(r"(\.layer|\.h|\.layers)\.\d+\.")
GRANULARITY = {"element": "element", "rows": "row", "columns": "column", "block16": "block"}
PUBLISHED = {"bert": (30522, 12), "gpt2": (50257, 12), "llama": (128256, 16)}  # vocabulary and layers
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Base:
    """What to build: `bert` and `gpt2` have the published base width, `llama` that of a 1B model."""

    architecture: str = "bert"
    layers: int = 4
    vocab: int = 1000
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    quick: bool = False
    seed: int = 0

    def build(self) -> nn.Module:
        """Return a new model; equal bases have equal weights."""
        torch.manual_seed(self.seed)
        size: dict[str, int] = {"vocab_size": self.vocab}
        if self.architecture == "gpt2":
            narrow = {"n_embd": 64, "n_head": 2} if self.quick else {}
            dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model: nn.Module = GPT2LMHeadModel(GPT2Config(n_layer=self.layers, **size, **narrow, **dropout))
        elif self.architecture == "llama":
            width = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
            if self.quick:
                width = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
            llama = LlamaConfig(num_hidden_layers=self.layers, num_key_value_heads=8, **width, **size)
            model = LlamaForCausalLM(llama)
        else:
            narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2} if self.quick else {}
            dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            bert = BertConfig(num_hidden_layers=self.layers, **size, **narrow, **dropout)
            model = BertForSequenceClassification(bert)
        return model.to(device=self.device, dtype=self.dtype)

    def batch(self, rows: int, tokens: int) -> Batch:
        """Return random tokens with labels, without padding."""
        ids = torch.randint(1, self.vocab, (rows, tokens), generator=torch.Generator().manual_seed(self.seed))
        labels = torch.arange(rows) % 2 if self.architecture == "bert" else ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {name: value.to(self.device) for name, value in batch.items()}

    @property
    def record(self) -> dict[str, str | int]:
        """Return what a row says of the base."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"architecture": self.architecture, "layers": self.layers, "dtype": dtype}

    def supports(self, method: str) -> bool:
        """Return whether the method can be built: SHiRA and Super-Tuning know `nn.Linear` only, GPT-2 has `Conv1D`."""
        return self.architecture != "gpt2" or method not in ("shira", "supertuning")


def base_arguments(arguments: argparse.ArgumentParser, *, layers: int, architecture: bool = True) -> None:
    """Add the options that describe a base."""
    if architecture:
        arguments.add_argument(
            "--architecture", choices=("bert", "gpt2", "llama"), help="default bert, on a GPU llama"
        )
    arguments.add_argument("--layers", type=int, help=f"default {layers}, of llama 16")
    arguments.add_argument("--vocab", type=int, help="default: the published one, in proportion to the layers")
    arguments.add_argument("--dtype", help="default float32, of llama bfloat16")
    arguments.set_defaults(default_layers=layers)


def base_of(options: argparse.Namespace, *, architecture: str | None = None) -> Base:
    """Return the base that the options describe; a quick one has one narrow layer."""
    architecture = architecture or options.architecture or ("bert" if options.device == "cpu" else "llama")
    llama = architecture == "llama"
    vocabulary, depth = PUBLISHED[architecture]
    layers = 1 if options.quick else options.layers or (16 if llama else options.default_layers)
    return Base(
        architecture=architecture,
        layers=layers,
        vocab=50 if options.quick else options.vocab or round(vocabulary * layers / depth),
        dtype=getattr(torch, options.dtype or ("bfloat16" if llama else "float32")),
        device=options.device,
        quick=options.quick,
        seed=options.seed,
    )


@dataclass
class Trainee:
    """A model and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, batch: Batch) -> None:
        """Run forward, loss, backward, AdamW step and zero_grad."""
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def trained(self) -> int:
        """Return the number of weights that training changes on purpose."""
        masks = self.optimizer.masks if isinstance(self.optimizer, MaskedAdamW) else {}
        return sum(int(masks[p].sum()) if p in masks else p.numel() for p in trainable(self.model))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def trainee(method: str, model: nn.Module, *, masks: Mapping[nn.Parameter, Tensor] | None = None) -> Trainee:
    """Return the wrapped model, in training mode, with AdamW over what it trains."""
    model.train()
    if method == "authors":
        return Trainee(model, MaskedAdamW(trainable(model), masks={} if masks is None else masks))
    return Trainee(model, torch.optim.AdamW(trainable(model), lr=1e-5))


def wrap(method: str, model: nn.Module, **options: Any) -> nn.Module:
    """Return the model as the method trains it; `options` go to `config`."""
    return model if method in ("full", "authors") else get_peft_model(model, config(method, model, **options))


def config(
    method: str, model: nn.Module, *, density: float = 0.01, score: str = "random", seed: int = 0, head: bool = True
) -> PeftConfig:
    """Return a method's PEFT configuration with about `density` of the blocks' linear weights trained."""
    task = (
        {"task_type": "SEQ_CLS" if isinstance(model, BertForSequenceClassification) else "CAUSAL_LM"} if head else {}
    )
    linear = {
        name: module
        for name, module in model.named_modules()
        if IN_BLOCKS.search(name) and isinstance(module, (nn.Linear, Conv1D))
    }
    if method in GRANULARITY:
        return ChildTuningConfig(
            density=density, score=score, seed=seed, granularity=GRANULARITY[method], block_size=16, **task
        )
    if method.startswith("lora_r"):
        transposed = any(isinstance(module, Conv1D) for module in linear.values())
        return LoraConfig(r=int(method[6:]), target_modules=list(linear), fan_in_fan_out=transposed, **task)
    if method == "shira":  # trains r (in + out) weights of each matrix
        shapes = [module.weight.shape for module in linear.values()]
        r = round(density * sum(map(np.prod, shapes)) / sum(map(sum, shapes)))
        return ShiraConfig(r=max(1, r), random_seed=seed, target_modules=list(linear), **task)
    if method == "supertuning":
        # seed 1 takes the smallest weights: two adapters of the largest ones would share all positions
        return SupertuningConfig(sparsity=1 - density, select_top=seed == 0, target_modules=list(linear), **task)
    raise ValueError(f"no method is called {method!r}")


class MaskedAdamW(torch.optim.AdamW):
    """AdamW that multiplies dense gradients by dense masks inside its step, as the authors' Child-Tuning-D does.

    Every weight keeps both moments, and weight decay acts on all. Source: Xu et al. 2021 (arXiv:2109.05687).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, masks: Mapping[nn.Parameter, Tensor]) -> None:
        super().__init__(parameters, lr=1e-5)
        self.masks = masks

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for parameter, mask in self.masks.items():
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        return super().step(closure)


def random_masks(model: nn.Module, density: float) -> dict[nn.Parameter, Tensor]:
    """Return a random mask for every weight in the blocks."""
    return {p: torch.rand_like(p, dtype=torch.float32) < density for p in block_parameters(model)}


def authors_masks(model: nn.Module, batches: Sequence[Batch], density: float) -> dict[nn.Parameter, Tensor]:
    """Select as the authors do: squared, clipped batch gradients, one percentile over their concatenation."""
    scores = {p: torch.zeros_like(p) for p in block_parameters(model)}
    for batch in batches:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trainable(model), 1.0)
        for parameter, score in scores.items():
            if parameter.grad is not None:
                score += parameter.grad**2 / len(batches)
        model.zero_grad()
    concatenation = np.concatenate([score.flatten().cpu().numpy() for score in scores.values()])
    threshold = float(np.percentile(concatenation, (1 - density) * 100))
    return {parameter: score >= threshold for parameter, score in scores.items()}


def block_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if IN_BLOCKS.search(name)]


def randomise(model: nn.Module) -> None:
    """Give what is trained random values: a delta of zero could be skipped."""
    for parameter in trainable(model):
        nn.init.normal_(parameter, std=1e-3)
