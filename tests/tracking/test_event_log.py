"""events.jsonl: one JSON object a line, readable after any kind of end."""

from __future__ import annotations

import json
import math

import pytest

from claq_exp.tracking.events import EventLog


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict]] = []
        self.finished: list[dict | None] = []

    def event(self, name: str, data: dict) -> None:
        self.events.append((name, data))

    def finish(self, results: dict | None) -> None:
        self.finished.append(results)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def lines(path) -> list[dict]:
    def refuse(text: str) -> None:
        raise ValueError(text)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_every_line_is_an_object_with_time_and_event(path):
    with EventLog(path, []) as log:
        log.event("started", run="a\nb \u2028 é")
        log.event("layer", name="q_proj", bits=3.5, shape=(4, 6))
    first, second = lines(path)
    assert (first["event"], first["run"]) == ("started", "a\nb \u2028 é")
    assert (second["event"], second["bits"], second["shape"]) == ("layer", 3.5, [4, 6])
    assert first["time"] <= second["time"]


def test_a_line_is_on_disk_before_the_next_thing_happens(path):
    with EventLog(path, []) as log:
        log.event("started")
        assert len(lines(path)) == 1


@pytest.mark.case(97)
def test_what_json_cannot_say_becomes_null_at_any_depth(path):
    recorder = Recorder()
    with EventLog(path, [recorder]) as log:
        log.event("layer", a=math.nan, b={"c": [math.inf, 1.0], 7: -math.inf})
    (line,) = lines(path)
    assert line["a"] is None
    assert line["b"] == {"c": [None, 1.0], "7": None}
    assert recorder.events == [("layer", {"a": None, "b": {"c": [None, 1.0], "7": None}})]


def test_seconds_add_up_over_several_tries_and_memory_is_the_largest(path):
    with EventLog(path, []) as log:
        log.event("stage", stage="load", load=1.5, peak_memory_bytes=70)
        log.event("block", block=0, solve=2.0, hessian=0.5)
        log.event("layer", seconds=100.0)
    with EventLog(path, []) as log:
        log.event("stage", stage="load", load=1.0, peak_memory_bytes=50)
        log.event("block", block=1, solve=3.0, hessian=0.25)
        spent = log.spent()
    assert spent == {"load": 2.5, "solve": 5.0, "hessian": 0.75, "peak_memory_bytes": 70}


@pytest.mark.case(6)
@pytest.mark.parametrize("cut", ["", "{", '{"time": 1, "event": "block", "solve": 9', "\0\0\0"])
def test_a_line_that_a_kill_left_unfinished_is_skipped_and_ended(cut, path):
    whole = '{"time": 1, "event": "block", "block": 0, "solve": 2.0}\n'
    path.write_text(whole + cut)
    with EventLog(path, []) as log:
        log.event("block", block=1, solve=3.0)
        assert log.spent() == {"solve": 5.0}
    content = path.read_text().splitlines()
    assert content[0] == whole.strip()
    assert json.loads(content[-1])["block"] == 1


def test_the_others_get_the_results_of_a_run_that_went_well(path):
    recorder = Recorder()
    with EventLog(path, [recorder]) as log:
        log.results({"schema": 1})
        assert recorder.finished == []
    assert recorder.finished == [{"schema": 1}]
    assert [line["event"] for line in lines(path)] == []


@pytest.mark.parametrize("error", [RuntimeError("no\nluck"), KeyboardInterrupt()])
def test_a_failure_is_the_last_line_and_the_others_get_no_results(error, path):
    recorder = Recorder()
    with pytest.raises(type(error)), EventLog(path, [recorder]) as log:
        log.results({"schema": 1})
        raise error
    assert recorder.finished == [None]
    assert lines(path)[-1]["event"] == "failed"
    assert lines(path)[-1]["error"]
