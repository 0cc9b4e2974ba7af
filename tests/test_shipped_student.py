"""The student of pixels that travels with the package knows photos that it has not seen."""

import json
from pathlib import Path

import torch
from transformers import AutoImageProcessor, AutoModel

from apm_hf import APMConfig, load_teacher
from apm_hf.assets import STUDENT_MODEL
from apm_hf.data.loading import load_images
from apm_hf.position_encoding import grid_coordinates


def test_it_is_small_and_says_where_it_comes_from():
    config = APMConfig.from_pretrained(STUDENT_MODEL)
    assert config.trigger_source == "columns" and config.feature_size == 192
    (origin,) = config.distilled_from
    assert (origin["name"], origin["license"], origin["dataset"]) == (
        "facebook/deit-tiny-patch16-224", "apache-2.0", "caltech101",
    )  # fmt: skip
    assert sum(path.stat().st_size for path in Path(STUDENT_MODEL).iterdir()) < 8e6
    card = (Path(STUDENT_MODEL) / "README.md").read_text()
    assert "ridge regression" in card and "scripts/make_student.py" in card
    metrics = json.loads((Path(STUDENT_MODEL) / "metrics.json").read_text())[-1]
    assert metrics["feature_r2"] > max(metrics[name] for name in ("ridge_r2", "position_r2", "mean_r2"))


def test_on_photos_of_other_kinds_it_explains_what_another_photo_and_the_mean_do_not(shared_dir):
    teacher = load_teacher(shared_dir / "teachers/deit-tiny")
    photos = [read() for read in load_images(shared_dir / "data/imagenet_sample1k", max_images=32, seed=1).photos()]
    student = AutoModel.from_pretrained(STUDENT_MODEL)
    pixel_values = AutoImageProcessor.from_pretrained(STUDENT_MODEL)(photos, return_tensors="pt")["pixel_values"]
    wanted = teacher.encode_images(photos).features.flatten(1, 2)  # (B, L, F)
    with torch.no_grad():
        found = student(pixel_values, grid_coordinates(14, 14)).last_hidden_state
    mean, std = torch.tensor(student.config.feature_mean), torch.tensor(student.config.feature_std)
    variance = ((wanted - wanted.mean(dim=0)) / std).square().mean()

    def explained(features):
        return (1 - ((features - wanted) / std).square().mean() / variance).item()

    own, other, constant = (explained(features) for features in (found, found.roll(1, dims=0), mean.expand_as(wanted)))
    assert own > max(other, constant) + 0.08, (own, other, constant)
    assert own > 0.03
