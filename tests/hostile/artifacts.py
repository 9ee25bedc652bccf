"""A small saved adapter, every way to load it, and what became of the model: run in processes of their own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel

from peft_childtune import ChildTuningConfig, ChildTuningError, get_child_network

# the fields that are this method's own, or that PEFT leaves to it; the others are PEFT's
OWN_FIELDS = tuple(ChildTuningConfig.__annotations__)
# what PEFT and Python's JSON raise before any code of this method runs
OF_PEFT = (json.JSONDecodeError, UnicodeDecodeError, KeyError)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)) for _ in range(2)])
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.pad(layer(x), (0, 1))
        return self.head(x[:, :3])


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    config = BertConfig(vocab_size=20, max_position_embeddings=8, attn_implementation="eager", **sizes)
    return BertModel(config, add_pooling_layer=False).eval()


def save(folder: Path, make: Callable[[], nn.Module] = small, **options: Any) -> None:
    """Save an adapter with random deltas on the model that `make` makes."""
    if make is small:
        options = {"target_modules": ["layers.0.0"], "modules_to_save": ["head"]} | options
    options = {"score": "magnitude", "density": 0.3, "init_weights": False, "seed": 5} | options
    base = make()
    torch.manual_seed(1)
    get_peft_model(base, ChildTuningConfig(**options)).save_pretrained(folder)


def _second(base: nn.Module, folder: Path) -> nn.Module:
    model = get_peft_model(base, ChildTuningConfig(target_modules=["layers.1.0"], score="random", density=0.2))
    model.load_adapter(folder, "second")
    model.set_adapter("second")
    return model


def _native(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    base.load_adapter(str(folder), **options)
    return base


def _state_dict(base: nn.Module, folder: Path) -> nn.Module:
    model = get_peft_model(base, PeftConfig.from_pretrained(str(folder)))
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


PEFT_PATHS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "PeftModel": lambda base, folder: PeftModel.from_pretrained(base, folder),
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "second adapter": _second,
}
OTHER_PATHS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "given config": lambda base, folder: PeftModel.from_pretrained(  # the second half of `AutoPeftModel`
        base, folder, config=PeftConfig.from_pretrained(str(folder))
    ),
    "state dict": _state_dict,
}
NATIVE_PATHS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "native": _native,
    "native trainable": lambda base, folder: _native(base, folder, is_trainable=True),
    "native low_cpu_mem_usage": lambda base, folder: _native(base, folder, low_cpu_mem_usage=True),
}


def photograph(model: nn.Module) -> dict[str, bytes]:
    """Return all parameters and buffers, bit for bit, under the base model's own names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        f"{name} {tensor.dtype}": tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in named
    }


def own_fields(config: PeftConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in OWN_FIELDS if name not in ("selection", "child")}


class Loading:
    """Loads one folder again and again and compares with the first, sound load."""

    def __init__(self, folder: Path, path: Callable[[nn.Module, Path], nn.Module] = PEFT_PATHS["PeftModel"]) -> None:
        self.folder, self.path = folder, path
        self.base = photograph(small())
        self.expected = self._describe(path(small(), folder))

    @staticmethod
    def _describe(model: nn.Module) -> tuple[Any, ...]:
        return photograph(model), get_child_network(model), own_fields(model.peft_config["default"])

    def outcome(self) -> str:
        """Return "same", "refused: <error>", or in capitals what is wrong."""
        base = small()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's, of fields that it does not know
                found = self._describe(self.path(base, self.folder))
        except (ChildTuningError, *OF_PEFT) as error:
            return f"refused: {type(error).__name__}" if photograph(base) == self.base else "BASE CHANGED"
        except Exception as error:
            return f"UNNAMED {type(error).__name__}: {error}"
        if found[:2] != self.expected[:2]:
            return "ANOTHER MODEL"
        different = [name for name, value in found[2].items() if self.expected[2][name] != value]
        return f"ANOTHER CONFIG: {different}" if different else "same"
