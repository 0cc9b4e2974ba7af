"""Image corruptions: the 19 of ImageNet-C and CIFAR-10-C, by their names.

[`corrupt_image`] gives the corruptions of Hendrycks & Dietterich 2019 (arXiv:1903.12261) at five severities. With
`constants="imagenet"` they come from the package `imagecorruptions` (of `pip install "apm_hf[eval]"`); ImageNet-C
itself was made from what [`imagenet_crop`] returns. `constants="cifar"` are the milder ones of CIFAR-10-C, for 32
pixels. Neither is bit-exact with the released files: those drew other numbers, were blurred by ImageMagick, and
ImageNet-C was saved as JPEG once more. Frost at ImageNet's size chooses among six pictures, enlarged by a tenth, where
the authors chose among five.
"""

import threading
from typing import Any, Literal

import numpy as np
from PIL import Image

from .basic_corruptions import check_severity, to_image

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
    check_severity(severity)
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
    """Crop as ImageNet-C does before it corrupts: shorter side resized to 256 pixels, then the central 224 x 224."""
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
