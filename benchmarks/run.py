"""Every figure is a ratio against a named rival in the same run; these machines are noisy, times alone say little.

    python benchmarks/run.py --quick
    make bench

Rivals: `naive` builds every query by concatenation, one row per location, and multiplies it with the first layer.
Repeats are interleaved and the smallest time of each is taken.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from apm_hf import APMConfig, APMModel, TTTConfig, adapt
from apm_hf.position_encoding import grid_coordinates, position_code


def naive_features(model: APMModel, pixel_values: Tensor) -> Tensor:
    """`(B, L, F)`, as the paper's figure draws it."""
    config = model.config
    trigger = model.fold(pixel_values)
    code = position_code(
        grid_coordinates(config.grid_size, config.grid_size, device=trigger.device),
        config.grid_size,
        config.grid_size,
        config.position_size,
    )
    batch_size, num_locations = len(trigger), len(code)
    hidden = torch.cat(
        [trigger[:, None].expand(-1, num_locations, -1), code.to(trigger.dtype).expand(batch_size, -1, -1)], dim=-1
    )
    for layer in model.decoder.layers:
        hidden = F.linear(hidden, layer.weight, layer.bias).relu()
    return model.decoder.feature_head(hidden)


def naive_ttt(model: APMModel, pixel_values: Tensor, targets: Tensor, config: TTTConfig) -> None:
    """One image after the other, with `torch.optim`."""
    for image, target in zip(pixel_values, targets, strict=True):
        machine = APMModel(model.config)
        optimizer = torch.optim.Adam(machine.parameters(), lr=config.learning_rate)
        for _ in range(config.steps):
            loss = F.mse_loss(naive_features(machine, image[None]).mean(dim=1), target[None])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def compare(rows: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Smallest time of each, in seconds, over interleaved repeats."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats + 1):  # the first is warm-up
        for name, call in rows.items():
            started = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - started)
    return {name: min(values[1:]) for name, values in times.items()}


def report(title: str, times: dict[str, float], rival: str) -> None:
    print(f"{title}")
    for name, seconds in times.items():
        print(f"  {name:<34} {1e3 * seconds:10.2f} ms   {times[rival] / seconds:7.2f} x {rival}")


@torch.no_grad()
def query_path(preset: str, repeats: int, device: torch.device) -> None:
    model = APMModel(APMConfig.preset(preset, pooling="mean", use_rgb_head=False)).to(device).eval()
    size = model.config.image_size
    pixel_values = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    few = grid_coordinates(model.config.grid_size, model.config.grid_size, device=device)[::64]
    trigger = model.fold(pixel_values)
    expected, answer = naive_features(model, pixel_values), model(pixel_values).last_hidden_state
    error = ((expected - answer).norm() / expected.norm()).item()
    rows = {
        "naive": lambda: naive_features(model, pixel_values),
        "full grid": lambda: model(pixel_values),
        f"{len(few)} locations": lambda: model.query(trigger, few),
    }
    report(f"{preset}: query path (relative error to naive {error:.1e})", compare(rows, repeats, device), "naive")


def test_time_training(preset: str, repeats: int, device: torch.device, *, batch_size: int, steps: int) -> None:
    model = APMModel(APMConfig.preset(preset, pooling="mean", use_rgb_head=False)).to(device)
    size, generator = model.config.image_size, torch.Generator().manual_seed(0)
    pixel_values = torch.rand(batch_size, 3, size, size, generator=generator).to(device)
    targets = torch.randn(batch_size, model.config.feature_size, generator=generator).to(device)
    exact = TTTConfig(steps=steps)
    sampled = TTTConfig(steps=steps, num_locations=16)
    rows = {
        "naive": lambda: naive_ttt(model, pixel_values, targets, exact),
        "exact": lambda: adapt(model, pixel_values, targets, config=exact),
        "16 sampled locations": lambda: adapt(model, pixel_values, targets, config=sampled),
    }
    title = f"{preset}: test-time training, {batch_size} images, {steps} steps"
    report(title, compare(rows, repeats, device), "naive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny machine only, few repeats")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}")
    query_path("tiny", 5 if options.quick else 30, device)
    test_time_training("tiny", 2 if options.quick else 5, device, batch_size=8, steps=20)
    if not options.quick:
        query_path("clip-ttt", 7, device)
        query_path("dinov2-large", 5, device)
        test_time_training("clip-ttt", 2, device, batch_size=1, steps=3)


if __name__ == "__main__":
    main()
