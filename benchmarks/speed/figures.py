"""The figures of `benchmarks/run.py`: each compares answers first, then times them, and says what must hold.

Legend: B images, L locations, F feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from apm_hf import APMModel
from apm_hf.position_encoding import grid_coordinates

from .products import forms, matmul_calls
from .rivals import (
    RELEASE_CHUNK,
    clip_base,
    dinov2_large,
    grid_codes,
    images,
    naive_answers,
    random_apm,
    vit_flops,
)
from .timing import Calls, Goal, Table, check_equal, label_of, milliseconds, smallest_times

FEW = (1, 4, 16, 64, 256)  # locations of a grid
BOUNDS = {  # by preset; what none is asked of stays unchecked
    "dinov2-large": {
        "matmul peak": 0.9,
        "release": {"cpu": 2.0, "cuda": 10.0},
        "release, bfloat16": 5.0,
        "few": 1 / 30,
        "growth": 4.3,
        "training": 0.3,
    },
    # Its calls cost more than its products: no share of a peak can be asked of it.
    "tiny": {"release": {"cpu": 1.5, "cuda": 1.5}, "growth": 4.3},
}


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    Args:
        preset: of the APM.
        repeats: of every call; the smallest counts.
        vision_transformers: also CLIP ViT-B/16 and DINOv2-L.
        peak_shapes: (rows, I, O) of the products that make the measured peak.
        growth: numbers of locations, each four times the one before.
        training_locations: of the student's step, out of the grid's.
    """

    preset: str = "dinov2-large"
    repeats: int = 3
    vision_transformers: bool = True
    peak_shapes: tuple[tuple[int, int, int], ...] = (
        (1024, 1024, 1024),
        (2048, 2048, 2048),
        (512, 4096, 4096),
        (1024, 4096, 4096),
        (1024, 4096, 2048),
    )
    growth: tuple[int, ...] = (1024, 4096, 16384)
    training_locations: int = 256


@dataclass
class Figure:
    """What one device and dtype gave: tables, goals, and the series that are drawn."""

    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    series: dict[str, dict[int, float]] = field(default_factory=dict)


def best(times: dict[str, float], prefix: str) -> tuple[str, float]:
    """The fastest of those whose name begins with `prefix`."""
    return min(((name, value) for name, value in times.items() if name.startswith(prefix)), key=lambda pair: pair[1])


def flops_of(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def full_grid(settings: Settings, device: torch.device, dtype: torch.dtype) -> Figure:
    """One image, every cell: against the naive form, the release's, the machine's peak and two transformers."""
    model, label = random_apm(settings.preset, device, dtype), label_of(settings.preset, device, dtype)
    pixel_values, codes = images(model), grid_codes(model)
    chunks = sorted({len(codes), *(size for size in (64, 256, 512) if size < len(codes))})
    answers = model(pixel_values)
    for name, expected in naive_answers(model, model.fold(pixel_values), codes).items():
        check_equal(f"full grid, {name}", answers[name], expected)
    calls: Calls = {"APM": lambda: model(pixel_values)}
    for size in (RELEASE_CHUNK, *chunks):
        name = "release's form, 16 a chunk" if size == RELEASE_CHUNK else f"naive, {size} a chunk"
        calls[name] = lambda size=size: naive_answers(model, model.fold(pixel_values), codes, size)
    work = {"APM": flops_of(calls["APM"])}
    products = matmul_calls(list(settings.peak_shapes), device, dtype)
    calls |= {f"peak: {name}": call for name, (call, _) in products.items()}
    work |= {f"peak: {name}": flops for name, (_, flops) in products.items()}
    if dtype == torch.bfloat16 and settings.preset in BOUNDS:  # the release computes in float32
        wide = random_apm(settings.preset, device, torch.float32)
        pixels, wide_codes = images(wide), grid_codes(wide)
        calls["release's form, 16 a chunk, float32"] = lambda: naive_answers(
            wide, wide.fold(pixels), wide_codes, RELEASE_CHUNK
        )
    if settings.vision_transformers:
        for name, build, side in (("CLIP ViT-B/16", clip_base, 224), ("DINOv2-L", dinov2_large, 518)):
            tower, image = build(device, dtype), torch.rand(1, 3, side, side, device=device).to(dtype)
            calls[f"{name}, {side} pixels"] = lambda tower=tower, image=image: tower(pixel_values=image)
            work[f"{name}, {side} pixels"] = vit_flops(tower, side)
    times = smallest_times(calls, settings.repeats, device)

    rates = {name: flops / times[name] for name, flops in work.items()}
    peak, rate = best({name: -value for name, value in rates.items()}, "peak")
    table = Table(
        f"Full grid: {label}",
        ("", "ms", "times APM's", "GFLOP/s"),
        text=f"Highest product measured: {-rate / 1e9:,.0f} GFLOP/s ({peak.removeprefix('peak: ')}). APM does "
        f"{rates['APM'] / -rate:.0%} of it.",
    )
    for name, seconds in times.items():
        if not name.startswith("peak"):
            speed = f"{rates[name] / 1e9:,.0f}" if name in rates else ""
            table.rows.append((name, milliseconds(seconds), f"{seconds / times['APM']:.2f}", speed))
    bounds, goals = BOUNDS.get(settings.preset, {}), []
    if "matmul peak" in bounds and device.type == "cpu":
        goals.append(Goal(f"share of the matmul peak: {label}", rates["APM"] / -rate, bounds["matmul peak"]))
    if "release" in bounds:
        ratio = times["release's form, 16 a chunk"] / times["APM"]
        if dtype == torch.float32:
            goals.append(Goal(f"release's time over APM's: {label}", ratio, bounds["release"][device.type]))
        elif "release, bfloat16" in bounds and device.type == "cpu":
            ratio = times["release's form, 16 a chunk, float32"] / times["APM"]
            goals.append(Goal(f"release's time in float32 over APM's: {label}", ratio, bounds["release, bfloat16"]))
    return Figure([table], goals)


@torch.no_grad()
def products(settings: Settings, device: torch.device, dtype: torch.dtype) -> Figure:
    """The widest layer's product with few and many rows, in every form."""
    return Figure([forms(settings.repeats, device, dtype)])


@torch.no_grad()
def few_locations(settings: Settings, device: torch.device, dtype: torch.dtype) -> Figure:
    """k cells of a folded image, in no order, against all of them and against the naive form of the same k."""
    model, label = random_apm(settings.preset, device, dtype), label_of(settings.preset, device, dtype)
    size = model.config.grid_size
    trigger, cells = model.fold(images(model)), grid_coordinates(size, size, device=device)
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(2)).to(device)
    numbers = [number for number in FEW if number < len(cells)]
    calls: Calls = {f"all {len(cells)}": lambda: model.query(trigger)}
    for number in numbers:
        places = cells[order[:number]]
        codes = grid_codes(model, places)
        expected = naive_answers(model, trigger, codes)["last_hidden_state"]
        check_equal(f"{number} locations", model.query(trigger, places).last_hidden_state, expected)
        calls[f"APM {number}"] = lambda places=places: model.query(trigger, places)
        calls[f"naive {number}"] = lambda codes=codes: naive_answers(model, trigger, codes)
    times = smallest_times(calls, 4 * settings.repeats, device)
    whole = times[f"all {len(cells)}"]
    table = Table(
        f"k of {len(cells)} locations: {label}",
        ("locations", "ms", "share of the grid", "share of the grid's locations", "naive form of the same, ms"),
    )
    for number in numbers:
        seconds = times[f"APM {number}"]
        share, naive = f"1/{whole / seconds:.1f}", milliseconds(times[f"naive {number}"])
        table.rows.append((str(number), milliseconds(seconds), share, f"1/{len(cells) / number:g}", naive))
    table.rows.append((f"{len(cells)} (grid)", milliseconds(whole), "1", "1", ""))
    goals, bound = [], BOUNDS.get(settings.preset, {}).get("few")
    if bound and device.type == "cpu" and dtype == torch.float32:
        ratio = times["APM 16"] / whole
        goals.append(Goal(f"16 locations' time over the grid's: {label}", ratio, bound, at_most=True))
    series = {f"APM, {_name(dtype)}": {number: times[f"APM {number}"] / whole for number in numbers} | {len(cells): 1}}
    return Figure([table], goals, series)


@torch.no_grad()
def growth(settings: Settings, device: torch.device, dtype: torch.dtype) -> Figure:
    """Four times the locations, anywhere in the image: what do they cost?"""
    model, label = random_apm(settings.preset, device, dtype), label_of(settings.preset, device, dtype)
    trigger = model.fold(images(model))
    generator = torch.Generator().manual_seed(3)
    places = (2 * torch.rand(max(settings.growth), 2, generator=generator) - 1).to(device)
    some = places[:64]
    expected = naive_answers(model, trigger, grid_codes(model, some))["last_hidden_state"]
    check_equal("off the grid", model.query(trigger, some).last_hidden_state, expected)
    calls: Calls = {str(n): lambda n=n: model.query(trigger, places[:n]) for n in settings.growth}
    times = smallest_times(calls, max(2, settings.repeats // 2), device)
    table = Table(f"More and more locations: {label}", ("locations", "ms", "µs a location", "times the row above"))
    goals, before = [], None
    for number in settings.growth:
        seconds = times[str(number)]
        ratio = "" if before is None else f"{seconds / before:.2f}"
        table.rows.append((f"{number:,}", milliseconds(seconds), f"{1e6 * seconds / number:.2f}", ratio))
        if before is not None and "growth" in BOUNDS.get(settings.preset, {}):
            name = f"time of {number:,} locations over that of {number // 4:,}: {label}"
            goals.append(Goal(name, seconds / before, BOUNDS[settings.preset]["growth"], at_most=True))
        before = seconds
    return Figure([table], goals)


def training_step(settings: Settings, device: torch.device, dtype: torch.dtype) -> Figure:
    """Forward, backward and fused Adam of a student on some locations with cached targets; the weights stay float32,
    bfloat16 is autocast. Beside it the same step in the naive form, and the teacher's forward."""
    model, label = (
        random_apm(settings.preset, device, torch.float32),
        label_of(settings.preset, device, dtype),
    )
    model.train()
    size, number = model.config.grid_size, settings.training_locations
    cells = grid_coordinates(size, size, device=device)
    places = cells[torch.randperm(len(cells), generator=torch.Generator().manual_seed(4))[:number].to(device)]
    pixel_values, codes = images(model), grid_codes(model, places)
    targets = torch.randn(1, number, model.config.feature_size, device=device)
    colours = torch.rand(1, number, 3, device=device)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=0.0, fused=True
    )  # the weights stand still: runs stay comparable

    def loss_of(answers: dict[str, Tensor]) -> Tensor:
        features, rgb = answers["last_hidden_state"].float(), answers["rgb"].float()
        return F.mse_loss(features, targets) + F.mse_loss(rgb, colours)

    def step(answer: Callable[[], dict[str, Tensor]]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(answer())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    forms: dict[str, Callable[[], dict[str, Tensor]]] = {
        "student's step": lambda: model(pixel_values, places),
        "naive student's step": lambda: naive_answers(model, model.fold(pixel_values), codes),
    }
    gradients = []
    for answer in forms.values():
        step(answer)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).to(dtype))
    check_equal("gradients of a training step", *gradients, slack=10)
    calls: Calls = {name: lambda answer=answer: step(answer) for name, answer in forms.items()}
    calls["student's forward in float32, all cells"] = lambda: _without_gradients(model, pixel_values)
    if settings.vision_transformers:
        teacher = dinov2_large(device, dtype)
        for side in (448, 518):
            image = torch.rand(1, 3, side, side, device=device).to(dtype)
            calls[f"DINOv2-L's forward, {side} pixels"] = torch.no_grad()(lambda i=image: teacher(pixel_values=i))
    times = smallest_times(calls, settings.repeats, device)
    own = times["student's step"]
    title = f"Training step, {number} of {len(cells)} locations, one image: {label}"
    table = Table(title, ("", "ms", "times the student's step"))
    table.rows = [(name, milliseconds(seconds), f"{seconds / own:.2f}") for name, seconds in times.items()]
    goals, bound = [], BOUNDS.get(settings.preset, {}).get("training")
    if bound and settings.vision_transformers:
        ratio = own / times["DINOv2-L's forward, 448 pixels"]
        goals.append(Goal(f"student's step over its teacher's forward: {label}", ratio, bound, at_most=True))
    return Figure([table], goals)


@torch.no_grad()
def _without_gradients(model: APMModel, pixel_values: Tensor) -> object:
    return model(pixel_values)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
