"""How fast a run is: what is counted, what is not, and what is never made up."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from apm_hf import load_teacher
from apm_hf.distillation import speed
from apm_hf.distillation.speed import SpeedMeter, peak_flops, student_flops
from fixtures_runs import forget_accelerate, run
from fixtures_tiny import save_clip, student, student_config

ALL = {"last_hidden_state", "pooler_output", "rgb"}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate keeps its state between runs of one process; a new process starts without."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(speed.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_figures_are_of_the_time_since_the_last_report_without_pauses(clock):
    meter = SpeedMeter(torch.device("cpu"), 2, peak=1e6)
    meter.flops = {"teacher": 300.0, "student": 700.0}
    meter._counted = True

    def one_pass():
        clock.now += 1  # images are read
        with meter.one_pass(8):
            with meter.teacher():
                clock.now += 3
            clock.now += 4

    for _ in range(3):
        one_pass()
    with meter.paused():
        clock.now += 1000
    one_pass()
    one_pass()
    values = meter.report()
    assert values["images_per_second"] == pytest.approx(5 * 16 / 40)
    assert values["mfu"] == pytest.approx(2.0 * 1000 / 2e6)
    assert (values["teacher_share"], values["student_share"]) == (pytest.approx(3 / 8), pytest.approx(4 / 8))
    clock.now += 8
    one_pass()
    assert meter.report()["images_per_second"] == pytest.approx(16 / 16)
    summary = meter.summary()
    assert summary["images_per_second"] == pytest.approx(1.0) and summary["reports"] == 1, "the first one warms up"
    assert summary["peak_flops"] == 1e6 and summary["peak_from"] == "given"


def test_memory_is_that_of_the_process_that_has_most():
    meter = SpeedMeter(torch.device("cpu"), 2, largest=lambda own: own + 7)
    time.sleep(0.001)
    assert 7.05 < meter.report()["memory_gib"] < 7 + 200


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_table_or_none(name, tflops):
    assert peak_flops(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_without_a_peak_there_is_no_mfu():
    meter = SpeedMeter(torch.device("cpu"), 1)
    assert "mfu" not in meter.report() and meter.summary()["peak_flops"] is None
    assert meter.summary()["peak_from"] == "unknown"


@pytest.mark.parametrize(
    "architecture",
    [{}, {"local_patch": True, "pooling": "attention"}, {"teacher_heads": {"other": {"feature_size": 12}}}],
    ids=["plain", "patch and attention", "two heads"],
)
def test_a_students_products_are_counted_without_computing_them(architecture):
    pixels, places = torch.rand(3, 3, 24, 24), torch.rand(5, 2)
    model = student(**architecture)
    with FlopCounterMode(display=False) as real:
        outputs = model(pixels, places)
        heads = (*(outputs.teacher_features or {}).values(), *(outputs.teacher_embeds or {}).values())
        sum(values.sum() for values in (*(outputs[name] for name in ALL), *heads)).backward()
    state = torch.get_rng_state()
    used = ALL | {"teacher_features", "teacher_embeds"}
    assert student_flops(student_config(**architecture), (pixels, places), {}, used) == real.get_total_flops() > 0
    assert (
        student_flops(student_config(**architecture), (pixels, places), {}, {"pooler_output"}) < real.get_total_flops()
    )
    assert torch.equal(state, torch.get_rng_state())


def test_a_run_says_how_fast_it_was(tmp_path):
    settings = {"statistics_images": 0, "max_steps": 4, "logging_steps": 1, "report_to": "tensorboard"}
    run(tmp_path, peak_tflops=0.001, **settings)
    said = json.loads((tmp_path / "speed.json").read_text())
    assert said["processes"] == 1 and said["device"] == "cpu" and said["reports"] == 3
    # 3 of 16 places of 4 images; targets were computed before.
    inputs = (torch.empty(4, 3, 24, 24), torch.empty(3, 2))
    expected = student_flops(student_config(), inputs, {"trigger_column": None, "heads": ()}, ALL) / 4
    assert said["flops_per_image"] == {"teacher": 0, "student": expected}
    assert said["images_per_second"] > 0 and 0.01 < said["memory_gib"] < 200
    assert 0 < said["student_share"] <= 1 and 0 <= said["teacher_share"] < 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tmp_path / "logs").glob("*/events.out.tfevents.*")
    tags = EventAccumulator(str(file)).Reload().Tags()["scalars"]
    assert {"images_per_second", "memory_gib", "mfu", "student_share", "teacher_share"} <= set(tags)


def test_a_teachers_products_are_counted_at_the_first_pass_alone(tmp_path):
    teacher = load_teacher(save_clip(tmp_path), device="cpu")
    pixels = torch.randn(3, 3, 32, 32)
    with FlopCounterMode(display=False) as real:
        teacher.encode_images(pixel_values=pixels)
    meter = SpeedMeter(torch.device("cpu"), 1)
    for _ in range(2):
        with meter.one_pass(3), meter.teacher():
            teacher.encode_images(pixel_values=pixels)
    assert meter.flops == {"teacher": real.get_total_flops() / 3} and real.get_total_flops() > 0


def test_the_benchmark_of_training_fills_its_place_in_a_document(tmp_path, monkeypatch, capsys):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("training_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = benchmark.rows
    monkeypatch.setattr(benchmark, "rows", lambda options: rows(options)[:1])
    document = tmp_path / "scaling.md"
    document.write_text(f"# Before\n\n{benchmark.BEGIN}\nold\n{benchmark.END}\n\nAfter\n")
    benchmark.main(["--quick", "--write", str(document)])
    text = document.read_text()
    assert text.startswith(f"# Before\n\n{benchmark.BEGIN}\n`python benchmarks/training.py --quick")
    assert text.endswith(f"{benchmark.END}\n\nAfter\n") and "old" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("| bfloat16, 4 locations |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert float(cells[1]) > 0 and float(cells[2]) > 0 and cells[3] == "peak unknown" and cells[5].endswith("%")
    assert line in capsys.readouterr().out
