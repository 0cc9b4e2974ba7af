"""The Asynchronous Perception Machine: fold an image into one column, unfold it anywhere, answer location by location.

    pixel_values (B, C, S, S) -- fold --> trigger column (B, D)
    (trigger column, location)  -- one shared MLP --> feature (B, L, F), colour (B, L, 3)

Source: Modi & Rawat, NeurIPS 2024, arXiv:2410.20535, Fig. 1. Queries never see each other, so any subset may be asked,
in any order. The first Linear acts on [trigger ; local patch ; position] and is computed in parts: the trigger's once
per image, the position's once per row and once per column, the patch's as a convolution. No concatenation is built.

Legend: B images, L locations, D trigger width, Q local-patch width, P position width, H a layer's width, F feature
width, K classes, (rows, cols) the grid; locations are row-major; coordinates are (y, x) in [-1, 1] at the places of
`torch.nn.functional.grid_sample(align_corners=False)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_apm import APMConfig
from .position_encoding import grid_coordinates, position_code, sample_patches, sincos_code

# Without gradients, locations are answered in chunks whose widest activation stays below this many elements.
CHUNK_ELEMENTS = 2**24


@dataclass
class APMModelOutput(ModelOutput):
    """What an APM answers.

    Args:
        last_hidden_state: `(B, L, F)`, the feature of every location asked for.
        pooler_output: `(B, F)`, pooled over these locations.
        rgb: `(B, L, 3)`, colours >= 0, or None without RGB head.
        trigger_column: `(B, D)`.
        hidden_states: one `(B, L, hidden_sizes[i])` per layer of the MLP, when asked for.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    rgb: Tensor | None = None
    trigger_column: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


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

    def locations(self) -> Tensor:
        """`(1 or B, L, 2)`, the coordinates asked for."""
        if self.coordinates is not None:
            return self.coordinates
        device = self.trigger_column.device
        return grid_coordinates(self.grid_size, self.grid_size, device=device)[None, self.start : self.stop]


class APMQueryLinear(nn.Linear):
    """A Linear over [features ; trigger ; local patch ; position] that is computed in parts.

    `weight` is `(H, F' + D + Q + P)` as if the input had been concatenated, so checkpoints stay plain; F' is 0 in the
    MLP and the feature width in the RGB head, whose input is [feature ; query].
    """

    def __init__(self, config: APMConfig, out_features: int, *, feature_size: int = 0):
        super().__init__(feature_size + config.query_width, out_features)
        self.patch_size, self.num_channels = config.patch_size, config.num_channels
        self.position_size = config.position_size
        self.widths = [feature_size, config.trigger_width, config.local_patch_width, config.position_size]

    def forward(self, query: APMQuery, features: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """`(B, L, H)`, for `features` `(B, L, F')`."""
        from_features, from_trigger, from_patch, from_position = self.weight.split(self.widths, dim=1)
        hidden = F.linear(query.trigger_column, from_trigger, self.bias)[:, None]  # (B, D) -> (B, 1, H)
        hidden = hidden + self.positions(query, from_position)  # (1 or B, L, H) -> (B, L, H)
        if query.pixel_values is not None:
            hidden = hidden + self.patches(query, query.pixel_values, from_patch)
        if features is not None:
            hidden = hidden + F.linear(features, from_features)
        return hidden

    def positions(self, query: APMQuery, weight: Tensor) -> Tensor:
        """`(1 or B, L, H)`: on the grid the code is separable: rows + cols products serve all locations."""
        size = query.grid_size
        if query.coordinates is not None:
            return F.linear(position_code(query.coordinates, size, size, self.position_size).to(weight.dtype), weight)
        first, last = query.start // size, (query.stop - 1) // size + 1
        from_column, from_row = weight.split(self.position_size // 2, dim=1)
        code = sincos_code(torch.arange(size, device=weight.device), self.position_size // 2).to(weight.dtype)
        by_row, by_column = F.linear(code[first:last], from_row), F.linear(code, from_column)
        hidden = (by_row[:, None] + by_column[None]).flatten(0, 1)  # (rows, 1, H) + (1, cols, H) -> (rows * cols, H)
        return hidden[None, query.start - first * size : query.stop - first * size]

    def patches(self, query: APMQuery, pixel_values: Tensor, weight: Tensor) -> Tensor:
        """`(B, L, H)`: the product with the patch around each location; on the grid it is a convolution."""
        size, stride = query.grid_size, self.patch_size
        if query.coordinates is not None:
            return F.linear(sample_patches(pixel_values, query.coordinates, self.patch_size), weight)
        first, last = query.start // size, (query.stop - 1) // size + 1
        kernel = weight.unflatten(1, (self.num_channels, stride, stride))  # (H, Q) -> (H, C, patch, patch)
        hidden = F.conv2d(pixel_values[:, :, first * stride : last * stride], kernel, stride=stride)
        hidden = hidden.flatten(2).transpose(1, 2)  # (B, H, rows, cols) -> (B, rows * cols, H)
        return hidden[:, query.start - first * size : query.stop - first * size]


class APMDecoder(nn.Module):
    """The shared MLP and its heads. One call answers one chunk of locations, so checkpointing it bounds memory."""

    gradient_checkpointing = False  # set by transformers' `gradient_checkpointing_enable`

    def __init__(self, config: APMConfig):
        super().__init__()
        widths = config.hidden_sizes
        self.layers = nn.ModuleList([APMQueryLinear(config, widths[0])])
        self.layers.extend(nn.Linear(width, next_width) for width, next_width in zip(widths, widths[1:], strict=False))
        self.activation = ACT2FN[config.hidden_act]
        self.feature_head = nn.Linear(widths[-1], config.feature_size)
        self.rgb_head = APMRGBHead(config) if config.use_rgb_head else None

    def hidden(self, query: APMQuery) -> list[Tensor]:
        """One `(B, L, hidden_sizes[i])` per layer."""
        states = [self.activation(self.layers[0](query))]
        for layer in self.layers[1:]:
            states.append(self.activation(layer(states[-1])))
        return states

    def forward(self, query: APMQuery, output_hidden_states: bool) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        hidden_states = self.hidden(query)
        features = self.feature_head(hidden_states[-1])
        rgb = self.rgb_head(features, query) if self.rgb_head is not None else None
        return features, rgb, hidden_states if output_hidden_states else []


class APMRGBHead(nn.Module):
    """[feature ; query] -> colour >= 0."""

    def __init__(self, config: APMConfig):
        super().__init__()
        widths = [*config.rgb_hidden_sizes, 3]
        self.layers = nn.ModuleList([APMQueryLinear(config, widths[0], feature_size=config.feature_size)])
        self.layers.extend(nn.Linear(width, next_width) for width, next_width in zip(widths, widths[1:], strict=False))

    def forward(self, features: Tensor, query: APMQuery) -> Tensor:
        """`(B, L, 3)` for features `(B, L, F)`."""
        rgb = self.layers[0](query, features).relu()
        for layer in self.layers[1:]:
            rgb = layer(rgb).relu()
        return rgb


class APMAttentionPooling(nn.Module):
    """A learned query attends to feature + position code; the design of the release's test-time-training model.

    With one query, the key and value projections move out of the sum over locations: scores are x . (W_k^T q) and the
    values' projection acts on the weighted mean of x. Equal to multi-head attention, at L * F * heads instead of
    2 * L * F * F products.
    """

    def __init__(self, config: APMConfig):
        super().__init__()
        self.num_heads = config.pooling_num_heads
        self.grid_size = config.grid_size
        self.query = nn.Parameter(torch.empty(config.feature_size))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.feature_size, config.feature_size) for _ in range(4)
        )

    def forward(self, features: Tensor, coordinates: Tensor) -> Tensor:
        """`(B, F)` for features `(B, L, F)` at coordinates `(1 or B, L, 2)`."""
        width = features.shape[-1]
        code = position_code(coordinates, self.grid_size, self.grid_size, width)
        inputs = features + code.to(features.dtype)  # (B, L, F)
        heads = (self.num_heads, width // self.num_heads)
        query = self.q_proj(self.query).unflatten(0, heads) * heads[1] ** -0.5  # (heads, F / heads)
        probe = torch.einsum("hd,hdf->hf", query, self.k_proj.weight.unflatten(0, heads))
        shift = (query * self.k_proj.bias.unflatten(0, heads)).sum(-1)  # the same for all locations: keeps k's bias
        scores = F.linear(inputs, probe, shift).transpose(1, 2)  # (B, L, F) -> (B, heads, L)
        weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(inputs.dtype)
        pooled = weights @ inputs  # (B, heads, F)
        values = torch.einsum("bhf,hdf->bhd", pooled, self.v_proj.weight.unflatten(0, heads)).flatten(1)
        return self.out_proj(values + self.v_proj.bias)


class APMPreTrainedModel(PreTrainedModel):
    config_class = APMConfig
    base_model_prefix = "apm"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["APMDecoder"]
    # The choice of attention is the text tower's, where a head has one.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: APMConfig, *args, **kwargs):
        config.validate_architecture()  # fields may have been set since the configuration was made
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, APMAttentionPooling):
            init.normal_(module.query, mean=0.0, std=self.config.initializer_range)


class APMModel(APMPreTrainedModel):
    """The bare machine: `fold` an image into its trigger column, `query` any locations of it.

    Source: arXiv:2410.20535, Fig. 1.

    Example:

    ```python
    >>> import torch
    >>> from apm_hf import APMConfig, APMModel

    >>> model = APMModel(APMConfig.preset("tiny")).eval()
    >>> trigger_column = model.fold(torch.rand(1, 3, 96, 96))
    >>> corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])  # (y, x)
    >>> model.query(trigger_column, corners).last_hidden_state.shape
    torch.Size([1, 2, 144])
    ```"""

    def __init__(self, config: APMConfig):
        super().__init__(config)
        if config.trigger_source == "conv":
            self.trigger = nn.Conv2d(
                config.num_channels, config.trigger_channels, config.patch_size, stride=config.patch_size
            )
        self.decoder = APMDecoder(config)
        self.pooler = APMAttentionPooling(config) if config.pooling == "attention" else None
        self.post_init()

    def fold(self, pixel_values: Tensor) -> Tensor:
        """Fold images into their trigger columns.

        Args:
            pixel_values: `(B, C, S, S)`, S = `config.image_size`.

        Returns:
            `(B, D)`: the convolution's channels, each flattened row-major.

        Raises:
            ValueError: for another shape, or where the trigger column comes from the caller.
        """
        if self.config.trigger_source != "conv":
            raise ValueError("fold: trigger_source='embedding' has nothing to fold; pass trigger_column instead")
        self._check_pixels(pixel_values)
        return self.trigger(pixel_values.to(self.trigger.weight.dtype)).flatten(1)  # (B, T, rows, cols) -> (B, D)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        coordinates: Tensor | None = None,
        *,
        trigger_column: Tensor | None = None,
        chunk_size: int | None = None,
        output_hidden_states: bool | None = None,
    ) -> APMModelOutput:
        """Fold, then query.

        Args:
            pixel_values: `(B, C, S, S)`; not needed where `trigger_column` is given and `config.local_patch` is off.
            coordinates: `(L, 2)` or `(B, L, 2)`, (y, x) in [-1, 1], any real values; None asks for the full grid.
            trigger_column: `(B, D)`, instead of folding; required with `trigger_source="embedding"`.
            chunk_size: locations answered at a time; the answers do not depend on it. None chooses: all at once where
                gradients are needed, else as many as keep the activations below `CHUNK_ELEMENTS`.
            output_hidden_states: also return the MLP's layers.

        Returns:
            [`APMModelOutput`].

        Raises:
            ValueError: for shapes that do not fit the configuration.
        """
        query = self._unfold(trigger_column, coordinates, pixel_values)
        features, rgb, hidden_states = self._answer(query, chunk_size, output_hidden_states)
        return APMModelOutput(
            last_hidden_state=features,
            pooler_output=self._pool(features, query),
            rgb=rgb,
            trigger_column=query.trigger_column,
            hidden_states=hidden_states,
        )

    def query(
        self,
        trigger_column: Tensor,
        coordinates: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        chunk_size: int | None = None,
        output_hidden_states: bool | None = None,
    ) -> APMModelOutput:
        """Ask about locations of images that are already folded; arguments and answer as in `forward`.

        `pixel_values` are needed only where `config.local_patch` is on.
        """
        return self(
            pixel_values,
            coordinates,
            trigger_column=trigger_column,
            chunk_size=chunk_size,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )

    def pooled_features(
        self,
        pixel_values: Tensor | None = None,
        coordinates: Tensor | None = None,
        *,
        trigger_column: Tensor | None = None,
    ) -> Tensor:
        """`forward(...).pooler_output`, `(B, F)`, and nothing else: cheaper, since neither colours nor, with mean
        pooling, the locations' own features are computed (the mean commutes with the feature head)."""
        query = self._unfold(trigger_column, coordinates, pixel_values)
        hidden = self.decoder.hidden(query)[-1]
        if self.pooler is None:
            return self.decoder.feature_head(hidden.mean(dim=1))
        return self._pool(self.decoder.feature_head(hidden), query)

    def _unfold(
        self, trigger_column: Tensor | None, coordinates: Tensor | None, pixel_values: Tensor | None
    ) -> APMQuery:
        dtype = self.decoder.feature_head.weight.dtype  # inputs may stay float32 beside bfloat16 weights
        pixel_values = None if pixel_values is None else pixel_values.to(dtype)
        trigger_column = None if trigger_column is None else trigger_column.to(dtype)
        if trigger_column is None:
            if pixel_values is None or self.config.trigger_source == "embedding":
                needed = "pixel_values or trigger_column" if self.config.trigger_source == "conv" else "trigger_column"
                raise ValueError(
                    f"forward: expected {needed}, got none (trigger_source={self.config.trigger_source!r})"
                )
            trigger_column = self.fold(pixel_values)
        batch_size, width = len(trigger_column), self.config.trigger_width
        if trigger_column.shape != (batch_size, width):
            raise ValueError(f"trigger_column: expected shape (B, {width}), got {tuple(trigger_column.shape)}")
        if self.config.local_patch:
            if pixel_values is None:
                raise ValueError("pixel_values: expected the images, since local_patch=True puts them into the query")
            self._check_pixels(pixel_values)
            if len(pixel_values) != batch_size:
                raise ValueError(f"pixel_values: expected {batch_size} images, one a column, got {len(pixel_values)}")
        if coordinates is not None:
            coordinates = self._check_coordinates(coordinates, batch_size)
        return APMQuery(
            trigger_column=trigger_column,
            grid_size=self.config.grid_size,
            pixel_values=pixel_values if self.config.local_patch else None,
            coordinates=coordinates,
            stop=self.config.num_locations,
        )

    def _answer(
        self, query: APMQuery, chunk_size: int | None, output_hidden_states: bool | None
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        chunk_size = self._chunk_size(query, chunk_size)
        decode: Callable = self.decoder
        if self.training and self.decoder.gradient_checkpointing:
            # Always the non-reentrant kind: the other loses the gradients of weights where no input has one.
            decode = partial(checkpoint, self.decoder, use_reentrant=False)
        chunks = [
            decode(query.chunk(start, min(start + chunk_size, query.num_locations)), output_hidden_states)
            for start in range(0, query.num_locations, chunk_size)
        ]
        if len(chunks) == 1:
            features, rgb, hidden_states = chunks[0]
        else:
            features = torch.cat([chunk[0] for chunk in chunks], dim=1)
            rgb = torch.cat([chunk[1] for chunk in chunks], dim=1) if self.config.use_rgb_head else None
            hidden_states = [torch.cat(states, dim=1) for states in zip(*(chunk[2] for chunk in chunks), strict=True)]
        return features, rgb, tuple(hidden_states) if output_hidden_states else None

    def _chunk_size(self, query: APMQuery, chunk_size: int | None) -> int:
        if chunk_size is not None:
            if chunk_size < 1:
                raise ValueError(f"chunk_size: expected a positive number of locations, got {chunk_size}")
            return chunk_size
        if torch.is_grad_enabled():
            return query.num_locations
        widest = max(*self.config.hidden_sizes, self.config.feature_size, self.config.local_patch_width)
        return max(1, CHUNK_ELEMENTS // (max(1, len(query.trigger_column)) * widest))

    def _pool(self, features: Tensor, query: APMQuery) -> Tensor:
        return features.mean(dim=1) if self.pooler is None else self.pooler(features, query.locations())

    def _check_pixels(self, pixel_values: Tensor) -> None:
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values: expected shape (B, {', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}"
            )

    def _check_coordinates(self, coordinates: Tensor, batch_size: int) -> Tensor:
        shape = tuple(coordinates.shape)
        if (
            len(shape) not in (2, 3)
            or shape[-1] != 2
            or shape[-2] == 0
            or (len(shape) == 3 and shape[0] != batch_size)
        ):
            raise ValueError(
                f"coordinates: expected shape (L, 2) or ({batch_size}, L, 2), (y, x), with L >= 1, got {shape}"
            )
        # Positions are worked out in float32 whatever the weights' dtype: see `sample_patches`.
        coordinates = coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))
        return coordinates if coordinates.ndim == 3 else coordinates[None]  # (L, 2) -> (1, L, 2)


__all__ = ["APMModel", "APMModelOutput", "APMPreTrainedModel"]
