"""A column of levels per location (GLOM, arXiv:2102.12627): predicted, distilled, saved."""

import pytest
import torch
from torch.nn import functional as F

from apm_hf import APMConfig, APMImageProcessor, APMModel, load_teacher
from apm_hf.distillation import DistillationConfig, distill, matching_image_processor
from apm_hf.distillation.losses import DistillationTargets, LossWeights, distillation_losses
from apm_hf.distillation.targets import TargetMaker, query_student
from apm_hf.teachers.dense_grids import moved
from apm_hf.teachers.targets import normalise_levels
from fixtures_tiny import (
    FEATURE_SIZE,
    STUDENT_SIZE,
    TEACHER_GRID,
    TEACHER_PATCH,
    TEACHER_SIZE,
    save_clip,
    student,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_location_has_a_column_of_levels():
    model, pixels = student(num_levels=3, level_size=10), noise(2, 3, STUDENT_SIZE, STUDENT_SIZE)
    outputs = model(pixels, output_hidden_states=True)
    assert outputs.levels.shape == (2, 9, 3, 10)
    head = model.decoder.level_head
    expected = F.linear(outputs.hidden_states[-1], head.weight[10:20], head.bias[10:20])
    torch.testing.assert_close(outputs.levels[:, :, 1], expected)
    assert student(num_levels=2)(pixels).levels.shape == (2, 9, 2, FEATURE_SIZE)
    assert student()(pixels).levels is None


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("gradients", [True, False])
def test_levels_do_not_depend_on_chunks(chunk_size, gradients):
    model, pixels = student(num_levels=2), noise(2, 3, STUDENT_SIZE, STUDENT_SIZE)
    places = torch.rand(7, 2) * 2 - 1
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(pixels, places, chunk_size=chunk_size).levels, model(pixels, places).levels)


def test_a_model_with_levels_is_saved_and_loaded(tmp_path):
    model, pixels = student(num_levels=2, level_size=6).eval(), noise(1, 3, STUDENT_SIZE, STUDENT_SIZE)
    model.save_pretrained(tmp_path)
    assert torch.equal(APMModel.from_pretrained(tmp_path)(pixels).levels, model(pixels).levels)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_levels": -1}, "num_levels: expected 0 or more, got -1"),
        ({"level_size": 8}, "level_size: expected a positive integer with num_levels >= 1, got 8"),
        ({"num_levels": 2, "level_size": 0}, "level_size: expected a positive integer"),
        ({"local_patch_scales": []}, "local_patch_scales: expected different divisors of image_size=96"),
        ({"local_patch_scales": [2, 2]}, "local_patch_scales: expected different divisors of image_size=96"),
        ({"local_patch_scales": [5]}, "local_patch_scales: expected different divisors of image_size=96"),
    ],
)
def test_what_describes_no_model_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        APMConfig.preset("tiny", **fields)


def test_targets_of_levels_are_the_teachers_layers_each_token_normalised(clip):
    seen = noise(2, 3, TEACHER_SIZE, TEACHER_SIZE)
    batch = {"pixel_values": noise(2, 3, STUDENT_SIZE, STUDENT_SIZE, seed=1), "teacher_pixel_values": seen}
    image_processor = matching_image_processor(clip, STUDENT_SIZE)
    targets = TargetMaker(clip, image_processor, layers=[0, 2])(batch)
    coordinates = targets.coordinates
    assert coordinates is None
    layers = clip.encode_images(pixel_values=seen, layers=[0, 2]).levels  # (B, N, rows, cols, C)
    token = layers[1, 1, 2, 3]
    expected = (token - token.mean()) / token.std(correction=0)
    torch.testing.assert_close(targets.levels[1, 2 * TEACHER_GRID + 3, 1], expected, atol=1e-3, rtol=1e-3)


def test_a_moved_teacher_is_asked_about_a_moved_image_and_the_student_where_its_patches_then_are(clip):
    seen = noise(2, 3, TEACHER_SIZE, TEACHER_SIZE)
    batch = {"pixel_values": noise(2, 3, STUDENT_SIZE, STUDENT_SIZE, seed=1), "teacher_pixel_values": seen}
    maker = TargetMaker(clip, matching_image_processor(clip, STUDENT_SIZE))
    targets = maker(batch, shift=(0.25, -0.5))
    coordinates = targets.coordinates
    answer = clip.encode_images(pixel_values=moved(seen, 0.25 * TEACHER_PATCH, -0.5 * TEACHER_PATCH))
    assert torch.equal(targets.features, answer.features.flatten(1, 2))
    # Row 1, column 2 of 4 x 4 patches, a quarter of a patch further down, half a patch further left.
    place = torch.tensor([2 * 1.75 / 4 - 1, 2 * 2.0 / 4 - 1])
    torch.testing.assert_close(coordinates[1 * TEACHER_GRID + 2], place)
    # Its colour is the mean of the window there: rows 7.5 to 13.5 and columns 9 to 15 of 24 pixels.
    window = batch["pixel_values"][:, :, 8:13, 9:15].sum(dim=2) + 0.5 * batch["pixel_values"][:, :, (7, 13), 9:15].sum(
        2
    )
    colour = window.sum(dim=-1) / 36 * maker.std + maker.mean
    torch.testing.assert_close(targets.rgb[:, 1 * TEACHER_GRID + 2], colour)
    model = student()
    outputs = query_student(model, batch["pixel_values"], targets, locations=torch.tensor([6]))
    expected = model(batch["pixel_values"], place[None]).last_hidden_state
    torch.testing.assert_close(outputs.last_hidden_state, expected)


def test_cached_answers_cannot_be_moved(clip):
    batch = {"pixel_values": noise(1, 3, 24, 24), "image_embeds": noise(1, 16), "features": noise(1, 4, 4, 16)}
    with pytest.raises(ValueError, match="jitter: expected a teacher"):
        TargetMaker(clip, matching_image_processor(clip, STUDENT_SIZE))(batch, shift=(0.1, 0.0))


def test_the_loss_of_levels_is_weighted_and_of_their_shape():
    model, pixels = student(num_levels=2, level_size=5), noise(2, 3, STUDENT_SIZE, STUDENT_SIZE)
    outputs = model(pixels)
    levels = noise(2, 9, 2, 5, seed=3)
    targets = DistillationTargets(noise(2, FEATURE_SIZE), noise(2, 9, FEATURE_SIZE), noise(2, 9, 3), levels)
    losses = distillation_losses(outputs, targets, LossWeights(level=2.0))
    torch.testing.assert_close(losses["loss_level"], F.mse_loss(outputs.levels, levels))
    plain = sum(losses[f"loss_{name}"] for name in ("grid", "cls", "rgb"))
    torch.testing.assert_close(losses["loss"], plain + 2 * losses["loss_level"])
    assert "loss_level" not in distillation_losses(outputs, targets, LossWeights(level=0.0))
    other = DistillationTargets(targets.image_embeds, targets.features, targets.rgb, levels[:, :, :1])
    with pytest.raises(ValueError, match=r"levels: expected a student with levels of shape \(2, 9, 1, 5\)"):
        distillation_losses(outputs, other, LossWeights())
    torch.testing.assert_close(normalise_levels(levels).std(-1, correction=0), torch.ones(2, 9, 2), atol=1e-3, rtol=0)


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {
            "pixel_values": noise(3, STUDENT_SIZE, STUDENT_SIZE, seed=index),
            "teacher_pixel_values": noise(3, TEACHER_SIZE, TEACHER_SIZE, seed=100 + index),
        }


@pytest.mark.parametrize("jitter", [False, True])
def test_levels_are_distilled(tmp_path, clip, jitter):
    config = DistillationConfig(
        output_dir=str(tmp_path), max_steps=60, batch_size=8, learning_rate=1e-2, level_layers=[0, 2], jitter=jitter,
        num_locations=8, report_to="tensorboard", checkpoint_steps=0, mixed_precision="no",
    )  # fmt: skip
    result = distill(
        student(num_levels=2), Pictures(), config=config, image_processor=matching_image_processor(clip, STUDENT_SIZE),
        teacher=clip, validation_data=Pictures(),
    )  # fmt: skip
    first, last = (result.metrics[index]["level_cosine"] for index in (0, -1))
    assert last > first + 0.2


def test_a_student_needs_a_level_for_every_layer(tmp_path, clip):
    config = DistillationConfig(output_dir=str(tmp_path), level_layers=[0, 1, 2], report_to="none")
    with pytest.raises(ValueError, match=r"level_layers: expected as many layers as the student has levels, 2, got"):
        distill(
            student(num_levels=2), Pictures(), config=config, teacher=clip,
            image_processor=matching_image_processor(clip, STUDENT_SIZE),
        )  # fmt: skip


def test_levels_without_targets_are_refused_unless_they_are_to_stay_as_they_are(tmp_path):
    class Cached(Pictures):
        def __getitem__(self, index):
            answer = {
                "image_embeds": noise(FEATURE_SIZE, seed=index),
                "features": noise(4, 4, FEATURE_SIZE, seed=index),
            }
            return answer | {"pixel_values": noise(3, STUDENT_SIZE, STUDENT_SIZE, seed=index)}

    model = student(num_levels=2)
    before = model.decoder.level_head.weight.detach().clone()
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "batch_size": 4,
        "report_to": "none",
        "checkpoint_steps": 0,
    }
    image_processor = APMImageProcessor(size={"height": STUDENT_SIZE, "width": STUDENT_SIZE})
    with pytest.raises(ValueError, match="levels: expected targets for the student's 2 levels, got none"):
        distill(model, Cached(), config=DistillationConfig(**settings), image_processor=image_processor)
    config = DistillationConfig(**settings, level_weight=0.0)
    result = distill(model, Cached(), config=config, image_processor=image_processor)
    assert torch.equal(result.student.decoder.level_head.weight, before)
