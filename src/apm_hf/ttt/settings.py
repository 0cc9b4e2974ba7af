"""Define the settings of a fit, with the published recipes as presets.

Source: arXiv:2410.20535, section 4.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

FITS = ("all", "last_layers", "low_rank", "heads", "trigger", "output_bias")
STARTS = ("random", "model")
STOPS = ("plateau", "cosine", "stable")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TTTConfig:
    """Configure a fit. The presets are in `TTTConfig.preset`.

    Args:
        steps: maximum number of gradient steps per image.
        learning_rate: learning rate of Adam (arXiv:1412.6980) with its usual betas.
        num_locations: number of grid locations whose features are pooled at each step, a new random subset each
            time; the subset's mean is an unbiased estimate of the grid's. None, or a number not below the grid's,
            pools all of them, without sampling noise.
        fit: what learns. `"all"`: every weight (paper). `"last_layers"`: the last hidden layer, the feature head and
            attention's values and output. `"low_rank"`: the same layers, each of which learns a low-rank update. Its
            first factor is fixed: it sums the inputs in `rank` blocks. `"heads"`: the feature head and attention's
            values and output. `"trigger"`: the convolution only. `"output_bias"`: one vector, a control: it copies
            its target and adapts nothing else.
        rank: see `fit="low_rank"`; reduced to a divisor of the layer's width.
        alpha: scale of low-rank updates: a step changes a layer's outputs by `learning_rate` * `alpha` of their size,
            for any architecture.
        start: `"random"` draws new weights, `"model"` starts from the given model's.
        seed: random seed of initial weights and of sampled locations. All images of a call share one seed.
        stop: label-free rule by which an image stops before `steps`. `"plateau"`: its loss has not fallen by the
            fraction `stop_threshold` within `stop_patience` steps. `"cosine"`: the cosine to its (mean) target has
            been at least `stop_threshold` for `stop_patience` steps. `"stable"`: its predicted class has been the same
            for `stop_patience` steps (`adapt` then takes `text_embeds`). None: never.
        stop_threshold, stop_patience: see `stop`.
        dtype: dtype of the products, `"float32"` or `"bfloat16"`; weights, losses, optimiser and pooling stay float32.

    Raises:
        ValueError: for a value outside its range.
    """

    steps: int = 20
    learning_rate: float = 1e-4
    num_locations: int | None = None
    fit: str = "all"
    rank: int = 8
    alpha: float = 1.0
    start: str = "random"
    seed: int = 0
    stop: str | None = None
    stop_threshold: float | None = None
    stop_patience: int = 5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, known in (("start", STARTS), ("fit", FITS), ("dtype", tuple(DTYPES)), ("stop", (None, *STOPS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, got {getattr(self, name)!r}")
        for name in ("steps", "num_locations", "rank", "stop_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("learning_rate", "alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive finite number, got {getattr(self, name)}")
        if self.stop in ("plateau", "cosine"):
            if self.stop_threshold is None or not 0 < self.stop_threshold < 1:
                raise ValueError(
                    f"stop_threshold: expected a number between 0 and 1 for stop={self.stop!r}, "
                    f"got {self.stop_threshold}"
                )
        elif self.stop_threshold is not None:
            raise ValueError(f"stop_threshold: expected None for stop={self.stop!r}, got {self.stop_threshold}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "TTTConfig":
        """Return `"paper"`, the paper's recipe, or `"fast"`, the most accurate cheap recipe that was measured.

        An override of `stop` replaces the preset's rule completely. docs/test_time_training.md has the measurements.

        Raises:
            ValueError: for an unknown preset or a value outside its range.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
        if "stop" in overrides:
            overrides = {"stop_threshold": None, "stop_patience": cls.stop_patience} | overrides
        return replace(PRESETS[name], **overrides)


PRESETS: dict[str, TTTConfig] = {
    "paper": TTTConfig(),
    "fast": TTTConfig(
        steps=200,
        learning_rate=1e-3,
        num_locations=8,
        fit="low_rank",
        alpha=100.0,
        stop="cosine",
        stop_threshold=0.99,
        stop_patience=1,
    ),
}
