"""The Asynchronous Perception Machine: fold an image into one column, unfold it anywhere, answer location by location.

    pixel_values (B, C, S, S) -- fold --> trigger column (B, D)
    (trigger column, location)  -- one shared MLP --> feature (B, L, F), colour (B, L, 3)

Source: Modi & Rawat, NeurIPS 2024, arXiv:2410.20535, Fig. 1. Queries never see each other, so any subset may be asked,
in any order.

Legend: B images, L locations, D trigger width, F feature width, N levels, (rows, cols) the grid; locations are
row-major; coordinates are (y, x) in [-1, 1] at the places of `torch.nn.functional.grid_sample(align_corners=False)`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_apm import APMConfig
from .modeling_apm_decoder import APMDecoder, APMQuery
from .modeling_apm_pooling import APMAttentionPooling, APMMeanPooling, AttentionSoFar

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
        levels: `(B, L, N, level_size)`, the column of levels of every location, low to high, where the model has any.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    rgb: Tensor | None = None
    trigger_column: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    levels: Tensor | None = None


class _Answers:
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
        return self._answer(query, self._chunk_size(query, chunk_size), output_hidden_states)

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
        pooling, head = self._pooling(), self.decoder.feature_head
        for chunk in self._chunks(query, self._chunk_size(query, None)):
            hidden = self.decoder.hidden(chunk)
            pooling.add(hidden if self.pooler is None else head(hidden), chunk.locations())
        return head(pooling.result(head.weight.dtype)) if self.pooler is None else pooling.result(head.weight.dtype)

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

    def _answer(self, query: APMQuery, chunk_size: int, output_hidden_states: bool | None) -> APMModelOutput:
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        decode: Callable = self.decoder
        if self.training and self.decoder.gradient_checkpointing:
            # Always the non-reentrant kind: the other loses the gradients of weights where no input has one.
            decode = partial(checkpoint, self.decoder, use_reentrant=False)
        pooling, answers = self._pooling(), _Answers(query.num_locations)
        for chunk in self._chunks(query, chunk_size):
            answer = decode(chunk, output_hidden_states)
            pooling.add(answer["last_hidden_state"], chunk.locations())
            answers.add(answer)
        whole = answers.result()
        states = tuple(whole.pop(name) for name in list(whole) if name.startswith("hidden_states."))
        return APMModelOutput(
            **whole,
            pooler_output=pooling.result(whole["last_hidden_state"].dtype),
            trigger_column=query.trigger_column,
            hidden_states=states if output_hidden_states else None,
        )

    @staticmethod
    def _chunks(query: APMQuery, chunk_size: int) -> Iterator[APMQuery]:
        for start in range(0, query.num_locations, chunk_size):
            yield query.chunk(start, min(start + chunk_size, query.num_locations))

    def _pooling(self) -> "APMMeanPooling | AttentionSoFar":
        return APMMeanPooling() if self.pooler is None else self.pooler.begin()

    def _chunk_size(self, query: APMQuery, chunk_size: int | None) -> int:
        if chunk_size is not None:
            if chunk_size < 1:
                raise ValueError(f"chunk_size: expected a positive number of locations, got {chunk_size}")
            return chunk_size
        if torch.is_grad_enabled():
            return query.num_locations
        widest = max(*self.config.hidden_sizes, self.config.feature_size, self.config.local_patch_width)
        return max(1, CHUNK_ELEMENTS // (max(1, len(query.trigger_column)) * widest))

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
