"""Test-time training: fit an APM to the teacher's embedding of one image, B images at once.

Every image has its own weights and its own optimiser state; they are stacked along a first dimension and stepped in
one batched computation (`torch.func.vmap`; Adam is elementwise, so the stacked step is each image's own step). The
model given is never changed. Source: arXiv:2410.20535, section 4; the published recipes are the presets.

Legend: B images, L locations, D trigger width, F feature width, S image side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from .modeling_apm import CHUNK_ELEMENTS, APMModel, APMModelOutput
from .position_encoding import grid_coordinates

logger = logging.get_logger(__name__)

_STARTS = ("random", "model")


@dataclass(frozen=True, kw_only=True)
class TTTConfig:
    """How an image is adapted to. The presets are in `TTTConfig.preset`.

    Args:
        steps: gradient steps per image.
        learning_rate: of Adam (arXiv:1412.6980) with its usual betas.
        num_locations: grid locations whose features are pooled at each step, a fresh random subset each time; the
            subset's mean is an unbiased estimate of the grid's. None pools all of them: the exact limit.
        start: `"random"` draws new weights, `"model"` starts from the given model's.
        seed: of the weights drawn and of the locations sampled. One seed serves all images of a call.
        initializer_range: standard deviation of weights drawn; None is the model's own, with biases at zero. A number
            draws the biases too, as the release does.
        lr_decay_every: steps after which the learning rate is multiplied by `lr_decay`; None never.
        lr_decay: see `lr_decay_every`.
        accumulate_gradients: never zero the gradients while an image is fitted (release).
        carry_over: hand Adam's moments and the learning rate on from image to image (release). Images are then fitted
            one after the other, and a result depends on the images before it.
        num_copies: copies of the image in the batch of one step (release: 8). The mean loss of identical copies is the
            loss of one, so this costs time and changes nothing but rounding.

    Raises:
        ValueError: for a value outside its range; says what was expected.
    """

    steps: int = 20
    learning_rate: float = 1e-4
    num_locations: int | None = None
    start: str = "random"
    seed: int = 0
    initializer_range: float | None = None
    lr_decay_every: int | None = None
    lr_decay: float = 0.1
    accumulate_gradients: bool = False
    carry_over: bool = False
    num_copies: int = 1

    def __post_init__(self) -> None:
        if self.start not in _STARTS:
            raise ValueError(f"start: expected one of {list(_STARTS)}, got {self.start!r}")
        for name in ("steps", "num_locations", "lr_decay_every", "num_copies"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("learning_rate", "initializer_range", "lr_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive finite number, got {value}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TTTConfig":
        """`"paper"`: the paper's recipe. `"reference"`: what the release computes, quirks included. `"fast"`: 16
        random locations a step and a learning rate to match.

        Raises:
            ValueError: for an unknown preset or a value outside its range.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
        return replace(PRESETS[name], **overrides)


PRESETS: dict[str, TTTConfig] = {
    "paper": TTTConfig(),
    "reference": TTTConfig(
        steps=1200,
        initializer_range=0.01,
        lr_decay_every=200,
        accumulate_gradients=True,
        carry_over=True,
        num_copies=8,
    ),
    "fast": TTTConfig(steps=20, learning_rate=1e-3, num_locations=16),
}


@dataclass(frozen=True)
class Adapted:
    """B adapted machines.

    Args:
        image_embeds: `(B, F)`, float32, after the last update, pooled over the locations of the last step.
        losses: `(B, steps)`, float32, each before its update.
        diverged: `(B,)`, true where a loss was not finite; that image's numbers mean nothing, the others' do.
    """

    image_embeds: Tensor
    losses: Tensor
    diverged: Tensor
    _model: APMModel = field(repr=False)
    _weights: dict[str, Tensor] = field(repr=False)
    _pixel_values: Tensor | None = field(repr=False)
    _trigger_column: Tensor | None = field(repr=False)

    def query(self, coordinates: Tensor | None = None, *, chunk_size: int | None = None) -> APMModelOutput:
        """Ask every adapted machine about its own image.

        Args:
            coordinates: `(L, 2)` or `(B, L, 2)`, (y, x) in [-1, 1]; None asks for the full grid.
            chunk_size: locations answered at a time, in every machine.

        Returns:
            [`APMModelOutput`], B images.
        """
        model, images, columns = self._model, self._pixel_values, self._trigger_column
        if coordinates is not None:
            coordinates = model._check_coordinates(coordinates, len(self.losses))
            coordinates = coordinates if len(coordinates) == len(self.losses) > 1 else coordinates[0]
        if chunk_size is None:
            widest = max(*model.config.hidden_sizes, model.config.feature_size)
            chunk_size = max(1, CHUNK_ELEMENTS // (len(self.losses) * widest))
        with torch.no_grad():
            outputs = _vmapped(model, self._weights, images, coordinates, columns, chunk_size=chunk_size)
        return APMModelOutput(
            **{name: value.squeeze(1) for name, value in outputs.items()}
        )  # drops the 1 of (B, 1, ...)

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """The weights fitted to image `index`, for `APMModel.load_state_dict`."""
        return {name: weight[index].clone() for name, weight in self._weights.items()}


@torch.inference_mode(False)  # adapting takes gradients, wherever it is called from
@torch.enable_grad()
def adapt(
    model: PreTrainedModel,
    pixel_values: Tensor | None,
    targets: Tensor,
    *,
    config: TTTConfig,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    trigger_column: Tensor | None = None,
) -> Adapted:
    """Fit one machine to each of B images, so that its pooled feature is the teacher's embedding of that image.

    An image's result depends on the image, its target, the configuration and its seed; not on the other images
    (`carry_over` excepted).

    Args:
        model: an [`APMModel`] or a model that holds one: the architecture and, with
            `start="model"`, the weights to start from. Not changed.
        pixel_values: `(B, C, S, S)`; None where the machine takes its trigger column from the caller.
        targets: `(B, F)`, the teacher's image embeddings, as the teacher gives them.
        config: see [`TTTConfig`].
        generator: supplies the seed, instead of `config.seed`.
        seeds: `(B,)`, a seed for each image, instead of `config.seed`.
        trigger_column: `(B, D)`, for `trigger_source="embedding"`.

    Returns:
        [`Adapted`].

    Raises:
        ValueError: for shapes that do not fit, for non-finite inputs (naming the images), or more locations than the
            grid has.
    """
    machine = getattr(model, "apm", model)  # heads hold the machine under this name
    if not isinstance(machine, APMModel):
        raise ValueError(f"model: expected an APMModel or a model that holds one, got {type(model).__name__}")
    _check(machine, pixel_values, targets, config, trigger_column)
    num_images, device = len(targets), machine.device
    seeds = _seeds(num_images, config, generator, seeds)
    # Copies, since what was made in inference mode cannot be differentiated through.
    inputs = [None if x is None else x.to(device, torch.float32, copy=True) for x in (pixel_values, trigger_column)]
    targets = targets.to(device, torch.float32, copy=True)

    fit = _Fit(machine, config)
    # The release hands the optimiser's state on from image to image, so it has to take them one by one.
    if config.carry_over:
        results = [
            fit([None if x is None else x[i : i + 1] for x in inputs], targets[i : i + 1], seeds[i : i + 1])
            for i in range(num_images)
        ]
        weights = {name: torch.cat([result[0][name] for result in results]) for name in results[0][0]}
        losses = torch.cat([result[1] for result in results])
        embeds = torch.cat([result[2] for result in results])
    else:
        weights, losses, embeds = fit(inputs, targets, seeds)
    diverged = ~(losses.isfinite().all(dim=1) & embeds.isfinite().all(dim=1))
    if diverged.any():
        logger.warning(f"adapt: the fit diverged for images {_indices(diverged)}")
    return Adapted(embeds, losses, diverged, machine, weights, *inputs)


class _Fit:
    """Fits groups of images. Adam's state outlives a group only where the configuration carries it over."""

    def __init__(self, model: APMModel, config: TTTConfig):
        self.model, self.config = model, config
        self.leaves: dict[str, Tensor] = {}

    def __call__(
        self, inputs: list[Tensor | None], targets: Tensor, seeds: Sequence[int]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Weights `(B, ...)` by name, losses `(B, steps)`, embeddings `(B, F)` of one group."""
        config = self.config
        sampler = _Sampler(seeds, self.model.config.num_locations, config.num_locations, self.model.config.grid_size)
        weights = _initial_weights(self.model, config, sampler.generators, seeds)
        self._set_leaves(weights)
        pixel_values, trigger_column = inputs

        def embed(coordinates: Tensor | None) -> Tensor:
            output = _vmapped(self.model, self.leaves, pixel_values, coordinates, trigger_column, pooled=True)
            return output.squeeze(1)  # (B, 1, F) -> (B, F)

        losses = torch.empty(len(seeds), config.steps, device=targets.device)
        coordinates = None
        for step in range(config.steps):
            coordinates = sampler()
            loss = F.mse_loss(embed(coordinates), targets, reduction="none").mean(dim=1)  # (B, F) -> (B,)
            # Summed over images: each image's weights then get exactly its own gradient.
            loss.sum().backward()
            self.optimizer.step()
            self.scheduler.step()
            if not config.accumulate_gradients:
                self.optimizer.zero_grad()
            losses[:, step] = loss.detach()
        self.optimizer.zero_grad()
        with torch.no_grad():
            embeds = embed(coordinates)
        fitted = {name: leaf.detach() for name, leaf in self.leaves.items()}
        if config.carry_over:  # the leaves serve the next image too
            fitted = {name: leaf.clone() for name, leaf in fitted.items()}
        return {**weights, **fitted}, losses, embeds

    def _set_leaves(self, weights: dict[str, Tensor]) -> None:
        # The colours have no target, so the RGB head has no gradient.
        weights = {name: weight for name, weight in weights.items() if not name.startswith("decoder.rgb_head.")}
        if self.leaves and self.config.carry_over:
            for name, leaf in self.leaves.items():
                leaf.data.copy_(weights[name])
            return
        self.leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
        self.optimizer = torch.optim.Adam(self.leaves.values(), lr=self.config.learning_rate, fused=True)
        never = 2**31
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            self.optimizer, self.config.lr_decay_every or never, self.config.lr_decay
        )


class _Sampler:
    """A fresh random subset of the grid's locations at every call, from each image's own seed."""

    def __init__(self, seeds: Sequence[int], num_all: int, num_sampled: int | None, grid_size: int):
        # Drawn on the CPU, so that a seed means the same on every device. Images of one seed share one stream.
        unique = dict.fromkeys(seeds)
        self.generators = {seed: torch.Generator().manual_seed(seed) for seed in unique}
        self.seeds, self.num_all, self.num_sampled, self.grid_size = seeds, num_all, num_sampled, grid_size

    def __call__(self) -> Tensor | None:
        """`(L, 2)` where all images share a seed, else `(B, L, 2)`; None for the full grid."""
        if self.num_sampled is None:
            return None
        grid = grid_coordinates(self.grid_size, self.grid_size)
        drawn = {
            seed: grid[torch.randperm(self.num_all, generator=generator)[: self.num_sampled]]
            for seed, generator in self.generators.items()
        }
        return next(iter(drawn.values())) if len(drawn) == 1 else torch.stack([drawn[seed] for seed in self.seeds])


def _initial_weights(
    model: APMModel, config: TTTConfig, generators: dict[int, torch.Generator], seeds: Sequence[int]
) -> dict[str, Tensor]:
    """Every weight of every image, stacked: `(B, ...)` by name, float32."""
    given = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    if config.start == "model":
        return {name: weight.expand(len(seeds), *weight.shape).clone() for name, weight in given.items()}
    drawn = {seed: _draw_weights(given, model, config, generator) for seed, generator in generators.items()}
    if len(drawn) == 1:
        weights = next(iter(drawn.values()))
        return {name: weight.expand(len(seeds), *weight.shape).clone() for name, weight in weights.items()}
    return {name: torch.stack([drawn[seed][name] for seed in seeds]) for name in given}


def _draw_weights(
    given: dict[str, Tensor], model: APMModel, config: TTTConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    std = model.config.initializer_range if config.initializer_range is None else config.initializer_range
    drawn = {}
    for name, weight in given.items():
        if name.endswith(".bias") and config.initializer_range is None:
            drawn[name] = torch.zeros_like(weight)
        else:
            drawn[name] = torch.empty(weight.shape).normal_(0.0, std, generator=generator).to(weight.device)
    return drawn


class _Call(nn.Module):
    """One machine, one image; `functional_call` needs a forward."""

    def __init__(self, model: APMModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, coordinates, trigger_column, pooled: bool, chunk_size: int | None):
        inputs = [None if x is None else x[None] for x in (pixel_values, trigger_column)]  # (...) -> (1, ...)
        if pooled:
            return self.model.pooled_features(inputs[0], coordinates, trigger_column=inputs[1])
        return dict(
            self.model(inputs[0], coordinates, trigger_column=inputs[1], chunk_size=chunk_size, return_dict=True)
        )


def _vmapped(
    model: APMModel,
    weights: dict[str, Tensor],
    pixel_values: Tensor | None,
    coordinates: Tensor | None,
    trigger_column: Tensor | None,
    *,
    pooled: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """Call B machines, each with its own weights `(B, ...)`, on an image each; outputs are `(B, 1, ...)`."""
    call = _Call(model)
    if coordinates is not None:
        coordinates = coordinates.to(model.device)

    def one(weights, pixel_values, coordinates, trigger_column):
        weights = {f"model.{name}": weight for name, weight in weights.items()}
        return functional_call(call, weights, (pixel_values, coordinates, trigger_column, pooled, chunk_size))

    per_image = coordinates is not None and coordinates.ndim == 3
    in_dims = (0, None if pixel_values is None else 0, 0 if per_image else None, None if trigger_column is None else 0)
    return vmap(one, in_dims=in_dims)(weights, pixel_values, coordinates, trigger_column)


def _seeds(
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


def _check(
    model: APMModel, pixel_values: Tensor | None, targets: Tensor, config: TTTConfig, trigger_column: Tensor | None
) -> None:
    num_locations, feature_size = model.config.num_locations, model.config.feature_size
    if targets.ndim != 2 or targets.shape[1] != feature_size or len(targets) == 0:
        raise ValueError(f"targets: expected shape (B, {feature_size}) with B >= 1, got {tuple(targets.shape)}")
    if config.num_locations is not None and config.num_locations > num_locations:
        raise ValueError(
            f"num_locations: expected at most the grid's {num_locations} locations, got {config.num_locations}"
        )
    if pixel_values is None and trigger_column is None:
        raise ValueError("adapt: expected pixel_values or trigger_column, got neither")
    for name, values in (("pixel_values", pixel_values), ("targets", targets), ("trigger_column", trigger_column)):
        if values is None:
            continue
        if len(values) != len(targets):
            raise ValueError(f"{name}: expected {len(targets)} images, as many as targets, got {len(values)}")
        bad = ~values.flatten(1).isfinite().all(dim=1)
        if bad.any():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in images {_indices(bad)}")


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
