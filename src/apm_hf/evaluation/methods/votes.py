"""Vote or seek a mode among an image's views, without gradients; with the helpers for views that all methods use.

* ZERO (Farina et al. 2024, arXiv:2405.18330): the most confident views vote.
* MTA (Zanella & Ben Ayed, CVPR 2024, arXiv:2405.02266): the mode of the views' embeddings, found together with how
  much each view belongs to it.

Legend: B images, V views, K classes, F width of the teacher's embeddings.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...teachers.zero_shot import classify
from .task import ImageBatch, MethodOutput, ZeroShotTask

NUM_VIEWS = 64  # as in TPT, MTA and ZERO: the image and 63 crops

# Classes without a vote are ranked too: all of them together get this share of one vote.
_UNVOTED = 1e-3
# Squared distance of unit vectors below which views are identical in float32.
_SAME = 1e-12


def check_views(num_views: int, keep: float = 1.0) -> None:
    """Raise a ValueError if there is no view, or no share of them to keep."""
    if num_views < 1 or not 0 < keep <= 1:
        raise ValueError(f"num_views, keep: expected at least 1 and a share in (0, 1], got {num_views} and {keep}")


def view_logits(task: ZeroShotTask, views: Tensor) -> Tensor:
    """Return logits `(B, V, K)` for embeddings `(B, V, F)` of any norm."""
    logits = classify(views.flatten(0, 1), task.text_embeds, logit_scale=task.teacher.logit_scale)
    return logits.unflatten(0, views.shape[:2])  # (B * V, K) -> (B, V, K)


def by_confidence(logits: Tensor) -> Tensor:
    """Sort views by entropy, least first: logits `(B, V, K)` -> indices `(B, V)`; ties keep their order."""
    log_probabilities = logits.log_softmax(dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return entropy.argsort(dim=1, stable=True)


def num_kept(num_views: int, keep: float) -> int:
    """Return the number of views in a share: rounded down, at least one."""
    return max(1, math.floor(num_views * keep + 1e-9))  # 0.29 * 100 is 28.999...


def mean_direction(task: ZeroShotTask, views: Tensor, keep: float = 1.0) -> Tensor:
    """Return `(B, F)`, the mean unit embedding of the most confident share `keep` of the views `(B, V, F)`."""
    views = F.normalize(views, dim=-1)
    if keep < 1:
        kept = by_confidence(view_logits(task, views))[:, : num_kept(views.shape[1], keep)]  # (B, n)
        views = views.take_along_dim(kept[:, :, None], dim=1)  # (B, V, F) -> (B, n, F)
    return views.mean(dim=1)


def recentred(embeds: Tensor, earlier: Tensor | None = None) -> Tensor:
    """Subtract from embeddings `(B, F)` the mean of them and of `earlier` ones `(N, F)`.

    A single embedding is returned unchanged: it equals its mean, and no shift can be estimated.
    """
    population = embeds if earlier is None else torch.cat([earlier.to(embeds), embeds])
    return embeds if len(population) == 1 else embeds - population.mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class Zero:
    """Apply ZERO: the most confident views vote, each for its most probable class.

    Voting is averaging probabilities at temperature zero. If classes tie, the excluded views vote too, the most
    confident first, until one of them votes for a tied class; if none does, the most confident of the voting views
    decides.

    Args:
        keep: share of the views that vote, by entropy; TPT's by default.
    """

    name: str = "zero"
    title: str = "ZERO"
    num_views: int = NUM_VIEWS
    baseline: str | None = "mean_views"
    sequential: bool = False
    keep: float = 0.1

    def __post_init__(self) -> None:
        check_views(self.num_views, self.keep)

    def __call__(self, task: ZeroShotTask, batch: ImageBatch) -> MethodOutput:
        """Return the logarithms of vote shares as logits; classes without a vote are ranked by mean probability."""
        logits = view_logits(task, batch.embeds(self.num_views))
        order, voters = by_confidence(logits), num_kept(self.num_views, self.keep)
        ranked = logits.take_along_dim(order[:, :, None], dim=1)
        votes = count_votes(ranked.argmax(dim=-1), voters, num_classes=logits.shape[-1]).cpu()  # (B, K)
        shares = votes + _UNVOTED * ranked[:, :voters].cpu().double().softmax(dim=-1).mean(dim=1)
        return MethodOutput(logits=(shares / shares.sum(dim=1, keepdim=True)).log().float())


def count_votes(classes: Tensor, voters: int, *, num_classes: int) -> Tensor:
    """Count votes `(B, K)`, ties broken by one extra vote, for views' classes `(B, V)` in order of confidence."""
    votes = F.one_hot(classes[:, :voters], num_classes).sum(dim=1)
    tied = votes == votes.amax(dim=1, keepdim=True)  # (B, K)
    deciding = classes.roll(-voters, dims=1)  # excluded views first, then those that voted
    first = tied.gather(1, deciding).int().argmax(dim=1, keepdim=True)  # voters name tied classes: there is always one
    one_more = (tied.sum(dim=1, keepdim=True) > 1).to(votes.dtype)
    return votes.scatter_add(1, deciding.gather(1, first), one_more)


@dataclass(frozen=True, kw_only=True)
class MTA:
    """Apply MTA: classify the mode that a robust MeanShift finds among the views' unit embeddings.

    The mode m and the inlierness y, which sums to 1 over the views, maximise (Eq. 3 of the paper)

        sum_p y_p K(f_p - m) + lambda / 2 sum_pq w_pq y_p y_q + lambda_y entropy(y)

    with the Gaussian kernel K(f_p - m) = exp(-|f_p - m|^2 / h_p^2), h_p^2 the mean squared distance of view p to its
    nearest neighbours, and w_pq the inner product of the class probabilities of views p and q. Both are found in turn
    by fixed-point iterations, y from equal shares and m from the image's embedding; m stays on the unit sphere.

    Args:
        affinity: lambda.
        entropy: lambda_y.
        neighbours: share of the other views that are neighbours.
        num_iterations: of each fixed point, and of alternations between them. All are run, so that an image does not
            depend on how fast others converge.
    """

    name: str = "mta"
    title: str = "MTA"
    num_views: int = NUM_VIEWS
    baseline: str | None = "mean_views"
    sequential: bool = False
    affinity: float = 4.0
    entropy: float = 0.2
    neighbours: float = 0.3
    num_iterations: int = 5

    def __post_init__(self) -> None:
        check_views(self.num_views, self.neighbours)
        if not self.affinity >= 0 or not self.entropy > 0 or self.num_iterations < 1:
            raise ValueError(
                "affinity, entropy, num_iterations: expected at least 0, above 0 and at least 1, "
                f"got {self.affinity}, {self.entropy} and {self.num_iterations}"
            )

    def __call__(self, task: ZeroShotTask, batch: ImageBatch) -> MethodOutput:
        views = batch.embeds(self.num_views)
        probabilities = view_logits(task, views).softmax(dim=-1)
        mode = self.mode(F.normalize(views, dim=-1), probabilities)
        return MethodOutput(logits=classify(mode, task.text_embeds, logit_scale=task.teacher.logit_scale).cpu())

    def mode(self, views: Tensor, probabilities: Tensor) -> Tensor:
        """Find the modes `(B, F)` of unit embeddings `(B, V, F)`, given their class probabilities `(B, V, K)`."""
        num_views = views.shape[1]
        if num_views == 1:
            return views[:, 0]
        # Not from inner products: rounding would give equal views a nonzero distance.
        distances = torch.cdist(views, views, compute_mode="donot_use_mm_for_euclid_dist").square()  # (B, V, V)
        nearest = distances.sort(dim=-1).values[..., 1 : 1 + num_kept(num_views - 1, self.neighbours)]
        squared_bandwidths = nearest.mean(dim=-1).clamp_min(_SAME)  # (B, V)
        affinities = probabilities @ probabilities.mT  # (B, V, V)

        def log_kernel(mode: Tensor) -> Tensor:
            return -(views - mode[:, None]).square().sum(dim=-1) / squared_bandwidths  # (B, V)

        inlierness = torch.full_like(squared_bandwidths, 1 / num_views)
        mode = views[:, 0]
        for _ in range(self.num_iterations):
            kernel = log_kernel(mode).exp()
            for _ in range(self.num_iterations):
                agreement = self.affinity * (affinities @ inlierness[:, :, None])[..., 0]  # (B, V)
                inlierness = ((kernel + agreement) / self.entropy).softmax(dim=1)
            for _ in range(self.num_iterations):
                # Softmax of logarithms, since the products could all underflow.
                weights = (inlierness.log() + log_kernel(mode)).softmax(dim=1)
                mode = F.normalize((weights[:, :, None] * views).sum(dim=1), dim=-1)
        return mode
