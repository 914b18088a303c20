"""Models that are gone through block by block: whole in memory, or read as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from claq_exp.models.discover import find_blocks
from claq_exp.models.skeleton import tied_names
from claq_exp.models.towers import other_towers
from claq_exp.models.weights import Weights


class BlockedModel(Protocol):
    """A causal language model whose decoder blocks are there one at a time.

    model: the whole, to be called only inside `outside`.  path: name of the list of its blocks.
    """

    model: PreTrainedModel
    path: str
    blocks: nn.ModuleList
    device: torch.device

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Have a block's weights in memory inside the context; what is changed there is lost."""

    def outside(self, *, head: bool) -> AbstractContextManager[PreTrainedModel]:
        """Have the weights outside of the blocks in memory; without `head`, none behind them."""

    def read(self, name: str) -> Tensor:
        """Return a parameter as it is stored."""


class WholeModel:
    """A model that is in memory; changes of its blocks stay."""

    def __init__(self, model: PreTrainedModel, blocks_path: str | None = None) -> None:
        self.model = model
        self.path, self.blocks = find_blocks(model, blocks_path)
        self.device = next(model.parameters()).device

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Return a block."""
        return nullcontext(self.blocks[index])

    def outside(self, *, head: bool) -> AbstractContextManager[PreTrainedModel]:
        """Return the model."""
        return nullcontext(self.model)

    def read(self, name: str) -> Tensor:
        """Return a parameter."""
        return self.model.get_parameter(name).detach()


class StreamedModel:
    """A model on the meta device whose weights are read inside the contexts, and freed behind them.

    model: from `skeleton`, in the dtype to run in.  weights: where its parameters come from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        weights: Weights,
        device: str | torch.device,
        blocks_path: str | None = None,
    ) -> None:
        self.model = model
        self.path, self.blocks = find_blocks(model, blocks_path)
        self.device = torch.device(device)
        self._weights = weights
        self._tied = tied_names(model)
        kept = model.state_dict().keys()
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    full_name = f"{path}.{name}".lstrip(".")
                    stored = self.read(full_name) if full_name in kept else buffer
                    module._buffers[name] = stored.to(self.device, buffer.dtype)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Have a block's weights in memory inside the context; what is changed there is lost."""
        block = self.blocks[index]
        inside = set(block.modules())
        with self._filled({n: m for n, m in self.model.named_modules() if m in inside}):
            yield block

    @contextmanager
    def outside(self, *, head: bool) -> Iterator[PreTrainedModel]:
        """Have the weights outside of the blocks in memory; without `head`, none behind them.

        Of the table of token embeddings only the rows are read that are looked up; of towers for
        images and sound nothing but the model's first parameter, which it asks for its device.
        """
        table = self.model.get_input_embeddings()
        last = self.model.get_output_embeddings()
        towers = {module for tower in other_towers(self.model) for module in tower.modules()}
        towers.discard(next(module for module in self.model.modules() if _has_own(module)))
        left_out = {*towers, *self.blocks.modules(), table, *(() if head else (last,))}
        modules = {n: m for n, m in self.model.named_modules() if m not in left_out}
        with self._filled(modules), self._looked_up(table):
            yield self.model

    def read(self, name: str) -> Tensor:
        """Return a parameter as it is stored; it may be mapped from a file."""
        return self._weights.read(self._tied.get(name, name))

    def load(self, place: Callable[[str], Any] | None = None) -> PreTrainedModel:
        """Bring all weights into memory, to stay there, and return the model.

        place: tells the device of a parameter; where it is None, the parameter is left out.
        """
        for module, name, full_name, empty in _parameters(dict(self.model.named_modules())):
            device = self.device if place is None else place(full_name)
            if device is not None:
                self._fill(module, name, full_name, empty, device)
        self.model.tie_weights()
        return self.model

    @contextmanager
    def _filled(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Have the stored weights in the place of the modules' own parameters."""
        parameters = _parameters(modules)
        try:
            for parameter in parameters:
                self._fill(*parameter, self.device)
            yield
        finally:
            for module, name, _, empty in parameters:
                setattr(module, name, empty)

    def _fill(
        self, module: nn.Module, name: str, full_name: str, empty: nn.Parameter, device: Any
    ) -> None:
        weight = self.read(full_name).to(device, empty.dtype, copy=True)
        setattr(module, name, nn.Parameter(weight, requires_grad=False))

    @contextmanager
    def _looked_up(self, table: nn.Module) -> Iterator[None]:
        """Have an embedding read the rows that a batch needs, as it needs them."""
        assert isinstance(table, nn.Embedding)
        name = next(name for name, module in self.model.named_modules() if module is table)
        stored = self.read(f"{name}.weight")
        empty, padding, forward = table.weight, table.padding_idx, table.forward

        def look_up(tokens: Tensor) -> Tensor:
            ids, places = tokens.unique(return_inverse=True)
            rows = stored[ids.to(stored.device)].to(self.device, empty.dtype)
            table.weight = nn.Parameter(rows, requires_grad=False)
            return forward(places)

        table.padding_idx = None  # it matters to gradients alone, and is no row of what was read
        table.forward = look_up  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            del table.forward
            table.padding_idx = padding
            table.weight = empty


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
