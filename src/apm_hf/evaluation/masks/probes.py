"""Fit linear and nearest-neighbour probes from frozen features to classes per location, for teachers and APMs.

A linear probe is the usual measure of dense features (arXiv:2304.07193, Sec. 7.4). The k-NN probe votes as
DINO's evaluation does (arXiv:2104.14294, App. E), on locations instead of images (arXiv:2306.01667). Both are fitted
to few sampled locations of many images and predict for every location.

Legend: N sampled locations, F feature width, K classes, (rows, cols) a map of locations, row-major.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from ...modeling_apm import IGNORE_INDEX, APMForSemanticSegmentation, APMModel

logger = logging.get_logger(__name__)

# Logit of a class that is absent in training: in effect minus infinity, but finite in float16 too.
ABSENT_BIAS = -1e4
CHUNK_ELEMENTS = 2**24  # similarities that the k-NN probe holds at a time


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """Classify features with a linear map.

    Args:
        weight: `(K, F)`, float32, for features that are not standardised: the standardisation is folded in.
        bias: `(K,)`, float32; `ABSENT_BIAS`, with a weight of zeros, for classes absent in training.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(
        cls,
        features: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        regularisation: float = 1e-3,
        seed: int = 0,
        max_iter: int = 1000,
    ) -> "LinearProbe":
        """Fit scikit-learn's multinomial logistic regression to standardised features.

        Args:
            features: `(N, F)`, on any device.
            labels: `(N,)`, integers in [0, K).
            num_classes: K.
            regularisation: factor of half the squared weights, added to the mean cross-entropy; > 0.
            seed: scikit-learn's `random_state`. Its solver starts from zeros and draws nothing, so today the result is
                the same for every seed.
            max_iter: iterations of L-BFGS; a fit that did not converge is logged.

        Raises:
            ValueError: for shapes that do not fit, labels outside [0, K), features that are not finite.
            ImportError: scikit-learn is not installed.
        """
        try:
            from sklearn.exceptions import ConvergenceWarning
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError('linear probes need scikit-learn: pip install "apm_hf[eval]"') from error
        if not regularisation > 0 or max_iter < 1:
            raise ValueError(
                f"expected regularisation > 0 and max_iter >= 1, got regularisation={regularisation}, {max_iter=}"
            )
        features, labels = _checked(features, labels, num_classes)
        mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
        scale = torch.where(scale > 1e-6 * features.abs().amax(), scale, torch.inf)  # constant features
        present = labels.unique()
        weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
        bias = torch.full((num_classes,), ABSENT_BIAS, dtype=torch.float64)
        if len(present) == 1:
            bias[present] = 0.0
            return cls(weight.float(), bias.float())
        # scikit-learn's C is the weight of the sum of the losses against half the squared weights
        solver = LogisticRegression(C=1 / (regularisation * len(labels)), max_iter=max_iter, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solver.fit(((features - mean) / scale).float().numpy(), labels.numpy())
        if solver.n_iter_.max() >= max_iter:
            logger.warning(f"the linear probe did not converge in {max_iter} iterations; raise max_iter.")
        coefficients, intercept = torch.from_numpy(solver.coef_), torch.from_numpy(solver.intercept_)
        if len(present) == 2:  # then there is one row, the logit of the second class against the first
            coefficients, intercept = (torch.cat([-half, half]) for half in (coefficients / 2, intercept / 2))
        weight[present] = coefficients.double() / scale
        bias[present] = intercept.double() - weight[present] @ mean
        return cls(weight.float(), bias.float())

    def logits(self, features: Tensor) -> Tensor:
        """Return logits `(..., K)`, float32, for features `(..., F)`, on their device."""
        return F.linear(features.float(), self.weight.to(features.device), self.bias.to(features.device))

    def predict(self, features: Tensor) -> Tensor:
        """Return class indices `(...)` for features `(..., F)`."""
        return self.logits(features).argmax(dim=-1)


@dataclass(frozen=True, eq=False)
class KNNProbe:
    """Classify features by their nearest training locations, weighted by exp(cosine / temperature).

    Args:
        features: `(N, F)`, of norm 1, float32, on the device where neighbours are searched.
        labels: `(N,)`, class indices.
        num_classes: K.
        k: number of neighbours that vote; all if there are fewer.
        temperature: of their weights; arXiv:2104.14294 uses 0.07, arXiv:2306.01667, on locations, 0.02.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    k: int
    temperature: float

    @classmethod
    def fit(
        cls,
        features: Tensor,
        labels: Tensor,
        *,
        num_classes: int | None = None,
        k: int = 20,
        temperature: float = 0.07,
    ) -> "KNNProbe":
        """Store the normalised training locations.

        Args:
            features: `(N, F)`.
            labels: `(N,)`, integers in [0, K).
            num_classes: K; by default the largest label plus one.
            k, temperature: as above.

        Raises:
            ValueError: for shapes that do not fit, labels outside [0, K), k < 1 or temperature <= 0.
        """
        if k < 1 or not temperature > 0:
            raise ValueError(f"expected k >= 1 and temperature > 0, got k={k} and temperature={temperature}")
        if num_classes is None:
            num_classes = int(labels.max()) + 1 if labels.numel() else 1
        checked, numbers = _checked(features, labels, num_classes)
        normalised = F.normalize(checked, dim=-1).float().to(features.device)
        return cls(normalised, numbers.to(features.device), num_classes, k, temperature)

    def votes(self, features: Tensor, *, chunk_size: int | None = None) -> Tensor:
        """Return shares of the votes, `(..., K)` float32, for features `(..., F)`.

        Args:
            features: on the probe's device.
            chunk_size: queries compared with all N locations at a time; None bounds similarities by `CHUNK_ELEMENTS`.
        """
        if chunk_size is None:
            chunk_size = max(1, CHUNK_ELEMENTS // len(self.features))
        queries = features.detach().reshape(-1, features.shape[-1])
        shares = torch.zeros(len(queries), self.num_classes, device=queries.device)
        for start in range(0, len(queries), chunk_size):
            cosines = F.normalize(queries[start : start + chunk_size].float(), dim=-1) @ self.features.T  # (chunk, N)
            cosines, nearest = cosines.topk(min(self.k, len(self.labels)), dim=-1)  # -> (chunk, k)
            weights = (cosines / self.temperature).softmax(dim=-1)
            shares[start : start + chunk_size].scatter_add_(1, self.labels[nearest], weights)
        return shares.unflatten(0, features.shape[:-1])

    def predict(self, features: Tensor, *, chunk_size: int | None = None) -> Tensor:
        """Return class indices `(...)` for features `(..., F)`."""
        return self.votes(features, chunk_size=chunk_size).argmax(dim=-1)


def sample_locations(
    label_map: ArrayLike,
    num_locations: int,
    generator: torch.Generator,
    *,
    ignore: int | None = IGNORE_INDEX,
    balanced: bool = False,
) -> Tensor:
    """Sample locations to train a probe on, each at most once.

    Args:
        label_map: `(rows, cols)`, integers.
        num_locations: number of locations; fewer are returned if fewer have a label.
        generator: on the CPU.
        ignore: label of pixels that are never sampled.
        balanced: draw all classes of the map with equal probability, until one is used up; otherwise all pixels.

    Returns:
        `(<= num_locations,)`, row-major indices in ascending order, int64.
    """
    labels = torch.from_numpy(np.ascontiguousarray(_label_map(label_map), dtype=np.int64)).flatten()
    candidates = torch.arange(len(labels)) if ignore is None else (labels != ignore).nonzero()[:, 0]
    weights = torch.ones(len(candidates), dtype=torch.float64)
    if balanced:
        _, classes, counts = labels[candidates].unique(return_inverse=True, return_counts=True)
        weights = 1 / counts.double()[classes]
    # The n largest of log(uniform) / weight are a weighted sample without replacement (Efraimidis & Spirakis 2006).
    keys = torch.rand(len(candidates), generator=generator, dtype=torch.float64).log() / weights
    picked = keys.topk(min(num_locations, len(candidates))).indices
    return candidates[picked].sort().values


class MeanIoU:
    """Accumulate intersection over union per class over images: counts are summed first, as is usual.

    Args:
        num_classes: K.
        ignore_index: label of ignored pixels in the ground truth.
    """

    def __init__(self, num_classes: int, *, ignore_index: int = IGNORE_INDEX) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.confusion = np.zeros((num_classes, num_classes + 1), dtype=np.int64)  # truth, predicted; last: no class

    def update(self, predicted: ArrayLike, truth: ArrayLike) -> None:
        """Count an image or a batch, both `(...)` integers. A pixel predicted as `ignore_index` is a miss.

        Raises:
            ValueError: for different shapes, or labels that are neither in [0, K) nor `ignore_index`.
        """
        predicted, truth = np.asarray(predicted), np.asarray(truth)
        if predicted.shape != truth.shape:
            raise ValueError(f"expected label maps of one shape, got {predicted.shape} and {truth.shape}")
        for name, labels in (("predicted", predicted), ("truth", truth)):
            unknown = labels[((labels < 0) | (labels >= self.num_classes)) & (labels != self.ignore_index)]
            if labels.dtype.kind not in "iub" or len(unknown):
                raise ValueError(
                    f"{name}: expected integers in [0, {self.num_classes}) or {self.ignore_index}, "
                    f"got {labels.dtype}, {np.unique(unknown)[:5].tolist()}"
                )
        counted = truth != self.ignore_index
        rows, cols = truth[counted].astype(np.int64), predicted[counted].astype(np.int64)
        cols[cols == self.ignore_index] = self.num_classes
        counts = np.bincount(rows * (self.num_classes + 1) + cols, minlength=self.confusion.size)
        self.confusion += counts.reshape(self.confusion.shape)

    @property
    def per_class(self) -> np.ndarray:
        """Return the IoU per class, `(K,)`, in [0, 1]; NaN for classes that are not in the ground truth."""
        hits, in_truth = np.diagonal(self.confusion), self.confusion.sum(axis=1)
        union = in_truth + self.confusion[:, : self.num_classes].sum(axis=0) - hits
        return np.where(in_truth > 0, hits / np.maximum(union, 1), np.nan)

    @property
    def mean_iou(self) -> float:
        """Return the mean over the classes in the ground truth, in [0, 1]; NaN before any pixel was counted."""
        per_class = self.per_class[self.confusion.sum(axis=1) > 0]
        return float(per_class.mean()) if len(per_class) else float("nan")

    @property
    def pixel_accuracy(self) -> float:
        """Return the share of correct pixels, in [0, 1]; NaN before any was counted."""
        total = self.confusion.sum()
        return float(np.diagonal(self.confusion).sum() / total) if total else float("nan")


def segmentation_model(apm: APMModel, probe: LinearProbe, id2label: Mapping[int, str]) -> APMForSemanticSegmentation:
    """Join an APM and the probe fitted to its features, for `save_pretrained` and `pipeline("image-segmentation")`.

    Weights are copied, except those that segmentation does not need: of pooling and of other heads.

    Args:
        apm: model whose `feature_size` is the probe's F.
        probe: probe for K classes.
        id2label: name of every class, 0 to K - 1.

    Raises:
        ValueError: for a probe of another width, or names of other classes.
    """
    num_classes, width = probe.weight.shape
    if width != apm.config.feature_size:
        raise ValueError(f"probe: expected features of width feature_size={apm.config.feature_size}, got {width}")
    if sorted(id2label) != list(range(num_classes)):
        raise ValueError(f"id2label: expected a name for each of 0 to {num_classes - 1}, got {dict(id2label)}")
    config = copy.deepcopy(apm.config)
    config.id2label = {index: id2label[index] for index in range(num_classes)}
    config.label2id = {name: index for index, name in config.id2label.items()}
    with torch.random.fork_rng(devices=[]):  # every weight drawn here is replaced below
        model = APMForSemanticSegmentation(config).to(device=apm.device, dtype=apm.dtype)
    weights = apm.state_dict()
    model.apm.load_state_dict({name: weights[name] for name in model.apm.state_dict()})
    model.classifier.load_state_dict({"weight": probe.weight, "bias": probe.bias})
    return model.eval()


def _checked(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Check training data and return it on the CPU: float64 `(N, F)` and int64 `(N,)`."""
    if features.ndim != 2 or not features.numel() or labels.shape != features.shape[:1]:
        raise ValueError(f"expected features (N, F) and labels (N,), got {(*features.shape,)} and {(*labels.shape,)}")
    if not features.isfinite().all():
        raise ValueError("features: expected finite numbers, got NaN or infinity")
    low, high = int(labels.min()), int(labels.max())
    if labels.is_floating_point() or low < 0 or high >= num_classes:
        raise ValueError(f"labels: expected integers in [0, {num_classes}), got {labels.dtype} in [{low}, {high}]")
    return features.detach().cpu().double(), labels.detach().cpu().long()


def _label_map(label_map: ArrayLike) -> np.ndarray:
    label_map = np.asarray(label_map)
    if label_map.ndim != 2 or label_map.dtype.kind not in "iub":
        raise ValueError(f"label_map: expected integers (rows, cols), got {label_map.dtype} {label_map.shape}")
    return label_map


__all__ = [
    "ABSENT_BIAS",
    "KNNProbe",
    "LinearProbe",
    "MeanIoU",
    "sample_locations",
    "segmentation_model",
]
