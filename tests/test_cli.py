"""`apm classify`, `islands` and `interpolate`, called in this process: tiny teachers and models from folders."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image

from apm_hf import load_teacher
from apm_hf.commands import classify, interpolate, islands
from apm_hf.commands.main import main
from apm_hf.data.scenes import make_scene
from apm_hf.distillation import matching_image_processor
from apm_hf.ttt import TTTConfig
from apm_hf.ttt.classification import TTTClassifier
from fixtures_tiny import LABELS, photo, save_classifier, save_clip, student


def model():
    """With the 16 locations that the fast recipe draws."""
    return student(initializer_range=0.3, image_size=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Teachers, a model, labels and photos."""
    folder = tmp_path_factory.mktemp("place")
    save_clip(folder / "clip")
    save_classifier(folder / "classifier")
    model().save_pretrained(folder / "apm")
    teacher = load_teacher(folder / "clip", device="cpu")
    matching_image_processor(teacher, model().config.image_size).save_pretrained(folder / "apm")
    (folder / "labels.txt").write_text("\n".join(LABELS))
    for seed in range(3):
        photo(seed).save(folder / f"{seed}.png")
    (folder / "broken.jpg").write_bytes(b"no photo at all")
    # What no teacher takes, though it can be opened: 32-bit floats have no agreed range.
    Image.fromarray(np.linspace(-3, 7, 48, dtype=np.float32).reshape(6, 8)).save(folder / "float.tiff")
    return folder


@pytest.fixture
def apm(place, capfd, caplog):
    """Run the command: status, lines of standard output, logged lines."""
    caplog.set_level(logging.INFO, logger="apm_hf")

    def run(*arguments, defaults=True):
        arguments = [str(place / argument) if (place / argument).exists() else argument for argument in arguments]
        if defaults:
            arguments += ["--teacher", str(place / "clip"), "--model", str(place / "apm")]
            arguments += ["--labels", str(place / "labels.txt"), "--steps", "5"]
        caplog.clear()
        status = main(["classify", *arguments])
        return status, capfd.readouterr().out.splitlines(), [record.getMessage() for record in caplog.records]

    return run


def predictions(lines, photo_name):
    """(probability, class) of the teacher and of the APM, as printed under a photo's name."""
    start = next(i for i, line in enumerate(lines) if line.endswith(photo_name))
    found = []
    for line in lines[start + 3 :]:
        row = re.fullmatch(r"\s+([\d.]+)% (\S.*?)\s{2,}([\d.]+)% (\S.*)", line)
        if row is None:
            break
        found.append(((float(row[1]) / 100, row[2]), (float(row[3]) / 100, row[4])))
    return found


def test_photos_are_classified_by_teacher_and_model_side_by_side(apm, place):
    status, lines, logged = apm("0.png", "1.png", "2.png")
    assert status == 0 and not [line for line in logged if "apm classify" in line]
    classifier = TTTClassifier(
        load_teacher(place / "clip", device="cpu"),
        LABELS,
        config=TTTConfig.preset("fast", start="model", steps=5),
        model=model(),
    )
    result = classifier([photo(seed) for seed in range(3)])
    for seed in range(3):
        printed = predictions(lines, f"{seed}.png")
        assert len(printed) == 3
        for column, logits in enumerate((result.teacher_logits, result.logits)):
            probabilities = logits[seed].softmax(0)
            assert [row[column][1] for row in printed] == [LABELS[i] for i in probabilities.argsort(descending=True)]
            for row in printed:
                score, label = row[column]
                assert score == pytest.approx(probabilities[LABELS.index(label)].item(), abs=0.001)


def test_the_classes_of_a_classifier_are_its_labels(apm):
    status, lines, _ = apm("0.png", "--teacher", "classifier", "--model", "apm", "--steps", "1", defaults=False)
    assert status == 0
    assert {teacher[1] for teacher, _ in predictions(lines, "0.png")} == set(LABELS)


@pytest.mark.parametrize("bad", ["broken.jpg", "nowhere.jpg", "clip", "float.tiff"])
def test_a_photo_that_cannot_be_read_is_one_line_and_the_others_are_done(apm, bad):
    status, lines, logged = apm("0.png", bad, "2.png")
    assert status == 1
    assert len(predictions(lines, "0.png")) == len(predictions(lines, "2.png")) == 3
    assert not [line for line in lines if line.endswith(bad)]
    errors = [line for line in logged if line.startswith("apm classify")]
    assert len(errors) == 1 and bad in errors[0] and "\n" not in errors[0]


def test_labels_that_the_teacher_has_no_words_for_are_left_out_and_named(tmp_path, caplog, capsys):
    """To the teacher in the package samovars and quasars are the same unknown word: to rank them would be a tie."""
    make_scene(0, seed=3, image_size=96).image.save(tmp_path / "scene.png")
    (tmp_path / "labels.txt").write_text("cat\nsamovar\nquasar\ndog\n")
    words = ["classify", str(tmp_path / "scene.png"), "--labels", str(tmp_path / "labels.txt"), "--steps", "1"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["labels"] == ["cat", "dog"] and "learnt photos of 100 kinds" in told["note"]
    assert {one["label"] for one in told["photos"][0]["apm"]} == {"cat", "dog"}
    assert "has no words for them: samovar, quasar" in caplog.text
    (tmp_path / "labels.txt").write_text("samovar\nquasar\n")
    assert main(words) == 1 and "expected words that the teacher knows, got none: samovar, quasar" in caplog.text


def test_labels_that_are_the_same_to_the_teacher_are_named(apm, place):
    """All their words are known, but they make the same prompt."""
    (place / "same.txt").write_text("a cat\na_cat\ndog\n")
    status, lines, logged = apm("0.png", "--teacher", "clip", "--labels", "same.txt", "--steps", "1", defaults=False)
    assert status == 0 and len(predictions(lines, "0.png")) == 3
    assert [line for line in logged if "cannot tell apart: a cat, a_cat;" in line]
    (place / "same.txt").write_text("a cat\na_cat\n")
    status, lines, logged = apm("0.png", "--teacher", "clip", "--labels", "same.txt", "--steps", "1", defaults=False)
    assert status == 1 and not lines and "expected words that the teacher can tell apart" in logged[-1]


def test_a_fit_that_diverges_is_reported_and_the_others_are_done(apm, monkeypatch):
    answer = TTTClassifier.__call__

    def diverged(self, images, **options):
        result = answer(self, images, **options)
        result.logits[1] = torch.nan
        return result

    monkeypatch.setattr(TTTClassifier, "__call__", diverged)
    status, lines, logged = apm("0.png", "1.png", "2.png")
    assert status == 1 and [len(predictions(lines, f"{seed}.png")) for seed in range(3)] == [3, 0, 3]
    assert len([line for line in lines if re.fullmatch(r"\s+[\d.]+% \S+\s*", line)]) == 3, "the teacher's scores"
    assert [line for line in logged if "1.png: the fit diverged" in line]


def test_only_unreadable_photos_is_status_1(apm):
    status, lines, logged = apm("broken.jpg")
    assert (status, lines) == (1, []) and len(logged) == 1


def test_photos_are_adapted_to_in_batches_with_equal_results(apm):
    one, all_at_once = (apm("0.png", "1.png", "2.png", "--batch_size", size)[1] for size in ("1", "3"))
    assert [predictions(one, f"{i}.png") for i in range(3)] == [predictions(all_at_once, f"{i}.png") for i in range(3)]


def test_the_number_of_classes_printed_is_top_k(apm):
    status, lines, _ = apm("0.png", "--top_k", "2")
    assert status == 0 and len(predictions(lines, "0.png")) == 2


def test_steps_are_those_asked_for(apm):
    options = ["--teacher", "clip", "--model", "apm", "--labels", "labels.txt", "--steps", "3"]
    _, lines, _ = apm("0.png", *options, defaults=False)
    assert [line for line in lines if "3 steps: loss" in line]


def test_predictions_are_one_json_object_and_what_failed_stands_beside(apm, place):
    status, lines, logged = apm("0.png", "broken.jpg", "--json", "--top_k", "2")
    (line,) = lines
    told = json.loads(line)
    assert status == 1 and set(told) == set(classify.RESULT)
    (photo_told,), (error,) = told["photos"], told["errors"]
    assert photo_told["photo"].endswith("0.png") and photo_told["steps"] == 5 and len(photo_told["loss"]) == 2
    assert all(f"{key}" in classify.RESULT["photos"] for key in photo_told)
    assert error["photo"].endswith("broken.jpg") and any(error["message"] in line for line in logged)
    _, lines, _ = apm("0.png", "--top_k", "2")
    printed = predictions(lines, "0.png")
    for column, name in enumerate(("teacher", "apm")):
        scores = [(entry["score"], entry["label"]) for entry in photo_told[name]]
        assert [(pytest.approx(score, abs=1e-3), label) for score, label in scores] == [row[column] for row in printed]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "nowhere.txt"], "nowhere.txt"),
        (["--labels", "empty.txt"], "at least one label"),
        (["--steps", "0"], "steps: expected a positive number, got 0"),
        (["--template", "a photo"], "template"),
        (["--top_k", "0"], "0"),
        (["--batch_size", "0"], "batch_size"),
        (["--batch_size", "-1"], "batch_size"),
        (["--model", "clip"], "model"),
        (["--teacher", "photo-folder"], "photo-folder"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_status_1(apm, place, options, message):
    (place / "empty.txt").write_text("\n")
    (place / "photo-folder").mkdir(exist_ok=True)
    options = [str(place / option) if (place / option).exists() else option for option in options]
    given = {"--teacher": "clip", "--model": "apm", "--labels": "labels.txt", "--steps": "1"}
    given = {name: str(place / value) for name, value in given.items() if value != "1"} | {"--steps": "1"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    status, lines, logged = apm("0.png", *(word for pair in given.items() for word in pair), defaults=False)
    assert status == 1 and lines == []
    assert len(logged) == 1 and logged[0].startswith("apm classify: ") and message in logged[0]


def test_a_teacher_without_classes_of_its_own_needs_labels(apm, place):
    status, _, logged = apm("0.png", "--teacher", "clip", "--model", "apm", defaults=False)
    assert status == 1 and "--labels: expected a file of class names" in logged[-1]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, ["demo", "classify", "islands", "interpolate", "evaluate"]),
        (["classify", "--help"], 0, ["PHOTO", "--teacher", "--labels", "--preset", "paper", "--steps"]),
        (["demo", "--help"], 0, ["--output_dir", "--max_steps"]),
        (["islands", "--help"], 0, ["PHOTO", "--model", "--teacher", "--movie", "--heights", "--point", "--text"]),
        (["interpolate", "--help"], 0, ["PHOTO", "--blending", "--patches", "--frames"]),
        ([], 0, ["demo", "classify"]),
        (["classify"], 2, []),
        (["nonsense"], 2, []),
    ],
)
def test_help_and_wrong_usage(capsys, arguments, status, words):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == status
    printed = capsys.readouterr()
    assert all(word in printed.out for word in words)
    assert status == 0 or "usage: apm" in printed.err


def test_the_command_of_the_readme_adapts_a_fresh_model(apm):
    status, lines, _ = apm("0.png", "--teacher", "clip", "--labels", "labels.txt", "--steps", "1", defaults=False)
    assert status == 0 and len(predictions(lines, "0.png")) == 3


@pytest.fixture
def pictures(place, tmp_path, caplog, capfd):
    """Run a command that draws: status, files by name, logged lines."""
    caplog.set_level(logging.INFO, logger="apm_hf")

    def run(command, *arguments, folder="pictures"):
        arguments = [str(place / argument) if (place / argument).exists() else argument for argument in arguments]
        caplog.clear()
        status = main([command, *arguments, "--output_dir", str(tmp_path / folder)])
        run.printed = capfd.readouterr().out
        notes = [line for line in run.printed.splitlines() if "in this package" in line or "learnt photos" in line]
        assert "--json" in arguments or run.printed.splitlines() == notes
        files = {path.name: path for path in sorted((tmp_path / folder).glob("*"))}
        return status, files, [record.getMessage() for record in caplog.records if record.name == "apm_hf"]

    return run


def test_islands_without_options_are_the_embedded_pair_s_and_the_files_are_named(pictures):
    status, files, logged = pictures("islands", "0.png", "--size", "16", "--heights", "2", "4")
    assert status == 0 and list(files) == ["islands.png"]
    assert pictures.printed.count("learnt photos of 100 kinds") == 1
    assert logged[-1] == f"pictures: {files['islands.png']}"


def test_islands_of_a_model_alone_and_the_same_bytes_again(pictures, place):
    arguments = ("0.png", "--model", "apm", "--size", "16", "--heights", "2", "4", "--point", "-0.5", "0.25", "--json")
    (status, first, logged), (_, second, _) = (pictures("islands", *arguments, folder=name) for name in "ab")
    assert status == 0 and len(logged) == 1
    told = json.loads(pictures.printed)
    assert set(told) == set(islands.RESULT) and told["files"] == [str(second["islands.png"])]
    assert told["model"] == str(place / "apm") and told["teacher"] is None and not told["fitted"]
    assert told["num_parameters"] == model().num_parameters()
    assert first["islands.png"].read_bytes() == second["islands.png"].read_bytes()


def test_a_fresh_model_is_fitted_to_the_photo_and_filmed(pictures):
    arguments = ("0.png", "--teacher", "clip", "--steps", "2", "--size", "16", "--text", "a cat", "--movie")
    status, files, logged = pictures("islands", *arguments)
    assert status == 0 and {"islands.png", "islands.gif"} <= set(files)
    assert all(str(path) in logged[-1] for path in files.values())


def test_a_model_is_adapted_to_the_photo(pictures):
    arguments = ("0.png", "--model", "apm", "--teacher", "clip", "--size", "16", "--heights", "2", "4", "--steps", "9")
    plain, adapted = (
        pictures("islands", *arguments, *more, folder=name)[1]["islands.png"].read_bytes()
        for name, more in (("plain", ()), ("adapted", ("--adapt",)))
    )
    assert plain != adapted


@pytest.mark.parametrize("options", [(), ("--trigger_only", "--blending", "spherical")])
def test_two_photos_are_interpolated_between(pictures, options):
    arguments = ("0.png", "1.png", "--teacher", "clip", "--steps", "2", "--size", "12", "--frames", "3", *options)
    status, files, logged = pictures("interpolate", *arguments)
    assert status == 0 and {"interpolation.png", "interpolation.gif"} <= set(files)
    assert all(str(path) in logged[-1] for path in files.values())


def test_interpolation_of_a_model_alone_gives_the_same_bytes_again(pictures):
    arguments = ("0.png", "1.png", "--model", "apm", "--size", "12", "--frames", "2", "--json")
    first, second = (pictures("interpolate", *arguments, folder=name)[1] for name in "ab")
    assert first and [path.read_bytes() for path in first.values()] == [path.read_bytes() for path in second.values()]
    told = json.loads(pictures.printed)
    assert set(told) == set(interpolate.RESULT) and sorted(told["files"]) == sorted(map(str, second.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("islands", "broken.jpg"), "broken.jpg: cannot decode"),
        (("islands", "nowhere.jpg"), "nowhere.jpg: cannot decode"),
        (("islands", "float.tiff"), "float.tiff: expected floating-point pixels"),
        (("islands", "0.png", "--size", "4"), "size: expected at least 8 locations along the longer side, got 4"),
        (("islands", "0.png", "--heights", "6", "2"), "heights: expected ascending"),
        (("islands", "0.png", "--size", "8", "--heights", "900"), "num_regions: expected 1 to"),
        (("islands", "0.png", "--point", "2", "0"), "points: expected (y, x) in [-1, 1]"),
        (("islands", "0.png", "--steps", "0"), "--steps: expected a positive number"),
        (("islands", "0.png", "--model", "clip"), "model: expected an APM"),
        (("islands", "0.png", "--model", "apm", "--adapt"), "--adapt, --movie: expected --teacher"),
        (("islands", "0.png", "--model", "apm", "--movie"), "--adapt, --movie: expected --teacher"),
        (("islands", "0.png", "--model", "apm", "--text", "a cat"), "--text: expected a teacher with a text tower"),
        (("islands", "0.png", "--teacher", "classifier", "--text", "a cat"), "--text: expected a teacher with"),
        (("islands", "0.png", "--model", "apm", "--fresh"), "--fresh: expected no --model"),
        (("interpolate", "0.png", "broken.jpg"), "broken.jpg: cannot decode"),
        (("interpolate", "0.png", "1.png", "--frames", "1"), "steps: expected at least 2"),
        (("interpolate", "0.png", "1.png", "--model", "apm", "--trigger_only"), "--trigger_only: expected a fresh"),
    ],
)
def test_what_the_user_can_mend_in_a_picture_is_one_line(pictures, arguments, message):
    status, files, logged = pictures(*arguments)
    assert status == 1 and not files
    errors = [line for line in logged if line.startswith(f"apm {arguments[0]}: ")]
    assert len(errors) == 1 and message in errors[0] and "\n" not in errors[0]
