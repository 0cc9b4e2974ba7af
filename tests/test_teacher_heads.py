"""Feature statistics, heads for several teachers, and what a student inherits from them.

Legend: B images, L locations, F feature width, (rows, cols) a teacher's grid.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel

from apm_hf import APMConfig, APMForImageClassification, APMModel, TTTConfig, adapt, load_teacher
from apm_hf.data.images import ImageCollator
from apm_hf.data.scenes import SceneDataset
from apm_hf.distillation import DistillationConfig, distill, matching_image_processor
from apm_hf.distillation import recipe as training
from apm_hf.distillation.feature_statistics import RunningStatistics, set_statistics
from apm_hf.distillation.losses import DistillationTargets, LossWeights, distillation_losses
from apm_hf.distillation.targets import TargetMaker, query_heads
from apm_hf.image_processing_pil_apm import APMImageProcessorPil
from apm_hf.position_encoding import grid_coordinates
from apm_hf.teachers.dense_grids import moved
from apm_hf.teachers.licenses import inherit, public_name, teacher_license
from apm_hf.teachers.matching import same_view
from apm_hf.teachers.targets import TargetCache
from apm_hf.ttt.maps import feature_map
from apm_hf.ttt.targets import TTTTargets
from fixtures_runs import forget_accelerate
from fixtures_tiny import (
    FEATURE_SIZE,
    STUDENT_SIZE,
    TEACHER_GRID,
    photo,
    resampling_slack,
    save_classifier,
    save_clip,
    student,
)
from naive_apm import assert_close, small_config, small_images, small_model


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(size, *, seed=0, scale=1.0):
    """Fields of a head: means and deviations that differ from channel to channel by a factor of 100."""
    return {
        "feature_mean": (scale * noise(size, seed=seed)).tolist(),
        "feature_std": (scale * 10 ** (noise(size, seed=seed + 1) / 2)).tolist(),
    }


HEADS = {
    "wide": {"feature_size": 24, "pooling": "attention", **statistics(24, scale=30.0)},
    "plain-2": {"feature_size": 5, "pooling": "mean"},
}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """16 wide, a 4 x 4 grid, crops the centre."""
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """As wide, squeezes the whole picture."""
    return load_teacher(save_classifier(tmp_path_factory.mktemp("classifier")), device="cpu")


def settings(folder, **options):
    fixed = {"report_to": "none", "mixed_precision": "no", "checkpoint_steps": 0, "num_pictures": 0}
    return DistillationConfig(output_dir=str(folder), **{**fixed, "batch_size": 8, "learning_rate": 3e-3, **options})


# --- statistics in the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_answers_are_those_of_the_network_mapped_to_the_teachers_space(pooling):
    plain, given = small_model(pooling=pooling), statistics(16)
    model = APMModel(small_config(pooling=pooling, **given)).eval()
    model.load_state_dict(plain.state_dict())
    mean, std = (torch.tensor(given[name]) for name in ("feature_mean", "feature_std"))
    with torch.no_grad():
        answers, expected = model(small_images()), plain(small_images())
        torch.testing.assert_close(answers.last_hidden_state, expected.last_hidden_state * std + mean)
        torch.testing.assert_close(answers.pooler_output, expected.pooler_output * std + mean)
        assert torch.equal(answers.rgb, expected.rgb)  # decoded from what the network answers
        torch.testing.assert_close(model.pooled_features(small_images()), answers.pooler_output)
    if pooling == "mean":
        torch.testing.assert_close(answers.pooler_output, answers.last_hidden_state.mean(dim=1))


def test_one_deviation_for_all_channels_is_that_deviation_for_each():
    given = statistics(16)
    models = [APMModel(small_config(feature_mean=given["feature_mean"], feature_std=std)) for std in (2, [2.0] * 16)]
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(*(model(small_images()).last_hidden_state for model in models))


def test_statistics_set_later_are_those_of_the_configuration_and_of_no_other():
    config = small_config(teacher_heads=HEADS)
    model, given = APMModel(config), statistics(16)
    before = model(small_images())
    model.set_feature_statistics(torch.tensor(given["feature_mean"]), np.array(given["feature_std"]))
    model.set_feature_statistics([1.0] * 5, 3.0, head="plain-2")
    assert model.config.feature_std == pytest.approx(given["feature_std"], rel=1e-6)
    assert model.config.teacher_head("plain-2")["feature_std"] == 3.0
    assert small_config(teacher_heads=HEADS).teacher_head("plain-2")["feature_std"] is None
    built = APMModel(model.config)
    built.load_state_dict(model.state_dict())
    assert_same(built(small_images()), model(small_images()))
    plain = before.teacher_features["plain-2"]
    torch.testing.assert_close(model(small_images()).teacher_features["plain-2"], 3 * plain + 1)
    with pytest.raises(ValueError, match=r"teacher_heads\['plain-2'\]: feature_std: expected positive .* channel 0"):
        model.set_feature_statistics([1.0] * 5, 0.0, head="plain-2")
    assert model.config.teacher_head("plain-2")["feature_std"] == 3.0


def assert_same(first, second):
    """To the bit, in every field."""
    assert first.keys() == second.keys()
    for name in first:
        one, two = first[name], second[name]
        pairs = [(one[key], two[key]) for key in two] if isinstance(two, dict) else [(one, two)]
        assert all(torch.equal(*pair) for pair in pairs), name


def assert_all_close(first, second):
    """But for the order in which BLAS sums, which is that of addresses in memory."""
    assert first.keys() == second.keys()
    for name in first:
        one, two = first[name], second[name]
        for pair in [(one[key], two[key]) for key in two] if isinstance(two, dict) else [(one, two)]:
            assert_close(*pair)


def test_a_saved_model_answers_the_same_and_its_file_holds_weights_alone(tmp_path):
    model = small_model(pooling="attention", teacher_heads=HEADS, **statistics(16))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.feature_space.mean, torch.tensor(model.config.feature_mean))
    assert_all_close(loaded(small_images()), model(small_images()))
    assert not [name for name in model.state_dict() if name.endswith((".mean", ".std"))]
    again = APMConfig.from_dict(json.loads(model.config.to_json_string()))
    assert again.to_dict() == model.config.to_dict()
    classifier = APMForImageClassification(model.config)
    classifier.save_pretrained(tmp_path / "head")
    bare = APMModel.from_pretrained(tmp_path / "head")  # the buffers of a part of a saved model
    assert_all_close(bare(small_images()), classifier.apm(small_images()))


def test_bfloat16_answers_in_the_teachers_space(tmp_path):
    model = small_model(teacher_heads=HEADS, **statistics(16))
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    answers, expected = half(small_images()), model(small_images())
    assert answers.last_hidden_state.dtype == answers.teacher_embeds["wide"].dtype == torch.bfloat16
    assert_close(answers.last_hidden_state, expected.last_hidden_state, 0.03)
    assert_close(answers.teacher_features["wide"], expected.teacher_features["wide"], 0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = model(small_images()).last_hidden_state
    assert automatic.dtype == torch.float32  # a small deviation about a large mean would not survive bfloat16
    assert_close(automatic, expected.last_hidden_state, 0.03)


NONSENSE = [
    ({"feature_mean": [0.0] * 16}, "feature_std: expected it beside feature_mean, got None"),
    ({"feature_std": 1.0}, "feature_mean: expected it beside feature_std, got None"),
    (
        {"feature_mean": [0.0] * 15, "feature_std": 1.0},
        "feature_mean: expected feature_size=16 numbers, got 15 values",
    ),
    ({"feature_mean": [0.0] * 16, "feature_std": [1.0]}, "feature_std: expected feature_size=16 numbers, got 1 value"),
    (
        {"feature_mean": [0.0] * 16, "feature_std": [1.0] * 15 + [0.0]},
        "feature_std: expected positive finite numbers, got 0.0 in channel 15",
    ),
    (
        {"feature_mean": [0.0, float("nan")] * 8, "feature_std": 1.0},
        "feature_mean: expected finite numbers, got nan in channel 1",
    ),
    (
        {"feature_mean": [0.0] * 16, "feature_std": float("inf")},
        "feature_std: expected positive finite numbers, got inf",
    ),
    ({"teacher_heads": {"a.b": {"feature_size": 4}}}, "teacher_heads: expected names of letters, digits.* got 'a.b'"),
    ({"teacher_heads": {"keys": {"feature_size": 4}}}, "teacher_heads: expected names .* got 'keys'"),
    ({"teacher_heads": {"a": {}}}, r"teacher_heads\['a'\]: expected feature_size and any of .*, got \[\]"),
    (
        {"teacher_heads": {"a": {"feature_size": 4, "width": 4}}},
        r"teacher_heads\['a'\]: .*got \['feature_size', 'width'",
    ),
    (
        {"teacher_heads": {"a": {"feature_size": 0}}},
        r"teacher_heads\['a'\]: feature_size: expected a positive integer",
    ),
    (
        {"teacher_heads": {"a": {"feature_size": 2, "feature_mean": [0], "feature_std": 1}}},
        r"teacher_heads\['a'\]: feature_mean: expected feature_size=2 numbers, got 1 values",
    ),
    (
        {"teacher_heads": {"a": {"feature_size": 6, "pooling": "attention"}}},
        r"teacher_heads\['a'\]: pooling_num_heads: expected a divisor of feature_size=6, got 4",
    ),
    (
        {"teacher_heads": {"a": {"feature_size": 6, "pooling": "max"}}},
        r"teacher_heads\['a'\]: pooling: expected one of",
    ),
    ({"distilled_from": [{"license": "mit"}]}, r"distilled_from\[0\]: expected name and any of .*, got \['license'\]"),
    ({"distilled_from": [{"name": "a", "url": "b"}]}, r"distilled_from\[0\]: expected name .*, got \['name', 'url'\]"),
    ({"distilled_from": [{"name": "a"}, {"name": " "}]}, r"distilled_from\[1\]: expected name to be a non-empty text"),
    (
        {"distilled_from": [{"name": "a", "license": 3}]},
        r"distilled_from\[0\]: expected license to be a non-empty text",
    ),
    ({"distilled_from": [{"name": "/home/me/teacher"}]}, r"expected name to be public.*, got '/home/me/teacher'"),
    ({"distilled_from": [{"name": "a", "dataset": "C:\\pics"}]}, r"expected dataset to be public"),
]


@pytest.mark.parametrize(("fields", "message"), NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_in_the_configuration_says_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


# --- several heads ------------------------------------------------------------------------------------------------


def test_every_teacher_has_a_head_on_the_shared_network():
    model = small_model(teacher_heads=HEADS)
    with torch.no_grad():
        outputs = model(small_images(), output_hidden_states=True)
    assert {name: tuple(values.shape) for name, values in outputs.teacher_features.items()} == {
        "plain-2": (2, 9, 5), "wide": (2, 9, 24),
    }  # fmt: skip
    assert {name: tuple(values.shape) for name, values in outputs.teacher_embeds.items()} == {
        "plain-2": (2, 5), "wide": (2, 24),
    }  # fmt: skip
    projection = model.decoder.teacher_heads["wide"].projection
    standardised = projection(outputs.hidden_states[-1])
    mean, std = (torch.tensor(HEADS["wide"][name]) for name in ("feature_mean", "feature_std"))
    torch.testing.assert_close(outputs.teacher_features["wide"], standardised * std + mean)
    pooler, index = model.decoder.teacher_heads["wide"].pooler, torch.arange(3.0)
    pooled, _ = pooler(standardised, index[None, :, None], index[None, None])
    torch.testing.assert_close(outputs.teacher_embeds["wide"], pooled * std + mean)
    torch.testing.assert_close(outputs.teacher_embeds["plain-2"], outputs.teacher_features["plain-2"].mean(dim=1))
    plain = model(small_images(), return_dict=False)
    assert torch.equal(plain[-2]["wide"], outputs.teacher_features["wide"])


@pytest.mark.parametrize("gradients", [True, False])
def test_outputs_of_additional_heads_do_not_depend_on_chunks_or_checkpointing(gradients):
    model, places = small_model(teacher_heads=HEADS, **statistics(16)), torch.rand(7, 2) * 2 - 1
    with torch.set_grad_enabled(gradients):
        whole = model(small_images(), places)
        for chunk_size in (1, 3):
            assert_all_close(model(small_images(), places, chunk_size=chunk_size), whole)
        model.gradient_checkpointing_enable()
        assert_same(model.train()(small_images(), places), whole)


def test_heads_that_are_not_asked_for_cost_nothing():
    model = small_model(teacher_heads=HEADS)
    calls = []
    for name, head in model.decoder.teacher_heads.items():
        head.projection.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        some, all_of_them = model(small_images(), heads=["wide"]), model(small_images())
        assert calls == ["wide", "plain-2", "wide"] and list(some.teacher_embeds) == ["wide"]
        assert torch.equal(some.teacher_features["wide"], all_of_them.teacher_features["wide"])
        calls.clear()
        none = model.query(model.fold(small_images()), heads=())
        assert none.teacher_features is None and torch.equal(none.pooler_output, some.pooler_output)
        feature_map(model, small_images(), (2, 2))
        model.pooled_features(small_images())
    assert calls == []
    with pytest.raises(ValueError, match=r"heads: expected names among \['plain-2', 'wide'\], got \['clip'\]"):
        model(small_images(), heads=["wide", "clip"])


@pytest.mark.parametrize("name", ["wide", "plain-2"])
def test_a_model_with_one_of_the_heads_answers_what_the_head_does(name, tmp_path):
    model = small_model(teacher_heads=HEADS, num_levels=2, **statistics(16))
    before = copy.deepcopy(model.state_dict())
    single = model.with_head(name)
    single.save_pretrained(tmp_path)
    outputs, loaded = model(small_images()), APMModel.from_pretrained(tmp_path)
    for one in (single, loaded):
        answers = one(small_images())
        assert_close(answers.last_hidden_state, outputs.teacher_features[name])
        assert_close(answers.pooler_output, outputs.teacher_embeds[name])
        assert_close(one.pooled_features(small_images()), outputs.teacher_embeds[name])
        assert_close(answers.levels, outputs.levels)
        assert answers.rgb is answers.teacher_features is None
    assert loaded.config.feature_size == HEADS[name]["feature_size"] and loaded.config.teacher_heads is None
    with torch.no_grad():
        single.decoder.feature_head.weight.zero_()
    assert all(torch.equal(model.state_dict()[key], values) for key, values in before.items())
    with pytest.raises(ValueError, match=r"head: expected one of \['plain-2', 'wide'\], got 'clip'"):
        model.with_head("clip")


def test_a_column_that_is_the_main_teachers_embedding_stays_as_wide_under_another_head():
    model = small_model(trigger_source="embedding", teacher_heads=HEADS)
    column = noise(2, 16)
    outputs, single = model(trigger_column=column), model.with_head("wide")
    assert torch.equal(single(trigger_column=column).last_hidden_state, outputs.teacher_features["wide"])


# --- test-time training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("fit", ["all", "low_rank", "output_bias"])
def test_adapting_with_statistics_is_adapting_to_standardised_targets(pooling, fit):
    plain, given = small_model(pooling=pooling), statistics(16, scale=20.0)
    model = APMModel(small_config(pooling=pooling, teacher_heads=HEADS, **given)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    mean, std = (torch.tensor(given[name]) for name in ("feature_mean", "feature_std"))
    wanted = {"image_embeds": noise(2, 16), "features": noise(2, 3, 3, 16, seed=1), "rgb": noise(2, 3, 3, 3).abs()}
    if fit != "all":
        wanted = {"image_embeds": wanted["image_embeds"]}  # the pooled feature alone takes another path
    own = {name: values if name == "rgb" else values * std + mean for name, values in wanted.items()}
    config = TTTConfig(steps=4, learning_rate=1e-2, fit=fit, start="model")
    expected = adapt(plain, small_images(), TTTTargets(**wanted), config=config)
    found = adapt(model, small_images(), TTTTargets(**own), config=config)
    assert_close(found.losses, expected.losses, 1e-4)
    assert (expected.losses[:, -1] < expected.losses[:, 0]).all()
    assert_close(found.image_embeds, expected.image_embeds * std + mean, 1e-3)
    answers, others = found.query(), expected.query()
    assert_close(answers.last_hidden_state, others.last_hidden_state * std + mean, 1e-3)
    assert_close(answers.pooler_output, found.image_embeds, 1e-4)


def test_models_of_another_head_are_adapted_to_its_teacher():
    single = small_model(teacher_heads=HEADS).with_head("wide")
    mean, std = (torch.tensor(HEADS["wide"][name]) for name in ("feature_mean", "feature_std"))
    wanted = noise(2, 24) * std + mean
    adapted = adapt(single, small_images(), wanted, config=TTTConfig(steps=60, learning_rate=1e-2))
    assert (F.cosine_similarity((adapted.image_embeds - mean) / std, (wanted - mean) / std) > 0.95).all()


# --- distillation -------------------------------------------------------------------------------------------------


def cached(num_images, *, scale=1.0, shift=0.0):
    grid = noise(num_images, TEACHER_GRID, TEACHER_GRID, FEATURE_SIZE, seed=2)
    pixels = noise(num_images, 3, STUDENT_SIZE, STUDENT_SIZE, seed=3)
    return TargetCache(pixels, noise(num_images, FEATURE_SIZE, seed=4) * scale + shift, grid * scale + shift)


PROCESSOR = APMImageProcessorPil(size={"height": STUDENT_SIZE, "width": STUDENT_SIZE})


@pytest.mark.parametrize("kind", ["channel", "scalar"])
def test_training_with_statistics_is_training_on_standardised_targets(tmp_path, kind):
    channels = torch.linspace(50, 400, FEATURE_SIZE)
    data = cached(24, scale=channels, shift=-3 * channels)
    measured = data.features.flatten(0, 2).double().numpy()
    mean, std = measured.mean(axis=0), measured.std(axis=0)
    std = std if kind == "channel" else np.sqrt((std**2).mean())
    options = {"max_steps": 12, "seed": 3, "num_locations": 7}
    config = settings(tmp_path / "own", statistics_images=24, statistics=kind, **options)
    model = student()
    given = model.config
    result = distill(model, data, config=config, image_processor=PROCESSOR, validation_data=data)
    assert given.feature_std is None, "another student of the same configuration has other statistics"
    saved = APMConfig.from_pretrained(tmp_path / "own")
    np.testing.assert_allclose(saved.feature_mean, mean, rtol=2e-7)
    np.testing.assert_allclose(saved.feature_std, std, rtol=2e-7)

    forget_accelerate()
    standardised = TargetCache(
        data.pixel_values,
        *(((x - torch.tensor(mean)) / torch.tensor(std)).float() for x in (data.image_embeds, data.features)),
    )
    plain = distill(
        student(), standardised, config=settings(tmp_path / "plain", **options), image_processor=PROCESSOR,
        validation_data=standardised,
    )  # fmt: skip
    for name, weight in plain.student.state_dict().items():
        assert (result.student.state_dict()[name] - weight).abs().max() < 1e-4, name
    pixels = data.pixel_values[:2]
    expected = plain.student(pixels).last_hidden_state.double() * torch.tensor(std) + torch.tensor(mean)
    assert_close(result.student(pixels).last_hidden_state, expected, 1e-4)
    if kind == "scalar":  # an affine map with one factor leaves R² as it is
        assert result.metrics[-1]["feature_r2"] == pytest.approx(plain.metrics[-1]["feature_r2"], abs=1e-3)


def test_losses_are_mean_squared_errors_in_the_standardised_space():
    outputs = student()(noise(2, 3, STUDENT_SIZE, STUDENT_SIZE))
    mean, std = noise(FEATURE_SIZE, seed=1), 10 ** noise(FEATURE_SIZE)
    targets = DistillationTargets(noise(2, FEATURE_SIZE), noise(2, 9, FEATURE_SIZE), noise(2, 9, 3))
    losses = distillation_losses(outputs, targets, LossWeights(), feature_mean=mean, feature_std=std)
    error = (outputs.last_hidden_state - targets.features) / std
    torch.testing.assert_close(losses["loss_grid"], (error**2).mean())
    error = (outputs.pooler_output - targets.image_embeds) / std
    torch.testing.assert_close(losses["loss_cls"], (error**2).mean())
    torch.testing.assert_close(losses["loss_rgb"], F.mse_loss(outputs.rgb, targets.rgb))


def test_statistics_are_numpys_whatever_the_batches_the_processes_and_the_mean():
    rows = noise(1001, 6).double() * torch.logspace(-1, 1, 6) + 1e6
    parts = [RunningStatistics(6), RunningStatistics(6), RunningStatistics(6)]  # the last process has no image
    for index, batch in enumerate(rows.split([1, 300, 17, 683])):
        parts[index % 2].add(batch.view(len(batch), 1, 6))
    packed = []
    for part in parts:
        part.merged(lambda one: packed.append(one) or one)
    wholes = [part.merged(lambda _: torch.cat(packed)) for part in parts]
    for whole in wholes:
        mean, std = whole.result()
        np.testing.assert_allclose(mean, rows.numpy().mean(axis=0), rtol=1e-14)
        np.testing.assert_allclose(std, rows.numpy().std(axis=0), rtol=1e-6)
        assert torch.equal(torch.stack(whole.result()), torch.stack(wholes[0].result()))
        assert whole.result("scalar")[1] == pytest.approx(np.sqrt(rows.numpy().var(axis=0).mean()))
    rows[:, 0] = 5.0  # a channel that never varies
    dead = RunningStatistics(6)
    dead.add(rows)
    std = dead.result()[1]
    assert 0 < std[0] < 1e-3 * std.square().mean().sqrt() * 1.01
    empty, still = RunningStatistics(6), RunningStatistics(1)
    still.add(torch.ones(4, 1))
    with pytest.raises(ValueError, match="statistics: expected at least one image, got none"):
        empty.result()
    with pytest.raises(ValueError, match="statistics: expected features that vary"):
        still.result()


def test_statistics_that_are_known_are_not_measured_again():
    model, given = small_model(**statistics(16), teacher_heads=HEADS), statistics(16)
    rows = noise(50, 5)
    set_statistics(
        model, [{"": noise(50, 16), "plain-2": rows, "wide": noise(50, 24)}], kind="channel", gather=lambda one: one
    )
    assert model.config.feature_std == given["feature_std"]
    assert model.config.teacher_head("wide")["feature_std"] == HEADS["wide"]["feature_std"]
    assert model.config.teacher_head("plain-2")["feature_mean"] == pytest.approx(rows.mean(0).tolist(), abs=1e-6)


def test_a_resumed_run_goes_on_with_the_statistics_that_it_began_with(tmp_path):
    data, options = cached(16, scale=40.0), {"max_steps": 6, "checkpoint_steps": 3, "statistics_images": 9}
    result = distill(student(), data, config=settings(tmp_path, **options), image_processor=PROCESSOR)
    whole = copy.deepcopy(result.student)
    forget_accelerate()
    config = settings(tmp_path, **options, resume=True)
    other = cached(16, scale=7.0)  # would be measured otherwise
    other.features, other.image_embeds = data.features, data.image_embeds
    other.features = data.features.clone()
    resumed = distill(student(seed=1), other, config=config, image_processor=PROCESSOR).student
    assert resumed.config.feature_std == whole.config.feature_std
    assert_same(resumed(data.pixel_values), whole(data.pixel_values))


class Prepared(torch.utils.data.Dataset):
    """Rows that are ready, so that only the loop is timed."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["pixel_values"])

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.batch.items()}


class Loud:
    """Another teacher: 12 wide, a 2 x 2 grid, features a hundred times as large, about a mean that is larger yet."""

    name, patch_size, image_size, feature_size = "someone/loud", 16, 32, 12
    model = SimpleNamespace(config=SimpleNamespace(_commit_hash="abc"))

    def __init__(self, teacher):
        self.teacher, self.mix = teacher, 100 * noise(16, 12, seed=7) / 4
        self.image_processor = teacher.image_processor

    def encode_images(self, *, pixel_values, layers=None):
        answer = self.teacher.encode_images(pixel_values=pixel_values)
        pooled = F.avg_pool2d(answer.features.movedim(-1, 1), 2).movedim(1, -1)  # (B, 2, 2, 16)
        return SimpleNamespace(
            image_embeds=answer.image_embeds @ self.mix + 300, features=pooled @ self.mix + 300, levels=None
        )


def test_two_teachers_of_different_widths_grids_and_scales_are_both_learnt(tmp_path, clip, classifier):
    loud, processor = Loud(classifier), matching_image_processor(clip, STUDENT_SIZE)
    collate = ImageCollator(
        processor, teacher_image_processor=clip.image_processor,
        teacher_image_processors={"loud": same_view(classifier, clip)},
    )  # fmt: skip
    scenes = SceneDataset(24, image_size=40)
    rows = Prepared(collate([scenes[index] for index in range(24)]))
    assert rows.batch["teacher_pixel_values.loud"].shape == (24, 3, 32, 32)
    model = student(teacher_heads={"loud": {"feature_size": 12}}, pooling="attention", local_patch=True)
    config = settings(
        tmp_path, max_steps=80, batch_size=12, learning_rate=1e-2, statistics_images=24,
        num_locations=12, validation_steps=80,
    )  # fmt: skip
    result = distill(
        model, rows, config=config, image_processor=processor, teacher=clip, teachers={"loud": loud},
        validation_data=rows,
    )  # fmt: skip
    first, last = result.metrics[0], result.metrics[-1]
    for name in ("", "loud/"):  # at the start every answer is the mean, which alone is worth some cosine
        assert last[f"{name}feature_r2"] > 0.3 > 0 > first[f"{name}feature_r2"]
        assert 1 - last[f"{name}feature_cosine"] < 0.7 * (1 - first[f"{name}feature_cosine"])
        assert last[f"{name}embed_cosine"] > first[f"{name}embed_cosine"]
    saved = APMModel.from_pretrained(tmp_path)
    assert max(saved.config.teacher_head("loud")["feature_mean"]) > 50 > max(saved.config.feature_mean)
    assert [origin["name"] for origin in saved.config.distilled_from] == [Path(clip.name).name, "someone/loud"]
    assert saved.config.distilled_from[1]["revision"] == "abc"
    assert str(tmp_path.parent) not in (tmp_path / "config.json").read_text()


def test_an_additional_teacher_reads_the_moved_image_and_its_head_is_queried_where_its_patches_then_are(
    clip, classifier
):
    batch = {"pixel_values": noise(2, 3, 24, 24)}
    batch |= {name: noise(2, 3, 32, 32) for name in ("teacher_pixel_values", "teacher_pixel_values.loud")}
    loud = Loud(classifier)
    questions = TargetMaker(clip, PROCESSOR, teachers={"loud": loud}).additional(batch, shift=(0.25, -0.5))
    targets = questions["loud"]
    coordinates, grid = targets.coordinates, targets.grid
    seen = moved(batch["teacher_pixel_values.loud"], 0.25 * 16, -0.5 * 16)
    assert torch.equal(targets.features, loud.encode_images(pixel_values=seen).features.flatten(1, 2))
    assert grid == (2, 2) and targets.rgb is targets.levels is None
    torch.testing.assert_close(coordinates, grid_coordinates(2, 2) + torch.tensor([0.25, -0.5]))


@pytest.mark.parametrize("grids", [((4, 4), (2, 2), (4, 4)), ((4, 4), (4, 4), (4, 4))])
def test_every_head_is_asked_where_its_own_teachers_patches_are(grids):
    model, pixels = small_model(teacher_heads=HEADS), small_images()
    sizes = (16, 24, 5)
    main, wide, plain = (
        DistillationTargets(
            noise(2, size), noise(2, grid[0] * grid[1], size), noise(2, grid[0] * grid[1], 3), grid=grid
        )
        for size, grid in zip(sizes, grids, strict=True)
    )
    locations = {(4, 4): torch.tensor([3, 9, 1])}
    outputs, others = query_heads(model, pixels, main, {"wide": wide, "plain-2": plain}, locations)
    where = {(4, 4): grid_coordinates(4, 4)[[3, 9, 1]], (2, 2): grid_coordinates(2, 2)}
    assert_close(outputs.last_hidden_state, model(pixels, where[4, 4]).last_hidden_state)
    assert_close(outputs.rgb, model(pixels, where[4, 4]).rgb)
    for name, question in (("wide", wide), ("plain-2", plain)):
        expected = model(pixels, where[question.grid]).teacher_features[name]
        assert_close(others[name].last_hidden_state, expected)
    places = torch.cat([where[grid] for grid in dict.fromkeys(grids)])
    assert_close(others["wide"].pooler_output, model(pixels, places).teacher_embeds["wide"])


def test_heads_and_their_teachers_must_be_as_wide_and_have_the_same_names(tmp_path, clip):
    wanted = {"loud": {"feature_size": 12}}
    for heads, message in (
        (wanted, "teacher_heads: expected 'loud' to be 16 wide, got 12"),
        ({"other": {"feature_size": 16}}, r"head: expected one of \['other'\], got 'loud'"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(
                student(teacher_heads=heads), cached(4), config=settings(tmp_path), image_processor=PROCESSOR,
                teachers={"loud": clip},
            )  # fmt: skip
    targets = cached(4)
    batch = {name: torch.stack([targets[i][name] for i in range(4)]) for name in targets[0]}
    batch |= {"image_embeds.loud": noise(4, 9), "features.loud": noise(4, 2, 2, 9)}
    with pytest.raises(ValueError, match="feature_size of head 'loud': expected the targets' 9, got 12"):
        distill(student(teacher_heads=wanted), Prepared(batch), config=settings(tmp_path), image_processor=PROCESSOR)


def test_teachers_that_crop_differently_are_shown_the_same_part(clip, classifier):
    picture = photo(3, size=(60, 40))
    centre = picture.crop((14, 4, 46, 36))  # what the first teacher sees of it: the middle 32 of 40 pixels
    theirs = classifier.image_processor(centre, return_tensors="pt")["pixel_values"]
    shown = same_view(classifier, clip)(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(shown, theirs)
    squeezed = same_view(clip, classifier)(picture, return_tensors="pt")["pixel_values"]
    whole = clip.image_processor(
        picture.resize((32, 32), Image.Resampling.BICUBIC),
        return_tensors="pt",
        do_resize=False,
        do_center_crop=False,
    )
    slack = resampling_slack(clip.image_processor)
    torch.testing.assert_close(squeezed, whole["pixel_values"], rtol=0, atol=slack)
    assert (squeezed - shown).abs().max() > 3 * slack


# --- what a student inherits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: cc-by-nc-4.0\n---\n# A teacher", "cc-by-nc-4.0"),
        ("---\nlicense: other\nlicense_name: dinov3-license\n---\n", "dinov3-license"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\ntags: [a]\n---\nlicense: mit, says the prose", None),
        ("no front matter: license: mit", None),
        ("---\nlicense: [mit\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_the_teachers_cards_or_unknown(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    teacher = SimpleNamespace(name=str(tmp_path), model=None)
    assert teacher_license(teacher) == expected
    config = small_config(distilled_from=[{"name": "someone/first", "license": "mit"}])
    inherit(config, [teacher, teacher], dataset="detection-datasets/coco:full")
    assert config.distilled_from[1:] == [
        {"name": tmp_path.name, "license": expected, "revision": None, "dataset": "detection-datasets/coco:full"}
    ]


def test_a_card_in_the_hubs_cache_is_read_and_nothing_is_fetched(tmp_path, monkeypatch):
    revision = "0" * 40
    folder = tmp_path / "models--someone--clip"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "snapshots" / revision / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = SimpleNamespace(config=SimpleNamespace(_commit_hash=revision))
    assert teacher_license(SimpleNamespace(name="someone/clip", model=model)) == "mit"
    assert teacher_license(SimpleNamespace(name="someone/else", model=model)) is None
    assert teacher_license(SimpleNamespace(name="my own network", model=None)) is None


def test_names_say_nothing_of_the_computer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    assert public_name("openai/clip-vit-base-patch16") == "openai/clip-vit-base-patch16"
    names = (str(tmp_path / "runs" / "teacher"), "runs/teacher", "./runs/teacher/", "/not/there/teacher")
    assert {public_name(name) for name in names} == {"teacher"}
    assert public_name(".") == tmp_path.name


def test_additional_teachers_are_named_with_their_heads(tmp_path, clip, classifier, monkeypatch):
    rows = [{"image": photo(seed)} for seed in range(8)]
    data = [SimpleNamespace(dataset=part, image_column="image") for part in (rows[:6], rows[6:])]
    monkeypatch.setattr(training, "train_and_validation", lambda *_, **options: data)
    sizes = {"image_size": 24, "patch_size": 8, "position_size": 16, "hidden_sizes": [32], "rgb_hidden_sizes": [8]}
    wishes = {
        "teacher": clip.name,
        "preset": "tiny",
        "dataset": str(tmp_path / "photos"),
        "config_overrides": json.dumps(sizes),
    }
    result = training.train(
        training.TrainingConfig(extra_teachers=[f"vit={classifier.name}"], **wishes),
        settings(tmp_path / "out", max_steps=2, batch_size=4, statistics_images=5),
        command="",
    ).distillation
    assert "vit/feature_cosine" in result.metrics[-1]
    config = APMConfig.from_pretrained(tmp_path / "out")
    assert len(config.teacher_head("vit")["feature_std"]) == len(config.feature_std) == FEATURE_SIZE
    assert {origin["dataset"] for origin in config.distilled_from} == {"photos"}
    assert len(config.distilled_from) == 2
    with pytest.raises(ValueError, match="--extra_teachers: expected NAME=TEACHER, got"):
        training.train(
            training.TrainingConfig(extra_teachers=["vit"], **wishes), settings(tmp_path / "no"), command=""
        )
