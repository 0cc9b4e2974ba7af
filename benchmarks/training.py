"""How fast a `dinov2-large` student is distilled from a DINOv2-L teacher, what it needs, and where the time goes.

    python benchmarks/training.py --quick
    python benchmarks/training.py --write

For one GPU. The teacher has DINOv2-L/14's architecture with registers and random weights (what a product costs does
not depend on its numbers), in bfloat16 on a GPU; the batch lies on the device already: reading and decoding images is
not measured. Figures are those of `speed.json` (docs/distributed.md). `--write` puts the table into
docs/scaling_measured.md.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from apm_hf import APMConfig, APMModel, Teacher
from apm_hf.distillation import DistillationConfig, distill
from apm_hf.image_processing_apm import APMImageProcessor
from apm_hf.runs.processes import process_state
from apm_hf.runs.provenance import commit, computer, versions

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "scaling_measured.md"
BEGIN, END = "<!-- training:begin -->", "<!-- training:end -->"
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518, "patch_size": 14}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
PATCH = 14


def outputs(module: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """The class token, and the patches without registers: `(B, F)`, `(B, rows, cols, F)`."""
    tokens = module(pixel_values).last_hidden_state
    grid = (pixel_values.shape[2] // PATCH, pixel_values.shape[3] // PATCH)
    return tokens[:, 0], tokens[:, 1 + module.config.num_register_tokens :].unflatten(1, grid)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    few = 4 if options.quick else 256
    compiled = {"torch_compile": "eager" if options.quick else "inductor"}
    precision = {"mixed_precision": "bf16"}
    return [
        {"name": f"bfloat16, {few} locations", **precision, "num_locations": few},
        {"name": f"bfloat16, {few} locations, compiled", **precision, **compiled, "num_locations": few},
        {"name": "bfloat16, all locations", **precision},
        {"name": "bfloat16, all locations, compiled", **precision, **compiled},
        {"name": f"float32, {few} locations", "mixed_precision": "no", "num_locations": few},
    ]


def measure(row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any] | None:
    """What `speed.json` says of a run; None where it does not fit into memory."""
    forget()
    device = process_state().device
    torch.manual_seed(0)
    config = APMConfig.preset("dinov2-large")
    if options.quick:
        config = APMConfig.preset("tiny", image_size=56, patch_size=PATCH, feature_size=TINY["hidden_size"])
    size = {"height": config.image_size, "width": config.image_size}
    module = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**(TINY if options.quick else LARGE)))
    module.to(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    processor = APMImageProcessor(size=size)
    teacher = Teacher.from_module(
        module, outputs=outputs, image_processor=processor, patch_size=PATCH, name="DINOv2-L, random"
    )
    pixels = torch.randn(options.batch_size, 3, config.image_size, config.image_size, device=device)
    batch = {"pixel_values": pixels, "teacher_pixel_values": pixels}
    with tempfile.TemporaryDirectory() as folder:
        settings = DistillationConfig(
            output_dir=folder,
            max_steps=options.steps,
            batch_size=options.batch_size,
            logging_steps=max(1, options.steps // 4),
            checkpoint_steps=0,
            cls_weight=0.0,  # the paper's recipe for the grid
            report_to="none",
            **{name: value for name, value in row.items() if name != "name"},
        )
        try:
            distill(
                APMModel(config),
                range(options.batch_size * options.steps),  # type: ignore[arg-type] - rows that nobody looks at
                config=settings,
                image_processor=processor,
                teacher=teacher,
                collate_fn=lambda indices: batch,
            )
        except torch.OutOfMemoryError:
            return None
        return json.loads(Path(folder, "speed.json").read_text())


def forget() -> None:
    """A fresh start in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def section(results: dict[str, dict[str, Any] | None], options: argparse.Namespace) -> str:
    known = versions()
    command = "python benchmarks/training.py" + (" --quick" if options.quick else "")
    lines = [
        f"`{command} --batch_size {options.batch_size} --steps {options.steps}` at commit {commit()}, on "
        f"{computer()}, torch {known['torch']}, accelerate {known['accelerate']}; one process, medians over reports.",
        "",
        "| | images/s | TFLOP/s | MFU | memory, GiB | student's share | teacher's share |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in results.items():
        if one is None:
            lines.append(f"| {name} | out of memory | | | | | |")
            continue
        tflops = sum(one["flops_per_image"].values()) * one["images_per_second"] / 1e12
        mfu = f"{one['mfu']:.1%}" if "mfu" in one else "peak unknown"
        shares = (f"{one[name]:.0%}" if name in one else "" for name in ("student_share", "teacher_share"))
        lines.append(
            f"| {name} | {one['images_per_second']:.4g} | {tflops:.3g} | {mfu} | {one['memory_gib']:.3g} | "
            + " | ".join(shares)
            + " |"
        )
    first = next((one for one in results.values() if one is not None), None)
    if first is not None and first["peak_flops"]:
        peak = f"{first['peak_flops'] / 1e12:.4g} TFLOP/s, dense bfloat16 ({first['peak_from']})"
        lines += ["", f"Peak that MFU is of, in float32 too: {peak}."]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Between the markers; where there are none, with them at the end."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = f"{BEGIN}\n{text}\n{END}"
    if BEGIN in before and END in before:
        head, tail = before.split(BEGIN, 1)[0], before.split(END, 1)[1]
        path.write_text(f"{head}{whole}{tail}", encoding="utf-8")
    else:
        path.write_text(f"{before}\n## Training speed\n\n{whole}\n".lstrip(), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny teacher and student, few steps")
    parser.add_argument("--batch_size", type=int, help="images a step (default: 64; 4 with --quick)")
    parser.add_argument("--steps", type=int, help="of each row, a multiple of 4 (default: 40; 4 with --quick)")
    parser.add_argument("--write", type=Path, nargs="?", const=DOCUMENT, help="a document (docs/scaling_measured.md)")
    options = parser.parse_args(arguments)
    options.batch_size = options.batch_size or (4 if options.quick else 64)
    options.steps = options.steps or (4 if options.quick else 40)
    text = section({row["name"]: measure(row, options) for row in rows(options)}, options)
    print(text)
    if options.write is not None:
        write(options.write, text)


if __name__ == "__main__":
    main()
