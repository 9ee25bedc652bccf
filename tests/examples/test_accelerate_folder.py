"""The configurations load as accelerate loads them, and the page beside them shows what its program prints."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from torch import nn

from peft_childtune import ChildTuningConfig, get_child_network
from peft_childtune.sparse import budget_for

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "accelerate"
PAGE = (FOLDER / "README.md").read_text()
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "bf16": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


@pytest.fixture(scope="module")
def how_big() -> ModuleType:
    spec = importlib.util.spec_from_file_location("how_big", FOLDER / "how_big.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_configuration_for_every_way():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_loads_a_configuration(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)  # which refuses keys that it does not know
    assert (config.distributed_type, config.num_processes, config.num_machines) == (KINDS[name], 2, 1)
    assert config.mixed_precision == ("bf16" if name == "bf16" else "no")


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_accelerate_knows_every_option_of_its_plugins(name):
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    known = vars(launch_command_parser().parse_args(["script.py"]))  # the loader itself takes any key here
    options = [key for part, table in config.items() if isinstance(table, dict) for key in table]
    assert options and [key for key in options if key not in known] == []


def test_weights_are_whole_when_the_child_is_chosen():
    assert load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    assert load_config_from_file(str(FOLDER / "deepspeed_zero3.yaml")).deepspeed_config["zero3_init_flag"] is False


@pytest.mark.parametrize("script", ["text_classification.py", "causal_lm.py"])
@pytest.mark.parametrize("name", KINDS)
def test_the_page_has_the_command_of_every_configuration_and_script(name, script):
    assert re.search(
        rf"accelerate launch --config_file examples/accelerate/{name}.yaml( --\S+ \w+ \\\n *)? ?examples/{script}",
        PAGE,
    )
    assert (ROOT / "examples" / script).is_file()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--config_file", str(FOLDER / "bf16.yaml")], "2 processes, bf16"),
        (["--multi_gpu", "--num_processes", "2"], "2 processes, no"),
        (["--cpu", "--num_processes", "2"], "1 processes, no"),
    ],
    ids=["configuration", "flags", "cpu flag"],
)
def test_as_many_processes_start_as_the_page_says(flags, expected, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator()\n"
        "accelerator.print(f'{accelerator.num_processes} processes, {accelerator.mixed_precision}')\n"
        "accelerator.end_training()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *flags, str(script)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout.splitlines()


def test_the_page_shows_what_its_program_prints(how_big, capsys):
    how_big.main()
    shown = re.search(r"<!-- how_big:begin -->\n(.*)<!-- how_big:end -->", PAGE, re.DOTALL)
    assert shown is not None and shown[1].strip() == capsys.readouterr().out.strip()


def test_a_llama_has_the_weights_of_its_name(how_big):
    # by Meta's and Mistral's model cards
    counts = {size: sum(p.numel() for p in how_big.llama(size).parameters()) for size in how_big.SHAPES}
    assert counts == {"1B": 1_235_814_400, "7B": 7_241_732_096, "70B": 70_553_706_496}


def test_the_bytes_a_weight_are_those_of_a_real_child(how_big):
    from peft import get_peft_model

    base = nn.Sequential(nn.Linear(512, 512, bias=False))
    config = ChildTuningConfig(target_modules=["0"], density=0.1, score="magnitude")
    model = get_peft_model(base, config)
    child = get_child_network(model)
    assert child.nnz == budget_for(0.1, 512 * 512)
    code = model.base_model.model[0]._code("default").get("weight").numel()
    exact = (child.nnz * (4 + 4 + 8 + 4) + code) / 512**2
    assert exact == pytest.approx(how_big.child_bytes(0.1, 8), rel=0.01)


def test_the_lora_weights_are_those_that_peft_makes(how_big, monkeypatch):
    from peft import LoraConfig, get_peft_model

    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(how_big.SHAPES, "1B", tiny | {"num_key_value_heads": 2, "vocab_size": 16})
    model = how_big.llama("1B")
    expected = how_big.lora_weights(model)
    wrapped = get_peft_model(model, LoraConfig(r=how_big.RANK, target_modules="all-linear"))
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == expected
