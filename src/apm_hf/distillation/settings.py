"""Every setting of a distillation, and what a run leaves behind."""

from dataclasses import dataclass, field
from pathlib import Path

from ..modeling_apm import APMModel
from .feature_statistics import KINDS
from .losses import LossWeights


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Settings of a distillation run; the names are also the flags of `apm distill` and `examples/train.py`.

    Raises:
        ValueError: for a value outside its range; says what was expected.
    """

    output_dir: str = field(metadata={"help": "folder of what is made; model, checkpoints, logs and pictures"})
    max_steps: int = field(default=1000, metadata={"help": "optimiser steps of the distillation"})
    batch_size: int = field(default=64, metadata={"help": "images at a time; in every process, a forward pass"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "forward passes per optimiser step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate of Adam"})
    warmup_steps: int = field(default=0, metadata={"help": "steps of linear warm-up, before the cosine decay"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm; 0 never"})
    num_locations: int | None = field(
        default=None, metadata={"help": "random teacher patches asked about at each step; all of them by default"}
    )
    grid_weight: float = field(default=1.0, metadata={"help": "weight of L_grid, the teacher's patch features"})
    cls_weight: float = field(default=1.0, metadata={"help": "weight of L_cls, the teacher's image embedding"})
    rgb_weight: float = field(default=1.0, metadata={"help": "weight of L_rgb, the image's own colours"})
    level_layers: list[int] | None = field(
        default=None, metadata={"help": "teacher layers, low to high, that the student's levels are distilled from"}
    )
    level_weight: float = field(default=1.0, metadata={"help": "weight of L_level, where there are levels"})
    jitter: bool = field(
        default=False, metadata={"help": "move the teacher's grid by a random part of a patch at every step"}
    )
    statistics_images: int = field(
        default=0,
        metadata={"help": "images on which teachers' feature statistics are measured before the first step; 0 never"},
    )
    statistics: str = field(
        default="channel", metadata={"help": "a standard deviation per channel, or one scalar, which keeps cosines"}
    )
    teacher_batch_size: int | None = field(
        default=None, metadata={"help": "images that the teachers are shown at a time; a whole pass by default"}
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
        default=None, metadata={"help": "what one device can do, for MFU, where its name does not tell"}
    )
    validation_steps: int = field(default=200, metadata={"help": "steps between validations; also one at each end"})
    checkpoint_steps: int = field(default=500, metadata={"help": "steps between checkpoints; 0 only when stopped"})
    keep_checkpoints: int = field(default=2, metadata={"help": "how many whole checkpoints stay on the disk"})
    resume: bool = field(default=False, metadata={"help": "go on from the last whole checkpoint in output_dir"})
    overwrite: bool = field(
        default=False, metadata={"help": "replace what output_dir holds, once the new run has saved a checkpoint"}
    )
    max_bad_images: int = field(
        default=0, metadata={"help": "unreadable images that are skipped and listed before the run stops"}
    )
    num_workers: int = field(default=0, metadata={"help": "processes that load images, per training process"})
    num_pictures: int = field(default=4, metadata={"help": "validation images drawn at each validation"})
    report_to: str = field(default="tensorboard", metadata={"help": "an Accelerate tracker, or none"})
    seed: int = field(default=0, metadata={"help": "of everything that is drawn; weights, images, locations"})

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir: expected a folder, got an empty name")
        if self.resume and self.overwrite:
            raise ValueError("resume, overwrite: expected one of them, got both")
        for name in (
            "max_steps", "batch_size", "gradient_accumulation_steps", "validation_steps", "keep_checkpoints",
            "logging_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in (
            "warmup_steps", "checkpoint_steps", "max_grad_norm", "num_workers", "num_pictures", "statistics_images",
            "max_bad_images",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.statistics not in KINDS:
            raise ValueError(f"statistics: expected one of {list(KINDS)}, got {self.statistics!r}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        for name in ("num_locations", "teacher_batch_size", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number or None, got {value}")
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision: expected no, bf16 or fp16, got {self.mixed_precision!r}")
        self.loss_weights  # noqa: B018 - validates them

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(self.grid_weight, self.cls_weight, self.rgb_weight, self.level_weight)


@dataclass(frozen=True)
class DistillationResult:
    """What a run leaves behind.

    Args:
        student: the trained student, on the CPU.
        metrics: of every validation, in order: `step`, `feature_cosine`, `feature_r2`, `embed_cosine`, `rgb_mse`, and
            those of further teachers behind their names, as `dinov2/feature_cosine`.
        output_dir: where the model was saved.
    """

    student: APMModel
    metrics: list[dict[str, float]]
    output_dir: Path
