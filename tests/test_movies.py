"""GIF and MP4 files, read back."""

import sys

import numpy as np
import pytest
from PIL import Image

from apm_hf.islands.films import write_gif, write_movies, write_mp4

COLOURS = [(255, 255, 255), (200, 30, 30), (30, 90, 200), (20, 20, 20), (240, 200, 40)]


def movie(num_frames=5, height=24, width=36):
    """A square that wanders over white, in few colours: `(T, H, W, 3)`."""
    frames = np.full((num_frames, height, width, 3), 255, dtype=np.uint8)
    for index, frame in enumerate(frames):
        frame[4:16, 4 * index : 4 * index + 12] = COLOURS[1 + index % 4]
    return frames


def read_gif(path):
    """Frames `(T, H, W, 3)`, and each one's milliseconds."""
    frames, times = [], []
    with Image.open(path) as image:
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            times.append(image.info["duration"])
    return np.stack(frames), times


def read_mp4(path):
    cv2 = pytest.importorskip("cv2")
    video, frames = cv2.VideoCapture(str(path)), []
    while (answer := video.read())[0]:
        frames.append(answer[1][..., ::-1])
    return np.stack(frames), video.get(cv2.CAP_PROP_FPS)


def test_a_gif_of_few_colours_is_read_back_as_it_was(tmp_path):
    frames = movie()
    write_gif(tmp_path / "new" / "movie.gif", frames, fps=5)
    read, times = read_gif(tmp_path / "new" / "movie.gif")
    assert np.array_equal(read, frames) and times == [200] * 5
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["movie.gif"]


def test_a_gif_of_many_colours_comes_close_and_its_margins_stay_white(tmp_path):
    ramp = np.linspace(0, 255, 64)
    frame = np.full((80, 64, 3), 255, dtype=np.uint8)
    frame[16:] = np.stack([*np.meshgrid(ramp, ramp), np.full((64, 64), 128)], axis=-1)
    frame[8:16] = (251, 248, 254)  # Pillow takes white for this, where the palette has both
    frames = np.stack([frame, frame[:, ::-1]])
    write_gif(tmp_path / "movie.gif", frames, fps=10)
    read, _ = read_gif(tmp_path / "movie.gif")
    assert np.abs(read.astype(int) - frames).mean() < 8
    assert (read[:, :8] == 255).all()


def test_what_stands_still_in_a_gif_does_not_flicker(tmp_path):
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8), 4, axis=0)
    frames[:, :, 12:] = rng.integers(0, 256, (4, 16, 4, 3), dtype=np.uint8)  # other colours in every frame
    write_gif(tmp_path / "movie.gif", frames, fps=5)
    read, _ = read_gif(tmp_path / "movie.gif")
    # Dithering carries errors from left to right, so what changes at the right does not reach the first rows' left.
    assert (read[:, 0, :8] == read[:1, 0, :8]).all()


def test_equal_frames_in_a_gif_are_one_that_lasts_longer(tmp_path):
    frames = np.concatenate([movie(2), movie(2)[1:], movie(2)[1:]])
    write_gif(tmp_path / "movie.gif", frames, fps=4)
    read, times = read_gif(tmp_path / "movie.gif")
    assert len(read) == 2 and sum(times) == 4 * 250


def test_an_mp4_comes_close_to_its_frames(tmp_path):
    frames = movie(6)
    write_mp4(tmp_path / "movie.mp4", frames, fps=5)
    read, fps = read_mp4(tmp_path / "movie.mp4")
    assert read.shape == frames.shape and fps == pytest.approx(5)
    assert np.abs(read.astype(int) - frames).mean() < 8
    assert [path.name for path in tmp_path.iterdir()] == ["movie.mp4"]


def test_an_mp4_of_odd_size_repeats_its_edge(tmp_path):
    frames = movie(3, height=23, width=35)
    write_mp4(tmp_path / "movie.mp4", frames, fps=5)
    read, _ = read_mp4(tmp_path / "movie.mp4")
    assert read.shape == (3, 24, 36, 3) and np.abs(read[:, :23, :35].astype(int) - frames).mean() < 8


def test_the_same_frames_give_the_same_bytes(tmp_path):
    pytest.importorskip("cv2")
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    first, second = (write_movies(tmp_path / name, "movie", frames, 5) for name in ("first", "second"))
    assert [path.name for path in first] == ["movie.gif", "movie.mp4"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_without_opencv_there_is_a_gif_alone_and_the_way_to_an_mp4_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cv2", None)
    caplog.set_level("INFO", logger="apm_hf")
    assert write_movies(tmp_path, "movie", movie(), 5) == [tmp_path / "movie.gif"]
    assert "movie.mp4" in caplog.text and "pip install opencv-python-headless" in caplog.text
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        write_mp4(tmp_path / "movie.mp4", movie(), 5)


@pytest.mark.parametrize("write", [write_gif, write_mp4])
@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (movie().astype(float), 5, "frames: expected uint8"),
        (movie()[0], 5, r"shape \(T, H, W, 3\)"),
        (movie()[:0], 5, r"shape \(T, H, W, 3\)"),
        (movie()[..., :2], 5, r"shape \(T, H, W, 3\)"),
        (movie(), 0, "fps: expected a positive number"),
        (movie(), float("nan"), "fps: expected a positive number"),
    ],
)
def test_other_frames_and_no_speed_are_refused(tmp_path, write, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "movie", frames, fps)
    assert not list(tmp_path.iterdir())


def test_a_gif_faster_than_browsers_show_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at most 50"):
        write_gif(tmp_path / "movie.gif", movie(), 60)
