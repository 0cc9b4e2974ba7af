"""Linear layers in the form that is fastest where they are: oneDNN's on the CPU, plain Linear everywhere else.

For float32 on a CPU, `torch.nn.functional.linear` calls MKL. Without gradients, oneDNN's product of the same matrices
is faster for large weights, most of all with few rows, and takes the weight as it lies: nothing is copied or packed
(docs/benchmarks.md has the figures). In bfloat16 `linear` already is oneDNN's.

Legend: I and O the widths of a layer's input and output.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGE = 2**18  # numbers in a weight: below, a product takes microseconds, and MKL's call is the shorter one
FEW = 64  # rows


def are_plain(*tensors: Tensor) -> bool:
    """Whether these may be given to an operator that has no gradient: no one differentiates, maps, traces, counts or
    casts what happens to them."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_any_autocast_enabled()
        or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors)
        or any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: `(..., O)` for inputs `(..., I)`, weight `(O, I)` and bias `(O,)`."""
    given = (inputs, weight) if bias is None else (inputs, weight, bias)
    if (
        weight.numel() < LARGE
        or weight.device.type != "cpu"
        or inputs.ndim < 2
        or any(tensor.dtype != torch.float32 for tensor in given)
        or not are_plain(*given)
    ):
        return F.linear(inputs, weight, bias)
    # oneDNN's way with a weight that is a part of another is slower by orders of magnitude.
    by_onednn = weight.is_contiguous() and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    rows = inputs.flatten(0, -2)  # (..., I) -> (rows, I)
    if 1 < len(rows) <= FEW:  # the weight comes first: it is read once, in order, and never rearranged
        answers = _onednn(weight, rows) if by_onednn else weight @ rows.T  # (O, rows)
        answers = answers.T.contiguous()
        return (answers if bias is None else answers.add_(bias)).unflatten(0, inputs.shape[:-1])
    return _onednn(inputs.contiguous(), weight, bias) if by_onednn else F.linear(inputs, weight, bias)


def _onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight.contiguous(), bias, "none", [], "")


class APMLinear(nn.Linear):
    """`torch.nn.Linear`, by [`linear`]."""

    def forward(self, inputs: Tensor) -> Tensor:
        """`(..., O)` for `(..., I)`."""
        return linear(inputs, self.weight, self.bias)
