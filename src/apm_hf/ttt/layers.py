"""Linear layers of B machines at once: what learns is each machine's own, what stands still is shared.

A Linear of B machines is one batched product, and its gradient is written into a buffer that lives as long as the fit.
Rows of a product do not depend on each other, so a machine's numbers do not depend on how many stand beside it;
products of very few rows take another path in the BLAS libraries and are padded.

Legend: B machines, n locations asked, H a layer's width, F feature width, R blocks, (rows, cols) the grid asked about.
"""

from collections.abc import Collection
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

from ..configuration_apm import APMConfig
from ..position_encoding import (
    cell_centres,
    coordinates_to_indices,
    sincos_code,
)
from .targets import at

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
class Shared:
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
        self, name: str, start: dict[str, Tensor], how: str | None, shared: Shared, *, columns: slice = slice(None),
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
        self, name: str, start: dict[str, Tensor], how: str | None, shared: Shared, config: APMConfig, *,
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


def _indices(number: int, size: int, device: torch.device) -> Tensor:
    """`(number,)`, where the centres of so many cells lie on an axis of `size` cells."""
    centres = cell_centres(number, device=device)[:, None].expand(-1, 2)
    return coordinates_to_indices(centres, size, size)[:, 0]
