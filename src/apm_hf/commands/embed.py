"""`apm embed`: folders of photos in, a file with one vector per photo out."""

import argparse
import os
from typing import Any

from .options import add
from .pairs import ABOUT_NOTE, ABOUT_TEACHER, add_teacher_option, load, note, teacher_name

HELP = "write one vector per photo to a parquet, NumPy or safetensors file"
DESCRIPTION = """
Write one vector per photo, with the photo's path, to a file for search, deduplication or a classifier of your own. The
vectors are the student's, which --model names, the teacher's, or both. Photos that cannot be read are listed and left
out. Parts of the work lie beside the file until it is written; the same command goes on from them. Without
--teacher and --model a public teacher is fetched from the Hub once, and said; where that is out of reach, the small
one of photos in this package is used. Vectors of different teachers cannot be compared: name one for what is to grow.
"""
EXAMPLES = (
    "apm embed photos --model user/apm-photos --output vectors.parquet",
    "apm embed photos --teacher facebook/dinov2-small --output vectors.npy --normalize",
    "apm embed photos --model user/apm-photos --teacher facebook/dinov2-small --source both --output vectors.parquet",
)
RESULT = {
    "file": "with the vectors",
    "photos": "number of vectors",
    "feature_size": "width of a vector",
    "sources": "whose vectors they are: student, teacher",
    "normalized": "whether they have length 1",
    "model": "as given, or null",
    "teacher": ABOUT_TEACHER,
    "note": ABOUT_NOTE,
    "errors": "a list: photo and message, of those that could not be read",
}
INTERRUPTED = "the same command goes on from the parts beside the output file"
SMALLER = "a smaller --batch_size"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files, folders or patterns")
    parser.add_argument(
        "--output", metavar="FILE", required=True, help="file to write, that ends in .parquet, .npy or .safetensors"
    )
    add(parser, "--model", "the student")
    add_teacher_option(parser, "the one that the student was distilled from, or one alone")
    parser.add_argument(
        "--source",
        choices=("student", "teacher", "both"),
        help="whose vectors; by default the student's where there is one, unless it is dense",
    )
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1, as cosine search needs")
    add(parser, "--batch_size", default=32)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read photos")
    parser.add_argument("--overwrite", action="store_true", help="replace the file, and begin anew")


def run(options: argparse.Namespace) -> dict[str, Any]:
    from ..data.folders import find_photos
    from ..pair.vectors import SOURCES, check_output, write_vectors

    sources = SOURCES if options.source == "both" else options.source and [options.source]
    check_output(options.output, sources, overwrite=options.overwrite)
    photos = find_photos(options.photos)
    apm = load(options, "vectors")
    alone = len(options.photos) == 1 and os.path.isdir(options.photos[0])
    vectors = write_vectors(
        apm,
        photos,
        options.output,
        folder=options.photos[0] if alone else None,
        sources=sources,
        normalize=options.normalize,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        overwrite=options.overwrite,
    )
    left_out = f", {len(vectors.unreadable)} photos left out" if vectors.unreadable else ""
    print(f"{vectors.file}: {len(vectors.paths)} vectors of width {vectors.feature_size}{left_out}")
    return {
        "file": vectors.file,
        "photos": len(vectors.paths),
        "feature_size": vectors.feature_size,
        "sources": vectors.sources,
        "normalized": options.normalize,
        "model": options.model,
        "teacher": teacher_name(apm),
        "note": note(apm),
        "errors": vectors.unreadable,
    }
