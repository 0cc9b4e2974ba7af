"""Ablations of test-time training, on the embedded scenes and teacher with a model of a few thousand weights."""

import importlib.util
import io
import json
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from apm_hf import APMConfig, APMModel, adapt, load_teacher
from apm_hf.assets import DEMO_TEACHER
from apm_hf.evaluation.labels.benchmarks import scenes_benchmark
from apm_hf.evaluation.statistics import Interval

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import one_factor as ablations
    from one_factor import (
        BASE_RECIPE,
        FACTORS,
        AblationRow,
        AblationTask,
        Variant,
        draw_ablations,
        is_base,
        location_cosine,
        run_ablations,
        run_variant,
        variants,
    )
finally:
    sys.path.remove(str(BENCHMARKS))

NUM_IMAGES = 10
# 36 locations.
BASE = APMConfig.preset(
    "tiny", patch_size=16, hidden_sizes=[64, 32, 16], rgb_hidden_sizes=[16], feature_size=144, pooling="attention"
)
RECIPE = replace(BASE_RECIPE, learning_rate=1e-2, steps=10)


@pytest.fixture(scope="module")
def task():
    return AblationTask.build(load_teacher(DEMO_TEACHER, device="cpu"), scenes_benchmark(NUM_IMAGES), BASE, seed=3)


def score(variant, task, **options):
    return run_variant(variant, task, **{"base": BASE, "recipe": RECIPE, **options})


def figures(row):
    return replace(row, seconds=0.0)


def test_every_factor_yields_its_levels_and_the_base_once():
    base = APMConfig.preset("clip-ttt")
    levels = {factor: variants(base, factors=[factor]) for factor in FACTORS}
    names = {factor: [variant.level for variant in own] for factor, own in levels.items()}
    assert names == {
        "losses": ["L_cls", "L_cls + L_grid", "L_cls + L_rgb", "L_cls + L_grid + L_rgb", "L_grid"],
        "trigger": ["T_c", "T_vit"],
        "local_patch": ["off", "on"],
        "pooling": ["mean", "attention"],
        "parameters": ["1280", "4096", "7424", "11264"],
        "depth": ["base", "1 x 2048", "2 x 2048", "3 x 2048", "4 x 2048", "5 x 2048"],
        "steps": ["1", "5", "10", "20", "40"],
        "locations": ["1", "4", "16", "64", "256"],
    }
    for factor, own in levels.items():
        assert sum(is_base(variant, base, BASE_RECIPE) for variant in own) == 1, factor
    assert variants(base) == [variant for own in levels.values() for variant in own]


def test_the_levels_of_parameters_are_as_large_as_they_are_said_to_be():
    base = APMConfig.preset("clip-ttt")
    sizes = []
    for variant in variants(base, factors=["parameters"]):
        with torch.device("meta"):
            sizes.append(APMModel(variant.settings(base, BASE_RECIPE)[0]).num_parameters() / 1e6)
    assert np.allclose(sizes, [7, 23, 54, 108], rtol=0.06)


def test_a_small_grid_does_without_levels_of_more_locations_than_it_has():
    assert [variant.level for variant in variants(BASE, RECIPE, ["locations"])] == ["1", "4", "16"]


def test_a_level_equal_to_the_base_gives_the_bases_figures_exactly(task):
    expected = score(Variant("depth", "base"), task)
    same = Variant("pooling", "attention", {"pooling": "attention", "local_patch": False}, {"steps": RECIPE.steps})
    other = Variant("pooling", "mean", {"pooling": "mean"})
    # Otherwise batched, an image's fit is still its own.
    assert figures(score(same, task, batch_size=3)) == figures(expected)
    assert figures(score(other, task)).cosine != expected.cosine


def test_figures_agree_with_a_naive_computation(task):
    # The embedded teacher errs on none of its scenes: with some labels of another class it does.
    task = replace(task, labels=torch.where(torch.arange(NUM_IMAGES) < 3, (task.labels + 1) % 8, task.labels))
    row = score(Variant("steps", "10"), task)
    assert row.agreement != row.accuracy.mean
    embeds, features = [], []
    torch.manual_seed(RECIPE.seed)  # every fit starts from the same drawn weights
    model, recipe = APMModel(BASE).eval(), replace(RECIPE, start="model")
    for index in range(NUM_IMAGES):
        one = slice(index, index + 1)
        adapted = adapt(model, task.pixel_values[one], task.image_embeds[one], config=recipe)
        embeds.append(adapted.image_embeds[0])
        features.append(F.normalize(adapted.query().last_hidden_state[0], dim=-1))
    embeds, texts = torch.stack(embeds), F.normalize(task.text_embeds, dim=-1)
    ours, theirs = ((F.normalize(x, dim=-1) @ texts.T).argmax(dim=1).tolist() for x in (embeds, task.image_embeds))
    labels = task.labels.tolist()
    right = [sum(a == b for a, b in zip(x, labels, strict=True)) / NUM_IMAGES for x in (ours, theirs)]
    assert row.accuracy.mean == pytest.approx(right[0])
    assert row.difference.mean == pytest.approx(right[0] - right[1])
    assert task.teacher_accuracy().mean == pytest.approx(right[1])
    assert row.agreement == pytest.approx(sum(a == b for a, b in zip(ours, theirs, strict=True)) / NUM_IMAGES)
    assert row.cosine == pytest.approx(F.cosine_similarity(embeds, task.image_embeds).mean().item(), abs=1e-5)
    pairs = [(a @ b).item() for image in features[:4] for a, b in combinations(image, 2)]
    assert row.location_cosine == pytest.approx(np.mean(pairs), abs=1e-5)
    assert row.parameters == sum(weight.numel() for weight in model.parameters())
    assert row.num_images == NUM_IMAGES and row.seconds > 0


def test_labels_belong_to_the_images_whatever_their_order(task):
    images, teacher = scenes_benchmark(NUM_IMAGES), load_teacher(DEMO_TEACHER, device="cpu")
    other = AblationTask.build(teacher, images, BASE, seed=4, batch_size=5)
    assert other.labels.tolist() != task.labels.tolist()
    assert other.teacher_accuracy() == task.teacher_accuracy()
    for index, label in enumerate(images.labels[:3]):
        embed = teacher.encode_images(images.image(index)).image_embeds
        place = int(torch.cdist(embed, task.image_embeds).argmin())
        assert task.labels[place] == label and torch.allclose(task.image_embeds[place], embed[0], atol=1e-4)


def test_collapsed_locations_have_a_cosine_of_one_and_opposite_ones_less():
    same = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 5, -1)
    assert location_cosine(same) == pytest.approx(1)
    assert location_cosine(torch.eye(5)[None]) == pytest.approx(0)
    assert location_cosine(torch.tensor([[[1.0, 0], [-2, 0]]])) == pytest.approx(-1)


def test_more_steps_come_closer_to_the_teacher_and_cost_more(task):
    rows = [score(Variant("steps", str(steps), recipe={"steps": steps}), task) for steps in (1, 5, 20)]
    assert rows[0].cosine < rows[1].cosine < rows[2].cosine
    assert rows[2].cosine > 0.9 and rows[2].gflops > 3 * rows[1].gflops


def test_the_losses_of_a_variant_are_what_is_fitted(task, monkeypatch):
    seen = []

    def spied(model, pixel_values, targets, **options):
        seen.append((model.config.pooling, targets))
        return adapt(model, pixel_values, targets, **options)

    monkeypatch.setattr(ablations, "adapt", spied)
    recipe = replace(RECIPE, steps=2)
    names = []
    for variant in variants(BASE, recipe, ["losses"]):
        seen.clear()
        score(variant, task, recipe=recipe)
        pooling, targets = seen[0]
        names.append((pooling, *targets.tensors()))
        for name, values in targets.tensors().items():
            assert torch.equal(values, getattr(task, name)[:4])
    assert names == [
        ("attention", "image_embeds"),
        ("attention", "image_embeds", "features"),
        ("attention", "image_embeds", "rgb"),
        ("attention", "image_embeds", "features", "rgb"),
        ("mean", "features"),
    ]


def test_colours_are_those_of_the_image():
    teacher, images = load_teacher(DEMO_TEACHER, device="cpu"), scenes_benchmark(5)
    task = AblationTask.build(teacher, images, BASE)
    means = [np.asarray(images.image(index)).mean(axis=(0, 1)) / 255 for index in range(5)]
    order = np.random.default_rng(0).permutation(5)
    assert np.allclose(task.rgb.mean(dim=(1, 2)).numpy(), np.stack(means)[order], atol=0.01)
    assert task.rgb.shape == (5, 6, 6, 3)


def test_the_embedding_as_trigger_is_asked_for_without_pixels(task, monkeypatch):
    seen = []

    def spied(model, pixel_values, targets, **options):
        seen.append((pixel_values is None, options["trigger_column"] is None))
        return adapt(model, pixel_values, targets, **options)

    monkeypatch.setattr(ablations, "adapt", spied)
    row = score(Variant("trigger", "T_vit", {"trigger_source": "embedding"}), task)
    assert set(seen) == {(True, False)} and row.cosine > 0.5
    seen.clear()
    score(Variant("trigger", "both", {"trigger_source": "embedding", "local_patch": True}), task)
    score(Variant("trigger", "T_c"), task)
    assert set(seen) == {(False, False), (False, True)}


def test_expensive_variants_see_fewer_images(task):
    cheap = score(Variant("steps", "10"), task)
    slow = score(Variant("steps", "10"), task, max_gflops=cheap.gflops / 2, num_slow=6)
    assert (cheap.num_images, slow.num_images) == (NUM_IMAGES, 6)
    assert slow.gflops == cheap.gflops and slow.location_cosine == cheap.location_cosine


def run(task, folder, factors, **options):
    return run_ablations(task, folder, base=BASE, recipe=RECIPE, factors=factors, **options)


def test_an_interrupted_run_goes_on_and_equal_settings_are_fitted_once(task, tmp_path, monkeypatch):
    fitted, real = [], ablations.run_variant

    def counted(variant, *arguments, **options):
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(variant.level)
        return real(variant, *arguments, **options)

    monkeypatch.setattr(ablations, "run_variant", counted)
    with pytest.raises(KeyboardInterrupt):
        run(task, tmp_path, ["trigger", "pooling", "locations"])
    before = (tmp_path / "ablations.jsonl").read_text()
    assert fitted == ["T_c", "T_vit", "mean"] and len(before.splitlines()) == 3
    fitted.clear()
    results = run(task, tmp_path, ["trigger", "pooling", "locations"])
    assert fitted == ["1", "4"]  # "attention" and "16" are the base, which "T_c" was
    text = (tmp_path / "ablations.jsonl").read_text()
    assert text.startswith(before)
    rows = {variant.level: row for variant, row in results}
    assert rows["T_c"] == rows["attention"] == rows["16"] != rows["mean"]

    fitted.clear()
    again = run(task, tmp_path, ["trigger", "pooling", "locations"])
    assert not fitted and again == results and (tmp_path / "ablations.jsonl").read_text() == text
    run(replace(task, source={**task.source, "teacher": "another"}), tmp_path, ["trigger"])
    assert fitted == ["T_c", "T_vit"]


def test_the_report_has_a_table_per_factor_that_starts_with_the_teacher(task, tmp_path):
    results = run(task, tmp_path, ["pooling", "trigger"])
    report = (tmp_path / "ablations.md").read_text()
    sections = report.split("\n## ")[1:]
    assert [section.split("\n")[0] for section in sections] == [FACTORS["pooling"], FACTORS["trigger"]]
    for section, levels in zip(sections, (["mean", "**attention**"], ["**T_c**", "T_vit"]), strict=True):
        table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "|" in line]
        assert [row[0] for row in table[2:]] == ["teacher", *levels]
        assert table[2][1].startswith(f"{100 * task.teacher_accuracy().mean:.1f} [")
    mean = results[0][1]
    assert "Teacher `demo-teacher`, Procedural scenes, 10 images" in report
    assert f"| mean | {100 * mean.accuracy.mean:.1f} [" in report and f"| {mean.cosine:.4f} |" in report


def test_the_picture_is_the_same_for_the_same_results_and_shows_them(task):
    import matplotlib

    def picture(accuracy):
        row = AblationRow(Interval(accuracy, 0.1, 0.9), Interval(0, 0, 0), 0.5, 0.7, 0.9, 12, 10**6, 2.0, 0.1, "CPU")
        results = [(variant, row) for variant in variants(BASE, RECIPE)]
        return draw_ablations(results, task, base=BASE, recipe=RECIPE)

    first = picture(0.5)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        assert picture(0.5) == first
    assert picture(0.6) != first and min(Image.open(io.BytesIO(first)).size) > 300


def test_what_cannot_be_run_is_refused(task):
    with pytest.raises(ValueError, match=r"factors: expected some of .*'losses'.*got \['colour'\]"):
        variants(BASE, RECIPE, ["steps", "colour"])
    with pytest.raises(ValueError, match="factor: expected one of .*got 'colour'"):
        Variant("colour", "red")
    for losses in ((), ("cls", "text")):
        with pytest.raises(ValueError, match="losses: expected some of"):
            Variant("losses", "none", losses=losses)
    with pytest.raises(ValueError, match="num_slow: expected more than 4, got 4"):
        score(Variant("steps", "10"), task, num_slow=4)
    teacher = load_teacher(DEMO_TEACHER, device="cpu")
    with pytest.raises(ValueError, match="num_images: expected more than 4, got 4"):
        AblationTask.build(teacher, scenes_benchmark(4), BASE)
    with pytest.raises(ValueError, match="feature_size: expected the teacher's 144, got 64"):
        AblationTask.build(teacher, scenes_benchmark(8), APMConfig.preset("tiny", feature_size=64))
    with pytest.raises(ValueError, match="steps, 10: expected fits that converge"):
        score(Variant("steps", "10", recipe={"learning_rate": 1e30}), task)


def test_the_global_random_state_is_left_alone(task):
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    score(Variant("steps", "1", recipe={"steps": 1}), task)
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_script_runs_on_the_embedded_teacher_and_scenes(tmp_path, monkeypatch):
    path = BENCHMARKS / "ablations.py"
    spec = importlib.util.spec_from_file_location("ablations_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    paper = partial(script.TTTConfig.preset, steps=5)  # instead of 20; 5 is one of the levels
    monkeypatch.setattr(script, "TTTConfig", SimpleNamespace(preset=paper))
    arguments = ["--preset", "tiny", "--num_images", "6", "--output_dir", str(tmp_path)]
    results = script.run(script.parse(arguments))
    assert {variant.factor for variant, _ in results} == set(FACTORS)
    rows = [json.loads(line) for line in (tmp_path / "ablations.jsonl").read_text().splitlines()]
    assert len(rows) == len(results) - (len(FACTORS) - 1)  # the base once
    assert (tmp_path / "ablations.md").exists() and (tmp_path / "ablations.png").exists()
    with pytest.raises(ValueError, match="factors: expected"):
        script.run(script.parse([*arguments, "--factors", "colour"]))
