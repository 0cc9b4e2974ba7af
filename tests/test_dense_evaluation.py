"""`apm evaluate --task islands`: rivals and controls, scored alike, resumable, reported."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from apm_hf import APM, APMImageProcessor
from apm_hf.evaluation.masks import GRID_TTT, MaskedImages, evaluate_islands, methods, scoring, summary
from apm_hf.evaluation.masks.methods import Job, Models, colour_maps, random_segments, slic_segments
from apm_hf.evaluation.masks.probes import MeanIoU
from apm_hf.evaluation.masks.scoring import JobRun, ScoringConfig, exchanged
from apm_hf.islands import cluster, collapse, distant_agreement, neighbour_agreement, upsample
from apm_hf.islands.scores import segmentation_scores
from apm_hf.runs import run as runs
from apm_hf.runs.processes import process_state
from apm_hf.teachers import load_teacher
from fixtures_masks import mask, save_masked
from fixtures_runs import damaged_places
from fixtures_tiny import STUDENT_SIZE, TEACHER_GRID, photo, save_classifier, save_clip, student

pytest.importorskip("skimage")
pytestmark = pytest.mark.usefixtures("few_pixels")
TTT = replace(GRID_TTT, steps=3)
FAST = {"map_size": 10, "ttt": TTT, "batch_size": 3}
COLOURS = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250]], dtype=np.uint8)


def save_student(folder, **overrides):
    student(**overrides).save_pretrained(folder)
    APMImageProcessor(size={"height": STUDENT_SIZE, "width": STUDENT_SIZE}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("model"), num_levels=2, local_patch=True)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Five photos whose masks are as arbitrary as photos made of noise deserve."""
    columns = {
        "object_mask": [mask(0, 1), mask(1, 0), mask(0, 1, 0), mask(0, 1, 1), mask(1, 1, 0)],
        "part_mask": [mask(0, 1, 2), mask(2, 0), mask(0, 2, 1, 0), mask(0, 1, 2), mask(1, 2, 0, 3)],
    }
    return str(save_masked(tmp_path_factory.mktemp("data") / "stripes", columns, names=["a", "b", "c", "d"]).parent)


@pytest.fixture(scope="module")
def options(teacher, model, stripes):
    return {"teacher": teacher, "model": model, "data": stripes, "command": "apm evaluate", **FAST}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, options):
    return evaluate_islands(output_dir=tmp_path_factory.mktemp("evaluated"), **options)


def painted(num_images=6, size=12):
    """Images whose colours are their part masks: 4, 3 or 2 parts, where they like; whole: part 0 or not."""
    generator = np.random.default_rng(0)
    block = np.ones((size // 3, size // 3), dtype=int)
    masks = [np.kron(generator.permutation(9).reshape(3, 3) % (4 - number % 3), block) for number in range(num_images)]
    rows = [
        {"image": Image.fromarray(COLOURS[part]), "part": part, "whole": (part > 0).astype(np.uint8)} for part in masks
    ]
    columns = {"whole": "whole", "part": "part"}
    return MaskedImages("painted", rows, "image", columns, ["a", "b", "c", "d"], (255,), size, {})


def noisy(images, size):
    """Features `(B, rows, cols, 5)` that depend on each image alone."""
    return torch.stack([noise(image, size) for image in images])


def noise(image, size):
    pixels = np.asarray(image).astype(np.int64).ravel()
    seed = int(pixels @ np.arange(len(pixels))) % 2**31
    return torch.randn(*size, 5, generator=torch.Generator().manual_seed(seed))


def run(job, data=None, **settings):
    return JobRun(job, data or painted(), ScoringConfig(**settings), (4, 4), lambda number: None)()


def knows_parts(images, size):
    """One direction per colour: a method that is always right."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.resize(size, 0)) for image in images]))
    codes = (pixels > 100).int() @ torch.tensor([1, 2, 3], dtype=torch.int32)
    return torch.nn.functional.one_hot(codes.long(), 4).float()


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_who_is_always_right_scores_one_everywhere():
    found = run(Job("apm", ("apm",), knows_parts))
    parts = [row for row in found["scores"] if row["level"] == "part"]
    assert len(parts) == 6
    for row in parts:
        assert [row[measure] for measure in summary.MEASURES] == pytest.approx([1, 1, 1, 1])
    assert {kind: summary._mean_iou(counts, 0)[0] for kind, counts in found["probes"]["apm"].items()} == {
        "linear": pytest.approx(1),
        "knn": pytest.approx(1),
    }


def test_scores_are_those_of_the_clusters_of_each_map_against_its_own_mask():
    data = painted()
    for row in run(Job("apm", ("apm",), noisy), data)["scores"]:
        mask = data.mask(row["image"], row["level"])
        features = noise(data.image(row["image"]), (12, 12))
        expected = segmentation_scores(cluster(features, len(np.unique(mask)), max_locations=1500), mask)
        assert row["ari"] == expected.ari and row["boundary_f"] == expected.boundary_f


def test_void_pixels_count_nowhere():
    data = painted()
    for row in data.rows:
        row["part"] = row["part"].copy()
        row["part"][:, :3] = 255  # where the colours go on
    found = run(Job("apm", ("apm",), knows_parts), data)
    for row in found["scores"]:
        if row["level"] == "part":
            seen = data.mask(row["image"], "part")[:, 3:]
            assert row["num_segments"] == len(np.unique(seen)) and (seen >= 0).all()
            clear = row["num_segments"] == len(np.unique(data.rows[row["image"]]["part"])) - 1  # and void hides none
            assert row["ari"] == pytest.approx(1) or not clear
    for counts in (*found["probes"]["apm"]["linear"], *found["probes"]["apm"]["knn"]):
        assert all(sum(image["truth"]) == 12 * 9 for image in counts)


def test_an_image_of_one_segment_does_not_count():
    data = painted()
    data.rows[2]["whole"][:] = 1
    found = run(Job("apm", ("apm", "image_shuffled", "shuffled_masks"), knows_parts), data)["scores"]
    assert {row["image"] for row in found if row["level"] == "whole"} == {0, 1, 3, 4, 5}
    assert {row["image"] for row in found if row["level"] == "part"} == set(range(6))


def test_the_number_of_segments_can_be_fixed():
    found = run(Job("apm", ("apm",), noisy), num_segments=3)
    assert {(row["num_segments"], row["num_found"]) for row in found["scores"]} == {(3, 3)}


# ---- controls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [4, 5, 11])
def test_exchanged_images_are_others_of_the_same_half(num_images):
    order, middle = exchanged(num_images, seed=3), num_images // 2
    assert sorted(order[:middle]) == [*range(middle)] and sorted(order[middle:]) == [*range(middle, num_images)]
    assert (order != np.arange(num_images)).all()


def test_shuffled_controls_score_one_image_against_another():
    data = painted()
    found = run(Job("apm", ("image_shuffled", "shuffled_masks"), noisy), data, num_shuffles=2)
    pairs = defaultdict(set)
    for row in found["scores"]:
        pairs[row["row"], row["repeat"], row["level"]].add((row["shown"], row["image"]))
        asker = row["image"] if row["row"] == "image_shuffled" else row["shown"]
        num_segments = len(np.unique(data.mask(asker, row["level"])))
        features = noise(data.image(row["shown"]), (12, 12))
        expected = segmentation_scores(
            cluster(features, num_segments, max_locations=1500), data.mask(row["image"], row["level"])
        )
        assert row["num_segments"] == num_segments and row["ari"] == expected.ari
    assert len(pairs) == 2 * 2 * 2
    for found_pairs in pairs.values():
        shown, scored = zip(*found_pairs, strict=True)
        assert all(a != b for a, b in found_pairs) and sorted(shown) == sorted(scored) == [*range(6)]
    assert pairs["image_shuffled", 0, "part"] != pairs["image_shuffled", 1, "part"]


def test_position_only_is_the_mean_of_the_answers_to_all_other_images(monkeypatch):
    data = painted()
    seen = []
    monkeypatch.setattr(
        scoring, "cluster", lambda features, *args, **options: seen.append(features) or np.zeros((12, 12), int)
    )
    run(Job("apm", ("position_only",), noisy), replace(data, mask_columns={"part": "part"}), batch_size=4)
    everything = noisy([data.image(index) for index in range(6)], (12, 12))
    for index, features in enumerate(seen):
        others = everything[[other for other in range(6) if other != index]]
        torch.testing.assert_close(features, others.mean(dim=0), rtol=0, atol=1e-6)
    assert len(seen) == 6


def test_superpixels_are_at_least_as_many_as_asked_for_and_random_segments_cohere():
    image, generator = photo(0), np.random.default_rng(0)
    for number in (2, 3, 7):
        assert number <= len(np.unique(slic_segments(image, number, size=(24, 24), generator=generator))) <= 3 * number
        cells = random_segments(image, number, size=(24, 24), generator=generator)
        assert len(np.unique(cells)) == number
        assert (cells[:, 1:] == cells[:, :-1]).mean() > 0.7


def test_colours_are_clustered_by_distance_not_by_direction():
    shades = np.zeros((12, 12, 3), dtype=np.uint8) + np.repeat([140, 160, 250], 4).astype(np.uint8)[:, None, None]
    labels = cluster(colour_maps([Image.fromarray(shades)], (12, 12))[0], 2)
    assert (labels == (np.arange(12) >= 8)[:, None]).all()


# ---- agreement and probes -------------------------------------------------------------------------------------------


def test_agreement_is_measured_around_the_mean_of_all_images():
    def maps(images, size):
        return upsample(noisy(images, (4, 4)), size) + 2

    data = painted()
    found = run(Job("teacher", ("teacher",), maps, subject=("teacher", "features")), data, batch_size=4)["agreement"]
    images = [data.image(index) for index in range(6)]
    grids, fine = maps(images, (4, 4)), maps(images, (12, 12))
    mean = grids.mean(dim=(0, 1, 2))
    assert found["neighbours"] == pytest.approx(neighbour_agreement(grids, mean).tolist(), abs=1e-5)
    assert found["neighbours_fine"] == pytest.approx(neighbour_agreement(fine, mean).tolist(), abs=1e-5)
    assert found["distant"] == pytest.approx(distant_agreement(grids, mean).tolist(), abs=1e-5)
    assert {name: found[name] for name in collapse(grids)} == pytest.approx(collapse(grids))


def test_probes_see_the_same_pixels_and_only_those_of_the_first_half(monkeypatch):
    asked = defaultdict(list)
    original = scoring.StreamedProbes._pixels

    def spy(self, index, mask, number):
        pixels = original(self, index, mask, number)
        asked[index, number].append(pixels.tolist())
        return pixels

    monkeypatch.setattr(scoring.StreamedProbes, "_pixels", spy)
    settings = {"num_train_pixels": 30, "num_query_pixels": 20}
    run(Job("apm", ("apm", "image_shuffled"), knows_parts), num_shuffles=2, **settings)
    run(Job("rgb", ("rgb",), colour_maps), **settings)
    assert sorted(asked) == [(0, 10), (1, 10), (2, 10), (3, 20), (4, 20), (5, 20)]
    for pixels in asked.values():
        assert len(pixels) == 4 and all(drawn == pixels[0] for drawn in pixels)


def test_mean_iou_is_that_of_all_images_together_and_lies_in_its_interval():
    generator, metric, counts = np.random.default_rng(0), MeanIoU(5), []
    for image in range(8):
        truth, predicted = generator.integers(0, 4, (2, 60))
        metric.update(predicted, truth)
        one = MeanIoU(5)
        one.update(predicted, truth)
        confusion = one.confusion
        columns = {"hits": np.diagonal(confusion), "truth": confusion.sum(1), "predicted": confusion[:, :5].sum(0)}
        counts.append({"image": image} | {name: values.tolist() for name, values in columns.items()})
    estimate, draws = summary._mean_iou([counts], 0)
    interval = summary._interval(estimate, draws)
    assert estimate == pytest.approx(metric.mean_iou) and interval.low < interval.mean < interval.high
    assert summary._accuracy([counts]) == pytest.approx(metric.pixel_accuracy)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger_source", ["conv", "embedding"])
def test_adapted_models_answer_more_like_the_teacher_on_their_own_images(teacher, trigger_source):
    loaded = load_teacher(teacher, device="cpu")
    model = student(trigger_source=trigger_source, local_patch=True)
    processor = APMImageProcessor(size={"height": STUDENT_SIZE, "width": STUDENT_SIZE})
    models = Models(APM(model, processor, loaded), (), replace(GRID_TTT, steps=40), 2, seed=0)
    images, size = [photo(seed) for seed in range(3)], (TEACHER_GRID * 2,) * 2
    wanted = models.encode(images, factor=2).features

    def error(maps):
        assert maps.shape == wanted.shape
        return float((maps - wanted).square().mean())

    before = error(models.apm_maps(images, size, model=model))
    after = {start: error(models.adapted_maps(images, size, start=start)) for start in ("model", "random")}
    assert after["model"] < 0.7 * before and after["random"] < 0.9 * before and after["model"] != after["random"]


def test_the_teacher_sees_the_whole_image_not_its_middle(teacher):
    loaded = load_teacher(teacher, device="cpu")  # its own processor crops
    models = Models(APM(student(), None, loaded), (), TTT, 1, seed=0)
    image = photo(0, size=(80, 40))
    squeezed = image.resize((32, 32), Image.Resampling.BICUBIC)
    options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
    whole = loaded.encode_images(**loaded.image_processor([squeezed], **options)).features
    middle = loaded.encode_images([image]).features
    found = models.encode([image]).features
    # A backend with torchvision resizes otherwise in the last bits of a pixel.
    assert (found - whole).abs().max() < 0.1 * (middle - whole).abs().max()


# ---- from end to end ------------------------------------------------------------------------------------------------


def test_every_row_is_scored_and_reported(evaluated):
    results, text = json.loads((evaluated / "results.json").read_text()), (evaluated / "report.md").read_text()
    found = results["data"]["stripes"]
    levels = [f"{whose}_level_{number}" for whose in ("teacher", "apm") for number in (1, 2)]
    assert set(found["rows"]) == {*methods.TITLES, *levels} - set(methods.OF_DENSE)
    for row in found["rows"].values():
        assert row["title"] in text
        for level in ("whole", "part"):
            assert set(summary.MEASURES) < set(row[level])
    probed = {name for name, row in found["rows"].items() if "linear" in row and "knn" in row}
    assert probed == set(found["rows"]) - {"slic", "random", "shuffled_masks"}
    assert set(found["comparisons"]) == {
        "teacher_moved",
        "apm",
        "apm_level_1",
        "apm_level_2",
        "apm_ttt",
        "apm_ttt_alone",
    }
    whose = {(entry["whose"], entry["level"]) for entry in found["agreement"]}
    kinds = ("features", "level 1", "level 2")
    assert whose == {(who, kind) for who in ("teacher", "APM", "APM random") for kind in kinds}
    assert (evaluated / "ari_stripes.png").read_bytes().startswith(b"\x89PNG") and "(ari_stripes.png)" in text
    assert "* command: `apm evaluate`" in text and str(evaluated.parent) not in text + json.dumps(results)


def test_every_method_is_asked_for_as_many_segments(evaluated):
    asked, rows = defaultdict(set), set()
    for line in (evaluated / "scores.jsonl").read_text().splitlines():
        score = json.loads(line)
        key = score["shown"] if score["row"] == "shuffled_masks" else score["image"]
        asked[key, score["level"]].add(score["num_segments"])
        rows.add(score["row"])
    assert len(asked) == 5 * 2 and len(rows) == 16 and all(len(numbers) == 1 for numbers in asked.values())


def test_an_interrupted_run_goes_on_and_ends_with_the_same_results(tmp_path, evaluated, options, monkeypatch):
    done, original = [], JobRun.__call__

    def interrupted(self):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(self.job.name)
        return original(self)

    options = options | {"output_dir": tmp_path}
    monkeypatch.setattr(JobRun, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_islands(**options)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(finished) == 3 and not (tmp_path / "report.md").exists()
    monkeypatch.setattr(JobRun, "__call__", original)
    evaluate_islands(**options | {"batch_size": 4})
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in evaluated.iterdir()}
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, evaluated))
    for name, row in theirs["data"]["stripes"]["rows"].items():
        assert ours["data"]["stripes"]["rows"][name]["part"]["ari"] == pytest.approx(row["part"]["ari"], abs=0.02)


def test_damage_to_any_file_of_an_evaluation_on_masks_is_found(tmp_path, evaluated):
    """The report, its plot and `results.json` are left out: the same command writes them anew, from the parts."""
    folder = shutil.copytree(evaluated, tmp_path / "copy")
    run = runs.Run(folder, process_state())
    parts = list(run.parts.rglob("*.json"))
    for path in damaged_places([*parts, folder / "scores.jsonl", folder / runs.MANIFEST]):
        if path in parts:
            assert run.load(str(path.relative_to(run.parts).with_suffix(""))) is None
        else:
            assert any(path.name in fault for fault in runs.manifest_faults(folder))
    assert len(parts) > 10 and not runs.manifest_faults(folder)


def test_a_teacher_that_sees_otherwise_is_asked_again(tmp_path, evaluated, options, caplog):
    folder, copy = shutil.copytree(evaluated, tmp_path / "copy"), shutil.copytree(options["teacher"], tmp_path / "t")
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    before = set((folder / "parts").rglob("*.json"))
    with caplog.at_level("INFO"):
        evaluate_islands(**options | {"output_dir": folder, "teacher": str(copy), "methods": ["teacher"]})
    assert len(set((folder / "parts").rglob("*.json")) - before) == 1
    assert "0 of 1 jobs are done" in caplog.text


def test_other_settings_compute_again_what_they_change(tmp_path, options, monkeypatch):
    done, original = [], JobRun.__call__
    monkeypatch.setattr(JobRun, "__call__", lambda self: done.append(self.job.name) or original(self))
    options = options | {"output_dir": tmp_path, "methods": ["teacher", "apm", "apm_ttt"]}
    evaluate_islands(**options)
    assert done == ["teacher", "apm", "apm_ttt"]
    evaluate_islands(**options)
    assert len(done) == 3
    evaluate_islands(**options | {"ttt": replace(TTT, steps=2)})
    assert done[3:] == ["apm_ttt"]
    evaluate_islands(**options | {"segments": 3})
    assert done[4:] == ["teacher", "apm", "apm_ttt"]


def test_without_a_model_a_fresh_model_is_adapted_and_nothing_is_said_to_be_distilled(tmp_path, stripes):
    classifier = str(save_classifier(tmp_path / "teacher"))
    folder = evaluate_islands(
        output_dir=tmp_path / "out", teacher=classifier, data=stripes, **FAST | {"ttt": replace(TTT, steps=1)}
    )
    results = json.loads((folder / "results.json").read_text())
    expected = set(methods.TITLES) - set(methods.OF_DISTILLED) - set(methods.OF_DENSE)
    found = results["data"]["stripes"]
    assert set(found["rows"]) == expected and results["model"] is None
    assert {entry["whose"] for entry in found["agreement"]} == {"teacher", "APM random"}


def test_by_default_the_embedded_teacher_and_model_are_scored_on_scenes(tmp_path):
    folder = evaluate_islands(output_dir=tmp_path, max_images=4, map_size=12, methods=["teacher", "apm", "random"])
    found = json.loads((folder / "results.json").read_text())
    rows = found["data"]["scenes"]["rows"]
    assert (found["teacher"], found["model"]) == ("demo-teacher", "demo-apm")
    assert min(rows["apm"]["whole"]["ari"]["mean"], rows["teacher"]["whole"]["ari"]["mean"]) > 0.2
    assert rows["random"]["whole"]["ari"]["mean"] < 0.15


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"teacher": None}, "teacher: expected the one that model .* was distilled from, got none"),
        ({"methods": ["teacher", "magic"]}, "methods: expected some of teacher, teacher_level_1, .* got magic"),
        ({"level_layers": [1]}, r"level_layers: expected one per level, 2, got \[1\]"),
        ({"masks": ["parts"]}, r"masks: expected whole=COLUMN, part=COLUMN or both, got \['parts'\]"),
        ({"data": ["scenes", "scenes"]}, r"data: expected .* different names, got \['scenes', 'scenes'\]"),
        ({"segments": 0}, "num_segments: expected a positive number, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(tmp_path, options, others, message):
    with pytest.raises(ValueError, match=message):
        evaluate_islands(**options | {"output_dir": tmp_path / "x"} | others)
    assert not list((tmp_path / "x").rglob("*"))


def test_a_model_of_another_width_is_refused(tmp_path, options):
    other = save_student(tmp_path / "model", feature_size=8)
    with pytest.raises(ValueError, match="model: expected features as wide as the teacher's, 16, got 8"):
        evaluate_islands(**options | {"output_dir": tmp_path / "out", "model": other})
