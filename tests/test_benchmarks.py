"""`make bench` in small: it compares outputs before it times them, and a slowed build does not pass its check."""

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from apm_hf.modeling_apm import APMDecoder, APMModel
from fixtures_runs import forked, status_of

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def runner():
    """benchmarks/run.py, which finds its parts beside itself, as a script does."""
    sys.path.insert(0, str(BENCHMARKS))
    sys.modules.pop("run", None)
    import run

    yield run
    sys.path.remove(str(BENCHMARKS))
    for name in [name for name in sys.modules if name == "run" or name.split(".")[0] == "speed"]:
        del sys.modules[name]


def in_a_fork(folder):
    """A stand-in for `subprocess.run` of benchmarks/memory.py: a child that has imported everything already."""

    def run(command, **options):
        def work():
            import memory

            sys.argv = command[1:]
            with open(folder / "printed", "w") as file, contextlib.redirect_stdout(file):
                memory.main()

        assert status_of(forked(work)) == 0
        return SimpleNamespace(stdout=(folder / "printed").read_text())

    return run


@pytest.fixture
def small(runner, monkeypatch):
    """`--quick` within seconds: fewer repeats and locations."""
    settings = runner.Settings(
        preset="tiny",
        repeats=2,
        vision_transformers=False,
        peak_shapes=((64, 64, 64),),
        growth=(256, 1024),
        training_locations=8,
        few_bound=1 / 30,
        peak_goal=False,
    )
    monkeypatch.setattr(runner, "TINY", settings)
    monkeypatch.setattr(runner, "MILLION", ("tiny", 4096, "float32", False))
    monkeypatch.setattr(runner, "start_up", lambda: None)
    return settings


def slowed(monkeypatch, seconds: float) -> None:
    decode = APMDecoder.forward

    def forward(self, *args, **kwargs):
        time.sleep(seconds)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(APMDecoder, "forward", forward)


def test_quick_run_writes_its_page_and_a_slowed_build_fails(runner, small, monkeypatch, tmp_path, capsys):
    figures = sys.modules["speed.figures"]
    monkeypatch.setattr(sys.modules["speed.resources"], "subprocess", SimpleNamespace(run=in_a_fork(tmp_path)))
    # On a computer that is busy with other tests, a wide margin: the slowed build is a hundred times slower.
    monkeypatch.setattr(figures, "NAIVE_BOUND", 0.2)
    monkeypatch.setattr(figures, "GROWTH_BOUND", 50.0)
    monkeypatch.setattr(runner, "TINY", dataclasses.replace(small, few_bound=5.0))
    assert runner.main(["--quick", "--output_dir", str(tmp_path)]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    for expected in (
        "python benchmarks/run.py --quick",
        "commit",
        "torch",
        "threads",
        "Not measured: no GPU" if not torch.cuda.is_available() else "cuda",
        "Full grid: tiny, cpu, bfloat16",
        "## Training step",
        "4,096",
        "`from_pretrained`",
        "| met |",
    ):
        assert expected in page
    pictures = sorted(path.name for path in (tmp_path / "benchmarks").iterdir())
    assert pictures == ["few_locations.png", "operations.png"]
    assert all(f"benchmarks/{name}" in page for name in pictures)

    slowed(monkeypatch, 0.1)
    for measure in ("few_locations", "growth", "training_step", "memory", "operations", "loading"):
        monkeypatch.setattr(runner, measure, lambda *args, **kwargs: figures.Figure())
    capsys.readouterr()
    assert runner.main(["--quick", "--output_dir", str(tmp_path)]) == 1
    assert "MISSED naive form's time over APM's: tiny, cpu, float32" in capsys.readouterr().out
    assert "**missed**" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.parametrize("measure", ["full_grid", "few_locations", "growth", "training_step"])
def test_nothing_is_timed_whose_outputs_differ(runner, small, measure, monkeypatch):
    forward = APMModel.forward

    def off(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state * (1 + 1e-3)
        return outputs

    monkeypatch.setattr(APMModel, "forward", off)
    monkeypatch.setattr(sys.modules["speed.figures"], "smallest_times", None)
    with pytest.raises(ValueError, match="expected the rival's outputs"):
        getattr(runner, measure)(small, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("measure", "goal", "name", "slow"),
    [
        ("full_grid", "naive form's time over APM's: tiny", "APM", 1.01),
        ("full_grid", "share of the matmul peak", "APM", 100.0),
        ("few_locations", "naive form's time over APM's, 1 locations", "APM 1", 0.021),
        ("few_locations", "16 locations' time over the grid's", "APM 16", 0.1 / 29),
        ("growth", "time of 1,024 locations over that of 256", "1024", 4.4),
    ],
)
def test_every_goal_is_missed_by_a_slowed_build(runner, small, monkeypatch, measure, goal, name, slow):
    figures = sys.modules["speed.figures"]
    # The sizes decide here, not this computer: a location costs a millisecond, more than the first hundred.
    clock = {"APM": 1.0, "all 144": 0.1, "APM 1": 0.02, "naive 1": 0.02, "APM 16": 0.1 / 31, "256": 1.0, "1024": 4.2}

    def times(calls, repeats, device):
        return {call: clock.get(call, 0.005 if call.startswith("peak") else 1.0) for call in calls}

    monkeypatch.setattr(figures, "smallest_times", times)
    monkeypatch.setattr(figures, "peak_bound", lambda dtype: 0.1)
    settings = dataclasses.replace(small, peak_goal=True)

    def found() -> bool:
        goals = getattr(runner, measure)(settings, torch.device("cpu"), torch.float32).goals
        (met,) = [entry.met for entry in goals if entry.name.startswith(goal)]
        return met

    assert found()
    clock[name] = slow
    assert not found()


@pytest.mark.parametrize(("flags", "expected"), [("fma avx2", (0.9, 0.9)), ("amx_bf16 amx_tile", (0.8, 0.7))])
def test_the_share_of_the_peak_depends_on_the_cpu(runner, monkeypatch, tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"vendor_id : X\nflags : {flags}\n")
    monkeypatch.setattr(sys.modules["speed.timing"], "CPU_FACTS", tmp_path / "cpuinfo")
    bounds = [sys.modules["speed.figures"].peak_bound(dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert tuple(bounds) == expected


def test_smallest_of_interleaved_repeats_counts(runner, monkeypatch):
    timing, clock = sys.modules["speed.timing"], [0.0]
    order, delays = [], {"first": iter([0.2, 0.05, 0.03, 0.05]), "second": iter([0.2, 0.06, 0.07, 0.08])}
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call(name):
        order.append(name)
        clock[0] += next(delays[name])

    times = timing.smallest_times({n: lambda n=n: call(n) for n in delays}, 3, torch.device("cpu"))
    assert order == ["first", "second"] * 4
    assert times == pytest.approx({"first": 0.03, "second": 0.06})


def test_naive_form_equals_the_model_in_chunks_of_any_size(runner):
    rivals = sys.modules["speed.rivals"]
    model = rivals.random_apm("tiny", torch.device("cpu"), torch.float32)
    naive, pixel_values = rivals.NaiveAPM(model), rivals.images(model, 2)
    with torch.no_grad():
        outputs = model(pixel_values)
        for chunk in (None, 16, 100):
            for name, value in naive(pixel_values, rivals.position_codes(model), chunk).items():
                torch.testing.assert_close(value, outputs[name], rtol=1e-4, atol=1e-4)


def test_a_figure_of_start_up_above_its_limit_is_missed_and_the_benchmark_fails(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import startup

    slow, quick = (startup.Figure("import", seconds, "rival", 2.0, limit=0.3) for seconds in (0.4, 0.2))
    free = startup.Figure("whole", 9.0, "rival", 2.0)
    assert slow.missed and not quick.missed and not free.missed and free.ratio == 4.5
    monkeypatch.setattr(sys, "argv", ["startup.py"])
    for found, status in (([quick, free], 0), ([quick, slow], 1)):
        monkeypatch.setattr(startup, "figures", lambda found=found: found)
        assert startup.main() == status
    assert "MISSED" in capsys.readouterr().out


def test_ways_to_features_are_compared_with_the_first_of_them(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import latency

    wanted = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50.0, 0.1])

    def of(features):
        return lambda pixels: features[int(pixels[0, 0, 0, 0])][None]

    methods = {
        "first": of(wanted),
        "mean of each position": of(wanted.mean(dim=0).expand(6, -1, -1)),
        "none": of(-wanted),
    }
    pixels = torch.arange(6.0)[:, None, None, None]
    rows = latency.measure(methods, pixels, repeats=1)
    assert [(row[0], row[3]) for row in rows[:2]] == [("first", "1.000"), ("mean of each position", "0.000")]
    assert rows[0][2] == "1.00" and rows[0][4] == "1.000" and rows[2][4] == "-1.000" and float(rows[2][3]) < -2
