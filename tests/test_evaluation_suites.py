"""`apm evaluate`: ready-made evaluations, from the command line to the report."""

import json
import re

import pytest

from apm_hf.assets import DEMO_TEACHER
from apm_hf.commands.main import main
from apm_hf.evaluation.labels import suites
from apm_hf.evaluation.labels.benchmarks import BENCHMARKS
from apm_hf.evaluation.methods.registry import METHODS
from apm_hf.evaluation.plan import Sweep

pytest.importorskip("imagecorruptions")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "smoke"
    assert main(["evaluate", "--suite", "smoke", "--num_views", "4", "--output_dir", str(folder)]) == 0
    return folder


def test_the_smoke_suite_reports_every_method_without_network(smoke):
    text = (smoke / "report.md").read_text()
    asked = {name for sweep in suites.smoke("scenes", ("t",), True) for name in sweep.methods}
    assert asked <= set(re.findall(r"`(\w+)`", text))
    pictures = re.findall(r"!\[.+\]\((.+\.png)\)", text)
    assert len(pictures) == 4 and all((smoke / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_control_of_random_weights_knows_nothing_and_the_teacher_much(smoke):
    rows = [json.loads(line) for line in (smoke / "results.jsonl").read_text().splitlines()]

    def accuracy(method):
        chosen = [row["label"] == row["top5"][0] for row in rows if row["method"] == method and row["severity"] == 0]
        return sum(chosen) / len(chosen)

    assert accuracy("zero_shot") > 0.9 and accuracy("apm_fast") > 0.9
    assert accuracy("apm_random") < 0.4 < accuracy("apm_distilled")


def test_the_results_go_into_a_model_card(smoke):
    from huggingface_hub.repocard_data import model_index_to_eval_results

    index = json.loads((smoke / "model_index.json").read_text())["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "demo-apm" and {result.dataset_name for result in results} == {"Procedural scenes"}
    assert all(result.metric_args["method"] == "apm_distilled_fast" for result in results)


def test_a_suites_methods_can_be_narrowed_and_its_images_limited(tmp_path):
    narrowed = {"methods": ["zero_shot"], "corruptions": ["fog"], "severities": [2], "max_images": 3}
    folder = suites.evaluate("smoke", output_dir=str(tmp_path / "x"), allow_chance=True, **narrowed)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {(row["method"], row["corruption"], row["severity"]) for row in rows} == {
        ("zero_shot", "none", 0),
        ("zero_shot", "fog", 2),
    }
    assert len(rows) == 6 and not (folder / "model_index.json").exists()


def test_a_report_tells_no_path_of_the_computer(smoke):
    for name in ("report.md", "run.json", "results.jsonl"):
        assert str(smoke.parent) not in (smoke / name).read_text()
    assert "--output_dir smoke" in (smoke / "report.md").read_text()


@pytest.mark.parametrize("name", suites.SUITES)
def test_suites_ask_for_what_there_is(name):
    for distilled in (False, True):
        for sweep in suites.SUITES[name]("scenes", ("t",), distilled):
            assert isinstance(sweep, Sweep) and set(sweep.methods) <= set(METHODS)
            assert set(sweep.benchmarks) <= {"scenes", *BENCHMARKS}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "photos", "--teacher", DEMO_TEACHER], "data: expected labelled images"),
        (["--suite", "ood"], "teachers: expected one or more for suite 'ood'"),
        (["--suite", "custom", "--data", "scenes", "--teacher", DEMO_TEACHER], "methods: expected one or more"),
        (["--suite", "smoke", "--methods", "magic"], "methods: expected some of zero_shot"),
        (["--suite", "smoke", "--corruptions", "rain"], "corruptions: expected some of none, .* got rain"),
        (["--suite", "smoke", "--batch_size", "0"], "batch_size: expected a positive number"),
        (["--suite", "photos", "--data", "/nowhere", "--teacher", DEMO_TEACHER], "no file or folder '/nowhere'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_computed(arguments, message, tmp_path, caplog):
    assert main(["evaluate", *arguments, "--output_dir", str(tmp_path / "x")]) == 1
    assert re.search(message, caplog.records[-1].getMessage())
    assert not (tmp_path / "x" / "parts").exists()
