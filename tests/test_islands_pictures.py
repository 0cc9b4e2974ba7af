"""The figure of a photo's islands and the movie over a fit: what is drawn where, and the same bytes every time."""

import numpy as np
import pytest
import torch
from PIL import Image

from apm_hf.islands import feature_map
from apm_hf.islands.fitting_film import IslandsMovie
from apm_hf.islands.panels import Panel, draw_panels, draw_regions
from apm_hf.islands.pictures import IslandsConfig, error_map, islands_picture, shuffled
from apm_hf.ttt.photos import fit_photo
from fixtures_tiny import FEATURE_SIZE, STUDENT_SIZE, photo, student

CONFIG = IslandsConfig(size=16, heights=(2, 3, 5))


def small_model(**overrides):
    return student(initializer_range=0.3, local_patch=True, **overrides)


def pixels():
    return torch.randn(1, 3, STUDENT_SIZE, STUDENT_SIZE, generator=torch.Generator().manual_seed(0))


def teachers():
    """`(4, 5, F)`."""
    return torch.randn(4, 5, FEATURE_SIZE, generator=torch.Generator().manual_seed(1))


def halves():
    """Labels `(8, 8)`, left and right, and a red and a blue fill."""
    labels = np.zeros((8, 8), dtype=int)
    labels[:, 4:] = 7  # any numbers
    fill = np.where(labels[..., None] == 7, [0.0, 0.0, 1.0], [1.0, 0.0, 0.0])
    return labels, fill


def test_regions_are_tinted_and_a_white_line_runs_between_them_alone():
    labels, fill = halves()
    drawn = draw_regions(np.zeros((64, 64, 3), dtype=np.uint8), labels, fill)
    height, width = drawn.shape[:2]
    assert height == width and drawn.min() >= 0 and drawn.max() <= 1
    white = (drawn == 1).all(axis=-1)
    columns = np.flatnonzero(white.any(axis=0))
    assert white[:, columns].all() and abs(columns.mean() - width / 2) < 3 and len(columns) < 8
    left, right = drawn[:, : columns[0]], drawn[:, columns[-1] + 1 :]
    assert (left[..., 0] > left[..., 2]).all() and (right[..., 2] > right[..., 0]).all()


def test_the_photo_shows_through_its_regions():
    labels, fill = halves()
    dark, light = (draw_regions(np.full((32, 32, 3), value, np.uint8), labels, fill) for value in (20, 220))
    assert (light >= dark).all() and (light - dark).mean() > 0.1


def test_a_single_region_has_no_contour():
    drawn = draw_regions(np.zeros((20, 30, 3), np.uint8), np.zeros((4, 6), int), np.full((4, 6, 3), 0.5))
    assert not (drawn == 1).all(axis=-1).any() and drawn.shape[0] * 3 == pytest.approx(drawn.shape[1] * 2, abs=3)


def test_the_error_is_one_minus_the_cosine_at_the_teacher_s_patches():
    model = small_model()
    answers = feature_map(model, pixels(), (4, 5))[0]
    torch.testing.assert_close(error_map(model, pixels(), answers), torch.zeros(4, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(error_map(model, pixels(), -3 * answers), torch.full((4, 5), 2.0))
    expected = 1 - torch.nn.functional.cosine_similarity(answers, teachers(), dim=-1)
    torch.testing.assert_close(error_map(model, pixels(), teachers()), expected)


def test_shuffled_pixels_are_the_same_pixels_elsewhere():
    values = pixels()
    mixed = shuffled(values, 2, seed=0)
    assert torch.equal(mixed, shuffled(values, 2, seed=0)) and not torch.equal(mixed, shuffled(values, 2, seed=1))
    assert mixed.shape == values.shape and (mixed != values).float().mean() > 0.9
    rows = {tuple(pixel) for pixel in values[0].flatten(1).T.tolist()}  # a pixel keeps its three channels
    assert {tuple(pixel) for pixel in mixed[0].flatten(1).T.tolist()} == rows


def draw(folder, model=None, config=CONFIG, **options):
    model = small_model() if model is None else model
    return islands_picture(photo(0), folder, model, pixels(), config=config, **options)


def test_the_figure_is_the_same_bytes_for_the_same_seed(tmp_path):
    first, second, other = (
        draw(
            tmp_path / name,
            config=IslandsConfig(size=12, heights=(3,), points=((0.5, -0.25),), seed=seed),
            teacher_features=teachers(),
            text_embeds={"a cat": teachers()[0, 0]},
            caption="made so",
        )
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    )
    assert first.name == "islands.png" and first.read_bytes() == second.read_bytes()
    assert other.read_bytes() != first.read_bytes()


def titles(monkeypatch):
    """Titles of the panels that are drawn, row by row."""
    import apm_hf.islands.pictures as pictures

    rows = []

    def spy(panels, *args):
        rows.extend([[panel.title for panel in row] for row in panels])
        return draw_panels(panels, *args)

    monkeypatch.setattr(pictures, "draw_panels", spy)
    return rows


def test_controls_stand_below_every_model(tmp_path, monkeypatch):
    rows = titles(monkeypatch)
    draw(tmp_path)
    assert rows == [
        ["photo", "features (PCA)", "wholes (2)", "parts (3)", "sub-parts (5)"],
        ["RGB decoded", "control: random", "control: shuffled"],
    ]


def test_what_is_asked_for_is_drawn(tmp_path, monkeypatch):
    rows = titles(monkeypatch)
    config = IslandsConfig(size=16, heights=(3,), points=((0.0, 0.0), (1.0, -1.0)), colours="tsne")
    model = small_model(use_rgb_head=False)
    draw(tmp_path, model, config, teacher_features=teachers(), text_embeds={"a cat": teachers()[0, 0]})
    assert rows == [
        ["photo", "features (t-SNE)", "3 regions"],
        [
            *("teacher, upsampled", "error to teacher", "control: random", "control: shuffled"),
            *("like the point", "like the point", "“a cat”"),
        ],
    ]


def test_a_model_whose_columns_come_from_the_caller_is_drawn_too(tmp_path):
    model = student(initializer_range=0.3, trigger_source="embedding")
    column = torch.randn(1, FEATURE_SIZE, generator=torch.Generator().manual_seed(2))
    assert draw(tmp_path, model, trigger_column=column).exists()


def test_panels_fill_the_figure_and_nothing_is_cut_off():
    panels = [Panel("photo", np.zeros((4, 4, 3))), Panel("values", np.arange(16.0).reshape(4, 4), "unit")]
    figure = draw_panels([panels, panels[:1]], 1.0, "a caption")
    from apm_hf.islands.figures import figure_pixels

    pixels_of = figure_pixels(figure)
    border = np.concatenate([pixels_of[[0, -1]].reshape(-1, 3), pixels_of[:, [0, -1]].reshape(-1, 3)])
    assert (border == 255).all()  # no type, no line reaches the edge
    inked = np.argwhere((pixels_of < 255).any(axis=-1))
    margins = [*inked.min(axis=0), *(np.array(pixels_of.shape[:2]) - 1 - inked.max(axis=0))]
    assert max(margins) < 0.25 * figure.dpi


@pytest.mark.parametrize("aspect", [0.02, 50])
def test_photos_of_extreme_shape_make_no_figure_of_extreme_size(aspect):
    figure = draw_panels([[Panel("photo", np.zeros((4, 4, 3)))] * 5], aspect)
    assert max(figure.get_size_inches()) < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "size: expected at least 8 locations"),
        ({"heights": ()}, "heights: expected ascending"),
        ({"heights": (6, 2)}, "heights: expected ascending"),
        ({"heights": (0, 2)}, "heights: expected ascending"),
        ({"heights": (2, 2)}, "heights: expected ascending"),
        ({"colours": "rainbow"}, "colours: expected one of"),
        ({"points": ((0.0, 1.5),)}, "points: expected"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        IslandsConfig(**options)


def test_more_regions_than_locations_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="num_regions: expected 1 to"):
        draw(tmp_path, config=IslandsConfig(size=8, heights=(2, 1000)))
    assert not list(tmp_path.iterdir())


def film(folder, steps=5):
    config = IslandsConfig(size=12, heights=(2, 3, 5))
    movie = IslandsMovie(photo(0), pixels(), teachers(), steps, config=config)
    fitted = fit_photo(small_model(), pixels(), teachers()[None], None, steps=steps, on_step=movie.on_step)
    movie.on_step(steps, fitted)
    return movie, movie.write(folder)


def test_the_movie_runs_from_the_first_step_to_the_fitted_model(tmp_path):
    movie, files = film(tmp_path / "first")
    steps = [frame.step for frame in movie.frames]
    assert steps[0] == 0 and steps[-1] == 5 and steps == sorted(set(steps)) and len(steps) > 3
    assert [labels.max() + 1 for labels in movie.cuts()[-1]] == [2, 3, 5]
    assert [path.name for path in files][:1] == ["islands.gif"]
    with Image.open(files[0]) as gif:
        assert gif.n_frames == len(movie.frames)
    _, again = film(tmp_path / "second")
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]


def test_a_model_to_which_all_places_look_alike_shows_one_region():
    movie = IslandsMovie(photo(0), pixels(), teachers(), 5, config=IslandsConfig(size=8, heights=(2, 4)))
    blank, knowing = small_model(), small_model()
    with torch.no_grad():
        blank.decoder.feature_head.weight.mul_(1e-4)
        blank.decoder.feature_head.bias.fill_(1.0)
    movie.on_step(0, blank)
    movie.on_step(5, knowing)
    assert [[labels.max() + 1 for labels in cuts] for cuts in movie.cuts()] == [[1, 1], [2, 4]]


def test_a_long_fit_is_watched_at_few_steps_most_of_them_early():
    movie = IslandsMovie(photo(0), pixels(), teachers(), 1000, config=CONFIG)
    watched = sorted(movie.watched)
    assert len(watched) <= 24 and watched[0] == 0 and watched[-1] == 999 and watched[len(watched) // 2] < 100
