"""One folder with an APM and its teacher's words: transformers' own pipeline takes it where the package is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, pipeline

from apm_hf import APM, load_teacher
from apm_hf.commands.main import main
from apm_hf.configuration_apm import APMConfig
from apm_hf.publishing.zero_shot import check_text, save_with_text
from apm_hf.runs.run import manifest_faults
from apm_hf.teachers.matching import matching_image_processor
from fixtures_runs import forget_accelerate
from fixtures_tiny import photo, save_classifier, save_clip, save_splits, student

pytest.importorskip("datasets")

LABELS = ["cat", "dog", "owl"]
TASK = "zero-shot-image-classification"
FRESH = """
import sys; sys.modules["apm_hf"] = None
import json; from transformers import pipeline
classify = pipeline("zero-shot-image-classification", model="run", trust_remote_code=True)
assert type(classify.model).__module__.startswith("transformers_modules")
print(json.dumps(classify("photo.png", candidate_labels=["cat", "dog", "owl"])))
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


def probabilities(predictions):
    return {one["label"]: pytest.approx(one["score"], abs=1e-5) for one in predictions}


def test_distil_with_text_makes_a_folder_for_the_pipeline_without_package_and_teacher(
    clip, tmp_path, environment, monkeypatch, caplog
):
    save_splits(tmp_path / "photos", num_train=6, num_validation=2)
    monkeypatch.chdir(tmp_path)
    overrides = {"image_size": 24, "patch_size": 8, "position_size": 16, "hidden_sizes": [32, 24]}
    status = main(
        ["distill", "--teacher", clip.name, "--dataset", "photos", "--output_dir", "run", "--with_text"]
        + ["--preset", "tiny"]
        + ["--config_overrides", json.dumps({**overrides, "initializer_range": 0.3, "pooling_num_heads": 4})]
        + ["--max_steps", "2", "--batch_size", "2", "--num_locations", "3", "--report_to", "none"]
        + ["--num_pictures", "0", "--quiet"]
    )
    assert status == 0 and manifest_faults(Path("run")) == []
    photo(1).save("photo.png")
    ours = pipeline(TASK, model="run", device="cpu")("photo.png", candidate_labels=LABELS)
    # The same from the parts: the student's vector against the teacher's own words.
    apm = APM.load("run", device="cpu")
    assert "UNEXPECTED" not in caplog.text
    assert type(apm.model).__name__ == "APMModel" and not apm.model.config.use_rgb_head
    texts = clip.encode_text(LABELS, ("This is a photo of {}.",))
    expected = (apm.encode("photo.png", normalize=True) @ texts.T * clip.logit_scale).softmax(dim=1)[0]
    assert probabilities(ours) == dict(zip(LABELS, expected.tolist(), strict=True))
    card = (tmp_path / "run/README.md").read_text()
    assert f"pipeline_tag: {TASK}" in card and f'pipeline("{TASK}", model="run"' in card
    assert str(tmp_path) not in card + (tmp_path / "run/config.json").read_text()

    fresh = subprocess.run(
        [sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert fresh.returncode == 0, fresh.stderr[-2000:]
    assert probabilities(json.loads(fresh.stdout.splitlines()[-1])) == {one["label"]: one["score"] for one in ours}


def test_joining_again_replaces_the_model_and_leaves_other_files(clip, tmp_path):
    (tmp_path / "metrics.json").write_text("[]")
    processor = matching_image_processor(clip, 24)
    for seed in (0, 1):
        model = save_with_text(student(seed=seed, initializer_range=0.3), clip, processor, tmp_path)
    saved = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(values, saved[name]) for name, values in model.apm.state_dict().items())
    assert (tmp_path / "metrics.json").read_text() == "[]" and not list(tmp_path.glob(".*"))
    assert AutoTokenizer.from_pretrained(tmp_path)("cat")["input_ids"] == clip.tokenizer("cat")["input_ids"]


def test_teachers_and_students_without_words_of_their_own_are_refused(clip, tmp_path):
    classifier = load_teacher(save_classifier(tmp_path / "classifier"), device="cpu")
    with pytest.raises(ValueError, match="expected a teacher with a text tower, such as CLIP, got .*classifier"):
        check_text(classifier, student().config)
    with pytest.raises(ValueError, match="expected a student that folds pixels, got trigger_source 'embedding'"):
        check_text(clip, student(trigger_source="embedding").config)
    check_text(clip, APMConfig.preset("tiny"))


def test_the_pipeline_that_adapts_finds_the_teacher_that_the_configuration_names(clip, hub, tmp_path, monkeypatch):
    model = student(initializer_range=0.3, image_size=32, distilled_from=[{"name": "teacher"}])
    model.save_pretrained(tmp_path / "apm")
    processor = matching_image_processor(clip, 32)
    processor.save_pretrained(tmp_path / "apm")
    task = "apm-zero-shot-image-classification"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="configuration says 'teacher', which cannot be loaded"):
        pipeline(task, model="apm", device="cpu")
    save_clip(tmp_path / "teacher")
    named = pipeline(task, model="apm", device="cpu")(photo(0), LABELS)
    assert named == pipeline(task, model="apm", teacher="teacher", device="cpu")(photo(0), LABELS)
    with pytest.raises(ValueError, match="expected a Teacher"):
        pipeline(task, model=student(), device="cpu")
