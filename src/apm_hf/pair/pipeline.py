"""Adapt an APM to every image and classify it zero-shot, as a transformers pipeline (arXiv:2410.20535, section 4).

    pipe = pipeline("apm-zero-shot-image-classification", model="apm", teacher="openai/clip-vit-large-patch14")
    pipe("photo.jpg", candidate_labels=["cat", "dog"])  # [{"score": 0.9, "label": "cat"}, {"score": 0.1, ...}]

Legend: B images, K labels, F feature width.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline
from transformers.utils import logging

from ..assets import PHOTO_MODEL, PHOTO_TEACHER
from ..configuration_apm import APMConfig
from ..data.images import decode_image, eight_bit_rgb
from ..modeling_apm import APMModel
from ..teachers import DEFAULT_TEMPLATES, Teacher, load_teacher
from ..teachers.zero_shot import classify
from ..ttt import TTTConfig, adapt, redraw
from .apm import APM, EMBEDDED_NOTE

logger = logging.get_logger(__name__)

_MAX_CACHED_TEXTS = 16


class TestTimeTrainingPipeline(Pipeline):
    """Score labels for images: fit an APM to the teacher's embedding of each image, then classify its embedding.

    A batch is adapted at once; its size changes scores by rounding only.

    Args:
        model: the APM, bare or with a head; never changed, but moved to `device`. `transformers.pipeline` takes a
            folder or Hub name too. None, or a dense student, which cannot be adapted, is a fresh `clip-ttt` as wide as
            the teacher.
        teacher: computes targets and class embeddings: a [`Teacher`], or a name or folder for [`load_teacher`]; by
            default the first one that the model's configuration says it was distilled from; without both, the small
            teacher of photos in the package.
        preset: recipe, `"fast"` by default; it starts from the weights of the given model, or random ones.
        ttt_config: a [`TTTConfig`] instead, used unchanged; `transformers.pipeline` has a different `config`.
        **options: options of [`Pipeline`], and defaults for those of a call. `image_processor`, the model's, is by
            default its folder's, else one that matches the teacher's.

    Raises:
        ValueError: for no teacher, no APM, widths that differ, or both a preset and a configuration.
        OSError: for a teacher that the model's configuration names and that cannot be loaded by that name.
    """

    __test__ = False  # else pytest would collect the class as a test
    _load_processor = _load_feature_extractor = _load_video_processor = _load_tokenizer = False

    def __init__(
        self,
        model: Any = None,
        *,
        teacher: Any = None,
        preset: str | None = None,
        ttt_config: Any = None,
        **options: Any,
    ):
        if teacher is None:
            teacher = _named_teacher(model)
        if getattr(getattr(model, "config", None), "trigger_source", None) == "tokens":
            model = None
            options.pop("image_processor", None)  # the dense student's
        if not isinstance(teacher, Teacher | str | os.PathLike):
            raise ValueError(f"teacher: expected a Teacher, or a name or folder of one, got {type(teacher).__name__}")
        if preset is not None and ttt_config is not None:
            raise ValueError("preset, ttt_config: expected one of them, got both")
        start = "random" if model is None else "model"
        self.ttt_config = ttt_config or TTTConfig.preset(preset or "fast", start=start)
        if model is None:
            teacher = teacher if isinstance(teacher, Teacher) else load_teacher(teacher)
            model = APMModel(APMConfig.preset("clip-ttt", feature_size=teacher.feature_size))
        options.pop("local_files_only", None)  # already used by `transformers.pipeline`
        super().__init__(model=model, **options)
        pair = APM.load(model, teacher=teacher, device=self.device)
        assert pair.teacher is not None
        self.teacher = pair.teacher
        self.image_processor: Any = self.image_processor or pair.image_processor
        self._text_embeds: dict[Any, Tensor] = {}
        self._start, self._config = self.model, self.ttt_config
        if self.ttt_config.start == "random":  # drawn once
            self._start = redraw(model, self.ttt_config.seed)
            self._config = replace(self.ttt_config, start="model")

    def __call__(self, images: Any, candidate_labels: Iterable[str] | None = None, **options: Any) -> Any:
        """Score the labels for an image, or for a list, generator or dataset of images.

        Args:
            images: path, URL, PIL image, array, tensor, encoded bytes or `{"bytes", "path"}`.
            candidate_labels: K different names.
            **options: `hypothesis_template`, a prompt with `{}` for the name, or several, averaged; `return_teacher`
                adds the teacher's `"teacher_score"`; `timeout` of URLs, in seconds; `batch_size`.

        Returns:
            For each image K dicts `{"score", "label"}`, highest first, scores in [0, 1] of sum 1. If the fit
            diverged, the scores are None and the labels in the given order.

        Raises:
            ValueError: for labels or templates that [`Teacher.encode_text`] rejects, or an unreadable image.
        """
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        elif "labels" not in self._forward_params:
            raise ValueError("candidate_labels: expected at least one label, got none")
        if hasattr(images, "to_list"):  # a column of a table
            images = images.to_list()
        if isinstance(images, list) and not images:
            return []  # transformers looks at the first of a list
        return super().__call__(images, **options)

    def _sanitize_parameters(
        self, *, candidate_labels=None, hypothesis_template=None, return_teacher=None, timeout=None
    ):
        labels, templates = candidate_labels, hypothesis_template
        if labels is not None and (isinstance(labels, str) or not (labels := tuple(labels))):
            raise ValueError(f"candidate_labels: expected a list of at least one label, got {labels!r}")
        if labels is not None and not all(isinstance(label, str) for label in labels):
            raise ValueError(
                "candidate_labels: expected names, the same for all images, got "
                f"{next(type(label).__name__ for label in labels if not isinstance(label, str))}; call once per image"
            )
        templates = (templates,) if isinstance(templates, str) else templates and tuple(templates)
        named = {"labels": labels}
        stages = ({"timeout": timeout}, named | {"templates": templates}, named | {"return_teacher": return_teacher})
        return tuple({name: value for name, value in stage.items() if value is not None} for stage in stages)

    def preprocess(self, image: Any, timeout: float | None = None) -> dict[str, Any]:
        # Only non-files go to transformers, whose reader clips 16-bit pixels and makes transparency black.
        elsewhere = isinstance(image, str) and not os.path.isfile(image)
        if not isinstance(image, np.ndarray | Tensor):
            image = load_image(image, timeout=timeout) if elsewhere else decode_image(image)
        image = eight_bit_rgb(image)
        return {"pixel_values": self.image_processor(image, return_tensors="pt")["pixel_values"], "image": image}

    def _forward(self, inputs: dict[str, Any], labels=(), templates=None) -> dict[str, Tensor]:
        key = (labels, templates or DEFAULT_TEMPLATES)
        if key not in self._text_embeds:
            if len(self._text_embeds) == _MAX_CACHED_TEXTS:
                del self._text_embeds[next(iter(self._text_embeds))]  # the oldest
            self._text_embeds[key] = self.teacher.encode_text(*key).to(self.device)
        texts, scale = self._text_embeds[key], self.teacher.logit_scale  # (K, F)
        images = inputs["image"] if isinstance(inputs["image"], list) else [inputs["image"]]
        # One at a time here and below: rounding depends on the batch size of a product, and would change scores.
        targets = torch.cat([self.teacher.encode_images(image)["image_embeds"] for image in images]).to(self.device)
        adapted = adapt(
            self._start, inputs["pixel_values"], targets, config=self._config, text_embeds=texts,
            trigger_column=targets if self.model.config.trigger_source == "embedding" else None, keep_models=False,
        )  # fmt: skip
        diverged = adapted.diverged[:, None]
        both = torch.where(diverged, targets, adapted.image_embeds), targets  # each (B, F) -> (B, K)
        scores = [torch.cat([classify(row, texts, logit_scale=scale) for row in x.split(1)]).softmax(-1) for x in both]
        return {"scores": scores[0].masked_fill(diverged, torch.nan), "teacher_scores": scores[1]}

    def postprocess(self, outputs: dict[str, Tensor], labels=(), return_teacher=False) -> list[dict[str, Any]]:
        known = not outputs["scores"].isnan().any()
        columns = {"score": outputs["scores"][0].tolist() if known else [None] * len(labels), "label": labels}
        if return_teacher:
            columns["teacher_score"] = outputs["teacher_scores"][0].tolist()
        predictions = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return sorted(predictions, key=lambda prediction: -prediction["score"]) if known else predictions


def _named_teacher(model: Any) -> Any:
    """Load the first teacher that a model's configuration names; None where it names none."""
    if getattr(model, "name_or_path", None) == PHOTO_MODEL:
        logger.warning(EMBEDDED_NOTE)
        return load_teacher(PHOTO_TEACHER)
    origins = getattr(getattr(model, "config", None), "distilled_from", None) or []
    name = next((entry["name"] for entry in origins if entry.get("name")), None)
    if name is None:
        return None
    try:
        return load_teacher(name)
    except OSError as error:
        raise OSError(
            f"teacher: expected a name or folder; the model's configuration says {name!r}, which cannot be loaded"
        ) from error


PIPELINE_REGISTRY.register_pipeline(
    "apm-zero-shot-image-classification",
    TestTimeTrainingPipeline,
    pt_model=AutoModel,
    default={"model": (PHOTO_MODEL, "main")},
    type="multimodal",
)
# Saved with a model, this entry would make `transformers.pipeline` look for remote code that does not exist.
del TestTimeTrainingPipeline._registered_impl
