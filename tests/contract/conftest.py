"""Models on disk, shared by the whole run: loaders need a folder to load the base from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.contract.families import FAMILIES, Batch, Family, add_noise, output, wrap


@dataclass(frozen=True)
class Saved:
    """A trained adapter in a folder, and what the model that saved it answers.

    Attributes:
        base: folder of the base model.
        folder: folder of the adapter.
        logits: of the saving model for `batch`, unmerged.
    """

    family: Family
    base: Path
    folder: Path
    batch: Batch
    logits: Tensor
    base_logits: Tensor

    def fresh(self, **options: object) -> nn.Module:
        """Return the base model, loaded from its folder."""
        model: nn.Module = self.family.auto.from_pretrained(self.base, attn_implementation="eager", **options)
        return model.eval()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's base model, made on first use."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(f"base_{name}")
            FAMILIES[name].build().save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="session")
def saved_adapter(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Callable[[str], Path]
) -> Callable[[str], Saved]:
    """Return a family's saved adapter, made on first use: a Fisher child with deltas of noise."""
    made: dict[str, Saved] = {}

    def saved(name: str) -> Saved:
        if name not in made:
            family, base = FAMILIES[name], base_folder(name)
            batch = family.batch(9)
            model = family.auto.from_pretrained(base, attn_implementation="eager").eval()
            base_logits = output(model, batch)
            options = {"modules_to_save": ["classifier"]} if name == "vit" else {}
            model = add_noise(wrap(model, family, **options))
            folder = tmp_path_factory.mktemp(f"adapter_{name}")
            model.save_pretrained(folder)
            made[name] = Saved(family, base, folder, batch, output(model, batch), base_logits)
            assert not torch.equal(made[name].logits, base_logits)  # else agreement would prove nothing
        return made[name]

    return saved
