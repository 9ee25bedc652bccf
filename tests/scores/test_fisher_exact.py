"""The per-example Fisher information equals a loop over batches of one, on every kind of model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from peft_childtune.scores import rules, score_parameters

VOCABULARY = 40
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tokens(size: int, length: int) -> tuple[Tensor, Tensor]:
    """Return token ids and their attention mask: examples of different lengths, padded with 0."""
    lengths = torch.randint(3, length + 1, (size,))
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    return torch.randint(3, VOCABULARY, (size, length)) * mask, mask


def classified(*sizes: tuple[int, int]) -> list[dict[str, Tensor]]:
    batches = []
    for size, length in sizes:
        ids, mask = tokens(size, length)
        batches.append({"labels": torch.randint(0, 3, (size,)), "input_ids": ids, "attention_mask": mask})
    return batches


def continued(*sizes: tuple[int, int]) -> list[dict[str, Tensor]]:
    batches = []
    for size, length in sizes:
        ids, mask = tokens(size, length)
        batches.append({"labels": ids.masked_fill(mask == 0, -100), "input_ids": ids, "attention_mask": mask})
    return batches


def bert_classifier() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SHAPE, num_labels=3))


def bert_masked_lm() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_key_value_heads=1))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def albert() -> nn.Module:
    return transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(**SHAPE, embedding_size=8, num_labels=3)
    )


def vit() -> nn.Module:
    shape = {
        key: SHAPE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    config = transformers.ViTConfig(**shape, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def pictures(*sizes: int) -> list[dict[str, Tensor]]:
    return [{"labels": torch.randint(0, 3, (n,)), "pixel_values": torch.randn(n, 3, 8, 8)} for n in sizes]


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[dict[str, Tensor]]], bool]] = {
    "bert": (bert_classifier, lambda: classified((4, 9), (5, 7), (1, 4)), True),
    "bert masked lm, tied head and bias": (bert_masked_lm, lambda: continued((4, 9), (5, 7)), True),
    "gpt2, Conv1D and tied head": (gpt2, lambda: continued((4, 9), (5, 7), (1, 4)), True),
    "llama": (llama, lambda: continued((4, 9), (3, 7)), True),
    "t5, position biases without a batch": (t5, lambda: continued((4, 9), (3, 7)), False),
    "albert, one block used twice": (albert, lambda: classified((4, 9), (5, 7)), True),
    "vit, patches by convolution": (vit, lambda: pictures(4, 3), True),
}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest error of any score, relative to the largest score of its tensor.

    Key biases have a gradient of zero in exact arithmetic: such tensors are compared with 1e-12 of
    the largest score of all.
    """
    floor = 1e-12 * max(float(scores.max()) for scores in expected.values())
    assert found.keys() == expected.keys()
    return max(float((found[k] - expected[k]).abs().max()) / max(floor, float(expected[k].max())) for k in expected)


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def labelled(*inputs: Tensor, classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.randint(0, classes, (len(x),))) for x in inputs]


class Pooled(nn.Module):
    """Embeds, transforms and averages tokens."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)).mean(1))


class Positions(nn.Module):
    """Adds one embedding of positions, made for a batch of one and passed by name, to all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.positions(input=torch.arange(x.shape[1])[None])).mean(1))


class SequenceFirst(nn.Module):
    """A linear layer that sees (time, batch, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class TwiceUsed(nn.Module):
    """One linear layer called twice, the second time on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Router(nn.Module):
    """Returns two tensors and a list of integers for each token, with a parameter behind either tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        return logits, logits.softmax(-1) * self.scale, logits.argmax(-1)


class Routed(nn.Module):
    """Flattens examples and tokens into one dimension for a part of its work."""

    def __init__(self, router: nn.Module | None = None) -> None:
        super().__init__()
        self.router = router
        self.inner, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 6)
        hidden = torch.tanh(self.norm(self.inner(flat)))
        if self.router is not None:
            logits, shares, best = self.router(flat)
            hidden = hidden * shares + torch.tanh(logits) * (best > 3)[:, None]
        return self.head(hidden.reshape(*x.shape[:2], 8).mean(1))


class Scaled(nn.Module):
    """A layer of unknown make: a learned shift and scale, and a parameter that takes no part."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(3)), nn.Parameter(torch.randn(3))
        self.unused = nn.Parameter(torch.ones(2))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x) + self.shift).sigmoid() * self.scale


class InPlace(nn.Module):
    """A convolutional net whose activations overwrite their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu_(self.first(x))).mean((2, 3))


def convolutions() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.Conv1d(6, 5, 2),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    with torch.no_grad():
        model(torch.randn(8, 2, 8, 8))  # also moves the running statistics away from 0 and 1
    return model


def id_batches(*sizes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    return labelled(*(torch.randint(0, 10, size) for size in sizes))


PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], bool]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3, bias=False)),
        lambda: labelled(torch.randn(4, 6), torch.randn(7, 6), torch.randn(1, 6)),
        True,
    ),
    "linear over images": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm((5, 8)), nn.Flatten(), nn.Linear(160, 3)),
        lambda: labelled(torch.randn(3, 4, 5, 6)),
        True,
    ),
    "convolutions": (convolutions, lambda: labelled(torch.randn(4, 2, 8, 8), torch.randn(3, 2, 8, 8)), True),
    "overwritten outputs": (InPlace, lambda: labelled(torch.randn(4, 2, 8, 8)), True),
    "embedding with padding": (
        lambda: Pooled(nn.Embedding(10, 8, padding_idx=0)),
        lambda: id_batches((4, 5), (3, 7)),
        True,
    ),
    "embedding scaled by frequency": (
        lambda: Pooled(nn.Embedding(10, 8, scale_grad_by_freq=True)),
        lambda: id_batches((4, 5), (3, 7)),
        True,
    ),
    "sparse embedding": (lambda: Pooled(nn.Embedding(10, 8, sparse=True)), lambda: id_batches((4, 5)), True),
    "positions shared by all examples": (
        Positions,
        lambda: labelled(torch.randn(4, 5, 6), torch.randn(3, 7, 6)),
        True,
    ),
    "sequence first": (SequenceFirst, lambda: labelled(torch.randn(4, 5, 6), torch.randn(3, 5, 6)), False),
    "sequence first, as long as the batch": (SequenceFirst, lambda: labelled(torch.randn(4, 4, 6)), False),
    "one layer used twice": (TwiceUsed, lambda: labelled(torch.randn(4, 6), torch.randn(3, 6)), True),
    "unknown layer around another": (lambda: Scaled(nn.Linear(6, 3)), lambda: labelled(torch.randn(4, 6)), True),
    "attention with tuple outputs": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), nn.Flatten(), nn.Linear(40, 3)),
        lambda: labelled(torch.randn(4, 5, 8), torch.randn(3, 5, 8)),
        True,
    ),
    "tokens of all examples in one dimension": (Routed, lambda: labelled(torch.randn(4, 5, 6)), True),
    "a router that returns a tuple": (
        lambda: Routed(Router()),
        lambda: labelled(torch.randn(4, 5, 6), torch.randn(3, 5, 6)),
        True,
    ),
}


def went_one_by_one(caplog: pytest.LogCaptureFixture) -> bool:
    return any("example by example" in record.message for record in caplog.records)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_fisher_of_a_transformer_equals_a_loop_over_batches_of_one(name, loop_fisher, caplog):
    make_model, make_batches, together = TRANSFORMERS[name]
    model, batches = make_model(), make_batches()
    expected = loop_fisher(model, batches)
    with caplog.at_level(logging.INFO, logger="peft_childtune"):
        result = score_parameters(model, dict(model.named_parameters()), batches, show_progress=False)
    assert relative_error(result.scores, expected) < 1e-4  # fp32 sums in another order
    assert went_one_by_one(caplog) is not together
    assert (result.num_examples, result.num_batches) == (sum(len(b["labels"]) for b in batches), len(batches))


@pytest.mark.parametrize("name", PLAIN)
def test_fisher_of_a_plain_module_equals_a_loop_over_batches_of_one(name, loop_fisher, caplog):
    make_model, make_batches, together = PLAIN[name]
    model, batches = make_model(), make_batches()
    expected = loop_fisher(model, batches, classify)
    with caplog.at_level(logging.INFO, logger="peft_childtune"):
        result = score_parameters(
            model, dict(model.named_parameters()), batches, loss_fn=classify, show_progress=False
        )
    assert relative_error(result.scores, expected) < 1e-4  # fp32 sums in another order
    assert went_one_by_one(caplog) is not together


def test_fisher_of_some_parameters_leaves_the_others_out(loop_fisher):
    model, batches = bert_classifier(), classified((4, 9), (5, 7))
    names = ["bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.attention.self.query.bias"]
    expected = loop_fisher(model, batches)
    result = score_parameters(model, {n: model.get_parameter(n) for n in names}, batches, show_progress=False)
    assert relative_error(result.scores, {name: expected[name] for name in names}) < 1e-4


def test_scores_are_fp32_and_of_each_parameters_shape():
    model = bert_classifier().to(torch.bfloat16)
    result = score_parameters(model, dict(model.named_parameters()), classified((2, 5)), show_progress=False)
    assert {name: (s.dtype, s.shape) for name, s in result.scores.items()} == {
        name: (torch.float32, p.shape) for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_scored_in_one_pass_close_to_its_loop(dtype, loop_fisher, caplog):
    model, batches = bert_classifier().to(dtype), classified((4, 9), (5, 7))
    # queries and keys of so small a random model have gradients of 1e-7, which float16 cannot tell apart
    names = [name for name, _ in model.named_parameters() if ".layer." in name and "attention.self" not in name]
    expected = loop_fisher(model, batches)
    with caplog.at_level(logging.INFO, logger="peft_childtune"):
        result = score_parameters(model, {n: model.get_parameter(n) for n in names}, batches, show_progress=False)
    # a batch of one is rounded differently: some percent in bfloat16 with its 8 bits
    assert relative_error(result.scores, {name: expected[name] for name in names}) < 16 * torch.finfo(dtype).eps
    assert not went_one_by_one(caplog)


def test_hooks_that_change_outputs_are_part_of_the_model(loop_fisher, caplog):
    model, batches = TwiceUsed(), labelled(torch.randn(4, 6), torch.randn(3, 6))
    model.shared.register_forward_hook(lambda module, args, output: output * 2)
    expected = loop_fisher(model, batches, classify)
    with caplog.at_level(logging.INFO, logger="peft_childtune"):
        result = score_parameters(
            model, dict(model.named_parameters()), batches, loss_fn=classify, show_progress=False
        )
    assert relative_error(result.scores, expected) < 1e-4
    assert not went_one_by_one(caplog)


def test_a_part_that_runs_without_gradients_scores_zero(loop_fisher, caplog):
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = torch.tanh(self.features(x))
            return self.head(x)

    model, batches = Probe(), labelled(torch.randn(4, 6), torch.randn(3, 6))
    expected = loop_fisher(model, batches, classify)
    with caplog.at_level(logging.INFO, logger="peft_childtune"):
        result = score_parameters(
            model, dict(model.named_parameters()), batches, loss_fn=classify, show_progress=False
        )
    assert relative_error(result.scores, expected) < 1e-4
    assert not result.scores["features.weight"].any() and not went_one_by_one(caplog)


def test_an_input_that_is_overwritten_later_on_is_not_taken_for_the_one_that_was_used():
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(x) * 2  # autograd keeps nothing of it, with frozen weights
            logits = self.head(hidden)
            if bool((x > 5).any()):  # only in a batch that is no longer scored both ways
                hidden.zero_()
            return logits

    model, x = Overwrites(), torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as in training
        score_parameters(
            model,
            dict(model.named_parameters()),
            labelled(x, x + 6),
            loss_fn=classify,
            show_progress=False,
        )


def test_one_parameter_under_two_names_is_scored_once_and_returned_twice():
    model = TwiceUsed()
    both = {"a": model.shared.weight, "b": model.shared.weight}
    result = score_parameters(model, both, labelled(torch.randn(4, 6)), loss_fn=classify, show_progress=False)
    assert torch.equal(result.scores["a"], result.scores["b"])


def test_a_checkpointed_module_is_scored_like_one_that_is_not(loop_fisher):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))

    model, batches = Checkpointed(), labelled(torch.randn(4, 6), torch.randn(3, 6))
    expected = loop_fisher(model, batches, classify)
    result = score_parameters(model, dict(model.named_parameters()), batches, loss_fn=classify, show_progress=False)
    assert relative_error(result.scores, expected) < 1e-4


def test_gradient_checkpointing_of_transformers_changes_nothing(loop_fisher):
    model, batches = llama(), continued((4, 9), (3, 7))
    expected = loop_fisher(model, batches)
    model.activation_checkpointing_enable()
    model.train()
    result = score_parameters(model, dict(model.named_parameters()), batches, show_progress=False)
    assert relative_error(result.scores, expected) < 1e-4


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_rules_compute_in_float32_inside_a_callers_autocast(device, monkeypatch):
    def forward_only(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    def products(total, use, factors):
        assert not torch.is_autocast_enabled("cpu")
        if device == "cpu":
            one_by_one(total, use, factors)
        else:
            rules._add_squared_products_(total, *rules._factors_of_weight(use), factors)

    torch.manual_seed(0)
    one_by_one = rules._add_squared_products_one_by_one_
    monkeypatch.setattr(rules, "_add_squared_products_one_by_one_", products)
    model, batches = bert_classifier(), classified((4, 9), (5, 7))
    parameters = dict(model.named_parameters())
    expected = score_parameters(model, parameters, batches, loss_fn=forward_only, show_progress=False).scores
    with torch.autocast("cpu", torch.bfloat16):
        found = score_parameters(model, parameters, batches, show_progress=False).scores
    assert relative_error(found, expected) < 0.02  # the backward pass is in the caller's precision, too
