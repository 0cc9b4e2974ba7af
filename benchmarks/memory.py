"""Measure the peak memory of querying very many locations of one image, beyond what the outputs themselves take.

    python benchmarks/memory.py --preset tiny --num_locations 1048576
    python benchmarks/memory.py --preset dinov2-large --num_locations 65536
    python benchmarks/memory.py --preset dinov2-large --num_locations 4096 --naive

The bound is the chunk's, whatever the number of locations. On the CPU the peak is the process's resident memory
(Linux's VmHWM) over what it held before the query, with weights loaded and one small query made; on a GPU it is the
allocator's. `--naive` writes every query out, all at once, as `speed/rivals.py` does.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from apm_hf import APMConfig, APMModel
from apm_hf.position_encoding import grid_coordinates
from speed.rivals import NaiveAPM, position_codes

MEBIBYTE = 2**20


def resident(field: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at most since the process began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@torch.no_grad()
def measure(
    preset: str,
    num_locations: int,
    *,
    local_patch: bool = False,
    chunk_size: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    naive: bool = False,
) -> dict[str, object]:
    """Measure mebibytes of the outputs and of the peak beyond them, and seconds of the one call."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = APMModel(APMConfig.preset(preset, local_patch=local_patch)).to(device, getattr(torch, dtype)).eval()
    side = model.config.image_size
    pixel_values = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    rows = 2 ** ((num_locations.bit_length() - 1) // 2)
    coordinates = grid_coordinates(rows, num_locations // rows, device=device)
    written_out = NaiveAPM(model) if naive else None
    model(pixel_values, coordinates[:64], chunk_size=32)  # libraries' own buffers
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far: the model may have been cast
        before = resident("VmRSS")
    started = time.perf_counter()
    if written_out is not None:
        outputs = written_out(pixel_values, position_codes(model, coordinates), chunk_size)
    else:
        outputs = model(pixel_values, coordinates, chunk_size=chunk_size)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    held = sum(values.numel() * values.element_size() for values in outputs.values() if torch.is_tensor(values))
    return {
        "preset": preset,
        "num_locations": len(coordinates),
        "local_patch": local_patch,
        "dtype": dtype,
        "naive": naive,
        "seconds": round(seconds, 4),
        "outputs_mib": round(held / MEBIBYTE, 1),
        "beyond_mib": round((peak - before - held) / MEBIBYTE, 1),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--num_locations", type=int, default=2**20, help="a power of 2, or a multiple of one")
    parser.add_argument("--local_patch", action="store_true")
    parser.add_argument("--chunk_size", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a GPU, where there is one")
    parser.add_argument("--naive", action="store_true", help="the form to compare with")
    options = parser.parse_args()
    print(json.dumps(measure(**vars(options))))


if __name__ == "__main__":
    main()
