"""Solve ridge regressions from sums over rows, in memory that does not grow with the rows.

Legend: N rows, W inputs, F outputs.
"""

import torch
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean diagonal of the inputs' products


def held_out(num_photos: int) -> Tensor:
    """Return which photos a penalty is chosen on, `(num_photos,)` bool: every tenth, of fewer than 20 every second."""
    return torch.arange(num_photos) % (10 if num_photos >= 20 else 2) == 1


class NormalEquations:
    """Accumulate the products of inputs and outputs, of rows to fit to and of rows to choose the penalty on.

    Args:
        num_inputs: W, with a column of ones if the regression has a constant.
        num_outputs: F.
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        self.gram = torch.zeros(2, num_inputs, num_inputs, dtype=torch.float64)  # fitted, held out
        self.cross = torch.zeros(2, num_inputs, num_outputs, dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor, *, held: bool = False) -> None:
        """Add rows `(N, W)` and `(N, F)`; those that are held out choose the penalty, and are fitted to afterwards."""
        self.gram[int(held)] += (inputs.T @ inputs).double()
        self.cross[int(held)] += (inputs.T @ outputs).double()

    def solve(self) -> Tensor:
        """Return the weight `(W, F)`, float32, for all rows; the middle penalty is taken where none are held out."""
        (gram, held_gram), (cross, held_cross) = self.gram, self.cross

        def weight(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
            eye = torch.eye(len(gram), dtype=torch.float64) * penalty * gram.diagonal().mean()
            return torch.linalg.solve(gram + eye, cross)

        def error(penalty: float) -> float:  # but for the outputs' own squares, which are the same for all
            found = weight(gram, cross, penalty)
            return float((found * (held_gram @ found)).sum() - 2 * (found * held_cross).sum())

        best = min(PENALTIES, key=error) if held_gram.any() and gram.any() else PENALTIES[len(PENALTIES) // 2]
        return weight(gram + held_gram, cross + held_cross, best).float()
