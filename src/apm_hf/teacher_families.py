"""What must be known about a family of models for it to be a teacher.

A new family is one entry in `VISION_TOWERS` and, where it reads text too, one in `DUAL_ENCODERS`.

Legend: C width of the vision tower, F width of the teacher's embeddings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class VisionTower:
    """What must be known about one family of vision transformers; keyed by its `config.model_type`.

    Args:
        num_prefix_tokens: From the vision config: tokens in front of the first patch (class, registers, distillation).
        pool: `(tower, tokens (..., C)) -> (..., C)`: what makes `pooler_output` of the class token, for any token of
            `last_hidden_state`. Used where the tower is part of a dual encoder.
        forward_options: Keyword arguments of every forward pass.
        bare_options: Keyword arguments of `from_pretrained` for a checkpoint without a head.
        standalone: Whether the tower can be a teacher on its own.
    """

    num_prefix_tokens: Callable[[Any], int]
    pool: Callable[[Any, Tensor], Tensor] = lambda tower, tokens: tokens
    forward_options: Mapping[str, Any] = field(default_factory=dict)
    bare_options: Mapping[str, Any] = field(default_factory=dict)
    standalone: bool = True


@dataclass(frozen=True)
class DualEncoder:
    """What must be known about one family of image-text models; keyed by its `config.model_type`.

    Args:
        project: `(model, pooled tokens (..., C)) -> (..., F)`: the map into the space shared with the text.
        feature_size: From the config: F.
        tokenizer_options: How the prompts of a batch are brought to one length.
    """

    project: Callable[[Any, Tensor], Tensor] = lambda model, pooled: model.visual_projection(pooled)
    feature_size: Callable[[Any], int] = lambda config: config.projection_dim
    tokenizer_options: Mapping[str, Any] = field(default_factory=lambda: {"padding": True})


def _pool_as_first_token(tower: Any, tokens: Tensor) -> Tensor:
    # The pooler reads token 0 of each sequence: give it every token as a sequence of its own.
    return tower.pooler(tokens.reshape(-1, 1, tokens.shape[-1])).unflatten(0, tokens.shape[:-1])


_INTERPOLATE = {"interpolate_pos_encoding": True}  # DINOv2 does so unasked
_VIT: dict[str, Any] = {
    "pool": _pool_as_first_token,
    "forward_options": _INTERPOLATE,
    "bare_options": {"add_pooling_layer": False},  # many checkpoints have none, and only dual encoders use it
}
VISION_TOWERS: dict[str, VisionTower] = {
    "clip_vision_model": VisionTower(
        lambda config: 1,
        pool=lambda tower, tokens: tower.post_layernorm(tokens),
        forward_options=_INTERPOLATE,
        standalone=False,  # AutoModel would drop its projection: ask for the whole CLIPModel
    ),
    "deit": VisionTower(lambda config: 2, **_VIT),  # class and distillation token
    "dinov2": VisionTower(lambda config: 1),
    "dinov2_with_registers": VisionTower(lambda config: 1 + config.num_register_tokens),
    "vit": VisionTower(lambda config: 1, **_VIT),
}
DUAL_ENCODERS: dict[str, DualEncoder] = {"clip": DualEncoder(), "vision-text-dual-encoder": DualEncoder()}
