"""Who APM is held against, each written as strong as its description allows.

* `naive_answers`: every query written out, [trigger ; position], one row a location; all at once or in chunks.
* the release's form: the same, 16 locations a chunk (what observing the release shows; its source was not read).
* CLIP ViT-B/16 and DINOv2-L with registers: the classes of transformers, with random weights.

Legend: B images, L locations, D trigger width, P position width, F feature width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from apm_hf import APMConfig, APMModel
from apm_hf.position_encoding import grid_coordinates, position_code

RELEASE_CHUNK = 16


def random_apm(preset: str, device: torch.device, dtype: torch.dtype) -> APMModel:
    """Mean pooling; weights so wide that answers are of order 1 and every layer counts, the same in every run."""
    model = APMModel(APMConfig.preset(preset, pooling="mean"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 200
            parameter.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return model.to(device, dtype).eval()


def images(model: APMModel, batch_size: int = 1) -> Tensor:
    """`(B, 3, S, S)`, uniform noise, where the model is and as it is."""
    side, generator = model.config.image_size, torch.Generator().manual_seed(1)
    return torch.rand(batch_size, 3, side, side, generator=generator).to(model.device, model.dtype)


def grid_codes(model: APMModel, coordinates: Tensor | None = None) -> Tensor:
    """`(L, P)`; the grid's where no coordinates are given."""
    config = model.config
    if coordinates is None:
        coordinates = grid_coordinates(config.grid_size, config.grid_size, device=model.device)
    return position_code(coordinates, config.grid_size, config.grid_size, config.position_size).to(model.dtype)


def naive_answers(model: APMModel, trigger: Tensor, codes: Tensor, chunk: int | None = None) -> dict[str, Tensor]:
    """`last_hidden_state (B, L, F)`, `rgb (B, L, 3)` and `pooler_output (B, F)`, as the paper's figure draws them.

    Args:
        trigger: `(B, D)`.
        codes: `(L, P)`, worked out beforehand: the rival pays nothing for them.
        chunk: locations answered at a time; None is all.
    """
    features, colours = [], []
    for part in codes.split(chunk or len(codes)):
        shape = (len(trigger), len(part), -1)
        query = torch.cat([trigger[:, None].expand(shape), part.expand(shape)], dim=-1)  # (B, chunk, D + P)
        hidden = query
        for layer in model.decoder.layers:
            hidden = F.linear(hidden, layer.weight, layer.bias).relu()
        features.append(F.linear(hidden, model.decoder.feature_head.weight, model.decoder.feature_head.bias))
        rgb = torch.cat([features[-1], query], dim=-1)
        for layer in model.decoder.rgb_head.layers:
            rgb = F.linear(rgb, layer.weight, layer.bias).relu()
        colours.append(rgb)
    whole = features[0] if len(features) == 1 else torch.cat(features, dim=1)
    return {
        "last_hidden_state": whole,
        "rgb": colours[0] if len(colours) == 1 else torch.cat(colours, dim=1),
        "pooler_output": whole.mean(dim=1),
    }


def clip_base(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The vision tower of CLIP ViT-B/16, with random weights; 224 x 224 pixels."""
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16
    )
    return _built(CLIPVisionModel, config, device, dtype)


def dinov2_large(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """DINOv2 ViT-L/14 with registers, with random weights; 518 x 518 pixels are its own resolution."""
    config = Dinov2WithRegistersConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
    )
    return _built(Dinov2WithRegistersModel, config, device, dtype)


def _built(model_class: type[nn.Module], config, device: torch.device, dtype: torch.dtype) -> nn.Module:
    model = model_class(config).to(device, dtype).eval()
    return model.requires_grad_(False)


def vit_flops(model: nn.Module, side: int) -> int:
    """Of one image's forward; a multiplication and an addition are two."""
    parameter = next(model.parameters())
    pixel_values = torch.zeros(1, 3, side, side, device=parameter.device, dtype=parameter.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values=pixel_values)
    return counter.get_total_flops()
