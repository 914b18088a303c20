"""What calibration tokens weigh: block by block as torch finds it on the whole model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from quantized_models import opened
from tiny_architectures import ARCHITECTURES, Architecture, saved, streamed, token_batches
from torch import Tensor, nn

from claq_exp.calibration.output_gradients import BackwardPass
from claq_exp.calibration.token_weights import TokenWeights
from claq_exp.errors import CalibrationError
from claq_exp.models.discover import linears_of
from claq_exp.models.stream import WholeModel
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.objective import OutputGradient
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.quantize.solver.base import Prepared
from claq_exp.run.quantize import quantize_model
from claq_exp.run.watcher import Watcher
from claq_exp.run.weighing import Weighing
from claq_exp.system.distributed import ALONE
from claq_exp.system.interruption import Interrupted

BATCHES = [*token_batches(2, size=4), token_batches(1, size=2, seed=1)[0]]
DENSE = [name for name, kind in ARCHITECTURES.items() if "experts" not in str(kind.groups)]


def oracle(model: nn.Module, kind: Architecture, groups: int) -> dict[str, Tensor]:
    """One backward pass of torch's through the whole model in float64, window by window."""
    model = model.double()
    found = defaultdict(list)

    def watch(name):
        def hook(_, __, output):
            output.register_hook(lambda rows: found[name].append(rows.reshape(-1, rows.shape[-1])))

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(watch(name)) for name in kind.linears()
    ]
    for batch in BATCHES:
        for window in batch:
            logits = model(window[None], use_cache=False).logits[0, :-1]
            nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    squares = {}
    for name, parts in found.items():
        rows = torch.cat(parts).square()
        squares[name] = torch.stack([part.mean(dim=1) for part in rows.chunk(groups, 1)], dim=1)
    return squares


def joined(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Name -> [tokens, groups] of all batches."""
    return {name: torch.cat([part[name].flatten(0, 1) for part in found]) for name in found[0]}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", DENSE)
def test_they_are_torchs_on_the_whole_model(name, groups):
    kind = ARCHITECTURES[name]
    expected = oracle(kind.build(), kind, groups)
    found = joined(BackwardPass(WholeModel(kind.build()), BATCHES, groups).squares([0, 1, 2]))
    assert found.keys() == expected.keys() == set(kind.linears())
    for path, squares in expected.items():
        assert found[path].shape == (sum(map(torch.numel, BATCHES)), groups)
        worst = (found[path].double() - squares).abs().max() / squares.max()
        assert worst < 1e-3, path  # float32 against float64, through norms of small numbers


def kept(place: Path, model: WholeModel, objective: OutputGradient, **options) -> TokenWeights:
    """Measure what tokens weigh, and keep it in a folder."""
    blocks = enumerate(model.blocks)
    names = tuple(f"{model.path}.{i}.{name}" for i, block in blocks for name in linears_of(block))
    weights = TokenWeights(place / "weights", BATCHES, names, objective)
    Weighing(None, place, place, weights, options.pop("states", 1)).measure(model, ALONE, **options)
    return weights


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_weights_are_one_on_average_and_as_the_gradients(power, tmp_path):
    kind = ARCHITECTURES["llama"]
    weights = kept(tmp_path, WholeModel(kind.build()), OutputGradient(2, power))
    for name, squares in oracle(kind.build(), kind, 2).items():
        found = weights.of(name)
        assert [part.shape for part in found] == [(*batch.shape, 2) for batch in BATCHES]
        expected = squares.pow(power) / squares.pow(power).mean()
        flat = torch.cat([part.flatten(0, 1) for part in found]).double()
        assert torch.allclose(flat, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
        assert flat.mean() == pytest.approx(1, rel=1e-5)


def test_outputs_that_change_nothing_weigh_all_tokens_alike():
    nothing = torch.zeros(7, 2)
    assert torch.equal(OutputGradient(2).weights(nothing), torch.ones(7, 2))


@pytest.mark.parametrize("times", [1.5, 3.0, 50.0])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_no_token_weighs_more_than_the_bound(times, power):
    """Found by bisection: the bound that is so many times the mean of what it leaves."""
    squares = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)).pow(-3.0)
    powers = squares.double().pow(power)
    low, high = 0.0, float(powers.max())
    for _ in range(200):
        middle = (low + high) / 2
        left = powers.clamp(max=middle)
        low, high = (middle, high) if middle < times * left.mean() else (low, middle)
    expected = powers.clamp(max=high)
    found = OutputGradient(2, power, times).weights(squares)
    assert torch.allclose(found.double(), expected / expected.mean(), rtol=1e-5)
    assert float(found.max()) <= times * (1 + 1e-6)
    assert float(found.mean()) == pytest.approx(1, rel=1e-5)


def test_a_bound_that_so_few_tokens_cannot_keep_makes_them_alike():
    squares = torch.tensor([[0.0], [0.0], [0.0], [5.0], [1.0]])
    expected = torch.tensor([[0.0], [0.0], [0.0], [2.5], [2.5]])
    assert torch.allclose(OutputGradient(clip=2.0).weights(squares), expected)
    alike = torch.full((4, 1), 3.0)
    assert torch.allclose(OutputGradient(clip=2.0).weights(alike), torch.ones(4, 1))


def test_a_pass_that_stops_goes_on_to_the_same_weights(tmp_path):
    kind, objective, asked = ARCHITECTURES["llama"], OutputGradient(), []
    whole = kept(tmp_path / "whole", WholeModel(kind.build()), objective, states=2**60)
    together = kept(tmp_path / "all", WholeModel(kind.build()), objective)

    def stopping() -> bool:
        asked.append(None)
        return len(asked) == 2

    with pytest.raises(Interrupted):
        kept(
            tmp_path / "parts", WholeModel(kind.build()), objective, states=2**60, stopping=stopping
        )
    files = sorted((tmp_path / "parts" / "weights").iterdir())
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-4])  # cut short: it is made again
    before = files[1].stat().st_mtime_ns
    parts = kept(tmp_path / "parts", WholeModel(kind.build()), objective, states=2**60)
    assert files[1].stat().st_mtime_ns == before
    for name in whole.names:
        for one, *others in zip(whole.of(name), parts.of(name), together.of(name), strict=True):
            assert all(torch.equal(one, other) for other in others)


def test_gradients_that_are_not_finite_name_a_layer(tmp_path):
    model = ARCHITECTURES["llama"].build()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.2\..*not finite.*model\.dtype"):
        kept(tmp_path, WholeModel(model), OutputGradient())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_gradient(dtype):
    """Behind a head with tiny weights all gradients are beyond float16, but for their scale."""
    kind = ARCHITECTURES["llama"]
    plain, small = kind.build().to(dtype), kind.build().to(dtype)
    found = []
    for model, factor in ((plain, 2.0**-2), (small, 2.0**-20)):
        model.lm_head.weight.data *= factor
        squares = joined(BackwardPass(WholeModel(model), BATCHES).squares([0, 1, 2]))
        found.append({name: part / part.mean() for name, part in squares.items()})
    for name, expected in found[0].items():
        likeness = torch.corrcoef(torch.stack([found[1][name][:, 0], expected[:, 0]]))[0, 1]
        assert likeness > 0.9, name


SEEN: list[Moments] = []


@dataclass(frozen=True)
class Watched(Gptq):
    """A solver that keeps what it is told, in the order of the linears."""

    def prepare(self, moments: Moments) -> Prepared:
        SEEN.append(Moments(moments.hessian.clone(), None, moments.tokens))
        return super().prepare(moments)


def recipe(solver: Gptq) -> Recipe:
    return Recipe(KMeans(), Fixed(2), NoReservation(), solver)


@pytest.mark.parametrize(("name", "groups"), [("llama", 1), ("opt", 1), ("gpt2", 3), ("phi", 2)])
def test_each_linear_has_a_hessian_in_which_tokens_weigh_as_they_should(name, groups, tmp_path):
    SEEN.clear()
    kind = ARCHITECTURES[name]
    model = kind.build()
    weights = kept(tmp_path, WholeModel(model), OutputGradient(groups))
    quantize_model(
        WholeModel(model), BATCHES, recipe(Watched()), opened(tmp_path / "store"), weights=weights
    )
    entering = defaultdict(list)
    for path in kind.linears():
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: entering[path].append(args[0].reshape(-1, args[0].shape[-1]))
        )
    with torch.no_grad():
        for batch in BATCHES:
            model(batch, use_cache=False)
    squares = oracle(kind.build(), kind, groups)
    assert len(SEEN) == len(kind.linears())
    for path, moments in zip(kind.linears(), SEEN, strict=True):
        inputs = torch.cat(entering[path]).double()
        own = squares[path] / squares[path].mean()
        assert moments.tokens == len(inputs)
        for group, hessian in enumerate(moments.hessian):
            expected = 2 / len(inputs) * (inputs * own[:, group, None]).t() @ inputs
            assert torch.allclose(hessian, expected, rtol=0, atol=1e-3 * expected.max()), path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


def quantized(folder: Path, place: Path, **options) -> dict[str, Tensor]:
    """Everything that a store holds of a model that is read block by block."""
    model = streamed(folder, place / "work")
    solver = options.pop("solver", Gptq())
    if objective := options.pop("objective", None):
        options["weights"] = kept(place, model, objective)
    if squares := options.pop("squares", None):
        for number, batch in enumerate(BATCHES):
            kinds = len(options["weights"].names)
            options["weights"].keep(number, torch.full((kinds * batch.numel(),), squares))
    quantize_model(model, BATCHES, recipe(solver), opened(place / "store"), **options)
    packed = opened(place / "store").packed()
    return {f"{n}.{s}": t for n, w in packed.items() for s, t in w.tensors.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("solver", [Gptq(), Gptq(asymmetric=0.5)])
def test_weights_that_are_all_alike_change_nothing(solver, folder, tmp_path):
    plain = quantized(folder, tmp_path / "plain", solver=solver)
    alike = quantized(
        folder, tmp_path / "alike", solver=solver, objective=OutputGradient(), squares=0.25
    )
    own = quantized(folder, tmp_path / "own", solver=solver, objective=OutputGradient())
    assert same(alike, plain)
    assert not same(own, plain)


class StopError(Exception):
    pass


def test_a_run_that_stops_between_layers_goes_on_to_the_same_bytes(folder, tmp_path):
    expected = quantized(folder, tmp_path / "undisturbed", objective=OutputGradient())
    seen: list[str] = []

    def stop(name: str, _: object) -> None:
        seen.append(name)
        if seen.count("layer") == 5:
            raise StopError

    with pytest.raises(StopError):
        options = {"objective": OutputGradient(), "watcher": Watcher(event=stop)}
        quantized(folder, tmp_path / "parts", **options)
    assert same(quantized(folder, tmp_path / "parts", objective=OutputGradient()), expected)
