"""Fit an APM to a teacher's features of one photo, and query it at the photo's aspect ratio.

Photos of any shape are resized without cropping to the model's square, and maps are queried at the photo's aspect
ratio. The teacher reads the photo at its aspect ratio too, at twice its usual side and once more shifted by half a
patch: a grid of features four times as fine. A model that reads the pixels around each location learns where objects
end between these features.

Source: grid targets at test time, arXiv:2410.20535, sections 3 and 4.

Legend: B images, F feature width, S image side, (rows, cols) a map of locations or a grid of patches.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..configuration_apm import APMConfig
from ..image_processing_apm import APMImageProcessor
from ..modeling_apm import APMModel
from ..position_encoding import grid_coordinates
from ..teachers import Teacher
from ..teachers.dense_grids import encode_densely
from ..teachers.targets import rgb_targets
from . import TTTConfig, TTTStep, adapt
from .maps import query
from .targets import TTTTargets

# Steps of `fit_photo`: cosine 0.95 to DeiT-Tiny's features in some 10 s on a CPU; longer fits copy teacher noise.
FIT_STEPS, FIT_LEARNING_RATE, FIT_LOCATIONS = 300, 1e-3, 196
_TEACHER_SCALE, _SHIFTS = 2, 2  # factor of the teacher's usual side; features along a side of its patches


def photo_model(feature_size: int, *, local_patch: bool = True, seed: int = 0) -> APMModel:
    """Make an APM with random weights that is small enough to be fitted to a photo in seconds on a CPU.

    Args:
        feature_size: F.
        local_patch: whether it reads the pixels around each location; otherwise it has only the trigger column.
        seed: random seed of the weights.
    """
    config = APMConfig(
        image_size=224,
        patch_size=8,
        position_size=128,
        hidden_sizes=[512, 512, 256],
        hidden_act="gelu",  # fits a photo closer than ReLU in the same number of steps
        feature_size=feature_size,
        rgb_hidden_sizes=[128, 128],
        local_patch=local_patch,
        initializer_range=0.05,
    )
    model = random_model(config, seed=seed)
    assert model.decoder.rgb_head is not None
    last = model.decoder.rgb_head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, 0.5)  # colours end in a ReLU: starting at mid-grey, no channel is stuck at zero
    return model


def photo_image_processor(side: int) -> APMImageProcessor:
    """Make the image processor that resizes whole photos to a square of `side` pixels, without cropping."""
    return APMImageProcessor(size={"height": side, "width": side})


def random_model(config: APMConfig, *, seed: int) -> APMModel:
    """Make an APM whose weights depend only on the seed, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return APMModel(config).eval()


def map_size(photo: Image.Image, longest: int) -> tuple[int, int]:
    """Return (rows, cols) at the photo's aspect ratio, the longer one `longest`, the shorter at least 1."""
    scale = longest / max(photo.size)
    return max(1, round(photo.height * scale)), max(1, round(photo.width * scale))


def query_map(
    model: APMModel, pixel_values: Tensor | None, size: tuple[int, int], *, trigger_column: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Query features and colours of B images at any resolution, without gradients.

    A model with local patch was only trained on complete patches: where one would cross the edge, the model is queried
    at the nearest location where none does, just as interpolation repeats the outermost values.

    Args:
        pixel_values: `(B, C, S, S)`, if the model needs them.
        size: `(rows, cols)`.
        trigger_column: `(B, D)`, computed before; by default it is computed from `pixel_values`.

    Returns:
        `(B, rows, cols, F)`, and `(B, rows, cols, 3)` in [0, 1] or None without an RGB head.
    """
    coordinates = grid_coordinates(*size)
    if model.config.local_patch and model.config.trigger_source != "tokens":
        inside = 1 - 1 / model.config.grid_size
        coordinates = coordinates.clamp(-inside, inside)
    outputs = query(model, pixel_values, coordinates, trigger_column=trigger_column)
    assert outputs.last_hidden_state is not None
    rgb = None if outputs.rgb is None else outputs.rgb.unflatten(1, size).clamp(0, 1)
    return outputs.last_hidden_state.unflatten(1, size), rgb


def whole_photos(image_processor: Any, photos: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """Return `pixel_values` `(B, 3, height, width)` of photos resized to `size` without cropping."""
    height, width = size
    options = {"size": {"height": height, "width": width}, "do_resize": True, "do_center_crop": False}
    return image_processor(list(photos), return_tensors="pt", **options)["pixel_values"]


def teacher_features(teacher: Teacher, photos: Sequence[Image.Image], *, fine: bool) -> Tensor:
    """Return a teacher's features of complete photos: `(B, rows, cols, F)`.

    Args:
        fine: resize the photos to the first one's shape, as large as described above; else to the teacher's square.
    """
    side = teacher.image_size // teacher.patch_size
    rows, cols = map_size(photos[0], _TEACHER_SCALE * side) if fine else (side, side)
    pixel_values = whole_photos(
        teacher.image_processor, photos, (rows * teacher.patch_size, cols * teacher.patch_size)
    )
    features = encode_densely(teacher, pixel_values, _SHIFTS if fine else 1).features
    assert features is not None
    return features


def fit_photo(
    model: APMModel,
    pixel_values: Tensor,
    features: Tensor,
    rgb: Tensor | None,
    *,
    steps: int = FIT_STEPS,
    trigger_column: Tensor | None = None,
    seed: int = 0,
    on_step: Callable[[int, APMModel], None] | None = None,
) -> APMModel:
    """Fit a copy of the model to the teacher's features of one photo by test-time training, with a progress bar.

    Args:
        pixel_values: `(1, C, S, S)`.
        features: `(1, rows, cols, F)`, the teacher's.
        rgb: `(1, rows', cols', 3)` in [0, 1], colours to decode; None fits no colours.
        steps: gradient steps.
        trigger_column: `(1, D)`, for `trigger_source="embedding"`.
        seed: random seed of the locations that are fitted at each step.
        on_step: called before the update of every step with its number, from 0, and the current model, which is
            changed after the call.
    """
    fitted = copy.deepcopy(model)
    config = TTTConfig(
        steps=steps,
        learning_rate=FIT_LEARNING_RATE,
        num_locations=min(FIT_LOCATIONS, features[0, ..., 0].numel()),
        start="model",
        seed=seed,
    )
    with tqdm(total=steps, desc="fit") as progress:

        def callback(step: TTTStep) -> None:
            if on_step is not None:
                fitted.load_state_dict(step.state_dict(0))
                on_step(step.step, fitted)
            progress.update()

        targets = TTTTargets(features=features, rgb=rgb)
        adapted = adapt(model, pixel_values, targets, config=config, trigger_column=trigger_column, callback=callback)
    if adapted.diverged.any():
        raise ValueError(f"the fit of {steps} steps diverged: its loss is no longer a number")
    fitted.load_state_dict(adapted.state_dict(0))
    return fitted.eval()


def photo_colours(photo: Image.Image, grid: tuple[int, int]) -> Tensor:
    """Return the mean colours of the cells of a grid, `(1, rows, cols, 3)` in [0, 1]."""
    pixels = torch.from_numpy(np.array(photo.convert("RGB"))).movedim(-1, 0)[None]  # (1, 3, H, W)
    colours = rgb_targets(pixels / 255, *grid, mean=torch.zeros(3), std=torch.ones(3))
    return colours.unflatten(1, grid)
