"""Measure what a dense student costs and how good it is, beside its teacher: torch, ONNX Runtime and int8.

    python benchmarks/latency.py --repeats 2 --max_images 6                        # a quick try, on sample photos
    python benchmarks/latency.py --teacher FOLDER_OF_DEIT_TINY --data FOLDER

A row is a way from one photo's pixels to features on the grid that the teacher has at twice its usual side. All rows
of a teacher take turns in one process, and the shortest of `--repeats` times counts: ratios to the teacher at twice
the side are what to read. Quality is R² after the mean of every position, and the mean cosine, both to the features of
that row. Graphs are those of `apm export`: of a student with its teacher inside both parts, else the student's part,
beside the teacher in torch. int8 is onnxruntime's dynamic quantisation of the weights of these graphs.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from apm_hf import APM
from apm_hf.assets import EMBEDDED
from apm_hf.data.loading import load_images
from apm_hf.data.sample_photos import sample_photos
from apm_hf.evaluation.tables import markdown_table
from apm_hf.position_encoding import grid_coordinates, sample_grid
from apm_hf.publishing.export import export_model
from apm_hf.runs.provenance import commit, computer, versions
from apm_hf.teachers.dense_grids import tokens_at_half

Way = Callable[[Tensor], Tensor]  # pixel_values (1, 3, S, S) -> features (1, L, F)


def ways(apm: APM, folder: Path, threads: int) -> dict[str, Way]:
    """Return the rows of a pair by name; graphs are written to the folder."""
    student, teacher = apm.bare_model, apm.teacher
    assert teacher is not None
    side = student.config.image_size // teacher.patch_size
    places = grid_coordinates(side, side)

    def fine(pixels: Tensor) -> Tensor:
        features = teacher.encode_images(pixel_values=pixels).features
        assert features is not None
        return features.flatten(1, 2)

    def bilinear(pixels: Tensor) -> Tensor:
        return sample_grid(tokens_at_half(teacher, pixels), places[None])

    def in_torch(pixels: Tensor) -> Tensor:
        return student(pixels, places, trigger_column=tokens_at_half(teacher, pixels)).last_hidden_state

    export_model(student, folder / "onnx")
    for graph in sorted((folder / "onnx").glob("*.onnx")):
        quantize_dynamic(graph, folder / f"int8_{graph.name}")
        graph.rename(folder / f"float32_{graph.name}")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads

    def in_onnx(precision: str) -> Way:
        fold, query = (
            onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"]) if path.exists() else None
            for path in (folder / f"{precision}_fold.onnx", folder / f"{precision}_query.onnx")
        )

        def run(pixels: Tensor) -> Tensor:
            inputs = {"pixel_values": pixels.numpy(), "coordinates": places.numpy()}
            tokens = tokens_at_half(teacher, pixels).numpy() if fold is None else fold.run(None, only(fold, inputs))[0]
            return torch.from_numpy(query.run(["features"], only(query, inputs | {"trigger_column": tokens}))[0])

        return run

    where = "ONNX Runtime" if student.folds else "ONNX Runtime, its teacher in torch"
    return {
        "teacher at twice the side, torch": fine,
        "teacher, bilinear, torch": bilinear,
        "dense student, torch": in_torch,
        f"dense student, {where}": in_onnx("float32"),
        f"dense student, {where}, int8": in_onnx("int8"),
    }


def only(session: onnxruntime.InferenceSession, inputs: dict[str, object]) -> dict[str, object]:
    """Return the inputs that a graph takes."""
    return {entry.name: inputs[entry.name] for entry in session.get_inputs()}


@torch.inference_mode()
def measure(methods: dict[str, Way], pixels: Tensor, repeats: int) -> list[list[str]]:
    """Return rows: name, milliseconds, ratio to the first, R² and cosine to the first's features."""
    outputs = {name: torch.cat([method(one[None]).float() for one in pixels]) for name, method in methods.items()}
    times = dict.fromkeys(methods, float("inf"))
    for _ in range(repeats):
        for name, method in methods.items():
            begin = time.perf_counter()
            method(pixels[:1])
            times[name] = min(times[name], time.perf_counter() - begin)
    wanted, rows = next(iter(outputs.values())), []  # (N, L, F)
    std = wanted.flatten(0, 1).std(dim=0)
    total = ((wanted - wanted.mean(dim=0)) / std).square().sum()
    for name, output in outputs.items():
        r2 = 1 - ((output - wanted) / std).square().sum() / total
        cosine = F.cosine_similarity(output, wanted, dim=-1).mean()
        ratio = times[name] / next(iter(times.values()))
        rows.append([name, f"{1e3 * times[name]:.1f}", f"{ratio:.2f}", f"{r2:.3f}", f"{cosine:.3f}"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", help="another one beside the embedded one, with its dense student in the package")
    parser.add_argument("--data", help="photos to measure quality on (default: six sample photos)")
    parser.add_argument("--max_images", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    for name in (None, "torch.onnx"):  # of exporter and quantisation, about themselves
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    if options.data is None:
        photos = list(sample_photos().values())[: options.max_images]
    else:
        photos = [photo() for photo in load_images(options.data, max_images=options.max_images, seed=0).photos()]
    print(
        f"Commit {commit()}, {computer()}, torch {versions()['torch']}, onnxruntime {onnxruntime.__version__}, ",
        end="",
    )
    print(f"{options.threads} threads; {len(photos)} photos.")
    for name in (EMBEDDED, *([options.teacher] if options.teacher else [])):
        apm = APM.load(teacher=name, device="cpu").with_dense_student()
        if apm is None:
            raise SystemExit(f"--teacher: expected one of which the package has a dense student, got {name}")
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            methods = ways(apm, Path(folder), options.threads)
            rows = measure(methods, apm.pixel_values(photos), options.repeats)
            sizes = {file.name: file.stat().st_size / 1e6 for file in sorted(Path(folder).glob("*.onnx"))}
        size = f"{apm.bare_model.num_parameters(only_trainable=True) / 1e6:.1f} M"
        print(f"\nTeacher: {Path(name).name}; student of {size} parameters\n")
        print(markdown_table(["one photo", "ms", "ratio", "R²", "cosine"], rows))
        print("Graphs: " + ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
