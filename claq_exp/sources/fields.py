"""Which field of a record or table is the text, and conversations that become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from claq_exp.errors import ConfigError, SourceError
from claq_exp.sources.content import Losses

Conversation = list[dict[str, Any]]  # messages with role and content, as chat templates take them
Writer = Callable[[Conversation], str]
BATCH = 1000  # rows of a table that are read at a time
SHOWN = 12  # fields in a message
STRINGS = ("string", "large_string", "string_view")
BYTES = ("binary", "large_binary")
MESSAGE_KEYS = (("role", "content"), ("from", "value"))  # the second: of ShareGPT
ROLES = {"human": "user", "gpt": "assistant"}
NAMES = {bool: "boolean", int: "number", float: "number", type(None): "null"}  # of JSON values


class _Column(Sequence[str]):
    """One field of a table, some rows at a time."""

    def __init__(self, values: Any, form: Callable[[Any], str] | None = None) -> None:
        self._values, self._form = values, form

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            values = self._values[number].to_pylist()
            return values if self._form is None else list(map(self._form, values))
        return self[number : number + 1][0]

    def __iter__(self) -> Any:
        for start in range(0, len(self), BATCH):
            yield from self[start : start + BATCH]


def table_documents(
    table: Any, field: str, where: str, losses: Losses, write: Writer | None
) -> Sequence[str]:
    """Return a field of a pyarrow table as documents, without those that are null.

    where: what messages name.  losses: gets the nulls.  write: makes a text of a conversation,
    where the field is to hold such.  Raises ConfigError with the fields and their types where it is
    none of them or no text.
    """
    fields = {own.name: _type_name(own.type) for own in table.schema}
    if field not in fields:
        raise ConfigError(
            f"{where} has no field '{field}'; it has: {_listed(fields)}{_hint(fields)}"
        )
    values = table.column(table.column_names.index(field))
    if values.null_count:
        losses.skipped += values.null_count
        values = values.drop_null()
    if str(values.type).startswith("dictionary"):
        values = values.cast(values.type.value_type)
    if str(values.type) in BYTES:
        with suppress(ValueError):  # those that are no UTF-8 stay bytes
            values = values.cast("string")
    if str(values.type) == "null":
        return []
    if write is not None and fields[field].startswith("list of {"):
        return _Column(values, lambda value: write(_conversation(value, where)))
    if write is not None or str(values.type) not in STRINGS:
        raise ConfigError(_unusable(where, field, fields, write))
    return _Column(values)


def record_document(
    record: Any, field: str, where: str, losses: Losses, write: Writer | None
) -> str | None:
    """Return the text of a record of JSON, or None where it is null.

    Arguments as in `table_documents`.  Raises SourceError with the fields where there is no text.
    """
    if not isinstance(record, dict):
        found = _value_name(record)
        raise SourceError(f"{where}: no JSON object with field '{field}', but a {found}")
    fields = {name: _value_name(value) for name, value in record.items()}
    if field not in fields:
        has = f"{_listed(fields)}{_hint(fields)}"
        raise SourceError(f"{where}: no JSON object with field '{field}'; it has: {has}")
    value = record[field]
    if value is None:
        losses.skipped += 1
        return None
    if write is not None and isinstance(value, list):
        return write(_conversation(value, where))
    if write is not None or not isinstance(value, str):
        raise SourceError(_unusable(where, field, fields, write))
    return value


def _conversation(value: list[Any], where: str) -> Conversation:
    """Return messages with role and content, as chat templates take them."""
    messages = []
    for own in value:
        parts = own.items() if isinstance(own, dict) else ()
        message = {key: part for key, part in parts if part is not None}
        if "from" in message and "role" not in message:
            role = message.pop("from")
            message = {"role": ROLES.get(role, role), "content": message.pop("value", "")}
        if "role" not in message:
            keys = " nor ".join(f"{{{', '.join(keys)}}}" for keys in MESSAGE_KEYS)
            raise SourceError(f"{where}: a message of a conversation is neither {keys}")
        messages.append(message)
    return messages


def _unusable(where: str, field: str, fields: Mapping[str, str], write: Writer | None) -> str:
    """Return the line about a field of the wrong type."""
    wanted = "text" if write is None else "conversation, which chat=true asks for,"
    has = f"{_listed(fields)}{_hint(fields)}"
    return f"{where}: field '{field}' is no {wanted} but {fields[field]}; there are: {has}"


def _hint(fields: Mapping[str, str]) -> str:
    """Return what to set where one of the fields is fit for it."""
    for name, kind in fields.items():
        if any(kind.startswith(f"list of {{{', '.join(keys)}") for keys in MESSAGE_KEYS):
            return f"; field={name} chat=true reads its conversations"
    strings = [name for name, kind in fields.items() if kind == "string"]
    return f"; set field, e.g. field={strings[0]}" if strings else ""


def _listed(fields: Mapping[str, str]) -> str:
    shown = [f"{name} ({kind})" for name, kind in list(fields.items())[:SHOWN]]
    more = [f"{len(fields) - SHOWN} more"] if len(fields) > SHOWN else []
    return ", ".join([*shown, *more]) or "none"


def _type_name(kind: Any) -> str:
    """Name a pyarrow type, as `_value_name` names values."""
    if hasattr(kind, "value_field"):  # a list of any form
        return f"list of {_type_name(kind.value_type)}"
    if str(kind).startswith("struct"):
        return f"{{{', '.join(kind.field(number).name for number in range(kind.num_fields))}}}"
    if str(kind).startswith("dictionary"):
        return _type_name(kind.value_type)
    return "string" if str(kind) in STRINGS else str(kind)


def _value_name(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(list(value)[:SHOWN])}}}"
    if isinstance(value, list):
        return f"list of {_value_name(value[0])}" if value else "list"
    return "string" if isinstance(value, str) else NAMES[type(value)]
