"""Selection and training in two and three real processes, against one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_childtune.codec import read_step
from tests.distributed.launching import run_cases
from tests.distributed.training import base_model

KINDS = ("d", "f_fixed", "f_resampled")
HOW = ("ddp", "fsdp1", "fsdp2")
TRAINERS = ("trainer_d", "trainer_f_resampled")
SHARDED_TRAINERS = ("trainer_fsdp2_d", "trainer_fsdp2_f_resampled")
CHECKPOINTS = ("fsdp2_FULL_STATE_DICT", "fsdp2_SHARDED_STATE_DICT")
STEPS = 5


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    names = [
        *(f"one_{kind}" for kind in KINDS),
        *TRAINERS,
        "uneven_shards",
        "fitted_head",
        "moved_child",
        "fsdp2_evaluation",
    ]
    return {name: found[0] for name, found in run_cases(names, 1, tmp_path_factory.mktemp("one")).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[Any]]:
    names = [f"{how}_{kind}" for how in HOW for kind in KINDS]
    names += ["ddp_traffic", "uneven_shards", "fitted_head", "moved_child", "sampled_shards", "dispatched_shards"]
    names += [
        "progress_bars",
        "one_fails",
        "one_comes_late",
        "divided_children",
        "own_groups",
        "fsdp2_evaluation",
        "fsdp2_units",
    ]
    # these three change what accelerate takes the processes for
    names += [*TRAINERS, "fsdp2_bf16", *CHECKPOINTS, "fsdp2_saving", *SHARDED_TRAINERS, "trainer_sharded_checkpoint"]
    return run_cases(names, 2, folder)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return run_cases(["ddp_d", "fsdp2_d", "fsdp2_f_resampled", "uneven_shards"], 3, tmp_path_factory.mktemp("three"))


@pytest.fixture(params=[(2, f"{how}_{kind}") for how in HOW for kind in KINDS], ids=lambda param: param[1])
def runs(request: pytest.FixtureRequest) -> tuple[list[Any], str]:
    return request.getfixturevalue("two")[request.param[1]], request.param[1].partition("_")[2]


def _check_against_one(runs: list[Any], one: dict[str, Any]) -> None:
    """Compare what several processes trained with what one trained on the same global batches.

    1e-4: float32 sums in another order, of a few 1e-6 after five steps of Adam; a wrong gradient, clipping or mask is
    off by orders of magnitude more.
    """
    for run in runs:
        assert run["digest"] == one["digest"]
        for name, values in run["trained"].items():
            assert torch.equal(values, runs[0]["trained"][name]), name
            error = float((values - one["trained"][name]).norm() / one["trained"][name].norm())
            assert error < 1e-4, name


def test_every_process_ends_with_the_deltas_that_one_process_trains(runs, one):
    found, kind = runs
    _check_against_one(found, one[f"one_{kind}"])


@pytest.mark.parametrize("name", ["ddp_d", "fsdp2_d", "fsdp2_f_resampled"])
def test_three_processes_do_too(name, three, one):
    _check_against_one(three[name], one[f"one_{name.partition('_')[2]}"])


@pytest.mark.parametrize("name", [*TRAINERS, *SHARDED_TRAINERS])
def test_trainer_in_two_processes_trains_what_it_trains_in_one(name, two, one):
    _check_against_one([run["whole"] for run in two[name]], one[name.replace("fsdp2_", "")]["whole"])


@pytest.mark.parametrize("name", [*TRAINERS, *SHARDED_TRAINERS])
def test_a_run_of_two_processes_that_is_resumed_ends_in_the_same_bits(name, two):
    for run in two[name]:
        whole, resumed = run["whole"], run["resumed"]
        assert resumed["digest"] == whole["digest"]
        for part in ("trained", "codes"):
            assert all(torch.equal(value, resumed[part][key]) for key, value in whole[part].items())
        states = list(zip(whole["optimizer"], resumed["optimizer"], strict=True))
        assert states and all(
            torch.equal(value, after[key]) for before, after in states for key, value in before.items()
        )


@pytest.mark.parametrize(
    "name, saved",
    [
        ("trainer_d", "d_None"),
        ("trainer_f_resampled", "f_resampled_None"),
        ("trainer_fsdp2_d", "d_FULL_STATE_DICT"),
        ("trainer_fsdp2_f_resampled", "f_resampled_FULL_STATE_DICT"),
    ],
)
def test_trainer_saves_the_adapter_that_all_processes_hold(name, saved, two, folder):
    loaded = PeftModel.from_pretrained(base_model(), folder / saved / "whole", is_trainable=True)
    expected = two[name][0]["whole"]["trained"]
    found = {key: parameter for key, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys()
    assert all(torch.equal(value.detach(), expected[key]) for key, value in found.items())


def test_trainers_sharded_checkpoints_are_refused_with_the_setting_that_works(two):
    for kind, message in two["trainer_sharded_checkpoint"]:
        assert kind == "UnsupportedError" and "FULL_STATE_DICT" in message


def test_the_base_stays_as_it_was_in_every_process(runs):
    for run in runs[0]:
        assert all(torch.equal(value, run["before"][name]) for name, value in run["frozen"].items())


@pytest.mark.parametrize("how", HOW)
def test_the_steps_of_a_resampled_child_are_counted_in_every_process(how, two):
    for run in two[f"{how}_f_resampled"]:
        assert {read_step(code) for code in run["codes"].values()} == {STEPS}


def test_training_moved_the_deltas(one):
    for kind in KINDS:
        deltas = [values for name, values in one[f"one_{kind}"]["trained"].items() if "child_tuning" in name]
        assert deltas and all(bool(values.any()) for values in deltas)


def test_ddp_moves_a_number_for_each_trained_entry_and_never_writes_into_coded_children(two):
    for run in two["ddp_traffic"]:
        assert run["moved"] == run["trained"]
        assert run["codes"] > 0 and run["writes"] == 0


@pytest.mark.parametrize("processes", ["two", "three"])
def test_uneven_shards_choose_the_child_of_one_process(processes, one, request):
    for run in request.getfixturevalue(processes)["uneven_shards"]:
        assert run == one["uneven_shards"]
        assert {examples for _, examples in run.values()} == {23}


def test_a_head_is_fitted_by_the_steps_of_all_processes_together(two, one):
    for run in two["fitted_head"]:
        assert run["losses"] == pytest.approx(one["fitted_head"]["losses"], rel=1e-5)
        assert run["heads"].keys() == one["fitted_head"]["heads"].keys()
        for name, head in run["heads"].items():
            assert torch.equal(head, two["fitted_head"][0]["heads"][name])
            # float32 sums in another order, after eight steps of Adam
            torch.testing.assert_close(head, one["fitted_head"]["heads"][name], rtol=1e-4, atol=1e-5)


def test_a_child_by_movement_is_the_one_that_a_single_process_chooses(two, one):
    for run in two["moved_child"]:
        for how, (indices, examples, same) in run.items():
            expected, number, _ = one["moved_child"][how]
            assert same and examples == number == 23
            chosen = sum(len(each) for each in expected.values())
            kept = sum(int(torch.isin(each, indices[name]).sum()) for name, each in expected.items())
            # all on the first: the same numbers; shared out: sums in another order, so near ties may change places
            assert kept == chosen if how == "first" else kept > 0.95 * chosen


def test_examples_of_samplers_that_leave_some_out_are_counted_once(two):
    assert two["sampled_shards"] == [[9, 12, 17, 20, 20]] * 2


def test_a_process_that_fails_reads_on_only_where_the_others_wait_for_its_part(two):
    first, last = two["dispatched_shards"]
    assert first["examples"] == last["examples"] == [3, 8, 17, 23]
    for kind in ("error", "own"):
        assert "process 1 of 2 has failed" in first[kind][1] and last[kind] == ("RuntimeError", "no loss")
    assert (first["read"], last["read"]) == (9, 1)


def test_all_stop_when_one_process_fails(two):
    first, last = two["one_fails"]
    assert last[0][0] == "IndexError" and last[1][0] == "SelectionError"
    for (kind, message), (_, cause) in zip(first[:2], last[:2], strict=True):
        assert kind == "SelectionError" and message.startswith("process 1 of 2 has failed") and cause in message


def test_processes_that_hold_different_children_or_models_are_refused(two):
    for run in two["one_fails"]:
        assert run[2][0] == "SelectionError" and "chose different children" in run[2][1]
        assert run[3][0] == "SelectionError" and "transformers.set_seed" in run[3][1]


def test_a_checkpoint_that_some_processes_do_not_find_is_refused(two):
    for run in two["one_fails"]:
        assert run[12][0] == "SelectionError"
        assert "process 1 of 2 has a checkpoint to resume from, process 0 has none to resume from" in run[12][1]


def test_what_ddp_would_not_synchronise_is_refused(two):
    for run in two["one_fails"]:
        selected, late, masks, resampled, early, checkpointed, active, compiled = run[4:12]
        assert {kind for kind, _ in run[4:]} == {"SelectionError"}
        assert "is in DistributedDataParallel already" in selected[1] and compiled == selected
        assert "after the model was wrapped" in late[1] and "after the model was wrapped" in early[1]
        assert "the same configuration, `seed` above all" in masks[1]
        assert "the same configuration, `seed` above all" in checkpointed[1]
        assert "the same active adapters" in active[1]
        assert "of seed 1" in resampled[1] and "chose different children" in resampled[1]


def test_different_children_are_refused_by_fsdp_as_well(two):
    for run in two["divided_children"]:
        assert {kind for kind, _ in run} == {"SelectionError"}
        assert all("the same configuration, `seed` above all" in message for _, message in run)


def test_groups_that_train_apart_may_have_different_children(two):
    first, second = two["own_groups"]
    assert any(not torch.equal(code, second[name]) for name, code in first.items())


def test_a_process_that_waits_for_others_says_what_for(two):
    first, last = two["one_comes_late"]
    assert len(first) == 1 and last == []
    assert "call `fit_head` and `select_child_network`, and to train" in first[0]


def test_the_first_process_alone_shows_a_bar(two):
    first, second = two["progress_bars"]
    assert "Fisher information" in first and second == ""


def test_a_sharded_model_evaluates_as_a_whole_one_and_keeps_no_composed_weights(two, one):
    for run in two["fsdp2_evaluation"]:
        assert run["layers"] > 0 and run["kept"] == 0
        for logits, expected in zip(run["logits"], one["fsdp2_evaluation"]["logits"], strict=True):
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)  # products of other shapes


def test_adapted_layers_can_be_sharding_units_themselves(two, one):
    for run in two["fsdp2_units"]:
        for name, values in run["trained"].items():
            error = (values - one["one_f_fixed"]["trained"][name]).norm() / values.norm()
            assert float(error) < 1e-4, name


def test_units_inside_of_an_adapted_layer_and_late_adapters_are_refused(two):
    for run in two["fsdp2_units"]:
        assert run["inner"][0] == run["added"][0] == "UnsupportedError"
        assert "let whole blocks be the units" in run["inner"][1]
        assert "before the model is wrapped" in run["added"][1]


def test_a_gathered_fsdp2_adapter_is_complete(two, folder):
    expected = two["fsdp2_saving"][0]["expected"]
    loaded = PeftModel.from_pretrained(base_model(), folder / "full", is_trainable=True)
    found = {name: parameter.detach() for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in found.items())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_accelerate_saves_and_loads_the_state_of_a_sharded_run(name, two):
    for run in two[name]:
        for part in ("trained", "codes"):
            before, after = run["before"][part], run["after"][part]
            assert before and before.keys() == after.keys()
            assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert {read_step(code) for code in run["after"]["codes"].values()} == {2}


def test_under_bf16_sharding_updates_below_the_precision_of_bf16_add_up(two):
    for run in two["fsdp2_bf16"]:
        for values in run.values():
            torch.testing.assert_close(values, torch.full_like(values, 1 - 100 * 1e-4), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "call, advice",
    [
        ("direct", "accelerator.get_state_dict(model)"),
        ("select", "before the model is wrapped"),
        ("network", "before the model is wrapped"),
        ("deltas", "load it in one process"),
        ("merge", "a base that one process has loaded"),
    ],
)
def test_what_needs_whole_weights_says_so_on_a_sharded_model(call, advice, two, folder):
    for run in two["fsdp2_saving"]:
        kind, message = run["errors"][call]
        assert kind == "UnsupportedError" and "divided" in message and advice in message
    assert not list((folder / "direct").glob("*.safetensors"))
