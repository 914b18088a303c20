"""How the ends of a model are quantized: the embedding, where tokens come in, and the head.

Both are matrices [vocabulary, width] with a row for each token.  A tied model stores one matrix
that serves as both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from claq_exp.errors import ConfigError, check_choice
from claq_exp.payload.stored import MAX_BITS
from claq_exp.quantize.codebook import Codebook, KMeans, Uniform
from claq_exp.quantize.precision.fixed import Fixed
from claq_exp.quantize.precision.none import NoPrecision
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation.none import NoReservation
from claq_exp.quantize.solver import Gptq, Nearest, Solver

EQUAL, FREQUENCY = "equal", "frequency"


class EndRule(Protocol):
    """A rule for an embedding or a head.

    lookup, rows, required: see `KMeansEnd`.
    """

    lookup: float = 0.0
    rows: str = EQUAL
    required: bool = True

    def recipe(self) -> Recipe | None:
        """Return how the matrix is quantized; None: it stays as it is.

        With `NoPrecision` the widths of a head are decided with those of the layers of blocks.
        """

    def looked_up(self) -> Recipe | None:
        """Return how an embedding is quantized that is no head: always rounded to nearest."""
        recipe = self.recipe()
        return None if recipe is None else replace(recipe, solver=Nearest())

    def copies(self) -> bool:
        """Tell whether a head takes the embedding's rule in place of this one."""
        return False


@dataclass(frozen=True)
class NoEnd(EndRule):
    """Leave the matrix in 16 bits."""

    def recipe(self) -> None:
        """Return None, see EndRule."""
        return


@dataclass(frozen=True)
class SameEnd(EndRule):
    """Quantize the head as the embedding: by its rule, or as the one matrix of a tied model."""

    def recipe(self) -> None:
        """Return None: the embedding's rule says it."""
        return

    def copies(self) -> bool:
        """Tell that it does, see EndRule."""
        return True


@dataclass(frozen=True)
class KMeansEnd(EndRule):
    """A k-means codebook for each column of the matrix, over all tokens.

    With a row for each token the codebooks cost next to nothing: 16 * 2**bits bits a column.

    bits: of a code, 1 to 8.
    solver: gptq spreads the error of a column over later ones, by the Hessian of what enters the
        head; nearest does not.  An embedding that is no head is looked up, and its errors do not
        depend on each other: it is always rounded to nearest.
    lookup: what a lookup counts in a matrix that is the head too, of a tied model: this share of
        the mean diagonal is added to the diagonal of the Hessian, for a lookup's Hessian is the
        identity.
    rows: what an error in a row weighs when codebooks are fitted.  frequency: as often as its token
        occurs in the calibration text, and a little for all; equal: the same for all.
    required: refuse a model whose embedding or head cannot be packed; else both stay in 16 bits.
    """

    bits: int = 8
    solver: str = "gptq"
    lookup: float = 0.0
    rows: str = FREQUENCY
    required: bool = True

    def __post_init__(self) -> None:
        _check(self.bits, self.solver, self.lookup)
        check_choice("rows", self.rows, (FREQUENCY, EQUAL))

    def recipe(self) -> Recipe:
        """Return how the matrix is quantized."""
        return _recipe(KMeans(), self.bits, self.solver)


@dataclass(frozen=True)
class UniformEnd(EndRule):
    """A uniform grid for each row, or each group of columns of a row.

    bits, solver, lookup, required: as of `KMeansEnd`.
    group_size: columns that share a grid; 0: the whole row.
    """

    bits: int = 8
    solver: str = "gptq"
    lookup: float = 0.0
    group_size: int = 0
    required: bool = True

    def __post_init__(self) -> None:
        _check(self.bits, self.solver, self.lookup)
        if self.group_size < 0:
            raise ConfigError(
                f"group_size is {self.group_size}; give 0 for whole rows or a positive number"
            )

    def recipe(self) -> Recipe:
        """Return how the matrix is quantized."""
        return _recipe(Uniform(group_size=self.group_size), self.bits, self.solver)


@dataclass(frozen=True)
class AllocatedEnd(EndRule):
    """A k-means codebook for each column, whose width an allocation over the whole model decides.

    The columns of a head, or of the one matrix of a tied model, compete with the columns of the
    layers of blocks for the bits of the whole checkpoint.

    solver, rows: as of `KMeansEnd`.
    looked_up_bits: of a code of an embedding that is no head; no logit tells what it is worth.
    """

    solver: str = "gptq"
    rows: str = FREQUENCY
    looked_up_bits: int = 8

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, RULES)
        check_choice("rows", self.rows, (FREQUENCY, EQUAL))
        _check_bits("looked_up_bits", self.looked_up_bits)

    def recipe(self) -> Recipe:
        """Return how the matrix is quantized."""
        return replace(self.looked_up(), precision=NoPrecision(), solver=_solver(self.solver))

    def looked_up(self) -> Recipe:
        """Return how an embedding is quantized that is no head."""
        return _recipe(KMeans(), self.looked_up_bits, "nearest")


EMBEDDING: dict[str, type] = {
    "none": NoEnd,
    "kmeans": KMeansEnd,
    "uniform": UniformEnd,
    "allocated": AllocatedEnd,
}
HEAD: dict[str, type] = {"same": SameEnd, **EMBEDDING}
MOST_LOOKUP = 100
RULES = ("gptq", "nearest")  # solvers that an end can have


def _check(bits: int, solver: str, lookup: float) -> None:
    _check_bits("bits", bits)
    check_choice("solver", solver, RULES)
    if not 0 <= lookup <= MOST_LOOKUP:
        raise ConfigError(
            f"lookup is {lookup}; give a share of the mean diagonal from 0 to {MOST_LOOKUP}"
        )


def _check_bits(name: str, bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"{name} is {bits}; give a whole number from 1 to {MAX_BITS}")


def _solver(name: str) -> Solver:
    return Gptq() if name == "gptq" else Nearest()


def _recipe(codebook: Codebook, bits: int, solver: str) -> Recipe:
    return Recipe(codebook, Fixed(bits), NoReservation(), _solver(solver))
