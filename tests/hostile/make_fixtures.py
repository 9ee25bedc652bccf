"""Make the damaged files in `fixtures/`, one for each kind of damage: `python -m tests.hostile.make_fixtures`.

They are committed, so that what an earlier release wrote, and somebody damaged, is refused by every later one. Weights
are numbers from a formula and nothing is random: another run makes the same files, unless the format has changed.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_childtune import ChildNetwork, ChildTuningConfig
from peft_childtune.files import load_tensors
from tests.hostile.artifacts import Small

FOLDER = Path(__file__).parent / "fixtures"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PATH = "base_model.model.layers.0.0.child_tuning_"
_CODE, _VALUES = f"{_PATH}code.weight", f"{_PATH}values.weight"
_NAME = r"^layers\.0\.0\.weight: "


def plain(*, scale: float = 1.0) -> nn.Module:
    """Return the base of all fixtures; with another scale one targeted tensor is another one."""
    model = Small().eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters(), start=1):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape).remainder(7) * number / 16 - 0.375)
        model.layers[0][0].weight.mul_(scale)
    return model


def _sound(folder: Path, *, density: float = 0.3) -> None:
    config = ChildTuningConfig(
        target_modules=["layers.0.0"], modules_to_save=["head"], score="magnitude", density=density
    )
    model = get_peft_model(plain(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "child_tuning_values" in name:
                parameter.copy_(torch.arange(1, parameter.numel() + 1) / 8)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()


def _bit(name: str) -> Callable[[Path], None]:
    """Flip one bit in the middle of a tensor."""

    def damage(folder: Path) -> None:
        raw = bytearray((folder / WEIGHTS).read_bytes())
        length = int.from_bytes(raw[:8], "little")
        first, stop = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
        raw[8 + length + (first + stop) // 2] ^= 4
        (folder / WEIGHTS).write_bytes(bytes(raw))

    return damage


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    return damage


def _header(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = change(raw[8 : 8 + length].decode().rstrip()).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])

    return damage


def _again(header: str) -> str:
    return f'{header[:-1]},"{_CODE}":{json.dumps(json.loads(header)[_CODE])}}}'


def _overlapping(header: str) -> str:
    table = json.loads(header)
    first, stop = table[_VALUES]["data_offsets"]
    table[_VALUES]["data_offsets"] = [first - 4, stop - 4]
    return json.dumps(table)


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))

    return damage


def _fields(**fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields, indent=2, sort_keys=True))

    return damage


def _mixed(folder: Path) -> None:
    _sound(folder / "other", density=0.6)
    shutil.copy(folder / "other" / CONFIG, folder / CONFIG)
    shutil.rmtree(folder / "other")


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


# kind: what is done to a sound adapter, the error, and what its message says
ADAPTERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "bit_in_code": (_bit(_CODE), "IntegrityError", _NAME),
    "bit_in_values": (_bit(_VALUES), "IntegrityError", _NAME),
    "bit_in_seal": (_bit(f"{_PATH}seal"), "IntegrityError", "^child_tuning_seal: "),
    "bit_in_head": (_bit("base_model.model.head.weight"), "IntegrityError", r"^head\.weight: "),
    "values_in_other_order": (
        _tensors(lambda t: t.update({_VALUES: t[_VALUES].flip(0)})),
        "IntegrityError",
        _NAME,
    ),
    "values_cut": (
        _tensors(lambda t: t.update({_VALUES: t[_VALUES][:-1]})),
        "IntegrityError",
        r"layers\.0\.0\.weight",
    ),
    "no_code": (_tensors(lambda t: t.pop(_CODE)), "IntegrityError", "child_tuning_code is missing"),
    "no_seal": (_tensors(lambda t: t.pop(f"{_PATH}seal")), "IntegrityError", "^0 seals"),
    "no_head": (_tensors(lambda t: t.pop("base_model.model.head.weight")), "IntegrityError", r"^head\.weight: "),
    "base_weight": (
        _tensors(lambda t: t.update({"base_model.model.layers.1.0.weight": torch.ones(3, 4)})),
        "IntegrityError",
        r"layers\.1\.0\.weight: .*no base weights",
    ),
    "cut_in_header": (_raw(lambda raw: raw[:100]), "FormatError", "sound safetensors file"),
    "cut_in_data": (_raw(lambda raw: raw[:-1]), "FormatError", "sound safetensors file"),
    "bytes_after_the_end": (_raw(lambda raw: raw + b"\0"), "FormatError", "sound safetensors file"),
    "empty": (_raw(lambda raw: b""), "FormatError", "sound safetensors file"),
    "huge_header": (_raw(lambda raw: b"\xff" * 7 + b"\x0f" + raw[8:]), "FormatError", "declares a header"),
    "entry_twice": (_header(_again), "FormatError", "two entries named"),
    "entries_overlap": (_header(_overlapping), "FormatError", "sound safetensors file"),
    "name_with_newline": (
        _header(lambda header: header.replace("base_model.model.head.bias", "base_model\\nmodel.head.bias")),
        "FormatError",
        "a name is printable",
    ),
    "negative_sizes": (
        _fields(child={"layers.0.0.weight": [-3, 9], "layers.0.0.bias": [1, 9]}),
        "FormatError",
        r"layers\.0\.0\.weight",
    ),
    "giant_sizes": (
        _fields(child={"layers.0.0.weight": [1 << 40, 9], "layers.0.0.bias": [1, 9]}),
        "IntegrityError",
        r"layers\.0\.0\.weight",
    ),
    "density_as_text": (_fields(density="0.3"), "ConfigError", "^density='0.3' "),
    "score_unknown": (_fields(score="taste"), "IntegrityError", "^adapter_config.json: its fields are not"),
    "evil_pattern": (_fields(target_modules="(a+)+b"), "ConfigError", "^target_modules=.*list the names"),
    "mixed_pair": (_mixed, "IntegrityError", r"layers\.0\.0\.(weight|bias)"),
    "pickle": (_pickled, "UnsupportedError", "is no safetensors file"),
}


def _network(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
    shapes = {"a.weight": (4, 6), "b.weight": (3, 3)}
    indices = {"a.weight": torch.tensor([0, 5, 23]), "b.weight": torch.tensor([4])}
    ChildNetwork.from_indices(indices, shapes).save(path)
    tensors, metadata = load_tensors(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


_HUGE = torch.tensor(
    list(bytes.fromhex("43540108 00 01 808080808020 00 00 00 0000000000000000 00")), dtype=torch.uint8
)
# kind: what is done to a sound child network, the error, and what its message says
NETWORKS: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, str]], object], str, str]] = {
    "other_shapes": (lambda t, m: m.update(shapes="6,4;3,3"), "IntegrityError", "another child than was saved"),
    "no_shapes": (lambda t, m: m.pop("shapes"), "FormatError", "list of shapes"),
    "bit_in_code": (lambda t, m: t["a.weight"][-1].bitwise_xor_(1), "IntegrityError", "another child than was saved"),
    "renamed": (lambda t, m: t.update({"c.weight": t.pop("b.weight")}), "IntegrityError", "another child"),
    "without_digest_of_codes": (
        lambda t, m: (m.pop("codes"), m.update(digest="0" * 32)),
        "IntegrityError",
        "other positions than were saved",
    ),
    "a_trillion_entries": (
        lambda t, m: (t.clear(), t.update(w=_HUGE), m.pop("codes"), m.update(shapes=str(1 << 40))),
        "FormatError",
        "1099511627776 units to draw",
    ),
}


def main() -> None:
    """Make all of them anew."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    _sound(FOLDER / "sound")
    for kind, (damage, _, _) in ADAPTERS.items():
        shutil.copytree(FOLDER / "sound", FOLDER / kind)
        damage(FOLDER / kind)
    _network(FOLDER / "network_sound.safetensors", lambda tensors, metadata: None)
    for kind, (change, _, _) in NETWORKS.items():
        _network(FOLDER / f"network_{kind}.safetensors", change)


if __name__ == "__main__":
    main()
