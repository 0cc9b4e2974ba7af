"""`apm interpolate`: what an APM sees between two photos, as a strip and a movie."""

import argparse
from pathlib import Path
from typing import Any

from .models import TOLD, add_machine_options, describe, load_machine, read_photo, tell
from .options import add

HELP = "blend the trigger columns of two photos: colours and features on the way, as a strip and a movie"
DESCRIPTION = """
Go from one photo's trigger column to another's in small steps and draw what the APM answers on the way: colours and
features, as a strip and a movie. Without --model a fresh machine is first distilled on the two photos alone.
"""
EXAMPLES = (
    "apm interpolate one.jpg other.jpg --output_dir frames",
    "apm interpolate one.jpg other.jpg --teacher openai/clip-vit-large-patch14 --trigger_only --output_dir frames",
)
RESULT = TOLD
INTERRUPTED = "a fit cannot go on where it was; start it again"
SMALLER = "a smaller --size or --frames"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs=2, metavar="PHOTO", help="image files; drawn in the first one's shape")
    add(parser, "--output_dir", "the pictures", required=True)
    add_machine_options(parser)
    add(parser, "--steps", "of a fresh machine", default=300)
    parser.add_argument(
        "--trigger_only", action="store_true", help="the fresh machine sees no pixels beside the trigger column"
    )
    parser.add_argument("--frames", type=int, default=25, help="from photo to photo")
    add(parser, "--size", default=192)
    parser.add_argument("--blending", default="linear", choices=("linear", "spherical"), help="of the columns")
    parser.add_argument(
        "--patches", default="blend", choices=("blend", "a", "b"), help="of machines that see local patches"
    )
    parser.add_argument("--fps", type=float, default=10, help="frames a second")
    add(parser, "--seed", default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..islands.interpolation_pictures import InterpolationConfig, interpolation_picture
    from ..ttt.photos import fit_photos, map_size, teacher_features

    config = InterpolationConfig(
        steps=options.frames, size=options.size, blending=options.blending, patches=options.patches, fps=options.fps
    )
    if options.steps < 1:
        raise ValueError(f"--steps: expected a positive number, got {options.steps}")
    first, second = (read_photo(path) for path in options.photos)
    machine = load_machine(options, local_patch=not options.trigger_only)
    if options.trigger_only and not machine.is_fresh:
        raise ValueError("--trigger_only: expected a fresh machine, so --teacher without --model, or --fresh")
    model, pixel_values = machine.model, machine.pixel_values([first, second])
    columns = machine.trigger_column([first, second])
    what = "not fitted to these photos"
    if machine.is_fresh:
        assert machine.teacher is not None
        features = teacher_features(machine.teacher, [first, second], fine=True)
        model = fit_photos(
            model, pixel_values, features, machine.image_processor, steps=options.steps, seed=options.seed
        )
        what = f"distilled on these photos alone in {options.steps} steps"
    if model.config.local_patch:
        local = {"blend": "of both photos, cross-faded", "a": "of photo A alone", "b": "of photo B alone"}
        what += f"; local patches {local[options.patches]}"
    files = interpolation_picture(
        (first, second),
        Path(options.output_dir),
        model,
        pixel_values,
        map_size(first, config.size),
        config=config,
        trigger_columns=None if columns is None else (columns[:1], columns[1:]),
        caption=describe(machine, what),
    )
    return tell(options, files, machine, fitted=machine.is_fresh)
