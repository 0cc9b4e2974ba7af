"""The witness: an Asynchronous Perception Machine written the slow way, and the small models that are held against it.

Everything the library factorises is spelled out here: every patch is cut by hand, every query is the concatenation
[trigger ; local patch ; position], every location goes through the layers alone, and the pooling is
`torch.nn.MultiheadAttention`. Source: arXiv:2410.20535, Fig. 1.

Legend: B images, L locations, D trigger width, Q local-patch width, P position width, F feature width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apm_hf import APMConfig, APMModel, APMModelOutput

# Fields of a model that folds into local columns.
COLUMNS = {"trigger_source": "columns", "trigger_channels": 16, "num_column_blocks": 1}
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def small_config(**overrides) -> APMConfig:
    """A 3 x 3 grid of 4 x 4 patches; wide enough weights for features of order 1."""
    fields = {
        "image_size": 12,
        "patch_size": 4,
        "trigger_channels": 2,
        "position_size": 16,
        "hidden_sizes": [32, 24],
        "feature_size": 16,
        "rgb_hidden_sizes": [12, 8],
        "pooling_num_heads": 4,
        "initializer_range": 0.3,
    }
    return APMConfig.preset("tiny", **{**fields, **overrides})


def randomise(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Draw every weight and, unlike a fresh model's, every bias."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def small_model(*, seed: int = 0, **overrides) -> APMModel:
    return randomise(APMModel(small_config(**overrides)), seed=seed)


def small_images(batch_size: int = 2, *, size: int = 12, seed: int = 1) -> Tensor:
    """`(B, 3, size, size)`, of unit variance."""
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(seed))


def random_coordinates(*shape: int, seed: int = 2, reach: float = 1.0) -> Tensor:
    """`(*shape, 2)`, (y, x) in [-reach, reach]."""
    return (torch.rand(*shape, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * reach


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance` times the largest expected value, which must not be so small that anything passes."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.abs().max().item()
    assert scale > 1e-2, f"nothing to compare: the largest expected value is {scale}"
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * scale, f"error {error:.2e}, {error / scale:.2e} of the largest value {scale:.2e}"


def assert_same_answers(actual: APMModelOutput, expected: APMModelOutput, tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        for a, e in zip(as_tuple(actual[name]), as_tuple(value), strict=True):
            assert_close(a, e, tolerance)


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def naive_grid_coordinates(rows: int, cols: int) -> Tensor:
    """`(rows * cols, 2)`, (y, x) of the cells' centres, float64."""
    centres = [(-1 + (2 * r + 1) / rows, -1 + (2 * c + 1) / cols) for r in range(rows) for c in range(cols)]
    return torch.tensor(centres, dtype=torch.float64)


def naive_position_code(y: Tensor, x: Tensor, rows: int, cols: int, size: int) -> Tensor:
    """`(P,)` for one location: the column index first; sine and cosine take turns."""
    row, column = ((y + 1) * rows - 1) / 2, ((x + 1) * cols - 1) / 2
    angles = [index * math.pow(10000, -2 * k / (size / 2)) for index in (column, row) for k in range(size // 4)]
    return torch.stack([function(angle) for angle in angles for function in (torch.sin, torch.cos)])


def naive_local_patch(image: Tensor, y: Tensor, x: Tensor, patch_size: int) -> Tensor:
    """`(Q,)`: the window of one image `(C, S, S)` around one location, bilinear, zero outside the image."""
    size = image.shape[-1]
    window = torch.arange(patch_size, dtype=image.dtype) - (patch_size - 1) / 2
    pixels = torch.arange(size, dtype=image.dtype)
    rows, columns = ((y + 1) * size - 1) / 2 + window, ((x + 1) * size - 1) / 2 + window  # in pixels
    # Bilinear sampling weighs each of the image's pixels with a tent: 1 at its centre, 0 from one pixel away.
    from_rows = (1 - (rows[:, None] - pixels).abs()).clamp(min=0)  # (patch_size, S)
    from_columns = (1 - (columns[:, None] - pixels).abs()).clamp(min=0)
    return (from_rows @ image @ from_columns.T).flatten()  # (C, patch_size, patch_size) -> (Q,)


def naive_fold(config: APMConfig, weights: dict[str, Tensor], pixel_values: Tensor) -> Tensor:
    """`(B, D)`: patch by patch, one trigger channel after the other."""
    size, grid = config.patch_size, config.image_size // config.patch_size
    columns = []
    for image in pixel_values:
        column = []
        for weight, bias in zip(weights["trigger.weight"], weights["trigger.bias"], strict=True):
            for r in range(grid):
                for c in range(grid):
                    patch = image[:, r * size : (r + 1) * size, c * size : (c + 1) * size]
                    column.append((patch * weight).sum() + bias)
        columns.append(torch.stack(column))
    return torch.stack(columns)


def naive_columns(config: APMConfig, weights: dict[str, Tensor], pixel_values: Tensor) -> Tensor:
    """`(B, rows, cols, D)`: every cell of every convolution alone."""
    activation = ACTIVATIONS[config.hidden_act]

    def norm(name: str, values: Tensor) -> Tensor:
        centred = values - values.mean()
        scaled = centred / (centred.square().mean() + 1e-5).sqrt()
        return weights[f"{name}.weight"] * scaled + weights[f"{name}.bias"]

    def linear(name: str, inputs: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ inputs + weights[f"{name}.bias"]

    def convolve(name: str, maps: Tensor, stride: int, y: int, x: int) -> Tensor:
        """One output `(D)` for maps `(rows, cols, C)`, zero outside: a patch, or a place and its neighbours."""
        weight, found = weights[f"{name}.weight"], weights[f"{name}.bias"].clone()
        reach, depthwise = weight.shape[-1] % 2, weight.shape[1] == 1 < maps.shape[-1]
        for i in range(weight.shape[-1]):
            for j in range(weight.shape[-1]):
                row, column = y * stride + i - reach, x * stride + j - reach
                if 0 <= row < len(maps) and 0 <= column < maps.shape[1]:
                    tap = weight[:, :, i, j]
                    found = found + (tap[:, 0] * maps[row, column] if depthwise else tap @ maps[row, column])
        return found

    patch = min(4, config.patch_size)
    strides = [patch] + [2] * int(math.log2(config.patch_size / patch))
    folded = []
    for image in pixel_values:
        maps = image.permute(1, 2, 0)
        for layer, stride in enumerate(strides):
            name, size = f"trigger.convolutions.{layer}", len(maps) // stride
            cells = [
                norm(f"trigger.norms.{layer}", convolve(name, maps, stride, y, x))
                for y in range(size)
                for x in range(size)
            ]
            maps = torch.stack(cells).unflatten(0, (size, size))
            maps = maps if layer == len(strides) - 1 else activation(maps)
        for block in range(config.num_column_blocks):
            name, added = f"trigger.blocks.{block}", torch.zeros_like(maps)
            for y in range(len(maps)):
                for x in range(maps.shape[1]):
                    mixed = norm(f"{name}.norm", convolve(f"{name}.neighbours", maps, 1, y, x))
                    added[y, x] = linear(f"{name}.down", activation(linear(f"{name}.up", mixed)))
            maps = maps + added
        folded.append(maps)
    return torch.stack(folded)


def naive_interpolation(grid: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """`(D,)` at one location of a grid `(rows, cols, D)`: the outermost cells go on beyond their centres."""
    rows, cols = grid.shape[:2]
    row = (((y + 1) * rows - 1) / 2).clamp(0, rows - 1)
    column = (((x + 1) * cols - 1) / 2).clamp(0, cols - 1)
    across = (1 - (row - torch.arange(rows)).abs()).clamp(min=0)  # a tent around every centre
    along = (1 - (column - torch.arange(cols)).abs()).clamp(min=0)
    return torch.einsum("r,c,rcd->d", across.to(grid.dtype), along.to(grid.dtype), grid)


def naive_pooling(config: APMConfig, weights: dict[str, Tensor], features: Tensor, coordinates: Tensor) -> Tensor:
    """`(F,)` for one image's features `(L, F)` at coordinates `(L, 2)`."""
    if config.pooling == "mean":
        return features.sum(dim=0) / len(features)
    grid = config.image_size // config.patch_size
    codes = [naive_position_code(y, x, grid, grid, config.feature_size) for y, x in coordinates]
    inputs = (features + torch.stack(codes))[None]
    attention = nn.MultiheadAttention(
        config.feature_size, config.pooling_num_heads, batch_first=True, dtype=features.dtype
    )
    parts = ("pooler.q_proj", "pooler.k_proj", "pooler.v_proj")
    parameters = {
        "in_proj_weight": torch.cat([weights[f"{part}.weight"] for part in parts]),
        "in_proj_bias": torch.cat([weights[f"{part}.bias"] for part in parts]),
        "out_proj.weight": weights["pooler.out_proj.weight"],
        "out_proj.bias": weights["pooler.out_proj.bias"],
    }
    query = weights["pooler.query"]
    pooled, _ = torch.func.functional_call(attention, parameters, (query, inputs, inputs))
    return pooled[0, 0]


def naive_apm(
    config: APMConfig,
    weights: dict[str, Tensor],
    pixel_values: Tensor | None = None,
    coordinates: Tensor | None = None,
    trigger_column: Tensor | None = None,
) -> APMModelOutput:
    """What an APM with these weights must answer; same arguments and answer as `APMModel.forward`."""
    grid = config.image_size // config.patch_size
    if trigger_column is None:
        fold = naive_columns if config.trigger_source == "columns" else naive_fold
        trigger_column = fold(config, weights, pixel_values)
    if coordinates is None:
        coordinates = naive_grid_coordinates(grid, grid)
    coordinates = coordinates.to(trigger_column.dtype).expand(len(trigger_column), -1, 2)
    activation = ACTIVATIONS[config.hidden_act]

    def linear(name: str, inputs: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ inputs + weights[f"{name}.bias"]

    def first_linear(name: str, inputs: Tensor) -> Tensor:
        """One Linear over the concatenated [feature ; trigger ; local patch ; position]."""
        parts = [f"{name}.{part}.weight" for part in ("features", "trigger", "patch", "column", "row")]
        weight = torch.cat([weights[part] for part in parts if part in weights], dim=1)
        return weight @ inputs + weights[f"{name}.trigger.bias"]

    features, colours, pooled, hidden_states = [], [], [], [[] for _ in config.hidden_sizes]
    for image, column in enumerate(trigger_column):
        for y, x in coordinates[image]:
            local = [naive_interpolation(column, y, x)] if column.ndim == 3 else []
            parts = [column.mean(dim=(0, 1)) if local else column]
            if config.local_patch:
                parts.append(naive_local_patch(pixel_values[image], y, x, config.patch_size))
            query = torch.cat([*parts, naive_position_code(y, x, grid, grid, config.position_size)])
            hidden = activation(first_linear("decoder.query", torch.cat([*local, query])))
            hidden_states[0].append(hidden)
            for i in range(1, len(config.hidden_sizes)):
                hidden = activation(linear(f"decoder.layers.{i - 1}", hidden))
                hidden_states[i].append(hidden)
            features.append(linear("decoder.feature_head", hidden))
            if config.use_rgb_head:
                rgb = first_linear("decoder.rgb_head.query", torch.cat([features[-1], query])).relu()
                for i in range(len(config.rgb_hidden_sizes)):
                    rgb = linear(f"decoder.rgb_head.layers.{i}", rgb).relu()
                colours.append(rgb)
        answers = torch.stack(features[-len(coordinates[image]) :])
        pooled.append(naive_pooling(config, weights, answers, coordinates[image]))

    def stacked(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows).unflatten(0, (len(trigger_column), -1))  # (B * L, F) -> (B, L, F)

    return APMModelOutput(
        last_hidden_state=stacked(features),
        pooler_output=torch.stack(pooled),
        rgb=stacked(colours) if config.use_rgb_head else None,
        trigger_column=trigger_column,
        hidden_states=tuple(stacked(states) for states in hidden_states),
    )
