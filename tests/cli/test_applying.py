"""`childtune apply`: the very checkpoint that merging in memory gives, without a model in memory."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertModel

from peft_childtune import ChildTuningConfig
from peft_childtune.cli import applying
from tests.cli.conftest import tensors_in
from tests.contract.families import FAMILIES, add_noise, output, same_bits, wrap

_CASES = [(n, d) for n in ("bert", "gpt2", "llama", "vit") for d in (torch.float32, torch.bfloat16)]


def _same(first, second):
    return set(first) == set(second) and all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("name", "dtype"), _CASES)
def test_the_checkpoint_is_that_of_the_merged_model_bit_for_bit(made, childtune, tmp_path, name, dtype):
    folders = made(name, dtype)
    result = childtune("apply", folders.adapter, "--base", folders.base, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert _same(tensors_in(tmp_path / "out"), tensors_in(folders.merged))
    assert not _same(tensors_in(tmp_path / "out"), tensors_in(folders.base))


def test_the_files_are_divided_as_the_bases_are(made, childtune, tmp_path):
    folders = made("gpt2")
    childtune("apply", folders.adapter, "--base", folders.base, "-o", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in folders.base.iterdir())
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((folders.base / index).read_text())
    assert (tmp_path / "out" / "config.json").read_bytes() == (folders.base / "config.json").read_bytes()


def test_the_result_loads_and_answers_as_the_adapter_does(made, childtune, tmp_path):
    folders = made("llama", torch.bfloat16)
    childtune("apply", folders.adapter, "--base", folders.base, "-o", tmp_path / "out")
    adapted = PeftModel.from_pretrained(folders.load(folders.base), folders.adapter)
    batch = folders.family.batch(5)
    assert torch.equal(output(folders.load(tmp_path / "out"), batch), output(adapted, batch))


def _encoder_and_adapter(folder, labels):
    """Save a bare encoder and an adapter of it with a new head; return the adapted model."""
    base = FAMILIES["bert"].build()
    base.bert.save_pretrained(folder / "encoder")
    torch.manual_seed(7)
    fresh = AutoModelForSequenceClassification.from_pretrained(folder / "encoder", num_labels=labels)
    model = add_noise(wrap(fresh, FAMILIES["bert"], score="magnitude"))
    model.save_pretrained(folder / "adapter")
    return model.eval()


@pytest.mark.parametrize("labels", [2, 3])
def test_a_new_head_on_a_bare_encoder_makes_the_checkpoint_of_a_classifier(childtune, tmp_path, labels):
    model = _encoder_and_adapter(tmp_path, labels)
    result = childtune("apply", tmp_path / "adapter", "--base", tmp_path / "encoder", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = {k: v for k, v in FAMILIES["bert"].batch(2).items() if k != "labels"}
    assert torch.equal(output(loaded, batch), output(model, batch))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert _same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "merged"))


def test_the_bases_precision_is_kept(made, childtune, tmp_path):
    folders = made("bert")
    folders.load(folders.base).to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    result = childtune("apply", folders.adapter, "--base", tmp_path / "narrow", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    narrow = folders.load(tmp_path / "narrow", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(narrow, folders.adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert _same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "merged"))


def test_a_resampled_child_is_merged_whole(made, childtune, tmp_path):
    folders = made("llama")
    options = {"mode": "task_free", "resample": True, "score": "fisher"}
    model = add_noise(wrap(folders.load(folders.base), folders.family, **options))
    model.save_pretrained(tmp_path / "adapter")
    childtune("apply", tmp_path / "adapter", "--base", folders.base, "-o", tmp_path / "out")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert _same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "merged"))


def test_a_tied_weight_that_is_stored_twice_is_edited_twice(made, childtune, tmp_path):
    folders = made("gpt2")
    base = folders.load(folders.base)
    base.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    stored["lm_head.weight"] = stored["transformer.wte.weight"].clone()
    save_file(stored, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    config = ChildTuningConfig(target_modules=["transformer.wte"], score="magnitude", density=0.1)
    model = add_noise(get_peft_model(folders.load(tmp_path / "base"), config))
    model.save_pretrained(tmp_path / "adapter")
    result = childtune("apply", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    batch = folders.family.batch(1)
    assert torch.equal(output(folders.load(tmp_path / "out"), batch), output(model, batch))


def test_another_base_is_refused_before_anything_is_written(made, childtune, tmp_path):
    folders = made("bert")
    other = folders.load(folders.base)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.mul_(1.01)
    other.save_pretrained(tmp_path / "other")
    result = childtune("apply", folders.adapter, "--base", tmp_path / "other", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "bert.encoder.layer.1.output.dense.weight" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_folder_with_something_in_it_is_refused(made, childtune, tmp_path):
    folders = made("bert")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    result = childtune("apply", folders.adapter, "--base", folders.base, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "not an empty folder" in result.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_failure_half_way_leaves_nothing(made, childtune, tmp_path, monkeypatch):
    folders = made("bert")
    rewrite, calls = applying.rewrite_shard, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", "somewhere")
        return rewrite(*args, **kwargs)

    monkeypatch.setattr(applying, "rewrite_shard", failing)
    result = childtune("apply", folders.adapter, "--base", folders.base, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == "childtune: somewhere: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_adapter_is_not_applied(made, childtune, tmp_path):
    folders = made("bert")
    shutil.copytree(folders.adapter, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    result = childtune("apply", tmp_path / "adapter", "--base", folders.base, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_filled_with_the_permissions_of_new_folders(made, childtune, tmp_path):
    folders = made("bert")
    (tmp_path / "out").mkdir()
    childtune("apply", folders.adapter, "--base", folders.base, "-o", tmp_path / "out")
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "out").iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_tokenizer_files_come_along_and_other_weights_do_not(made, childtune, tmp_path):
    folders = made("bert")
    shutil.copytree(folders.base, tmp_path / "base")
    for name in ("tokenizer.json", "vocab.txt", "pytorch_model.bin", "model.onnx"):
        (tmp_path / "base" / name).write_text(name)
    childtune("apply", folders.adapter, "--base", tmp_path / "base", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "vocab.txt"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_a_model_without_its_task_head_takes_the_adapter_of_one_that_has_it(made, childtune, tmp_path):
    folders = made("bert")
    base = BertModel.from_pretrained(folders.base)
    model = add_noise(get_peft_model(base, ChildTuningConfig(score="magnitude", density=0.1)))
    model.save_pretrained(tmp_path / "adapter")
    result = childtune("apply", tmp_path / "adapter", "--base", folders.base, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = tensors_in(tmp_path / "merged")
    applied = tensors_in(tmp_path / "out")
    assert all(same_bits(applied[f"bert.{name}"], tensor) for name, tensor in merged.items())
