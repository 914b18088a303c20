"""The parts of a run on a device that is not the CPU, beside the same parts on the CPU.

What is compared takes the same inputs and one step, so that nothing hangs on a rounding.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pretend_device
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from torch import Tensor, nn

from claq_exp.allocate.survey import survey_model
from claq_exp.calibration.moments import MomentsAccumulator
from claq_exp.calibration.output_gradients import BackwardPass
from claq_exp.checkpoint.store import BlockStore
from claq_exp.errors import CalibrationError, NumericalError
from claq_exp.evaluation.divergence import Comparison, LogitStore
from claq_exp.evaluation.perplexity import Corpus, perplexity
from claq_exp.evaluation.predict import in_memory, streamed
from claq_exp.models.activations import observe_inputs
from claq_exp.models.load import open_model
from claq_exp.models.stream import StreamedModel, WholeModel
from claq_exp.number_formats.encoding import round_values
from claq_exp.number_formats.formats import E2M1, LEARNED, BlockFormat
from claq_exp.number_formats.table import FormatCodebooks
from claq_exp.quantize.codebook import KMeans, RowKMeans, Uniform
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.problem import LinearProblem
from claq_exp.quantize.recipe import Recipe, quantize_weight
from claq_exp.quantize.reservation import Iht, NoReservation
from claq_exp.quantize.solver import Gptq, Nearest, QuantEase
from claq_exp.quantize.solver import device as solver_device
from claq_exp.quantize.solver.base import Prepared
from claq_exp.quantize.solver.columns import GroupedSystem
from claq_exp.run.quantize import quantize_model
from claq_exp.run.solve import solve_linears
from claq_exp.run.watcher import Watcher
from claq_exp.system.interruption import Interrupted

TO_NEAREST = Recipe(Uniform(), Fixed(3), NoReservation(), Nearest())
CLUSTERS = Recipe(KMeans(), Fixed(2), NoReservation(), Gptq())


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 250, (2, 16), generator=generator) for _ in range(count)]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(inputs: Tensor) -> Moments:
    accumulator = MomentsAccumulator(inputs.shape[1])
    accumulator.add(inputs, where="here")
    return accumulator.moments()


@pytest.fixture
def interpreted(monkeypatch) -> pretend_device.interpreted:
    """The column loop's kernel, run by the interpreter."""
    pytest.importorskip("triton")
    from claq_exp.quantize.kernels import column_step

    kernel = pretend_device.interpreted(column_step.quantize_column)
    monkeypatch.setattr(column_step, "quantize_column", kernel)
    return kernel


@pytest.fixture
def stream(tiny_model, tmp_path):
    """Opens the tiny model to be read block by block."""

    def opened(where: str) -> StreamedModel:
        return open_model(tiny_model, tmp_path / "work", dtype="float32", device=where)

    return opened


def test_a_hessian_is_summed_where_the_tokens_are(pretend):
    inputs = [gaussian(70, 40, seed=seed) for seed in range(5)]
    expected, accumulator = MomentsAccumulator(40), MomentsAccumulator(40)
    with pretend_device.traffic() as seen:
        for number, batch in enumerate(inputs):
            expected.add(batch, where=str(number))
            accumulator.add(batch.to(pretend), where=str(number))
    assert seen.downloads.total() == 0
    assert seen.waits.total() == len(inputs)
    found = accumulator.moments().single()
    assert found.device.type == "cpu"
    assert torch.allclose(found, expected.moments().single(), rtol=1e-6, atol=1e-6)
    with pytest.raises(CalibrationError, match="the input of there"):
        MomentsAccumulator(2).add(torch.tensor([[1.0, torch.nan]], device=pretend), where="there")


def test_a_hessian_that_has_no_room_on_the_device_is_summed_on_the_cpu(pretend):
    batch = gaussian(20, 200)
    there = batch.to(pretend)
    with pretend_device.memory(8 * 200**2 - 1), pretend_device.traffic() as seen:
        found = moments_of(there).single()
    assert seen.downloads.total() > 0
    assert torch.allclose(found, moments_of(batch).single(), rtol=1e-6, atol=1e-6)


def test_blocks_are_quantized_on_the_device_to_the_same_bytes(pretend, stream, tmp_path):
    stores = []
    for where in ("cpu", pretend):
        stores.append(BlockStore(tmp_path / where, {"run": "run"}))
        stores[-1].open()
        quantize_model(stream(where), batches(), TO_NEAREST, stores[-1])
    first, second = (store.packed() for store in stores)
    assert first.keys() == second.keys()
    for name, packed in first.items():
        for suffix, tensor in packed.tensors.items():
            assert torch.equal(tensor, second[name].tensors[suffix]), (name, suffix)
    for ours, theirs in zip(*(store.report("quantize") for store in stores), strict=True):
        assert ours["output_error"] == pytest.approx(theirs["output_error"], rel=0.05)


def test_gradients_are_found_on_the_device(pretend, stream):
    ours, theirs = (
        BackwardPass(stream(at), batches(), 2).squares([0, 1]) for at in ("cpu", pretend)
    )
    for one, other in zip(ours, theirs, strict=True):
        for name, squares in one.items():
            assert other[name].device.type == "cpu"
            assert torch.allclose(squares, other[name], rtol=1e-3, atol=1e-5 * float(squares.max()))


def test_an_interrupted_quantization_goes_on_on_the_device(pretend, stream, tmp_path):
    whole, parts = (BlockStore(tmp_path / name, {"run": "run"}) for name in ("whole", "parts"))
    whole.open()
    quantize_model(stream(pretend), batches(), TO_NEAREST, whole)
    for _ in range(4):
        parts.open()
        asked = iter([False] * 5)
        with pytest.raises(Interrupted):
            quantize_model(
                stream(pretend),
                batches(),
                TO_NEAREST,
                parts,
                watcher=Watcher(stopping=lambda asked=asked: next(asked, True)),
            )
        if len(parts.packed()) > 14:
            break
    parts.open()
    quantize_model(stream(pretend), batches(), TO_NEAREST, parts)
    for name, packed in whole.packed().items():
        for suffix, tensor in packed.tensors.items():
            assert torch.equal(tensor, parts.packed()[name].tensors[suffix])


def test_a_block_is_given_back_before_the_next(pretend, stream):
    model = stream(pretend)
    module = torch.get_device_module(pretend)
    outside = module.memory_allocated()
    with model.block(0) as block:
        own = sum(p.numel() * p.element_size() for p in block.parameters())
        assert module.memory_allocated() - outside == own
    assert module.memory_allocated() == outside


def test_the_column_loop_waits_no_more_for_more_columns(pretend, interpreted):
    seen = []
    for columns in (10, 30):
        weights = {"layer": gaussian(24, columns)}
        with pretend_device.traffic() as traffic:
            ((solved, _),) = solve_linears(
                weights, moments_of(gaussian(90, columns)), CLUSTERS, device=torch.device(pretend)
            )
        assert 0 < solved.output_error < 0.3
        seen.append({kind: traffic.total(kind) for kind in ("uploads", "downloads", "waits")})
    assert interpreted.launches == 40
    assert seen[0] == seen[1]
    assert traffic.bytes_down < 4 * 30**2  # the factor stays there


def test_what_the_kernel_does_not_know_is_solved_on_the_cpu(pretend):
    weights, inputs = {"layer": gaussian(24, 10)}, gaussian(90, 10)
    recipe = Recipe(Uniform(), Fixed(3), NoReservation(), Gptq())
    ((expected, _),) = solve_linears(weights, moments_of(inputs), recipe)
    ((found, _),) = solve_linears(weights, moments_of(inputs), recipe, device=torch.device(pretend))
    assert found.output_error == pytest.approx(expected.output_error, rel=0.05)
    assert not found.retreats


@pytest.mark.parametrize(("room", "retreats"), [(0, 1), (8 * 40**2 * 8, 0)])
def test_a_device_without_memory_leaves_the_solving_to_the_cpu(
    pretend, interpreted, room, retreats
):
    weights, inputs = {"layer": gaussian(24, 40)}, gaussian(90, 40)
    with pretend_device.memory(room):
        ((found, _),) = solve_linears(
            weights, moments_of(inputs), CLUSTERS, device=torch.device(pretend)
        )
    assert found.retreats == retreats
    assert bool(interpreted.launches) != bool(retreats)
    assert 0 < found.output_error < 0.3


def test_an_error_of_the_device_names_the_layers(pretend, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise NumericalError("column 1 has a weight of 1e+05, beyond float16")

    monkeypatch.setattr(solver_device, "quantize_group_on_device", refuse)
    weights = {"model.q": gaussian(8, 6), "model.k": gaussian(8, 6)}
    with pytest.raises(NumericalError, match=r"^model\.q, model\.k: column 1"):
        solve_linears(weights, moments_of(gaussian(90, 6)), CLUSTERS, device=torch.device(pretend))


def test_perplexity_and_kl_are_those_of_the_cpu(pretend, tmp_path, stream, monkeypatch):
    monkeypatch.setattr("claq_exp.evaluation.divergence.CHUNK", 4)  # tokens, of 15 in a window
    corpus = Corpus(torch.cat(batches()), "text")
    model = tiny_llama().float()
    store = LogitStore(tmp_path, {"text": 6})
    plain = perplexity(
        in_memory(model, "cpu"), corpus, 2, on_logits=lambda *found: store.record("text", *found)
    )
    comparison = Comparison(store)
    with pretend_device.traffic() as seen:
        found = perplexity(
            in_memory(model.to(pretend), pretend),
            corpus,
            2,
            on_logits=lambda *of: comparison.add("text", *of),
        )
    assert found.value == pytest.approx(plain.value, rel=1e-4)
    assert comparison.results()["text"].mean < 1e-4
    assert seen.downloads.total() == 2 * 6 + 3  # KL and agreement of a window, losses of a batch
    assert seen.waits.total() <= 2 * 3  # of a batch
    assert perplexity(streamed(stream(pretend)), corpus, 2).value == pytest.approx(
        found.value, rel=1e-3
    )


def test_a_survey_is_that_of_the_cpu(pretend):
    tokens = batches()
    expected = survey_model(tiny_llama().float(), tokens, Gptq(), gradients=True)
    model = tiny_llama().float().to(pretend)
    with pretend_device.traffic() as seen:
        found = survey_model(model, [batch.to(pretend) for batch in tokens], Gptq(), gradients=True)
    for name, statistics in expected.items():
        assert found[name].weight.device.type == "cpu"
        for part in ("distortion_weight", "row_weights"):
            ours, theirs = getattr(found[name], part), getattr(statistics, part)
            assert torch.allclose(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.mean()))
    linears = len(expected)
    assert seen.downloads.total() < 3 * linears  # weights, importances, Hessians: not by window


def test_what_enters_layers_is_looked_at_without_waiting(pretend, stream):
    model, names = (
        stream(pretend),
        ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
    )
    expected = observe_inputs(stream("cpu"), batches(), names)
    with pretend_device.traffic() as seen:
        found = observe_inputs(model, batches(), names)
    assert found.maxima == pytest.approx(expected.maxima, rel=1e-4)
    for ours, theirs in zip(found.samples, expected.samples, strict=True):
        assert ours.device.type == "cpu"
        assert torch.allclose(ours, theirs, atol=1e-3)
    where = [line for line in seen.waits if line.startswith("claq_exp/models/activations.py")]
    assert sum(seen.waits[line] for line in where) == len(names)


@pytest.mark.parametrize(
    "block_format",
    [BlockFormat(4, 16, "e4m3", E2M1), BlockFormat(4, 32, "e4m3", LEARNED, 8, 4, 6)],
    ids=["nvfp4", "lo_bcq"],
)
@pytest.mark.parametrize("limit", [None, 3.0])
def test_activations_are_rounded_on_the_device_to_the_same_bits(pretend, block_format, limit):
    books = torch.arange(16.0).expand(4, 16) * torch.arange(1, 5)[:, None] // 3 - 10
    grid = (
        FormatCodebooks.fixed(block_format)
        if block_format.codewords == E2M1
        else FormatCodebooks(block_format, books)
    )
    values = gaussian(6, 5, 64)
    expected = round_values(values, grid, limit=limit)
    there = values.to(pretend)
    with pretend_device.traffic() as seen:
        found = round_values(there, grid, limit=limit)
    assert (seen.downloads.total(), seen.waits.total()) == (0, 0)
    assert torch.equal(found.cpu(), expected)


def test_tasks_are_scored_on_the_device(pretend, tmp_path, monkeypatch):
    from claq_exp.config import TaskConfig
    from claq_exp.evaluation.zero_shot import score_tasks

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    words = ("goal", "sol1", "sol2")
    rows = [{**{word: f"{word} {number**3}" for word in words}, "label": 0} for number in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {"piqa": TaskConfig(data=str(data))}
    model, tokenizer = tiny_llama(seed=3).float(), byte_tokenizer()
    expected = score_tasks(model, tokenizer, task, 4)["piqa"]
    found = score_tasks(model.to(pretend), tokenizer, task, 4)["piqa"]
    assert found == expected


def test_generation_stays_on_the_device(pretend):
    model = tiny_llama().float()
    prompt = torch.arange(1, 9)[None]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    there = prompt.to(pretend)
    found = model.to(pretend).generate(there, attention_mask=torch.ones_like(there), **options)
    assert torch.equal(found.cpu(), expected)


def test_a_whole_model_knows_its_device(pretend):
    assert WholeModel(tiny_llama().to(pretend)).device.type == pretend
    assert isinstance(tiny_llama().to(pretend).get_input_embeddings(), nn.Embedding)


def sweeping(**fields: object) -> Recipe:
    return Recipe(KMeans(), Fixed(2), NoReservation(), QuantEase(block_size=5, **fields))


@pytest.mark.parametrize(
    "recipe",
    [
        sweeping(),
        sweeping(start="nearest"),
        sweeping(sweeps=5, escape_every=3, refit=False),
        replace(sweeping(), reservation=Iht(0.1)),
        replace(sweeping(), reservation=Iht(0.1, step="matrix"), codebook=RowKMeans()),
    ],
    ids=str,
)
def test_sweeps_multiply_on_a_device_and_code_on_the_cpu(pretend, recipe):
    problem = LinearProblem(gaussian(24, 50), moments_of(gaussian(90, 50, seed=1)).single())
    prepared = recipe.solver.prepare(Moments(problem.hessian))
    there = on_device(prepared, pretend)
    expected = quantize_weight(problem, prepared, recipe)
    with pretend_device.traffic() as seen:
        found = quantize_weight(problem, there, recipe)
    assert found.quantized.codes.device.type == "cpu"
    assert torch.equal(found.quantized.dequantize(), expected.quantized.dequantize())
    assert found.output_error == expected.output_error
    assert seen.bytes_down > 3 * 4 * 24 * 50  # columns went there and back


def on_device(prepared: Prepared, device: str) -> Prepared:
    """The same with its matrices on a device."""
    if isinstance(prepared, GroupedSystem):
        return replace(prepared, parts=tuple(on_device(part, device) for part in prepared.parts))
    matrices = ("hessian", "lost", "inverse_factor", "correction")
    there = {name: getattr(prepared, name) for name in matrices}
    return replace(prepared, **{n: m if m is None else m.to(device) for n, m in there.items()})


@pytest.mark.parametrize("groups", [1, 2])
def test_asymmetric_sweeps_of_groups_multiply_on_a_device(pretend, groups):
    hessians = torch.stack([moments_of(gaussian(90, 20, seed=s)).single() for s in range(groups)])
    crosses = torch.stack([0.1 * gaussian(20, 20, seed=s).double() for s in range(groups)])
    recipe, weight = sweeping(asymmetric=0.5, sweeps=4, escape_every=3), gaussian(24, 20)
    prepared = recipe.solver.prepare(Moments(hessians, crosses, 90))
    problem = LinearProblem(weight, hessians)
    expected = quantize_weight(problem, prepared, recipe)
    found = quantize_weight(problem, on_device(prepared, pretend), recipe)
    assert torch.equal(found.quantized.dequantize(), expected.quantized.dequantize())


def test_linears_that_share_an_input_are_prepared_and_multiplied_on_a_device(pretend):
    weights = {"layer": gaussian(24, 50), "other": gaussian(7, 50, seed=2)}
    inputs = gaussian(90, 50, seed=1)
    expected = solve_linears(weights, moments_of(inputs), sweeping())
    with pretend_device.traffic() as seen:
        found = solve_linears(weights, moments_of(inputs), sweeping(), device=torch.device(pretend))
    for (ours, _), (theirs, _) in zip(found, expected, strict=True):
        assert ours.output_error == pytest.approx(theirs.output_error, rel=0.05)
        assert not ours.retreats
    assert seen.bytes_down < 4 * 50**2 * 10  # neither Hessian nor factor came down as a whole
    assert seen.bytes_up > 3 * 4 * 31 * 50


def test_a_device_without_memory_for_sweeps_leaves_them_to_the_cpu(pretend):
    weights, inputs = {"layer": gaussian(200, 40)}, gaussian(90, 40)
    ((expected, _),) = solve_linears(weights, moments_of(inputs), sweeping())
    with pretend_device.memory(9 * 40**2 * 8):  # for the Hessian and its factor alone
        ((found, _),) = solve_linears(
            weights, moments_of(inputs), sweeping(), device=torch.device(pretend)
        )
    assert found.retreats == 1
    assert found.output_error == pytest.approx(expected.output_error, rel=0.05)
