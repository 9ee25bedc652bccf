"""The calls around a selection: what is accepted, what is refused, what is put back, and what is reported."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_childtune import (
    ChildNetwork,
    ChildTuningConfig,
    ConfigError,
    DeltaError,
    FormatError,
    ScoreError,
    SelectionError,
    get_child_network,
    get_deltas,
    select_child_network,
    selection_report,
)
from peft_childtune.tuner import ChildTuningLayer


def _config(**options):
    return ChildTuningConfig(**({"score": "fisher", "density": 0.25} | options))


def _wrapped(base, **options):
    return get_peft_model(base, _config(**options))


def _select(model, data=None, **options):
    return select_child_network(model, data, show_progress=False, **options)


def _covered(base):
    """The tensors inside the toy's blocks, in the model's order."""
    return {name: p.detach() for name, p in base.named_parameters() if name.startswith("layers.")}


def test_a_child_network_is_installed_from_an_object_or_a_path(toy, tmp_path):
    shapes = {name: tuple(p.shape) for name, p in _covered(toy()).items()}
    child = ChildNetwork.from_indices({name: torch.tensor([0, 3]) for name in shapes}, shapes)
    child.save(tmp_path / "child.safetensors")
    for given in (child, tmp_path / "child.safetensors", str(tmp_path / "child.safetensors")):
        model = _wrapped(toy())
        assert _select(model, network=given) == child
        assert model.peft_config["default"].selection["source"] == "given"
        assert {n: d.indices.tolist() for n, d in get_deltas(model).items()} == dict.fromkeys(shapes, [0, 3])


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_a_child_network_of_another_model_is_refused_and_changes_nothing(toy, change):
    model = _wrapped(toy(), score="magnitude")
    before = get_child_network(model)
    shapes = {name: tuple(p.shape) for name, p in _covered(toy()).items()}
    if change == "missing":
        shapes.pop("layers.1.fc.bias")
    elif change == "unknown":
        shapes["layers.2.fc.bias"] = (6,)
    else:
        shapes["layers.1.fc.bias"] = (7,)
    network = ChildNetwork.from_indices({name: torch.tensor([0]) for name in shapes}, shapes)
    with pytest.raises(DeltaError, match=r"layers\.[12]\.fc\.bias"):
        _select(model, network=network)
    assert get_child_network(model) == before


def test_a_path_that_holds_no_child_network_is_refused(toy, tmp_path):
    (tmp_path / "f").write_bytes(b"no")
    with pytest.raises(FormatError):
        _select(_wrapped(toy()), network=tmp_path / "f")


def test_a_model_without_such_an_adapter_is_refused(toy):
    for call in (_select, get_child_network, get_deltas, selection_report):
        with pytest.raises(SelectionError, match="get_peft_model"):
            call(toy())
    with pytest.raises(SelectionError, match=r"'other'.*\['default'\]"):
        _select(_wrapped(toy()), adapter_name="other")


def test_an_adapter_of_another_method_is_refused(toy):
    model = get_peft_model(toy(), LoraConfig(target_modules=["fc"]))
    with pytest.raises(ConfigError, match="LoraConfig"):
        _select(model)


def test_a_score_that_looks_at_data_needs_data(toy):
    with pytest.raises(SelectionError, match=r"select_child_network\(model, dataloader\)"):
        _select(_wrapped(toy()))


def test_data_and_a_given_child_together_are_refused(toy, batches):
    with pytest.raises(ConfigError, match="not both"):
        _select(_wrapped(toy()), batches, network=get_child_network(_wrapped(toy(), score="magnitude")))


def test_a_trained_adapter_keeps_its_child(toy, batches):
    model = _wrapped(toy(), score="magnitude").train()
    before = get_child_network(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batches[0]).loss.backward()
    optimizer.step()
    with pytest.raises(SelectionError, match="trained already"):
        _select(model)
    assert get_child_network(model) == before


def test_a_merged_adapter_keeps_its_child(toy):
    model = _wrapped(toy(), score="magnitude")
    model.merge_adapter()
    with pytest.raises(SelectionError, match="unmerge_adapter"):
        _select(model)
    model.unmerge_adapter()
    _select(model)


def test_an_untrained_adapter_can_be_given_another_child(toy, batches):
    model = _wrapped(toy(), density=0.1)
    first = _select(model, batches[:1])
    second = _select(model, batches[1:])
    assert first != second
    assert get_child_network(model) == second
    model.train()(**batches[0]).loss.backward()
    assert sum(p.grad.numel() for p in model.parameters() if p.requires_grad) == second.nnz


def test_only_so_many_batches_are_read(toy, batches):
    def stream():
        yield from batches[:2]
        raise AssertionError("read too far")

    model, other = _wrapped(toy()), _wrapped(toy())
    assert _select(model, stream(), num_batches=2) == _select(other, batches[:2])


def test_a_loss_function_may_stand_in_for_the_models_own(toy, batches):
    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(x=batch["x"]).logits, batch["labels"])

    assert _select(_wrapped(toy()), batches, loss_fn=loss_fn) == _select(_wrapped(toy()), batches)


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_data_is_an_error(toy, data):
    with pytest.raises(ScoreError):
        _select(_wrapped(toy()), data)


def test_scores_are_those_of_the_base_whatever_other_adapters_do(toy, batches):
    alone = _select(_wrapped(toy()), batches)
    model = _wrapped(toy(), mode="task_free", init_weights=False)
    model.add_adapter("second", _config())
    assert _select(model, batches, adapter_name="second") == alone
    model.set_adapter("default")
    model.add_adapter("third", _config())
    assert _select(model, batches, adapter_name="third") == alone


def _state(model):
    layers = [m for m in model.modules() if isinstance(m, ChildTuningLayer)]
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [layer._disable_adapters for layer in layers],
        [layer.active_adapters for layer in layers],
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_every_flag_is_put_back_also_when_scoring_fails(toy, batches, bits, fails, train):
    model = _wrapped(toy(), mode="task_free", init_weights=False)
    model.add_adapter("second", _config())
    model.train(train)
    before, photograph = _state(model), bits(model.get_base_model())

    def loss_fn(wrapped, batch):
        assert not any(m.training for m in wrapped.modules())
        if fails:
            raise RuntimeError("out of luck")
        return wrapped(**batch).loss

    if fails:
        with pytest.raises(RuntimeError, match="out of luck"):
            _select(model, batches, loss_fn=loss_fn, adapter_name="second")
        assert _state(model) == before
        assert bits(model.get_base_model()) == photograph
    else:
        _select(model, batches, loss_fn=loss_fn, adapter_name="second")
        assert [s for i, s in enumerate(_state(model)) if i in (2, 3)] == list(before[2:])
        assert _state(model)[0] == before[0]
    layers = [m for m in model.modules() if isinstance(m, ChildTuningLayer)]
    assert not any(layer._disable_adapters for layer in layers)


def test_the_report_says_what_is_covered_and_where_the_child_lies(toy):
    shapes = {name: tuple(p.shape) for name, p in _covered(toy()).items()}
    model = _wrapped(toy())
    indices = {name: torch.tensor([0, 1, 2] if name == "layers.1.fc.weight" else [0]) for name in shapes}
    _select(model, network=ChildNetwork.from_indices(indices, shapes))
    report = selection_report(model)
    total = sum(p.numel() for p in toy().parameters())
    assert f"10 of 108 covered weights (9.259%); {108 / total:.1%} of the model's {total:,} weights" in report
    rows = {line.split()[0]: line.split()[1:] for line in report.splitlines()[1:]}
    assert rows["layers.0"] == ["40.0%", "7.41%"]
    assert rows["layers.1"] == ["60.0%", "11.11%"]
    assert rows["fc.weight"] == ["40.0%", "5.56%"]
    assert rows["norm.bias"] == ["20.0%", "16.67%"]


def test_the_report_counts_the_base_once_whatever_is_wrapped_around_it(toy):
    total = sum(p.numel() for p in toy().parameters())
    model = _wrapped(toy(), score="magnitude", modules_to_save=["head"])
    model.add_adapter("other", _config(score="random"))
    assert f"of the model's {total:,} weights" in selection_report(model)


def test_the_selection_is_logged(toy, batches, caplog):
    with caplog.at_level("INFO", logger="peft_childtune"):
        _select(_wrapped(toy()), batches)
    assert "Child network: 27 of 108" in caplog.text


def test_wrappers_for_several_devices_are_seen_through(toy, batches):
    model = _wrapped(toy())
    child = _select(nn.DataParallel(model), batches)
    assert get_child_network(nn.DataParallel(model)) == get_child_network(model) == child


def test_weights_on_the_meta_device_cannot_be_scored(toy, batches):
    with torch.device("meta"):
        base = type(toy())()
    model = _wrapped(base)
    with pytest.raises(ValueError, match="network=ChildNetwork.load"):
        _select(model, batches)


def test_deltas_are_copies(toy):
    model = _wrapped(toy(), score="magnitude")
    for delta in get_deltas(model).values():
        delta.values.add_(1)
        delta.indices.zero_()
    assert not any(bool(d.values.any()) for d in get_deltas(model).values())
    assert get_child_network(model) == get_child_network(_wrapped(toy(), score="magnitude"))


def test_processes_that_are_not_connected_are_warned_of(toy, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="WORLD_SIZE=2, but the processes have not been connected"):
        _select(_wrapped(toy(), score="random"))
