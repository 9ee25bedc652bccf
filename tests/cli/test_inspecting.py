"""`childtune inspect`: what is in an adapter, without reading its tensors."""

from __future__ import annotations

import json
import shutil

import pytest
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_childtune import ChildTuningConfig, get_child_network
from peft_childtune.artifact import Artifact
from tests.contract.families import FAMILIES, add_noise


def test_json_says_of_each_tensor_what_the_model_knows(childtune, tmp_path):
    options = {"target_modules": ["dense"], "score": "magnitude", "scope": "tensor", "density": 0.25}
    model = get_peft_model(FAMILIES["bert"].build(), ChildTuningConfig(task_type="SEQ_CLS", **options))
    model.save_pretrained(tmp_path)
    network = get_child_network(model)
    found = json.loads(childtune("inspect", tmp_path, "--json").stdout)
    rows = {row["name"]: row for row in found["tensors"]}
    assert {name: (row["kept"], tuple(row["shape"])) for name, row in rows.items()} == {
        name: (child.nnz, child.grid.shape) for name, child in network.children.items()
    }
    assert {row["dtype"] for row in rows.values()} == {"F32"}
    totals = found["totals"]
    assert (totals["kept"], totals["covered"]) == (network.nnz, network.numel)
    assert totals["density"] == pytest.approx(network.density)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert (totals["file_bytes"], totals["bytes_per_kept"]) == (size, size / network.nnz)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    coded = sum(tensor.numel() for key, tensor in stored.items() if ".child_tuning_code." in key)
    assert (totals["index_bytes"], totals["index_bytes_per_kept"]) == (coded, coded / network.nnz)
    assert {head["name"]: head["shape"] for head in found["heads"]} == {
        "classifier.weight": [2, 32],
        "classifier.bias": [2],
    }


def test_the_text_names_base_child_and_provenance(made, childtune):
    folders = made("bert")
    lines = dict(line.split("  ", 1) for line in childtune("inspect", folders.adapter).stdout.splitlines()[:7])
    facts = {name: value.strip() for name, value in lines.items()}
    assert facts["base"] == str(folders.base)
    assert facts["child"] == "task_driven, score fisher, density 0.2, scope global, granularity element"
    assert facts["chosen by"].startswith("fisher, 12 examples, mean loss ")
    assert facts["heads"] == "classifier.bias 2 F32, classifier.weight 2x32 F32"


def test_piped_a_tensor_is_a_line_without_colours_or_frames(made, childtune):
    result = childtune("inspect", made("bert").adapter)
    table = result.stdout.split("\n\n")[1].splitlines()
    names = list(json.loads((made("bert").adapter / "adapter_config.json").read_text())["child"])
    assert [line.split()[0] for line in table] == ["tensor", *names]
    assert len({len(line.split()) for line in table[1:]}) == 1
    assert result.stdout.isascii() and "\x1b" not in result.stdout
    assert all(line == line.rstrip() for line in result.stdout.splitlines())


def test_no_tensor_is_read_but_the_front_of_each_code(made, childtune, monkeypatch):
    def refuse(self, key):
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(Artifact, "tensor", refuse)
    assert childtune("inspect", made("gpt2").adapter).exit_code == 0


def test_codings_and_kinds_of_children_are_named(childtune, tmp_path):
    for options, coding in (
        ({"mode": "task_free", "score": "random"}, "seeded"),
        ({"mode": "task_free", "resample": True}, "resampled"),
    ):
        folder = tmp_path / coding
        base = FAMILIES["llama"].build()
        config = ChildTuningConfig(target_modules=["up_proj"], density=0.25, **options)
        add_noise(get_peft_model(base, config)).save_pretrained(folder)
        found = json.loads(childtune("inspect", folder, "--json").stdout)
        assert {row["coding"] for row in found["tensors"]} == {coding}
        assert "the seed alone" in childtune("inspect", folder).stdout


def test_names_that_would_steer_a_terminal_are_written_out(made, childtune, tmp_path):
    shutil.copytree(made("bert").adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["evil\x1b[31m\nname"] = tensors["base_model.model.classifier.bias"].clone()
    tensors["base_model.model.[bold]a.child_tuning_code.weight"] = tensors.pop(
        next(key for key in tensors if "child_tuning_code" in key)
    )
    save_file(tensors, path)
    for command in ("inspect", "verify"):
        result = childtune(command, tmp_path / "adapter")
        assert "\x1b" not in result.stdout + result.stderr


def test_a_code_without_a_sound_header_is_damaged(made, childtune, tmp_path):
    shutil.copytree(made("bert").adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "child_tuning_code" in key)
    tensors[key][0] = 0
    save_file(tensors, path)
    result = childtune("inspect", tmp_path / "adapter")
    assert result.exit_code == 1
    assert "magic" in result.stderr
