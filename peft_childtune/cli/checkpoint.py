"""A checkpoint folder of the base model: its tensors by the names that an adapter has for them, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..artifact import read_json
from ..errors import ChildTuningError

__all__ = ["INDEX_NAME", "Checkpoint", "CheckpointError", "Names", "find_folder", "model_class", "renamed_keys"]

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
_FLOATS = ("F64", "F32", "BF16", "F16")
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


class CheckpointError(ChildTuningError, OSError):
    """A checkpoint that cannot be read, so that nothing can be said about it."""


def find_folder(model: str, revision: str | None = None) -> Path:
    """Return the folder of a base model: a local one, or what the hub or its cache has under that id.

    Raises:
        CheckpointError: there is none.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{model}: is no folder, and the hub has nothing under that id ({why}).") from error


class Checkpoint:
    """The safetensors files of a checkpoint folder.

    Args:
        folder: with `model.safetensors`, or several files and their index.

    Attributes:
        shards: the files, each with the tensors in it.
        files: tensor -> the file that holds it.
        index: what the index holds; None for a single file.

    Raises:
        CheckpointError: it holds no sound safetensors checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] | None = None
        if (folder / INDEX_NAME).is_file():
            self.index = self._json(INDEX_NAME)
            weight_map = self.index.get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise CheckpointError(f"{folder / INDEX_NAME}: has no sound weight_map; fetch it again.")
            names = list(dict.fromkeys(weight_map.values()))
        elif (folder / SINGLE_NAME).is_file():
            names = [SINGLE_NAME]
        else:
            raise CheckpointError(
                f"{folder}: holds no {SINGLE_NAME} and no {INDEX_NAME}; name a checkpoint folder in the safetensors "
                "format (`model.save_pretrained(folder)` writes one)."
            )
        self._stack, self._open = ExitStack(), {}
        self.shards: dict[str, list[str]] = {}
        for name in names:
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise CheckpointError(f"{path}: is named in {INDEX_NAME}, but is no file beside it; fetch it again.")
            try:
                file = self._stack.enter_context(safe_open(str(path), framework="pt"))
                self.shards[name] = list(file.keys())
            except SafetensorError as error:
                raise CheckpointError(f"{path}: is not a sound safetensors file ({error}); fetch it again.") from error
            self._open[name] = file
        self.files = {key: name for name, keys in self.shards.items() for key in keys}

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.folder / name)
        except (ChildTuningError, FileNotFoundError) as error:
            raise CheckpointError(str(error)) from error

    def config(self) -> dict[str, Any]:
        """Return the model's configuration."""
        return self._json("config.json")

    def tensor(self, key: str) -> Tensor:
        """Return a tensor."""
        found: Tensor = self._open[self.files[key]].get_tensor(key)
        return found

    def match(self, names: Collection[str]) -> Names:
        """Return where each of an adapter's base tensors is in this checkpoint.

        Names may differ by the prefix of the model inside (`bert.`), or as transformers renames them when it loads.

        Raises:
            CheckpointError: one of them is not there.
        """
        found = _match(names, {key: key for key in self.files})
        if len(found.keys) < len(names):
            renamed = _match(names, renamed_keys(self)[0])
            found = max(found, renamed, key=lambda names: len(names.keys))
        if len(found.keys) < len(names):
            missing = next(name for name in names if name not in found.keys)
            raise CheckpointError(
                f"{missing}: is not in {self.folder}, which holds, for example, {next(iter(self.files), 'nothing')}; "
                "give the base model that adapter_config.json names. If this is it, transformers stores this weight "
                "in another form than it uses: load the adapter with `PeftModel.from_pretrained`, which verifies too."
            )
        for name, key in found.keys.items():
            if (dtype := self._open[self.files[key]].get_slice(key).get_dtype()) not in _FLOATS:
                raise CheckpointError(
                    f"{name}: is stored as {dtype} in {self.folder}, quantised, so it can neither be compared nor "
                    "merged; give the base as it was published."
                )
        return found


@dataclass(frozen=True)
class Names:
    """How an adapter's names of base tensors lead to a checkpoint's.

    Attributes:
        keys: name -> key, of all that were found.
        prefix: what the adapter's names have in front, and the checkpoint's have not.
        rule: of any name, the name under which the checkpoint's model has it.
        table: the model's names -> keys.
    """

    keys: dict[str, str]
    prefix: str
    rule: Callable[[str], str]
    table: dict[str, str]

    def key(self, name: str) -> str:
        """Return the key of a tensor, also of one that is not there yet."""
        name = self.rule(name)
        return self.table.get(name, name)


def _match(names: Collection[str], table: dict[str, str]) -> Names:
    """Return how most of the names, all if possible, lead to keys: as they are, or with a prefix more or less."""
    first = next(iter(names), "").partition(".")[0] + "."
    rules: list[tuple[str, Callable[[str], str]]] = [("", lambda name: name)]
    rules.append((first, lambda name: name.removeprefix(first)))
    for prefix in sorted({key.partition(".")[0] for key in table}):
        rules.append(("", lambda name, prefix=prefix: f"{prefix}.{name}"))  # type: ignore[misc]
    best = Names({}, "", rules[0][1], table)
    for prefix, rule in rules:
        found = {name: table[rule(name)] for name in names if rule(name) in table}
        if len(found) > len(best.keys):
            best = Names(found, prefix, rule, table)
    return best


def model_class(folder: Path) -> tuple[Any, Any]:
    """Return the configuration of a checkpoint, and the class of its model: one of transformers' own.

    Raises:
        CheckpointError: it names none; code that came with a checkpoint is never run.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its config.json cannot be read ({str(error).splitlines()[0]}).") from error
    name = (config.architectures or [None])[0]
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{folder}: `architectures` in config.json names no model of transformers ({config.architectures}); save "
            "it with `save_pretrained` of its model."
        )
    return config, kind


def renamed_keys(checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Return how transformers reads a checkpoint: the model's names -> keys, and tied names -> those they follow.

    Tensors that it splits, stacks or fuses have no counterpart, and are left out; tied ones have all their names.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    same = {key: key for key in checkpoint.files}
    try:
        config, kind = model_class(checkpoint.folder)
    except CheckpointError:  # then names can only be taken as they are
        return same, {}
    with torch.device("meta"):
        model = kind(config)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state, found = model.state_dict(), {}
    for key in same:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if converted is None:
            found[name] = key
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    for follower, leader in tied.items():
        if leader in found:
            found.setdefault(follower, found[leader])
        elif follower in found:
            found[leader] = found[follower]
    return found, tied
