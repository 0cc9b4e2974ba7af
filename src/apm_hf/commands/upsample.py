"""`apm upsample`: the features of a photo at any resolution, as a file."""

import argparse
import logging
from pathlib import Path
from typing import Any

from .options import add
from .pairs import ABOUT_NOTE, ABOUT_TEACHER, add_teacher_option, load, note, teacher_name

logger = logging.getLogger("apm_hf")

HELP = "write a teacher's features of a photo at any resolution"
DESCRIPTION = """
Write the features of a photo at any resolution to a safetensors file, as `features` (rows, cols, width), computed row
by row in flat memory. With --model, a student is queried at each location; with --teacher alone, the dense student of
this teacher in the package, if there is one, else the teacher's grid is interpolated bilinearly. Without both, a small
public teacher is fetched from the Hub once, and said, or the one in this package is used; with its dense student.
"""
EXAMPLES = (
    "apm upsample a.jpg --model user/apm-dense --teacher facebook/dinov2-small --size 1024 --output map.safetensors",
    "apm upsample a.jpg --teacher facebook/dinov2-small --size 448 --output map.safetensors --picture map.png",
)
RESULT = {
    "file": "the safetensors file",
    "rows": "of the map",
    "cols": "of the map",
    "feature_size": "width of a feature",
    "bytes": "of the map",
    "picture": "the PNG file, or null",
    "teacher": ABOUT_TEACHER,
    "note": ABOUT_NOTE,
}
INTERRUPTED = "no file was written"
SMALLER = "a smaller --size"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", metavar="PHOTO", help="image file")
    parser.add_argument("--output", metavar="FILE", required=True, help="safetensors file to write")
    add(parser, "--model", "a student, e.g. one distilled with --preset dense")
    add_teacher_option(parser, "the one that the student was distilled from")
    add(parser, "--size", default=448)
    parser.add_argument(
        "--dtype", default="float16", choices=("bfloat16", "float16", "float32"), help="precision in the file"
    )
    parser.add_argument("--picture", metavar="FILE", help="also draw three principal components as a PNG file")


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ..data.images import read_rgb
    from ..pair.upsampling import write_dense

    photo = read_rgb(options.photo)
    apm = load(options, "locations")
    if apm.model is None:
        dense = apm.with_dense_student()
        apm, how = dense or apm, "bilinear interpolation" if dense is None else "the dense student in the package"
        logger.info(f"no --model: features by {how}")
    facts = write_dense(apm, photo, options.size, options.output, dtype=getattr(torch, options.dtype))
    if options.picture is not None:
        _draw(Path(options.output), Path(options.picture))
    print(f"{options.output}: {facts['rows']} x {facts['cols']} x {facts['feature_size']} {options.dtype}")
    about = {"picture": options.picture, "teacher": teacher_name(apm), "note": note(apm)}
    return {"file": options.output, **facts, **about}


def _draw(file: Path, picture: Path) -> None:
    """Draw the map's three principal components, fitted on some of its rows and columns."""
    import numpy as np
    from safetensors import safe_open

    from ..islands.colours import PCAColours
    from ..islands.figures import png_bytes
    from ..runs.files import write_atomically

    with safe_open(file, framework="pt") as tensors:
        features = tensors.get_tensor("features")
    step = max(1, max(features.shape[:2]) // 128)
    colours = PCAColours.fit(features[::step, ::step].float())
    rows = [colours(features[start : start + 64].float()) for start in range(0, len(features), 64)]
    write_atomically(picture, png_bytes(np.concatenate(rows)))
