"""What is known of the inputs of linears that share one: sums over calibration tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CROSS, OUTPUT_GRADIENTS = "cross", "output_gradients"
WANTED = (CROSS, OUTPUT_GRADIENTS)  # what a solver may want beside the plain Hessian


@dataclass
class Moments:
    """The second moments of the inputs of linears that share them.

    hessian: [groups, in, in] float64, 2/n * sum over n tokens of g x x^T (GPTQ, arXiv 2210.17323,
        eq. 1-2).  g is what an error in the outputs of a group of rows weighs at a token, 1 on
        average (`claq_exp.quantize.objective`); one group with g = 1 where tokens count alike.
        Groups are neighbouring rows, in equal numbers.  [in, in] may be given for one group.
    cross: [groups, in, in] float64, 2/n * sum of g (x_teacher - x_student) x_student^T (GPTAQ,
        arXiv 2504.02692); None where nothing wants it.
    tokens: n.
    wide: the inputs are in float64, and so is what a solver computes of the moments.
    disposable: nobody needs the tensors afterwards.  A solver may work in their memory, and calls
        `use_up` where it did.
    """

    hessian: Tensor
    cross: Tensor | None = None
    tokens: int = 0
    disposable: bool = False
    wide: bool = False

    def __post_init__(self) -> None:
        if self.hessian.dim() == 2:
            self.hessian = self.hessian[None]
        groups, columns = self.hessian.shape[0], self.hessian.shape[-1]
        if self.hessian.dim() != 3 or self.hessian.shape[1] != columns or not groups:
            raise ValueError(f"a Hessian of the shape {tuple(self.hessian.shape)}")
        if self.cross is not None and self.cross.dim() == 2:
            self.cross = self.cross[None]
        if self.cross is not None and self.cross.shape != self.hessian.shape:
            raise ValueError(
                f"cross is {tuple(self.cross.shape)}, the Hessian {tuple(self.hessian.shape)}"
            )

    @property
    def groups(self) -> int:
        """Number of groups of rows."""
        return self.hessian.shape[0]

    @property
    def used_up(self) -> bool:
        """Whether a solver has taken the memory of the tensors."""
        return not self.hessian.numel()

    def single(self) -> Tensor:
        """Return one Hessian for all rows: [in, in] float64, the mean over groups.

        With one group it is that group's own memory.
        """
        return self.hessian[0] if self.groups == 1 else self.hessian.mean(dim=0)

    def single_cross(self) -> Tensor | None:
        """Return one cross moment for all rows, as `single`; None where there is none."""
        if self.cross is None:
            return None
        return self.cross[0] if self.groups == 1 else self.cross.mean(dim=0)

    def to(self, device: torch.device) -> Moments:
        """Return these on a device; a copy there is disposable."""
        moved = self.hessian.to(device)
        if moved is self.hessian:
            return self
        cross = None if self.cross is None else self.cross.to(device)
        return Moments(moved, cross, self.tokens, disposable=True, wide=self.wide)

    def use_up(self) -> None:
        """Let go of the tensors; their memory is now a solver's."""
        self.hessian = self.hessian.new_empty(1, 0, 0)
        self.cross = None
