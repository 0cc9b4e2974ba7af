"""Run B models of one architecture at once: layers that learn hold weights for every image, all others are shared.

The arithmetic is that of `modeling_apm`: [`StackedModels`] copies the model's modules, replaces the layers in them,
and runs the model's forward code.

Legend: B images, n locations, H a layer's width, F feature width, L locations of the grid, R blocks.
"""

import copy
from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling_apm import APMAttentionPooling, APMModel
from ..position_encoding import axis_codes, grid_coordinates, grid_patches, local_patches, sample_grid
from .settings import DTYPES, TTTConfig

Weights = dict[str, Tensor]  # by name, as in a state dict


def learning_layers(model: APMModel, config: TTTConfig, targets: Sequence[str] = ()) -> dict[str, str]:
    """Return the layers that learn, by name, and what learns: `"all"` of it, a `"low_rank"` update or the `"bias"`.

    Args:
        targets: names of the fields of [`TTTTargets`] that are given; colours and levels need their heads.

    Raises:
        ValueError: if the model has no such layers.
    """
    num_layers, num_blocks = len(model.decoder.layers), len(model.decoder.blocks)
    last = f"decoder.layers.{num_layers - 1}" if num_layers else "decoder.query"
    last = f"decoder.blocks.{num_blocks - 1}" if num_blocks else last
    head, values = "decoder.feature_head", ["pooler.v_proj", "pooler.out_proj"]
    if config.fit == "trigger" and model.config.trigger_source != "conv":
        raise ValueError("fit='trigger': expected trigger_source='conv', got a model without a convolution")
    fold = ["trigger"] if model.config.trigger_source == "conv" else []  # that into local columns stays as it is
    attends = isinstance(model.pooler, APMAttentionPooling)
    chosen = {
        "all": dict.fromkeys([*fold, "decoder.query", "decoder.layers", "decoder.blocks", head, "pooler"], "all"),
        "last_layers": dict.fromkeys([last, head, *values], "all"),
        "low_rank": dict.fromkeys([last, head, *values], "low_rank"),
        "heads": dict.fromkeys([head, *values], "all"),
        "trigger": {"trigger": "all"},
        "output_bias": {values[-1] if attends else head: "bias"},
    }[config.fit]
    chosen |= {"decoder.rgb_head": "all"} if "rgb" in targets else {}
    chosen |= {"decoder.level_head": "all"} if "levels" in targets else {}
    return {
        name: how
        for name, layer in model.named_modules()
        for parent, how in chosen.items()
        if (name == parent or name.startswith(f"{parent}."))
        and isinstance(layer, (nn.Linear, nn.Conv2d, APMAttentionPooling))
    }


def draw_weights(model: APMModel, seed: int) -> Weights:
    """Draw every weight from a normal distribution, as for a new model, with biases at zero."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a seed gives the same values on every device
    drawn = {}
    for name, weight in model.named_parameters():
        values = torch.zeros(weight.shape, dtype=torch.float32)
        if not name.endswith(".bias"):
            values.normal_(0.0, model.config.initializer_range, generator=generator)
        drawn[name] = values.to(model.device)
    return drawn


def redraw(model: PreTrainedModel, seed: int) -> APMModel:
    """Return a float32 copy of the bare model with the weights that `TTTConfig(start="random", seed=seed)` draws.

    Drawing takes longer than a fast fit: to fit many times, draw once and fit this model with `start="model"`.
    """
    apm: Any = copy.deepcopy(getattr(model, "apm", model)).float()
    apm.load_state_dict(draw_weights(apm, seed))
    return apm


# --- layers of B models ---


class StackedLinear(nn.Module):
    """Apply a Linear with weights for each of B images, stored transposed, so that their gradients are contiguous.

    Args:
        weight, bias: initial values, `(1 or B, out, in)` and `(1 or B, out)` or None.
        num_models: B.
        dtype: dtype of the product.
        learns: `"all"`, `"bias"` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, num_models: int, dtype: torch.dtype, learns: str | None):
        super().__init__()
        self.dtype = dtype
        copies = len(weight) if learns == "bias" else num_models
        self.weight = _parameter(weight.mT, copies, learns == "all")  # (1 or B, in, out)
        self.bias = None if bias is None else _parameter(bias, num_models, learns is not None)  # (B, out)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute `(B, ..., out)` for `(1 or B, ..., in)`."""
        num_models = len(self.weight if self.bias is None else self.bias)
        weight = self.weight.to(self.dtype).expand(num_models, -1, -1)
        rows = inputs.to(self.dtype).reshape(len(inputs), -1, inputs.shape[-1]).expand(num_models, -1, -1)
        if self.bias is None:
            outputs = torch.bmm(rows, weight)
        else:
            outputs = torch.baddbmm(self.bias[:, None].to(self.dtype), rows, weight)
        return outputs.reshape(num_models, *inputs.shape[1:-1], -1)  # (B, n, out) -> (B, ..., out)

    def weights(self, index: int) -> Weights:
        """Return one image's weights, as `nn.Linear` stores them."""
        weight = self.weight.detach()[min(index, len(self.weight) - 1)].mT.contiguous()
        return {"weight": weight} | ({} if self.bias is None else {"bias": self.bias.detach()[index]})


class StackedFold(nn.Module):
    """Apply the folding convolution with weights for each of B images, on patches extracted beforehand."""

    def __init__(self, weight: Tensor, bias: Tensor, num_models: int, learns: bool):
        super().__init__()
        self.kernel_shape = weight.shape[1:]
        self.weight = _parameter(weight.flatten(2), num_models, learns)  # (B, channels, Q)
        self.bias = _parameter(bias[..., None], num_models, learns)  # (B, channels, 1)

    def forward(self, patches: Tensor) -> Tensor:
        """Return trigger columns `(B, D)` for the grid's patches `(B, Q, L)`."""
        return torch.baddbmm(self.bias, self.weight, patches).flatten(1)  # (B, channels, L) -> (B, D)

    def weights(self, index: int) -> Weights:
        """Return one image's weights, as `nn.Conv2d` stores them."""
        return {"weight": self.weight.detach()[index].view(self.kernel_shape), "bias": self.bias.detach()[index, :, 0]}


class LowRankLinear(nn.Module):
    """Apply a frozen Linear plus a learnt update, (inputs summed in R blocks) @ delta, for each of B images.

    Adam takes steps of equal size in every entry, so their effect on outputs depends on the inputs. The sums are
    scaled once, so that a step changes the outputs by learning rate * alpha * their size. The bias learns a tenth as
    fast: it matters only where all inputs are zero.

    Args:
        linear: the frozen layer.
        shape: (B, R, out), of delta.
        alpha: see `TTTConfig`.
        size: `(B, 1, 1)`, the size of the target outputs, if known.
    """

    def __init__(self, linear: nn.Module, shape: tuple[int, int, int], alpha: float, size: Tensor | None):
        super().__init__()
        num_models, self.num_blocks, width = shape
        device = next(linear.parameters()).device
        self.linear, self.alpha, self.size = linear, alpha, size
        self.has_bias = linear.bias is not None
        zeros = torch.zeros(num_models, self.num_blocks + self.has_bias, width, dtype=torch.float32, device=device)
        self.delta = nn.Parameter(zeros)
        # Scales of the sums and of the constant input of the bias, once they are measured.
        self.scales = nn.Parameter(zeros.new_zeros(num_models, 1, 2), requires_grad=False)
        self.measured = False

    def prepare(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what is constant while the models learn: outputs `(1 or B, ..., out)` and sums `(B, n, R + 1)`."""
        outputs = self.linear(inputs)
        blocks = inputs.float().reshape(len(inputs), -1, self.num_blocks, inputs.shape[-1] // self.num_blocks)
        sums = blocks.sum(dim=-1)  # (1 or B, n, R)
        if not self.measured:
            self._measure(outputs.detach().float().flatten(1), sums.detach())
        sums = sums * self.scales[..., :1]
        if self.has_bias:
            sums = torch.cat([sums, self.scales[..., 1:].expand(-1, sums.shape[1], -1)], dim=-1)
        return outputs, sums

    def _measure(self, outputs: Tensor, sums: Tensor) -> None:
        size = outputs.square().mean(dim=1)[:, None, None]
        size = (size if self.size is None else size + self.size.square()).sqrt()
        step = sums.abs().sum(dim=2, keepdim=True).mean(dim=1, keepdim=True)  # change of outputs if delta changes by 1
        scales = [size / step.clamp_min(torch.finfo(step.dtype).tiny), 0.1 * size]
        self.scales.copy_(self.alpha * torch.cat(torch.broadcast_tensors(*scales), dim=-1))
        self.measured, self.size = True, None

    def finish(self, outputs: Tensor, sums: Tensor) -> Tensor:
        """Return the layer's outputs `(B, ..., out)` for the results of `prepare`."""
        update = torch.bmm(sums.to(outputs.dtype), self.delta.to(outputs.dtype))  # (B, n, out)
        return outputs + update.reshape(len(update), *outputs.shape[1:])

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute `(B, ..., out)` for `(1 or B, ..., in)`."""
        return self.finish(*self.prepare(inputs))

    def weights(self, index: int) -> Weights:
        """Return one image's update of the frozen weights."""
        delta, (scale, constant) = self.delta[index].mT, self.scales[index, 0]  # (out, R + 1)
        weight: Any = self.linear.weight
        in_features = weight.shape[-1 if isinstance(self.linear, nn.Linear) else 1]
        update = scale * delta[:, : self.num_blocks].repeat_interleave(in_features // self.num_blocks, dim=1)
        return {"weight": update} | ({"bias": constant * delta[:, -1]} if self.has_bias else {})


class FrozenLayers(nn.Module):
    """Compute the frozen first layers of a decoder, in place of its query layer.

    They are computed for the locations of many steps at once: products of few rows are bound by reading weights.
    The frozen part of a low-rank layer after them is computed with them.
    """

    def __init__(self, query: nn.Module, layers: Sequence[nn.Module], activation: nn.Module):
        super().__init__()
        self.layers, self.activation = nn.ModuleList([query, *layers]), activation
        self.prepared: tuple[Tensor, ...] = ()
        self.now = slice(None)

    @torch.no_grad()
    def prepare(self, *inputs: Any) -> None:
        """Compute the layers for the inputs of [`APMQuery`], up to the activation of the last one."""
        for layer in self.layers[:-1]:
            inputs = (self.activation(layer(*inputs)),)
        last = self.layers[-1]
        self.prepared = last.prepare(*inputs) if isinstance(last, LowRankLinear) else (last(*inputs),)

    def forward(self, *inputs: Any) -> Tensor:
        """Return `(B, n, H)` at the prepared locations `now`."""
        parts, last = [part[:, self.now] for part in self.prepared], self.layers[-1]
        return last.finish(*parts) if isinstance(last, LowRankLinear) else parts[0]


def _parameter(start: Tensor, num_models: int, learns: bool) -> nn.Parameter:
    """Repeat `(1 or B, ...)` for every image."""
    values = start.expand(num_models, *start.shape[1:]).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(values, requires_grad=learns)


# --- B models ---


class StackedModels(nn.Module):
    """Run B models of one architecture, one for each of B images.

    Args:
        model: the architecture; not changed.
        start: every weight by name, float32, `(1 or B, ...)`.
        learning: see `learning_layers`.
        config: settings of the fit.
        pixel_values: `(B, C, S, S)`, if the model reads them.
        trigger_column: `(B, D)`, instead of folding; None where the model folds into local columns.
        grid: (rows, cols) of the locations, of the model's grid or any other.
        outputs: outputs of the decoder: `"features"` and, if they have targets, `"rgb"` and `"levels"`.
        target_size: `(B, 1, 1)`, size of the target features, for low-rank layers.
    """

    def __init__(
        self,
        model: APMModel,
        start: Weights,
        learning: dict[str, str],
        config: TTTConfig,
        pixel_values: Tensor | None,
        trigger_column: Tensor | None,
        grid: tuple[int, int],
        outputs: Sequence[str],
        target_size: Tensor | None = None,
    ):
        super().__init__()
        self.target_size = target_size
        self.start, self.outputs, self.dtype = start, outputs, DTYPES[config.dtype]
        self.num_models = len(next(x for x in (trigger_column, pixel_values) if x is not None))
        # Parameters are not copied, since they are replaced.
        self.model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()
        self.model.feature_space.float()
        decoder = self.model.decoder
        decoder.teacher_heads = nn.ModuleDict()
        decoder.rgb_head = decoder.rgb_head if "rgb" in outputs else None
        decoder.level_head = decoder.level_head if "levels" in outputs else None
        self.learning: dict[str, Any] = {}  # layers that learn, by their names in the model
        for name, layer in list(self.model.named_modules()):
            if name.startswith("trigger."):
                continue  # local columns are folded once
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm | APMAttentionPooling):
                self._replace(name, layer, learning.get(name), config)
        if not decoder.blocks:
            self._freeze_first_layers(learning)

        self.size, self.num_cols = model.config.grid_size, grid[1]
        self.axes = [_cell_indices(count, self.size, model.device) for count in grid]  # (rows,), (cols,)
        self.cells = self.patches = self.tokens = None
        if model.config.trigger_source == "columns":
            with torch.no_grad():
                assert pixel_values is not None
                columns = model.fold(pixel_values).float()
            trigger_column = columns.mean(dim=(1, 2))
            self.tokens = sample_grid(columns, grid_coordinates(*grid, device=model.device)[None]).to(self.dtype)
        elif trigger_column is None and pixel_values is not None:
            self.cells = grid_patches(pixel_values, model.config.patch_size).mT.contiguous()  # (B, Q, L)
        if model.config.local_patch and pixel_values is not None:
            is_model_grid = grid == (model.config.grid_size, model.config.grid_size)
            where = None if is_model_grid else grid_coordinates(*grid, device=model.device)[None]
            patches = local_patches(pixel_values, model.config.patch_size, model.config.local_patch_scales, where)
            self.patches = patches.to(self.dtype)  # (B, rows * cols, Q)
        self.trigger_column = trigger_column
        if trigger_column is None and "trigger" not in learning:
            with torch.no_grad():
                self.trigger_column, self.cells = self.model.trigger(self.cells), None
        self.places: list[Tensor | None] = []

    def _replace(self, name: str, layer: nn.Module, how: str | None, config: TTTConfig) -> None:
        """Replace a layer by its stacked or frozen counterpart."""
        if isinstance(layer, nn.LayerNorm):
            for part in ("weight", "bias"):
                setattr(layer, part, nn.Parameter(self.start[f"{name}.{part}"][0].to(self.dtype), requires_grad=False))
            return
        # The fold and the pooling are small, and pooling is sensitive to rounding.
        dtype = torch.float32 if name.startswith(("trigger", "pooler")) else self.dtype
        if isinstance(layer, APMAttentionPooling):
            query = self.start[f"{name}.query"][:, 0]  # (1 or B, 1, F)
            layer.query = _parameter(query, self.num_models if how else len(query), how is not None)
            return
        weight, bias = self.start[f"{name}.weight"], self.start.get(f"{name}.bias")
        new: nn.Module
        if isinstance(layer, nn.Conv2d):
            assert bias is not None
            new = StackedFold(weight, bias, self.num_models, how is not None)
        elif how == "low_rank":
            shape = (self.num_models, gcd(config.rank, weight.shape[2]), weight.shape[1])
            size = self.target_size if name in ("decoder.feature_head", "pooler.out_proj") else None
            new = LowRankLinear(self._frozen(weight, bias, dtype), shape, config.alpha, size)
        elif how is not None:
            new = StackedLinear(weight, bias, self.num_models, dtype, how)
        else:
            new = self._frozen(weight, bias, dtype)
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, new)
        if how is not None:
            self.learning[name] = new

    def _frozen(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        if len(weight) > 1:
            return StackedLinear(weight, bias, self.num_models, dtype, None)
        layer = nn.Linear(weight.shape[2], weight.shape[1], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight[0].to(dtype), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias[0].to(dtype), requires_grad=False)
        return layer

    def _freeze_first_layers(self, learning: dict[str, str]) -> None:
        decoder = self.model.decoder
        if "trigger" in learning or "decoder.query.trigger" in learning:
            return
        layers = list(decoder.layers)
        count = next((i for i in range(len(layers)) if f"decoder.layers.{i}" in learning), len(layers))
        count += count < len(layers) and isinstance(layers[count], LowRankLinear)
        decoder.query = FrozenLayers(decoder.query, layers[:count], decoder.activation)
        decoder.layers = nn.ModuleList(layers[count:])

    def prepare(self, places: list[Tensor | None]) -> None:
        """Compute the first layers, if they are frozen, for the next steps' locations.

        Args:
            places: for each step, cells `(n,)` or `(B, n)`, or None for the complete grid.
        """
        self.places, decoder = places, self.model.decoder
        if isinstance(decoder.query, FrozenLayers):
            where = None if places[0] is None else torch.cat([place for place in places if place is not None], dim=-1)
            rows, columns, patches, tokens = self._locations(where)
            half = decoder.position_size // 2
            codes = [code.to(self.dtype) for code in axis_codes(half, rows, columns)]
            decoder.query.prepare(self._trigger(), *codes, patches, tokens)

    def forward(self, step: int) -> dict[str, Tensor]:
        """Return `"pooled"`, `(B, F)`, and the decoder's outputs, `(B, n, ...)`, at the prepared locations.

        Args:
            step: index into the `places` of `prepare`.
        """
        where, decoder = self.places[step], self.model.decoder
        if where is not None and isinstance(decoder.query, FrozenLayers):
            decoder.query.now = slice(step * where.shape[-1], (step + 1) * where.shape[-1])
        rows, columns, patches, tokens = self._locations(where)
        outputs = decoder(self._trigger(), rows, columns, patches, self.outputs, tokens)
        decoded = {name: output.float() for name, output in zip(self.outputs, outputs, strict=True)}
        features, pooler, space = decoded["features"], self.model.pooler, self.model.feature_space
        pooled, _ = pooler(features, rows, columns)
        return decoded | {"features": space(features), "pooled": space(pooled)}

    def _trigger(self) -> Tensor:
        column = self.model.trigger(self.cells) if self.trigger_column is None else self.trigger_column
        return column.to(self.dtype)

    def _locations(self, where: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the decoder's inputs: cell indices of rows and columns, patches, and local columns."""
        if where is None:
            return self.axes[0][None, :, None], self.axes[1][None, None], self.patches, self.tokens
        cells = where if where.ndim == 2 else where[None]
        rows, columns = self.axes[0][cells // self.num_cols], self.axes[1][cells % self.num_cols]
        patches, tokens = (None if values is None else at(values, where) for values in (self.patches, self.tokens))
        return rows[..., None], columns[..., None], patches, tokens

    def learnt(self) -> list[nn.Parameter]:
        """Return the parameters that learn, each `(B, ...)`."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def take(self, images: Tensor) -> "StackedModels":
        """Return the models of some of the images, `(B',)` indices."""
        tensors: list[Tensor | None] = [
            *self.start.values(),
            self.cells,
            self.patches,
            self.tokens,
            self.trigger_column,
        ]
        tensors += [self.target_size]
        tensors += [place for place in self.places if place is not None and place.ndim == 2]
        for module in self.modules():
            if isinstance(module, StackedLinear | StackedFold | LowRankLinear | APMAttentionPooling):
                tensors += module.parameters(recurse=False)
            elif isinstance(module, FrozenLayers):
                tensors += module.prepared
        copies: dict[int, Any] = {id(parameter): parameter for parameter in self.parameters()}
        for x in tensors:
            if x is not None and len(x) == self.num_models > 1:  # else it is shared
                chosen = x.detach()[images]
                copies[id(x)] = nn.Parameter(chosen, x.requires_grad) if isinstance(x, nn.Parameter) else chosen
            elif x is not None:
                copies[id(x)] = x
        taken = copy.deepcopy(self, copies)
        taken.num_models = len(images)
        return taken

    def release(self) -> None:
        """Free tensors that only learning needs."""
        self.zero_grad()
        self.cells = self.patches = self.tokens = self.trigger_column = None
        self.places = []
        self.model.decoder.query = None

    @torch.no_grad()
    def weights(self, index: int) -> Weights:
        """Return copies of the weights of one image, for [`APMModel.load_state_dict`]."""
        state = {name: weight[min(index, len(weight) - 1)].clone() for name, weight in self.start.items()}
        if (query := "pooler.query") in state:
            state[query] = self.model.pooler.query[min(index, len(self.model.pooler.query) - 1)][None].clone()
        for name, layer in self.learning.items():
            for part, value in layer.weights(index).items():
                added = isinstance(layer, LowRankLinear)
                state[f"{name}.{part}"] = state[f"{name}.{part}"] + value if added else value.clone()
        return state


def _cell_indices(count: int, size: int, device: torch.device) -> Tensor:
    """Return the positions of `count` cell centres on an axis of `size` cells: `(count,)`, 0 is the first centre."""
    return (2 * torch.arange(count, dtype=torch.float32, device=device) + 1) * size / (2 * count) - 0.5


def at(values: Tensor, where: Tensor | None) -> Tensor:
    """Select locations: `(B, L, ...)` -> `(B, n, ...)`."""
    if where is None or where.ndim == 1:
        return values if where is None else values[:, where]
    return values[torch.arange(len(values), device=values.device)[:, None], where]
