"""The four commands and their options."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor
from tqdm import tqdm

from ..artifact import Artifact
from ..errors import ConfigError, FormatError
from ..tuner import ChildTuningConfig
from .applying import apply_adapter
from .checkpoint import Checkpoint, find_folder
from .inspecting import describe, show
from .output import refuse_existing
from .view import bar_over, fail, note, reporting, show_facts, show_json

__all__ = ["app"]

app = typer.Typer(
    help="Look into, verify, make and apply Child-Tuning adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 well; 1 damaged, another base, or not possible; 2 could not be tried (nothing there, wrong "
    "options).",
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a saved adapter.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to make; must be new or empty.")]
Model = Annotated[str, typer.Option("--base", metavar="MODEL", help="Folder (or hub id) of the base model.")]
_MOST_PROBLEMS = 20  # of those that are printed


@app.command("inspect")
@reporting
def inspect_(folder: Folder, as_json: Json = False) -> None:
    """Show what is in an adapter: base, child, bytes, and a line for each tensor.

    Reads the configuration and the header of the weights file; no tensor data but the first bytes of each code.
    """
    found = describe(Artifact(folder))
    if as_json:
        show_json(found)
    else:
        show(found)


@app.command()
@reporting
def verify(
    folder: Folder,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder (or hub id) of the base to compare with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check an adapter, alone or with its base: 0 sound, 1 damaged or another base, 2 could not be checked.

    Alone: the file, the configuration against it, every code and value, and the digests of the seal. With --base:
    also that the base's weights are those that the adapter was made for, read one tensor at a time from its
    safetensors files.
    """
    found = _Found(folder, base)
    if as_json:
        show_json(found.as_json())
    elif not found.problems:
        of_base = " No base was given to compare with (--base)." if base is None else f" It fits {base}."
        heads = f" and {_counted(len(found.heads), 'tensor')} of heads" if found.heads else ""
        counts = f"{_counted(found.tensors, 'tensor')} of the child{heads}"
        print(f"{folder}: sound, {counts}." + ("" if found.unverified else of_base))
    for problem in found.problems[:_MOST_PROBLEMS]:
        note(problem)
    if len(found.problems) > _MOST_PROBLEMS:
        note(f"... and {len(found.problems) - _MOST_PROBLEMS} more problems.")
    for name in found.unsealed:
        note(f"{name}: is stored beside the child and its heads, and nothing vouches for it.")
    if found.problems:
        raise typer.Exit(1)
    if found.unverified:
        raise fail(f"{found.unverified_text()}; give the base in the precision in which it was published.", code=2)


class _Found:
    """What a verification found of an adapter and, if one is given, of its base."""

    def __init__(self, folder: Path, base: str | None) -> None:
        self.base = base
        self.problems: list[str] = []
        self.unverified: list[str] = []
        self.heads: list[str] = []
        self.unsealed: list[str] = []
        self.tensors = 0
        self.is_other_base = False
        try:
            self.artifact = Artifact(folder)
        except FormatError as error:
            self.problems = [str(error)]
            return
        try:
            config = ChildTuningConfig.from_pretrained(str(folder))
        except (FormatError, ConfigError) as error:
            self.problems = self.artifact.verify().problems or [str(error)]  # which may tell more
            return
        self.heads, self.unsealed = list(self.artifact.heads), list(self.artifact.unsealed)
        base_tensor = None if base is None else self._tensor
        verdict = self.artifact.verify(
            base_tensor, config=config.file_digest, made_for=config.made_for, bar=bar_over("verifying")
        )
        self.problems, self.unverified = verdict.problems, verdict.unverified
        self.is_other_base = verdict.is_other_base
        self.tensors = 0 if self.problems and not self.is_other_base else len(self.artifact.names())

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The base: opened once the adapter has proved sound by itself."""
        assert self.base is not None  # asked for only where one was given
        return Checkpoint(find_folder(self.base, self.artifact.config.get("revision")))

    @cached_property
    def _keys(self) -> dict[str, str]:
        return self.checkpoint.match(self.artifact.names()).keys

    def _tensor(self, name: str) -> Tensor:
        return self.checkpoint.tensor(self._keys[name])

    def unverified_text(self) -> str:
        more = f" and {len(self.unverified) - 1} more tensors" if len(self.unverified) > 1 else ""
        return f"{self.unverified[0]}{more} cannot be compared: bfloat16 here, float16 there"

    def as_json(self) -> dict[str, Any]:
        sound = not self.problems or self.is_other_base
        return {
            "sound": sound,
            "fits_base": None if self.base is None or self.unverified or not sound else not self.problems,
            "base": self.base,
            "tensors": self.tensors,
            "heads": self.heads,
            "problems": self.problems,
            "unverified": self.unverified,
            "unsealed": self.unsealed,
        }


@app.command()
@reporting
def diff(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder (or hub id) of the base model.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Folder (or hub id) of its full fine-tune.")],
    output: Output,
    density: Annotated[
        float | None, typer.Option(metavar="P", help="Keep the largest deltas: this fraction of the covered weights.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Keep every change, checked entry by entry.")] = False,
) -> None:
    """Turn a full fine-tune into an adapter of its base.

    --density covers the repeated blocks, as training does, and warns of changes elsewhere. --exact covers every module
    that changed, and the adapter on the base gives the fine-tune's very weights; where float32 deltas cannot, it says
    where, and makes nothing. A new head is stored whole.
    """
    if exact == (density is not None):
        raise typer.BadParameter("give either --density P or --exact.")
    if density is not None and not 0 < density <= 1:
        raise typer.BadParameter(
            f"{density} is outside (0, 1]; 0.02 keeps 2 % of the weights.", param_hint="--density"
        )
    refuse_existing(output)
    from .diffing import diff_models

    name = None if Path(base).is_dir() else base
    made = diff_models(
        find_folder(base), find_folder(tuned), output, density=density, name=name, bar=bar_over("comparing")
    )
    facts = [("kept", f"{made.kept:,} of {made.numel:,} covered weights ({made.kept / made.numel:.3%})")]
    facts.append(("changed", f"{made.changed:,} covered weights by the fine-tune"))
    if exact:
        facts.append(("exact", "every entry of the fine-tune is base plus delta, checked one by one"))
    elif made.rounded:
        facts.append(("rounded", f"{made.rounded:,} kept entries are off by at most {made.largest:.3g}"))
    if made.heads:
        facts.append(("whole", ", ".join(made.heads)))
    show_facts([*facts, ("adapter", str(output))])
    if made.left_out:
        note(
            f"{', '.join(made.left_out[:5])}{' and more' if len(made.left_out) > 5 else ''}: {len(made.left_out)} "
            "tensors outside of the covered ones differ, too, and are not in the adapter; only --exact covers them."
        )
    if made.dtype is not None:
        note(f"the fine-tune is in another precision than the base: load the base with dtype={made.dtype}.")


@app.command("apply")
@reporting
def apply_(folder: Folder, base: Model, output: Output) -> None:
    """Merge an adapter into a checkpoint of its base: a full checkpoint, file by file, with no model in memory.

    The base is verified first. The result has the base's files, precision, configuration and tokenizer, with the
    adapter's heads.
    """
    refuse_existing(output)
    found = _Found(folder, base)
    if found.problems:
        raise fail(found.problems[0], code=1)
    if found.unverified:
        note(f"{found.unverified_text()}.")
    artifact, checkpoint = found.artifact, found.checkpoint
    with tqdm(total=len(checkpoint.shards), desc="writing", unit="file", disable=None, leave=False) as progress:

        def tick(shard: str) -> None:
            progress.set_postfix_str(shard)
            progress.update()

        added = apply_adapter(artifact, checkpoint, output, tick=tick)
    facts: list[tuple[str, Any]] = [
        (
            "merged",
            f"{sum(artifact.stored(n).nnz for n in artifact.names()):,} weights of {len(artifact.names())} tensors",
        )
    ]
    if artifact.heads:
        facts.append(("heads", f"{len(artifact.heads)} tensors, {len(added)} of them new to the base"))
    show_facts([*facts, ("checkpoint", f"{output}, weights in {_counted(len(checkpoint.shards), 'file')}")])


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
