"""The original of the block at hand, run beside the block that is being quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from claq_exp.errors import ConfigError
from claq_exp.models.blocks import BlockInputs, feed
from claq_exp.models.experts import following_routes, noting_routes, unrouted_experts
from claq_exp.models.overlay import Overlay
from claq_exp.models.stream import BlockedModel

Sink = Callable[[Tensor], None]


@dataclass(frozen=True)
class TeacherBlock:
    """A copy of an original block, and the hidden states that enter it in the original model.

    module: holds weights of its own, for the model's block is quantized meanwhile.
    inputs: with the teacher's hidden states of this rank's batches.
    overlay, path: of the model and of the block: what the student's inputs were divided by.
    """

    module: nn.Module
    inputs: BlockInputs
    overlay: Overlay
    path: str

    @staticmethod
    def of(model: BlockedModel, index: int, inputs: BlockInputs) -> TeacherBlock:
        """Copy a block that nothing was changed of yet.

        Raises ConfigError as `check_routes`.
        """
        path = f"{model.path}.{index}"
        with model.block(index, original=True) as module:
            check_routes(module, path)
            return TeacherBlock(copy.deepcopy(module), inputs, model.overlay, path)

    def entering(
        self, student: nn.Module, inputs: BlockInputs, batch: int, names: Sequence[str]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Run a batch through both blocks; return what enters linears in the student and here.

        student, inputs: the block that is being quantized, and what enters it.  names: of linears;
        a layer of an expert that the student sends no token to is left out.  The teacher's experts
        get the tokens that the student's got, so that rows belong together.
        """
        own: dict[str, Tensor] = {}
        theirs: dict[str, Tensor] = {}
        with noting_routes(student) as routes:
            feed(student, inputs, batch, _sinks(student, names, theirs))
        with following_routes(self.module, routes):
            feed(self.module, self.inputs, batch, _sinks(self.module, names, own))
        return {name: (theirs[name], self._rewritten(name, own[name])) for name in theirs}

    def _rewritten(self, name: str, entering: Tensor) -> Tensor:
        """Return what would enter a linear if the teacher's norms were rewritten as the student's.

        A rewrite multiplies the columns of a matrix and divides what enters it.
        """
        factor = self.overlay.factor(f"{self.path}.{name}.weight")
        return entering if factor is None else entering / factor.reshape(-1).to(entering.device)


def check_routes(block: nn.Module, path: str) -> None:
    """Raise ConfigError for experts of which it is not known which tokens they get."""
    for name in unrouted_experts(block):
        raise ConfigError(
            "an asymmetric solver compares inputs token by token, and which tokens go to each of "
            f"{path}.{name} is not known; set solver.asymmetric=0"
        )


def _sinks(
    block: nn.Module, names: Sequence[str], found: dict[str, Tensor]
) -> dict[nn.Module, Sink]:
    def note(name: str) -> Sink:
        return lambda entering: found.__setitem__(name, entering)

    return {block.get_submodule(name): note(name) for name in names}
