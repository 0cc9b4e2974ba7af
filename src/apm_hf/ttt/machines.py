"""B machines that learn at once: what learns is each machine's own, what stands still is shared and computed once.

The arithmetic is `modeling_apm`'s, written for stacked weights; layers below the first one that learns are computed
for many steps at a time.

Source: arXiv:2410.20535, section 4.

Legend: B machines, one an image, n locations asked, H a layer's width, F feature width, R blocks, (rows, cols) the
grid asked about, the machine's own or its target's. Locations are indices of its cells, row-major: `(n,)`, `(B, n)` or
None for the whole grid.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..configuration_apm import APMConfig
from ..position_encoding import (
    grid_coordinates,
    position_code,
    sample_patches,
)
from .layers import ALIGNED, Shared, StackedLinear, StackedQueryLinear
from .targets import Answers


class Machines:
    """B machines of one architecture, about an image each.

    Args:
        config: the architecture.
        start: every weight by name, float32, `(1 or B, ...)`.
        learning: see `learning_modules`.
        pixel_values: `(B, C, S, S)`, or None where the trigger column is given and there is no local patch.
        trigger_column: `(B, D)`, for `trigger_source="embedding"`.
        grid: asked about, (rows, cols); None is the machine's own.
        rank, alpha: of modules that learn in blocks.
        own: every machine starts from weights of its own: `start` holds `(B, ...)`, not `(1, ...)`.
        accumulate: never forget gradients.
        dtype: of the products; weights, losses and pooling stay float32.
    """

    def __init__(
        self,
        config: APMConfig,
        start: dict[str, Tensor],
        learning: dict[str, str],
        pixel_values: Tensor | None,
        trigger_column: Tensor | None,
        num_machines: int,
        *,
        grid: tuple[int, int] | None = None,
        rank: int = 1,
        alpha: float = 1.0,
        own: bool = False,
        accumulate: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.start = config, start
        own_grid = (config.grid_size, config.grid_size)
        grid = own_grid if grid is None else grid
        device = next(iter(start.values())).device
        anchor = torch.zeros((), device=device, requires_grad=True)
        shared = Shared(num_machines, anchor, accumulate, dtype, rank, alpha, own)
        self.shared, self.activation = shared, ACT2FN[config.hidden_act]

        def linear(name: str, shared: Shared = shared) -> StackedLinear:
            return StackedLinear(name, start, learning.get(name), shared)

        def query_linear(name: str, feature_size: int = 0) -> StackedQueryLinear:
            how = learning.get(name)
            return StackedQueryLinear(name, start, how, shared, config, grid=grid, feature_size=feature_size)

        self.first = query_linear("decoder.layers.0")
        self.chain = [linear(f"decoder.layers.{index}") for index in range(1, len(config.hidden_sizes))]
        self.chain.append(linear("decoder.feature_head"))
        # The trigger's convolution and the pooling are small, and pooling is where rounding would hurt.
        precise = Shared(num_machines, anchor, accumulate, torch.float32, rank, alpha, own)
        self.trigger = linear("trigger", precise) if config.trigger_source == "conv" else None
        self.pooler = _StackedPooler(config, start, learning, precise, grid) if config.pooling == "attention" else None
        self.colours: list[StackedLinear] = []
        self.first_colours: StackedQueryLinear | None = None
        if "decoder.rgb_head.layers.0" in learning:
            self.first_colours = query_linear("decoder.rgb_head.layers.0", config.feature_size)
            self.colours = [
                linear(f"decoder.rgb_head.layers.{index}") for index in range(1, len(config.rgb_hidden_sizes) + 1)
            ]
        # What the convolution multiplies, and what is in the queries: (B, L, C * patch**2) and (B, L, Q).
        self.cells = self.patches = None
        if pixel_values is not None:
            one_window = config.local_patch and config.local_patch_scales == [1] and grid == own_grid
            if self.trigger is not None or one_window:
                self.cells = _aligned(F.unfold(pixel_values, config.patch_size, stride=config.patch_size).mT)
            if one_window:
                self.patches = self.cells
            elif config.local_patch:
                coordinates = grid_coordinates(*grid, device=device)[None]
                windows = [
                    sample_patches(pixel_values, coordinates, config.patch_size, scale)
                    for scale in config.local_patch_scales
                ]
                self.patches = _aligned(torch.cat(windows, dim=-1))
        self.levels = linear("decoder.level_head") if "decoder.level_head" in learning else None
        self.trigger_column = trigger_column
        self.statistics: list[Tensor] | None = None  # mean and deviation of the teacher's features
        if config.feature_mean is not None:
            given = (config.feature_mean, config.feature_std)
            self.statistics = [torch.tensor(values, dtype=torch.float32, device=device) for values in given]
        # How many Linears of the chain stand still, counted from the image on; None: the first layer learns.
        self.num_still: int | None = None
        trigger_learns = self.trigger is not None and self.trigger.how is not None
        # Levels are read from the last layer's answers, which what is prepared may not hold.
        if not trigger_learns and self.first.parts["trigger"].how is None and self.levels is None:
            self.num_still = next((k for k, layer in enumerate(self.chain) if layer.how), len(self.chain))

    def linears(self) -> Iterator[StackedLinear]:
        for owner in (self.first, self.first_colours):
            yield from owner.parts.values() if owner is not None else ()
        yield from [*self.chain, *self.colours]
        yield from (layer for layer in (self.trigger, self.levels) if layer is not None)
        yield from () if self.pooler is None else self.pooler.linears.values()

    def leaves(self) -> dict[str, Tensor]:
        """All that learns: `(B, ...)` by name."""
        leaves = {
            f"{linear.name}[{linear.columns.start}]:{part}": leaf
            for linear in self.linears()
            for part, leaf in linear.leaves.items()
        }
        return leaves | (self.pooler.leaves if self.pooler is not None else {})

    def prepare(self, where: Iterable[Tensor | None]) -> list[Any]:
        """What stands still while the machines learn, for the locations of several steps, one entry each."""
        steps = list(where)
        if self.num_still is None:
            return [None] * len(steps)
        with torch.no_grad():
            if steps[0] is None:
                return [self._prepare(None)] * len(steps)
            counts = [step.shape[-1] for step in steps if step is not None]
            prepared = self._prepare(torch.cat([step for step in steps if step is not None], dim=-1))
        return list(zip(*(part.split(counts, dim=1) for part in prepared), strict=True))

    def _prepare(self, where: Tensor | None) -> tuple[Tensor, ...]:
        hidden = self.activation(self._first_layer(self._trigger(), where))
        assert self.num_still is not None
        for layer in self.chain[: self.num_still]:
            hidden = layer(hidden)
            hidden = hidden if layer is self.chain[-1] else self.activation(hidden)
        return self.chain[self.num_still].prepare(hidden) if self.num_still < len(self.chain) else (hidden,)

    def _first_layer(self, trigger: Tensor, where: Tensor | None) -> Tensor:
        return self.first(trigger, self.patches, where, None)

    def _trigger(self) -> Tensor:
        """`(B, 1, D)`."""
        if self.trigger is None:
            assert self.trigger_column is not None
            return self.trigger_column[:, None]
        assert self.cells is not None
        return self.trigger(self.cells).mT.flatten(1)[:, None]  # (B, L, T) -> (B, T, L) -> (B, 1, D)

    def __call__(self, where: Tensor | None, prepared: Any, *, everywhere: bool) -> Answers:
        """At `where`, from what `prepare` gave for it; `everywhere`: whether locations have targets of their own."""
        trigger = None
        if self.num_still is None or (everywhere and self.first_colours is not None):
            trigger = self._trigger()  # once a step: a product's gradient is written, not added
        if self.num_still is None:
            assert trigger is not None
            rest, hidden = self.chain, self.activation(self._first_layer(trigger, where))
        elif self.num_still < len(self.chain):
            layer, *rest = self.chain[self.num_still :]
            hidden = layer.finish(prepared)
            hidden = self.activation(hidden) if rest else hidden
        else:
            rest, (hidden,) = [], prepared
        for layer in rest[:-1]:
            hidden = self.activation(layer(hidden))
        if self.pooler is None and not everywhere and rest:  # the mean commutes with the feature head
            return Answers(self._own_space(rest[-1](_mean(hidden)[:, None])[:, 0].float()))
        levels = None
        if self.levels is not None:
            levels = self.levels(hidden).float().unflatten(-1, (self.config.num_levels, -1))  # (B, n, N, C)
        features = (rest[-1](hidden) if rest else hidden).float()
        pooled = _mean(features) if self.pooler is None else self.pooler(features, where)
        rgb = None
        if self.first_colours is not None and trigger is not None:
            rgb = self.first_colours(trigger, self.patches, where, features).relu()
            for layer in self.colours:
                rgb = layer(rgb).relu()
            rgb = rgb.float()
        return Answers(self._own_space(pooled), self._own_space(features), rgb, levels)

    def _own_space(self, features: Tensor) -> Tensor:
        """As `APMFeatureSpace`: what the network answers, in the teacher's own space."""
        return features if self.statistics is None else torch.addcmul(self.statistics[0], features, self.statistics[1])

    def keep(self, kept: Tensor) -> None:
        """Go on with these machines alone, `(B',)` indices; the leaves are new tensors."""
        self.shared.num_machines = len(kept)
        for linear in self.linears():
            linear.shared.num_machines = len(kept)
            linear.keep(kept)
        if self.pooler is not None:
            self.pooler.keep(kept)
        shared_cells = self.patches is self.cells
        self.cells = None if self.cells is None else self.cells[kept]
        self.patches = self.cells if shared_cells else None if self.patches is None else self.patches[kept]
        self.trigger_column = None if self.trigger_column is None else self.trigger_column[kept]

    def release(self) -> None:
        """Free what only learning needs."""
        for linear in self.linears():
            for part in list(linear.grads):
                linear.leaves[part].grad = None
            linear.grads.clear()

    def state_dict(self, start: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """One machine's weights, from those it started from, and its leaves, by the names of `leaves()`."""
        state = {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in start.items()}
        for linear in self.linears():
            prefix = f"{linear.name}[{linear.columns.start}]:"
            linear.write(
                state, {name.removeprefix(prefix): x for name, x in leaves.items() if name.startswith(prefix)}
            )
        for name in state.keys() & leaves.keys():
            state[name].copy_(leaves[name])
        return state


class _StackedPooler:
    """`APMAttentionPooling` of B machines."""

    def __init__(
        self, config: APMConfig, start: dict[str, Tensor], learning: dict[str, str], shared: Shared,
        grid: tuple[int, int],
    ):  # fmt: skip
        self.num_heads, self.shared = config.pooling_num_heads, shared
        self.linears = {
            name: StackedLinear(f"pooler.{name}", start, learning.get(f"pooler.{name}"), shared)
            for name in ("v_proj", "out_proj")
        }
        # The query and what it is compared with have no large product: plain autograd.
        names = ["pooler.query"] + [f"pooler.{m}_proj.{p}" for m in "qk" for p in ("weight", "bias")]
        self.weights = {name: start[name] for name in names}
        self.leaves: dict[str, Tensor] = {}
        if "pooler" in learning:
            self.leaves = {
                name: weight.expand(shared.num_machines, *weight.shape[1:]).clone().requires_grad_()
                for name, weight in self.weights.items()
            }
        self.probe = None if self.leaves else self._probe(self.weights)
        size, device = config.grid_size, start["pooler.query"].device
        self.code = position_code(grid_coordinates(*grid, device=device), size, size, config.feature_size)  # (L, F)

    def _probe(self, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What features are compared with, `(1 or B, heads, F)`, and a shift `(1 or B, heads, 1)`."""
        query, query_weight, query_bias, key_weight, key_bias = weights.values()
        query = (query_weight * query[:, None]).sum(dim=-1) + query_bias  # (B, F, F) -> (B, F)
        query = query.unflatten(1, (self.num_heads, -1)) * (query.shape[1] // self.num_heads) ** -0.5
        keys = key_weight.unflatten(1, (self.num_heads, -1))  # (1 or B, heads, F / heads, F)
        probe = torch.bmm(query.flatten(0, 1)[:, None], keys.flatten(0, 1)).view(*query.shape[:2], -1)
        return probe, (query * key_bias.view_as(query)).sum(-1, keepdim=True)

    def __call__(self, features: Tensor, where: Tensor | None) -> Tensor:
        """`(B, F)` for `(B, n, F)`."""
        inputs = features + (self.code if where is None else self.code[where])
        probe, shift = self.probe if self.probe is not None else self._probe(self.leaves)
        scores = torch.bmm(probe.expand(len(inputs), -1, -1), inputs.mT) + shift  # (B, heads, n)
        pooled = torch.bmm(scores.softmax(dim=-1), inputs)  # (B, heads, F)
        values = self.linears["v_proj"].by_head(pooled).flatten(1)
        return self.linears["out_proj"](values[:, None])[:, 0]

    def keep(self, kept: Tensor) -> None:
        self.leaves = {name: leaf.detach()[kept].requires_grad_() for name, leaf in self.leaves.items()}
        if self.probe is not None and self.shared.own:
            self.probe = self.probe[0][kept], self.probe[1][kept]


def _mean(values: Tensor) -> Tensor:
    """`(B, F)` of `(B, n, F)`, summed in an order that does not depend on B."""
    weights = values.new_full((len(values), 1, values.shape[1]), 1 / values.shape[1])
    return torch.bmm(weights, values)[:, 0]


def _aligned(patches: Tensor) -> Tensor:
    return F.pad(patches, (0, -patches.shape[2] % ALIGNED)).contiguous()
