"""Train one copy of an APM per image at test time, B copies in one batched computation.

Every image has its own weights and optimiser state; they are stacked along a first dimension and updated in one
batched computation (Adam is elementwise, so the stacked step equals each image's step). The given model is never
changed. Source: arXiv:2410.20535, section 4; the published recipes are the presets.

Legend: B images, n locations, D trigger width, F feature width, K classes, S image side.
"""

from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling_apm import APMModel
from .adapted import Adapted, TTTStep
from .settings import TTTConfig
from .stacked import StackedModels, Weights, draw_weights, learning_layers
from .targets import Loss, Stopper, TTTTargets, as_float

logger = logging.get_logger(__name__)

# Number of steps for which frozen layers are computed at a time.
PREPARED_STEPS = 16


@torch.inference_mode(False)  # adapting takes gradients even when called in inference mode
@torch.enable_grad()
def adapt(
    model: PreTrainedModel,
    pixel_values: Any,
    targets: Any,
    *,
    config: TTTConfig,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    trigger_column: Any = None,
    text_embeds: Any = None,
    callback: Callable[[TTTStep], None] | None = None,
    max_memory: int | None = None,
    keep_models: bool = True,
) -> Adapted:
    """Fit one model to each of B images, so that its pooled feature matches the teacher's embedding of that image.

    An image's result depends on the image, its target, the configuration and its seed; the other images, their number
    and order change it by rounding only (1e-5). Repeating a call on the same computer gives the same bytes.

    Args:
        model: an [`APMModel`] or a model that contains one: the architecture and, with `start="model"`, the initial
            weights. Not changed.
        pixel_values: `(B, C, S, S)`: a tensor, an array or lists, like all inputs; None if the trigger column is
            given and no local patch is read.
        targets: `(B, F)`, the teacher's image embeddings, unchanged, or [`TTTTargets`].
        config: see [`TTTConfig`].
        generator: supplies the seed, instead of `config.seed`.
        seeds: `(B,)`, per-image seeds, instead of `config.seed`.
        trigger_column: `(B, D)`, instead of folding; required with `trigger_source="embedding"`.
        text_embeds: `(K, F)`, class embeddings, for `stop="stable"`.
        callback: called at every step of every group of images.
        max_memory: bytes that the fit may use; images are fitted in groups that fit into it, at least one at a time.
            None is half of the device's free memory.
        keep_models: False returns only embeddings and losses, and frees each group's weights.

    Returns:
        [`Adapted`].

    Raises:
        ValueError: for shapes that do not fit, non-finite inputs or targets of norm zero (naming the images).
    """
    apm = getattr(model, "apm", model)  # heads hold the model under this name
    if not isinstance(apm, APMModel):
        raise ValueError(f"model: expected an APMModel or a model that contains one, got {type(model).__name__}")
    if not isinstance(targets, TTTTargets):
        targets = as_float("targets", targets)
        if targets is None or targets.ndim != 2 or len(targets) == 0:
            width, got = apm.config.feature_size, None if targets is None else tuple(targets.shape)
            raise ValueError(f"targets: expected shape (B, {width}) with B >= 1, got {got}")
        targets = TTTTargets(image_embeds=targets)
    named = {"pixel_values": pixel_values, "trigger_column": trigger_column, "text_embeds": text_embeds}
    inputs = {name: as_float(name, values) for name, values in named.items()}
    num_images, device = len(targets), apm.device
    distinct, seeds = seeds is not None, _seeds(num_images, config, generator, seeds)
    check_inputs(apm, targets, config, **inputs)
    inputs = {name: None if values is None else values.to(device) for name, values in inputs.items()}
    texts = inputs.pop("text_embeds")

    with torch.autocast(device.type, enabled=False):  # `config.dtype` sets the dtype of products
        fit = _Fit(apm, config, targets, texts, callback, distinct)
        size = group_size(apm, config, targets, max_memory, distinct=distinct)
        for first in range(0, num_images, size):
            images = slice(first, min(first + size, num_images))
            fit(images, seeds[images], **{name: None if x is None else x[images] for name, x in inputs.items()})
            if not keep_models:
                fit.models.clear()
    embeds, losses, steps = fit.embeds, fit.losses, fit.taken
    diverged = ~embeds.isfinite().all(dim=1) | losses.isinf().any(dim=1)
    diverged |= (losses.isnan() & (torch.arange(config.steps, device=device) < steps[:, None])).any(dim=1)
    if diverged.any():
        logger.warning(f"adapt: the fit diverged for images {_indices(diverged)}")
    below = ~(fit.cosines >= (config.stop_threshold or 0.0)) & ~diverged
    if config.stop == "cosine" and below.any():
        logger.warning(
            f"adapt: {config.steps} steps were too few for a cosine of {config.stop_threshold} to the targets of the "
            f"images {_indices(below)}"
        )
    places = [fit.models[index] for index in range(num_images)] if keep_models else None
    return Adapted(embeds, losses, steps, diverged, apm, places, **inputs)


class _Fit:
    """Fit groups of images and collect the results of all; attributes have the names of [`Adapted`]'s."""

    def __init__(
        self,
        model: APMModel,
        config: TTTConfig,
        targets: TTTTargets,
        text_embeds: Tensor | None,
        callback: Callable[[TTTStep], None] | None,
        distinct: bool,
    ):
        self.model, self.config, self.targets, self.callback = model, config, targets, callback
        self.text_embeds = None if text_embeds is None else F.normalize(text_embeds, dim=-1)
        self.distinct = distinct and config.start == "random"
        self.learning = learning_layers(model, config, list(targets.tensors()))
        self.start: Weights | None = None  # if all images start from the same weights
        num_images, size = len(targets), model.config.grid_size
        self.grid = targets.grid or (size, size)
        empty = {"dtype": torch.float32, "device": model.device}
        self.embeds = torch.empty(num_images, model.config.feature_size, **empty)
        self.cosines = torch.ones(num_images, **empty)  # to the target, for images that were not stopped
        self.losses = torch.full((num_images, config.steps), torch.nan, **empty)
        self.taken = torch.full((num_images,), config.steps, device=model.device)
        self.models: dict[int, tuple[StackedModels, int]] = {}  # the models of each image, and its index in them

    def __call__(
        self, group: slice, seeds: Sequence[int], *, pixel_values: Tensor | None, trigger_column: Tensor | None
    ) -> None:
        config, device = self.config, self.model.device
        sampler = _Sampler(seeds, self.grid[0] * self.grid[1], config.num_locations, device)
        outputs = ["features", *(name for name in ("rgb", "levels") if name in self.targets.tensors())]
        loss = Loss(self.targets, group, self.model)
        models = StackedModels(
            self.model,
            self._start(seeds),
            self.learning,
            config,
            pixel_values,
            trigger_column,
            self.grid,
            outputs,
            loss.target_size(),
        )
        optimizer: torch.optim.Optimizer = torch.optim.Adam(models.learnt(), lr=config.learning_rate, fused=True)
        stopper = self._stopper(len(seeds))
        images = torch.arange(group.start, group.stop)  # images that have not stopped
        for step in range(config.steps):
            now = step % PREPARED_STEPS
            if now == 0:
                models.prepare(
                    [sampler(images - group.start) for _ in range(min(PREPARED_STEPS, config.steps - step))]
                )
            outputs = models(now)
            losses, pooled = loss(outputs, models.places[now]), outputs["pooled"].detach()
            self.losses[images, step] = losses.detach()
            if self.callback is not None:
                self.callback(TTTStep(step, images, losses.detach(), pooled, _weights(models, images)))
            done = None if stopper is None else stopper(losses.detach(), pooled, loss)
            if done is not None and done.any():
                stopped = models if done.all() else models.take(done.nonzero()[:, 0].to(device))
                self._finish(stopped, images[done], pooled[done])
                self.taken[images[done]] = step
                if done.all():
                    return
            # Summed over images, so that the weights of an image get exactly the gradient of its loss.
            losses.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if done is not None and done.any():
                remaining = (~done).nonzero()[:, 0].to(device)
                images, old = images[~done], models
                models = old.take(remaining)
                optimizer = _transfer_state(optimizer, old, models, remaining)
                loss.keep(remaining)
                stopper.keep(remaining)
        with torch.no_grad():
            pooled = models(now)["pooled"]
        self._finish(models, images, pooled)
        if (cosines := loss.cosine(pooled)) is not None:
            self.cosines[images] = cosines

    def _start(self, seeds: Sequence[int]) -> Weights:
        """Return the weights that models start from, `(1 or B, ...)` by name."""
        if self.distinct:
            drawn = {seed: draw_weights(self.model, seed) for seed in dict.fromkeys(seeds)}
            return {name: torch.stack([drawn[seed][name] for seed in seeds]) for name in drawn[seeds[0]]}
        if self.start is None:
            given = {name: weight.detach().float() for name, weight in self.model.named_parameters()}
            weights = draw_weights(self.model, seeds[0]) if self.config.start == "random" else given
            # Clone, since inference tensors cannot be saved for backward.
            self.start = {name: (x.clone() if x.is_inference() else x)[None] for name, x in weights.items()}
        return self.start

    def _stopper(self, num_images: int) -> Any:
        config, texts = self.config, self.text_embeds
        if config.stop is None:
            return None
        classify = None if texts is None else (lambda embeds: (embeds @ texts.T).argmax(dim=-1))
        return Stopper(config.stop, config.stop_threshold or 0.0, config.stop_patience, num_images, classify)

    def _finish(self, models: StackedModels, images: Tensor, pooled: Tensor) -> None:
        models.release()
        self.embeds[images] = pooled
        self.models |= {image: (models, place) for place, image in enumerate(images.tolist())}


def _transfer_state(
    optimizer: torch.optim.Optimizer, old: StackedModels, new: StackedModels, remaining: Tensor
) -> torch.optim.Optimizer:
    """Return an optimiser for the remaining models, with their state."""
    successor = torch.optim.Adam(new.learnt(), lr=optimizer.param_groups[0]["lr"], fused=True)
    for before, after in zip(old.learnt(), new.learnt(), strict=True):
        state = optimizer.state[before]
        successor.state[after] = {name: value[remaining] if value.ndim else value for name, value in state.items()}
    return successor


def _weights(models: StackedModels, images: Tensor) -> Callable[[int], Weights]:
    return lambda image: models.weights(images.tolist().index(image))


class _Sampler:
    """Draw a new random subset of the grid's cells at every call, from per-image seeds."""

    def __init__(self, seeds: Sequence[int], num_cells: int, num_sampled: int | None, device: torch.device):
        # Drawn on the CPU, so that a seed gives the same values on every device. Images of one seed share one stream.
        self.generators = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
        self.seeds, self.num_cells, self.num_sampled, self.device = seeds, num_cells, num_sampled, device

    def __call__(self, images: Tensor) -> Tensor | None:
        """Return `(n,)` if all images share a seed, else `(B', n)` for these images; None for the full grid."""
        if self.num_sampled is None or self.num_sampled >= self.num_cells:
            return None
        drawn = {
            seed: torch.randperm(self.num_cells, generator=generator)[: self.num_sampled]
            for seed, generator in self.generators.items()
        }
        if len(drawn) == 1:
            return next(iter(drawn.values())).to(self.device)
        return torch.stack([drawn[self.seeds[index]] for index in images.tolist()]).to(self.device)


# --- memory ---


def group_size(
    model: APMModel, config: TTTConfig, targets: TTTTargets, max_memory: int | None, *, distinct: bool
) -> int:
    """Return the number of images fitted at a time: as many as fit into memory, at least one."""
    if max_memory is None:
        on_gpu = model.device.type == "cuda"
        max_memory = (torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available) // 2
    elif max_memory < 1:
        raise ValueError(f"max_memory: expected a positive number of bytes, got {max_memory}")
    return max(1, max_memory // bytes_per_image(model, config, targets, distinct=distinct))


def bytes_per_image(model: APMModel, config: TTTConfig, targets: TTTTargets, *, distinct: bool) -> int:
    """Estimate the bytes that fitting one image takes; `distinct` if seeds, and so weights, are per image."""
    architecture, learning = model.config, learning_layers(model, config, list(targets.tensors()))
    learnt = 0
    for name, parameter in model.named_parameters():
        how, part = learning.get(name.rpartition(".")[0]), name.rpartition(".")[2]
        low_rank = how == "low_rank" and part == "weight"
        if how == "all" or low_rank or (how and part == "bias"):
            learnt += config.rank * len(parameter) if low_rank else parameter.numel()
    every = sum(parameter.numel() for parameter in model.parameters())
    num_cells = architecture.num_locations if targets.grid is None else targets.grid[0] * targets.grid[1]
    num_queried = min(config.num_locations or num_cells, num_cells)
    ahead = min(PREPARED_STEPS, config.steps) if config.num_locations else 1
    widths = [*architecture.hidden_sizes, architecture.feature_size]
    widths += architecture.hidden_sizes * 2 * architecture.num_residual_blocks
    images = architecture.num_channels * architecture.image_size**2 * 2
    images += num_cells * architecture.trigger_width * (architecture.trigger_source == "columns")
    images += num_cells * (2 * architecture.local_patch_width + architecture.feature_size * (targets.grid is not None))
    # Weights, gradients and Adam's two moments; activations, their gradients and what Linear and ReLU save of them.
    elements = 4 * learnt + 2 * every * (distinct and config.start == "random")
    return 4 * (elements + num_queried * (4 * sum(widths) + ahead * max(widths)) + images)


# --- validation of the arguments ---


def _seeds(
    num_images: int, config: TTTConfig, generator: torch.Generator | None, seeds: Sequence[int] | None
) -> list[int]:
    if seeds is not None:
        if generator is not None:
            raise ValueError("seeds, generator: expected one of them, got both")
        if len(seeds) != num_images:
            raise ValueError(f"seeds: expected {num_images}, one per image, got {len(seeds)}")
        return [int(seed) for seed in seeds]
    seed = config.seed
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return [seed] * num_images


def check_inputs(
    model: APMModel,
    targets: TTTTargets,
    config: TTTConfig,
    pixel_values: Tensor | None,
    trigger_column: Tensor | None,
    text_embeds: Tensor | None,
) -> None:
    """Raise a `ValueError` for inputs that do not fit the model or each other, or are not finite."""
    architecture, named, num_images = model.config, targets.tensors(), len(targets)
    width, side = architecture.feature_size, architecture.image_size
    if num_images == 0:
        raise ValueError("targets: expected at least one image, got none")
    for name, shape in (("image_embeds", f"(B, {width})"), ("features", f"(B, rows, cols, {width})")):
        if name in named and named[name].shape[-1] != width:
            raise ValueError(f"targets: expected shape {shape} with B >= 1, got {tuple(named[name].shape)}")
    levels = (architecture.num_levels, architecture.level_width)
    if targets.levels is not None and (targets.levels.shape[1], targets.levels.shape[-1]) != levels:
        raise ValueError(
            f"levels: expected shape (B, {levels[0]}, rows, cols, {levels[1]}), got {tuple(targets.levels.shape)}"
        )
    if targets.rgb is not None and not architecture.use_rgb_head:
        raise ValueError("rgb: expected a model with use_rgb_head=True, got one without")
    if config.stop == "stable" and text_embeds is None:
        raise ValueError("text_embeds: expected class embeddings (K, F) for stop='stable', got none")
    if config.stop == "cosine" and targets.image_embeds is None:
        raise ValueError("image_embeds: expected targets to compare with for stop='cosine', got none")
    if text_embeds is not None and (text_embeds.ndim != 2 or text_embeds.shape[1] != width):
        raise ValueError(f"text_embeds: expected shape (K, {width}), got {tuple(text_embeds.shape)}")
    if architecture.trigger_source == "tokens":
        raise ValueError("model: expected one that is fitted to its teacher's features, got one that reads them")
    if config.start == "random" and (architecture.num_residual_blocks or architecture.trigger_source == "columns"):
        raise ValueError("start: expected 'model' with local columns or residual blocks, got 'random'")
    if architecture.trigger_source == "columns" and (pixel_values is None or trigger_column is not None):
        raise ValueError("adapt: expected pixel_values alone with trigger_source='columns', which are folded")
    if trigger_column is None and architecture.trigger_source == "embedding":
        raise ValueError("trigger_column: expected (B, D) for trigger_source='embedding', got none")
    if pixel_values is None and trigger_column is None:
        raise ValueError("adapt: expected pixel_values or trigger_column, got neither")
    if pixel_values is None and architecture.local_patch:
        raise ValueError("pixel_values: expected the images, since local_patch=True puts them into the query")
    if trigger_column is not None and config.fit == "trigger" and architecture.trigger_source == "conv":
        raise ValueError("fit='trigger': expected pixel_values to fold, got the trigger_column")
    shapes = {
        "pixel_values": (architecture.num_channels, side, side),
        "trigger_column": (architecture.trigger_width,),
    }
    for name, values in {"pixel_values": pixel_values, "trigger_column": trigger_column, **named}.items():
        if values is None:
            continue
        label = "targets" if name == "image_embeds" else name
        if name in shapes and values.shape[1:] != shapes[name]:
            expected = ", ".join(map(str, shapes[name]))
            raise ValueError(f"{name}: expected shape (B, {expected}), got {tuple(values.shape)}")
        if len(values) != num_images:
            raise ValueError(f"{label}: expected {num_images} images, as many as targets, got {len(values)}")
        bad = ~values.flatten(1).isfinite().all(dim=1)
        if bad.any():
            raise ValueError(f"{label}: expected finite numbers, got NaN or infinity in images {_indices(bad)}")
    if targets.image_embeds is not None:
        empty = (targets.image_embeds == 0).all(dim=-1).view(num_images, -1).any(dim=1)
        if empty.any():
            raise ValueError(f"targets: expected embeddings with a direction, got zeros in images {_indices(empty)}")


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
