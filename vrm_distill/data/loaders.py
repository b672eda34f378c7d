"""Batches: the share of one process of a global batch, in an order that a number decides."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from vrm_distill.seeding import derived_seed


class ShardedBatches:
    """Index batches of one epoch: every process gets its equal part of each global batch, cut in micro-batches.

    The order is a permutation drawn from ``(seed, epoch)`` alone, so that :meth:`seek` goes anywhere and all processes
    agree. Processes' parts of a batch are contiguous in it: gathered in the order of their ranks they are the batch
    that one process would have had. The last, incomplete batch of an epoch is left out.

    Args:
        samples: how many there are to learn from.
        batch_size: samples of a step of the optimiser, over all processes and micro-batches.

    Raises:
        ValueError: the batch cannot be dealt out equally, or is larger than the set.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1):
        if batch_size % (world * accumulate):
            raise ValueError(
                f"a batch of {batch_size} cannot be dealt out equally to {world} processes of {accumulate} "
                f"micro-batches each: take a multiple of {world * accumulate}"
            )
        if batch_size // (world * accumulate) < 2:
            raise ValueError(
                f"a batch of {batch_size} leaves one image to each of {world} processes' {accumulate} micro-batches, "
                f"which has no relations and no batch norm: take {2 * world * accumulate} or more"
            )
        if batch_size > samples:
            raise ValueError(f"{batch_size} is larger than the {samples} training images: no batch would be full")
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.steps = samples // batch_size
        self.seek(0, 0)

    def seek(self, epoch: int, step: int) -> None:
        """Let the next iteration start at this step of this epoch, both from 0."""
        self.epoch, self.start = epoch, step

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
        order = torch.randperm(self.samples, generator=generator)
        local = self.batch_size // self.world
        for step in range(self.start, self.steps):
            first = step * self.batch_size + self.rank * local
            yield from order[first : first + local].split(local // self.accumulate)


def batches_loader(dataset: Dataset, batches, workers: int = 0) -> DataLoader:
    """``(images, labels)`` of each index batch. Augmentation is not the loader's: it follows on the device."""
    return DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Without a generator of its own, a loader draws a seed for its workers from the global one.
        generator=torch.Generator(),
    )


def plain_loader(
    dataset: Dataset, batch_size: int = 256, *, rank: int = 0, world: int = 1, workers: int = 0
) -> DataLoader:
    """Batches ``(images, labels)`` in order, each one read at once; of several processes, each every ``world``-th."""
    indices = torch.arange(rank, len(dataset), world)
    return batches_loader(dataset, BatchSampler(_Tensor(indices), batch_size, drop_last=False), workers)


class _Tensor:
    def __init__(self, values: Tensor) -> None:
        self.values = values.tolist()

    def __iter__(self):
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)
