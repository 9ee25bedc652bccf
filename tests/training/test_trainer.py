"""What else a `Trainer` does with a wrapped model: best checkpoints, several adapters, uploads, compiling and more."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from peft import PeftModel
from transformers import EvalPrediction

from peft_childtune import (
    ChildTuningCallback,
    ChildTuningConfig,
    get_child_network,
    get_deltas,
    select_child_network,
)
from tests.training.runs import (
    CHECKPOINT,
    KINDS,
    STEPS,
    base,
    batches,
    differences,
    state_of,
    tensors_of,
    trainer_for,
    wrapped,
)


def _same(one, other):
    return differences({"tensors": one}, {"tensors": other}) == []


def _ready(kind="D", **options):
    model = wrapped(kind, **options)
    if kind == "D":
        select_child_network(model, batches(), show_progress=False)
    return model


def _base_tensors(model):
    """The base's own weights and buffers, by their own names."""
    base_model = model.get_base_model()
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor.clone()
        for name, tensor in base_model.state_dict().items()
        if ".child_tuning_" not in name and ".modules_to_save." not in name
    }


@pytest.mark.parametrize("kind", KINDS)
def test_training_changes_no_base_weight(kind, tmp_path):
    model = _ready(kind)
    trainer_for(model, tmp_path, save_strategy="no").train()
    assert _same(_base_tensors(model), dict(base().state_dict()))
    assert any(bool(delta.values.any()) for delta in get_deltas(model).values())


# ---- the best model


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_is_back_at_the_end_counter_included(kind, tmp_path):
    scores = iter([1.0, 0.0])  # the first evaluation is the better one

    def metrics(_: EvalPrediction):
        return {"score": next(scores)}

    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = trainer_for(
        wrapped(kind),
        tmp_path,
        callbacks=[ChildTuningCallback(batches())],
        compute_metrics=metrics,
        eval_strategy="steps",
        eval_steps=CHECKPOINT,
        **best,
    )
    trainer.train()
    assert trainer.state.global_step == STEPS
    saved = PeftModel.from_pretrained(base(), tmp_path / f"checkpoint-{CHECKPOINT}", is_trainable=True)
    last = PeftModel.from_pretrained(base(), tmp_path / f"checkpoint-{STEPS}", is_trainable=True)
    assert _same(tensors_of(trainer.model), tensors_of(saved))
    assert not _same(tensors_of(saved), tensors_of(last))


# ---- several adapters


def _two_adapters(seed, **options):
    """A trained adapter, and a frozen one whose deltas are random."""
    model = _ready(**options)
    torch.manual_seed(seed)
    settings = {"task_type": "SEQ_CLS", "density": 0.1, "score": "random", "init_weights": False} | options
    model.add_adapter("frozen", ChildTuningConfig(**settings))
    return model


def _adapter(model, name):
    return {key: tensor for key, tensor in tensors_of(model).items() if f".{name}." in key}


def test_an_adapter_that_is_not_active_is_left_alone_and_resumed_too(tmp_path):
    model = _two_adapters(seed=1)
    frozen = _adapter(model, "frozen")
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    end = state_of(trainer)
    assert frozen and _same(_adapter(model, "frozen"), frozen)
    assert (tmp_path / f"checkpoint-{CHECKPOINT}" / "frozen" / "adapter_model.safetensors").exists()

    resumed = _two_adapters(seed=2)
    assert not _same(_adapter(resumed, "frozen"), frozen)
    trainer = trainer_for(resumed, tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CHECKPOINT}"))
    assert _same(_adapter(resumed, "frozen"), frozen)
    assert differences(state_of(trainer), end) == []


def test_a_second_adapter_is_trained_over_a_frozen_active_one(tmp_path):
    model = _two_adapters(seed=1, task_type=None)  # heads are trained in one adapter only
    model.base_model.set_adapter(["default", "frozen"])
    for name, parameter in model.named_parameters():
        if ".frozen." in name:
            parameter.requires_grad_(False)
    frozen, before = _adapter(model, "frozen"), _adapter(model, "default")
    trainer_for(model, tmp_path, save_strategy="no").train()
    assert _same(_adapter(model, "frozen"), frozen)
    assert not _same(_adapter(model, "default"), before)
    assert _same(_base_tensors(model), dict(base().state_dict()))


# ---- uploads


class LocalHub:
    """Stands in for the hub's API: a repository is a folder."""

    def __init__(self, root):
        self.root = root

    def create_repo(self, name, **_):
        (self.root / name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns=(), path_in_repo=".", **_):
        source = Path(folder_path)
        for path in source.rglob("*"):
            name = path.relative_to(source)
            if path.is_file() and not any(fnmatch(part, p) for part in name.parts for p in ignore_patterns):
                target = self.root / repo_id / path_in_repo / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        return SimpleNamespace(done=lambda: True, result=lambda: None)


def test_what_a_trainer_pushes_is_the_adapter_and_a_card_and_loads_from_there(tmp_path, monkeypatch):
    hub = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    trainer = trainer_for(
        wrapped(),
        tmp_path / "run",
        callbacks=[ChildTuningCallback(batches())],
        push_to_hub=True,
        hub_model_id="me/child",
        hub_strategy="checkpoint",
    )
    trainer.train()
    trainer.push_to_hub()
    pushed = hub.root / "me" / "child"
    expected = {"adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin"}
    assert {path.name for path in pushed.iterdir()} == expected | {"last-checkpoint"}
    assert "library_name: peft" in (pushed / "README.md").read_text()
    assert _same(tensors_of(PeftModel.from_pretrained(base(), pushed)), tensors_of(trainer.model.eval()))
    resumed = trainer_for(wrapped(), tmp_path / "again", callbacks=[ChildTuningCallback(batches(seed=1))])
    resumed.train(resume_from_checkpoint=str(pushed / "last-checkpoint"))
    assert get_child_network(resumed.model) == get_child_network(trainer.model)


# ---- recomputing activations


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # renamed in late releases of transformers
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing_over_a_frozen_embedding(kind, use_reentrant, tmp_path):
    ends = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}},
    ):
        model = _ready(kind)
        assert not model.get_input_embeddings().weight.requires_grad
        trainer = trainer_for(model, tmp_path, save_strategy="no", **options)
        trainer.train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) is bool(options)
        ends.append(state_of(trainer))
    assert differences(*ends) == []


# ---- compiling


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
@pytest.mark.parametrize("kind", ["D", "per-step F"])
def test_a_run_resumed_in_a_compiled_trainer_ends_in_the_bits_of_the_eager_one(kind, tmp_path):
    eager = trainer_for(_ready(kind, layers=1), tmp_path)
    eager.train()
    end = state_of(eager)
    torch.compiler.reset()
    compiled = trainer_for(
        _ready(kind, layers=1), tmp_path / "compiled", torch_compile=True, torch_compile_backend="aot_eager"
    )
    compiled.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{CHECKPOINT}"))
    assert hasattr(compiled.model_wrapped, "_orig_mod")  # it was compiled
    assert differences(state_of(compiled), end) == []
