"""Models that are gone through block by block: whole in memory, or read as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from claq_exp.models.discover import find_blocks
from claq_exp.models.overlay import Overlay
from claq_exp.models.skeleton import tied_names
from claq_exp.models.towers import other_towers
from claq_exp.models.weights import Weights

RowsOf = Callable[[Tensor], Tensor]  # token ids [n] int64 on the CPU -> their rows [n, width]


class BlockedModel(Protocol):
    """A causal language model whose decoder blocks are there one at a time.

    model: the whole, to be called only inside `outside`.  path: name of the list of its blocks.
    overlay: what of it is changed.
    """

    model: PreTrainedModel
    path: str
    blocks: nn.ModuleList
    device: torch.device
    overlay: Overlay

    def block(
        self, index: int, *, original: bool = False, packed: Collection[str] = ()
    ) -> AbstractContextManager[nn.Module]:
        """Have a block's weights in memory inside the context, with what the overlay changes.

        original: without the changes.  packed: names of parameters that the caller changes there
        and keeps elsewhere; every other change belongs into the overlay.
        """

    def outside(
        self, *, head: bool, rows_of: RowsOf | None = None
    ) -> AbstractContextManager[PreTrainedModel]:
        """Have the weights outside of the blocks in memory; without `head`, none behind them.

        rows_of: what its embedding looks up in place of its own rows.
        """

    def read(self, name: str) -> Tensor:
        """Return a parameter as it is stored."""


class WholeModel:
    """A model that is in memory; changes of its blocks stay."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks_path: str | None = None,
        stored: torch.dtype | None = None,
    ) -> None:
        """Take a model.  stored: as of `Overlay`."""
        self.model = model
        self.path, self.blocks = find_blocks(model, blocks_path)
        self.device = next(model.parameters()).device
        self.overlay = Overlay(self.read, stored)
        self._opened: set[int] = set()
        self._multiplied: set[str] = set()

    def block(
        self, index: int, *, original: bool = False, packed: Collection[str] = ()
    ) -> AbstractContextManager[nn.Module]:
        """Return a block.  Raises ValueError for the original of one that was opened to change."""
        if original:
            if index in self._opened:
                raise ValueError(f"the original of block {index} is not in memory any more")
            return nullcontext(self.blocks[index])
        if packed:
            self._opened.add(index)
        path = f"{self.path}.{index}."
        factors = {name: f for name, f in self.overlay.factors.items() if name.startswith(path)}
        with torch.no_grad():
            for name, value in self.overlay.within(f"{self.path}.{index}").items():
                self._opened.add(index)
                self.model.get_parameter(name).copy_(value)
            for name in factors.keys() - self._multiplied:
                self._opened.add(index)
                self._multiplied.add(name)
                self.model.get_parameter(name).mul_(factors[name].to(self.device))
        return nullcontext(self.blocks[index])

    def outside(
        self, *, head: bool, rows_of: RowsOf | None = None
    ) -> AbstractContextManager[PreTrainedModel]:
        """Return the model; its embedding looks up other rows inside the context, if asked to."""
        return nullcontext(self.model) if rows_of is None else self._with_rows(rows_of)

    @contextmanager
    def _with_rows(self, rows_of: RowsOf) -> Iterator[PreTrainedModel]:
        with _looked_up(_table(self.model), rows_of, self.device):
            yield self.model

    def read(self, name: str) -> Tensor:
        """Return a parameter."""
        return self.model.get_parameter(name).detach()


class StreamedModel:
    """A model on the meta device whose weights are read inside the contexts, and freed behind them.

    model: from `skeleton`, in the dtype to run in.  weights: where its parameters come from.
    stored: as of `Overlay`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Weights,
        device: str | torch.device,
        blocks_path: str | None = None,
        stored: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.path, self.blocks = find_blocks(model, blocks_path)
        self.device = torch.device(device)
        self.overlay = Overlay(weights.read, stored, tied_names(model))
        self._weights = weights
        kept = model.state_dict().keys()
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    full_name = f"{path}.{name}".lstrip(".")
                    content = self.read(full_name) if full_name in kept else buffer
                    module._buffers[name] = content.to(self.device, buffer.dtype)

    @contextmanager
    def block(
        self, index: int, *, original: bool = False, packed: Collection[str] = ()
    ) -> Iterator[nn.Module]:
        """Have a block's weights in memory inside the context, with what the overlay changes.

        original, packed: as of `BlockedModel`.  Raises ValueError for a change that would be lost.
        """
        block = self.blocks[index]
        inside = set(block.modules())
        modules = {n: m for n, m in self.model.named_modules() if m in inside}
        with self._filled(modules, self.overlay.original if original else self.read, packed):
            yield block

    @contextmanager
    def outside(self, *, head: bool, rows_of: RowsOf | None = None) -> Iterator[PreTrainedModel]:
        """Have the weights outside of the blocks in memory; without `head`, none behind them.

        Of the table of token embeddings only the rows are read that are looked up; of towers for
        images and sound nothing but the model's first parameter, which it asks for its device.
        rows_of: what is looked up in place of them.
        """
        table = _table(self.model)
        last = self.model.get_output_embeddings()
        towers = {module for tower in other_towers(self.model) for module in tower.modules()}
        towers.discard(next(module for module in self.model.modules() if _has_own(module)))
        left_out = {*towers, *self.blocks.modules(), table, *(() if head else (last,))}
        modules = {n: m for n, m in self.model.named_modules() if m not in left_out}
        stored = rows_of or self._rows_of(table)
        with self._filled(modules, self.read), _looked_up(table, stored, self.device):
            yield self.model

    def read(self, name: str) -> Tensor:
        """Return a parameter as it is stored or was changed; it may be mapped from a file."""
        return self.overlay.read(name)

    def load(self, place: Callable[[str], Any] | None = None) -> PreTrainedModel:
        """Bring all weights into memory, to stay there, and return the model.

        place: tells the device of a parameter; where it is None, the parameter is left out.
        """
        for module, name, full_name, empty in _parameters(dict(self.model.named_modules())):
            device = self.device if place is None else place(full_name)
            if device is not None:
                _fill(module, name, self.read(full_name), empty, device)
        self.model.tie_weights()
        return self.model

    @contextmanager
    def _filled(
        self,
        modules: dict[str, nn.Module],
        read: Callable[[str], Tensor],
        packed: Collection[str] = (),
    ) -> Iterator[None]:
        """Have weights in the place of the modules' own parameters.

        read: returns each by its name.  Inside inference mode, where a model is only measured,
        nothing is looked at for changes.
        """
        parameters = _parameters(modules)
        try:
            for module, name, full_name, empty in parameters:
                _fill(module, name, read(full_name), empty, self.device)
            yield
            for module, name, full_name, empty in parameters:
                if full_name not in packed and not torch.is_inference_mode_enabled():
                    _check_kept(module, name, full_name, read(full_name), empty)
        finally:
            for module, name, _, empty in parameters:
                setattr(module, name, empty)

    def _rows_of(self, table: nn.Embedding) -> RowsOf:
        """Return what looks rows of an embedding up, as `read` has them."""
        module = next(name for name, module in self.model.named_modules() if module is table)
        name = f"{module}.weight"
        if self.overlay.changes(name):
            return self.read(name).cpu().__getitem__
        return self._weights.table(self.overlay.stored_name(name))


@contextmanager
def _looked_up(table: nn.Embedding, rows_of: RowsOf, device: torch.device) -> Iterator[None]:
    """Have an embedding read the rows that a batch needs, as it needs them."""
    own, padding, forward = table.weight, table.padding_idx, table.forward

    def look_up(tokens: Tensor) -> Tensor:
        ids, places = tokens.unique(return_inverse=True)
        rows = rows_of(ids.cpu()).to(device, own.dtype)
        table.weight = nn.Parameter(rows, requires_grad=False)
        return forward(places)

    table.padding_idx = None  # it matters to gradients alone, and is no row of what was read
    table.forward = look_up  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del table.forward
        table.padding_idx = padding
        table.weight = own


def _table(model: PreTrainedModel) -> nn.Embedding:
    """Return the embedding of a model."""
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table


def _fill(module: nn.Module, name: str, stored: Tensor, empty: nn.Parameter, device: Any) -> None:
    weight = stored.to(device, empty.dtype, copy=True)
    setattr(module, name, nn.Parameter(weight, requires_grad=False))


def _check_kept(
    module: nn.Module, name: str, full_name: str, kept: Tensor, empty: nn.Parameter
) -> None:
    """Raise ValueError for a parameter that differs from what is kept of it."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor) or not torch.equal(
        value.detach(), kept.to(value.device, empty.dtype)
    ):
        raise ValueError(
            f"{full_name} was changed where its weights are read for a while only, and the change "
            "would be lost; hand it to `overlay.change`, and go on with what that returns"
        )


def _has_own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _parameters(
    modules: dict[str, nn.Module],
) -> list[tuple[nn.Module, str, str, nn.Parameter]]:
    """Return (module, name in it, name in the model, parameter) of the modules' own parameters."""
    return [
        (module, name, f"{path}.{name}".lstrip("."), parameter)
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
