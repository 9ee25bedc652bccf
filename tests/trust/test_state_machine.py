"""Any order of adding, loading, switching, merging, deleting and saving agrees with plain dense arithmetic."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import PeftModel, get_peft_model
from torch import nn

from peft_childtune import ChildTuningConfig, SelectionError, get_deltas, verify_base
from peft_childtune.tuner import ChildTuningLayer

_NAMES = ["default", "b", "c"]


def _base(dtype):
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 4), nn.LayerNorm(4)])}).to(dtype)


def _config(seed):
    return ChildTuningConfig(target_modules=["0", "1"], mode="task_free", density=0.4, seed=seed, init_weights=False)


class Machine(RuleBasedStateMachine):
    """A wrapped model beside what it should be: a dense delta for each adapter, and the order of the merged ones."""

    @initialize(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    def start(self, dtype):
        self.dtype = dtype
        self.folder = Path(tempfile.mkdtemp())
        self.base = {name: tensor.clone() for name, tensor in _base(dtype).state_dict().items()}
        self.model = get_peft_model(_base(dtype), _config(0))
        self.deltas = {"default": self._read("default")}
        self.active, self.merged, self.saved = ["default"], [], {}

    def _read(self, name):
        return {path: delta.to_dense() for path, delta in get_deltas(self.model, name).items()}

    def _composed(self, names):
        """Return the base with some deltas added, one after the other, in fp32, each rounded once."""
        now = dict(self.base)
        for name in names:
            for path, delta in self.deltas[name].items():
                there = delta != 0
                now[path] = torch.where(there, (now[path].float() + delta).to(self.dtype), now[path])
        return now

    def _weights(self):
        layers = [module for module in self.model.modules() if isinstance(module, ChildTuningLayer)]
        return {
            layer.full_name(p): (layer.base_parameter(p).detach(), getattr(layer, p).detach())
            for layer in layers
            for p in layer.covered
        }

    @precondition(lambda self: len(self.deltas) < 3)
    @rule(data=st.data(), seed=st.integers(1, 3))
    def add(self, data, seed):
        name = data.draw(st.sampled_from([n for n in _NAMES if n not in self.deltas]))
        self.model.add_adapter(name, _config(seed))
        self.deltas[name], self.merged = self._read(name), []  # PEFT unmerges

    @precondition(lambda self: set(self.deltas) - {*self.active, *self.merged})
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(set(self.deltas) - {*self.active, *self.merged})))
        self.model.delete_adapter(name)
        del self.deltas[name]

    @rule(data=st.data())
    def switch(self, data):
        names = data.draw(st.lists(st.sampled_from(sorted(self.deltas)), min_size=1, unique=True))
        self.model.base_model.set_adapter(names)
        self.active, self.merged = names, []  # PEFT unmerges first

    @rule()
    def merge(self):
        self.model.merge_adapter()
        self.merged += [name for name in self.active if name not in self.merged]

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = []

    @rule(data=st.data())
    def save(self, data):
        name = data.draw(st.sampled_from(sorted(self.deltas)))
        folder = self.folder / str(len(self.saved))
        self.model.save_pretrained(folder, selected_adapters=[name])
        place = folder if name == "default" else folder / name
        verify_base(_base(self.dtype), place, full=True)
        self.saved[place] = self.deltas[name]

    @precondition(lambda self: self.saved and len(self.deltas) < 3)
    @rule(data=st.data())
    def load(self, data):
        place = data.draw(st.sampled_from(sorted(self.saved)))
        name = data.draw(st.sampled_from([n for n in _NAMES if n not in self.deltas]))
        self.model.load_adapter(place, name)
        self.deltas[name], self.merged = self.saved[place], []

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def load_over(self, data):
        place = data.draw(st.sampled_from(sorted(self.saved)))
        name = data.draw(st.sampled_from(sorted(self.deltas)))
        if name in self.merged:
            with pytest.raises(SelectionError, match="is merged"):
                self.model.load_adapter(place, name)
            return
        self.model.load_adapter(place, name)
        self.deltas[name] = self.saved[place]

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def load_alone(self, data):
        place = data.draw(st.sampled_from(sorted(self.saved)))
        loaded = get_deltas(PeftModel.from_pretrained(_base(self.dtype), place))
        assert all(torch.equal(delta.to_dense(), self.saved[place][path]) for path, delta in loaded.items())

    @rule()
    def disable(self):
        with self.model.disable_adapter():
            assert all(torch.equal(seen, self.base[path]) for path, (_, seen) in self._weights().items())
        self.merged = []  # as PEFT does: disabling unmerges

    @invariant()
    def weights_are_what_dense_arithmetic_says(self):
        held, seen = self._composed(self.merged), self._composed(self.merged or self.active)
        for path, (base, effective) in self._weights().items():
            assert torch.equal(base, held[path]), path
            assert torch.equal(effective, seen[path]), path
        for name, deltas in self.deltas.items():
            now = self._read(name)
            assert all(torch.equal(now[path], deltas[path]) for path in deltas), name


@pytest.mark.filterwarnings("ignore")  # PEFT's, about merging twice and the like
@pytest.mark.parametrize("examples", [pytest.param(400, marks=pytest.mark.long), 25])
def test_every_order_of_operations_agrees_with_dense_arithmetic(examples):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Machine.TestCase.settings = settings(
            max_examples=examples, stateful_step_count=25, deadline=None, phases=[Phase.generate]
        )
        Machine.TestCase().runTest()
