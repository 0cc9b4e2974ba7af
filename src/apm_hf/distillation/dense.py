"""Distil a decoder of a frozen teacher's tokens: its features at any coordinate, sharper than its own grid.

The student reads a photo at twice the teacher's usual side, and the teacher's tokens of the same photo at half that.
It learns what the teacher outputs for the photo at twice the side, in windows that are moved, so that coordinates are
continuous. What it is compared with is always there: interpolation of the same tokens, and a ridge regression from the
same inputs to the same targets.

Source: the decoder is ours; targets at a higher resolution as in FeatUp (arXiv:2403.10516).

Legend: N photos, V windows of a photo, B photos of a batch, L locations, F feature width, S the teacher's side in
pixels, (rows, cols) the teacher's grid at S.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ..configuration_apm import APMConfig
from ..image_processing_apm import APMImageProcessor
from ..modeling_apm import FINER, APMModel
from ..position_encoding import grid_coordinates
from ..runs.processes import on_cpu, process_state
from ..runs.progress import no_loading_bars
from ..runs.run import Run
from ..teachers import Teacher
from ..teachers.dense_grids import moved, tokens_at_half
from ..teachers.licenses import inherit, record_weights
from ..teachers.matching import dense_image_processor
from .resuming import MADE, make_room
from .rivals import CHUNK, AttentionUpsampler, Ridge, Upsampler, averages, bilinear
from .validation import verdict

logger = logging.get_logger(__name__)

MAX_SHIFT = 16  # pixels of that photo by which windows are moved
PHOTOS = 8  # that the teacher reads at a time


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Configure the distillation of a dense decoder.

    Args:
        output_dir: folder of the model and its figures.
        max_steps: optimiser steps.
        batch_size: photos per step, of each process.
        num_locations: locations per photo and step.
        learning_rate: peak learning rate of AdamW; 5 % warm-up, cosine decay.
        weight_decay: of AdamW.
        num_windows: V, windows of each photo whose targets are cached.
        mixed_precision: `"bf16"`, `"fp16"` or `"no"`; None is bf16 on a GPU, else no.
        overwrite: replace an earlier model in `output_dir`.
        seed: random seed of weights, windows, photos and locations.

    Raises:
        ValueError: for a value outside its range.
    """

    output_dir: str
    max_steps: int = 1500
    batch_size: int = 16
    num_locations: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    num_windows: int = 1
    mixed_precision: str | None = None
    overwrite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir: expected a folder, got an empty name")
        for name in ("max_steps", "batch_size", "num_locations", "num_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf") or not 0 <= self.weight_decay < float("inf"):
            raise ValueError(
                f"learning_rate, weight_decay: expected a positive number and 0 or more, got {self.learning_rate}, "
                f"{self.weight_decay}"
            )


@dataclass(frozen=True, eq=False)
class DensePairs:
    """Hold inputs and targets of N photos, in memory or in files that are mapped into it.

    Args:
        image_processor: the student's.
        pixels: `(N, 3, 2S, 2S)` uint8, whole photos.
        tokens: `(N, rows, cols, F)` float16, the teacher's features at its usual side.
        targets: `(N, V, 2 rows, 2 cols, F)` float16, its features of moved windows at twice the side.
        shifts: `(N, V, 2)`, (down, right), in units of coordinates, by which targets lie beside the plain grid.
    """

    image_processor: APMImageProcessor
    pixels: Tensor
    tokens: Tensor
    targets: Tensor
    shifts: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    @classmethod
    def build(
        cls,
        photos: Sequence[Any],
        teacher: Teacher,
        *,
        num_windows: int = 1,
        shifted: bool = True,
        seed: int = 0,
        folder: str | os.PathLike[str] | None = None,
        description: str | None = None,
    ) -> "DensePairs":
        """Run the teacher on every photo, once at its usual side and once per window at twice the side.

        Args:
            photos: N 8-bit RGB pictures, or functions that return one.
            shifted: whether windows are moved; else V is 1, on the plain grid.
            folder: of files that hold the tensors, where memory does not: about 1.2 MB a photo for 192 features.
            description: of the progress bar; None shows none.

        Raises:
            ValueError: for no photos, or a teacher that cannot take twice its side.
        """
        if not len(photos):
            raise ValueError("photos: expected at least one, got none")
        side, generator = FINER * teacher.image_size, torch.Generator().manual_seed(seed)
        windows, image_processor = num_windows if shifted else 1, dense_image_processor(teacher)
        shifts = torch.zeros(len(photos), windows, 2)
        if shifted:
            shifts = (2 * torch.rand(len(photos), windows, 2, generator=generator) - 1) * MAX_SHIFT  # in pixels
        stored: dict[str, Tensor] = {}
        with tqdm(total=len(photos), desc=description, disable=description is None) as progress:
            for start in range(0, len(photos), PHOTOS):
                batch = [photos[row] for row in range(start, min(start + PHOTOS, len(photos)))]
                pictures = [photo() if callable(photo) else photo for photo in batch]
                pixels = image_processor(pictures, return_tensors="pt", do_rescale=False, do_normalize=False)
                pixels = pixels["pixel_values"].round().clamp(0, 255).to(torch.uint8)
                plain = normalised(pixels, image_processor)
                targets = [
                    _features(
                        teacher, torch.cat([moved(one[None], *shift) for one, shift in zip(plain, row, strict=True)])
                    )
                    for row in shifts[start : start + len(batch)].transpose(0, 1).tolist()
                ]
                values = {
                    "pixels": pixels,
                    "tokens": tokens_at_half(teacher, plain).half().cpu(),
                    "targets": torch.stack(targets, dim=1),
                }
                for name, value in values.items():
                    if name not in stored:
                        stored[name] = _storage(folder, name, (len(photos), *value.shape[1:]), value.dtype)
                    stored[name][start : start + len(batch)] = value
                progress.update(len(batch))
        return cls(image_processor, **stored, shifts=shifts * 2 / side)

    def pixel_values(self, photos: Tensor) -> Tensor:
        """Return the student's inputs of photos by number: `(B, 3, 2S, 2S)`, normalised."""
        return normalised(self.pixels[photos], self.image_processor)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation `(F,)` of the tokens, over photos and places."""
        count, sums = 0, torch.zeros(2, self.tokens.shape[-1], dtype=torch.float64)
        for part in self.tokens.split(CHUNK):
            flat = part.flatten(0, 2).double()
            sums += torch.stack([flat.sum(dim=0), flat.square().sum(dim=0)])
            count += len(flat)
        mean, square = sums / count
        return mean.float(), (square - mean.square()).clamp(min=1e-12).sqrt().float()


def _storage(folder: str | os.PathLike[str] | None, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor, in a file of this name if there is a folder."""
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"{name}.bin"
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def _features(teacher: Teacher, pixel_values: Tensor) -> Tensor:
    features = teacher.encode_images(pixel_values=pixel_values).features
    assert features is not None
    return features.half().cpu()


@dataclass(frozen=True)
class DenseResult:
    """A distilled decoder, and how well it does on held-out photos.

    Args:
        student: on the CPU, in evaluation mode.
        metrics: R² of held-out photos after removing the mean of each position, of the student as `feature_r2` and of
            what it is compared with as `mean_r2`, `position_r2`, `ridge_r2` and `bilinear_r2`.
        output_dir: folder of the model.
    """

    student: APMModel
    metrics: dict[str, float]
    output_dir: Path


def distill_dense(
    teacher: Teacher,
    train: DensePairs,
    validation: DensePairs,
    config: DenseConfig,
    *,
    dataset: str | None = None,
    **architecture: Any,
) -> DenseResult:
    """Fit a dense decoder to its teacher, compare it with interpolation and ridge regression, and save it.

    Args:
        train: photos to learn from.
        validation: other photos, with plain windows (`shifted=False`).
        dataset: public name of the photos, for the card's origins.
        **architecture: fields of [`APMConfig`] instead of those of the preset `dense`.

    Raises:
        ValueError: for a folder that holds another model, without `config.overwrite`, fewer than two photos to
            measure on, or a loss that is not finite.
    """
    if len(validation) < 2:
        raise ValueError(f"validation: expected two photos or more, to measure on, got {len(validation)}")
    run = Run(config.output_dir, process_state())
    with run.locked():
        if run.state.is_main_process:
            make_room(run, overwrite=config.overwrite)
        mean, std = train.statistics()
        student = _fit(teacher, train, mean, std, config, architecture)
        student.config.validate_architecture()
        keep_teacher(student, teacher)
        inherit(student.config, [teacher], dataset=dataset)
        if not student.folds:
            record_weights(student.config, teacher)
        ridge = Ridge.fit(train, mean, std)
        metrics = evaluate_dense(student, ridge, validation, averages(train))
        logger.info("held-out R² after position means: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
        logger.info(verdict(metrics))
        if run.state.is_main_process:
            with run.finished_files(last="config.json") as folder, no_loading_bars():
                student.save_pretrained(folder)
                train.image_processor.save_pretrained(folder)
                ridge.save(folder)
                (folder / "metrics.json").write_text(
                    json.dumps([{"step": config.max_steps, **metrics}], indent=2) + "\n"
                )
            run.forget_previous(MADE)
        run.state.wait_for_everyone()
    return DenseResult(student, metrics, run.folder)


def keep_teacher(student: APMModel, teacher: Teacher) -> None:
    """Put the teacher inside the student, so that it works from pixels alone, where its tower alone is enough.

    A teacher from the Hub is named in the configuration, another one's weights are saved with the student. Where a
    teacher's features are more than its tower's last hidden state, as a dual encoder's, it stays beside the student.
    """
    tower = teacher.tower
    if tower is None:
        return
    side = student.config.image_size
    pixels = torch.rand(1, student.config.num_channels, side, side, generator=torch.Generator().manual_seed(0))
    expected = tokens_at_half(teacher, pixels).cpu()
    trial = copy.deepcopy(student)
    try:
        trial.set_teacher(copy.deepcopy(tower).float().cpu())
        fits = torch.allclose(trial.fold(pixels), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    except (TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        logger.info(f"the teacher stays beside the student: the features of {teacher.name} are not its tower's alone")
        return
    is_local = os.path.exists(teacher.name)
    revision = getattr(tower.config, "_commit_hash", None)
    student.set_teacher(copy.deepcopy(tower).cpu(), name=None if is_local else teacher.name, revision=revision)


def normalised(pixels: Tensor, processor: APMImageProcessor) -> Tensor:
    """Return `pixel_values` of `(B, 3, H, W)` uint8, as the image processor makes them."""
    values = pixels.float()
    if processor.do_rescale:
        values.mul_(processor.rescale_factor)  # in place: images are large
    if processor.do_normalize:
        mean, std = (
            torch.tensor(numbers, device=pixels.device)[:, None, None]
            for numbers in (processor.image_mean, processor.image_std)
        )
        values.sub_(mean).div_(std)
    return values


def _fit(
    teacher: Teacher, train: DensePairs, mean: Tensor, std: Tensor, config: DenseConfig, architecture: dict[str, Any]
) -> APMModel:
    torch.manual_seed(config.seed)
    fields = {"image_size": FINER * teacher.image_size, "feature_size": teacher.feature_size, **architecture}
    student = APMModel(APMConfig.preset("dense", **fields))
    student.set_feature_statistics(mean, std)

    def call(model: Any, tokens: Tensor, coordinates: Tensor, pixel_values: Tensor) -> Tensor:
        return model(pixel_values, coordinates, trigger_column=tokens).last_hidden_state

    return cast(APMModel, _minimise(student, call, train, mean, std, config, description="distil"))


def fit_attention(train: DensePairs, config: DenseConfig) -> AttentionUpsampler:
    """Fit a rival of the student's with the same photos, steps and loss."""
    torch.manual_seed(config.seed)
    rival, (mean, std) = AttentionUpsampler(train.tokens.shape[-1]), train.statistics()
    rival.mean.copy_(mean)
    rival.std.copy_(std)

    def call(model: Any, *inputs: Tensor) -> Tensor:
        return model(*inputs)

    return cast(AttentionUpsampler, _minimise(rival, call, train, mean, std, config, description="attention"))


def _minimise(
    module: nn.Module,
    call: Callable[..., Tensor],
    train: DensePairs,
    mean: Tensor,
    std: Tensor,
    config: DenseConfig,
    *,
    description: str,
) -> nn.Module:
    """Fit a module to the targets at random places of random photos.

    Args:
        call: `(module, tokens, coordinates, pixel_values)` -> `(B, L, F)`.
        mean, std: in units of which errors are measured.
    """
    precision = config.mixed_precision or ("no" if on_cpu() else "bf16")
    accelerator = Accelerator(cpu=on_cpu(), mixed_precision=precision)
    decay = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.max_steps // 20, config.max_steps)
    model, optimizer = accelerator.prepare(module, optimizer)
    device = accelerator.device
    rows, cols = train.targets.shape[2:4]
    centres, mean, std = grid_coordinates(rows, cols), mean.to(device), std.to(device)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + accelerator.process_index)
    model.train()
    progress = tqdm(range(config.max_steps), desc=description, disable=not accelerator.is_local_main_process)
    for step in progress:
        photos = torch.randint(len(train), (config.batch_size,), generator=generator)
        windows = torch.randint(train.targets.shape[1], (config.batch_size,), generator=generator)
        places = torch.randint(rows * cols, (config.batch_size, config.num_locations), generator=generator)
        targets = train.targets[photos, windows].flatten(1, 2).take_along_dim(places[..., None], dim=1)  # (B, L, F)
        coordinates = centres[places] + train.shifts[photos, windows][:, None]  # (B, L, 2)
        pixel_values = normalised(train.pixels[photos].to(device), train.image_processor)
        with accelerator.autocast():
            outputs = call(model, train.tokens[photos].to(device, torch.float32), coordinates.to(device), pixel_values)
        features = (outputs.float() - mean) / std
        wanted = (targets.to(device, torch.float32) - mean) / std
        cosine = F.cosine_similarity(features, wanted, dim=-1).mean()
        loss = F.smooth_l1_loss(features, wanted) + 1 - cosine
        if not torch.isfinite(loss):
            raise ValueError(f"step {step}: the loss is {loss.item()}; lower learning_rate")
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix({"loss": f"{loss.item():.4f}"}, refresh=False)
    accelerator.wait_for_everyone()
    return accelerator.unwrap_model(model).cpu().float().eval()


def as_upsampler(student: APMModel) -> Upsampler:
    """Return a function that calls the student as its rivals are called."""

    def call(tokens: Tensor, coordinates: Tensor, pixel_values: Tensor) -> Tensor:
        coordinates = coordinates.expand(len(tokens), -1, -1)
        return student(pixel_values, coordinates, trigger_column=tokens, return_dict=True).last_hidden_state

    return call


def evaluate_dense(
    student: APMModel, ridge: Ridge, validation: DensePairs, rivals: Mapping[str, Upsampler] | None = None
) -> dict[str, float]:
    """Return R² after position means, of held-out photos: of the student, interpolation, ridge regression and others.

    Args:
        ridge: fitted to the photos that the student learnt from.
        validation: with plain windows.
        rivals: more of them, by name.

    Returns:
        `feature_r2` of the student, and `NAME_r2` of the others.
    """
    methods: dict[str, Upsampler] = {
        "feature": as_upsampler(student),
        **(rivals or {}),
        "ridge": ridge,
        "bilinear": bilinear,
    }
    return {f"{name}_r2": _r2(validation, method, ridge.std) for name, method in methods.items()}


@torch.inference_mode()
def _r2(pairs: DensePairs, method: Upsampler, std: Tensor) -> float:
    """Share of the targets' variance around the mean of each position that is explained, in standardised units."""
    rows, cols = pairs.targets.shape[2:4]
    centres = grid_coordinates(rows, cols)[None]
    centre = torch.stack([part[:, 0].float().sum(dim=0) for part in pairs.targets.split(CHUNK)]).sum(dim=0) / len(
        pairs
    )
    error = total = 0.0
    for numbers in torch.arange(len(pairs)).split(CHUNK):
        wanted = pairs.targets[numbers, 0].float()
        found = method(pairs.tokens[numbers].float(), centres, pairs.pixel_values(numbers)).unflatten(1, (rows, cols))
        error += float((((found - wanted) / std) ** 2).sum())
        total += float((((wanted - centre) / std) ** 2).sum())
    return 1 - error / total
