"""What a teacher-feature cache saves and costs, on this computer; the figures of docs/scaling_measured.md.

    python benchmarks/data.py --num_images 64
    python benchmarks/data.py --teacher ../shared/teachers/deit-tiny --dataset ../shared/data/imagenet_sample1k

Ways to read are compared in one run, interleaved, and the smallest time of each is taken: computers are noisy,
and times alone say little. `warm` files are in the system's page cache, of `cold` ones it was asked to let go.
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from apm_hf import APMConfig, APMModel, load_teacher
from apm_hf.assets import DEMO_TEACHER
from apm_hf.data.images import ImageCollator
from apm_hf.data.loading import load_images
from apm_hf.data.scenes import SceneDataset
from apm_hf.data.split_streams import SplitStream
from apm_hf.distillation import matching_image_processor
from apm_hf.position_encoding import grid_coordinates
from apm_hf.runs.files import write_atomically
from apm_hf.teachers.feature_cache import CacheSettings, FeatureCache, write_feature_cache

BATCH = 32


def smallest(rows: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each, interleaved; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats + 1):
        for name, function in rows.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: min(values[1:]) for name, values in times.items()}


def report(title: str, times: dict[str, float], rival: str, per: int) -> None:
    print(f"\n{title}")
    for name, seconds in times.items():
        print(f"  {name:<44} {1e6 * seconds / per:12.1f} us an image {times[rival] / seconds:9.2f} x {rival}")


def let_go(folder: Path) -> None:
    """Ask the system to forget what it holds of the files."""
    for path in folder.rglob("*.*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def stacked(rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([row["features"] for row in rows])


def reading(cache: FeatureCache, folder: Path, repeats: int) -> dict[str, float]:
    """A batch of random rows into one tensor, by each way."""
    import datasets

    order = np.random.default_rng(0).permutation(len(cache))[:BATCH].tolist()
    shape, per_shard = cache[0]["features"].shape, cache.index["images_per_shard"]
    files = [safe_open(cache.folder / shard["file"], framework="pt") for shard in cache.index["shards"]]
    slices = [file.get_slice("features") for file in files]
    everything = torch.stack([cache[row]["features"] for row in range(len(cache))])
    raw = everything.view(torch.uint8).reshape(len(cache), -1).numpy()
    table = datasets.Dataset.from_dict(
        {"features": [row.tobytes() for row in raw]},
        features=datasets.Features({"features": datasets.Value("large_binary")}),
    )
    table.save_to_disk(folder / "arrow")
    arrow = datasets.load_from_disk(str(folder / "arrow"))
    numbers = datasets.Dataset.from_dict(
        {"features": everything.float().flatten(1, -2).numpy()},
        features=datasets.Features({"features": datasets.Array2D(everything.flatten(1, -2).shape[1:], "float32")}),
    ).with_format("torch")
    raw.tofile(folder / "raw.bin")
    mapped = np.memmap(folder / "raw.bin", mode="r", shape=raw.shape)

    def from_arrow() -> torch.Tensor:
        column = arrow.__getitems__(order)
        values = [torch.frombuffer(bytearray(row["features"]), dtype=everything.dtype) for row in column]
        return torch.stack(values).view(-1, *shape)

    ways = {
        "this reader": lambda: stacked(cache.__getitems__(order)),
        "numpy.memmap, one file": lambda: torch.from_numpy(mapped[order]).view(everything.dtype).view(-1, *shape),
        "safetensors get_slice": lambda: torch.stack([slices[row // per_shard][row % per_shard] for row in order]),
        "Arrow large_binary": from_arrow,
        "Arrow Array2D, float32": lambda: numbers[order]["features"],
    }
    expected = ways["this reader"]()
    for name in list(ways)[1:4]:
        assert torch.equal(ways[name](), expected), name
    return smallest(ways, repeats)


def student_step(shared: bool, model: APMModel, pixel_values: torch.Tensor, num_locations: int) -> None:
    """Forward and backward at the same places of all images, or at places of each image's own."""
    size = model.config.grid_size
    coordinates = grid_coordinates(size, size)
    if shared:
        coordinates = coordinates[torch.randperm(size**2)[:num_locations]]
    else:
        coordinates = coordinates[torch.stack([torch.randperm(size**2)[:num_locations] for _ in pixel_values])]
    model(pixel_values, coordinates).last_hidden_state.square().mean().backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default=DEMO_TEACHER)
    parser.add_argument("--dataset", help="drawn scenes by default")
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--num_locations", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    teacher = load_teacher(options.teacher, device="cpu")
    if options.dataset:
        images = load_images(options.dataset, max_images=options.num_images).dataset
    else:
        images = load_images_of_scenes(options.num_images)
    where = f"{options.teacher and Path(options.teacher).name}, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, CPU, teacher {where}, {len(images)} images, batches of {BATCH}")
    with tempfile.TemporaryDirectory() as place:
        measure(Path(place), teacher, images, options)


def load_images_of_scenes(number: int) -> object:
    import datasets

    return (
        SceneDataset(number).to_hf_dataset().select_columns("image").cast_column("image", datasets.Image(decode=False))
    )


def measure(folder: Path, teacher: object, images: object, options: argparse.Namespace) -> None:
    rows = [images[row] for row in range(BATCH)]
    student_processor = matching_image_processor(teacher, 224)
    both = ImageCollator(student_processor, teacher_image_processor=teacher.image_processor)
    alone = ImageCollator(student_processor)
    batch = both(rows)
    caches = {}
    for name, places in (("full grid", None), (f"{options.num_locations} locations", options.num_locations)):
        settings = CacheSettings(num_locations=places, images_per_shard=max(1, len(images) // 4))
        started = time.perf_counter()
        caches[name] = write_feature_cache(folder / name, teacher, images, settings=settings, batch_size=BATCH)
        size = sum(shard["size"] for shard in caches[name].index["shards"])
        seconds = time.perf_counter() - started
        print(f"cache, {name}: {size / len(images) / 1e3:.1f} kB an image, written in {seconds:.1f} s")
    order = np.random.default_rng(1).permutation(len(images))[:BATCH].tolist()
    ways = {"teacher, bare": lambda: teacher.encode_images(pixel_values=batch["teacher_pixel_values"])}
    ways |= {
        f"cache, {name}": (lambda cache=cache: stacked(cache.__getitems__(order))) for name, cache in caches.items()
    }
    ways["decode, and process for student and teacher"] = lambda: both(rows)
    ways["decode, and process for the student"] = lambda: alone(rows)
    report("One batch: asking, reading, and what both need", smallest(ways, options.repeats), "teacher, bare", BATCH)

    report("A batch of random rows, warm", reading(caches["full grid"], folder, options.repeats), "this reader", BATCH)
    seconds = []
    for _ in range(options.repeats):
        let_go(folder / "full grid")
        cold = FeatureCache(folder / "full grid")
        started = time.perf_counter()
        stacked(cold.__getitems__(order))
        seconds.append(time.perf_counter() - started)
    size = caches["full grid"][0]["features"].nbytes * BATCH
    print(f"  this reader, cold: {1e6 * min(seconds) / BATCH:.1f} us an image, {size / min(seconds) / 1e6:.0f} MB/s")

    block = os.urandom(2**27)
    times = smallest(
        {
            "write, brought to the disk": lambda: write_atomically(folder / "block", block),
            "SHA-256": lambda: hashlib.sha256(block).digest(),
        },
        3,
    )
    print("\n" + ", ".join(f"{name}: {len(block) / seconds / 1e6:.0f} MB/s" for name, seconds in times.items()))

    images.to_parquet(str(folder / "rows.parquet"))
    stream = SplitStream(load_images(folder / "rows.parquet", streaming=True).dataset, name="rows")
    whole = len(images)

    def skip() -> None:
        stream.go_on([{"num_workers": 1, "new_epoch": 0, "next": 0, "places": {"0": [0, whole - 1]}}])
        next(iter(stream))

    seconds = smallest({"skip": skip}, 3)["skip"]
    print(f"stream, going on after {whole} rows of parquet: {1e6 * seconds / whole:.1f} us a row")

    model = APMModel(APMConfig.preset("tiny", image_size=224, patch_size=14, use_rgb_head=False))
    pixel_values = torch.rand(BATCH, 3, 224, 224)
    steps = {
        f"{options.num_locations} places, of all images the same": lambda: student_step(
            True, model, pixel_values, options.num_locations
        ),
        f"{options.num_locations} places of each image's own": lambda: student_step(
            False, model, pixel_values, options.num_locations
        ),
    }
    report("A tiny student, forward and backward", smallest(steps, options.repeats), next(iter(steps)), BATCH)


if __name__ == "__main__":
    main()
