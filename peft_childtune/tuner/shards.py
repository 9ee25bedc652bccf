"""Batches that accelerate has divided among processes, without the examples it repeats to make the shares even."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard

from ..ranks import rank, world_size
from ..scores import batch_size, examples

__all__ = ["without_repeats"]


def without_repeats(dataloader: Iterable[Any]) -> Iterable[Any]:
    """Return the batches of a dataloader, each example that it samples once over all processes.

    A dataloader that accelerate (or Trainer) has prepared starts again from the first examples where the last batches
    would be uneven; counted twice, they would choose another child than one process would. An iterable dataset has
    no sampler to be asked for uneven batches: unless accelerate dispatches it, its repeats stay.
    """
    if world_size() == 1:
        return dataloader
    if isinstance(dataloader, DataLoaderDispatcher):
        return _Dispatched(dataloader)
    sampler = getattr(dataloader, "batch_sampler", None)
    is_padded = isinstance(dataloader, DataLoaderShard) and isinstance(sampler, BatchSamplerShard)
    return _Uneven(dataloader) if is_padded else dataloader


class _Distinct(Iterable[Any], Sized):
    def __init__(self, dataloader: Any) -> None:
        self.dataloader = dataloader

    def __len__(self) -> int:
        return len(self.dataloader)


class _Uneven(_Distinct):
    """Shares as they come, as in accelerate's own `join_uneven_inputs`."""

    def __iter__(self) -> Iterator[Any]:
        sampler = self.dataloader.batch_sampler
        before, sampler.even_batches = sampler.even_batches, False
        try:
            yield from self.dataloader
        finally:
            sampler.even_batches = before


class _Dispatched(_Distinct):
    """Shares of batches that the first process has read, the last one filled up."""

    is_read_together = True  # it sends each batch to the others

    def __iter__(self) -> Iterator[Any]:
        for batch in self.dataloader:
            size = batch_size(batch)
            # the rule by which `gather_for_metrics` drops them: the real ones come first in the order of processes
            if self.dataloader.end_of_dataloader and self.dataloader.remainder > 0 and size:
                kept = min(size, max(0, self.dataloader.remainder - rank() * size))
                if kept < size:
                    batch = examples(batch, slice(0, kept), size=size)
                if not kept:
                    continue
            yield batch
