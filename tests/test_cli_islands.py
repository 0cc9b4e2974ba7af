"""`apm evaluate --task islands`: from the command line to the report."""

import json
import re

import pytest

from apm_hf.assets import DEMO_TEACHER
from apm_hf.commands import evaluate
from apm_hf.commands.main import main


def test_islands_of_drawn_scenes_are_scored_from_the_command_line(few_pixels, tmp_path, caplog, capfd):
    folder = tmp_path / "report"
    methods = ["teacher", "apm", "random"]  # a shuffled control costs as many probes as it has repetitions
    arguments = ["--max_images", "4", "--map_size", "16", "--ttt_steps", "2", "--methods", *methods]
    assert main(["evaluate", "--task", "islands", "--output_dir", str(folder), *arguments, "--json"]) == 0
    text = (folder / "report.md").read_text()
    assert "apm evaluate --task islands" in text and "random segments" in text
    results = json.loads((folder / "results.json").read_text())
    assert results["settings"]["ttt"]["steps"] == 2 and results["settings"]["map_size"] == 16
    assert str(folder / "report.md") in caplog.text
    told = json.loads(capfd.readouterr().out)
    assert set(told) == set(evaluate.RESULT) and told["report"] == str(folder / "report.md")
    assert told["scores"] == results["data"] and set(told["scores"]["scenes"]["rows"]) == set(methods)


def test_accuracies_of_drawn_scenes_are_one_json_object(tmp_path, capfd):
    arguments = ["--suite", "custom", "--data", "scenes", "--teacher", DEMO_TEACHER, "--methods", "zero_shot"]
    folder = tmp_path / "report"
    assert main(["evaluate", "--output-dir", str(folder), *arguments, "--max_images=8", "--json", "-q"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert set(told) == set(evaluate.RESULT) and told["task"] == "zero-shot"
    (score,) = told["scores"]
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert score["images"] == len(rows) == 8 and score["method"] == "zero_shot" and score["corruption"] == "none"
    assert score["top1"] == sum(row["label"] == row["top5"][0] for row in rows) / 8
    assert score["low"] <= score["top1"] <= score["high"]
    assert all(key in evaluate.RESULT["scores"] for key in score)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "islands", "--suite", "photos"], "--task islands: expected no --suite, which is of another task"),
        (["--segments", "3"], "--task zero-shot: expected no --segments, which is of another task"),
        (["--task", "islands", "--teacher", "a", "b"], r"--teacher: expected one, got \['a', 'b'\]"),
        (["--task", "islands", "--methods", "magic"], "methods: expected some of teacher"),
        (["--task", "islands", "--data", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_does_not_go_together_is_one_line(arguments, message, tmp_path, caplog):
    assert main(["evaluate", "--output_dir", str(tmp_path), *arguments]) == 1
    assert len(caplog.records[-1].getMessage().splitlines()) <= 3
    assert re.search(message, caplog.records[-1].getMessage())
