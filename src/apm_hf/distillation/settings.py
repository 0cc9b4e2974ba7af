"""Define the settings of a distillation, and its result."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..configuration_apm import PRESETS as ARCHITECTURES
from ..modeling_apm import APMModel
from .feature_statistics import KINDS
from .losses import DISTANCES, LossWeights

# Steps by default: docs/students.md shows what they bring.
PASSES, FEWEST_STEPS, MOST_STEPS = 32, 250, 10_000
# What students of a preset learn best with, where that is not the paper's recipe, which are the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "student": {
        "batch_size": 32,
        "learning_rate": 2e-3,
        "warmup_steps": 50,
        "feature_loss": "smooth_l1_cosine",
        "rgb_weight": 0.0,
        "statistics_images": 512,
    }
}


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Configure a distillation run; the names are also the options of `apm distill`.

    Raises:
        ValueError: for a value outside its range; says what was expected.
    """

    output_dir: str = field(metadata={"help": "output folder; for the model, checkpoints, logs and pictures"})
    max_steps: int | None = field(
        default=None,
        metadata={
            "help": f"optimiser steps; by default as many as {PASSES} passes over the images take, at least "
            f"{FEWEST_STEPS} and at most {MOST_STEPS}; a stream needs a number"
        },
    )
    batch_size: int = field(default=64, metadata={"help": "images per batch; of each process, per forward pass"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "forward passes per optimiser step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate of Adam"})
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up, before the cosine decay"})
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "largest gradient norm; longer gradients are clipped, 0 clips none"}
    )
    num_locations: int | None = field(
        default=None, metadata={"help": "random locations trained on per step; all of them by default"}
    )
    feature_loss: str = field(
        default="mse", metadata={"help": "loss of features: mse, as in the paper, or smooth_l1_cosine"}
    )
    grid_weight: float = field(default=1.0, metadata={"help": "weight of the loss on the teacher's patch features"})
    cls_weight: float = field(default=1.0, metadata={"help": "weight of the loss on the teacher's image embedding"})
    rgb_weight: float = field(default=1.0, metadata={"help": "weight of the loss on the image's colours"})
    level_layers: list[int] | None = field(
        default=None, metadata={"help": "intermediate teacher layers, low to high, that the student predicts too"}
    )
    level_weight: float = field(default=1.0, metadata={"help": "weight of the loss on levels"})
    jitter: bool = field(
        default=False, metadata={"help": "augment: shift the teacher's grid by a random part of a patch at each step"}
    )
    statistics_images: int = field(
        default=0,
        metadata={
            "help": "images for measuring the teachers' feature statistics before the first step; 0 measures none"
        },
    )
    statistics: str = field(
        default="channel", metadata={"help": "standardise per channel, or by one scalar, which keeps cosines"}
    )
    teacher_batch_size: int | None = field(
        default=None, metadata={"help": "images per forward pass of the teachers; a whole batch by default"}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; by default bf16 where a GPU supports it, else no"}
    )
    torch_compile: str | None = field(
        default=None,
        metadata={"help": "backend of torch.compile for the student, e.g. inductor; by default what Accelerate says"},
    )
    logging_steps: int = field(default=10, metadata={"help": "steps between reports of losses and speed"})
    peak_tflops: float | None = field(
        default=None, metadata={"help": "peak TFLOP/s of one device, for model FLOPs utilisation, where it is unknown"}
    )
    validation_steps: int = field(
        default=200, metadata={"help": "steps between validations; there is one before and after training, too"}
    )
    checkpoint_steps: int = field(
        default=500, metadata={"help": "steps between checkpoints; 0 saves one only when the run is stopped"}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "number of checkpoints that stay on disk"})
    resume: bool = field(default=False, metadata={"help": "resume an interrupted run in output_dir"})
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "replace an earlier run in output_dir, which is deleted once this one has saved a checkpoint"
        },
    )
    max_unreadable_images: int = field(
        default=0, metadata={"help": "unreadable images to skip and list before stopping with an error"}
    )
    num_workers: int = field(default=0, metadata={"help": "processes that load images, for each training process"})
    num_pictures: int = field(default=4, metadata={"help": "images drawn at each validation"})
    report_to: str = field(
        default="tensorboard",
        metadata={"help": "experiment tracker: tensorboard, wandb and others of Accelerate's, or none"},
    )
    seed: int = field(default=0, metadata={"help": "random seed; of weights, images and locations"})

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir: expected a folder, got an empty name")
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected one of them, got both")
        for name in (
            "batch_size", "gradient_accumulation_steps", "validation_steps", "keep_checkpoints", "logging_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in (
            "warmup_steps", "checkpoint_steps", "max_grad_norm", "num_workers", "num_pictures", "statistics_images",
            "max_unreadable_images",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.statistics not in KINDS:
            raise ValueError(f"statistics: expected one of {list(KINDS)}, got {self.statistics!r}")
        if self.feature_loss not in DISTANCES:
            raise ValueError(f"feature_loss: expected one of {list(DISTANCES)}, got {self.feature_loss!r}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        for name in ("max_steps", "num_locations", "teacher_batch_size", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number or None, got {value}")
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision: expected no, bf16 or fp16, got {self.mixed_precision!r}")
        self.loss_weights  # noqa: B018 - validates them

    @classmethod
    def preset(cls, name: str, **settings: Any) -> "DistillationConfig":
        """Return the settings for students of a preset of [`APMConfig`].

        Args:
            settings: that replace those of the preset, and those that have no default.

        Raises:
            ValueError: for a name that is no preset, or a value outside its range.
        """
        if name not in ARCHITECTURES:
            raise ValueError(f"preset: expected one of {sorted(ARCHITECTURES)}, got {name!r}")
        return cls(**{**PRESETS.get(name, {}), **settings})

    def steps_for(self, num_images: int | None, num_processes: int = 1) -> int:
        """Return `max_steps`, or the default for this many images.

        Args:
            num_images: to train on; None for a stream, whose length is not known.

        Raises:
            ValueError: for a stream without `max_steps`.
        """
        if self.max_steps is not None:
            return self.max_steps
        if num_images is None:
            raise ValueError("max_steps: expected a number for a stream, whose length is not known, got none")
        images_a_step = self.batch_size * self.gradient_accumulation_steps * num_processes
        return min(max(FEWEST_STEPS, math.ceil(PASSES * num_images / images_a_step)), MOST_STEPS)

    @property
    def loss_weights(self) -> LossWeights:
        """The weights of the losses."""
        return LossWeights(self.grid_weight, self.cls_weight, self.rgb_weight, self.level_weight)


@dataclass(frozen=True)
class DistillationResult:
    """Hold the result of a distillation.

    Args:
        student: the trained student, on the CPU.
        metrics: of every validation, in order: `step`, R² after position means of the student as `feature_r2` and of
            its controls as `mean_r2`, `position_r2` and `ridge_r2`, `feature_cosine` and `mean_cosine` (of a constant,
            the mean of the teacher's features), `embed_cosine`, `rgb_mse`, and those of additional teachers with
            their names in front, e.g. `dinov2/feature_cosine`.
        output_dir: where the model was saved.
        steps: of the optimiser.
    """

    student: APMModel
    metrics: list[dict[str, float]]
    output_dir: Path
    steps: int
