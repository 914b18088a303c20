"""What every stored form of a matrix can do: the interface that the rest of the package uses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from claq_exp.errors import CheckpointError, ConfigError, NumericalError
from claq_exp.payload.operand import Operand
from claq_exp.payload.stored import HALF, STORED_DTYPES, Ledger, StoredTensor

MOST = 2**48  # rows, columns or entries of a matrix


class Layout(ABC):
    """Everything about a stored matrix but its numbers; kept as JSON beside the tensors.

    Kinds are frozen dataclasses: their fields are the keys of their JSON, beside `kind`.

    rows, columns: outputs and inputs.
    reserved: float16 entries in the whole matrix; most_reserved: in its fullest column.
    """

    kind: ClassVar[str]
    rows: int
    columns: int
    reserved: int = 0
    most_reserved: int = 0

    def __post_init__(self) -> None:
        """Raise CheckpointError for sizes that no matrix has."""
        whole_numbers(self.rows, self.columns, self.reserved, self.most_reserved)
        if self.rows < 1 or self.most_reserved > self.rows or self.reserved > self.weights:
            raise CheckpointError(f"{self.rows} rows cannot hold {self.reserved} reserved entries")
        if (self.reserved > 0) != (self.most_reserved > 0):
            raise CheckpointError(
                f"{self.reserved} reserved entries do not fit {self.most_reserved} in one column"
            )
        if self.columns < 1:
            raise CheckpointError("a matrix has at least one column")

    @abstractmethod
    def widths(self) -> dict[int, int]:
        """Return code width in bits -> how many columns have it, in ascending order."""

    @abstractmethod
    def stored_tensors(self) -> dict[str, StoredTensor]:
        """Return suffix -> tensor for everything that is stored of this matrix."""

    @abstractmethod
    def describe(self) -> str:
        """Return what codes stand for in a few words, e.g. `column codebooks`."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.columns

    def ledger(self) -> Ledger:
        """Return the bits that the stored tensors take, padding included."""
        accounts: dict[str, int] = {}
        for tensor in self.stored_tensors().values():
            accounts[tensor.account] = accounts.get(tensor.account, 0) + tensor.bits
        return Ledger(**accounts)

    def nominal_bits(self) -> float:
        """Return the bits per weight that papers print.

        Codes, and 16 bits in place of a code for each reserved entry, as in CLAQ's own r * (16 - b)
        accounting; codebooks, positions, column maps and padding are left out.
        """
        mean = sum(width * columns for width, columns in self.widths().items()) / self.columns
        return mean + self.reserved / self.weights * (HALF - mean)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError unless tensors are those that the layout asks for.

        Names, dtypes, shapes, finite numbers, and padding bits that are 0.  Takes no memory for
        sizes that the tensors do not have.
        """
        expected = self.stored_tensors()
        if set(tensors) != set(expected):
            raise CheckpointError(
                f"stored tensors {sorted(tensors)} where the layout asks for {sorted(expected)}"
            )
        for suffix, spec in expected.items():
            tensor = tensors[suffix]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != STORED_DTYPES[spec.dtype]:
                raise CheckpointError(
                    f"{suffix} is {tensor.dtype} {tuple(tensor.shape)}, the layout asks for "
                    f"{spec.dtype} {spec.shape}"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{suffix} holds a value that is not finite")
            count, width = spec.packed or (0, 0)
            used = count * width % 8
            if used and bool((tensor[..., -1] >> used).any()):
                raise CheckpointError(f"{suffix} has padding bits that are not 0")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: `kind`, and the keys of this kind."""
        assert is_dataclass(self)
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read `to_json` back, without `kind`.  Raises CheckpointError on anything else."""
        assert is_dataclass(cls)
        keys = {field.name for field in fields(cls)}
        if set(data) != keys:
            raise CheckpointError(f"the layout of a {cls.kind} must have the keys {sorted(keys)}")
        try:
            return cls(**cls._fields(data))
        except (TypeError, ValueError, KeyError, AttributeError, ConfigError) as error:
            raise CheckpointError(
                f"layout of a quantized weight is not readable: {error}"
            ) from error

    @classmethod
    def _fields(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that JSON data give; may raise what `from_json` turns into one line."""
        return dict(data)


class Payload(ABC):
    """A matrix in one stored form: a frozen dataclass of tensors, of the kind `kind`.

    layout_class: how it is stored.
    """

    kind: ClassVar[str]
    layout_class: ClassVar[type[Layout]]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @abstractmethod
    def layout(self) -> Layout:
        """Describe how this matrix is stored."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the matrix: [out, in] float32, or float64 where a float leaf is.

        On the device of the payload.  Differentiable in the tensors of `trainable`; the same bits
        every time on a CPU.
        """

    @abstractmethod
    def pack(self) -> dict[str, Tensor]:
        """Return the stored tensors by suffix, as `layout().stored_tensors()` says.

        The float tensors must be such as can be stored, as those of `rebuilt` are.
        """

    @classmethod
    @abstractmethod
    def unpack(cls, layout: Any, tensors: Mapping[str, Tensor]) -> Self:
        """Rebuild a matrix, on the CPU, from its stored tensors on any device.

        Raises CheckpointError where they do not fit the layout.
        """

    @classmethod
    @abstractmethod
    def operand(cls, layout: Any, tensors: Mapping[str, Tensor]) -> Operand:
        """Return the matrix as kernels read it, on the device of its codes; raises as `unpack`."""

    @classmethod
    def rows(cls, layout: Any, tensors: Mapping[str, Tensor], index: Tensor) -> Tensor:
        """Return some rows of the matrix: [n, in] float32, the same bits as of `dequantize`.

        index: [n] int64, on the device of the codes.  The others stay packed where a form can read
        single rows.  Raises as `unpack`, and IndexError for a row that is not there.
        """
        return cls.unpack(layout, tensors).dequantize()[index.cpu()].to(index.device)

    @classmethod
    def reserved_counts(cls, layout: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the reserved entries of every column, [in] int64; raises as `unpack`."""
        cls.unpack(layout, tensors)
        return torch.zeros(layout.columns, dtype=torch.int64)

    def ledger(self) -> Ledger:
        """Return the bits of everything that is stored of this matrix."""
        return self.layout().ledger()

    def trainable(self) -> dict[str, Tensor]:
        """Return the float tensors that `dequantize` is differentiable in, by name."""
        return {}

    def with_values(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, as they are.

        Raises KeyError for a name that is not there.
        """
        if unknown := set(values) - set(self.trainable()):
            raise KeyError(f"a {self.kind} has nothing to train named {sorted(unknown)}")
        return self

    def rebuilt(self, values: Mapping[str, Tensor]) -> Self:
        """Return the matrix with other numbers for some of `trainable`, rounded to what is stored.

        Raises NumericalError for numbers that cannot be stored.
        """
        return self.with_values({name: half(name, given) for name, given in values.items()})

    def finite(self) -> bool:
        """Tell whether all that is stored is finite."""
        return all(bool(torch.isfinite(leaf).all()) for leaf in self.trainable().values())

    def clamped(self) -> int:
        """Return how many weights are beyond float16 by their code, and are cut to its range."""
        return 0

    def to(self, device: torch.device | str) -> Self:
        """Return the matrix on another device."""
        moved: Self = moved_to(self, torch.device(device))
        return moved


def moved_to(value: Any, device: torch.device) -> Any:
    """Return tensors, and dataclasses and dicts of them, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved_to(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return replace(value, **{name: moved_to(item, device) for name, item in own.items()})
    return value


def half(name: str, values: Tensor) -> Tensor:
    """Round to float16.  Raises NumericalError where it cannot hold a number."""
    rounded = values.detach().to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise NumericalError(f"{name} holds a number that float16 cannot store")
    return rounded


def wide(values: Tensor) -> Tensor:
    """Return numbers to compute with: float64 as it is, anything else as float32."""
    return values if values.dtype == torch.float64 else values.float()


def whole_numbers(*counts: object) -> None:
    """Raise CheckpointError unless all are whole numbers of a possible size."""
    if any(type(count) is not int or not 0 <= count < MOST for count in counts):
        raise CheckpointError(f"the counts of a layout must be whole numbers, not {counts}")
