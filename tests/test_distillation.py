"""Distillation against a plain loop, against itself interrupted, and against a teacher seen through other crops.

Most runs read random targets from memory: only the order of events is tested there. Numbers of processes are in
`test_examples.py`, which starts them.

Legend: B images, L locations, F feature width.
"""

import copy
import dataclasses
import json
import logging
import math
import weakref

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoImageProcessor, AutoModel

from apm_hf import load_teacher
from apm_hf.data.images import ImageCollator
from apm_hf.distillation import DistillationConfig, distill, matching_image_processor
from apm_hf.distillation import targets as distillation_targets
from apm_hf.distillation.losses import DistillationTargets, LossWeights
from apm_hf.distillation.targets import TargetMaker, query_student
from apm_hf.image_processing_pil_apm import APMImageProcessorPil
from apm_hf.position_encoding import grid_coordinates
from apm_hf.teachers.targets import TargetCache
from fixtures_runs import forget_accelerate
from fixtures_tiny import (
    FEATURE_SIZE,
    STUDENT_SIZE,
    TEACHER_GRID,
    TEACHER_SIZE,
    photo,
    save_classifier,
    save_clip,
    student,
)

GRID = (TEACHER_GRID, TEACHER_GRID)
PIXELS = {"size": {"height": STUDENT_SIZE, "width": STUDENT_SIZE}}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state between runs of one process; a new process starts without."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return load_teacher(save_classifier(tmp_path_factory.mktemp("classifier")), device="cpu")


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_targets(num_images, *, grid=GRID, seed=0):
    return TargetCache(
        noise(num_images, 3, STUDENT_SIZE, STUDENT_SIZE, seed=seed),
        noise(num_images, FEATURE_SIZE, seed=seed + 1),
        noise(num_images, *grid, FEATURE_SIZE, seed=seed + 2),
    )


class Stream(IterableDataset):
    """The same rows, one after the other."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows[index] for index in range(len(self.rows)))


class Interrupted(Exception):
    pass


class Interrupting(Dataset):
    """Rows of `data`, until `num_rows` of them have been read."""

    def __init__(self, data, num_rows):
        self.data, self.left = data, num_rows

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if self.left == 0:
            raise Interrupted
        self.left -= 1
        return self.data[index]


def run(folder, data, *, model=None, processor=None, teacher=None, validation=None, collate_fn=None, **settings):
    settings = {
        "max_steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "mixed_precision": "no",
    } | settings
    return distill(
        student() if model is None else model,
        data,
        config=DistillationConfig(output_dir=str(folder), **settings),
        image_processor=processor or APMImageProcessorPil(**PIXELS),
        teacher=teacher,
        validation_data=validation,
        collate_fn=collate_fn,
    )


def weights_of(result):
    return result.student.state_dict()


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first if first[name] is not None)


def logged(folder, name):
    """What TensorBoard was told: {step: value}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (folder / "logs").glob("*/events.out.tfevents.*")
    return {event.step: event.value for event in EventAccumulator(str(file)).Reload().Scalars(name)}


# --- the loop -----------------------------------------------------------------------------------------------------


def naive_loop(model, data, *, steps, learning_rate, warmup_steps, max_grad_norm, weights):
    """All images at every step; the schedule and the clipping are spelled out."""
    model = copy.deepcopy(model)
    rows = [data[index] for index in range(len(data))]
    pixels, embeds, features = (
        torch.stack([row[k] for row in rows]) for k in ("pixel_values", "image_embeds", "features")
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    colours = pixels * std[:, None, None] + mean[:, None, None]
    cell = STUDENT_SIZE // TEACHER_GRID
    colours = colours.unflatten(2, (TEACHER_GRID, cell)).unflatten(4, (TEACHER_GRID, cell)).mean(dim=(3, 5))
    colours = colours.flatten(2).transpose(1, 2)  # (B, 3, rows, cols) -> (B, L, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    losses, norms = [], []
    for step in range(steps):
        if step < warmup_steps:
            factor = step / warmup_steps
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        outputs = model(pixels, grid_coordinates(*GRID))
        loss = (
            weights.grid * ((outputs.last_hidden_state - features.flatten(1, 2)) ** 2).mean()
            + weights.cls * ((outputs.pooler_output - embeds) ** 2).mean()
            + weights.rgb * ((outputs.rgb - colours) ** 2).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        norms.append(math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters())))
        for parameter in model.parameters():
            parameter.grad *= min(1, max_grad_norm / norms[-1])
        optimizer.step()
        losses.append(loss.item())
    return model, losses, norms


def test_training_is_adam_with_warm_up_cosine_clipping_and_weighted_losses(tmp_path):
    # One batch is the whole data, so that the order of images is all the same.
    data, model = random_targets(8), student()
    recipe = {"learning_rate": 3e-3, "warmup_steps": 3, "max_grad_norm": 0.1}
    weights = LossWeights(grid=1.0, cls=0.5, rgb=2.0)
    expected, losses, norms = naive_loop(model, data, steps=10, weights=weights, **recipe)
    assert min(norms) > recipe["max_grad_norm"], "nothing was clipped"
    before = copy.deepcopy(model.state_dict())
    result = run(
        tmp_path, data, model=model, max_steps=10, batch_size=8, cls_weight=0.5, rgb_weight=2.0,
        report_to="tensorboard", **recipe,
    )  # fmt: skip
    assert largest_difference(weights_of(result), expected.state_dict()) < 1e-5
    assert largest_difference(before, expected.state_dict()) > 1e-2, "nothing was learnt"
    assert logged(tmp_path, "loss")[10] == pytest.approx(losses[-1], rel=1e-5)
    assert result.student is model


def test_a_short_run_lowers_the_loss_and_raises_the_validation_cosine(tmp_path, clip):
    images = [photo(seed) for seed in range(24)]
    processor = matching_image_processor(clip, STUDENT_SIZE)
    cache = TargetCache.build(images, clip, processor)
    train, held_out = (
        TargetCache(cache.pixel_values[part], cache.image_embeds[part], cache.features[part])
        for part in (slice(16), slice(16, 24))
    )
    result = run(
        tmp_path, train, processor=processor, validation=held_out, max_steps=80, batch_size=8, learning_rate=3e-3,
        validation_steps=40, report_to="tensorboard", seed=1,
    )  # fmt: skip
    loss = logged(tmp_path, "loss")
    assert loss[80] < 0.8 * loss[10]
    assert [row["step"] for row in result.metrics] == [0, 40, 80]
    for figure in ("feature_cosine", "embed_cosine"):
        values = [row[figure] for row in result.metrics]
        assert values[2] > values[0] + 0.2 and values[1] > values[0]
        assert logged(tmp_path, f"validation/{figure}")[80] == pytest.approx(values[2], rel=1e-5)
    assert result.metrics[-1]["rgb_mse"] < 0.6 * result.metrics[0]["rgb_mse"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == result.metrics
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "step_000000.png", "step_000040.png", "step_000080.png",
    ]  # fmt: skip


def test_validation_covers_every_image_at_every_place_of_the_teacher(tmp_path):
    held_out, model = random_targets(7, seed=10), student()
    with torch.no_grad():
        outputs = model(held_out.pixel_values, grid_coordinates(*GRID))
    features = held_out.features.flatten(1, 2)
    taught = random_targets(8)
    result = run(tmp_path, taught, model=model, validation=held_out, num_locations=2, max_steps=1, batch_size=8)
    first = result.metrics[0]
    std = taught.features.flatten(0, 2).std(dim=0, correction=0)
    error = ((outputs.last_hidden_state - features) / std).square().sum()
    spread = ((features - features.mean(dim=0)) / std).square().sum()
    cosine = F.cosine_similarity(outputs.last_hidden_state, features, dim=-1).mean()
    assert first["feature_cosine"] == pytest.approx(cosine.item(), abs=1e-6)
    assert first["feature_r2"] == pytest.approx((1 - error / spread).item(), rel=1e-4)
    controls = ("mean_r2", "position_r2", "ridge_r2")
    assert {name: first[name] for name in controls} == {name: result.metrics[1][name] for name in controls}
    assert max(first[name] for name in controls) < 0, "nothing is to be learnt of noise"
    embed_cosine = F.cosine_similarity(outputs.pooler_output, held_out.image_embeds).mean()
    assert first["embed_cosine"] == pytest.approx(embed_cosine.item(), abs=1e-6)


def test_validation_does_not_change_the_training(tmp_path):
    data = random_targets(10)
    plain = run(tmp_path / "plain", data, max_steps=6, num_locations=3)
    forget_accelerate()
    checked = run(
        tmp_path / "checked", data, max_steps=6, num_locations=3, validation=random_targets(5), validation_steps=1
    )
    assert largest_difference(weights_of(plain), weights_of(checked)) == 0


def test_two_passes_of_32_make_one_step_of_64(tmp_path):
    data = random_targets(128)
    one = run(tmp_path / "one", data, batch_size=64, num_locations=5)
    forget_accelerate()
    two = run(tmp_path / "two", data, batch_size=32, gradient_accumulation_steps=2, num_locations=5)
    forget_accelerate()
    half = run(tmp_path / "half", data, batch_size=32, num_locations=5)
    assert largest_difference(weights_of(one), weights_of(two)) < 1e-5
    assert largest_difference(weights_of(one), weights_of(half)) > 1e-3


def test_the_loss_reported_is_that_of_all_passes_of_a_step(tmp_path):
    data = random_targets(64)
    for accumulation in (1, 4):
        folder = tmp_path / str(accumulation)
        size = 64 // accumulation
        run(
            folder, data, batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1,
            report_to="tensorboard",
        )  # fmt: skip
        forget_accelerate()
    assert logged(tmp_path / "4", "loss")[1] == pytest.approx(logged(tmp_path / "1", "loss")[1], rel=1e-5)


def test_the_seed_decides_the_order_of_images_and_the_places(tmp_path):
    data = random_targets(10)
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        weights.append(weights_of(run(tmp_path / str(number), data, seed=seed, num_locations=3)))
        forget_accelerate()
    assert largest_difference(weights[0], weights[1]) == 0
    assert largest_difference(weights[0], weights[2]) > 1e-4


def test_every_epoch_has_every_image_once_in_a_new_order(tmp_path):
    data, orders = random_targets(12), []

    class Recorded(Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            orders.append(index)
            return data[index]

    run(tmp_path, Recorded(), max_steps=9)  # three epochs of three batches
    epochs = [orders[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_fewer_images_than_a_batch_are_enough(tmp_path):
    assert len(run(tmp_path, random_targets(3), validation=random_targets(2), max_steps=3).metrics) == 2


# --- places -------------------------------------------------------------------------------------------------------


def test_places_are_drawn_afresh_at_each_step_and_are_some_of_the_teachers(tmp_path, monkeypatch):
    drawn = []

    def recorded(*inputs, locations=None, **options):
        drawn.append(locations)
        return query_student(*inputs, locations=locations, **options)

    monkeypatch.setattr(distillation_targets, "query_student", recorded)
    run(tmp_path, random_targets(8), num_locations=5, max_steps=6)
    assert len(drawn) == 6 and len({tuple(places.tolist()) for places in drawn}) == 6
    assert all(len(set(places.tolist())) == 5 and set(places.tolist()) <= set(range(16)) for places in drawn)


def test_the_loss_at_some_places_is_against_the_teachers_answers_there(tmp_path, monkeypatch):
    data, model, drawn = random_targets(8), student(), []

    def recorded(*inputs, locations=None, **options):
        drawn.append(locations)
        return query_student(*inputs, locations=locations, **options)

    monkeypatch.setattr(distillation_targets, "query_student", recorded)
    with torch.no_grad():
        answers = model(data.pixel_values, grid_coordinates(*GRID))
    cell = STUDENT_SIZE // TEACHER_GRID
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    colours = F.avg_pool2d(data.pixel_values, cell) * std[:, None, None] + mean[:, None, None]
    settings = {"num_locations": 5, "batch_size": 8, "max_steps": 1, "report_to": "tensorboard"}
    run(tmp_path, data, model=model, **settings)
    (places,) = drawn
    for name, answer, target in (
        ("loss_grid", answers.last_hidden_state, data.features.flatten(1, 2)),
        ("loss_rgb", answers.rgb, colours.flatten(2).transpose(1, 2)),
    ):
        expected = F.mse_loss(answer[:, places], target[:, places]).item()
        assert logged(tmp_path, name)[1] == pytest.approx(expected, rel=1e-5)
        assert expected != pytest.approx(F.mse_loss(answer[:, places], target[:, places.flip(0)]).item(), rel=1e-4)


def test_all_places_are_asked_where_more_are_wanted_than_there_are(tmp_path):
    data = random_targets(8)
    everywhere = run(tmp_path / "all", data)
    forget_accelerate()
    assert largest_difference(weights_of(everywhere), weights_of(run(tmp_path / "99", data, num_locations=99))) == 0
    forget_accelerate()
    assert largest_difference(weights_of(everywhere), weights_of(run(tmp_path / "2", data, num_locations=2))) > 1e-4


@pytest.mark.parametrize("grid", [(3, 3), (4, 4), (2, 5)], ids=["the student's own grid", "finer", "oblong"])
@pytest.mark.parametrize("locations", [None, [5, 0, 3]], ids=["everywhere", "somewhere"])
def test_the_student_is_asked_at_the_centres_of_the_teachers_patches(grid, locations):
    model, pixels = student(pooling="attention", local_patch=True), noise(2, 3, STUDENT_SIZE, STUDENT_SIZE, seed=0)
    targets = DistillationTargets(noise(2, FEATURE_SIZE, seed=1), torch.empty(0), torch.empty(0), grid=grid)
    places = locations if locations is not None else range(grid[0] * grid[1])
    rows, cols = grid
    centres = [((2 * (i // cols) + 1) / rows - 1, (2 * (i % cols) + 1) / cols - 1) for i in places]
    expected = model(pixels, torch.tensor(centres))
    given = None if locations is None else torch.tensor(locations)
    answer = query_student(model, pixels, targets, locations=given)
    for name in ("last_hidden_state", "pooler_output", "rgb"):
        torch.testing.assert_close(answer[name], expected[name], atol=1e-5, rtol=1e-5)
    assert expected.last_hidden_state.std(dim=1).max() > 0.05, "all places answer alike"


def test_a_student_may_take_its_trigger_from_the_teacher(tmp_path):
    model = student(trigger_source="embedding")
    before = copy.deepcopy(model.state_dict())
    result = run(tmp_path, random_targets(8), model=model, validation=random_targets(4))
    assert largest_difference(before, weights_of(result)) > 1e-3 and len(result.metrics) == 2


# --- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_min_max": True},
        {"do_flip_channel_order": True},
        {"do_flip_channel_order": True, "do_min_max": True},
        {"do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "do_flip_channel_order": True},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
    ids=["imagenet", "min-max", "bgr", "bgr min-max", "not normalised", "bgr own mean", "one mean for all"],
)
def test_colour_targets_are_the_pictures_own_colours_in_the_order_of_the_pixels(options, clip):
    # A red, a green and a blue row; black and white corners make min-max change nothing.
    pixels = np.zeros((STUDENT_SIZE, STUDENT_SIZE, 3), dtype=np.uint8)
    pixels[:6], pixels[6:12], pixels[12:18] = (255, 51, 0), (0, 204, 102), (26, 0, 230)
    processor = APMImageProcessorPil(**PIXELS, **options)
    inputs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    teacher_pixels = noise(1, 3, TEACHER_SIZE, TEACHER_SIZE, seed=0)
    targets = TargetMaker(clip, processor)({"pixel_values": inputs, "teacher_pixel_values": teacher_pixels})
    grid = targets.grid
    assert grid == GRID and targets.rgb.shape == (1, 16, 3)
    expected = torch.tensor([(255, 51, 0), (0, 204, 102), (26, 0, 230), (0, 0, 0)]) / 255
    if options.get("do_flip_channel_order"):
        expected = expected.flip(1)
    torch.testing.assert_close(targets.rgb[0], expected.repeat_interleave(4, dim=0), atol=1e-6, rtol=0)
    assert targets.rgb.min() >= -1e-6 and targets.rgb.max() <= 1 + 1e-6


def test_targets_are_what_the_teacher_says_row_major(clip):
    pixels = noise(2, 3, TEACHER_SIZE, TEACHER_SIZE, seed=0)
    batch = {"pixel_values": noise(2, 3, STUDENT_SIZE, STUDENT_SIZE, seed=1), "teacher_pixel_values": pixels}
    targets = TargetMaker(clip, APMImageProcessorPil(**PIXELS))(batch)
    grid = targets.grid
    answer = clip.encode_images(pixel_values=pixels)
    assert grid == GRID and torch.equal(targets.image_embeds, answer.image_embeds)
    assert torch.equal(targets.features[:, 6], answer.features[:, 1, 2])
    assert not targets.features.is_inference()


def test_targets_in_the_batch_come_before_the_teachers(clip):
    cache = random_targets(2, grid=(2, 3))
    batch = torch.utils.data.default_collate([cache[0], cache[1]])
    targets = TargetMaker(clip, APMImageProcessorPil(**PIXELS))(batch)
    grid = targets.grid
    assert grid == (2, 3) and torch.equal(targets.features, cache.features.flatten(1, 2))
    assert torch.equal(targets.image_embeds, cache.image_embeds)
    assert targets.rgb.shape == (2, 6, 3)


@pytest.mark.parametrize("size", [(60, 36), (36, 60), (40, 40)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("name", ["clip", "classifier"])
@pytest.mark.parametrize("student_size", [STUDENT_SIZE, 4 * TEACHER_SIZE])
def test_the_student_is_shown_the_part_of_the_picture_that_the_teacher_sees(request, name, size, student_size):
    teacher = request.getfixturevalue(name)
    # The picture is its own map: red tells x, green tells y.
    y, x = np.mgrid[: size[1], : size[0]]
    ramp = np.stack([255 * x / (size[0] - 1), 255 * y / (size[1] - 1), 0 * x], axis=-1).astype(np.uint8)
    picture = Image.fromarray(ramp)
    processor = matching_image_processor(teacher, student_size, do_normalize=False)
    seen = processor(picture, return_tensors="pt")["pixel_values"]
    theirs = teacher.image_processor
    shown = theirs(picture, return_tensors="pt")["pixel_values"]
    shown = shown * torch.tensor(theirs.image_std)[:, None, None] + torch.tensor(theirs.image_mean)[:, None, None]
    assert seen.shape == (1, 3, student_size, student_size)
    at = grid_coordinates(4, 4).flip(-1)[None, None]  # (1, 1, 16, 2), (x, y)
    places = [F.grid_sample(pixels, at, align_corners=False)[0, :2, 0] for pixels in (seen, shown)]
    assert (places[0] - places[1]).abs().max() < 0.02, "the two look at different places"
    if name == "clip" and size[0] != size[1]:
        whole = matching_image_processor(teacher, student_size, do_normalize=False, do_center_crop=False)
        whole.size = {"height": student_size, "width": student_size}
        stretched = whole(picture, return_tensors="pt")["pixel_values"]
        assert (F.grid_sample(stretched, at, align_corners=False)[0, :2, 0] - places[1]).abs().max() > 0.05


def test_options_of_the_students_image_processor_are_kept(clip):
    processor = matching_image_processor(clip, STUDENT_SIZE, do_min_max=True, do_flip_channel_order=True)
    assert processor.do_min_max and processor.do_flip_channel_order and processor.do_center_crop


# --- interruption -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "checkpoint_steps"),
    [
        ({"num_locations": 3}, 3),  # 5 batches an epoch: the checkpoint is in the middle of the first,
        ({"num_locations": 3}, 8),  # of the second,
        ({}, 5),  # and between two
        ({"gradient_accumulation_steps": 2}, 4),  # 3 steps an epoch, the last of one pass
        ({"gradient_accumulation_steps": 2, "warmup_steps": 6, "num_locations": 3}, 7),
    ],
    ids=["first epoch", "second epoch", "between epochs", "accumulation", "accumulation, third epoch"],
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does_bit_for_bit(tmp_path, settings, checkpoint_steps):
    data, held_out = random_targets(20), random_targets(6, seed=7)
    settings = {"max_steps": 12, "checkpoint_steps": checkpoint_steps, "validation_steps": 2} | settings
    whole = run(tmp_path / "whole", data, validation=held_out, **settings)
    forget_accelerate()
    images_a_step = 4 * settings.get("gradient_accumulation_steps", 1)
    with pytest.raises(Interrupted):
        # Controls are fitted to all images first.
        until = Interrupting(data, len(data) + (checkpoint_steps + 2) * images_a_step)
        run(tmp_path / "cut", until, validation=held_out, **settings)
    forget_accelerate()
    torch.manual_seed(123)  # a new process knows nothing of the old one's generators
    resumed = run(tmp_path / "cut", data, validation=held_out, model=student(seed=5), resume=True, **settings)
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0
    assert whole.metrics == resumed.metrics


@pytest.mark.parametrize("checkpoint_steps", [3, 8], ids=["first epoch", "second epoch"])
def test_a_resumed_stream_ends_where_an_uninterrupted_one_does(tmp_path, checkpoint_steps):
    data = random_targets(20)
    settings = {"max_steps": 12, "checkpoint_steps": checkpoint_steps, "num_locations": 3}
    whole = run(tmp_path / "whole", Stream(data), **settings)
    forget_accelerate()
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", Stream(Interrupting(data, (checkpoint_steps + 2) * 4)), **settings)
    forget_accelerate()
    resumed = run(tmp_path / "cut", Stream(data), model=student(seed=5), resume=True, **settings)
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0


def checkpoint_names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_last_checkpoints_stay_and_none_is_half_written(tmp_path):
    run(tmp_path, random_targets(8), max_steps=9, checkpoint_steps=2, keep_checkpoints=2)
    assert checkpoint_names(tmp_path) == ["step_00000006", "step_00000008"]


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path, caplog):
    data = random_targets(8)
    run(tmp_path, data, max_steps=4, checkpoint_steps=2)
    (tmp_path / "checkpoints/step_00000003.partial").mkdir()
    forget_accelerate()
    with caplog.at_level(logging.INFO, logger="apm_hf"):
        run(tmp_path, data, max_steps=4, resume=True)
    assert "resumed from step_00000002" in caplog.text


def test_no_checkpoint_is_written_where_none_is_wanted(tmp_path):
    run(tmp_path, random_targets(8), checkpoint_steps=0)
    assert not (tmp_path / "checkpoints").exists()


def test_resuming_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume: found no checkpoint"):
        run(tmp_path, random_targets(8), resume=True)


@pytest.mark.parametrize("max_steps", [2, 4], ids=["shorter", "as long"])
def test_resuming_a_run_that_has_no_steps_left_ends(tmp_path, max_steps):
    data = random_targets(8)
    longer = run(tmp_path, data, max_steps=6, checkpoint_steps=4)
    forget_accelerate()
    read = Interrupting(data, 100)  # instead of for ever
    try:
        resumed = run(tmp_path, read, max_steps=max_steps, resume=True)
    except ValueError as error:
        assert "max_steps" in str(error)
    else:
        assert read.left > 90 and largest_difference(weights_of(longer), weights_of(resumed)) > 0


def test_a_new_run_does_not_resume_from_the_checkpoints_of_an_old_one(tmp_path):
    data = random_targets(8)
    run(tmp_path, data, max_steps=10, checkpoint_steps=4, keep_checkpoints=2)  # leaves 4 and 8
    settings = {"max_steps": 10, "checkpoint_steps": 3, "keep_checkpoints": 2, "learning_rate": 1e-3}
    forget_accelerate()
    with pytest.raises(Interrupted):
        run(tmp_path, Interrupting(data, 20), overwrite=True, **settings)
    forget_accelerate()
    resumed = run(tmp_path, data, resume=True, model=student(seed=5), **settings)
    forget_accelerate()
    whole = run(tmp_path / "whole", data, **settings)
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0


def test_what_wraps_the_student_dies_before_the_process_group(tmp_path, monkeypatch):
    # The other way round, a wrapper for several processes waits in its destructor for a thread that waits for it.
    wrappers, alive, end_training = [], [], Accelerator.end_training

    def prepare_model(accelerator, model, *args, **kwargs):
        wrapper = torch.nn.DataParallel(model)
        wrappers.append(weakref.ref(wrapper))
        return wrapper

    def remember(accelerator):
        alive.extend(wrapper() is not None for wrapper in wrappers)
        end_training(accelerator)

    monkeypatch.setattr(Accelerator, "prepare_model", prepare_model)
    monkeypatch.setattr(Accelerator, "end_training", remember)
    run(tmp_path, random_targets(8), max_steps=1)
    assert alive == [False]


# --- precision, streams, the folder that is left --------------------------------------------------------------------


def test_bfloat16_trains_and_leaves_an_ordinary_float32_student(tmp_path):
    data, model = random_targets(8), student()
    result = run(
        tmp_path, data, model=model, mixed_precision="bf16", max_steps=12, validation=random_targets(4),
        report_to="tensorboard",
    )  # fmt: skip
    forget_accelerate()
    plain = run(tmp_path / "plain", data, mixed_precision="no", max_steps=12)
    assert 1e-5 < largest_difference(weights_of(plain), weights_of(result)) < 0.1
    assert {weight.dtype for weight in weights_of(result).values()} == {torch.float32}
    # The student handed back is the student saved, without autocast around it.
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    pixels = noise(2, 3, STUDENT_SIZE, STUDENT_SIZE, seed=9)
    with torch.no_grad():
        first, second = loaded(pixels), result.student(pixels)
    assert largest_difference(dict(first), dict(second)) < 1e-6
    with torch.no_grad():
        assert isinstance(result.student(pixels, return_dict=False), tuple)


def test_the_folder_loads_as_model_and_image_processor(tmp_path, clip):
    processor = matching_image_processor(clip, STUDENT_SIZE, do_min_max=True)
    result = run(tmp_path, random_targets(8), processor=processor, validation=random_targets(4))
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    picture = photo(3, size=(60, 36))
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], processor(picture, return_tensors="pt")["pixel_values"])
    with torch.no_grad():
        first, second = loaded(**inputs), result.student(**inputs)
    assert largest_difference(dict(first), dict(second)) < 1e-6
    assert not result.student.training and result.output_dir == tmp_path


def test_a_stream_of_photos_trains_like_the_photos_in_order(tmp_path, clip, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
    processor = matching_image_processor(clip, STUDENT_SIZE)
    rows = datasets.Dataset.from_dict({"image": [photo(seed) for seed in range(10)]}).to_iterable_dataset()
    collator = ImageCollator(processor, teacher_image_processor=clip.image_processor)
    options = {"processor": processor, "max_steps": 4, "validation": random_targets(3)}
    result = run(tmp_path / "photos", rows, teacher=clip, collate_fn=collator, **{**options, "validation": None})
    forget_accelerate()
    cache = Stream(TargetCache.build([photo(seed) for seed in range(10)], clip, processor))
    from_memory = run(tmp_path / "memory", cache, **options)
    assert largest_difference(weights_of(result), weights_of(from_memory)) < 1e-5


@pytest.mark.parametrize(
    ("num_images", "processes", "steps"),
    [(60, 1, 250), (3000, 1, 3000), (3001, 1, 3001), (3000, 2, 1500), (10**6, 1, 10_000)],
)
def test_the_default_number_of_steps_follows_the_number_of_images(num_images, processes, steps):
    config = DistillationConfig(output_dir="out", batch_size=16, gradient_accumulation_steps=2)
    assert config.steps_for(num_images, processes) == steps
    assert dataclasses.replace(config, max_steps=7).steps_for(num_images, processes) == 7
    with pytest.raises(ValueError, match="max_steps: expected a number for a stream"):
        config.steps_for(None, processes)


def test_a_run_takes_the_default_number_of_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("apm_hf.distillation.settings.FEWEST_STEPS", 2)
    images = random_targets(3)
    result = run(tmp_path, images, validation=images, max_steps=None, batch_size=24)
    assert result.steps == result.metrics[-1]["step"] == 4  # 32 passes over 3 images in steps of 24


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "max_steps: expected a positive number or None, got 0"),
        ({"batch_size": 0}, "batch_size: expected a positive number"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: expected a positive"),
        ({"validation_steps": 0}, "validation_steps: expected a positive number"),
        ({"keep_checkpoints": 0}, "keep_checkpoints: expected a positive number"),
        ({"warmup_steps": -1}, "warmup_steps: expected 0 or more, got -1"),
        ({"checkpoint_steps": -1}, "checkpoint_steps: expected 0 or more"),
        ({"max_grad_norm": -0.1}, "max_grad_norm: expected 0 or more"),
        ({"num_workers": -1}, "num_workers: expected 0 or more"),
        ({"num_pictures": -1}, "num_pictures: expected 0 or more"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"learning_rate": math.nan}, "learning_rate: expected a positive number"),
        ({"num_locations": 0}, "num_locations: expected a positive number or None, got 0"),
        ({"mixed_precision": "fp8"}, "mixed_precision: expected no, bf16 or fp16, got 'fp8'"),
        ({"grid_weight": -1.0}, "loss weights: expected numbers >= 0"),
        ({"grid_weight": 0.0, "cls_weight": 0.0, "rgb_weight": 0.0}, "one of grid, cls and rgb positive"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(output_dir="unused", **settings)


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        DistillationConfig(output_dir="unused").seed = 1


@pytest.mark.parametrize("source", ["teacher", "targets"])
def test_a_student_of_another_width_is_refused(tmp_path, source, clip):
    teacher = clip if source == "teacher" else None
    with pytest.raises(ValueError, match=f"feature_size: expected.* {FEATURE_SIZE}, got 20"):
        run(tmp_path, random_targets(8), model=student(feature_size=20), teacher=teacher)


def test_no_image_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one image"):
        run(tmp_path, random_targets(0))
    forget_accelerate()
    with pytest.raises(ValueError, match="at least one image|does not contain any data"):
        run(tmp_path, Stream(random_targets(0)))


def test_neither_teacher_nor_targets_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected a teacher, or batches with image_embeds and features"):
        run(tmp_path, [{"pixel_values": noise(3, STUDENT_SIZE, STUDENT_SIZE, seed=i)} for i in range(4)])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    data = random_targets(8)
    data.features[3] = math.nan
    with pytest.raises(ValueError, match="step [01]: the loss is nan"):
        run(tmp_path, data)


def test_colours_are_not_asked_of_a_student_without_them(tmp_path):
    with pytest.raises(ValueError, match="rgb: expected a student with use_rgb_head=True"):
        run(tmp_path, random_targets(8), model=student(use_rgb_head=False))
    forget_accelerate()
    result = run(tmp_path, random_targets(8), model=student(use_rgb_head=False), rgb_weight=0.0)
    assert result.student.decoder.rgb_head is None


def test_a_tracker_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nonsense"):
        run(tmp_path, random_targets(8), report_to="nonsense")
