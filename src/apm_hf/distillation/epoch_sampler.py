"""The order of the images of an epoch, from any place in it."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """A random order for every epoch that depends on the seed and the epoch alone; `start` images of it are done."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch, self.start = length, seed, 0, 0

    def __len__(self) -> int:
        return max(self.length - self.start, 0)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.length, generator=generator).tolist()[self.start :]
