"""Compare a dense student with other ways to get a teacher's features between its tokens.

Each is called as `(tokens, coordinates, pixel_values)`, with what the student reads, and is fitted or tuned on the
student's own photos. Those that were fitted lie beside the student, and an evaluation takes what it finds there.

Legend: B photos, L locations, F feature width, T tokens of a photo, (rows, cols) their grid, C colours.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..position_encoding import axis_codes, coordinates_to_indices, grid_coordinates, sample_grid
from .ridge import NormalEquations, held_out

if TYPE_CHECKING:
    from .dense import DensePairs

Upsampler = Callable[[Tensor, Tensor, Tensor], Tensor]

RIDGE, BILATERAL, ATTENTION = "ridge.safetensors", "bilateral.safetensors", "attention.safetensors"
CHUNK = 32  # photos at a time
PLACES = 2**12  # locations whose weights for all tokens are held at a time
TUNED_PHOTOS = 64


def averages(pairs: "DensePairs") -> dict[str, Upsampler]:
    """Return the mean feature of these photos, and that of each place: what can be said without the photo."""
    places = torch.stack([part.float().sum(dim=(0, 1)) for part in pairs.targets.split(CHUNK)]).sum(dim=0)
    places = places / (len(pairs) * pairs.targets.shape[1])  # (rows, cols, F)

    def constant(maps: Tensor) -> Upsampler:
        def call(tokens: Tensor, coordinates: Tensor, pixel_values: Tensor) -> Tensor:
            return sample_grid(maps[None].expand(len(tokens), -1, -1, -1), coordinates)

        return call

    return {"mean": constant(places.mean(dim=(0, 1), keepdim=True)), "position": constant(places)}


def bilinear(tokens: Tensor, coordinates: Tensor, pixel_values: Tensor) -> Tensor:
    """Interpolate tokens linearly between their four neighbours."""
    return sample_grid(tokens, coordinates)


def bicubic(tokens: Tensor, coordinates: Tensor, pixel_values: Tensor) -> Tensor:
    """Interpolate tokens with cubic polynomials of their sixteen neighbours."""
    places = coordinates.flip(-1)[:, None].expand(len(tokens), -1, -1, -1)  # grid_sample takes (x, y)
    maps = tokens.movedim(-1, 1)
    sampled = F.grid_sample(maps, places, mode="bicubic", padding_mode="border", align_corners=False)
    return sampled[:, :, 0].transpose(1, 2)  # (B, F, 1, L) -> (B, L, F)


@dataclass(frozen=True, eq=False)
class Ridge:
    """Linear regression with an L2 penalty from [token at the place ; mean token] to the teacher's fine features.

    Args:
        weight: `(2 F + 1, F)`, of standardised inputs with a one behind them.
        mean, std: `(F,)`, of the tokens.
    """

    weight: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, pairs: "DensePairs", mean: Tensor, std: Tensor) -> "Ridge":
        """Solve the normal equations; the penalty is chosen on photos that are fitted to afterwards."""
        equations, held = NormalEquations(2 * len(mean) + 1, len(mean)), held_out(len(pairs))
        for is_held, numbers in ((False, (~held).nonzero()[:, 0]), (True, held.nonzero()[:, 0])):
            for part in numbers.split(CHUNK):
                equations.add(*cls._inputs(pairs, part, mean, std), held=is_held)
        return cls(equations.solve(), mean, std)

    @staticmethod
    def _inputs(pairs: "DensePairs", numbers: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        rows, cols = pairs.targets.shape[2:4]
        tokens = (pairs.tokens[numbers].float() - mean) / std
        inputs, targets = [], []
        for window in range(pairs.targets.shape[1]):
            coordinates = grid_coordinates(rows, cols)[None] + pairs.shifts[numbers, window][:, None]
            inputs.append(_with_mean(tokens, coordinates).flatten(0, 1))
            targets.append(((pairs.targets[numbers, window].float() - mean) / std).flatten(0, 2))
        return torch.cat(inputs), torch.cat(targets)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights beside a model, for comparison."""
        values = {"weight": self.weight, "mean": self.mean, "std": self.std}
        save_file({name: value.contiguous() for name, value in values.items()}, Path(folder) / RIDGE)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Ridge | None":
        """Read the weights that lie beside a model; None where there are none."""
        path = Path(folder) / RIDGE
        return cls(**load_file(path)) if path.is_file() else None

    def __call__(self, tokens: Tensor, coordinates: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Return features `(B, L, F)` for tokens `(B, rows, cols, F)` at coordinates `(1 or B, L, 2)`."""
        inputs = _with_mean((tokens - self.mean) / self.std, coordinates)
        return inputs @ self.weight * self.std + self.mean


@dataclass(frozen=True)
class Bilateral:
    """Joint bilateral upsampling: tokens weighted by their distance to the place and by their difference in colour.

    Source: Kopf et al. 2007, 10.1145/1275808.1276497.

    Args:
        distance: standard deviation in tokens.
        colour: standard deviation in units of `pixel_values`.
    """

    distance: float
    colour: float

    @classmethod
    def fit(cls, pairs: "DensePairs") -> "Bilateral":
        """Choose both deviations by the error on the first of the photos."""
        options = [
            cls(distance, colour) for distance in (0.35, 0.5, 0.7, 1.0) for colour in (0.25, 0.5, 1.0, 2.0, 1e3)
        ]
        errors = [0.0] * len(options)
        rows, cols = pairs.targets.shape[2:4]
        for photo in range(min(TUNED_PHOTOS, len(pairs))):
            numbers = torch.tensor([photo])
            coordinates = grid_coordinates(rows, cols)[None] + pairs.shifts[numbers, 0][:, None]
            inputs = pairs.tokens[numbers].float(), coordinates, pairs.pixel_values(numbers)
            for index, option in enumerate(options):
                errors[index] += float(
                    (option(*inputs) - pairs.targets[numbers, 0].flatten(1, 2).float()).square().sum()
                )
        return options[errors.index(min(errors))]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write both numbers beside a model, for comparison."""
        save_file({name: torch.tensor(value) for name, value in vars(self).items()}, Path(folder) / BILATERAL)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Bilateral | None":
        """Read what lies beside a model; None where there is nothing."""
        path = Path(folder) / BILATERAL
        return cls(**{name: float(value) for name, value in load_file(path).items()}) if path.is_file() else None

    def __call__(self, tokens: Tensor, coordinates: Tensor, pixel_values: Tensor) -> Tensor:
        """Return features `(B, L, F)` for tokens `(B, rows, cols, F)` at coordinates `(1 or B, L, 2)`."""
        rows, cols = tokens.shape[1:3]
        centres = coordinates_to_indices(grid_coordinates(rows, cols), rows, cols)[None]  # (1, T, 2)
        colours = F.adaptive_avg_pool2d(pixel_values, (rows, cols)).flatten(2).transpose(1, 2)  # (B, T, C)
        image, found = pixel_values.movedim(1, -1), []
        for places in coordinates.split(PLACES, dim=1):
            far = torch.cdist(coordinates_to_indices(places, rows, cols), centres) / self.distance
            other = torch.cdist(sample_grid(image, places), colours) / self.colour  # (B, L, T)
            found.append((-(far.square() + other.square()) / 2).softmax(dim=-1) @ tokens.flatten(1, 2))
        return torch.cat(found, dim=1)


class AttentionUpsampler(nn.Module):
    """Attend from the pixels around a place to all tokens, which are averaged with these weights.

    As JAFAR does (arXiv:2506.11136): queries from a convolutional encoding of the image, keys from the same encoding
    averaged over each token's cell and modulated by the token; values are the tokens themselves.

    Args:
        feature_size: F.
        width: of the encoding, queries and keys.
        num_heads: whose weights are averaged.
    """

    mean: Tensor  # (F,), of the tokens
    std: Tensor

    def __init__(self, feature_size: int, *, width: int = 64, num_heads: int = 4):
        super().__init__()
        self.num_heads = num_heads
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU()
        )
        self.modulation = nn.Linear(feature_size, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("mean", torch.zeros(feature_size))
        self.register_buffer("std", torch.ones(feature_size))

    def forward(self, tokens: Tensor, coordinates: Tensor, pixel_values: Tensor) -> Tensor:
        """Return features `(B, L, F)` for tokens `(B, rows, cols, F)` at coordinates `(1 or B, L, 2)`."""
        rows, cols = tokens.shape[1:3]
        encoded = self.encoder(pixel_values)  # (B, W, H / 2, W / 2)
        cells = F.adaptive_avg_pool2d(encoded, (rows, cols)).movedim(1, -1).flatten(1, 2)  # (B, T, W)
        values = tokens.flatten(1, 2)
        scale, shift = self.modulation((values - self.mean) / self.std).chunk(2, dim=-1)
        centres = grid_coordinates(rows, cols, device=tokens.device)[None]
        keys = self._heads(self.key(self.norm(cells) * (1 + scale) + shift + self._code(centres, rows, cols)))
        image, found = encoded.movedim(1, -1), []
        for places in coordinates.split(PLACES, dim=1):
            queries = self.norm(sample_grid(image, places)) + self._code(places, rows, cols)
            scores = self._heads(self.query(queries)) @ keys.transpose(-1, -2)  # (B, heads, L, T)
            weights = (scores * keys.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)
            found.append(weights @ values)
        return torch.cat(found, dim=1)

    def _heads(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, L, W) -> (B, heads, L, W / heads)

    def _code(self, coordinates: Tensor, rows: int, cols: int) -> Tensor:
        indices = coordinates_to_indices(coordinates, rows, cols)
        half = self.query.in_features // 2
        return torch.cat(axis_codes(half, *indices.unbind(-1)), dim=-1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights beside a model, for comparison."""
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, Path(folder) / ATTENTION)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "AttentionUpsampler | None":
        """Read the weights that lie beside a model; None where there are none."""
        path = Path(folder) / ATTENTION
        if not path.is_file():
            return None
        weights = load_file(path)
        model = cls(len(weights["mean"]), width=len(weights["norm.weight"]))
        model.load_state_dict(weights)
        return model.eval().requires_grad_(False)


def fitted_rivals(folder: str | os.PathLike[str]) -> dict[str, Upsampler]:
    """Return the fitted rivals that lie beside a model, by name."""
    found = {
        "ridge": Ridge.load(folder),
        "bilateral": Bilateral.load(folder),
        "attention": AttentionUpsampler.load(folder),
    }
    return {name: rival for name, rival in found.items() if rival is not None}


def _with_mean(tokens: Tensor, coordinates: Tensor) -> Tensor:
    """Return `(B, L, 2 F + 1)`: token at each place, mean token, one."""
    sampled = sample_grid(tokens, coordinates)
    shared = tokens.mean(dim=(1, 2))[:, None].expand_as(sampled)
    return torch.cat([sampled, shared, torch.ones_like(sampled[..., :1])], dim=-1)
