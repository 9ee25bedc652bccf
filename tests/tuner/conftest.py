"""Small local models: a toy with two blocks, and tiny transformers of seven families."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

_TEXT = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(hidden_size=16, max_position_embeddings=16, **_TEXT)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(hidden_size=16, num_key_value_heads=1, max_position_embeddings=16, **_TEXT)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=40, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24, decoder_start_token_id=0)
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
        )
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(
            hidden_size=16, num_key_value_heads=1, num_local_experts=4, max_position_embeddings=16, **_TEXT
        )
    ),
    "albert": lambda: tf.AlbertForSequenceClassification(
        tf.AlbertConfig(embedding_size=8, hidden_size=16, max_position_embeddings=16, **_TEXT)
    ),
}


@pytest.fixture
def family() -> Callable[[str], nn.Module]:
    """Return a function that makes a tiny model of a family, in eval mode, the same weights every time."""

    def make(name: str) -> nn.Module:
        torch.manual_seed(0)
        return _FAMILIES[name]().eval()

    return make


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


class Toy(nn.Module):
    """An embedding, two blocks, a head; answers like a transformers model: `model(x=..., labels=...).loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


@pytest.fixture
def toy() -> Callable[[], nn.Module]:
    """Return a function that makes the toy model, the same weights every time; 96 covered weights."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = Toy()
        for block in model.layers:  # norms as trained ones: no row of equal weights
            nn.init.normal_(block.norm.weight, 1.0, 0.1)
            nn.init.normal_(block.norm.bias, 0.0, 0.1)
        return model

    return make


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    """Return three batches of four examples for the toy."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(4, 4, generator=generator), "labels": torch.randint(3, (4,), generator=generator)}
        for _ in range(3)
    ]


@pytest.fixture
def bits() -> Callable[[nn.Module], dict[str, bytes]]:
    """Return a function that takes a photograph of all parameters and buffers of a model, bit for bit."""

    def photograph(model: nn.Module) -> dict[str, bytes]:
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {
            name: tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for name, tensor in named
        }

    return photograph
