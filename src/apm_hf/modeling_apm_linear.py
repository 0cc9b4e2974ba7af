"""Linear layers in the form that is fastest where they are: oneDNN's on the CPU, plain Linear everywhere else.

For float32 on a CPU, `torch.nn.functional.linear` calls MKL. Without gradients, oneDNN's product of the same matrices
is faster for large weights, most of all with few rows, and reads the weight as it lies: nothing is copied or packed
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
        or any(tensor.dtype != torch.float32 for tensor in given)
        or not are_plain(*given)
    ):
        return F.linear(inputs, weight, bias)
    if weight.is_contiguous() and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(inputs.contiguous(), weight, bias, "none", [], "")
    if bias is None and 1 < inputs.numel() // inputs.shape[-1] <= FEW:
        answers = (weight @ inputs.flatten(0, -2).T).T  # of few rows, MKL prefers the long side of a product in front
        return answers.contiguous().unflatten(0, inputs.shape[:-1])
    return F.linear(inputs, weight, bias)


class APMLinear(nn.Linear):
    """`torch.nn.Linear`, by [`linear`]."""

    def forward(self, inputs: Tensor) -> Tensor:
        """`(..., O)` for `(..., I)`."""
        return linear(inputs, self.weight, self.bias)
