"""Measure seconds and memory of features at many resolutions, and of a few places, beside interpolation and attention.

    python benchmarks/dense.py --sizes 224 448 896
    python benchmarks/dense.py --sizes 4096 --methods bilinear decoder
    python benchmarks/dense.py --places

A map of `size` locations along each side of one square photo, computed band by band and thrown away, as
`apm upsample` computes it before it writes. Seconds are without the teacher's pass, which has a line of its own,
except for the decoder, which makes it; memory is the peak of the process beyond what it held with the models loaded.
The teacher is a DeiT-Tiny and all weights are random: neither seconds nor memory depend on them. The attention
upsampler encodes the photo once and attends to all tokens, `rivals.PLACES` locations at a time. With `--places`:
seconds of k places after the teacher has run.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DeiTConfig, DeiTModel

from apm_hf import APM, APMConfig, APMModel
from apm_hf.distillation.rivals import AttentionUpsampler, bilinear
from apm_hf.evaluation.tables import markdown_table
from apm_hf.pair.upsampling import BAND_LOCATIONS, dense_rows
from apm_hf.position_encoding import cell_centres, grid_coordinates
from apm_hf.ttt.photos import photo_image_processor
from memory import MEBIBYTE, resident

PLACES = (1, 4, 16, 64, 256, 1024, 4096, 16384, 50176)


class EncodedOnce(nn.Module):
    """Stands in for the encoder of an attention upsampler whose photo has been encoded already."""

    def __init__(self, encoded: Tensor):
        super().__init__()
        self.encoded = encoded

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoded


def bands(call: Callable[[Tensor], Tensor], size: int) -> Iterator[Tensor]:
    """Yield a map's features in the bands of `dense_rows`, for a function of coordinates `(1, L, 2)`."""
    x = cell_centres(size)
    for part in cell_centres(size).split(max(1, BAND_LOCATIONS // size)):
        yield call(torch.stack(torch.meshgrid(part, x, indexing="ij"), dim=-1).flatten(0, 1)[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", type=int, default=[], help="locations along each side of a map")
    parser.add_argument("--methods", nargs="+", default=["bilinear", "decoder", "attention"])
    parser.add_argument("--places", action="store_true", help="also time k places")
    parser.add_argument("--repeats", type=int, default=3, help="of --places; the smallest counts")
    options = parser.parse_args()
    torch.manual_seed(0)
    tower = DeiTModel(
        DeiTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768), add_pooling_layer=False
    )
    student = APMModel(APMConfig.preset("dense", feature_size=192)).eval()
    student.set_teacher(tower)
    apm = APM(student, photo_image_processor(student.config.image_size), None)
    rival = AttentionUpsampler(192).eval().requires_grad_(False)
    photo = Image.fromarray(np.random.default_rng(0).integers(256, size=(640, 640, 3), dtype=np.uint8))
    pixels = apm.pixel_values(photo)
    begin = time.perf_counter()
    tokens = apm.trigger_column(photo)
    assert tokens is not None
    print(f"teacher's pass at half of {pixels.shape[-1]} pixels: {time.perf_counter() - begin:.3f} s\n")
    with torch.inference_mode():
        rows = [
            measure(name, size, apm, photo, pixels, tokens, rival)
            for size in options.sizes
            for name in options.methods
        ]
        if rows:
            print(markdown_table(["", "locations", "seconds", "MiB beyond the models"], rows))
        if options.places:
            print(
                markdown_table(
                    ["places", "milliseconds", "share of 224 x 224"], places(student, pixels, tokens, options.repeats)
                )
            )


def measure(
    name: str, size: int, apm: APM, photo: Image.Image, pixels: Tensor, tokens: Tensor, rival: AttentionUpsampler
) -> list[str]:
    """Return a row of the table."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, begin = resident("VmRSS"), time.perf_counter()
    if name == "decoder":
        parts = dense_rows(apm, photo, (size, size))
    elif name == "attention":
        encoder, rival.encoder = rival.encoder, EncodedOnce(rival.encoder(pixels))
        parts = bands(lambda places: rival(tokens, places, pixels), size)
    else:
        parts = bands(lambda places: bilinear(tokens, places, pixels), size)
    count = sum(part.numel() for part in parts) // 192
    seconds, beyond = time.perf_counter() - begin, resident("VmHWM") - before
    if name == "attention":
        rival.encoder = encoder
    return [name, f"{size:,} x {size:,} = {count:,}", f"{seconds:.3g}", f"{beyond / MEBIBYTE:.0f}"]


def places(student: APMModel, pixels: Tensor, tokens: Tensor, repeats: int) -> list[list[str]]:
    """Return rows: k places, their time and its share of all."""
    coordinates = grid_coordinates(224, 224)[torch.randperm(224 * 224)]
    smallest: dict[int, float] = dict.fromkeys(PLACES, float("inf"))
    for _ in range(repeats):
        for k in PLACES:
            begin = time.perf_counter()
            student(pixels, coordinates[:k], trigger_column=tokens)
            smallest[k] = min(smallest[k], time.perf_counter() - begin)
    return [[f"{k:,}", f"{1e3 * smallest[k]:.2f}", f"{smallest[k] / smallest[PLACES[-1]]:.4f}"] for k in PLACES]


if __name__ == "__main__":
    main()
