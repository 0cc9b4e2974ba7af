"""`apm interpolate`: what an APM sees between two photos, as a strip and a movie."""

import argparse
from pathlib import Path
from typing import Any

from .options import add
from .pairs import RESULT, add_pair_options, caption, load_pair, result

__all__ = ["RESULT"]

HELP = "blend the trigger columns of two photos: colours and features on the way, as a strip and a movie"
DESCRIPTION = """
Go from one photo's trigger column to another's in small steps and draw what the APM answers on the way: colours and
features, as a strip and a movie. Of a dense student the teacher's tokens are blended. With --teacher alone it is the
dense student of this teacher in the package, if there is one; else, or with --fresh, a fresh student is first
distilled on the two photos alone.
"""
EXAMPLES = (
    "apm interpolate one.jpg other.jpg --output_dir frames",
    "apm interpolate one.jpg other.jpg --teacher openai/clip-vit-large-patch14 --trigger_only --output_dir frames",
)
INTERRUPTED = "a fit cannot go on where it was; start it again"
SMALLER = "a smaller --size or --frames"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs=2, metavar="PHOTO", help="image files; drawn in the first one's shape")
    add(parser, "--output_dir", "the pictures", required=True)
    add_pair_options(parser)
    add(parser, "--steps", "of a fresh student", default=300)
    parser.add_argument(
        "--trigger_only", action="store_true", help="a fresh student, that sees no pixels beside the trigger column"
    )
    parser.add_argument("--frames", type=int, default=25, help="from photo to photo")
    add(parser, "--size", default=192)
    parser.add_argument("--blending", default="linear", choices=("linear", "spherical"), help="of the columns")
    parser.add_argument(
        "--patches", default="blend", choices=("blend", "a", "b"), help="of students that see local patches"
    )
    parser.add_argument("--fps", type=float, default=10, help="frames a second")
    add(parser, "--seed", default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..data.images import read_rgb
    from ..islands.interpolation_pictures import InterpolationConfig, interpolation_picture
    from ..runs.files import writable_folder
    from ..ttt.photos import map_size

    config = InterpolationConfig(
        steps=options.frames, size=options.size, blending=options.blending, patches=options.patches, fps=options.fps
    )
    if options.steps < 1:
        raise ValueError(f"--steps: expected a positive number, got {options.steps}")
    photos = [read_rgb(path) for path in options.photos]
    writable_folder(options.output_dir)
    pair = load_pair(options, local_patch=not options.trigger_only, dense=not options.trigger_only)
    if options.trigger_only and pair.is_fitted:
        raise ValueError("--trigger_only: expected a fresh student, so --teacher without --model, or --fresh")
    what, fits = "not fitted to these photos", not pair.is_fitted
    if fits:
        pair = pair.fit(photos, steps=options.steps, seed=options.seed)
        what = f"distilled on these photos alone in {options.steps} steps"
    columns = pair.trigger_column(photos)
    if pair.bare_model.config.local_patch:
        local = {"blend": "of both photos, cross-faded", "a": "of photo A alone", "b": "of photo B alone"}
        what += f"; local patches {local[options.patches]}"
    files = interpolation_picture(
        (photos[0], photos[1]),
        Path(options.output_dir),
        pair.bare_model,
        pair.pixel_values(photos),
        map_size(photos[0], config.size),
        config=config,
        trigger_columns=None if columns is None else (columns[:1], columns[1:]),
        caption=caption(pair, what),
    )
    return result(options, files, pair, fitted=fits)
