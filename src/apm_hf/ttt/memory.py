"""How many images are fitted at a time: as many as fit the memory."""

import psutil
import torch

from ..modeling_apm import APMModel
from .layers import learning_modules
from .settings import TTTConfig
from .targets import TTTTargets

# Of layers that stand still, so many steps are computed at a time.
PREPARED_STEPS = 32


def group_size(
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
    num_cells = num_asked(model, targets)
    asked = config.num_locations or num_cells
    ahead = PREPARED_STEPS if config.num_locations else 1
    widths = [*architecture.hidden_sizes, architecture.feature_size]
    grids = architecture.num_channels * architecture.image_size**2 * 2
    grids += num_cells * (2 * architecture.local_patch_width + architecture.feature_size * (1 + targets.everywhere))
    # Weights, gradients and Adam's two moments; activations, their gradients and what Linear and ReLU save of them.
    elements = 4 * learnt + whole * (distinct and config.start == "random")
    elements += asked * (4 * sum(widths) + ahead * max(widths)) + grids
    return 4 * elements


def num_asked(model: APMModel, targets: TTTTargets) -> int:
    """Locations that are fitted to: the cells of the target's grid, else of the machine's."""
    return model.config.num_locations if targets.grid is None else targets.grid[0] * targets.grid[1]
