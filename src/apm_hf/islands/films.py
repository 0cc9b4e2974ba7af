"""Write frames as GIF and MP4 files, atomically; equal frames give equal bytes.

Legend: T frames, (H, W) their height and width in pixels.
"""

import io
import logging
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ..runs.files import write_atomically

logger = logging.getLogger("apm_hf")

_PALETTE_PIXELS = 2**20  # pixels, of all frames together, that the palette is chosen from
_NUM_COLOURS = 256
_HUNDREDTHS = 100  # of a second: GIF's unit of time


def write_movies(folder: Path, name: str, frames: np.ndarray, fps: float) -> list[Path]:
    """Write `name.gif` and, if OpenCV is installed, `name.mp4`; return their paths. Arguments as in [`write_gif`].

    Raises:
        ValueError: as [`write_gif`] does.
    """
    gif, mp4 = folder / f"{name}.gif", folder / f"{name}.mp4"
    write_gif(gif, frames, fps)
    try:
        write_mp4(mp4, frames, fps)
    except ImportError as error:
        logger.info(f"no {mp4.name}: {error}")
        return [gif]
    return [gif, mp4]


def write_gif(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write an animated GIF that loops forever, with one palette for all frames, so that static parts do not flicker.

    Consecutive equal frames become one that is shown for longer.

    Args:
        frames: `(T, H, W, 3)`, uint8.
        fps: frames per second; GIF rounds a frame's time to 1/100 s.

    Raises:
        ValueError: for other frames, or a number of frames per second that is above 50 or not positive.
    """
    _check(frames, fps)
    if fps > 50:  # browsers slow down anything faster
        raise ValueError(f"fps: expected at most 50 in a GIF, got {fps}")
    palette = _palette(frames)
    reduced: dict[bytes, Image.Image] = {}  # movies played forth and back show most frames twice
    for frame in frames:
        if (key := frame.tobytes()) not in reduced:
            reduced[key] = _reduce(frame, palette)
    images = [reduced[frame.tobytes()] for frame in frames]
    file = io.BytesIO()
    milliseconds = 10 * round(_HUNDREDTHS / fps)
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0, optimize=False)
    write_atomically(Path(path), file.getvalue())


def write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Write an MP4 movie (VP9, which browsers play). An odd height or width is made even by repeating the edge.

    Args:
        frames: `(T, H, W, 3)`, uint8.
        fps: frames per second.

    Raises:
        ImportError: without OpenCV.
        OSError: if this build of OpenCV has no such encoder.
        ValueError: for other frames, or not a positive number of frames per second.
    """
    _check(frames, fps)
    try:
        import cv2
    except ImportError as error:
        raise ImportError("MP4 movies need OpenCV: pip install opencv-python-headless") from error
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    height, width = frames.shape[1:3]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "movie.mp4"
        # "vp09": the patent-free codec in OpenCV's wheels.
        writer = cv2.VideoWriter(str(scratch), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"vp09"), fps, (width, height))
        if not writer.isOpened():
            raise OSError(f"{path}: this build of OpenCV cannot write VP9 movies")
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))  # RGB -> BGR
        writer.release()
        write_atomically(Path(path), scratch.read_bytes())


def _palette(frames: np.ndarray) -> Image.Image:
    """Choose 256 colours for all frames from evenly spaced pixels; the last is white, for the margins."""
    pixels = frames.reshape(-1, 3)  # (T, H, W, 3) -> (T * H * W, 3)
    pixels = pixels[:: -(-len(pixels) // _PALETTE_PIXELS)]
    colours = Image.fromarray(pixels[None]).quantize(_NUM_COLOURS - 1, Image.Quantize.MEDIANCUT).getpalette()
    white = [255] * (3 * _NUM_COLOURS - len(colours or []))  # there may be fewer colours
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(colours or []), *white])
    return palette


def _reduce(frame: np.ndarray, palette: Image.Image) -> Image.Image:
    """Reduce a frame `(H, W, 3)` to the palette's colours, dithered."""
    image = Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    # Pillow's colour lookup is approximate and would tint white margins.
    indices = np.where((frame == 255).all(axis=-1), _NUM_COLOURS - 1, np.asarray(image)).astype(np.uint8)
    reduced = Image.fromarray(indices).convert("P")
    reduced.putpalette(palette.getpalette() or [])
    return reduced


def _check(frames: np.ndarray, fps: float) -> None:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames: expected uint8 of shape (T, H, W, 3), got {frames.dtype} of {frames.shape}")
    if not 0 < fps < float("inf"):
        raise ValueError(f"fps: expected a positive number, got {fps}")
