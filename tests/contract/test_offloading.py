"""Models that accelerate offloads to the CPU or a disk: the same bits as on a device, the same files, or an error."""

from __future__ import annotations

import copy
from pathlib import Path

import accelerate
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_childtune import ChildTuningConfig, get_child_network, get_deltas, select_child_network
from peft_childtune.errors import TargetError, UnsupportedError
from tests.contract.families import (
    FAMILIES,
    add_noise,
    config_of,
    differing,
    layers_in,
    output,
    same_bits,
    snapshot,
    train,
    wrap,
)

# as they come from accelerate and transformers themselves; PEFT asks models for all their attributes
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CHILD = {"score": "random", "density": 0.3}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT writes copies of offloaded files below the working directory


def to_cpu(model, **options):
    return accelerate.cpu_offload(model, execution_device="cpu", **options)


def to_disk(model, **options):
    return accelerate.disk_offload(model, "offloaded", execution_device="cpu", **options)


def dispatched(model, **options):
    """Return the model with everything on the disk, by a map of its children, as `device_map=` makes one."""
    inner, prefix = (model.base_model.model, "base_model.model.") if isinstance(model, PeftModel) else (model, "")
    places = {prefix + name: "disk" for name, _ in inner.named_children()}
    return accelerate.dispatch_model(model, places, offload_dir="offloaded", **options)


WAYS = {"cpu": to_cpu, "disk": to_disk, "device_map": dispatched}
ways = pytest.mark.parametrize("way", list(WAYS))


def plain(name="llama", **options):
    """Return a wrapped model, its delta noise, on a device."""
    family = FAMILIES[name]
    return add_noise(wrap(family.build(), family, **(CHILD | options)))


def offloaded(way, order, name="llama", **options):
    """Return the same model, offloaded after it was wrapped, or wrapped after its base was offloaded."""
    family = FAMILIES[name]
    if order == "wrapped_first":
        return WAYS[way](plain(name, **options))
    return add_noise(wrap(WAYS[way](family.build()), family, **(CHILD | options)))


orders = pytest.mark.parametrize("order", ["base_first", "wrapped_first"])


def is_all_away(model):
    """Return whether no base weight and no offloaded delta has stayed in memory, nor anything composed of them."""
    layers = layers_in(model)
    assert layers
    weights = [p for layer in layers for p in layer.get_base_layer().parameters()]
    return all(p.is_meta for p in weights) and not any(layer._compose_cache._kept for layer in layers)


@ways
@orders
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_an_offloaded_model_answers_the_bits_of_one_on_a_device(way, order, name):
    batch = FAMILIES[name].batch()
    expected = output(plain(name), batch)
    model = offloaded(way, order, name)
    assert is_all_away(model)
    assert same_bits(output(model, batch), expected)
    assert is_all_away(model)
    assert same_bits(output(model, batch), expected)


@ways
def test_a_convolution_answers_the_same_bits_offloaded_with_and_without_gradients(way):
    def build():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
        config = ChildTuningConfig(target_modules=["0", "1"], **CHILD)
        return add_noise(get_peft_model(base, config))

    x = torch.randn(2, 3, 6, 6)
    expected = build()(x).detach()
    model = WAYS[way](build())
    assert same_bits(model(x), expected)
    with torch.no_grad():
        assert same_bits(model(x), expected)


@ways
@orders
def test_generation_disabling_and_switching_work_offloaded(way, order):
    family = FAMILIES["llama"]

    def with_two(model):
        model.add_adapter("two", config_of(family, seed=5))
        return add_noise(model, "two", seed=2)

    batch, reference = family.batch(), with_two(plain())
    if order == "base_first":
        model = with_two(offloaded(way, order))
    else:
        model = WAYS[way](with_two(plain()))
    prompt = {"input_ids": batch["input_ids"], "max_new_tokens": 5, "do_sample": False}
    for names in ("default", "two", ["two", "default"]):
        for one in (model, reference):
            one.base_model.set_adapter(names)
        assert same_bits(output(model, batch), output(reference, batch))
    assert torch.equal(model.generate(**prompt), reference.generate(**prompt))
    with model.disable_adapter(), reference.disable_adapter():
        assert same_bits(output(model, batch), output(reference, batch))
    assert is_all_away(model)


@ways
@orders
def test_offloaded_weights_merge_and_come_back_bit_for_bit(way, order):
    batch = FAMILIES["llama"].batch()
    reference = plain()
    expected = output(reference, batch)
    model = offloaded(way, order)
    with reference.disable_adapter():
        base = output(reference, batch)
    model.merge_adapter()
    assert is_all_away(model)
    assert same_bits(output(model, batch), expected)
    model.unmerge_adapter()
    assert same_bits(output(model, batch), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert same_bits(output(model, batch), base)
    assert same_bits(output(model, batch), expected)
    assert same_bits(output(model.merge_and_unload(safe_merge=True), batch), expected)


@ways
@pytest.mark.parametrize(
    ("order", "name"),
    # no head with an offloaded base: PEFT copies it with its hook, so noise written to it would be no part of it
    [("base_first", "llama"), ("wrapped_first", "llama"), ("wrapped_first", "bert")],
)
def test_an_offloaded_adapter_is_saved_whole_also_while_it_is_merged(way, order, name):
    plain(name).save_pretrained("expected")
    expected = load_file("expected/adapter_model.safetensors")
    model = offloaded(way, order, name)
    for state in ("unmerged", "merged"):
        if state == "merged":
            model.merge_adapter()
        model.save_pretrained(state)
        saved = load_file(f"{state}/adapter_model.safetensors")
        assert set(saved) == set(expected)
        assert [key for key in expected if not same_bits(saved[key], expected[key])] == []


@pytest.mark.parametrize("options", [{}, {"offload_buffers": True}], ids=["values", "values_and_codes"])
def test_children_deltas_and_weights_of_an_offloaded_model_can_be_read(options):
    reference = plain()
    model = to_disk(plain(), **options)
    assert get_child_network(model).digest() == get_child_network(reference).digest()
    expected = get_deltas(reference)
    found = get_deltas(model)
    assert [name for name in expected if not same_bits(found[name].values, expected[name].values)] == []
    assert [name for name in expected if not torch.equal(found[name].indices, expected[name].indices)] == []
    for one, other in zip(layers_in(model), layers_in(reference), strict=True):
        assert same_bits(one.weight, other.weight)
    assert same_bits(output(model, FAMILIES["llama"].batch()), output(reference, FAMILIES["llama"].batch()))


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_a_saved_adapter_loads_onto_an_offloaded_base(saved_adapter, way, name):
    saved = saved_adapter(name)
    model = PeftModel.from_pretrained(WAYS[way](saved.fresh()), saved.folder)
    assert same_bits(output(model, saved.batch), saved.logits)
    with model.disable_adapter():
        assert same_bits(output(model, saved.batch), saved.base_logits)


def from_disk(saved):
    """Return the base as transformers loads it with a `device_map` that has it on the disk, but for a head."""
    names = [name for name, _ in saved.fresh().named_children()]
    places = {name: "cpu" if name == "classifier" else "disk" for name in names}
    base = saved.fresh(device_map=places, offload_folder="offloaded")
    assert base.get_input_embeddings().weight.is_meta
    return base, {f"base_model.model.{name}": place for name, place in places.items()}


def test_an_adapter_in_bfloat16_is_verified_when_peft_dispatches_the_model_again(saved_adapter):
    saved = saved_adapter("llama")
    model = add_noise(wrap(saved.fresh(), saved.family, save_dtype="bfloat16", **CHILD))
    model.save_pretrained("rounded")
    expected = output(PeftModel.from_pretrained(saved.fresh(), "rounded"), saved.batch)
    base, places = from_disk(saved)
    model = PeftModel.from_pretrained(base, "rounded", device_map=places, offload_dir="again")
    assert same_bits(output(model, saved.batch), expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_peft_dispatches_a_loaded_adapter_again_with_the_base_that_transformers_offloaded(saved_adapter, name):
    saved = saved_adapter(name)
    base, places = from_disk(saved)
    model = PeftModel.from_pretrained(base, saved.folder, device_map=places, offload_dir="again")
    assert is_all_away(model)
    assert same_bits(output(model, saved.batch), saved.logits)
    model.merge_adapter()
    assert same_bits(output(model, saved.batch), saved.logits)
    model.unmerge_adapter()
    model.save_pretrained("out")
    first, second = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (saved.folder, "out"))
    assert set(first) == set(second) and [key for key in first if not same_bits(first[key], second[key])] == []
    assert same_bits(output(model.merge_and_unload(), saved.batch), saved.logits)


def test_an_adapter_of_another_base_is_refused_when_peft_dispatches_the_model_again(saved_adapter, tmp_path):
    saved = saved_adapter("llama")
    saved.family.build(seed=1).save_pretrained("other")
    base = saved.family.auto.from_pretrained(
        "other", device_map={"model": "disk", "lm_head": "disk"}, offload_folder="o"
    )
    places = {"base_model.model.model": "disk", "base_model.model.lm_head": "disk"}
    with pytest.raises(ValueError, match="the base weights differ from those that the adapter was made for"):
        PeftModel.from_pretrained(base, saved.folder, device_map=places, offload_dir="again")


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_an_adapter_of_another_base_is_refused_on_an_offloaded_one(saved_adapter, way):
    saved = saved_adapter("llama")
    with pytest.raises(ValueError, match="the base weights differ from those that the adapter was made for"):
        PeftModel.from_pretrained(WAYS[way](saved.family.build(seed=1)), saved.folder)


def tied_base():
    torch.manual_seed(0)
    config = FAMILIES["llama"].config()
    config.tie_word_embeddings = True
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def with_embeddings(base):
    options = {"target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"}
    return add_noise(get_peft_model(base, ChildTuningConfig(**options, **CHILD)))


@pytest.mark.parametrize("on_device", [[], ["model"], ["lm_head"]], ids=["none", "leader", "follower"])
@pytest.mark.parametrize("order", ["base_first", "wrapped_first"])
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
def test_tied_weights_that_accelerate_parts_stay_one_weight(order, on_device):
    def dispatch(model, prefix=""):
        places = {prefix + name: "cpu" if name in on_device else "disk" for name in ("model", "lm_head")}
        return accelerate.dispatch_model(model, places, offload_dir="offloaded")

    batch = FAMILIES["llama"].batch()
    base, expected = output(tied_base(), batch), output(with_embeddings(tied_base()), batch)
    if order == "base_first":
        model = with_embeddings(dispatch(tied_base()))
    else:
        model = dispatch(with_embeddings(tied_base()), "base_model.model.")
    assert same_bits(output(model, batch), expected)
    model.merge_adapter()
    assert same_bits(output(model, batch), expected)
    with model.disable_adapter():
        assert same_bits(output(model, batch), base)
    assert same_bits(output(model, batch), expected)
    assert same_bits(output(model.merge_and_unload(), batch), expected)


@ways
@pytest.mark.parametrize("options", [{}, {"mode": "task_free", "score": None, "resample": True}], ids=["fixed", "F"])
def test_deltas_on_a_device_train_over_an_offloaded_base_as_over_one_on_the_device(way, options):
    family = FAMILIES["llama"]
    given = {key: value for key, value in (CHILD | options).items() if value is not None}
    before = snapshot(family.build())
    reference = wrap(family.build(), family, **given)
    model = wrap(WAYS[way](family.build()), family, **given)
    train(reference, family.batches(), steps=3)
    train(model, family.batches(), steps=3)
    trained = get_deltas(reference)
    assert any(bool(delta.values.any()) for delta in trained.values())
    assert [n for n, delta in get_deltas(model).items() if not same_bits(delta.values, trained[n].values)] == []
    with model.disable_adapter():
        base = family.build()
        assert differing(base, before) == []
        assert same_bits(output(model, family.batch()), output(base, family.batch()))


@ways
def test_the_gradient_of_an_offloaded_delta_raises_rather_than_be_lost(way):
    family = FAMILIES["llama"]
    model = offloaded(way, "wrapped_first")
    loss = model.train()(**family.batch()).loss
    with pytest.raises(UnsupportedError, match="its gradient would be lost"):
        loss.backward()


def test_a_delta_on_a_device_with_an_offloaded_code_is_not_trained():
    family = FAMILIES["llama"]
    model = wrap(family.build(), family, **CHILD)
    path = next(name for name, module in model.named_modules() if name.endswith("q_proj"))
    layer = model.get_submodule(path)
    accelerate.cpu_offload(layer.child_tuning_code["default"], execution_device="cpu", offload_buffers=True)
    accelerate.cpu_offload(layer.base_layer, execution_device="cpu")
    with pytest.raises(UnsupportedError, match="a child that accelerate has offloaded"):
        model.train()(**family.batch())
    assert same_bits(output(model, family.batch()), output(wrap(family.build(), family, **CHILD), family.batch()))


@pytest.mark.parametrize("kind", ["LlamaDecoderLayer", "Linear"])
def test_weights_that_only_a_module_above_brings_in_are_run_and_else_refused_by_name(kind):
    family = FAMILIES["llama"]
    expected = output(plain(), family.batch())
    model = to_disk(plain(), preload_module_classes=[kind])
    assert same_bits(output(model, family.batch()), expected)
    calls = {
        "train": model.train,
        "merge": model.merge_adapter,
        "save": lambda: model.save_pretrained("out"),
        "deltas": lambda: get_deltas(model),
        "select": lambda: select_child_network(model, network=get_child_network(plain())),
    }
    for call in calls.values():
        with pytest.raises(UnsupportedError, match="on the meta device, and no hook of accelerate's"):
            call()
    assert same_bits(output(model, family.batch()), expected)


@pytest.mark.parametrize("order", ["base_first", "wrapped_first"])
def test_offloaded_weights_cannot_be_scored_but_take_a_given_child(order):
    family = FAMILIES["llama"]
    child = get_child_network(plain())
    if order == "base_first":
        with pytest.raises(TargetError, match="cannot be scored"):
            wrap(to_disk(family.build()), family, score="magnitude")
        model = get_peft_model(to_disk(family.build()), ChildTuningConfig(task_type="CAUSAL_LM", density=0.3))
        assert select_child_network(model, network=child).digest() == child.digest()
        assert same_bits(output(add_noise(model), family.batch()), output(plain(), family.batch()))
        return
    model = to_disk(wrap(family.build(), family, **CHILD))
    with pytest.raises(UnsupportedError, match="no child or delta can be put there"):
        select_child_network(model, network=child)


def test_a_checkpoint_is_not_loaded_into_an_offloaded_adapter():
    model = plain()
    model.save_pretrained("saved")
    model = to_disk(model)
    with pytest.raises(UnsupportedError, match="no child or delta can be put there"):
        model.load_adapter("saved", "default")
    model.load_adapter("saved", "again")
    model.set_adapter("again")
    assert same_bits(output(model, FAMILIES["llama"].batch()), output(plain(), FAMILIES["llama"].batch()))


def test_a_model_that_accelerate_no_longer_offloads_can_be_wrapped():
    family = FAMILIES["llama"]
    base = to_cpu(family.build())
    accelerate.hooks.remove_hook_from_submodules(base)
    model = add_noise(wrap(base, family, **CHILD))
    assert same_bits(output(copy.deepcopy(model), family.batch()), output(plain(), family.batch()))


def test_a_compiled_offloaded_model_answers_what_one_on_a_device_does():
    def build():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
        return add_noise(get_peft_model(base, ChildTuningConfig(target_modules=["0", "1"], **CHILD))).eval()

    x = torch.randn(2, 4)
    torch.compiler.reset()
    with torch.no_grad():
        assert same_bits(torch.compile(to_cpu(build()), backend="eager")(x), build()(x))
