"""Batches that accelerate has divided among processes, without the examples it repeats to make the shares even."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard

from ..ranks import rank, world_size
from ..scores import batch_size, examples

__all__ = ["without_repeats"]


def without_repeats(dataloader: Iterable[Any]) -> Iterable[Any]:
    """Return the batches of a dataloader, each example of the dataset once over all processes.

    A dataloader that accelerate (or Trainer) has prepared starts again from the first examples where the last batches
    would be uneven; counted twice, they would choose another child than one process would. Where the length of the
    dataset is unknown, the repeats cannot be told and stay.
    """
    if world_size() == 1 or not isinstance(dataloader, DataLoaderShard | DataLoaderDispatcher):
        return dataloader
    sampler = getattr(dataloader, "batch_sampler", None)
    is_padded = isinstance(sampler, BatchSamplerShard) and sampler.even_batches
    return _Distinct(dataloader) if is_padded or isinstance(dataloader, DataLoaderDispatcher) else dataloader


class _Distinct(Iterable[Any], Sized):
    def __init__(self, dataloader: Any) -> None:
        self.dataloader = dataloader

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.dataloader:
            size = batch_size(batch)
            remainder = self._remainder()
            # the rule by which `gather_for_metrics` drops them: the real ones come first in the order of processes
            if self.dataloader.end_of_dataloader and remainder > 0 and size:
                kept = min(size, max(0, remainder - rank() * size))
                if kept < size:
                    batch = examples(batch, slice(0, kept), size=size)
                if not kept:
                    continue
            yield batch

    def _remainder(self) -> int:
        """Return how many examples the last batches of all processes hold: of what is sampled, not of the dataset."""
        loader = self.dataloader
        sampler = getattr(getattr(loader.batch_sampler, "batch_sampler", None), "sampler", None)
        if isinstance(loader, DataLoaderShard) and loader.remainder >= 0 and isinstance(sampler, Sized):
            return int(len(sampler) % loader.total_batch_size)
        return int(loader.remainder)
