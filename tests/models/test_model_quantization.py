"""Quantizing whole models: order of work, resuming, reloading, and faults that name their place."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from led_layers import assert_follows, recorded
from quantized_models import Quantized, opened, quantized_model
from tiny_architectures import ARCHITECTURES, Architecture, token_batches
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from claq_exp.calibration.moments import MomentsAccumulator
from claq_exp.checkpoint.reader import load_model
from claq_exp.checkpoint.store import BlockStore
from claq_exp.checkpoint.writer import write_checkpoint
from claq_exp.errors import CalibrationError, CheckpointError, NumericalError
from claq_exp.models.discover import linear_weight
from claq_exp.models.stream import WholeModel
from claq_exp.payload import unpack_weight
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed, LayerMap, OutlierOrder
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import Fixed as FixedReservation
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq, Nearest
from claq_exp.run.quantize import quantize_model
from claq_exp.run.watcher import Watcher
from claq_exp.system.interruption import Interrupted

RECIPE = Recipe(KMeans(), OutlierOrder(2.5), FixedReservation(0.02), Gptq())
PLAIN = Recipe(KMeans(), Fixed(2), NoReservation(), Gptq())
BATCHES = token_batches(batches=3, size=4)


def quantized(model: nn.Module, folder: Path, recipe: Recipe = RECIPE, **options) -> Quantized:
    return quantized_model(model, BATCHES, recipe, folder, **options)


def entering(model: nn.Module, linear: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """What enters a linear in ordinary forward passes."""
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        for batch in batches:
            model(batch, use_cache=False)
    hook.remove()
    return seen


def assert_same_packed(first: Quantized, second: Quantized) -> None:
    assert list(first.packed) == list(second.packed)
    for name, weight in first.packed.items():
        assert weight.layout == second.packed[name].layout
        assert set(weight.tensors) == set(second.packed[name].tensors)
        for suffix, tensor in weight.tensors.items():
            assert torch.equal(tensor, second.packed[name].tensors[suffix]), f"{name}.{suffix}"


def without_seconds(result: Quantized) -> list[dict[str, object]]:
    return [{key: row[key] for key in row if key != "seconds"} for row in result.report]


@dataclass(frozen=True)
class Case:
    """A model before and after quantizing, and what was packed."""

    architecture: Architecture
    original: PreTrainedModel
    model: PreTrainedModel
    result: Quantized


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request, tmp_path_factory) -> Case:
    architecture = ARCHITECTURES[request.param]
    model = architecture.build()
    result = quantized(model, tmp_path_factory.mktemp("blocks"))
    return Case(architecture, architecture.build(), model, result)


def test_every_linear_of_every_block_is_packed_and_written_back(case):
    expected = case.architecture.linears()
    assert list(case.result.packed) == expected
    assert [row["name"] for row in case.result.report] == expected
    for linear, packed in case.result.packed.items():
        dense = unpack_weight(packed.layout, packed.tensors).dequantize()
        assert torch.equal(linear_weight(case.model.get_submodule(linear)), dense)
    original = case.original.state_dict()
    for key, tensor in case.model.state_dict().items():
        if key.removesuffix(".weight") not in case.result.packed:
            assert torch.equal(tensor, original[key]), key


def test_a_rule_sees_the_full_name_of_every_linear(tmp_path):
    architecture = next(iter(ARCHITECTURES.values()))
    names = architecture.linears()
    widths = {name: 1 + index % 5 for index, name in enumerate(names)}
    recipe = Recipe(KMeans(), LayerMap(widths, default=8), NoReservation(), Gptq())
    result = quantized(architecture.build(), tmp_path, recipe)
    found = {name: packed.layout.widths() for name, packed in result.packed.items()}
    assert {name: set(bits) for name, bits in found.items()} == {n: {b} for n, b in widths.items()}


def test_a_written_checkpoint_loads_as_the_model_in_memory(case, tmp_path, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    write_checkpoint(tmp_path / "out", case.model, tokenizer, case.result.packed, torch.float32)
    loaded = load_model(tmp_path / "out")
    for key, tensor in case.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert_follows(loaded, recorded(case.model, case.result.packed, BATCHES[0]), BATCHES[0])


def test_quantized_blocks_still_do_most_of_what_the_original_ones_did(case):
    emptied = copy.deepcopy(case.original)
    for name in case.architecture.linears():
        emptied.get_submodule(name).weight.data.zero_()
    with torch.inference_mode():
        before = case.original(BATCHES[0]).logits
        nothing, after = emptied(BATCHES[0]).logits, case.model(BATCHES[0]).logits
    assert 0 < (after - before).norm() < 0.75 * (nothing - before).norm()


@pytest.mark.parametrize(
    ("linear", "earlier"),
    [
        ("self_attn.k_proj", []),
        ("self_attn.o_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("mlp.up_proj", ["self_attn.o_proj"]),
        ("mlp.down_proj", ["mlp.gate_proj", "mlp.up_proj"]),
    ],
)
@pytest.mark.parametrize("block", [0, 1])
def test_later_groups_are_calibrated_on_the_quantized_earlier_ones(
    block, linear, earlier, tmp_path
):
    original = ARCHITECTURES["llama"].build()
    model = copy.deepcopy(original)
    result = quantized(model, tmp_path, PLAIN)
    name = f"model.layers.{block}.{linear}"

    def solved_on(reference: nn.Module) -> Tensor:
        """Quantize the original weight on inputs from ordinary passes of another model."""
        module = original.get_submodule(name)
        accumulator = MomentsAccumulator(module.in_features)
        for batch in entering(reference, reference.get_submodule(name), BATCHES):
            accumulator.add(batch, where=name)
        hessian = accumulator.moments().single()
        problem = LinearProblem(module.weight.detach(), hessian)
        solved = quantize_weight(problem, PLAIN.solver.prepare(Moments(hessian)), PLAIN)
        return solved.quantized.dequantize()

    packed = result.packed[name]
    dense = unpack_weight(packed.layout, packed.tensors).dequantize()
    # in the finished model everything that runs before this linear is quantized
    assert torch.equal(dense, solved_on(model))
    if earlier or block:
        assert not torch.equal(dense, solved_on(original))
    for other in earlier:
        changed = copy.deepcopy(model)
        changed.model.layers[block].get_submodule(other).weight.data.copy_(
            original.model.layers[block].get_submodule(other).weight
        )
        assert not torch.equal(dense, solved_on(changed)), other


class Stop(Exception):
    pass


@pytest.mark.case(48)
@pytest.mark.parametrize(
    ("event", "count"), [("layer", 3), ("block", 1), ("layer", 10), ("block", 2), ("block", 3)]
)
def test_a_stopped_run_goes_on_to_the_same_tensors(event, count, tmp_path):
    whole = quantized(ARCHITECTURES["llama"].build(), tmp_path / "whole")
    seen = []

    def stop(name: str, data: dict[str, object]) -> None:
        seen.append(name)
        if seen.count(event) == count:
            raise Stop

    with pytest.raises(Stop):
        quantized(ARCHITECTURES["llama"].build(), tmp_path / "parts", watcher=Watcher(event=stop))
    blocks = []
    model = ARCHITECTURES["llama"].build()
    again = quantized(
        model,
        tmp_path / "parts",
        watcher=Watcher(
            event=lambda name, data: blocks.append(data["block"]) if name == "block" else None
        ),
    )
    assert_same_packed(again, whole)
    assert without_seconds(again) == without_seconds(whole)
    assert blocks == list(range(seen.count("block"), 3))


@pytest.mark.parametrize("name", ["mistral", "gemma3", "mixtral"])
def test_a_run_that_is_stopped_after_every_block_ends_the_same(name, tmp_path):
    whole = quantized(ARCHITECTURES[name].build(), tmp_path / "whole")

    def stop(name: str, _: object) -> None:
        if name == "block":
            raise Stop

    for _ in range(ARCHITECTURES[name].depth):
        with pytest.raises(Stop):
            quantized(ARCHITECTURES[name].build(), tmp_path / "parts", watcher=Watcher(event=stop))
    again = quantized(ARCHITECTURES[name].build(), tmp_path / "parts", watcher=Watcher(event=stop))
    assert_same_packed(again, whole)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_a_run_that_is_asked_to_stop_publishes_the_group_at_hand_and_repeats_none(
    name, groups, tmp_path
):
    whole = quantized(ARCHITECTURES[name].build(), tmp_path / "whole")
    asked: list[int] = []

    def stopping() -> bool:
        asked.append(1)
        return len(asked) == groups

    with pytest.raises(Interrupted):
        watcher = Watcher(stopping=stopping)
        quantized(ARCHITECTURES[name].build(), tmp_path / "parts", watcher=watcher)
    done = list(opened(tmp_path / "parts").packed())
    architecture = ARCHITECTURES[name]
    expected = [layer for group in architecture.groups * 2 for layer in group]
    assert len(done) == sum(len(g) for g in (architecture.groups * 2)[:groups])
    assert [layer.split(".", 3)[3] for layer in done] == expected[: len(done)]
    solved: list[str] = []
    watcher = Watcher(
        event=lambda name, data: solved.append(data["name"]) if name == "layer" else None
    )
    again = quantized(ARCHITECTURES[name].build(), tmp_path / "parts", watcher=watcher)
    assert solved == list(whole.packed)[len(done) :]
    assert_same_packed(again, whole)
    assert without_seconds(again) == without_seconds(whole)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.case(8)
@pytest.mark.parametrize(
    ("file", "kept"),
    [("quantize_0001_00", 1), ("quantize_0000_00", 0), ("student_0002", 2), ("student", 2)],
)
def test_what_is_damaged_in_the_store_is_made_again_and_never_used(file, kept, tmp_path):
    whole = quantized(ARCHITECTURES["llama"].build(), tmp_path / "whole")

    def stop(name: str, data: dict[str, object]) -> None:
        if name == "block" and data["block"] == 1:
            raise Stop

    with pytest.raises(Stop):
        quantized(ARCHITECTURES["llama"].build(), tmp_path / "parts", watcher=Watcher(event=stop))
    (path,) = (tmp_path / "parts").glob(f"{file}*.safetensors")
    damage(path) if "_" in file else path.unlink()
    with pytest.raises(CheckpointError, match=path.stem):
        opened(tmp_path / "parts")
    told: list[str] = []
    store = BlockStore(tmp_path / "parts", {"run": "run"})
    store.open(told.append)
    assert len(told) == 1
    assert str(path) in told[0]
    solved: set[int] = set()
    watcher = Watcher(
        event=lambda name, data: solved.add(data["block"]) if name == "layer" else None
    )
    model = WholeModel(ARCHITECTURES["llama"].build())
    quantize_model(model, BATCHES, RECIPE, store, watcher=watcher)
    assert solved == set(range(kept, 3))
    assert_same_packed(Quantized(store.packed(), store.report("quantize")), whole)


@pytest.mark.case(40)
def test_the_same_command_twice_gives_the_same_tensors(tmp_path):
    results = [quantized(ARCHITECTURES["gemma2"].build(), tmp_path / str(run)) for run in (1, 2)]
    assert_same_packed(*results)
    assert without_seconds(results[0]) == without_seconds(results[1])


@pytest.mark.case(39)
def test_threads_change_nothing_but_the_order_of_sums(tmp_path):
    """Layers that are solved side by side do not disturb one another.

    Rounding to nearest depends on the weights alone; a sum in another order, which GPTQ sees, may
    tip a clustering.
    """
    results, nearest = [], Recipe(KMeans(), Fixed(2), FixedReservation(0.02), Nearest())
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = ARCHITECTURES["llama"].build()
        results.append(quantized(model, tmp_path / str(threads), nearest))
    torch.set_num_threads(1)
    assert_same_packed(*results)
    errors = [[row["output_error"] for row in result.report] for result in results]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_the_store_of_another_run_is_not_touched(tmp_path):
    quantized(ARCHITECTURES["llama"].build(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="another run"):
        opened(tmp_path, "another run")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shares_add_up_to_the_whole_work(tmp_path):
    shares: list[tuple[float, str]] = []
    model = ARCHITECTURES["llama"].build()
    result = quantized(
        model, tmp_path, watcher=Watcher(share=lambda share, where: shares.append((share, where)))
    )
    assert sum(share for share, _ in shares) == pytest.approx(1)
    assert [where for _, where in shares] == list(result.packed)
    shares.clear()
    quantized(
        model, tmp_path, watcher=Watcher(share=lambda share, where: shares.append((share, where)))
    )
    assert shares == [(1.0, "after block 2")]


def test_report_rows_hold_what_the_layers_cost(tmp_path):
    rows = []
    result = quantized(
        ARCHITECTURES["llama"].build(),
        tmp_path,
        watcher=Watcher(event=lambda name, data: rows.append(data) if name == "layer" else None),
    )
    assert rows == result.report
    for row in rows:
        layout = result.packed[row["name"]].layout
        assert (row["rows"], row["cols"]) == (layout.rows, layout.columns)
        assert row["bits"] == layout.ledger().total / (layout.rows * layout.columns)
        assert row["reserved"] == round(0.02 * layout.rows * layout.columns)
        assert 0 < row["output_error"] < 1
        assert 0 < row["weight_error"] < 1
        assert row["damping"] == 0.01
        assert row["dead_columns"] == 0
        assert row["tokens"] == 3 * 4 * 12
        assert row["seconds"] > 0


@pytest.mark.case(25)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_weight_is_reported_by_layer_and_entry(bad, tmp_path):
    model = ARCHITECTURES["llama"].build()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = bad
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj: weight\[3, 5\]"):
        quantized(model, tmp_path)
    assert opened(tmp_path).blocks == 1


@pytest.mark.case(24)
def test_a_bad_activation_is_reported_by_layer_and_batch(tmp_path):
    model = ARCHITECTURES["llama"].build()
    token = int(BATCHES[2][1, 4])
    model.model.embed_tokens.weight.data[token, 0] = math.nan
    first = next(index for index, batch in enumerate(BATCHES) if (batch == token).any())
    where = rf"model\.layers\.0\.self_attn\.q_proj \(calibration batch {first}\)"
    with pytest.raises(CalibrationError, match=where):
        quantized(model, tmp_path)


@pytest.mark.case(21)
def test_an_input_that_is_always_zero_is_counted_as_dead(tmp_path):
    model = ARCHITECTURES["llama"].build()
    model.model.layers[0].input_layernorm.weight.data[7] = 0
    result = quantized(model, tmp_path)
    dead = {row["name"]: row["dead_columns"] for row in result.report}
    for linear, count in dead.items():
        expected = linear.startswith("model.layers.0.self_attn.") and "o_proj" not in linear
        assert count == int(expected), linear


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_smaller_last_batch_is_taken_as_it_comes(name, tmp_path):
    batches = [*token_batches(2, size=4), token_batches(1, size=2, seed=1)[0]]
    model = ARCHITECTURES[name].build()
    result = quantized_model(model, batches, PLAIN, tmp_path)
    assert all(math.isfinite(row["output_error"]) for row in result.report)


def test_a_float16_model_keeps_its_dtype(tmp_path):
    model = ARCHITECTURES["llama"].build().half()
    result = quantized(model, tmp_path)
    for name, packed in result.packed.items():
        dense = unpack_weight(packed.layout, packed.tensors).dequantize()
        assert torch.equal(model.get_submodule(name).weight, dense.half())
