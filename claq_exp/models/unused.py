"""Stored tensors that no parameter of a model takes, but for those that nobody misses."""

from __future__ import annotations

import re
from collections.abc import Mapping

from transformers import PreTrainedModel

# What older releases stored, and is computed: not learned, and the same in every model.
COMPUTED = (
    r"(^|\.)(inv_freq|position_ids|(cos|sin)_cached|masked_bias|causal_mask|num_batches_tracked)$",
    r"(^|\.)(attn|attention)\.bias$",  # a triangle of ones
    r"(^|\.)_extra_state$",
)
# Parts beside the text model, which has no such module: towers of other media, and heads for drafts
# and rewards.  What is inside a decoder block is never one of these.
BESIDE = re.compile(
    r"(^|\.)(\w*(vision|visual|image|video|audio|speech)\w*|multi_modal_projector|mm_\w+|projector"
    r"|mtp\w*|nextn\w*|medusa\w*|eagle\w*|v_head|value_head|score|classifier|reward\w*)\."
)


def unused_tensors(model: PreTrainedModel, left_over: Mapping[str, str]) -> tuple[str, ...]:
    """Return those of the stored tensors without a parameter that the model is poorer without.

    left_over: tensor -> what it would be called in the model.
    What the model's class ignores, what is computed, and what lies beside a text model is not
    missed.
    """
    declared = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in (*declared, *COMPUTED)))
    modules = {name for name, _ in model.named_modules()}
    return tuple(
        name
        for name, inside in sorted(left_over.items())
        if not ignored.search(inside) and not _beside(inside, modules, model.base_model_prefix)
    )


def _beside(name: str, modules: set[str], prefix: str) -> bool:
    """Tell whether a tensor belongs to a part that the model does not have at all."""
    found = BESIDE.search(name)
    if found is None:
        return False
    part = name[: found.end() - 1]
    around = part.rpartition(".")[0]
    inside_block = re.search(r"\.\d+(\.|$)", around) is not None
    return not inside_block and not {part, f"{prefix}.{part}"} & modules
