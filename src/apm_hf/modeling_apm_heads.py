"""APM with task heads: image classification, semantic segmentation, zero-shot image classification.

Legend: B images, L locations, F feature width, K classes or texts, (rows, cols) the grid, T tokens.
"""

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput, SemanticSegmenterOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_apm import APMConfig
from .modeling_apm import APMModel, APMPreTrainedModel
from .position_encoding import grid_coordinates

# Pixels of segmentation maps that carry no label, as in transformers' `semantic_loss_ignore_index`.
IGNORE_INDEX = 255


@dataclass
class APMZeroShotOutput(ModelOutput):
    """Image-text similarities.

    Args:
        loss: `()`, the contrastive loss where it was asked for.
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
    """A linear classifier on the pooled feature."""

    def __init__(self, config: APMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.apm = APMModel(config)
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
        **kwargs,
    ) -> ImageClassifierOutput:
        """Logits `(B, num_labels)`.

        Args:
            pixel_values: `(B, C, S, S)`.
            labels: `(B,)`, class indices; or `(B, num_labels)` or `(B,)` floats, as `config.problem_type` says.
            coordinates, trigger_column, chunk_size, output_hidden_states: as in [`APMModel.forward`].
        """
        outputs = self.apm(
            pixel_values,
            coordinates,
            trigger_column=trigger_column,
            chunk_size=chunk_size,
            output_hidden_states=output_hidden_states,
            heads=(),
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = self.loss_function(labels, logits, self.config, **kwargs) if labels is not None else None
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class APMForSemanticSegmentation(APMPreTrainedModel):
    """A linear classifier on the feature of every location; the map may be asked for at any resolution.

    To train the classifier alone, `model.apm.requires_grad_(False)`: the machine is then asked without gradients, in
    chunks, so that `output_size` may be that of the labels, whatever the memory.

    Args:
        output_size: (height, width) of maps where a call names none; None is the grid. It describes a use of the
            machine and not the machine, hence is no part of the configuration and is not saved:
            `from_pretrained(..., output_size=(480, 640))` or `model.output_size = ...` sets it, and for a folder
            `pipeline("image-segmentation", folder, model_kwargs={"output_size": (480, 640)})`.
    """

    def __init__(self, config: APMConfig, *, output_size: tuple[int, int] | None = None):
        super().__init__(config)
        self.output_size = output_size
        self.num_labels = config.num_labels
        self.apm = APMModel(config)
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
    ) -> SemanticSegmenterOutput:
        """Logits `(B, num_labels, height, width)`.

        Args:
            pixel_values: `(B, C, S, S)`.
            labels: `(B, height', width')`, class indices, 255 where there is none; the logits are interpolated
                bilinearly to their size for the loss.
            output_size: (height, width) of the map of queries; None is the model's own, by default the grid itself.
            trigger_column, chunk_size, output_hidden_states: as in [`APMModel.forward`].
        """
        grid = self.config.grid_size
        output_size = output_size if output_size is not None else self.output_size
        height, width = output_size if output_size is not None else (grid, grid)
        if height < 1 or width < 1:
            raise ValueError(f"output_size: expected a positive (height, width), got {output_size}")
        coordinates = None if output_size is None else grid_coordinates(height, width, device=self.device)
        sources = (pixel_values, trigger_column, *self.apm.parameters())
        is_frozen = not any(source is not None and source.requires_grad for source in sources)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            outputs = self.apm(
                pixel_values,
                coordinates,
                trigger_column=trigger_column,
                chunk_size=chunk_size,
                output_hidden_states=output_hidden_states,
                heads=(),
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
    """An APM beside the text tower of its teacher: one vector space for images and texts.

    `config.text_config` describes the tower, of any Hugging Face dual encoder; [`from_dual_encoder`] takes it, with
    its weights, from a teacher such as CLIP, SigLIP or a `VisionTextDualEncoderModel`.
    """

    def __init__(self, config: APMConfig):
        if not isinstance(config.text_config, PreTrainedConfig):
            raise ValueError(
                "text_config: expected the configuration of a text tower, got None; "
                "see APMForZeroShotImageClassification.from_dual_encoder"
            )
        super().__init__(config)
        self.apm = APMModel(config)
        self.text_model = _text_model_class(config.text_config)._from_config(config.text_config)
        self.text_projection = (
            nn.Linear(config.text_config.hidden_size, config.feature_size, bias=False)
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
            ValueError: for a model without text tower, or of another width.
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
        scale = getattr(dual_encoder, "logit_scale", None)
        config = APMConfig(
            **{
                **{k: v for k, v in apm.config.to_dict().items() if k not in ("architectures", "text_config")},
                "text_config": dual_encoder.config.text_config.to_dict(),
                "text_projection": projection is not None,
                **({} if scale is None else {"logit_scale_init_value": scale.item()}),
            }
        )
        model = cls(config).to(device=apm.device, dtype=apm.dtype)
        model.apm.load_state_dict(apm.state_dict())
        # Some dual encoders hold the tower itself, others the core that the tower's own class wraps once more.
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

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """`(K, F)`, unnormalised, for token ids `(K, T)`."""
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return self.text_projection(outputs.pooler_output)

    def get_image_features(self, pixel_values: Tensor, coordinates: Tensor | None = None) -> Tensor:
        """`(B, F)`, unnormalised, for pixels `(B, C, S, S)`, pooled over the locations asked for."""
        return self.apm.pooled_features(pixel_values, coordinates)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        coordinates: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs,
    ) -> APMZeroShotOutput:
        """Compare every image with every text.

        Args:
            input_ids: `(K, T)`.
            pixel_values: `(B, C, S, S)`.
            attention_mask: `(K, T)`, 1 for tokens, 0 for padding.
            coordinates: `(L, 2)` or `(B, L, 2)`, the locations that are pooled; None is the full grid.
            return_loss: also return the contrastive loss of B = K matching pairs (arXiv:2103.00020).
            **kwargs: further inputs of the text tower, e.g. `token_type_ids`.
        """
        image_embeds = F.normalize(self.get_image_features(pixel_values, coordinates), dim=-1)
        text_embeds = F.normalize(self.get_text_features(input_ids, attention_mask, **kwargs), dim=-1)
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


def _text_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    # Some text towers (SigLIP's) are no AutoModel; transformers' naming contract finds them.
    if type(config) in AutoModel._model_mapping:
        return AutoModel._model_mapping[type(config)]
    name = type(config).__name__.removesuffix("Config") + "Model"
    if not hasattr(transformers, name):
        raise ValueError(f"text_config: expected the configuration of a text tower, got {type(config).__name__}")
    return getattr(transformers, name)


def _same_keys(first: nn.Module, second: nn.Module) -> bool:
    return first.state_dict().keys() == second.state_dict().keys()


__all__ = [
    "APMForImageClassification",
    "APMForSemanticSegmentation",
    "APMForZeroShotImageClassification",
    "APMZeroShotOutput",
]
