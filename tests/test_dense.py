"""The dense student: a decoder of a frozen teacher's tokens, at any coordinate, for images of any size."""

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    ViTConfig,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from apm_hf import APM, APMConfig, APMImageProcessorPil, APMModel, load_teacher
from apm_hf.assets import DENSE_MODEL, EFFICIENTNET_MODEL, PHOTO_MODEL, PHOTO_TEACHER
from apm_hf.commands.main import main
from apm_hf.data.images import decode_image, eight_bit_rgb
from apm_hf.data.loading import load_images
from apm_hf.distillation import DenseConfig, DensePairs, distill_dense
from apm_hf.distillation.dense import evaluate_dense, fit_attention, keep_teacher
from apm_hf.distillation.rivals import AttentionUpsampler, Bilateral, Ridge, averages, bicubic, bilinear, fitted_rivals
from apm_hf.evaluation.masks import evaluate_islands
from apm_hf.pair.upsampling import dense_rows, write_dense
from apm_hf.position_encoding import grid_coordinates, sample_grid
from apm_hf.publishing.export import export_model, read_description
from apm_hf.teachers.dense_grids import tokens_at_half
from fixtures_runs import forget_accelerate
from fixtures_tiny import FEATURE_SIZE, TEACHER_SIZE, VISION, dense_student, photo, randomise, save_clip

F, SIDE = 12, 64
SMALL = {"hidden_sizes": [32], "position_size": 16}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


def dense(seed=0, **fields):
    """A dense student whose weights are all drawn, the last layer's too."""
    torch.manual_seed(seed)
    model = APMModel(APMConfig.preset("dense", image_size=SIDE, feature_size=F, **{**SMALL, **fields})).eval()
    torch.nn.init.normal_(model.decoder.feature_head.weight, std=0.3)
    return model


def inputs(batch_size=2, height=SIDE, width=SIDE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch_size, 4, 5, F, generator=generator)
    return torch.rand(batch_size, 3, height, width, generator=generator), tokens


def outputs(model, pixel_values, tokens, coordinates=None, **options):
    with torch.no_grad():
        return model(pixel_values, coordinates, trigger_column=tokens, **options).last_hidden_state


# --- the model ----------------------------------------------------------------------------------------------------


def test_a_new_student_gives_what_is_interpolated():
    model = APMModel(APMConfig.preset("dense", image_size=SIDE, feature_size=F, **SMALL)).eval()
    model.set_feature_statistics(torch.randn(F), torch.rand(F) + 0.5)
    pixel_values, tokens = inputs()
    found = outputs(model, pixel_values, tokens)
    side = SIDE // model.config.patch_size
    expected = torch.nn.functional.interpolate(tokens.movedim(-1, 1), (side, side), mode="bilinear")
    torch.testing.assert_close(found, expected.flatten(2).mT, rtol=1e-4, atol=1e-5)


def test_locations_are_independent_in_any_order_and_chunk():
    model, (pixel_values, tokens) = dense(), inputs()
    places = 2 * torch.rand(23, 2, generator=torch.Generator().manual_seed(1)) - 1
    together = outputs(model, pixel_values, tokens, places)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(outputs(model, pixel_values, tokens, places[order]), together[:, order])
    torch.testing.assert_close(outputs(model, pixel_values, tokens, places, chunk_size=5), together)
    torch.testing.assert_close(outputs(model, pixel_values, tokens, places[7:8]), together[:, 7:8])
    torch.testing.assert_close(outputs(model, pixel_values[1:], tokens[1:], places), together[1:])
    assert together.std(dim=1).min() > 1e-2


def test_what_a_location_gives_depends_on_token_mean_window_and_place():
    model, (pixel_values, tokens) = dense(), inputs(1)
    place = torch.zeros(1, 2)
    before = outputs(model, pixel_values, tokens, place)

    def change(name):
        pixels, grid, where = pixel_values.clone(), tokens.clone(), place
        if name == "far token":  # changes the mean alone
            grid[:, 0, 0] += 5
        elif name == "window":
            pixels[..., SIDE // 2 - 3 : SIDE // 2 + 3, SIDE // 2 - 3 : SIDE // 2 + 3] += 1
        elif name == "far pixels":
            pixels[..., :4, :4] += 1
        else:
            where = place + 0.01
        return float((outputs(model, pixels, grid, where) - before).abs().max())

    assert min(change("far token"), change("window"), change("place")) > 1e-4
    assert change("far pixels") == 0


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 96), (8, 8)])
def test_images_may_have_any_size_of_whole_cells(height, width):
    pixel_values, tokens = inputs(height=height, width=width)
    assert outputs(dense(), pixel_values, tokens).shape == (2, height // 8 * (width // 8), F)


def test_it_saves_and_loads_and_trains_with_checkpointing(tmp_path):
    model, (pixel_values, tokens) = dense(), inputs()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(again, pixel_values, tokens), outputs(model, pixel_values, tokens))
    gradients = []
    for checkpointed in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointed:
            trained.gradient_checkpointing_enable()
        trained(pixel_values, trigger_column=tokens, chunk_size=20).last_hidden_state.square().mean().backward()
        gradients.append([p.grad for p in trained.parameters()])
    assert all(grad is not None for grad in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p, t: m(p, trigger_column=t.flatten(1, 2)), r"expected shape \(B, rows, cols, 12\)"),
        (lambda m, p, t: m(p), "expected trigger_column, got none"),
        (lambda m, p, t: m(trigger_column=t), "pixel_values: expected the images"),
        (lambda m, p, t: m(p[..., :60], trigger_column=t), "a multiple of 8"),
        (lambda m, p, t: m.fold(p), "trigger_source='tokens' has nothing to fold"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(dense(), *inputs())


@pytest.mark.parametrize(
    "fields", [{"num_residual_blocks": -1}, {"hidden_sizes": [32, 32]}, {"trigger_size": F + 1}], ids=str
)
def test_architectures_that_do_not_fit_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields)).replace("hidden_sizes", "num_residual_blocks")):
        APMConfig.preset("dense", feature_size=F, **fields)


# --- with its teacher inside ---------------------------------------------------------------------------------------


TOWERS = {
    "vit": ViTConfig(**VISION), "deit": DeiTConfig(**VISION), "dinov2": Dinov2Config(**VISION),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**VISION), "dinov3": DINOv3ViTConfig(**VISION),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOWERS)
def test_the_teacher_inside_outputs_what_it_does_as_a_teacher(kind, tmp_path):
    tower = randomise(AutoModel.from_config(TOWERS[kind]))
    tower.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": TEACHER_SIZE, "width": TEACHER_SIZE}).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, device="cpu")
    model = APMModel(APMConfig.preset("dense", image_size=2 * TEACHER_SIZE, feature_size=FEATURE_SIZE, **SMALL))
    keep_teacher(model, teacher)
    assert model.folds and model.config.teacher_source is None and str(tmp_path) not in str(model.config)
    pixel_values = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    tokens = model.fold(pixel_values)
    assert tokens.shape == (2, 4, 6, FEATURE_SIZE) and tokens.std(dim=(1, 2)).min() > 1e-2
    torch.testing.assert_close(tokens, tokens_at_half(teacher, pixel_values), rtol=1e-4, atol=1e-4)


def test_with_its_teacher_inside_it_answers_from_pixels_alone_saved_with_its_weights(tmp_path):
    model, (pixel_values, _) = dense_student(), inputs(height=64, width=96)
    found = outputs(model, pixel_values, None)
    assert torch.equal(outputs(model, pixel_values, model.fold(pixel_values)), found)
    model.save_pretrained(tmp_path)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()
    again = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(again, pixel_values, None), found)
    assert not any(weight.requires_grad for weight in again.trigger.parameters())
    assert not again.train().trigger.tower.training and again.decoder.training
    with pytest.raises(ValueError, match="multiples of 16, got 64 x 72"):
        model(pixel_values[..., :72])


def test_the_control_of_a_dense_student_has_its_teacher_and_adds_nothing_to_its_tokens():
    model, picture = dense_student(), photo(0)
    pair = APM(model, APMImageProcessorPil(size={"height": 64, "width": 64}), None)
    control = pair.control()
    tokens = pair.trigger_column(picture)
    assert torch.equal(control.trigger_column(picture), tokens)
    found = control.encode_dense(picture, size=(6, 5))[0].flatten(0, 1)
    torch.testing.assert_close(found, bilinear(tokens, grid_coordinates(6, 5)[None], tokens)[0], rtol=1e-4, atol=1e-5)
    assert (pair.encode_dense(picture, size=(6, 5))[0].flatten(0, 1) - found).abs().max() > 0.01


def test_its_size_of_maps_can_be_set(tmp_path):
    dense_student().save_pretrained(tmp_path)
    model, pixel_values = AutoModel.from_pretrained(tmp_path, output_size=(3, 5)), inputs()[0]
    expected = outputs(model, pixel_values, None, grid_coordinates(3, 5))
    assert torch.equal(outputs(model, pixel_values, None), expected) and expected.shape[1] == 15


def test_a_named_teacher_is_loaded_from_there_and_no_other_one(tmp_path, monkeypatch):
    tower = dense_student().trigger.tower
    tower.save_pretrained(tmp_path / "teacher")
    randomise(copy.deepcopy(tower), seed=1).save_pretrained(tmp_path / "another")
    model = dense_student(teacher_name="teacher")
    model.save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)  # where a folder has the name that would be the Hub's
    assert not any("tower" in key for key in load_file("dense/model.safetensors"))
    pixel_values, _ = inputs()
    expected = outputs(model, pixel_values, None)
    assert torch.equal(outputs(AutoModel.from_pretrained("dense"), pixel_values, None), expected)
    given = AutoModel.from_pretrained("dense", teacher=copy.deepcopy(tower))
    assert torch.equal(outputs(given, pixel_values, None), expected)
    Path("teacher").rename("moved")
    Path("another").rename("teacher")
    with pytest.raises(ValueError, match="features would be another teacher's"):
        AutoModel.from_pretrained("dense")


def test_with_its_teacher_inside_it_is_exported(tmp_path):
    model, pixel_values = dense_student(), inputs(3)[0]
    folder = export_model(model, tmp_path / "graphs", format="torch", graphs=["fold", "query"])
    outputs_of_fold = read_description(folder)["graphs"]["fold"]["outputs"]
    assert outputs_of_fold == {"trigger_column": ["batch", 4, 4, FEATURE_SIZE]}
    fold, query = (torch.export.load(folder / f"{name}.pt2") for name in ("fold", "query"))
    assert not any("tower" in name for name in query.state_dict) and any("tower" in name for name in fold.state_dict)
    places = torch.rand(7, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    given = fold.module()(pixel_values=pixel_values)
    found = query.module()(**given, pixel_values=pixel_values, coordinates=places)["features"]
    torch.testing.assert_close(found, outputs(model, pixel_values, None, places), rtol=1e-4, atol=1e-4)
    alone = export_model(dense(), tmp_path / "other", format="torch")
    (graph,) = read_description(alone)["graphs"].values()
    assert graph["inputs"]["trigger_column"] == ["batch", "rows", "cols", F]


def test_with_its_teacher_inside_it_is_one_onnx_graph(tmp_path):
    """The exporter compares it with the model."""
    export_model(dense_student(), tmp_path / "graphs", graphs=["model"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trigger_source": "conv", "teacher_config": {"model_type": "vit"}}, "teacher_config: expected None with"),
        ({"teacher_source": {"name": "a/b", "revision": None, "sha256": "0"}}, "None without teacher_config"),
        ({"teacher_config": {"model_type": "vit"}, "teacher_source": {"name": "a/b"}}, "teacher_source: expected"),
        ({"teacher_config": {}}, "teacher_config: expected a key 'model_type'"),
    ],
)
def test_configurations_of_teachers_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        APMConfig.preset("dense", **fields)


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


@pytest.fixture(scope="module")
def pairs(teacher):
    photos = [photo(seed) for seed in range(24)]
    return (
        DensePairs.build(photos[:20], teacher, num_windows=2, seed=1),
        DensePairs.build(photos[20:], teacher, shifted=False),
    )


def test_targets_are_the_teacher_s_features_of_moved_windows_at_twice_the_side(teacher, pairs):
    train, held_out = pairs
    side = teacher.image_size // teacher.patch_size
    assert train.tokens.shape[1:3] == (side, side) and train.targets.shape[1:4] == (2, 2 * side, 2 * side)
    assert held_out.targets.shape[1] == 1 and held_out.shifts.abs().max() == 0
    assert 0 < train.shifts.abs().max() <= 16 * 2 / (2 * teacher.image_size)
    assert train.pixels.dtype == torch.uint8 and train.pixels.shape[-1] == 2 * teacher.image_size


def test_ridge_solves_what_is_linear_and_says_what_it_explains(teacher, pairs):
    train, _ = pairs
    generator = torch.Generator().manual_seed(0)
    width = train.tokens.shape[-1]
    mean, std = train.statistics()
    mix = torch.randn(width, width, generator=generator) / width**0.5
    rows, cols = train.targets.shape[2:4]

    def linear(pairs):
        targets = torch.empty_like(pairs.targets)
        for window in range(pairs.targets.shape[1]):
            places = grid_coordinates(rows, cols)[None] + pairs.shifts[:, window][:, None]
            values = sample_grid(pairs.tokens.float(), places) @ mix
            targets[:, window] = values.unflatten(1, (rows, cols)).half()
        return replace(pairs, targets=targets)

    fitted, student = linear(train), APMModel(APMConfig.preset("dense", image_size=SIDE, feature_size=width, **SMALL))
    ridge = Ridge.fit(fitted, mean, std)
    found = ridge(train.tokens.float(), grid_coordinates(rows, cols)[None])
    expected = sample_grid(train.tokens.float(), grid_coordinates(rows, cols)[None]) @ mix
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    metrics = evaluate_dense(student.eval(), ridge, linear(pairs[1]))
    assert metrics["ridge_r2"] > 0.95 > metrics["bilinear_r2"] == pytest.approx(metrics["feature_r2"], abs=1e-3)


@pytest.mark.parametrize("seed", [0])
def test_a_student_learns_what_no_linear_map_can(teacher, pairs, tmp_path, seed):
    """Targets that depend on the photo's colours at the place: interpolation and ridge cannot know them."""
    train, held_out = pairs
    width = train.tokens.shape[-1]
    rows, cols = train.targets.shape[2:4]

    def coloured(pairs):
        targets = pairs.targets.clone().float()
        for window in range(targets.shape[1]):
            places = grid_coordinates(rows, cols)[None] + pairs.shifts[:, window][:, None]
            brightness = sample_grid(pairs.pixels.float().mean(dim=1)[..., None] / 64 - 2, places)
            targets[:, window] = brightness.unflatten(1, (rows, cols)).expand(-1, -1, -1, width)
        return replace(pairs, targets=targets.half())

    config = DenseConfig(output_dir=str(tmp_path / "dense"), max_steps=150, batch_size=8, num_locations=32, seed=seed)
    result = distill_dense(teacher, coloured(train), coloured(held_out), config, **SMALL)
    assert result.metrics["feature_r2"] > result.metrics["ridge_r2"] + 0.2
    told = json.loads((tmp_path / "dense/metrics.json").read_text())
    assert told == [{"step": 150, **result.metrics}]
    assert max(result.metrics[name] for name in ("mean_r2", "position_r2")) < 0
    again = AutoModel.from_pretrained(tmp_path / "dense")
    assert torch.equal(again.decoder.feature_head.weight, result.student.decoder.feature_head.weight)
    ridge = Ridge.load(tmp_path / "dense")
    assert ridge is not None and Ridge.load(tmp_path) is None
    expected = evaluate_dense(again.eval(), ridge, coloured(held_out), averages(coloured(train)))
    assert expected == pytest.approx(result.metrics, abs=1e-3)
    with pytest.raises(ValueError, match="which holds config.json.*--overwrite replaces it"):
        distill_dense(teacher, train, held_out, config, **SMALL)


# --- its rivals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_interpolation_at_places_is_that_of_whole_maps(mode):
    tokens = torch.randn(2, 5, 6, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(tokens.movedim(-1, 1), (15, 12), mode=mode).flatten(2).mT
    found = {"bilinear": bilinear, "bicubic": bicubic}[mode](tokens, grid_coordinates(15, 12)[None], tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bilateral_upsampling_keeps_to_the_side_of_an_edge_in_the_picture():
    """Tokens 0 on the left, 1 on the right; the picture's edge lies beyond the border between them."""
    tokens = torch.zeros(1, 4, 4, 1)
    tokens[:, :, 2:] = 1
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[..., 13:] = 4.0  # three pixels left of the middle
    place = torch.tensor([[[0.0, -0.1]]])  # bright, though left of the middle
    follows, ignores = (Bilateral(0.7, colour)(tokens, place, pixels) for colour in (0.5, 1e3))
    assert bilinear(tokens, place, pixels) < 0.5 > ignores and follows > 0.9


def test_fitted_rivals_are_measured_saved_and_found_beside_a_student(teacher, pairs, tmp_path):
    train, held_out = pairs
    config = DenseConfig(output_dir=str(tmp_path), max_steps=3, batch_size=2, num_locations=8)
    mean, std = train.statistics()
    ridge = Ridge.fit(train, mean, std)
    rivals = {"ridge": ridge, "bilateral": Bilateral.fit(train), "attention": fit_attention(train, config)}
    student = APMModel(APMConfig.preset("dense", image_size=64, feature_size=len(mean), **SMALL)).eval()
    metrics = evaluate_dense(student, ridge, held_out, rivals)
    assert fitted_rivals(tmp_path) == {}
    for rival in rivals.values():
        rival.save(tmp_path)
    again = fitted_rivals(tmp_path)
    assert evaluate_dense(student, ridge, held_out, again) == pytest.approx(metrics, abs=1e-6)
    assert isinstance(again["attention"], AttentionUpsampler) and len({*metrics.values()}) >= 4


def test_an_attention_upsampler_learns_to_follow_the_pixels():
    """Features that are the picture's brightness: attention to tokens of that brightness explains them."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(64, 1, 8, 8, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    tokens = torch.nn.functional.avg_pool2d(pixels, 16).movedim(1, -1).expand(-1, -1, -1, 4)
    pixels, places = pixels.expand(-1, 3, -1, -1), grid_coordinates(8, 8)[None]
    wanted = sample_grid(pixels[:, :1].movedim(1, -1), places)
    torch.manual_seed(0)
    model = AttentionUpsampler(4, width=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def error():
        return (model(tokens, places, pixels)[..., :1] - wanted).square().mean()

    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error() < 0.8 * (bilinear(tokens, places, pixels)[..., :1] - wanted).square().mean()


# --- from the command line to a file ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("place")
    (folder / "photos").mkdir()
    for seed in range(20):
        photo(seed, size=(48, 40)).save(folder / "photos" / f"{seed}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        forget_accelerate()
        words = ["distill", "--preset", "dense", "--teacher", teacher.name, "--dataset", str(folder / "photos")]
        words += ["--output_dir", str(folder / "dense"), "--max_steps", "5", "--batch_size", "4"]
        assert main([*words, "--config_overrides", json.dumps(SMALL)]) == 0
    return folder


def test_the_command_makes_a_student_that_the_pair_queries(place, teacher):
    assert (place / "dense/README.md").exists() and "ridge" in (place / "dense/README.md").read_text()
    apm = APM.load(place / "dense", teacher=teacher)
    maps = apm.encode_dense(place / "photos/0.png", size=32)
    assert maps.shape == (1, 27, 32, teacher.feature_size)
    assert apm.encode(place / "photos/0.png").shape == (1, teacher.feature_size)
    other = APM.load(teacher=teacher.name).teacher
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    with pytest.raises(ValueError, match="expected the one that this dense student was made for, .* got "):
        APM.load(place / "dense", teacher=other)
    assert apm.islands(place / "photos/0.png", heights=(2, 4), size=16).regions.shape == (2, 13, 16)
    with pytest.raises(ValueError, match="expected one that can be fitted, got a dense one"):
        apm.fit(place / "photos/0.png")


def test_options_of_other_presets_are_refused(place, teacher, caplog):
    words = ["distill", "--preset", "dense", "--teacher", teacher.name, "--dataset", str(place / "photos")]
    words += ["--output_dir", str(place / "other")]
    for option in ("--jitter", "--warmup_steps=0", "--streaming", '--image_processor={"do_min_max": true}'):
        assert main([*words, option]) == 1
        assert f"{option.partition('=')[0]}: expected none with --preset dense" in caplog.text


def test_options_that_are_given_count_though_they_equal_the_defaults_of_other_presets(place, teacher, monkeypatch):
    taken = []

    def stop(teacher, pairs, held_out, settings, **options):
        taken.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr("apm_hf.distillation.recipe.distill_dense", stop)
    words = ["distill", "--preset", "dense", "--teacher", teacher.name, "--dataset", str(place / "photos")]
    main([*words, "--output_dir", str(place / "other"), "--max_steps", "1000", "--learning_rate", "1e-4"])
    main([*words, "--output_dir", str(place / "other")])
    assert [(one.max_steps, one.learning_rate) for one in taken] == [(1000, 1e-4), (1500, 2e-3)]


def test_a_student_of_local_columns_is_made_queried_and_adapted(place, teacher, monkeypatch):
    small = {"image_size": 32, "patch_size": 8, "trigger_channels": 16, "num_column_blocks": 1, "pooling": "mean"}
    words = ["distill", "--preset", "student", "--teacher", teacher.name, "--dataset", str(place / "photos")]
    words += ["--config_overrides", json.dumps({**SMALL, **small}), "--max_steps", "3", "--batch_size", "4"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    assert main([*words, "--output_dir", str(place / "student")]) == 0
    apm = APM.load(place / "student", teacher=teacher)
    assert apm.model.config.feature_std is not None  # measured, as this preset does
    assert apm.encode(place / "photos/0.png").shape == (1, teacher.feature_size)
    assert apm.encode_dense(place / "photos/0.png", size=16).shape == (1, 13, 16, teacher.feature_size)
    adapted = apm.fit(place / "photos/0.png")
    assert adapted is not None


def test_settings_of_a_preset_yield_to_those_that_are_given(place, teacher, monkeypatch):
    taken = []

    def stop(student, rows, *, config, **options):
        taken.append((config.learning_rate, config.rgb_weight, config.batch_size))
        raise ValueError("enough")

    monkeypatch.setattr("apm_hf.distillation.recipe.distill", stop)
    words = ["distill", "--preset", "student", "--teacher", teacher.name, "--dataset", str(place / "photos")]
    main([*words, "--output_dir", str(place / "third")])
    main([*words, "--output_dir", str(place / "third"), "--learning_rate", "1e-4", "--batch_size=8"])
    assert taken == [(2e-3, 0.0, 32), (1e-4, 0.0, 8)]


def test_a_map_is_written_row_by_row_as_it_is_queried(place, teacher, monkeypatch, capsys):
    monkeypatch.setattr("apm_hf.pair.upsampling.BAND_LOCATIONS", 100)
    path, output = str(place / "photos/1.png"), place / "map.safetensors"
    words = ["upsample", path, "--model", str(place / "dense"), "--teacher", teacher.name, "--size", "40"]
    words += ["--json", "--dtype", "float32", "--output", str(output), "--picture", str(place / "map.png")]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["cols"], told["feature_size"]) == (33, 40, teacher.feature_size)
    with safe_open(output, framework="pt") as file:
        found = file.get_tensor("features")
    expected = APM.load(place / "dense", teacher=teacher).encode_dense(path, size=40)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with Image.open(place / "map.png") as picture:
        assert picture.size == (40, 33)
    assert not [one for one in place.iterdir() if one.name.startswith(".map")]


def test_a_teacher_alone_is_interpolated_in_bands(place, teacher, monkeypatch):
    monkeypatch.setattr("apm_hf.pair.upsampling.BAND_LOCATIONS", 30)
    apm, image = APM.load(teacher=teacher), photo(3, size=(20, 40))
    bands = torch.cat(list(dense_rows(apm, image, (12, 6))))
    torch.testing.assert_close(bands, apm.encode_dense(image, size=(12, 6))[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        write_dense(apm, image, 8, place / "x.safetensors", dtype=torch.float64)
    assert np.isfinite(bands.numpy()).all()


def test_an_evaluation_holds_it_against_interpolation_ridge_and_the_teacher_at_twice_the_side(
    few_pixels, place, teacher, tmp_path
):
    folder = evaluate_islands(
        output_dir=tmp_path, teacher=teacher.name, model=str(place / "dense"), data="scenes", max_images=4, map_size=12
    )
    rows = json.loads((folder / "results.json").read_text())["data"]["scenes"]["rows"]
    assert {"teacher", "teacher_moved", "teacher_twice", "apm", "apm_random", "position_only"} <= set(rows)
    assert {"bicubic", "ridge"} <= set(rows) and not {"bilateral", "attention"} & set(rows)
    assert "The APM above the ridge regression" in (folder / "report.md").read_text()
    assert not {"apm_ttt", "apm_ttt_alone"} & set(rows)


def test_features_between_tokens_are_compared_with_the_teacher_at_twice_the_side(place, teacher, tmp_path, capsys):
    words = ["evaluate", "--task", "dense", "--data", str(place / "photos"), "--teacher", teacher.name, "--json"]
    words += ["--model", str(place / "dense"), "--max_images", "6", "--output_dir", str(tmp_path / "compared")]
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)["scores"]
    assert list(rows) == ["mean", "position_only", "bilinear", "bicubic", "moved", "ridge", "apm"]
    assert rows["mean"]["r2"]["mean"] == 0
    data = load_images(place / "photos", max_images=6, seed=0)
    pictures = [eight_bit_rgb(decode_image(row["image"])) for row in data.dataset]
    pairs = DensePairs.build(pictures, teacher, shifted=False)
    ridge = Ridge.load(place / "dense")
    expected = evaluate_dense(AutoModel.from_pretrained(place / "dense"), ridge, pairs)
    for name, other in (("apm", "feature"), ("bilinear", "bilinear"), ("ridge", "ridge")):
        assert rows[name]["r2"]["mean"] == pytest.approx(expected[f"{other}_r2"], abs=0.05)  # other photos' deviations
    for row in ("ridge", "apm"):
        above = rows[row]["above"]["bilinear"]
        assert above["mean"] == pytest.approx(rows[row]["r2"]["mean"] - rows["bilinear"]["r2"]["mean"])
        assert above["low"] <= above["mean"] <= above["high"] and rows[row]["seconds"] > 0
    assert "| dense student |" in (tmp_path / "compared/report.md").read_text()


# --- those that travel with the package ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "teacher", "width"),
    [
        (DENSE_MODEL, "facebook/deit-tiny-patch16-224", 192),
        (PHOTO_MODEL, "apm_hf's photo teacher", 192),
        (EFFICIENTNET_MODEL, "efficientnet-lite0", 112),
    ],
)
def test_the_shipped_students_are_small_and_say_where_they_come_from(folder, teacher, width):
    config = APMConfig.from_pretrained(folder)
    assert config.trigger_source == "tokens" and config.feature_size == width
    (origin,) = config.distilled_from
    assert (origin["name"], origin["license"], origin["dataset"]) == (teacher, "apache-2.0", "caltech101")
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) < 4e6
    card = (Path(folder) / "README.md").read_text()
    assert "ridge" in card and "APM.load(" in card and "scripts/make_dense.py" in card
    metrics = json.loads((Path(folder) / "metrics.json").read_text())[-1]
    assert metrics["feature_r2"] > metrics["ridge_r2"] > metrics["bilinear_r2"]


def test_a_teacher_alone_gets_the_shipped_student_that_was_made_for_it(teacher):
    assert APM.load(teacher=teacher).with_dense_student() is None  # of another width
    apm = APM.load(teacher=PHOTO_TEACHER)
    embeds = apm.encode(photo(0))
    pair = apm.with_dense_student()
    assert pair.model.name_or_path == PHOTO_MODEL and pair.teacher is apm.teacher
    torch.testing.assert_close(apm.encode(photo(0)), embeds, rtol=0, atol=0)  # the teacher is as it was
    with torch.no_grad():  # another one of its kind
        apm.teacher.model.visual_projection.weight.mul_(1.1)
    assert apm.with_dense_student() is None
    with pytest.raises(ValueError, match="expected the one that this dense student was made for"):
        APM.load(PHOTO_MODEL, teacher=apm.teacher)


def test_the_student_of_a_tower_is_not_given_to_a_dual_encoder_with_this_tower(shared_dir):
    deit, reads = (APM.load(teacher=shared_dir / f"teachers/{name}") for name in ("deit-tiny", "deit-tiny-lit"))
    assert deit.with_dense_student().model.name_or_path == DENSE_MODEL
    assert reads.with_dense_student() is None  # a projection lies behind it


def test_commands_that_are_given_a_teacher_alone_take_the_shipped_student(tmp_path, caplog):
    path, output = str(tmp_path / "photo.png"), tmp_path / "f.safetensors"
    photo(0).save(path)
    pair = APM.load(PHOTO_MODEL, teacher=PHOTO_TEACHER)
    named = ["--teacher", PHOTO_TEACHER, "--size", "12"]
    assert main(["upsample", path, *named, "--output", str(output)]) == 0
    found = load_file(output)["features"].float()
    torch.testing.assert_close(found, pair.encode_dense(path, size=12)[0], rtol=1e-2, atol=1e-2)
    assert main(["islands", path, *named, "--heights", "2", "4", "--output_dir", str(tmp_path / "islands")]) == 0
    assert caplog.text.count("the dense student") == 2


@pytest.mark.parametrize("folder", [DENSE_MODEL, EFFICIENTNET_MODEL])
def test_the_shipped_student_comes_closer_to_the_teacher_at_twice_the_side_than_ridge_and_interpolation(
    folder, shared_dir, monkeypatch
):
    """On photos of other kinds than it learnt from."""
    if folder == EFFICIENTNET_MODEL:
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
        teacher = importlib.import_module("efficientnet_lite0").load_efficientnet_lite0()
        pair = APM(None, None, teacher).with_dense_student()
        assert pair.model.name_or_path == EFFICIENTNET_MODEL
    else:
        teacher = load_teacher(shared_dir / "teachers/deit-tiny")
    data = load_images(shared_dir / "data/imagenet_sample1k", max_images=12, seed=1)
    photos = [eight_bit_rgb(decode_image(row["image"])) for row in data.dataset]
    pairs = DensePairs.build(photos, teacher, shifted=False)
    ridge = Ridge.load(folder)
    student = APM.load(folder, teacher=teacher).bare_model  # where its name leads to is not reached here
    metrics = evaluate_dense(student, ridge, pairs)
    if folder == DENSE_MODEL:  # whose teacher is inside
        tokens = student.fold(pairs.pixel_values(torch.arange(2)))
        torch.testing.assert_close(tokens, pairs.tokens[:2].float(), rtol=0.01, atol=0.01)
    assert metrics["feature_r2"] > metrics["ridge_r2"] + 0.005 > metrics["bilinear_r2"] + 0.03, metrics
