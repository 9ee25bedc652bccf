"""`childtune verify`: 0 sound, 1 damaged or another base, 2 could not be checked."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertModel

from peft_childtune import ChildTuningConfig
from tests.contract.families import FAMILIES, add_noise, wrap


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_a_sound_adapter_fits_its_base(made, childtune, name, dtype):
    folders = made(name, dtype)
    result = childtune("verify", folders.adapter, "--base", folders.base)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"sound, {len(_config(folders.adapter)['child'])} tensors" in result.stdout
    assert f"It fits {folders.base}." in result.stdout


def _config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_without_a_base_it_says_that_none_was_compared(made, childtune):
    result = childtune("verify", made().adapter)
    assert result.exit_code == 0
    assert "No base was given" in result.stdout


def test_a_damaged_file_is_named_in_one_line(made, childtune, tmp_path):
    shutil.copytree(made().adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "child_tuning_values" in key)
    tensors[key][0] += 1
    save_file(tensors, path)
    result = childtune("verify", tmp_path / "adapter")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("childtune: bert.encoder.layer.0.")
    assert result.stderr.count("\n") == 1


def test_a_file_that_is_cut_off_is_damaged_and_json_says_so(made, childtune, tmp_path):
    shutil.copytree(made().adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = childtune("verify", tmp_path / "adapter", "--base", made().base, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["sound"], found["fits_base"]) == (False, None)
    assert "not a sound safetensors file" in found["problems"][0]


def test_every_problem_of_the_file_is_named(made, childtune, tmp_path):
    shutil.copytree(made().adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    names = [name for name, sizes in config["child"].items() if sizes[0]][:2]
    for name in names:
        config["child"][name][0] += 1
    path.write_text(json.dumps(config))
    result = childtune("verify", tmp_path / "adapter", "--json")
    problems = json.loads(result.stdout)["problems"]
    assert result.exit_code == 1
    assert [problem.partition(":")[0] for problem in problems] == names


def test_a_field_of_the_configuration_that_was_changed_is_damage(made, childtune, tmp_path):
    shutil.copytree(made().adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"density": 0.2', '"density": 0.3'))
    result = childtune("verify", tmp_path / "adapter")
    assert result.exit_code == 1
    assert "adapter_config.json: its fields are not those" in result.stderr


def test_an_option_that_means_nothing_is_damage(made, childtune, tmp_path):
    shutil.copytree(made().adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"density": 0.2', '"density": 7'))
    result = childtune("verify", tmp_path / "adapter", "--json")
    assert result.exit_code == 1
    assert "density=7" in json.loads(result.stdout)["problems"][0]


def _scaled_base(made, tmp_path, name, tensor):
    folders = made(name)
    model = folders.load(folders.base)
    with torch.no_grad():
        model.get_parameter(tensor).mul_(1.01)
    model.save_pretrained(tmp_path / "other", max_shard_size="30KB")
    return folders.adapter, tmp_path / "other"


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_a_base_with_one_tensor_scaled_is_another_one(made, childtune, tmp_path, name):
    tensor = FAMILIES[name].weight
    adapter, other = _scaled_base(made, tmp_path, name, tensor)
    result = childtune("verify", adapter, "--base", other, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (found["sound"], found["fits_base"]) == (True, False)
    assert found["problems"][0].startswith(f"{tensor}: ")


def test_a_base_of_other_shapes_is_another_one(made, childtune, tmp_path):
    config = FAMILIES["llama"].config()
    config.intermediate_size = 64
    FAMILIES["llama"].auto.from_config(config).save_pretrained(tmp_path / "wide")
    result = childtune("verify", made("llama").adapter, "--base", tmp_path / "wide")
    assert result.exit_code == 1
    assert "the base tensor is of shape" in result.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_half_precision_fits(made, childtune, tmp_path, dtype):
    folders = made("gpt2")
    folders.load(folders.base).to(dtype).save_pretrained(tmp_path / "narrow")
    assert childtune("verify", folders.adapter, "--base", tmp_path / "narrow").exit_code == 0


def test_bfloat16_and_float16_cannot_be_compared(made, childtune, tmp_path):
    folders = made("gpt2", torch.bfloat16)
    folders.load(folders.base).to(torch.float16).save_pretrained(tmp_path / "half")
    result = childtune("verify", folders.adapter, "--base", tmp_path / "half", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 2
    assert (found["sound"], found["fits_base"]) == (True, None)
    assert len(found["unverified"]) == found["tensors"] == 24
    assert "23 more tensors cannot be compared" in result.stderr


def test_names_may_have_the_models_prefix_more_than_the_checkpoint(made, childtune, tmp_path):
    folders = made("bert")
    folders.load(folders.base).bert.save_pretrained(tmp_path / "encoder")
    assert childtune("verify", folders.adapter, "--base", tmp_path / "encoder").exit_code == 0


def test_names_may_have_the_models_prefix_less_than_the_checkpoint(made, childtune, tmp_path):
    folders = made("bert")
    base = BertModel.from_pretrained(folders.base)
    get_peft_model(base, ChildTuningConfig(score="magnitude", density=0.1)).save_pretrained(tmp_path / "adapter")
    assert childtune("verify", tmp_path / "adapter", "--base", folders.base).exit_code == 0


def test_old_names_of_norms_are_understood_as_transformers_does(made, childtune, tmp_path):
    folders = made("bert")
    folders.load(folders.base).save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    renamed = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in load_file(path).items()
    }
    assert any("gamma" in key for key in renamed)
    save_file(renamed, path, metadata={"format": "pt"})
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "old")  # transformers still reads it
    assert childtune("verify", folders.adapter, "--base", tmp_path / "old").exit_code == 0


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT's, of the target's name
def test_an_adapter_of_the_output_head_finds_the_embedding_that_it_is_tied_to(made, childtune, tmp_path):
    folders = made("gpt2")
    config = ChildTuningConfig(target_modules=["lm_head"], score="magnitude", density=0.1)
    model = add_noise(get_peft_model(folders.load(folders.base), config))
    model.save_pretrained(tmp_path / "adapter")
    assert "lm_head.weight" in _config(tmp_path / "adapter")["child"]
    assert childtune("verify", tmp_path / "adapter", "--base", folders.base).exit_code == 0


def test_a_tensor_that_the_base_does_not_have_is_named_with_the_way_out(made, childtune):
    result = childtune("verify", made("bert").adapter, "--base", made("llama").base)
    assert result.exit_code == 2
    assert result.stderr.startswith("childtune: bert.encoder.layer.0.")
    assert "PeftModel.from_pretrained" in result.stderr


@pytest.mark.parametrize("missing", ["folder", "config", "weights"])
def test_what_is_not_there_cannot_be_checked(made, childtune, tmp_path, missing):
    folder = tmp_path / "adapter"
    if missing != "folder":
        shutil.copytree(made().adapter, folder)
        (folder / {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}[missing]).unlink()
    result = childtune("verify", folder)
    assert result.exit_code == 2
    assert str(folder) in result.stderr
    assert result.stderr.count("\n") == 1


def test_pickled_weights_are_not_read(made, childtune, tmp_path):
    shutil.copytree(made().adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    result = childtune("verify", tmp_path / "adapter")
    assert result.exit_code == 2
    assert "never read" in result.stderr


def test_a_quantised_base_cannot_be_compared(made, childtune, tmp_path):
    folders = made("llama")
    folders.load(folders.base).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.0.mlp.up_proj.weight"] = stored["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(stored, path, metadata={"format": "pt"})
    result = childtune("verify", folders.adapter, "--base", tmp_path / "base")
    assert result.exit_code == 2
    assert "model.layers.0.mlp.up_proj.weight: is stored as I8" in result.stderr


def test_an_index_cannot_lead_out_of_its_folder(made, childtune, tmp_path):
    folders = made("llama")
    shutil.copytree(folders.base, tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "base").glob("*.safetensors"):
        path.rename(tmp_path / "elsewhere" / path.name)
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"../elsewhere/model-'))
    result = childtune("verify", folders.adapter, "--base", tmp_path / "base")
    assert result.exit_code == 2
    assert "elsewhere" in result.stderr


@pytest.mark.parametrize("damage", ["empty folder", "no such id", "cut off", "missing shard", "no weight map"])
def test_a_base_that_cannot_be_read_is_no_verdict(made, childtune, tmp_path, damage):
    folders, base = made("llama"), tmp_path / "base"
    if damage == "empty folder":
        base.mkdir()
    elif damage != "no such id":
        shutil.copytree(folders.base, base)
    if damage == "cut off":
        path = sorted(base.glob("*.safetensors"))[0]
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing shard":
        sorted(base.glob("*.safetensors"))[0].unlink()
    elif damage == "no weight map":
        (base / "model.safetensors.index.json").write_text("{}")
    result = childtune("verify", folders.adapter, "--base", "no/such" if damage == "no such id" else base)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_an_adapter_of_another_method_is_refused(made, childtune, tmp_path):
    shutil.copytree(made().adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace("CHILD_TUNING", "LORA"))
    result = childtune("verify", tmp_path / "adapter")
    assert result.exit_code == 1
    assert "'LORA'" in result.stderr


def test_no_more_than_one_tensor_of_the_base_is_asked_for_at_a_time(made, monkeypatch, childtune):
    from peft_childtune.cli.checkpoint import Checkpoint

    folders, asked, real = made("gpt2"), [], Checkpoint.tensor

    def tensor(self, key):
        asked.append(key)
        return real(self, key)

    monkeypatch.setattr(Checkpoint, "tensor", tensor)
    childtune("verify", folders.adapter, "--base", folders.base)
    assert sorted(asked) == sorted(_config(folders.adapter)["child"])


def test_a_resized_vocabulary_is_reported_as_not_sealed(made, childtune, tmp_path):
    folders = made("llama")
    base = folders.load(folders.base)
    base.resize_token_embeddings(70)
    model = wrap(base, folders.family, score="magnitude")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    result = childtune("verify", tmp_path / "adapter")
    assert result.exit_code == 0
    assert "model.embed_tokens.weight: is stored beside the child" in result.stderr
    applied = childtune("apply", tmp_path / "adapter", "--base", folders.base, "-o", tmp_path / "out")
    assert applied.exit_code == 1
    assert "merge_and_unload" in applied.stderr
