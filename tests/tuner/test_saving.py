"""What goes into the file of an adapter, and what does not."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from peft_childtune import (
    ChildNetwork,
    ChildTuningConfig,
    DeltaError,
    SelectionError,
    get_child_network,
    get_deltas,
    select_child_network,
)
from peft_childtune.codec import decode_child
from peft_childtune.seal import seal_bytes

_PATH = "base_model.model.layers"
_COVERED = [f"{i}.{m}.{p}" for i in (0, 1) for m in ("fc", "norm") for p in ("weight", "bias")]


def _trained(toy, **options):
    options = {"score": "magnitude", "density": 0.25, "init_weights": False} | options
    return get_peft_model(toy(), ChildTuningConfig(**options))


def _file(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_the_file_holds_code_and_values_of_each_tensor_one_seal_and_nothing_else(toy, tmp_path):
    model = _trained(toy)
    model.save_pretrained(tmp_path)
    tensors = _file(tmp_path)
    deltas = get_deltas(model)
    expected = set()
    for name in _COVERED:
        module, _, parameter = name.rpartition(".")
        delta = deltas[f"layers.{name}"]
        if not delta.nnz:
            continue
        code, values = (f"{_PATH}.{module}.child_tuning_{kind}.{parameter}" for kind in ("code", "values"))
        expected |= {code, values}
        assert tensors[code].dtype == torch.uint8
        assert torch.equal(decode_child(tensors[code], shape=delta.shape).indices(), delta.indices)
        assert torch.equal(tensors[values], delta.values)
    (seal,) = set(tensors) - expected
    assert seal.endswith("child_tuning_seal")
    assert tensors[seal].numel() == seal_bytes(8, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_configuration_lists_every_covered_tensor_with_its_sizes(toy, tmp_path):
    model = get_peft_model(toy(), ChildTuningConfig(score="fisher", density=0.25, target_modules=["fc"]))
    empty, some = torch.zeros(0, dtype=torch.int64), torch.tensor([1, 2, 5])
    shapes = {f"layers.{i}.fc.{p}": s for i in (0, 1) for p, s in (("weight", (6, 6)), ("bias", (6,)))}
    indices = {n: empty if n == "layers.0.fc.bias" else some for n in shapes}
    select_child_network(model, network=ChildNetwork.from_indices(indices, shapes))
    model.save_pretrained(tmp_path)
    tensors = _file(tmp_path)
    listed = json.loads((tmp_path / "adapter_config.json").read_text())["child"]
    assert set(listed) == set(shapes)
    for name, (nnz, coded) in listed.items():
        module, _, parameter = name.removeprefix("layers.").rpartition(".")
        code = tensors.get(f"{_PATH}.{module}.child_tuning_code.{parameter}", torch.zeros(0))
        values = tensors.get(f"{_PATH}.{module}.child_tuning_values.{parameter}", torch.zeros(0))
        assert (nnz, coded) == (values.numel(), code.numel())
    assert listed["layers.0.fc.bias"] == [0, 0]
    loaded = get_child_network(PeftModel.from_pretrained(toy(), tmp_path))
    assert loaded == get_child_network(model)
    assert loaded.indices["layers.0.fc.bias"].numel() == 0


def test_saving_twice_gives_the_same_bytes(toy, tmp_path):
    model = _trained(toy)
    for folder in ("one", "two"):
        model.save_pretrained(tmp_path / folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16", "float16", None])
def test_values_are_rounded_in_the_file_only(toy, tmp_path, save_dtype):
    model = _trained(toy, save_dtype=save_dtype)
    before = {name: delta.values for name, delta in get_deltas(model).items()}
    model.save_pretrained(tmp_path)
    assert all(
        torch.equal(before[n], d.values) and d.values.dtype == torch.float32 for n, d in get_deltas(model).items()
    )
    dtype = getattr(torch, save_dtype or "float32")
    stored = [t for n, t in _file(tmp_path).items() if "child_tuning_values" in n]
    assert {t.dtype for t in stored} == {dtype}
    loaded = get_deltas(PeftModel.from_pretrained(toy(), tmp_path))
    assert {d.values.dtype for d in loaded.values()} == {torch.float32}
    for name, values in before.items():
        assert torch.equal(loaded[name].values, values.to(dtype).float())


def test_a_merged_model_saves_what_it_would_save_unmerged(toy, tmp_path):
    model = _trained(toy)
    model.save_pretrained(tmp_path / "one")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    assert PeftModel.from_pretrained(toy(), tmp_path / "two")


def test_a_seeded_child_costs_next_to_nothing_beside_its_values(toy, tmp_path):
    model = _trained(toy, score="random")
    model.save_pretrained(tmp_path)
    codes = [t.numel() for n, t in _file(tmp_path).items() if "child_tuning_code" in n]
    assert codes
    assert max(codes) <= 32


def test_an_adapter_whose_child_was_never_selected_cannot_be_saved(toy, tmp_path):
    model = get_peft_model(toy(), ChildTuningConfig(score="fisher"))
    with pytest.raises(SelectionError, match="select_child_network"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_head_is_saved_whole_beside_the_child(toy, tmp_path):
    model = _trained(toy, modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    heads = {n: t for n, t in _file(tmp_path).items() if "child_tuning_" not in n}
    assert {n: tuple(t.shape) for n, t in heads.items()} == {
        "base_model.model.head.weight": (3, 6),
        "base_model.model.head.bias": (3,),
    }
    (seal,) = [t for n, t in _file(tmp_path).items() if "child_tuning_seal" in n]
    assert seal.numel() == seal_bytes(8, 2)


def test_a_state_dict_that_lacks_the_adapter_is_refused(toy, tmp_path):
    model = _trained(toy)
    state = model.state_dict()
    key = next(n for n in state if "child_tuning_values" in n)
    del state[key]
    with pytest.raises(SelectionError, match="whole state dict"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_a_given_state_dict_is_what_is_saved(toy, tmp_path):
    model = _trained(toy)
    state = {n: (t * 2 if "child_tuning_values" in n else t).clone() for n, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = get_deltas(PeftModel.from_pretrained(toy(), tmp_path))
    for name, delta in get_deltas(model).items():
        assert torch.equal(loaded[name].values, 2 * delta.values)


def test_each_adapter_has_a_file_of_its_own(toy, tmp_path):
    model = _trained(toy)
    model.add_adapter("other", ChildTuningConfig(score="random", density=0.5, init_weights=False))
    model.save_pretrained(tmp_path)
    for folder, adapter in [(tmp_path, "default"), (tmp_path / "other", "other")]:
        loaded = get_deltas(PeftModel.from_pretrained(toy(), folder))
        for name, delta in get_deltas(model, adapter).items():
            assert torch.equal(loaded[name].values, delta.values)
            assert torch.equal(loaded[name].indices, delta.indices)


def test_the_live_state_has_no_seal_and_the_saved_one_has(toy):
    model = _trained(toy)
    assert not any("seal" in name for name in model.state_dict())
    assert sum("seal" in name for name in get_peft_model_state_dict(model)) == 1


def test_targeted_embeddings_are_saved_as_their_delta_and_not_whole(family, tmp_path):
    config = ChildTuningConfig(
        task_type="SEQ_CLS", score="magnitude", density=0.1, target_modules=["word_embeddings"], modules_to_save=[]
    )
    model = get_peft_model(family("bert"), config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {n: file.get_slice(n).get_shape() for n in file.keys()}
    assert not [n for n, shape in shapes.items() if "child_tuning_" not in n and "embedding" in n]
    assert sum(shape[0] for n, shape in shapes.items() if "child_tuning_values" in n) == round(0.1 * 40 * 16)


def test_a_state_dict_from_before_a_selection_is_not_saved_with_the_child_of_after(toy, tmp_path):
    model = _trained(toy, init_weights=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = get_child_network(model)
    shifted = {name: (first.shapes[name], positions) for name, positions in first.indices.items()}
    other = ChildNetwork.from_indices(
        {
            name: ((positions + 1) % torch.Size(shape).numel()).sort().values
            for name, (shape, positions) in shifted.items()
        },
        first.shapes,
    )
    select_child_network(model, network=other)
    with pytest.raises(SelectionError, match="of another child than the model has now"):
        model.save_pretrained(tmp_path, state_dict=before)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_resampled_adapter_is_saved_from_a_state_dict_of_an_earlier_step(toy, batches, tmp_path):
    model = get_peft_model(toy(), ChildTuningConfig(mode="task_free", resample=True, density=0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batches[0]).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path, state_dict=before)
    loaded = PeftModel.from_pretrained(toy(), tmp_path)
    assert all(not bool(delta.values.any()) for delta in get_deltas(loaded).values())


@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
def test_training_that_goes_on_from_rounded_deltas_is_warned_of(save_dtype, toy, tmp_path, caplog):
    model = _trained(toy, save_dtype=save_dtype)
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)  # as Trainer resumes
    assert ("rounded deltas" in caplog.text) == (save_dtype is not None)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_delta_that_is_not_finite_is_not_saved_and_the_old_file_stays(number, toy, tmp_path):
    model = _trained(toy)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    values = model.base_model.model.layers[1].fc.child_tuning_values["default"].get("weight")
    with torch.no_grad():
        values[0] = number
    with pytest.raises(DeltaError, match=r"^layers\.1\.fc\.weight: 1 of its .* not finite.*diverged"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_a_state_dict_with_a_delta_of_another_length_is_refused(toy, tmp_path):
    model = _trained(toy)
    state = model.state_dict()
    key = f"{_PATH}.0.fc.child_tuning_values.default.weight"
    state[key] = state[key][:-1]
    with pytest.raises(SelectionError, match=f"{key}: the state dict holds"):
        model.save_pretrained(tmp_path, state_dict=state)
