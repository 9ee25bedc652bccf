"""`ChildTuningCallback`: when a trainer's child is chosen, from which data, and when it is left alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from peft_childtune import (
    ChildTuningCallback,
    ChildTuningConfig,
    SelectionError,
    fit_head,
    get_child_network,
    get_deltas,
    select_child_network,
)
from tests.training.runs import CHECKPOINT, base, batches, differences, state_of, trainer_for, wrapped


def _child_of(data, **options):
    return select_child_network(wrapped(), data, show_progress=False, **options)


def test_the_child_is_there_once_the_trainer_is_made(tmp_path):
    model = wrapped()
    trainer_for(model, tmp_path, callbacks=[ChildTuningCallback(batches())])
    assert get_child_network(model) == _child_of(batches())


@pytest.mark.parametrize("callback", [ChildTuningCallback(), ChildTuningCallback], ids=["object", "class"])
def test_without_data_the_trainers_own_training_batches_are_looked_at(callback, tmp_path):
    model = wrapped()
    trainer = trainer_for(model, tmp_path, callbacks=[callback])
    child = get_child_network(model)
    # the trainer shuffles, which changes the order of summation, and no more
    assert child.overlap(_child_of(batches())) > 0.99
    assert child == _child_of(trainer.get_train_dataloader())
    assert child != _child_of(batches(seed=1))


def test_a_subclass_of_a_trainer_is_asked_for_its_own_batches(tmp_path):
    own = batches(seed=1)
    kind = type(trainer_for(_selected(), tmp_path))

    class Own(kind):
        def get_train_dataloader(self):
            return own

    model = wrapped()
    Own(model, trainer_for(_selected(), tmp_path).args, callbacks=[ChildTuningCallback()])
    assert get_child_network(model) == _child_of(own)


def _selected():
    model = wrapped()
    select_child_network(model, batches(), show_progress=False)
    return model


def test_a_run_with_a_callback_is_that_of_a_model_whose_child_was_given(tmp_path):
    """The pass over the training data leaves random state and shuffling as they were, also when it stops early."""
    trainer = trainer_for(wrapped(), tmp_path, callbacks=[ChildTuningCallback(num_batches=3)], save_strategy="no")
    child = get_child_network(trainer.model)
    trainer.train()
    end = state_of(trainer)
    given = wrapped()
    select_child_network(given, network=child)
    trainer = trainer_for(given, tmp_path, save_strategy="no")
    trainer.train()
    assert differences(state_of(trainer), end) == []


def test_a_function_is_called_for_the_data_only_if_they_are_needed(tmp_path):
    calls = []

    def data():
        calls.append(1)
        return batches()

    trainer_for(_selected(), tmp_path, callbacks=[ChildTuningCallback(data)])
    assert calls == []
    trainer_for(wrapped(), tmp_path, callbacks=[ChildTuningCallback(data)])
    assert calls == [1]


def _refuse():
    raise AssertionError("nothing is to be chosen")


@pytest.mark.parametrize("kind", ["D", "fixed F", "per-step F"])
def test_a_child_that_is_there_already_stays(kind, tmp_path):
    model = _selected() if kind == "D" else wrapped(kind)
    child, values = get_child_network(model), [p for p in model.parameters() if p.requires_grad]
    trainer_for(model, tmp_path, callbacks=[ChildTuningCallback(_refuse)])
    assert get_child_network(model) == child
    assert all(a is b for a, b in zip(values, (p for p in model.parameters() if p.requires_grad), strict=True))


def test_a_loaded_child_and_its_delta_stay(tmp_path):
    model = _selected()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    trainer_for(loaded, tmp_path, callbacks=[ChildTuningCallback(_refuse)])
    assert get_child_network(loaded) == get_child_network(model)
    assert all((delta.values == 0.5).all() for delta in get_deltas(loaded).values())


def test_a_natively_loaded_child_stays(tmp_path):
    _selected().save_pretrained(tmp_path)
    model = base()
    model.load_adapter(str(tmp_path), is_trainable=True)
    trainer_for(model, tmp_path, callbacks=[ChildTuningCallback(_refuse)])
    assert get_child_network(model) == get_child_network(_selected())


def test_nothing_is_chosen_where_the_arguments_name_a_checkpoint(tmp_path):
    trainer_for(_selected(), tmp_path, max_steps=CHECKPOINT).train()
    model, checkpoint = wrapped(), str(tmp_path / f"checkpoint-{CHECKPOINT}")
    trainer = trainer_for(model, tmp_path, callbacks=[ChildTuningCallback(_refuse)], resume_from_checkpoint=checkpoint)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    assert get_child_network(model) == get_child_network(_selected())


def test_a_checkpoint_that_is_not_there_yet_lets_the_child_be_chosen(tmp_path):
    """As in scripts that are started again and again with the same arguments."""
    model = wrapped()
    trainer_for(model, tmp_path, callbacks=[ChildTuningCallback(batches())], resume_from_checkpoint="runs/last")
    assert get_child_network(model) == _child_of(batches())


def test_training_without_a_child_says_what_to_call(tmp_path):
    trainer_for(_selected(), tmp_path, max_steps=CHECKPOINT).train()
    checkpoint = str(tmp_path / f"checkpoint-{CHECKPOINT}")
    trainer = trainer_for(
        wrapped(), tmp_path, callbacks=[ChildTuningCallback(_refuse)], resume_from_checkpoint=checkpoint
    )
    with pytest.raises(SelectionError, match="select_child_network"):
        trainer.train()  # though the arguments said that it would resume


def test_every_adapter_without_a_child_gets_one(tmp_path):
    model = wrapped()
    model.add_adapter("second", ChildTuningConfig(task_type="SEQ_CLS", density=0.1, score="gradient"))
    model.add_adapter("third", ChildTuningConfig(task_type="SEQ_CLS", density=0.1, score="magnitude"))
    third = get_child_network(model, "third")
    trainer_for(model, tmp_path, callbacks=[ChildTuningCallback(batches())])
    assert get_child_network(model) == _child_of(batches())
    assert get_child_network(model, "second").nnz == third.nnz
    assert get_child_network(model, "third") == third


def test_one_adapter_can_be_named(tmp_path):
    model = wrapped()
    model.add_adapter("second", ChildTuningConfig(task_type="SEQ_CLS", score="fisher", density=0.1))
    trainer_for(model, tmp_path, callbacks=[ChildTuningCallback(batches(), adapter_name="second")])
    assert get_child_network(model, "second").nnz > 0
    with pytest.raises(SelectionError):
        get_child_network(model)


def test_a_loss_function_and_a_number_of_batches_are_passed_on(tmp_path):
    def loss_fn(model, batch):
        return (model(**batch).logits[:, 0] - batch["labels"]).abs().mean()

    model = wrapped()
    trainer_for(model, tmp_path, callbacks=[ChildTuningCallback(batches(), num_batches=2, loss_fn=loss_fn)])
    assert get_child_network(model) == _child_of(batches()[:2], loss_fn=loss_fn)
    assert get_child_network(model) not in (_child_of(batches()[:2]), _child_of(batches(), loss_fn=loss_fn))


def test_a_new_head_is_fitted_before_the_choice_if_asked_for(tmp_path):
    model, twin = wrapped(), wrapped()
    callback = ChildTuningCallback(batches(), head_epochs=2, num_batches=3, show_progress=False)
    trainer_for(model, tmp_path, callbacks=[callback])
    fit_head(twin, batches(), epochs=2, num_batches=3, show_progress=False)
    select_child_network(twin, batches(), num_batches=3, show_progress=False)
    assert get_child_network(model) == get_child_network(twin) != _child_of(batches(), num_batches=3)
    heads = [{name: p for name, p in m.named_parameters() if "modules_to_save" in name} for m in (model, twin)]
    assert heads[0] and all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_an_iterator_serves_the_head_and_the_choice(tmp_path):
    model, twin = wrapped(), wrapped()
    for m, data in ((model, iter(batches())), (twin, batches())):
        trainer_for(m, tmp_path, callbacks=[ChildTuningCallback(data, head_epochs=1, show_progress=False)])
    assert get_child_network(model) == get_child_network(twin)


def test_a_head_that_is_not_fitted_is_told_of(tmp_path, caplog):
    trainer_for(wrapped(score="random"), tmp_path, callbacks=[ChildTuningCallback(batches(), head_epochs=1)])
    assert "head_epochs=1: no adapter waits for its child" in caplog.text


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_the_progress_bar_is_shown_where_the_trainer_shows_its_own(disable_tqdm, tmp_path, capfd):
    trainer_for(wrapped(), tmp_path, callbacks=[ChildTuningCallback(batches())], disable_tqdm=disable_tqdm)
    assert ("Fisher information" in capfd.readouterr().err) is not disable_tqdm


def test_other_models_are_refused(tmp_path):
    with pytest.raises(SelectionError, match="BertForSequenceClassification has no Child-Tuning adapter"):
        trainer_for(base(), tmp_path, callbacks=[ChildTuningCallback(batches())])
    with pytest.raises(SelectionError, match="has no adapter 'other' of ours .it has .'default'.."):
        trainer_for(wrapped(), tmp_path, callbacks=[ChildTuningCallback(batches(), adapter_name="other")])


def test_an_event_from_elsewhere_needs_the_data(tmp_path):
    model, args = wrapped(), trainer_for(_selected(), tmp_path).args
    handler = CallbackHandler([ChildTuningCallback()], model, None, None, None)
    with pytest.raises(SelectionError, match=r"ChildTuningCallback\(dataloader\)"):
        handler.on_init_end(args, TrainerState(), TrainerControl())
    handler = CallbackHandler([ChildTuningCallback(batches())], model, None, None, None)
    handler.on_init_end(args, TrainerState(), TrainerControl())
    assert get_child_network(model).nnz > 0


def test_a_child_chosen_by_the_trainers_loader_before_training_is_trained(tmp_path):
    model = get_peft_model(base(), ChildTuningConfig(task_type="SEQ_CLS", score="fisher", density=0.05))
    trainer = trainer_for(model, tmp_path, save_strategy="no")
    child = select_child_network(model, trainer.get_train_dataloader(), show_progress=False)
    trainer.train()
    assert get_child_network(model) == child
    assert all(bool(delta.values.any()) for name, delta in get_deltas(model).items() if delta.nnz > 5)
