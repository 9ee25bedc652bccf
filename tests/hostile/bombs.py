"""Hostile files, each made from nothing, and a process that loads them one after the other under watch.

`python -m tests.hostile.bombs FOLDER NAMES` makes and loads some of them and prints one line of JSON for each.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft_childtune import ChildNetwork, ChildTuningConfig, ChildTuningError
from peft_childtune.codec import encode_child
from peft_childtune.network import _seal
from peft_childtune.seal import Sealed, make_seal
from peft_childtune.sparse import ResampledUnits, SeededUnits, TensorChild, UnitGrid
from peft_childtune.weights import fingerprint
from tests.hostile.artifacts import NATIVE_PATHS, PEFT_PATHS, bert, photograph, save, small

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EVIL_PATTERN = "(([a-z.0-9])+)+X"
MANY = 200_000


def _raw(header: bytes, data: bytes = b"", *, length: int | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)

    return write


def _tensor(shape: str = "[8]", offsets: str = "[0,8]", extra: str = "") -> str:
    return f'{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}{extra}}}'


def _named(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(tensors | {name: torch.zeros(2)}, folder / WEIGHTS)

    return write


def _twice(folder: Path) -> None:
    """Write the table of the sound file with one entry in it twice."""
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    table = json.loads(header)
    name = next(name for name in table if "values" in name)
    entry = json.dumps(table[name])
    text = header.decode().rstrip()[:-1] + f',"{name}":{entry}}}'
    _raw(text.encode(), data)(folder)


def _cut(share: float) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(raw[: int(len(raw) * share)])

    return write


def _config(**fields: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return write


def _sizes(first: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        child = json.loads((folder / CONFIG).read_text())["child"]
        _config(child=child | {next(iter(child)): first})(folder)

    return write


def _deep_config(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"selection": null', f'"selection": {"[" * MANY}{"]" * MANY}'))


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(str(folder / "sprung"))))


# by kind of damage; for the PEFT paths and for transformers' own
FOLDERS: dict[str, Callable[[Path], None]] = {
    "header of 2^63 bytes": _raw(b"{}", length=1 << 63),
    "header of 99 MB in a file of 10 bytes": _raw(b"{}", length=99_000_000),
    "header of 9 MB that grows": _raw(b'{"x":[' + b"{}," * 3_000_000 + b"{}]}"),
    "header that grows inside of an entry": _raw(
        f'{{"a":{_tensor(extra=f",{chr(34)}x{chr(34)}:[" + "{}," * 3_000_000 + "{}]")}}}'.encode(), bytes(8)
    ),
    "deep header": _raw(b'{"a":' + b"[" * MANY + b"]" * MANY + b"}"),
    "two entries of one name": _twice,
    "overlapping entries": _raw(f'{{"a":{_tensor()},"b":{_tensor("[4]", "[4,8]")}}}'.encode(), bytes(8)),
    "entries beyond the end": _raw(f'{{"a":{_tensor("[80]", "[0,80]")}}}'.encode(), bytes(8)),
    "shape of 2^128 entries": _raw(f'{{"a":{_tensor(f"[{2**64 - 1},{2**64 - 1}]")}}}'.encode(), bytes(8)),
    "shape of zero times 2^64": _raw(f'{{"a":{_tensor(f"[0,{2**64 - 1}]", "[0,0]")}}}'.encode()),
    "no JSON": _raw(b"\xff\xfe{"),
    "empty file": lambda folder: (folder / WEIGHTS).write_bytes(b"") and None,
    "file cut in the header": _cut(0.2),
    "file cut in the data": _cut(0.98),
    "pickle": _pickle,
    "tensor named nothing": _named(""),
    "tensor named with a newline": _named("layers.0.0.child_tuning_values.weight\n"),
    "tensor named with a megabyte": _named("x" * 1_000_000),
    "tensor named __class__": _named("__class__"),
    "tensor named keys": _named("keys"),
    "tensor named forward": _named("forward"),
    "tensor named ../x": _named("../x.child_tuning_values.weight"),
    "tensor named alike": _named("base_model.model.lаyers.0.0.child_tuning_values.weight"),
    "tensor of the base": _named("base_model.model.head.base_layer.weight"),
    "sizes beyond the base": _sizes([1 << 40, 8]),
    "sizes beyond the format": _sizes([1 << 200, 8]),
    "negative sizes": _sizes([-1, -8]),
    "sizes that are no numbers": _sizes([float("nan"), "8"]),
    "sizes for 50,000 tensors": _config(child={f"x{i}.weight": [1, 9] for i in range(MANY // 4)}),
    "sizes that are a list": _config(child=[1, 2]),
    "200,000 targets": _config(target_modules=[f"x{i}" for i in range(MANY)]),
    "200,000 excluded": _config(exclude_modules=[f"x{i}" for i in range(MANY)]),
    "200,000 heads": _config(modules_to_save=[f"x{i}" for i in range(MANY)]),
    "targets that take for ever": _config(target_modules=EVIL_PATTERN),
    "exclusions that take for ever": _config(exclude_modules=EVIL_PATTERN),
    "heads that take for ever": _config(modules_to_save=[EVIL_PATTERN]),
    "blocks that take for ever": _config(layers_to_transform=[0], layers_pattern=[EVIL_PATTERN]),
    "deep configuration": _deep_config,
}
OF_PEFT = {"deep configuration": "RecursionError"}  # raised before any code of this method runs


class Wide(nn.Module):
    """One large tensor: 2^24 entries, 64 MiB, and 128 MiB as positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1 << 12, 1 << 12, bias=False)


def wide() -> nn.Module:
    torch.manual_seed(0)
    return Wide().eval()


_SHAPE = (1 << 12, 1 << 12)
CODES: dict[str, TensorChild] = {
    "every row": TensorChild(UnitGrid(_SHAPE, "row"), torch.arange(1 << 12)),
    "every column": TensorChild(UnitGrid(_SHAPE, "column"), torch.arange(1 << 12)),
    "one block": TensorChild(UnitGrid(_SHAPE, "block", block_size=1 << 12), torch.arange(1)),
    "half the entries, compressed": TensorChild(UnitGrid(_SHAPE), torch.arange(1 << 23)),
    "drawn": TensorChild(UnitGrid(_SHAPE), SeededUnits(1, 0, 1 << 63, 0, 1 << 24)),
    "resampled": TensorChild(UnitGrid(_SHAPE), ResampledUnits(1, 0, 0.5)),
}


def _coded(child: TensorChild) -> Callable[[Path], None]:
    """Write an adapter whose seal is right, whose code keeps millions of entries, and which has values for three."""

    def write(folder: Path) -> None:
        save(folder, wide, target_modules=["fc"], density=3 / (1 << 24))
        code, values = encode_child(child), torch.ones(3)
        base = wide().fc.weight
        _config(child={"fc.weight": [3, code.numel()]})(folder)
        fields = json.loads((folder / "adapter_config.json").read_text())
        digest = ChildTuningConfig.from_peft_type(**fields).file_digest
        sealed = {"fc.weight": Sealed(code, values, lambda: fingerprint(base, torch.arange(3)))}
        seal = make_seal(sealed, {}, config=digest)
        path = "base_model.model.fc.child_tuning_"
        save_file({f"{path}code.weight": code, f"{path}values.weight": values, f"{path}seal": seal}, folder / WEIGHTS)

    return write


def _huge(grid: UnitGrid, units: Any) -> tuple[torch.Tensor, tuple[int, ...]]:
    return encode_child(TensorChild(grid, units)), grid.shape


_LINE, _SQUARE = (1 << 40,), (2, 1 << 40)
NETWORKS: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {
    "a row of 2^40": _huge(UnitGrid(_SQUARE, "row"), torch.tensor([1])),
    "a column of 2^40": _huge(UnitGrid((1 << 40, 2), "column"), torch.tensor([1])),
    "a block of 2^40": _huge(UnitGrid((1 << 20, 1 << 20), "block", block_size=1 << 20), torch.tensor([0])),
    "2^40 resampled": _huge(UnitGrid(_LINE), ResampledUnits(0, 0, 0.5)),
    "2^40 drawn": (
        torch.tensor(
            list(bytes.fromhex("43540108 00 01 808080808020 00 00 00 0000000000000000 00")), dtype=torch.uint8
        ),
        _LINE,
    ),
    "2^40 compressed": (
        torch.tensor(list(bytes.fromhex("43540104 00 01 808080808020 01 00")), dtype=torch.uint8),
        _LINE,
    ),
    "2^61 in raw": (
        torch.tensor(list(bytes.fromhex("43540100 00 01 808080808080808020 808080808020 00")), dtype=torch.uint8),
        (1 << 61,),
    ),
}


def _network(name: str, sealed: bool) -> Callable[[Path], None]:
    code, shape = NETWORKS[name]

    def write(folder: Path) -> None:
        metadata = {
            "format": "peft_childtune.child_network.v1",
            "digest": "0" * 32,
            "shapes": ",".join(map(str, shape)),
        }
        seal = {"codes": _seal({"w": code}, metadata)} if sealed else {}
        save_file({"w": code}, folder / WEIGHTS, metadata=metadata | seal)

    return write


def cases() -> Iterator[tuple[str, Callable[[Path], None], Callable[[], nn.Module], Callable[[Any, Path], Any]]]:
    """Yield name, what makes the hostile file, the base and what loads."""
    for damage, write in FOLDERS.items():
        for path, load in (PEFT_PATHS | NATIVE_PATHS).items():
            make = bert if path in NATIVE_PATHS else small
            if path in ("low_cpu_mem_usage", "native low_cpu_mem_usage") and "JSON" not in damage:
                continue  # they differ in what follows only
            yield f"{damage}, {path}", write, make, load
    for name, child in CODES.items():
        yield f"code: {name}", _coded(child), wide, PEFT_PATHS["PeftModel"]
    for name in NETWORKS:
        for sealed in (True, False):
            yield (
                f"network: {name}, {'sealed' if sealed else 'unsealed'}",
                _network(name, sealed),
                small,
                lambda _, folder: ChildNetwork.load(folder / WEIGHTS),
            )


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024


def watched(folder: Path, write: Any, make: Callable[[], nn.Module], load: Any) -> dict[str, Any]:
    """Make a hostile file, load it, and return what that took and what came of it."""
    folder.mkdir()
    save(folder, bert, target_modules=["query"]) if make is bert else save(folder)
    write(folder)
    base = make()
    before = photograph(base)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    resident, start = _memory("VmRSS:"), time.process_time()
    try:
        load(base, folder)
        error = None
    except Exception as caught:
        error = caught
    found: dict[str, Any] = {"seconds": time.process_time() - start, "bytes": _memory("VmHWM:") - resident}
    after = {
        name.replace(".base_layer", "").replace(".original_module", ""): b for name, b in photograph(base).items()
    }
    kept = ".default." if load is PEFT_PATHS["second adapter"] else "nothing"  # the first adapter stays
    return found | {
        "error": None if error is None else type(error).__name__,
        "named": isinstance(error, ChildTuningError),
        "message": "" if error is None else str(error),
        "trace": "".join(traceback.format_exception(error)[-3:]) if error is not None else "",
        "file": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        "unchanged": all(after.get(name) == bits for name, bits in before.items())
        and all(name in before or kept in name for name in after),
        "sprung": (folder / "sprung").exists(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = json.loads(sys.argv[2])
    for number, (name, write, make, load) in enumerate(cases()):
        if name in names:
            found = watched(Path(sys.argv[1], str(number)), write, make, load)
            print(json.dumps({"name": name} | found), flush=True)
