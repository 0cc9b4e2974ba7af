"""What can be wrong with the arguments of a fit, each with a message of its own.

Legend: B images, L locations, D trigger width, F feature width, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..modeling_apm import APMModel
from .layers import learning_modules
from .memory import num_asked
from .settings import TTTConfig
from .targets import TTTTargets


def seeds_of(
    num_images: int, config: TTTConfig, generator: torch.Generator | None, seeds: Sequence[int] | None
) -> list[int]:
    if seeds is not None:
        seeds = [int(seed) for seed in seeds]
        if generator is not None:
            raise ValueError("seeds, generator: expected one of them, got both")
        if len(seeds) != num_images:
            raise ValueError(f"seeds: expected {num_images}, one an image, got {len(seeds)}")
        return seeds
    seed = config.seed
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return [seed] * num_images


def check_arguments(
    model: APMModel,
    pixel_values: Tensor | None,
    targets: TTTTargets,
    config: TTTConfig,
    trigger_column: Tensor | None,
    text_embeds: Tensor | None,
) -> None:
    num_locations, feature_size = num_asked(model, targets), model.config.feature_size
    num_images, named = len(targets), targets.tensors()
    if num_images == 0:
        raise ValueError("targets: expected at least one image, got none")
    levels = (model.config.num_levels, model.config.level_width)
    if targets.levels is not None and (targets.levels.shape[1], targets.levels.shape[-1]) != levels:
        raise ValueError(
            f"levels: expected shape (B, {levels[0]}, rows, cols, {levels[1]}), got {tuple(targets.levels.shape)}"
        )
    for name in named.keys() - {"rgb", "levels"}:
        if named[name].shape[-1] != feature_size:
            shape = {"image_embeds": f"(B, {feature_size})", "features": f"(B, rows, cols, {feature_size})"}[name]
            raise ValueError(f"targets: expected shape {shape} with B >= 1, got {tuple(named[name].shape)}")
    if targets.rgb is not None and not model.config.use_rgb_head:
        raise ValueError("rgb: expected a machine with use_rgb_head=True, got one without")
    if config.fit == "trigger":
        learning_modules(model.config, config.fit)  # says what is missing
    if config.num_locations is not None and config.num_locations > num_locations:
        raise ValueError(
            f"num_locations: expected at most the grid's {num_locations} locations, got {config.num_locations}"
        )
    if config.stop == "stable" and text_embeds is None:
        raise ValueError("text_embeds: expected class embeddings (K, F) for stop='stable', got none")
    if config.stop == "cosine" and targets.image_embeds is None:
        raise ValueError("image_embeds: expected targets to compare with for stop='cosine', got none")
    if text_embeds is not None and (text_embeds.ndim != 2 or text_embeds.shape[1] != feature_size):
        raise ValueError(f"text_embeds: expected shape (K, {feature_size}), got {tuple(text_embeds.shape)}")
    _check_inputs(model, pixel_values, trigger_column, num_images)
    everything = {"pixel_values": pixel_values, "trigger_column": trigger_column, **named}
    for name, values in everything.items():
        if values is None:
            continue
        label = "targets" if name == "image_embeds" else name
        if len(values) != num_images:
            raise ValueError(f"{label}: expected {num_images} images, as many as targets, got {len(values)}")
        bad = ~values.flatten(1).isfinite().all(dim=1)
        if bad.any():
            raise ValueError(f"{label}: expected finite numbers, got NaN or infinity in images {indices_of(bad)}")
    if targets.image_embeds is not None:
        empty = (targets.image_embeds == 0).all(dim=-1).view(num_images, -1).any(dim=1)
        if empty.any():
            raise ValueError(f"targets: expected embeddings with a direction, got zeros in images {indices_of(empty)}")


def _check_inputs(
    model: APMModel, pixel_values: Tensor | None, trigger_column: Tensor | None, num_images: int
) -> None:
    config = model.config
    if pixel_values is None and trigger_column is None:
        raise ValueError("adapt: expected pixel_values or trigger_column, got neither")
    if config.trigger_source == "embedding" and trigger_column is None:
        raise ValueError("trigger_column: expected (B, D) for trigger_source='embedding', got none")
    if config.trigger_source == "conv" and pixel_values is None:
        raise ValueError("pixel_values: expected the images for trigger_source='conv', got none")
    if config.local_patch and pixel_values is None:
        raise ValueError("pixel_values: expected the images, since local_patch=True puts them into the query")
    if pixel_values is not None:
        model._check_pixels(pixel_values)
    if trigger_column is not None and trigger_column.shape[1:] != (config.trigger_width,):
        raise ValueError(
            f"trigger_column: expected shape (B, {config.trigger_width}), got {tuple(trigger_column.shape)}"
        )


def indices_of(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
