"""Test-time training: fit an APM to the teacher's embedding of one image, B images at once.

Every image has its own weights and its own optimiser state; they are stacked along a first dimension and stepped in
one batched computation (Adam is elementwise, so the stacked step is each image's own step). The model given is never
changed. Source: arXiv:2410.20535, section 4; the published recipes are the presets.

Legend: B images, L locations, D trigger width, F feature width, K classes, S image side.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling_apm import APMModel
from .adapted import Adapted, TTTStep
from .checks import check_arguments, indices_of, seeds_of
from .layers import learning_modules
from .machines import Machines
from .memory import PREPARED_STEPS, group_size, num_asked
from .settings import DTYPES, TTTConfig
from .start_weights import initial_weights
from .targets import GridTargets, Stopper, TTTTargets

logger = logging.get_logger(__name__)


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
    own_seeds, seeds = seeds is not None, seeds_of(num_images, config, generator, seeds)
    check_arguments(machine, pixel_values, targets, config, trigger_column, text_embeds)
    # Copies, since what was made in inference mode cannot be differentiated through.
    inputs = [None if x is None else x.to(device, torch.float32, copy=True) for x in (pixel_values, trigger_column)]
    texts = None if text_embeds is None else text_embeds.to(device, torch.float32, copy=True)

    fit = _Fit(machine, config, targets, texts, callback, keep_machines, own_seeds)
    # The release hands the optimiser's state on from image to image, so it has to take them one by one.
    size = 1 if config.carry_over else group_size(machine, config, targets, max_memory, distinct=own_seeds)
    groups = [slice(first, min(first + size, num_images)) for first in range(0, num_images, size)]
    results = [fit([None if x is None else x[rows] for x in inputs], rows, seeds[rows]) for rows in groups]
    embeds = torch.cat([result[0] for result in results])
    losses = torch.cat([result[1] for result in results])
    steps = torch.cat([result[2] for result in results])
    diverged = ~embeds.isfinite().all(dim=1) | losses.isinf().any(dim=1)
    diverged |= (losses.isnan() & (torch.arange(config.steps, device=device) < steps[:, None])).any(dim=1)
    if diverged.any():
        logger.warning(f"adapt: the fit diverged for images {indices_of(diverged)}")
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
        sampler = _Sampler(seeds, num_asked(self.model, self.targets), config.num_locations)
        own = self.own_seeds and config.start == "random"
        start = initial_weights(self.model, config, sampler.generators, seeds, own)
        device = next(iter(start.values())).device
        machines = Machines(
            self.model.config, start, self.learning, inputs[0], inputs[1], num_images,
            grid=grid, rank=config.rank, alpha=config.alpha, own=own,
            accumulate=config.accumulate_gradients, dtype=DTYPES[config.dtype],
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
                places = [sampler(device, fitted) for _ in range(min(PREPARED_STEPS, config.steps - step))]
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
