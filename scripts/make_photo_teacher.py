"""Distil the photo teacher that travels with the package: a small dual encoder, from a larger one, on Caltech-101.

    python scripts/make_photo_teacher.py --teacher FOLDER --dataset FOLDER --steps 4 --max_images 600 \
        --output_dir /tmp/teacher --work_dir /tmp/work
    python scripts/make_photo_teacher.py --teacher FOLDER --dataset FOLDER --work_dir /tmp/work

The teacher is a ViT-Tiny with a text tower (`vision-text-dual-encoder`); the student keeps five of its twelve layers
and learns a text tower of its own, with one token per word. Four losses: cosines to the teacher's image embedding, to
its projected patch tokens and to its text embeddings, and, since Caltech-101 has labels, the cross-entropy of every
photo over the names of all classes, as in CLIP (arXiv:2103.00020). So the student is supervised on these classes.

Which photos are held out is decided by their SHA-256 alone: of every class the ten smallest are for testing, the next
three are watched during training. What the teacher outputs for the others is computed once and lies in `--work_dir`,
as do the checkpoints from which an interrupted run goes on.

Caltech-101 (Fei-Fei Li, Marco Andreetto, Marc'Aurelio Ranzato, Pietro Perona) is CC BY 4.0.

Shape legend: B photos, N views, S image side, (rows, cols) the grid of patches, F width of the embeddings, K classes,
W words, T templates.
"""

import argparse
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import (
    BertConfig,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    set_seed,
)

from apm_hf import Teacher, load_teacher
from apm_hf.assets import PHOTO_TEACHER
from apm_hf.data.images import decode_image
from apm_hf.data.loading import load_images

IMAGE_SIZE, PATCH_SIZE = 128, 16
STORED_SIZE = 160  # side of the photos from which windows are cut
KEPT_LAYERS, NUM_FROZEN = (0, 1, 3, 5, 8), 2  # of the teacher's twelve layers; the first ones stay the teacher's
NUM_TEST, NUM_WATCHED = 10, 3  # photos of every class that are held out
BACKGROUND = "BACKGROUND_Google"  # photos of no class: looked at, not named
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of an {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a drawing of a {}.",
    "itap of a {}.",
    "a bad photo of the {}.",
    "a good photo of the {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "{}",
)
SPECIAL_TOKENS = ("<pad>", "<unk>", "<cls>", "<sep>")  # in the order of their ids
# The data's class: its name in words, then synonyms.
CLASS_WORDS: dict[str, tuple[str, ...]] = {
    "accordion": ("accordion", "squeezebox"),
    "airplanes": ("airplane", "aeroplane", "plane", "aircraft", "airliner", "jet"),
    "anchor": ("anchor", "ship anchor"),
    "ant": ("ant",),
    "barrel": ("barrel", "cask", "keg"),
    "bass": ("bass", "bass fish", "sea bass"),
    "beaver": ("beaver",),
    "binocular": ("binoculars", "binocular", "field glasses"),
    "bonsai": ("bonsai", "bonsai tree"),
    "brain": ("brain", "human brain"),
    "brontosaurus": ("brontosaurus", "long-necked dinosaur"),
    "buddha": ("buddha", "buddha statue", "statue of buddha"),
    "butterfly": ("butterfly",),
    "camera": ("camera", "photo camera", "film camera"),
    "cannon": ("cannon", "artillery gun"),
    "car_side": ("car side", "car", "side of a car", "automobile", "station wagon"),
    "ceiling_fan": ("ceiling fan",),
    "cellphone": ("cellphone", "cell phone", "mobile phone", "cellular telephone"),
    "chair": ("chair",),
    "chandelier": ("chandelier",),
    "cougar_body": ("cougar body", "cougar", "puma", "mountain lion"),
    "cougar_face": ("cougar face", "face of a cougar", "head of a cougar"),
    "crab": ("crab",),
    "crayfish": ("crayfish", "crawfish", "crawdad"),
    "crocodile": ("crocodile", "alligator"),
    "crocodile_head": ("crocodile head", "head of a crocodile", "jaws of a crocodile"),
    "cup": ("cup", "mug", "teacup", "coffee cup"),
    "dalmatian": ("dalmatian", "spotted dog"),
    "dollar_bill": ("dollar bill", "banknote", "dollar", "money"),
    "dolphin": ("dolphin",),
    "dragonfly": ("dragonfly",),
    "electric_guitar": ("electric guitar", "guitar"),
    "elephant": ("elephant",),
    "emu": ("emu",),
    "euphonium": ("euphonium", "tuba", "baritone horn"),
    "ewer": ("ewer", "pitcher", "jug"),
    "Faces": ("face", "human face", "person", "portrait", "man", "woman"),
    "ferry": ("ferry", "ferry boat"),
    "flamingo": ("flamingo", "pink flamingo"),
    "flamingo_head": ("flamingo head", "head of a flamingo"),
    "garfield": ("garfield", "cartoon cat"),
    "gerenuk": ("gerenuk", "antelope", "gazelle"),
    "gramophone": ("gramophone", "phonograph", "record player"),
    "grand_piano": ("grand piano", "piano"),
    "hawksbill": ("hawksbill", "sea turtle", "turtle", "hawksbill turtle"),
    "headphone": ("headphone", "headphones", "headset", "earphones"),
    "hedgehog": ("hedgehog",),
    "helicopter": ("helicopter", "chopper"),
    "ibis": ("ibis",),
    "inline_skate": ("inline skate", "inline skates", "roller skate", "rollerblade"),
    "joshua_tree": ("joshua tree", "yucca"),
    "kangaroo": ("kangaroo",),
    "ketch": ("ketch", "sailboat", "sailing boat", "yacht"),
    "lamp": ("lamp", "table lamp", "desk lamp"),
    "laptop": ("laptop", "laptop computer", "notebook computer"),
    "Leopards": ("leopard",),
    "llama": ("llama", "alpaca"),
    "lobster": ("lobster",),
    "lotus": ("lotus", "lotus flower"),
    "mandolin": ("mandolin",),
    "mayfly": ("mayfly",),
    "menorah": ("menorah", "candelabrum", "candlestick"),
    "metronome": ("metronome",),
    "minaret": ("minaret", "tower of a mosque", "mosque"),
    "Motorbikes": ("motorbike", "motorcycle"),
    "nautilus": ("nautilus", "nautilus shell"),
    "octopus": ("octopus",),
    "okapi": ("okapi",),
    "pagoda": ("pagoda",),
    "panda": ("panda", "giant panda", "panda bear"),
    "pigeon": ("pigeon", "dove"),
    "pizza": ("pizza",),
    "platypus": ("platypus",),
    "pyramid": ("pyramid", "egyptian pyramid"),
    "revolver": ("revolver", "handgun", "pistol", "gun"),
    "rhino": ("rhino", "rhinoceros"),
    "rooster": ("rooster", "cock", "chicken"),
    "saxophone": ("saxophone", "sax"),
    "schooner": ("schooner", "tall ship", "sailing ship"),
    "scissors": ("scissors", "pair of scissors"),
    "scorpion": ("scorpion",),
    "sea_horse": ("sea horse", "seahorse"),
    "snoopy": ("snoopy", "cartoon dog"),
    "soccer_ball": ("soccer ball", "football"),
    "stapler": ("stapler",),
    "starfish": ("starfish", "sea star"),
    "stegosaurus": ("stegosaurus", "plated dinosaur"),
    "stop_sign": ("stop sign", "traffic sign"),
    "strawberry": ("strawberry",),
    "sunflower": ("sunflower",),
    "tick": ("tick",),
    "trilobite": ("trilobite", "fossil"),
    "umbrella": ("umbrella", "parasol"),
    "watch": ("watch", "wristwatch", "wrist watch"),
    "water_lilly": ("water lily", "water lilly"),
    "wheelchair": ("wheelchair",),
    "wild_cat": ("wild cat", "wildcat"),
    "windsor_chair": ("windsor chair", "wooden chair"),
    "wrench": ("wrench", "spanner"),
    "yin_yang": ("yin yang", "yin and yang", "yin yang symbol"),
}
# Words for everyday photos, of which the student has seen none by name: it takes the teacher's word for them.
EVERYDAY_WORDS = tuple(
    "dog, puppy, cat, kitten, tabby cat, horse, cow, sheep, pig, bird, owl, eagle, duck, penguin, fish, goldfish, "
    "shark, whale, snake, lizard, frog, spider, bee, beetle, snail, monkey, gorilla, bear, lion, tiger, zebra, "
    "camel, fox, wolf, rabbit, mouse, squirrel, truck, bus, train, bicycle, boat, ship, rocket, street, traffic "
    "light, house, church, castle, palace, bridge, tower, mountain, volcano, beach, lake, tree, mushroom, flower, "
    "daisy, food, plate, bowl, bottle, glass, coffee, espresso, table, bed, sofa, desk, door, window, book, "
    "computer, keyboard, telephone, television, clock, shoe, boot, dress, hat, bag, backpack, ball, drum, violin, "
    "trumpet, knife, spoon, hammer, fruit, apple, orange, banana, lemon, bread, cheese, ice cream, hamburger, "
    "soup, astronaut".split(", ")
)


@dataclass(frozen=True)
class PhotoTeacherRecipe:
    """Everything the weights depend on, and where they go."""

    teacher: str
    dataset: str
    work_dir: str
    output_dir: str = PHOTO_TEACHER
    steps: int = 480
    batch_size: int = 64
    learning_rate: float = 1e-3
    text_steps: int = 400
    text_learning_rate: float = 2e-3
    weight_decay: float = 0.05
    class_weight: float = 1.0
    label_smoothing: float = 0.1
    max_images: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Photos:
    """Photos of one part of the data.

    Args:
        files: encoded images.
        labels: `(B,)` int64, indices into `class_names`; -1 for photos of no class.
        class_names: K names in words.
    """

    files: list[bytes]
    labels: Tensor
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def images(self, rows: slice = slice(None)) -> list[Image.Image]:
        """Decode some, as upright RGB pictures."""
        return [decode_image(file).convert("RGB") for file in self.files[rows]]


def load_parts(dataset: str, max_images: int | None = None) -> dict[str, Photos]:
    """Load the photos to learn from, those that are watched and those to test with: `train`, `watched`, `test`.

    Of photos that occur twice, byte for byte, the first is taken.

    Args:
        dataset: folder or Hub name of Caltech-101.
        max_images: only the first photos by their SHA-256, for a quick try.
    """
    data = load_images(dataset)
    label_column, names = data.require_labels(), data.class_names or []
    known = [name for name in names if name != BACKGROUND]
    if strange := sorted(set(known) - CLASS_WORDS.keys()):
        raise ValueError(f"--dataset: expected the classes of Caltech-101, got {', '.join(strange[:5])}")
    rows: dict[str, tuple[bytes, int]] = {}
    for row in data.dataset:
        file = row[data.image_column]["bytes"]
        rows.setdefault(hashlib.sha256(file).hexdigest(), (file, row[label_column]))
    taken: dict[str, int] = defaultdict(int)
    parts: dict[str, tuple[list[bytes], list[int]]] = {part: ([], []) for part in ("train", "watched", "test")}
    for digest in sorted(rows)[:max_images]:
        file, label = rows[digest]
        name, part = names[label], "train"
        if name != BACKGROUND:
            part = "test" if taken[name] < NUM_TEST else "watched" if taken[name] < NUM_TEST + NUM_WATCHED else "train"
            taken[name] += 1
        parts[part][0].append(file)
        parts[part][1].append(-1 if name == BACKGROUND else known.index(name))
    words = [CLASS_WORDS[name][0] for name in known]
    return {part: Photos(files, torch.tensor(labels), words) for part, (files, labels) in parts.items()}


def class_words(class_names: list[str]) -> list[tuple[str, ...]]:
    """Return the name and the synonyms of every class."""
    by_name = {words[0]: words for words in CLASS_WORDS.values()}
    return [by_name[name] for name in class_names]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; words it has never seen become `<unk>`."""
    names = [word for words in CLASS_WORDS.values() for word in words]
    text = " ".join((*TEMPLATES, *names, *EVERYDAY_WORDS)).replace("{}", "")
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", text)))
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *words))}
    pad, unknown, begin, end = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, vocabulary[begin]), (end, vocabulary[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unknown,
        cls_token=begin,
        sep_token=end,
        padding_side="right",
        model_max_length=24,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(teacher: Teacher, tokenizer: PreTrainedTokenizerFast, class_names: list[str]) -> Any:
    """Return a dual encoder of 2.7 million parameters whose image tower starts as some of the teacher's layers."""
    source: Any = teacher.model
    vision = source.config.vision_config.to_dict()
    vision |= {"image_size": IMAGE_SIZE, "num_hidden_layers": len(KEPT_LAYERS)}
    text = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VisionTextDualEncoderConfig(
        vision_config=ViTConfig(**vision).to_dict(), text_config=text.to_dict(), projection_dim=teacher.feature_size
    )
    config.id2label, config.label2id = dict(enumerate(class_names)), {name: i for i, name in enumerate(class_names)}
    model: Any = VisionTextDualEncoderModel(config)
    weights = source.vision_model.state_dict()
    positions = weights["embeddings.position_embeddings"]  # (1, 1 + rows * cols, C)
    side, wanted = math.isqrt(positions.shape[1] - 1), IMAGE_SIZE // PATCH_SIZE
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False, antialias=True)
    weights["embeddings.position_embeddings"] = torch.cat([positions[:, :1], grid.flatten(2).mT], dim=1)
    own = model.vision_model.state_dict()
    for name in own:
        layer = re.sub(r"(?<=layer\.)\d+", lambda match: str(KEPT_LAYERS[int(match[0])]), name)
        layer = re.sub(r"(?<=layers\.)\d+", lambda match: str(KEPT_LAYERS[int(match[0])]), layer)
        own[name].copy_(weights[layer])
    model.visual_projection.load_state_dict(source.visual_projection.state_dict())
    with torch.no_grad():
        model.logit_scale.copy_(source.logit_scale)
    return model


def make_image_processor(teacher: Teacher) -> ViTImageProcessorPil:
    given = teacher.image_processor
    return ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=given.image_mean,
        image_std=given.image_std,
        resample=given.resample,
    )


def normalisation(image_processor: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the channels, `(3, 1, 1)` each."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    return mean, std


def squares(photos: list[Image.Image], side: int) -> Tensor:
    """Return whole photos, squeezed into squares, `(B, 3, S, S)` uint8."""
    resized = [np.asarray(photo.resize((side, side), Image.Resampling.BICUBIC)) for photo in photos]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()  # (B, S, S, 3) -> (B, 3, S, S)


def teacher_targets(recipe: PhotoTeacherRecipe, teacher: Teacher, photos: Photos) -> dict[str, Tensor]:
    """Return photos and what the teacher outputs for them, from the work folder where they are there.

    Returns:
        `pixels` `(B, 3, S, S)` uint8; `image_embeds` `(B, F)` and `features` `(B, rows, cols, F)`, bfloat16 and of
        length 1, and `labels` `(B,)`.
    """
    path = Path(recipe.work_dir) / "targets.safetensors"
    settings = json.dumps([teacher.identity(), STORED_SIZE], sort_keys=True)
    mark = hashlib.sha256(settings.encode() + b"".join(photos.files)).hexdigest()
    if path.exists():
        targets = load_file(path)
        if bytes(targets.pop("mark").tolist()).hex() == mark:
            return targets
    fast = load_teacher(recipe.teacher, device="cpu", dtype="bfloat16")
    mean, std = normalisation(teacher.image_processor)
    embeds, features, pixels = [], [], []
    for start in tqdm(range(0, len(photos), 32), desc="teacher", mininterval=10):
        images = photos.images(slice(start, start + 32))
        pixels.append(squares(images, STORED_SIZE))
        pixel_values = (squares(images, teacher.image_size) / 255 - mean) / std
        outputs = fast.encode_images(pixel_values=pixel_values)
        assert outputs.image_embeds is not None and outputs.features is not None
        embeds.append(F.normalize(outputs.image_embeds, dim=-1).bfloat16())
        features.append(F.normalize(outputs.features, dim=-1).bfloat16())
    targets = {"image_embeds": torch.cat(embeds), "features": torch.cat(features), "labels": photos.labels}
    targets["pixels"] = torch.cat(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    save_file(targets | {"mark": torch.tensor(list(bytes.fromhex(mark)), dtype=torch.uint8)}, beside)
    os.replace(beside, path)
    return targets


def augment(pixels: Tensor, features: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Take the same random window, mirrored or not, of pixels and of the teacher's map; change the pixels' colours.

    Args:
        pixels: `(B, 3, S, S)` in [0, 1].
        features: `(B, rows, cols, F)`.

    Returns:
        Pixels of the student's size, in [0, 1], and `(B, rows', cols', F)`, one location per patch.
    """
    batch_size, side, grid = len(pixels), IMAGE_SIZE, IMAGE_SIZE // PATCH_SIZE

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch_size, *shape, generator=generator)

    extent = uniform(0.75, 1.0, 2)
    centre = uniform(-1, 1, 2) * (1 - extent)
    mirrored = torch.where(torch.rand(batch_size, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch_size, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = extent[:, 0] * mirrored, extent[:, 1], centre
    cut = [
        F.grid_sample(
            maps, F.affine_grid(theta, [batch_size, maps.shape[1], size, size], align_corners=False),
            padding_mode="border", align_corners=False,
        )
        for maps, size in ((pixels, side), (features.float().permute(0, 3, 1, 2), grid))
    ]  # fmt: skip
    images = cut[0]
    mean = images.mean(dim=(2, 3), keepdim=True)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * uniform(0.3, 1.3, 1, 1, 1)
    images = (images - mean) * uniform(0.7, 1.2, 1, 1, 1) + mean * uniform(0.75, 1.2, 3, 1, 1)
    return images.clamp(0, 1), cut[1].permute(0, 2, 3, 1)


def vision_embeds(model: Any, pixel_values: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-length embeddings of images, `(B, F)`, and of the patches in `keep`, `(B, len(keep), F)`, in one space.

    Only the patches in `keep` are looked at: as in FLIP (arXiv:2212.00794), training on some of them costs less.
    """
    tower = model.vision_model
    with torch.no_grad():  # the first layers stay the teacher's
        tokens = tower.embeddings(pixel_values)  # (B, 1 + L, C)
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:][:, keep]], dim=1)
        for layer in tower.layers[:NUM_FROZEN]:
            tokens = layer(tokens)
    for layer in tower.layers[NUM_FROZEN:]:
        tokens = layer(tokens)
    # The pooler reads the first token: each token stands alone, as a sequence of its own.
    pooled = tower.pooler(tower.layernorm(tokens).flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])
    embeds = F.normalize(model.visual_projection(pooled), dim=-1)
    return embeds[:, 0], embeds[:, 1:]


def text_embeds(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """Unit-length embeddings of prompts, `(n, F)`."""
    return F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)


def rate_at(step: int, steps: int) -> float:
    """Rise to 1 over the first twentieth of the steps, then fall to 0 along a cosine."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Words:
    """Draw prompts of every class, and of some everyday words, and the teacher's embeddings of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, teacher: Teacher, class_names: list[str]) -> None:
        self.tokenizer, self.classes = tokenizer, class_words(class_names)
        words = [*(word for one in self.classes for word in one), *EVERYDAY_WORDS]
        self.row_of = {word: row for row, word in enumerate(words)}
        self.embeds = torch.stack([teacher.encode_text(words, (template,)) for template in TEMPLATES])  # (T, W, F)
        self.tokens = torch.tensor(sorted({token for word in words for token in tokenizer(word)["input_ids"]}))

    def draw(self, generator: torch.Generator) -> tuple[Any, Tensor]:
        """Return tokens of `K + 28` prompts in one template, those of the classes first, and `(K + 28, F)`."""
        chosen = [one[int(torch.randint(len(one), (), generator=generator))] for one in self.classes]
        everyday = torch.randperm(len(EVERYDAY_WORDS), generator=generator)[:28].tolist()
        chosen += [EVERYDAY_WORDS[index] for index in everyday]
        template = int(torch.randint(len(TEMPLATES), (), generator=generator))
        prompts = [TEMPLATES[template].format(word) for word in chosen]
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        is_filler = ~torch.isin(tokens["input_ids"], self.tokens) & (tokens["input_ids"] >= len(SPECIAL_TOKENS))
        forgotten = is_filler & (torch.rand(is_filler.shape, generator=generator) < 0.1)
        tokens["input_ids"][forgotten] = self.tokenizer.unk_token_id  # prompts may come in words it never met
        return tokens, self.embeds[template, [self.row_of[word] for word in chosen]]


class Training:
    """Two phases: the text tower learns to name the teacher's embeddings of photos, then both towers learn together.

    The first is LiT (arXiv:2111.07991) on what is cached, which costs next to nothing.
    """

    def __init__(self, recipe: PhotoTeacherRecipe, model: Any, words: Words, targets: dict[str, Tensor]) -> None:
        self.recipe, self.model, self.words, self.targets = recipe, model, words, targets

    def losses(self, image: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the loss on words and the one on classes, of image embeddings `(B, F)` with labels `(B,)`."""
        tokens, wanted = self.words.draw(generator)
        texts = text_embeds(self.model, tokens)
        scale = self.model.logit_scale.exp().clamp(max=100)
        logits = scale * image @ texts[: len(self.words.classes)].T
        smoothing = self.recipe.label_smoothing
        class_loss = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing)
        return 1 - (texts * wanted).sum(-1).mean(), class_loss

    def learn_words(self) -> None:
        """Train the text tower alone."""
        recipe, targets = self.recipe, self.targets
        parameters = [*self.model.text_model.parameters(), *self.model.text_projection.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=recipe.text_learning_rate, weight_decay=recipe.weight_decay)
        for step in (progress := tqdm(range(recipe.text_steps), desc="words", mininterval=10)):
            generator = torch.Generator().manual_seed((recipe.seed << 32) + (1 << 31) + step)
            rows = torch.randint(len(targets["labels"]), (256,), generator=generator)
            losses = self.losses(targets["image_embeds"][rows].float(), targets["labels"][rows], generator)
            sum(losses).backward()  # type: ignore[union-attr]
            self.update(optimizer, recipe.text_learning_rate * rate_at(step, recipe.text_steps))
            if step % 50 == 0:
                progress.set_postfix(text=f"{losses[0].item():.3f}", classes=f"{losses[1].item():.3f}")

    def update(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        self.model.zero_grad()

    def learn_photos(self, tokenizer: PreTrainedTokenizerFast, processor: Any, watched: Photos) -> None:
        """Train both towers; goes on from the work folder's checkpoint, where there is one of the same recipe."""
        recipe, model, targets = self.recipe, self.model, self.targets
        mean, std = normalisation(processor)
        decayed, others = ([one for one in model.parameters() if (one.ndim > 1) == wide] for wide in (True, False))
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
        checkpoint = Path(recipe.work_dir) / "checkpoint.pt"
        start = 0
        if checkpoint.exists() and (state := torch.load(checkpoint, weights_only=True))["recipe"] == repr(recipe):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            start = state["step"]
        else:
            self.learn_words()
        progress = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc="steps", mininterval=10)
        for step in progress:
            # Seeded by its number, so that a resumed run is the same run.
            generator = torch.Generator().manual_seed((recipe.seed << 32) + step)
            rows = torch.randint(len(targets["labels"]), (recipe.batch_size,), generator=generator)
            images, features = augment(targets["pixels"][rows] / 255, targets["features"][rows], generator=generator)
            num_patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
            num_kept = num_patches // 2 if step < 0.8 * recipe.steps else num_patches  # all, towards the end
            keep = torch.randperm(num_patches, generator=generator)[:num_kept]
            image, patches = vision_embeds(model, (images - mean) / std, keep)
            image_loss = 1 - (image * targets["image_embeds"][rows].float()).sum(-1).mean()
            patch_loss = 1 - (patches * F.normalize(features.flatten(1, 2)[:, keep], dim=-1)).sum(-1).mean()
            text_loss, class_loss = self.losses(image, targets["labels"][rows], generator)
            (image_loss + patch_loss + text_loss + recipe.class_weight * class_loss).backward()
            self.update(optimizer, recipe.learning_rate * rate_at(step, recipe.steps))
            if step % 20 == 0:
                losses = {"image": image_loss, "patch": patch_loss, "text": text_loss, "class": class_loss}
                progress.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()})
            if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
                score = accuracy(model, tokenizer, processor, watched)
                tqdm.write(f"step {step + 1}: {score:.1f} % of the watched photos")
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state | {"step": step + 1, "recipe": repr(recipe)}, checkpoint.with_suffix(".part"))
                os.replace(checkpoint.with_suffix(".part"), checkpoint)


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerFast, processor: Any, photos: Photos) -> float:
    """Zero-shot top-1 in percent, with the first template."""
    was_training = model.training
    model.eval()
    prompts = [TEMPLATES[0].format(name) for name in photos.class_names]
    texts = text_embeds(model, tokenizer(prompts, padding=True, return_tensors="pt"))
    right = 0
    for start in range(0, len(photos), 64):
        batch = processor(photos.images(slice(start, start + 64)), return_tensors="pt")
        embeds = model.get_image_features(**batch).pooler_output
        right += int(((embeds @ texts.T).argmax(dim=-1) == photos.labels[start : start + 64]).sum())
    model.train(was_training)
    return 100 * right / len(photos)


def save(recipe: PhotoTeacherRecipe, model: Any, tokenizer: PreTrainedTokenizerFast, processor: Any) -> None:
    """Weights in bfloat16, with a configuration that makes `from_pretrained` load them in single precision."""
    folder = Path(recipe.output_dir)
    model.bfloat16().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone; an installed package has other readers
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def run(recipe: PhotoTeacherRecipe) -> dict[str, float]:
    """Train, save and test; returns zero-shot top-1 on the held-out photos, in percent, of student and teacher."""
    set_seed(recipe.seed)
    teacher = load_teacher(recipe.teacher, device="cpu")
    parts = load_parts(recipe.dataset, recipe.max_images)
    print({part: len(photos) for part, photos in parts.items()})
    tokenizer, processor = make_tokenizer(), make_image_processor(teacher)
    model = make_model(teacher, tokenizer, parts["train"].class_names)
    words, targets = (
        Words(tokenizer, teacher, parts["train"].class_names),
        teacher_targets(recipe, teacher, parts["train"]),
    )
    model.train()
    Training(recipe, model, words, targets).learn_photos(tokenizer, processor, parts["watched"])
    save(recipe, model, make_tokenizer(), processor)  # another one, since use leaves traces in it
    student = load_teacher(recipe.output_dir, device="cpu")
    return {
        "photo teacher": accuracy(student.model, student.tokenizer, processor, parts["test"]),
        "its teacher": accuracy(teacher.model, teacher.tokenizer, teacher.image_processor, parts["test"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(PhotoTeacherRecipe):
        kind, needed = (
            int if field.name == "max_images" else field.type,
            field.name in ("teacher", "dataset", "work_dir"),
        )
        default = None if needed else field.default
        parser.add_argument(f"--{field.name}", type=kind, default=default, required=needed)
    for name, score in run(PhotoTeacherRecipe(**vars(parser.parse_args()))).items():
        print(f"{name:20s} {score:5.1f} %")


if __name__ == "__main__":
    main()
