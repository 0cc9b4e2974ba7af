"""Classify photos with the teacher and with adapted models.

Source: arXiv:2410.20535, section 4: the teacher's embedding of an image is computed once, a model is fitted to it, and
the model's pooled feature is classified zero-shot. A model fitted to convergence reproduces its teacher, so the
teacher's prediction is always returned for comparison.

Legend: B images, K classes, F feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..configuration_apm import APMConfig
from ..modeling_apm import APMModel, APMPreTrainedModel
from ..teachers import DEFAULT_TEMPLATES, Teacher
from ..teachers.matching import matching_image_processor
from ..teachers.zero_shot import class_embeds, classify
from .adaptation import adapt
from .adapted import Adapted
from .settings import TTTConfig
from .stacked import redraw


@dataclass(frozen=True)
class TTTClassification:
    """Hold predictions for B images, on the CPU.

    Args:
        teacher_logits, logits: `(B, K)`, of the teacher and of the adapted models, for the same class embeddings;
            NaN if a fit diverged.
        target_cosine: `(B,)`, cosine between the adapted models' pooled features and the teacher's embeddings.
        adapted: the fits; models can be queried if they were kept.
    """

    teacher_logits: Tensor
    logits: Tensor
    target_cosine: Tensor
    adapted: Adapted

    @property
    def agreement(self) -> Tensor:
        """Return for each image whether both predict the same class: `(B,)`."""
        agrees = self.logits.argmax(dim=-1) == self.teacher_logits.argmax(dim=-1)
        return agrees & self.logits.isfinite().all(dim=-1)


class TTTClassifier:
    """Adapt to every image and classify it. Texts are encoded, and random weights drawn, once.

    Args:
        teacher: computes the targets and the class embeddings.
        class_names: the K classes; where names repeat, the first is predicted.
        model: the APM to adapt; None is a new one of the preset `clip-ttt`, as wide as the teacher.
        image_processor: the model's; by default one that matches the teacher's.
        config: how to adapt.
        templates: prompts, averaged per class.

    Raises:
        ValueError: for a model of another width than the teacher.
    """

    def __init__(
        self,
        teacher: Teacher,
        class_names: Sequence[str],
        *,
        config: TTTConfig,
        model: PreTrainedModel | None = None,
        image_processor: Any = None,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
    ):
        if model is None:
            model = APMModel(APMConfig.preset("clip-ttt", feature_size=teacher.feature_size)).to(teacher.device)
        if not isinstance(model, APMPreTrainedModel):
            raise ValueError(f"model: expected an APM, got {type(model).__name__}")
        if model.config.feature_size != teacher.feature_size:
            raise ValueError(
                f"model: expected features as wide as the teacher's, {teacher.feature_size}, "
                f"got {model.config.feature_size}"
            )
        self.teacher, self.model, self.config = teacher, model, config
        self.drawn = redraw(model, config.seed) if config.start == "random" else None
        self.image_processor = image_processor or matching_image_processor(teacher, model.config.image_size)
        self.class_names = list(class_names)
        self.text_embeds = class_embeds(teacher, self.class_names, templates)  # (K, F)

    def __call__(
        self, images: Sequence[Any], *, seeds: Sequence[int] | None = None, keep_models: bool = False
    ) -> TTTClassification:
        """Classify B images, PIL or any other format of the image processors.

        With `keep_models` the adapted models can be queried, but may take far more memory than the images.
        """
        targets = self.teacher.encode_images(list(images)).image_embeds
        assert targets is not None
        inputs = self.image_processor(list(images), return_tensors="pt")
        trigger = targets if self.model.config.trigger_source == "embedding" else None
        model, config = self.model, self.config
        if self.drawn is not None and seeds is None:
            model, config = self.drawn, replace(config, start="model")
        adapted = adapt(
            model,
            inputs["pixel_values"],
            targets,
            config=config,
            seeds=seeds,
            trigger_column=trigger,
            text_embeds=self.text_embeds if self.config.stop == "stable" else None,
            keep_models=keep_models,
        )
        embeds, targets = adapted.image_embeds.cpu(), targets.cpu()
        scale, texts = self.teacher.logit_scale, self.text_embeds.cpu()
        logits = torch.full((len(embeds), len(texts)), torch.nan)
        sound = ~adapted.diverged.cpu()
        logits[sound] = classify(embeds[sound], texts, logit_scale=scale)
        return TTTClassification(
            teacher_logits=classify(targets, texts, logit_scale=scale),
            logits=logits,
            target_cosine=F.cosine_similarity(embeds, targets),
            adapted=adapted,
        )
