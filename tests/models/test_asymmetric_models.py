"""Models whose linears follow the original: what solvers are told of it, and how it lasts."""

from __future__ import annotations

import itertools
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from quantized_models import opened
from tiny_architectures import ARCHITECTURES, saved, streamed, token_batches
from torch import Tensor, nn

from claq_exp.calibration.streams import STUDENT, TEACHER, HiddenForm
from claq_exp.errors import ConfigError
from claq_exp.models.blocks import BlockInputs
from claq_exp.models.experts import ARGUMENTS, SeparateExperts
from claq_exp.models.stream import BlockedModel, WholeModel
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.moments import Moments
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.quantize.solver.columns import ColumnSystem
from claq_exp.run.quantize import quantize_model
from claq_exp.run.teacher import TeacherBlock
from claq_exp.run.watcher import Watcher
from claq_exp.train.norms import Norms
from claq_exp.transform.smooth import Smooth

BATCHES = [*token_batches(2, size=4), token_batches(1, size=2, seed=1)[0]]
SEEN: list[Moments] = []


@dataclass(frozen=True)
class Watched(Gptq):
    """An asymmetric solver that keeps what it is told, in the order of the groups."""

    def prepare(self, moments: Moments) -> ColumnSystem:
        SEEN.append(Moments(moments.hessian.clone(), moments.cross.clone(), moments.tokens))
        return super().prepare(moments)


def recipe(solver: Gptq) -> Recipe:
    return Recipe(KMeans(), Fixed(2), NoReservation(), solver)


ASYMMETRIC = recipe(Gptq(asymmetric=1.0))


@contextmanager
def entering(model: nn.Module):
    """Name of a module -> what enters it in each call; experts: with where tokens are sent."""
    found = defaultdict(list)

    def note(name):
        return lambda _, args, keyword: found[name].append(
            {**dict(zip(ARGUMENTS, args, strict=False)), **keyword}
        )

    watched = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | SeparateExperts) or type(module).__name__ == "Conv1D"
    ]
    yield found
    for hook in watched:
        hook.remove()


@torch.no_grad()
def inputs_of(model: nn.Module) -> dict[str, list[dict[str, Tensor]]]:
    with entering(model) as found:
        for batch in BATCHES:
            model(batch, use_cache=False)
    return found


def gathered(calls: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([call["hidden_states"].flatten(0, -2) for call in calls]).double()


def expert_rows(
    name: str, original: nn.Module, student: dict, teacher: dict
) -> tuple[Tensor, Tensor]:
    """What enters a layer of an expert in both models, for the student's tokens."""
    experts, _, rest = name.partition(".experts.")
    index, _, layer = rest.partition(".")
    expert = original.get_submodule(f"{experts}.experts.{index}")
    found: list[tuple[Tensor, Tensor]] = []
    for own, other in zip(
        student[f"{experts}.experts"], teacher[f"{experts}.experts"], strict=True
    ):
        token, _ = torch.where(own["top_k_index"] == int(index))
        theirs = other["hidden_states"][token]
        if layer == "down_proj":
            theirs = expert.act_fn(expert.gate_proj(theirs)) * expert.up_proj(theirs)
        found.append((own["hidden_states"][token], theirs))
    one, two = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (gathered(student[name]) if student[name] else one[:, :0]), two.double()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma2", "phi", "mixtral"])
def test_a_solver_is_told_what_the_inputs_have_lost_token_by_token(name, tmp_path):
    """Later linears do not change what enters a linear: the finished model is its student."""
    SEEN.clear()
    original, model = ARCHITECTURES[name].build(), ARCHITECTURES[name].build()
    whole, store = WholeModel(model), opened(tmp_path)
    quantize_model(whole, BATCHES, recipe(Watched(asymmetric=1.0)), store)
    teacher, student = inputs_of(original), inputs_of(model)
    first = [
        f"{whole.path}.{index}.{group[0]}"
        for index in range(len(whole.blocks))
        for group in ARCHITECTURES[name].groups
    ]
    assert len(SEEN) == len(first)
    lost = []
    for path, moments in zip(first, SEEN, strict=True):
        if ".experts." in path:
            own, other = expert_rows(path, original, student, teacher)
        else:
            own, other = gathered(student[path]), gathered(teacher[path])
        assert moments.tokens == len(other)
        if not len(other):
            assert not moments.cross.any()
            continue
        hessian, cross = moments.single(), moments.single_cross()
        scale = 2 / len(own)
        size = hessian.abs().max()
        assert torch.allclose(hessian, scale * own.t() @ own, rtol=0, atol=1e-4 * size), path
        expected = scale * (other - own).t() @ own
        assert torch.allclose(cross, expected, rtol=0, atol=1e-4 * size), path
        lost.append((cross.abs().max() / size).item())
    assert lost[0] == 0  # the first block's inputs are the original's
    assert min(lost[len(lost) // 2 :]) > 1e-3


@torch.no_grad()
def test_hidden_states_come_nearer_to_the_originals_than_plain_gptqs(tmp_path):
    """What leaves the model: summed over three models, for one alone is a draw of lots."""
    distances = {0.0: 0.0, 1.0: 0.0}
    for share, seed in itertools.product(distances, range(3)):
        model, store = ARCHITECTURES["llama"].build(seed), opened(tmp_path / f"{share}_{seed}")
        solver, tune = Gptq(asymmetric=share), Norms(steps=1, learning_rate=1e-9)
        quantize_model(WholeModel(model), BATCHES, recipe(solver), store, tune=tune)
        for own, other in zip(store.hidden(STUDENT), store.hidden(TEACHER), strict=True):
            distances[share] += ((own - other).square().sum() / other.square().sum()).item()
    assert distances[1.0] < 0.8 * distances[0.0]


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def folder(request, tmp_path_factory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def stored(place: Path) -> dict[str, Tensor]:
    """Everything that a store holds of a model."""
    store = opened(place)
    packed = {f"{n}.{s}": t for n, w in store.packed().items() for s, t in w.tensors.items()}
    return packed | store.dense()


def quantized(model: BlockedModel, place: Path, **options) -> dict[str, Tensor]:
    quantize_model(model, BATCHES, options.pop("recipe", ASYMMETRIC), opened(place), **options)
    return stored(place)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


OPTIONS = {"plain": {}, "smooth": {"transform": Smooth()}, "tuned": {"tune": Norms(steps=2)}}


@pytest.mark.parametrize("kind", OPTIONS)
def test_streamed_or_whole_in_memory_or_on_disk_it_is_the_same_bytes(kind, folder, tmp_path):
    options = OPTIONS[kind]
    parts = quantized(streamed(folder, tmp_path / "work"), tmp_path / "parts", **options)
    form = {"hidden_form": HiddenForm(on_disk=True)}
    disk = quantized(streamed(folder, tmp_path / "work"), tmp_path / "disk", **options, **form)
    assert_same(disk, parts)
    memory = WholeModel(streamed(folder, tmp_path / "work").load(), stored=torch.bfloat16)
    assert_same(quantized(memory, tmp_path / "whole", **options), parts)
    symmetric = quantized(
        streamed(folder, tmp_path / "work"), tmp_path / "no", recipe=recipe(Gptq()), **options
    )
    assert any(not torch.equal(symmetric[name], tensor) for name, tensor in parts.items())


class StopError(Exception):
    pass


@pytest.mark.parametrize(
    ("event", "count", "whole"),
    [("layer", 5, False), ("tune", 1, False), ("block", 1, False), ("tune", 1, True)],
)
def test_a_run_that_stops_anywhere_goes_on_to_the_same_bytes(event, count, whole, folder, tmp_path):
    options = {"transform": Smooth(), "tune": Norms(steps=2)}

    def model() -> BlockedModel:
        parts = streamed(folder, tmp_path / "work")
        return WholeModel(parts.load(), stored=torch.bfloat16) if whole else parts

    expected = quantized(model(), tmp_path / "undisturbed", **options)
    seen: list[str] = []

    def stop(name: str, _: object) -> None:
        seen.append(name)
        if seen.count(event) == count:
            raise StopError

    with pytest.raises(StopError):
        quantized(model(), tmp_path / "parts", watcher=Watcher(event=stop), **options)
    assert_same(quantized(model(), tmp_path / "parts", **options), expected)


def test_rewritten_norms_do_not_count_as_what_was_lost(folder, tmp_path):
    """Nothing is quantized before the first linears: their inputs are the original's, divided."""
    SEEN.clear()
    watched = recipe(Watched(asymmetric=1.0))
    model = streamed(folder, tmp_path / "work")
    quantized(model, tmp_path / "smooth", transform=Smooth(), recipe=watched)
    assert model.overlay.factors
    moments = SEEN[0]
    assert moments.cross.abs().max() < 0.01 * moments.hessian.abs().max()  # norms have 16 bits


def test_the_teacher_flows_through_the_original_and_a_plain_run_has_none(folder, tmp_path):
    quantized(streamed(folder, tmp_path / "work"), tmp_path / "plain", recipe=recipe(Gptq()))
    assert not list((tmp_path / "plain").glob(f"{TEACHER}*"))
    quantized(streamed(folder, tmp_path / "work"), tmp_path / "own")
    quantized(
        streamed(folder, tmp_path / "work"),
        tmp_path / "tuned",
        recipe=recipe(Gptq()),
        tune=Norms(steps=1),
    )
    own, tuned = opened(tmp_path / "own"), opened(tmp_path / "tuned")
    for found, expected in zip(own.hidden(TEACHER), tuned.hidden(TEACHER), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(own.hidden(STUDENT)[0], own.hidden(TEACHER)[0])


def test_experts_whose_tokens_cannot_be_told_are_refused_in_one_line():
    model = ARCHITECTURES["mixtral"].build()
    for block in model.model.layers:
        block.mlp.experts.__class__ = type("Own", (nn.ModuleList,), {"forward": None})
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.experts .*solver\.asymmetric=0"):
        TeacherBlock.of(WholeModel(model), 0, BlockInputs())
