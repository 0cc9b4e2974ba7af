"""A run of an evaluation: the same bytes however it was cut, killed or shared out; nothing of another run in it."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from apm_hf.assets import DEMO_TEACHER
from apm_hf.evaluation.labels import runner
from apm_hf.evaluation.labels.benchmarks import LabelledImages
from apm_hf.evaluation.labels.runner import (
    COSTS,
    RESULTS,
    EvaluationConfig,
    PeakMemory,
    run_evaluation,
)
from apm_hf.evaluation.labels.suites import evaluate
from apm_hf.evaluation.plan import CLEAN, Cell, Sweep
from apm_hf.evaluation.report import write_report
from apm_hf.evaluation.results import read_results
from apm_hf.runs import run as runs
from apm_hf.runs.files import write_atomically
from apm_hf.runs.processes import process_state
from apm_hf.runs.run import PARTS, RUN
from apm_hf.runs.unreadable_images import SKIPPED
from fixtures_runs import damaged_places, forget_accelerate, forked, processes, status_of

pytest.importorskip("imagecorruptions")

METHODS = ("zero_shot", "mean_views", "recentred_batch", "recentred_stream")
OPTIONS = {"batch_size": 4, "num_views": 3}


def sweep(**changes):
    fields = {
        "benchmarks": ("scenes",),
        "teachers": (DEMO_TEACHER,),
        "methods": METHODS,
        "corruptions": (CLEAN, "contrast"),
        "severities": (2,),
        "max_images": 14,
    }
    return Sweep(**{**fields, **changes})


def run(folder, sweeps=None, **options):
    config = EvaluationConfig(output_dir=str(folder), data={}, allow_chance=True, **{**OPTIONS, **options})
    return run_evaluation(sweeps or [sweep()], config)


def lines(folder, name=RESULTS):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "finished")


def test_every_method_answers_every_image_under_every_condition_once(finished):
    rows = lines(finished)
    assert len(rows) == 14 * 2 * len(METHODS)
    assert len({(row["corruption"], row["method"], row["image"]) for row in rows}) == len(rows)
    images = {
        corruption: {row["image"] for row in rows if row["corruption"] == corruption}
        for corruption in (CLEAN, "contrast")
    }
    assert images[CLEAN] == images["contrast"] and len(images[CLEAN]) == 14
    assert {row["severity"] for row in rows if row["corruption"] == CLEAN} == {0}
    assert all(0 < row["confidence"] <= 1 and len(row["top5"]) == 5 for row in rows)


def test_the_order_of_lines_is_the_plans(finished):
    rows = lines(finished)
    assert [row["corruption"] for row in rows] == sorted(
        (row["corruption"] for row in rows), key=[CLEAN, "contrast"].index
    )


def test_costs_stand_beside_the_results_and_charge_a_method_for_its_views(finished):
    rows = lines(finished, COSTS)
    seconds = {name: sum(row["seconds"] for row in rows if row["method"] == name) for name in METHODS}
    images = {name: sum(row["images"] for row in rows if row["method"] == name) for name in METHODS}
    assert set(images.values()) == {28}
    assert (
        seconds["mean_views"] > 1.5 * seconds["zero_shot"] > 0
    )  # three views cost more than one, whoever asked first
    assert "seconds" not in lines(finished)[0]


def test_no_path_of_the_computer_is_in_the_results(finished):
    text = (finished / RESULTS).read_text() + (finished / COSTS).read_text()
    assert str(Path(DEMO_TEACHER).parent) not in text and Path(DEMO_TEACHER).name in text


def test_a_run_that_is_started_again_computes_nothing_anew(finished, monkeypatch):
    before = (finished / RESULTS).read_bytes()
    monkeypatch.setattr("apm_hf.evaluation.labels.runner._Evaluation._result_lines", None)  # a call would raise
    run(finished)
    assert (finished / RESULTS).read_bytes() == before


def test_lost_batches_are_computed_again_to_the_same_bytes(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / RESULTS).unlink()
    parts = sorted((folder / PARTS).rglob("*0000*.json"))
    for part in parts[1::2]:
        part.unlink()
    (parts[1].parent / ".000009.json.123").write_text("torn")  # what a killed process leaves
    run(folder)
    assert (folder / RESULTS).read_bytes() == (finished / RESULTS).read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "emptied", "a prediction changed", "tensors"])
def test_damaged_parts_are_computed_again_to_the_same_bytes(finished, tmp_path, damage, caplog):
    folder = shutil.copytree(finished, tmp_path / "copy")
    part = min((folder / PARTS).rglob("000001.json"))
    text = part.read_bytes()
    if damage == "tensors":
        part = part.with_suffix(".safetensors")
        text = part.read_bytes()
        part.write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    elif damage == "a prediction changed":
        at = text.index(b"top5") + 10
        part.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
    else:
        part.write_bytes(text[: len(text) // 2] if damage == "truncated" else b"")
    (folder / RESULTS).unlink()
    run(folder)
    assert (folder / RESULTS).read_bytes() == (finished / RESULTS).read_bytes()
    assert "000001.json is damaged and computed again" in caplog.text


def test_damage_to_any_file_of_an_evaluation_is_found(finished, tmp_path):
    """Reports and plots are left out: the same command draws them anew, from what was verified."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    evaluation = runs.Run(folder, process_state())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != runs.LOCK]
    assert {RESULTS, COSTS, RUN, runs.MANIFEST} < {path.name for path in files}
    for path in damaged_places(files):
        if path.is_relative_to(folder / PARTS):
            assert evaluation.load(str(path.relative_to(folder / PARTS).with_suffix(""))) is None
        elif path.name == RUN:
            with pytest.raises(ValueError, match=RUN):
                evaluation.claim({})
        else:
            with pytest.raises(ValueError, match=path.name):
                read_results(folder)


def test_a_teacher_that_reads_otherwise_is_another_run(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "copy")
    load = runner.load_teacher

    def changed(name, **options):
        teacher = load(name, **options)
        teacher.tokenizer.add_tokens("zebra")
        return teacher

    monkeypatch.setattr(runner, "load_teacher", changed)
    with pytest.raises(ValueError, match=r"another run in .*, which differs in teachers\.demo-teacher\.text\.finger"):
        run(folder)


def test_a_teacher_whose_weights_changed_is_another_run(finished, tmp_path, monkeypatch):
    """Under the same name, as after another training in the same folder."""
    folder = shutil.copytree(finished, tmp_path / "copy")
    load = runner.load_teacher

    def changed(name, **options):
        teacher = load(name, **options)
        next(teacher.model.vision_model.parameters()).data.view(-1)[7] += 1e-3
        return teacher

    monkeypatch.setattr(runner, "load_teacher", changed)
    with pytest.raises(ValueError, match=r"another run in .*, which differs in teachers\.demo-teacher\.weights"):
        run(folder)


def test_a_finished_file_that_was_changed_is_not_reported(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    text = (folder / RESULTS).read_bytes()
    (folder / RESULTS).write_bytes(text.replace(b'"image": 1', b'"image": 2', 1))
    with pytest.raises(ValueError, match=rf"{RESULTS}: expected SHA-256 .*run the evaluation again"):
        write_report(folder)


def test_a_run_killed_halfway_and_started_again_gives_the_same_bytes(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    folder, save = tmp_path / "killed", runner.Run.save

    def killed(self, *inputs, **options):
        save(self, *inputs, **options)
        if len(list(folder.glob(f"{PARTS}/*/*.json"))) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(runner.Run, "save", killed)
        assert status_of(forked(lambda: run(folder))) == -signal.SIGKILL
    assert len(list(folder.glob(f"{PARTS}/*/*.json"))) == 3
    assert not (folder / RESULTS).exists()
    assert (folder / RUN).exists()
    run(folder)
    assert (folder / RESULTS).read_bytes() == (finished / RESULTS).read_bytes()


def test_two_processes_give_the_bytes_of_one(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Accelerate warns of several processes without
    folder, options = tmp_path / "two", {"data": ["scenes"], "teachers": [DEMO_TEACHER], "methods": METHODS}

    def work(rank):
        forget_accelerate()
        conditions = {"corruptions": [CLEAN, "contrast"], "severities": [2], "max_images": 14, "allow_chance": True}
        evaluate("custom", output_dir=str(folder), **options, **conditions, **OPTIONS)
        (tmp_path / str(rank)).write_text(str(process_state().num_processes))

    assert processes(2, work) == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["2", "2"]
    assert (folder / RESULTS).read_bytes() == (finished / RESULTS).read_bytes()
    assert (folder / "report.md").exists()


def test_results_of_an_image_do_not_depend_on_its_batch(finished, tmp_path):
    other = run(tmp_path / "other", batch_size=7)
    wanted = {"zero_shot", "mean_views", "recentred_stream"} - {"recentred_stream"}

    def chosen(folder):
        rows = [row for row in lines(folder) if row["method"] in wanted]
        return {(row["corruption"], row["method"], row["image"]): row["top5"] for row in rows}

    assert chosen(other) == chosen(finished)


@pytest.fixture
def damaged(monkeypatch):
    """Of 14 scenes five cannot be read: one, and a whole batch."""
    bad, image = {2, 8, 9, 10, 11}, LabelledImages.image

    def read(self, index):
        if index in bad:
            raise ValueError(f"image {index} of {self.title}: expected an encoded image, got an empty file")
        return image(self, index)

    chosen = list(range(14))
    monkeypatch.setattr(LabelledImages, "image", read)
    monkeypatch.setattr(Cell, "indices", lambda self, num_images: chosen)
    return bad


def test_images_that_cannot_be_read_are_left_out_for_every_method_and_listed(damaged, tmp_path, monkeypatch):
    folder = run(tmp_path / "run", max_unreadable_images=5)
    found = {(line["corruption"], line["method"]): set() for line in lines(folder)}
    for line in lines(folder):
        found[line["corruption"], line["method"]].add(line["image"])
    assert len(found) == 2 * len(METHODS) and all(images == set(range(14)) - damaged for images in found.values())
    skipped = lines(folder, SKIPPED)
    assert [line["image"] for line in skipped] == sorted(damaged)  # once, though two conditions met them
    assert all("got an empty file" in line["reason"] and line["benchmark"] == "scenes" for line in skipped)
    report = write_report(folder)[0].read_text()
    assert f"{len(damaged)} unreadable images, listed in `{SKIPPED}`" in report


def test_more_bad_images_than_the_limit_stop_the_run_and_lose_nothing(damaged, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="^image 2 of .*: expected an encoded image, got an empty file"):
        run(folder)
    with pytest.raises(
        ValueError, match="max_unreadable_images: expected at most 3 unreadable images, got 5, .* image 11 of"
    ):
        run(folder, max_unreadable_images=3)
    there = set(folder.glob(f"{PARTS}/*/*.json"))
    run(folder, max_unreadable_images=5)  # goes on
    assert there and there < set(folder.glob(f"{PARTS}/*/*.json"))


def test_a_folder_that_another_run_writes_is_refused(finished, monkeypatch):
    monkeypatch.setattr(runs, "LOCK_PATIENCE", 0)
    before = (finished / RESULTS).read_bytes()
    with FileLock(finished / runs.LOCK), pytest.raises(ValueError, match="output_dir: expected a folder that no"):
        run(finished)
    assert (finished / RESULTS).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sweeps": [sweep(max_images=13)]}, "sweeps"),
        ({"batch_size": 5}, "batch_size"),
        ({"num_views": 4}, "methods"),
    ],
)
def test_another_runs_folder_is_refused_and_left_alone(finished, changes, named):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"expected an empty folder or the same run.*{named}"):
        run(finished, **changes)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_folder_with_other_things_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="expected an empty folder"):
        run(tmp_path)


def test_a_method_asked_for_twice_under_one_condition_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a method once under the same conditions"):
        run(tmp_path / "x", [sweep(), sweep(methods=("zero_shot",), max_images=3)])
    assert not list((tmp_path / "x").rglob("*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"benchmarks": ()}, "benchmarks: expected one or more"),
        ({"methods": ("zero_shot", "zero_shot")}, "methods: expected one or more different"),
        ({"severities": (0,)}, "severities: expected 1 to 5"),
        ({"max_images": 0}, "max_images"),
        ({"skip_images": -1}, "skip_images"),
        ({"corruptions": "fog"}, "corruptions: expected"),
    ],
)
def test_a_sweep_says_what_is_wrong_with_it(fields, message):
    with pytest.raises(ValueError, match=message):
        sweep(**fields)


def cell(**changes):
    fields = {
        "benchmark": "b", "corruption": CLEAN, "severity": 0, "teacher": "t", "seed": 0, "max_images": None,
        "skip_images": 0, "methods": ("zero_shot",),
    }  # fmt: skip
    return Cell(**{**fields, **changes})


def test_skipped_images_and_kept_ones_make_up_the_data_set():
    first, second = cell(max_images=30).indices(100), cell(skip_images=30).indices(100)
    assert len(first) == 30 and sorted(first + second) == list(range(100))
    assert first != list(range(30))  # drawn: many data sets are sorted by class
    with pytest.raises(ValueError, match="expected more than 100 images"):
        cell(skip_images=100).indices(100)


def test_an_images_seed_depends_on_seed_purpose_and_image_alone():
    seeds = {cell().image_seed(index) for index in range(100)}
    assert len(seeds) == 100 and all(0 <= seed < 2**63 for seed in seeds)
    assert cell(corruption="fog", severity=3).image_seed(7) == cell().image_seed(7)
    assert cell(seed=1).image_seed(7) != cell().image_seed(7) != cell().image_seed(7, "noise")


def test_cells_of_different_sweeps_never_share_a_folder():
    assert cell().folder != cell(max_images=3).folder != cell(methods=("mta",)).folder


def test_labels_of_another_data_set_are_refused(tmp_path, monkeypatch):
    real = runner.load_benchmark

    class Shuffled:
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getattr__(self, name):
            return getattr(self.images, name)

        def label(self, index):
            return (self.images.label(index) + 5) % len(self.images.class_names)

    monkeypatch.setattr(runner, "load_benchmark", lambda *args, **options: Shuffled(real(*args, **options)))
    config = EvaluationConfig(output_dir=str(tmp_path / "x"), data={}, **OPTIONS)
    with pytest.raises(ValueError, match="scenes: "):
        run_evaluation([sweep(methods=("zero_shot",), corruptions=(CLEAN,), max_images=60)], config)


def test_honest_labels_pass_the_same_check(tmp_path):
    config = EvaluationConfig(output_dir=str(tmp_path / "x"), data={}, **OPTIONS)
    run_evaluation([sweep(methods=("zero_shot",), corruptions=(CLEAN,), max_images=60)], config)


def test_peak_memory_sees_what_a_block_takes():
    with PeakMemory(torch.device("cpu")) as nothing:
        pass
    with PeakMemory(torch.device("cpu")) as much:
        held = torch.ones(64 * 2**20)  # 256 MiB
        time.sleep(0.05)
        del held
    assert much.peak_bytes > 200 * 2**20 > nothing.peak_bytes


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def torn():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, torn())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
