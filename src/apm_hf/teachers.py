"""Frozen Hugging Face models as teachers: images and class names in, targets for a student out.

A teacher sees a whole image once and says what a student should answer: one embedding per image, one feature per
patch, optionally the patches of intermediate layers, and the embeddings of class names to classify against. The paper
distils DINOv2 grids and adapts to CLIP image embeddings (arXiv:2410.20535, Sec. 3); prompts are averaged as in CLIP
(arXiv:2103.00020, Sec. 3.1.4) and patch tokens go through CLIP's image head as in MaskCLIP (arXiv:2112.01071).

A new family is one entry in `apm_hf.teacher_families`.

Shapes: B images, T tokens (prefix tokens, then rows * cols patches, row-major), N levels, K classes, C width of the
vision tower, F width of the teacher's embeddings. Pixels are `(B, 3, H, W)`; H = rows * patch_size.
"""

import os
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoTokenizer

# At its top level transformers 5.17 refuses this class without torchvision, though the PIL backend works.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import ModelOutput, logging

from .data.images import eight_bit_rgb
from .teacher_families import DUAL_ENCODERS, VISION_TOWERS, DualEncoder

logger = logging.get_logger(__name__)

DEFAULT_TEMPLATES = ("a photo of a {}.",)
DEFAULT_LOGIT_SCALE = 100.0  # the bound that CLIP's training keeps to (arXiv:2103.00020, Sec. 2.5)
TEXT_BATCH_SIZE = 256


# Names of linear heads over the class token. DeiT has a second one, over the distillation token, which is not used.
_HEADS = ("classifier", "cls_classifier")


@dataclass
class TeacherOutput(ModelOutput):
    """What a teacher says about a batch of images, in float32.

    Args:
        image_embeds: `(B, F)`, not normalised: what zero-shot classification (or a classifier's linear head) uses.
        features: `(B, rows, cols, F)`, patch tokens in the space of `image_embeds`.
        levels: `(B, N, rows, cols, C)`, patch tokens of the layers asked for, before any final layernorm; or None.
    """

    image_embeds: Tensor | None = None
    features: Tensor | None = None
    levels: Tensor | None = None


class Teacher:
    """A frozen model that turns images and class names into targets; made by [`load_teacher`].

    Attributes:
        name: What `load_teacher` was given.
        model, image_processor, tokenizer: The Hugging Face objects; `tokenizer` is None without a text tower.
        feature_size, hidden_size: F and C.
        num_layers: Layers of the vision tower.
        image_size: Side in pixels of what `image_processor` makes of a square image.
        patch_size: Side of a patch in pixels.
        has_text: Whether there is a text tower, so that `encode_text` takes any words.
        class_names: All labels of a classifier whose weights serve as class embeddings, in order and unique: labels
            that occur twice carry their index, "crane (134)". None for other teachers.
        logit_scale: Factor on cosine similarities: exp of the model's own for dual encoders, else 100.
    """

    def __init__(self, name: str, model: Any, image_processor: Any, tokenizer: Any = None) -> None:
        self.name, self.model, self.image_processor, self.tokenizer = name, model, image_processor, tokenizer
        self._dual_encoder = DUAL_ENCODERS.get(model.config.model_type)
        self.has_text = self._dual_encoder is not None
        heads = [getattr(model, head) for head in _HEADS if hasattr(model, head)]
        self._tower = model.vision_model if self.has_text else model.base_model if heads else model
        self._layout = VISION_TOWERS[self._tower.config.model_type]
        self.num_layers: int = self._tower.config.num_hidden_layers
        self.hidden_size: int = self._tower.config.hidden_size
        self.feature_size = self.hidden_size
        self.logit_scale = DEFAULT_LOGIT_SCALE
        if self._dual_encoder is not None:
            self.feature_size = self._dual_encoder.feature_size(model.config)
            self.logit_scale = float(model.logit_scale.exp())
        self.patch_size = _side(self._tower.config.patch_size, "patches")
        # What the processor makes, not what the config says, decides on the grid: DINOv2 says 518 and is shown 224.
        blank = Image.new("RGB", (_side(self._tower.config.image_size, "images"),) * 2)
        pixel_values = image_processor(images=[blank], return_tensors="pt")["pixel_values"]
        self.image_size = _side(pixel_values.shape[-2:], "images")

        self._head = heads[0] if heads and isinstance(heads[0], nn.Linear) else None
        self._labels: list[str] = []
        if self._head is not None and self._head.in_features == self.feature_size:
            self._labels = [model.config.id2label[index] for index in range(self._head.out_features)]
        counts = Counter(self._labels)
        self._unique_labels = [f"{x} ({row})" if counts[x] > 1 else x for row, x in enumerate(self._labels)]
        self.class_names = list(self._unique_labels) or None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def encode_images(
        self, images: Any = None, *, pixel_values: Tensor | None = None, layers: Sequence[int] | None = None
    ) -> TeacherOutput:
        """Embed images and their patches, all of them in one forward pass.

        For a dual encoder the patch tokens go through the same layernorm or pooler and projection as the class token,
        so that they can be compared with text (unlike in MaskCLIP, the last attention layer stays as it is). For other
        models both are tokens after the final layernorm.

        Args:
            images: A PIL image (turned upright, transparency on white), a uint8 array or tensor (grey, RGB or RGBA,
                channels first or last), or a list or batch of them. Give exactly one of `images` and `pixel_values`.
            pixel_values: `(B, 3, H, W)`, made by `image_processor`; H and W multiples of the patch size, not
                necessarily equal.
            layers: Indices into the hidden states, for `levels`: 0 is the embedding, n the output of layer n.

        Returns:
            [`TeacherOutput`], ordinary tensors on the teacher's device: a student may be trained on them.

        Raises:
            ValueError: What is no image or no pixel values, an unknown layer, sizes that do not fit the patches,
                values that are not finite (naming the image's index).
        """
        if (images is None) == (pixel_values is None):
            raise ValueError("Expected exactly one of `images` and `pixel_values`.")
        if pixel_values is None:
            pixel_values = self.pixel_values(images)
        self._check_pixel_values(pixel_values)
        if layers is not None and (not layers or any(layer not in range(self.num_layers + 1) for layer in layers)):
            raise ValueError(f"Expected `layers` from 0 to {self.num_layers} for teacher '{self.name}', got {layers}.")
        grid = (pixel_values.shape[-2] // self.patch_size, pixel_values.shape[-1] // self.patch_size)

        with torch.inference_mode():
            states = self._tower(
                pixel_values=pixel_values.to(self.device, self.dtype),
                output_hidden_states=layers is not None,
                **self._layout.forward_options,
            )
            features = self._patches(states.last_hidden_state, grid)
            image_embeds = states.last_hidden_state[:, 0]
            if self._dual_encoder is not None:
                image_embeds = self._dual_encoder.project(self.model, states.pooler_output)
                features = self._dual_encoder.project(self.model, self._layout.pool(self._tower, features))
            targets = {"image_embeds": image_embeds, "features": features}
            if layers is not None:
                levels = [self._patches(states.hidden_states[layer], grid) for layer in layers]
                targets["levels"] = torch.stack(levels, dim=1)  # N times (B, rows, cols, C) -> (B, N, rows, cols, C)
        for key, target in targets.items():
            _check_finite(target, f"{key} of teacher '{self.name}' in {self.dtype}")
        return TeacherOutput(**{key: _ordinary(target) for key, target in targets.items()})

    def pixel_values(self, images: Any) -> Tensor:
        """`(B, 3, H, W)`, what `image_processor` makes of images as `encode_images` takes them."""
        rgb_images = [_to_rgb(image, index) for index, image in enumerate(_as_list(images))]
        return self.image_processor(images=rgb_images, return_tensors="pt")["pixel_values"]

    def encode_text(self, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
        """Embed class names: as prompts, or as the class weights of a classifier that has such labels.

        With a text tower, every template is filled with every name, and the unit embeddings of a name's prompts are
        averaged. Without one, names are looked up among the classifier's labels: exactly, else ignoring case.
        Underscores in names count as spaces.

        Args:
            class_names: K different names.
            templates: Prompts with `{}` or `{class}` where the name goes. Without effect on a classifier.

        Returns:
            `(K, F)`, float32 rows of length 1.

        Raises:
            ValueError: No, repeated, blank, unknown or ambiguous names; a template without a place for the name; a
                teacher with neither a text tower nor class weights.
        """
        _check_strings(class_names, "class_names")
        _check_strings(templates, "templates")
        if repeated := [name for name, count in Counter(class_names).items() if count > 1]:
            raise ValueError(f"Expected different class names, got more than once: {first_five(repeated)}.")
        parsed_templates = [_parse_template(template) for template in templates]
        if self._dual_encoder is not None:
            embeds = self._prompt_embeds(self._dual_encoder, class_names, parsed_templates)
        else:
            embeds = self._class_weights(class_names)
            if tuple(templates) != DEFAULT_TEMPLATES:
                logger.warning_once(f"Teacher '{self.name}' has no text tower: `templates` are ignored.")
        return nn.functional.normalize(_ordinary(embeds), dim=-1)

    def _prompt_embeds(
        self, family: DualEncoder, class_names: Sequence[str], templates: Sequence[list[str | None]]
    ) -> Tensor:
        """Mean over templates of unit text embeddings, `(K, F)`; None in a template is where the name goes."""
        max_length = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        options = {"truncation": True, "max_length": max_length, **family.tokenizer_options}
        total = torch.zeros(len(class_names), self.feature_size, device=self.device)
        for template in templates:
            words = [name.replace("_", " ") for name in class_names]  # data sets write "ruffed_grouse"
            prompts = ["".join(name if part is None else part for part in template) for name in words]
            for start in range(0, len(prompts), TEXT_BATCH_SIZE):
                batch = slice(start, start + TEXT_BATCH_SIZE)
                tokens = self.tokenizer(prompts[batch], return_tensors="pt", **options)
                with torch.inference_mode():
                    embeds = self.model.get_text_features(**tokens.to(self.device)).pooler_output
                _check_finite(embeds, f"text embeddings of teacher '{self.name}'", prompts[batch])
                total[batch] += nn.functional.normalize(_ordinary(embeds), dim=-1)
        return total / len(templates)

    def _class_weights(self, class_names: Sequence[str]) -> Tensor:
        """Rows of the classifier's weight that belong to the names, `(K, F)`."""
        if self._head is None:
            raise ValueError(
                f"Teacher '{self.name}' has neither a text tower nor a classifier: it knows no class names. "
                "Use a dual encoder such as CLIP, or an image classifier."
            )
        if not self._labels:
            raise ValueError(
                f"The classifier of teacher '{self.name}' reads {self._head.in_features} values (class token and mean "
                f"patch), not the {self.feature_size} of `image_embeds`: its weights are no class embeddings. "
                "Use a dual encoder such as CLIP, or a ViT or DeiT classifier."
            )
        rows_by_label: dict[str, list[int]] = {}
        for row, labels in enumerate(zip(self._labels, self._unique_labels, strict=True)):
            for label in {_plain(label) for label in labels}:
                rows_by_label.setdefault(label, []).append(row)

        rows: list[int] = []
        problems = []
        for name in class_names:
            matches = rows_by_label.get(_plain(name), [])
            matches = [row for row in matches if name in (self._labels[row], self._unique_labels[row])] or matches
            if len(matches) == 1 and matches[0] not in rows:
                rows.append(matches[0])
            elif len(matches) == 1:
                problems.append(f"'{name}' (asked for twice)")
            else:
                choices = " or ".join(f"'{self._unique_labels[row]}'" for row in matches)
                problems.append(f"'{name}' (ambiguous: {choices})" if matches else f"'{name}' (unknown)")
        if problems:
            raise ValueError(
                f"Expected different names among the {len(self._labels)} labels of teacher '{self.name}', "
                f"got {len(problems)} of {len(class_names)} wrong: {first_five(problems)}."
            )
        return self._head.weight[rows]

    def _patches(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        num_prefix_tokens = self._layout.num_prefix_tokens(self._tower.config)
        if tokens.shape[1] != num_prefix_tokens + grid[0] * grid[1]:
            raise ValueError(
                f"Expected {num_prefix_tokens} prefix tokens and {grid[0]} x {grid[1]} patches from teacher "
                f"'{self.name}', got {tokens.shape[1]} tokens."
            )
        return tokens[:, num_prefix_tokens:].unflatten(1, grid)  # (B, T, C) -> (B, rows, cols, C)

    def _check_pixel_values(self, pixel_values: Tensor) -> None:
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != 3 or 0 in shape or not pixel_values.is_floating_point():
            raise ValueError(
                f"Expected floating point `pixel_values` of shape (B, 3, H, W), got {pixel_values.dtype} {shape}; "
                "unprocessed images go to `images`."
            )
        if shape[2] % self.patch_size or shape[3] % self.patch_size:
            raise ValueError(
                f"Expected height and width to be multiples of the patch size {self.patch_size}, got {shape[2:]}: "
                "pixels at the edge would be dropped, and the grid would not cover the image."
            )
        _check_finite(pixel_values, "pixel values")


def load_teacher(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Teacher:
    """Load a frozen model from the Hub or a folder.

    Args:
        name_or_path: CLIP, a vision-text dual encoder, or a ViT, DeiT or DINOv2, bare or as an image classifier.
        device: By default the first of CUDA, MPS and CPU that is there.
        dtype: By default float32 on the CPU (where float16 is 40 times slower), elsewhere that of the checkpoint.

    Raises:
        ValueError: A family that is not supported, a checkpoint that lacks weights or a tokenizer.
        OSError: Not found or not to be reached, with the Hub's own message.
    """
    name = os.fspath(name_or_path)
    device = torch.device(_default_device() if device is None else device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    with _loading(name, "configuration"):
        config = AutoConfig.from_pretrained(name)
    _check_family(name, config)

    auto_class, options = AutoModel, {}
    if config.model_type in VISION_TOWERS:
        if any("ForImageClassification" in architecture for architecture in config.architectures or []):
            auto_class = AutoModelForImageClassification
        else:
            options = dict(VISION_TOWERS[config.model_type].bare_options)
    with _loading(name, "model"):
        model, report = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True, **options)
    # transformers fills missing weights at random. The mask token alone is of no use to a teacher.
    if missing := sorted(key for key in report["missing_keys"] if not key.endswith("mask_token")):
        raise ValueError(f"Teacher '{name}' lacks weights of {type(model).__name__}: {first_five(missing)}.")
    model.requires_grad_(False).eval().to(device)

    with _loading(name, "image processor"):
        image_processor = AutoImageProcessor.from_pretrained(name)
    tokenizer = None
    if config.model_type in DUAL_ENCODERS:
        with _loading(name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name)
        # Where CLIP's tokenizer files are missing, transformers makes one up of special tokens alone.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError(f"Teacher '{name}' has no tokenizer files.")
    return Teacher(name, model, image_processor, tokenizer)


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def _loading(name: str, part: str) -> Iterator[None]:
    """Put one line of context above the Hub's own message."""
    try:
        yield
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"Could not load the {part} of teacher '{name}'.\n{error}") from error


def _check_family(name: str, config: Any) -> None:
    model_type, supported = config.model_type, sorted(VISION_TOWERS)
    if model_type in DUAL_ENCODERS:
        name, model_type = f"{name} (vision tower)", config.vision_config.model_type
    else:
        supported = sorted([*DUAL_ENCODERS, *(family for family in VISION_TOWERS if VISION_TOWERS[family].standalone)])
    if model_type not in supported:
        raise ValueError(f"Expected teacher '{name}' to be one of {', '.join(supported)}, got '{model_type}'.")


def _side(size: int | Sequence[int], what: str) -> int:
    sides = set(size) if isinstance(size, Sequence) else {size}
    if len(sides) != 1:
        raise ValueError(f"Expected a teacher with square {what}, got {size}.")
    return int(sides.pop())


def _ordinary(tensor: Tensor) -> Tensor:
    """A float32 copy which, unlike a tensor made in inference mode, autograd may keep for a student's loss."""
    return tensor.clone().float()


def _check_finite(tensor: Tensor, what: str, names: Sequence[str] | None = None) -> None:
    rows = (~torch.isfinite(tensor).flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if rows:
        where = [f"image {row}" if names is None else f"'{names[row]}'" for row in rows]
        raise ValueError(f"Expected finite {what}, got NaN or infinity in {first_five(where)}.")


def _check_strings(strings: Sequence[str], what: str) -> None:
    if isinstance(strings, str) or not strings or not all(isinstance(x, str) and x.strip() for x in strings):
        raise ValueError(f"Expected `{what}` to be one or more strings in a list, none blank, got {strings!r}.")


def first_five(items: Sequence[object]) -> str:
    """Items for an error message, the rest as a number."""
    return ", ".join(map(str, items[:5])) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ")


def _parse_template(template: str) -> list[str | None]:
    """Split a template into literal texts and None where the class name goes."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"Expected a template with '{{}}' or '{{class}}', got {template!r}: {error}.") from error
    placeholders = {name for _, name, _, _ in fields if name is not None}
    if not placeholders or not placeholders <= {"", "class"}:
        raise ValueError(f"Expected a template with '{{}}' or '{{class}}' and no other field, got {template!r}.")
    return [part for text, name, _, _ in fields for part in ([text] if name is None else [text, None])]


def _as_list(images: Any) -> list[Any]:
    is_batch = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4)
    images = list(images) if is_batch else [images]
    if not images:
        raise ValueError("Expected at least one image, got none.")
    return images


def _to_rgb(image: Any, index: int) -> Image.Image:
    if isinstance(image, np.ndarray | Tensor) and image.dtype not in (np.uint8, torch.uint8):
        raise ValueError(
            f"Image {index}: expected an array of uint8, 0 to 255, got {image.dtype}; "
            "what an image processor has made goes to `pixel_values`."
        )
    try:
        return eight_bit_rgb(image)
    except ValueError as error:
        raise ValueError(f"Image {index}: {error}") from error
