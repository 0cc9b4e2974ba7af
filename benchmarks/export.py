"""Measure exported graphs beside the model: size on disk, and speed of onnxruntime against torch in the same run.

    python benchmarks/export.py                                          # the demo's model
    python benchmarks/export.py --model clip-ttt --num_locations 1 64 1024 --threads 2
    python benchmarks/export.py --model tiny --repeats 2                 # a quick try

Rows: folding one image, then querying some locations of it. `torch` is the model called with these coordinates,
`torch, grid` the model called without any, which computes less where they are its grid. All take turns, and the
shortest of `--repeats` times counts. Presets have random weights.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from transformers import AutoModel

from apm_hf import APMConfig, APMModel
from apm_hf.assets import DEMO_MODEL
from apm_hf.configuration_apm import PRESETS
from apm_hf.position_encoding import grid_coordinates
from apm_hf.publishing.export import export_model


def shortest(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return milliseconds; after one call each that does not count, the candidates take turns."""
    times = {name: float("inf") for name in candidates}
    for repeat in range(repeats + 1):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            elapsed = (time.perf_counter() - start) * 1000
            times[name] = min(times[name], elapsed) if repeat else times[name]
    return times


@torch.inference_mode()
def rows(model: APMModel, folder: Path, num_locations: list[int], repeats: int, threads: int) -> list[list[str]]:
    """Return the rows of the table of times."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    fold, query = (
        onnxruntime.InferenceSession(folder / f"{graph}.onnx", settings, providers=["CPUExecutionProvider"])
        for graph in ("fold", "query")
    )
    config, generator = model.config, torch.Generator().manual_seed(0)
    pixels = torch.randn(1, config.num_channels, config.image_size, config.image_size, generator=generator)
    column = model.fold(pixels)
    table = []
    times = shortest(
        {
            "torch": lambda: model.fold(pixels),
            "onnxruntime": lambda: fold.run(None, {"pixel_values": pixels.numpy()}),
        },
        repeats,
    )
    table.append(["fold", f"{times['torch']:.2f}", "", f"{times['onnxruntime']:.2f}"])
    for count in num_locations:
        is_grid = count == config.num_locations
        places = torch.rand(count, 2, generator=generator) * 2 - 1
        places = grid_coordinates(config.grid_size, config.grid_size) if is_grid else places
        given = {"trigger_column": column, "coordinates": places, "pixel_values": pixels}
        arrays = {entry.name: given[entry.name].numpy() for entry in query.get_inputs()}

        def in_torch(where: torch.Tensor | None = places) -> object:
            return model.query(column, where, pixel_values=pixels)

        candidates = {"torch": in_torch, "onnxruntime": lambda arrays=arrays: query.run(None, arrays)}
        candidates |= {"torch, grid": lambda: in_torch(None)} if is_grid else {}
        times = shortest(candidates, repeats)
        on_grid = f"{times['torch, grid']:.2f}" if is_grid else ""
        table.append([f"query, {count} locations", f"{times['torch']:.2f}", on_grid, f"{times['onnxruntime']:.2f}"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEMO_MODEL, help="folder, or one of the presets (default: the demo's)")
    parser.add_argument("--num_locations", type=int, nargs="+", default=[1, 16, 144])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.model in PRESETS:
        torch.manual_seed(0)
        model = APMModel(APMConfig.preset(options.model)).eval()
    else:
        model = AutoModel.from_pretrained(options.model)
    name = Path(options.model).name
    print(f"{name}: torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {platform.machine()}, ", end="")
    print(f"{options.threads} threads, milliseconds, shortest of {options.repeats}\n")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model.save_pretrained(folder / "weights")
        export_model(model, folder / "onnx")
        export_model(model, folder / "torch", format="torch")
        print("| file | MB |\n| --- | ---: |")
        files = [folder / "weights" / "model.safetensors", *sorted(folder.glob("onnx/*.onnx"))]
        for file in [*files, *sorted(folder.glob("torch/*.pt2"))]:
            print(f"| {file.name} | {file.stat().st_size / 1e6:.2f} |")
        print("\n| one image | torch | torch, grid | onnxruntime |\n| --- | ---: | ---: | ---: |")
        for row in rows(model, folder / "onnx", options.num_locations, options.repeats, options.threads):
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
