"""Runs that are killed, stopped, damaged or started twice: nothing is lost, and the weights are the same to the bit.

Children are forked from this process, which has imported everything, and killed by real signals.
"""

import errno
import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import other as accelerate_files
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import modeling_utils

from apm_hf import APM
from apm_hf.commands.main import main
from apm_hf.distillation import loop
from apm_hf.distillation import recipe as training
from apm_hf.runs import run as runs
from apm_hf.runs import stopping
from apm_hf.runs.checkpoints import Checkpoints, faults, manifest_of, progress_of
from apm_hf.runs.stopping import EXIT_STOPPED, RunStopped
from fixtures_runs import Fatal, damaged_places, forget_accelerate, forked, processes, random_targets, run, status_of
from fixtures_tiny import student


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state between runs of one process; a new process starts without."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Accelerate warns of several processes without
    forget_accelerate()
    # A test run that was started in the background ignores Ctrl-C, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    forget_accelerate()


def go_on(folder, **settings):
    """What a person does with a run that is dead: resume it, or where it has saved nothing yet, start it again."""
    torch.manual_seed(123)  # a new process knows nothing of the old one's generators
    resume = bool(Checkpoints(folder, keep=1).names())
    return run(folder, model=student(seed=5) if resume else None, resume=resume, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run(folder)
    return folder


def assert_same_results(folder, whole):
    for name in ("model.safetensors", "config.json", "metrics.json", "preprocessor_config.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    left = {path.name for path in (*folder.iterdir(), *(folder / "checkpoints").iterdir())}
    assert not any("partial" in name for name in left)


# --- killed -------------------------------------------------------------------------------------------------------


class Moments:
    """Numbers the moments at which files change; at one of them the process kills itself.

    A write has two, before it and halfway; what renames a file or brings it to the disk has one, before it; removing a
    folder has one halfway, too.
    """

    def __init__(self, fatal=None):
        self.fatal, self.names = fatal, []

    def install(self, patch):
        for owner, name in ((accelerate_files, "safe_save_file"), (modeling_utils, "safe_save_file"), (torch, "save")):
            patch.setattr(owner, name, self.write(getattr(owner, name), name, lambda inputs: inputs[1]))
        patch.setattr(Path, "write_text", self.write(Path.write_text, "write_text", lambda inputs: inputs[0]))
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "rename")):
            patch.setattr(owner, name, self.change(getattr(owner, name), name))
        patch.setattr(shutil, "rmtree", self.remove(shutil.rmtree))
        return self

    def passed(self, name, half=None):
        self.names.append(name)
        if len(self.names) - 1 == self.fatal:
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def change(self, function, name):
        def changed(*inputs, **options):
            self.passed(name if isinstance(inputs[0], int) else f"{name} {Path(inputs[0]).name}")
            return function(*inputs, **options)

        return changed

    def write(self, function, name, file_of):
        def written(*inputs, **options):
            path = Path(file_of(inputs))
            self.passed(f"{name} {path.name}: before")
            result = function(*inputs, **options)
            self.passed(f"{name} {path.name}: halfway", lambda: os.truncate(path, path.stat().st_size // 2))
            return result

        return written

    def remove(self, function):
        def removed(path, *inputs, **options):
            if path.is_dir():
                self.passed(f"rmtree {path.name}: before")
                self.passed(f"rmtree {path.name}: halfway", lambda: next(path.iterdir()).unlink())
            return function(path, *inputs, **options)

        return removed


@pytest.fixture(scope="module")
def begun(whole, tmp_path_factory):
    """The folder of a run that was killed after its first checkpoint."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    child = forked(lambda: run(folder, data=Fatal(random_targets(20), 50)))  # controls read all 20 first
    assert status_of(child) == -signal.SIGKILL
    assert Checkpoints(folder, keep=1).names() == ["step_00000002"]
    return folder


def test_killed_at_any_change_of_a_file_a_run_ends_as_one_never_killed(whole, begun, tmp_path):
    """One checkpoint stays: each new one is written, renamed, and the old one removed, before the model is saved."""
    folder = tmp_path / "recorded"
    shutil.copytree(begun, folder)
    with pytest.MonkeyPatch.context() as patch:
        recorded = Moments().install(patch)
        go_on(folder, keep_checkpoints=1)
    assert_same_results(folder, whole)
    places = {name: moment for moment, name in enumerate(recorded.names)}  # the last of each name
    kinds = sorted({name.split()[0] for name in places})
    assert kinds == ["fsync", "rename", "replace", "rmtree", "safe_save_file", "save", "write_text"]
    chosen = {moment for name, moment in places.items() if not name.startswith(("fsync", "replace"))}
    rest = sorted(set(range(len(recorded.names))) - chosen)
    chosen |= {*random.Random(0).sample(rest, 6), len(recorded.names) - 2, len(recorded.names) - 1}
    assert len(chosen) >= 20
    for moment in sorted(chosen):
        folder = tmp_path / str(moment)
        shutil.copytree(begun, folder)

        def killed(folder=folder, moment=moment):
            with pytest.MonkeyPatch.context() as patch:
                Moments(moment).install(patch)
                go_on(folder, keep_checkpoints=1)

        assert status_of(forked(killed)) == -signal.SIGKILL, recorded.names[moment]
        assert not any(faults(folder / "checkpoints" / name) for name in Checkpoints(folder, keep=1).names())
        if (folder / "config.json").exists():  # then it is a model, and the whole of it
            assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        go_on(folder, keep_checkpoints=1)
        assert_same_results(folder, whole)


def test_killed_again_and_again_at_random_times_a_run_ends_as_one_never_killed(whole, tmp_path):
    seconds, folder, killed = random.Random(0), tmp_path / "run", 0
    while killed < 10:
        child = forked(lambda: go_on(folder))
        time.sleep(seconds.uniform(0.02, 0.6))
        os.kill(child, signal.SIGKILL)
        if status_of(child) == 0:  # it was at its end
            assert_same_results(folder, whole)
            shutil.rmtree(folder)
        else:
            killed += 1
    go_on(folder)
    assert_same_results(folder, whole)


# --- damaged ------------------------------------------------------------------------------------------------------


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


FILES = ["manifest.json", "model.safetensors", "optimizer.bin", "progress.json", "random_states_0.pkl"]


@pytest.fixture
def two(whole, tmp_path):
    """A run's folder with the checkpoints of its steps 4 and 6."""
    folder = tmp_path / "two"
    shutil.copytree(whole / "checkpoints", folder / "checkpoints")
    return folder


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flipped", "truncated", "deleted"])
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_named_and_the_checkpoint_before_is_used(two, caplog, name, damage):
    checkpoints = Checkpoints(two, keep=2)
    last = two / "checkpoints" / checkpoints.names()[-1]
    assert sorted(path.name for path in last.iterdir()) == FILES
    assert checkpoints.newest() == last and not caplog.records
    size = (last / name).stat().st_size
    damage(last / name)
    assert checkpoints.newest().name == "step_00000004"
    (record,) = caplog.records
    text = record.getMessage()
    assert "step_00000006 is damaged" in text and f"{name}: expected" in text and "found" in text
    if damage is truncate and name != "manifest.json":
        assert f"expected {size} bytes, found {size - 1}" in text


def test_every_byte_of_a_manifest_counts(two):
    path = two / "checkpoints/step_00000006" / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert faults(path.parent), position
    path.write_bytes(content)
    assert not faults(path.parent)
    manifest = manifest_of(path.parent)
    assert manifest["step"] == 6 and manifest["num_processes"] == 1 and "torch" in manifest["versions"]
    assert manifest["files"]["optimizer.bin"]["size"] == (path.parent / "optimizer.bin").stat().st_size


def test_damage_to_any_file_of_a_finished_run_is_found(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != runs.LOCK]
    assert {"manifest.json", "metrics.json", "speed.json", "config.json"} < {path.name for path in files}
    assert not runs.manifest_faults(folder)
    for path in damaged_places(files):
        found = faults(path.parent) if path.parent.name.startswith("step_") else runs.manifest_faults(folder)
        assert any(path.name in fault for fault in found), path


def test_a_damaged_model_is_said_when_it_is_loaded(whole, tmp_path, caplog):
    folder = shutil.copytree(whole, tmp_path / "run")
    APM.load(folder)
    assert not caplog.records
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    APM.load(folder)
    (record,) = caplog.records
    assert "model.safetensors: expected SHA-256" in record.getMessage() and "damaged, or was" in record.getMessage()


def test_a_copy_that_a_person_made_of_a_checkpoint_is_not_gone_on_from(two):
    checkpoints = Checkpoints(two, keep=2)
    for name in ("step_00000004_copy", "step_best", "step_00000004 (1)"):
        shutil.copytree(checkpoints.folder / "step_00000004", checkpoints.folder / name)
    assert checkpoints.names() == ["step_00000004", "step_00000006"] and checkpoints.newest().name == "step_00000006"


def test_a_run_with_a_damaged_checkpoint_ends_as_one_without(whole, two, caplog):
    flip(two / "checkpoints/step_00000006/optimizer.bin")
    caplog.set_level(logging.INFO, logger="apm_hf")
    go_on(two)
    assert "resumed from step_00000004" in caplog.text
    assert_same_results(two, whole)
    assert not any(faults(two / "checkpoints" / name) for name in Checkpoints(two, keep=2).names())


def test_no_whole_checkpoint_is_an_error_that_says_why(two):
    for name in Checkpoints(two, keep=2).names():
        (two / "checkpoints" / name / "progress.json").unlink()
    with pytest.raises(ValueError, match="2 damaged; of step_00000004: progress.json: expected a file, found No such"):
        run(two, resume=True)


def test_those_kept_are_whole_ones(two, caplog):
    class Nothing:
        is_main_process, num_processes = True, 1

        def wait_for_everyone(self):
            pass

        def save_state(self, folder):
            Path(folder).mkdir(parents=True)
            (Path(folder) / "state").write_text("state")

    checkpoints = Checkpoints(two, keep=2)
    truncate(two / "checkpoints/step_00000006/model.safetensors")
    checkpoints.save(Nothing(), 8, {"step": 8})
    assert checkpoints.names() == ["step_00000004", "step_00000008"]
    assert "step_00000006 is damaged and removed: model.safetensors: expected" in caplog.text
    checkpoints.save(Nothing(), 10, {"step": 10})
    assert checkpoints.names() == ["step_00000008", "step_00000010"]
    assert progress_of(checkpoints.newest()) == {"step": 10}


# --- stopped ------------------------------------------------------------------------------------------------------


FULL = {
    "model.safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "optimizer.bin": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "random_states_0.pkl": OSError(errno.ENOSPC, "No space left on device"),
}  # what the libraries said on a file system of 200 kB


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_message_and_the_checkpoint_before_stays(two, name, tmp_path):
    def save_state(folder):
        Path(folder).mkdir()
        Path(folder, name).write_bytes(b"half of it")
        raise FULL[name]

    accelerator = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, save_state=save_state)
    before = sorted(path for path in two.rglob("*") if path.is_file())
    with pytest.raises(
        OSError, match=r"^checkpoint step_00000008: cannot write it to .*MiB are free: .*; step_0*6 is"
    ):
        Checkpoints(two, keep=2).save(accelerator, 8, {})
    assert sorted(path for path in two.rglob("*") if path.is_file()) == before
    assert not any(faults(path) for path in two.glob("checkpoints/*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_to_the_same_bits(whole, tmp_path, number):
    folder = tmp_path / "run"
    told = Fatal(random_targets(20), 61, lambda: os.kill(os.getpid(), number))  # in the fourth step
    assert status_of(forked(lambda: run(folder, data=told, checkpoint_steps=0))) == EXIT_STOPPED == 75
    assert Checkpoints(folder, keep=1).names() == ["step_00000004"]
    assert not (folder / "model.safetensors").exists()
    go_on(folder)
    assert_same_results(folder, whole)


def test_what_was_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping.StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
    assert requests.received is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_second_ctrl_c_interrupts_at_once_and_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stopping.StopRequests() as requests:
        assert requests.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.received == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_command_ends_with_the_status_and_says_how_to_go_on(monkeypatch, caplog):
    def stopped(*inputs, **options):
        raise RunStopped("stopped by SIGTERM, saved after step 3")

    monkeypatch.setattr(training, "train", stopped)
    assert main(["distill", "--teacher", "a", "--dataset", "b", "--output_dir", "c"]) == EXIT_STOPPED
    (record,) = caplog.records
    assert record.getMessage().startswith("apm distill: stopped by SIGTERM, saved after step 3; with --resume")


# --- two writers --------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "LOCK_PATIENCE", 0)
    folder, ready = tmp_path / "run", tmp_path / "ready"

    def write():
        ready.touch()
        time.sleep(60)

    child = forked(lambda: run(folder, data=Fatal(random_targets(20), 40, write), statistics_images=0))
    try:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        before = Checkpoints(folder, keep=1).names()
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match="output_dir: expected a folder that no other run writes, got"):
                run(folder, **options)
        assert Checkpoints(folder, keep=1).names() == before == ["step_00000002"]
    finally:
        os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL
    assert run(folder, resume=True, statistics_images=0).output_dir == folder


# --- a folder that holds something -----------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_refused_unless_it_is_resumed_or_overwritten(begun, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="which holds checkpoints.*; --resume goes on with a run, --overwrite repl"):
        run(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="expected one of them, got both"):
        run(folder, resume=True, overwrite=True)


def test_a_run_that_is_replaced_stays_until_the_new_one_has_saved_something(begun, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    (folder / "notes.txt").write_text("a person's")
    child = forked(lambda: run(folder, overwrite=True, data=Fatal(random_targets(20), 2), checkpoint_steps=50))
    assert status_of(child) == -signal.SIGKILL
    previous = Checkpoints(folder / "previous", keep=1)
    assert previous.names() == ["step_00000002"] and not faults(previous.folder / "step_00000002")
    with pytest.raises(FileNotFoundError, match="found no checkpoint in .*; the run before it lies in previous"):
        run(folder, resume=True)
    assert run(folder, overwrite=True).output_dir == folder
    assert not (folder / "previous").exists() and (folder / "notes.txt").read_text() == "a person's"


def test_fewer_steps_than_are_done_are_refused(begun):
    with pytest.raises(ValueError, match="max_steps: expected at least the 2 steps that are done, got 1"):
        run(begun, resume=True, max_steps=1)


def test_a_stray_file_among_the_checkpoints_does_no_harm(begun, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    for name in ("step_00000099", "step_00000004", "step_00000050.partial"):
        (folder / "checkpoints" / name).write_text("stray")
    go_on(folder)
    for name in ("model.safetensors", "metrics.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


# --- otherwise than it began ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"data": random_targets(21)}, "num_images 20 -> 21"),
        ({"data": random_targets(20).shuffled(seed=3)}, "other images"),
        ({"model": student(position_size=32)}, "student.position_size 16 -> 32"),
        ({"processor": {"do_min_max": True}}, "image_processor.do_min_max .* -> True"),
        ({"statistics": "scalar", "seed": 2}, "statistics channel -> scalar"),
    ],
    ids=["seed", "number of images", "images", "student", "image processor", "statistics"],
)
def test_what_makes_it_another_run_is_refused(begun, changes, message):
    with pytest.raises(ValueError, match=f"resume: expected what the run began with, got .*{message}"):
        run(begun, resume=True, **changes)


def test_other_settings_are_said_and_take_effect(begun, tmp_path, caplog):
    shutil.copytree(begun, tmp_path / "run")
    seen, schedule = [], loop.get_cosine_schedule_with_warmup
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loop, "get_cosine_schedule_with_warmup", lambda *a, **b: seen.append(schedule(*a, **b)) or seen[-1]
        )
        run(tmp_path / "run", resume=True, learning_rate=2e-2, batch_size=2, max_steps=3)
    assert "batch_size 4 -> 2" in caplog.text and "learning_rate 0.01 -> 0.02" in caplog.text
    assert seen[-1].base_lrs == [2e-2] and seen[-1].last_epoch == 3 and seen[-1].get_last_lr() == [2e-2]


def test_two_processes_stop_at_the_same_step_and_any_number_goes_on(whole, tmp_path, caplog):
    """Two processes of 4 images a pass take what one takes in two passes; 20 images are two rounds and a half."""
    data = random_targets(16)
    both = {"gradient_accumulation_steps": 1, "statistics_images": 0}
    run(tmp_path / "one", data=data, statistics_images=0)
    assert processes(2, lambda rank: run(tmp_path / "two", data=data, **both)) == [0, 0]

    def told(rank):
        rows = data if rank == 0 else Fatal(data, 14, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(tmp_path / "cut", data=rows, checkpoint_steps=0, **both)

    assert processes(2, told) == [EXIT_STOPPED, EXIT_STOPPED]
    (name,) = Checkpoints(tmp_path / "cut", keep=1).names()
    manifest = manifest_of(tmp_path / "cut/checkpoints" / name)
    assert manifest["num_processes"] == 2 and {"random_states_0.pkl", "random_states_1.pkl"} <= set(manifest["files"])
    shutil.copytree(tmp_path / "cut", tmp_path / "changed")
    assert processes(2, lambda rank: run(tmp_path / "cut", data=data, resume=True, **both)) == [0, 0]
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    run(tmp_path / "changed", data=data, resume=True, statistics_images=0)
    assert "num_processes 2 -> 1" in caplog.text and "gradient_accumulation_steps 1 -> 2" in caplog.text
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "changed")]
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "changed")]
    assert [row["step"] for row in metrics[0]] == [0, 3, 6, 7]
    for uninterrupted, changed in zip(*metrics, strict=True):
        assert changed == pytest.approx(uninterrupted, abs=1e-5)
    for other in ends[1:]:
        assert max((other[name] - weight).abs().max().item() for name, weight in ends[0].items()) < 1e-5
