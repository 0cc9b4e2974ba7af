"""Fit and score linear and nearest-neighbour probes on maps that arrive one image at a time.

Every method's probes are fitted to the same pixels and scored on the same pixels. A pixel's feature is that of the
map's cell in which it lies. The linear probe predicts every pixel: its logits are interpolated bilinearly to the
mask's resolution; the k-NN probe, which costs more, predicts a sample of the mask's pixels.

Legend: F width of the features, K classes, (rows, cols) a map of locations, (H, W) a mask's pixels.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...islands.scores import near_boundaries
from .datasets import VOID
from .probes import KNNProbe, LinearProbe, MeanIoU, sample_locations

BOUNDARY = 6  # pixels of the mask: the reach of "near a boundary"
PROBES = {"linear": "linear probe", "knn": "k-NN probe"}


class StreamedProbes:
    """Hold both probes and fit them when the first image to be scored arrives.

    Args:
        num_classes: K.
        num_train_pixels: pixels per training image.
        num_query_pixels: pixels per test image that the k-NN probe is scored on.
        seed: random seed of the pixels.
    """

    def __init__(self, num_classes: int, *, num_train_pixels: int, num_query_pixels: int, seed: int):
        self.num_classes, self.seed = num_classes, seed
        self.num_train_pixels, self.num_query_pixels = num_train_pixels, num_query_pixels
        self.features: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.fitted: tuple[LinearProbe, KNNProbe] | None = None
        self.counts: dict[str, list[dict[str, Any]]] = {probe: [] for probe in PROBES}

    def train(self, index: int, features: Tensor, mask: NDArray[np.int32]) -> None:
        """Add training pixels of image `index`: features `(rows, cols, F)`, mask `(H, W)`."""
        pixels = self._pixels(index, mask, self.num_train_pixels)
        self.features.append(_at(features, mask.shape, pixels))
        self.labels.append(torch.from_numpy(mask.ravel()[pixels].astype(np.int64)))

    def test(self, index: int, features: Tensor, mask: NDArray[np.int32]) -> None:
        """Fit the probes if needed and count their predictions on image `index`."""
        if self.fitted is None:
            features_seen, labels = torch.cat(self.features), torch.cat(self.labels)
            self.fitted = (
                LinearProbe.fit(features_seen, labels, num_classes=self.num_classes),
                KNNProbe.fit(features_seen, labels, num_classes=self.num_classes),
            )
            self.features, self.labels = [], []  # the k-NN probe has a copy
        linear, nearest = self.fitted
        logits = linear.logits(features).movedim(-1, 0)  # (rows, cols, K) -> (K, rows, cols)
        logits = F.interpolate(logits[None], size=mask.shape, mode="bilinear", align_corners=False)[0]
        predicted = logits.argmax(dim=0).numpy()
        self._count("linear", index, predicted, mask)
        near = near_boundaries(mask, mask != VOID, BOUNDARY)
        hits = int((predicted[near] == mask[near]).sum())
        self.counts["linear"][-1] |= {"near": int(near.sum()), "near_hits": hits}
        pixels = self._pixels(index, mask, self.num_query_pixels)
        votes = nearest.predict(_at(features, mask.shape, pixels))
        self._count("knn", index, votes.numpy(), mask.ravel()[pixels])

    def _pixels(self, index: int, mask: NDArray[np.int32], number: int) -> NDArray[np.int64]:
        (seed,) = np.random.SeedSequence([self.seed, index]).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed))
        return sample_locations(mask, number, generator, ignore=VOID).numpy()

    def _count(self, probe: str, index: int, predicted: NDArray[np.int64], truth: NDArray[np.int32]) -> None:
        counts = MeanIoU(self.num_classes, ignore_index=VOID)
        counts.update(predicted, truth)
        confusion = counts.confusion  # (K, K + 1)
        in_truth, in_predicted = confusion.sum(axis=1), confusion[:, : self.num_classes].sum(axis=0)
        self.counts[probe].append(
            {
                "image": index,
                "hits": np.diagonal(confusion).tolist(),
                "truth": in_truth.tolist(),
                "predicted": in_predicted.tolist(),
            }
        )


def _at(features: Tensor, mask_size: tuple[int, ...], pixels: NDArray[np.int64]) -> Tensor:
    """Return `(n, F)`, features of the cells of `(rows, cols, F)` that contain the centres of the mask's pixels."""
    places = np.unravel_index(pixels, mask_size)
    cells = [
        (2 * place + 1) * cells // (2 * pixels)
        for place, cells, pixels in zip(places, features.shape[:2], mask_size, strict=True)
    ]
    return features[torch.from_numpy(cells[0]), torch.from_numpy(cells[1])]
