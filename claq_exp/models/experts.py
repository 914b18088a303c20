"""Mixtures of experts: fused expert weights taken apart into linear layers, and their routers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FUSED = ("gate_up_proj", "down_proj")
ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")  # of a fused module's forward


class Expert(nn.Module):
    """One gated feed-forward layer of a mixture."""

    def __init__(self, gate_up: Tensor, down: Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (gate, up, down))
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        gated = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        out: Tensor = self.down_proj(gated)
        return out


class SeparateExperts(nn.ModuleList):
    """The experts of one block as linear layers; computes what the fused module computes.

    The layers' weights are views of the fused tensors, so that nothing is held twice.  Only experts
    that a token was sent to are run.
    """

    def __init__(self, fused: nn.Module) -> None:
        gate_up, down = (fused.get_parameter(name) for name in FUSED)
        act_fn = fused.get_submodule("act_fn")
        super().__init__(
            Expert(gate_up.detach()[index], down.detach()[index], act_fn)
            for index in range(len(gate_up))
        )
        for name in FUSED:
            setattr(fused, name, nn.Parameter(fused.get_parameter(name).to("meta")))
        self.emptied = (fused,)  # in a tuple, for its weights must not be counted as this module's

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add up the experts of each token.

        hidden_states: [tokens, hidden].  top_k_index, top_k_weights: [tokens, k], which experts
        and how much of each.
        """
        total = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == index)
            out = self[index](hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total

    def fuse(self) -> nn.Module:
        """Return the module that this one was made of, with the weights as they are now."""
        (fused,) = self.emptied
        gates, ups, downs = (
            [expert.get_parameter(f"{layer}_proj.weight").detach() for expert in self]
            for layer in ("gate", "up", "down")
        )
        both = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        for name, matrices in zip(FUSED, (both, downs), strict=True):
            setattr(fused, name, nn.Parameter(torch.stack(matrices)))
        return fused


def split_experts(model: nn.Module) -> None:
    """Put linear layers in the place of all fused experts that this module knows.

    These are modules with nothing but gate_up_proj [experts, 2 * inner, hidden] and down_proj
    [experts, hidden, inner] that compute down(act_fn(gate) * up), as Mixtral's; others stay.
    """
    for name, module in list(model.named_modules()):
        if _is_fused(module):
            model.set_submodule(name, SeparateExperts(module))


def fuse_experts(model: nn.Module) -> None:
    """Undo `split_experts`, one module at a time."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SeparateExperts):
            model.set_submodule(name, module.fuse())


Routes = dict[str, dict[str, Any]]  # name of experts -> which of them take each token, and how much


@contextmanager
def noting_routes(block: nn.Module) -> Iterator[Routes]:
    """Note where the experts of a block are sent tokens, as long as this is open."""
    found: Routes = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], keyword: dict[str, Any]) -> None:
            found[name] = {key: _named(args, keyword)[key] for key in ARGUMENTS[1:]}

        return hook

    with _hooked(block, note):
        yield found


@contextmanager
def following_routes(block: nn.Module, routes: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Send tokens to the same experts as was noted of another block, as long as this is open."""

    def lead(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], keyword: dict[str, Any]) -> Any:
            return (), {**_named(args, keyword), **routes[name]}

        return hook

    with _hooked(block, lead):
        yield


@contextmanager
def _hooked(block: nn.Module, hook: Any) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in block.named_modules()
        if isinstance(module, SeparateExperts)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(args: tuple[Any, ...], keyword: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(ARGUMENTS, args, strict=False)), **keyword}


@dataclass(frozen=True)
class ExpertPlace:
    """Where a layer stands in a list of experts: the list's name, the expert, the layer in it."""

    experts: str
    index: int
    layer: str

    def of(self, index: int) -> str:
        """Return the name of the same layer of another expert."""
        return f"{self.experts}.{index}.{self.layer}"


def expert_lists(block: nn.Module) -> dict[str, nn.ModuleList]:
    """Return name -> list of experts of a block: split ones, and lists with a router beside them.

    A router is known by what it is: a module beside the list whose only matrix has one row for each
    expert.
    """
    return {
        _join(name, child): experts
        for name, parent in block.named_modules()
        for child, experts in parent.named_children()
        if isinstance(experts, nn.ModuleList)
        and (
            isinstance(experts, SeparateExperts)
            or (len(experts) > 1 and _gates(parent, experts, len(experts)))
        )
    }


def unrouted_experts(block: nn.Module) -> list[str]:
    """Return the lists of experts of which it is not known where tokens are sent."""
    lists = expert_lists(block)
    return [name for name, experts in lists.items() if not isinstance(experts, SeparateExperts)]


def router_weights(block: nn.Module) -> set[str]:
    """Return the names of the matrices that weigh experts; they stay in 16 bits.

    They are a few thousandths of a block, and an error in them sends a token to another expert:
    routers (see `expert_lists`), and gates of a shared expert, whose only matrix is a single row.
    """
    found = set()
    for name, experts in expert_lists(block).items():
        above = name.rpartition(".")[0]
        parent = block.get_submodule(above)
        for rows in (len(experts), 1):
            found |= {_join(above, gate) for gate in _gates(parent, experts, rows)}
    return found


def place_among_experts(name: str, lists: Iterable[str]) -> ExpertPlace | None:
    """Return where a layer stands among a block's lists of experts, None for one beside them."""
    for experts in lists:
        if name.startswith(f"{experts}."):
            index, _, layer = name.removeprefix(f"{experts}.").partition(".")
            return ExpertPlace(experts, int(index), layer)
    return None


def _gates(parent: nn.Module, experts: nn.ModuleList, rows: int) -> set[str]:
    """Return the names, inside `parent`, of modules' only matrices with so many rows.

    Columns: as many as an expert takes.
    """
    widths = {matrix.shape[1] for matrix in experts[0].parameters() if matrix.ndim == 2}
    found = set()
    for child, module in parent.named_children():
        if module is experts:
            continue
        matrices = [(key, value) for key, value in module.named_parameters() if value.ndim > 1]
        if len(matrices) == 1:
            key, matrix = matrices[0]
            if matrix.ndim == 2 and matrix.shape[0] == rows and matrix.shape[1] in widths:
                found.add(f"{child}.{key}")
    return found


def _is_fused(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    if set(own) != set(FUSED) or not hasattr(module, "act_fn"):
        return False
    gate_up, down = (own[name] for name in FUSED)
    if gate_up.ndim != 3 or tuple(down.shape) != (
        len(gate_up),
        gate_up.shape[2],
        gate_up.shape[1] // 2,
    ):
        return False
    takes = tuple(inspect.signature(module.forward).parameters)
    beside = getattr(module, "has_post_expert_norm", False)
    return takes == ARGUMENTS and not beside and _gates_plainly(module)


def _gates_plainly(module: nn.Module) -> bool:
    """Tell whether a fused module's own gate, if any, is act_fn(first half) * second half."""
    gate, act_fn = getattr(module, "_apply_gate", None), module.get_submodule("act_fn")
    sample = torch.tensor([-1e3, -1.0, 0.5, 1e3, 2.0, -1e3, 1e3, 3.0], device="cpu")
    first, second = sample.chunk(2)
    return gate is None or torch.equal(gate(sample), act_fn(first) * second)


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def _join(name: str, child: str) -> str:
    return f"{name}.{child}".lstrip(".")
