"""Image corruptions: the 19 of ImageNet-C and CIFAR-10-C by their names, and four that need no extra package.

[`corrupt_image`] gives the corruptions of Hendrycks & Dietterich 2019 (arXiv:1903.12261) at five severities. With
`constants="imagenet"` they come from the package `imagecorruptions` (of `pip install "apm_hf[eval]"`); ImageNet-C
itself was made from what [`imagenet_crop`] returns. `constants="cifar"` are the milder ones of CIFAR-10-C, for 32
pixels. Neither is bit-exact with the released files: those drew other numbers, were blurred by ImageMagick, and
ImageNet-C was saved as JPEG once more. Frost at ImageNet's size chooses among six pictures, enlarged by a tenth, where
the authors chose among five.

[`corrupt`] is the small set that demos and tests use: the same definitions and constants
(https://github.com/hendrycks/robustness, ImageNet-C/create_c) in NumPy and Pillow alone. The same constant hurts a
small image more: a blur of radius 10 leaves nothing of a 32-pixel photo. The authors therefore made milder sets for
64- and 32-pixel images, and `corrupt` chooses among the three by the image's shorter side.

Shape legend: H, W image height and width; R reach of a blur kernel. Pixels are float64 in [0, 1] inside this file.
"""

import io
import threading
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FloatImage = NDArray[np.float64]  # (H, W, 3) in [0, 1]

# Shorter side from which a set applies -> corruption -> its constant for severity 1 to 5.
_CONSTANTS: dict[int, dict[str, tuple[Any, ...]]] = {
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
CORRUPTIONS: tuple[str, ...] = tuple(_CONSTANTS[0])

CORRUPTION_NAMES = (  # in the order of the paper's tables: noise, blur, weather, digital
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
EXTRA_CORRUPTION_NAMES = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # the authors' validation set
MIN_SIDE = {"imagenet": 32, "cifar": 16}  # pixels
# Displacement, its smoothness, jitter of three corners, in pixels. The package lacks the affine jitter and has other
# constants for severity 1 and 2, so this one is ours.
_IMAGENET_ELASTIC = ((488, 170.8, 24.4), (488, 19.52, 48.8), *((244 * a, 2.44, 4.88) for a in (0.05, 0.07, 0.12)))
_GLOBAL_STATE = threading.Lock()


def corrupt_image(
    image: Image.Image, name: str, *, severity: int, seed: int, constants: Literal["imagenet", "cifar"] = "imagenet"
) -> Image.Image:
    """A corrupted copy of an image, which depends on the arguments alone: not on other images or on global state.

    Args:
        image: any mode; it is read as RGB. At least 32 pixels a side, or 16 with the constants of CIFAR.
        name: one of `CORRUPTION_NAMES` or `EXTRA_CORRUPTION_NAMES`.
        severity: 1 (mild) to 5.
        seed: >= 0; one an image, or all images get the same noise.
        constants: "imagenet" for images of about 224 pixels, "cifar" for 32.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: an unknown name, severity or set of constants, a negative seed, an image too small.
        ImportError: the extra `apm_hf[eval]` is not installed.
    """
    names = CORRUPTION_NAMES + EXTRA_CORRUPTION_NAMES
    if name not in names:
        raise ValueError(f"expected a corruption in {names}, got {name!r}")
    if constants not in MIN_SIDE:
        raise ValueError(f"expected constants in {tuple(MIN_SIDE)}, got {constants!r}")
    _check_severity(severity)
    if seed < 0:
        raise ValueError(f"expected a seed >= 0, got {seed}")
    if min(image.size) < MIN_SIDE[constants]:
        raise ValueError(
            f"expected at least {MIN_SIDE[constants]} pixels a side for the {constants!r} constants, got {image.size}"
        )
    try:
        import imagecorruptions

        from . import small_corruptions
    except ImportError as error:
        raise ImportError(
            f'the corruption {name!r} needs the package `imagecorruptions`: pip install "apm_hf[eval]" ({error})'
        ) from error
    image = image.convert("RGB")
    generator = np.random.default_rng([seed, names.index(name), severity])
    if constants == "cifar":
        return small_corruptions.corrupt_small(image, name, severity=severity, generator=generator)
    if name == "elastic_transform":
        constant = _IMAGENET_ELASTIC[severity - 1]
        return to_image(small_corruptions.elastic_transform(np.asarray(image) / 255, constant, generator))
    return _of_package(getattr(imagecorruptions, name), image, severity, generator)


def imagenet_crop(image: Image.Image) -> Image.Image:
    """What ImageNet-C was made from: the shorter side resized to 256 pixels, then the central 224 x 224."""
    short = min(image.size)
    width, height = (int(256 * side / short) for side in image.size)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + 224, top + 224))


def _of_package(function: Any, image: Image.Image, severity: int, generator: np.random.Generator) -> Image.Image:
    seed = int(generator.integers(2**32))
    # Two of them do not draw from NumPy's global state, but afresh from the operating system unless they get a seed.
    own_seed = {"seed": seed} if function.__name__ in ("impulse_noise", "glass_blur") else {}
    with _GLOBAL_STATE, np.errstate(invalid="ignore"):
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            pixels = np.asarray(function(image, severity, **own_seed), dtype=np.float64)
        finally:
            np.random.set_state(state)
    # Spatter divides by its largest drop: in a small image there may be none, which should leave it as it is.
    pixels = np.where(np.isfinite(pixels), pixels, np.asarray(image))
    return Image.fromarray(pixels.astype(np.uint8))  # cut off, not rounded, as ImageNet-C is


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
    _check_severity(severity)
    image = image.convert("RGB")
    constants = next(table for side, table in _CONSTANTS.items() if min(image.size) >= side)
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


def _check_severity(severity: int) -> None:
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
