"""Describe the families of models that can be teachers.

A new family is one entry in `VISION_TOWERS` and, if it encodes text too, one in `DUAL_ENCODERS`; the descriptions are
used in `apm_hf.teachers.vision` and `apm_hf.teachers.text`. The tests check the token order of every family.

Legend: B images, T tokens, (rows, cols) the grid of patches, C width of the vision tower, F width of the embeddings.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

LinearHead = nn.Linear | None


def _run(tower: Any, pixel_values: Tensor, output_hidden_states: bool, **options: Any) -> Any:
    return tower(pixel_values=pixel_values, output_hidden_states=output_hidden_states, **options)


def _linear_head(model: Any) -> LinearHead:
    """Return the linear layer that makes logits. DeiT has a second one, for the distillation token, not used here."""
    head = next((getattr(model, name) for name in ("classifier", "cls_classifier") if hasattr(model, name)), None)
    if isinstance(head, nn.Sequential):  # ResNet and RegNet flatten the pooled features first
        head = head[-1]
    return head if isinstance(head, nn.Linear) else None


def _is_classifier(config: Any) -> bool:
    return any("ForImageClassification" in architecture for architecture in config.architectures or [])


@dataclass(frozen=True)
class VisionTower:
    """Describe one family of vision models; keyed by its `config.model_type`.

    A tower's tensors are tokens `(B, T, C)`, prefix tokens first and patches row-major, or maps `(B, C, rows, cols)`.

    Args:
        num_prefix_tokens: From the tower: number of tokens before the first patch (class, registers, distillation).
        standalone: The tower's image embedding if it is a teacher without a text tower: the first token, the mean of
            the patches, or its `pooler_output`; None if it cannot be one.
        pool: `(tower, patches (..., C)) -> (..., F)`: applies the pooling that makes `pooler_output` to each patch of
            `last_hidden_state`. Used if `pooler_output` is the embedding: `standalone`, and in dual encoders.
        forward: `(tower, pixel_values, output_hidden_states)` -> an object with `last_hidden_state` and, if used,
            `pooler_output` and `hidden_states`.
        bare_options: Keyword arguments of `from_pretrained` for a checkpoint without a head.
        patch_size: From the tower: pixels from one patch, or position of a map, to the next.
        num_layers, hidden_size: From the tower: number of `hidden_states` after the first; C.
        feature_size: From the tower: F if it is a teacher without a text tower; None is C.
        is_classifier: From the config: whether the checkpoint has a classifier.
        tower, head: From a classifier: its backbone, and the linear layer over the image embedding.
    """

    num_prefix_tokens: Callable[[Any], int] = lambda tower: 0
    standalone: Literal["first_token", "mean", "pooler_output"] | None = "first_token"
    pool: Callable[[Any, Tensor], Tensor] = lambda tower, patches: patches
    forward: Callable[[Any, Tensor, bool], Any] = _run
    bare_options: Mapping[str, Any] = field(default_factory=dict)
    patch_size: Callable[[Any], int] = lambda tower: tower.config.patch_size
    num_layers: Callable[[Any], int] = lambda tower: tower.config.num_hidden_layers
    hidden_size: Callable[[Any], int] = lambda tower: tower.config.hidden_size
    feature_size: Callable[[Any], int] | None = None
    is_classifier: Callable[[Any], bool] = _is_classifier
    tower: Callable[[Any], Any] = lambda model: model.base_model
    head: Callable[[Any], LinearHead] = _linear_head


@dataclass(frozen=True)
class DualEncoder:
    """Describe one family of image-text models; keyed by its `config.model_type`.

    Args:
        project: `(model, pooled (..., C)) -> (..., F)`: the map into the space shared with the text.
        feature_size: From the config: F.
        tokenizer_options: How the prompts of a batch are padded to one length.
        lowercase: Whether it was trained on lower case, which not every tokenizer of such checkpoints applies.
    """

    project: Callable[[Any, Tensor], Tensor] = lambda model, pooled: model.visual_projection(pooled)
    feature_size: Callable[[Any], int] = lambda config: config.projection_dim
    tokenizer_options: Mapping[str, Any] = field(default_factory=lambda: {"padding": True})
    lowercase: bool = False


def _class_token(tower: Any) -> int:
    return 1


def _class_and_registers(tower: Any) -> int:
    return 1 + tower.config.num_register_tokens


_interpolate = partial(_run, interpolate_pos_encoding=True)  # DINOv2 does so by default


def _as_first_token(tower: Any, patches: Tensor) -> Tensor:
    # The pooler reads token 0 of each sequence: pass every patch as a separate sequence.
    return tower.pooler(patches.reshape(-1, 1, patches.shape[-1])).unflatten(0, patches.shape[:-1])


def _attention_pool(tower: Any, patches: Tensor) -> Tensor:
    """Apply SigLIP's head to every patch as a separate sequence.

    Attention over one token gives it weight 1 for any query, so this is the head's value and output projection and its
    MLP, without attention: as in MaskCLIP (arXiv:2112.01071, Sec. 3.2), for a head with one learned query.
    """
    return tower.head(patches.reshape(-1, 1, patches.shape[-1])).unflatten(0, patches.shape[:-1])


def _all_in_order(tower: Any, pixel_values: Tensor, output_hidden_states: bool) -> Any:
    """Run MAE without masking: it shuffles patches by sorting noise, then drops `mask_ratio` of them."""
    num_patches = (pixel_values.shape[-2] // tower.config.patch_size) * (
        pixel_values.shape[-1] // tower.config.patch_size
    )
    order = torch.arange(num_patches, device=pixel_values.device, dtype=torch.float32)  # bfloat16 is exact up to 256
    noise = order.expand(len(pixel_values), -1)
    return _interpolate(tower, pixel_values, output_hidden_states, noise=noise)


def _naflex(tower: Any, pixel_values: Tensor, output_hidden_states: bool) -> Any:
    """Run SigLIP 2 NaFlex, which takes patches, flattened with channels last, and the shape of the grid."""
    patch_size = tower.config.patch_size
    rows, cols = pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size
    pixels = pixel_values.unflatten(3, (cols, patch_size)).unflatten(2, (rows, patch_size))
    patches = (
        pixels.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    )  # (B, 3, rows, p, cols, p) -> (B, T, p * p * 3)
    return _run(
        tower,
        patches,
        output_hidden_states,
        pixel_attention_mask=patches.new_ones(patches.shape[:2], dtype=torch.int64),
        spatial_shapes=torch.tensor([[rows, cols]] * len(patches), device=patches.device),
    )


def _resnet_stride(tower: Any) -> int:
    config, stem = tower.config, 4 if tower.config.model_type == "resnet" else 2
    return stem * 2 ** (len(config.depths) - 1 + config.downsample_in_first_stage)


def _efficientnet_stride(tower: Any) -> int:
    return 2 * math.prod(tower.config.strides)


def _timm_forward(model: Any, pixel_values: Tensor, output_hidden_states: bool) -> Any:
    """Run the wrapped timm model, with or without a classifier, and return its features before the logits."""
    wrapped, hidden_states = model.timm_model, None
    if output_hidden_states and not hasattr(wrapped, "forward_intermediates"):
        raise ValueError(f"{model.config.architecture} of timm gives no hidden states: expected `layers` to be None")
    if output_hidden_states:
        last, hidden_states = wrapped.forward_intermediates(pixel_values)  # tokens or maps, and maps
    else:
        last = wrapped.forward_features(pixel_values)
    pooled = wrapped.forward_head(last, pre_logits=True)
    if getattr(wrapped, "output_fmt", "NCHW") == "NHWC":
        last = last.permute(0, 3, 1, 2)
    return SimpleNamespace(last_hidden_state=last, pooler_output=pooled, hidden_states=hidden_states)


def _timm_pool(model: Any, patches: Tensor) -> Tensor:
    """Apply the head's pooling and norm to every location as a separate image."""
    wrapped, width = model.timm_model, patches.shape[-1]
    if hasattr(wrapped, "num_prefix_tokens"):  # a sequence of one patch, for first-token and mean pooling alike
        images = patches.reshape(-1, 1, width).expand(-1, wrapped.num_prefix_tokens + 1, -1)
    elif getattr(wrapped, "output_fmt", "NCHW") == "NHWC":
        images = patches.reshape(-1, 1, 1, width)
    else:
        images = patches.reshape(-1, width, 1, 1)
    return wrapped.forward_head(images, pre_logits=True).flatten(1).unflatten(0, patches.shape[:-1])


def _timm_width(model: Any) -> int:
    wrapped = model.timm_model
    return max(wrapped.num_features, *(stage["num_chs"] for stage in wrapped.feature_info))


def _timm_head(model: Any) -> LinearHead:
    head = model.timm_model.get_classifier()
    return head if isinstance(head, nn.Linear) else None


_VIT: dict[str, Any] = {
    "pool": _as_first_token,
    "forward": _interpolate,
    "bare_options": {"add_pooling_layer": False},  # many checkpoints lack one, and only dual encoders use it
}
_CLIP: dict[str, Any] = {
    "num_prefix_tokens": _class_token,
    "pool": lambda tower, patches: tower.post_layernorm(patches),
    "forward": _interpolate,
    "standalone": None,  # AutoModel would drop its projection: use the full CLIPModel
}
_CONVOLUTIONAL: dict[str, Any] = {
    "standalone": "pooler_output",
    "num_layers": lambda tower: len(tower.config.depths),
    "hidden_size": lambda tower: tower.config.hidden_sizes[-1],
}
_CONVNEXT = _CONVOLUTIONAL | {
    "pool": lambda tower, patches: tower.layernorm(patches),
    "patch_size": lambda tower: tower.config.patch_size * 2 ** (len(tower.config.depths) - 1),
}
VISION_TOWERS: dict[str, VisionTower] = {
    "clip_vision_model": VisionTower(**_CLIP),
    "convnext": VisionTower(**_CONVNEXT),
    "convnextv2": VisionTower(**_CONVNEXT),
    "deit": VisionTower(lambda tower: 2, **_VIT),  # class and distillation token
    "dinov2": VisionTower(_class_token),
    "dinov2_with_registers": VisionTower(_class_and_registers),
    "dinov3_convnext": VisionTower(  # its last state is tokens, the mean of all first, all after the layernorm
        _class_token,
        **_CONVOLUTIONAL | {"standalone": "first_token"},
        patch_size=lambda tower: 4 * 2 ** (len(tower.config.depths) - 1),
    ),
    "dinov3_vit": VisionTower(_class_and_registers),
    "efficientnet": VisionTower(
        standalone="pooler_output",
        patch_size=_efficientnet_stride,
        num_layers=lambda tower: len(tower.encoder.blocks),
        hidden_size=lambda tower: tower.config.hidden_dim,
    ),
    "ijepa": VisionTower(standalone="mean", forward=_interpolate),
    "metaclip_2_vision_model": VisionTower(**_CLIP),
    "regnet": VisionTower(**_CONVOLUTIONAL, patch_size=_resnet_stride),
    "resnet": VisionTower(**_CONVOLUTIONAL, patch_size=_resnet_stride),
    "siglip2_vision_model": VisionTower(standalone=None, pool=_attention_pool, forward=_naflex),
    "siglip_vision_model": VisionTower(standalone=None, pool=_attention_pool, forward=_interpolate),
    "timm_wrapper": VisionTower(
        lambda model: getattr(model.timm_model, "num_prefix_tokens", 0),
        standalone="pooler_output",
        pool=_timm_pool,
        forward=_timm_forward,
        patch_size=lambda model: model.timm_model.feature_info[-1]["reduction"],
        num_layers=lambda model: len(model.timm_model.feature_info) - 1,  # timm's first entry is hidden state 0
        hidden_size=_timm_width,
        feature_size=lambda model: getattr(model.timm_model, "head_hidden_size", model.timm_model.num_features),
        # timm's configs on the Hub have a number of classes and no transformers architecture.
        is_classifier=lambda config: _is_classifier(config) or not config.architectures and config.num_labels > 0,
        tower=lambda model: model,
        head=_timm_head,
    ),
    "vit": VisionTower(_class_token, **_VIT),
    "vit_mae": VisionTower(_class_token, forward=_all_in_order, bare_options={"mask_ratio": 0.0}),
}
_SIGLIP = DualEncoder(
    lambda model, pooled: pooled,  # the head's output is the embedding
    feature_size=lambda config: config.vision_config.hidden_size,
    tokenizer_options={"padding": "max_length"},  # as trained: the last token is read, padding and all
    lowercase=True,
)
DUAL_ENCODERS: dict[str, DualEncoder] = {
    "clip": DualEncoder(),
    "metaclip_2": DualEncoder(),
    "siglip": _SIGLIP,
    "siglip2": _SIGLIP,
    "vision-text-dual-encoder": DualEncoder(),
}
