"""TRL's `SFTTrainer`: it wraps the base by itself, or is given a wrapped model."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_childtune import (
    ChildTuningCallback,
    ChildTuningConfig,
    get_child_network,
    get_deltas,
    select_child_network,
)
from peft_childtune.codec import read_step
from peft_childtune.tuner import ChildTuningLayer
from tests.training.runs import differences, state_of, tensors_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import SFTConfig, SFTTrainer

# TRL checkpoints activations unless told otherwise, under a name that transformers has just renamed
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")

_WORDS = ("[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(37)))
_KINDS = {
    "D": {"score": "fisher"},
    "magnitude": {"score": "magnitude"},
    "fixed F": {"mode": "task_free"},
    "per-step F": {"mode": "task_free", "resample": True},
}


def _tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def _sentences():
    disable_progress_bars()
    return Dataset.from_list([{"text": " ".join(f"w{i * j % 37}" for j in range(1, 4 + i % 5))} for i in range(12)])


def _base(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def _config(kind="D", **options):
    return ChildTuningConfig(**({"task_type": "CAUSAL_LM", "density": 0.1} | _KINDS[kind] | options))


def _trainer(model, folder, *, peft_config=None, callbacks=None, rows=None, **options):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**(arguments | options)),
        train_dataset=_sentences() if rows is None else Dataset.from_list(rows),
        processing_class=_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def _trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _check_run(trainer, base_before):
    """Only the child is trained, and after training only its entries differ from the base."""
    model = trainer.model
    child = get_child_network(model)
    trained = _trained(model)
    assert sum(p.numel() for p in trained.values()) == model.get_nb_trainable_parameters()[0] == child.nnz
    assert all(".child_tuning_values." in name for name in trained)
    trainer.train()
    losses = _losses(trainer)
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)
    held = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if ".child_tuning_" not in name
    }
    assert differences({"tensors": held}, {"tensors": base_before}) == []
    assert any(bool(delta.values.any()) for delta in get_deltas(model).values())
    merged = model.merge_and_unload().state_dict()
    changed = {name: merged[name].ne(tensor).reshape(-1).nonzero().flatten() for name, tensor in base_before.items()}
    outside = {
        name: len(set(positions.tolist()) - set(child.indices.get(name, torch.zeros(0)).tolist()))
        for name, positions in changed.items()
    }
    assert set(outside.values()) == {0}
    # of masks drawn anew, four steps have met 1 - .9 ** 4 of the weights
    assert sum(len(positions) for positions in changed.values()) > 0.3 * child.nnz


@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputing", "keeping activations"])
@pytest.mark.parametrize("kind", _KINDS)
def test_a_trainer_that_is_given_a_configuration_trains_the_child_and_nothing_else(kind, checkpointing, tmp_path):
    before = tensors_of(_base())
    trainer = _trainer(
        _base(),
        tmp_path,
        peft_config=_config(kind),
        callbacks=[ChildTuningCallback()],
        save_strategy="no",
        gradient_checkpointing=checkpointing,
    )
    _check_run(trainer, before)


@pytest.mark.parametrize("kind", ["D", "fixed F"])
def test_a_trainer_that_is_given_a_wrapped_model_trains_the_child_and_nothing_else(kind, tmp_path):
    before = tensors_of(_base())
    model = get_peft_model(_base(), _config(kind))
    trainer = _trainer(model, tmp_path, save_strategy="no")
    if kind == "D":
        select_child_network(model, trainer.get_train_dataloader(), show_progress=False)
    _check_run(trainer, before)


def test_the_callback_chooses_what_would_be_chosen_from_the_finished_trainer(tmp_path):
    """Though at that moment TRL has not yet exchanged the model's forward for its own."""
    early = _trainer(_base(), tmp_path, peft_config=_config(), callbacks=[ChildTuningCallback()])
    chosen = get_child_network(early.model)
    early.train()
    end = state_of(early)
    late = _trainer(_base(), tmp_path, peft_config=_config())
    assert select_child_network(late.model, late.get_train_dataloader(), show_progress=False) == chosen
    late.train()
    assert differences(state_of(late), end) == []


def test_without_a_callback_training_says_what_to_call(tmp_path):
    trainer = _trainer(_base(), tmp_path, peft_config=_config())
    with pytest.raises(RuntimeError, match="select_child_network"):
        trainer.train()


@pytest.mark.parametrize("kind", ["D", "per-step F"])
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(kind, tmp_path):
    def trainer(name):
        callbacks = [ChildTuningCallback(None if name == "whole" else _other_batches)]
        return _trainer(_base(), tmp_path / name, peft_config=_config(kind), callbacks=callbacks)

    whole = trainer("whole")
    whole.train()
    end = state_of(whole)
    resumed = trainer("resumed")
    if kind == "D":
        assert get_child_network(resumed.model) != get_child_network(whole.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert differences(state_of(resumed), end) == []


def _other_batches():
    tokens = torch.randint(3, 37, (6, 5), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": tokens, "labels": tokens}]


def test_the_last_checkpoint_loads_to_the_trained_model(tmp_path):
    trainer = _trainer(_base(), tmp_path, peft_config=_config(), callbacks=[ChildTuningCallback()])
    trainer.train()
    loaded = PeftModel.from_pretrained(_base(), tmp_path / "checkpoint-4")
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, trainer.model.eval()(tokens).logits)


@pytest.mark.parametrize("kind", ["D", "per-step F"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_bf16_as_trl_sets_by_default_the_deltas_and_their_optimizer_stay_float32(kind, dtype, tmp_path):
    trainer = _trainer(
        _base(dtype),
        tmp_path,
        peft_config=_config(kind),
        callbacks=[ChildTuningCallback()],
        save_strategy="no",
        bf16=None,
    )
    assert trainer.args.bf16
    trainer.train()
    assert {p.dtype for p in _trained(trainer.model).values()} == {torch.float32}
    moments = [s for state in trainer.optimizer.state_dict()["state"].values() for s in state.values()]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert all(math.isfinite(loss) for loss in _losses(trainer))
    held = {n: p.dtype for n, p in trainer.model.named_parameters() if ".child_tuning_" not in n}
    assert set(held.values()) == {dtype}
    if kind == "per-step F":
        layers = [m for m in trainer.model.modules() if isinstance(m, ChildTuningLayer)]
        assert {read_step(m.child_tuning_code["default"].get(p)) for m in layers for p in m.covered} == {4}


@pytest.mark.parametrize("data", ["packed", "completions"])
def test_data_that_trl_packs_or_masks_choose_and_train_the_child(data, tmp_path):
    options = {"packing": True, "max_length": 16, "packing_strategy": "wrapped"} if data == "packed" else {}
    rows = None if data == "packed" else [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2}"} for i in range(12)]
    trainer = _trainer(
        _base(),
        tmp_path,
        peft_config=_config(),
        callbacks=[ChildTuningCallback()],
        rows=rows,
        save_strategy="no",
        **options,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    masked = (batch["labels"] == -100) & batch["attention_mask"].bool()
    assert bool(masked.any()) is (data == "completions")
    assert (batch["input_ids"][:, :-1] == 2).sum(1).max() == (3 if data == "packed" else 0)  # ends of sentences
    _check_run(trainer, tensors_of(_base()))
