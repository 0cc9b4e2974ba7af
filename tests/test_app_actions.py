"""The app without its page: actions as plain functions, what visitors upload and write, how the Space is described."""

import copy
import io
import sys
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard, SpaceCardData
from PIL import Image

from apm_hf.app import launch
from apm_hf.app.blend_tab import blend, blend_pictures
from apm_hf.app.islands_tab import island_pictures, photo_features, point_of_pixel, similarity_picture
from apm_hf.app.labels_tab import adaptation, curve_picture
from apm_hf.app.models import load_models
from apm_hf.app.pictures import Picture, figures_html, scores_html
from apm_hf.app.uploads import MAX_LABELS, read_labels, read_upload, shown_size, unknown_labels
from apm_hf.assets import DEMO_TEACHER
from apm_hf.data.scenes import make_scene

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples" / "space"


@pytest.fixture(scope="module")
def models():
    """The embedded APM, its teacher and the control."""
    return load_models()


@pytest.fixture(scope="module")
def scene():
    return make_scene(3, seed=11, image_size=96).image


@pytest.fixture(scope="module")
def seen(models, scene):
    return photo_features(models, scene, size=64)


def pixels(picture):
    return np.asarray(picture.image, dtype=np.int16)


def differ(one, other):
    return np.abs(pixels(one) - pixels(other)).mean()


def test_islands_stand_at_three_heights_beside_what_they_are_made_of_and_controls(models, seen):
    islands, made_of = island_pictures(models, seen, (2, 5, 9))
    assert [picture.title for picture in islands] == ["2 wholes", "5 parts", "9 sub-parts", "Control: 5 parts"]
    assert [picture.title for picture in made_of] == ["Features", "Teacher", "RGB decoded", "Control: features"]
    for row in (islands, made_of):
        assert [picture.is_control for picture in row] == [False, False, False, True]
        assert all(picture.image.size == (480, 480) and picture.image.mode == "RGB" for picture in row)
        assert min(differ(row[0], other) for other in row[1:]) > 2
    again = island_pictures(models, seen, (2, 5, 9))
    assert all(
        differ(*two) == 0
        for row, same in zip((islands, made_of), again, strict=True)
        for two in zip(row, same, strict=True)
    )
    decoded = made_of[2].image.resize((24, 24), Image.Resampling.BOX)
    photo = seen.photo.resize((24, 24), Image.Resampling.BOX)
    assert np.abs(np.asarray(decoded, dtype=float) - np.asarray(photo)).mean() < 25  # the photo, if blurred


@pytest.mark.parametrize("heights", [(6, 2, 20), (2, 2, 3), (0, 1, 2), (2, 6, 10**6)])
def test_heights_that_are_no_heights_are_refused(models, seen, heights):
    with pytest.raises(ValueError, match="three numbers of regions, each above the last|too many for this photo"):
        island_pictures(models, seen, heights)


def test_a_photo_of_any_shape_has_islands_in_its_shape(models):
    wide = photo_features(models, Image.effect_noise((300, 40), 50).convert("RGB"), size=64)
    islands, made_of = island_pictures(models, wide)
    assert {picture.image.size for picture in islands + made_of} == {(480, 64)}


def test_without_a_teacher_islands_are_shown_and_labels_refused(models, scene, seen):
    alone = copy.copy(models)
    object.__setattr__(alone, "apm", copy.copy(models.apm))
    object.__setattr__(alone.apm, "teacher", None)
    assert [picture.title for picture in island_pictures(alone, seen)[1]] == [
        "Features",
        "RGB decoded",
        "Control: features",
    ]
    with pytest.raises(ValueError, match="Labels need a teacher that reads"):
        next(adaptation(alone, scene, ["cat", "boat"]))


def test_similarity_is_to_the_point_given(models, seen):
    picture = similarity_picture(models, seen, (0.5, -0.5))
    assert "y 0.50, x -0.50" in picture.note
    assert differ(picture, similarity_picture(models, seen, (0.5, -0.5))) == 0
    assert differ(picture, similarity_picture(models, seen, (-0.7, 0.6))) > 2
    with pytest.raises(ValueError, match="outside of the photo"):
        similarity_picture(models, seen, (0.0, 1.1))


def test_pixels_become_coordinates_of_the_photo_as_it_is_shown(tmp_path):
    assert point_of_pixel(0, 0, (200, 100)) == pytest.approx((-0.99, -0.995))
    assert point_of_pixel(149.5, 24.5, (200, 100)) == pytest.approx((-0.5, 0.5))
    turned = Image.new("RGB", (80, 60))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert shown_size(str(tmp_path / "turned.jpg")) == (60, 80) == read_upload(str(tmp_path / "turned.jpg")).size


def test_photos_of_all_kinds_are_read_and_large_ones_scaled(tmp_path):
    Image.new("RGBA", (3000, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((4, 6), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_upload(str(tmp_path / "clear.png")).size == (1024, 7)
    assert read_upload(str(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    assert read_upload(str(tmp_path / "deep.png")).getpixel((0, 0)) == (156, 156, 156)


def test_what_is_no_photo_gets_one_clear_sentence(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    Image.new("1", (13_500, 13_500)).save(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("no picture")
    whole = io.BytesIO()
    make_scene(0).image.save(whole, format="JPEG")
    (tmp_path / "half.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    for name, sentence in {
        "huge.png": "more than 50 megapixels",
        "bomb.png": "more than 50 megapixels",
        "text.png": "cannot be read as a picture",
        "half.jpg": "damaged",
        "gone.png": "no longer on the server",
    }.items():
        with pytest.raises(ValueError, match=sentence) as raised:
            read_upload(str(tmp_path / name))
        assert str(tmp_path) not in str(raised.value)
    with pytest.raises(ValueError, match="There is no photo yet"):
        read_upload(None)


def test_labels_are_read_and_checked(models):
    assert read_labels(" cat,  sailing \tboat\ncat,,tree\n") == ["cat", "sailing boat", "tree"]
    for text, sentence in {
        "": "two labels at least",
        "cat, cat": "two labels at least",
        ", ".join(map(str, range(MAX_LABELS + 1))): f"{MAX_LABELS + 1} labels are too many",
        f"cat, {'a' * 61}": "60 characters at most",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            read_labels(text)
    assert unknown_labels(models.teacher, ["cat", "zebra", "tree"]) == ["zebra"]


def test_adaptation_brings_the_apm_to_its_teacher(models, scene):
    before = {name: weight.clone() for name, weight in models.model.state_dict().items()}
    labels = models.apm.default_labels
    seen = list(adaptation(models, scene, labels, start="random", num_steps=40))
    assert [progress.step for progress in seen] == [*range(0, 40, 4), 40]
    assert [len(progress.cosines) for progress in seen] == list(range(1, 12))
    cosines = dict(seen[-1].cosines)
    assert cosines[0] < 0.5 < 0.7 < cosines[40] <= 1
    for progress in seen:
        assert progress.before == seen[0].now and progress.teacher == seen[0].teacher
        assert sum(progress.now) == pytest.approx(1, abs=1e-4) and len(progress.now) == len(labels) == 12
    assert labels[np.argmax(seen[-1].teacher)] == labels[np.argmax(seen[-1].now)] == "cat"
    assert list(adaptation(models, scene, labels, start="random", num_steps=40)) == seen
    assert all(torch.equal(weight, before[name]) for name, weight in models.model.state_dict().items())
    curve = curve_picture(seen[-1], 40)
    assert f"{cosines[0]:.2f} before, {cosines[40]:.2f} after 40 steps" in curve.note and curve.image.width > 300
    distilled = next(adaptation(models, scene, labels, start="model", num_steps=1))
    assert distilled.cosines[0][1] > cosines[0] + 0.3


def test_an_adaptation_that_nobody_waits_for_ends(models, scene):
    num_threads = threading.active_count()
    frames = adaptation(models, scene, ["cat", "boat"], num_steps=100_000)
    assert next(frames).step == 0
    frames.close()
    assert threading.active_count() == num_threads


def test_a_blend_begins_and_ends_with_its_photos(models, scene, seen):
    other = make_scene(6, seed=11, image_size=96).image
    way = blend(models, scene, other)
    for alpha, photo in ((0.0, scene), (1.0, other)):
        expected = photo_features(models, photo, size=96).features
        frame = way.frame(alpha)
        cosine = torch.nn.functional.cosine_similarity(frame.features, expected, dim=-1)
        assert cosine.min() > 0.999
    first, middle, last = (blend_pictures(way, alpha) for alpha in (0.0, 0.5, 1.0))
    assert [picture.title for picture in middle] == ["RGB decoded", "Features"] and "50 % of photo B" in middle[0].note
    assert min(differ(first[0], last[0]), differ(first[1], middle[1]), differ(middle[1], last[1])) > 5
    column_alone = blend_pictures(blend(models, scene, other, patches="a"), 1.0)
    assert differ(column_alone[1], last[1]) > 5
    with pytest.raises(ValueError, match="between 0 and 1"):
        blend_pictures(way, 1.5)


def test_what_visitors_write_is_text_on_the_page():
    html = scores_html(["<b>x</b>", "y"], [("teacher", [0.25, 0.75])], "a caption")
    assert "&lt;b&gt;x&lt;/b&gt;" in html and "<b>" not in html and "25.0 %" in html
    figure = figures_html([Picture('"><script>', Image.new("RGB", (2, 3)), "seen", is_control=True)])
    assert "<script>" not in figure and 'width="2" height="3"' in figure and "apm-control" in figure


def test_a_teacher_needs_the_model_that_learnt_from_it():
    with pytest.raises(ValueError, match="expected an APM distilled from the teacher"):
        load_models(teacher=DEMO_TEACHER)


def test_without_gradio_the_app_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"apm_hf\[app\]"):
        launch()


def test_the_space_is_described_as_the_hub_wants_it():
    card = SpaceCard((SPACE / "README.md").read_text())
    assert isinstance(card.data, SpaceCardData)
    assert (card.data.sdk, card.data.app_file) == ("gradio", "app.py") and (SPACE / card.data.app_file).is_file()
    assert f"gradio=={card.data.sdk_version}\n" in (ROOT / "constraints.txt").read_text()
    assert len(card.data.short_description) <= 60  # the Hub's limit
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card.data["colorFrom"], card.data["colorTo"]} <= colours
    assert len((SPACE / "app.py").read_text().splitlines()) <= 60


def test_the_space_asks_for_what_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["app"], *extras["viz"]} - {"apm_hf[viz]"}
    assert {line for line in (SPACE / "requirements.txt").read_text().splitlines() if line[0] not in "#-"} == wanted
