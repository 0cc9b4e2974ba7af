"""The pair `APM`: student, image processor and teacher, loaded and checked together, and what it gives."""

import numpy as np
import pytest
import torch
from PIL import Image

import apm_hf
from apm_hf import APM, APMConfig, APMForImageClassification, APMModel, TTTConfig, load_teacher
from apm_hf.assets import DEMO_MODEL, DEMO_TEACHER, PHOTO_MODEL, PHOTO_TEACHER
from apm_hf.data.scenes import make_scene
from apm_hf.distillation import DistillationConfig, distill
from apm_hf.teachers.targets import TargetCache
from apm_hf.ttt.photos import photo_image_processor


@pytest.fixture(scope="module")
def apm():
    """The pair of drawn scenes."""
    return APM.load(DEMO_MODEL, teacher=DEMO_TEACHER)


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(index, seed=5, image_size=96).image for index in range(3)]


@pytest.fixture(scope="module")
def paths(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    found = [folder / f"{index}.png" for index in range(len(scenes))]
    for path, scene in zip(found, scenes, strict=True):
        scene.save(path)
    return found


def test_without_names_the_pair_of_photos_is_loaded_and_what_it_does_not_know_is_said(scenes, caplog):
    apm = APM.load(device="cpu")
    assert apm.model.name_or_path == PHOTO_MODEL and apm.teacher.name == PHOTO_TEACHER
    assert [record.getMessage() for record in caplog.records] == [apm_hf.pair.EMBEDDED_NOTE]
    assert apm.is_embedded and apm.is_dense and {"dalmatian", "pizza"} <= set(apm.default_labels)
    # The embedding of an image is the teacher's, which has read it anyway.
    torch.testing.assert_close(apm.encode(scenes), apm.teacher.encode_images(scenes).image_embeds, rtol=0, atol=0)
    assert not torch.equal(apm.encode(scenes, source="student"), apm.encode(scenes))
    with pytest.raises(ValueError, match="expected one that can be fitted, got a dense one"):
        apm.fit(scenes[0])


def test_a_dense_student_cannot_be_adapted_so_a_fresh_one_is():
    classifier = APM.load(PHOTO_MODEL, teacher=PHOTO_TEACHER).classifier(
        ["cat", "dog"], config=TTTConfig(start="model")
    )
    assert classifier.model.config.trigger_source == "conv" and classifier.config.start == "random"


def test_another_teacher_than_the_one_that_a_student_learnt_from_is_named(tmp_path, caplog):
    """Of the same width, so that nothing else would tell."""
    teacher, image_processor = load_teacher(DEMO_TEACHER), photo_image_processor(96)
    student = APMModel(APMConfig.preset("tiny", feature_size=teacher.feature_size))
    targets = TargetCache.build([make_scene(0, seed=5, image_size=96).image], teacher, image_processor)
    config = DistillationConfig(output_dir=str(tmp_path / "run"), max_steps=1, report_to="none", num_pictures=0)
    distill(student, targets, config=config, teacher=teacher, image_processor=image_processor)
    APM.load(tmp_path / "run", teacher=teacher)
    assert "is not the teacher" not in caplog.text
    with torch.no_grad():
        next(teacher.model.parameters()).mul_(1.1)
    APM.load(tmp_path / "run", teacher=teacher)
    assert "is not the teacher that this student learnt from, demo-teacher" in caplog.text


def test_a_named_pair_is_ready_for_use(apm):
    assert not apm.is_embedded and apm.is_fitted and "car" in apm.default_labels
    assert not apm.model.training and not apm.teacher.model.training
    assert apm.bare_model is apm.model and apm.bare_model.config.feature_size == apm.teacher.feature_size


def test_an_image_may_be_a_picture_a_path_an_array_or_a_tensor_one_or_many(apm, scenes, paths):
    embeds = apm.encode(scenes)
    assert embeds.shape == (3, apm.bare_model.config.feature_size) and embeds.dtype == torch.float32
    arrays = np.stack([np.asarray(scene) for scene in scenes])
    for images in (paths, [str(path) for path in paths], arrays, torch.from_numpy(arrays).permute(0, 3, 1, 2)):
        torch.testing.assert_close(apm.encode(images), embeds)
    for image in (scenes[1], paths[1], str(paths[1]), arrays[1]):
        torch.testing.assert_close(apm.encode(image), embeds[1:2])
    torch.testing.assert_close(apm.encode(scenes, batch_size=1), embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apm.encode(scenes, normalize=True).norm(dim=1), torch.ones(3))


def test_embeddings_are_those_of_student_or_teacher_as_each_gives_them(apm, scenes):
    pixels = apm.image_processor(scenes, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = apm.model(pixels).pooler_output
    torch.testing.assert_close(apm.encode(scenes), expected)
    torch.testing.assert_close(apm.encode(scenes, source="teacher"), apm.teacher.encode_images(scenes).image_embeds)
    assert (apm.encode(scenes) - apm.encode(scenes, source="teacher")).abs().max() > 1e-3
    alone = APM.load(teacher=apm.teacher)
    torch.testing.assert_close(alone.encode(scenes), apm.encode(scenes, source="teacher"))


def test_dense_features_are_maps_of_any_size_or_of_any_coordinates(apm, scenes):
    width = apm.bare_model.config.feature_size
    grid = apm.encode_dense(scenes)
    side = apm.bare_model.config.grid_size
    assert grid.shape == (3, side, side, width)
    maps = apm.encode_dense(scenes[0], size=(3, 5))
    assert maps.shape == (1, 3, 5, width)
    # The centre of the middle cell of the middle row.
    at_centre = apm.encode_dense(scenes[0], coordinates=torch.zeros(1, 2))
    torch.testing.assert_close(at_centre[0, 0], maps[0, 1, 2], rtol=1e-4, atol=1e-4)
    wide = Image.effect_noise((80, 40), 50).convert("RGB")
    assert apm.encode_dense(wide, size=10).shape == (1, 5, 10, width)
    teachers = apm.encode_dense(scenes, source="teacher")
    torch.testing.assert_close(apm.encode_dense(scenes, size=teachers.shape[1:3], source="teacher"), teachers)


def test_labels_are_scored_by_teacher_and_adapted_student(apm, scenes):
    found = apm.classify(scenes[:2], ["car", "house", "tree"])
    assert found.logits.shape == found.teacher_logits.shape == (2, 3) and found.target_cosine.min() > 0.9
    expected = apm.teacher.encode_images(scenes[:2]).image_embeds
    texts = apm.teacher.encode_text(["car", "house", "tree"])
    cosines = torch.nn.functional.cosine_similarity(expected[:, None], texts[None], dim=2)
    torch.testing.assert_close(found.teacher_logits, apm.teacher.logit_scale * cosines, rtol=1e-4, atol=1e-3)


def test_islands_are_nested_regions_of_a_map(apm, scenes):
    islands = apm.islands(scenes[0], heights=(2, 5), size=16)
    assert islands.features.shape[:2] == (16, 16) and islands.regions.shape == (2, 16, 16)
    assert [len(cut.unique()) for cut in islands.regions] == [2, 5]
    wholes, parts = islands.regions
    assert all(len(wholes[parts == part].unique()) == 1 for part in parts.unique())  # every part lies in one whole


def test_a_fresh_student_is_fitted_to_photos_and_the_pair_stays_as_it_was(apm, scenes):
    fresh = APM.load(teacher=apm.teacher).fresh(seed=1)
    assert not fresh.is_fitted
    before = {name: weight.clone() for name, weight in fresh.model.state_dict().items()}
    fitted = fresh.fit(scenes[0], steps=40)
    assert fitted.is_fitted and all(torch.equal(fresh.model.state_dict()[name], one) for name, one in before.items())
    wanted = apm.encode_dense(scenes[0], size=(6, 6), source="teacher")

    def error(pair):
        found = pair.encode_dense(scenes[0], size=(6, 6))
        return float((found - wanted).square().mean())

    assert error(fitted) < 0.8 * error(fresh)


def test_a_head_lends_the_apm_under_it(scenes):
    head = APMForImageClassification(APMConfig.preset("tiny", num_labels=3)).eval()
    pair = APM.load(head)
    assert pair.bare_model is head.apm
    assert pair.encode(scenes).shape == (3, head.config.feature_size)
    assert pair.control().bare_model.config.feature_size == head.config.feature_size


def test_what_does_not_fit_is_refused_in_one_line(apm, scenes, tmp_path):
    teacher = apm.teacher
    with pytest.raises(ValueError, match="expected features as wide as the teacher's"):
        APM.load(APMModel(APMConfig.preset("tiny", feature_size=teacher.feature_size + 1)), teacher=teacher)
    with pytest.raises(ValueError, match="model: expected an APM, got"):
        APM.load(DEMO_TEACHER)
    with pytest.raises(ValueError, match="got neither"):
        APM(None, None, None)
    alone = APM.load(DEMO_MODEL)
    for call in (
        lambda: alone.classify(scenes, ["a", "b"]),
        alone.fresh,
        lambda: alone.encode(scenes, source="teacher"),
    ):
        with pytest.raises(ValueError, match="teacher: expected one"):
            call()
    with pytest.raises(ValueError, match="expected a student, got a teacher alone"):
        APM.load(teacher=teacher).pixel_values(scenes)
    with pytest.raises(ValueError, match="expected 'student' or 'teacher'"):
        apm.encode(scenes, source="both")
    with pytest.raises(ValueError, match="batch_size: expected a positive number"):
        apm.encode(scenes, batch_size=0)
    with pytest.raises(ValueError, match="images: expected at least one"):
        apm.encode([])
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"bad\.png: cannot decode .*a page of HTML"):
        apm.encode([str(bad)])
    with pytest.raises(ValueError, match="images of different shapes"):
        apm.encode_dense([scenes[0], Image.new("RGB", (20, 40))], size=16)
    with pytest.raises(ValueError, match="expected one of them, got both"):
        apm.encode_dense(scenes, size=4, coordinates=torch.zeros(1, 2))
    with pytest.raises(ValueError, match="ascending numbers of regions"):
        apm.islands(scenes[0], heights=(5, 2))
    with pytest.raises(ValueError, match="at most 16 regions"):
        apm.islands(scenes[0], heights=(2, 20), size=4)


def test_the_teacher_may_be_an_object_and_the_pair_is_public(apm):
    teacher = load_teacher(DEMO_TEACHER, device="cpu")
    pair = APM.load(DEMO_MODEL, teacher=teacher)
    assert pair.teacher is teacher and "APM" in apm_hf.__all__
