"""What a distillation costs with and without a teacher-feature cache, by arithmetic; the tables of docs/scaling.md.

    python benchmarks/cost_model.py
    python benchmarks/cost_model.py --teacher_mfu 0.5 --num_epochs 3

Nothing is measured here. Every input is an option whose help says where it comes from: counted, a data sheet, measured
by `benchmarks/data.py` (say which machine's), or an assumption. FLOPs are two for each multiply-add.
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
    "decode_ms": (12.0, "CPU milliseconds to decode and process an image; benchmarks/data.py, see docs/scaling.md"),
    "image_kb": (110.0, "kB of an encoded image; assumption, ImageNet's mean JPEG"),
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
    kinds = {"full grid": TEACHER["patches"], "64 locations": 64, "embedding only": 0}
    teacher_s = options.gpu_tflops * 1e12 * options.teacher_mfu / teacher_flops()  # images/s of a GPU
    print(f"\nTeacher: {teacher_flops() / 1e9:.0f} GFLOP and {teacher_s:,.0f} images/s on a GPU.\n")
    rows = []
    for name, places in kinds.items():
        if not places:
            continue
        flops = student_flops(places)
        student_s = options.gpu_tflops * 1e12 * options.student_mfu / flops
        live = 1 / (1 / teacher_s + 1 / student_s)
        read = kilobytes(places) + options.image_kb
        rows.append([
            name, number(flops / 1e9), number(student_s), number(live), f"{student_s / live:.2f}",
            number(student_s * kilobytes(places) / 1e6), number(options.storage_gb_s * 1e6 / read / student_s),
            number(student_s * options.decode_ms / 1e3), number(live * options.decode_ms / 1e3),
        ])  # fmt: skip
    header = [
        "targets at", "student GFLOP", "images/s, cached", "images/s, live", "gain, times", "features, GB/s a GPU",
        "GPUs that storage feeds", "cores to decode, cached", "cores to decode, live",
    ]  # fmt: skip
    print(table(header, rows))
    epochs, rows = options.num_epochs, []
    for title, images in IMAGES.items():
        teacher_hours = images / teacher_s / 3600
        for name, places in kinds.items():
            cells = [title, name, size(kilobytes(places) * images)]
            if not places:
                rows.append([*cells, number(teacher_hours), "", "", ""])
                continue
            student_hours = (
                images * epochs * student_flops(places) / options.gpu_tflops / 1e12 / options.student_mfu / 3600
            )
            live, cached = student_hours + epochs * teacher_hours, student_hours + teacher_hours
            bound = images * epochs * options.decode_ms / 1e3 / options.cpu_cores / 3600
            rows.append([*cells, number(teacher_hours), number(live), number(cached), number(bound)])
    header = [
        "images", "targets at", "bytes", "GPU h to ask once", f"GPU h, {epochs} epochs, live", "the same, cached",
        f"GPU h that {options.cpu_cores} cores need to decode",
    ]  # fmt: skip
    print("\n" + table(header, rows))
    print(f"\nEncoded images: {', '.join(f'{title}: {size(options.image_kb * n)}' for title, n in IMAGES.items())}.")


if __name__ == "__main__":
    main()
