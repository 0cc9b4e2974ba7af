"""Four image corruptions that need NumPy and Pillow alone, for demos and tests.

The definitions and constants are those of Hendrycks & Dietterich 2019
(https://github.com/hendrycks/robustness, ImageNet-C/create_c). The same constant hurts a small image more: a blur of
radius 10 leaves nothing of a 32-pixel photo. The authors therefore made milder sets for 64- and 32-pixel images, and
[`corrupt`] chooses among the three by the image's shorter side.

Shape legend: H, W image height and width; R reach of a blur kernel. Pixels are float64 in [0, 1] inside this file.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FloatImage = NDArray[np.float64]  # (H, W, 3) in [0, 1]

# Shorter side from which a set applies -> corruption -> its constant for severity 1 to 5.
CONSTANTS: dict[int, dict[str, tuple[Any, ...]]] = {
    160: {  # ImageNet-C, made for 224 pixels
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor on the distance to the image's mean colour
        "jpeg": (25, 18, 15, 10, 7),  # quality
        "defocus": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius of a disc, sigma of its smoothing
    },
    48: {  # Tiny-ImageNet-C, made for 64 pixels
        "gaussian_noise": (0.04, 0.08, 0.12, 0.15, 0.18),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "jpeg": (65, 58, 50, 40, 25),
        "defocus": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    },
    0: {  # CIFAR-10-C, made for 32 pixels
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "jpeg": (80, 65, 58, 50, 40),
        "defocus": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    },
}
CORRUPTIONS: tuple[str, ...] = tuple(CONSTANTS[0])


def corrupt(image: Image.Image, name: str, *, severity: int, generator: np.random.Generator) -> Image.Image:
    """A corrupted copy of an image.

    Args:
        image: any mode; it is read as RGB. Its shorter side selects the constants: ImageNet-C's from 160 pixels,
            Tiny-ImageNet-C's from 48, CIFAR-10-C's below.
        name: one of `CORRUPTIONS`.
        severity: 1 (mild) to 5.
        generator: source of the noise; the other corruptions draw nothing from it.

    Returns:
        An RGB image of the same size.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"expected a corruption in {CORRUPTIONS}, got {name!r}")
    check_severity(severity)
    image = image.convert("RGB")
    constants = next(table for side, table in CONSTANTS.items() if min(image.size) >= side)
    return apply_basic(image, name, constants[name][severity - 1], generator)


def apply_basic(image: Image.Image, name: str, constant: Any, generator: np.random.Generator) -> Image.Image:
    """One of `CORRUPTIONS`, with a constant as in the table above, on an RGB image."""
    if name == "jpeg":
        return _jpeg(image, constant)
    pixels = np.asarray(image) / 255.0
    if name == "gaussian_noise":
        pixels = pixels + generator.normal(scale=constant, size=pixels.shape)
    elif name == "contrast":
        mean = pixels.mean(axis=(0, 1))
        pixels = (pixels - mean) * constant + mean
    else:
        pixels = _convolve(pixels, _disc(*constant))
    return to_image(pixels)


def to_image(pixels: FloatImage) -> Image.Image:
    """`(H, W, 3)` in [0, 1], clipped and rounded to 8 bits."""
    return Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def check_severity(severity: int) -> None:
    """Raise a ValueError for a severity that is not 1 to 5."""
    if severity not in range(1, 6):
        raise ValueError(f"expected a severity in 1..5, got {severity!r}")


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def _disc(radius: float, sigma: float) -> NDArray[np.float64]:
    """Point spread of an unfocused lens, `(2R + 1, 2R + 1)`, sum 1: a disc, its rim smoothed by a small Gaussian."""
    smoothing_reach = 1 if radius <= 8 else 2
    axis = np.arange(-int(radius) - smoothing_reach, int(radius) + smoothing_reach + 1)
    disc = (axis[:, None] ** 2 + axis[None, :] ** 2 <= radius**2).astype(np.float64)
    taps = np.exp(-(np.arange(-smoothing_reach, smoothing_reach + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum() * np.sqrt(disc.sum())
    smooth = np.apply_along_axis(np.convolve, 0, disc, taps, mode="same")
    return np.apply_along_axis(np.convolve, 1, smooth, taps, mode="same")


def _convolve(pixels: FloatImage, kernel: NDArray[np.float64]) -> FloatImage:
    """Convolution with a symmetric kernel, the image mirrored about its border: `(H, W, 3)` -> `(H, W, 3)`."""
    reach = len(kernel) // 2
    padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    height, width = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, s=(height, width))[..., None]
    blurred = np.fft.irfft2(spectrum, s=(height, width), axes=(0, 1))
    return blurred[2 * reach :, 2 * reach :]  # (H + 2R, W + 2R, 3) -> (H, W, 3): the wrapped-around rows fall away
