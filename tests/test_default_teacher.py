"""Which teacher commands take that are given none: from a Hub on 127.0.0.1, its cache, or the package."""

import json
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from apm_hf import load_teacher
from apm_hf.assets import PHOTO_TEACHER
from apm_hf.commands.main import main
from apm_hf.pair import EMBEDDED_NOTE
from apm_hf.teachers import defaults
from fixtures_hub import File, Repository
from fixtures_tiny import photo, save_clip


def serve(hub, task, folder):
    """Put a folder's files on the Hub, under the name of the teacher for a task."""
    name = defaults.HUB_TEACHERS[task]
    repository = hub.repositories["model", name] = Repository(name, "model")
    paths = [path for path in Path(folder).iterdir() if path.is_file()]
    files = {path.name: File(path.read_bytes(), lfs=path.suffix == ".safetensors") for path in paths}
    repository.commit("main", {**files, "pytorch_model.bin": File(b"a pickle", lfs=True)}, "initial commit")
    return name


@pytest.fixture
def picture(tmp_path):
    photo(0, size=(48, 40)).save(tmp_path / "photo.png")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    return str(tmp_path / "photo.png")


def classified(picture, *options):
    labels = Path(picture).with_name("labels.txt")
    return main(["classify", picture, "--labels", str(labels), "--steps", "1", *options])


def test_the_public_teacher_is_fetched_once_said_before_and_then_found_without_a_network(
    hub, picture, tmp_path, caplog, capsys, monkeypatch
):
    save_clip(tmp_path / "clip")
    name = serve(hub, "words", tmp_path / "clip")
    assert classified(picture, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["teacher"] == name and told["note"] is None
    size = sum(path.stat().st_size for path in (tmp_path / "clip").iterdir() if path.suffix != ".bin") / 1e6
    assert f"fetching {name} from {hub.url}, {size:.0f} MB, into " in caplog.text
    assert f"no teacher named: {name} from the Hub; --teacher embedded takes the small one" in caplog.text
    assert not [request for request in hub.requests if "pytorch_model" in request], "a pickle is not fetched"
    hub.requests.clear()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert classified(picture, "--json") == 0
        assert json.loads(capsys.readouterr().out)["teacher"] == name and hub.requests == []


def test_the_embedded_teacher_is_taken_and_said_where_the_hub_is_out_of_reach(
    hub, picture, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert classified(picture) == 0
    printed = capsys.readouterr().out
    assert "the one in this package is taken" in printed and EMBEDDED_NOTE in printed
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["embed", picture, "--output", str(tmp_path / "v.npy"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["teacher"] == "embedded" and told["note"] == EMBEDDED_NOTE and told["feature_size"] == 192


def test_a_name_is_taken_at_its_word_and_the_hub_is_not_asked(hub, picture, capsys):
    assert classified(picture, "--teacher", "embedded", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["teacher"] == "embedded" and told["note"] == EMBEDDED_NOTE and hub.requests == []
    assert load_teacher("embedded").name == PHOTO_TEACHER


def test_a_hub_that_does_not_answer_is_waited_for_briefly(hub, monkeypatch):
    monkeypatch.setattr(defaults, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert defaults.find_on_hub("facebook/dinov2-small") is None


def test_a_repository_without_safetensors_is_not_taken(hub):
    name = defaults.HUB_TEACHERS["vectors"]
    repository = hub.repositories["model", name] = Repository(name, "model")
    repository.commit("main", {"config.json": File(b"{}"), "pytorch_model.bin": File(b"", lfs=True)}, "initial commit")
    assert defaults.default_teacher("vectors") is None


def test_the_teacher_of_locations_has_its_dense_student_in_the_package(hub, shared_dir, picture, tmp_path, capsys):
    name = serve(hub, "locations", shared_dir / "teachers/deit-tiny")
    assert main(["upsample", picture, "--size", "12", "--output", str(tmp_path / "map.safetensors"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["teacher"] == name and told["note"] is None and told["feature_size"] == 192
