"""Define the configuration of the Asynchronous Perception Machine (APM).

It holds the architecture and the teachers' statistics and origins: no learning rates and no paths. Keyword arguments
are checked; unknown fields of a file are kept.

Teachers' features differ in scale by orders of magnitude, so that one would drown the others: AM-RADIO
(arXiv:2312.06709), PHI-S (arXiv:2410.01680) and Theia (arXiv:2407.20179) train in standardised spaces.

Source: Modi & Rawat, NeurIPS 2024, arXiv:2410.20535, Fig. 1.

Legend: D trigger width, Q local-patch width, P position width, F feature width, (rows, cols) the grid of locations.
"""

import copy
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

logger = logging.get_logger(__name__)

HEAD_FIELDS = ("feature_size", "feature_mean", "feature_std", "pooling")
ORIGIN_FIELDS = ("name", "license", "revision", "dataset", "sha256")
SOURCE_FIELDS = ("name", "revision", "sha256")
POOLINGS = ("mean", "attention")
MAX_SIZE = 2**20  # of any width or side: beyond, a file is no model's
_SIZES = (
    "image_size",
    "patch_size",
    "num_channels",
    "trigger_channels",
    "feature_size",
    "position_size",
    "trigger_size",
)

PRESETS: dict[str, dict[str, Any]] = {
    # The release's COCO model: 54.3 M parameters, student of DINOv2 ViT-L/14 with registers.
    "dinov2-large": {"hidden_sizes": [4096, 4096, 4096, 2048, 1024], "feature_size": 1024, "pooling": "mean"},
    # The release's test-time-training model: 22.8 M parameters, student of CLIP ViT-L/14.
    "clip-ttt": {"hidden_sizes": [4096, 2048, 1024], "feature_size": 768, "pooling": "attention"},
    # The paper's student in small: one column of the whole image, 2.5 M parameters at F = 192.
    "paper": {
        "image_size": 224,
        "patch_size": 16,
        "hidden_sizes": [1024, 512, 256],
        "pooling": "attention",
        "initializer_range": 0.06,
    },
    # Reads the tokens of a frozen teacher and gives its features at any coordinate: 0.6 M parameters at F = 192.
    "dense": {
        "image_size": 448,  # twice the side of what a teacher usually sees
        "patch_size": 8,
        "trigger_source": "tokens",
        "local_patch": True,
        "local_patch_scales": [1, 2, 4],
        "position_size": 64,
        "hidden_sizes": [256],
        "hidden_act": "gelu",
        "num_residual_blocks": 2,
        "use_rgb_head": False,
        "pooling": "mean",
        "initializer_range": 0.06,
    },
    # Reads pixels through local columns: a small student for new photos, 1.6 M parameters at F = 192.
    "student": {
        "image_size": 224,
        "patch_size": 16,
        "trigger_source": "columns",
        "trigger_channels": 192,
        "num_column_blocks": 3,
        "position_size": 64,
        "hidden_sizes": [256],
        "hidden_act": "gelu",
        "num_residual_blocks": 1,
        "use_rgb_head": False,
        "pooling": "attention",
        "initializer_range": 0.06,
    },
    # For tests and the embedded demo. In its narrow layers the usual 0.02 would make every feature vanish;
    # 0.1 is He's sqrt(2 / fan_in) for a fan-in of 200.
    "tiny": {
        "image_size": 96,
        "patch_size": 8,
        "position_size": 64,
        "hidden_sizes": [256, 256, 128],
        "feature_size": 144,
        "rgb_hidden_sizes": [64, 64],
        "pooling": "mean",
        "initializer_range": 0.1,
    },
}

# Fields that transformers and its Trainer write into or pass to configurations, besides the declared ones.
_WRITTEN_BY_LIBRARIES = set(vars(GenerationConfig())) | {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
}


def _wrong_types_are_value_errors(cls):
    """Raise a `ValueError` for a field of another type, as for other errors, at construction and on assignment."""
    set_strictly = cls.__setattr__

    def set_attribute(self, name, value):
        try:
            set_strictly(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"{name}: {' '.join(str(error.__cause__ or error).split())}") from error

    cls.__setattr__ = set_attribute
    return cls


@_wrong_types_are_value_errors
@strict
class APMConfig(PreTrainedConfig):
    r"""
    Configure the architecture of an [`APMModel`].

    Args:
        image_size (`int`, defaults to 448): side of the square input, in pixels; a multiple of `patch_size`.
        patch_size (`int`, defaults to 14): side of a grid cell, in pixels.
        num_channels (`int`, defaults to 3): channels of the input image.
        trigger_channels (`int`, defaults to 1): channels of the folding convolution; D is
            trigger_channels * rows * cols. Of local columns, their width D.
        trigger_source (`str`, defaults to `"conv"`): `"conv"` folds the pixels (the paper's T_c); `"embedding"` takes
            the trigger column from the caller, usually the teacher's embedding (the paper's T_vit); `"columns"` folds
            the pixels into a grid of local columns, one a cell, of which every location reads what is interpolated at
            its coordinate and the mean; `"tokens"` takes the teacher's grid of features, from the caller or from
            `teacher_config`, and the network refines what is interpolated from it.
        num_column_blocks (`int`, defaults to 0): blocks of a depthwise convolution and an MLP, after the strided
            convolutions that make local columns.
        trigger_size (`int`, *optional*): D, for `trigger_source="embedding"`, where it defaults to `feature_size`.
        local_patch (`bool`, defaults to `False`): put the image patch around each location into its query (I_xy).
        local_patch_scales (`list[int]`, defaults to `[1]`): the windows of the local patch, in patches: scale s is a
            window of s * patch_size pixels, averaged over s x s pixels, so that every scale has patch_size x
            patch_size samples: fine in the middle, coarse around it.
        position_size (`int`, defaults to 1024): P, width of the 2-D sin-cos position code; a multiple of 4.
        hidden_sizes (`list[int]`): widths of the MLP's layers, each Linear + activation.
        num_residual_blocks (`int`, defaults to 0): instead of the MLP, this many residual blocks (LayerNorm, Linear,
            activation, Linear) of the width `hidden_sizes[0]`, and a LayerNorm.
        hidden_act (`str`, defaults to `"relu"`): activation of the MLP.
        feature_size (`int`, defaults to 1024): F, width of the teacher's features.
        feature_mean (`list[float]`, *optional*): F means of the teacher's features. The network then predicts in a
            standardised space, and its outputs are mapped to the teacher's: times `feature_std`, plus this.
        feature_std (`list[float]` or `float`, *optional*): their F standard deviations; or one for all channels, which
            preserves directions, hence cosines.
        teacher_heads (`dict[str, dict]`, *optional*): heads for additional teachers by name, each with its
            `feature_size` and, optionally, `feature_mean`, `feature_std` and `pooling`.
        num_levels (`int`, defaults to 0): number of levels to predict per location, GLOM's column of embeddings
            (arXiv:2102.12627), usually the teacher's layers from low (parts) to high (wholes).
        level_size (`int`, *optional*): width of a level; `feature_size` by default.
        use_rgb_head (`bool`, defaults to `True`): also decode the colour of each location.
        rgb_hidden_sizes (`list[int]`): widths of the RGB head's hidden layers.
        pooling (`str`, defaults to `"mean"`): `"mean"` (paper) or `"attention"`.
        pooling_num_heads (`int`, defaults to 8): heads of the attention pooling; divides `feature_size`.
        initializer_range (`float`, defaults to 0.02): standard deviation of initial weights.
        text_config (`dict` or `PreTrainedConfig`, *optional*): text tower of [`APMForZeroShotImageClassification`].
        text_projection (`bool`, defaults to `True`): whether a linear map follows the text tower (CLIP's: yes,
            SigLIP's: no).
        logit_scale_init_value (`float`, defaults to 4.6052): log of the temperature; log(100), as in the paper's
            `cosine * 100`.
        teacher_config (`dict` or `PreTrainedConfig`, *optional*): the frozen teacher inside the model, with
            `trigger_source="tokens"`: any vision model whose last hidden state is its features.
        teacher_source (`dict`, *optional*): where the teacher's weights are loaded from, instead of being saved with
            the model: `name` on the Hub, `revision` or None, and `sha256` as [`APMModel.set_teacher`] computes it.
        distilled_from (`list[dict]`, *optional*): the teachers whose licences the model inherits, each with a public
            `name` and, as far as known, `license`, `revision`, `dataset` and `sha256`, of its weights; None means
            unknown.

    Raises:
        ValueError: for a value that fits no architecture or a field that does not exist.

    Example:

    ```python
    >>> from apm_hf import APMConfig, APMModel

    >>> model = APMModel(APMConfig.preset("clip-ttt", feature_size=512))
    ```"""

    model_type = "apm"
    sub_configs = {"text_config": AutoConfig, "teacher_config": AutoConfig}
    attribute_map = {"hidden_size": "feature_size"}  # the usual name of the width of `last_hidden_state`

    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    trigger_channels: int = 1
    trigger_source: str = "conv"
    num_column_blocks: int = 0
    trigger_size: int | None = None
    local_patch: bool = False
    local_patch_scales: list[int] | tuple[int, ...] = (1,)
    position_size: int = 1024
    hidden_sizes: list[int] | tuple[int, ...] = (4096, 4096, 4096, 2048, 1024)
    num_residual_blocks: int = 0
    hidden_act: str = "relu"
    feature_size: int = 1024
    feature_mean: list[float | int] | tuple[float | int, ...] | None = None
    feature_std: list[float | int] | tuple[float | int, ...] | float | int | None = None
    teacher_heads: dict | None = None
    num_levels: int = 0
    level_size: int | None = None
    use_rgb_head: bool = True
    rgb_hidden_sizes: list[int] | tuple[int, ...] = (256, 256)
    pooling: str = "mean"
    pooling_num_heads: int = 8
    initializer_range: float | int = 0.02
    text_config: dict | PreTrainedConfig | None = None
    text_projection: bool = True
    logit_scale_init_value: float | int = 4.6052
    teacher_config: dict | PreTrainedConfig | None = None
    teacher_source: dict | None = None
    distilled_from: list[dict] | None = None

    def __post_init__(self, **kwargs):
        _check_typed(kwargs, all_are_fields=True)
        self.hidden_sizes = list(self.hidden_sizes)
        self.rgb_hidden_sizes = list(self.rgb_hidden_sizes)
        self.local_patch_scales = list(self.local_patch_scales)
        for name in ("feature_mean", "feature_std"):
            values = getattr(self, name)
            setattr(self, name, list(values) if isinstance(values, tuple) else values)
        if self.teacher_heads:  # sorted as in JSON, so that parameters have one order
            self.teacher_heads = {
                name: copy.deepcopy(head) for name, head in sorted(self.teacher_heads.items(), key=str)
            }
        for name in self.sub_configs:
            if isinstance(value := getattr(self, name), dict):
                if "model_type" not in value:
                    raise ValueError(f"{name}: expected a key 'model_type', got {sorted(value)}")
                values = dict(value)
                setattr(self, name, AutoConfig.for_model(values.pop("model_type"), **values))
        # Checked here as well as by @strict, so that users get a plain ValueError.
        self.validate_architecture()
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for an invalid combination of fields."""
        for name in ("image_size", "patch_size", "num_channels", "trigger_channels", "feature_size", "position_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {getattr(self, name)}")
        widths = [getattr(self, name) for name in _SIZES] + [*self.hidden_sizes, *self.rgb_hidden_sizes]
        if too_large := [width for width in widths if width is not None and width > MAX_SIZE]:
            raise ValueError(f"sizes: expected at most {MAX_SIZE:,} everywhere, got {too_large[0]:,}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size: expected a multiple of patch_size={self.patch_size}, got image_size={self.image_size}"
            )
        if self.position_size % 4:
            raise ValueError(
                "position_size: expected a multiple of 4 (sine and cosine of rows and of columns), "
                f"got {self.position_size}"
            )
        self._expect_one_of("trigger_source", ("conv", "embedding", "columns", "tokens"))
        if self.trigger_source == "columns" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(f"patch_size: expected a power of 2 with trigger_source='columns', got {self.patch_size}")
        if self.num_column_blocks < 0 or (self.num_column_blocks and self.trigger_source != "columns"):
            raise ValueError(
                "num_column_blocks: expected 0, or more with trigger_source='columns', got "
                f"{self.num_column_blocks} with trigger_source={self.trigger_source!r}"
            )
        check_pooling("", self.pooling, self.feature_size, self.pooling_num_heads)
        check_statistics("", self.feature_size, self.feature_mean, self.feature_std)
        check_teacher_heads(self.teacher_heads or {}, self.pooling, self.pooling_num_heads)
        check_origins(self.distilled_from or [])
        if self.trigger_size is not None and self.folds_pixels and self.trigger_size != self.trigger_width:
            product = "trigger_channels * rows * cols" if self.trigger_source == "conv" else "trigger_channels"
            raise ValueError(
                f"trigger_size: expected {product} with trigger_source={self.trigger_source!r}, that is "
                f"{self.trigger_width}, got {self.trigger_size}"
            )
        if self.trigger_size is not None and self.trigger_size < 1:
            raise ValueError(f"trigger_size: expected a positive integer, got {self.trigger_size}")
        scales = self.local_patch_scales
        if not scales or len(set(scales)) < len(scales) or any(s < 1 or self.image_size % s for s in scales):
            raise ValueError(
                f"local_patch_scales: expected different divisors of image_size={self.image_size}, got {list(scales)}"
            )
        if self.num_levels < 0:
            raise ValueError(f"num_levels: expected 0 or more, got {self.num_levels}")
        if self.level_size is not None and (self.level_size < 1 or not self.num_levels):
            raise ValueError(
                f"level_size: expected a positive integer with num_levels >= 1, got {self.level_size} "
                f"with num_levels={self.num_levels}"
            )
        if self.trigger_source == "tokens" and self.trigger_size not in (None, self.feature_size):
            raise ValueError(
                f"trigger_size: expected feature_size={self.feature_size} with trigger_source='tokens', got "
                f"{self.trigger_size}"
            )
        check_teacher_source(self)
        if self.num_residual_blocks < 0 or (self.num_residual_blocks and len(self.hidden_sizes) != 1):
            raise ValueError(
                "num_residual_blocks: expected 0, or more with one width in hidden_sizes, got "
                f"{self.num_residual_blocks} with {list(self.hidden_sizes)}"
            )
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes: expected at least one positive width, got {list(self.hidden_sizes)}")
        if any(size < 1 for size in self.rgb_hidden_sizes):
            raise ValueError(f"rgb_hidden_sizes: expected positive widths, got {list(self.rgb_hidden_sizes)}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act: expected one of {sorted(ACT2FN)}, got {self.hidden_act!r}")
        if not self.initializer_range > 0:
            raise ValueError(f"initializer_range: expected a positive number, got {self.initializer_range}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Make a configuration from a file's fields, including unknown ones, and `kwargs`, which are checked.

        Raises:
            ValueError: for misspelt `kwargs`, fields that do not fit together, or another kind of model.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(f"model_type: expected {cls.model_type!r}, got a configuration of {kind!r}")
        _check_typed(kwargs, all_are_fields=False)  # some may be for a model
        known = {field.name for field in fields(cls)} | _WRITTEN_BY_LIBRARIES
        unknown = {
            name: value for name, value in config_dict.items() if name not in known and not name.startswith("_")
        }
        config_dict = {name: value for name, value in config_dict.items() if name not in unknown}
        wants_unused = kwargs.get("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, **{**kwargs, "return_unused_kwargs": True})
        if unknown:  # from a later version, or added by a user
            logger.warning(f"APMConfig keeps unknown fields: {', '.join(sorted(unknown))}")
        for name, value in unknown.items():
            setattr(config, name, value)
        config.validate_architecture()  # including the fields that the caller set
        return (config, unused) if wants_unused else config

    def _expect_one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name}: expected one of {list(choices)}, got {getattr(self, name)!r}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "APMConfig":
        """Return an architecture: `"dinov2-large"` or `"clip-ttt"`, as published, `"paper"`, `"student"`, `"dense"` or
        `"tiny"`.

        Args:
            name: one of `PRESETS`.
            **overrides: fields that replace those of the preset, e.g. `feature_size=512`.

        Raises:
            ValueError: for an unknown preset or field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})

    def teacher_head(self, name: str | None) -> dict[str, Any]:
        """Return `feature_size`, `feature_mean`, `feature_std` and `pooling` of a head.

        Args:
            name: one of `teacher_heads`; None or empty is the main head.

        Raises:
            ValueError: for an unknown name.
        """
        if not name:
            return {field: getattr(self, field) for field in HEAD_FIELDS}
        heads = self.teacher_heads or {}
        if name not in heads:
            raise ValueError(f"head: expected one of {sorted(heads)}, got {name!r}")
        return {"feature_mean": None, "feature_std": None, "pooling": self.pooling, **heads[name]}

    def set_feature_statistics(self, mean: Any, std: Any, *, head: str | None = None) -> dict[str, Any]:
        """Set and return `feature_mean` and `feature_std` of the main head or of one of `teacher_heads`.

        Args:
            mean: `(F,)`: a list, array or tensor.
            std: `(F,)`, or one number for all channels.

        Raises:
            ValueError: for an unknown head, another number of values than F, values that are not finite, or deviations
                that are not positive.
        """
        statistics = plain_statistics(mean, std)
        where = "" if not head else f"teacher_heads[{head!r}]: "
        check_statistics(where, self.teacher_head(head)["feature_size"], *statistics.values())
        if not head:
            self.feature_mean, self.feature_std = statistics["feature_mean"], statistics["feature_std"]
        elif self.teacher_heads is not None:
            self.teacher_heads[head].update(statistics)
        return statistics

    def with_head(self, name: str) -> "APMConfig":
        """Return the architecture with only the head of the teacher `name`: see [`APMModel.with_head`].

        Raises:
            ValueError: for an unknown name.
        """
        config = copy.deepcopy(self)
        # Widths that default to the main head's are fixed at their current values.
        config.trigger_size, config.level_size = self.trigger_width, self.level_width if self.num_levels else None
        config.teacher_heads, config.text_config, config.use_rgb_head = None, None, False
        for field, value in self.teacher_head(name).items():
            setattr(config, field, copy.deepcopy(value))
        return config

    def features_only(self, *, pooling: str | None = None) -> "APMConfig":
        """Return the architecture without colours, levels and additional teachers' heads.

        Args:
            pooling: replaces the current one.
        """
        config = copy.deepcopy(self)
        config.trigger_size = self.trigger_width  # else it would default to feature_size
        config.level_size, config.num_levels = None, 0
        config.teacher_heads, config.use_rgb_head = None, False
        config.pooling = self.pooling if pooling is None else pooling
        return config

    @property
    def grid_size(self) -> int:
        """Return the number of rows (and of columns) of the grid of locations."""
        return self.image_size // self.patch_size

    @property
    def num_locations(self) -> int:
        """Return L of the full grid: rows * cols."""
        return self.grid_size**2

    @property
    def trigger_width(self) -> int:
        """Return D, the width of the trigger column."""
        if self.trigger_source == "conv":
            return self.trigger_channels * self.num_locations
        if self.trigger_source == "columns":
            return self.trigger_channels
        return self.trigger_size if self.trigger_size is not None else self.feature_size

    @property
    def folds_pixels(self) -> bool:
        """Return whether the trigger is made from the image alone, without a teacher."""
        return self.trigger_source in ("conv", "columns")

    @property
    def trigger_is_grid(self) -> bool:
        """Return whether the trigger is a grid `(B, rows, cols, D)`, interpolated at each location, of any size."""
        return self.trigger_source in ("columns", "tokens")

    @property
    def local_patch_width(self) -> int:
        """Return Q, the width of the local patch in the query; 0 without it."""
        scales = len(self.local_patch_scales)
        return self.num_channels * self.patch_size**2 * scales if self.local_patch else 0

    @property
    def level_width(self) -> int:
        """Return the width of one level."""
        return self.feature_size if self.level_size is None else self.level_size

    @property
    def query_width(self) -> int:
        """Return D + Q + P, the width of the query."""
        return self.trigger_width + self.local_patch_width + self.position_size


def _check_typed(names: Iterable[str], *, all_are_fields: bool) -> None:
    """Raise a `ValueError` for a misspelt name or, if all should be fields, for any other name."""
    known = {field.name for field in fields(APMConfig)}
    for name in names:
        if name in known | _WRITTEN_BY_LIBRARIES or name.startswith("_"):
            continue
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.6 if all_are_fields else 0.8):
            raise ValueError(f"APMConfig has no field {name!r}; did you mean {close[0]!r}?")
        if all_are_fields:
            raise ValueError(f"APMConfig has no field {name!r}; its fields are {sorted(known)}")


def check_statistics(where: str, feature_size: int, mean: Any, std: Any) -> None:
    """Raise a `ValueError` unless both are None, or there are a mean and a deviation (or one for all) per channel.

    Args:
        where: prefix of the fields' names in messages.
        feature_size: F.
    """
    if (mean is None) != (std is None):
        missing, given = ("feature_mean", "feature_std") if mean is None else ("feature_std", "feature_mean")
        raise ValueError(f"{where}{missing}: expected it beside {given}, got None")
    if mean is None:
        return
    for name, values in (("feature_mean", mean), ("feature_std", [std] * feature_size if _is_number(std) else std)):
        if not isinstance(values, list | tuple) or len(values) != feature_size:
            got = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)
            raise ValueError(f"{where}{name}: expected feature_size={feature_size} numbers, got {got}")
        for channel, value in enumerate(values):
            if not _is_number(value) or not math.isfinite(value) or (name == "feature_std" and value <= 0):
                kind = "positive finite" if name == "feature_std" else "finite"
                raise ValueError(f"{where}{name}: expected {kind} numbers, got {value!r} in channel {channel}")


def check_pooling(where: str, pooling: str, feature_size: int, num_heads: int) -> None:
    """Raise a `ValueError` for a pooling that is unknown or does not fit the features' width."""
    if pooling not in POOLINGS:
        raise ValueError(f"{where}pooling: expected one of {list(POOLINGS)}, got {pooling!r}")
    if pooling == "attention":
        if num_heads < 1 or feature_size % num_heads:
            raise ValueError(
                f"{where}pooling_num_heads: expected a divisor of feature_size={feature_size}, got {num_heads}"
            )
        if feature_size % 4:
            raise ValueError(
                f"{where}feature_size: expected a multiple of 4 with pooling='attention', got {feature_size}"
            )


def check_teacher_heads(heads: Any, pooling: str, pooling_num_heads: int) -> None:
    """Raise a `ValueError` unless `heads` is `{name: {"feature_size": F, ...}}` with fields of `HEAD_FIELDS`.

    Args:
        pooling, pooling_num_heads: defaults of the heads.
    """
    taken = nn.ModuleDict()  # names of its attributes cannot be names of modules
    for name, head in heads.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or hasattr(taken, name):
            raise ValueError(
                "teacher_heads: expected names of letters, digits, - and _, none of them an attribute of ModuleDict, "
                f"got {name!r}"
            )
        where = f"teacher_heads[{name!r}]: "
        if not isinstance(head, dict) or "feature_size" not in head or not head.keys() <= set(HEAD_FIELDS):
            got = sorted(head) if isinstance(head, dict) else repr(head)
            raise ValueError(f"{where}expected feature_size and any of {list(HEAD_FIELDS[1:])}, got {got}")
        size = head["feature_size"]
        if type(size) is not int or size < 1:
            raise ValueError(f"{where}feature_size: expected a positive integer, got {size!r}")
        check_statistics(where, size, head.get("feature_mean"), head.get("feature_std"))
        check_pooling(where, head.get("pooling", pooling), size, pooling_num_heads)


def check_teacher_source(config: "APMConfig") -> None:
    """Raise a `ValueError` for a teacher inside a model that reads no tokens, or a source without its fields."""
    if config.teacher_config is not None and config.trigger_source != "tokens":
        raise ValueError(
            f"teacher_config: expected None with trigger_source={config.trigger_source!r}, which reads no tokens"
        )
    if (source := config.teacher_source) is None:
        return
    if config.teacher_config is None:
        raise ValueError("teacher_source: expected None without teacher_config")
    if set(source) != set(SOURCE_FIELDS) or not all(source[field] for field in ("name", "sha256")):
        raise ValueError(f"teacher_source: expected {list(SOURCE_FIELDS)}, got {source}")
    check_origins([{"name": source["name"]}])


def check_origins(origins: Sequence[Any]) -> None:
    """Raise a `ValueError` unless every entry has a public `name` and otherwise texts or None of `ORIGIN_FIELDS`."""
    for index, origin in enumerate(origins):
        where = f"distilled_from[{index}]"
        if not isinstance(origin, dict) or "name" not in origin or not origin.keys() <= set(ORIGIN_FIELDS):
            got = sorted(origin) if isinstance(origin, dict) else repr(origin)
            raise ValueError(f"{where}: expected name and any of {list(ORIGIN_FIELDS[1:])}, got {got}")
        for field, value in origin.items():
            if not (value is None and field != "name") and not (isinstance(value, str) and value.strip()):
                raise ValueError(f"{where}: expected {field} to be a non-empty text, got {value!r}")
        for field in ("name", "dataset"):
            value = origin.get(field) or ""
            if value.startswith((".", "~", "/")) or "\\" in value or value.count("/") > 1:
                raise ValueError(
                    f"{where}: expected {field} to be public, such as 'user/name' or the last part of a folder's "
                    f"path, got {value!r}"
                )


def plain_statistics(mean: Any, std: Any) -> dict[str, Any]:
    """Convert `feature_mean` and `feature_std` from tensors, arrays or lists to JSON values.

    Nine digits are exact for float32 and leave a configuration of a thousand channels readable.
    """

    def plain(values: Any) -> Any:
        values = values.tolist() if hasattr(values, "tolist") else values
        if values is None or _is_number(values):
            return values if values is None else float(f"{values:.9g}")
        return [float(f"{value:.9g}") for value in values]

    return {"feature_mean": plain(mean), "feature_std": plain(std)}


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


APMConfig.register_for_auto_class()  # saved models include their code, for `trust_remote_code=True`

__all__ = ["APMConfig", "PRESETS"]
