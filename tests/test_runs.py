"""The output folder of long work: claimed by one run, its parts verified, nothing of another run in it."""

import json
import os

import pytest
import torch
from safetensors.torch import save
from torch import nn

from apm_hf.runs.files import write_atomically
from apm_hf.runs.identity import images_digest, weights_digest
from apm_hf.runs.processes import process_state
from apm_hf.runs.run import LOCK, MANIFEST, PREVIOUS, RUN, Run, check_manifest, differences, own_folder
from fixtures_runs import damaged_places, forget_accelerate

IDENTITY = {"teachers": {"clip": {"weights": "abc", "image_size": 224}}, "methods": ["a", "b"]}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


def finished(folder):
    """A run with three parts, tensors beside one of them, and a finished file."""
    run = Run(folder, process_state())
    with run.locked():
        run.claim(IDENTITY, facts={"command": "apm evaluate"})
        for number in range(3):
            tensors = save({"embeds": torch.arange(6.0)}) if number == 1 else None
            run.save(f"cell/{number:06d}", {"lines": f"line {number}\n", "numbers": [number, 0.1]}, tensors=tensors)
        write_atomically(folder / "results.jsonl", "line 0\nline 1\nline 2\n")
        run.finish(("results.jsonl", "missing.jsonl"))
    return run


def test_parts_are_read_as_they_were_written_and_a_run_goes_on(tmp_path):
    run = finished(tmp_path / "run")
    again = Run(run.folder, process_state())
    with again.locked():
        again.claim(IDENTITY)
        assert again.load("cell/000001") == {"lines": "line 1\n", "numbers": [1, 0.1]}
        assert again.load("cell/000009") is None
    told = json.loads((run.folder / RUN).read_text())
    assert told["command"] == "apm evaluate" and told["identity"] == IDENTITY and "torch" in told["versions"]
    check_manifest(run.folder)


def test_any_damage_to_any_file_is_found(tmp_path, caplog):
    """One bit at 200 random places of all files but the lock, which is empty."""
    run = finished(tmp_path / "run")
    files = [path for path in sorted(run.folder.rglob("*")) if path.is_file() and path.name != LOCK]
    assert len(files) == 3 + 1 + 3  # parts, tensors; run.json, manifest.json, results.jsonl
    for path in damaged_places(files):
        if path.name in (RUN, MANIFEST, "results.jsonl"):
            with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
                run.claim(IDENTITY)
                check_manifest(run.folder)
        else:
            caplog.clear()
            assert run.load(f"cell/{path.stem}") is None and "is damaged and computed again" in caplog.text
    assert all(run.load(f"cell/{number:06d}") is not None for number in range(3))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"teachers": {"clip": {"weights": "abd", "image_size": 224}}}, r"differs in teachers\.clip\.weights$"),
        ({"methods": ["a"]}, r"differs in methods \(expected \['a'\], got \['a', 'b'\]\)"),
        ({"batch_size": 3}, r"differs in batch_size \(expected 3, got None\)"),
    ],
    ids=["weights", "methods", "new"],
)
def test_another_run_is_refused_with_all_that_differs(tmp_path, changed, named):
    run = finished(tmp_path / "run")
    with pytest.raises(ValueError, match=named):
        run.claim(IDENTITY | changed)


def test_a_folder_with_other_things_is_refused_and_hidden_files_are_no_things(tmp_path):
    (tmp_path / ".DS_Store").write_text("")
    run = Run(tmp_path, process_state())
    run.claim(IDENTITY)
    (tmp_path / RUN).unlink()
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="expected an empty folder or an earlier run to resume"):
        run.claim(IDENTITY)


def test_what_is_replaced_is_set_aside_also_in_two_goes(tmp_path):
    run = Run(tmp_path, process_state())
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text(f"old {name}")
    (tmp_path / "notes.txt").write_text("a person's")
    with pytest.raises(ValueError, match="holds config.json, model.safetensors; --resume goes on"):
        run.set_aside(("config.json", "model.safetensors", "metrics.json"), overwrite=False)
    run.set_aside(("config.json",), overwrite=True)  # as a process that was killed in between
    run.set_aside(("config.json", "model.safetensors"), overwrite=True)
    assert {path.name for path in (tmp_path / PREVIOUS).iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {PREVIOUS, "notes.txt"}
    (tmp_path / PREVIOUS / "diary.txt").write_text("a person's, too")
    run.forget_previous(("config.json", "model.safetensors", "metrics.json"))
    assert [path.name for path in (tmp_path / PREVIOUS).iterdir()] == ["diary.txt"]
    (tmp_path / PREVIOUS / "diary.txt").unlink()
    run.forget_previous(("config.json",))
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}


def test_an_output_folder_is_neither_the_teacher_s_nor_the_data_s_nor_within(tmp_path):
    (tmp_path / "photos").mkdir()
    for folder in ("photos", "photos/run", "photos/../photos"):
        with pytest.raises(ValueError, match="which lies in the folder of --dataset"):
            own_folder(tmp_path / folder, dataset=tmp_path / "photos", teacher="org/clip")
    own_folder(tmp_path / "photos-run", dataset=tmp_path / "photos", teacher=None)
    own_folder(tmp_path, dataset=tmp_path / "photos")
    with pytest.raises(ValueError, match="folder of --data"):
        own_folder(tmp_path / "photos", data=["scenes", str(tmp_path / "photos")])
    for empty in ("", " "):
        with pytest.raises(ValueError, match="output_dir: expected a folder, got"):
            own_folder(empty, dataset=tmp_path / "photos")


def test_weights_are_known_by_every_number_their_names_and_types():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    before = weights_digest(module)
    assert weights_digest(module) == before
    module[0].weight.data[29, 39] += 1e-6
    assert weights_digest(module) != before
    in_half = weights_digest(module, dtype=torch.bfloat16)
    assert weights_digest(module.to(torch.bfloat16), dtype=torch.bfloat16) == in_half != weights_digest(module.float())


def test_images_are_known_by_their_bytes_wherever_they_lie(tmp_path):
    (tmp_path / "a").write_bytes(b"start" + b"-" * 10_000 + b"end")
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes())
    rows = [[{"image": {"path": str(tmp_path / name), "bytes": None}}] for name in "ab"]
    rows.append([{"image": {"path": "elsewhere", "bytes": (tmp_path / "a").read_bytes()}}])
    assert len({images_digest(one, "image") for one in rows}) == 1
    (tmp_path / "b").write_bytes(b"start" + b"-" * 10_000 + b"END")
    assert images_digest(rows[0], "image") != images_digest(rows[1], "image")
    assert images_digest(rows[0], "image") != images_digest(rows[0] * 2, "image")
    os.mkfifo(tmp_path / "pipe")  # nobody waits for one
    assert images_digest([{"image": str(tmp_path / "pipe")}], "image")


def test_differences_name_digests_alone_and_values_in_full():
    there, wanted = {"a": {"fingerprint": "x", "n": 1}}, {"a": {"fingerprint": "y", "n": 2}}
    assert differences(there, wanted) == ["a.fingerprint", "a.n (expected 2, got 1)"]
    assert differences(there, there) == []
