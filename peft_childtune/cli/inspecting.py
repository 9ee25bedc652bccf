"""`childtune inspect`: what is in an adapter, from its configuration and the weights file's header."""

from __future__ import annotations

from typing import Any

from ..artifact import Artifact
from .view import show_facts, show_table

__all__ = ["describe", "show"]


def describe(artifact: Artifact) -> dict[str, Any]:
    """Return what is in an adapter, as `--json` prints it."""
    config = artifact.config
    tensors: list[dict[str, Any]] = []
    for name in artifact.names():
        stored = artifact.stored(name)
        tensors.append(
            {
                "name": name,
                "shape": None if stored.shape is None else list(stored.shape),
                "kept": stored.nnz,
                "density": stored.nnz / stored.numel if stored.numel else None,
                "coding": stored.coding,
                "index_bytes": stored.coded_bytes,
                "dtype": stored.dtype,
            }
        )
    kept, index_bytes = sum(t["kept"] for t in tensors), sum(t["index_bytes"] for t in tensors)
    reached = sum(artifact.stored(t["name"]).numel for t in tensors)
    # where nothing was kept of a tensor, no code says how large it is
    covered = reached if all(t["shape"] for t in tensors) else None
    return {
        "base": {"name": config.get("base_model_name_or_path"), "revision": config.get("revision")},
        "task_type": config.get("task_type"),
        "mode": config.get("mode"),
        "score": config.get("score") if config.get("mode") != "task_free" else None,
        "density": config.get("density"),
        "scope": config.get("scope") or (config.get("selection") or {}).get("scope", "global"),
        "granularity": config.get("granularity"),
        "resample": config.get("resample"),
        "seed": config.get("seed"),
        "save_dtype": config.get("save_dtype"),
        "selection": config.get("selection"),
        "peft_version": config.get("peft_version"),
        "totals": {
            "tensors": len(tensors),
            "tensors_with_kept": sum(t["kept"] > 0 for t in tensors),
            "kept": kept,
            "covered": covered,
            "density": kept / covered if covered else None,
            "entries_of_tensors_with_kept": reached,
            "file_bytes": artifact.file_bytes,
            "bytes_per_kept": artifact.file_bytes / kept if kept else None,
            "index_bytes": index_bytes,
            "index_bytes_per_kept": index_bytes / kept if kept else None,
        },
        "tensors": tensors,
        "heads": _listed(artifact.heads),
        "unsealed": _listed(artifact.unsealed),
    }


def _listed(tensors: dict[str, tuple[str, str, tuple[int, ...]]]) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(shape), "dtype": dtype} for name, (_, dtype, shape) in tensors.items()]


def show(found: dict[str, Any]) -> None:
    """Print what `describe` returned."""
    base, totals = found["base"], found["totals"]
    empty = totals["tensors"] - totals["tensors_with_kept"]
    facts = [
        ("base", f"{base['name'] or 'not named'}" + (f", revision {base['revision']}" if base["revision"] else "")),
        ("child", _method(found)),
        ("chosen by", _provenance(found)),
        (
            "kept",
            f"{totals['kept']:,} of {totals['covered']:,} covered weights ({totals['density'] or 0:.3%})"
            if totals["covered"] is not None
            else f"{totals['kept']:,} weights of {totals['tensors_with_kept']} tensors, which have "
            f"{totals['entries_of_tensors_with_kept']:,}; nothing of {empty} more covered tensors",
        ),
        (
            "on disk",
            f"{totals['file_bytes']:,} bytes"
            + (
                f", {totals['bytes_per_kept']:.3f} for each kept weight, {totals['index_bytes_per_kept']:.3f} of them "
                "for its position"
                if totals["kept"]
                else ""
            ),
        ),
        ("task", f"{found['task_type'] or 'none'} (peft {found['peft_version'] or 'unknown'})"),
    ]
    for title, kind in (("heads", "heads"), ("not sealed", "unsealed")):
        if found[kind]:
            facts.append((title, ", ".join(f"{t['name']} {_shape(t['shape'])} {t['dtype']}" for t in found[kind])))
    show_facts(facts)
    print()
    show_table(
        ("tensor", "shape", "kept", "density", "coding", "index bytes", "dtype"),
        [
            (
                t["name"],
                _shape(t["shape"]),
                f"{t['kept']:,}",
                "-" if t["density"] is None else f"{t['density']:.3%}",
                t["coding"] or "-",
                f"{t['index_bytes']:,}",
                t["dtype"] or "-",
            )
            for t in found["tensors"]
        ],
        left=("tensor", "coding", "dtype"),
    )


def _shape(shape: list[int] | None) -> str:
    return "-" if shape is None else "x".join(map(str, shape))


def _method(found: dict[str, Any]) -> str:
    score = "" if found["score"] is None else f", score {found['score']}"
    drawn = ", resampled at every step" if found["resample"] else ""
    return (
        f"{found['mode']}{score}{drawn}, density {found['density']}, scope {found['scope']}, "
        f"granularity {found['granularity']}"
    )


def _provenance(found: dict[str, Any]) -> str:
    how = found["selection"]
    if not isinstance(how, dict):
        what = "the seed alone" if found["score"] in (None, "random") else f"{found['score']} of the base's weights"
        return f"{what}, when the base was wrapped (seed {found['seed']})"
    parts = [str(how.get("source"))]
    if how.get("source") == "diff":
        parts.append(f"{how.get('kept')} of {how.get('tuned')}")
    if how.get("examples") is not None:
        parts.append(f"{how['examples']} examples")
    if isinstance(how.get("loss"), float):
        parts.append(f"mean loss {how['loss']:.4f}")
    parts += [f"torch seed {how['torch_seed']}"] if "torch_seed" in how else []
    parts += [f"digest {how['digest']}"] if "digest" in how else []
    return ", ".join(parts)
