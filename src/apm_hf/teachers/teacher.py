"""Use frozen models as teachers: images and class names in, targets for a student out.

A teacher encodes a complete image in one pass and outputs a student's targets: one embedding per image, one feature
per patch, optionally the patches of intermediate layers, and the embeddings of class names to classify against. The
paper distils DINOv2 grids and adapts to CLIP image embeddings (arXiv:2410.20535, Sec. 3); patch tokens go through
CLIP's image head as in MaskCLIP (arXiv:2112.01071). `docs/teachers.md` has the details for each family.

A new family is one entry in `apm_hf.teachers.families`; for any other module use [`Teacher.from_module`].

Shapes: B images, N levels, K classes, C width of the vision tower, F width of the teacher's embeddings. Pixels are
`(B, 3, H, W)`; H = rows * patch_size, where a convolutional network's patch is its stride.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoTokenizer

# At its top level transformers 5.17 refuses this class without torchvision, though the PIL backend works.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import ModelOutput, logging

from ..assets import EMBEDDED, PHOTO_TEACHER
from ..runs.devices import default_device
from ..runs.identity import processor_settings, weights_digest
from ..runs.progress import no_loading_bars
from .families import DUAL_ENCODERS, VISION_TOWERS
from .images import fitted, plain_image_processor, process, rgb_images, square_side
from .licenses import public_name
from .text import (
    DEFAULT_TEMPLATES,
    ClassWeights,
    ModuleText,
    TowerText,
    check_class_names,
    check_finite,
    check_strings,
    first_five,
    ordinary,
    parse_template,
    prompt_embeds,
    words_of,
)
from .vision import FamilyVision, ModuleOutputs, ModuleVision, device_and_dtype

logger = logging.get_logger(__name__)

DEFAULT_LOGIT_SCALE = 100.0  # the upper bound in CLIP's training (arXiv:2103.00020, Sec. 2.5)


@dataclass
class TeacherOutput(ModelOutput):
    """Hold a teacher's outputs for a batch of images, in float32.

    Args:
        image_embeds: `(B, F)`, not normalised: what zero-shot classification (or a classifier's linear head) uses.
        features: `(B, rows, cols, F)`, patches in the space of `image_embeds`.
        levels: `(B, N, rows, cols, C)`, patches of the requested layers, before any final layernorm; or None.
    """

    image_embeds: Tensor | None = None
    features: Tensor | None = None
    levels: Tensor | None = None


class Teacher:
    """Convert images and class names to targets with a frozen model; made by [`load_teacher`] or `from_module`.

    It can be pickled, and so be sent to a process, if its module and functions can, until `layers` are first
    requested: then transformers leaves hooks in some models that cannot be pickled.

    Attributes:
        name: The argument of `load_teacher`.
        model, image_processor, tokenizer: The Hugging Face objects, or the arguments of `from_module`; `tokenizer` is
            None without a text tower.
        feature_size, hidden_size: F and C.
        num_layers: Layers, or stages, of the vision tower.
        image_size: Side in pixels of the output of `image_processor` for a square image.
        patch_size: Side of a patch in pixels; the stride of a convolutional network.
        has_text: Whether there is a text tower, so that `encode_text` takes any words.
        class_names: All labels of a classifier whose weights serve as class embeddings, in order and unique: labels
            that occur twice have their index appended, "crane (134)". None for other teachers.
        logit_scale: Factor on cosine similarities: exp of the model's parameter for dual encoders, else 100.
        logit_bias: SigLIP's bias in `sigmoid(logit_scale * cosine + logit_bias)`; it is the same for every class, so
            it changes neither softmax nor ranking. 0 for others.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        image_processor: Any,
        vision: FamilyVision | ModuleVision,
        *,
        tokenizer: Any = None,
        text: TowerText | ModuleText | None = None,
        classes: ClassWeights | None = None,
        logit_scale: float = DEFAULT_LOGIT_SCALE,
        logit_bias: float = 0.0,
    ) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.image_processor = fitted(image_processor, vision.patch_size, side=vision.image_size)
        # The processor's output, not the config, sets the grid: DINOv2's config has 518, its processor makes 224.
        self.image_size = square_side(self.image_processor, vision.image_size)
        self.feature_size, self.hidden_size = vision.feature_size, vision.hidden_size
        self.num_layers, self.patch_size = vision.num_layers, vision.patch_size
        self.logit_scale, self.logit_bias = logit_scale, logit_bias
        self.has_text = text is not None
        self.class_names = None if classes is None else list(classes.names)
        self._vision, self._text, self._classes = vision, text, classes

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        outputs: ModuleOutputs,
        image_processor: Any,
        patch_size: int,
        text: Callable[[nn.Module, list[str]], Tensor] | None = None,
        class_names: Sequence[str] | None = None,
        class_embeds: Tensor | None = None,
        logit_scale: float = DEFAULT_LOGIT_SCALE,
        name: str | None = None,
    ) -> "Teacher":
        """Make a teacher of any module. It is frozen and put into evaluation mode, and stays on its device.

        Args:
            outputs: `(module, pixel_values (B, 3, H, W)) -> (image_embeds, features)` or `(..., levels)`, as
                [`TeacherOutput`] describes them; `levels`, of all layers, may be a list of `(B, rows, cols,
                C)`. Called in inference mode. A function at the top of a file can be pickled, a lambda cannot.
            image_processor: A Hugging Face image processor that makes squares. For `encode_images` any callable
                `(images=[PIL], return_tensors="pt")["pixel_values"]` suffices; students, views and complete photos
                need its options, too: `do_resize`, `do_center_crop`, `size`.
            patch_size: Pixels from one location of `features` to the next.
            text: `(module, prompts) -> (n, F)`, for teachers that encode text.
            class_names, class_embeds: K names and `(K, F)`, for teachers with fixed classes instead.
            logit_scale: Factor on cosine similarities.
            name: Name in messages and cards; by default the module's class.

        Raises:
            ValueError: Outputs of other shapes or types (checked at once on a blank image), an image processor that
                makes no multiples of the patch size, class names without embeddings or of another number.
        """
        if not isinstance(module, nn.Module):
            raise ValueError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        if not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"patch_size: expected an integer number of pixels, 1 or more, got {patch_size!r}")
        if (class_names is None) != (class_embeds is None) or (class_names is not None and text is not None):
            raise ValueError("class_names, class_embeds: expected both or neither, and neither with text")
        module.requires_grad_(False).eval()
        image_processor = fitted(plain_image_processor(image_processor), patch_size, side=_BLANK_SIDE)
        image_size = square_side(image_processor, _BLANK_SIDE)
        vision = ModuleVision(module, outputs, patch_size=patch_size, image_size=image_size)
        classes = None
        if class_names is not None and class_embeds is not None:
            check_strings(class_names, "class_names")
            if tuple(class_embeds.shape) != (wanted := (len(class_names), vision.feature_size)):
                raise ValueError(f"class_embeds: expected shape {wanted}, got {tuple(class_embeds.shape)}")
            classes = ClassWeights(class_embeds.detach(), class_names)
        return cls(
            name or type(module).__name__,
            module,
            image_processor,
            vision,
            text=None if text is None else ModuleText(module, text, vision.feature_size),
            classes=classes,
            logit_scale=logit_scale,
        )

    @property
    def tower(self) -> Any:
        """The transformers model that reads images, without its head; None for other modules."""
        return self._vision.tower if isinstance(self._vision, FamilyVision) else None

    @property
    def device(self) -> torch.device:
        """The device of the teacher's weights."""
        return device_and_dtype(self.model)[0]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the teacher's weights."""
        return device_and_dtype(self.model)[1]

    def encode_images(
        self, images: Any = None, *, pixel_values: Tensor | None = None, layers: Sequence[int] | None = None
    ) -> TeacherOutput:
        """Embed images and their patches, all of them in one forward pass.

        For a dual encoder the patch tokens go through the same layernorm, pooler or attention head and projection as
        `image_embeds`, each as a separate sequence, so that they can be compared with text (unlike in MaskCLIP, the
        last attention layer is unchanged). For other models both are tokens, or locations of a map, after the final
        layernorm.

        Args:
            images: A PIL image (turned upright, transparency on white), a uint8 array or tensor (grey, RGB or RGBA,
                channels first or last), or a list or batch of them. Give exactly one of `images` and `pixel_values`.
            pixel_values: `(B, 3, H, W)`, made by `image_processor`; H and W multiples of the patch size, not
                necessarily equal.
            layers: Indices into the hidden states, for `levels`: 0 is the embedding, n the output of layer n. Maps of
                a convolutional network are converted to the last one's grid and width, see `apm_hf.teachers.vision`.

        Returns:
            [`TeacherOutput`], ordinary tensors on the teacher's device: a student may be trained on them.

        Raises:
            ValueError: Invalid images or pixel values, an unknown layer, sizes that do not fit the patches, values
                that are not finite (naming the image's index).
        """
        if (images is None) == (pixel_values is None):
            raise ValueError("Expected exactly one of `images` and `pixel_values`.")
        if pixel_values is None:
            pixel_values = self.pixel_values(images)
        self._check_pixel_values(pixel_values)
        if layers is not None and (not layers or any(layer not in range(self.num_layers + 1) for layer in layers)):
            raise ValueError(f"Expected `layers` from 0 to {self.num_layers} for teacher '{self.name}', got {layers}.")
        with torch.inference_mode():
            try:
                targets = self._vision.encode(pixel_values.to(self.device, self.dtype), layers)
            except ValueError as error:
                raise ValueError(f"Teacher '{self.name}': {error}") from error
        for key, target in targets.items():
            check_finite(target, f"{key} of teacher '{self.name}' in {self.dtype}")
        return TeacherOutput(**{key: ordinary(target) for key, target in targets.items()})

    def pixel_values(self, images: Any) -> Tensor:
        """Return `(B, 3, H, W)`, the output of `image_processor` for images as `encode_images` takes them."""
        return process(self.image_processor, rgb_images(images))

    def encode_text(self, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
        """Embed class names: as prompts, or as the class weights of a classifier that has such labels.

        With a text tower, every template is filled with every name, and the unit embeddings of a name's prompts are
        averaged. Without one, names are looked up among the classifier's labels: exactly, else ignoring case.
        Underscores in names count as spaces.

        Args:
            class_names: K different names.
            templates: Prompts with `{}` or `{class}` for the name. Ignored by a classifier.

        Returns:
            `(K, F)`, float32 rows of length 1.

        Raises:
            ValueError: No, repeated, blank, unknown or ambiguous names; a template without a field for the name; a
                teacher with neither a text tower nor class weights.
        """
        check_class_names(class_names)
        check_strings(templates, "templates")
        parsed = [parse_template(template) for template in templates]
        if self._text is not None:
            embeds = prompt_embeds(self._text, class_names, parsed, f"text embeddings of teacher '{self.name}'")
        elif self._classes is not None:
            embeds = self._classes(class_names, self.name).to(self.device)
            if tuple(templates) != DEFAULT_TEMPLATES:
                logger.warning_once(f"Teacher '{self.name}' has no text tower: `templates` are ignored.")
        elif self._vision.head_size is None:
            raise ValueError(
                f"Teacher '{self.name}' has neither a text tower nor a classifier, so it has no class names. "
                "Use a dual encoder such as CLIP, or an image classifier."
            )
        else:
            raise ValueError(
                f"The classifier of teacher '{self.name}' reads {self._vision.head_size} values (class token and mean "
                f"patch), not the {self.feature_size} of `image_embeds`: its weights are no class embeddings. "
                "Use a dual encoder such as CLIP, or a ViT or DeiT classifier."
            )
        return nn.functional.normalize(ordinary(embeds), dim=-1)

    def unknown_labels(self, labels: Sequence[str]) -> list[str]:
        """Return labels with words that the tokenizer has no token for: to this teacher they are all the same."""
        unknown = None if self.tokenizer is None else self.tokenizer.unk_token_id
        if unknown is None or not labels:
            return []
        # Without special tokens: CLIP's tokenizer has one token for the unknown and for the end of a text.
        tokens = self.tokenizer([words_of(label) for label in labels], add_special_tokens=False)["input_ids"]
        return [label for label, ids in zip(labels, tokens, strict=True) if unknown in ids]

    def identity(self) -> dict[str, Any]:
        """Return what outputs depend on, as JSON: sizes, the SHA-256 of all weights, the image processor's options."""
        return {
            "name": public_name(self.name),
            "feature_size": self.feature_size,
            "hidden_size": self.hidden_size,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights": weights_digest(self.model),
            "weights_bfloat16": weights_digest(self.model, dtype=torch.bfloat16),
            "image_processor": processor_settings(self.image_processor),
        }

    def features_digest(self) -> str:
        """Return the SHA-256 of the weights that features come from, rounded to bfloat16: a dual encoder's are all.

        Of others it is the tower's, as in the `teacher_source` of a dense student with this teacher inside.
        """
        alone = self.tower is not None and not self.has_text
        return weights_digest(self.tower if alone else self.model, dtype=torch.bfloat16)

    def text_identity(self) -> dict[str, Any]:
        """Return what [`Teacher.encode_text`] depends on beside the weights: tokenizer, names of classes."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = None if self.tokenizer is None else backend.to_str() if backend else self.tokenizer.get_vocab()
        known = json.dumps([words, self.class_names, self.logit_scale, self.logit_bias], sort_keys=True)
        return {"fingerprint": hashlib.sha256(known.encode()).hexdigest()}

    def _check_pixel_values(self, pixel_values: Tensor) -> None:
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != 3 or 0 in shape or not pixel_values.is_floating_point():
            raise ValueError(
                f"Expected floating point `pixel_values` of shape (B, 3, H, W), got {pixel_values.dtype} {shape}; "
                "pass unprocessed images as `images`."
            )
        if shape[2] % self.patch_size or shape[3] % self.patch_size:
            raise ValueError(
                f"Expected height and width to be multiples of the patch size {self.patch_size}, got {shape[2:]}: "
                "pixels at the edge would be dropped, and the grid would not cover the image."
            )
        check_finite(pixel_values, "pixel values")


_BLANK_SIDE = 224  # side of a blank image for testing image processors


def load_teacher(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    image_processor: Any = None,
) -> Teacher:
    """Load a frozen model from the Hub or a folder. Remote code is never run.

    Args:
        name_or_path: A model of a family in `docs/teachers.md`: CLIP, SigLIP, DINOv3, MAE, ConvNeXt, timm's, ...,
            bare or as an image classifier; `"embedded"` is the small teacher of photos in this package.
        device: By default the first available one of CUDA, MPS and CPU.
        dtype: By default float32 on the CPU (where float16 is 40 times slower), elsewhere that of the checkpoint.
        image_processor: Replaces the model's, e.g. if that needs torchvision, as DINOv3's does.

    Raises:
        ValueError: A family that is not supported, a checkpoint that lacks weights or a tokenizer.
        OSError: Not found or not reachable, with the Hub's message.
    """
    name = os.fspath(name_or_path)
    name = PHOTO_TEACHER if name == EMBEDDED else name
    device = torch.device(default_device() if device is None else device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    trusted = {"trust_remote_code": False}  # None would prompt the user
    with _loading(name, "configuration"):
        config = AutoConfig.from_pretrained(name, **trusted)
    _check_family(name, config)

    auto_class, options = AutoModel, {}
    if (family := VISION_TOWERS.get(config.model_type)) is not None:
        if family.is_classifier(config):
            auto_class = AutoModelForImageClassification
        else:
            options = dict(family.bare_options)
    with _loading(name, "model"), no_loading_bars():
        model, report = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True, **trusted, **options)
    # transformers fills missing weights at random. Only the mask token is not needed by a teacher.
    if missing := sorted(key for key in report["missing_keys"] if not key.endswith("mask_token")):
        raise ValueError(f"Teacher '{name}' lacks weights of {type(model).__name__}: {first_five(missing)}.")
    model.requires_grad_(False).eval().to(device)

    if image_processor is None:
        with _loading(name, "image processor"):
            image_processor = AutoImageProcessor.from_pretrained(name, **trusted)
    vision = FamilyVision(model)
    tokenizer = text = classes = None
    logit_scale, logit_bias = DEFAULT_LOGIT_SCALE, 0.0
    if config.model_type in DUAL_ENCODERS:
        with _loading(name, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(name, **trusted)
        # If CLIP's tokenizer files are missing, transformers makes a tokenizer with special tokens only.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError(f"Teacher '{name}' has no tokenizer files.")
        text, logit_scale = TowerText(model, tokenizer), float(model.logit_scale.exp())
        logit_bias = float(getattr(model, "logit_bias", 0.0))
    elif vision.head is not None:
        classes = ClassWeights(vision.head, [config.id2label[row] for row in range(vision.head.out_features)])
    return Teacher(
        name,
        model,
        plain_image_processor(image_processor),
        vision,
        tokenizer=tokenizer,
        text=text,
        classes=classes,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
    )


@contextmanager
def _loading(name: str, part: str) -> Iterator[None]:
    """Prefix the Hub's message with one line of context."""
    try:
        yield
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        advice = ""
        if "trust_remote_code" in str(error):
            advice = (
                "\nHere such code is never run: load the model yourself and make a teacher by Teacher.from_module."
            )
        raise kind(f"Could not load the {part} of teacher '{name}'.\n{error}{advice}") from error


def _check_family(name: str, config: Any) -> None:
    model_type, supported = config.model_type, sorted(VISION_TOWERS)
    if model_type in DUAL_ENCODERS:
        name, model_type = f"{name} (vision tower)", config.vision_config.model_type
    else:
        alone = (family for family, tower in VISION_TOWERS.items() if tower.standalone is not None)
        supported = sorted([*DUAL_ENCODERS, *alone])
    if model_type not in supported:
        raise ValueError(
            f"Expected teacher '{name}' to be one of {', '.join(supported)}, got '{model_type}'; "
            "make a teacher of any other module by Teacher.from_module."
        )


__all__ = [
    "DEFAULT_LOGIT_SCALE",
    "DEFAULT_TEMPLATES",
    "Teacher",
    "TeacherOutput",
    "first_five",
    "load_teacher",
]
