"""Reports of made-up runs whose truth is known: figures against naive recomputation from the lines."""

import io
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from huggingface_hub import ModelCardData
from PIL import Image

from apm_hf.evaluation.plots import Panels, _styles, draw_severity
from apm_hf.evaluation.report import _by_severity, eval_results, write_model_index, write_report
from apm_hf.evaluation.results import read_results
from apm_hf.evaluation.statistics import mean_interval, paired_interval

SCENES = [("none", 0), ("gaussian_noise", 1), ("gaussian_noise", 5), ("jpeg", 1), ("jpeg", 5)]
METHODS = {"teacher": None, "copy": "teacher", "apm": "teacher"}
NUM_IMAGES, NUM_CLASSES, SEEDS = 40, 8, (0, 1)


def make_rows():
    """Lines of one benchmark: `copy` answers as the teacher does, `apm` is right more often and has steps."""
    generator, rows = np.random.default_rng(0), []
    for corruption, severity in SCENES:
        for seed in SEEDS:
            for image in generator.permutation(NUM_IMAGES).tolist():
                label = image % NUM_CLASSES
                chance = generator.random()
                for method in METHODS:
                    right = chance < (0.8 - 0.1 * severity + 0.15 * (method == "apm"))
                    top5 = [(label + shift + (not right)) % NUM_CLASSES for shift in range(5)]
                    if method == "apm" and not right:
                        top5[4] = label
                    row = {
                        "benchmark": "shapes",
                        "corruption": corruption,
                        "severity": severity,
                        "teacher": "org/tiny",
                        "seed": seed,
                        "method": method,
                        "image": image,
                        "label": label,
                        "top5": top5,
                        "confidence": round(0.3 + 0.6 * chance, 6),
                    }
                    if method == "apm":
                        row["steps"] = 3
                        row["by_step"] = {"1": (label + 1) % 8, "2": label if image % 4 else 9, "3": top5[0]}
                        if image == 7:  # went on for longer than others: step 4 is not common to all
                            row["by_step"]["4"] = label
                    rows.append(row)
    return rows


def make_costs(rows):
    names = ("benchmark", "corruption", "severity", "teacher", "seed", "method")
    cells = dict.fromkeys(tuple(row[name] for name in names) for row in rows)
    costs = []
    for number, cell in enumerate(cells):
        cell = dict(zip(names, cell, strict=True))
        factor = list(METHODS).index(cell["method"]) + 1
        costs.append(cell | {"images": 30, "seconds": 0.3 * factor, "peak_bytes": factor * 2**20})
        costs.append(cell | {"images": 10, "seconds": 0.2 * factor, "peak_bytes": factor * 2**21 + number})
    return costs


INFO = {
    "command": "apm evaluate --suite made-up",
    "commit": "abc",
    "computer": "none",
    "versions": {"torch": "2"},
    "methods": {
        name: {"title": name.capitalize(), "baseline": baseline, "num_views": 1, "options": {}}
        for name, baseline in METHODS.items()
    },
    "benchmarks": {"shapes": {"title": "Shapes", "num_classes": NUM_CLASSES, "num_images": NUM_IMAGES}},
    "teachers": ["org/tiny"],
}


def write_run(folder: Path, rows, costs=None, info=INFO) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("results", rows), ("costs", make_costs(rows) if costs is None else costs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def reported(rows, tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"), rows)
    assert write_report(folder)[0] == folder / "report.md"
    return folder


def tables(folder: Path) -> list[dict[str, dict[str, str]]]:
    """Tables of a report: row name -> column -> cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", (folder / "report.md").read_text(), flags=re.M):
        header, _, *lines = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        found.append({line[0]: dict(zip(header, line, strict=True)) for line in lines})
    return found


def pick(rows, **wanted):
    return [row for row in rows if all(row[key] in np.atleast_1d(value) for key, value in wanted.items())]


def percent(values):
    return f"{100 * np.mean(values):.1f}"


def right(rows):
    return [row["top5"][0] == row["label"] for row in rows]


def place(row):
    return row["corruption"], row["severity"], row["seed"], row["image"]


def leading(cell: str) -> str:
    return cell.split(" ")[0]


DIFFERENCE, ORACLE = "difference to its baseline, points", "oracle step (unattainable)"
CORRUPTED = ["gaussian_noise", "jpeg"]


def test_clean_figures_are_those_of_counting_lines(reported, rows):
    table = tables(reported)[1]
    assert list(table) == ["Teacher", "Copy", "Apm"]
    for method in METHODS:
        clean, line = pick(rows, corruption="none", method=method), table[method.capitalize()]
        assert line["top-1, %"] == percent(right(clean))
        assert leading(line["top-5, %"]) == percent([row["label"] in row["top5"] for row in clean])
        bins = {}
        for row, is_right in zip(clean, right(clean), strict=True):
            bins.setdefault(int(np.ceil(row["confidence"] * 15)), []).append(is_right - row["confidence"])
        assert leading(line["ECE, %"]) == percent(sum(abs(sum(gaps)) for gaps in bins.values()) / len(clean))
        factor = list(METHODS).index(method) + 1
        assert line["s/image"] == f"{0.5 * factor / 40:.3g}" and line["peak, MiB"] == str(2 * factor)
        assert line["images"] == "40 x 2 seeds"
        interval = mean_interval(right(clean), groups=[row["image"] for row in clean])
        assert line["95 % interval"] == f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def test_differences_are_paired_by_image_and_zero_for_a_copy(reported, rows):
    clean, corrupted = tables(reported)[1:3]
    assert clean["Copy"][DIFFERENCE] == corrupted["Copy"][DIFFERENCE] == "+0.0 [+0.0, +0.0]"
    assert clean["Teacher"][DIFFERENCE] == "–"
    for table, scenes in ((clean, "none"), (corrupted, CORRUPTED)):
        ours = sorted(pick(rows, corruption=scenes, method="apm"), key=place)
        theirs = sorted(pick(rows, corruption=scenes, method="teacher"), key=place)
        interval = paired_interval(right(ours), right(theirs), groups=[row["image"] for row in ours])
        low, high = (f"{100 * bound:+.1f}" for bound in (interval.low, interval.high))
        assert table["Apm"][DIFFERENCE] == f"{100 * interval.mean:+.1f} [{low}, {high}]"
        assert interval.mean > 0.05


def test_corruption_tables_are_means_over_severities_and_over_corruptions(reported, rows):
    by_corruption, by_severity = tables(reported)[2:4]
    for method in METHODS:
        line = by_corruption[method.capitalize()]
        for corruption in CORRUPTED:
            expected = right(pick(rows, corruption=corruption, method=method))
            assert leading(line[corruption.replace("_", " ")]) == percent(expected)
        everything = percent(right(pick(rows, corruption=CORRUPTED, method=method)))
        assert leading(line["mean"]) == leading(by_severity[method.capitalize()]["mean"]) == everything
        for severity in (1, 5):
            expected = right(pick(rows, severity=severity, method=method))
            assert leading(by_severity[method.capitalize()][f"severity {severity}"]) == percent(expected)


def test_the_oracle_takes_the_best_step_that_all_images_have(reported, rows):
    for table, scenes in zip(tables(reported)[1:3], ("none", CORRUPTED), strict=True):
        chosen = pick(rows, corruption=scenes, method="apm")
        by_step = {step: np.mean([row["by_step"][step] == row["label"] for row in chosen]) for step in "123"}
        best = max(by_step, key=by_step.get)
        cell = table["Apm"][ORACLE]
        assert leading(cell) == percent(by_step[best]) and cell.endswith(f" at {best}")
        assert table["Teacher"][ORACLE] == "–"
    assert {table["Apm"][ORACLE][-1] for table in tables(reported)[1:3]} == {"2", "3"}


def test_figures_from_few_images_show_their_interval_and_those_from_many_do_not(reported, tmp_path):
    interval = re.compile(r"^\d+\.\d \[\d+\.\d, \d+\.\d\]")
    shares = [line[name] for line in tables(reported)[2].values() for name in ("jpeg", "mean")]
    assert all(interval.match(cell) for cell in shares)
    few = [row for row in make_rows() if row["corruption"] == "jpeg" and row["seed"] == 0]
    many = [row | {"image": row["image"] + 40 * copy} for row in few for copy in range(13)]
    table = tables(write_reported(tmp_path, many))[1]
    assert re.fullmatch(r"\d+\.\d", table["Apm"]["jpeg"]) and "[" in table["Apm"][DIFFERENCE]


def write_reported(folder, rows, **options):
    write_report(write_run(folder, rows, **options))
    return folder


def test_lines_in_another_order_and_settings_of_matplotlib_change_no_byte(reported, rows, tmp_path):
    generator = np.random.default_rng(1)
    costs = make_costs(rows)
    write_run(tmp_path, [rows[i] for i in generator.permutation(len(rows))])
    (tmp_path / "costs.jsonl").write_text(
        "".join(json.dumps(costs[i]) + "\n" for i in generator.permutation(len(costs)))
    )
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "savefig.dpi": 30}):
        paths = write_report(tmp_path)
    names = ["report.md", *(f"{kind}_shapes.png" for kind in ("severity", "steps", "cost", "reliability"))]
    assert [path.name for path in paths] == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (reported / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*names, "results.jsonl", "costs.jsonl", "run.json"]
    )


def test_the_report_shows_every_picture_and_what_was_run(reported):
    text = (reported / "report.md").read_text()
    for path in reported.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 300 and picture.info.keys() <= {"dpi"}
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20  # not blank
        assert f"]({path.name})" in text
    for fact in (INFO["command"], "abc", "torch 2", "Teacher: tiny", "Shapes"):
        assert fact in text


def test_several_benchmarks_and_teachers_stand_side_by_side(rows, tmp_path):
    clean = pick(rows, corruption="none", seed=0)
    other = [row | {"benchmark": "user/other set", "top5": [row["label"]]} for row in clean if row["image"] < 20]
    info = INFO | {"benchmarks": INFO["benchmarks"] | {"user/other set": {"title": "Other", "num_classes": 3}}}
    folder = write_reported(tmp_path, [*clean, *other, *(row | {"teacher": "b"} for row in clean)], info=info)
    shift, shapes, others = tables(folder)[2:5]  # after the table of methods and that of teacher "b"
    expected = {name: np.mean(right(pick(clean, method=name))) for name in METHODS}
    for method, accuracy in expected.items():
        line = shift[method.capitalize()]
        assert leading(line["Shapes"]) == shapes[method.capitalize()]["top-1, %"] == f"{100 * accuracy:.1f}"
        assert leading(line["Other"]) == "100.0"
        assert leading(line["mean"]) == f"{50 * accuracy + 50:.1f}"  # benchmarks count alike, whatever their size
    gain = (expected["apm"] - expected["teacher"]) / 2
    assert leading(shift["Apm"][DIFFERENCE]) == f"{100 * gain:+.1f}"
    assert "top-5, %" in shapes["Apm"] and "top-5, %" not in others["Apm"]  # of three classes all are in the top 5
    names = {path.name for path in folder.glob("*.png")}
    assert {"cost_user-other-set_tiny.png", "cost_shapes_b.png", "cost_shapes_tiny.png"} <= names


def test_means_are_left_out_where_scenes_are_missing(rows, tmp_path):
    kept = [row for row in rows if not (row["method"] == "copy" and row["corruption"] == "jpeg")]
    kept = [row for row in kept if not (row["method"] == "apm" and row["severity"] == 5 and row["image"] < 10)]
    folder = write_reported(tmp_path, kept)
    line = tables(folder)[2]["Copy"]
    assert line["jpeg"] == line["mean"] == line[DIFFERENCE] == "–" and line["gaussian noise"] != "–"
    assert "Apm lacks 40 predictions" in (folder / "report.md").read_text()  # 10 images, 2 corruptions, 2 seeds
    ours = [row for row in pick(kept, method="apm") if row["severity"]]
    partners = set(map(place, ours))
    theirs = [row for row in pick(kept, method="teacher") if place(row) in partners]
    gain = np.mean(right(ours)) - np.mean(right(theirs))
    assert leading(tables(folder)[2]["Apm"][DIFFERENCE]) == f"{100 * gain:+.1f}"


def test_reading_keeps_what_the_lines_say(reported, rows):
    run = read_results(reported)
    assert run.conditions("shapes", "org/tiny") == SCENES
    answers = run.pooled("shapes", "org/tiny", "apm", [("jpeg", 5)])
    expected = sorted(
        pick(rows, corruption="jpeg", severity=5, method="apm"), key=lambda row: (row["seed"], row["image"])
    )
    assert answers.images.tolist() == [row["image"] for row in expected]
    assert answers.correct.tolist() == right(expected)
    assert answers.confidence.tolist() == [row["confidence"] for row in expected]
    assert list(answers.by_step) == [1, 2, 3] and answers.steps.tolist() == [3] * 80
    assert answers.by_step[3].tolist() == right(expected)


def spoil(rows, **changes):
    return [*rows[:2], {key: value for key, value in (rows[2] | changes).items() if value is not None}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, "expected the column 'label'"),
        ({"method": None}, "expected the column 'method'"),
        ({"method": "magic"}, r"methods in run.json, \['teacher', 'copy', 'apm'\], got 'magic'"),
        ({"benchmark": "moon"}, "got 'moon'"),
        ({"confidence": 1.5}, r"confidence in \[0, 1\], got 1.5"),
        ({"confidence": float("nan")}, "got nan"),
        ({"confidence": "sure"}, "'str'"),
        ({"top5": []}, r"a list of integers top5, got \d and \[\]"),
        ({"top5": ["0"]}, r"got \d and \['0'\]"),
        ({"label": "3"}, "expected an integer label"),
        ({"image": 0.5}, "float"),
        ({"severity": 2}, '"none" with severity 0'),
        ({"seed": "0"}, "expected seed to be int, got '0'"),
        ({"by_step": {"1": "2"}}, "integer classes in by_step"),
        ({"by_step": [1]}, "list"),
    ],
)
def test_a_malformed_line_is_named(rows, tmp_path, changes, message):
    folder = write_run(tmp_path, spoil(rows, **changes), costs=make_costs(rows))
    with pytest.raises(ValueError, match=rf"results\.jsonl, line 3: .*{message}"):
        read_results(folder)


@pytest.mark.parametrize("lost", [2, 20, 150])
def test_a_torn_last_line_is_named(rows, tmp_path, lost):
    folder = write_run(tmp_path, rows[:5])
    text = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(text[:-lost])
    with pytest.raises(ValueError, match=r"results\.jsonl, line 5: expected a JSON object, got '{.*bench"):
        read_results(folder)


def test_what_is_no_object_is_named(rows, tmp_path):
    folder = write_run(tmp_path, [rows[0], [1, 2]], costs=make_costs(rows))
    with pytest.raises(ValueError, match="line 2: expected a JSON object, got list"):
        read_results(folder)


def test_an_image_twice_in_a_cell_is_refused(rows, tmp_path):
    folder = write_run(tmp_path, [*rows[:7], rows[2]])
    with pytest.raises(
        ValueError, match="results.jsonl, line 8: expected an image once per cell, got the one of line 3"
    ):
        read_results(folder)


def test_a_run_without_rows_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match=r"results\.jsonl: expected at least one row, got none"):
        read_results(write_run(tmp_path, []))
    with pytest.raises(ValueError, match=r"costs\.jsonl: expected at least one row, got none"):
        read_results(write_run(tmp_path, rows, costs=[]))
    with pytest.raises(ValueError, match=r"costs\.jsonl, line 1: expected at least one image"):
        read_results(write_run(tmp_path, rows, costs=[make_costs(rows)[0] | {"images": 0}]))


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"methods": {}}, "expected the entry 'benchmarks'"),
        (INFO | {"methods": {"apm": {"title": "Apm"}}}, "expected the entry 'baseline'"),
        (INFO | {"benchmarks": {"shapes": {"title": "Shapes", "num_classes": 0}}}, "at least one class"),
        ([], "list"),
    ],
)
def test_a_malformed_description_is_named(rows, tmp_path, info, message):
    with pytest.raises(ValueError, match=rf"run\.json: .*{message}"):
        read_results(write_run(tmp_path, rows[:3], info=info))


def test_model_index_entries_hold_accuracies_by_corruption(reported, rows):
    results = eval_results(reported, "apm", dataset_split="validation")
    assert [result.dataset_config for result in results] == ["default", "gaussian_noise", "jpeg"]
    for result, corruption in zip(results, ("none", *CORRUPTED), strict=True):
        expected = right(pick(rows, corruption=corruption, method="apm"))
        assert result.metric_value == pytest.approx(np.mean(expected))
        assert (result.metric_type, result.dataset_name, result.dataset_split) == ("accuracy", "Shapes", "validation")
        assert result.verified is False and result.dataset_args["images"] == 40
        low, high = result.metric_args["interval_95"]
        assert low < result.metric_value < high


def test_the_model_index_is_one_that_the_hub_reads(reported):
    index = json.loads(write_model_index(reported, "apm", "tiny-apm").read_text())
    card = ModelCardData(**index)
    assert card.model_name == "tiny-apm"
    assert [result.metric_value for result in card.eval_results] == [
        x.metric_value for x in eval_results(reported, "apm")
    ]


def test_model_index_entries_of_nothing_are_refused(reported, rows, tmp_path):
    with pytest.raises(ValueError, match="method: expected one with results .* got 'magic'"):
        eval_results(reported, "magic")
    with pytest.raises(ValueError, match=r"teacher: expected one of \['org/tiny'\], got 'b'"):
        eval_results(reported, "apm", teacher="b")
    folder = write_run(tmp_path, [*rows, *(row | {"teacher": "b"} for row in rows[:3])])
    with pytest.raises(ValueError, match=r"teacher: expected one of \['b', 'org/tiny'\], got None"):
        eval_results(folder, "apm")
    assert len(eval_results(folder, "apm", teacher="b")) == 1


def test_methods_look_different_and_the_same_in_every_picture():
    methods = {"teacher": True, "views": True} | {f"m{number}": False for number in range(18)}
    styles = _styles(methods)
    looks = {(look["color"], str(look["linestyle"]), look["marker"]) for look in styles.values()}
    assert len(looks) == 20
    assert {styles[name]["color"] for name in ("teacher", "views")}.isdisjoint(
        styles[f"m{n}"]["color"] for n in range(18)
    )


@pytest.mark.parametrize("title", ["method {}", "a title that goes on and on over two lines {}"])
def test_a_picture_is_as_high_as_its_legend(reported, title):
    curve = next(iter(read_curves(reported).values()))
    methods = {title.format(number): False for number in range(40)}
    png = draw_severity(Panels("title", methods, {"panel": dict.fromkeys(methods, curve)}, 0.1))
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    legend = pixels[:, -200:]
    assert (legend[-15:] == 255).all()  # more than the space between two lines: nothing is cut
    assert (legend[-len(legend) // 4 :] < 128).any()


def read_curves(folder):
    return _by_severity(read_results(folder), "shapes", "org/tiny", ["jpeg"])


def test_curves_hold_accuracies_by_severity(reported, rows):
    for title, curve in read_curves(reported).items():
        expected = [np.mean(right([*pick(rows, corruption="none", severity=0, method=title.lower())]))]
        expected += [np.mean(right(pick(rows, corruption="jpeg", severity=x, method=title.lower()))) for x in (1, 5)]
        assert list(curve.x) == [0, 1, 5]
        assert [value.mean for value in curve.y] == pytest.approx(expected)
