"""The product that everything is made of, in every form that PyTorch has for it; which one `APMLinear` takes, and why.

Legend: I and O the widths of a layer's input and output.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from apm_hf.modeling_apm_linear import linear

from .timing import Table, label_of, milliseconds, smallest_times

FORMS_SHAPE = (4096, 4096)  # of the widest layers of `dinov2-large`, (I, O)
ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)


def matmul_calls(
    shapes: list[tuple[int, int, int]], device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], object], int]]:
    """A call, and its floating-point operations, for every way that PyTorch has to multiply (rows, I) by (I, O)."""
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    weights: dict[tuple[int, int], torch.Tensor] = {}
    for rows, width, out in shapes:
        inputs = torch.randn(rows, width, device=device, dtype=dtype)
        weight = weights.setdefault((width, out), torch.randn(out, width, device=device, dtype=dtype))
        ways = {
            "linear": lambda x=inputs, w=weight: F.linear(x, w),
            "transposed": lambda x=inputs, w=weight: (w @ x.T).T,
        }
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            for way, w in (("oneDNN", weight), ("oneDNN, packed", packed)):
                ways[way] = lambda x=inputs, w=w: _onednn(x, w)
            ways["oneDNN, transposed"] = lambda x=inputs, w=weight: _onednn(w, x).T
        ways["APMLinear"] = lambda x=inputs, w=weight: linear(x, w)
        for way, call in ways.items():
            calls[f"{way} {rows} x {width} x {out}"] = call, 2 * rows * width * out
    return calls


def _onednn(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")


@torch.no_grad()
def forms(repeats: int, device: torch.device, dtype: torch.dtype) -> Table:
    """Milliseconds of every form, by rows."""
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
