"""The query and the shared MLP that answers it, chunk by chunk.

The first Linear acts on [trigger ; local patch ; position] and is computed in parts: the trigger's once per image, the
position's once per row and once per column (kept while the weights stand still), the patch's as a convolution. No
concatenation is built, no trigger copied.

Source: arXiv:2410.20535, section 3 and Fig. 1.

Legend: B images, L locations, D trigger width, Q local-patch width, P position width, H a layer's width, F feature
width, N levels, (rows, cols) the grid; locations are row-major; coordinates are (y, x) in [-1, 1].
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_apm import APMConfig
from .modeling_apm_linear import FEW, APMLinear, are_plain, linear
from .modeling_apm_pooling import APMAttentionPooling
from .position_encoding import grid_coordinates, position_code, sample_patches, sincos_code


@dataclass
class APMQuery:
    """Trigger columns paired with locations, not yet written out (the unfolding of arXiv:2410.20535, Fig. 1).

    Args:
        trigger_column: `(B, D)`.
        grid_size: rows and columns of the grid.
        pixel_values: `(B, C, S, S)`, where the query holds the local patch.
        coordinates: `(1 or B, L, 2)`, or None for the cells `start` to `stop` of the grid, row-major.
    """

    trigger_column: Tensor
    grid_size: int
    pixel_values: Tensor | None = None
    coordinates: Tensor | None = None
    start: int = 0
    stop: int = 0
    codes: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_locations(self) -> int:
        return self.stop - self.start if self.coordinates is None else self.coordinates.shape[1]

    def chunk(self, start: int, stop: int) -> "APMQuery":
        """The same query for its locations `start` to `stop`."""
        if self.coordinates is None:
            start, stop, coordinates = self.start + start, self.start + stop, None
        else:
            coordinates = self.coordinates[:, start:stop]
        return APMQuery(self.trigger_column, self.grid_size, self.pixel_values, coordinates, start, stop)

    @property
    def num_rows(self) -> int:
        return len(self.trigger_column) * self.num_locations

    def locations(self) -> Tensor:
        """`(1 or B, L, 2)`, the coordinates asked for."""
        if self.coordinates is not None:
            return self.coordinates
        device = self.trigger_column.device
        return grid_coordinates(self.grid_size, self.grid_size, device=device)[None, self.start : self.stop]

    def position_code(self, width: int) -> Tensor:
        """`(1 or B, L, P)`, in the dtype of the trigger column, for P = `width`; worked out once for all that ask."""
        if width not in self.codes:
            code = position_code(self.locations(), self.grid_size, self.grid_size, width)
            self.codes[width] = code.to(self.trigger_column.dtype)
        return self.codes[width]


@dataclass(frozen=True)
class GridProducts:
    """What the position adds on the grid, and the weight that it was worked out from.

    Args:
        weight: it lies where the layer's own weight lay; being held, its place in memory cannot go to another one.
        version: of its contents.
        num_steps: that optimisers had taken in this process: fused ones do not count what they change as a version.
        by_row, by_column: `(grid_size, H)`.
    """

    weight: Tensor
    version: int
    num_steps: int
    by_row: Tensor
    by_column: Tensor

    def are_of(self, weight: Tensor, grid_size: int) -> bool:
        """Whether `weight` is the same, unchanged."""
        return (
            self.weight.data_ptr() == weight.data_ptr()
            and (self.version, self.num_steps) == (weight._version, _OptimizerSteps.number)
            and (self.weight.shape, self.weight.dtype) == (weight.shape, weight.dtype)
            and len(self.by_row) == grid_size
        )


class _OptimizerSteps:
    """How many steps all optimisers of this process have taken since they began to be counted."""

    number, are_counted = 0, False

    @classmethod
    def begin(cls) -> None:
        if not cls.are_counted:
            cls.are_counted = True
            register_optimizer_step_post_hook(cls._count)

    @classmethod
    def _count(cls, *_: Any) -> None:
        cls.number += 1


class APMQueryLinear(nn.Linear):
    """A Linear over [features ; trigger ; local patch ; position] that is computed in parts.

    `weight` is `(H, F' + D + Q + P)` as if the input had been concatenated, so checkpoints stay plain; F' is 0 in the
    MLP and the feature width in the RGB head, whose input is [feature ; query].
    """

    def __init__(self, config: APMConfig, out_features: int, *, feature_size: int = 0):
        super().__init__(feature_size + config.query_width, out_features)
        self.patch_size, self.num_channels = config.patch_size, config.num_channels
        self.scales = config.local_patch_scales
        self.position_size = config.position_size
        self.widths = [feature_size, config.trigger_width, config.local_patch_width, config.position_size]
        self._kept: GridProducts | None = None

    def forward(self, query: APMQuery, features: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """`(B, L, H)`, for `features` `(B, L, F')`."""
        if query.coordinates is not None and are_plain(self.weight) and query.num_rows <= FEW:
            return linear(self._written_out(query, features), self.weight, self.bias)
        from_features, from_trigger, from_patch, from_position = self.weight.split(self.widths, dim=1)
        hidden = linear(query.trigger_column, from_trigger, self.bias)  # (B, D) -> (B, H)
        if query.coordinates is None:
            hidden = self._add_grid(hidden, query)
        else:
            code = query.position_code(self.position_size)  # (1 or B, L, P)
            hidden = hidden[:, None] + linear(code, from_position)  # (B, 1, H) + (1 or B, L, H) -> (B, L, H)
        if query.pixel_values is not None:
            hidden = hidden + self.patches(query, query.pixel_values, from_patch)
        if features is not None:
            hidden = hidden + linear(features, from_features)
        return hidden

    def _written_out(self, query: APMQuery, features: Tensor | None) -> Tensor:
        """`(B, L, F' + D + Q + P)`: one product of few rows reads the weight once, as it lies, its parts do not."""
        parts = [query.trigger_column[:, None], query.position_code(self.position_size)]  # (B, 1, D), (1 or B, L, P)
        if query.pixel_values is not None:
            where = query.pixel_values, query.locations(), self.patch_size
            parts[1:1] = [sample_patches(*where, scale) for scale in self.scales]
        if features is not None:
            parts.insert(0, features)
        shape = len(query.trigger_column), query.num_locations, -1
        return torch.cat([part.expand(shape) for part in parts], dim=-1)

    def _add_grid(self, hidden: Tensor, query: APMQuery) -> Tensor:
        """`(B, H)` -> `(B, L, H)`: the code is separable, so that rows + cols products serve all cells."""
        size = query.grid_size
        first, last = query.start // size, (query.stop - 1) // size + 1
        by_row, by_column = self.grid_products(size)
        rows = hidden[:, None] + by_row[first:last]  # (B, 1, H) + (rows, H) -> (B, rows, H)
        cells = (rows[:, :, None] + by_column).flatten(1, 2)  # (B, rows, 1, H) + (cols, H) -> (B, rows * cols, H)
        return cells[:, query.start - first * size : query.stop - first * size]

    def grid_products(self, size: int) -> tuple[Tensor, Tensor]:
        """`(rows, H)` and `(cols, H)`, what the position adds in every row and column of the grid.

        No image matters to them: in evaluation mode, where no gradients flow, they are kept while the weight stands
        still. Whatever PyTorch counts as a change is seen at once, and so are optimisers' steps; `train()`, `eval()`
        and a call with gradients forget. Only what is written past all of these, through `weight.data`, needs one of
        these calls.
        """
        weight, kept = self.weight, self._kept
        if self.training or not are_plain(weight) or weight.is_meta or weight.is_inference() or _is_captured(weight):
            if not torch.compiler.is_compiling():  # what is traced changes nothing
                self._kept = None
            return self._grid_products(size)
        if kept is None or not kept.are_of(weight, size):
            _OptimizerSteps.begin()
            versions = weight._version, _OptimizerSteps.number
            kept = self._kept = GridProducts(weight.detach(), *versions, *self._grid_products(size))
        return kept.by_row, kept.by_column

    def _grid_products(self, size: int) -> tuple[Tensor, Tensor]:
        from_column, from_row = self.weight[:, -self.position_size :].chunk(2, dim=1)
        code = sincos_code(torch.arange(size, device=self.weight.device), self.position_size // 2)
        code = code.to(self.weight.dtype)
        return linear(code, from_row), linear(code, from_column)

    def train(self, mode: bool = True) -> "APMQueryLinear":
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without what is kept."""
        return {**self.__dict__, "_kept": None}

    def patches(self, query: APMQuery, pixel_values: Tensor, weight: Tensor) -> Tensor:
        """`(B, L, H)`: the product with the patch around each location, summed over the scales."""
        weights = weight.chunk(len(self.scales), dim=1)
        parts = [self._patch(query, pixel_values, *pair) for pair in zip(weights, self.scales, strict=True)]
        return sum(parts[1:], start=parts[0])

    def _patch(self, query: APMQuery, pixel_values: Tensor, weight: Tensor, scale: int) -> Tensor:
        """On the grid it is a convolution, of the averaged image, where the windows begin at whole pixels of it."""
        size, patch = query.grid_size, self.patch_size
        if query.coordinates is not None or (scale > 1 and patch % (2 * scale)):
            return F.linear(sample_patches(pixel_values, query.locations(), patch, scale), weight)
        first, last = query.start // size, (query.stop - 1) // size + 1
        stride = patch // scale
        margin = (patch - stride) // 2  # of the window around its cell
        averaged = F.avg_pool2d(pixel_values, scale) if scale > 1 else pixel_values
        averaged = F.pad(averaged, (margin,) * 4) if margin else averaged
        kernel = weight.unflatten(1, (self.num_channels, patch, patch))  # (H, Q) -> (H, C, patch, patch)
        hidden = F.conv2d(averaged[:, :, first * stride : (last - 1) * stride + patch], kernel, stride=stride)
        hidden = hidden.flatten(2).transpose(1, 2)  # (B, H, rows, cols) -> (B, rows * cols, H)
        return hidden[:, query.start - first * size : query.stop - first * size]


class APMFeatureSpace(nn.Module):
    """From the standardised space in which a head answers to its teacher's own: answer * std + mean, per channel.

    The numbers are the configuration's; files of weights do not hold them.
    """

    mean: Tensor  # (F,)
    std: Tensor  # (F,)

    def __init__(self, mean: list[float], std: list[float] | float):
        super().__init__()
        self.statistics = (mean, std)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(len(mean)), persistent=False)

    @classmethod
    def of(cls, mean: Any, std: Any) -> "APMFeatureSpace | None":
        """For the statistics of a head; None where it has none: it then answers in its teacher's space."""
        return None if mean is None else cls(mean, std)

    def fill(self) -> None:
        """Write the numbers into the buffers, which loading leaves undefined."""
        for name, values in zip(("mean", "std"), self.statistics, strict=True):
            init.copy_(getattr(self, name), torch.tensor(values))  # one deviation serves all channels

    def forward(self, features: Tensor) -> Tensor:
        """`(..., F)` for `(..., F)`."""
        return torch.addcmul(self.mean, features, self.std)


class APMTeacherHead(nn.Module):
    """What is a further teacher's own: a Linear on the last layer of the MLP, pooling, statistics."""

    def __init__(self, config: APMConfig, name: str):
        super().__init__()
        fields = config.teacher_head(name)
        width = fields["feature_size"]
        self.projection = APMLinear(config.hidden_sizes[-1], width)
        self.pooler = APMAttentionPooling(config, width) if fields["pooling"] == "attention" else None
        self.space = APMFeatureSpace.of(fields["feature_mean"], fields["feature_std"])


class APMDecoder(nn.Module):
    """The shared MLP and its heads, which answer in standardised spaces where there are statistics.

    One call answers one chunk of locations, so checkpointing it bounds memory.
    """

    gradient_checkpointing = False  # set by transformers' `gradient_checkpointing_enable`

    def __init__(self, config: APMConfig):
        super().__init__()
        widths = config.hidden_sizes
        self.layers = nn.ModuleList([APMQueryLinear(config, widths[0])])
        self.layers.extend(APMLinear(width, next_width) for width, next_width in zip(widths, widths[1:], strict=False))
        self.activation = ACT2FN[config.hidden_act]
        self.feature_head = APMLinear(widths[-1], config.feature_size)
        self.num_levels = config.num_levels
        self.level_head = APMLinear(widths[-1], config.num_levels * config.level_width) if config.num_levels else None
        self.rgb_head = APMRGBHead(config) if config.use_rgb_head else None
        self.teacher_heads = nn.ModuleDict({name: APMTeacherHead(config, name) for name in config.teacher_heads or ()})

    def teacher_head(self, name: str) -> APMTeacherHead:
        head = self.teacher_heads[name]
        assert isinstance(head, APMTeacherHead)
        return head

    def hidden(self, query: APMQuery, kept: list[Tensor] | None = None) -> Tensor:
        """`(B, L, hidden_sizes[-1])`; the layers' answers, this one included, are added to `kept`."""
        first, *others = self.layers
        hidden = self.activation(first(query))
        for layer in others:
            if kept is not None:
                kept.append(hidden)
            hidden = self.activation(layer(hidden))
        if kept is not None:
            kept.append(hidden)
        return hidden

    def forward(self, query: APMQuery, output_hidden_states: bool, heads: tuple[str, ...] = ()) -> dict[str, Tensor]:
        """Fields of [`APMModelOutput`], each layer of the MLP as `hidden_states.i`, further heads by `features_of`."""
        kept: list[Tensor] = []
        hidden = self.hidden(query, kept if output_hidden_states else None)
        answers = {"last_hidden_state": self.feature_head(hidden)}
        if self.rgb_head is not None:
            answers["rgb"] = self.rgb_head(answers["last_hidden_state"], query)
        if self.level_head is not None:
            answers["levels"] = self.level_head(hidden).unflatten(-1, (self.num_levels, -1))  # (B, L, N, level_size)
        for name in heads:
            answers[features_of(name)] = self.teacher_head(name).projection(hidden)
        return answers | {f"hidden_states.{index}": states for index, states in enumerate(kept)}


def _is_captured(weight: Tensor) -> bool:
    """By a CUDA graph, whose memory is not for others to keep."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def features_of(head: str) -> str:
    """The name of a further head's answers."""
    return f"teacher_features.{head}"


class APMAnswers:
    """Answers of chunks, put together; without gradients they are written where they end up: nothing is held twice."""

    def __init__(self, num_locations: int):
        self.num_locations, self.num_answered = num_locations, 0
        self.parts: dict[str, list[Tensor]] = {}
        self.whole: dict[str, Tensor] = {}

    def add(self, answer: dict[str, Tensor]) -> None:
        """Of the next locations, `(B, L, ...)` by name."""
        first, count = self.num_answered, next(iter(answer.values())).shape[1]
        self.num_answered += count
        if count == self.num_locations:
            self.whole = answer
        elif torch.is_grad_enabled():
            for name, part in answer.items():
                self.parts.setdefault(name, []).append(part)
        else:
            for name, part in answer.items():
                if name not in self.whole:
                    self.whole[name] = part.new_empty(len(part), self.num_locations, *part.shape[2:])
                self.whole[name][:, first : self.num_answered] = part

    def result(self) -> dict[str, Tensor]:
        """The whole, `(B, L, ...)` by name."""
        return self.whole | {name: torch.cat(parts, dim=1) for name, parts in self.parts.items()}


class APMRGBHead(nn.Module):
    """[feature ; query] -> colour >= 0; the feature is standardised where there are statistics."""

    def __init__(self, config: APMConfig):
        super().__init__()
        widths = [*config.rgb_hidden_sizes, 3]
        self.layers = nn.ModuleList([APMQueryLinear(config, widths[0], feature_size=config.feature_size)])
        self.layers.extend(APMLinear(width, next_width) for width, next_width in zip(widths, widths[1:], strict=False))

    def forward(self, features: Tensor, query: APMQuery) -> Tensor:
        """`(B, L, 3)` for features `(B, L, F)`."""
        first, *others = self.layers
        rgb = first(query, features).relu()
        for layer in others:
            rgb = layer(rgb).relu()
        return rgb
