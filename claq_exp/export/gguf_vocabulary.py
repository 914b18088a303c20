"""A tokenizer as GGUF files describe it: SentencePiece-like BPE, or byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claq_exp.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # types of tokens
SPACE = "▁"
CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # how text is split before merges -> llama.cpp's name of it
    CASELESS + r"\p{N}{1,3}" + REST: "llama-bpe",
    CASELESS + r"\p{N}" + REST: "qwen2",
}
ENDS = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    model: `llama` or `gpt2`.  pre: how a byte-level one splits text.  merges: best first.
    special: which of `ENDS` -> id.  adds: whether a text gets its `bos` and `eos` by itself.
    prefix: whether a text gets a space in front.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    special: Mapping[str, int]
    adds: Mapping[str, bool]
    prefix: bool
    template: str | None

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the fields of the file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.model == "llama":
            writer.add_token_scores(self._scores())
            writer.add_add_space_prefix(self.prefix)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges([" ".join(pair) for pair in self.merges])
        for end, add in zip(
            ENDS,
            (
                writer.add_bos_token_id,
                writer.add_eos_token_id,
                writer.add_unk_token_id,
                writer.add_pad_token_id,
            ),
            strict=True,
        ):
            if end in self.special:
                add(self.special[end])
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.template:
            writer.add_chat_template(self.template)

    def _scores(self) -> list[float]:
        """Return the score of each token: of two merges that can be done, the higher is done.

        The score is the rank of the first merge that makes the token; single characters, which no
        merge makes, come after all.
        """
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(self.merges):
            ranks.setdefault("".join(pair), rank)
        last = len(self.merges)
        return [
            -float(ranks.get(token, last + index)) if kind == NORMAL else 0.0
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
        ]


def read_vocabulary(folder: Path, size: int, *, trust_remote_code: bool = False) -> Vocabulary:
    """Read the tokenizer in a folder.  size: rows of the embedding; missing tokens are padding.

    Raises ConfigError for a tokenizer that GGUF has no name for.
    """
    from claq_exp.models.load import load_tokenizer

    tokenizer: Any = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    try:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
    except AttributeError as error:
        raise _unknown(f"{type(tokenizer).__name__} has no tokenizer.json") from error
    own = described["model"]
    if own["type"] != "BPE":
        raise _unknown(f"it is {own['type']}, not BPE")
    if not own["merges"]:
        raise _unknown("it has no merges")
    model = "llama" if own.get("byte_fallback") else "gpt2"
    pre = "default" if model == "llama" else _splitting(described["pre_tokenizer"])
    tokens, types = _tokens(described, size)
    ids = {end: getattr(tokenizer, f"{end}_token_id", None) for end in ENDS}
    around = tokenizer("a").input_ids
    first = tokenizer.convert_ids_to_tokens(around[int(around[0] == ids["bos"])])
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[_pair(merge) for merge in own["merges"]],
        special={end: id_ for end, id_ in ids.items() if id_ is not None},
        adds={
            "bos": len(around) > 1 and around[0] == ids["bos"],
            "eos": len(around) > 1 and around[-1] == ids["eos"],
        },
        prefix=first.startswith(SPACE),
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _tokens(described: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return all tokens by their ids, and their types."""
    own = described["model"]
    found: dict[int, tuple[str, int]] = {
        id_: (token, BYTE if own.get("byte_fallback") and _is_byte(token) else NORMAL)
        for token, id_ in own["vocab"].items()
    }
    for added in described["added_tokens"]:
        kind = CONTROL if added["special"] else USER
        unknown = added["content"] == own.get("unk_token")
        found[added["id"]] = added["content"], UNKNOWN if unknown else kind
    if max(found) >= size:
        raise ConfigError(
            f"format=gguf: the tokenizer has the token {max(found)}, the embedding {size} rows; "
            "use format=dense"
        )
    padded = [found.get(id_, (f"[PAD{id_}]", UNUSED)) for id_ in range(size)]
    return [token for token, _ in padded], [kind for _, kind in padded]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Return both parts of a merge, which older files write as one text."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _is_byte(token: str) -> bool:
    return len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")


def _splitting(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text before merges."""
    parts = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    if kinds[-1:] != ["ByteLevel"] or parts[-1]["add_prefix_space"]:
        raise _unknown(f"it splits text by {kinds}")
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1]["use_regex"]:
        pattern = parts[0]["pattern"].get("Regex")
        if pattern in SPLITS and parts[0]["behavior"] == "Isolated":
            return SPLITS[pattern]
    raise _unknown("llama.cpp's name for how it splits text is not known here")


def _unknown(why: str) -> ConfigError:
    return ConfigError(
        f"format=gguf cannot write this tokenizer ({why}); use format=dense and llama.cpp's own "
        "convert_hf_to_gguf.py"
    )
