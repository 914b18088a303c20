"""The bits of a checkpoint that others made, from the headers of its files alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from claq_exp.errors import CheckpointError
from claq_exp.foreign.found import Foreign
from claq_exp.foreign.headers import Headers, Stored, read_headers
from claq_exp.foreign.owners import Owners, find_owners, model_config
from claq_exp.foreign.purposes import (
    BLOCKS,
    CODES,
    DENSE,
    FLOAT_BITS,
    OF_LINEARS,
    UNKNOWN,
    UNQUANTIZED,
    code_bits,
    purpose,
    type_bits,
)

OTHER, UNATTRIBUTED = "other", "unattributed"
NAMED = 3  # tensors that a message names


@dataclass(frozen=True)
class LinearBits:
    """What is stored for a linear layer of a decoder block; its bias is not counted.

    storage: suffix and type of each tensor.  nominal: bits of a code as the owner states them; of
    a layer that is not quantized the bits of its numbers.
    """

    name: str
    rows: int
    columns: int
    storage: tuple[str, ...]
    nominal: float
    stored: int

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return self.rows * self.columns

    @property
    def bits(self) -> float:
        """All stored bits for each weight."""
        return self.stored / self.weights

    def row(self) -> dict[str, Any]:
        """Return block (0 where none is named), name and bits, for pictures."""
        number = re.search(r"\.(\d+)\.", self.name)
        block = int(number[1]) if number else 0
        return {"block": block, "name": self.name, "bits": self.bits, "reserved_percent": 0.0}


@dataclass(frozen=True)
class ForeignLedger:
    """The bits of a checkpoint by purpose; they add up to the bytes of its files.

    accounts: purpose -> bits: those of `OF_LINEARS`, embedding, head, unquantized (norms, biases,
    routers, other towers), unattributed, and other (headers, descriptions, padding).
    unattributed: tensors that no part of the model takes.  unknown: those of a linear layer whose
    purpose their names do not tell.  missing: linear layers that nothing is stored for.
    """

    of_linears: ClassVar[tuple[str, ...]] = OF_LINEARS
    headers: Headers
    accounts: Mapping[str, int]
    linears: tuple[LinearBits, ...]
    parameters: int
    model_type: str
    unattributed: tuple[str, ...]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all files that are counted."""
        return self.headers.bytes

    @cached_property
    def weights(self) -> int:
        """Number of weights in linear layers."""
        return sum(linear.weights for linear in self.linears)

    @property
    def nominal(self) -> float:
        """Bits of a code, as its owner states them, on average over the weights."""
        return sum(linear.nominal * linear.weights for linear in self.linears) / self.weights

    @property
    def linear(self) -> float:
        """All bits that are stored for the linear layers of blocks, for each of their weights."""
        return sum(self.accounts.get(account, 0) for account in OF_LINEARS) / self.weights

    @property
    def model(self) -> float:
        """All bits of the files for each parameter of the model."""
        return 8 * self.bytes / self.parameters

    def main_kind(self) -> str:
        """Return the type that most weights of linear layers are stored in, e.g. `IQ4_NL`."""
        counts: Counter[str] = Counter()
        for linear in self.linears:
            counts[linear.storage[0].rpartition(" ")[2]] += linear.weights
        return counts.most_common(1)[0][0]

    def notes(self) -> list[str]:
        """Return a sentence for each thing that makes these bits less certain."""
        told = {
            "tensors that no part of the model takes": self.unattributed,
            "tensors of linear layers whose purpose is not known": self.unknown,
            "linear layers that nothing is stored for, so that no bits count them": self.missing,
        }
        return [f"{what}: {_named(names)}" for what, names in told.items() if names]


def read_ledger(foreign: Foreign, *, trust_remote_code: bool = False) -> ForeignLedger:
    """Read what a checkpoint stores, and for what.

    Raises ConfigError for a folder without weights or of a model that transformers cannot make,
    CheckpointError for files that cannot be read or that store no linear layer of the model.
    """
    config = model_config(foreign, trust_remote_code=trust_remote_code)
    owners, headers = find_owners(foreign, config), read_headers(foreign)
    accounts: Counter[str] = Counter({OTHER: 8 * headers.beside})
    parts: dict[str, list[tuple[Stored, str, str]]] = {}
    unattributed, unknown = [], []
    for stored in headers.tensors:
        owner, suffix = owners.owner(stored.name)
        account = owners.ends.get(owner, UNQUANTIZED if owner else UNATTRIBUTED)
        if owner in owners.linears:
            account = purpose(stored, suffix, gguf=foreign.is_gguf)
            parts.setdefault(owner, []).append((stored, suffix, account))
        accounts[account] += 8 * stored.bytes
        if account == UNATTRIBUTED:
            unattributed.append(stored.name)
        if account == UNKNOWN:
            unknown.append(stored.name)
    linears = [
        _linear(foreign, owners, name, found)
        for name, found in parts.items()
        if any(account in (CODES, BLOCKS, DENSE, UNKNOWN) for *_, account in found)
    ]
    if not linears:
        raise CheckpointError(
            f"{foreign.path}: none of its {len(headers.tensors)} tensors is of a linear layer of "
            f"the model, e.g. {_named([tensor.name for tensor in headers.tensors])}"
        )
    there = {linear.name for linear in linears}
    return ForeignLedger(
        headers,
        dict(accounts),
        tuple(sorted(linears, key=lambda linear: _natural(linear.name))),
        owners.parameters,
        str(config.model_type),
        tuple(unattributed),
        tuple(unknown),
        tuple(name for name in owners.linears if name not in there),
    )


def check_whole(foreign: Foreign, ledger: ForeignLedger) -> None:
    """Raise CheckpointError where layers are missing, which transformers would make up."""
    if ledger.missing:
        raise CheckpointError(
            f"{foreign.path} stores nothing for {len(ledger.missing)} linear layers, e.g. "
            f"{ledger.missing[0]}; if it is one of several files, join them (gguf-split --merge "
            "of llama.cpp)"
        )


def _linear(
    foreign: Foreign, owners: Owners, name: str, found: list[tuple[Stored, str, str]]
) -> LinearBits:
    rows, columns = owners.linears[name]
    counted = [(stored, suffix, a) for stored, suffix, a in found if a in OF_LINEARS]
    storage = tuple(f"{suffix} {stored.kind}" for stored, suffix, _ in counted)
    bits = {a: 8 * sum(s.bytes for s, _, of in counted if of == a) for _, _, a in counted}
    weights = rows * columns
    first = counted[0][0].kind
    if DENSE in bits:
        nominal = next(float(FLOAT_BITS[s.kind]) for s, _, a in counted if a == DENSE)
    elif BLOCKS in bits:
        nominal = type_bits(first) or bits[BLOCKS] / weights
    else:
        beside = next((s.code_bits for s, _, a in counted if a == CODES), None)
        stated = beside or code_bits(foreign.quantization, name)
        nominal = stated or bits.get(CODES, 0) / weights
    return LinearBits(name, rows, columns, storage, nominal, sum(bits.values()))


def _named(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
