"""Folders for the command to work on: bases, adapters, merged models and full fine-tunes, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from torch import Tensor, nn
from typer.testing import CliRunner

from peft_childtune.cli.app import app
from tests.contract.families import FAMILIES, Family, add_noise, wrap

SHARD = "30KB"


@dataclass(frozen=True)
class Made:
    """Folders of one family in one precision.

    Attributes:
        base: the base's checkpoint, of several files.
        adapter: of it, with a delta of noise.
        merged: what `merge_and_unload().save_pretrained` makes of the two.
        tuned: a full fine-tune: a third of all entries changed, by up to a tenth.
    """

    family: Family
    base: Path
    adapter: Path
    merged: Path
    tuned: Path

    def load(self, folder: Path, **options: Any) -> nn.Module:
        """Return a model from a folder."""
        model: nn.Module = self.family.auto.from_pretrained(folder, attn_implementation="eager", **options)
        return model.eval()


@torch.no_grad()
def fine_tune_(model: nn.Module, *, seed: int = 3) -> nn.Module:
    """Change a third of all entries by up to a tenth of themselves, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        change = parameter.float() * 0.1 * torch.rand(parameter.shape, generator=generator)
        change *= torch.rand(parameter.shape, generator=generator) < 1 / 3
        parameter.add_(change.to(parameter.dtype))
    return model


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}
    return found


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Return the folders of a family in a precision, made on first use."""
    known: dict[tuple[str, torch.dtype], Made] = {}

    def get(name: str = "bert", dtype: torch.dtype = torch.float32) -> Made:
        if (name, dtype) not in known:
            root = tmp_path_factory.mktemp(f"{name}_{dtype}")
            family = FAMILIES[name]
            folders = Made(family, root / "base", root / "adapter", root / "merged", root / "tuned")
            family.build().to(dtype).save_pretrained(folders.base, max_shard_size=SHARD)
            options = {"modules_to_save": ["classifier"]} if name == "vit" else {}
            wrapped = add_noise(wrap(folders.load(folders.base), family, **options))
            wrapped.save_pretrained(folders.adapter)
            wrapped.merge_and_unload().save_pretrained(folders.merged, max_shard_size=SHARD)
            fine_tune_(folders.load(folders.base)).save_pretrained(folders.tuned, max_shard_size=SHARD)
            known[name, dtype] = folders
        return known[name, dtype]

    return get


@pytest.fixture
def childtune() -> Iterator[Callable[..., Result]]:
    """Return a call of the command in this process; an error that it does not handle is raised here."""

    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="childtune")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    yield call
