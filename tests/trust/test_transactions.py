"""What writes into weights in place either happens or does not: whichever write fails, nothing is left half done."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_childtune import ChildTuningConfig, get_deltas, weights
from peft_childtune.kernels import use_kernels
from tests.contract.families import FAMILIES, add_noise, bits, differing, layers_in, same_bits, snapshot, wrap


class Interrupt(Exception):
    """Stands for a full memory, a lost device, or Ctrl-C."""


_WRITES = {  # what writes entries
    "extension": (weights, ("merge_entries_", "put_entries_")),
    "torch": (torch.Tensor, ("index_put_",)),
    "every weight": (torch.Tensor, ("copy_",)),
}


class _Faulty:
    """Stands in for functions of one module, or methods of one class: the n-th call of them raises.

    Before it does anything, or after it has done it.
    """

    def __init__(self, owner: object, names: tuple[str, ...], patch: pytest.MonkeyPatch, *, n: int, written: bool):
        self.left = n
        for name in names:
            patch.setattr(owner, name, self._faulty(getattr(owner, name), written))

    def _faulty(self, real, written):
        def run(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                if written:
                    real(*args, **kwargs)
                raise Interrupt
            return real(*args, **kwargs)

        return run


def _model(name, *, score="random", **options):
    family = FAMILIES[name]
    model = wrap(family.build(), family, score=score, density=0.3, **options)
    second = ChildTuningConfig(task_type=family.task_type, score=score, density=0.3, seed=7, **options)
    model.add_adapter("b", second)
    return add_noise(add_noise(model, seed=1), "b", seed=2)


def _merged(model):
    return [list(layer.merged_adapters) for layer in layers_in(model)]


def _merge_two(model):
    model.base_model.merge_adapter(["default", "b"])


ACTIONS = {
    "merge": (lambda model: None, lambda model: model.merge_adapter()),
    "merge two": (lambda model: None, _merge_two),
    "merge a second": (lambda model: model.base_model.merge_adapter(["b"]), _merge_two),
    "safe merge": (lambda model: None, lambda model: model.merge_adapter(safe_merge=True)),
    "unmerge": (lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()),
    "unmerge two": (_merge_two, lambda model: model.unmerge_adapter()),
    "merge and unload": (lambda model: None, lambda model: model.merge_and_unload()),
}


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    ("name", "writer", "options"),
    [
        ("bert", "extension", {}),
        ("gpt2", "extension", {}),
        ("bert", "torch", {}),
        ("bert", "every weight", {"mode": "task_free", "resample": True}),
    ],
    ids=["bert", "gpt2", "bert without the extension", "every weight"],
)
def test_whichever_write_fails_the_model_is_what_it_was_bit_for_bit(
    name, writer, options, action, written, monkeypatch
):
    prepare, act = ACTIONS[action]
    model = _model(name, **options)
    prepare(model)
    before, merged = snapshot(model), _merged(model)
    n, failed = 0, True
    while failed:
        n += 5 if n > 3 else 1  # a layer has at most four writes: this meets the first and the last of them
        with monkeypatch.context() as patch, use_kernels(extension=writer == "extension"):
            fault = _Faulty(*_WRITES[writer], patch, n=n, written=written)
            with contextlib.suppress(Interrupt):
                act(model)
            failed = fault.left <= 0
        if failed:
            assert _merged(model) == merged, n
            assert differing(model, before) == [], n
    assert n > 5


def test_a_failed_unloading_leaves_a_model_that_works_and_can_be_unloaded(monkeypatch):
    model, whole = _model("bert"), _model("bert")
    batch = FAMILIES["bert"].batch()
    with monkeypatch.context() as patch, torch.no_grad():
        _Faulty(*_WRITES["extension"], patch, n=9, written=True)
        with pytest.raises(Interrupt):
            model.merge_and_unload()
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        assert same_bits(model.eval()(**batch).logits, whole.eval()(**batch).logits)
        unloaded = model.merge_and_unload()
        assert same_bits(unloaded(**batch).logits, whole(**batch).logits)


@pytest.mark.parametrize("step", range(3))
def test_a_switch_that_fails_at_any_step_can_be_done_again(step, monkeypatch):
    model, expected = _model("bert"), _model("bert")
    expected.base_model.set_adapter("b")
    expected.merge_adapter()
    model.merge_adapter()

    def switch():
        model.unmerge_adapter()
        model.base_model.set_adapter("b")
        model.merge_adapter()

    with monkeypatch.context() as patch:
        _Faulty(*_WRITES["extension"], patch, n=(3, 23, 45)[step], written=True)
        with pytest.raises(Interrupt):
            switch()
    if not any(_merged(model)):
        model.merge_adapter()
    switch()
    assert differing(model, snapshot(expected)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_thousand_switches_leave_the_base_bit_for_bit(dtype):
    plain = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(40, 30), nn.LayerNorm(30)])}).to(dtype)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    options = {"target_modules": ["0", "1"], "mode": "task_free", "init_weights": False}
    model = get_peft_model(plain, ChildTuningConfig(**options, density=0.3))
    model.add_adapter("b", ChildTuningConfig(**options, density=0.6, seed=1))
    for cycle in range(1000):
        model.base_model.set_adapter(["default", "b"][cycle % 2])
        model.merge_adapter()
        model.unmerge_adapter()
    now = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
    }
    assert [name for name, tensor in before.items() if not same_bits(tensor, now[name])] == []


@pytest.mark.parametrize("n", [1, 2])
def test_a_layer_that_is_merged_by_itself_is_merged_whole_or_not_at_all(n, monkeypatch):
    model = _model("bert")
    before, layer = snapshot(model), layers_in(model)[0]
    with monkeypatch.context() as patch:
        _Faulty(*_WRITES["extension"], patch, n=n, written=True)
        with pytest.raises(Interrupt):
            layer.merge()
    assert layer.merged_adapters == []
    assert differing(model, before) == []


def _deltas(model, adapter):
    """Return the bits of an adapter, with its head."""
    heads = {name: tensor for name, tensor in model.state_dict().items() if f"modules_to_save.{adapter}." in name}
    deltas = {name: delta.to_dense() for name, delta in get_deltas(model, adapter).items()}
    return {name.replace(f".{adapter}.", "."): bits(tensor).tolist() for name, tensor in (heads | deltas).items()}


@pytest.mark.parametrize("method", ["copy_", "to", "clone"])
@pytest.mark.parametrize("place", ["b", "default"], ids=["a new adapter", "over an adapter"])
def test_wherever_loading_onto_a_live_model_breaks_off_each_adapter_is_whole(place, method, tmp_path, monkeypatch):
    family = FAMILIES["bert"]
    saved = add_noise(wrap(family.build(), family, score="random", density=0.3, seed=4), seed=5)
    saved.save_pretrained(tmp_path)
    new, ends, n = _deltas(saved, "default"), set(), 0
    while True:
        n += 1 if n < 4 else 9
        model = add_noise(wrap(family.build(), family, score="random", density=0.2), seed=1)
        before, old = snapshot(model), _deltas(model, "default")
        with monkeypatch.context() as patch:
            fault = _Faulty(torch.Tensor, (method,), patch, n=n, written=False)
            with contextlib.suppress(Interrupt, RuntimeError):  # the latter: torch's, about what it could not copy
                model.load_adapter(tmp_path, place)
        if fault.left > 0:
            break
        found = _deltas(model, place) if place in model.peft_config else None
        ends.add("none" if found is None else "old" if found == old else "new" if found == new else "SOMETHING ELSE")
        if place == "b" or found == old:
            assert [name for name, tensor in before.items() if not same_bits(tensor, model.state_dict()[name])] == []
    assert ends <= ({"none", "new"} if place == "b" else {"old", "new"})
    assert ends & {"none", "old"}
