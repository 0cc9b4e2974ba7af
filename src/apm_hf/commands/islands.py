"""`apm islands`: the islands of a photo, with what they have to be compared with, and how they come about."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .models import TOLD, Machine, add_machine_options, describe, load_machine, read_photo, tell
from .options import add

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..islands.pictures import IslandsConfig
    from ..modeling_apm import APMModel

HELP = "draw the parts and wholes an APM sees in a photo, beside its controls"
DESCRIPTION = """
Draw the islands of agreement an APM sees in a photo: its features as colours, regions at several heights, places that
look alike, beside the teacher's grid and the controls they have to be compared with; and a film of how they come
about.
"""
EXAMPLES = (
    "apm islands photo.jpg --output_dir islands",
    "apm islands photo.jpg --teacher openai/clip-vit-large-patch14 --text 'a dog' --output_dir islands --movie",
    "apm islands photo.jpg --model user/apm-photos --point 0.1 -0.5 --heights 3 9 27 --output_dir islands",
)
RESULT = TOLD
INTERRUPTED = "a fit cannot go on where it was; start it again"
SMALLER = "a smaller --size"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", metavar="PHOTO", help="image file")
    add(parser, "--output_dir", "the pictures", required=True)
    add_machine_options(parser)
    parser.add_argument(
        "--adapt", action="store_true", help="fit the --model to the teacher's answers about the photo"
    )
    parser.add_argument("--movie", action="store_true", help="also a movie over the steps of the fit; means --adapt")
    add(parser, "--steps", default=300)
    add(parser, "--size", default=256)
    parser.add_argument("--heights", type=int, nargs="+", default=[2, 6, 20], help="numbers of regions")
    parser.add_argument("--colours", default="pca", choices=("pca", "tsne", "umap"), help="of the features")
    parser.add_argument(
        "--point", type=float, nargs=2, action="append", default=[], metavar=("Y", "X"),
        help="in [-1, 1]: where else does it look like there? may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--text",
        metavar="TEXT",
        action="append",
        default=[],
        help="where is it? for a teacher that reads; may be repeated",
    )
    add(parser, "--seed", default=0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..islands.pictures import IslandsConfig, islands_picture
    from ..ttt.photos import teacher_features

    config = IslandsConfig(
        size=options.size,
        heights=options.heights,
        colours=options.colours,
        points=[(y, x) for y, x in options.point],
        seed=options.seed,
    )
    if options.steps < 1:
        raise ValueError(f"--steps: expected a positive number, got {options.steps}")
    photo = read_photo(options.photo)
    machine = load_machine(options)
    teacher = machine.teacher
    fits = machine.is_fresh or options.adapt or options.movie
    if fits and teacher is None:
        raise ValueError("--adapt, --movie: expected --teacher, to whose answers the machine is fitted")
    if options.text and (teacher is None or not teacher.has_text):
        raise ValueError(f"--text: expected a teacher with a text tower, got {options.teacher}")
    pixel_values, trigger_column = machine.pixel_values([photo]), machine.trigger_column([photo])
    features, texts = None, {}
    if teacher is not None:
        features = teacher_features(teacher, [photo], fine=machine.is_fresh)
    if teacher is not None and options.text:
        texts = dict(zip(options.text, teacher.encode_text(options.text, ("{}",)), strict=True))
    model, movie = machine.model, list[Path]()
    if fits:
        assert features is not None
        model, movie = _fit(machine, photo, pixel_values, features, trigger_column, config, options)
    picture = islands_picture(
        photo,
        Path(options.output_dir),
        model,
        pixel_values,
        config=config,
        trigger_column=trigger_column,
        teacher_features=None if features is None else features[0],
        text_embeds=texts,
        caption=describe(
            machine, f"fitted to this photo in {options.steps} steps" if fits else "not fitted to this photo"
        ),
    )
    return tell(options, [picture, *movie], machine, fitted=fits)


def _fit(
    machine: Machine,
    photo: "Image.Image",
    pixel_values: "Tensor",
    features: "Tensor",
    trigger_column: "Tensor | None",
    config: "IslandsConfig",
    options: argparse.Namespace,
) -> tuple["APMModel", list[Path]]:
    """The machine fitted to the photo, and the files of the movie, if one is asked for."""
    from ..islands.fitting_film import IslandsMovie
    from ..ttt.photos import fit_photo, photo_colours

    movie = None
    if options.movie:
        movie = IslandsMovie(
            photo, pixel_values, features[0], options.steps, config=config, trigger_column=trigger_column
        )
    rows, cols = features.shape[1:3]
    model = fit_photo(
        machine.model,
        pixel_values,
        features,
        photo_colours(photo, (rows, cols)) if machine.model.config.use_rgb_head else None,
        steps=options.steps,
        trigger_column=trigger_column,
        seed=options.seed,
        on_step=None if movie is None else movie.on_step,
    )
    if movie is None:
        return model, []
    movie.on_step(options.steps, model)
    return model, movie.write(Path(options.output_dir))
