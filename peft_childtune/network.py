"""The child network: which entries of which base tensors are trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from .codec import decode_child, encode_child, measure_child
from .errors import DeltaError, FormatError, IntegrityError
from .files import load_tensors, save_tensors
from .sparse import TensorChild, UnitGrid
from .untrusted import MAX_SCANNED, read_header
from .weights import digest

__all__ = ["ChildNetwork"]

# What a file may ask for whose shapes nobody has vouched for: a few bytes can stand for any number of entries.
_MAX_UNLISTED = 1 << 25  # kept entries beyond one for each bit of the file: 256 MiB as positions
_MAX_UNSEALED = 1 << 22  # the same in files without a digest of their codes: their positions are listed to be checked
_FORMAT = "peft_childtune.child_network.v1"


class ChildNetwork:
    """The kept positions of every covered base tensor: the child network of the paper.

    Args:
        children: by the base model's own parameter name; one entry per covered tensor, empty ones too.

    Example:
        >>> child = ChildNetwork.from_indices({"fc.weight": torch.tensor([0, 3])}, {"fc.weight": (2, 4)})
        >>> child
        ChildNetwork(1 tensors, 2 of 8 entries, density 0.25)
        >>> child.overlap(ChildNetwork.from_indices({"fc.weight": torch.tensor([3, 4])}, {"fc.weight": (2, 4)}))
        0.5

    Source: Xu et al. 2021 (arXiv:2109.05687), section 2.
    """

    def __init__(self, children: Mapping[str, TensorChild]) -> None:
        self.children = dict(children)

    @classmethod
    def from_indices(cls, indices: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> ChildNetwork:
        """Return the child network of given positions.

        Args:
            indices: int64, `(nnz,)` each, flat row-major positions, strictly increasing.
            shapes: of the base tensors, under the same names.

        Raises:
            DeltaError: names differ, or positions are out of order or out of range.
        """
        if set(indices) != set(shapes):
            raise DeltaError(f"indices and shapes name different tensors: {sorted(set(indices) ^ set(shapes))[:3]}.")
        children = {}
        for name, positions in indices.items():
            grid = UnitGrid(tuple(shapes[name]))
            positions = positions.detach().cpu()
            if positions.dtype is not torch.int64 or positions.ndim != 1:
                raise DeltaError(
                    f"{name}: indices are {positions.dtype} of {positions.ndim} dimensions; need int64, (nnz,)."
                )
            if positions.numel() and (
                positions[0] < 0 or positions[-1] >= grid.numel or bool((positions.diff() <= 0).any())
            ):
                raise DeltaError(
                    f"{name}: indices must increase strictly within [0, {grid.numel}); sort and deduplicate them."
                )
            children[name] = TensorChild(grid, positions)
        return cls(children)

    @cached_property
    def indices(self) -> dict[str, Tensor]:
        """Flat row-major positions per base tensor: int64, `(nnz,)`, strictly increasing, on the CPU."""
        return {name: child.indices() for name, child in self.children.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each covered base tensor."""
        return {name: child.grid.shape for name, child in self.children.items()}

    @property
    def nnz(self) -> int:
        """Number of kept entries."""
        return sum(child.nnz for child in self.children.values())

    @property
    def numel(self) -> int:
        """Number of entries of all covered tensors."""
        return sum(child.grid.numel for child in self.children.values())

    @property
    def density(self) -> float:
        """Kept fraction, `nnz / numel`."""
        return self.nnz / self.numel if self.numel else 0.0

    def overlap(self, other: ChildNetwork) -> float:
        """Return the share of the smaller child that the other one also holds, in [0, 1].

        Raises:
            DeltaError: the two cover different tensors.
        """
        if self.shapes != other.shapes:
            different = sorted(dict(self.shapes.items() ^ other.shapes.items()))
            raise DeltaError(f"the two child networks cover different tensors, for example {different[0]}.")
        shared = sum(
            int(torch.isin(self.indices[name], other.indices[name], assume_unique=True).sum())
            for name in self.children
        )
        smaller = min(self.nnz, other.nnz)
        return shared / smaller if smaller else 0.0

    def digest(self) -> str:
        """Return 32 hexadecimal digits that depend on names, shapes and positions, not on order or coding."""
        state = xxhash.xxh3_128()
        for name in sorted(self.children):
            positions = self.children[name].indices()  # not kept: one tensor's at a time
            state.update(f"{name}\0{self.children[name].grid.shape}\0{positions.numel()}\0".encode())
            state.update(positions.numpy())  # type: ignore[arg-type]  # numpy's stubs know no buffers in this Python
        return state.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save to a safetensors file of one coded tensor per base tensor."""
        codes = {name: encode_child(child) for name, child in self.children.items()}
        shapes = ";".join(",".join(map(str, self.children[name].grid.shape)) for name in sorted(codes))
        metadata = {"format": _FORMAT, "digest": self.digest(), "shapes": shapes}
        save_tensors(codes, path, metadata | {"codes": _seal(codes, metadata)})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> ChildNetwork:
        """Load what `save` saved.

        A few bytes can stand for any number of entries (a random child is stored as its seed), so a file may not ask
        for more than a model of some 100 million weights needs, unless the shapes are known to be those of a model.

        Args:
            path: of the file.
            shapes: of the base tensors it may be about, by name; `select_child_network(model, network=path)` gives
                those of the model.

        Raises:
            FileNotFoundError: nothing is there.
            FormatError: the file is malformed, holds something else, or asks for too much.
            IntegrityError: the positions are not those that were saved.
            DeltaError: it is about other tensors than `shapes`.
        """
        if not os.path.isdir(path):
            read_header(path)
        codes, metadata = load_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise FormatError(
                f"{path}: is no child network file ({_FORMAT}); save one with `ChildNetwork.save`. An adapter folder "
                "is loaded with `PeftModel.from_pretrained`."
            )
        try:
            stored = [tuple(int(n) for n in part.split(",") if n) for part in metadata["shapes"].split(";")]
        except (KeyError, ValueError) as error:
            raise FormatError(f"{path}: the list of shapes is damaged; save the child network again.") from error
        if len(stored) != max(1, len(codes)):
            raise FormatError(f"{path}: {len(stored)} shapes for {len(codes)} tensors; save the child network again.")
        if (seal := metadata.pop("codes", None)) not in (None, _seal(codes, metadata)):
            raise IntegrityError(f"{path}: holds another child than was saved; the file is damaged, fetch it again.")
        found = dict(zip(sorted(codes), stored, strict=False))
        if shapes is None:
            _check_demands(path, codes, found, _MAX_UNSEALED if seal is None else _MAX_UNLISTED)
        elif name := next((name for name, shape in found.items() if shape != shapes.get(name)), None):
            raise DeltaError(
                f"{name}: has the shape {found[name]} in {path}, and {shapes.get(name)} in the model; the child "
                "network was chosen for another model, or for other target_modules."
            )
        try:
            network = cls({name: decode_child(codes[name], shape=shape) for name, shape in found.items()})
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from error
        if seal is None and network.digest() != metadata.get("digest"):
            raise IntegrityError(
                f"{path}: holds other positions than were saved; the file is damaged, fetch it again."
            )
        return network

    def __eq__(self, other: object) -> bool:
        """Return whether both keep the same positions of the same tensors."""
        return isinstance(other, ChildNetwork) and self.shapes == other.shapes and self.digest() == other.digest()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return a summary."""
        kept = f"{self.nnz} of {self.numel} entries"
        return f"ChildNetwork({len(self.children)} tensors, {kept}, density {self.density:.3g})"


def _seal(codes: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return 32 hexadecimal digits that depend on all that a file holds beside them."""
    state = xxhash.xxh3_128()
    for key, value in sorted(metadata.items()):
        state.update(f"{key}\0{value}\0".encode())
    for name in sorted(codes):
        state.update(digest(name, codes[name]))
    return state.hexdigest()


def _check_demands(
    path: str | os.PathLike[str],
    codes: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    unlisted_limit: int,
) -> None:
    """Raise unless a file asks for no more than its length or a small model can justify; nothing is decoded."""
    scanned = unlisted = 0
    for name, shape in shapes.items():
        try:
            demand = measure_child(codes[name], shape=shape)
        except FormatError as error:
            raise FormatError(f"{path}: {name}: {error}") from error
        scanned += demand.scanned
        unlisted += max(0, demand.nnz - 8 * codes[name].numel())
        if scanned > MAX_SCANNED or unlisted > unlisted_limit:
            raise FormatError(
                f"{path}: {name} of shape {shape} takes the file, of {sum(c.numel() for c in codes.values())} bytes, "
                f"to {scanned} units to draw and {unlisted} entries that it does not list, above the limits "
                f"{MAX_SCANNED} and {unlisted_limit}. If you trust it, say which tensors it is about: "
                "`ChildNetwork.load(path, shapes=...)`, or `select_child_network(model, network=path)`."
            )
