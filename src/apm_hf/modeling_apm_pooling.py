"""Pooling: features of locations, which may come chunk by chunk -> one feature per image.

Source: arXiv:2410.20535, section 3 (the mean), and the release's test-time-training model (attention).

Legend: B images, L locations, F feature width; coordinates are (y, x) in [-1, 1].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_apm import APMConfig
from .position_encoding import position_code


class APMMeanPooling:
    """The mean over locations that come chunk by chunk."""

    needs_coordinates = False

    def __init__(self) -> None:
        self.total: Tensor | None = None  # (B, F)
        self.count = 0

    def add(self, features: Tensor, coordinates: Tensor | None = None) -> None:
        """`features` `(B, L, F)`; where they lie does not matter."""
        total = features.sum(dim=1, dtype=torch.promote_types(features.dtype, torch.float32))
        self.total = total if self.total is None else self.total + total
        self.count += features.shape[1]

    def result(self, dtype: torch.dtype) -> Tensor:
        """`(B, F)`."""
        assert self.total is not None
        return (self.total / self.count).to(dtype)


class APMAttentionPooling(nn.Module):
    """A learned query attends to feature + position code; the design of the release's test-time-training model.

    With one query, the key and value projections move out of the sum over locations: scores are x . (W_k^T q) and the
    values' projection acts on the weighted mean of x. Equal to multi-head attention, at L * F * heads instead of
    2 * L * F * F products. Locations may come chunk by chunk (arXiv:1805.02867: the maximum is kept up with).
    """

    def __init__(self, config: APMConfig, feature_size: int | None = None):
        super().__init__()
        width = config.feature_size if feature_size is None else feature_size
        self.num_heads = config.pooling_num_heads
        self.grid_size = config.grid_size
        self.query = nn.Parameter(torch.empty(width))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, features: Tensor, coordinates: Tensor) -> Tensor:
        """`(B, F)` for features `(B, L, F)` at coordinates `(1 or B, L, 2)`."""
        pooling = self.begin()
        pooling.add(features, coordinates)
        return pooling.result(features.dtype)

    def begin(self) -> "AttentionSoFar":
        """To be given the locations chunk by chunk."""
        return AttentionSoFar(self)

    def probe(self) -> tuple[Tensor, Tensor]:
        """What inputs are compared with, `(heads, F)`, and a shift `(heads,)`, the same for all locations."""
        heads = (self.num_heads, len(self.query) // self.num_heads)
        query = self.q_proj(self.query).unflatten(0, heads) * heads[1] ** -0.5  # (heads, F / heads)
        probe = torch.einsum("hd,hdf->hf", query, self.k_proj.weight.unflatten(0, heads))
        return probe, (query * self.k_proj.bias.unflatten(0, heads)).sum(-1)  # the shift keeps k's bias

    def project(self, pooled: Tensor) -> Tensor:
        """`(B, F)` for the heads' weighted means of the inputs, `(B, heads, F)`."""
        weight = self.v_proj.weight.unflatten(0, (self.num_heads, -1))
        values = torch.einsum("bhf,hdf->bhd", pooled, weight).flatten(1)
        return self.out_proj(values + self.v_proj.bias)


class AttentionSoFar:
    """Sums over the locations seen, weighted by exp(score - highest score seen)."""

    needs_coordinates = True

    def __init__(self, pooler: APMAttentionPooling):
        self.pooler, (self.probe, self.shift) = pooler, pooler.probe()
        self.highest: Tensor | None = None  # (B, heads, 1)
        self.weighted = self.total = torch.empty(0)  # (B, heads, F), (B, heads, 1)

    def add(self, features: Tensor, coordinates: Tensor | None = None) -> None:
        """Features `(B, L, F)` at coordinates `(1 or B, L, 2)`."""
        assert coordinates is not None
        size = self.pooler.grid_size
        code = position_code(coordinates, size, size, features.shape[-1])
        inputs = features + code.to(features.dtype)  # (B, L, F)
        scores = F.linear(inputs, self.probe, self.shift).transpose(1, 2)  # (B, L, F) -> (B, heads, L)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        highest = scores.detach().amax(dim=-1, keepdim=True)
        highest = highest if self.highest is None else highest.maximum(self.highest)
        weights = (scores - highest).exp()
        weighted = (weights.to(inputs.dtype) @ inputs).to(weights.dtype)  # (B, heads, F)
        total = weights.sum(dim=-1, keepdim=True)
        if self.highest is not None:
            shrink = (self.highest - highest).exp()
            weighted, total = self.weighted * shrink + weighted, self.total * shrink + total
        self.highest, self.weighted, self.total = highest, weighted, total

    def result(self, dtype: torch.dtype) -> Tensor:
        """`(B, F)`."""
        return self.pooler.project((self.weighted / self.total).to(dtype))


def begin_pooling(pooler: APMAttentionPooling | None) -> APMMeanPooling | AttentionSoFar:
    """What is given the locations chunk by chunk; None pools by the mean."""
    return APMMeanPooling() if pooler is None else pooler.begin()
