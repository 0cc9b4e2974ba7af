"""`apm islands`: the islands of a photo, with what they have to be compared with, and how they come about."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.files import plain_name
from .console import printable
from .options import add
from .pairs import RESULT, add_pair_options, caption, load_pair, result, teacher_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image
    from torch import Tensor

    from ..islands.pictures import IslandsConfig
    from ..pair import APM

logger = logging.getLogger("apm_hf")

__all__ = ["RESULT"]

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
INTERRUPTED = "a fit cannot go on where it was; start it again"
SMALLER = "a smaller --size"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files, folders or patterns")
    add(parser, "--output_dir", "the pictures", required=True)
    add_pair_options(parser)
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
    from ..data.folders import find_photos
    from ..data.images import read_rgb
    from ..islands.pictures import IslandsConfig
    from ..runs.files import writable_folder

    config = IslandsConfig(
        size=options.size,
        heights=options.heights,
        colours=options.colours,
        points=[(y, x) for y, x in options.point],
        seed=options.seed,
    )
    if options.steps < 1:
        raise ValueError(f"--steps: expected a positive number, got {options.steps}")
    photos = find_photos(options.photos)
    writable_folder(options.output_dir)
    task = "words" if options.text else "locations"
    pair = load_pair(options, task, dense=not (options.adapt or options.movie))
    teacher, fits = pair.teacher, not pair.is_fitted or options.adapt or options.movie
    if fits and teacher is None:
        raise ValueError("--adapt, --movie: expected --teacher, to whose features the student is fitted")
    if options.text and (teacher is None or not teacher.has_text):
        raise ValueError(f"--text: expected a teacher with a text tower, got {teacher_name(pair)}")
    texts = {}
    if teacher is not None and options.text:
        texts = dict(zip(options.text, teacher.encode_text(options.text, ("{}",)), strict=True))
    files: list[Path] = []
    folders = _folders(photos, Path(options.output_dir))
    errors = []
    for path, folder in zip(photos, folders, strict=True):
        try:
            photo = read_rgb(path)
        except ValueError as error:
            if len(photos) == 1:
                raise
            logger.error(f"apm islands: {printable(str(error))}")
            errors.append({"photo": path, "message": str(error)})
            continue
        files += _draw(pair, photo, folder, config, texts, options, fits=fits)
    return result(options, files, pair, fitted=fits) | {"errors": errors}


def _folders(photos: "Sequence[str]", output_dir: Path) -> list[Path]:
    """Name a folder for the pictures of each photo: of one, the output folder itself."""
    if len(photos) == 1:
        return [output_dir]
    stems = [Path(photo).stem for photo in photos]
    return [
        output_dir / (f"{number}-{plain_name(stem)}" if stems.count(stem) > 1 else plain_name(stem))
        for number, stem in enumerate(stems)
    ]


def _draw(
    pair: "APM",
    photo: "Image.Image",
    folder: Path,
    config: "IslandsConfig",
    texts: "Mapping[str, Tensor]",
    options: argparse.Namespace,
    *,
    fits: bool,
) -> list[Path]:
    """Draw the islands of one photo; return the files."""
    from ..islands.pictures import islands_picture
    from ..ttt.photos import teacher_features

    features, movie = None, list[Path]()
    if pair.teacher is not None:
        features = teacher_features(pair.teacher, [photo], fine=not pair.is_fitted)[0]
    if fits:
        pair, movie = _fit(pair, photo, folder, config, options)
    picture = islands_picture(
        photo,
        folder,
        pair.bare_model,
        pair.pixel_values(photo),
        config=config,
        trigger_column=pair.trigger_column(photo),
        teacher_features=features,
        text_embeds=texts,
        caption=caption(pair, f"{'' if fits else 'not '}fitted to this photo" + f" in {options.steps} steps" * fits),
    )
    return [picture, *movie]


def _fit(
    pair: "APM", photo: "Image.Image", folder: Path, config: "IslandsConfig", options: argparse.Namespace
) -> tuple["APM", list[Path]]:
    """Fit the student to the photo; also return the files of the movie, if one is asked for."""
    from ..islands.fitting_film import IslandsMovie
    from ..ttt.photos import teacher_features

    if not options.movie:
        return pair.fit(photo, steps=options.steps, seed=options.seed), []
    assert pair.teacher is not None
    movie = IslandsMovie(
        photo,
        pair.pixel_values(photo),
        teacher_features(pair.teacher, [photo], fine=not pair.is_fitted)[0],
        options.steps,
        config=config,
        trigger_column=pair.trigger_column(photo),
    )
    fitted = pair.fit(photo, steps=options.steps, seed=options.seed, on_step=movie.on_step)
    movie.on_step(options.steps, fitted.bare_model)
    return fitted, movie.write(folder)
