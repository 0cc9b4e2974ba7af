"""`apm evaluate --task islands`: from the command line to the report."""

import json
import re

import pytest

from apm_hf.cli import main


def test_islands_of_drawn_scenes_are_scored_from_the_command_line(tmp_path, caplog):
    folder = tmp_path / "report"
    methods = ["teacher", "apm", "apm_ttt", "image_shuffled", "random"]
    arguments = ["--max_images", "2", "--map_size", "16", "--ttt_steps", "2", "--methods", *methods]
    assert main(["evaluate", "--task", "islands", "--output_dir", str(folder), *arguments]) == 0
    text = (folder / "report.md").read_text()
    assert "apm evaluate --task islands" in text and "APM, image shuffled" in text
    results = json.loads((folder / "results.json").read_text())
    assert results["settings"]["ttt"]["steps"] == 2 and results["settings"]["map_size"] == 16
    assert str(folder / "report.md") in caplog.text


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
