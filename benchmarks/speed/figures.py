"""The figures of `benchmarks/run.py`: each compares outputs first, then times them, and says what must hold.

Goals: the whole grid runs at a share of the matmul peak, which is that of the fastest public form of a product
(products.py); 16 of 1,024 locations take a tenth of its time; a call is never slower than the naive form, single
locations included; four times the locations take 4.3 times as long at most. The naive form is given the position codes
of the grid, which it could keep, and computes those of other places, which depend on the call.

Legend: B images, L locations, F feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from apm_hf import APMModel

from .products import forms, matmul_calls
from .rivals import (
    RELEASE_CHUNK,
    NaiveAPM,
    clip_base,
    dinov2_large,
    gradients_of,
    images,
    position_codes,
    random_apm,
    vit_flops,
)
from .timing import Calls, Goal, Table, check_equal, has_amx, label_of, milliseconds, smallest_times

FEW = (1, 4, 16, 64, 256)  # locations
NAIVE_BOUND, GROWTH_BOUND = 1.0, 4.3


@dataclass(frozen=True)
class Settings:
    """What a run measures, and which goals the size of the model allows.

    Args:
        preset: of the APM.
        repeats: of every call; the smallest counts.
        vision_transformers: also CLIP ViT-B/16 and DINOv2-L.
        peak_shapes: (rows, I, O) of the products that make the measured peak.
        growth: numbers of locations, each four times the one before.
        training_locations: of the student's step, out of the grid's.
        few_bound: of the time of 16 locations, as a share of the grid's; None sets no goal.
        peak_goal: the grid runs at a share of the matmul peak.
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
    few_bound: float | None = 1 / 10
    peak_goal: bool = True


@dataclass
class Figure:
    """The results of one device and dtype: tables, goals, and the series that are drawn."""

    tables: list[Table] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    series: dict[str, dict[int, float]] = field(default_factory=dict)


def best(times: dict[str, float], prefix: str) -> tuple[str, float]:
    """Return the fastest of those whose name begins with `prefix`."""
    return min(((name, value) for name, value in times.items() if name.startswith(prefix)), key=lambda pair: pair[1])


def peak_bound(dtype: torch.dtype) -> float:
    """Return the share of the matmul peak that the grid should reach on this CPU."""
    if has_amx():  # products are so fast there that what lies between them counts
        return 0.8 if dtype == torch.float32 else 0.7
    return 0.9


def flops_of(call: Callable[[], object]) -> int:
    """Count the floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def full_grid(settings: Settings, device: torch.device, dtype: torch.dtype) -> Figure:
    """Measure one image, every cell, beside the naive form, the release's, the matmul peak and two transformers."""
    model, label = random_apm(settings.preset, device, dtype), label_of(settings.preset, device, dtype)
    naive, pixel_values, codes = NaiveAPM(model), images(model), position_codes(model)
    chunks = sorted({len(codes), *(size for size in (64, 256, 512) if size < len(codes))})
    outputs = model(pixel_values)
    for name, expected in naive(pixel_values, codes).items():
        check_equal(f"full grid, {name}", outputs[name], expected)
    calls: Calls = {"APM": lambda: model(pixel_values)}
    for size in (RELEASE_CHUNK, *chunks):
        name = "release's form, 16 a chunk" if size == RELEASE_CHUNK else f"naive, {size} a chunk"
        calls[name] = lambda size=size: naive(pixel_values, codes, size)
    work = {"APM": flops_of(calls["APM"])}
    products = matmul_calls(list(settings.peak_shapes), device, dtype)
    calls |= {f"peak: {name}": call for name, (call, _) in products.items()}
    work |= {f"peak: {name}": flops for name, (_, flops) in products.items()}
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
    goals = [Goal(f"naive form's time over APM's: {label}", best(times, "naive")[1] / times["APM"], NAIVE_BOUND)]
    if settings.peak_goal and device.type == "cpu":
        goals.append(Goal(f"share of the matmul peak: {label}", rates["APM"] / -rate, peak_bound(dtype)))
    return Figure([table], goals)


@torch.no_grad()
def products(settings: Settings, device: torch.device, dtype: torch.dtype) -> Figure:
    """Measure the widest layer's product with few and many rows, in every form."""
    return Figure([forms(settings.repeats, device, dtype)])


@torch.no_grad()
def few_locations(settings: Settings, device: torch.device, dtype: torch.dtype) -> Figure:
    """Measure k locations anywhere in a folded image, beside its whole grid and the naive form of the same k."""
    model, label = random_apm(settings.preset, device, dtype), label_of(settings.preset, device, dtype)
    naive, trigger = NaiveAPM(model), model.fold(images(model))
    places = _places(max(FEW), device)
    cells = model.config.num_locations
    numbers = [number for number in FEW if number < cells]

    def written_out(number: int) -> Tensor:
        return naive(None, position_codes(model, places[:number]), trigger_column=trigger).last_hidden_state

    calls: Calls = {f"all {cells}": lambda: model.query(trigger)}
    for number in numbers:
        outputs = model.query(trigger, places[:number]).last_hidden_state
        check_equal(f"{number} locations", outputs, written_out(number))
        calls[f"APM {number}"] = lambda number=number: model.query(trigger, places[:number])
        calls[f"naive {number}"] = lambda number=number: written_out(number)
    times = smallest_times(calls, 4 * settings.repeats, device)
    whole, goals = times[f"all {cells}"], []
    table = Table(
        f"k locations beside a grid of {cells}: {label}",
        ("locations", "ms", "share of the grid's time", "share of its locations", "naive form of the same, ms"),
    )
    for number in numbers:
        seconds, rival = times[f"APM {number}"], times[f"naive {number}"]
        share = f"1/{whole / seconds:.1f}"
        table.rows.append((str(number), milliseconds(seconds), share, f"1/{cells / number:g}", milliseconds(rival)))
        name = f"naive form's time over APM's, {number} locations: {label}"
        goals.append(Goal(name, rival / seconds, NAIVE_BOUND))
    table.rows.append((f"{cells} (grid)", milliseconds(whole), "1", "1", ""))
    if settings.few_bound is not None and device.type == "cpu":
        ratio = times["APM 16"] / whole
        goals.append(Goal(f"16 locations' time over the grid's: {label}", ratio, settings.few_bound, at_most=True))
    series = {f"APM, {_name(dtype)}": {number: times[f"APM {number}"] / whole for number in numbers} | {cells: 1}}
    return Figure([table], goals, series)


@torch.no_grad()
def growth(settings: Settings, device: torch.device, dtype: torch.dtype) -> Figure:
    """Measure four times the locations, anywhere in the image, again and again."""
    model, label = random_apm(settings.preset, device, dtype), label_of(settings.preset, device, dtype)
    trigger = model.fold(images(model))
    places = _places(max(settings.growth), device)
    some = places[:64]
    expected = NaiveAPM(model)(None, position_codes(model, some), trigger_column=trigger)
    check_equal("off the grid", model.query(trigger, some).last_hidden_state, expected.last_hidden_state)
    calls: Calls = {str(n): lambda n=n: model.query(trigger, places[:n]) for n in settings.growth}
    times = smallest_times(calls, max(2, settings.repeats // 2), device)
    table = Table(f"More and more locations: {label}", ("locations", "ms", "µs a location", "times the row above"))
    goals, before = [], None
    for number in settings.growth:
        seconds = times[str(number)]
        ratio = "" if before is None else f"{seconds / before:.2f}"
        table.rows.append((f"{number:,}", milliseconds(seconds), f"{1e6 * seconds / number:.2f}", ratio))
        if before is not None:
            name = f"time of {number:,} locations over that of {number // 4:,}: {label}"
            goals.append(Goal(name, seconds / before, GROWTH_BOUND, at_most=True))
        before = seconds
    return Figure([table], goals)


def training_step(settings: Settings, device: torch.device, dtype: torch.dtype) -> Figure:
    """Measure a student's step beside the same in the naive form, and beside its teacher's forward.

    It is forward, backward and fused Adam on some locations with cached targets; weights stay float32, bfloat16 is
    autocast.
    """
    model, label = (
        random_apm(settings.preset, device, torch.float32),
        label_of(settings.preset, device, dtype),
    )
    model.train()
    naive, pixel_values, number = NaiveAPM(model), images(model), settings.training_locations
    places = _places(number, device)
    targets = torch.randn(1, number, model.config.feature_size, device=device)
    colours = torch.rand(1, number, 3, device=device)

    def loss_of(outputs: dict[str, Tensor]) -> Tensor:
        features, rgb = outputs["last_hidden_state"].float(), outputs["rgb"].float()
        return F.mse_loss(features, targets) + F.mse_loss(rgb, colours)

    def step(forward: Callable[[], dict[str, Tensor]], optimizer: torch.optim.Optimizer) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(forward())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    calls: Calls = {}
    for name, student, forward in (
        ("student's step", model, lambda: model(pixel_values, places)),
        ("naive student's step", naive, lambda: naive(pixel_values, position_codes(model, places))),
    ):
        # A learning rate of 0: the weights stand still, so that runs stay comparable.
        optimizer = torch.optim.Adam(student.parameters(), lr=0.0, fused=True)
        calls[name] = lambda forward=forward, optimizer=optimizer: step(forward, optimizer)
    gradients = []
    for call, read in zip(calls.values(), (gradients_of, naive.gradients), strict=True):
        call()
        found = read(model)
        gradients.append(torch.cat([found[name].flatten() for name in sorted(found)]).to(dtype))
    check_equal("gradients of a training step", *gradients, slack=10)
    calls["student's forward in float32, all cells"] = lambda: _without_gradients(model, pixel_values)
    if settings.vision_transformers:
        teacher = dinov2_large(device, dtype)
        for side in (448, 518):
            image = torch.rand(1, 3, side, side, device=device).to(dtype)
            calls[f"DINOv2-L's forward, {side} pixels"] = torch.no_grad()(lambda i=image: teacher(pixel_values=i))
    times = smallest_times(calls, settings.repeats, device)
    own = times["student's step"]
    title = f"Training step, {number} locations of one image: {label}"
    table = Table(title, ("", "ms", "times the student's step"))
    table.rows = [(name, milliseconds(seconds), f"{seconds / own:.2f}") for name, seconds in times.items()]
    return Figure([table])


@torch.no_grad()
def _without_gradients(model: APMModel, pixel_values: Tensor) -> object:
    return model(pixel_values)


def _places(number: int, device: torch.device) -> Tensor:
    """Draw coordinates `(number, 2)` anywhere in the image."""
    return (2 * torch.rand(number, 2, generator=torch.Generator().manual_seed(3)) - 1).to(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
