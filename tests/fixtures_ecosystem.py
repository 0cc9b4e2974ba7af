"""Small models of every kind, with all kinds of layers, for the tests beside other libraries.

Legend: B images, L locations.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from apm_hf import (
    APMConfig,
    APMForImageClassification,
    APMForSemanticSegmentation,
    APMForZeroShotImageClassification,
    APMModel,
)
from naive_apm import assert_close, randomise, small_config, small_images

NUM_LABELS = 5
# Every kind of layer, both poolings, and statistics.
RICH: dict[str, Any] = {
    "local_patch": True,
    "local_patch_scales": [1, 2],
    "pooling": "attention",
    "num_levels": 2,
    "level_size": 6,
    "feature_mean": [0.2] * 16,
    "feature_std": [1.2] * 16,
    "teacher_heads": {
        "other": {"feature_size": 12, "pooling": "mean", "feature_mean": [0.1] * 12, "feature_std": 1.5}
    },
}
TEXT = {
    "model_type": "clip_text_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "max_position_embeddings": 12,
    "projection_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
INPUT_IDS = [[1, 5, 6, 2], [1, 7, 8, 2]]
NARROW = {"hidden_sizes": [64, 32, 32], "feature_size": 16, "rgb_hidden_sizes": [8], "image_size": 56}
NARROW |= {"initializer_range": 0.3}
MODELS = (
    "plain",
    "rich",
    "embedding",
    "classification",
    "segmentation",
    "zero-shot",
    "tiny",
    "clip-ttt",
    "dinov2-large",
)
HEADS = ("classification", "segmentation", "zero-shot")


def build(kind: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a small model of one of `MODELS`, in evaluation mode; the last three are the presets, shrunk."""
    if kind in ("tiny", "clip-ttt", "dinov2-large"):
        model = APMModel(APMConfig.preset(kind, **({} if kind == "tiny" else NARROW)))
    elif kind == "plain":
        model = APMModel(small_config())
    elif kind == "rich":
        model = APMModel(small_config(**RICH))
    elif kind == "embedding":
        model = APMModel(small_config(trigger_source="embedding", pooling="attention"))
    elif kind == "zero-shot":
        config = small_config(**RICH, text_config=TEXT, logit_scale_init_value=1.0)
        model = APMForZeroShotImageClassification(config)
    else:
        head = {"classification": APMForImageClassification, "segmentation": APMForSemanticSegmentation}[kind]
        model = head(small_config(**RICH, num_labels=NUM_LABELS))
    return randomise(model, seed=seed)


def inputs_for(model: PreTrainedModel, batch_size: int = 2) -> dict[str, Tensor]:
    """Return what `forward` needs."""
    config, inputs = model.config, {}
    if config.trigger_source == "conv":
        inputs["pixel_values"] = small_images(batch_size, size=config.image_size)
    else:
        generator = torch.Generator().manual_seed(0)
        inputs["trigger_column"] = torch.randn(batch_size, config.trigger_width, generator=generator)
    if isinstance(model, APMForZeroShotImageClassification):
        inputs["input_ids"] = torch.tensor(INPUT_IDS)
    return inputs


def labels_for(model: PreTrainedModel, batch_size: int = 2) -> dict[str, Any]:
    """Return what makes a head return a loss."""
    if isinstance(model, APMForImageClassification):
        return {"labels": torch.arange(batch_size) % NUM_LABELS}
    if isinstance(model, APMForSemanticSegmentation):
        return {"labels": torch.arange(batch_size * 36).reshape(batch_size, 6, 6) % NUM_LABELS}
    return {"return_loss": True}


def tensors(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return all tensors of a model's output by name."""
    found: dict[str, Tensor] = {}
    for name, value in outputs.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif value is not None:
            entries = value.items() if isinstance(value, Mapping) else enumerate(value)
            found |= {f"{name}.{key}": entry for key, entry in entries}
    return found


def assert_same(actual: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float = 1e-5) -> None:
    """Compare two outputs, tensor by tensor; colours may all be 0."""
    actual, expected = tensors(actual), tensors(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if name == "rgb" and not value.any():
            assert not actual[name].any()
        else:
            assert_close(actual[name], value, tolerance)


def loss_of(outputs: ModelOutput) -> Tensor:
    """Return a loss in which every output counts."""
    values = tensors(outputs).values()
    dtype = torch.promote_types(torch.float32, next(iter(values)).dtype)
    return torch.stack([value.to(dtype).square().mean() for value in values]).sum()


def linears(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that libraries find; all matrices of the model belong to them."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert matrices == {f"{name}.weight" for name in found}
    return found


def assert_alike(outputs: ModelOutput, expected: ModelOutput) -> None:
    """Features and pooled features point where those of the whole model do, and are not the very same."""
    for name in ("last_hidden_state", "pooler_output"):
        assert F.cosine_similarity(outputs[name], expected[name], dim=-1).min() > 0.99, name
        assert not torch.equal(outputs[name], expected[name]), f"{name}: nothing was quantised"
