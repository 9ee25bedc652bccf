"""What the processes of a DeepSpeed run do, by name: `python deepspeed_cases.py FOLDER NAME...`, like `cases.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

from peft_childtune import ChildNetwork, ChildTuningConfig, get_child_network, get_deltas, select_child_network
from tests.distributed.launching import answer
from tests.distributed.training import CONFIGS, base_model, child_model, collate, global_batches, rows, shard, state_of

CASES: dict[str, Callable[[Path], Any]] = {}
PARTS = 2


def settings(stage: int, **options: Any) -> dict[str, Any]:
    """Return DeepSpeed's configuration for `training.train`."""
    zero: dict[str, Any] = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    zero["stage3_param_persistence_threshold"] = 0  # by default, parameters as small as these are not divided
    # the buffers are of gigabytes by default
    zero |= {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
    return {
        "train_micro_batch_size_per_gpu": 6 // dist.get_world_size(),
        "gradient_accumulation_steps": PARTS,
        "gradient_clipping": 0.5,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the others are compiled on first use
        **options,
    }


def engine_of(model: nn.Module, stage: int, **options: Any) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage, **options))
    return engine


def train(engine: Any, *, steps: int = 5, skip: int = 0) -> int:
    """Take the steps of `training.train`; return how many changed the weights."""
    applied = 0
    engine.train()
    for micro in list(global_batches(steps, PARTS))[skip:]:
        for batch in micro:
            engine.backward(engine(**batch).loss)
            engine.step()
        applied += engine.was_step_applied()
    return applied


def gathered(engine: Any) -> dict[str, Any]:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return state_of(engine.module)


def refusal(act: Callable[[], Any]) -> str:
    """Return the type and text of the error that something raises."""
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def _trained(stage: int, kind: str, **options: Any) -> Callable[[Path], Any]:
    def case(folder: Path) -> dict[str, Any]:
        model = child_model(kind)
        before, digest = state_of(model)["frozen"], get_child_network(model).digest()
        engine = engine_of(model, stage, **options)
        applied = train(engine)
        return {"before": before, "digest": digest, "applied": applied, **gathered(engine)}

    return case


for _stage in (0, 2, 3):
    for _kind in ("d", "f_fixed", "f_resampled"):
        CASES[f"zero{_stage}_{_kind}"] = _trained(_stage, _kind)
    if _stage:
        CASES[f"zero{_stage}_bf16"] = _trained(_stage, "f_resampled", bf16={"enabled": True})
        _scale = {"enabled": True, "initial_scale_power": 18, "hysteresis": 1}
        CASES[f"zero{_stage}_fp16"] = _trained(_stage, "f_resampled", fp16=_scale)


def _resumed(stage: int) -> Callable[[Path], Any]:
    def case(folder: Path) -> dict[str, Any]:
        engine = engine_of(child_model("f_resampled"), stage)
        train(engine, steps=3)
        path = str(folder / f"checkpoint{stage}")
        engine.save_checkpoint(path, exclude_frozen_parameters=True)
        train(engine, skip=3)
        uninterrupted = gathered(engine)
        resumed = engine_of(child_model("f_resampled"), stage)
        resumed.load_checkpoint(path, load_module_strict=False)
        train(resumed, skip=3)
        return {"uninterrupted": uninterrupted, "resumed": gathered(resumed)}

    return case


CASES["zero2_resumed"], CASES["zero3_resumed"] = _resumed(2), _resumed(3)


def zero3_saved(folder: Path) -> dict[str, Any]:
    """Save in each of the ways that there are."""
    engine = engine_of(child_model("d"), 3)
    model, is_first = engine.module, dist.get_rank() == 0
    early = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    found = {"early": refusal(lambda: model.save_pretrained(folder / "early", state_dict=early))}
    train(engine)
    found["direct"] = refusal(lambda: model.save_pretrained(folder / "direct"))
    for name, leaves_out in (("trained_only", True), ("all", False)):
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=leaves_out)
        model.save_pretrained(folder / name, is_main_process=is_first, state_dict=state)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if is_first:
            model.save_pretrained(folder / "gathered")
    found["deltas"] = refusal(lambda: get_deltas(model))
    found["merge"] = refusal(model.merge_adapter)
    return {**found, "digest": get_child_network(model).digest(), **gathered(engine)}


def zero3_small_parameters(folder: Path) -> dict[str, Any]:
    """Save directly where the parameters are too small to be divided, as the deltas often are."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 10_000}
    engine = engine_of(child_model("d"), 3, zero_optimization=zero)
    train(engine)
    engine.module.save_pretrained(folder / "small", is_main_process=dist.get_rank() == 0)
    return gathered(engine)


def by_accelerate(folder: Path) -> dict[str, Any]:
    """Train and save as an accelerate loop does."""
    PartialState(cpu=True)  # without a GPU accelerate finds the other processes like this only
    plugin = DeepSpeedPlugin(hf_ds_config=settings(3))
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=PARTS)
    model = child_model("f_resampled")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1))
    engine.train()
    for micro in global_batches(5, PARTS):
        for batch in micro:
            with accelerator.accumulate(engine):
                accelerator.backward(engine(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    state = accelerator.get_state_dict(engine)
    unwrapped = accelerator.unwrap_model(engine)
    unwrapped.save_pretrained(folder / "accelerate", is_main_process=accelerator.is_main_process, state_dict=state)
    return {"engine": type(engine).__name__, **gathered(engine)}


def _by_trainer(stage: int) -> Callable[[Path], Any]:
    def case(folder: Path) -> dict[str, Any]:
        """Train and save as Trainer does, from a model that transformers divides while it loads."""
        configuration = settings(stage, gradient_accumulation_steps=1)
        arguments = TrainingArguments(
            str(folder / f"trainer{stage}"),
            deepspeed=configuration,
            max_steps=3,
            max_grad_norm=configuration["gradient_clipping"],
            save_steps=2,
            per_device_train_batch_size=configuration["train_micro_batch_size_per_gpu"],
            report_to=[],
            disable_tqdm=True,
        )
        _ = arguments.device  # sets up a state, of one process where there is no GPU
        PartialState._reset_state()
        arguments.distributed_state = PartialState(cpu=True)
        model = BertForSequenceClassification.from_pretrained(folder / "base")
        wrapped = get_peft_model(model, ChildTuningConfig(task_type="SEQ_CLS", **CONFIGS["f_resampled"]))
        trainer = Trainer(wrapped, arguments, train_dataset=rows(), data_collator=collate)
        trainer.train()
        trainer.save_model()
        engine = trainer.model_wrapped
        return {"engine": type(engine).__name__, **gathered(engine)}

    return case


def zero_init(folder: Path) -> dict[str, Any]:
    """Wrap a base whose weights were divided as they were loaded."""
    chosen = get_child_network(child_model("d"))
    keep = HfDeepSpeedConfig(settings(3))
    options = {"task_type": "SEQ_CLS", "exclude_modules": r".*\.key"}

    def fresh(**more: Any) -> nn.Module:
        base = BertForSequenceClassification.from_pretrained(folder / "base")
        return get_peft_model(base, ChildTuningConfig(**options, **more))

    found = {
        "magnitude": refusal(lambda: fresh(score="magnitude", density=0.05)),
        "fisher": refusal(lambda: select_child_network(fresh(**CONFIGS["d"]), shard(), show_progress=False)),
    }
    given = fresh(**CONFIGS["d"])
    select_child_network(given, network=ChildNetwork(chosen.children), show_progress=False)
    for name, model in (("d", given), ("f_fixed", fresh(**CONFIGS["f_fixed"]))):
        engine = engine_of(model, 3)
        train(engine)
        found[name] = gathered(engine)
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        model.save_pretrained(folder / f"init_{name}", is_main_process=dist.get_rank() == 0, state_dict=state)
    dist.barrier()
    base = BertForSequenceClassification.from_pretrained(folder / "base")
    found["load"] = refusal(lambda: PeftModel.from_pretrained(base, folder / "init_d"))
    with deepspeed.zero.GatheredParameters(list(base.parameters())):
        PeftModel.from_pretrained(base, folder / "init_d")
    del keep
    return found


def selected_late(folder: Path) -> dict[str, str]:
    """Select when the model is in an engine already."""
    found = {}
    for stage in (0, 2, 3):
        engine = engine_of(child_model("f_fixed"), stage)
        found[f"engine{stage}"] = refusal(lambda engine=engine: select_child_network(engine))
        if stage:
            found[f"model{stage}"] = refusal(lambda engine=engine: select_child_network(engine.module))
    return found


def other_children(folder: Path) -> list[str]:
    """Train a child of its own in each process, of as many entries as the others'."""
    found = []
    for stage in (2, 3):
        engine = engine_of(child_model("f_fixed", seed=dist.get_rank(), scope="tensor"), stage)
        found.append(refusal(lambda engine=engine: train(engine)))
    return found


_OTHERS = (zero3_saved, zero3_small_parameters, by_accelerate, zero_init, selected_late, other_children)
CASES |= {case.__name__: case for case in _OTHERS}
CASES |= {"trainer_zero2": _by_trainer(2), "trainer_zero3": _by_trainer(3)}


def _connect(folder: Path) -> None:
    """Form a process group, and leave a model that all load."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    deepspeed.init_distributed("gloo")
    if dist.get_rank() == 0:
        base_model().save_pretrained(folder / "base")
    dist.barrier()


if __name__ == "__main__":
    _connect(Path(sys.argv[1]))
    answer(CASES)
