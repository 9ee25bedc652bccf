"""A saved adapter is loaded whole and verified, or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_childtune import (
    BaseMismatchError,
    ChildNetwork,
    ChildTuningConfig,
    ChildTuningError,
    FormatError,
    IntegrityError,
    SelectionError,
    get_child_network,
    get_deltas,
    select_child_network,
    skip_verification,
)
from peft_childtune.tuner import ChildTuningLayer

_PATH = "base_model.model.layers"
_CODE, _VALUES = f"{_PATH}.0.fc.child_tuning_code.weight", f"{_PATH}.0.fc.child_tuning_values.weight"


def _saved(toy, folder, **options):
    options = {"score": "magnitude", "density": 0.25, "init_weights": False} | options
    torch.manual_seed(3)
    model = get_peft_model(toy(), ChildTuningConfig(modules_to_save=["head"], **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.5)
    model.save_pretrained(folder)
    return model


def _resave(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})


def _rewrite(folder, change):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _refused(toy, bits, folder, error, match=None, make=None):
    """Load onto a fresh base, expect the error, and expect the base to be as it was, to the bit and the flag."""
    base = (make or toy)()
    base.embed.weight.requires_grad_(False)
    before, flags = bits(base), [(n, p.requires_grad) for n, p in base.named_parameters()]
    with pytest.raises(error, match=match) as caught:
        PeftModel.from_pretrained(base, folder)
    assert bits(base) == before
    assert [(n, p.requires_grad) for n, p in base.named_parameters()] == flags
    assert not [m for m in base.modules() if isinstance(m, ChildTuningLayer)]
    assert not hasattr(base, "peft_config")
    return caught.value


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"score": "random"}, {"granularity": "row"}, {"mode": "task_free", "score": "fisher", "resample": True}],
    ids=["listed", "seeded", "rows", "resampled"],
)
def test_a_loaded_adapter_is_the_saved_one(toy, batches, tmp_path, low_cpu_mem_usage, trainable, options):
    saved = _saved(toy, tmp_path, **options)
    loaded = PeftModel.from_pretrained(
        toy(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=trainable
    ).eval()
    assert torch.equal(loaded(**batches[0]).logits, saved(**batches[0]).logits)
    assert get_child_network(loaded) == get_child_network(saved)
    for name, delta in get_deltas(saved).items():
        assert torch.equal(get_deltas(loaded)[name].values, delta.values)
    trained = [n for n, p in loaded.named_parameters() if p.requires_grad]
    if trainable:
        assert trained
        assert all("child_tuning_values" in n or "modules_to_save" in n for n in trained)
        loaded.train()(**batches[0]).loss.backward()
    else:
        assert trained == []
    assert not any("seal" in n for n in loaded.state_dict())


def test_every_flipped_byte_is_refused_and_nothing_stays_behind(toy, bits, tmp_path):
    _saved(toy, tmp_path, target_modules=["layers.0.fc"])
    path = tmp_path / "adapter_model.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for at in range(start, len(raw), 3):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(bytes(damaged))
        _refused(toy, bits, tmp_path, FormatError)
    path.write_bytes(raw)
    assert PeftModel.from_pretrained(toy(), tmp_path)


def _drop(part):
    def change(tensors):
        del tensors[next(n for n in tensors if part in n)]

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_drop("child_tuning_code.weight"), "child_tuning_code is missing"),
        (_drop("child_tuning_values.weight"), "child_tuning_values is missing"),
        (lambda t: (t.pop(_CODE), t.pop(_VALUES)), r"layers\.0\.fc\.weight"),
        (_drop("child_tuning_seal"), "0 seals"),
        (_drop("head.weight"), r"head\.weight"),
        (lambda t: t.update({f"{_PATH}.9.fc.child_tuning_values.weight": torch.zeros(2)}), r"layers\.9"),
        (lambda t: t.update({_VALUES: t[_VALUES][:-1]}), r"layers\.0\.fc\.weight"),
        (lambda t: t.update({_VALUES: t[_VALUES].flip(0)}), r"layers\.0\.fc\.weight"),
        (lambda t: t.update({_VALUES: t[_VALUES].bfloat16()}), r"layers\.0\.fc\.weight"),
        (lambda t: t.update({_CODE: torch.cat([t[_CODE], t[_CODE][:1]])}), r"layers\.0\.fc\.weight"),
        (lambda t: t.update({"base_model.model.head.weight": torch.zeros(3, 6)}), r"head\.weight"),
    ],
    ids=[
        "no code",
        "no values",
        "neither",
        "no seal",
        "no head",
        "one too many",
        "short values",
        "other order",
        "rounded",
        "long code",
        "other head",
    ],
)
def test_a_file_that_holds_something_else_is_refused_by_name(toy, bits, tmp_path, change, match):
    _saved(toy, tmp_path)
    _resave(tmp_path, change)
    _refused(toy, bits, tmp_path, IntegrityError, match)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["child"].update({"layers.0.fc.weight": [37, 4]}),
        lambda c: c["child"].update({"layers.0.fc.weight": [-1, 4]}),
        lambda c: c["child"].update({"layers.0.fc.weight": [2, 1 << 40]}),
        lambda c: c["child"].update({"layers.0.fc.weight": [2, 0]}),
        lambda c: c["child"].update({"layers.0.fc.weight": "many"}),
        lambda c: c["child"].update({"layers.0.fc.weight": [True, True]}),
        lambda c: c["child"].update({"layers.0.fc.weight": None}),
        lambda c: c["child"].update({"layers.0.fc.weight": [1, 9]}),
        lambda c: c["child"].pop("layers.0.fc.weight"),
        lambda c: c["child"].update({"layers.7.fc.weight": [1, 9]}),
        lambda c: c.update(child={}),
        lambda c: c.update(target_modules=["fc"]),
        lambda c: c.update(modules_to_save=None),
    ],
    ids=[
        "too many",
        "negative",
        "gigabytes",
        "no code",
        "text",
        "booleans",
        "null",
        "other count",
        "one missing",
        "one too many",
        "empty",
        "other targets",
        "no head",
    ],
)
def test_a_configuration_that_does_not_belong_to_the_file_is_refused(toy, bits, tmp_path, change):
    _saved(toy, tmp_path)
    _rewrite(tmp_path, change)
    _refused(toy, bits, tmp_path, FormatError)


@pytest.mark.parametrize("change", ["child", "touched", "untouched", "uncovered"])
def test_another_base_is_refused_and_what_the_adapter_does_not_touch_may_differ(toy, bits, tmp_path, change):
    saved = _saved(toy, tmp_path)
    kept = get_child_network(saved).indices["layers.1.fc.weight"].tolist()
    left = [i for i in range(36) if i not in kept]

    def other():
        base = toy()
        with torch.no_grad():
            if change == "uncovered":
                base.embed.weight += 1
            else:
                base.layers[1].fc.weight.view(-1)[kept[0] if change != "untouched" else left[0]] += 1e-3
        return base

    if change == "uncovered":
        assert PeftModel.from_pretrained(other(), tmp_path)
    else:
        _refused(toy, bits, tmp_path, BaseMismatchError, r"^layers\.1\.fc\.weight: ", make=other)


def test_a_base_in_half_precision_is_recognised(toy, bits, tmp_path):
    _saved(toy, tmp_path)
    loaded = PeftModel.from_pretrained(toy().to(torch.bfloat16), tmp_path)
    assert {p.dtype for n, p in loaded.named_parameters() if "child_tuning_values" in n} == {torch.float32}


@pytest.mark.parametrize("change", ["fewer blocks", "other shape", "no bias"])
def test_a_base_of_another_build_is_refused(toy, bits, tmp_path, change):
    def other():
        base = toy()
        if change == "fewer blocks":
            del base.layers[1]
        elif change == "other shape":
            base.layers[0].fc.weight = torch.nn.Parameter(torch.zeros(6, 3))
        else:
            base.layers[0].fc.bias = None
        return base

    _saved(toy, tmp_path)
    _refused(toy, bits, tmp_path, ChildTuningError, r"layers\.[01]", make=other)


def _with_another_head(toy):
    base = toy()
    base.head = torch.nn.Linear(6, 5)
    return base


def test_a_head_of_another_shape_is_refused_and_nothing_stays_behind(toy, bits, tmp_path):
    _saved(toy, tmp_path)
    _refused(
        toy,
        bits,
        tmp_path,
        BaseMismatchError,
        r"head\.weight: has the shape \(3, 6\) in the weights file, and \(5, 6\)",
        make=lambda: _with_another_head(toy),
    )


def test_a_head_of_another_shape_leaves_a_live_adapter_as_it_was(toy, batches, bits, tmp_path):
    live = _saved(toy, tmp_path / "live", score="random", density=0.5)
    _saved(lambda: _with_another_head(toy), tmp_path)
    before, out = bits(live), live(**batches[0]).logits
    with pytest.raises(BaseMismatchError, match="head"):
        live.load_adapter(tmp_path, "default", is_trainable=True)
    assert bits(live) == before
    assert torch.equal(live.eval()(**batches[0]).logits, out)


def test_all_but_a_head_of_another_shape_is_loaded_where_that_is_asked_for(toy, tmp_path):
    saved = _saved(toy, tmp_path)
    with skip_verification(), pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = PeftModel.from_pretrained(_with_another_head(toy), tmp_path, ignore_mismatched_sizes=True)
    assert all(torch.equal(d.values, get_deltas(loaded)[n].values) for n, d in get_deltas(saved).items())


def test_a_second_adapter_that_is_refused_leaves_the_first_as_it_was(toy, batches, bits, tmp_path):
    model = _saved(toy, tmp_path / "first")
    _saved(toy, tmp_path / "second", score="random")
    path = tmp_path / "second" / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    before = bits(model)
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    out = model(**batches[0]).logits
    with pytest.raises(FormatError):
        model.load_adapter(tmp_path / "second", "second")
    assert bits(model) == before
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(**batches[0]).logits, out)
    model.add_adapter("second", ChildTuningConfig(score="random", density=0.1))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "first" / "adapter_model.safetensors"
    ).read_bytes()


def test_two_adapters_with_children_of_different_sizes_live_side_by_side(toy, batches, tmp_path):
    first = _saved(toy, tmp_path / "first")
    second = _saved(toy, tmp_path / "second", score="random", density=0.5)
    both = PeftModel.from_pretrained(toy(), tmp_path / "first").eval()
    both.load_adapter(tmp_path / "second", "second")
    assert torch.equal(both(**batches[0]).logits, first(**batches[0]).logits)
    both.set_adapter("second")
    assert torch.equal(both(**batches[0]).logits, second(**batches[0]).logits)


def test_loading_into_a_live_adapter_takes_over_the_files_child(toy, batches, tmp_path):
    saved = _saved(toy, tmp_path)
    live = _saved(toy, tmp_path / "other", score="random", density=0.5)
    live.load_adapter(tmp_path, "default", is_trainable=True)
    assert get_child_network(live) == get_child_network(saved)
    assert torch.equal(live.eval()(**batches[0]).logits, saved(**batches[0]).logits)
    live.train()(**batches[0]).loss.backward()
    assert sum(p.grad.numel() for n, p in live.named_parameters() if "values" in n) == get_child_network(saved).nnz


def test_a_refused_file_leaves_a_live_adapter_as_it_was(toy, batches, bits, tmp_path):
    live = _saved(toy, tmp_path / "live", score="random", density=0.5)
    _saved(toy, tmp_path)
    _resave(tmp_path, lambda t: t.update({_VALUES: t[_VALUES] + 1}))
    before, out = bits(live), live(**batches[0]).logits
    with pytest.raises(IntegrityError):
        live.load_adapter(tmp_path, "default", is_trainable=True)
    assert bits(live) == before
    assert torch.equal(live.eval()(**batches[0]).logits, out)


def test_nothing_is_loaded_into_a_merged_adapter(toy, tmp_path):
    model = _saved(toy, tmp_path)
    model.merge_adapter()
    before = {n: d.values for n, d in get_deltas(model).items()}
    with pytest.raises(SelectionError, match="unmerge_adapter"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(before[n], d.values) for n, d in get_deltas(model).items())


def test_a_state_dict_is_set_only_when_it_is_sound(toy, batches, tmp_path):
    saved = _saved(toy, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    model = get_peft_model(
        toy(), ChildTuningConfig(score="random", density=0.1, modules_to_save=["head"], init_weights=False)
    ).eval()
    before = {n: d.values for n, d in get_deltas(model).items()}
    with pytest.raises(IntegrityError):
        set_peft_model_state_dict(model, state | {_VALUES: state[_VALUES] + 1})
    assert all(torch.equal(before[n], d.values) for n, d in get_deltas(model).items())
    set_peft_model_state_dict(model, state)
    assert torch.equal(model(**batches[0]).logits, saved(**batches[0]).logits)


def test_a_state_dict_brings_its_positions_along_also_into_codes_of_the_same_length(toy, batches):
    shapes = {f"layers.{i}.fc.{p}": s for i in (0, 1) for p, s in (("weight", (6, 6)), ("bias", (6,)))}
    models = []
    for last in (3, 4):
        model = get_peft_model(toy(), ChildTuningConfig(target_modules=["fc"], init_weights=False)).eval()
        child = ChildNetwork.from_indices({n: torch.tensor([0, last]) for n in shapes}, shapes)
        select_child_network(model, network=child)
        model(**batches[0])
        models.append(model)
    one, other = models
    one.load_state_dict(other.state_dict())
    assert get_child_network(one) == get_child_network(other)
    assert torch.equal(one(**batches[0]).logits, other(**batches[0]).logits)


def test_a_saved_configuration_without_its_weights_is_not_silently_a_new_adapter(toy, batches, tmp_path):
    _saved(toy, tmp_path)
    config = ChildTuningConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(toy(), config)
    for call in (
        lambda: model.train()(**batches[0]),
        lambda: model.save_pretrained(tmp_path / "x"),
        model.merge_adapter,
    ):
        with pytest.raises(SelectionError, match="never"):
            call()
    config.child = None
    fresh = get_peft_model(toy(), config)
    fresh.train()(**batches[0]).loss.backward()


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_names_may_be_given_as_a_tuple_in_any_order(toy, tmp_path, field):
    names = ("norm", "fc") if field == "target_modules" else ("head", "embed")
    options = {"target_modules": ["norm", "fc"]} | {field: names}
    saved = get_peft_model(toy(), ChildTuningConfig(score="magnitude", init_weights=False, **options))
    saved.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy(), tmp_path)
    assert all(torch.equal(d.values, get_deltas(loaded)[n].values) for n, d in get_deltas(saved).items())


def test_loading_draws_no_random_numbers(toy, tmp_path):
    _saved(toy, tmp_path)
    base = toy()
    torch.manual_seed(5)
    PeftModel.from_pretrained(base, tmp_path)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize("half", ["code", "values"])
def test_half_a_pair_in_a_state_dict_is_refused_by_name(half, toy, tmp_path):
    _saved(toy, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    _drop(f"child_tuning_{half}.weight")(tensors)
    model = PeftModel.from_pretrained(toy(), tmp_path)
    with pytest.raises(IntegrityError, match=rf"layers\.0\.fc\.weight: its child_tuning_{half} is missing"):
        set_peft_model_state_dict(model, tensors)
