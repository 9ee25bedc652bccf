"""Every way in which PEFT's users load an adapter gives the same model, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
import warnings

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

from peft_childtune import ChildTuningConfig, get_child_network, get_deltas
from tests.contract.families import (
    FAMILIES,
    add_noise,
    base_state,
    output,
    same_bits,
    snapshot,
    train,
    with_two_adapters,
    wrap,
)

AUTO_PEFT = {
    "bert": AutoPeftModelForSequenceClassification,
    "gpt2": AutoPeftModelForCausalLM,
    "llama": AutoPeftModelForCausalLM,
    "t5": AutoPeftModelForSeq2SeqLM,
    "vit": AutoPeftModel,
}
EAGER = {"attn_implementation": "eager"}


def by_peft(saved, **options):
    return PeftModel.from_pretrained(saved.fresh(), saved.folder, **options)


def by_native(saved, **options):
    model = saved.fresh()
    model.load_adapter(str(saved.folder), **options)
    return model


def by_native_state_dict(saved):
    model = saved.fresh()
    tensors = load_file(saved.folder / "adapter_model.safetensors")
    model.load_adapter(adapter_state_dict=tensors, peft_config=PeftConfig.from_pretrained(str(saved.folder)))
    return model


def by_second_adapter(saved):
    model = add_noise(wrap(saved.fresh(), saved.family, score="random", seed=5), seed=7)
    model.load_adapter(saved.folder, adapter_name="second")
    model.set_adapter("second")
    return model


def by_second_native_adapter(saved):
    model = by_native(saved, adapter_name="first")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Already found a `peft_config` attribute"
        )  # what PEFT says to every second one
        model.load_adapter(str(saved.folder), adapter_name="second")
    model.set_adapter("second")
    return model


def by_injection(saved):
    config = PeftConfig.from_pretrained(str(saved.folder))
    model = inject_adapter_in_model(config, saved.fresh())
    tensors = load_file(saved.folder / "adapter_model.safetensors")
    # a model without PEFT's wrapper has names without its prefix
    set_peft_model_state_dict(model, {key.removeprefix("base_model.model."): t for key, t in tensors.items()})
    return model


def by_state_dict(saved):
    config = PeftConfig.from_pretrained(str(saved.folder))
    model = get_peft_model(saved.fresh(), config)
    set_peft_model_state_dict(model, load_file(saved.folder / "adapter_model.safetensors"))
    return model


def by_state_dict_into_an_untrained_adapter(saved):
    """As a `Trainer` resumes: the places exist already, for another child."""
    options = {"modules_to_save": ["classifier"]} if saved.family.name == "vit" else {}
    model = wrap(saved.fresh(), saved.family, score="random", **options)
    set_peft_model_state_dict(model, load_file(saved.folder / "adapter_model.safetensors"))
    return model


PATHS = {
    "PeftModel": by_peft,
    "low_cpu_mem_usage": lambda s: by_peft(s, low_cpu_mem_usage=True),
    "is_trainable": lambda s: by_peft(s, is_trainable=True),
    "trainable, low_cpu_mem_usage": lambda s: by_peft(s, is_trainable=True, low_cpu_mem_usage=True),
    "other name": lambda s: by_peft(s, adapter_name="other"),
    "autocast_adapter_dtype=False": lambda s: by_peft(s, autocast_adapter_dtype=False),
    "given config": lambda s: by_peft(s, config=PeftConfig.from_pretrained(str(s.folder))),
    "AutoPeftModel": lambda s: AUTO_PEFT[s.family.name].from_pretrained(str(s.folder), **EAGER),
    "AutoModel": lambda s: s.family.auto.from_pretrained(str(s.folder), **EAGER),
    "native": by_native,
    "native trainable": lambda s: by_native(s, is_trainable=True),
    "native low_cpu_mem_usage": lambda s: by_native(s, low_cpu_mem_usage=True),
    "native state dict": by_native_state_dict,
    "second": by_second_adapter,
    "native second": by_second_native_adapter,
    "merged": lambda s: by_peft(s).merge_and_unload(),
    "merged safely": lambda s: by_peft(s, low_cpu_mem_usage=True).merge_and_unload(safe_merge=True),
    "injection": by_injection,
    "state dict": by_state_dict,
    "state dict, resumed": by_state_dict_into_an_untrained_adapter,
    "pickle": lambda s: pickle.loads(pickle.dumps(by_peft(s))),
    "deepcopy": lambda s: copy.deepcopy(by_peft(s)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_load_path_answers_with_the_bits_of_the_model_that_was_saved(name, path, saved_adapter):
    saved = saved_adapter(name)
    model = PATHS[path](saved)
    assert same_bits(output(model, saved.batch), saved.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", ["PeftModel", "native", "low_cpu_mem_usage"])
def test_a_float32_adapter_on_a_low_precision_base_keeps_its_float32_deltas(path, dtype, saved_adapter):
    saved = saved_adapter("llama")
    tensors = load_file(saved.folder / "adapter_model.safetensors")
    base = saved.fresh(dtype=dtype)
    if path == "native":
        base.load_adapter(str(saved.folder))
        model = base
    else:
        model = PeftModel.from_pretrained(base, saved.folder, low_cpu_mem_usage=path == "low_cpu_mem_usage")
    output(model, saved.batch)
    key = saved.family.weight.replace(".weight", ".child_tuning_values.default.weight")
    loaded = model.get_parameter(key if path == "native" else f"base_model.model.{key}")
    stored = tensors["base_model.model." + saved.family.weight.replace(".weight", ".child_tuning_values.weight")]
    assert same_bits(loaded, stored)


@pytest.mark.parametrize("save_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_save_dtype_rounds_the_delta_and_nothing_else(name, save_dtype, tmp_path):
    family, dtype = FAMILIES[name], getattr(torch, save_dtype)
    model = add_noise(wrap(family.build(), family, save_dtype=save_dtype))
    before = get_deltas(model)
    model.save_pretrained(tmp_path)
    assert all(same_bits(delta.values, before[key].values) for key, delta in get_deltas(model).items())

    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    after = get_deltas(loaded)
    assert all(same_bits(after[key].values, before[key].values.to(dtype).float()) for key in before)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".child_tuning_values." in key:
                parameter.copy_(parameter.to(dtype))
    assert same_bits(output(loaded, family.batch()), output(model, family.batch()))
    native = family.build()
    native.load_adapter(str(tmp_path))
    assert same_bits(output(native, family.batch()), output(model, family.batch()))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_adapter_saved_without_safetensors_loads_to_the_same_bits(name, tmp_path):
    family = FAMILIES[name]
    model = add_noise(wrap(family.build(), family))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    assert same_bits(output(loaded, family.batch()), output(model, family.batch()))


def test_saving_creates_the_two_files_of_peft_and_nothing_else_beside_the_model_card(saved_adapter):
    saved = saved_adapter("bert")
    names = {path.name for path in saved.folder.iterdir()}
    assert names - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_saved_configuration_lists_every_covered_tensor_and_the_live_one_does_not(tmp_path):
    family = FAMILIES["bert"]
    model = wrap(family.build(), family, density=0.01)
    network = get_child_network(model)
    model.save_pretrained(tmp_path)
    listed = json.loads((tmp_path / "adapter_config.json").read_text())["child"]
    assert {name: sizes[0] for name, sizes in listed.items()} == {
        name: len(indices) for name, indices in network.indices.items()
    }
    assert [0, 0] in listed.values()  # a tensor with nothing kept is listed too
    assert model.peft_config["default"].child is None


def test_the_configuration_of_a_saved_adapter_reused_after_saving_starts_a_new_adapter(tmp_path):
    family = FAMILIES["gpt2"]
    model = wrap(family.build(), family, score="magnitude")
    config = model.peft_config["default"]
    model.save_pretrained(tmp_path)
    again = get_peft_model(family.build(), config)
    train(again, family.batches(), steps=1)  # a configuration that meant "load" would raise here
    assert get_child_network(again) == get_child_network(model)


def test_saving_an_adapter_without_a_child_is_refused(tmp_path):
    family = FAMILIES["bert"]
    model = get_peft_model(family.build(), ChildTuningConfig(task_type="SEQ_CLS", score="fisher"))
    with pytest.raises(RuntimeError, match="select_child_network"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("merged", [False, True])
def test_saving_a_merged_adapter_saves_the_same_bytes_as_an_unmerged_one(merged, saved_adapter, tmp_path):
    saved = saved_adapter("gpt2")
    model = by_peft(saved)
    if merged:
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (saved.folder / name).read_bytes()


@pytest.mark.parametrize("path", ["PeftModel", "second", "native", "low_cpu_mem_usage"])
def test_a_loaded_adapter_saves_the_same_tensors_again(path, saved_adapter, tmp_path):
    saved = saved_adapter("bert")
    model = PATHS[path](saved)
    if path == "second":
        model.save_pretrained(tmp_path, selected_adapters=["second"])
        folder = tmp_path / "second"
    else:
        model.save_pretrained(tmp_path)
        folder = tmp_path
    first = load_file(saved.folder / "adapter_model.safetensors")
    second = load_file(folder / "adapter_model.safetensors")
    assert {k.removeprefix("base_model.model.") for k in first} == {
        k.removeprefix("base_model.model.") for k in second
    }
    second = {f"base_model.model.{k.removeprefix('base_model.model.')}": v for k, v in second.items()}
    assert all(same_bits(first[key], second[key]) for key in first)


def test_a_trainable_loaded_adapter_trains_on_and_an_inference_one_is_frozen(saved_adapter):
    saved = saved_adapter("bert")
    assert not any(p.requires_grad for p in by_peft(saved).parameters())
    model = by_peft(saved, is_trainable=True)
    before = snapshot(saved.fresh())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".child_tuning_values." in n or ".modules_to_save." in n for n in trained)
    start = get_deltas(model)
    train(model, saved.family.batches(), steps=3)
    assert any(not same_bits(start[key].values, delta.values) for key, delta in get_deltas(model).items())
    assert all(same_bits(before[n], tensor) for n, tensor in base_state(model).items())


def test_get_peft_model_state_dict_round_trips_through_memory():
    family = FAMILIES["t5"]
    model = add_noise(wrap(family.build(), family))
    tensors = get_peft_model_state_dict(model)
    twin = wrap(family.build(), family, score="random", density=0.05)
    result = set_peft_model_state_dict(twin, tensors)
    assert not result.unexpected_keys
    assert get_child_network(twin) == get_child_network(model)
    assert same_bits(output(twin, family.batch()), output(model, family.batch()))


@pytest.mark.parametrize(
    "options",
    [{"granularity": "row"}, {"granularity": "column"}, {"granularity": "block"}, {"mode": "task_free"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_every_kind_of_child_survives_saving_and_native_loading(name, options, tmp_path):
    family = FAMILIES[name]
    model = add_noise(wrap(family.build(), family, **options, block_size=8))
    model.save_pretrained(tmp_path)
    native = family.build()
    native.load_adapter(str(tmp_path))
    assert same_bits(output(native, family.batch()), output(model, family.batch()))
    assert get_child_network(PeftModel.from_pretrained(family.build(), tmp_path)) == get_child_network(model)


def test_a_resampled_adapter_resumes_at_the_step_at_which_it_was_saved(tmp_path):
    family = FAMILIES["llama"]
    options = {"lr": 1e-2, "weight_decay": 0.0}

    def new():
        return wrap(family.build(), family, mode="task_free", resample=True)

    model = new()
    train(model, family.batches(), steps=3, **options)
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(family.build(), tmp_path, is_trainable=True)
    # a fresh optimizer on both sides, so that only the step of the mask can make a difference
    train(model, family.batches(), steps=2, **options)
    train(resumed, family.batches(), steps=2, **options)
    assert same_bits(output(resumed, family.batch()), output(model, family.batch()))
    restarted = new()
    set_peft_model_state_dict(restarted, load_file(tmp_path / "adapter_model.safetensors"))
    train(restarted, family.batches(), steps=2, **options)
    assert same_bits(output(restarted, family.batch()), output(model, family.batch()))


def test_the_state_dict_of_a_wrapped_model_brings_its_child_along():
    family = FAMILIES["llama"]
    options = {"score": "random", "scope": "tensor"}  # as many entries in each tensor, whatever the seed
    first = add_noise(wrap(family.build(), family, seed=1, **options))
    second = wrap(family.build(), family, seed=2, **options)
    output(second, family.batch())  # its own child is decoded by now
    assert get_child_network(first) != get_child_network(second)
    second.load_state_dict(first.state_dict())
    assert get_child_network(second) == get_child_network(first)
    assert same_bits(output(second, family.batch()), output(first, family.batch()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_wrapped_model_moved_to_another_dtype_still_merges_and_unmerges_exactly(dtype):
    family = FAMILIES["llama"]
    model = add_noise(wrap(family.build(), family, score="magnitude")).to(dtype)
    before = {name: tensor.clone() for name, tensor in base_state(model).items()}
    unmerged = output(model, family.batch())
    model.merge_adapter()
    assert same_bits(output(model, family.batch()), unmerged)
    model.unmerge_adapter()
    assert all(same_bits(before[name], tensor) for name, tensor in base_state(model).items())


def test_a_state_dict_handed_to_save_pretrained_is_left_as_it_was(tmp_path):
    """A gathered state dict is saved for one adapter after the other, and may be wanted for more."""
    model = with_two_adapters("gpt2")
    gathered = model.state_dict()
    names = set(gathered)
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert set(gathered) == names


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_embeddings_of_a_grown_vocabulary_can_be_saved_beside_the_child(name, tmp_path):
    family = FAMILIES[name]
    base = family.build()
    base.resize_token_embeddings(70, mean_resizing=False)
    model = add_noise(wrap(base, family, score="magnitude"))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    fresh = family.build()
    fresh.resize_token_embeddings(
        70, mean_resizing=False
    )  # new rows are random: the file must bring the others' values
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert same_bits(output(loaded, family.batch()), output(model, family.batch()))
