"""The Asynchronous Perception Machine: fold an image into one column, unfold it anywhere, answer location by location.

    pixel_values (B, C, S, S) -- fold --> trigger column (B, D)
    (trigger column, location)  -- one shared MLP --> feature (B, L, F), colour (B, L, 3)

Source: Modi & Rawat, NeurIPS 2024, arXiv:2410.20535, Fig. 1. Queries never see each other, so any subset may be asked,
in any order.

Legend: B images, L locations, D trigger width, F feature width, N levels, (rows, cols) the grid; locations are
row-major; coordinates are (y, x) in [-1, 1] at the places of `torch.nn.functional.grid_sample(align_corners=False)`.
"""

import copy
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_apm import APMConfig
from .modeling_apm_decoder import APMAnswers, APMDecoder, APMFeatureSpace, APMQuery, features_of
from .modeling_apm_pooling import APMAttentionPooling, APMMeanPooling, AttentionSoFar, begin_pooling

# Without gradients, locations are answered in chunks whose widest activation stays below this many elements. On the
# CPU it should also stay in the cache (8 MiB in float32), unless the chunk were less than a row of the grid.
CHUNK_ELEMENTS, CACHED_ELEMENTS = 2**24, 2**21
FAR = 1e30  # of coordinates


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
        teacher_features: `(B, L, F_i)` by name, of the further teachers' heads that were asked for.
        teacher_embeds: `(B, F_i)` by name, each pooled over these locations.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    rgb: Tensor | None = None
    trigger_column: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    levels: Tensor | None = None
    teacher_features: dict[str, Tensor] | None = None
    teacher_embeds: dict[str, Tensor] | None = None


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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers, but weights are read from safetensors alone unless `use_safetensors=False`.

        Raises:
            ValueError: for keyword arguments that nobody knows, a configuration that is none of APM's, and weights
                that do not have its shapes.
            OSError: for files that are missing or broken; names them.
        """
        kwargs.setdefault("use_safetensors", True)
        name = pretrained_model_name_or_path
        try:
            return super().from_pretrained(name, *model_args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"{_broken_file(name)}: expected a whole safetensors file, got: {error}") from error
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in kwargs:
                raise
            raise ValueError(f"{cls.__name__}: neither a field nor an option is called {unknown[1]!r}") from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"{name}: expected weights of the shapes that its configuration describes, got others; they are "
                "listed in the log above"
            ) from error

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers.

        Raises:
            OSError: where the weights cannot be written, as on a full disk.
        """
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"cannot write the weights to {str(save_directory)!r}: {error}") from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, APMAttentionPooling):
            init.normal_(module.query, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, APMFeatureSpace):
            module.fill()


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
        self.feature_space = APMFeatureSpace.of(config.feature_mean, config.feature_std)
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
        heads: Sequence[str] | None = None,
    ) -> APMModelOutput:
        """Fold, then query.

        Args:
            pixel_values: `(B, C, S, S)`; not needed where `trigger_column` is given and `config.local_patch` is off.
            coordinates: `(L, 2)` or `(B, L, 2)`, (y, x) in [-1, 1], any real values; None asks for the full grid.
                NaN is refused, but not looked for on an accelerator where gradients are wanted.
            trigger_column: `(B, D)`, instead of folding; required with `trigger_source="embedding"`.
            chunk_size: locations answered at a time; the answers do not depend on it. None chooses: all at once where
                gradients are needed, else as many as keep the activations below `CHUNK_ELEMENTS`.
            output_hidden_states: also return the MLP's layers.
            heads: names of `config.teacher_heads` that are to answer beside the main one; None asks all of them.

        Returns:
            [`APMModelOutput`].

        Raises:
            ValueError: for shapes that do not fit the configuration.
        """
        known = self.decoder.teacher_heads
        if unknown := [name for name in heads or () if name not in known]:
            raise ValueError(f"heads: expected names among {list(known)}, got {unknown}")
        query = self._unfold(trigger_column, coordinates, pixel_values)
        size = self._chunk_size(query, chunk_size)
        return self._answer(query, size, output_hidden_states, tuple(known if heads is None else heads))

    def query(
        self,
        trigger_column: Tensor,
        coordinates: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        chunk_size: int | None = None,
        output_hidden_states: bool | None = None,
        heads: Sequence[str] | None = None,
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
            heads=heads,
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
        pooling, head = begin_pooling(self.pooler), self.decoder.feature_head
        space = self.feature_space or _as_they_are
        for chunk in self._chunks(query, self._chunk_size(query, None)):
            hidden = self.decoder.hidden(chunk)
            pooling.add(hidden if self.pooler is None else head(hidden), _coordinates(chunk, pooling))
        pooled = pooling.result(head.weight.dtype)
        return space(head(pooled) if self.pooler is None else pooled)

    @torch.no_grad()
    def set_feature_statistics(
        self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float] | float, *, head: str | None = None
    ) -> None:
        """Put a teacher's statistics into the configuration and between the network and its answers.

        The weights stay: the network now answers in the standardised space, so set them before it is trained.

        Args:
            mean: `(F,)`.
            std: `(F,)`, or one number for all channels.
            head: a name of `config.teacher_heads`; None is the main head.

        Raises:
            ValueError: for an unknown head, and for numbers that are not F, not finite, or no deviations.
        """
        statistics = self.config.set_feature_statistics(mean, std, head=head)
        space = APMFeatureSpace(*statistics.values()).to(device=self.device, dtype=self.dtype)
        space.fill()
        if head:
            self.decoder.teacher_head(head).space = space
        else:
            self.feature_space = space

    def with_head(self, name: str) -> "APMModel":
        """An ordinary APM whose main, and only, head is the one of the teacher `name`; weights are copied.

        Everything that takes an APM takes it: test-time training, zero-shot classification, islands. It decodes no
        colours, since the RGB head reads the features of the main head.

        Raises:
            ValueError: for an unknown name.
        """
        config, model = self.config.with_head(name), copy.deepcopy(self)
        head = model.decoder.teacher_head(name)
        model.config, model.decoder.feature_head = config, head.projection
        model.pooler, model.feature_space = head.pooler, head.space
        model.decoder.rgb_head, model.decoder.teacher_heads = None, nn.ModuleDict()
        return model

    def _unfold(
        self, trigger_column: Tensor | None, coordinates: Tensor | None, pixel_values: Tensor | None
    ) -> APMQuery:
        for name, given in (("pixel_values", pixel_values), ("trigger_column", trigger_column)):
            if given is not None and not isinstance(given, Tensor):
                raise ValueError(f"{name}: expected a tensor, got {type(given).__name__}")
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
        self, query: APMQuery, chunk_size: int, output_hidden_states: bool | None, heads: tuple[str, ...]
    ) -> APMModelOutput:
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        decode: Callable = self.decoder
        if self.training and self.decoder.gradient_checkpointing:
            # Always the non-reentrant kind: the other loses the gradients of weights where no input has one.
            decode = partial(checkpoint, self.decoder, use_reentrant=False)
        # What heads answer is pooled as it is, then all of it is mapped to their teachers' spaces.
        parts: dict[str, tuple] = {
            "last_hidden_state": (begin_pooling(self.pooler), self.feature_space or _as_they_are)
        }
        for name in heads:
            head = self.decoder.teacher_head(name)
            parts[features_of(name)] = begin_pooling(head.pooler), head.space or _as_they_are
        answers, dtype = APMAnswers(query.num_locations), torch.float32
        for chunk in self._chunks(query, chunk_size):
            answer = decode(chunk, output_hidden_states, heads)
            dtype = answer["last_hidden_state"].dtype
            for name, (pooling, space) in parts.items():
                pooling.add(answer[name], _coordinates(chunk, pooling))
                answer[name] = space(answer[name])
            answers.add(answer)
        whole = answers.result()
        states = tuple(whole.pop(name) for name in list(whole) if name.startswith("hidden_states."))
        pooled = {name: space(pooling.result(dtype)) for name, (pooling, space) in parts.items()}
        features = {name: whole.pop(features_of(name)) for name in heads}
        return APMModelOutput(
            **whole,
            pooler_output=pooled["last_hidden_state"],
            trigger_column=query.trigger_column,
            hidden_states=states if output_hidden_states else None,
            teacher_features=features or None,
            teacher_embeds={name: pooled[features_of(name)] for name in heads} or None,
        )

    @staticmethod
    def _chunks(query: APMQuery, chunk_size: int) -> Iterator[APMQuery]:
        for start in range(0, query.num_locations, chunk_size):
            yield query.chunk(start, min(start + chunk_size, query.num_locations))

    def _chunk_size(self, query: APMQuery, chunk_size: int | None) -> int:
        if chunk_size is not None:
            if chunk_size < 1:
                raise ValueError(f"chunk_size: expected a positive number of locations, got {chunk_size}")
            return chunk_size
        if torch.is_grad_enabled():
            return query.num_locations
        further = [head["feature_size"] for head in (self.config.teacher_heads or {}).values()]
        widest = max(*self.config.hidden_sizes, self.config.feature_size, self.config.local_patch_width, *further)
        elements = max(1, len(query.trigger_column)) * widest  # of one location
        size = CHUNK_ELEMENTS // elements
        if query.trigger_column.device.type == "cpu":
            size = min(size, max(CACHED_ELEMENTS // elements, query.grid_size))
        return max(1, size)

    def _check_pixels(self, pixel_values: Tensor) -> None:
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values: expected shape (B, {', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}"
            )

    def _check_coordinates(self, coordinates: Tensor, batch_size: int) -> Tensor:
        if not isinstance(coordinates, Tensor):
            raise ValueError(f"coordinates: expected a tensor, got {type(coordinates).__name__}")
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
        if not torch.compiler.is_compiling() and _can_be_looked_at(coordinates) and not coordinates.isfinite().all():
            raise ValueError("coordinates: expected finite numbers, (y, x), got NaN or infinite ones")
        # Positions are worked out in float32 whatever the weights' dtype: see `sample_patches`. Beyond the bound, they
        # would overflow on their way; nothing can be told apart so far out.
        coordinates = coordinates.to(torch.promote_types(coordinates.dtype, torch.float32)).clamp(-FAR, FAR)
        return coordinates if coordinates.ndim == 3 else coordinates[None]  # (L, 2) -> (1, L, 2)


def _can_be_looked_at(coordinates: Tensor) -> bool:
    """Not under vmap; and where gradients are wanted on an accelerator, it would have to wait at every step."""
    mapped = torch._C._functorch.is_functorch_wrapped_tensor(coordinates)
    return not mapped and (coordinates.device.type == "cpu" or not torch.is_grad_enabled())


def _broken_file(name: str | os.PathLike) -> str:
    """Which of a folder's files of weights cannot be read; the model's own name where none of them is to blame."""
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return str(name)


def _coordinates(query: APMQuery, pooling: APMMeanPooling | AttentionSoFar) -> Tensor | None:
    return query.locations() if pooling.needs_coordinates else None


def _as_they_are(features: Tensor) -> Tensor:
    return features


__all__ = ["APMModel", "APMModelOutput", "APMPreTrainedModel"]
