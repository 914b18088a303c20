"""A model that several processes quantize is, up to the order of sums, what one makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from processes import Rank, start_ranks
from torch import Tensor
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from claq_exp.calibration.streams import HiddenForm
from claq_exp.checkpoint.store import BlockStore
from claq_exp.compose.experiment import compose_config
from claq_exp.models.load import open_model
from claq_exp.payload import unpack_weight
from claq_exp.quantize.allocation import ColumnPlan, MatrixPlan
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.ends import EMBEDDING, SameEnd
from claq_exp.quantize.precision import OutlierOrder
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import Fixed
from claq_exp.quantize.solver import Gptq
from claq_exp.run.assist import Quantization, assist
from claq_exp.run.ends import chosen_ends
from claq_exp.run.quantize import quantize_model
from claq_exp.run.watcher import Watcher
from claq_exp.system.distributed import Ranks, together
from claq_exp.train.norms import Norms
from claq_exp.train.window import UNTUNED, Tune

pytestmark = pytest.mark.other_process
RECIPE = Recipe(KMeans(), OutlierOrder(2.5), Fixed(0.02), Gptq())


def llama() -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=2)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = MixtralConfig(**shape, **heads, vocab_size=256, num_local_experts=5)
    return MixtralForCausalLM(config).half().eval()


@pytest.fixture(scope="module", params=[llama, mixtral])
def source(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    request.param().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense_source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_two(dense_source, batches, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("two")
    finished(start_ranks(quantize, place, dense_source, place, batches, size=2))
    return place


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Three batches, so that two ranks have different numbers of them, of two sizes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (size, 24), generator=generator) for size in (4, 4, 2)]


def quantize(source: Path, place: Path, batches: list[Tensor], **options) -> int:
    """Quantize a model as the runner does, on one rank or several."""
    with together() as ranks:
        return quantize_together(ranks, source, place, batches, **options)


def quantize_together(
    ranks: Ranks,
    source: Path,
    place: Path,
    batches: list[Tensor],
    *,
    on_disk: bool = False,
    stop_after: int | None = None,
    tune: Tune = UNTUNED,
    recipe: Recipe = RECIPE,
    embedding: str = "none",
    plans: Mapping[str, MatrixPlan] | None = None,
) -> int:
    torch.set_num_threads(1)
    if not ranks.is_first:
        return assist(ranks)
    model = open_model(source, place, dtype="float32", device="cpu")
    store = BlockStore(place / "store", {"run": "test"})
    store.open()
    config = compose_config(
        ["model=hf", f"model.source={source}", "model.dtype=float32", "device=cpu", "threads=1"]
    )
    form = HiddenForm(torch.float16, on_disk)
    follower = store.follower()
    ends = chosen_ends(model.model, EMBEDDING[embedding](), SameEnd())
    ranks.tell(
        Quantization(
            config,
            source,
            place,
            batches,
            recipe,
            follower,
            plans or {},
            form,
            tune=tune,
            ends=ends,
        )
    )
    linears = 0

    def stopping() -> bool:
        return stop_after is not None and linears >= stop_after

    def count(*_) -> None:
        nonlocal linears
        linears += 1

    watcher = Watcher(event=count, stopping=stopping)
    quantize_model(
        model,
        batches,
        recipe,
        store,
        plans=plans,
        hidden_form=form,
        tune=tune,
        ends=ends,
        watcher=watcher,
        ranks=ranks,
    )
    ranks.tell(None)
    return 0


def weights(place: Path) -> dict[str, Tensor]:
    packed = stored(place).packed()
    return {
        name: unpack_weight(weight.layout, weight.tensors).dequantize()
        for name, weight in packed.items()
    }


def stored(place: Path) -> BlockStore:
    store = BlockStore(place / "store", {"run": "test"})
    store.open()
    return store


def assert_same_bytes(first: Path, second: Path) -> None:
    packed, others = stored(first).packed(), stored(second).packed()
    assert list(packed) == list(others)
    for name, weight in packed.items():
        assert weight.layout == others[name].layout
        for suffix, tensor in weight.tensors.items():
            assert torch.equal(tensor, others[name].tensors[suffix]), f"{name}.{suffix}"


@pytest.fixture(scope="module")
def alone(source, batches, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    quantize(source, place, batches)
    torch.set_num_threads(threads)
    return place


@pytest.fixture(scope="module", params=[2, 4])
def by_ranks(request, source, batches, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    finished(start_ranks(quantize, place, source, place, batches, size=request.param))
    return place


def finished(ranks: list[Rank]) -> None:
    for rank in ranks:
        assert rank.exit_code() == 0, rank.output()
    assert [rank.output() for rank in ranks[1:]] == [""] * (len(ranks) - 1)


def test_the_layers_are_those_of_one_process_up_to_the_order_of_sums(alone, by_ranks):
    expected, found = stored(alone).report("quantize"), stored(by_ranks).report("quantize")
    assert [row["name"] for row in found] == [row["name"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["tokens"] == other["tokens"]
        assert row["bits"] == other["bits"]
        assert row["output_error"] == pytest.approx(other["output_error"], rel=0.02)
    one, several = weights(alone), weights(by_ranks)
    for name, weight in one.items():
        assert (weight - several[name]).norm() < 0.05 * weight.norm(), name


def test_hidden_states_are_those_of_one_process(alone, by_ranks):
    for one, other in zip(
        stored(alone).hidden("student"), stored(by_ranks).hidden("student"), strict=True
    ):
        assert one.shape == other.shape
        assert (one.float() - other.float()).norm() < 0.02 * one.float().norm()


def on_disk(source: Path, place: Path, batches: list[Tensor]) -> int:
    return quantize(source, place, batches, on_disk=True)


@pytest.mark.parametrize("work", [quantize, on_disk])
def test_the_same_number_of_ranks_gives_the_same_bytes(
    work, dense_source, batches, by_two, tmp_path
):
    finished(start_ranks(work, tmp_path, dense_source, tmp_path, batches, size=2))
    assert_same_bytes(tmp_path, by_two)


def stops_on(rank: int, source: Path, place: Path, batches: list[Tensor]) -> int:
    with together() as ranks:
        stop_after = 5 if ranks.rank == rank else None
        return quantize_together(ranks, source, place, batches, stop_after=stop_after)


@pytest.mark.case(3)
def test_a_stopped_run_goes_on_with_any_number_of_ranks(dense_source, batches, by_two, tmp_path):
    first, second = start_ranks(stops_on, tmp_path, 0, dense_source, tmp_path, batches, size=2)
    assert first.exit_code() == 99  # the command line makes 75 of it
    assert "Interrupted" in first.output()
    assert (second.exit_code(), second.output()) == (75, "")
    assert 5 <= len(stored(tmp_path).report("quantize")) < 14
    quantize(dense_source, tmp_path, batches)
    found, expected = weights(tmp_path), weights(by_two)
    assert list(found) == list(expected)
    for name, weight in expected.items():
        assert (weight - found[name]).norm() < 0.05 * weight.norm(), name


ASYMMETRIC = Recipe(KMeans(), OutlierOrder(2.5), Fixed(0.02), Gptq(asymmetric=1.0))


def asymmetric(source: Path, place: Path, batches: list[Tensor]) -> int:
    return quantize(source, place, batches, recipe=ASYMMETRIC)


def asymmetric_until(layers: int, source: Path, place: Path, batches: list[Tensor]) -> int:
    with together() as ranks:
        stop_after = layers if ranks.is_first else None
        options = {"recipe": ASYMMETRIC, "on_disk": True, "stop_after": stop_after}
        return quantize_together(ranks, source, place, batches, **options)


def test_ranks_have_the_teachers_inputs_of_their_own_batches(source, alone, batches, tmp_path):
    """Of a mixture too, whose experts get other numbers of tokens on each rank."""
    threads = torch.get_num_threads()
    asymmetric(source, tmp_path / "alone", batches)
    torch.set_num_threads(threads)
    two, parts = tmp_path / "two", tmp_path / "parts"
    finished(start_ranks(asymmetric, two, source, two, batches, size=2))
    stopped = start_ranks(asymmetric_until, parts, 9, source, parts, batches, size=2)
    assert [rank.exit_code() for rank in stopped] == [99, 75]
    finished(start_ranks(asymmetric, parts, source, parts, batches, size=2))
    assert_same_bytes(parts, two)
    one, several, plain = weights(tmp_path / "alone"), weights(two), weights(alone)
    for name, weight in one.items():
        assert (weight - several[name]).norm() < 0.05 * weight.norm(), name
    assert any((weight - plain[name]).norm() > 0.1 * weight.norm() for name, weight in one.items())


def with_ends(embedding: str, source: Path, place: Path, batches: list[Tensor]) -> int:
    plans = {}
    if embedding == "allocated":
        widths, none = torch.tensor([4, 6], dtype=torch.uint8), torch.zeros(48, dtype=torch.int64)
        plans["model.embed_tokens"] = MatrixPlan(KMeans(), ColumnPlan(widths.repeat(24), none))
    with together() as ranks:
        return quantize_together(ranks, source, place, batches, embedding=embedding, plans=plans)


@pytest.mark.parametrize("embedding", ["kmeans", "allocated"])
def test_an_embedding_that_ranks_quantize_is_that_of_one_process(
    embedding, dense_source, batches, tmp_path
):
    with_ends(embedding, dense_source, tmp_path / "alone", batches)
    place = tmp_path / "two"
    finished(start_ranks(with_ends, place, embedding, dense_source, place, batches, size=2))
    name = "model.embed_tokens"
    one, two = weights(tmp_path / "alone")[name], weights(tmp_path / "two")[name]
    assert (one - two).norm() < 0.01 * one.norm()
    (row,) = stored(tmp_path / "two").report("embedding")
    assert (row["name"], row["tokens"]) == (name, 10 * 24)


def test_an_embedding_that_ranks_quantize_before_the_blocks_is_to_the_byte_that_of_one_process(
    batches, tmp_path
):
    source = tmp_path / "source"
    tiny_llama(num_hidden_layers=2, tie_word_embeddings=False).save_pretrained(source)
    place = tmp_path / "two"
    with_ends("kmeans", source, tmp_path / "alone", batches)
    finished(start_ranks(with_ends, place, "kmeans", source, place, batches, size=2))
    one, two = (stored(tmp_path / place).packed() for place in ("alone", "two"))
    assert one.keys() == two.keys()
    name = "model.embed_tokens"
    for suffix, tensor in one[name].tensors.items():
        assert torch.equal(tensor, two[name].tensors[suffix])
    ours, theirs = (weights(tmp_path / place)["lm_head"] for place in ("alone", "two"))
    assert (ours - theirs).norm() < 0.01 * ours.norm()


FEW = Norms(steps=6, learning_rate=0.01, batch=2)
NORM_TOLERANCE = 1e-3  # of a norm: what another order of sums makes of six steps


def tuned(source: Path, place: Path, batches: list[Tensor]) -> int:
    with together() as ranks:
        return quantize_together(ranks, source, place, batches, tune=FEW, on_disk=True)


def tuned_until(layers: int, source: Path, place: Path, batches: list[Tensor]) -> int:
    with together() as ranks:
        stop_after = layers if ranks.is_first else None
        return quantize_together(ranks, source, place, batches, tune=FEW, stop_after=stop_after)


@pytest.mark.case(150)
def test_norms_that_ranks_train_are_those_of_one_process(dense_source, batches, tmp_path):
    """The first three steps have other batches on each rank, the third one on the first alone."""
    quantize_alone = tmp_path / "alone"
    tuned(dense_source, quantize_alone, batches)
    for name in ("two", "again"):
        place = tmp_path / name
        finished(start_ranks(tuned, place, dense_source, place, batches, size=2))
    assert (
        start_ranks(
            tuned_until, tmp_path / "parts", 9, dense_source, tmp_path / "parts", batches, size=2
        )[1].exit_code()
        == 75
    )
    finished(
        start_ranks(tuned, tmp_path / "parts", dense_source, tmp_path / "parts", batches, size=2)
    )
    one, two = stored(quantize_alone).dense(), stored(tmp_path / "two").dense()
    again, parts = stored(tmp_path / "again").dense(), stored(tmp_path / "parts").dense()
    assert len(one) == 4
    assert one.keys() == two.keys() == again.keys() == parts.keys()
    source = llama().state_dict()
    for name, norm in one.items():
        assert torch.equal(two[name], again[name])
        assert torch.equal(two[name], parts[name])
        assert not torch.equal(norm, source[name])
        assert (norm.float() - two[name].float()).norm() < NORM_TOLERANCE * norm.float().norm()
    rows = stored(tmp_path / "two").report("tune")
    for row, other in zip(rows, stored(quantize_alone).report("tune"), strict=True):
        assert row["error_after"] < row["error_before"]
        assert row["error_after"] == pytest.approx(other["error_after"], rel=0.02)


def spoiled(source: Path, place: Path, batches: list[Tensor]) -> int:
    """Quantize with a value in the second rank's batch that is not finite."""
    from claq_exp.models import blocks

    run_block = blocks.run_block

    def spoiling(block, inputs, batch):
        if torch.distributed.get_rank() == 1:
            inputs.hidden[batch][0, 0, 0] = torch.nan
        return run_block(block, inputs, batch)

    blocks.run_block = spoiling
    return quantize(source, place, batches)


@pytest.mark.case(24)
def test_a_bad_activation_on_another_rank_is_named_with_its_batch(dense_source, batches, tmp_path):
    first, second = start_ranks(spoiled, tmp_path, dense_source, tmp_path, batches, size=2)
    assert first.exit_code() == 99
    assert "CalibrationError" in first.output()
    assert "(calibration batch 1)" in first.output()
    assert "(rank 1)" in first.output()
    assert (second.exit_code(), second.output()) == (1, "")
