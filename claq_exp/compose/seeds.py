"""`seeds=0,1,2`: one word that runs every job once for each seed, and has tables merge them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from claq_exp.errors import ConfigError

KEY = "seeds"
EXAMPLE = "seeds=0,1,2 or seeds=range(0,8)"


def spread_seeds(words: Sequence[str]) -> tuple[list[str], tuple[int, ...]]:
    """Return words with `seed=0,1,2` in place of `seeds=0,1,2`, and those seeds.

    The seeds are empty where no word names them.  Raises ConfigError for seeds that cannot be read,
    that are there twice, and beside a word `seed=`.
    """
    asked = [word for word in words if _key(word) == KEY]
    if not asked:
        return list(words), ()
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)} do not go together; list all seeds in one word")
    if own := next((word for word in words if _key(word) == "seed"), None):
        raise ConfigError(f"{asked[0]} and {own} do not go together; leave out one")
    seeds = _read(asked[0])
    spread = f"seed={','.join(map(str, seeds))}"
    return [spread if word == asked[0] else word for word in words], seeds


def first_seed(words: Sequence[str]) -> tuple[list[str], tuple[int, ...]]:
    """Return words that ask for the first of several seeds alone, and all seeds."""
    spread, seeds = spread_seeds(words)
    if not seeds:
        return spread, seeds
    return [f"seed={seeds[0]}" if _key(word) == "seed" else word for word in spread], seeds


def lists_seeds(word: str) -> bool:
    """Tell a word that may name several seeds, without a look at what they are."""
    return _key(word) == KEY and bool(re.search(r"[,(]", word))


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _read(word: str) -> tuple[int, ...]:
    name, _, text = word.partition("=")
    if name != KEY:
        raise ConfigError(f"'{word}': write it as {EXAMPLE}")
    if span := re.fullmatch(r"range\(\s*(\d+)\s*,\s*(\d+)\s*\)", text):
        seeds = tuple(range(int(span[1]), int(span[2])))
    elif re.fullmatch(r"\d+(\s*,\s*\d+)*", text):
        seeds = tuple(map(int, text.split(",")))
    else:
        raise ConfigError(f"'{word}' names no seeds; write whole numbers, e.g. {EXAMPLE}")
    if not seeds:
        raise ConfigError(f"'{word}' names no seed; nothing would be run")
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise ConfigError(f"'{word}' has the seed {twice} twice; that is one draw, not two")
    return seeds
