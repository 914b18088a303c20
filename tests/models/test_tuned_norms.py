"""Norms that are trained: the gradient, the gain, and that nothing of it is lost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from quantized_models import opened
from tiny_architectures import ARCHITECTURES, saved, streamed, token_batches
from torch import Tensor, nn

from claq_exp.calibration.streams import STUDENT, TEACHER, HiddenForm
from claq_exp.checkpoint.store import BlockStore
from claq_exp.errors import ConfigError
from claq_exp.models.blocks import BlockInputs, capture_inputs, run_block
from claq_exp.models.discover import linear_weight, linears_of
from claq_exp.models.stream import BlockedModel, WholeModel
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.run.quantize import quantize_model
from claq_exp.run.watcher import Watcher
from claq_exp.system.interruption import Interrupted
from claq_exp.train import TUNE
from claq_exp.train.norms import Norms, _gradients, norm_parameters
from claq_exp.train.window import Tuned, Window

RECIPE = Recipe(KMeans(), Fixed(2), NoReservation(), Gptq())
BATCHES = [*token_batches(2, size=4), token_batches(1, size=2, seed=1)[0]]
FEW = Norms(steps=6, learning_rate=0.02, batch=2)
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def window_of(model: nn.Module, seed: int = 0) -> tuple[Window, nn.Module]:
    """The first block of a model with rounded matrices, and its original's outputs."""
    whole = WholeModel(model)
    with torch.no_grad():
        inputs = capture_inputs(whole, BATCHES)[0]
        block = whole.blocks[0]
        teacher = [run_block(block, inputs, batch) for batch in range(len(BATCHES))]
        generator = torch.Generator().manual_seed(seed)
        for module in linears_of(block).values():
            weight = linear_weight(module)
            weight += 0.1 * torch.randn(weight.shape, generator=generator).to(weight)
    return Window(block, inputs, teacher, len(BATCHES)), block


def error(window: Window) -> float:
    with torch.no_grad():
        pairs = [
            (run_block(window.module, window.inputs, batch), teacher)
            for batch, teacher in enumerate(window.teacher)
        ]
    squares = sum((one - other).double().square().sum().item() for one, other in pairs)
    return squares / sum(other.double().square().sum().item() for _, other in pairs)


@every_architecture
def test_norms_are_what_is_no_matrix_and_belongs_to_none(name):
    model = ARCHITECTURES[name].build()
    block = WholeModel(model).blocks[0]
    found = norm_parameters(block)
    assert found
    assert all("norm" in path or "ln_" in path or "layernorm" in path for path in found), found
    held = {f"{path}.{own}" for path in linears_of(block) for own in ("weight", "bias")}
    assert not held & found.keys()
    vectors = {path for path, p in block.named_parameters() if p.ndim == 1}
    assert vectors - held - found.keys() == set()


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "gemma2"])
def test_the_gradient_is_the_slope_of_the_error(name):
    model = ARCHITECTURES[name].build().double()
    window, block = window_of(model)
    norms = norm_parameters(block)
    path, parameter = next(iter(norms.items()))
    found = _gradients(window, list(norms.values()), {0, 2})[0]

    def loss() -> float:
        with torch.no_grad():
            return sum(
                (
                    (run_block(block, window.inputs, b) - window.teacher[b]).square().sum()
                    / window.teacher[b].square().mean()
                ).item()
                for b in (0, 2)
            )

    for place in (0, 7, 23):
        with torch.no_grad():
            parameter[place] += 1e-5
            above = loss()
            parameter[place] -= 2e-3
            below = loss()
            parameter[place] += 1e-5
        slope = (above - below) / 2e-3  # some norms compute in float32, whatever the model
        assert abs(found[place].item() - slope) < 3e-3 * found.norm().item(), path


@every_architecture
def test_training_lowers_the_error_and_leaves_the_block_alone(name):
    window, block = window_of(ARCHITECTURES[name].build())
    before = {path: tensor.clone() for path, tensor in block.state_dict().items()}
    asked = [parameter.requires_grad for parameter in block.parameters()]
    first = error(window)
    tuned = FEW.run(window)
    for path, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[path]), path
    assert [parameter.requires_grad for parameter in block.parameters()] == asked
    assert all(parameter.grad is None for parameter in block.parameters())
    assert tuned.changed.keys() == norm_parameters(block).keys()
    block.load_state_dict({**before, **tuned.changed})
    assert tuned.report["error_before"] == pytest.approx(first, rel=1e-4)
    assert tuned.report["error_after"] == pytest.approx(error(window), rel=1e-4)
    assert error(window) < first


def test_steps_that_make_it_worse_are_not_kept():
    window, _ = window_of(ARCHITECTURES["llama"].build())
    tuned = Norms(steps=3, learning_rate=0.9).run(window)
    assert tuned.report["error_after"] > tuned.report["error_before"]
    assert (tuned.changed, tuned.report["kept"]) == ({}, False)


def test_a_block_without_norms_or_without_an_error_is_left_as_it_is():
    class Block(nn.Module):
        def __init__(self, *, norm: bool) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4) if norm else nn.Identity()

        def forward(self, hidden: Tensor) -> Tensor:
            return self.linear(self.norm(hidden))

    inputs = BlockInputs([torch.randn(2, 3, 4)], {2: ((), {})})
    bare = Block(norm=False)
    assert FEW.run(Window(bare, inputs, [torch.zeros(2, 3, 4)], 1)) == Tuned()
    exact = Block(norm=True)
    with torch.no_grad():
        outputs = [run_block(exact, inputs, 0)]
    assert FEW.run(Window(exact, inputs, outputs, 1)) == Tuned()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "tune.steps is 0"),
        ({"batch": -1}, "tune.batch is -1"),
        ({"learning_rate": 0.0}, "tune.learning_rate is 0"),
        ({"learning_rate": math.nan}, "tune.learning_rate is nan"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Norms(**fields)


class TestFamily:
    """What every member must do."""

    @pytest.fixture(params=TUNE)
    def strategy(self, request):
        return TUNE[request.param]()

    def test_it_is_plain_data_that_says_what_it_wants_and_costs(self, strategy):
        assert strategy == type(strategy)()
        assert strategy.wants <= {TEACHER}
        for batches in (1, 8):
            cost = strategy.cost(batches)
            assert cost.passes >= 0
            assert cost.states >= 0

    def test_it_leaves_the_window_and_says_what_to_change(self, strategy):
        window, block = window_of(ARCHITECTURES["llama"].build())
        before = {path: tensor.clone() for path, tensor in block.state_dict().items()}
        results = [strategy.run(window) for _ in range(2)]
        for path, tensor in block.state_dict().items():
            assert torch.equal(tensor, before[path]), path
        assert results[0].changed.keys() == results[1].changed.keys() <= before.keys()
        for path, tensor in results[0].changed.items():
            assert tensor.shape == before[path].shape
            assert torch.equal(tensor, results[1].changed[path])


@pytest.fixture(scope="module", params=["llama", "opt", "gemma2", "mixtral"])
def folder(request, tmp_path_factory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


def tuned(model: BlockedModel, place: Path, **options) -> dict[str, Tensor]:
    """Quantize and tune a model, and return its norms as an export would read them."""
    store = opened(place)
    options = {"tune": FEW, **options}
    quantize_model(model, BATCHES, RECIPE, store, **options)
    return exported(model, place)


def exported(model: BlockedModel, place: Path) -> dict[str, Tensor]:
    dense = opened(place).dense()
    assert dense
    for name, tensor in dense.items():
        assert torch.equal(model.overlay.read(name), tensor)
    return {
        name: model.overlay.read(name).clone()
        for name, p in model.model.named_parameters()
        if name.startswith(f"{model.path}.") and p.ndim == 1
    }


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.case(150)
def test_streamed_or_whole_in_memory_or_on_disk_the_norms_are_the_same_bytes(folder, tmp_path):
    parts = tuned(streamed(folder, tmp_path / "work"), tmp_path / "parts")
    disk = tuned(
        streamed(folder, tmp_path / "work"),
        tmp_path / "disk",
        hidden_form=HiddenForm(on_disk=True),
    )
    assert_same(disk, parts)
    memory = streamed(folder, tmp_path / "work").load()
    whole = tuned(WholeModel(memory, stored=torch.bfloat16), tmp_path / "whole")
    assert_same(whole, parts)
    for name, tensor in whole.items():
        assert torch.equal(memory.get_parameter(name), tensor.float()), name
    dense = opened(tmp_path / "whole").dense()
    assert {tensor.dtype for tensor in dense.values()} == {torch.bfloat16}
    rows = opened(tmp_path / "parts").report("tune")
    assert [row["block"] for row in rows] == list(range(len(rows)))
    assert any(row["kept"] for row in rows)
    assert all(row["error_after"] < row["error_before"] for row in rows if row["kept"])


class Stop(Exception):
    pass


@pytest.mark.case(150)
@pytest.mark.parametrize(
    ("kind", "event", "count"),
    [
        ("streamed", "layer", 3),
        ("streamed", "tune", 1),
        ("streamed", "tune", 2),
        ("streamed", "block", 1),
        ("whole", "tune", 2),
    ],
)
def test_a_run_that_stops_anywhere_goes_on_to_the_same_norms(event, count, kind, folder, tmp_path):
    def model() -> BlockedModel:
        parts = streamed(folder, tmp_path / "work")
        return parts if kind == "streamed" else WholeModel(parts.load(), stored=torch.bfloat16)

    whole = tuned(model(), tmp_path / "whole")
    seen: list[str] = []

    def stop(name: str, _: object) -> None:
        seen.append(name)
        if seen.count(event) == count:
            raise Stop

    with pytest.raises(Stop):
        tuned(model(), tmp_path / "parts", watcher=Watcher(event=stop))
    again: list[str] = []
    watcher = Watcher(event=lambda name, data: again.append(f"{name} {data['block']}"))
    resumed = model()
    assert_same(tuned(resumed, tmp_path / "parts", watcher=watcher), whole)
    trained = [line for line in again if line.startswith("tune")]
    assert len(trained) + seen.count("tune") == len(resumed.blocks)  # none twice
    assert_same(exported(resumed, tmp_path / "whole"), whole)
    last = model()  # a run that ended before its export
    quantize_model(last, BATCHES, RECIPE, opened(tmp_path / "parts"), tune=FEW)
    assert_same(exported(last, tmp_path / "parts"), whole)


@pytest.mark.case(150)
def test_a_damaged_part_of_norms_is_trained_again(folder, tmp_path):
    whole = tuned(streamed(folder, tmp_path / "work"), tmp_path / "whole")
    tuned(streamed(folder, tmp_path / "work"), tmp_path / "parts")
    path = tmp_path / "parts" / "tune_0001_00.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    told: list[str] = []
    store = BlockStore(tmp_path / "parts", {"run": "run"})
    store.open(told.append)
    assert len(told) == 1
    model = streamed(folder, tmp_path / "work")
    quantize_model(model, BATCHES, RECIPE, store, tune=FEW)
    assert_same(exported(model, tmp_path / "parts"), whole)


def test_the_teacher_is_the_original_model_and_a_plain_run_has_none(folder, tmp_path):
    plain = opened(tmp_path / "plain")
    quantize_model(streamed(folder, tmp_path / "work"), BATCHES, RECIPE, plain)
    assert plain.hidden(TEACHER) is None
    assert not list((tmp_path / "plain").glob("teacher*"))
    store = opened(tmp_path / "tuned")
    quantize_model(streamed(folder, tmp_path / "work"), BATCHES, RECIPE, store, tune=FEW)
    model = streamed(folder, tmp_path / "work").load()
    last: list[Tensor] = []
    block = WholeModel(model).blocks[-1]
    hook = block.register_forward_hook(lambda _, __, output: last.append(output))
    with torch.no_grad():
        for batch in BATCHES:
            model(batch, use_cache=False)
    hook.remove()
    teacher, student = store.hidden(TEACHER), store.hidden(STUDENT)
    for number, output in enumerate(last):
        expected = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(teacher[number], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(student[number], expected, rtol=1e-2)


def test_an_interrupted_run_has_its_teacher_when_it_goes_on(folder, tmp_path):
    whole = tuned(streamed(folder, tmp_path / "work"), tmp_path / "whole")
    for _ in range(40):
        asked = iter([False])
        watcher = Watcher(stopping=lambda asked=asked: next(asked, True))
        try:
            found = tuned(streamed(folder, tmp_path / "work"), tmp_path / "parts", watcher=watcher)
        except Interrupted:
            continue
        break
    assert_same(found, whole)
