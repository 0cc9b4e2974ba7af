"""The weights that fits start from: the model's own, or drawn, for all images or for each.

Legend: B images.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..modeling_apm import APMModel
from .settings import TTTConfig


def initial_weights(
    model: APMModel, config: TTTConfig, generators: dict[int, torch.Generator], seeds: Sequence[int], own: bool
) -> dict[str, Tensor]:
    """Every weight by name, float32: `(B, ...)` where images have weights of their own, else `(1, ...)`."""
    given = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    if config.start == "model":
        return {name: weight[None] for name, weight in given.items()}
    if not own:
        (seed,) = generators
        return {
            name: weight[None] for name, weight in _kept_weights(given, model, config, generators[seed], seed).items()
        }
    drawn = {seed: _draw_weights(given, model, config, generator) for seed, generator in generators.items()}
    return {name: torch.stack([drawn[seed][name] for seed in seeds]) for name in given}


# The weights that a model's last fit started from: drawing millions takes longer than fitting a few.
_drawn: WeakKeyDictionary[APMModel, tuple[tuple, dict[str, Tensor], Tensor]] = WeakKeyDictionary()


def _kept_weights(
    given: dict[str, Tensor], model: APMModel, config: TTTConfig, generator: torch.Generator, seed: int
) -> dict[str, Tensor]:
    """What `_draw_weights` gives for this seed, with the generator left where it leaves it."""
    shapes = tuple((name, weight.shape) for name, weight in given.items())
    key = (seed, config.initializer_range, model.config.initializer_range, model.device, shapes)
    if model not in _drawn or _drawn[model][0] != key:
        _drawn.pop(model, None)  # before the new ones take as much again
        _drawn[model] = key, _draw_weights(given, model, config, generator), generator.get_state()
    _, weights, state = _drawn[model]
    generator.set_state(state)
    return weights


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
