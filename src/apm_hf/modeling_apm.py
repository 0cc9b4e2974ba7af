"""Implement the Asynchronous Perception Machine (APM): fold an image into one column, then query any location of it.

    pixel_values (B, C, S, S) -- fold --> trigger_column (B, D)
    [trigger_column ; local patch ; position code] -- one shared MLP --> feature (B, L, F), colour (B, L, 3)
    features (B, L, F) -- pool --> pooler_output (B, F)

Locations do not interact, so any subset of them can be queried, in any order and in chunks.

Source: Modi & Rawat, NeurIPS 2024, arXiv:2410.20535, Fig. 1.

Legend: B images, L locations, D trigger width, Q local-patch width, P position width, H a layer's width, F feature
width, N levels, K classes or texts, T tokens, (rows, cols) the grid. Locations are row-major; coordinates are (y, x)
in [-1, 1] as in `torch.nn.functional.grid_sample(align_corners=False)`.
"""

import copy
import hashlib
import inspect
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput, SemanticSegmenterOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_apm import APMConfig
from .position_encoding import (
    averaged,
    axis_codes,
    axis_indices,
    grid_coordinates,
    local_patches,
    sample_grid,
    sample_local_patches,
)

# Without gradients, locations are decoded in chunks whose widest activation stays below this many elements. On the
# CPU it should also stay in the cache, below this many bytes, unless the chunk were less than a row of the grid.
CHUNK_ELEMENTS, CACHED_BYTES = 2**24, 2**23
# Coordinates are clamped to this distance: beyond, float32 overflows and cannot resolve positions.
FAR = 1e30
# Pixels of the image for each of the teacher's, along a side, where a model reads a teacher's tokens.
FINER = 2
# Label of unlabelled pixels in segmentation maps, as in transformers' `semantic_loss_ignore_index`.
IGNORE_INDEX = 255


@dataclass
class APMModelOutput(ModelOutput):
    """Hold the outputs of an APM.

    Args:
        last_hidden_state: `(B, L, F)`, the feature of every location.
        pooler_output: `(B, F)`, pooled over these locations.
        rgb: `(B, L, 3)`, colours >= 0, or None without an RGB head.
        trigger_column: `(B, D)`.
        hidden_states: one `(B, L, hidden_sizes[i])` per layer of the MLP, with `output_hidden_states=True`.
        levels: `(B, L, N, level_size)`, the column of levels of every location, low to high, if the model has any.
        teacher_features: `(B, L, F_i)` by name, from the additional teachers' heads that were requested.
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


# --- layers, from the query to the pooled feature ---


class APMQuery(nn.Module):
    """Apply the first layer, a Linear over [features ; trigger ; local patch ; position], as a sum of Linears.

    W [I ; p] = W_I I + W_p p: the trigger's product is one row per image, and since the position code is
    [column ; row], rows + cols products serve all cells of a grid. Nothing is concatenated or repeated.
    """

    def __init__(self, config: APMConfig, out_features: int, *, feature_size: int = 0):
        super().__init__()
        half = config.position_size // 2
        self.trigger = nn.Linear(config.trigger_width, out_features)
        self.row = nn.Linear(half, out_features, bias=False)
        self.column = nn.Linear(half, out_features, bias=False)
        self.patch = nn.Linear(config.local_patch_width, out_features, bias=False) if config.local_patch else None
        self.features = nn.Linear(feature_size, out_features, bias=False) if feature_size else None

    def forward(
        self,
        trigger_column: Tensor,
        row_code: Tensor,
        column_code: Tensor,
        patches: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Compute `(B, L, H)` for locations in R rows of C, L = R * C.

        Args:
            trigger_column: `(B, D)`.
            row_code: `(1 or B, R, 1, P / 2)`.
            column_code: `(1 or B, 1 or R, C, P / 2)`.
            patches: `(B, L, Q)`, with `config.local_patch`.
            features: `(B, L, F)`, in the RGB head.
        """
        trigger = self.trigger(trigger_column)[:, None]  # (B, 1, H)
        # Layers get at most three axes: adapters treat four as an image.
        row, column = self.row(row_code.flatten(1, 2)), self.column(column_code.flatten(1, 2))  # (1 or B, R or C, H)
        if column_code.shape[2] == 1:  # every location is a row of its own
            hidden = row + column + trigger
        else:
            hidden = (row + trigger)[:, :, None] + column[:, None]  # (B, R, C, H)
            hidden = hidden.flatten(1, 2)
        if self.patch is not None:
            hidden = hidden + self.patch(patches)
        if self.features is not None:
            hidden = hidden + self.features(features)
        return hidden


class APMRGBHead(nn.Module):
    """Decode a colour >= 0 from [feature ; query] with an MLP; the feature is standardised if there are statistics."""

    def __init__(self, config: APMConfig):
        super().__init__()
        widths = [*config.rgb_hidden_sizes, 3]
        self.query = APMQuery(config, widths[0], feature_size=config.feature_size)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))

    def forward(
        self,
        features: Tensor,
        trigger_column: Tensor,
        row_code: Tensor,
        column_code: Tensor,
        patches: Tensor | None = None,
    ) -> Tensor:
        """Return `(B, L, 3)` for features `(B, L, F)` and a query as in [`APMQuery`]."""
        rgb = self.query(trigger_column, row_code, column_code, patches, features).relu()
        for layer in self.layers:
            rgb = layer(rgb).relu()
        return rgb


class APMFeatureSpace(nn.Module):
    """Map a head's standardised output to its teacher's space: output * std + mean, per channel.

    The statistics come from the configuration; weight files do not contain them.
    """

    mean: Tensor  # (F,)
    std: Tensor  # (F,)

    def __init__(self, mean: list[float], std: list[float] | float):
        super().__init__()
        self.statistics = (mean, std)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(len(mean)), persistent=False)
        self.fill()

    def fill(self) -> None:
        """Write the statistics into the buffers, which loading leaves undefined."""
        for name, values in zip(("mean", "std"), self.statistics, strict=True):
            init.copy_(getattr(self, name), torch.tensor(values))  # a single deviation is shared by all channels

    def forward(self, features: Tensor) -> Tensor:
        """Return features in the teacher's space, `(..., F)`, for outputs `(..., F)`."""
        return torch.addcmul(self.mean, features, self.std)

    def standardise(self, features: Tensor) -> Tensor:
        """Return standardised features, `(..., F)`, for those in the teacher's space."""
        return (features - self.mean) / self.std


def _feature_space(mean: Any, std: Any) -> APMFeatureSpace | nn.Identity:
    return nn.Identity() if mean is None or std is None else APMFeatureSpace(mean, std)


class APMMeanPooling(nn.Module):
    """Average over locations, which may come in chunks."""

    def forward(
        self, features: Tensor, rows: Tensor, columns: Tensor, state: tuple[Any, ...] = ()
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Pool a chunk of locations with those before it.

        Args:
            features: `(B, L, F)`.
            rows, columns: not used here.
            state: the features' sum `(B, F)` and their number, over the previous chunks.

        Returns:
            The pooled features `(B, F)` of all chunks so far, and the state after this one.
        """
        dtype = torch.promote_types(features.dtype, torch.float32)
        total, count = features.sum(dim=1, dtype=dtype), features.shape[1]
        if state:
            total, count = state[0] + total, state[1] + count
        return (total / count).to(features.dtype), (total, count)


class APMAttentionPooling(nn.Module):
    """Attend with a learned query to feature + position code; the design of the release's test-time-training model.

    Locations may come in chunks: the softmax is computed online (arXiv:1805.02867).
    """

    def __init__(self, config: APMConfig, feature_size: int):
        super().__init__()
        self.num_heads = config.pooling_num_heads
        self.query = nn.Parameter(torch.empty(1, 1, feature_size))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(feature_size, feature_size) for _ in range(4)
        )

    def forward(
        self, features: Tensor, rows: Tensor, columns: Tensor, state: tuple[Any, ...] = ()
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Pool a chunk of locations with those before it.

        Args:
            features: `(B, L, F)`.
            rows, columns: cell indices `(1 or B, R, 1)` and `(1 or B, 1 or R, C)`, L = R * C.
            state: highest score, sum of exp(score - highest) and the values' sum with these weights:
                `(B, heads, 1, 1)` twice and `(B, heads, 1, F / heads)`, over the previous chunks.

        Returns:
            The pooled features `(B, F)` of all chunks so far, and the state after this one.
        """
        half = features.shape[-1] // 2
        codes = axis_codes(half, columns, rows)  # the column's half comes first
        code = torch.cat(torch.broadcast_tensors(*codes), dim=-1).flatten(1, 2)  # (1 or B, L, F)
        inputs = features + code.to(features.dtype)
        # (B, L, F) -> (B, heads, L, F / heads)
        query, key, value = (
            projection(values).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, values in ((self.q_proj, self.query), (self.k_proj, inputs), (self.v_proj, inputs))
        )
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, heads, 1, L)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        highest = scores.detach().amax(dim=-1, keepdim=True)
        highest = torch.maximum(highest, state[0]) if state else highest
        weights = (scores - highest).exp()
        total = weights.sum(dim=-1, keepdim=True)
        weighted = (weights.to(value.dtype) @ value).to(weights.dtype)
        if state:
            shrink = (state[0] - highest).exp()
            total, weighted = state[1] * shrink + total, state[2] * shrink + weighted
        pooled = self.out_proj((weighted / total).flatten(1).to(features.dtype))  # (B, heads, 1, F / heads) -> (B, F)
        return pooled, (highest, total, weighted)


def _pooling(config: APMConfig, kind: str, feature_size: int) -> APMMeanPooling | APMAttentionPooling:
    return APMAttentionPooling(config, feature_size) if kind == "attention" else APMMeanPooling()


class APMTeacherHead(nn.Module):
    """Hold the modules of an additional teacher: a Linear on the last layer of the MLP, pooling, statistics."""

    def __init__(self, config: APMConfig, name: str):
        super().__init__()
        fields = config.teacher_head(name)
        width = fields["feature_size"]
        self.projection = nn.Linear(config.hidden_sizes[-1], width)
        self.pooler = _pooling(config, fields["pooling"], width)
        self.space = _feature_space(fields["feature_mean"], fields["feature_std"])


class APMResidualBlock(nn.Module):
    """Add to each location what a small MLP makes of it."""

    def __init__(self, config: APMConfig, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `(B, L, H)` for `(B, L, H)`."""
        return hidden + self.down(self.activation(self.up(self.norm(hidden))))


class APMDecoder(GradientCheckpointingLayer):
    """Apply the shared MLP and its heads, which predict standardised features if there are statistics.

    One call decodes one chunk of locations, so that checkpointing it bounds memory.
    """

    def __init__(self, config: APMConfig):
        super().__init__()
        widths, self.position_size, self.num_levels = config.hidden_sizes, config.position_size, config.num_levels
        self.refines_tokens = config.trigger_source == "tokens"
        self.query = APMQuery(config, widths[0], feature_size=config.trigger_width if config.trigger_is_grid else 0)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.activation = ACT2FN[config.hidden_act]
        self.blocks = nn.ModuleList(APMResidualBlock(config, widths[0]) for _ in range(config.num_residual_blocks))
        self.norm = nn.LayerNorm(widths[0]) if self.blocks else None
        self.feature_head = nn.Linear(widths[-1], config.feature_size)
        self.level_head = nn.Linear(widths[-1], config.num_levels * config.level_width) if config.num_levels else None
        self.rgb_head = APMRGBHead(config) if config.use_rgb_head else None
        self.teacher_heads = nn.ModuleDict({name: APMTeacherHead(config, name) for name in config.teacher_heads or ()})

    def teacher_head(self, name: str) -> APMTeacherHead:
        """Return the head of an additional teacher."""
        head = self.teacher_heads[name]
        assert isinstance(head, APMTeacherHead)
        return head

    def forward(
        self,
        trigger_column: Tensor,
        rows: Tensor,
        columns: Tensor,
        patches: Tensor | None,
        outputs: Sequence[str],
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Decode locations in R rows of C, L = R * C.

        Args:
            trigger_column: `(B, D)`.
            rows, columns: real-valued cell indices, `(1 or B, R, 1)` and `(1 or B, 1 or R, C)`.
            patches: `(B, L, Q)`, with `config.local_patch`.
            tokens: `(B, L, D)`, interpolated in a trigger that is a grid; features are added to the teacher's.
            outputs: names of outputs to compute: `"features"`, `"rgb"`, `"levels"`, `"hidden_states.i"` for layer i of
                the MLP, or `"teacher_features."` followed by the name of an additional teacher.

        Returns:
            One `(B, L, ...)` for each of `outputs`.
        """
        half, dtype = self.position_size // 2, trigger_column.dtype
        codes = [code.to(dtype) for code in axis_codes(half, rows, columns)]  # (1 or B, R, 1 or C, P / 2)
        hidden = self.query(trigger_column, *codes, patches, tokens)
        if self.norm is None:
            hidden = self.activation(hidden)
        else:
            for block in self.blocks:
                hidden = block(hidden)
            hidden = self.norm(hidden)
        keep = any(output.startswith("hidden_states.") for output in outputs)  # else each layer's memory is freed
        hidden_states = [hidden] if keep else []
        for layer in self.layers:
            hidden = self.activation(layer(hidden))
            hidden_states += [hidden] if keep else []
        features = self.feature_head(hidden)
        if tokens is not None and self.refines_tokens:
            features = features + tokens
        decoded: list[Tensor] = []
        for output in outputs:
            kind, _, name = output.partition(".")
            if kind == "features":
                decoded.append(features)
            elif kind == "rgb" and self.rgb_head is not None:
                decoded.append(self.rgb_head(features, trigger_column, *codes, patches))
            elif kind == "levels" and self.level_head is not None:
                decoded.append(self.level_head(hidden).unflatten(-1, (self.num_levels, -1)))  # (B, L, N, level_size)
            elif kind == "hidden_states":
                decoded.append(hidden_states[int(name)])
            else:
                decoded.append(self.teacher_head(name).projection(hidden))
        return tuple(decoded)


class APMColumnBlock(nn.Module):
    """Add to each local column what its neighbours and an MLP make of it (the block of arXiv:2201.03545, 3 x 3)."""

    def __init__(self, width: int, act: str):
        super().__init__()
        self.neighbours = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation = ACT2FN[act]

    def forward(self, columns: Tensor) -> Tensor:
        """Return `(B, D, rows, cols)` for `(B, D, rows, cols)`."""
        mixed = self.norm(self.neighbours(columns).movedim(1, -1)).flatten(1, 2)  # (B, rows * cols, D)
        update = self.down(self.activation(self.up(mixed)))
        return columns + update.movedim(1, -1).unflatten(-1, columns.shape[2:])


class APMColumns(nn.Module):
    """Fold an image into local columns, one per cell: 4 x 4 patches, 3 x 3 convolutions of stride 2, then blocks."""

    def __init__(self, config: APMConfig):
        super().__init__()
        patch, width = min(4, config.patch_size), config.trigger_channels
        halvings = (config.patch_size // patch).bit_length() - 1
        widths = [max(8, width >> halvings - i) for i in range(halvings + 1)]
        self.convolutions = nn.ModuleList([nn.Conv2d(config.num_channels, widths[0], patch, stride=patch)])
        for pair in zip(widths, widths[1:], strict=False):
            self.convolutions.append(nn.Conv2d(*pair, 3, stride=2, padding=1))
        self.norms = nn.ModuleList(nn.LayerNorm(one) for one in widths)
        self.activation = ACT2FN[config.hidden_act]
        self.blocks = nn.ModuleList(APMColumnBlock(width, config.hidden_act) for _ in range(config.num_column_blocks))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return `(B, rows, cols, D)` for images `(B, C, H, W)`."""
        columns = pixel_values.contiguous(memory_format=torch.channels_last)
        last = len(self.convolutions) - 1
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            columns = norm(convolution(columns).movedim(1, -1)).movedim(-1, 1)
            columns = columns if index == last else self.activation(columns)
        for block in self.blocks:
            columns = block(columns)
        return columns.movedim(1, -1)


class APMTeacher(nn.Module):
    """Fold an image into the tokens of a frozen vision model, which reads it at half its side.

    The teacher's features are its last hidden state: tokens, prefix tokens first, or a map. It stays in evaluation
    mode and takes no gradients.
    """

    def __init__(self, tower: PreTrainedModel):
        super().__init__()
        if _may_have_pooler(type(tower)):
            tower.pooler = None  # its output is not used, and many checkpoints have no weights for it
        self.tower = tower.requires_grad_(False).eval()

    @property
    def patch_size(self) -> int:
        """Side of a patch in the teacher's pixels; 1 for maps, whose size is known after the teacher has run."""
        return getattr(self.tower.config, "patch_size", 1)

    def train(self, mode: bool = True) -> "APMTeacher":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return tokens `(B, rows, cols, F)` for images `(B, C, H, W)`.

        Raises:
            ValueError: for sides that are not multiples of twice the teacher's patch.
        """
        step = FINER * self.patch_size
        height, width = pixel_values.shape[-2:]
        if height % step or width % step:
            raise ValueError(f"pixel_values: expected sides that are multiples of {step}, got {height} x {width}")
        options: dict[str, Any] = {"return_dict": True}
        if "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters:
            options["interpolate_pos_encoding"] = True
        state = self.tower(pixel_values=F.avg_pool2d(pixel_values, FINER), **options).last_hidden_state
        if state.ndim == 4:
            return state.movedim(1, -1)  # (B, F, rows, cols)
        rows, cols = height // step, width // step
        return state[:, -rows * cols :].unflatten(1, (rows, cols))  # prefix tokens come first


def _may_have_pooler(kind: type) -> bool:
    return "add_pooling_layer" in inspect.signature(kind).parameters


def weights_digest(module: nn.Module, *, dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 of all weights and buffers of a module, by their names, types and bytes.

    About a second per gigabyte; it is computed anew each time, so that it can never be of weights that were changed.

    Args:
        dtype: to which floating-point tensors are rounded first, so that the precision they are in does not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- models ---


class APMPreTrainedModel(PreTrainedModel):
    """Draw, load and save the weights of all APM models."""

    config_class = APMConfig
    base_model_prefix = "apm"
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["APMDecoder", "APMAttentionPooling"]
    # The choice of attention applies to the text tower, if a head has one.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: APMConfig, *args, **kwargs):
        config.validate_architecture()  # fields may have changed since the configuration was made
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Load a model as in transformers, but only from safetensors unless `use_safetensors=False`.

        Args:
            teacher: the teacher's tower, where `config.teacher_source` names it; by default it is loaded from there.

        Raises:
            ValueError: for weights whose shapes do not match the configuration, or another teacher's.
            OSError: for missing or damaged files.
        """
        name, teacher = pretrained_model_name_or_path, kwargs.pop("teacher", None)
        wants_info, strict = kwargs.get("output_loading_info"), not kwargs.get("ignore_mismatched_sizes")
        options = {"use_safetensors": True, **kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            model, info = super().from_pretrained(name, *model_args, **options)
        except SafetensorError as error:
            raise OSError(f"{_damaged_file(name)}: damaged safetensors file: {error}") from error
        if strict and info["mismatched_keys"]:
            key, found, expected = min(info["mismatched_keys"])
            raise ValueError(
                f"{name}: expected weights of the shapes that its configuration describes, "
                f"{key} of {tuple(expected)}, got {tuple(found)}"
            )
        if isinstance(fold := getattr(model, "apm", model).trigger, APMTeacher):
            fold.requires_grad_(False)  # loaded weights are trainable
        if model.config.teacher_source is not None:
            shared = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
            model._load_teacher(teacher, {key: kwargs[key] for key in shared if key in kwargs})
        return (model, info) if wants_info else model

    def _load_teacher(self, tower: PreTrainedModel | None, options: dict[str, Any]) -> None:
        """Put the teacher that the configuration names into the model."""
        source, apm = self.config.teacher_source, cast(APMModel, getattr(self, "apm", self))
        if tower is None:
            kind = type(cast(APMTeacher, apm.trigger).tower)  # as the configuration says
            if _may_have_pooler(kind):
                options["add_pooling_layer"] = False
            tower = kind.from_pretrained(
                source["name"], revision=source["revision"], dtype="auto", use_safetensors=True, **options
            )
        # Rounded to bfloat16, so that the precision in which they were saved does not count.
        fold = APMTeacher(tower)
        if (found := weights_digest(fold.tower, dtype=torch.bfloat16)) != source["sha256"]:
            raise ValueError(
                f"teacher_source: expected the weights of {source['name']} with SHA-256 {source['sha256']}, got "
                f"{found}: features would be another teacher's"
            )
        apm.trigger = fold.to(apm.device, apm.dtype)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save a model as in transformers, together with its code for every Auto class.

        The teacher's weights are left out where `config.teacher_source` says where they are.

        Raises:
            OSError: if the weights cannot be written, e.g. on a full disk.
        """
        if type(self).__module__ == __name__:
            self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | _AUTO_MAP
        if self.config.teacher_source is not None:
            state = kwargs.get("state_dict") or self.state_dict()
            inside = ("trigger.tower.", "apm.trigger.tower.")
            kwargs["state_dict"] = {key: value for key, value in state.items() if not key.startswith(inside)}
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"cannot write the weights to {str(save_directory)!r}: {error}") from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            decoder = getattr(getattr(self, "apm", self), "decoder", None)
            if decoder is not None and decoder.refines_tokens and module is decoder.feature_head:
                init.zeros_(module.weight)  # features begin as what is interpolated
            else:
                init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, APMAttentionPooling):
            init.normal_(module.query, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, APMFeatureSpace):
            module.fill()

    def get_input_embeddings(self) -> nn.Module:
        """Return the first module applied to the input: the fold, or the identity for an embedding."""
        model: Any = getattr(self, "apm", self)
        return model.trigger


class APMModel(APMPreTrainedModel):
    """Run the bare model: `fold` an image into its trigger column, `query` any locations of it.

    Args:
        output_size: (rows, cols) of the map that is queried where no coordinates are given; None is the grid. It is
            not part of the configuration and is not saved: `from_pretrained(..., output_size=(64, 96))` sets it, and
            `pipeline("image-feature-extraction", folder, model_kwargs={"output_size": (64, 96)})`.

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

    # Of a repository that also holds the words of the teacher.
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]

    def __init__(self, config: APMConfig, *, output_size: tuple[int, int] | None = None):
        super().__init__(config)
        self.output_size = output_size
        if config.teacher_source is not None:  # `from_pretrained` loads them from there
            self._keys_to_ignore_on_load_missing = [r"trigger\.tower\."]
        self.grid_size = config.grid_size
        widths = [head["feature_size"] for head in (config.teacher_heads or {}).values()]
        self.widest = max(*config.hidden_sizes, config.feature_size, config.local_patch_width, *widths)
        self.trigger: nn.Module = nn.Identity()  # for an embedding
        if config.trigger_source == "conv":
            self.trigger = nn.Conv2d(
                config.num_channels, config.trigger_channels, config.patch_size, stride=config.patch_size
            )
        elif config.trigger_source == "columns":
            self.trigger = APMColumns(config)
        elif config.teacher_config is not None:
            self.trigger = APMTeacher(AutoModel.from_config(config.teacher_config))
        self.decoder = APMDecoder(config)
        self.pooler = _pooling(config, config.pooling, config.feature_size)
        self.feature_space = _feature_space(config.feature_mean, config.feature_std)
        self.post_init()

    def fold(self, pixel_values: Tensor) -> Tensor:
        """Fold images into their trigger columns.

        Args:
            pixel_values: `(B, C, S, S)`, S = `config.image_size`.

        Returns:
            `(B, D)`: the convolution's channels, each flattened row-major; or local columns, or the tokens of the
            teacher inside, `(B, rows, cols, D)`.

        Raises:
            ValueError: for another shape, or if the trigger column comes from the caller.
        """
        if not self.folds:
            source = self.config.trigger_source
            raise ValueError(f"fold: trigger_source={source!r} has nothing to fold; pass trigger_column instead")
        folded = self.trigger(self._check_pixels(pixel_values))
        return folded if self.config.trigger_is_grid else folded.flatten(1)  # (B, 1, rows, cols) -> (B, D)

    @property
    def folds(self) -> bool:
        """Return whether pixels suffice: the trigger column is made here, not by the caller."""
        return not isinstance(self.trigger, nn.Identity)

    def set_teacher(self, tower: PreTrainedModel, *, name: str | None = None, revision: str | None = None) -> None:
        """Put a frozen teacher inside, so that the model works from pixels alone.

        Args:
            tower: a vision model whose last hidden state is its features, of width F; it is frozen.
            name: its name on the Hub: saved models then say where its weights are, instead of holding them.
            revision: of `name`.

        Raises:
            ValueError: for a model that reads no tokens, or another width.
        """
        config = copy.deepcopy(tower.config)
        width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        if width != self.config.feature_size:
            raise ValueError(f"tower: expected features of width {self.config.feature_size}, got {width}")
        config.num_labels = 2  # names of classes are of no use here
        config.name_or_path, config.architectures = "", None  # nor is where it was loaded from
        fold = APMTeacher(tower)
        source = None
        if name is not None:
            digest = weights_digest(fold.tower, dtype=torch.bfloat16)
            source = {"name": name, "revision": revision, "sha256": digest}
        self.config.teacher_config, self.config.teacher_source = config, source
        self.config.validate_architecture()
        self.trigger = fold.to(self.device, self.dtype)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        coordinates: Tensor | None = None,
        *,
        trigger_column: Tensor | None = None,
        chunk_size: int | None = None,
        heads: Sequence[str] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> APMModelOutput:
        """Fold, then query.

        Args:
            pixel_values: `(B, C, S, S)`; not needed if `trigger_column` is given and `config.local_patch` is off.
            coordinates: `(L, 2)` or `(B, L, 2)`, (y, x) in [-1, 1], any real values; None is the full grid.
            trigger_column: `(B, D)`, instead of folding; required with `trigger_source="embedding"`, and with
                `"tokens"`, as the teacher's grid `(B, rows, cols, F)`; images may then be of any size.
            chunk_size: locations decoded at a time, rounded to full rows on the grid; outputs do not depend on it.
                None chooses: all at once if gradients are needed without checkpointing and in compiled code, else as
                many as keep the activations below `CHUNK_ELEMENTS`.
            heads: names of `config.teacher_heads` to compute besides the main head; None is all of them.
            output_hidden_states: also return the MLP's layers.
            output_attentions: accepted and ignored: locations do not attend to each other.
            interpolate_pos_encoding: accepted and ignored: positions are real numbers, and the image has one size.

        Raises:
            ValueError: for shapes that do not fit the configuration.
        """
        config, decoder = self.config, self.decoder
        if unknown := [name for name in heads or () if name not in decoder.teacher_heads]:
            raise ValueError(f"heads: expected names among {list(decoder.teacher_heads)}, got {unknown}")
        if output_hidden_states is None:
            output_hidden_states = bool(config.output_hidden_states)
        heads = tuple(decoder.teacher_heads if heads is None else heads)
        # The name of each output of the decoder, with its pooling and the map to its teacher's space.
        features: dict[str, tuple[Any, Any]] = {"features": (self.pooler, self.feature_space)}
        for name in heads:
            head = decoder.teacher_head(name)
            features[f"teacher_features.{name}"] = head.pooler, head.space
        outputs = list(features)
        outputs += ["rgb"] * (decoder.rgb_head is not None) + ["levels"] * (decoder.level_head is not None)
        num_layers = len(config.hidden_sizes) if output_hidden_states else 0
        outputs += [f"hidden_states.{index}" for index in range(num_layers)]

        trigger_column = self._trigger_column(trigger_column, pixel_values)
        coordinates = self._coordinates(coordinates, trigger_column, pixel_values)
        column = self._column(trigger_column)
        states: dict[str, tuple[Any, ...]] = dict.fromkeys(features, ())
        pooled: dict[str, Tensor] = {}
        chunks = _Chunks(self.grid_size**2 if coordinates is None else coordinates.shape[1])
        for rows, columns, patches, tokens in self._locations(trigger_column, coordinates, pixel_values, chunk_size):
            values = decoder(column, rows, columns, patches, outputs, tokens)
            decoded = dict(zip(outputs, values, strict=True))
            for name, (pooler, space) in features.items():
                pooled[name], states[name] = pooler(decoded[name], rows, columns, states[name])
                decoded[name] = space(decoded[name])
            chunks.add(decoded)
        whole = chunks.join()
        pooled = {name: space(pooled[name]) for name, (_, space) in features.items()}
        return APMModelOutput(
            last_hidden_state=whole["features"],
            pooler_output=pooled["features"],
            rgb=whole.get("rgb"),
            trigger_column=trigger_column,
            hidden_states=tuple(whole[f"hidden_states.{index}"] for index in range(num_layers)) or None,
            levels=whole.get("levels"),
            teacher_features={name: whole[f"teacher_features.{name}"] for name in heads} or None,
            teacher_embeds={name: pooled[f"teacher_features.{name}"] for name in heads} or None,
        )

    def query(
        self,
        trigger_column: Tensor,
        coordinates: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        chunk_size: int | None = None,
        heads: Sequence[str] | None = None,
        output_hidden_states: bool | None = None,
    ) -> APMModelOutput:
        """Query locations of folded images; arguments and output as in `forward`.

        `pixel_values` are needed only if `config.local_patch` is on.
        """
        return self(
            pixel_values,
            coordinates,
            trigger_column=trigger_column,
            chunk_size=chunk_size,
            heads=heads,
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
        """Return `forward(...).pooler_output`, `(B, F)`, without computing colours or levels or storing features."""
        trigger_column = self._trigger_column(trigger_column, pixel_values)
        coordinates = self._coordinates(coordinates, trigger_column, pixel_values)
        column, state = self._column(trigger_column), ()
        for rows, columns, patches, tokens in self._locations(trigger_column, coordinates, pixel_values, None):
            (features,) = self.decoder(column, rows, columns, patches, ("features",), tokens)
            pooled, state = self.pooler(features, rows, columns, state)
        return self.feature_space(pooled)

    @torch.no_grad()
    def set_feature_statistics(
        self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float] | float, *, head: str | None = None
    ) -> None:
        """Set a teacher's statistics in the configuration and apply them to the network's output.

        Weights are unchanged: the network now predicts standardised features, so set the statistics before training.

        Args:
            mean: `(F,)`.
            std: `(F,)`, or one number for all channels.
            head: a name of `config.teacher_heads`; None is the main head.

        Raises:
            ValueError: for an unknown head, another number of values than F, values that are not finite, or deviations
                that are not positive.
        """
        statistics = self.config.set_feature_statistics(mean, std, head=head)
        space = APMFeatureSpace(*statistics.values()).to(device=self.device, dtype=self.dtype)
        if head:
            self.decoder.teacher_head(head).space = space
        else:
            self.feature_space = space

    def with_head(self, name: str) -> "APMModel":
        """Return an ordinary APM whose main and only head is that of the teacher `name`; weights are copied.

        It decodes no colours, since the RGB head reads the features of the main head.

        Raises:
            ValueError: for an unknown name.
        """
        config, model = self.config.with_head(name), copy.deepcopy(self)
        head = model.decoder.teacher_head(name)
        model.config, model.decoder.feature_head = config, head.projection
        model.pooler, model.feature_space = head.pooler, head.space
        model.decoder.rgb_head, model.decoder.teacher_heads = None, nn.ModuleDict()
        return model

    def _trigger_column(self, trigger_column: Tensor | None, pixel_values: Tensor | None) -> Tensor:
        """Return the trigger column `(B, D)`, given or folded, in the model's dtype."""
        if trigger_column is None:
            if pixel_values is None or not self.folds:
                needed = "pixel_values or trigger_column" if self.folds else "trigger_column"
                source = self.config.trigger_source
                raise ValueError(f"forward: expected {needed}, got none (trigger_source={source!r})")
            return self.fold(pixel_values)
        width = self.config.trigger_width
        if not isinstance(trigger_column, Tensor):
            raise ValueError(f"trigger_column: expected a tensor, got {type(trigger_column).__name__}")
        shape = "B, rows, cols" if (is_grid := self.config.trigger_is_grid) else "B"
        if trigger_column.ndim != (4 if is_grid else 2) or trigger_column.shape[-1] != width:
            raise ValueError(f"trigger_column: expected shape ({shape}, {width}), got {tuple(trigger_column.shape)}")
        trigger_column = trigger_column.to(self.dtype)  # inputs may be float32 with bfloat16 weights
        return self.trigger(trigger_column) if self.config.trigger_source == "embedding" else trigger_column

    def _column(self, trigger_column: Tensor) -> Tensor:
        """Return what all locations of an image share, `(B, D)`: the column, or the mean of a grid of them."""
        if not self.config.trigger_is_grid:
            return trigger_column
        return self._standardised(trigger_column).mean(dim=(1, 2))

    def _standardised(self, trigger_column: Tensor) -> Tensor:
        """Standardise the teacher's tokens; local columns stay as they are."""
        space = self.feature_space
        if not self.decoder.refines_tokens or not isinstance(space, APMFeatureSpace):
            return trigger_column
        return space.standardise(trigger_column)

    def _locations(
        self,
        trigger_column: Tensor,
        coordinates: Tensor | None,
        pixel_values: Tensor | None,
        chunk_size: int | None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
        """Yield chunks of locations: cell indices `(1 or B, R, 1)` and `(1 or B, 1 or R, C)`, patches and tokens."""
        config, device = self.config, trigger_column.device
        if config.local_patch:
            if pixel_values is None:
                raise ValueError("pixel_values: expected the images, since local_patch=True puts them into the query")
            images = self._check_pixels(pixel_values)
            num_columns, num_images = trigger_column.shape[0], images.shape[0]
            if num_images != num_columns:
                raise ValueError(f"pixel_values: expected {num_columns} images, one per column, got {num_images}")
        patches = tokens = None
        if config.trigger_is_grid:
            standardised = self._standardised(trigger_column)
        if coordinates is None:  # rows and columns of the grid
            if config.trigger_is_grid:
                tokens = standardised.flatten(1, 2)  # (B, L, D)
            index = torch.arange(self.grid_size, dtype=torch.float32, device=device)
            rows, columns = index[None, :, None], index[None, None]
            if config.local_patch:
                patches = local_patches(images, config.patch_size, config.local_patch_scales)  # (B, L, Q)
        else:  # every location is a row of length one
            rows, columns = axis_indices(coordinates, self.grid_size).split(1, dim=-1)  # (1 or B, L, 1) twice
            if config.local_patch:
                pyramid = averaged(images, config.local_patch_scales)
        step = self._chunk_rows(trigger_column, columns, chunk_size)
        for start in range(0, rows.shape[1], step) if step else (0,):  # a range would fix a traced number of rows
            chunk = slice(start, start + step if step else None)
            if coordinates is None:
                width = columns.shape[2]
                cells = slice(start * width, chunk.stop * width if step else None)
                parts = [None if values is None else values[:, cells] for values in (patches, tokens)]
                yield rows[:, chunk], columns, parts[0], parts[1]
            else:
                if config.local_patch:
                    patches = sample_local_patches(pyramid, coordinates[:, chunk], config.patch_size)
                if config.trigger_is_grid:
                    tokens = sample_grid(standardised, coordinates[:, chunk])
                yield rows[:, chunk], columns[:, chunk], patches, tokens

    def _chunk_rows(self, trigger_column: Tensor, columns: Tensor, chunk_size: int | None) -> int | None:
        """Return the number of rows of locations decoded at a time; None is all of them."""
        if chunk_size is not None:
            if chunk_size < 1:
                raise ValueError(f"chunk_size: expected a positive number of locations, got {chunk_size}")
            return max(1, chunk_size // columns.shape[2])
        checkpointed = self.training and self.decoder.gradient_checkpointing
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not checkpointed):
            return None
        elements = max(1, len(trigger_column)) * self.widest  # per location
        size = CHUNK_ELEMENTS // elements
        if trigger_column.device.type == "cpu":
            cached = CACHED_BYTES // (elements * trigger_column.element_size())
            size = min(size, max(cached, self.grid_size))
        return max(1, size // columns.shape[2])

    def _check_pixels(self, pixel_values: Tensor) -> Tensor:
        """Return the images in the model's dtype."""
        config = self.config
        expected: tuple[int | str, ...] = (config.num_channels, config.image_size, config.image_size)
        if not isinstance(pixel_values, Tensor):
            raise ValueError(f"pixel_values: expected a tensor, got {type(pixel_values).__name__}")
        if config.trigger_is_grid:  # any size
            sides = f"a multiple of {config.patch_size}"
            expected = (config.num_channels, sides, sides)
            fits = pixel_values.shape[1] == config.num_channels and all(
                side and side % config.patch_size == 0 for side in pixel_values.shape[2:]
            )
        else:
            fits = tuple(pixel_values.shape[1:]) == expected
        if pixel_values.ndim != 4 or not fits:
            raise ValueError(
                f"pixel_values: expected shape (B, {', '.join(map(str, expected))}), got {tuple(pixel_values.shape)}"
            )
        return pixel_values.to(self.dtype)

    def _coordinates(
        self, coordinates: Tensor | None, trigger_column: Tensor, pixel_values: Tensor | None
    ) -> Tensor | None:
        """Return coordinates `(1 or B, L, 2)`, float32 or wider, on the trigger column's device; None stays None.

        Where the trigger is another grid than the model's, None becomes the centres of the image's cells.
        """
        if coordinates is None and self.output_size is not None:
            return grid_coordinates(*self.output_size, device=trigger_column.device)[None]
        if coordinates is None:
            own_grid = trigger_column.shape[1:3] == (self.grid_size, self.grid_size)
            if not self.config.trigger_is_grid or (self.config.trigger_source == "columns" and own_grid):
                return None
            size = (self.config.image_size,) * 2 if pixel_values is None else pixel_values.shape[-2:]
            rows, cols = (side // self.config.patch_size for side in size)
            return grid_coordinates(rows, cols, device=trigger_column.device)[None]
        if not isinstance(coordinates, Tensor):
            raise ValueError(f"coordinates: expected a tensor, got {type(coordinates).__name__}")
        batch_size, shape = trigger_column.shape[0], coordinates.shape
        if (
            len(shape) not in (2, 3)
            or shape[-1] != 2
            or shape[-2] == 0
            or (len(shape) == 3 and shape[0] != batch_size)
        ):
            raise ValueError(
                f"coordinates: expected shape (L, 2) or ({batch_size}, L, 2), (y, x), with L >= 1, got {tuple(shape)}"
            )
        if not _are_finite(coordinates):
            raise ValueError("coordinates: expected finite numbers, (y, x), got NaN or infinite ones")
        dtype = torch.promote_types(coordinates.dtype, torch.float32)  # in bfloat16 positions would be off by pixels
        coordinates = coordinates.to(trigger_column.device, dtype).clamp(-FAR, FAR)
        return coordinates if coordinates.ndim == 3 else coordinates[None]  # (L, 2) -> (1, L, 2)


def _are_finite(coordinates: Tensor) -> bool:
    """Return False for non-finite numbers; True without checking where that would synchronise or break a graph."""
    if coordinates.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    try:
        # The sum is finite only if all are; it may overflow where they are.
        return math.isfinite(coordinates.detach().sum().item()) or bool(coordinates.isfinite().all())
    except RuntimeError:  # under `torch.vmap` no values can be read
        return True


class _Chunks:
    """Join the decoder's outputs for chunks of locations; without gradients, nothing is stored twice."""

    def __init__(self, num_locations: int):
        self.num_locations, self.num_decoded = num_locations, 0
        self.parts: dict[str, list[Tensor]] = {}
        self.whole: dict[str, Tensor] = {}

    def add(self, outputs: dict[str, Tensor]) -> None:
        """Add `(B, L, ...)` by name, for the next locations."""
        first, count = self.num_decoded, outputs["features"].shape[1]
        self.num_decoded += count
        if count == self.num_locations:
            self.whole = outputs
        elif torch.is_grad_enabled():
            for name, part in outputs.items():
                self.parts.setdefault(name, []).append(part)
        else:
            for name, part in outputs.items():
                if name not in self.whole:
                    self.whole[name] = part.new_empty(len(part), self.num_locations, *part.shape[2:])
                self.whole[name][:, first : self.num_decoded] = part

    def join(self) -> dict[str, Tensor]:
        """Return all locations, `(B, L, ...)` by name."""
        return self.whole | {name: torch.cat(parts, dim=1) for name, parts in self.parts.items()}


# --- models with a head for a task ---

# Weights of a distilled APM that a head does not use.
_UNUSED_BY_HEADS = [r"decoder\.(rgb_head|level_head|teacher_heads)\."]


@dataclass
class APMZeroShotOutput(ModelOutput):
    """Hold image-text similarities.

    Args:
        loss: `()`, the contrastive loss, with `return_loss=True`.
        logits_per_image: `(B, K)`, cosine similarities times the temperature.
        logits_per_text: `(K, B)`.
        text_embeds: `(K, F)`, of norm 1.
        image_embeds: `(B, F)`, of norm 1.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class APMForImageClassification(APMPreTrainedModel):
    """Classify images with a linear layer on the pooled feature, without colours, levels and additional heads."""

    _keys_to_ignore_on_load_unexpected = _UNUSED_BY_HEADS

    def __init__(self, config: APMConfig):
        super().__init__(config.features_only())
        self.num_labels = config.num_labels
        self.apm = APMModel(self.config)
        self.classifier = nn.Linear(config.feature_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        coordinates: Tensor | None = None,
        *,
        trigger_column: Tensor | None = None,
        chunk_size: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Compute logits `(B, num_labels)`.

        Args:
            pixel_values: `(B, C, S, S)`.
            labels: `(B,)`, class indices; or `(B, num_labels)` or `(B,)` floats, as `config.problem_type` says.
            coordinates, trigger_column, chunk_size, output_hidden_states, output_attentions,
                interpolate_pos_encoding: as in [`APMModel.forward`].
            **kwargs: for the loss.
        """
        outputs = self.apm(
            pixel_values,
            coordinates,
            trigger_column=trigger_column,
            chunk_size=chunk_size,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = self.loss_function(labels, logits, self.config, **kwargs) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class APMForSemanticSegmentation(APMPreTrainedModel):
    """Segment images with a linear layer on the feature of every location, at any resolution.

    To train only the classifier, use `model.apm.requires_grad_(False)`: the APM then runs without gradients, in
    chunks, so that memory does not limit `output_size`. The model has no pooling and no other heads.

    Args:
        output_size: default (height, width) of maps; None is the grid. It is not part of the configuration and is
            not saved: `from_pretrained(..., output_size=(480, 640))` or `model.output_size = ...` sets it, and for a
            folder `pipeline("image-segmentation", folder, model_kwargs={"output_size": (480, 640)})`.
    """

    _keys_to_ignore_on_load_unexpected = [*_UNUSED_BY_HEADS, r"^(apm\.)?pooler\."]

    def __init__(self, config: APMConfig, *, output_size: tuple[int, int] | None = None):
        super().__init__(config.features_only(pooling="mean"))
        self.output_size = output_size
        self.num_labels = config.num_labels
        self.apm = APMModel(self.config)
        self.classifier = nn.Linear(config.feature_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_size: tuple[int, int] | None = None,
        trigger_column: Tensor | None = None,
        chunk_size: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> SemanticSegmenterOutput:
        """Compute logits `(B, num_labels, height, width)`.

        Args:
            pixel_values: `(B, C, S, S)`.
            labels: `(B, height', width')`, class indices, 255 for unlabelled pixels; the logits are interpolated
                bilinearly to their size for the loss.
            output_size: (height, width) of the map of queries; None is `model.output_size`, by default the grid.
            trigger_column, chunk_size, output_hidden_states, output_attentions, interpolate_pos_encoding: as in
                [`APMModel.forward`].
        """
        grid = self.config.grid_size
        output_size = output_size if output_size is not None else self.output_size
        height, width = output_size if output_size is not None else (grid, grid)
        if height < 1 or width < 1:
            raise ValueError(f"output_size: expected a positive (height, width), got {output_size}")
        given = pixel_values if trigger_column is None else trigger_column
        device = given.device if isinstance(given, Tensor) else None  # weights may be offloaded until they are used
        coordinates = None if output_size is None else grid_coordinates(height, width, device=device)
        sources = (pixel_values, trigger_column, *self.apm.parameters())
        is_frozen = not any(source is not None and source.requires_grad for source in sources)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            outputs = self.apm(
                pixel_values,
                coordinates,
                trigger_column=trigger_column,
                chunk_size=chunk_size,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
        logits = self.classifier(outputs.last_hidden_state)  # (B, L, num_labels)
        logits = logits.transpose(1, 2).unflatten(2, (height, width))  # -> (B, num_labels, height, width)
        loss = None
        if labels is not None:
            if labels.ndim != 3 or len(labels) != len(logits):
                raise ValueError(f"labels: expected shape ({len(logits)}, height, width), got {tuple(labels.shape)}")
            scaled = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = F.cross_entropy(scaled, labels.long(), ignore_index=IGNORE_INDEX)
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class APMForZeroShotImageClassification(APMPreTrainedModel):
    """Compare images and texts with an APM and the text tower of its teacher, in one vector space.

    `config.text_config` describes the tower, of any Hugging Face dual encoder; [`from_dual_encoder`] takes it, with
    its weights, from a teacher such as CLIP, SigLIP or a `VisionTextDualEncoderModel`. The APM has only what the
    pooled feature needs: no colours, levels or additional heads.
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _keys_to_ignore_on_load_unexpected = _UNUSED_BY_HEADS

    def __init__(self, config: APMConfig):
        if not isinstance(config.text_config, PreTrainedConfig):
            raise ValueError(
                "text_config: expected the configuration of a text tower, got None; "
                "see APMForZeroShotImageClassification.from_dual_encoder"
            )
        super().__init__(config.features_only())
        self.apm = APMModel(self.config)
        text_config = self.config.text_config
        self.text_model = _text_tower(text_config)
        self.text_projection = (
            nn.Linear(text_config.hidden_size, config.feature_size, bias=False)
            if config.text_projection
            else nn.Identity()
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.logit_scale, float(self.config.logit_scale_init_value))

    @classmethod
    def from_dual_encoder(cls, apm: APMModel, dual_encoder: PreTrainedModel) -> "APMForZeroShotImageClassification":
        """Join an APM, distilled from `dual_encoder`, with its text tower. Weights are copied.

        Args:
            apm: its `feature_size` is the width of the dual encoder's embeddings.
            dual_encoder: e.g. `CLIPModel`, `SiglipModel`, `VisionTextDualEncoderModel`.

        Raises:
            ValueError: for a model without a text tower, or of another width.
        """
        tower = getattr(dual_encoder, "text_model", None)
        if tower is None:
            raise ValueError(f"dual_encoder: expected a model with a text tower, got {type(dual_encoder).__name__}")
        projection = getattr(dual_encoder, "text_projection", None)
        width = getattr(tower.config, "projection_size", None) or tower.config.hidden_size  # SigLIP projects inside
        if projection is not None:
            plain = isinstance(projection, nn.Linear) and projection.bias is None
            if not plain or projection.in_features != tower.config.hidden_size:
                raise ValueError(
                    "dual_encoder: expected a text projection that is one linear map without bias of the pooled text, "
                    f"got {projection} in {type(dual_encoder).__name__}"
                )
            width = projection.out_features
        if width != apm.config.feature_size:
            raise ValueError(
                f"dual_encoder: expected embeddings of width feature_size={apm.config.feature_size}, got {width}"
            )
        config = copy.deepcopy(apm.config)
        config.text_config = copy.deepcopy(dual_encoder.config.text_config)
        config.text_projection = projection is not None
        if (scale := getattr(dual_encoder, "logit_scale", None)) is not None:
            config.logit_scale_init_value = scale.item()
        model = cls(config).to(device=apm.device, dtype=apm.dtype)
        used = model.apm.state_dict().keys()
        model.apm.load_state_dict({name: weight for name, weight in apm.state_dict().items() if name in used})
        # Some dual encoders hold the tower itself, others the core module that the tower's class wraps.
        core = (
            model.text_model if _same_keys(model.text_model, tower) else getattr(model.text_model, "text_model", None)
        )
        if core is None or not _same_keys(core, tower):
            raise ValueError(
                f"dual_encoder: {type(model.text_model).__name__}, built from its text_config, does not have the "
                f"weights of its {type(tower).__name__}"
            )
        core.load_state_dict(tower.state_dict())
        if projection is not None:
            model.text_projection.load_state_dict(projection.state_dict())
        return model.eval()

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Return the tower's output for token ids `(K, T)`; `pooler_output` is `(K, F)`, unnormalised."""
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, coordinates: Tensor | None = None, **kwargs) -> APMModelOutput:
        """Return the APM's output for images `(B, C, S, S)`; `pooler_output` is `(B, F)`, unnormalised."""
        return self.apm(pixel_values, coordinates, return_dict=True, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        coordinates: Tensor | None = None,
        return_loss: bool | None = None,
        *,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> APMZeroShotOutput:
        """Compare every image with every text.

        Args:
            input_ids: `(K, T)`.
            pixel_values: `(B, C, S, S)`.
            attention_mask: `(K, T)`, 1 for tokens, 0 for padding.
            coordinates: `(L, 2)` or `(B, L, 2)`, the locations that are pooled; None is the full grid.
            return_loss: also return the contrastive loss of B = K matching pairs (arXiv:2103.00020).
            interpolate_pos_encoding: as in [`APMModel.forward`].
            **kwargs: additional inputs of the text tower, e.g. `token_type_ids`.
        """
        image_embeds = F.normalize(self.apm.pooled_features(pixel_values, coordinates), dim=-1)
        text = self.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
        text_embeds = F.normalize(text.pooler_output, dim=-1)
        logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()
        loss = None
        if return_loss:
            if len(text_embeds) != len(image_embeds):
                raise ValueError(f"return_loss: expected as many texts as images, got {tuple(logits_per_text.shape)}")
            pairs = torch.arange(len(text_embeds), device=logits_per_text.device)
            loss = (F.cross_entropy(logits_per_text, pairs) + F.cross_entropy(logits_per_text.T, pairs)) / 2
        return APMZeroShotOutput(
            loss=loss,
            logits_per_image=logits_per_text.T,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
        )


def _damaged_file(name: str | os.PathLike) -> str:
    """Return the first weight file in a folder that cannot be read; the folder or model name if all can."""
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return str(name)


def _text_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the text tower of a configuration; `AutoModel` does not support some, e.g. SigLIP's."""
    name = type(config).__name__.removesuffix("Config") + "Model"
    if hasattr(transformers, name):
        return getattr(transformers, name)(config)
    return AutoModel.from_config(config)


def _same_keys(first: nn.Module, second: nn.Module) -> bool:
    return first.state_dict().keys() == second.state_dict().keys()


# Saved models include their code, for `trust_remote_code=True`.
AUTO_CLASSES = {
    "AutoModel": APMModel,
    "AutoModelForImageClassification": APMForImageClassification,
    "AutoModelForSemanticSegmentation": APMForSemanticSegmentation,
    "AutoModelForZeroShotImageClassification": APMForZeroShotImageClassification,
}
_AUTO_MAP = {name: f"modeling_apm.{model_class.__name__}" for name, model_class in AUTO_CLASSES.items()}
for _name, _model_class in AUTO_CLASSES.items():
    _model_class.register_for_auto_class(_name)

__all__ = [
    "AUTO_CLASSES",
    "APMForImageClassification",
    "APMForSemanticSegmentation",
    "APMForZeroShotImageClassification",
    "APMModel",
    "APMModelOutput",
    "APMPreTrainedModel",
    "APMZeroShotOutput",
]
