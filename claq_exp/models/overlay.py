"""The tensors of a model that are not those of its source any more."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from claq_exp.errors import NumericalError

PRODUCT = "*"  # behind the name of a tensor: a factor of it


class Overlay:
    """Holds every tensor of a model that changed, beside packed matrices, which are the store's.

    Names are those of the model.  A changed tensor is rounded at once to the type that a checkpoint
    stores it in, so that the model in memory, the store and the checkpoint hold the same numbers.
    A tensor may be multiplied too: of a matrix that will be quantized the factor is kept, not the
    product.
    """

    def __init__(
        self,
        source: Callable[[str], Tensor],
        stored: torch.dtype | None = None,
        tied: Mapping[str, str] | None = None,
    ) -> None:
        """Begin without changes.

        source: returns a parameter of the original by name.  stored: the type that a checkpoint
        stores floating tensors in; None: that of the changed tensor.  tied: name -> under which
        other name the source has it.
        """
        self._source, self._stored, self._tied = source, stored, dict(tied or {})
        self._changed: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """Return a parameter as it is now: changed, or the source's; a product has 32 bits."""
        own = self._tied.get(name, name)
        changed, factor = self._changed.get(own), self.factors.get(own)
        value = self.original(name) if changed is None else changed
        return value if factor is None else value.float() * factor.to(value.device)

    def factor(self, name: str) -> Tensor | None:
        """Return what a parameter is multiplied by, float32; None where it is not."""
        return self.factors.get(self.stored_name(name))

    def stored_name(self, name: str) -> str:
        """Return the name that the source has a parameter under."""
        return self._tied.get(name, name)

    def changes(self, name: str) -> bool:
        """Tell whether a parameter is another than the source's."""
        own = self.stored_name(name)
        return own in self._changed or own in self.factors

    def original(self, name: str) -> Tensor:
        """Return a parameter of the source."""
        return self._source(self._tied.get(name, name))

    def change(self, name: str, value: Tensor) -> Tensor:
        """Have a tensor changed; return it as it is stored, on the CPU.

        Raises NumericalError for a value that is not finite, or that its stored type cannot hold,
        ValueError for another shape than the original's, and what reading that raises.
        """
        original = self.original(name)
        if value.shape != original.shape:
            raise ValueError(
                f"{name} is {list(original.shape)}, and cannot be changed to {list(value.shape)}"
            )
        rounded = self.rounded(value).to("cpu", copy=True)
        if not torch.isfinite(rounded).all():
            raise NumericalError(
                f"{name} was changed to a value that {rounded.dtype} cannot hold, which the "
                "checkpoint keeps this tensor in"
            )
        self._changed[self._tied.get(name, name)] = rounded
        return rounded

    def multiply(self, name: str, factor: Tensor) -> dict[str, Tensor]:
        """Have a tensor multiplied by a factor of its shape, where 1 stands for any size.

        Returns what `update` takes to do the same again.
        """
        own = self._tied.get(name, name)
        self.factors[own] = factor.detach().float().cpu() * self.factors.get(own, 1.0)
        return {f"{own}{PRODUCT}": self.factors[own]}

    def rounded(self, value: Tensor) -> Tensor:
        """Return a tensor in the type that it is stored in."""
        value = value.detach()
        return value.to(self._stored) if value.is_floating_point() and self._stored else value

    def update(self, changed: Mapping[str, Tensor]) -> None:
        """Take over what was changed and stored before."""
        for name, tensor in changed.items():
            held = self.factors if name.endswith(PRODUCT) else self._changed
            held[name.removesuffix(PRODUCT)] = tensor

    def within(self, path: str) -> dict[str, Tensor]:
        """Return name -> tensor of what changed inside a module."""
        return {n: t for n, t in self._changed.items() if n.startswith(f"{path}.")}
