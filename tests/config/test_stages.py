"""One list of stages: what is planned is what is run, timed and checked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from conftest import tiny_llama

from claq_exp.cli import main
from claq_exp.compose.experiment import compose_config
from claq_exp.config import CHANGING
from claq_exp.run.job import STEPS
from claq_exp.run.plan import Plan, make_plan
from claq_exp.run.stages import STAGES, TIMINGS, Cost, Footprint, Linear, Shape, Times, costs

NAMES = [stage.name for stage in STAGES]
OBSERVED = ["activation=lo_bcq", "activation.books=local"]
SHAPE = Shape(
    sizes=Footprint((Linear(8, 6),), *(float(2**power) for power in range(20, 34))),
    times=Times(1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 1.5, 64.0),
    threads=1,
    on_gpu=False,
    streams=False,
    allocates=True,
    observes=True,
)


def plan(*words: str) -> Plan:
    config = compose_config(["evaluation.context=64", *words])
    return make_plan(config, tiny_llama().config, "cpu")


def test_every_stage_has_a_step_and_every_step_a_stage():
    assert list(STEPS) == NAMES
    assert len(set(NAMES)) == len(NAMES)


def test_every_second_of_a_stage_has_a_field_in_the_results():
    assert all(stage.timings for stage in STAGES)
    assert set(TIMINGS) == {timing for stage in STAGES for timing in stage.timings}
    assert [stage.name for stage in STAGES if len(stage.timings) > 1] == ["quantize"]


def test_a_plan_has_the_stages_that_the_run_will_have_in_order():
    extra = ("output gradients", "allocate", "activations", "evaluate after quantize")
    usual = [name for name in NAMES if name not in extra]
    assert list(plan().seconds) == usual
    assert list(plan("allocation=rate_distortion", "allocation.target_bits=9").seconds) == [
        name for name in NAMES if name == "allocate" or name not in extra
    ]
    found = plan(*OBSERVED, "evaluation.after=[quantize]")
    assert list(found.seconds) == [name for name in NAMES if name not in extra[:2]]
    assert found.seconds["activations"] > 0
    assert found.needs.host["activations"] > plan().needs.host["evaluate original"] / 2
    assert list(plan("activation=nvfp4").seconds) == usual  # it looks at nothing
    weighed = plan("objective=output_gradient")
    assert list(weighed.seconds) == [name for name in NAMES if name not in extra[1:]]
    assert weighed.needs.host["output gradients"] > plan().needs.host["evaluate original"] / 2


@pytest.mark.parametrize("on_gpu", [False, True])
def test_bytes_are_where_the_passes_run(on_gpu):
    found = costs(replace(SHAPE, on_gpu=on_gpu))
    plain = costs(SHAPE)
    passing = ("evaluate original", "output gradients", "allocate", "activations")
    for name in (*passing, "evaluate quantized"):
        forward = found[name].device if on_gpu else found[name].host
        assert forward == plain[name].host
        assert (found[name].host if on_gpu else found[name].device) == 0
    assert (found["quantize"].host < plain["quantize"].host) == on_gpu
    assert found["quantize"].host > 0


def test_seconds_and_disk_add_up():
    found = costs(SHAPE)
    times, sizes = SHAPE.times, SHAPE.sizes
    assert found["quantize"].seconds == times.calibrate + times.solve
    assert found["allocate"].seconds == times.survey + 3 * times.solve
    assert found["evaluate quantized"].seconds == 2 + times.read + 1.5 * times.evaluate
    disk = sum(cost.disk for cost in found.values())
    assert disk == 2 * sizes.kept_hidden + 2 * sizes.checkpoint + sizes.compared


def test_the_stages_to_measure_after_are_those_that_change_the_model():
    names = {f"evaluate after {stage}" for stage in CHANGING}
    assert names == {name for name in NAMES if name.startswith("evaluate after ")}
    assert set(CHANGING) < set(NAMES)
    assert "evaluate after quantize" in costs(replace(SHAPE, after=("quantize",)))


def test_a_stage_that_a_run_does_not_have_costs_nothing():
    times = replace(SHAPE.times, weigh=0.0)
    found = costs(replace(SHAPE, times=times, allocates=False, observes=False))
    assert {"output gradients", "allocate", "activations"}.isdisjoint(found)
    assert all(isinstance(cost, Cost) for cost in found.values())


def test_looks_at_activations_are_timed_and_what_stood_before_is_measured(
    tiny_run, tmp_path, capfd
):
    words = ["precision=fixed", "reservation=none", "activation.codebooks=2", "threads=1"]
    after = ["evaluation.after=[quantize]", "evaluation.kl_windows=2"]
    assert main([*tiny_run, *OBSERVED, *words, *after]) == 0
    assert "after quantize" in capfd.readouterr().out
    (path,) = (tmp_path / "outputs").rglob("results.json")
    results = json.loads(path.read_text())
    assert list(results["timings"]) == list(TIMINGS)
    assert results["timings"]["activations"] > 0
    then, end = results["after"]["quantize"], results["perplexity"]["wikipedia"]
    assert then["kl"]["wikipedia"] != results["kl"]["wikipedia"]["mean"]
    assert not list(path.parent.glob("work"))
    plain = [*tiny_run, *words[:2], "threads=1", "name=plain"]  # nothing follows the weights
    assert main([*plain, "evaluation.after=[quantize]"]) == 0
    (path,) = (tmp_path / "outputs" / "plain").rglob("results.json")
    results = json.loads(path.read_text())
    assert results["perplexity"]["wikipedia"]["quantized"] == then["perplexity"]["wikipedia"]
    assert results["after"]["quantize"]["perplexity"] == then["perplexity"]
    assert end["quantized"] != then["perplexity"]["wikipedia"]
