"""A plan's sizes are exact, and a run that this machine cannot hold does not start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_llama

from claq_exp.cli import main
from claq_exp.compose.experiment import compose_config
from claq_exp.run import needs
from claq_exp.run.plan import Plan, make_plan, plan_for
from claq_exp.system import resources

GIB = 2**30


@pytest.fixture
def only_folder(tmp_path):
    return lambda: next((tmp_path / "outputs" / "default").iterdir())


def unmeasured(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith("evaluation")] + ["evaluation=none"]


@pytest.mark.case(104)
@pytest.mark.parametrize(
    "words",
    [
        ["experiment=claq_2.12"],
        ["experiment=w4a4/lo_bcq_64_8"],
        ["experiment=gptq_4bit_g64", "solver=nearest"],
        ["codebook.shared=true", "codebook.row_scales=true", "precision.target_bits=2.5"],
        ["experiment=linear/or_2.6", "budget.bits=7"],
        ["embedding=uniform", "budget.bits=11.5", "budget.kind=model"],
    ],
    ids=["columns", "blocks", "grid", "shared", "budget", "budget of the model"],
)
def test_the_planned_bytes_are_those_of_the_checkpoint(words, tiny_run, only_folder):
    words = [*unmeasured(tiny_run), *words, "calibration.windows=2"]
    plan = plan_for(compose_config(words), "cpu")
    planned = plan.sizes
    assert main(words) == 0
    results = json.loads((only_folder() / "results.json").read_text())
    assert plan.activation_bits == results["bits"]["activation"]
    assert planned.bytes == results["size"]["checkpoint_bytes"]
    assert planned.ledger.as_dict() == results["bits"]["ledger"]
    for kind in ("nominal", "linear", "model"):
        assert getattr(planned, kind) == pytest.approx(results["bits"][kind], rel=1e-12)


@pytest.mark.case(104)
def test_a_second_stream_is_planned_for_where_a_strategy_wants_it_alone(tiny_run):
    def planned(*words: str) -> Plan:
        return plan_for(compose_config([*tiny_run, *words]), "cpu")

    plain, tuned = planned(), planned("tune=norms")
    assert planned("tune=none").hidden_bytes == plain.hidden_bytes == 8 * 64 * 48 * 4
    assert tuned.hidden_bytes == 2 * plain.hidden_bytes
    assert tuned.needs.disk == plain.needs.disk + 2 * plain.hidden_bytes
    assert tuned.needs.host["quantize"] > plain.needs.host["quantize"] + plain.hidden_bytes
    assert tuned.needs.host["evaluate original"] == plain.needs.host["evaluate original"]
    assert tuned.sizes == plain.sizes
    longer = planned("tune=norms", "tune.steps=32")
    assert plain.seconds["quantize"] < tuned.seconds["quantize"] < longer.seconds["quantize"]


def test_what_an_asymmetric_solver_takes_is_planned_for(tiny_run):
    def planned(*words: str) -> Plan:
        return plan_for(compose_config([*tiny_run, *words]), "cpu")

    plain, asymmetric = planned(), planned("solver.asymmetric=0.25")
    assert planned("solver.asymmetric=0").costs == plain.costs
    assert asymmetric.hidden_bytes == planned("tune=norms").hidden_bytes == 2 * plain.hidden_bytes
    assert planned("solver.asymmetric=1", "tune=norms").hidden_bytes == 2 * plain.hidden_bytes
    assert asymmetric.needs.disk == plain.needs.disk + 2 * plain.hidden_bytes
    block = 4 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 72 + 2 * 48)  # of the original, beside
    more = asymmetric.needs.host["quantize"] - plain.needs.host["quantize"]
    assert plain.hidden_bytes + block < more < plain.hidden_bytes + 4 * block
    assert asymmetric.needs.host["evaluate original"] == plain.needs.host["evaluate original"]
    assert asymmetric.sizes == plain.sizes
    assert 1.0 < asymmetric.seconds["quantize"] / plain.seconds["quantize"] < 4


def test_what_weighed_tokens_take_is_planned_for(tiny_run):
    def planned(*words: str) -> Plan:
        return plan_for(compose_config([*tiny_run, "embedding=none", *words]), "cpu")

    plain, one = planned(), planned("objective=output_gradient")
    four = planned("objective=output_gradient", "objective.groups=4")
    assert planned("objective=plain").costs == plain.costs
    weights = 8 * 64 * 7 * 3 * 4  # tokens, linears of a block, blocks, float32
    assert one.needs.disk == plain.needs.disk + weights
    assert four.needs.disk == plain.needs.disk + 4 * weights
    entering = 4 * 2 * 64 * 48  # bytes of what enters a block, of a batch of two windows
    assert one.states_bytes == 4 * entering
    held = one.costs["output gradients"].host
    states, graph = 4 * one.states_bytes, 40 * entering
    assert states + graph < held < states + 1.5 * graph + 2**20
    squares = 4 * 4 * 8 * 48**2  # q, k, v (and maybe o) receive the same; of each four groups
    more = four.costs["quantize"].host - plain.costs["quantize"].host
    assert squares / 4 < more < squares
    assert four.costs["quantize"].host > squares
    assert one.seconds["quantize"] < four.seconds["quantize"]
    assert one.sizes == plain.sizes


@pytest.mark.case(102)
@pytest.mark.parametrize("stage", ["evaluate", "quantize"])
def test_a_run_that_needs_more_memory_than_is_free_does_not_start(
    stage, tiny_run, tmp_path, monkeypatch, capfd
):
    words = unmeasured(tiny_run) if stage == "quantize" else tiny_run
    monkeypatch.setattr(needs, "available_memory", lambda: GIB // 2)
    assert main(words) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "GiB of memory" in line
    assert f"to {stage}" in line
    assert "0.5 GiB are free" in line
    assert "check_resources=false" in line
    assert not (tmp_path / "outputs").exists()
    assert main([*words, "check_resources=false"]) == 0


@pytest.mark.case(105)
def test_a_run_that_needs_more_disk_than_is_free_does_not_start(
    tiny_run, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(needs, "free_disk", lambda folder: 1000)
    assert main(tiny_run) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "GiB of disk" in line
    assert str(tmp_path / "outputs") in line
    assert not (tmp_path / "outputs").exists()


def planned(*words: str, layers: int = 3, **sizes: int) -> Plan:
    model = tiny_llama(num_hidden_layers=layers, **sizes)
    return make_plan(compose_config(["evaluation.context=64", *words]), model.config, "cpu")


def test_memory_to_quantize_does_not_grow_with_depth():
    few, many = planned(layers=2), planned(layers=20)
    assert few.needs.host["quantize"] == many.needs.host["quantize"]
    assert few.needs.host["evaluate original"] < many.needs.host["evaluate original"]


def test_wide_layers_hidden_states_and_rate_distortion_take_memory():
    plain = planned().needs.host
    wide = planned(intermediate_size=1024).needs.host
    assert wide["quantize"] - plain["quantize"] >= 8 * (1024**2 - 72**2)
    long = planned("calibration.windows=320").needs
    assert long.host["quantize"] > plain["quantize"]
    assert long.disk > planned().needs.disk
    assert set(planned("experiment=linear/rate_distortion_2.6", "budget.bits=9").needs.host) == {
        "evaluate original",
        "evaluate quantized",
        "quantize",
        "allocate",
    }


def test_a_model_is_streamed_where_it_would_not_fit(monkeypatch):
    words = ["evaluation=perplexity"]
    assert not planned(*words).needs.streams
    assert planned(*words, "stream=true").needs.streams
    monkeypatch.setattr(needs, "free_memory", lambda device: int(needs.LIBRARIES) + 1000)
    assert planned(*words).needs.streams
    assert not planned(*words, "stream=false").needs.streams
    assert not planned(*words, "runtime.kernel=reference").needs.streams
    assert not planned().needs.streams  # there are tasks, and lm-eval wants the whole


def test_a_gpu_holds_blocks_and_the_host_the_hessians(monkeypatch):
    monkeypatch.setattr(needs, "free_memory", lambda device: 80 * GIB)
    monkeypatch.setattr("claq_exp.run.shape.free_memory", lambda device: 80 * GIB)
    monkeypatch.setattr("claq_exp.run.shape.windows_at_once", lambda *_: 4)
    config = compose_config(["evaluation.context=64", "model.dtype=float16"])
    found = make_plan(config, tiny_llama().config, "cuda").needs
    assert set(found.device) == {"evaluate original", "evaluate quantized", "quantize"}
    assert set(found.host) == {"quantize"}
    needs.check_needs(found, "cuda", Path.cwd())
    monkeypatch.setattr(needs, "free_memory", lambda device: 1000)
    with pytest.raises(needs.ConfigError, match="memory of cuda"):
        needs.check_needs(found, "cuda", Path.cwd())


def test_the_free_memory_is_that_of_the_tightest_limit(monkeypatch, tmp_path):
    whole = resources.available_memory()
    assert whole > 0
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text("3000000\n")
    used.write_text("1000000\n")
    monkeypatch.setattr(resources, "CONTROL_GROUPS", ((str(limit), str(used)),))
    assert resources.available_memory() == 2_000_000
    limit.write_text("max\n")
    assert resources.available_memory() > 2_000_000
    monkeypatch.setattr(resources.resource, "getrlimit", lambda _: (0, 0))
    assert resources.available_memory() == 0


def test_the_peak_counts_from_where_it_was_reset():
    block = bytearray(300 * 2**20)
    block[:: 2**12] = b"\1" * len(block[:: 2**12])
    high = resources.peak_memory()
    del block
    resources.reset_peak()
    assert resources.peak_memory() < high
