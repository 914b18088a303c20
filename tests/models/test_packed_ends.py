"""Checkpoints whose embedding and head are packed, of every architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from led_layers import Steps, assert_follows, logits_of, recorded
from quantized_models import opened
from tiny_architectures import ARCHITECTURES, Architecture, token_batches
from tiny_towers import TOWERS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import claq_exp
from claq_exp.checkpoint.reader import open_checkpoint, read_layouts, read_weights
from claq_exp.checkpoint.summary import summarize
from claq_exp.checkpoint.writer import checkpoint_sizes, planned_sizes, write_checkpoint
from claq_exp.compose.experiment import compose_config
from claq_exp.errors import ConfigError
from claq_exp.evaluation.predict import streamed
from claq_exp.export.dense import write_dense
from claq_exp.models.ends import Ends, find_ends, in_blocks, is_end
from claq_exp.models.stream import WholeModel
from claq_exp.payload import unpack_weight
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.ends import AllocatedEnd, EndRule, KMeansEnd, NoEnd, SameEnd, UniformEnd
from claq_exp.quantize.precision import Fixed as FixedBits
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.run.ends import chosen_ends
from claq_exp.run.quantize import quantize_model
from claq_exp.runtime.embedding import QuantizedEmbedding
from claq_exp.runtime.packed import packed_modules

RECIPE = Recipe(KMeans(), FixedBits(4), NoReservation(), Gptq())
TOKENS = token_batches(1, seed=5)[0]
RULES: dict[str, tuple[EndRule, EndRule]] = {
    "both": (KMeansEnd(bits=4), SameEnd()),
    "each": (UniformEnd(bits=5, group_size=7), KMeansEnd(bits=3, solver="nearest")),
    "embedding": (KMeansEnd(bits=4), NoEnd()),
    "head": (NoEnd(), UniformEnd(bits=6)),
    "tied": (UniformEnd(bits=5, lookup=0.5), SameEnd()),
}


TIED = ("llama_tied_biased", "gpt2", "opt", "opt_350m", "gpt_neox", "gemma2", "gemma3", "qwen3_moe")
UNTIED = ("llama", "phi", "opt_350m", "gpt_neox", "gemma3", "mixtral")  # phi's head has a bias


def variants() -> dict[str, tuple[Architecture, str]]:
    """Architectures, tied and not, and the rules for each; all rules on one of them."""
    found = {}
    for names, tied in ((TIED, True), (UNTIED, False)):
        for name in names:
            options = {**ARCHITECTURES[name].options, "tie_word_embeddings": tied}
            own = replace(ARCHITECTURES[name], options=options)
            found[f"{name}, {'tied' if tied else 'untied'}"] = own, "tied" if tied else "both"
    llama = found["llama, untied"][0]
    return found | {f"llama, {rule}": (llama, rule) for rule in ("each", "embedding", "head")}


VARIANTS = variants()


@dataclass(frozen=True)
class Written:
    """A checkpoint, the model that it holds, and what that computes."""

    folder: Path
    model: PreTrainedModel
    ends: Ends
    steps: Steps


def quantized(model: PreTrainedModel, batches: list[Tensor], rules, folder: Path):
    """Quantize a model in memory with its ends; return what is packed."""
    store = opened(folder)
    quantize_model(WholeModel(model), batches, RECIPE, store, ends=chosen_ends(model, *rules))
    packed = store.packed()
    for name, weight in packed.items():
        if is_end(name):
            dense = unpack_weight(weight.layout, weight.tensors).dequantize()
            model.get_submodule(name).weight.data.copy_(dense)
    return packed


@pytest.fixture(scope="module", params=VARIANTS)
def written(request, tmp_path_factory, tiny_model) -> Written:
    architecture, rules = VARIANTS[request.param]
    place = tmp_path_factory.mktemp("ends")
    model = architecture.build()
    packed = quantized(model, token_batches(2, size=4), RULES[rules], place / "blocks")
    folder = place / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    write_checkpoint(folder, model, tokenizer, packed, torch.float32)
    ends = find_ends(model)
    names = [*in_blocks(packed), ends.head]
    return Written(folder, model, ends, recorded(model, names, TOKENS))


@pytest.mark.parametrize("kernel", ["dense", "reference", "auto"])
def test_the_packages_own_loader_gives_the_same_logits(written, kernel):
    assert_follows(claq_exp.load(written.folder, kernel=kernel), written.steps, TOKENS)


def test_block_by_block_it_gives_the_same_logits(written):
    (logits,) = streamed(open_checkpoint(written.folder))([TOKENS], lambda _: None)
    # Nothing here is rounded again, so float32 sums in another order stay close.
    torch.testing.assert_close(logits, written.steps.logits, rtol=0, atol=1e-4)


def test_transformers_loads_it_and_saves_the_same_tensors(written, tmp_path):
    loaded, report = AutoModelForCausalLM.from_pretrained(
        written.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    layouts = read_layouts(written.folder)
    assert set(packed_modules(loaded)) == set(layouts)
    assert_follows(loaded, written.steps, TOKENS)
    loaded.tie_weights()
    loaded.save_pretrained(tmp_path)
    assert read_layouts(tmp_path) == layouts
    for (name, one), (_, two) in zip(
        read_weights(written.folder), read_weights(tmp_path), strict=True
    ):
        assert torch.equal(one.dequantize(), two.dequantize()), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(again, TOKENS), logits_of(loaded, TOKENS))


def test_dequantized_it_is_a_plain_model_of_transformers(written, tmp_path):
    write_dense(written.folder, tmp_path / "dense", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert not packed_modules(plain)
    torch.testing.assert_close(logits_of(plain, TOKENS), written.steps.logits)


def test_the_planned_sizes_are_those_on_disk_and_linear_bits_count_blocks_alone(written):
    layouts = read_layouts(written.folder)
    planned = planned_sizes(written.model, layouts, torch.float32)
    parameters = summarize(written.folder).parameters
    assert checkpoint_sizes(written.folder, layouts, parameters) == planned
    linears = in_blocks(layouts)
    weights = sum(layout.weights for layout in linears.values())
    stored = sum(layout.ledger().total for layout in linears.values()) + planned.ledger.other
    assert planned.linear == pytest.approx(stored / weights)
    assert planned.nominal == pytest.approx(4)
    own = [layout for name, layout in layouts.items() if is_end(name)]
    assert planned.ledger.embedding == sum(layout.ledger().total for layout in own)


@pytest.mark.parametrize("size", [None, 80])
def test_a_packed_embedding_or_head_cannot_be_resized(written, size):
    loaded = AutoModelForCausalLM.from_pretrained(written.folder)
    with pytest.raises(ConfigError, match="cannot be resized; write dense ones"):
        loaded.resize_token_embeddings(size)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ((KMeansEnd(), NoEnd()), "leave head=same"),
        ((NoEnd(), KMeansEnd()), "leave head=same"),
        ((KMeansEnd(), UniformEnd()), "leave head=same"),
    ],
)
def test_a_tied_model_has_one_matrix_and_one_rule(rules, told):
    with pytest.raises(ConfigError, match=told):
        chosen_ends(ARCHITECTURES["llama_tied_biased"].build(), *rules)


def test_rows_of_frequent_tokens_are_stored_more_exactly(tmp_path):
    architecture = ARCHITECTURES["llama_tied_biased"]
    batches = [batch % 8 + 1 for batch in token_batches(2, size=4)]
    original = architecture.build().model.embed_tokens.weight.detach()
    errors = {}
    for rows in ("frequency", "equal"):
        model = architecture.build()
        rules = KMeansEnd(bits=2, rows=rows, solver="nearest"), SameEnd()
        quantized(model, batches, rules, tmp_path / rows)
        errors[rows] = (model.model.embed_tokens.weight.detach() - original).square().sum(dim=1)
    frequent = slice(1, 9)
    assert errors["frequency"][frequent].sum() < 0.7 * errors["equal"][frequent].sum()
    assert errors["frequency"].sum() > errors["equal"].sum()


@dataclass(frozen=True)
class Halves(EndRule):
    """A rule of one's own: signs of columns."""

    def recipe(self) -> Recipe:
        return Recipe(KMeans(), FixedBits(1), NoReservation(), Gptq())


def test_a_rule_of_ones_own_is_found_by_its_path():
    config = compose_config([f"embedding.name={__name__}:Halves"])
    (end,) = chosen_ends(ARCHITECTURES["llama_tied_biased"].build(), *config.end_rules())
    assert end.layout().widths() == {1: 24}


def test_nothing_is_chosen_without_a_rule():
    assert chosen_ends(ARCHITECTURES["llama_tied_biased"].build(), NoEnd(), SameEnd()) == ()
    assert chosen_ends(ARCHITECTURES["llama"].build(), NoEnd(), SameEnd()) == ()


def test_only_what_makes_logits_is_allocated():
    untied, tied = ARCHITECTURES["llama"].build(), ARCHITECTURES["llama_tied_biased"].build()
    rule, fixed = AllocatedEnd(looked_up_bits=5), KMeansEnd(bits=4)
    (end,) = chosen_ends(tied, rule, SameEnd())
    assert (end.allocated, end.tied) == (True, True)
    table, head = chosen_ends(untied, rule, SameEnd())
    assert (table.allocated, table.layout().nominal_bits()) == (False, 5)
    assert (head.allocated, head.tied) == (True, False)
    assert [end.allocated for end in chosen_ends(untied, fixed, rule)] == [False, True]
    for other in (fixed, NoEnd()):
        with pytest.raises(ConfigError, match="head=allocated, or choose embedding=kmeans"):
            chosen_ends(untied, rule, other)


@pytest.mark.parametrize("kind", TOWERS)
def test_of_several_towers_that_of_text_has_its_ends_packed(kind, tiny_model, tmp_path):
    towers = TOWERS[kind]
    model = towers.build(kind)
    batches = [batch % 50 + 1 for batch in token_batches(2, size=4)]
    rules = RULES["tied" if find_ends(model).tied else "both"]
    packed = quantized(model, batches, rules, tmp_path / "blocks")
    folder = tmp_path / "checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    write_checkpoint(folder, model, tokenizer, packed, torch.float32)
    for kernel in ("dense", "auto"):
        loaded = claq_exp.load(folder, kernel=kernel)
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(
            logits_of(loaded, batches[0]), logits_of(model, batches[0]), **close
        )
        if towers.image:
            with torch.inference_mode():
                found, expected = (
                    m(**towers.seen(), use_cache=False).logits for m in (loaded, model)
                )
            torch.testing.assert_close(found, expected, **close)
    (end,) = [n for n, m in loaded.named_modules() if isinstance(m, QuantizedEmbedding)]
    assert end == find_ends(model).embedding


class Normed(nn.Embedding):
    """An embedding that holds more than its table."""

    def __init__(self) -> None:
        super().__init__(64, 24)
        self.norm = nn.LayerNorm(24)


@pytest.mark.parametrize("which", ["embedding", "head"])
def test_ends_of_another_kind_are_refused(which):
    model = ARCHITECTURES["llama"].build()
    if which == "embedding":
        model.set_input_embeddings(Normed())
    else:
        model.lm_head = nn.Sequential(nn.Linear(24, 64))
    with pytest.raises(ConfigError, match=f"the {which} of LlamaForCausalLM"):
        chosen_ends(model, KMeansEnd(), SameEnd())


def test_a_name_tells_an_end_from_a_layer_of_a_block():
    for name in ("lm_head", "model.embed_tokens", "gpt_neox.embed_in", "embed_out"):
        assert is_end(name)
    for name in ("model.layers.0.mlp.up_proj", "transformer.h.11.attn.c_attn", "h.0.fc"):
        assert not is_end(name)
