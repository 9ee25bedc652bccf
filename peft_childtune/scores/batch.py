"""A batch of any common make: its size, its examples one by one, its labels, its loss."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_childtune.errors import ScoreError

__all__ = ["IGNORED_LABEL", "batch_size", "detached_to", "examples", "label_counts", "lacks_labels", "loss_of"]

IGNORED_LABEL = -100  # torch's default `ignore_index`, which transformers' losses share


def detached_to(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it detached and on `device`; its containers keep their types."""
    return _mapped(batch, lambda tensor: tensor.detach().to(device, non_blocking=True))


def batch_size(batch: Any) -> int | None:
    """Return how many examples a batch holds, or None if nothing in it tells.

    A list of mappings counts as a list of examples; else `labels` decides, else the first tensor, else the first list.

    Example:
        >>> batch_size({"input_ids": torch.zeros(3, 7), "labels": torch.zeros(3)})
        3
    """
    if _is_list_of_examples(batch):
        return len(batch)
    labels = batch.get("labels") if isinstance(batch, Mapping | UserDict) else None
    if isinstance(labels, Tensor) and labels.dim() > 0:
        return labels.shape[0]
    for tensor in _tensors(batch):
        if tensor.dim() > 0:
            return tensor.shape[0]
    values = batch.values() if isinstance(batch, Mapping | UserDict) else [batch]
    return next((len(value) for value in values if isinstance(value, list)), None)


def examples(batch: Any, part: slice, *, size: int) -> Any:
    """Return the batch that holds some of the examples of a batch of `size`.

    Tensors whose first dimension is `size` are cut, and so are lists of that length; all else is shared.

    Example:
        >>> examples({"x": torch.tensor([[1], [2]]), "names": ["a", "b"], "scale": 3}, slice(1, 2), size=2)
        {'x': tensor([[2]]), 'names': ['b'], 'scale': 3}
    """
    if _is_list_of_examples(batch):
        return batch[part]

    def cut(tensor: Tensor) -> Tensor:
        return tensor[part] if tensor.dim() > 0 and tensor.shape[0] == size else tensor

    def cut_list(items: list[Any]) -> list[Any] | None:
        whole = [t for t in _tensors(items) if t.dim() > 0 and t.shape[0] == size]
        return items[part] if len(items) == size and not whole else None

    return _mapped(batch, cut, cut_list)


def label_counts(batch: Any, *, size: int, shifted: bool = False) -> Tensor | None:
    """Return how many labels of each example count towards the loss, or None if there are no class labels.

    Args:
        batch: class labels are an integer tensor named `labels` whose first dimension is the batch size.
        size: the batch size.
        shifted: leave out the first position, as a causal language model does.

    Returns:
        float64, `(size,)`, on the CPU.

    Example:
        >>> label_counts({"labels": torch.tensor([[5, 7, -100], [-100, -100, 2]])}, size=2)
        tensor([2., 1.], dtype=torch.float64)
    """
    labels = batch.get("labels") if isinstance(batch, Mapping | UserDict) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() < (2 if shifted else 1):
        return None
    if labels.shape[0] != size:
        return None
    counted = labels[:, 1:] if shifted else labels
    return counted.ne(IGNORED_LABEL).reshape(size, -1).sum(1).double().cpu()


def lacks_labels(batch: Any) -> bool:
    """Return whether no label of the batch counts, with or without the shift of a causal language model."""
    size = batch_size(batch)
    if size is None:
        return False
    counts = [label_counts(batch, size=size, shifted=shifted) for shifted in (False, True)]
    return any(count is not None and not count.any() for count in counts)


def loss_of(model: nn.Module, batch: Any, *, loss_fn: Callable[[nn.Module, Any], Tensor] | None, index: int) -> Tensor:
    """Return the scalar loss of a batch, by `loss_fn(model, batch)` or as the loss of `model(**batch)`.

    Args:
        model: returns a mapping or an object with `loss`, or a tuple that begins with a scalar loss.
        batch: a mapping, or anything that `loss_fn` takes.
        loss_fn: overrides the model's own loss.
        index: number of the batch, for messages.

    Raises:
        ScoreError: there is no loss, or it is not one number. Whether it is finite is for the caller to judge.
    """
    if loss_fn is not None:
        loss: Any = loss_fn(model, batch)
    else:
        if not isinstance(batch, Mapping | UserDict):
            raise ScoreError(
                f"batch {index}: is a {type(batch).__name__}, and only a mapping can be passed as model(**batch); "
                "let the dataloader yield dictionaries or pass loss_fn=."
            )
        loss = _loss_in(model(**batch))
    if loss is None:
        raise ScoreError(f"batch {index}: the model returned no loss; pass labels in the batch or loss_fn=.")
    if not isinstance(loss, Tensor):
        raise ScoreError(f"batch {index}: the loss is a {type(loss).__name__}, not a tensor; use loss_fn=.")
    if loss.numel() != 1:
        raise ScoreError(
            f"batch {index}: the loss has shape {tuple(loss.shape)}, not one number; reduce it to its mean, "
            "in the model or in loss_fn=."
        )
    return loss.reshape(())


def _loss_in(outputs: Any) -> Any:
    if isinstance(outputs, Mapping | UserDict):
        return outputs.get("loss")
    if isinstance(outputs, tuple) and not hasattr(outputs, "loss"):
        first = outputs[0] if outputs else None
        return first if isinstance(first, Tensor) and first.numel() == 1 else None
    return getattr(outputs, "loss", None)


def _is_list_of_examples(batch: Any) -> bool:
    return isinstance(batch, list) and bool(batch) and all(isinstance(item, Mapping | UserDict) for item in batch)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | UserDict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _mapped(
    value: Any, on_tensor: Callable[[Tensor], Tensor], on_list: Callable[[list[Any]], list[Any] | None] | None = None
) -> Any:
    """Return a copy of nested containers with every tensor replaced, and every list for which `on_list` has one."""
    if isinstance(value, Tensor):
        return on_tensor(value)
    if isinstance(value, UserDict):  # transformers' BatchEncoding: read by attribute too, so its type is kept
        clone = copy.copy(value)
        clone.data = {key: _mapped(item, on_tensor, on_list) for key, item in value.data.items()}
        return clone
    if isinstance(value, Mapping):
        return {key: _mapped(item, on_tensor, on_list) for key, item in value.items()}
    if isinstance(value, list):
        cut = on_list(value) if on_list is not None else None
        return cut if cut is not None else [_mapped(item, on_tensor, on_list) for item in value]
    if isinstance(value, tuple):
        items = [_mapped(item, on_tensor, on_list) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
