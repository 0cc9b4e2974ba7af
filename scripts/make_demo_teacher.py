"""Train the tiny CLIP teacher that ships inside the package, on procedural part-whole scenes.

    python scripts/make_demo_teacher.py --steps 20 --num_scenes 240 --num_test_scenes 60 --output_dir /tmp/teacher
    python scripts/make_demo_teacher.py

The second command made `src/apm_hf/assets/demo-teacher` (about 20 minutes on two CPU cores). Three losses, all of
them cosines to text embeddings: the image embedding points to its class's caption, as in CLIP (arXiv:2103.00020);
each patch token, sent through the same projection, points to the name of the part it shows and, on the object, to
the name of the whole. So the teacher's patches know both levels. The augmentation is kept light on purpose: the demo
wants a teacher that reads clean scenes well and corrupted ones badly.

Shape legend: B images, L = rows * cols patches, p patch size, K classes, P parts, C and F widths of tokens and
embeddings, N scenes.
"""

import argparse
import json
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    set_seed,
)

from apm_hf.data.basic_corruptions import CORRUPTIONS, corrupt
from apm_hf.data.scenes import CLASS_NAMES, PART_NAMES, make_scene
from apm_hf.position_encoding import grid_coordinates, position_code

IMAGE_SIZE, PATCH_SIZE = 96, 8
WHITENING_FLOOR = 0.01  # added to every variance, so that detail which hardly varies is not blown up
# The first is what zero-shot users write; the others let prompt ensembles work. Worded after CLIP's ImageNet prompts.
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a drawing of a {}.",
    "a cartoon {}.",
    "itap of a {}.",
    "art of the {}.",
    "a {} in a video game.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "a bad photo of the {}.",
    "a blurry photo of a {}.",
    "{}",
)
SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")  # in the order of their ids


@dataclass(frozen=True)
class TeacherRecipe:
    """Everything the weights depend on, and where they go."""

    output_dir: str = str(Path(__file__).parents[1] / "src" / "apm_hf" / "assets" / "demo-teacher")
    steps: int = 2400
    batch_size: int = 64
    num_scenes: int = 24_000
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    num_kept_patches: int = 64
    seed: int = 0
    test_seed: int = 1
    num_test_scenes: int = 600


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; words it has never seen become `<unk>`."""
    text = " ".join((*TEMPLATES, *CLASS_NAMES, *PART_NAMES)).replace("{}", "")
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
        bos_token=begin,
        eos_token=end,
        padding_side="right",
        model_max_length=24,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP of 1.3 million parameters. Its eos id must not be 2, which CLIP takes for an old checkpoint's."""
    vision = {"hidden_size": 144, "intermediate_size": 432, "num_hidden_layers": 5, "num_attention_heads": 6}
    text = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "projection_dim": 144}
    text |= {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": 144,
    }
    text |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=144)
    config.id2label, config.label2id = dict(enumerate(CLASS_NAMES)), {name: i for i, name in enumerate(CLASS_NAMES)}
    config._attn_implementation = "eager"  # in bfloat16 on a CPU, twice as fast as sdpa; not saved
    return CLIPModel(config)


@torch.no_grad()
def start_well(model: CLIPModel, pixel_values: Tensor) -> None:
    """Initial weights from which so small a ViT learns several times faster than from CLIP's own.

    Patch embeddings whiten the patches of some scenes, position embeddings are sin-cos codes of comparable size, and
    keys equal queries, so that tokens first attend to their likes and neighbours (as in arXiv:2305.09828).
    """
    tower = model.vision_model
    width, grid = model.config.vision_config.hidden_size, IMAGE_SIZE // PATCH_SIZE
    patches = F.unfold(pixel_values, PATCH_SIZE, stride=PATCH_SIZE).mT.flatten(0, 1)  # (B, 3*p*p, L) -> (B*L, 3*p*p)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    whitening = directions / (variances + WHITENING_FLOOR).sqrt()  # by column, smallest variance first
    tower.embeddings.patch_embedding.weight.copy_(whitening[:, -width:].T.unflatten(1, (3, PATCH_SIZE, PATCH_SIZE)))
    code = position_code(grid_coordinates(grid, grid), grid, grid, width)
    tower.embeddings.position_embedding.weight[1:] = code
    for layer in tower.encoder.layers:
        torch.nn.init.xavier_uniform_(layer.self_attn.q_proj.weight)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def make_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False)


def render(index: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene as `(3, H, W)` uint8, and how many pixels of each patch show each part, `(P, rows, cols)` uint8."""
    scene = make_scene(index, seed=seed, image_size=IMAGE_SIZE)
    grid = IMAGE_SIZE // PATCH_SIZE
    patches = scene.part_mask.reshape(grid, PATCH_SIZE, grid, PATCH_SIZE)  # (H, W) -> (rows, p, cols, p)
    counts = np.stack([(patches == part).sum(axis=(1, 3)) for part in range(len(PART_NAMES))])
    return np.asarray(scene.image).transpose(2, 0, 1), counts.astype(np.uint8)


def render_all(num_scenes: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """All training scenes, held in memory: `(N, 3, H, W)` and `(N, P, rows, cols)`, uint8."""
    with ProcessPoolExecutor() as pool:
        scenes = pool.map(partial(render, seed=seed), range(num_scenes), chunksize=100)
        images, counts = zip(*tqdm(scenes, total=num_scenes, desc="scenes"), strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(counts))


def shuffled_batches(num_scenes: int, batch_size: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(num_scenes, generator=generator).split(batch_size)


def augment(images: Tensor, *, generator: torch.Generator) -> Tensor:
    """Light colour jitter and faint noise, `(B, 3, H, W)` in [0, 1]: far milder than the demo's corruptions."""
    batch_size = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch_size, *shape, generator=generator)

    channels = torch.rand(batch_size, 3, generator=generator).argsort(dim=1)  # colours carry no class: permute them
    images = images[torch.arange(batch_size)[:, None], channels]
    mean = images.mean(dim=(2, 3), keepdim=True)
    images = (images - mean) * uniform(0.75, 1.1, 1, 1, 1) + mean * uniform(0.85, 1.15, 3, 1, 1)
    noise = torch.randn(images.shape, generator=generator) * uniform(0.0, 0.02, 1, 1, 1)
    return (images + noise).clamp(0, 1)


def vision_embeds(model: CLIPModel, pixel_values: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Image embeddings `(B, F)` and, in the same space, those of the patches in `keep`, `(B, len(keep), F)`.

    Only the patches in `keep` are looked at: as in FLIP (arXiv:2212.00794), training on some of them costs less.
    """
    tower = model.vision_model
    tokens = tower.embeddings(pixel_values)  # (B, 1 + L, C)
    tokens = torch.cat([tokens[:, :1], tokens[:, 1:][:, keep]], dim=1)
    tokens = tower.encoder(inputs_embeds=tower.pre_layrnorm(tokens)).last_hidden_state
    embeds = model.visual_projection(tower.post_layernorm(tokens))
    return embeds[:, 0], embeds[:, 1:]


def text_embeds(model: CLIPModel, tokens: dict[str, Tensor]) -> Tensor:
    """Unit-length embeddings of prompts, `(K, F)`."""
    return F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)


def dense_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over patches: logits and target shares `(B, L, K)`, weights `(B, L)`."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
    return (weights.flatten() * losses).sum() / weights.sum()


def train(recipe: TeacherRecipe, model: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> None:
    device = model.device
    generator = torch.Generator().manual_seed(recipe.seed)
    images, counts = render_all(recipe.num_scenes, seed=recipe.seed)
    processor = make_image_processor()
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    names = torch.tensor(tokenizer.convert_tokens_to_ids([*CLASS_NAMES, *PART_NAMES]))
    start_well(model, (images[:512] / 255 - mean) / std)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.steps, pct_start=max(0.1, 2 / recipe.steps)
    )
    batches = shuffled_batches(recipe.num_scenes, recipe.batch_size, generator=generator)
    num_patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
    model.train()
    for step in (progress := tqdm(range(recipe.steps), desc="steps")):
        rows = next(batches)
        pixel_values = (augment(images[rows] / 255, generator=generator) - mean) / std
        num_kept = recipe.num_kept_patches if step < 0.8 * recipe.steps else num_patches  # all, towards the end
        keep = torch.randperm(num_patches, generator=generator)[:num_kept]
        labels = (rows % len(CLASS_NAMES)).to(device)
        shares = (counts[rows].flatten(2)[..., keep].mT / PATCH_SIZE**2).to(device)  # -> (B, num_kept, P)
        on_object = shares[..., PART_NAMES.index("occluder") + 1 :].sum(dim=-1)
        weights = 1.0 - 0.75 * shares[..., 0]  # most patches are background
        template = TEMPLATES[torch.randint(len(TEMPLATES), (), generator=generator)]
        prompts = [template.format(name) for name in (*CLASS_NAMES, *PART_NAMES)]
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        is_filler = ~torch.isin(tokens["input_ids"], names) & (tokens["input_ids"] >= len(SPECIAL_TOKENS))
        forgotten = is_filler & (torch.rand(is_filler.shape, generator=generator) < 0.1)
        tokens["input_ids"][forgotten] = tokenizer.unk_token_id  # prompts may come in words it never met

        with torch.autocast(device.type, torch.bfloat16):
            text = text_embeds(model, tokens.to(device))
            image, patches = (
                F.normalize(embeds, dim=-1) for embeds in vision_embeds(model, pixel_values.to(device), keep)
            )
        scale = model.logit_scale.exp().clamp(max=100)
        class_text, part_text = text.float().split((len(CLASS_NAMES), len(PART_NAMES)))
        class_loss = F.cross_entropy(scale * image.float() @ class_text.T, labels)
        part_loss = dense_cross_entropy(scale * patches.float() @ part_text.T, shares, weights)
        own_class = F.one_hot(labels, len(CLASS_NAMES))[:, None].expand(-1, num_kept, -1).float()
        whole_loss = dense_cross_entropy(scale * patches.float() @ class_text.T, own_class, on_object)
        (class_loss + part_loss + whole_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(
                image=f"{class_loss.item():.3f}", part=f"{part_loss.item():.3f}", whole=f"{whole_loss.item():.3f}"
            )


def save(recipe: TeacherRecipe, model: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights in half precision, with a configuration that makes `from_pretrained` load them in single."""
    folder = Path(recipe.output_dir)
    model.cpu().half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for its owner alone; an installed package has other readers
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)


@torch.inference_mode()
def evaluate(recipe: TeacherRecipe) -> dict[str, float]:
    """Held-out top-1 accuracy in percent, of the folder as saved: zero-shot with one prompt, clean and corrupted."""
    model = AutoModel.from_pretrained(recipe.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe.output_dir)
    processor = AutoImageProcessor.from_pretrained(recipe.output_dir)
    scenes = [make_scene(index, seed=recipe.test_seed) for index in range(recipe.num_test_scenes)]
    labels = torch.tensor([scene.label for scene in scenes])

    def embed(names: tuple[str, ...]) -> Tensor:
        prompts = [TEMPLATES[0].format(name) for name in names]
        return text_embeds(model, tokenizer(prompts, padding=True, return_tensors="pt"))

    def forward(images: list) -> tuple[Tensor, Tensor]:
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        return vision_embeds(model, pixel_values, torch.arange((IMAGE_SIZE // PATCH_SIZE) ** 2))

    def accuracy(images: list) -> float:
        logits = torch.cat([forward(images[i : i + 100])[0] @ class_text.T for i in range(0, len(images), 100)])
        return 100 * (logits.argmax(dim=-1) == labels).float().mean().item()

    class_text, part_text = embed(CLASS_NAMES), embed(PART_NAMES)
    clean = [scene.image for scene in scenes]
    scores = {"clean": accuracy(clean)}
    for name in CORRUPTIONS:
        for severity in range(1, 6):
            generator = np.random.default_rng(recipe.test_seed)
            corrupted = [corrupt(image, name, severity=severity, generator=generator) for image in clean]
            scores[f"{name}-{severity}"] = accuracy(corrupted)
    counts = torch.from_numpy(np.stack([render(i, seed=recipe.test_seed)[1] for i in range(min(200, len(scenes)))]))
    part_logits = torch.cat([forward(clean[i : i + 100])[1] @ part_text.T for i in range(0, len(counts), 100)])
    right = part_logits.argmax(dim=-1) == counts.flatten(2).argmax(dim=1)  # (B, P, L) -> (B, L)
    on_object = counts.flatten(2).argmax(dim=1) > PART_NAMES.index("occluder")
    scores["patches"] = 100 * right.float().mean().item()
    scores["patches_on_object"] = 100 * right[on_object].float().mean().item()
    return scores


def run(recipe: TeacherRecipe) -> dict[str, float]:
    """Train, save and measure; returns what `evaluate` returns."""
    set_seed(recipe.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    train(recipe, model, tokenizer)
    save(recipe, model, tokenizer)
    return evaluate(recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(TeacherRecipe):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    for name, score in run(TeacherRecipe(**vars(parser.parse_args()))).items():
        print(f"{name:20s} {score:5.1f} %")


if __name__ == "__main__":
    main()
