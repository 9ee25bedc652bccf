"""`childtune apply`: an adapter merged into a checkpoint of its base, file by file, without a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import Artifact
from ..errors import IntegrityError, UnsupportedError
from ..sparse import ResampledUnits
from ..weights import merge_
from .checkpoint import INDEX_NAME, Checkpoint, Names, renamed_keys
from .output import new_folder, rewrite_shard

__all__ = ["apply_adapter"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ckpt", ".gguf", ".tflite")
_TASKS = {  # PEFT's names of tasks -> transformers' tables of classes
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
}


def apply_adapter(
    artifact: Artifact, base: Checkpoint, target: Path, *, tick: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Write the checkpoint of the merged model; at most one tensor of the base is in memory at a time.

    Args:
        artifact: the adapter; verified against the base by the caller.
        base: its base.
        target: the folder to make.
        tick: called with the name of each file that is begun.

    Returns:
        The names of the tensors that the base did not have: heads.

    Raises:
        UnsupportedError: the adapter holds more than a child and heads.
        FileExistsError: `target` exists and is not empty.
    """
    if artifact.unsealed:
        raise UnsupportedError(
            f"{next(iter(artifact.unsealed))}: is stored beside the child, as PEFT does with embeddings of a resized "
            "vocabulary; merge this adapter with `merge_and_unload()` instead."
        )
    names = base.match(artifact.names())
    edit = {key: _merge_of(artifact, name) for name, key in names.keys.items() if name in artifact.keys["code"]}
    edit |= {twin: edit[key] for twin, key in _twins(base, edit).items()}
    heads = {name: artifact.tensor(key) for name, (key, _, _) in artifact.heads.items()}
    replace = {key: heads[n].to(base.tensor(key).dtype) for n in heads if (key := names.key(n)) in base.files}
    dtype = base.tensor(next(iter(names.keys.values()))).dtype
    add = {n: t.to(dtype) if t.is_floating_point() else t for n, t in heads.items() if names.key(n) not in base.files}
    with new_folder(target) as folder:
        total, last = 0, list(base.shards)[-1]
        for shard in base.shards:
            tick(shard)
            total += rewrite_shard(
                base.folder / shard,
                folder / shard,
                rename=lambda key: names.prefix + key,
                edit=edit,
                replace=replace,
                add={_added(name, names): tensor for name, tensor in add.items()} if shard == last else {},
            )
        if base.index is not None:
            weight_map = {names.prefix + key: shard for key, shard in base.files.items()}
            weight_map |= {_added(name, names): last for name in add}
            metadata = dict(base.index.get("metadata") or {}) | {"total_size": total}
            if "total_parameters" in metadata:
                metadata["total_parameters"] += sum(t.numel() for t in add.values())
                metadata["total_parameters"] += sum(t.numel() - base.tensor(k).numel() for k, t in replace.items())
            _write_json(folder / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})
        _copy_others(base.folder, folder)
        changed = [
            *add,
            *(n for n in heads if (k := names.key(n)) in replace and heads[n].shape != base.tensor(k).shape),
        ]
        if changed and (folder / "config.json").is_file():
            _write_json(folder / "config.json", _with_head(base.config(), artifact, heads))
    return list(add)


def _added(name: str, names: Names) -> str:
    return name if names.prefix else names.key(name)


def _merge_of(artifact: Artifact, name: str) -> Callable[[Tensor], None]:
    def merge(weight: Tensor) -> None:
        child = artifact.child(name, tuple(weight.shape))
        if child is None:
            raise IntegrityError(f"{name}: its code is gone; the file was exchanged while it was read.")
        merge_(weight, None if isinstance(child.units, ResampledUnits) else child.indices(), artifact.values(name))

    return merge


def _twins(base: Checkpoint, edited: dict[str, Any]) -> dict[str, str]:
    """Return tensors that a checkpoint stores twice although they are tied: key -> the edited key that it equals.

    transformers ties them only if both are alike, so both are edited.
    """
    found, tied = renamed_keys(base)
    pairs = [(found[a], found[b]) for a, b in tied.items() if a in found and b in found]
    twins = {}
    for one, other in [*pairs, *((b, a) for a, b in pairs)]:
        if (
            one != other
            and other in edited
            and one not in edited
            and torch.equal(base.tensor(one), base.tensor(other))
        ):
            twins[one] = other
    return twins


def _with_head(config: dict[str, Any], artifact: Artifact, heads: dict[str, Tensor]) -> dict[str, Any]:
    """Return the base's configuration for the model with the adapter's head: its class, and how many labels it has."""
    import transformers

    task = artifact.config.get("task_type")
    if task in _TASKS:
        kind = type(transformers.AutoConfig.for_model(config["model_type"]))
        classes = getattr(transformers, _TASKS[task])
        if kind in classes:
            config["architectures"] = [classes[kind].__name__]
    last = heads[max(heads, key=lambda name: (name.partition(".")[0] in ("classifier", "score"), name))]
    if task in ("SEQ_CLS", "TOKEN_CLS") and last.shape[0] != len(config.get("id2label") or {0: "", 1: ""}):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(last.shape[0])}
        config["label2id"] = {label: int(i) for i, label in config["id2label"].items()}
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_others(source: Path, target: Path) -> None:
    for path in source.iterdir():
        is_weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not path.name.startswith((".", "adapter_")):
            shutil.copyfile(path, target / path.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")
