"""One run of the study: a method, a task and a seed in; the predictions on the test rows out."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import assets
import candidates
import numpy as np
import torch
from contrast import contrastive_loss
from data import by_length, mean_pooled, tokenize
from loop import EPOCHS, MAX_LENGTH, Record, make_batches, predict, tokenizer, train
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from staged import chosen_after_warm_up, chosen_again
from tasks import load
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, set_seed

from peft_childtune import ChildTuningConfig, fit_head, get_child_network, select_child_network
from peft_childtune.scores import score_parameters

_PEERS: dict[str, Any] = {"lora": LoraConfig, "shira": ShiraConfig, "supertuning": SupertuningConfig}
_IN_BLOCKS = r".*\.layer\.\d+\..*(query|key|value|dense)"


@dataclass(frozen=True)
class Method:
    """How a model is fine-tuned.

    Attributes:
        kind: `child`, `full` (every weight), `probe` (logistic regression on frozen features), or a peer in PEFT:
            `lora`, `shira`, `supertuning`.
        options: of the child's configuration, or of the peer's.
        weight_decay: AdamW's; of a child it pulls towards the pretrained weights.
        fits_head: whether the head is fitted on the frozen base first, before anything is scored.
        contrastive: whether the child is chosen by a loss without a head.
        stage: when the child is chosen: `before` training; `warm`, after an epoch that is taken back; `again`, half of
            it a second time after an epoch that is not.
        epochs: over the training rows.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    fits_head: bool = False
    contrastive: bool = False
    stage: str = "before"
    epochs: int = EPOCHS


@dataclass(frozen=True)
class Outcome:
    """What one run leaves."""

    predictions: list[int]
    labels: list[int]
    trained: int
    seconds: float  # of training
    loss: float | None  # mean of the last epoch


def run(method: Method, *, task: str, learning_rate: float, seed: int, bf16: bool) -> Outcome:
    """Fine-tune the pinned encoder, and return its predictions on the task's test rows.

    Args:
        method: how.
        task: one of `tasks.TASKS`.
        learning_rate: the highest; it rises over the first tenth of the steps and falls linearly to zero. Of a probe,
            the inverse strength C of its regularisation.
        seed: of the training rows, the head, the batches, dropout and whatever the method draws.
        bf16: whether to compute in bf16 (autocast); weights and optimizer stay in fp32.
    """
    rows, test, num_labels = _data(task, seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if method.kind == "probe":
        return _probe(rows, test, strength=learning_rate, device=device)
    set_seed(seed)
    model = _base(num_labels).to(device)
    if bf16:  # around each forward: one context for all of them would keep the first step's weights in bf16
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    candidates.remember((task, seed, bf16, method.fits_head))
    for_an_epoch = partial(train, records=rows, learning_rate=learning_rate, epochs=1, seed=seed, device=device)
    model = _wrapped(model, method, task, seed, device, for_an_epoch)
    start = time.perf_counter()
    left = method.epochs - (method.stage == "again")  # one of them is over
    loss = train(model, rows, learning_rate, method.weight_decay, epochs=left, seed=seed, device=device)
    seconds = time.perf_counter() - start
    predictions = predict(model, test, device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    del model
    gc.collect()  # the wrapped forward and its model refer to each other
    labels = [record["labels"] for record in test]
    return Outcome(predictions, labels, trained, seconds, loss)


def fisher_of(task: str, *, seed: int) -> dict[str, Tensor]:
    """Return the Fisher information of every covered weight of a task's fresh model."""
    rows, _, num_labels = _data(task, seed)
    set_seed(seed)
    model = _base(num_labels)
    covered = get_peft_model(model, ChildTuningConfig(task_type="SEQ_CLS", score="random", density=0.5))
    names = get_child_network(covered).indices
    base = covered.unload()  # type: ignore[operator]
    parameters = {name: base.get_parameter(name) for name in names}
    return score_parameters(base, parameters, make_batches(by_length(rows), "cpu"), show_progress=False).scores


@lru_cache(maxsize=4)
def _data(task: str, seed: int) -> tuple[list[Record], list[Record], int]:
    split = load(task, seed=seed)
    train, test = (tokenize(rows, tokenizer(), MAX_LENGTH) for rows in (split.train, split.test))
    return train, test, split.num_labels


def _base(num_labels: int) -> nn.Module:
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(assets.encoder_dir(), num_labels=num_labels)
    return model


def _wrapped(
    model: nn.Module,
    method: Method,
    task: str,
    seed: int,
    device: str,
    for_an_epoch: Callable[[nn.Module], object],
) -> nn.Module:
    """Return the model with only what the method trains left trainable."""
    if method.kind == "full":
        return model
    rows, _, _ = _data(task, seed)
    options = dict(method.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method.kind != "child":
            peer = _PEERS[method.kind](task_type="SEQ_CLS", target_modules=_IN_BLOCKS, **options)
            return get_peft_model(model, peer)
        if options.get("score") in ("fisher", "gradient") and not method.contrastive and method.stage == "before":
            options["score"] = f"known {options['score']}"
        config = ChildTuningConfig(task_type="SEQ_CLS", seed=seed, **options)
        batches = make_batches(by_length(rows), device)
        if method.stage != "before":
            if method.fits_head or method.contrastive:
                raise ValueError(f"stage={method.stage!r} cannot be had together with a fitted head or another loss.")
            return {"warm": chosen_after_warm_up, "again": chosen_again}[method.stage](
                model, config, batches, for_an_epoch
            )
        model = get_peft_model(model, config)
    if method.fits_head:
        fit_head(model, batches, show_progress=False)
    if method.contrastive:  # in an order of chance: a batch needs more than one label
        batches = make_batches(rows, device)
    if config.needs_data:
        loss_fn = contrastive_loss if method.contrastive else None
        select_child_network(model, batches, loss_fn=loss_fn, show_progress=False)
    return model


def _probe(train: list[Record], test: list[Record], *, strength: float, device: str) -> Outcome:
    encoder = AutoModel.from_pretrained(assets.encoder_dir()).to(device).eval()
    start = time.perf_counter()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    probe.fit(_features(encoder, train, device), [record["labels"] for record in train])
    predictions = probe.predict(_features(encoder, test, device)).tolist()
    weights = probe[-1].coef_.size + probe[-1].intercept_.size
    labels = [record["labels"] for record in test]
    return Outcome(predictions, labels, weights, time.perf_counter() - start, None)


@torch.no_grad()
def _features(encoder: nn.Module, records: Sequence[Record], device: str) -> np.ndarray:
    """Return the mean of the last hidden states over each text's own tokens, `(rows, width)`, in the rows' order."""
    found = []
    for batch in make_batches(records, device, size=32):
        hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        found.append(mean_pooled(hidden, batch["attention_mask"]).cpu())
    return torch.cat(found).numpy()
