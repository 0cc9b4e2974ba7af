"""The teacher that ships inside the package: small, loadable, good on clean scenes and visibly worse on noisy ones."""

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessorPil

import apm_hf
from apm_hf.data.basic_corruptions import corrupt
from apm_hf.data.scenes import CLASS_NAMES, PART_NAMES, SceneDataset

FOLDER = Path(apm_hf.__file__).parent / "assets" / "demo-teacher"
TEST_SEED = 1  # the teacher was trained on seed 0


@pytest.fixture(scope="module")
def scenes():
    return list(map(SceneDataset(120, seed=TEST_SEED).__getitem__, range(120)))


@pytest.fixture(scope="module")
def teacher():
    model = AutoModel.from_pretrained(FOLDER).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return model, tokenizer, CLIPImageProcessorPil.from_pretrained(FOLDER)


def embed_text(teacher, names, template="a photo of a {}."):
    model, tokenizer, _ = teacher
    tokens = tokenizer([template.format(name) for name in names], padding=True, return_tensors="pt")
    with torch.inference_mode():
        return torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)


def embed_images(teacher, images):
    """Image embeddings `(B, F)` and patch embeddings `(B, L, F)`."""
    model, _, processor = teacher
    with torch.inference_mode():
        outputs = model.vision_model(**processor(images, return_tensors="pt"))
        patches = model.vision_model.post_layernorm(outputs.last_hidden_state[:, 1:])
        return model.visual_projection(outputs.pooler_output), model.visual_projection(patches)


@pytest.fixture(scope="module")
def clean(teacher, scenes):
    """What `embed_images` gives for the scenes as they are drawn."""
    return embed_images(teacher, [scene["image"] for scene in scenes])


def top1(teacher, image_embeds, labels, template="a photo of a {}."):
    predicted = (image_embeds @ embed_text(teacher, CLASS_NAMES, template).T).argmax(dim=-1)
    return (predicted == torch.tensor(labels)).float().mean().item()


def test_the_folder_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) < 3_000_000
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= set(
        files
    )


def test_weights_stored_in_half_precision_load_in_single(teacher):
    assert {parameter.dtype for parameter in teacher[0].parameters()} == {torch.float32}
    assert json.loads((FOLDER / "config.json").read_text())["vision_config"]["dtype"] == "float32"


def test_the_tokenizer_pools_at_the_end_of_the_sentence(teacher):
    """Padding, and words after the last, must not change an embedding; the class name must."""
    model, tokenizer, _ = teacher
    assert tokenizer("a photo of a cat.")["input_ids"][-1] == model.config.text_config.eos_token_id != 2
    alone = embed_text(teacher, ["cat"])
    padded = embed_text(teacher, ["cat", "robot in a very long and quite unusual sentence"])
    assert torch.allclose(alone[0], padded[0], atol=1e-5)
    assert (alone[0] @ embed_text(teacher, ["car"])[0]).item() < 0.9
    assert tokenizer.unk_token_id in tokenizer("a zebra")["input_ids"]


def test_every_class_and_part_name_is_one_known_word(teacher):
    for name in (*CLASS_NAMES, *PART_NAMES):
        token, *rest = teacher[1](name, add_special_tokens=False)["input_ids"]
        assert not rest and token != teacher[1].unk_token_id


def test_clean_scenes_are_read_well_with_any_prompt(teacher, scenes, clean):
    image_embeds, labels = clean[0], [scene["label"] for scene in scenes]
    assert top1(teacher, image_embeds, labels) >= 0.97
    for template in ("{}", "art of the {}.", "behold, the one and only {}!"):
        assert top1(teacher, image_embeds, labels, template) >= 0.95


def test_heavy_noise_and_low_contrast_hurt(teacher, scenes):
    labels = [scene["label"] for scene in scenes]
    for name in ("gaussian_noise", "contrast"):
        generator = np.random.default_rng(0)
        images = [corrupt(scene["image"], name, severity=5, generator=generator) for scene in scenes]
        assert top1(teacher, embed_images(teacher, images)[0], labels) <= 0.5


def test_patches_know_their_part_and_their_whole(teacher, scenes, clean):
    _, patch_embeds = clean
    predicted = (patch_embeds @ embed_text(teacher, PART_NAMES).T).argmax(dim=-1)  # (B, L)
    predicted_class = (patch_embeds @ embed_text(teacher, CLASS_NAMES).T).argmax(dim=-1)
    masks = torch.stack([torch.from_numpy(scene["part_mask"]) for scene in scenes])
    patches = masks.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).flatten(1, 2)  # (B, H, W) -> (B, L, p * p)
    shown, pure = patches.mode(dim=-1).values, (patches == patches[..., :1]).all(dim=-1)
    on_object = pure & (shown > PART_NAMES.index("occluder"))
    assert (predicted == shown)[on_object].float().mean() > 0.85
    assert (predicted == shown)[pure & (shown == 0)].float().mean() > 0.95
    labels = torch.tensor([scene["label"] for scene in scenes])[:, None]
    assert (predicted_class == labels)[on_object].float().mean() > 0.9


def test_the_script_writes_what_is_shipped(tmp_path, monkeypatch):
    """Three steps of training: other weights, but the same configuration, tokenizer and image processor."""
    monkeypatch.syspath_prepend(FOLDER.parents[3] / "scripts")
    script = importlib.import_module("make_demo_teacher")
    monkeypatch.setattr(script, "ProcessPoolExecutor", ThreadPoolExecutor)
    scores = script.run(
        script.TeacherRecipe(output_dir=str(tmp_path), steps=3, batch_size=4, num_scenes=24, num_test_scenes=12)
    )
    assert scores.keys() >= {"clean", "gaussian_noise-3", "defocus-5", "patches"}
    assert all(0 <= score <= 100 for score in scores.values())
    config, shipped = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, FOLDER))
    assert config | {"transformers_version": ""} == shipped | {"transformers_version": ""}
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((FOLDER / name).read_text())
    assert (tmp_path / "model.safetensors").stat().st_size == (FOLDER / "model.safetensors").stat().st_size
