"""The 19 corruptions of CIFAR-10-C, for images of 32 pixels.

Definitions: Hendrycks & Dietterich 2019 (arXiv:1903.12261, App. B); constants: the table of their generator
(https://github.com/hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py). `imagecorruptions` makes the same ones
with ImageNet-C's constants, fixed inside its functions. What differs from the released files: other random numbers,
motion blur here instead of by ImageMagick, and pixels rounded to 8 bits instead of cut off.

Needs SciPy, scikit-image and OpenCV, which `imagecorruptions` brings; the frost pictures are that package's.

Shape legend: H, W image height and width, R reach of a kernel. Pixels `(H, W, 3)` are float64 in [0, 1], RGB.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.color import hsv2rgb, rgb2hsv

from .basic_corruptions import CONSTANTS, FloatImage, apply_basic, to_image

FloatMap = NDArray[np.float64]  # (H, W)

TURQUOISE, BROWN = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255  # water and mud
FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
FROST_SCALE = 0.2  # the pictures are made for ImageNet's size


def corrupt_small(image: Image.Image, name: str, *, severity: int, generator: Generator) -> Image.Image:
    """An RGB image, corrupted with CIFAR-10-C's constants; called by [`corrupt_image`], which checks."""
    if name in _BASIC:
        basic = _BASIC[name]
        return apply_basic(image, basic, CONSTANTS[0][basic][severity - 1], generator)
    function, constants = _CORRUPTIONS[name]
    return to_image(function(np.asarray(image) / 255.0, constants[severity - 1], generator))


def shot_noise(pixels: FloatImage, photons: float, generator: Generator) -> FloatImage:
    """Draw photon counts: Poisson noise."""
    return generator.poisson(pixels * photons) / photons


def impulse_noise(pixels: FloatImage, amount: float, generator: Generator) -> FloatImage:
    """Single colour values turned fully on or off."""
    hit = generator.random(pixels.shape) < amount
    return np.where(hit, generator.random(pixels.shape) < 0.5, pixels)


def speckle_noise(pixels: FloatImage, scale: float, generator: Generator) -> FloatImage:
    """Add Gaussian noise in proportion to each value."""
    return pixels + pixels * generator.normal(scale=scale, size=pixels.shape)


def gaussian_blur(pixels: FloatImage, sigma: float, generator: Generator) -> FloatImage:
    """Blur with a Gaussian."""
    return ndimage.gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest")


def glass_blur(pixels: FloatImage, constant: tuple[float, int, int], generator: Generator) -> FloatImage:
    """Pixels copied from random neighbours, between two blurs."""
    sigma, reach, iterations = constant
    blurred = gaussian_blur(pixels, sigma, generator)
    height, width = blurred.shape[:2]
    for offsets in generator.integers(-reach, reach, size=(iterations, height, width, 2)).tolist():
        for y in range(height - reach, reach, -1):
            for x in range(width - reach, reach, -1):
                dy, dx = offsets[y][x]
                # The authors write a swap; on views of a NumPy array it copies, and so the released images have it.
                blurred[y, x] = blurred[y + dy, x + dx]
    return gaussian_blur(blurred, sigma, generator)


def motion_blur(pixels: FloatImage, constant: tuple[int, float], generator: Generator) -> FloatImage:
    """Blur along a line of random direction."""
    return move(pixels, *constant, angle=generator.uniform(-45, 45))


def move(pixels: NDArray[np.float64], radius: int, sigma: float, *, angle: float) -> NDArray[np.float64]:
    """ImageMagick's motion blur: half a Gaussian of 2 * radius + 1 steps along a line.

    Args:
        pixels: `(H, W)` or `(H, W, 3)`; the border is repeated outside.
        angle: in degrees; 0 samples to the right, 90 downwards.
    """
    reach = 2 * radius
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    along = math.sin(math.radians(angle)), math.cos(math.radians(angle))  # (y, x)
    for step in range(reach + 1):
        y, x = (reach + math.ceil(step * direction - 0.5) for direction in along)
        kernel[y, x] += math.exp(-(step**2) / (2 * sigma**2))
    return cv2.filter2D(pixels, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


def zoom_blur(pixels: FloatImage, largest: float, generator: Generator) -> FloatImage:
    """The mean of enlargements by 1, 1.01, 1.02, ... and once more the image itself."""
    factors = np.arange(1, largest, 0.01)
    return (pixels + sum(enlarge(pixels, factor) for factor in factors)) / (len(factors) + 1)


def enlarge(pixels: FloatImage, factor: float) -> FloatImage:
    """The centre of an image, enlarged to the image's size: `(H, W, C)` -> `(H, W, C)`."""
    size = pixels.shape[:2]
    cropped = [math.ceil(side / factor) for side in size]
    result = ndimage.zoom(_centre(pixels, cropped), (factor, factor, 1), order=1)
    return _centre(result, size)


def _centre(pixels: FloatImage, size: Any) -> FloatImage:
    top, left = ((side - wanted) // 2 for side, wanted in zip(pixels.shape[:2], size, strict=True))
    return pixels[top : top + size[0], left : left + size[1]]


def snow(pixels: FloatImage, constant: tuple[float, ...], generator: Generator) -> FloatImage:
    """Bright flakes, blurred as they fall, over an image that is paler than before."""
    mean, scale, factor, threshold, radius, sigma, keep = constant
    flakes = enlarge(generator.normal(mean, scale, size=(*pixels.shape[:2], 1)), factor)[..., 0]
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = move(flakes, int(radius), sigma, angle=generator.uniform(-135, -45))
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    pale = np.maximum(pixels, grey[..., None] * 1.5 + 0.5)
    return keep * pixels + (1 - keep) * pale + (flakes + np.rot90(flakes, 2))[..., None]


def frost(pixels: FloatImage, constant: tuple[float, float], generator: Generator) -> FloatImage:
    """A random part of a picture of ice crystals, added."""
    height, width = pixels.shape[:2]
    ice = _ice(FROST_FILES[generator.integers(len(FROST_FILES))], height, width)
    top, left = (generator.integers(there - wanted) for there, wanted in zip(ice.shape, (height, width), strict=False))
    return constant[0] * pixels + constant[1] * ice[top : top + height, left : left + width]


@lru_cache
def _ice(name: str, height: int, width: int) -> FloatImage:
    """A frost picture, with at least one row and one column to spare."""
    with resources.as_file(resources.files("imagecorruptions") / "frost" / name) as path, Image.open(path) as image:
        picture = np.asarray(image.convert("RGB")) / 255
    scale = max(FROST_SCALE, (height + 1) / picture.shape[0], (width + 1) / picture.shape[1])
    return cv2.resize(picture, None, fx=scale, fy=scale)


def fog(pixels: FloatImage, constant: tuple[float, float], generator: Generator) -> FloatImage:
    """A cloud, added; the brightest value stays."""
    strength, decay = constant
    height, width = pixels.shape[:2]
    cloud = plasma(1 << (max(height, width) - 1).bit_length(), decay, generator)[:height, :width, None]
    brightest = pixels.max()
    return (pixels + strength * cloud) * brightest / (brightest + strength)


def plasma(size: int, decay: float, generator: Generator) -> FloatMap:
    """Random heights in [0, 1] by the diamond-square algorithm, `(size, size)`; size a power of two, edges wrap."""
    heights, step, amplitude = np.zeros((size, size)), size, 100.0

    def mean_of_four(total: FloatMap) -> FloatMap:
        return total / 4 + amplitude * generator.uniform(-amplitude, amplitude, total.shape)

    while step >= 2:
        half = step // 2
        corners, centres = heights[::step, ::step], heights[half::step, half::step]
        rows = corners + np.roll(corners, -1, axis=0)
        columns = corners + np.roll(corners, -1, axis=1)
        centres[:] = mean_of_four(rows + np.roll(rows, -1, axis=1))
        heights[::step, half::step] = mean_of_four(columns + centres + np.roll(centres, 1, axis=0))
        heights[half::step, ::step] = mean_of_four(rows + centres + np.roll(centres, 1, axis=1))
        step, amplitude = half, amplitude / decay
    heights -= heights.min()
    return heights / heights.max()


def brightness(pixels: FloatImage, added: float, generator: Generator) -> FloatImage:
    """Add to the value of every pixel in HSV."""
    hsv = rgb2hsv(pixels)
    hsv[..., 2] = np.clip(hsv[..., 2] + added, 0, 1)
    return hsv2rgb(hsv)


def saturate(pixels: FloatImage, constant: tuple[float, float], generator: Generator) -> FloatImage:
    """Scale and shift the saturation of every pixel in HSV."""
    hsv = rgb2hsv(pixels)
    hsv[..., 1] = np.clip(hsv[..., 1] * constant[0] + constant[1], 0, 1)
    return hsv2rgb(hsv)


def elastic_transform(pixels: FloatImage, constant: tuple[float, ...], generator: Generator) -> FloatImage:
    """A random affine map, then every pixel moved a little, neighbours alike.

    Args:
        constant: size of the moves, reach of their smoothing, and how far three corners of a square go, in pixels.
    """
    amount, sigma, jitter = constant
    height, width = pixels.shape[:2]
    centre, reach = np.array([width // 2, height // 2]), min(height, width) // 3
    corners = (centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])).astype(np.float32)  # (x, y)
    moved = corners + generator.uniform(-jitter, jitter, corners.shape).astype(np.float32)
    affine = cv2.getAffineTransform(corners, moved)
    pixels = cv2.warpAffine(pixels, affine, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    if amount == 0:
        return pixels
    field = generator.uniform(-1, 1, size=(2, height, width))
    field = amount * ndimage.gaussian_filter(field, (0, sigma, sigma), mode="reflect", truncate=3)
    places = np.indices((height, width)) + field  # (2, H, W)
    channels = [ndimage.map_coordinates(pixels[..., c], places, order=1, mode="reflect") for c in range(3)]
    return np.stack(channels, axis=-1)


def pixelate(pixels: FloatImage, scale: float, generator: Generator) -> FloatImage:
    """Shrink and enlarge the image."""
    image = to_image(pixels)
    small = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX)) / 255


def spatter(pixels: FloatImage, constant: tuple[float, ...], generator: Generator) -> FloatImage:
    """Drops of water or mud."""
    mean, scale, sigma, threshold, strength, is_mud = constant
    liquid = generator.normal(mean, scale, size=pixels.shape[:2])
    liquid = ndimage.gaussian_filter(liquid, sigma, mode="nearest")
    if is_mud:
        cover = ndimage.gaussian_filter((liquid > threshold).astype(np.float64), strength, mode="nearest")
        cover = np.where(cover < 0.8, 0, cover)[..., None]
        return pixels * (1 - cover) + cover * BROWN
    drops = (np.clip(np.where(liquid < threshold, 0, liquid), 0, 1) * 255).astype(np.uint8)
    lit = drops * _relief(drops)
    if not lit.any():  # too small an image for a drop
        return pixels
    return pixels + strength * (lit / lit.max())[..., None] * TURQUOISE


def _relief(drops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How light falls on drops, lit from one side: `(H, W)`, 0 to 255."""
    distance = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    rim = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float32)
    return cv2.blur(cv2.filter2D(cv2.equalizeHist(rim), cv2.CV_8U, emboss), (3, 3)).astype(np.float32)


_BASIC = {
    "gaussian_noise": "gaussian_noise",
    "contrast": "contrast",
    "jpeg_compression": "jpeg",
    "defocus_blur": "defocus",
}
# Each function of this file, and its constant for severity 1 to 5.
_CORRUPTIONS: dict[str, tuple[Callable[..., FloatImage], tuple[Any, ...]]] = {
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "glass_blur": (glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "saturate": (saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
    "elastic_transform": (
        elastic_transform,
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
    ),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "spatter": (
        spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    ),
}
