"""`make bench` in small: it compares answers before it times them, and a slowed build does not pass its check."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from apm_hf.modeling_apm import APMModel
from apm_hf.modeling_apm_decoder import APMDecoder

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
    # On a machine that is busy with other tests, a wide margin: the slowed build is a hundred times slower.
    monkeypatch.setitem(figures.BOUNDS, "tiny", {"release": {"cpu": 0.2, "cuda": 0.2}})
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
    assert "MISSED release's time over APM's: tiny, cpu, float32" in capsys.readouterr().out
    assert "**missed**" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.parametrize("measure", ["full_grid", "few_locations", "growth", "training_step"])
def test_nothing_is_timed_whose_answers_differ(runner, small, measure, monkeypatch):
    answer = APMModel._answer

    def off(self, *args, **kwargs):
        outputs = answer(self, *args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state * (1 + 1e-3)
        return outputs

    monkeypatch.setattr(APMModel, "_answer", off)
    monkeypatch.setattr(sys.modules["speed.figures"], "smallest_times", None)
    with pytest.raises(ValueError, match="expected the rival's answers"):
        getattr(runner, measure)(small, torch.device("cpu"), torch.float32)


def test_growth_and_few_locations_have_goals_that_a_slowed_build_misses(runner, small, monkeypatch):
    figures = sys.modules["speed.figures"]
    bounds = {"few": 1 / 30, "growth": 4.3, "training": 0.3}
    monkeypatch.setitem(figures.BOUNDS, "tiny", bounds)
    # The sizes decide here, not this machine: a location costs a millisecond, more than the first hundred.
    clock = {"all 144": 0.1, "APM 16": 0.1 / 31, "256": 1.0, "1024": 4.2}

    def times(calls, repeats, device):
        return {name: clock.get(name, 1.0) for name in calls}

    monkeypatch.setattr(figures, "smallest_times", times)
    device = torch.device("cpu")
    for measure, name, slow in ((runner.few_locations, "APM 16", 0.1 / 29), (runner.growth, "1024", 4.4)):
        (goal,) = measure(small, device, torch.float32).goals
        assert goal.met and goal.at_most
        clock[name] = slow
        (goal,) = measure(small, device, torch.float32).goals
        assert not goal.met


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
    pixel_values = rivals.images(model, 2)
    with torch.no_grad():
        outputs = model(pixel_values)
        for chunk in (None, 16, 100):
            answers = rivals.naive_answers(model, model.fold(pixel_values), rivals.grid_codes(model), chunk)
            for name, value in answers.items():
                torch.testing.assert_close(value, outputs[name], rtol=1e-4, atol=1e-4)
