"""B machines that learn at once: what learns is each machine's own, what stands still is shared and computed once.

The arithmetic is `modeling_apm`'s, written for stacked weights: a Linear of B machines is one batched product, its
gradient is written into a buffer that lives as long as the fit, and layers below the first one that learns are
computed for many steps at a time. Rows of a product do not depend on each other, so a machine's numbers do not depend
on how many stand beside it; products of very few rows take another path in the BLAS libraries and are padded.

Source: arXiv:2410.20535, section 4.

Legend: B machines, one an image, n locations asked, H a layer's width, F feature width, R blocks, (rows, cols) the
grid asked about, the machine's own or its target's. Locations are indices of its cells, row-major: `(n,)`, `(B, n)` or
None for the whole grid.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_apm import APMConfig
from .position_encoding import (
    cell_centres,
    coordinates_to_indices,
    grid_coordinates,
    position_code,
    sample_patches,
    sincos_code,
)
from .ttt_targets import Answers, at

# Elements in 64 bytes, what BLAS libraries align to: patches are padded to a multiple of them.
ALIGNED = 16
# Below so many rows BLAS libraries switch to kernels that sum in another order.
MIN_ROWS = 16

# What learns: module -> "all", "blocks" or "bias". See `TTTConfig.fit`.
FITS = ("all", "last_layers", "low_rank", "heads", "trigger", "output_bias")


def learning_modules(config: APMConfig, fit: str, targets: Collection[str] = ()) -> dict[str, str]:
    """Which modules learn, and how, for one of `FITS`; with `"rgb"` and `"levels"` among the targets, their heads too.

    Raises:
        ValueError: where the machine has nothing of that kind.
    """
    last, head = f"decoder.layers.{len(config.hidden_sizes) - 1}", "decoder.feature_head"
    values = ["pooler.v_proj", "pooler.out_proj"] if config.pooling == "attention" else []
    asked_for = {"decoder.level_head": "all"} if "levels" in targets else {}
    if "rgb" in targets:
        asked_for |= {f"decoder.rgb_head.layers.{index}": "all" for index in range(len(config.rgb_hidden_sizes) + 1)}
    if fit == "trigger":
        if config.trigger_source != "conv":
            raise ValueError("fit='trigger': expected trigger_source='conv', got a machine without a convolution")
        return {"trigger": "all"} | asked_for
    if fit == "output_bias":
        return {values[-1] if values else head: "bias"} | asked_for
    how = "blocks" if fit == "low_rank" else "all"
    if fit == "all":
        learning = [f"decoder.layers.{index}" for index in range(len(config.hidden_sizes))] + [head]
        learning += ["trigger"] if config.trigger_source == "conv" else []
        learning += ["pooler", "pooler.q_proj", "pooler.k_proj", *values] if values else []
    else:
        learning = [head] if fit == "heads" else [last, head]
    return dict.fromkeys(learning, how) | dict.fromkeys(values, "all") | asked_for


class _Product(torch.autograd.Function):
    """`x W^T + b` for B machines. Autograd would allocate gradients as large as the weights at every step."""

    @staticmethod
    def forward(ctx, x, anchor, weight, bias, weight_grad, bias_grad, accumulate, dtype):
        x, weight = x.to(dtype), weight.to(dtype)  # (B, n, i), (B, o, i)
        ctx.save_for_backward(x, weight)
        ctx.weight_grad, ctx.bias_grad, ctx.beta = weight_grad, bias_grad, float(accumulate)
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias[:, None].to(dtype), x, weight.mT)

    @staticmethod
    def backward(ctx, *grads):
        (x, weight), grad, beta = ctx.saved_tensors, grads[0], ctx.beta
        if ctx.weight_grad.dtype == x.dtype:
            torch.baddbmm(ctx.weight_grad, grad.mT, x, beta=beta, out=ctx.weight_grad)
        else:
            product = torch.bmm(grad.mT, x)
            ctx.weight_grad.mul_(beta).add_(product) if beta else ctx.weight_grad.copy_(product)
        if ctx.bias_grad is not None:
            product = grad.sum(dim=1, dtype=torch.float32)
            ctx.bias_grad.mul_(beta).add_(product) if beta else ctx.bias_grad.copy_(product)
        return (torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None, *[None] * 7)


@dataclass
class _Shared:
    """What all Linears of a group of machines have in common."""

    num_machines: int
    anchor: Tensor  # makes autograd visit products whose inputs need no gradient
    accumulate: bool
    dtype: torch.dtype
    rank: int
    alpha: float
    own: bool  # every machine starts from weights of its own


class StackedLinear:
    """One Linear, or some of its input columns, of B machines.

    Args:
        name: of the module.
        start: every weight by name, `(1 or B, ...)`; 1 where all machines start alike.
        columns: of the weight that this part multiplies.
        how: `"all"`: the weights are each machine's own and learn. `"blocks"`: the weights stand still and a product
            of rank R is added, whose first factor is fixed: it sums the inputs in R blocks. `"bias"`: the bias alone
            learns. None: nothing does.
    """

    def __init__(
        self, name: str, start: dict[str, Tensor], how: str | None, shared: _Shared, *, columns: slice = slice(None),
        has_bias: bool = True,
    ):  # fmt: skip
        self.name, self.how, self.shared, self.columns, self.has_bias = name, how, shared, columns, has_bias
        weight, bias = start[f"{name}.weight"], start[f"{name}.bias"] if has_bias else None
        weight = weight.flatten(2)[:, :, columns]  # a convolution is a Linear too
        # Matrices that start off the libraries' alignment are summed in another order: no machine's may.
        self.out_features, (rows, width) = weight.shape[1], weight.shape[1:]
        aligned = 1 if name.startswith("pooler.") else ALIGNED  # heads cut those into equal parts
        weight = F.pad(weight, (0, -width % aligned, 0, -rows % aligned))
        bias = None if bias is None else F.pad(bias, (0, -rows % aligned))
        self.weight, self.bias = weight, bias  # (1 or B, o, i), (1 or B, o)
        self.leaves: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        num_machines = shared.num_machines
        if how == "all":
            self._own("weight", weight)
        else:
            self.weight = weight.to(shared.dtype).contiguous()
        if how == "blocks":
            self.num_blocks = gcd(shared.rank, width)
            # Adam steps of one size in every entry: a block moves the output as much as its columns together would.
            self.leaves["delta"] = weight.new_zeros(num_machines, self.num_blocks, weight.shape[1]).requires_grad_()
        if bias is not None and how == "all":
            self._own("bias", bias)
        elif bias is not None and how is not None:
            self.leaves["bias"] = bias.expand(num_machines, -1).clone().requires_grad_()

    def _own(self, part: str, start: Tensor) -> None:
        leaf = start.expand(self.shared.num_machines, *start.shape[1:]).clone(memory_format=torch.contiguous_format)
        leaf.grad = torch.zeros_like(leaf)
        self.leaves[part], self.grads[part] = leaf, leaf.grad

    def prepare(self, x: Tensor) -> tuple[Tensor, ...]:
        """As much of the product as stands still while the machines learn; `(B, n, ...)` each."""
        padded = F.pad(x, (0, self.weight.shape[2] - x.shape[2]))
        if self.how == "all":
            return (padded,)
        base = self._still(padded)
        if self.how != "blocks":
            return (base,)
        sums = x.float().unflatten(-1, (self.num_blocks, -1)).sum(-1)  # (B, n, i) -> (B, n, R)
        return base, sums * self.shared.alpha

    def finish(self, prepared: tuple[Tensor, ...]) -> Tensor:
        """`(B, n, o)` of what `prepare` left."""
        return self._finish(prepared)[..., : self.out_features]

    def _finish(self, prepared: tuple[Tensor, ...]) -> Tensor:
        if self.how == "all":
            return self._product(prepared[0], self.leaves["weight"], self.leaves.get("bias"), self.grads)
        output = prepared[0]
        if self.how == "blocks":
            sums = prepared[1].expand(self.shared.num_machines, -1, -1)
            output = output + torch.bmm(sums, self.leaves["delta"]).to(output.dtype)
        if "bias" in self.leaves:
            output = output + self.leaves["bias"][:, None].to(output.dtype)
        return output

    def __call__(self, x: Tensor) -> Tensor:
        """`(B, n, o)` for `(1 or B, n, i)`; `(1, n, o)` where neither inputs nor weights differ between machines."""
        return self.finish(self.prepare(x))

    def by_head(self, x: Tensor) -> Tensor:
        """`(B, heads, o / heads)` for `(B, heads, i)`: every head's own rows of the weight."""
        batch_size, num_heads, width = x.shape
        if self.how != "all":
            whole = self(x).unflatten(-1, (num_heads, -1))  # (B, heads, o) -> (B, heads, heads, o / heads)
            return whole.diagonal(dim1=1, dim2=2).mT
        views = {name: leaf.view(batch_size * num_heads, -1, *leaf.shape[2:]) for name, leaf in self.leaves.items()}
        views["bias"] = views["bias"].squeeze(-1)
        grads = {name: grad.view(views[name].shape) for name, grad in self.grads.items()}
        product = self._product(x.reshape(batch_size * num_heads, 1, width), views["weight"], views["bias"], grads)
        return product.view(batch_size, num_heads, -1)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, grads: dict[str, Tensor]) -> Tensor:
        shared = self.shared
        x = x.expand(len(weight), -1, -1)
        return _Product.apply(
            x, shared.anchor, weight, bias, grads["weight"], grads.get("bias"), shared.accumulate, shared.dtype
        )

    def _still(self, x: Tensor) -> Tensor:
        x = x.to(self.shared.dtype)
        bias = self.bias if self.how is None else None  # a bias that learns is added last
        bias = None if bias is None else bias.to(x.dtype)
        if self.shared.own:
            x = x.expand(len(self.weight), -1, -1)
            product = torch.bmm(x, self.weight.mT)
            return product if bias is None else product + bias[:, None]
        batch_size, num_rows = x.shape[:2]
        rows = x.reshape(batch_size * num_rows, -1)
        missing = max(0, MIN_ROWS - len(rows))
        product = F.linear(F.pad(rows, (0, 0, 0, missing)), self.weight[0], None if bias is None else bias[0])
        return product[: len(rows)].view(batch_size, num_rows, -1)

    def keep(self, kept: Tensor) -> None:
        """Go on with these machines alone, `(B',)` indices."""
        if self.shared.own:
            self.weight = self.weight[kept] if self.how != "all" else self.weight
            self.bias = None if self.bias is None else self.bias[kept]
        for part, leaf in self.leaves.items():
            self.leaves[part] = leaf.detach()[kept].requires_grad_(leaf.requires_grad)
            if part in self.grads:
                self.grads[part] = self.leaves[part].grad = torch.zeros_like(self.leaves[part])

    def write(self, state: dict[str, Tensor], leaves: dict[str, Tensor]) -> None:
        """Put one machine's leaves into its state dict, which holds the weights it started from."""
        weight = state[f"{self.name}.weight"]
        weight = weight.flatten(1)[:, self.columns]
        if "weight" in leaves:
            weight.copy_(leaves["weight"][: len(weight), : weight.shape[1]])
        if "delta" in leaves:
            per_column = leaves["delta"].mT.repeat_interleave(weight.shape[1] // self.num_blocks, dim=1)  # (o, i)
            weight.add_(per_column[: len(weight)], alpha=self.shared.alpha)
        if "bias" in leaves:
            bias = state[f"{self.name}.bias"]
            bias.copy_(leaves["bias"][: len(bias)])


class StackedQueryLinear:
    """`APMQueryLinear` of B machines: a Linear over [features ; trigger ; local patch ; position] in parts."""

    def __init__(
        self, name: str, start: dict[str, Tensor], how: str | None, shared: _Shared, config: APMConfig, *,
        grid: tuple[int, int], feature_size: int = 0,
    ):  # fmt: skip
        half = config.position_size // 2
        widths = {
            "features": feature_size, "trigger": config.trigger_width, "patch": config.local_patch_width,
            "column": half, "row": half,
        }  # fmt: skip
        self.parts, first = {}, 0
        for part, width in widths.items():
            if width:
                columns = slice(first, first + width)
                has_bias = part == "trigger"
                self.parts[part] = StackedLinear(name, start, how, shared, columns=columns, has_bias=has_bias)
            first += width
        device, size = start[f"{name}.weight"].device, config.grid_size
        self.num_cols = grid[1]
        # By row and by column, (1, rows, P / 2) and (1, cols, P / 2), as the model computes it for coordinates: a
        # coordinate's index is an integer but for rounding, which Adam makes whole steps of where the code is 0.
        self.codes_asked = tuple(sincos_code(_indices(number, size, device), half)[None] for number in grid)
        # As the model computes it for its whole grid.
        self.codes = self.codes_asked
        if grid == (size, size):
            self.codes = (sincos_code(torch.arange(size, device=device), half)[None],) * 2

    def __call__(
        self, trigger: Tensor, patches: Tensor | None, where: Tensor | None, features: Tensor | None
    ) -> Tensor:
        """`(B, n, H)` for triggers `(1 or B, 1, D)`, patches `(B, L, Q)` of the grid and features `(B, n, F)`."""
        hidden = self.parts["trigger"](trigger) + self._positions(where)
        if patches is not None:
            hidden = hidden + self.parts["patch"](at(patches, where))
        return hidden if features is None else hidden + self.parts["features"](features)

    def _positions(self, where: Tensor | None) -> Tensor:
        row, column = self.parts["row"], self.parts["column"]
        if where is None:  # rows + cols products serve all locations
            return (row(self.codes[0])[:, :, None] + column(self.codes[1])[:, None]).flatten(1, 2)
        rows, columns = (where if where.ndim == 2 else where[None]) // self.num_cols, where % self.num_cols
        columns = columns if columns.ndim == 2 else columns[None]
        code_of_row, code_of_column = self.codes_asked
        if row.how is None and not row.shared.own:
            return row(code_of_row)[0][rows] + column(code_of_column)[0][columns]
        return row(code_of_row[0][rows]) + column(code_of_column[0][columns])


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
        shared = _Shared(num_machines, anchor, accumulate, dtype, rank, alpha, own)
        self.shared, self.activation = shared, ACT2FN[config.hidden_act]

        def linear(name: str, shared: _Shared = shared) -> StackedLinear:
            return StackedLinear(name, start, learning.get(name), shared)

        def query_linear(name: str, feature_size: int = 0) -> StackedQueryLinear:
            how = learning.get(name)
            return StackedQueryLinear(name, start, how, shared, config, grid=grid, feature_size=feature_size)

        self.first = query_linear("decoder.layers.0")
        self.chain = [linear(f"decoder.layers.{index}") for index in range(1, len(config.hidden_sizes))]
        self.chain.append(linear("decoder.feature_head"))
        # The trigger's convolution and the pooling are small, and pooling is where rounding would hurt.
        precise = _Shared(num_machines, anchor, accumulate, torch.float32, rank, alpha, own)
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
        self, config: APMConfig, start: dict[str, Tensor], learning: dict[str, str], shared: _Shared,
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


def _indices(number: int, size: int, device: torch.device) -> Tensor:
    """`(number,)`, where the centres of so many cells lie on an axis of `size` cells."""
    centres = cell_centres(number, device=device)[:, None].expand(-1, 2)
    return coordinates_to_indices(centres, size, size)[:, 0]
