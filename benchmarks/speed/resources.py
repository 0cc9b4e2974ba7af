"""Memory and operations against the number of locations (the paper's Figure 2 and Table 4), and the time to load."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from apm_hf import APMModel
from apm_hf.position_encoding import grid_coordinates

from .figures import Figure, flops_of
from .rivals import NaiveAPM, clip_base, dinov2_large, images, position_codes, random_apm, vit_flops
from .timing import Goal, Table, milliseconds, smallest_times

HERE = Path(__file__).resolve().parents[1]
PAPER = (
    "The paper's Table 4 (arXiv:2410.20535, ViT-B/16, as the authors' poster prints it), measured / ideal GFLOPs: "
    "teacher pass 20.5 / 20.5 with 149.2 M parameters and 1.8 GB, student pass 10 / 10 with 25.0 M and 0.6 GB, APM's "
    "peak over 20 steps 241.7 / 210.5 with 174.2 M and 2.7 GB, CLIP over 20 steps 462 / 410, TPT 529 / 476. Theirs "
    "seem to count a multiplication with its addition as one operation: a ViT-B/16 of 20.5 GFLOPs does. Here they are "
    "two."
)


@torch.no_grad()
def operations(presets: tuple[str, ...], *, vision_transformers: bool) -> Figure:
    """GFLOPs against the number of locations, counted by `torch.utils.flop_counter`, on the CPU."""
    device, dtype = torch.device("cpu"), torch.float32
    table = Table(
        "Operations", ("", "M parameters", "locations", "GFLOPs", "GFLOPs, naive form"), text=PAPER if presets else ""
    )
    series: dict[str, dict[int, float]] = {}
    for preset in presets:
        model = random_apm(preset, device, dtype)
        naive, pixel_values, codes = NaiveAPM(model), images(model), position_codes(model)
        millions = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}"
        series[f"APM {preset}"], series[f"naive {preset}"] = {}, {}
        number = 1
        while number <= len(codes):
            chosen = slice(0, number)
            places = None if number == len(codes) else _cells(model)[chosen]
            own = flops_of(lambda m=model, x=pixel_values, p=places: m(x, p)) / 1e9
            written_out = flops_of(lambda m=naive, x=pixel_values, c=codes[chosen]: m(x, c)) / 1e9
            series[f"APM {preset}"][number], series[f"naive {preset}"][number] = own, written_out
            table.rows.append((f"APM `{preset}`", millions, f"{number:,}", f"{own:.2f}", f"{written_out:.2f}"))
            number = 4 * number if 4 * number <= len(codes) or number == len(codes) else len(codes)
    if vision_transformers:
        for name, build, side in (("CLIP ViT-B/16", clip_base, 224), ("DINOv2-L", dinov2_large, 518)):
            tower = build(device, dtype)
            millions = f"{sum(p.numel() for p in tower.parameters()) / 1e6:.1f}"
            gigas = vit_flops(tower, side) / 1e9
            series[f"{name}, {side} pixels"] = {number: gigas for number in (1, 1024)}
            table.rows.append((f"{name}, image tower, {side} pixels", millions, "all", f"{gigas:.2f}", ""))
    return Figure([table], series=series)


def _cells(model: APMModel) -> Tensor:
    return grid_coordinates(model.config.grid_size, model.config.grid_size)


def memory(cases: list[tuple[str, int, str, bool]], device: torch.device) -> Figure:
    """Measure MiB beyond the outputs, and seconds of a first call, each in a process of its own.

    Args:
        cases: (preset, number of locations, dtype, naive form).
    """
    columns = ("", "dtype", "locations", "outputs, MiB", "beyond them, MiB", "s", "µs a location")
    table = Table(
        f"Memory: {device.type}",
        columns,
        text="One process each: what is held at most beyond the weights and the outputs themselves. "
        "The time is that of a single call.",
    )
    series: dict[str, dict[int, float]] = {}
    for preset, number, dtype, naive in cases:
        command = [sys.executable, str(HERE / "memory.py"), "--preset", preset, "--num_locations", str(number)]
        command += ["--dtype", dtype, "--device", device.type] + ["--naive"] * naive
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        name = f"{'naive' if naive else 'APM'} {preset}"
        series.setdefault(f"{name}, {dtype}", {})[number] = found["beyond_mib"]
        table.rows.append(
            (
                name,
                dtype,
                f"{number:,}",
                f"{found['outputs_mib']:,.0f}",
                f"{found['beyond_mib']:,.0f}",
                f"{found['seconds']:.2f}",
                f"{1e6 * found['seconds'] / number:.2f}",
            )
        )
    return Figure([table], series=series)


def loading(preset: str, repeats: int) -> Figure:
    """`from_pretrained` beside reading the same bytes; both from the page cache, where the file was just written."""
    with tempfile.TemporaryDirectory() as folder:
        random_apm(preset, torch.device("cpu"), torch.float32).save_pretrained(folder)
        files = sorted(Path(folder).glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        calls = {
            "`from_pretrained`": lambda: APMModel.from_pretrained(folder),
            "reading the same bytes": lambda: [path.read_bytes() for path in files],
            "`from_pretrained`, every weight then read once": lambda: [
                p.sum() for p in APMModel.from_pretrained(folder).parameters()
            ],
        }
        with torch.no_grad():
            times = smallest_times(calls, repeats, torch.device("cpu"))
    read = times["reading the same bytes"]
    table = Table(f"Loading `{preset}`, {size / 2**20:.0f} MiB, from the page cache", ("", "ms", "times the reading"))
    table.rows = [(name, milliseconds(seconds), f"{seconds / read:.2f}") for name, seconds in times.items()]
    return Figure([table])


def start_up() -> Figure:
    """What `benchmarks/startup.py` measures, one repeat of every process; about two minutes."""
    from startup import figures

    found = figures(repeats=1, load_repeats=3)
    rows = [(one.name, f"{one.seconds:.3f} s", one.rival, f"{one.rival_seconds:.3f} s") for one in found]
    table = Table("Start-up", ("", "seconds", "rival", "its seconds"), rows)
    limits = [(one, one.limit) for one in found if one.limit is not None]
    goals = [Goal(f"{one.name}, seconds", one.seconds, limit, at_most=True) for one, limit in limits]
    return Figure([table], goals)
