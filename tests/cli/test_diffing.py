"""`childtune diff`: a full fine-tune as an adapter: exactly, or the largest part of what changed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from peft_childtune import get_child_network, get_deltas
from tests.cli.conftest import fine_tune_, tensors_in
from tests.contract.families import FAMILIES, output, same_bits

_CASES = [(n, d) for n in ("bert", "gpt2", "llama") for d in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), _CASES)
def test_an_exact_diff_gives_the_very_fine_tune(made, childtune, tmp_path, name, dtype):
    folders = made(name, dtype)
    result = childtune("diff", folders.base, folders.tuned, "-o", tmp_path / "out", "--exact")
    assert result.exit_code == 0, result.stderr
    tuned = folders.load(folders.tuned)
    adapted = PeftModel.from_pretrained(folders.load(folders.base), tmp_path / "out").eval()
    batch = folders.family.batch(4)
    assert torch.equal(output(adapted, batch), output(tuned, batch))
    merged = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(merged[key], tensor) for key, tensor in tuned.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_an_exact_diff_keeps_what_changed_and_nothing_else(made, childtune, tmp_path, name):
    folders = made(name)
    childtune("diff", folders.base, folders.tuned, "-o", tmp_path / "out", "--exact")
    base, tuned = folders.load(folders.base), folders.load(folders.tuned)
    model = PeftModel.from_pretrained(folders.load(folders.base), tmp_path / "out")
    changed = {
        key: (p.detach() != tuned.get_parameter(key).detach()).flatten().nonzero().flatten().tolist()
        for key, p in base.named_parameters()
        if not key.startswith("classifier")
    }
    found = {key: at.tolist() for key, at in get_child_network(model).indices.items()}
    assert {k: v for k, v in found.items() if v} == {k: v for k, v in changed.items() if v}


def test_settings_that_an_adapter_does_not_hold_are_named(made, childtune, tmp_path):
    folders = made("bert")
    silent = childtune("diff", folders.base, folders.tuned, "-o", tmp_path / "one", "--exact")
    shutil.copytree(folders.tuned, tmp_path / "tuned")
    path = tmp_path / "tuned" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "relu", "hidden_dropout_prob": 0.3}))
    told = childtune("diff", folders.base, tmp_path / "tuned", "-o", tmp_path / "two", "--exact")
    assert (silent.exit_code, "settings" in silent.stderr) == (0, False)
    assert (told.exit_code, "differ in hidden_act (gelu and relu): an adapter" in told.stderr) == (0, True)


def test_diff_and_apply_bring_back_the_fine_tuned_checkpoint(made, childtune, tmp_path):
    folders = made("llama", torch.bfloat16)
    childtune("diff", folders.base, folders.tuned, "-o", tmp_path / "adapter", "--exact")
    assert childtune("verify", tmp_path / "adapter", "--base", folders.base).exit_code == 0
    childtune("apply", tmp_path / "adapter", "--base", folders.base, "-o", tmp_path / "out")
    applied, tuned = tensors_in(tmp_path / "out"), tensors_in(folders.tuned)
    assert set(applied) == set(tuned)
    assert all(torch.equal(applied[key], tuned[key]) for key in tuned)


def test_a_density_keeps_the_largest_deltas_of_the_blocks(made, childtune, tmp_path):
    folders = made("gpt2")
    result = childtune("diff", folders.base, folders.tuned, "-o", tmp_path / "out", "--density", 0.05)
    assert result.exit_code == 0, result.stderr
    base, tuned = folders.load(folders.base), folders.load(folders.tuned)
    inside = [key for key, _ in base.named_parameters() if ".h." in key]
    delta = torch.cat([(tuned.get_parameter(k) - base.get_parameter(k)).detach().flatten() for k in inside])
    kept = round(0.05 * delta.numel())
    largest = delta.abs().argsort(descending=True)[:kept].sort().values
    model = PeftModel.from_pretrained(folders.load(folders.base), tmp_path / "out")
    found = get_deltas(model)
    flat = torch.cat([found[key].to_dense().flatten() for key in inside])
    assert torch.equal(flat.nonzero().flatten(), largest)
    assert torch.equal(flat[largest], delta[largest])


def test_a_density_above_what_changed_keeps_what_changed(made, childtune, tmp_path):
    folders = made("gpt2")
    result = childtune("diff", folders.base, folders.tuned, "-o", tmp_path / "out", "--density", 0.9)
    base, tuned = folders.load(folders.base), folders.load(folders.tuned)
    changed = sum(int((p != tuned.get_parameter(key)).sum()) for key, p in base.named_parameters() if ".h." in key)
    model = PeftModel.from_pretrained(folders.load(folders.base), tmp_path / "out")
    assert get_child_network(model).nnz == changed
    assert f"{changed:,} covered weights by the fine-tune" in result.stdout


def test_changes_outside_of_the_covered_tensors_are_warned_of(made, childtune, tmp_path):
    folders = made("gpt2")
    result = childtune("diff", folders.base, folders.tuned, "-o", tmp_path / "out", "--density", 0.05)
    assert result.stderr.count("\n") == 1
    assert "transformer.wte.weight, transformer.wpe.weight, transformer.ln_f.weight" in result.stderr
    assert "3 tensors outside of the covered ones differ" in result.stderr


def test_a_head_of_another_shape_is_stored_whole(made, childtune, tmp_path):
    folders = made("bert")
    tuned = AutoModelForSequenceClassification.from_pretrained(
        folders.base, num_labels=5, ignore_mismatched_sizes=True, attn_implementation="eager"
    )
    with torch.no_grad():
        tuned.bert.encoder.layer[0].output.dense.weight.mul_(1.125)
    tuned.eval().save_pretrained(tmp_path / "tuned")
    result = childtune("diff", folders.base, tmp_path / "tuned", "-o", tmp_path / "out", "--exact")
    assert result.exit_code == 0, result.stderr
    assert "whole    classifier\n" in result.stdout
    fresh = AutoModelForSequenceClassification.from_pretrained(
        folders.base, num_labels=5, ignore_mismatched_sizes=True, attn_implementation="eager"
    )
    adapted = PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    batch = {k: v for k, v in folders.family.batch(2).items() if k != "labels"}
    assert torch.equal(output(adapted, batch), output(tuned, batch))


def test_a_classifier_of_a_bare_encoder_keeps_its_new_head(childtune, tmp_path):
    tuned = FAMILIES["bert"].build(seed=1)
    encoder = FAMILIES["bert"].build().bert
    encoder.load_state_dict(tuned.bert.state_dict())
    encoder.save_pretrained(tmp_path / "encoder")
    fine_tune_(tuned).save_pretrained(tmp_path / "tuned")
    result = childtune("diff", tmp_path / "encoder", tmp_path / "tuned", "-o", tmp_path / "out", "--exact")
    assert result.exit_code == 0, result.stderr
    fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", attn_implementation="eager")
    adapted = PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    batch = FAMILIES["bert"].batch(2)
    assert torch.equal(output(adapted, batch), output(tuned, batch))
    assert childtune("verify", tmp_path / "out", "--base", tmp_path / "encoder").exit_code == 0


def test_a_change_that_float32_cannot_hold_is_named_and_nothing_is_made(made, childtune, tmp_path):
    folders = made("llama")
    for name, entries in (("base", [1.0, 0.5]), ("tuned", [1e-12, 1.0])):
        model = folders.load(folders.base)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, :2] = torch.tensor(entries)
        model.save_pretrained(tmp_path / name)
    result = childtune("diff", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "out", "--exact")
    assert result.exit_code == 1
    # 1.0 to 1e-12 takes a delta of forty bits; 0.5 to 1.0 takes one bit
    assert "model.layers.0.mlp.up_proj.weight: 1 entries, error up to 1e-12" in result.stderr
    assert "1 of 2 changed entries" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_the_density_that_the_refusal_names_keeps_everything(made, childtune, tmp_path):
    folders = made("llama")
    tuned = fine_tune_(folders.load(folders.base))
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.mul_(-1e-3)
    tuned.save_pretrained(tmp_path / "tuned")
    refused = childtune("diff", folders.base, tmp_path / "tuned", "-o", tmp_path / "out", "--exact")
    assert refused.exit_code == 1
    assert "--density" in refused.stderr
    made_anyway = childtune("diff", folders.base, tmp_path / "tuned", "-o", tmp_path / "out", "--density", 1)
    assert made_anyway.exit_code == 0
    assert "kept entries are off by at most" in made_anyway.stdout


def test_a_fine_tune_in_wider_precision_is_exact_on_the_base_in_that_precision(made, childtune, tmp_path):
    folders = made("llama", torch.bfloat16)
    tuned = fine_tune_(folders.load(folders.base, dtype=torch.float32))
    tuned.save_pretrained(tmp_path / "tuned")
    result = childtune("diff", folders.base, tmp_path / "tuned", "-o", tmp_path / "out", "--exact")
    assert result.exit_code == 0, result.stderr
    assert "load the base with dtype=torch.float32" in result.stderr
    base = folders.load(folders.base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    batch = folders.family.batch(4)
    assert torch.equal(output(adapted, batch), output(tuned, batch))
    assert childtune("verify", tmp_path / "out", "--base", folders.base).exit_code == 0


@pytest.mark.parametrize("option", [["--exact"], ["--density", 0.1]])
def test_the_same_model_twice_is_refused(made, childtune, tmp_path, option):
    folders = made("gpt2")
    result = childtune("diff", folders.base, folders.base, "-o", tmp_path / "out", *option)
    assert result.exit_code == 1
    assert "nothing to keep" in result.stderr
    assert not (tmp_path / "out").exists()


def test_models_of_different_types_are_refused(made, childtune, tmp_path):
    result = childtune("diff", made("gpt2").base, made("llama").tuned, "-o", tmp_path / "out", "--exact")
    assert result.exit_code == 1
    assert "is of type llama, the base of gpt2" in result.stderr


def test_an_enlarged_vocabulary_is_refused_with_the_way_out(made, childtune, tmp_path):
    folders = made("llama")
    tuned = folders.load(folders.base)
    tuned.resize_token_embeddings(70)
    tuned.save_pretrained(tmp_path / "tuned")
    result = childtune("diff", folders.base, tmp_path / "tuned", "-o", tmp_path / "out", "--exact")
    assert result.exit_code == 1
    assert "resize_token_embeddings" in result.stderr


@pytest.mark.parametrize("option", [["--exact"], ["--density", 0.1]], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(made, childtune, tmp_path, value, option):
    folders = made("llama")
    tuned = folders.load(folders.base)
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight[0, 0] = value
    tuned.save_pretrained(tmp_path / "tuned")
    result = childtune("diff", folders.base, tmp_path / "tuned", "-o", tmp_path / "out", *option)
    assert result.exit_code == 1
    assert "model.layers.1.mlp.up_proj.weight: an entry of the base or the fine-tune is not finite" in result.stderr


@pytest.mark.parametrize(
    "options", [[], ["--exact", "--density", "0.1"], ["--density", "0"], ["--density", "1.5"]], ids=str
)
def test_options_that_mean_nothing_are_wrong_usage(made, childtune, tmp_path, options):
    folders = made("gpt2")
    result = childtune("diff", folders.base, folders.tuned, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert "--density" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_said_to_be_unreadable(made, childtune, tmp_path):
    (tmp_path / "empty").mkdir()
    result = childtune("diff", made("gpt2").base, tmp_path / "empty", "-o", tmp_path / "out", "--exact")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["pipeline", "AutoTokenizer", "NoSuchModel", "os"])
def test_only_models_of_transformers_are_made(made, childtune, tmp_path, name):
    folders = made("gpt2")
    shutil.copytree(folders.tuned, tmp_path / "tuned")
    path = tmp_path / "tuned" / "config.json"
    path.write_text(path.read_text().replace("GPT2LMHeadModel", name))
    result = childtune("diff", folders.base, tmp_path / "tuned", "-o", tmp_path / "out", "--exact")
    assert result.exit_code == 2
    assert "names no model of transformers" in result.stderr


def test_the_configuration_says_where_the_adapter_came_from(made, childtune, tmp_path):
    folders = made("gpt2")
    childtune("diff", folders.base, folders.tuned, "-o", tmp_path / "out", "--density", 0.05)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders.base)
    assert config["selection"]["source"] == "diff"
    assert config["selection"]["kept"] == "the largest 0.05"
    assert "diff, the largest 0.05 of tuned" in childtune("inspect", tmp_path / "out").stdout


def test_entries_that_only_change_the_sign_of_zero_are_no_change(made, childtune, tmp_path):
    folders = made("llama")
    for name, zero in (("base", 0.0), ("tuned", -0.0)):
        model = folders.load(folders.base)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = zero
            model.model.layers[0].mlp.up_proj.weight[0, 1] = 1.0 if name == "base" else 2.0
        model.save_pretrained(tmp_path / name)
    result = childtune("diff", tmp_path / "base", tmp_path / "tuned", "-o", tmp_path / "out", "--exact")
    assert result.exit_code == 0, result.stderr
    assert "kept     1 of" in result.stdout
    merged = PeftModel.from_pretrained(folders.load(tmp_path / "base"), tmp_path / "out").merge_and_unload()
    assert not same_bits(merged.model.layers[0].mlp.up_proj.weight[0, :1], torch.tensor([-0.0]))
