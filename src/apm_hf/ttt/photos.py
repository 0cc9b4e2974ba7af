"""A machine for the photos at hand: a fresh APM fitted to what a teacher sees in them, and what it takes to ask it.

Photos of any shape are squeezed whole into the machine's square, and maps are asked for in the photo's own shape, so
that nothing is cut off. The teacher is shown the photo in its own shape too, at twice its usual side, so that its
patches are half as large, and moved by half a patch, so that it answers between them; a machine that sees the pixels
around each location learns where between these answers things end.

Source: grid targets at test time, arXiv:2410.20535, sections 3 and 4.

Legend: B images, F feature width, S image side, (rows, cols) a map of locations or a grid of patches.
"""

import copy
import tempfile
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
from .maps import ask
from .targets import TTTTargets

# Of `fit_photo`: features of cosine 0.95 to DeiT-Tiny's in some 10 s on a CPU; longer fits copy the teacher's noise.
FIT_STEPS, FIT_LEARNING_RATE, FIT_LOCATIONS = 300, 1e-3, 196
_FINER, _BETWEEN = 2, 2  # times the teacher's usual side; answers along a side of its patches


def photo_machine(feature_size: int, *, local_patch: bool = True, seed: int = 0) -> APMModel:
    """A fresh machine with random weights, small enough to be fitted to a photo in seconds on a CPU.

    Args:
        feature_size: F.
        local_patch: whether it sees the pixels around each location; without, all it knows is in the trigger column.
        seed: of the weights.
    """
    config = APMConfig(
        image_size=224,
        patch_size=8,
        position_size=128,
        hidden_sizes=[512, 512, 256],
        hidden_act="gelu",  # fits a photo closer than ReLU in as many steps
        feature_size=feature_size,
        rgb_hidden_sizes=[128, 128],
        local_patch=local_patch,
        initializer_range=0.05,
    )
    model = random_machine(config, seed=seed)
    assert model.decoder.rgb_head is not None
    last = model.decoder.rgb_head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, 0.5)  # colours end in a ReLU: from mid-grey no channel starts, and stays, at zero
    return model


def photo_image_processor(machine: APMModel) -> Any:
    """The image processor of a machine made by [`photo_machine`]."""
    return APMImageProcessor(size={"height": machine.config.image_size, "width": machine.config.image_size})


def random_machine(config: APMConfig, *, seed: int) -> APMModel:
    """A machine whose weights depend on the seed alone, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return APMModel(config).eval()


def map_size(photo: Image.Image, longest: int) -> tuple[int, int]:
    """(rows, cols) in the photo's shape, the longer one `longest`, the shorter at least 1."""
    scale = longest / max(photo.size)
    return max(1, round(photo.height * scale)), max(1, round(photo.width * scale))


def ask_map(
    model: APMModel, pixel_values: Tensor | None, size: tuple[int, int], *, trigger_column: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Features and colours of B images at any resolution, without gradients.

    A machine with local patch has only ever seen whole patches: where one would reach over the edge, it is asked at
    the nearest place where none does, as interpolation goes on with the outermost values too.

    Args:
        pixel_values: `(B, C, S, S)`, where the machine needs them.
        size: `(rows, cols)`.
        trigger_column: `(B, D)`, instead of folding.

    Returns:
        `(B, rows, cols, F)`, and `(B, rows, cols, 3)` in [0, 1] or None without RGB head.
    """
    coordinates = grid_coordinates(*size)
    if model.config.local_patch:
        inside = 1 - 1 / model.config.grid_size
        coordinates = coordinates.clamp(-inside, inside)
    answers = ask(model, pixel_values, coordinates, trigger_column=trigger_column)
    assert answers.last_hidden_state is not None
    rgb = None if answers.rgb is None else answers.rgb.unflatten(1, size).clamp(0, 1)
    return answers.last_hidden_state.unflatten(1, size), rgb


def whole_photos(image_processor: Any, photos: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """`pixel_values` `(B, 3, height, width)` of whole photos, squeezed to `size` and not cropped."""
    height, width = size
    options = {"size": {"height": height, "width": width}, "do_resize": True, "do_center_crop": False}
    return image_processor(list(photos), return_tensors="pt", **options)["pixel_values"]


def teacher_features(teacher: Teacher, photos: Sequence[Image.Image], *, fine: bool) -> Tensor:
    """A teacher's features of whole photos: `(B, rows, cols, F)`.

    Args:
        fine: the photos are squeezed into the first one's shape, as large as described above; else into the teacher's
            square.
    """
    side = teacher.image_size // teacher.patch_size
    rows, cols = map_size(photos[0], _FINER * side) if fine else (side, side)
    pixel_values = whole_photos(
        teacher.image_processor, photos, (rows * teacher.patch_size, cols * teacher.patch_size)
    )
    features = encode_densely(teacher, pixel_values, _BETWEEN if fine else 1).features
    assert features is not None
    return features


def fit_photo(
    machine: APMModel,
    pixel_values: Tensor,
    features: Tensor,
    rgb: Tensor | None,
    *,
    steps: int = FIT_STEPS,
    trigger_column: Tensor | None = None,
    seed: int = 0,
    on_step: Callable[[int, APMModel], None] | None = None,
) -> APMModel:
    """Test-time training of a copy of the machine on the teacher's features of one photo; shows its progress.

    Args:
        pixel_values: `(1, C, S, S)`.
        features: `(1, rows, cols, F)`, the teacher's.
        rgb: `(1, rows', cols', 3)` in [0, 1], colours to decode; None fits none.
        steps: gradient steps.
        trigger_column: `(1, D)`, where the machine takes it from the caller.
        seed: of the locations that are fitted at each step.
        on_step: called before the update of every step with its number, from 0, and the machine as it then is, which
            changes after the call.
    """
    fitted = copy.deepcopy(machine)
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
        adapted = adapt(
            machine, pixel_values, targets, config=config, trigger_column=trigger_column, callback=callback
        )
    if adapted.diverged.any():
        raise ValueError(f"the fit of {steps} steps diverged: its loss is no longer a number")
    fitted.load_state_dict(adapted.state_dict(0))
    return fitted.eval()


def photo_colours(photo: Image.Image, grid: tuple[int, int]) -> Tensor:
    """`(1, rows, cols, 3)` in [0, 1]: the mean colours of the cells of a grid."""
    pixels = torch.from_numpy(np.array(photo.convert("RGB"))).movedim(-1, 0)[None]  # (1, 3, H, W)
    colours = rgb_targets(pixels / 255, *grid, mean=torch.zeros(3), std=torch.ones(3))
    return colours.unflatten(1, grid)


def fit_photos(
    machine: APMModel,
    pixel_values: Tensor,
    features: Tensor,
    image_processor: Any,
    *,
    steps: int = FIT_STEPS,
    seed: int = 0,
) -> APMModel:
    """One machine for several photos: distilled on them alone, so that their trigger columns tell them apart.

    Args:
        pixel_values: `(B, C, S, S)`.
        features: `(B, rows, cols, F)`, the teacher's.
        image_processor: the machine's; says how colours were normalised.

    Raises:
        ImportError: without accelerate, which distils; says what to install.
    """
    try:
        from ..distillation import DistillationConfig, distill
        from ..teachers.targets import TargetCache
    except ImportError as error:
        raise ImportError('one machine for several photos needs accelerate: pip install "apm_hf[train]"') from error
    embeds = features.mean(dim=(1, 2))  # of weight 0
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            max_steps=steps,
            batch_size=len(pixel_values),
            learning_rate=FIT_LEARNING_RATE,
            warmup_steps=min(10, steps // 10),
            num_locations=FIT_LOCATIONS,
            cls_weight=0.0,
            rgb_weight=10.0,
            checkpoint_steps=0,
            report_to="none",
            seed=seed,
        )
        data = TargetCache(pixel_values.cpu(), embeds.cpu(), features.cpu())
        student = distill(copy.deepcopy(machine), data, config=config, image_processor=image_processor).student
    return student.to(machine.device).eval()
