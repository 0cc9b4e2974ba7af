"""The product that everything is made of, in the forms that PyTorch's public operations have for it.

Legend: I and O the widths of a layer's input and output.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .timing import Table, label_of, milliseconds, smallest_times

FORMS_SHAPE = (4096, 4096)  # of the widest layers of `dinov2-large`, (I, O)
ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)


def matmul_calls(
    shapes: list[tuple[int, int, int]], device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], object], int]]:
    """Return a call, and its number of floating-point operations, for every form of (rows, I) times (I, O)."""
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    weights: dict[tuple[int, int], torch.Tensor] = {}
    for rows, width, out in shapes:
        inputs = torch.randn(rows, width, device=device, dtype=dtype)
        weight = weights.setdefault((width, out), torch.randn(out, width, device=device, dtype=dtype))
        ways = {
            "linear": lambda x=inputs, w=weight: F.linear(x, w),
            "weight first": lambda x=inputs, w=weight: (w @ x.T).T,
        }
        for way, call in ways.items():
            calls[f"{way} {rows} x {width} x {out}"] = call, 2 * rows * width * out
    return calls


@torch.no_grad()
def forms(repeats: int, device: torch.device, dtype: torch.dtype) -> Table:
    """Measure every form by the number of rows, in milliseconds."""
    shapes = [(rows, *FORMS_SHAPE) for rows in ROWS]
    times = smallest_times({n: call for n, (call, _) in matmul_calls(shapes, device, dtype).items()}, repeats, device)
    ways = list(dict.fromkeys(name.rsplit(" ", 5)[0] for name in times))
    table = Table(
        f"Forms of a product: {label_of('x'.join(map(str, FORMS_SHAPE)), device, dtype)}, ms", ("rows", *ways)
    )
    for shape in shapes:
        name = " x ".join(map(str, shape))
        table.rows.append((str(shape[0]), *(milliseconds(times[f"{way} {name}"]) for way in ways)))
    return table
