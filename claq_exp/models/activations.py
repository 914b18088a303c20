"""The inputs of a model's linear layers: rounded while it runs, or looked at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from claq_exp.models.blocks import BlockInputs, capture_inputs, run_block, watched
from claq_exp.quantize.activation.rounding import Observed, Rounding

if TYPE_CHECKING:
    from claq_exp.models.stream import BlockedModel

SAMPLED = 1 << 21  # numbers that are kept of all inputs together


class _Shared:
    """The rounded form of the input that was last seen: layers side by side share their input."""

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self._last: tuple[Tensor, float | None, Tensor] | None = None

    def round(self, values: Tensor, limit: float | None) -> Tensor:
        last = self._last
        if last is not None and last[0] is values and last[1] == limit:
            return last[2]
        rounded = self._rounding.round(values, limit)
        self._last = values, limit, rounded
        return rounded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


@dataclass(frozen=True)
class _RoundingHook:
    shared: _Shared
    limit: float | None

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        entering: Tensor = inputs[0]
        with torch.no_grad():
            rounded = self.shared.round(entering, self.limit)
        if torch.is_grad_enabled() and entering.requires_grad:
            rounded = _StraightThrough.apply(entering, rounded)
        return rounded, *inputs[1:]


class _StraightThrough(torch.autograd.Function):
    """Rounded numbers that hand gradients on to the numbers that they stand for."""

    @staticmethod
    def forward(ctx: Any, entering: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def round_inputs(
    model: nn.Module,
    rounding: Rounding | None,
    linears: Iterable[str],
    places: Mapping[str, str] | None = None,
) -> None:
    """Have layers round what enters them from now on; their weights may be replaced meanwhile.

    rounding: None to leave everything as it is.  linears: names of the layers.  places: name ->
    where it stands in this model, if elsewhere.  An input that several layers get one after the
    other is rounded once.
    """
    if rounding is None:
        return
    shared = _Shared(rounding)
    for name in linears:
        hook = _RoundingHook(shared, rounding.limit(name))
        place = name if places is None else places[name]
        model.get_submodule(place).register_forward_pre_hook(hook)


@torch.inference_mode()
def observe_inputs(
    model: BlockedModel,
    batches: list[Tensor],
    linears: Collection[str],
    on_share: Callable[[float, str], None] = lambda _share, _what: None,
) -> Observed:
    """Look at what enters linear layers of a model that is gone through block by block.

    batches: token ids [batch, seqlen].  on_share: called with (share of the work, what).
    Samples are tokens evenly spaced over the first batch; an input of several layers is one.
    An expert that no token reached gets the largest maximum of all.
    """
    inputs = capture_inputs(model, batches)
    hidden = list(inputs[0].hidden)
    gathered = _Gathered(max(1, SAMPLED // max(1, len(linears))))
    for index, entering in enumerate(inputs):
        entering.hidden = hidden
        path = f"{model.path}.{index}"
        with model.block(index) as block:
            own = [name for name in linears if name.startswith(f"{path}.")]
            sinks = {block.get_submodule(n.removeprefix(f"{path}.")): n for n in own}
            for number in range(len(batches)):
                with watched(gathered.sinks(sinks, sampled=number == 0)):
                    hidden[number] = run_block(block, entering, number)
        inputs[index] = BlockInputs()
        on_share(1 / len(inputs), f"block {index}")
    maxima = gathered.maxima()
    unseen = dict.fromkeys(linears, max(maxima.values(), default=0.0))
    return Observed(unseen | maxima, tuple(gathered.samples))


class _Gathered:
    """What was seen so far.  each: numbers that are kept of an input."""

    def __init__(self, each: int) -> None:
        self._maxima: dict[str, Tensor] = {}
        self.samples: list[Tensor] = []
        self._each = each
        self._last: Tensor | None = None

    def sinks(
        self, linears: Mapping[nn.Module, str], *, sampled: bool
    ) -> dict[nn.Module, Callable[[Tensor], None]]:
        def sink(name: str) -> Callable[[Tensor], None]:
            return lambda entering: self._see(name, entering, sampled)

        return {module: sink(name) for module, name in linears.items()}

    def maxima(self) -> dict[str, float]:
        """Return the largest magnitude of each input; a device is waited for here alone."""
        return {name: float(largest) for name, largest in self._maxima.items()}

    def _see(self, name: str, entering: Tensor, sampled: bool) -> None:
        if not entering.numel():
            self._maxima.setdefault(name, entering.new_zeros(()))
            return
        largest = entering.abs().max()
        self._maxima[name] = torch.maximum(self._maxima.get(name, largest), largest)
        if not sampled or entering is self._last:
            return
        self._last = entering
        tokens = entering.reshape(-1, entering.shape[-1])
        count = max(1, min(len(tokens), self._each // tokens.shape[1]))
        places = torch.linspace(0, len(tokens) - 1, count).round().long()
        self.samples.append(tokens[places.to(tokens.device)].float().cpu())
