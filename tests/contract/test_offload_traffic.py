"""How often offloaded weights are fetched: each is as large as the work that is done with it."""

from __future__ import annotations

import accelerate
import pytest

from tests.contract.families import FAMILIES, add_noise, layers_in, output, wrap

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class Counted(dict):
    """Weights that count how often each is fetched."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.fetched = dict.fromkeys(tensors, 0)

    def __getitem__(self, name):
        self.fetched[name] += 1
        return super().__getitem__(name)


@pytest.mark.parametrize("state", ["active", "disabled", "without_a_delta"])
def test_each_offloaded_weight_is_fetched_once_in_a_forward(state):
    family = FAMILIES["llama"]
    model = add_noise(wrap(family.build(), family, score="random", density=0.3))
    if state == "without_a_delta":
        for layer in layers_in(model):
            layer._values("default")._parameters.clear()
    weights = Counted({name: tensor.clone() for name, tensor in model.state_dict().items()})
    accelerate.cpu_offload(model, execution_device="cpu", state_dict=weights)
    weights.fetched = dict.fromkeys(weights, 0)
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    output(model, family.batch())
    kept = [n for n in weights if ".child_tuning_" not in n or (".child_tuning_values." in n and state == "active")]
    assert {weights.fetched[name] for name in kept} == {1}
