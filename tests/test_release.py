"""What is released beside the package: version, citation, forms, entry points of torch.hub, the script for jobs."""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

import apm_hf
from apm_hf.assets import DEMO_MODEL, DEMO_TEACHER
from apm_hf.data.scenes import SceneDataset

ROOT = Path(__file__).parents[1]
REPOSITORY = re.search(r"^  repository: (\S+)", (ROOT / "mkdocs.yml").read_text(), re.M)[1]


def test_the_citation_has_the_fields_of_its_format_and_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    needed = {"cff-version", "message", "title", "authors"}
    known = needed | {"type", "version", "license", "repository-code", "preferred-citation"}
    assert needed <= set(citation) <= known and citation["cff-version"] == "1.2.0"
    assert citation["version"] == apm_hf.__version__ and citation["repository-code"] == REPOSITORY
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    assert paper["title"] in (ROOT / "README.md").read_text()
    for author in (*citation["authors"], *paper["authors"]):
        assert set(author) in ({"name"}, {"family-names", "given-names"})


def test_the_changelog_has_a_section_for_this_version():
    assert f"\n## {apm_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_forms_have_what_their_format_asks(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown") and field["attributes"]["label"]


def test_torch_hub_loads_the_pair_and_the_model():
    pair = torch.hub.load(str(ROOT), "apm", source="local")
    assert pair.is_embedded and pair.encode(SceneDataset(1)[0]["image"]).shape == (1, pair.feature_size)
    named = torch.hub.load(str(ROOT), "apm", DEMO_MODEL, source="local", teacher=DEMO_TEACHER, device="cpu")
    assert named.teacher is not None and not named.is_embedded
    model = torch.hub.load(str(ROOT), "apm_model", DEMO_MODEL, source="local")
    assert isinstance(model, apm_hf.APMModel) and not model.training


def test_torch_hub_asks_for_what_the_package_needs():
    needed = {re.split(r"[\s<>=;\[]", line)[0] for line in metadata.requires("apm_hf") if "extra ==" not in line}
    modules = {name.replace("-", "_") for name in needed} - {"pillow", "shtab"} | {"PIL"}  # shtab: the command line's
    assert set(runpy.run_path(str(ROOT / "hubconf.py"))["dependencies"]) == modules


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(4):
        SceneDataset(4)[row]["image"].save(folder / f"{row}.png")
    return folder


def test_the_script_for_jobs_installs_from_the_repository_and_distils(photos, tmp_path, monkeypatch, capfd):
    script = ROOT / "examples/jobs/distill.py"
    header = re.search(r"^# /// script\n(.*?)^# ///$", script.read_text(), re.S | re.M)[1]
    wanted = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.M))
    assert wanted["dependencies"] == [f"apm_hf[train,viz] @ git+{REPOSITORY}"]
    arguments = f"--teacher {DEMO_TEACHER} --dataset {photos} --output_dir {tmp_path / 'student'} --max_steps 1"
    arguments += " --batch_size 2 --num_pictures 0 --report_to none --push_to_hub --hub_model_id user/apm"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [str(script), *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 1  # not published: a student of one step is no better than a constant
    assert (tmp_path / "student/model.safetensors").exists(), capfd.readouterr().err


def test_a_job_whose_model_would_be_lost_does_not_begin(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill.py", "--teacher", DEMO_TEACHER])
    with pytest.raises(SystemExit, match="expected --push_to_hub"):
        runpy.run_path(str(ROOT / "examples/jobs/distill.py"), run_name="__main__")


def test_trackio_gets_the_figures_of_a_run(photos, tmp_path, environment):
    """Where it is installed: `pip install trackio`. In its own process, since it reads its folder when imported."""
    pytest.importorskip("trackio")
    arguments = f"--teacher {DEMO_TEACHER} --dataset {photos} --output_dir {tmp_path / 'student'} --max_steps 2"
    arguments += " --batch_size 2 --num_pictures 0 --logging_steps 1 --report_to trackio --json"
    command = [sys.executable, "-m", "apm_hf.commands.main", "distill", *arguments.split()]
    ended = subprocess.run(
        command, env=environment | {"HF_HOME": str(tmp_path / "home")}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    # What trackio prints in between goes to standard error; at exit it prints one more line (0.43).
    assert json.loads(ended.stdout.splitlines()[0])["steps"] == 2
    assert list((tmp_path / "home/trackio").glob("distillation*.db")), ended.stderr
