"""What a distillation costs with and without a teacher-feature cache, by arithmetic, for docs/scaling_measured.md.

    python benchmarks/cost_model.py
    python benchmarks/cost_model.py --teacher_mfu 0.5 --num_epochs 3

Nothing is measured here. Every input is an option whose help says where it comes from: counted, a data sheet, measured
by `benchmarks/data.py` (say which computer's), or an assumption. FLOPs are two for each multiply-add.
"""

import argparse

IMAGES = {"COCO, 118 k": 118_287, "ImageNet-21k, 14 M": 14_197_122, "1 B": 1_000_000_000}
# Teacher: DINOv2-L/14 at 224 pixels: 16 x 16 patches, a class token and 4 registers (arXiv:2309.16588).
TEACHER = {"layers": 24, "width": 1024, "tokens": 16 * 16 + 5, "patches": 16 * 16}
# Student: APMConfig.preset("dinov2-large"); widths of the MLP, its query, and the RGB head's.
STUDENT = {"query": 2048, "hidden": (4096, 4096, 4096, 2048, 1024), "features": 1024, "rgb": (256, 256, 3)}
ASSUMPTIONS = {
    "gpu_tflops": (989.0, "dense bf16 TFLOP/s of a GPU; data sheet of the H100 SXM"),
    "teacher_mfu": (0.4, "share of them that a teacher's forward pass reaches; assumption"),
    "student_mfu": (0.3, "share of them that a student's step reaches; assumption"),
    "num_epochs": (10, "times that a student sees an image; assumption"),
    "live_ms": (
        5.5,
        "CPU milliseconds to decode an image for student and teacher; benchmarks/data.py, 256-pixel JPEGs",
    ),
    "cached_ms": (3.0, "the same for the student alone; benchmarks/data.py, 256-pixel JPEGs"),
    "image_kb": (34.4, "kB of an encoded image; the mean of the same JPEGs"),
    "storage_gb_s": (3.0, "GB/s that all GPUs together read; assumption, one NVMe disk"),
    "cpu_cores": (12, "CPU cores for each GPU; assumption, a rented node"),
}


def teacher_flops() -> float:
    """Of a forward pass over one image: projections and MLP, 12 d^2 weights a layer, and attention."""
    layers, width, tokens = TEACHER["layers"], TEACHER["width"], TEACHER["tokens"]
    return layers * (2 * 12 * width**2 * tokens + 4 * tokens**2 * width)


def student_flops(num_locations: int) -> float:
    """Of a forward and a backward pass (twice as much) over one image at so many locations.

    The part of the first layer that multiplies the trigger column, the query's first half, is done once an image.
    """
    widths = (STUDENT["query"], *STUDENT["hidden"])
    weights = sum(first * last for first, last in zip(widths, widths[1:], strict=False))
    weights += STUDENT["hidden"][-1] * STUDENT["features"]
    rgb = (STUDENT["features"] + STUDENT["query"], *STUDENT["rgb"])
    weights += sum(first * last for first, last in zip(rgb, rgb[1:], strict=False))
    once = STUDENT["query"] // 2 * STUDENT["hidden"][0]
    return 3 * 2 * ((weights - once) * num_locations + once)


def kilobytes(num_locations: int) -> float:
    """Of an image's bf16 answers: features, the embedding, and where the features lie if they are not the grid."""
    places = 4 * num_locations if 0 < num_locations < TEACHER["patches"] else 0
    return ((num_locations + 1) * TEACHER["width"] * 2 + places + 8) / 1e3


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(kb: float) -> str:
    for unit, scale in (("PB", 1e12), ("TB", 1e9), ("GB", 1e6)):
        if kb >= scale:
            return f"{number(kb / scale)} {unit}"
    return f"{number(kb / 1e3)} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, (default, source) in ASSUMPTIONS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{source} (default: %(default)s)")
    options = parser.parse_args()
    print(table(["input", "value", "source"], [
        [name, number(getattr(options, name)), source.partition("; ")[2] + ": " + source.partition("; ")[0]]
        for name, (_, source) in ASSUMPTIONS.items()
    ]))  # fmt: skip
    kinds = {"full grid": TEACHER["patches"], "64 locations": 64}
    flops = options.gpu_tflops * 1e12
    teacher_s = flops * options.teacher_mfu / teacher_flops()  # images/s of a GPU
    print(f"\nTeacher: {teacher_flops() / 1e9:.0f} GFLOP and {teacher_s:,.0f} images/s on a GPU.\n")
    speeds, rows = {}, []
    for name, places in kinds.items():
        student_s = flops * options.student_mfu / student_flops(places)
        live_s = 1 / (1 / teacher_s + 1 / student_s)
        feeds = options.storage_gb_s * 1e6 / (kilobytes(places) + options.image_kb) / student_s
        rows.append([
            name, number(student_flops(places) / 1e9), number(student_s), number(live_s), f"{student_s / live_s:.2f}",
            number(student_s * kilobytes(places) / 1e6), number(feeds), number(student_s * options.cached_ms / 1e3),
            number(live_s * options.live_ms / 1e3),
        ])  # fmt: skip
        # What a GPU with its cores gets through: the slower of the two.
        cores = options.cpu_cores * 1e3
        speeds[name] = min(live_s, cores / options.live_ms), min(student_s, cores / options.cached_ms)
    header = [
        "targets at", "student GFLOP", "images/s, cached", "images/s, live", "gain, times", "features, GB/s a GPU",
        "GPUs that storage feeds", "cores to decode, cached", "cores to decode, live",
    ]  # fmt: skip
    print(table(header, rows))
    epochs, rows = options.num_epochs, []
    for title, images in IMAGES.items():
        once = images / min(teacher_s, options.cpu_cores * 1e3 / options.cached_ms) / 3600
        for name, places in kinds.items():
            live, cached = (images * epochs / speed / 3600 for speed in speeds[name])
            single, again = live / epochs, once + cached / epochs
            cells = [number(hours) for hours in (once, live, once + cached, single, again)]
            rows.append([title, name, size(kilobytes(places) * images), *cells])
        rows.append([title, "embedding only", size(kilobytes(0) * images), number(once), "", "", "", ""])
    header = [
        "images", "targets at", "bytes", "GPU h to fill", f"{epochs} epochs, live", f"{epochs} epochs, cached",
        "1 epoch, live", "1 epoch, cached",
    ]  # fmt: skip
    print("\n" + table(header, rows))
    print(f"\nEncoded images: {', '.join(f'{title}: {size(options.image_kb * n)}' for title, n in IMAGES.items())}.")


if __name__ == "__main__":
    main()
