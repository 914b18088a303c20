"""The ends of a model: its embedding, where tokens come in, and its head, where logits come out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from claq_exp.errors import ConfigError
from claq_exp.models.skeleton import tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
ADVICE = "; set embedding=none"
KEPT = "; embedding and head stay in 16 bits"
NUMBERED = re.compile(r"\.\d+\.")  # in the name of a layer of a block: blocks stand in a list


class EndsError(ConfigError):
    """The embedding and the head of a model cannot be packed."""

    @property
    def reason(self) -> str:
        """Say why, without what to do."""
        return str(self).removesuffix(ADVICE)


@dataclass(frozen=True)
class Ends:
    """Names of the modules that hold an embedding [vocabulary, width] and a head.

    tied: the head has no matrix of its own, but the embedding's.
    """

    embedding: str
    head: str
    tied: bool


def find_ends(model: PreTrainedModel) -> Ends:
    """Return the ends of a model.

    Raises EndsError for one whose embedding is no table with a row for each token and nothing
    else, whose head is no linear layer, or whose embedding is tied to anything but the head.
    """
    about = f"{type(model).__name__} ({model.config.model_type})"
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, nn.Embedding) or set(table.state_dict()) != {"weight"}:
        raise EndsError(
            f"the embedding of {about} is a {type(table).__name__}, no plain table with a row for "
            f"each token{ADVICE}"
        )
    if not isinstance(head, nn.Linear):
        raise EndsError(f"the head of {about} is a {type(head).__name__}, no linear layer{ADVICE}")
    names = {module: name for name, module in model.named_modules()}
    ends = Ends(names[table], names[head], tied=False)
    source, own = f"{ends.embedding}.weight", f"{ends.head}.weight"
    tied = tied_names(model)
    shared = {name for name, other in tied.items() if source in (name, other)}
    shared |= {tied[name] for name in shared}
    if others := sorted(shared - {source, own}):
        raise EndsError(
            f"the embedding of {about} is also {others[0]}, and only a head may share it{ADVICE}"
        )
    if numbered := [name for name in (ends.embedding, ends.head) if not is_end(name)]:
        raise EndsError(f"{about} keeps {numbered[0]} in a list of modules{ADVICE}")
    if own in shared and tied.get(source) == own:
        raise EndsError(f"{about} stores its head in place of its embedding{ADVICE}")
    return Ends(ends.embedding, ends.head, tied=own in shared)


def is_end(name: str) -> bool:
    """Tell an embedding or head, by its name, from the layers of blocks."""
    return NUMBERED.search(f".{name}.") is None


def in_blocks(layers: Mapping[str, T]) -> dict[str, T]:
    """Return the layers of blocks, without embedding and head."""
    return {name: layer for name, layer in layers.items() if not is_end(name)}
