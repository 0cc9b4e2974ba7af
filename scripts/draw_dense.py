"""Draw what the shipped dense student adds to its teacher's grid, for photos of Caltech-101 that it has not seen.

    python scripts/draw_dense.py --teacher FOLDER --dataset FOLDER --output docs/dense/features.jpg

Caltech-101 (Fei-Fei Li, Marco Andreetto, Marc'Aurelio Ranzato, Pietro Perona) is CC BY 4.0. The photos are the first
of those that `scripts/make_dense.py` holds out. Each row has one basis: the three principal components of the
teacher's features at twice the side.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from apm_hf import APM
from apm_hf.assets import DENSE_MODEL
from apm_hf.data.loading import train_and_validation
from apm_hf.islands.colours import PCAColours
from apm_hf.runs.files import write_atomically
from apm_hf.ttt.maps import upsample
from apm_hf.ttt.photos import whole_photos

SIDE, GAP, TITLE = 224, 6, 18  # pixels
TITLES = ("photo", "teacher's grid", "bilinear", "dense student", "teacher at twice the side")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--model", default=DENSE_MODEL)
    parser.add_argument("--num_photos", type=int, default=6)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    apm = APM.load(options.model, teacher=options.teacher)
    _, held_out = train_and_validation(
        options.dataset, validation_fraction=0.1, max_images=3000, max_validation_images=256, seed=0
    )
    rows = [panels(apm, held_out.photo(number)) for number in range(options.num_photos)]
    sheet = Image.new("RGB", (len(TITLES) * (SIDE + GAP) - GAP, TITLE + len(rows) * (SIDE + GAP) - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(TITLES):
        draw.text((column * (SIDE + GAP) + 2, 3), title, fill="black")
        for row, pictures in enumerate(rows):
            sheet.paste(pictures[column], (column * (SIDE + GAP), TITLE + row * (SIDE + GAP)))
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=75)
    write_atomically(Path(options.output), content.getvalue())


def panels(apm: APM, photo: Image.Image) -> list[Image.Image]:
    """Return the pictures of one row, as wide as high."""
    teacher = apm.teacher
    assert teacher is not None
    pixels = whole_photos(teacher.image_processor, [photo], (2 * teacher.image_size,) * 2)
    reference = teacher.encode_images(pixel_values=pixels).features
    assert reference is not None
    grid = apm.encode_dense(photo, source="teacher")
    colours = PCAColours.fit(reference[0])
    maps = [
        grid,
        upsample(grid, (SIDE, SIDE)),
        apm.encode_dense(photo, size=(SIDE, SIDE)),
        upsample(reference, (SIDE, SIDE)),
    ]
    return [photo.resize((SIDE, SIDE)), *(_picture(colours(features[0])) for features in maps)]


def _picture(values: np.ndarray) -> Image.Image:
    picture = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
