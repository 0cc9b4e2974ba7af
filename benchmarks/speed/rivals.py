"""The rivals of an APM, each written as fast as its description allows.

* `NaiveAPM`: every query written out, [trigger ; position], one row a location; all at once or in chunks. It is called
  as a model is and returns what a model returns, so that both pay for the call and for a `ModelOutput`.
* the release's form: the same, 16 locations a chunk (what observing the release shows; its source was not read).
* CLIP ViT-B/16 and DINOv2-L with registers: the classes of transformers, with random weights.

Legend: B images, L locations, D trigger width, P position width, F feature width.
"""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from apm_hf import APMConfig, APMModel, APMModelOutput
from apm_hf.modeling_apm import APMQuery
from apm_hf.position_encoding import grid_coordinates, position_code

RELEASE_CHUNK = 16


def random_apm(preset: str, device: torch.device, dtype: torch.dtype) -> APMModel:
    """Build a model with mean pooling, and weights so large that outputs are of order 1; the same in every run."""
    model = APMModel(APMConfig.preset(preset, pooling="mean"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 200
            parameter.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    return model.to(device, dtype).eval()


def images(model: APMModel, batch_size: int = 1) -> Tensor:
    """Return `(B, 3, S, S)`, uniform noise, on the model's device and in its dtype."""
    side, generator = model.config.image_size, torch.Generator().manual_seed(1)
    return torch.rand(batch_size, 3, side, side, generator=generator).to(model.device, model.dtype)


def position_codes(model: APMModel, coordinates: Tensor | None = None) -> Tensor:
    """Return `(L, P)` for coordinates `(L, 2)`; None is the grid."""
    side, dtype = model.grid_size, model.decoder.feature_head.weight.dtype
    if coordinates is None:
        coordinates = grid_coordinates(side, side, device=model.device)
    return position_code(coordinates, side, side, model.decoder.position_size).to(dtype)


class NaiveAPM(nn.Module):
    """A model without pooling layers as the paper's figure draws it: one Linear after another on written-out queries.

    It shares the model's weights, but for those of the two first Linears, which are joined here, once.
    """

    def __init__(self, model: APMModel):
        super().__init__()
        decoder = model.decoder
        assert decoder.rgb_head is not None
        self.trigger, self.feature_head = model.trigger, decoder.feature_head
        self.layers = nn.ModuleList([_joined(decoder.query), *decoder.layers])
        self.rgb_layers = nn.ModuleList([_joined(decoder.rgb_head.query), *decoder.rgb_head.layers])

    def forward(
        self,
        pixel_values: Tensor | None,
        codes: Tensor,
        chunk: int | None = None,
        *,
        trigger_column: Tensor | None = None,
    ) -> APMModelOutput:
        """Fold, then query: `last_hidden_state (B, L, F)`, `rgb (B, L, 3)` and `pooler_output (B, F)`.

        Args:
            pixel_values: `(B, C, S, S)`.
            codes: `(L, P)`.
            chunk: locations decoded at a time; None is all.
            trigger_column: `(B, D)`, instead of folding.
        """
        if trigger_column is None:
            trigger_column = self.trigger(pixel_values).flatten(1)
        features, colours = [], []
        for part in codes.split(chunk or len(codes)):
            shape = (len(trigger_column), len(part), -1)
            query = torch.cat([trigger_column[:, None].expand(shape), part.expand(shape)], dim=-1)  # (B, chunk, D + P)
            hidden = query
            for layer in self.layers:
                hidden = layer(hidden).relu()
            features.append(self.feature_head(hidden))
            rgb = torch.cat([features[-1], query], dim=-1)
            for layer in self.rgb_layers:
                rgb = layer(rgb).relu()
            colours.append(rgb)
        whole = features[0] if len(features) == 1 else torch.cat(features, dim=1)
        return APMModelOutput(
            last_hidden_state=whole,
            pooler_output=whole.mean(dim=1),
            rgb=colours[0] if len(colours) == 1 else torch.cat(colours, dim=1),
            trigger_column=trigger_column,
        )

    def gradients(self, model: APMModel) -> dict[str, Tensor]:
        """Return the gradients of this form under the names of the model's weights, of which it shares most."""
        gradients = gradients_of(model)
        firsts = {"decoder.query": self.layers[0], "decoder.rgb_head.query": self.rgb_layers[0]}
        for query, joined in firsts.items():
            parts = _parts(model.get_submodule(query))
            split = joined.weight.grad.split([part.in_features for part in parts.values()], dim=1)
            gradients |= {f"{query}.{name}.weight": grad for name, grad in zip(parts, split, strict=True)}
            gradients[f"{query}.trigger.bias"] = joined.bias.grad
        return gradients


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a model by name, those of the weights that a loss reached."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _parts(query: APMQuery) -> dict[str, nn.Linear]:
    """Return the Linears whose sum is a query, in the order in which its inputs are concatenated."""
    parts = {name: getattr(query, name) for name in ("features", "trigger", "column", "row")}
    return {name: part for name, part in parts.items() if part is not None}


def _joined(query: APMQuery) -> nn.Linear:
    """Return the one Linear over [feature ; trigger ; position] that a query is."""
    weight = torch.cat([part.weight.detach() for part in _parts(query).values()], dim=1)
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(query.trigger.bias.detach().clone())
    return linear


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
