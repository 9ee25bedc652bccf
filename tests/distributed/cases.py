"""What the processes of one run do, by name: `python cases.py FOLDER NAME...` leaves what each found in FOLDER."""

# no lazy annotations: DDP looks at those of its hooks
import contextlib
import io
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from peft_childtune import (
    ChildTuningCallback,
    ChildTuningConfig,
    fit_head,
    get_child_network,
    get_deltas,
    ranks,
    select_child_network,
)
from peft_childtune.codec import write_step_
from peft_childtune.tuner import ChildTuningLayer
from tests.distributed.launching import answer
from tests.distributed.trainers import trained_by_trainer
from tests.distributed.training import (
    base_model,
    child_model,
    collate,
    full,
    place,
    rows,
    shard,
    state_of,
    train,
    wrapped,
)

CASES: dict[str, Callable[[Path], Any]] = {}


def case(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    CASES[function.__name__] = function
    return function


def _trained(how: str | None, kind: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> dict[str, Any]:
        model = child_model(kind)
        before = state_of(model)["frozen"]
        digest = get_child_network(model).digest()
        model = wrapped(model, how)
        train(model)
        return {"digest": digest, "before": before, **state_of(model)}

    return run


for _how in (None, "ddp", "fsdp1", "fsdp2"):
    for _kind in ("d", "f_fixed", "f_resampled"):
        CASES[f"{_how or 'one'}_{_kind}"] = _trained(_how, _kind)


for _kind in ("d", "f_resampled"):
    CASES[f"trainer_{_kind}"] = partial(trained_by_trainer, _kind, None)
    CASES[f"trainer_fsdp2_{_kind}"] = partial(trained_by_trainer, _kind, "FULL_STATE_DICT")


def _error_of(call: Callable[[], object]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def _selectable(**options: Any) -> torch.nn.Module:
    given = {"task_type": "SEQ_CLS", "score": "fisher", "density": 0.05} | options
    return get_peft_model(base_model(), ChildTuningConfig(**given))


@case
def ddp_traffic(folder: Path) -> dict[str, Any]:
    """Count the numbers that the gradients' exchange moves in a step, and the writes into coded children."""
    model = child_model("d")
    codes = [buffer for name, buffer in model.named_buffers() if ".child_tuning_code." in name]
    versions = [code._version for code in codes]
    ddp = wrapped(model, "ddp")
    moved: list[int] = []

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        moved.append(bucket.buffer().numel())
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    for batch in shard()[:2]:
        ddp(**batch).loss.backward()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    written = sum(code._version - before for code, before in zip(codes, versions, strict=True))
    return {"moved": sum(moved) / 2, "trained": trained, "writes": written, "codes": len(codes)}


def _digest(loader: Any, score: str) -> tuple[str, int]:
    """Return the child's digest, and how many examples were counted: a small child does not tell one more or less."""
    model = _selectable(score=score)
    digest = select_child_network(model, loader, show_progress=False).digest()
    return digest, model.peft_config["default"].selection["examples"]


@case
def uneven_shards(folder: Path) -> dict[str, tuple[str, int]]:
    """Select from 23 examples that are divided in several uneven ways."""
    rank, world = place()
    whole = rows()[:23]
    own = [collate(whole[i : i + 5]) for i in range(0, 23, 5)]
    found = {}
    for score in ("fisher", "gradient"):
        found[f"{score} by batch"] = _digest(own[rank::world], score)
        found[f"{score} all on the last"] = _digest(own if rank == world - 1 else [], score)
    accelerator = Accelerator()  # starts again from the first examples to make the last batches even
    for batch_size in (4, 5, 16):
        prepared = accelerator.prepare(DataLoader(whole, batch_size, collate_fn=collate))
        found[f"fisher prepared {batch_size}"] = _digest(prepared, "fisher")
    return found


@case
def fitted_head(folder: Path) -> dict[str, Any]:
    """Fit the head on 23 examples, six a step: the last step has five, which do not divide evenly."""
    rank, world = place()
    steps = [rows()[:23][i : i + 6] for i in range(0, 23, 6)]
    own = [[row for number, row in enumerate(step) if number % world == rank] for step in steps]
    model = _selectable()
    loss = fit_head(model, [collate(step) for step in own], epochs=2, show_progress=False)
    none_here = fit_head(model, [collate(step) for step in steps] if rank == 0 else [], show_progress=False)
    heads = {name: p.detach() for name, p in model.named_parameters() if ".modules_to_save." in name}
    return {"losses": (loss, none_here), "heads": heads}


@case
def moved_child(folder: Path) -> dict[str, Any]:
    """Choose by movement, in steps that are shared out unevenly; then with all batches on the first process."""
    rank, world = place()
    steps = [rows()[:23][i : i + 6] for i in range(0, 23, 6)]
    own = [collate([row for number, row in enumerate(step) if number % world == rank]) for step in steps]
    found = {}
    for name, data in {"shared": own, "first": [collate(step) for step in steps] if rank == 0 else []}.items():
        model = _selectable(score="movement", scope="tensor")
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        child = select_child_network(model, data, show_progress=False)
        after = dict(model.named_parameters())
        same = all(torch.equal(after[key], old) for key, old in before.items() if key in after)
        found[name] = (child.indices, model.peft_config["default"].selection["examples"], same)
    return found


@case
def sampled_shards(folder: Path) -> list[int]:
    """Count the examples of samplers that are shorter than their dataset."""
    accelerator = Accelerator()
    found = []
    for number in (9, 12, 17):
        loader = DataLoader(rows(), 4, sampler=list(range(number)), collate_fn=collate)
        found.append(_digest(accelerator.prepare(loader), "gradient")[1])
    without_rest = BatchSampler(SequentialSampler(rows()), 5, drop_last=True)
    written_out = [list(range(start, start + 4)) for start in range(0, 20, 4)]
    for batches in (without_rest, _Listed(written_out)):
        loader = DataLoader(rows(), batch_sampler=batches, collate_fn=collate)
        found.append(_digest(accelerator.prepare(loader), "gradient")[1])
    return found


class _Listed(list[list[int]]):
    """A batch sampler without a sampler."""

    batch_size, drop_last = 4, False


@case
def dispatched_shards(folder: Path) -> dict[str, Any]:
    """Count the examples of batches that the first process reads for all; let the last one fail at its first."""
    accelerator = Accelerator()

    def dispatched(number: int) -> Any:
        loader = DataLoader(rows()[:number], 4, collate_fn=collate_evenly)
        return prepare_data_loader(loader, device=accelerator.device, put_on_device=True, dispatch_batches=True)

    def collate_evenly(part: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: tensor[: len(part)] for name, tensor in collate([*part, *rows()]).items()}

    def fails(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if place()[0] == place()[1] - 1:
            raise RuntimeError("no loss")
        return model(**batch).loss

    read: list[int] = []
    own = [collate(rows()[:4])] * 9
    counted = (read.append(number) or batch for number, batch in enumerate(own))
    return {
        "examples": [_digest(dispatched(number), "gradient")[1] for number in (3, 8, 17, 23)],
        "error": _error_of(
            lambda: select_child_network(_selectable(), dispatched(23), loss_fn=fails, show_progress=False)
        ),
        "own": _error_of(lambda: select_child_network(_selectable(), counted, loss_fn=fails, show_progress=False)),
        "read": len(read),
    }


@case
def progress_bars(folder: Path) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        select_child_network(_selectable(), shard())
    return shown.getvalue()


@case
def fsdp2_evaluation(folder: Path) -> dict[str, Any]:
    """Evaluate on few tokens, twice, and count what is kept of composed weights."""
    model = wrapped(child_model("f_fixed", init_weights=False), "fsdp2").eval()
    with torch.no_grad():
        logits = [model(**collate(rows()[:2])).logits for _ in range(2)]
    kept = [len(m._compose_cache._kept) for m in model.modules() if isinstance(m, ChildTuningLayer)]
    return {"logits": logits, "kept": sum(kept), "layers": len(kept)}


@case
def fsdp2_units(folder: Path) -> dict[str, Any]:
    """Make each adapted layer a unit, and then what is inside of one; add an adapter to such a model."""
    model = child_model("f_fixed")
    for module in list(model.modules()):
        if isinstance(module, ChildTuningLayer):
            fully_shard(module)
    fully_shard(model)
    train(model)
    inner = child_model("f_fixed")
    for module in list(inner.modules()):
        if isinstance(module, torch.nn.Linear):
            fully_shard(module)
    fully_shard(inner)
    config = ChildTuningConfig(task_type="SEQ_CLS", score="random", density=0.05)
    return {
        **state_of(model),
        "inner": _error_of(lambda: inner.train()(**shard()[0])),
        "added": _error_of(lambda: model.add_adapter("late", config)),
    }


@case
def one_fails(folder: Path) -> list[tuple[str, str]]:
    """Let one process of several meet a problem in different places."""
    last = place()[0] == place()[1] - 1
    poisoned = shard()
    if last:
        poisoned[-1] = {**poisoned[-1], "labels": torch.full_like(poisoned[-1]["labels"], 77)}  # no such class
    network = get_child_network(_selectable(score="random", seed=place()[0]))
    ddp, late = wrapped(child_model("f_fixed"), "ddp"), wrapped(_selectable(score="random"), "ddp")
    late.module.add_adapter("late", ChildTuningConfig(task_type="SEQ_CLS", score="random", density=0.05))
    late.module.set_adapter("late")
    early = _selectable(score="random")
    early.add_adapter("early", ChildTuningConfig(task_type="SEQ_CLS", score="random", density=0.05))
    early = wrapped(early, "ddp")
    early.module.set_adapter("early")  # frozen when DDP looked
    masks = wrapped(child_model("f_resampled", seed=place()[0]), "ddp")
    checkpointed = child_model("f_resampled", seed=place()[0])
    checkpointed.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    checkpointed.enable_input_require_grads()
    checkpointed = wrapped(checkpointed, "ddp")
    active = child_model("f_fixed")
    active.add_adapter("other", active.peft_config["default"])
    active.set_adapter(["default", "other"][place()[0]])
    active = wrapped(active, "ddp")
    resampled = get_peft_model(
        base_model(), ChildTuningConfig(task_type="SEQ_CLS", mode="task_free", resample=True, seed=place()[0])
    )
    resuming = SimpleNamespace(resume_from_checkpoint=str(folder) if last else None, disable_tqdm=True)
    different = get_peft_model(base_model(seed=place()[0]), ChildTuningConfig(task_type="SEQ_CLS", score="fisher"))
    return [
        _error_of(lambda: select_child_network(_selectable(), poisoned, show_progress=False)),
        _error_of(lambda: select_child_network(_selectable(), None if last else shard(), show_progress=False)),
        _error_of(lambda: select_child_network(_selectable(), network=network)),
        _error_of(lambda: select_child_network(different, shard(), show_progress=False)),
        _error_of(lambda: select_child_network(ddp)),
        _error_of(lambda: late.train()(**shard()[0])),
        _error_of(lambda: masks.train()(**shard()[0])),
        _error_of(lambda: select_child_network(resampled)),
        _error_of(lambda: early.train()(**shard()[0])),
        _error_of(lambda: checkpointed.train()(**shard()[0])),
        _error_of(lambda: active.train()(**shard()[0])),
        _error_of(lambda: select_child_network(torch.compile(ddp, backend="eager"))),
        _error_of(lambda: ChildTuningCallback(shard()).on_init_end(resuming, None, None, model=_selectable())),
    ]


@case
def divided_children(folder: Path) -> list[tuple[str, str]]:
    """Train a child of its own in each process, of as many entries as the others'."""
    found = []
    for how in ("fsdp2", "fsdp1"):
        model = wrapped(child_model("f_fixed", seed=place()[0], scope="tensor"), how)
        found.append(_error_of(lambda model=model: model.train()(**shard()[0])))
    return found


@case
def own_groups(folder: Path) -> dict[str, Any]:
    """Train a model of its own in each process, in a group of one."""
    rank, world = place()
    groups = [dist.new_group([number]) for number in range(world)]
    model = DistributedDataParallel(child_model("f_fixed", seed=rank), process_group=groups[rank])
    train(model, steps=1)
    return state_of(model)["codes"]


@case
def one_comes_late(folder: Path) -> list[str]:
    """Return what the processes that wait have said."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger(ranks.__name__).addHandler(handler)
    ranks._PATIENCE = 1
    model = _selectable(score="random")
    wrapped(model, "ddp")  # and done with it, which is no reason to refuse the model
    if place()[0] == place()[1] - 1:
        time.sleep(3)
    select_child_network(model)
    ranks._PATIENCE = 30
    return said


def _numbered(model: torch.nn.Module) -> None:
    """Give every trained entry a value of its own, so that no part can stand for another."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += torch.arange(1, parameter.numel() + 1).view(parameter.shape) * 1e-3 + number


def _fsdp2_accelerator(state_dict_type: str = "FULL_STATE_DICT") -> Accelerator:
    """Return an accelerator that shards over CPU processes, which accelerate itself leaves to accelerators."""
    accelerator = Accelerator(cpu=True)
    state = AcceleratorState()
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    settings = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["BertLayer"]}
    settings |= {"state_dict_type": state_dict_type, "cpu_ram_efficient_loading": False}
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **settings)
    return accelerator


@case
def fsdp2_saving(folder: Path) -> dict[str, Any]:
    """Save an accelerate-prepared FSDP2 model, and go through its full and its sharded state dicts."""
    accelerator = _fsdp2_accelerator()
    model = child_model("d")
    _numbered(model)
    expected = state_of(model)["trained"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(type(p.data).__name__ == "DTensor" for p in model.parameters())
    direct = _error_of(lambda: model.save_pretrained(folder / "direct"))
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder / "full", state_dict=state)
    for name in ("full", "sharded"):
        options = StateDictOptions(full_state_dict=name == "full")
        kept = {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in get_model_state_dict(model, options=options).items()
        }
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        set_model_state_dict(model, kept, options=options)
        assert {k: torch.equal(v, expected[k]) for k, v in state_of(model)["trained"].items()} == dict.fromkeys(
            expected, True
        ), name
    errors = {
        "direct": direct,
        "select": _error_of(lambda: select_child_network(model, shard())),
        "network": _error_of(lambda: select_child_network(model, network=get_child_network(model))),
        "deltas": _error_of(lambda: get_deltas(model)),
        "merge": _error_of(model.merge_adapter),
    }
    return {"expected": expected, "errors": errors}


@case
def trainer_sharded_checkpoint(folder: Path) -> tuple[str, str]:
    return _error_of(lambda: trained_by_trainer("f_fixed", "SHARDED_STATE_DICT", folder))


def _fsdp2_checkpoint(kind: str, folder: Path) -> dict[str, Any]:
    """Save and load the state of a run through accelerate, with everything trained set to zero in between."""
    accelerator = _fsdp2_accelerator(kind)
    model = child_model("f_resampled")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    for batch in shard()[:2]:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    before = state_of(model)
    accelerator.save_state(folder / kind)
    with torch.no_grad():
        for tensor in (p for p in model.parameters() if p.requires_grad):
            tensor.zero_()
        for name, code in model.named_buffers():
            if ".child_tuning_code." in name:
                write_step_(code, 77)
    accelerator.load_state(folder / kind)
    return {"before": before, "after": state_of(model)}


for _kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
    CASES[f"fsdp2_{_kind}"] = partial(_fsdp2_checkpoint, _kind)


@case
def fsdp2_bf16(folder: Path) -> dict[str, Any]:
    """Take many steps, each too small to show in bf16, with bf16 all-gathers and products."""
    model = child_model("f_fixed")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.get_base_model().bert.encoder.layer:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    deltas = {name: p for name, p in model.named_parameters() if "child_tuning_values" in name}
    with torch.no_grad():
        for delta in deltas.values():
            delta.fill_(1.0)
    optimizer = torch.optim.SGD(deltas.values(), lr=1.0)
    for _ in range(100):
        model(**shard()[0]).loss.backward()
        for delta in deltas.values():
            delta.grad.fill_(1e-4)  # bf16 numbers near 1 are 0.004 to 0.008 apart
        optimizer.step()
        optimizer.zero_grad()
    return {name: full(delta) for name, delta in deltas.items()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    answer(CASES)
