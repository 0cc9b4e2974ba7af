"""Test-time training: fit an APM to the teacher's embedding of one image, B images at once.

Every image has its own weights and its own optimiser state; they are stacked along a first dimension and stepped in
one batched computation (Adam is elementwise, so the stacked step is each image's own step). The model given is never
changed. Source: arXiv:2410.20535, section 4; the published recipes are the presets.

Legend: B images, L locations, D trigger width, F feature width, K classes, S image side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.utils import logging

from .modeling_apm import APMModel, APMModelOutput
from .ttt_machines import FITS, Machines, learning_modules
from .ttt_targets import STOPS, GridTargets, Stopper, TTTTargets

logger = logging.get_logger(__name__)

_STARTS = ("random", "model")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of layers that stand still, so many steps are computed at a time.
_PREPARED_STEPS = 32


@dataclass(frozen=True, kw_only=True)
class TTTConfig:
    """How an image is adapted to. The presets are in `TTTConfig.preset`.

    Args:
        steps: gradient steps per image, at most.
        learning_rate: of Adam (arXiv:1412.6980) with its usual betas.
        num_locations: grid locations whose features are pooled at each step, a fresh random subset each time; the
            subset's mean is an unbiased estimate of the grid's. None pools all of them: the exact limit.
        fit: what learns. `"all"`: every weight (paper). `"last_layers"`: the last hidden layer, the feature head and
            attention's values and output. `"low_rank"`: the same, but the hidden layer and the head learn a product
            of rank `rank` whose first factor is fixed: it sums the inputs in `rank` blocks, so that the columns of a
            block move together, which is nearly what Adam does to them anyway. `"heads"`: the feature head and
            attention's values and output. `"trigger"`: the convolution alone. `"output_bias"`: one vector, a control:
            it copies its target and adapts nothing.
        rank: see `fit="low_rank"`; reduced to a divisor of the layer's width.
        alpha: layers of low rank move so many times as far as their weights would; layers below stand still, and
            this makes up for them.
        start: `"random"` draws new weights, `"model"` starts from the given model's.
        seed: of the weights drawn and of the locations sampled. One seed serves all images of a call.
        initializer_range: standard deviation of weights drawn; None is the model's own, with biases at zero. A number
            draws the biases too, as the release does.
        stop: label-free rule by which an image stops before `steps`. `"plateau"`: its loss has not fallen by the
            fraction `stop_threshold` within `stop_patience` steps. `"cosine"`: the cosine to its target has been at
            least `stop_threshold` for `stop_patience` steps. `"stable"`: its predicted class has been the same for
            `stop_patience` steps (`adapt` then takes `text_embeds`). None: never.
        stop_threshold, stop_patience: see `stop`.
        dtype: of the products, `"float32"` or `"bfloat16"`; weights, losses, optimiser and pooling stay float32.
        lr_decay_every: steps after which the learning rate is multiplied by `lr_decay`; None never.
        lr_decay: see `lr_decay_every`.
        accumulate_gradients: never zero the gradients while an image is fitted (release).
        carry_over: hand Adam's moments and the learning rate on from image to image (release). Images are then fitted
            one after the other, and a result depends on the images before it.
        num_copies: copies of the image in the batch of one step (release: 8). The mean loss of identical copies is the
            loss of one, so the copies are not computed.

    Raises:
        ValueError: for a value outside its range; says what was expected.
    """

    steps: int = 20
    learning_rate: float = 1e-4
    num_locations: int | None = None
    fit: str = "all"
    rank: int = 8
    alpha: float = 1.0
    start: str = "random"
    seed: int = 0
    initializer_range: float | None = None
    stop: str | None = None
    stop_threshold: float | None = None
    stop_patience: int = 5
    dtype: str = "float32"
    lr_decay_every: int | None = None
    lr_decay: float = 0.1
    accumulate_gradients: bool = False
    carry_over: bool = False
    num_copies: int = 1

    def __post_init__(self) -> None:
        for name, known in (("start", _STARTS), ("fit", FITS), ("dtype", tuple(_DTYPES)), ("stop", (None, *STOPS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, got {getattr(self, name)!r}")
        for name in ("steps", "num_locations", "rank", "stop_patience", "lr_decay_every", "num_copies"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("learning_rate", "alpha", "initializer_range", "lr_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive finite number, got {value}")
        if self.stop in ("plateau", "cosine"):
            if self.stop_threshold is None or not 0 < self.stop_threshold < 1:
                raise ValueError(
                    f"stop_threshold: expected a number between 0 and 1 for stop={self.stop!r}, "
                    f"got {self.stop_threshold}"
                )
        elif self.stop_threshold is not None:
            raise ValueError(f"stop_threshold: expected None for stop={self.stop!r}, got {self.stop_threshold}")
        if self.stop is not None and self.carry_over:
            raise ValueError("stop: expected None with carry_over, whose schedule counts whole fits")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TTTConfig":
        """`"paper"`: the paper's recipe. `"reference"`: what the release computes, quirks included. `"fast"`: the best
        point measured on the curve of quality against cost (docs/test_time_training.md).

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
    "fast": TTTConfig(steps=30, learning_rate=2e-4, num_locations=4, fit="low_rank", rank=8, alpha=5.0),
}


@dataclass(frozen=True)
class TTTStep:
    """What a callback sees of a group of images, before the update of a step.

    Args:
        step: from 0.
        images: `(B',)`, indices of the images that are still fitted, on the CPU.
        losses: `(B',)`.
        image_embeds: `(B', F)`, pooled over this step's locations.
        state_dict: the weights of the machine of an image that is still fitted, by the image's index.
    """

    step: int
    images: Tensor
    losses: Tensor
    image_embeds: Tensor
    state_dict: Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Adapted:
    """B adapted machines.

    Args:
        image_embeds: `(B, F)`, float32, after the last update, pooled over the locations of the last step; where a
            rule stopped the fit, as the rule saw it.
        losses: `(B, steps)`, float32, each before its update; NaN where the fit had stopped.
        steps: `(B,)`, updates taken.
        diverged: `(B,)`, true where a loss was not finite; that image's numbers mean nothing, the others' do.
    """

    image_embeds: Tensor
    losses: Tensor
    steps: Tensor
    diverged: Tensor
    _model: APMModel = field(repr=False)
    _states: list[Callable[[], dict[str, Tensor]]] | None = field(repr=False)
    _pixel_values: Tensor | None = field(repr=False)
    _trigger_column: Tensor | None = field(repr=False)

    def __getitem__(self, images: slice) -> "Adapted":
        """The machines of some of the images, e.g. `adapted[2:3]`."""
        return Adapted(
            self.image_embeds[images],
            self.losses[images],
            self.steps[images],
            self.diverged[images],
            self._model,
            None if self._states is None else self._states[images],
            None if self._pixel_values is None else self._pixel_values[images],
            None if self._trigger_column is None else self._trigger_column[images],
        )

    def query(self, coordinates: Tensor | None = None, *, chunk_size: int | None = None) -> APMModelOutput:
        """Ask every adapted machine about its own image, one after the other; the main head alone has adapted.

        Args:
            coordinates: `(L, 2)` or `(B, L, 2)`, (y, x) in [-1, 1]; None asks for the full grid.
            chunk_size: locations answered at a time.

        Returns:
            [`APMModelOutput`], B images.
        """
        num_images = len(self.losses)
        if coordinates is not None:
            coordinates = self._model._check_coordinates(coordinates, num_images)
        outputs = []
        for index in range(num_images):
            inputs = [None if x is None else x[index : index + 1] for x in (self._pixel_values, self._trigger_column)]
            where = coordinates if coordinates is None or len(coordinates) == 1 else coordinates[index : index + 1]
            with torch.no_grad():
                arguments = {"trigger_column": inputs[1], "chunk_size": chunk_size, "heads": (), "return_dict": True}
                outputs.append(functional_call(self._model, self.state_dict(index), (inputs[0], where), arguments))
        answers: dict[str, Any] = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        return APMModelOutput(**answers)

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """The weights fitted to image `index`, for `APMModel.load_state_dict`.

        Raises:
            ValueError: where `adapt` was told not to keep the machines.
        """
        if self._states is None:
            raise ValueError("state_dict, query: expected adapted machines that were kept, got keep_machines=False")
        return self._states[index]()


@torch.inference_mode(False)  # adapting takes gradients, wherever it is called from
@torch.enable_grad()
def adapt(
    model: PreTrainedModel,
    pixel_values: Tensor | None,
    targets: Tensor | TTTTargets,
    *,
    config: TTTConfig,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    trigger_column: Tensor | None = None,
    text_embeds: Tensor | None = None,
    callback: Callable[[TTTStep], None] | None = None,
    max_memory: int | None = None,
    keep_machines: bool = True,
) -> Adapted:
    """Fit one machine to each of B images, so that its pooled feature is the teacher's embedding of that image.

    An image's result depends on the image, its target, the configuration and its seed; not on the other images
    (`carry_over` excepted), nor on how many there are. On the CPU it is the same to the last bit where the machine's
    widths are multiples of 16, as the presets' are, and else to rounding.

    Args:
        model: an [`APMModel`] or a model that holds one: the architecture and, with
            `start="model"`, the weights to start from. Not changed.
        pixel_values: `(B, C, S, S)`; None where the machine takes its trigger column from the caller.
        targets: `(B, F)`, the teacher's image embeddings, as the teacher gives them, or [`TTTTargets`].
        config: see [`TTTConfig`].
        generator: supplies the seed, instead of `config.seed`.
        seeds: `(B,)`, a seed for each image, instead of `config.seed`.
        trigger_column: `(B, D)`, for `trigger_source="embedding"`.
        text_embeds: `(K, F)`, class embeddings, for `stop="stable"`.
        callback: called at every step of every group of images.
        max_memory: bytes that the fit may take at a time; images are fitted in as many groups as that needs, one at
            a time at least. None is half of what is free on the device.
        keep_machines: False keeps embeddings and losses alone, and frees each group's weights.

    Returns:
        [`Adapted`].

    Raises:
        ValueError: for shapes that do not fit, for non-finite inputs or targets of norm zero (naming the images), or
            more locations than the grid has.
    """
    machine = getattr(model, "apm", model)  # heads hold the machine under this name
    if not isinstance(machine, APMModel):
        raise ValueError(f"model: expected an APMModel or a model that holds one, got {type(model).__name__}")
    if not isinstance(targets, TTTTargets):
        if targets.ndim != 2 or len(targets) == 0:
            width = machine.config.feature_size
            raise ValueError(f"targets: expected shape (B, {width}) with B >= 1, got {tuple(targets.shape)}")
        targets = TTTTargets(image_embeds=targets)
    num_images, device = len(targets), machine.device
    own_seeds, seeds = seeds is not None, _seeds(num_images, config, generator, seeds)
    _check(machine, pixel_values, targets, config, trigger_column, text_embeds)
    # Copies, since what was made in inference mode cannot be differentiated through.
    inputs = [None if x is None else x.to(device, torch.float32, copy=True) for x in (pixel_values, trigger_column)]
    texts = None if text_embeds is None else text_embeds.to(device, torch.float32, copy=True)

    fit = _Fit(machine, config, targets, texts, callback, keep_machines, own_seeds)
    # The release hands the optimiser's state on from image to image, so it has to take them one by one.
    size = 1 if config.carry_over else _group_size(machine, config, targets, max_memory, distinct=own_seeds)
    groups = [slice(first, min(first + size, num_images)) for first in range(0, num_images, size)]
    results = [fit([None if x is None else x[rows] for x in inputs], rows, seeds[rows]) for rows in groups]
    embeds = torch.cat([result[0] for result in results])
    losses = torch.cat([result[1] for result in results])
    steps = torch.cat([result[2] for result in results])
    diverged = ~embeds.isfinite().all(dim=1) | losses.isinf().any(dim=1)
    diverged |= (losses.isnan() & (torch.arange(config.steps, device=device) < steps[:, None])).any(dim=1)
    if diverged.any():
        logger.warning(f"adapt: the fit diverged for images {_indices(diverged)}")
    states = [state for result in results for state in result[3]] if keep_machines else None
    return Adapted(embeds, losses, steps, diverged, machine, states, *inputs)


class _Fit:
    """Fits groups of images. Adam's state outlives a group only where the configuration carries it over."""

    def __init__(
        self,
        model: APMModel,
        config: TTTConfig,
        targets: TTTTargets,
        text_embeds: Tensor | None,
        callback: Callable[[TTTStep], None] | None,
        keep_machines: bool,
        own_seeds: bool,
    ):
        self.model, self.config, self.targets, self.callback = model, config, targets, callback
        self.text_embeds = None if text_embeds is None else torch.nn.functional.normalize(text_embeds, dim=-1)
        self.keep_machines, self.own_seeds = keep_machines, own_seeds
        self.learning = learning_modules(model.config, config.fit, targets.tensors())
        self.optimizer: torch.optim.Optimizer | None = None

    def __call__(
        self, inputs: list[Tensor | None], rows: slice, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, list[Callable[[], dict[str, Tensor]]]]:
        """Embeddings `(B, F)`, losses `(B, steps)`, steps taken `(B,)` and what gives each machine's weights."""
        config, num_images = self.config, len(seeds)
        grid = self.targets.grid
        sampler = _Sampler(seeds, _num_asked(self.model, self.targets), config.num_locations)
        own = self.own_seeds and config.start == "random"
        start = _initial_weights(self.model, config, sampler.generators, seeds, own)
        device = next(iter(start.values())).device
        machines = Machines(
            self.model.config, start, self.learning, inputs[0], inputs[1], num_images,
            grid=grid, rank=config.rank, alpha=config.alpha, own=own,
            accumulate=config.accumulate_gradients, dtype=_DTYPES[config.dtype],
        )  # fmt: skip
        std = self.model.config.feature_std
        scale = None if std is None else torch.tensor(std, dtype=torch.float32, device=device)
        targets = GridTargets(self.targets, device, rows, scale=scale)
        self._set_optimizer(machines)
        stopper = self._stopper(num_images)
        fitted = torch.arange(num_images)  # the images still fitted; the stacked weights are theirs
        losses = torch.full((num_images, config.steps), torch.nan, device=device)
        taken = torch.full((num_images,), config.steps, device=device)
        embeds = torch.empty(num_images, self.model.config.feature_size, device=device)
        leaves: dict[int, dict[str, Tensor]] = {}
        ahead: list[tuple[Tensor | None, Any]] = []
        where, still = None, None
        for step in range(config.steps):
            if not ahead:
                places = [sampler(device, fitted) for _ in range(min(_PREPARED_STEPS, config.steps - step))]
                ahead = list(zip(places, machines.prepare(places), strict=True))
            where, still = ahead.pop(0)
            answers = machines(where, still, everywhere=self.targets.everywhere)
            loss, pooled = targets.loss(answers, where), answers.pooled
            losses[fitted, step] = loss.detach()
            if self.callback is not None:
                self._call_back(step, rows, fitted, loss, pooled, machines, start)
            done = None if stopper is None else stopper(loss.detach(), pooled.detach(), targets)
            if done is not None and done.any():
                embeds[fitted[done]], taken[fitted[done]] = pooled.detach()[done], step
                leaves |= _leaves(machines, fitted, done, copy=True)
                if done.all():
                    fitted = fitted[:0]
                    break
            # Summed over images: each image's weights then get exactly its own gradient.
            loss.sum().backward()
            self._step(machines)
            if done is not None and done.any():
                kept, num = (~done).nonzero()[:, 0].to(device), len(fitted)
                fitted = fitted[~done]
                self._keep(kept, machines)
                targets.keep(kept)
                stopper.keep(kept)
                selected: dict[int, Any] = {}  # entries of the whole grid are one and the same
                (where, still), *ahead = [_select(entry, kept, num, selected) for entry in [(where, still), *ahead]]
        if len(fitted):
            with torch.no_grad():
                embeds[fitted] = machines(where, still, everywhere=self.targets.everywhere).pooled
            leaves |= _leaves(machines, fitted, torch.ones(len(fitted), dtype=torch.bool))
        machines.release()
        if not self.keep_machines:
            return embeds, losses, taken, []
        return (
            embeds,
            losses,
            taken,
            [self._state(machines, start, leaves[index], index) for index in range(num_images)],
        )

    @staticmethod
    def _state(
        machines: Machines, start: dict[str, Tensor], leaves: dict[str, Tensor], index: int
    ) -> Callable[[], dict[str, Tensor]]:
        first = {name: weight[index if machines.shared.own else 0] for name, weight in start.items()}
        return partial(machines.state_dict, first, leaves)

    def _stopper(self, num_images: int) -> Any:
        config, texts = self.config, self.text_embeds
        if config.stop is None:
            return None
        classify = None if texts is None else (lambda embeds: (embeds @ texts.T).argmax(dim=-1))
        return Stopper(config.stop, config.stop_threshold or 0.0, config.stop_patience, num_images, classify)

    def _set_optimizer(self, machines: Machines) -> None:
        leaves = list(machines.leaves().values())
        if self.optimizer is not None and self.config.carry_over:
            self._hand_over(leaves, None)
            return
        self.optimizer = torch.optim.Adam(leaves, lr=self.config.learning_rate, fused=True)
        never = 2**31
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            self.optimizer, self.config.lr_decay_every or never, self.config.lr_decay
        )

    def _hand_over(self, leaves: list[Tensor], kept: Tensor | None) -> None:
        """Adam's moments go on with other leaves, of the machines `kept`."""
        assert self.optimizer is not None
        (group,) = self.optimizer.param_groups
        for old, new in zip(group["params"], leaves, strict=True):
            state = self.optimizer.state.pop(old, {})
            if kept is not None:
                state = {name: value[kept] if value.ndim else value for name, value in state.items()}
            self.optimizer.state[new] = state
        group["params"] = leaves

    def _keep(self, kept: Tensor, machines: Machines) -> None:
        machines.keep(kept)
        self._hand_over(list(machines.leaves().values()), kept)

    def _step(self, machines: Machines) -> None:
        assert self.optimizer is not None
        self.optimizer.step()
        self.scheduler.step()
        if not self.config.accumulate_gradients:
            for leaf in machines.leaves().values():
                if leaf.requires_grad:  # the gradients of the others are overwritten
                    leaf.grad = None

    def _call_back(
        self,
        step: int,
        rows: slice,
        fitted: Tensor,
        loss: Tensor,
        pooled: Tensor,
        machines: Machines,
        start: dict[str, Tensor],
    ) -> None:
        def state_dict(image: int) -> dict[str, Tensor]:
            index = image - rows.start
            position = (fitted == index).nonzero()[0, 0]
            one = {name: leaf.detach()[position] for name, leaf in machines.leaves().items()}
            return self._state(machines, start, one, index)()

        assert self.callback is not None
        self.callback(TTTStep(step, fitted + rows.start, loss.detach(), pooled.detach(), state_dict))


def _leaves(machines: Machines, fitted: Tensor, chosen: Tensor, *, copy: bool = False) -> dict[int, dict[str, Tensor]]:
    """What the chosen machines `(B',)` have learnt, by image."""
    stacked = {name: leaf.detach() for name, leaf in machines.leaves().items()}
    taken = {}
    for position in chosen.nonzero()[:, 0]:
        one = {name: leaf[position] for name, leaf in stacked.items()}
        taken[int(fitted[position])] = {name: leaf.clone() for name, leaf in one.items()} if copy else one
    return taken


def _select(entry: tuple[Tensor | None, Any], kept: Tensor, num: int, selected: dict[int, Any]) -> Any:
    """The machines `kept` of `num`: of locations and of what was prepared for them."""
    where, still = entry
    where = where[kept] if where is not None and where.ndim == 2 else where
    if still is not None:
        if id(still) not in selected:
            # The old one stays referenced, so that its id stays its own.
            selected[id(still)] = still, tuple(part[kept] if len(part) == num else part for part in still)
        still = selected[id(still)][1]
    return where, still


class _Sampler:
    """A fresh random subset of the grid's cells at every call, from each image's own seed."""

    def __init__(self, seeds: Sequence[int], num_all: int, num_sampled: int | None):
        # Drawn on the CPU, so that a seed means the same on every device. Images of one seed share one stream.
        unique = dict.fromkeys(seeds)
        self.generators = {seed: torch.Generator().manual_seed(seed) for seed in unique}
        self.seeds, self.num_all, self.num_sampled = seeds, num_all, num_sampled

    def __call__(self, device: torch.device, images: Tensor) -> Tensor | None:
        """`(n,)` where all images share a seed, else `(B', n)` for the images asked; None for the full grid."""
        if self.num_sampled is None:
            return None
        drawn = {
            seed: torch.randperm(self.num_all, generator=generator)[: self.num_sampled]
            for seed, generator in self.generators.items()
        }
        if len(drawn) == 1:
            return next(iter(drawn.values())).to(device)
        return torch.stack([drawn[self.seeds[index]] for index in images.tolist()]).to(device)


def _initial_weights(
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


def _group_size(
    model: APMModel, config: TTTConfig, targets: TTTTargets, max_memory: int | None, *, distinct: bool
) -> int:
    """As many images as fit the budget, one at least."""
    if max_memory is None:
        on_gpu = model.device.type == "cuda"
        free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
        max_memory = free // 2
    elif max_memory < 1:
        raise ValueError(f"max_memory: expected a positive number of bytes, got {max_memory}")
    return max(1, max_memory // bytes_per_image(model, config, targets, distinct=distinct))


def bytes_per_image(model: APMModel, config: TTTConfig, targets: TTTTargets, *, distinct: bool) -> int:
    """An estimate of what fitting one image takes; `distinct` where every image has a seed, so weights, of its own."""
    architecture = model.config
    learning = learning_modules(architecture, config.fit, targets.tensors())
    whole = sum(parameter.numel() for parameter in model.parameters())
    learnt = 0
    for name, parameter in model.named_parameters():
        how = learning.get(name.rpartition(".")[0])
        blocks = how == "blocks" and parameter.ndim > 1
        learnt += (config.rank * len(parameter) if blocks else parameter.numel()) if how else 0
    num_cells = _num_asked(model, targets)
    num_asked = config.num_locations or num_cells
    ahead = _PREPARED_STEPS if config.num_locations else 1
    widths = [*architecture.hidden_sizes, architecture.feature_size]
    grids = architecture.num_channels * architecture.image_size**2 * 2
    grids += num_cells * (2 * architecture.local_patch_width + architecture.feature_size * (1 + targets.everywhere))
    # Weights, gradients and Adam's two moments; activations, their gradients and what Linear and ReLU save of them.
    elements = 4 * learnt + whole * (distinct and config.start == "random")
    elements += num_asked * (4 * sum(widths) + ahead * max(widths)) + grids
    return 4 * elements


def _num_asked(model: APMModel, targets: TTTTargets) -> int:
    """Locations that are fitted to: the cells of the target's grid, else of the machine's."""
    return model.config.num_locations if targets.grid is None else targets.grid[0] * targets.grid[1]


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
    model: APMModel,
    pixel_values: Tensor | None,
    targets: TTTTargets,
    config: TTTConfig,
    trigger_column: Tensor | None,
    text_embeds: Tensor | None,
) -> None:
    num_locations, feature_size = _num_asked(model, targets), model.config.feature_size
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
            raise ValueError(f"{label}: expected finite numbers, got NaN or infinity in images {_indices(bad)}")
    if targets.image_embeds is not None:
        empty = (targets.image_embeds == 0).all(dim=-1).view(num_images, -1).any(dim=1)
        if empty.any():
            raise ValueError(f"targets: expected embeddings with a direction, got zeros in images {_indices(empty)}")


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


def _indices(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()
