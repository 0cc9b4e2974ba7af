"""Configuration of the Asynchronous Perception Machine (APM).

Architecture, and of its teachers what a model needs or inherits: no learning rates and no paths.
Source: Modi & Rawat, NeurIPS 2024, arXiv:2410.20535, Fig. 1.

Legend: D trigger width, Q local-patch width, P position width, F feature width, (rows, cols) the grid of locations.
"""

import copy
import difflib
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedConfig

from .configuration_apm_teachers import (
    HEAD_FIELDS,
    check_origins,
    check_pooling,
    check_statistics,
    check_teacher_heads,
    plain_statistics,
)

PRESETS: dict[str, dict[str, Any]] = {
    # The release's COCO model: 54.3 M parameters, student of DINOv2 ViT-L/14 with registers.
    "dinov2-large": {"hidden_sizes": [4096, 4096, 4096, 2048, 1024], "feature_size": 1024, "pooling": "mean"},
    # The release's test-time-training model: 22.8 M parameters, student of CLIP ViT-L/14.
    "clip-ttt": {"hidden_sizes": [4096, 2048, 1024], "feature_size": 768, "pooling": "attention"},
    # For tests and the embedded demo. Its layers are so narrow that the usual 0.02 would make every feature vanish;
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

# Where the Auto classes find APM's in a folder or repository whose files stand beside this one: what is loaded with
# `trust_remote_code=True` by those who have not installed the package.
AUTO_MAP: dict[str, Any] = {
    "AutoConfig": "configuration_apm.APMConfig",
    "AutoModel": "modeling_apm.APMModel",
    "AutoModelForImageClassification": "modeling_apm_heads.APMForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_apm_heads.APMForSemanticSegmentation",
    "AutoModelForZeroShotImageClassification": "modeling_apm_heads.APMForZeroShotImageClassification",
    "AutoImageProcessor": {
        "torchvision": "image_processing_apm.APMImageProcessor",
        "pil": "image_processing_pil_apm.APMImageProcessorPil",
    },
}


def travelling_classes() -> dict[str, Any]:
    """The classes that `AUTO_MAP` names.

    transformers copies, and fetches, the files it finds in import lines such as these: thanks to them every saved
    configuration takes all of APM's code along.
    """
    from .image_processing_apm import APMImageProcessor
    from .image_processing_pil_apm import APMImageProcessorPil
    from .modeling_apm import APMModel
    from .modeling_apm_heads import APMForImageClassification, APMForSemanticSegmentation
    from .modeling_apm_heads import APMForZeroShotImageClassification  # isort: skip

    return {
        "AutoConfig": APMConfig,
        "AutoModel": APMModel,
        "AutoModelForImageClassification": APMForImageClassification,
        "AutoModelForSemanticSegmentation": APMForSemanticSegmentation,
        "AutoModelForZeroShotImageClassification": APMForZeroShotImageClassification,
        "AutoImageProcessor": {"torchvision": APMImageProcessor, "pil": APMImageProcessorPil},
    }


# Keyword arguments that transformers itself gives to a config beside the declared fields.
_TRANSFORMERS_KWARGS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
}


# Options of `from_pretrained` that may be left when a configuration is made, and are none of its fields: a pipeline
# gives its `model_kwargs` to configurations too, `output_size` for APMForSemanticSegmentation among them.
_LOADING_KWARGS = {"code_revision", "commit_hash", "dtype", "output_size", "return_unused_kwargs", "trust_remote_code"}


def _wrong_types_are_value_errors(cls):
    """A field of another type is an error like every other in a field, whether it is given or set later."""
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
    Architecture of an [`APMModel`].

    Args:
        image_size (`int`, defaults to 448): side of the square input, in pixels; a multiple of `patch_size`.
        patch_size (`int`, defaults to 14): side of a grid cell, in pixels.
        num_channels (`int`, defaults to 3): channels of the input image.
        trigger_channels (`int`, defaults to 1): channels of the folding convolution; D is
            trigger_channels * rows * cols.
        trigger_source (`str`, defaults to `"conv"`): `"conv"` folds the pixels (the paper's T_c); `"embedding"` takes
            the trigger column from the caller, as a rule the teacher's own embedding (the paper's T_vit).
        trigger_size (`int`, *optional*): D, for `trigger_source="embedding"`, where it defaults to `feature_size`.
        local_patch (`bool`, defaults to `False`): put the image patch around each location into its query (I_xy).
        local_patch_scales (`list[int]`, defaults to `[1]`): the windows of the local patch, in patches: scale s is a
            window of s * patch_size pixels, averaged over s x s pixels, so that every scale is seen in patch_size x
            patch_size samples: fine in the middle, coarse around it.
        position_size (`int`, defaults to 1024): P, width of the 2-D sin-cos position code; a multiple of 4.
        hidden_sizes (`list[int]`): widths of the MLP's layers, each Linear + activation.
        hidden_act (`str`, defaults to `"relu"`): activation of the MLP.
        feature_size (`int`, defaults to 1024): F, width of the teacher's features.
        feature_mean (`list[float]`, *optional*): F means of the teacher's features. The network then answers in a
            standardised space, and its answers are mapped to the teacher's own: times `feature_std`, plus this.
        feature_std (`list[float]` or `float`, *optional*): their F standard deviations; or one for all channels, which
            leaves directions, hence cosines, as they are.
        teacher_heads (`dict[str, dict]`, *optional*): heads for further teachers by name, each with its `feature_size`
            and, where wanted, `feature_mean`, `feature_std` and a `pooling` of its own.
        num_levels (`int`, defaults to 0): also predict so many levels per location, GLOM's column of embeddings
            (arXiv:2102.12627), as a rule the teacher's layers from low (parts) to high (wholes).
        level_size (`int`, *optional*): width of a level; `feature_size` by default.
        use_rgb_head (`bool`, defaults to `True`): also decode the colour of each location.
        rgb_hidden_sizes (`list[int]`): widths of the RGB head's hidden layers.
        pooling (`str`, defaults to `"mean"`): `"mean"` (paper) or `"attention"`.
        pooling_num_heads (`int`, defaults to 8): heads of the attention pooling; divides `feature_size`.
        initializer_range (`float`, defaults to 0.02): standard deviation of freshly drawn weights.
        text_config (`dict` or `PreTrainedConfig`, *optional*): text tower of [`APMForZeroShotImageClassification`].
        text_projection (`bool`, defaults to `True`): whether a linear map follows the text tower (CLIP's: yes,
            SigLIP's: no).
        logit_scale_init_value (`float`, defaults to 4.6052): log of the temperature; log(100), as in the paper's
            `cosine * 100`.
        distilled_from (`list[dict]`, *optional*): the teachers whose obligations the model inherits, each with a
            public `name` and, as far as known, `license`, `revision` and `dataset`, where None means unknown.

    Raises:
        ValueError: for a value that fits no architecture or a field that does not exist; says what was expected.

    Example:

    ```python
    >>> from apm_hf import APMConfig, APMModel

    >>> model = APMModel(APMConfig.preset("clip-ttt", feature_size=512))
    ```"""

    model_type = "apm"
    sub_configs = {"text_config": AutoConfig}

    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    trigger_channels: int = 1
    trigger_source: str = "conv"
    trigger_size: int | None = None
    local_patch: bool = False
    local_patch_scales: list[int] | tuple[int, ...] = (1,)
    position_size: int = 1024
    hidden_sizes: list[int] | tuple[int, ...] = (4096, 4096, 4096, 2048, 1024)
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
    distilled_from: list[dict] | None = None

    def __post_init__(self, **kwargs):
        self._reject_unknown_fields(kwargs)
        self.hidden_sizes = list(self.hidden_sizes)
        self.rgb_hidden_sizes = list(self.rgb_hidden_sizes)
        self.local_patch_scales = list(self.local_patch_scales)
        for name in ("feature_mean", "feature_std"):
            values = getattr(self, name)
            setattr(self, name, list(values) if isinstance(values, tuple) else values)
        if self.teacher_heads:  # as JSON sorts them, so that parameters have one order
            self.teacher_heads = {
                name: copy.deepcopy(head) for name, head in sorted(self.teacher_heads.items(), key=str)
            }
        if isinstance(self.text_config, dict):
            if "model_type" not in self.text_config:
                raise ValueError(f"text_config: expected a key 'model_type', got {sorted(self.text_config)}")
            text_config = dict(self.text_config)
            self.text_config = AutoConfig.for_model(text_config.pop("model_type"), **text_config)
        # Checked here as well as by @strict: the error that reaches the user is then a plain ValueError.
        self.validate_architecture()
        super().__post_init__(**kwargs)

    @classmethod
    def _reject_unknown_fields(cls, kwargs: dict[str, Any]) -> None:
        known = {field.name for field in fields(cls)}
        for name in kwargs:
            if name.startswith("_") or name in _TRANSFORMERS_KWARGS:
                continue
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; its fields are {sorted(known)}"
            raise ValueError(f"APMConfig has no field {name!r}{hint}")

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for a combination of fields that describes no model."""
        for name in ("image_size", "patch_size", "num_channels", "trigger_channels", "feature_size", "position_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive integer, got {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size: expected a multiple of patch_size={self.patch_size}, got image_size={self.image_size}"
            )
        if self.position_size % 4:
            raise ValueError(
                "position_size: expected a multiple of 4 (sine and cosine of rows and of columns), "
                f"got {self.position_size}"
            )
        self._expect_one_of("trigger_source", ("conv", "embedding"))
        check_pooling("", self.pooling, self.feature_size, self.pooling_num_heads)
        check_statistics("", self.feature_size, self.feature_mean, self.feature_std)
        check_teacher_heads(self.teacher_heads or {}, self.pooling, self.pooling_num_heads)
        check_origins(self.distilled_from or [])
        if self.trigger_size is not None and self.trigger_source == "conv" and self.trigger_size != self.trigger_width:
            raise ValueError(
                "trigger_size: expected trigger_channels * rows * cols with trigger_source='conv', "
                f"that is {self.trigger_width}, got {self.trigger_size}"
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
                f"level_size: expected a positive integer beside num_levels >= 1, got {self.level_size} "
                f"with num_levels={self.num_levels}"
            )
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes: expected at least one positive width, got {list(self.hidden_sizes)}")
        if any(size < 1 for size in self.rgb_hidden_sizes):
            raise ValueError(f"rgb_hidden_sizes: expected positive widths, got {list(self.rgb_hidden_sizes)}")
        from transformers.activations import ACT2FN  # with what it imports, as slow to load as torch

        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act: expected one of {sorted(ACT2FN)}, got {self.hidden_act!r}")
        if not self.initializer_range > 0:
            raise ValueError(f"initializer_range: expected a positive number, got {self.initializer_range}")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, which forgets what it does not know: here a misspelt field is an error.

        Raises:
            ValueError: for fields that do not exist, that do not fit together, or of another kind of model.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(f"model_type: expected {cls.model_type!r}, got a configuration of {kind!r}")
        wants_unused = kwargs.get("return_unused_kwargs", False)
        config, unused = super().from_dict(config_dict, **{**kwargs, "return_unused_kwargs": True})
        config.validate_architecture()  # with the fields that the caller set
        # Where the caller asks for what is left, some of it may be meant for a model.
        left = {name: value for name, value in unused.items() if name not in _LOADING_KWARGS}
        cls._reject_unknown_fields({name: left[name] for name in left if not wants_unused or _resembles_field(name)})
        return (config, unused) if wants_unused else config

    def save_pretrained(self, save_directory, *args, **kwargs):
        # Whatever was saved before, the files that are written now lie in this folder; a subclass keeps its own entry.
        own = {name: path for name, path in (getattr(self, "auto_map", None) or {}).items() if "--" not in path}
        self.auto_map = {**AUTO_MAP, **own}
        super().save_pretrained(save_directory, *args, **kwargs)

    def _expect_one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name}: expected one of {list(choices)}, got {getattr(self, name)!r}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "APMConfig":
        """The published architectures `"dinov2-large"` and `"clip-ttt"`, and `"tiny"` for tests and the demo.

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
        """`feature_size`, `feature_mean`, `feature_std` and `pooling` of a head.

        Args:
            name: of one of `teacher_heads`; None or empty is the main head.

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
        """Set and return `feature_mean` and `feature_std`, of the main head or of one of `teacher_heads`.

        Args:
            mean: `(F,)`: a list, array or tensor.
            std: `(F,)`, or one number for all channels.

        Raises:
            ValueError: for an unknown head, and for numbers that are not F, not finite or no deviations.
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
        """The architecture whose main, and only, head is the one of the teacher `name`: see [`APMModel.with_head`].

        Raises:
            ValueError: for an unknown name.
        """
        config = copy.deepcopy(self)
        # Widths that follow the main head's by default stay what they are.
        config.trigger_size, config.level_size = self.trigger_width, self.level_width if self.num_levels else None
        config.teacher_heads, config.text_config, config.use_rgb_head = None, None, False
        for field, value in self.teacher_head(name).items():
            setattr(config, field, copy.deepcopy(value))
        return config

    @property
    def grid_size(self) -> int:
        """Rows, and columns, of the grid of locations."""
        return self.image_size // self.patch_size

    @property
    def num_locations(self) -> int:
        """L of the full grid: rows * cols."""
        return self.grid_size**2

    @property
    def trigger_width(self) -> int:
        """D, the width of the trigger column."""
        if self.trigger_source == "conv":
            return self.trigger_channels * self.num_locations
        return self.trigger_size if self.trigger_size is not None else self.feature_size

    @property
    def local_patch_width(self) -> int:
        """Q, the width of the local patch in the query; 0 without it."""
        scales = len(self.local_patch_scales)
        return self.num_channels * self.patch_size**2 * scales if self.local_patch else 0

    @property
    def level_width(self) -> int:
        """Width of one level."""
        return self.feature_size if self.level_size is None else self.level_size

    @property
    def query_width(self) -> int:
        """D + Q + P."""
        return self.trigger_width + self.local_patch_width + self.position_size


def _resembles_field(name: str) -> bool:
    return bool(difflib.get_close_matches(name, {field.name for field in fields(APMConfig)}, n=1, cutoff=0.85))


APMConfig.register_for_auto_class()  # what is saved takes its code along, for `trust_remote_code=True`

__all__ = ["AUTO_MAP", "APMConfig", "PRESETS", "travelling_classes"]
