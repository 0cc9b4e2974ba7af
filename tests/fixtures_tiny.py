"""Tiny teachers of the real classes, saved as real ones are, a folder of photos, and a student for them.

Every weight is drawn wide enough for embeddings of order 1 that differ from image to image.

Legend: F width of the shared space.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from apm_hf import APMConfig, APMModel
from fixtures_pipelines import LABELS

TEACHER_SIZE, TEACHER_PATCH, TEACHER_GRID = 32, 8, 4
FEATURE_SIZE = 16  # F
STUDENT_SIZE, STUDENT_PATCH, STUDENT_GRID = 24, 8, 3  # not the teacher's grid
WORDS = "[PAD] [UNK] [CLS] [SEP] a photo of cat dog owl .".split()
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": TEACHER_SIZE, "patch_size": TEACHER_PATCH}


def student_config(**overrides) -> APMConfig:
    """A 3 x 3 grid of 8 x 8 patches."""
    fields = {
        "image_size": STUDENT_SIZE,
        "patch_size": STUDENT_PATCH,
        "position_size": 16,
        "hidden_sizes": [32, 24],
        "feature_size": FEATURE_SIZE,
        "rgb_hidden_sizes": [12],
        "pooling_num_heads": 4,
        "initializer_range": 0.15,
    }
    return APMConfig.preset("tiny", **{**fields, **overrides})


def student(*, seed: int = 0, **overrides) -> APMModel:
    """The same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return APMModel(student_config(**overrides))


def dense_student(*, teacher_name: str | None = None) -> APMModel:
    """A dense student with its teacher inside, a ViT of 32 pixels; `teacher_name` says where its weights lie."""
    torch.manual_seed(0)
    fields = {"image_size": 2 * TEACHER_SIZE, "hidden_sizes": [32], "position_size": 16}
    model = APMModel(APMConfig.preset("dense", feature_size=FEATURE_SIZE, **fields)).eval()
    torch.nn.init.normal_(model.decoder.feature_head.weight, std=0.3)
    model.set_teacher(randomise(ViTModel(ViTConfig(**VISION), add_pooling_layer=False)), name=teacher_name)
    return model


def randomise(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Every weight away from 0 and 1, whatever transformers' initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.2, generator=generator))
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: row for row, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )


def save_clip(folder: Path) -> Path:
    """A dual encoder with a 4 x 4 grid, which resizes the short side to 40 and crops the centre 32."""
    ends = {"pad_token_id": 0, "bos_token_id": WORDS.index("[CLS]"), "eos_token_id": WORDS.index("[SEP]")}
    text = TOWER | ends | {"vocab_size": len(WORDS), "max_position_embeddings": 12}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=FEATURE_SIZE))
    randomise(model).save_pretrained(folder)
    crop = {"height": TEACHER_SIZE, "width": TEACHER_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=crop).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_classifier(folder: Path) -> Path:
    """An image classifier, which squeezes the whole picture into 32 x 32."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: row for row, label in enumerate(LABELS)}}
    randomise(ViTForImageClassification(ViTConfig(**VISION, **labels))).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": TEACHER_SIZE, "width": TEACHER_SIZE}).save_pretrained(folder)
    return folder


def resampling_slack(image_processor, *, backend: str | None = None) -> float:
    """Bound how far pixel values of this processor, or of another backend of it, are from those resized with PIL.

    torchvision resizes tensors with other roundings of the kernel's weights than PIL, and both round to 8 bits after
    the rows and after the columns: up to two levels of 255, which normalization divides by the deviation. Whatever
    comes before and after is the same arithmetic.
    """
    levels = 0 if (backend or image_processor.backend) == "pil" else 2
    return levels / 255 / min(image_processor.image_std) + 1e-5


def photo(seed: int, *, size: tuple[int, int] = (44, 36)) -> Image.Image:
    """Smooth blobs of colour, different for every seed; `size` is (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def save_photos(folder: Path, num_images: int, *, first: int = 0) -> Path:
    """A folder of PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + num_images):
        photo(seed).save(folder / f"{seed:03d}.png")
    return folder


def save_splits(folder: Path, *, num_train: int, num_validation: int) -> Path:
    """`train/` and `validation/` folders of PNG files, as `datasets` finds them."""
    save_photos(folder / "train", num_train)
    save_photos(folder / "validation", num_validation, first=num_train)
    return folder
