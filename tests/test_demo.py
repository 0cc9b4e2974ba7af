"""The demo's claim, on a small budget: what is distilled beats both controls."""

import json

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

import apm_hf  # noqa: F401 - registers the Auto classes
from apm_hf.data.scenes import CLASS_NAMES, SceneDataset
from apm_hf.data.targets import TargetCache
from apm_hf.demo import ADAPTED, CONDITIONS, DISTILLED, RANDOM, SHUFFLED, TEACHER, DemoConfig, run_demo
from apm_hf.demo_assets import DEMO_MODEL, DEMO_TEACHER
from apm_hf.modeling_apm import APMModel
from apm_hf.position_encoding import grid_coordinates
from apm_hf.teachers import load_teacher
from apm_hf.zero_shot import classify


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    config = DemoConfig(output_dir=str(folder / "apm"), max_steps=160, num_images=768, num_test_images=48)
    return run_demo(config)


def test_the_distilled_apm_beats_both_controls(result):
    # Answers to the wrong images still teach what is common to all images, so the second margin is a narrow one.
    for control, cosine, accuracy in ((RANDOM, 0.3, 0.1), (SHUFFLED, 0.01, 0.05)):
        assert result.rows[DISTILLED]["cosine, clean"] > result.rows[control]["cosine, clean"] + cosine
        assert result.rows[DISTILLED]["top-1, clean"] > result.rows[control]["top-1, clean"] + accuracy


def test_every_row_stands_beside_its_teacher(result):
    for condition in CONDITIONS:
        assert all(0 <= row[f"top-1, {condition}"] <= 1 for row in result.rows.values())
    assert f"| {TEACHER} |" in result.table and f"| {SHUFFLED} |" in result.table
    stored = json.loads((result.output_dir.parent / "apm_report" / "results.json").read_text())
    assert stored == result.rows


def test_adapted_machines_come_closer_to_their_teachers_predictions(result):
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


def test_the_shipped_apm_knows_scenes_and_random_weights_do_not():
    teacher = load_teacher(DEMO_TEACHER)
    model = AutoModel.from_pretrained(DEMO_MODEL).eval()
    image_processor = AutoImageProcessor.from_pretrained(DEMO_MODEL)
    scenes = SceneDataset(96, seed=7)
    cache = TargetCache.build([scenes[i]["image"] for i in range(96)], teacher, image_processor)
    labels = torch.tensor([scenes[i]["label"] for i in range(96)])
    texts = teacher.encode_text(CLASS_NAMES)
    torch.manual_seed(0)
    accuracies, cosines = [], []
    for machine in (model, APMModel(model.config).eval()):
        with torch.no_grad():
            output = machine(cache.pixel_values, grid_coordinates(*cache.features.shape[1:3]))
        accuracies.append((classify(output.pooler_output, texts).argmax(-1) == labels).float().mean().item())
        features = cache.features.flatten(1, 2)
        cosines.append(torch.nn.functional.cosine_similarity(output.last_hidden_state, features, dim=-1).mean().item())
    assert accuracies[0] > 3 / len(CLASS_NAMES) and accuracies[1] < 3 / len(CLASS_NAMES)
    assert cosines[0] > cosines[1] + 0.2
