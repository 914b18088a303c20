"""Fits a recipe to a budget of bits per weight that must not be exceeded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from claq_exp.errors import ConfigError, one_of
from claq_exp.payload.base import Layout
from claq_exp.quantize.recipe import Recipe, planned_layouts
from claq_exp.quantize.statistics import EqualColumns

LINEAR, NOMINAL, MODEL = "linear", "nominal", "model"
KINDS = (LINEAR, NOMINAL, MODEL)
MOST = 16.0  # bits of a weight that is not quantized
STEPS = 40  # halvings of a range of target bits

Overhead = Callable[[Mapping[str, Layout]], float]


@dataclass
class BudgetConfig:
    """What a whole model may take, in place of the precision's own bits.

    bits: bits per weight, never exceeded; null: the precision decides.
    kind: what they count: linear, everything that is stored of the layers of blocks (codebooks,
        maps, reserved values and positions, header); nominal, as papers print; model, the whole
        checkpoint over all parameters.
    """

    bits: float | None = None
    kind: str = LINEAR

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(one_of("budget.kind", self.kind, KINDS))
        if self.bits is not None and not 0 < self.bits < 16:
            raise ConfigError(f"budget.bits is {self.bits}; give bits per weight between 0 and 16")

    def for_layers(
        self, parameters: int, beside: float, shapes: Mapping[str, tuple[int, int]]
    ) -> BudgetConfig:
        """Return the budget of the layers of blocks: of a model's bits, what is left for them.

        parameters: of the model.  beside: bits of everything but those layers and headers.
        shapes: name -> (out, in) of those layers.  Raises ConfigError where nothing is left.
        """
        if self.bits is None or self.kind != MODEL:
            return self
        weights = sum(rows * columns for rows, columns in shapes.values())
        left = (self.bits * parameters - beside) / weights
        if left <= 0:
            raise ConfigError(
                f"budget.bits={self.bits} model bits cannot be met: all that is not in layers of "
                f"blocks takes {beside / parameters:.3f} alone; quantize the embedding too "
                "(embedding=kmeans), or give more"
            )
        return BudgetConfig(min(left, math.nextafter(MOST, 0.0)), LINEAR)


def fit_budget(
    recipe: Recipe, budget: BudgetConfig, shapes: Mapping[str, tuple[int, int]], overhead: Overhead
) -> Recipe:
    """Return the recipe with the largest precision that the budget allows.

    The reservation keeps its own ratio; the precision gets the rest.  Widths that an allocation
    decides are left to it.
    shapes: name -> (out, in) of every matrix.  overhead: bits that a checkpoint with these layouts
    takes beside them; counted in linear budgets.
    Raises ConfigError with the range that can be reached.
    """
    if budget.bits is None or recipe.allocated:
        return recipe
    model = _Model(budget.kind == NOMINAL, shapes, overhead)
    best: Recipe | None = None
    reached: list[float] = []
    for low, high, at in _ranges(recipe):
        ends = model.bits(at(low)), model.bits(at(high))
        reached += ends
        if ends[0] <= budget.bits:
            found = at(_largest(low, high, lambda bits, at=at: model.bits(at(bits)), budget.bits))  # type: ignore[misc]
            if best is None or _mean(found) > _mean(best):
                best = found
    if best is None:
        raise ConfigError(
            f"budget.bits={budget.bits} {budget.kind} bits cannot be met; this recipe reaches "
            f"from {min(reached):.3f} to {max(reached):.3f} on this model"
        )
    return best


@dataclass(frozen=True)
class _Model:
    """Counts the bits per weight that recipes take on the matrices of a model."""

    nominal: bool
    shapes: Mapping[str, tuple[int, int]]
    overhead: Overhead

    def bits(self, recipe: Recipe) -> float:
        layouts = planned_layouts(recipe, self.shapes)
        weights = sum(layout.weights for layout in layouts.values())
        if self.nominal:
            stored = sum(layout.nominal_bits() * layout.weights for layout in layouts.values())
        else:
            stored = sum(layout.ledger().total for layout in layouts.values())
            stored += self.overhead(layouts)
        return stored / weights


def _ranges(recipe: Recipe) -> Iterator[tuple[float, float, Callable[[float], Recipe]]]:
    """Yield (lowest, highest, recipe at so many bits) for each range without a jump."""
    precision = recipe.precision
    ranges = precision.ranges()
    if not ranges:
        raise ConfigError(
            f"{type(precision).__name__} cannot follow budget.bits; set its own bits, or choose "
            "another precision"
        )
    for low, high, at in ranges:
        yield low, high, lambda bits, at=at: replace(recipe, precision=at(bits))  # type: ignore[misc]


def _largest(low: float, high: float, bits: Callable[[float], float], limit: float) -> float:
    """Return the largest target in [low, high] whose bits stay within the limit; low's do."""
    if bits(high) <= limit:
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        if bits(middle) <= limit:
            low = middle
        else:
            high = middle
    return low


def _mean(recipe: Recipe) -> float:
    return float(recipe.precision.plan(EqualColumns(1, 1024)).float().mean())
