"""A saved adapter as it lies in its folder: read without a model, without PEFT, and without more than is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .codec import decode_child, measure_child
from .codec.bits import Reader
from .codec.header import Header, decode_header
from .errors import BaseMismatchError, ChildTuningError, FormatError, IntegrityError
from .seal import sealed_file_tensor
from .sparse import TensorChild
from .untrusted import MAX_SCANNED, PEFT_PREFIX, shown
from .verification import THE_NAMED_BASE, verify_seal, verify_stored

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "Artifact", "Stored", "Verdict", "read_json"]

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
CODINGS = {0: "raw", 1: "rice", 2: "block-rice", 3: "bitmap", 4: "lzma", 8: "seeded", 9: "resampled"}
_CODE, _VALUES, _SEAL = ".child_tuning_code.", ".child_tuning_values.", ".child_tuning_seal"
_FRONT = 320  # bytes of a code that hold its header, at most
_MAX_JSON = 1 << 26  # bytes of a configuration; a table of a million tensors is shorter

Bar = Callable[[Collection[str]], Iterable[str]]  # shows progress over names


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        FileNotFoundError: nothing is there.
        FormatError: it is no JSON object, or above 64 MB.
    """
    if path.stat().st_size > _MAX_JSON:
        raise FormatError(f"{path}: {path.stat().st_size} bytes, above the limit {_MAX_JSON}; it is no configuration.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not sound JSON ({error}); save or fetch it again.") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: holds {type(found).__name__}, no JSON object; save or fetch it again.")
    return found


@dataclass(frozen=True)
class Stored:
    """What the weights file says of one covered base tensor, without its data.

    Attributes:
        nnz: kept entries: the length of the delta.
        coded_bytes: of the positions.
        dtype: of the delta, as safetensors names it; None where nothing was kept.
        header: of the code: shape, granularity, coding; None where nothing was kept.
    """

    nnz: int = 0
    coded_bytes: int = 0
    dtype: str | None = None
    header: Header | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The base tensor's shape; None where nothing was kept, and so no code says it."""
        return None if self.header is None else self.header.grid.shape

    @property
    def numel(self) -> int:
        """Entries of the base tensor, or 0 where its shape is not known."""
        return 0 if self.header is None else self.header.grid.numel

    @property
    def coding(self) -> str | None:
        """The name of the coding of the positions."""
        return None if self.header is None else CODINGS[self.header.coding]


@dataclass(frozen=True)
class Verdict:
    """What a verification found.

    Attributes:
        problems: of the artifact, or of artifact and base together, one line each; empty if it is sound.
        unverified: tensors of the base of which nothing can be said: bfloat16 here and float16 there.
        is_other_base: whether the only problem is that the base is another one.
    """

    problems: list[str]
    unverified: list[str]
    is_other_base: bool = False


class Artifact:
    """A saved adapter in a folder. Opening reads its configuration and the weights file's header only.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        config: what adapter_config.json holds.
        keys: in the weights file: kind ("code", "values"), base name -> key.
        heads: of `modules_to_save` tensors, base name -> (key, dtype, shape).
        unsealed: likewise, of what PEFT adds by itself, the embeddings of a resized vocabulary.

    Raises:
        FileNotFoundError: the folder, or one of the two files, is not there.
        FormatError: they are no adapter of this method.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"{self.folder}: is no folder; name the folder that `save_pretrained` has written."
            )
        self.path = self.folder / WEIGHTS_NAME
        for path in (self.folder / CONFIG_NAME, self.path):
            if not path.is_file():
                also = " (pickled weights, adapter_model.bin, are never read)" if path is self.path else ""
                raise FileNotFoundError(f"{path}: is not there{also}; name the folder of a saved adapter.")
        self.config = read_json(self.folder / CONFIG_NAME)
        if self.config.get("peft_type") != "CHILD_TUNING":
            raise FormatError(
                f"{self.folder / CONFIG_NAME}: peft_type is {self.config.get('peft_type')!r}; this is no adapter of "
                "Child-Tuning."
            )
        try:
            self._file = cast(Any, safe_open(str(self.path), framework="pt"))
            found = dict.fromkeys(self._file.keys())
        except SafetensorError as error:
            raise FormatError(
                f"{self.path}: is not a sound safetensors file ({error}); fetch or save it again."
            ) from error
        self.keys: dict[str, dict[str, str]] = {"code": {}, "values": {}}
        self.heads: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        self.unsealed: dict[str, tuple[str, str, tuple[int, ...]]] = {}
        self._seals = []
        modules = self.config.get("modules_to_save") or []
        if not isinstance(modules, list):
            raise FormatError(f"{self.folder / CONFIG_NAME}: modules_to_save={shown(modules)} is no list of names.")
        to_save = [f".{module}." for module in modules]
        for key in found:
            name = key.removeprefix(PEFT_PREFIX)
            if name != key and name in found:
                raise IntegrityError(f"{self.path}: {shown(name)} is there twice, with and without {PEFT_PREFIX!r}.")
            if name.endswith(_SEAL):
                self._seals.append(key)
            elif _CODE in name:
                self.keys["code"][name.replace(_CODE, ".")] = key
            elif _VALUES in name:
                self.keys["values"][name.replace(_VALUES, ".")] = key
            else:
                part = self._file.get_slice(key)
                is_head = any(module in f".{name}" for module in to_save)
                (self.heads if is_head else self.unsealed)[name] = (key, part.get_dtype(), tuple(part.get_shape()))

    @property
    def file_bytes(self) -> int:
        """Size of the weights file."""
        return self.path.stat().st_size

    @property
    def table(self) -> Mapping[str, Any]:
        """What the configuration lists as covered: base name -> [kept entries, coded bytes]."""
        table = self.config.get("child")
        if not isinstance(table, dict) or not table:
            raise FormatError(
                f"{self.folder / CONFIG_NAME}: `child` is no table of covered tensors; the configuration is damaged "
                "or of an adapter that was never saved with its weights: save or fetch it again."
            )
        return table

    def names(self) -> list[str]:
        """Return every covered base tensor: those that the configuration lists, and any that only the file holds."""
        return list(dict.fromkeys([*self.table, *self.keys["code"], *self.keys["values"]]))

    def stored(self, name: str) -> Stored:
        """Return what the file says of a covered tensor; of its code only the header is read.

        Raises:
            FormatError: the code has no sound header, or code and delta are not vectors.
        """
        if name not in self.keys["code"] or name not in self.keys["values"]:
            if name in self.keys["code"] or name in self.keys["values"]:
                missing = "values" if name in self.keys["code"] else "code"
                raise IntegrityError(f"{name}: its child_tuning_{missing} is missing; save or fetch the file again.")
            return Stored()
        code, values = (self._file.get_slice(self.keys[kind][name]) for kind in ("code", "values"))
        if len(code.get_shape()) != 1 or len(values.get_shape()) != 1 or code.get_dtype() != "U8":
            raise FormatError(
                f"{name}: code {code.get_dtype()} {code.get_shape()}, values {values.get_shape()}; a code is a vector "
                "of U8, and so is a delta one of floats. The file is damaged: save or fetch it again."
            )
        try:
            header = decode_header(Reader(code[:_FRONT].numpy()), shape=None)
        except ChildTuningError as error:
            raise FormatError(f"{name}: {error}") from error
        return Stored(values.get_shape()[0], code.get_shape()[0], values.get_dtype(), header)

    def tensor(self, key: str) -> Tensor:
        """Return a tensor of the weights file."""
        found: Tensor = self._file.get_tensor(key)
        return found

    def child(self, name: str, shape: tuple[int, ...]) -> TensorChild | None:
        """Return the decoded child of a covered tensor of that shape, or None where nothing was kept.

        Raises:
            FormatError: the code is damaged, or of another shape.
        """
        if name not in self.keys["code"]:
            return None
        try:
            code, nnz = self.tensor(self.keys["code"][name]), self.values(name).numel()
            return decode_child(code, shape=shape, nnz=nnz)
        except ChildTuningError as error:
            raise type(error)(f"{name}: {error}") from error

    def values(self, name: str) -> Tensor:
        """Return the delta of a covered tensor, `(nnz,)`, as stored; empty where nothing was kept."""
        key = self.keys["values"].get(name)
        return torch.zeros(0) if key is None else self.tensor(key)

    def verify(
        self,
        base: Callable[[str], Tensor] | None = None,
        *,
        config: bytes | None = None,
        made_for: str = THE_NAMED_BASE,
        bar: Bar = iter,
    ) -> Verdict:
        """Check everything that the folder alone can show, and then, if there is a base, that it is the right one.

        Args:
            base: called for each covered tensor of the base, by the name that the adapter has for it; one at a time.
            config: the digest of the configuration's own fields (`ChildTuningConfig.file_digest`); not checked if
                not given.
            made_for: what the configuration says of the base, for errors.
            bar: shows progress.
        """
        problems: list[str] = []
        try:
            names = self.names()
        except FormatError as error:
            return Verdict([str(error)], [])
        for name in bar(names):
            try:
                self._check(name, base)
            except ChildTuningError as error:
                problems.append(str(error))
        for name, (key, _, _) in self.heads.items():
            tensor = self.tensor(key)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                problems.append(f"{name}: an entry is not finite; training has diverged, or the file is damaged.")
        if len(self._seals) != 1:
            problems.append(
                f"{len(self._seals)} seals instead of one; the weights file is incomplete: fetch it again."
            )
        if problems:
            return Verdict(problems, [])
        try:
            return Verdict([], self._compare_with_seal(names, base, config, made_for))
        except (FormatError, BaseMismatchError) as error:  # another one is the base's, which cannot be read
            return Verdict([str(error)], [], isinstance(error, BaseMismatchError))

    def _check(self, name: str, base: Callable[[str], Tensor] | None) -> None:
        """Raise unless table, code and delta of one covered tensor fit together."""
        stored, listed = self.stored(name), self.table.get(name)
        if listed is None:
            raise IntegrityError(
                f"{name}: is in the weights file, but not in `child` of adapter_config.json; the two do not belong "
                "together."
            )
        if listed != [stored.nnz, stored.coded_bytes]:
            raise IntegrityError(
                f"{name}: adapter_config.json lists {listed!r}, but the weights file holds {stored.nnz} kept entries "
                f"and {stored.coded_bytes} coded bytes; the two do not belong together."
            )
        if stored.shape is None:
            return
        if name in self.keys["code"]:
            scanned = measure_child(self.tensor(self.keys["code"][name]), shape=stored.shape).scanned
            if scanned > MAX_SCANNED and base is None:
                raise FormatError(
                    f"{name}: {scanned} units have to be drawn to know its child, above the limit {MAX_SCANNED} "
                    "for a file alone; verify it together with its base."
                )
            if scanned > MAX_SCANNED:
                self._of_base(name, base)  # its shape is what the units are compared with
        child = self.child(name, stored.shape)
        if child is not None and child.nnz != stored.nnz:
            raise IntegrityError(f"{name}: {stored.nnz} values for {child.nnz} kept entries; fetch the file again.")
        values = self.values(name)
        if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
            raise IntegrityError(f"{name}: a value is not finite; training has diverged, or the file is damaged.")

    def _compare_with_seal(
        self, names: list[str], base: Callable[[str], Tensor] | None, config: bytes | None, made_for: str
    ) -> list[str]:
        """Return what cannot be verified; the one place that knows what the seal wants."""
        seal = self.tensor(self._seals[0])
        heads = {name: self.tensor(key) for name, (key, _, _) in self.heads.items()}
        children = {}
        for name in names:
            found = (self.keys[kind].get(name) for kind in ("code", "values"))
            code, values = (None if key is None else self.tensor(key) for key in found)
            children[name] = sealed_file_tensor(name, code, values, base=partial(self._of_base, name, base))
        if base is None:
            return verify_stored(seal, children, heads, config=config)
        return verify_seal(seal, children, heads, config=config, made_for=made_for)

    def _of_base(self, name: str, base: Callable[[str], Tensor] | None) -> Tensor:
        assert base is not None  # `verify_stored` asks for none
        tensor, stored = base(name), self.stored(name)
        if stored.shape is not None and stored.shape != tuple(tensor.shape):
            raise BaseMismatchError(
                f"{name}: the base tensor is of shape {tuple(tensor.shape)}, the child's of {stored.shape}; use the "
                "base model (and revision) named in adapter_config.json."
            )
        return tensor
