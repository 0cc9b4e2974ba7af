"""Score one method on one data set: segments against masks, probes for part names, agreement and collapse.

Maps are made a batch at a time and not stored. Statistics over all images are gathered in a first pass: the mean that
agreement is measured around, a sample for collapse, and the sum of all maps for the position-only control.

Probes are fitted to the first half of the images and scored on the second; controls exchange images within the halves,
so that one second pass in the order of the images suffices.

Legend: B images at a time, F width of the features, (rows, cols) a map of locations, (H, W) a mask's pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...islands import cluster, collapse, distant_agreement, neighbour_agreement
from ...islands.scores import resize_labels, segmentation_scores
from .datasets import VOID, MaskedImages
from .methods import Job, Size
from .probing import StreamedProbes

CLUSTER_LOCATIONS = 1500  # locations that k-means is fitted to; all are assigned
COLLAPSE_LOCATIONS = 2**15  # locations of all images together
UNPROBED = ("shuffled_masks",)  # identical to `image_shuffled` for a probe


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Configure how every method is scored.

    Args:
        map_size: side of the maps; None is the data set's default.
        num_segments: for every image and level; None is the number of segments in its mask.
        batch_size: images per batch.
        num_shuffles: number of orders (shuffled controls) or draws (random segments) that are averaged.
        num_train_pixels: pixels that a probe is fitted to, over all images of the first half.
        num_query_pixels: pixels per image of the second half that the k-NN probe is queried at.
        seed: random seed of everything that is drawn.

    Raises:
        ValueError: for a number that is not positive.
    """

    map_size: int | None = None
    num_segments: int | None = None
    batch_size: int = 8
    num_shuffles: int = 3
    num_train_pixels: int = 4096
    num_query_pixels: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("map_size", "num_segments", "batch_size", "num_shuffles", "num_train_pixels", "num_query_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")


class JobRun:
    """Run a [`Job`] on a data set.

    Args:
        grid: (rows, cols) at which agreement is measured: the teacher's.
        advance: called with the number of images done.
    """

    def __init__(self, job: Job, data: MaskedImages, config: ScoringConfig, grid: Size, advance: Callable[[int], Any]):
        self.job, self.data, self.config, self.grid, self.advance = job, data, config, grid, advance
        side = config.map_size or data.map_size
        self.size = (side, side)
        self.num_train = len(data) // 2
        self.orders = [exchanged(len(data), seed=(config.seed, number)) for number in range(config.num_shuffles)]
        self.scores: list[dict[str, Any]] = []
        self.probes: dict[tuple[str, int], StreamedProbes] = {}
        self.agreement = None if job.subject is None else _Agreement(len(data), grid, config.seed)
        self.total: Tensor | None = None  # sum of all maps, (rows, cols, F) float64

    def __call__(self) -> dict[str, Any]:
        """Return `scores`, one per row, image, level and repetition; `probes`, row -> probe -> counts per repetition;
        and `agreement`, its measures or None."""
        if self.job.maps is None:
            for shown in range(len(self.data)):
                self._score_segments(shown)
                self.advance(1)
        else:
            self._first_pass()
            for indices, images in self._batches():
                maps = self._maps(images, self.size)
                if self.agreement is not None:
                    self.agreement.measure(self._maps(images, self.grid), maps)
                for shown, features in zip(indices, maps, strict=True):
                    self._score_map(shown, features)
                self.advance(len(indices))
        probes: dict[str, dict[str, list]] = {}
        for (row, _), probe in self.probes.items():
            for kind, counts in probe.counts.items():
                probes.setdefault(row, {}).setdefault(kind, []).append(counts)
        agreement = None if self.agreement is None else self.agreement.result()
        return {"scores": self.scores, "probes": probes, "agreement": agreement}

    def _maps(self, images: list, size: Size) -> Tensor:
        assert self.job.maps is not None
        return self.job.maps(images, size).float().cpu()

    def _batches(self) -> Iterator[tuple[list[int], list]]:
        for start in range(0, len(self.data), self.config.batch_size):
            indices = list(range(start, min(start + self.config.batch_size, len(self.data))))
            yield indices, [self.data.image(index) for index in indices]

    def _first_pass(self) -> None:
        needs_total = "position_only" in self.job.rows
        if self.agreement is None and not needs_total:
            return
        for _, images in self._batches():
            if self.agreement is not None:
                self.agreement.add(self._maps(images, self.grid))
            if needs_total:
                added = self._maps(images, self.size).sum(dim=0, dtype=torch.float64)
                self.total = added if self.total is None else self.total + added

    def _score_map(self, shown: int, features: Tensor) -> None:
        """Score every row that is made of the map `(rows, cols, F)` of one image."""
        clusters = _Segments(features, self.config.seed)
        for row in self.job.rows:
            segments = clusters
            if row == "position_only":  # the mean of the other images' maps
                assert self.total is not None
                segments = _Segments(((self.total - features) / (len(self.data) - 1)).float(), self.config.seed)
            for scored, repeat in self._pairs(row, shown):
                self._score(row, shown, scored, repeat, segments)
                if self.data.class_names is not None and row not in UNPROBED:
                    self._probe(row, scored, repeat, segments.features)

    def _score_segments(self, shown: int) -> None:
        """Score a method without maps; random segments are drawn several times."""
        (row,), image, method = self.job.rows, self.data.image(shown), self.job.segments
        assert method is not None
        for repeat in range(self.config.num_shuffles if row == "random" else 1):
            generator = np.random.default_rng((self.config.seed, shown, repeat))
            segments = partial(method, image, size=self.size, generator=generator)
            self._score(row, shown, shown, repeat, segments)

    def _pairs(self, row: str, shown: int) -> list[tuple[int, int]]:
        """Return (index of the mask, repetition) pairs that the segments of an image are scored against."""
        if row == "image_shuffled":  # image i is replaced by `order[i]`
            return [(int(np.flatnonzero(order == shown)[0]), number) for number, order in enumerate(self.orders)]
        if row == "shuffled_masks":
            return [(int(order[shown]), number) for number, order in enumerate(self.orders)]
        return [(shown, 0)]

    def _score(
        self, row: str, shown: int, scored: int, repeat: int, segments: Callable[[int], NDArray[np.int64]]
    ) -> None:
        for level, counts in self.data.num_segments.items():
            # The number of segments is that of the scored mask; for shuffled masks, that of the input image's mask.
            source = shown if row == "shuffled_masks" else scored
            if min(counts[source], counts[scored]) < 2:  # a single segment
                continue
            num_segments = self.config.num_segments or counts[source]
            mask = self.data.mask(scored, level)
            found = resize_labels(segments(num_segments), mask.shape)
            self.scores.append(
                {"row": row, "image": scored, "shown": shown, "level": level, "repeat": repeat}
                | {"num_segments": num_segments, "num_found": len(np.unique(found))}
                | asdict(segmentation_scores(found, mask, ignore=VOID))
            )

    def _probe(self, row: str, scored: int, repeat: int, features: Tensor) -> None:
        mask = self.data.mask(scored, "part")
        if (mask == VOID).all():
            return
        if (row, repeat) not in self.probes:
            assert self.data.class_names is not None
            self.probes[row, repeat] = StreamedProbes(
                len(self.data.class_names),
                num_train_pixels=max(1, self.config.num_train_pixels // self.num_train),
                num_query_pixels=self.config.num_query_pixels,
                seed=self.config.seed,
            )
        probes = self.probes[row, repeat]
        (probes.train if scored < self.num_train else probes.test)(scored, features, mask)


class _Segments:
    """Cluster a map `(rows, cols, F)`, once for each number of clusters."""

    def __init__(self, features: Tensor, seed: int):
        self.features, self.seed = features, seed
        self.by_number: dict[int, NDArray[np.int64]] = {}

    def __call__(self, num_segments: int) -> NDArray[np.int64]:
        if num_segments not in self.by_number:
            self.by_number[num_segments] = cluster(
                self.features, num_segments, seed=self.seed, max_locations=max(CLUSTER_LOCATIONS, num_segments)
            )
        return self.by_number[num_segments]


class _Agreement:
    """Measure agreement between neighbours and between distant locations per image, and collapse over all images."""

    def __init__(self, num_images: int, grid: Size, seed: int):
        num_cells = grid[0] * grid[1]
        order = torch.randperm(num_cells, generator=torch.Generator().manual_seed(seed))
        self.sampled = order[: max(2, COLLAPSE_LOCATIONS // num_images)]
        self.num_cells, self.num_images, self.seed = num_cells, num_images, seed
        self.total: Tensor | float = 0.0
        self.samples: list[Tensor] = []
        self.measures: dict[str, list[float]] = {"neighbours": [], "neighbours_fine": [], "distant": []}

    def add(self, grids: Tensor) -> None:
        """First pass: add maps `(B, rows, cols, F)` at the teacher's grid to the mean and the sample."""
        grids = grids.flatten(1, 2)
        self.total = self.total + grids.sum(dim=(0, 1), dtype=torch.float64)
        self.samples.append(grids[:, self.sampled])

    def measure(self, grids: Tensor, maps: Tensor) -> None:
        """Second pass: measure the same maps, and fine maps `(B, rows, cols, F)`, around the mean over all images."""
        assert isinstance(self.total, Tensor)
        mean = (self.total / (self.num_images * self.num_cells)).float()
        self.measures["neighbours"] += neighbour_agreement(grids, mean).tolist()
        self.measures["neighbours_fine"] += neighbour_agreement(maps, mean).tolist()
        self.measures["distant"] += distant_agreement(grids, mean, seed=self.seed).tolist()

    def result(self) -> dict[str, Any]:
        return self.measures | collapse(torch.cat(self.samples))


def exchanged(num_images: int, *, seed: int | tuple[int, ...]) -> NDArray[np.int64]:
    """Return `(n,)`, for each image another one of the same half: each half is permuted by one random cycle."""
    generator, order, middle = np.random.default_rng(seed), np.empty(num_images, dtype=np.int64), num_images // 2
    for half in (np.arange(middle), np.arange(middle, num_images)):
        circle = generator.permutation(half)
        order[circle] = np.roll(circle, 1)
    return order
