"""Views: drawn from their own seed alone, inside the asked ranges, and encoded just as they are.

Legend: B images, (width, height) of a picture.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from apm_hf import load_teacher
from apm_hf.assets import DEMO_TEACHER
from apm_hf.evaluation.methods.task import ImageBatch
from apm_hf.evaluation.methods.views import ViewConfig, make_view, view_encoder
from fixtures_tiny import TEACHER_SIZE, photo, save_classifier, save_clip

WIDTH, HEIGHT = 90, 60


@pytest.fixture(scope="module", params=[save_clip, save_classifier, None], ids=["crops", "squeezes", "demo"])
def teacher(request, tmp_path_factory):
    folder = DEMO_TEACHER if request.param is None else request.param(tmp_path_factory.mktemp("teacher"))
    return load_teacher(folder, device="cpu")


def coordinates(width=WIDTH, height=HEIGHT):
    """A picture whose red is the column and whose green is the row of a pixel."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def box(view, size):
    """Left, top, right and bottom edge, in pixels of `coordinates`, and whether it is mirrored."""
    columns, rows = np.asarray(view, dtype=float)[..., 0].mean(axis=0), np.asarray(view, dtype=float)[..., 1].mean(1)
    mirrored = columns[0] > columns[-1]
    edges = []
    for line in (columns[::-1] if mirrored else columns, rows):
        inner = slice(size // 4, -(size // 4))  # resampling bends the ends
        slope, start = np.polyfit(np.arange(size)[inner], line[inner], 1)
        edges.append((start - slope / 2 + 0.5, start + slope * (size - 0.5) + 0.5))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1], mirrored


def test_view_0_is_the_image_itself():
    image = photo(0)
    assert make_view(image, 0, seed=3, size=8) is image


def test_a_view_depends_on_image_number_and_seed_alone():
    image = photo(0)
    np.random.seed(0)
    first = np.asarray(make_view(image, 1, seed=5, size=16))
    np.random.seed(1)
    again = np.asarray(make_view(image.copy(), 1, seed=5, size=16))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (16, 16, 3)
    for other in (make_view(image, 2, seed=5, size=16), make_view(image, 1, seed=6, size=16)):
        assert np.abs(first.astype(int) - np.asarray(other)).mean() > 2


def test_crops_have_area_and_ratio_in_range_and_lie_inside_half_of_them_mirrored():
    config, size, image = ViewConfig(scale=(0.2, 0.5), ratio=(0.75, 1.5)), 48, coordinates()
    boxes = [box(make_view(image, 1 + n, seed=n, size=size, config=config), size) for n in range(300)]
    left, top, right, bottom, mirrored = map(np.array, zip(*boxes, strict=True))
    shares, ratios = (right - left) * (bottom - top) / (WIDTH * HEIGHT), (right - left) / (bottom - top)
    # Edges lie on pixels: 30 of them are up to 2 % more or less.
    assert shares.min() > 0.2 * 0.95 and shares.max() < 0.5 * 1.05
    assert ratios.min() > 0.75 * 0.94 and ratios.max() < 1.5 * 1.06
    assert shares.min() < 0.23 and shares.max() > 0.47 and ratios.min() < 0.8 and ratios.max() > 1.4
    assert min(left.min(), top.min()) > -2 and right.max() < WIDTH + 2 and bottom.max() < HEIGHT + 2
    assert left.min() < 5 and right.max() > WIDTH - 5 and top.min() < 5 and bottom.max() > HEIGHT - 5
    assert 0.4 < mirrored.mean() < 0.6
    # Area and log ratio are uniform: their means lie in the middle.
    assert abs(shares.mean() - 0.35) < 0.02 and abs(np.log(ratios).mean() - np.log([0.75, 1.5]).mean()) < 0.06


@pytest.mark.parametrize(("flip", "expected"), [(0.0, False), (1.0, True)])
def test_mirroring_can_be_had_never_or_always(flip, expected):
    image, config = coordinates(), ViewConfig(flip=flip, scale=(0.5, 1.0))
    assert all(box(make_view(image, n, seed=n, size=32, config=config), 32)[4] == expected for n in range(1, 20))


def test_by_default_crops_are_those_of_test_time_prompt_tuning():
    assert ViewConfig() == ViewConfig(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)
    image = coordinates()
    assert (
        make_view(image, 1, seed=0, size=9).tobytes()
        == make_view(image, 1, seed=0, size=9, config=ViewConfig()).tobytes()
    )


def test_where_no_crop_fits_the_largest_central_one_is_taken():
    config = ViewConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    for image, expected in ((coordinates(90, 30), (30, 0, 60, 30)), (coordinates(30, 90), (0, 30, 30, 60))):
        view = make_view(image, 1, seed=0, size=30, config=config)
        np.testing.assert_array_equal(np.asarray(view), np.asarray(image.crop(expected)))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 2)])
def test_tiny_and_thin_images_have_views_too(size):
    for view in range(1, 10):
        assert make_view(photo(0, size=size), view, seed=view, size=12).size == (12, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.1)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
    ],
)
def test_ranges_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=f"{message}: expected"):
        ViewConfig(**options)


def test_negative_numbers_are_refused():
    for arguments in ({"view": -1}, {"seed": -1}, {"size": 0}):
        with pytest.raises(ValueError, match="view, seed, size: expected"):
            make_view(photo(0), **{"view": 1, "seed": 0, "size": 8, **arguments})


def batch_of(teacher, seeds, **options):
    images = [photo(seed, size=(50 + seed, 40)) for seed in seeds]
    return ImageBatch(images, list(seeds), list(seeds), view_encoder(teacher, **options))


def test_view_0_is_encoded_the_teachers_own_way(teacher):
    batch = batch_of(teacher, range(3))
    expected = teacher.encode_images(batch.images).image_embeds
    torch.testing.assert_close(batch.embeds(1)[:, 0], expected, rtol=0, atol=0)


def test_other_views_are_neither_resized_nor_cropped_again(teacher, monkeypatch):
    batch, size, given = batch_of(teacher, range(3)), teacher.image_size, []
    encode = teacher.encode_images
    monkeypatch.setattr(
        teacher, "encode_images", lambda *args, **kwargs: given.append(kwargs) or encode(*args, **kwargs)
    )
    embeds = batch.encode(batch, 2)
    (pixel_values,) = [arguments["pixel_values"] for arguments in given]
    processor = teacher.image_processor
    for row, image in enumerate(batch.images):
        view = make_view(image, 2, seed=batch.seeds[row], size=size)
        expected = np.asarray(view, dtype=np.float32) / 255
        expected = (expected - np.array(processor.image_mean)) / np.array(processor.image_std)
        np.testing.assert_allclose(pixel_values[row].permute(1, 2, 0), expected, atol=1e-5)
    torch.testing.assert_close(embeds, encode(pixel_values=pixel_values).image_embeds, rtol=0, atol=0)


def test_embeddings_of_views_do_not_depend_on_the_other_images(teacher):
    together = batch_of(teacher, [0, 1, 2]).embeds(4)
    alone = torch.cat([batch_of(teacher, [seed]).embeds(4) for seed in (2, 0, 1)])
    torch.testing.assert_close(together[[2, 0, 1]], alone, atol=1e-4, rtol=1e-4)
    distances = (together[:, :, None] - together[:, None]).norm(dim=-1)  # (B, V, V)
    assert distances[:, *torch.triu_indices(4, 4, 1)].min() > 1e-2, "two views are the same"


def test_the_encoder_draws_views_as_configured(tmp_path):
    teacher = load_teacher(save_clip(tmp_path), device="cpu")
    whole = ViewConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    square = photo(0, size=(TEACHER_SIZE, TEACHER_SIZE))
    batch = ImageBatch([square], [0], [0], view_encoder(teacher, config=whole))
    processor = teacher.image_processor
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    pixels = (torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(
        batch.embeds(2)[:, 1], teacher.encode_images(pixel_values=pixels[None]).image_embeds, atol=1e-5, rtol=1e-5
    )
