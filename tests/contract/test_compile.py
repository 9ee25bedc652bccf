"""`torch.compile` over wrapped models: one graph, the same numbers, no second compilation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from peft_childtune import ChildTuningConfig, get_deltas
from tests.contract.families import FAMILIES, add_noise, wrap

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inside torch's compiler
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*CompileCounterWithBackend.*"),
]

_OPTIONS = {
    "element": {"score": "magnitude"},
    "column": {"score": "magnitude", "granularity": "column"},
    "resampled": {"mode": "task_free", "resample": True},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _family_model(name, **options):
    family = FAMILIES[name]
    base = family.build()
    base.config.use_cache = False
    if name == "bert":
        base.config.problem_type = "single_label_classification"  # else its forward sets it, and is compiled again
    if name == "gpt2":
        base.loss_type = "ForCausalLM"  # else its forward logs that it guesses, which breaks the graph
    return wrap(base, family, **options).train()


def _steps(model, call, family, *, count=3):
    """Train for some steps and return the loss of each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for seed in range(count):
        loss = call(**family.batch(seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_compiled_model_is_one_graph_that_trains_as_the_eager_one(name, options):
    eager, compiled = _family_model(name, **options), _family_model(name, **options)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(compiled, backend=counter, fullgraph=True)
    expected = _steps(eager, eager, FAMILIES[name])
    assert _steps(compiled, call, FAMILIES[name]) == expected
    assert counter.frame_count == 1
    for key, delta in get_deltas(eager).items():
        assert torch.equal(get_deltas(compiled)[key].values, delta.values), key


def test_a_compiled_model_evaluates_what_the_eager_one_does():
    model = add_noise(_family_model("bert", score="magnitude")).eval()
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = FAMILIES["bert"].batch()
    with torch.no_grad():
        assert torch.equal(call(**batch).logits, model(**batch).logits)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        assert torch.equal(call(**batch).logits, model(**batch).logits)


def test_a_frozen_adapter_is_compiled_to_one_graph_where_gradients_are_on():
    model, batch = _family_model("bert", score="random", granularity="row").eval(), FAMILIES["bert"].batch()
    model.requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**batch).logits, model(**batch).logits)


def test_a_new_child_is_compiled_anew():
    from peft_childtune import ChildNetwork, get_child_network, select_child_network

    model = _family_model("llama", score="random", seed=1)
    other = get_child_network(_family_model("llama", score="random", seed=2))
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = FAMILIES["llama"].batch()
    call(**batch)
    assert isinstance(other, ChildNetwork)
    select_child_network(model, network=other)
    call(**batch).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(gradients[name], parameter.grad), name


def test_autocast_is_compiled_too():
    eager, compiled = (_family_model("llama", score="magnitude") for _ in range(2))
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    batch = FAMILIES["llama"].batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = [run(**batch).loss for run in (eager, call)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        if one.requires_grad:
            assert torch.equal(one.grad, other.grad)


class _Blocks(nn.Module):
    """Two blocks, each recomputed in the backward."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()) for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant) if self.use_reentrant is not None else block(x)
        return x


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_compile_to_the_gradients_of_the_eager_model(use_reentrant):
    from peft import get_peft_model

    def gradients(use_reentrant, compiled):
        torch.manual_seed(0)
        config = ChildTuningConfig(density=0.3, score="magnitude", target_modules="all-linear")
        model = get_peft_model(_Blocks(use_reentrant), config)
        # reentrant checkpoints are no part of a graph in any model
        call = torch.compile(model, backend="aot_eager", fullgraph=not use_reentrant) if compiled else model
        call(torch.ones(3, 8, requires_grad=True)).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    expected = gradients(None, False)
    found = gradients(use_reentrant, True)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # float32 sums in the graph's own order


@pytest.mark.slow
def test_inductor_trains_as_the_eager_model():
    eager, compiled = (_family_model("bert", score="magnitude") for _ in range(2))
    call = torch.compile(compiled, fullgraph=True)
    expected = _steps(eager, eager, FAMILIES["bert"], count=2)
    # fused kernels round in another order
    assert _steps(compiled, call, FAMILIES["bert"], count=2) == pytest.approx(expected, rel=1e-5)
