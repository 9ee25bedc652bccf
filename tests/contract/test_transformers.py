"""What `transformers` does with a wrapped model: generation, autocast, and training with checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_childtune import ChildTuningConfig, get_child_network, get_deltas, select_child_network
from tests.contract.families import (
    FAMILIES,
    add_noise,
    base_state,
    config_of,
    differing,
    output,
    same_bits,
    snapshot,
    train,
    wrap,
)
from tests.training.runs import ARGUMENTS

GENERATIVE = ["gpt2", "llama", "t5"]


def prompt(family):
    return {key: value for key, value in family.batch().items() if key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", GENERATIVE)
def test_generation_gives_the_tokens_of_the_merged_model(name, beams):
    family = FAMILIES[name]
    options = {**prompt(family), "max_new_tokens": 8, "do_sample": False, "num_beams": beams, "min_new_tokens": 8}
    base = family.build()
    plain = base.generate(**options)
    model = add_noise(wrap(base, family, score="magnitude"), scale=1.0)
    unmerged = model.generate(**options)
    merged = model.merge_and_unload().generate(**options)
    assert torch.equal(unmerged, merged)
    assert not torch.equal(unmerged, plain)


@pytest.mark.parametrize("name", GENERATIVE)
def test_generation_with_a_natively_loaded_adapter_gives_the_tokens_of_the_peft_model(name, saved_adapter):
    saved = saved_adapter(name)
    options = {**prompt(saved.family), "max_new_tokens": 6, "do_sample": False}
    native = saved.fresh()
    native.load_adapter(str(saved.folder))
    wrapped = PeftModel.from_pretrained(saved.fresh(), saved.folder)
    assert torch.equal(native.generate(**options), wrapped.generate(**options))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_merged_and_unmerged_agree_bit_for_bit_under_autocast(name):
    family = FAMILIES[name]
    model = add_noise(wrap(family.build(), family, score="magnitude"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unmerged = output(model, family.batch())
        model.merge_adapter()
        merged = output(model, family.batch())
    assert same_bits(unmerged, merged)
    model.unmerge_adapter()
    assert not same_bits(unmerged, output(model, family.batch()))  # autocast was at work


@pytest.mark.parametrize("name", list(FAMILIES))
def test_gradients_under_autocast_are_those_of_the_dense_model_under_autocast(name):
    family = FAMILIES[name]
    base = family.build()
    dense = copy.deepcopy(base).train()
    model = wrap(base, family, score="magnitude").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, loss = dense(**family.batch()).loss, model(**family.batch()).loss
    assert same_bits(loss, expected)
    expected.backward()
    loss.backward()
    reference, found = dict(dense.named_parameters()), dict(model.named_parameters())
    checked = 0
    for key, indices in get_child_network(model).indices.items():
        path, _, parameter = key.rpartition(".")
        values = found.get(f"base_model.model.{path}.child_tuning_values.default.{parameter}")
        if values is None:
            continue
        assert values.grad.dtype is torch.float32
        gradient = reference[key].grad
        # bf16 rounds to 8 bits, and the two paths round at different places
        atol = 2**-6 * float(gradient.abs().max())
        torch.testing.assert_close(values.grad, gradient.reshape(-1)[indices], rtol=0, atol=atol)
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_t5_in_low_precision_agrees_merged_and_unmerged_though_it_asks_for_the_dtype_of_a_weight(dtype):
    family = FAMILIES["t5"]
    base = family.auto.from_config(family.config(), attn_implementation="eager").to(dtype).eval()
    for module in base.modules():  # as `from_pretrained` does for this family: `wo` stays in float32
        if hasattr(module, "wo"):
            module.wo.to(torch.float32)
    model = add_noise(wrap(base, family, score="magnitude"))
    unmerged = output(model, family.batch())
    model.merge_adapter()
    assert same_bits(output(model, family.batch()), unmerged)


# ---- adapters without a PeftModel


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_an_adapter_added_in_transformers_trains_saves_and_loads_everywhere(name, tmp_path):
    family = FAMILIES[name]
    model = family.build()
    before = snapshot(model)
    model.add_adapter(config_of(family, task_type=None, score="fisher"))
    select_child_network(model, family.batches(), show_progress=False)
    train(model, family.batches(), steps=3)
    # no task type, no `modules_to_save`: the head is frozen like the rest of the base
    assert [n for n, tensor in base_state(model).items() if not same_bits(before[n], tensor)] == []
    tuned = output(model, family.batch())
    model.disable_adapters()
    assert same_bits(output(model, family.batch()), output(family.build(), family.batch()))
    model.enable_adapters()
    assert same_bits(output(model, family.batch()), tuned)

    model.save_pretrained(tmp_path)
    native = family.build()
    native.load_adapter(str(tmp_path))
    assert same_bits(output(native, family.batch()), tuned)
    assert same_bits(output(PeftModel.from_pretrained(family.build(), tmp_path), family.batch()), tuned)


# ---- Trainer


class Sentences(Dataset):
    """Sixteen rows of BERT's batch."""

    def __init__(self):
        self.rows = FAMILIES["bert"].batch(3, size=16)

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {key: tensor[index] for key, tensor in self.rows.items()}


def trainer_for(model, folder, **options):
    rows = Sentences()
    return Trainer(
        model, TrainingArguments(str(folder), **(ARGUMENTS | options)), train_dataset=rows, eval_dataset=rows
    )


KINDS = {"D": {}, "F": {"mode": "task_free", "resample": True}}


def new_model(options):
    return wrap(FAMILIES["bert"].build(), FAMILIES["bert"], **options)


@pytest.fixture(scope="module", params=KINDS)
def uninterrupted(request, tmp_path_factory):
    """Train six steps with a checkpoint after three."""
    folder = tmp_path_factory.mktemp("trainer")
    model = new_model(KINDS[request.param])
    before = snapshot(FAMILIES["bert"].build())
    trainer_for(model, folder).train()
    return KINDS[request.param], folder, model, before


def test_a_trainer_changes_no_base_weight(uninterrupted):
    _, _, model, before = uninterrupted
    assert [n for n, tensor in base_state(model).items() if not same_bits(before[n], tensor)] == []
    assert any(bool(delta.values.any()) for delta in get_deltas(model).values())


def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(uninterrupted, tmp_path):
    options, folder, model, _ = uninterrupted
    resumed = new_model(options)
    trainer_for(resumed, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert differing(resumed, snapshot(model)) == []


def test_a_run_resumed_without_selecting_again_ends_in_the_bits_of_an_uninterrupted_one(uninterrupted, tmp_path):
    """A script that resumes need not score the data again: the checkpoint brings the child along."""
    options, folder, model, _ = uninterrupted
    if options:
        resumed = PeftModel.from_pretrained(FAMILIES["bert"].build(), folder / "checkpoint-3", is_trainable=True)
    else:
        resumed = get_peft_model(
            FAMILIES["bert"].build(), ChildTuningConfig(task_type="SEQ_CLS", score="fisher", density=0.2)
        )
    trainer_for(resumed, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert get_child_network(resumed) == get_child_network(model)
    assert differing(resumed, snapshot(model)) == []


def test_the_last_checkpoint_of_a_trainer_loads_to_the_bits_of_its_model(uninterrupted):
    _, folder, model, _ = uninterrupted
    loaded = PeftModel.from_pretrained(FAMILIES["bert"].build(), folder / "checkpoint-6")
    batch = FAMILIES["bert"].batch(7)
    assert same_bits(output(loaded, batch), output(model, batch))
    assert {path.name for path in (folder / "checkpoint-6").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (folder / "checkpoint-6" / "model.safetensors").exists()


def test_a_trainer_that_loads_its_best_model_ends_in_that_checkpoint(tmp_path):
    model = new_model({})
    trainer = trainer_for(
        model,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worse of the two, the first: so that something is loaded
        learning_rate=1e-3,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    best = PeftModel.from_pretrained(FAMILIES["bert"].build(), tmp_path / "checkpoint-3")
    batch = FAMILIES["bert"].batch(7)
    assert same_bits(output(model, batch), output(best, batch))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # renamed in late releases of transformers
def test_a_trainer_with_gradient_checkpointing_ends_in_the_same_bits_as_without(tmp_path):
    ends = []
    for checkpointing in (False, True):
        model = new_model({})
        trainer_for(
            model,
            tmp_path / str(checkpointing),
            max_steps=3,
            save_strategy="no",
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        ).train()
        ends.append(snapshot(model))
    assert [name for name in ends[0] if not same_bits(ends[0][name], ends[1][name])] == []


def test_selection_takes_a_data_loader_of_the_trainer(tmp_path):
    model = get_peft_model(
        FAMILIES["bert"].build(), ChildTuningConfig(task_type="SEQ_CLS", score="fisher", density=0.05)
    )
    trainer = trainer_for(model, tmp_path)
    child = select_child_network(model, trainer.get_train_dataloader(), show_progress=False)
    assert child.nnz == int(0.05 * child.numel)
    assert get_child_network(model) == child
