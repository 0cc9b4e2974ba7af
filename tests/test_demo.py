"""The demo's claim, on a small budget: what is distilled beats both controls."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel

from apm_hf.assets import DEMO_MODEL, DEMO_TEACHER
from apm_hf.data.basic_corruptions import corrupt
from apm_hf.data.scenes import CLASS_NAMES, SceneDataset
from apm_hf.demo import story as demo
from apm_hf.demo.story import ADAPTED, CONDITIONS, DISTILLED, RANDOM, SHUFFLED, TEACHER, DemoConfig, run_demo
from apm_hf.distillation import distill
from apm_hf.modeling_apm import APMModel
from apm_hf.position_encoding import grid_coordinates
from apm_hf.teachers import load_teacher
from apm_hf.teachers.targets import TargetCache
from apm_hf.teachers.zero_shot import classify

SHOWN = ("clean", "jpeg")  # of the demo's five conditions, of which each costs as much as another


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The demo's result, and the students that it distilled: from the teacher's outputs, and from shuffled ones."""
    students = []

    def recorded(*inputs, **options):
        distilled = distill(*inputs, **options)
        students.append(distilled.student.eval())
        return distilled

    config = DemoConfig(
        output_dir=str(tmp_path_factory.mktemp("demo") / "apm"), max_steps=100, num_images=768, num_test_images=24
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "distill", recorded)
        patch.setattr(demo, "CONDITIONS", SHOWN)
        return run_demo(config), students


@pytest.fixture(scope="module")
def result(run):
    return run[0]


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(DEMO_TEACHER)


@pytest.fixture(scope="module")
def held_out(teacher):
    """The teacher's outputs for 96 scenes that no student was distilled from, and their labels."""
    rows = list(SceneDataset(96, seed=7))
    image_processor = AutoImageProcessor.from_pretrained(DEMO_MODEL)
    cache = TargetCache.build([row["image"] for row in rows], teacher, image_processor)
    return cache, torch.tensor([row["label"] for row in rows])


def outputs_of(model, cache):
    with torch.no_grad():
        return model(cache.pixel_values, grid_coordinates(*cache.features.shape[1:3]))


def told_apart(ours, targets):
    """The share of image pairs (i, j) for which `ours` of i is closer to the target of i than to that of j.

    For `(B, F)` or `(B, L, F)`. What all images have in common is subtracted first, so that a student that does not
    look at its image scores 1/2, whatever else it has learnt.
    """
    ours, targets = (
        F.normalize(values - values.mean(dim=0), dim=-1).view(len(values), -1, values.shape[-1])
        for values in (ours, targets)
    )
    cosines = torch.einsum("ilf,jlf->lij", ours, targets)  # (L, B, B)
    own, others = cosines.diagonal(dim1=1, dim2=2)[:, :, None], ~torch.eye(len(ours), dtype=torch.bool)
    return (own > cosines)[:, others].float().mean().item()


def test_the_distilled_apm_beats_both_controls(run, held_out):
    result, (distilled, shuffled) = run
    cache, _ = held_out
    torch.manual_seed(0)
    pooled, local = [], []
    for model in (distilled, shuffled, APMModel(distilled.config).eval()):
        outputs = outputs_of(model, cache)
        pooled.append(told_apart(outputs.pooler_output, cache.image_embeds))
        local.append(told_apart(outputs.last_hidden_state, cache.features.flatten(1, 2)))
    # So short a run names few scenes right, and features are much alike in all images: but it tells images apart.
    assert pooled[0] > max(pooled[1:]) + 0.05
    assert local[0] > max(local[1:]) + 0.1
    assert result.rows[DISTILLED]["cosine, clean"] > result.rows[RANDOM]["cosine, clean"] + 0.3


def test_every_row_stands_beside_its_teacher(result):
    for condition in SHOWN:
        assert all(0 <= row[f"top-1, {condition}"] <= 1 for row in result.rows.values())
    assert f"| {TEACHER} |" in result.table and f"| {SHUFFLED} |" in result.table
    stored = json.loads((result.output_dir.parent / "apm_report" / "results.json").read_text())
    assert stored == result.rows


def test_every_condition_of_the_demo_changes_an_image():
    image = SceneDataset(1, seed=5)[0]["image"]
    assert set(SHOWN) < set(CONDITIONS) and CONDITIONS[0] == "clean"
    for condition in CONDITIONS[1:]:
        changed = corrupt(image, condition, severity=demo.SEVERITY, generator=np.random.default_rng(0))
        assert changed.size == image.size and np.asarray(changed).tobytes() != np.asarray(image).tobytes(), condition


def test_adapted_models_come_closer_to_their_teachers_predictions(result):
    gap = {name: abs(result.rows[name]["top-1, clean"] - result.rows[TEACHER]["top-1, clean"]) for name in result.rows}
    assert gap[ADAPTED] < gap[DISTILLED]


def test_the_demo_leaves_an_ordinary_model_and_a_report(result):
    model = AutoModel.from_pretrained(result.output_dir)
    image_processor = AutoImageProcessor.from_pretrained(result.output_dir)
    image = SceneDataset(1, seed=5)[0]["image"]
    with torch.no_grad():
        output = model(**image_processor(image, return_tensors="pt"))
    assert output.last_hidden_state.shape == (1, model.config.num_locations, model.config.feature_size)
    assert all(path.stat().st_size > 0 for path in result.files)
    page = next(path for path in result.files if path.name == "photos.md").read_text()
    assert "| chelsea | " in page and "| astronaut | " in page and "![output of each model](photos.png)" in page


def test_the_shipped_apm_knows_scenes_and_random_weights_do_not(teacher, held_out):
    model = AutoModel.from_pretrained(DEMO_MODEL).eval()
    cache, labels = held_out
    texts = teacher.encode_text(CLASS_NAMES)
    torch.manual_seed(0)
    accuracies, cosines = [], []
    for weights in (model, APMModel(model.config).eval()):
        outputs = outputs_of(weights, cache)
        accuracies.append((classify(outputs.pooler_output, texts).argmax(-1) == labels).float().mean().item())
        features = cache.features.flatten(1, 2)
        cosines.append(F.cosine_similarity(outputs.last_hidden_state, features, dim=-1).mean().item())
    assert accuracies[0] > 3 / len(CLASS_NAMES) and accuracies[1] < 3 / len(CLASS_NAMES)
    assert cosines[0] > cosines[1] + 0.2
