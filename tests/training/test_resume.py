"""A run that was interrupted and resumed ends in the bits of one that was not."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from peft_childtune import ChildTuningCallback, get_child_network, select_child_network
from peft_childtune.codec import read_step
from peft_childtune.tuner import ChildTuningLayer
from tests.training.runs import CHECKPOINT, KINDS, STEPS, base, batches, differences, state_of, trainer_for, wrapped


def _steps(model):
    """The counters of per-step F's masks."""
    layers = [m for m in model.modules() if isinstance(m, ChildTuningLayer)]
    return {read_step(layer.child_tuning_code["default"].get(p)) for layer in layers for p in layer.covered}


def _selected(kind, seed=0):
    model = wrapped(kind)
    if kind == "D":
        select_child_network(model, batches(seed), show_progress=False)
    return model


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(request, tmp_path_factory):
    """Train without a break, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = trainer_for(_selected(request.param), folder)
    trainer.train()
    return SimpleNamespace(
        kind=request.param, checkpoint=folder / f"checkpoint-{CHECKPOINT}", model=trainer.model, end=state_of(trainer)
    )


def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(uninterrupted, tmp_path):
    trainer = trainer_for(_selected(uninterrupted.kind), tmp_path)
    trainer.train(resume_from_checkpoint=str(uninterrupted.checkpoint))
    assert differences(state_of(trainer), uninterrupted.end) == []


class _FirstState(TrainerCallback):
    """Keeps the optimizer's state as it is when training begins."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.state = copy.deepcopy(kwargs["optimizer"].state_dict()["state"])


def test_the_optimizer_begins_with_the_state_that_it_had_at_the_checkpoint(uninterrupted, tmp_path):
    saved = torch.load(uninterrupted.checkpoint / "optimizer.pt", weights_only=True)["state"]
    first = _FirstState()
    trainer = trainer_for(_selected(uninterrupted.kind), tmp_path, callbacks=[first], max_steps=CHECKPOINT + 1)
    trainer.train(resume_from_checkpoint=str(uninterrupted.checkpoint))
    assert len(saved) == len([p for p in trainer.model.parameters() if p.requires_grad])
    assert first.state.keys() == saved.keys()
    for number, state in saved.items():
        assert all(torch.equal(first.state[number][key], value) for key, value in state.items())


def test_the_masks_of_per_step_f_go_on_where_they_stopped(tmp_path):
    trainer_for(wrapped("per-step F"), tmp_path, max_steps=CHECKPOINT).train()
    loaded = PeftModel.from_pretrained(base(), tmp_path / f"checkpoint-{CHECKPOINT}", is_trainable=True)
    assert _steps(loaded) == {CHECKPOINT}
    resumed = wrapped("per-step F")
    trainer_for(resumed, tmp_path).train(resume_from_checkpoint=True)
    assert _steps(resumed) == {STEPS}


def _with_another_child():
    """Return a model whose child is of other sizes, but for some biases, than the one of `_selected`."""
    child, model = get_child_network(_selected("D")), _selected("D", seed=1)
    sizes = [{name: len(indices) for name, indices in c.indices.items()} for c in (child, get_child_network(model))]
    weights = [name for name in sizes[0] if name.endswith(".weight") and sizes[0][name] != sizes[1][name]]
    biases = [name.removesuffix("weight") + "bias" for name in weights]
    assert any(sizes[0][name] == sizes[1][name] > 0 for name in biases)
    return model


def test_a_child_chosen_on_other_data_gives_way_to_that_of_the_checkpoint(tmp_path):
    whole = trainer_for(_selected("D"), tmp_path / "whole")
    whole.train()
    end = state_of(whole)
    trainer = trainer_for(_with_another_child(), tmp_path / "resumed")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CHECKPOINT}"))
    assert differences(state_of(trainer), end) == []


def test_a_loaded_child_has_its_parameters_in_the_order_in_which_an_optimizer_of_one_group_was_saved(tmp_path):
    """An optimizer's state knows its parameters by number, and takes a state of another shape without a word."""
    model = _selected("D")
    model.save_pretrained(tmp_path)
    resumed = _with_another_child()
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    names = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (model, resumed)]
    assert names[0] == names[1]


def test_a_callback_gives_way_to_the_child_of_the_checkpoint(tmp_path):
    whole = trainer_for(wrapped(), tmp_path / "whole", callbacks=[ChildTuningCallback(batches())])
    whole.train()
    end = state_of(whole)
    trainer = trainer_for(wrapped(), tmp_path / "resumed", callbacks=[ChildTuningCallback(batches(seed=1))])
    assert get_child_network(trainer.model) != get_child_network(whole.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CHECKPOINT}"))
    assert differences(state_of(trainer), end) == []


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Train each kind in processes that are killed after the checkpoint, and resume in new ones."""
    folder = tmp_path_factory.mktemp("killed")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.killed", folder], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if line.startswith(tuple(KINDS))]
    assert ends == [f"{kind} {-signal.SIGKILL} 0" for kind in KINDS], done.stderr
    return folder


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_in_another_process_ends_in_the_bits_of_one_that_was_not(
    uninterrupted, killed
):
    end = torch.load(killed / uninterrupted.kind / "end.pt", weights_only=True)
    assert differences(end, uninterrupted.end) == []
