"""The hub's own client libraries against a hub on this machine: what is fetched, kept, refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from fake_hub import Hub, Repository, folder_files, running_hub
from paper_texts import DOCUMENTS, RAW, SENTENCES, c4, c4_shard, ptb, wikitext

from claq_exp.compose.experiment import compose_config
from claq_exp.sources.text import TextSource, read_documents

RUN = """\
import contextlib, io, json, sys
from claq_exp.cli import main
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
READ = """\
import json, sys
from claq_exp.errors import ClaqError
from claq_exp.sources.text import TextSource, read_documents
for options in json.loads(sys.argv[1]):
    try:
        print(json.dumps(list(read_documents(TextSource(**options)))))
    except ClaqError as error:
        print(json.dumps(str(error)))
"""
MODEL = """\
import json, sys
from claq_exp.errors import ClaqError
from claq_exp.models.source import ModelSource, fingerprint, model_folder
for name, revision in json.loads(sys.argv[1]):
    try:
        print(json.dumps(fingerprint(model_folder(ModelSource(name, revision=revision)))))
    except ClaqError as error:
        print(json.dumps(str(error)))
"""
DOWN = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the port that nothing listens on
OFFLINE = {**DOWN, "HF_HUB_OFFLINE": "1"}


def model_files(folder: Path, seed: int = 0) -> dict[str, bytes]:
    tiny_llama(seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    names = (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "onnx/model.onnx",
    )
    return {**folder_files(folder), **dict.fromkeys(names, b"not wanted"), "README.md": b"tiny"}


@dataclass
class Client:
    """A person at another machine: the hub, where its files are kept, and what no one asked for."""

    hub: Hub
    home: Path
    noise: str = ""

    def ask(self, script: str, requests: list, environment: dict[str, str] | None = None) -> list:
        """Return what a script printed for each request, and forget what was sent before."""
        self.hub.sent.clear()
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(requests)],
            env={**os.environ, **self.hub.environment(self.home), **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        self.noise = done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:
        tiny = model_files(folder / "tiny")
        hub.models["owner/tiny"] = Repository({"main": tiny})
        hub.models["owner/gated"] = Repository({"main": tiny}, gated=401)
        hub.data_sets |= {
            "Salesforce/wikitext": Repository({"main": wikitext()}),
            "allenai/c4": Repository({"main": c4()}),
            "ptb-text-only/ptb_text_only": Repository(
                {"main": {"ptb_text_only.py": b"raise SystemExit"}, "refs/convert/parquet": ptb()}
            ),
            "owner/folders": Repository({"main": ptb()}),
            "owner/gated": Repository({"main": c4()}, gated=401),
            "owner/asked": Repository({"main": c4()}, gated=403),
        }
        yield Client(hub, folder / "home")


def request(outputs: Path) -> list[str]:
    return [
        "model=hf",
        "model.source=owner/tiny",
        "evaluation=papers",
        "evaluation.context=64",
        "evaluation.corpora.c4.windows=4",
        "calibration=c4",
        "calibration.windows=4",
        "calibration.seqlen=64",
        "experiment=rtn_4bit",
        "tracking=none",
        "threads=1",
        f"outputs={outputs}",
    ]


@dataclass
class Fetched:
    lines: list[str]
    sent: list[str]
    planned: list[str]
    request: list[str]


@pytest.fixture(scope="module")
def fetched(client, tmp_path_factory) -> Fetched:
    """Plan, then fetch, both with the hub."""
    wanted = request(tmp_path_factory.mktemp("runs") / "outputs")
    ((code, _, error),) = client.ask(RUN, [["plan", *wanted]])
    assert code == 0, error
    planned = list(client.hub.sent)
    ((code, out, error),) = client.ask(RUN, [["fetch", *wanted]])
    assert code == 0, error
    assert client.noise.splitlines() == [
        "calibration text: allenai/c4",
        "corpus wikitext2: Salesforce/wikitext",
        "corpus c4: allenai/c4",
        "corpus ptb: ptb-text-only/ptb_text_only",
        "model tiny: owner/tiny",
    ]
    return Fetched(out.splitlines(), list(client.hub.sent), planned, wanted)


def test_a_plan_asks_for_no_weights_and_no_text(fetched):
    assert "owner/tiny/config.json" in fetched.planned
    assert {name.rpartition("/")[0] for name in fetched.planned} == {"owner/tiny"}
    assert not [name for name in fetched.planned if name.endswith(("tensors", ".bin", ".onnx"))]


def test_only_what_the_run_reads_is_fetched(fetched):
    assert sorted(fetched.sent) == [
        "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet",
        "allenai/c4/en/c4-train.00000-of-01024.json.gz",
        "allenai/c4/en/c4-validation.00000-of-00008.json.gz",
        "owner/tiny/model.safetensors",
        "ptb-text-only/ptb_text_only/penn_treebank/validation/0000.parquet",
    ]


def test_fetch_says_what_is_there_and_where(fetched, client):
    named = {line.split("  ")[0]: line for line in fetched.lines}
    assert list(named) == ["calibration", "corpus wikitext2", "corpus c4", "corpus ptb", "model"]
    for what, origin, end in (
        ("calibration", "allenai/c4", "c4-train.00000-of-01024.json.gz"),
        ("corpus ptb", "ptb-text-only/ptb_text_only", "penn_treebank/validation/0000.parquet"),
    ):
        _, source, size, digits, place = (part.strip() for part in named[what].split("  ") if part)
        assert (source, len(digits)) == (origin, 12)
        assert place.startswith(str(client.home)) and place.endswith(end)
        assert size == f"{Path(place).stat().st_size / 1e3:.1f} kB"
    assert Path(named["model"].split()[-1], "model.safetensors").is_file()


@pytest.mark.case(79)
def test_what_was_fetched_is_enough_without_the_hub(fetched, client):
    ((code, out, error),) = client.ask(RUN, [fetched.request], OFFLINE)
    assert code == 0, error
    for corpus in ("wikitext2", "c4", "ptb"):
        assert f"perplexity, {corpus} (" in out
    ((code, out, error),) = client.ask(RUN, [fetched.request], DOWN)
    assert (code, error) == (0, "")
    assert "finished before" in out
    assert client.noise == ""


def options(text: TextSource) -> dict[str, object]:
    return {field.name: getattr(text, field.name) for field in fields(TextSource)}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, str]:
    """The same texts as people have them as files."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "wiki.test.raw").write_text(RAW, encoding="utf-8")
    (folder / "ptb.txt").write_text(SENTENCES, encoding="utf-8")
    for split in ("train", "validation"):
        (folder / f"c4.{split}.jsonl.gz").write_bytes(c4_shard(DOCUMENTS[f"{split}.0"]))
    names = {"c4": "c4.validation.jsonl.gz", "calibration": "c4.train.jsonl.gz"}
    names |= {"wikitext2": "wiki.test.raw", "ptb": "ptb.txt"}
    return {name: str(folder / file) for name, file in names.items()}


def test_the_hubs_texts_are_those_of_the_files_that_take_their_place(fetched, client, local):
    config = compose_config(fetched.request)
    texts: dict[str, TextSource] = {"calibration": config.calibration, **config.evaluation.corpora}
    assert texts.keys() == local.keys()
    read = client.ask(READ, [options(text) for text in texts.values()], OFFLINE)
    for (name, text), documents in zip(texts.items(), read, strict=True):
        there = {**options(text), "path": local[name]}
        assert documents == list(read_documents(TextSource(**there))), name
        assert len(documents) > 5, name


def test_splits_and_patterns_are_read_with_the_hub_and_found_without_it(client):
    shards = {"source": "allenai/c4", "files": "en/c4-train.0000[12]*.json.gz"}
    asked = [
        {"source": "Salesforce/wikitext", "subset": "wikitext-2-raw-v1", "split": "train"},
        {"source": "owner/folders", "split": "test", "field": "sentence"},
        shards,
    ]
    first = client.ask(READ, asked)
    assert {name for name in client.hub.sent if name.startswith("allenai/")} == {
        f"allenai/c4/en/c4-train.0000{shard}-of-01024.json.gz" for shard in (1, 2)
    }
    assert first[0] == [" train \n", *(line if line.strip() else "" for line in io.StringIO(RAW))]
    assert first[1] == ["test", *(line.strip() for line in io.StringIO(SENTENCES))]
    assert first[2] == DOCUMENTS["train.1"] + DOCUMENTS["train.2"]
    assert client.ask(READ, asked, OFFLINE) == first
    assert client.ask(READ, [shards], DOWN) == first[2:]


TRAIN = "en/c4-train.00000-of-01024.json.gz"


@pytest.mark.case(61)
@pytest.mark.parametrize(
    ("given", "fragments"),
    [
        ({"source": "owner/gated", "files": TRAIN}, ["is gated", "hf auth login", "datasets/"]),
        ({"source": "owner/asked", "files": TRAIN}, ["is gated", "accept its terms"]),
        ({"source": "owner/gated"}, ["is gated", "hf auth login"]),
        ({"source": "owner/none", "files": TRAIN}, ["is not on the hub", "check its name"]),
        ({"source": "owner/none"}, ["is not on the hub", "check its name"]),
        ({"source": "allenai/c4", "files": "en/x.json.gz"}, ["has no file 'en/x.json.gz'"]),
        ({"source": "allenai/c4", "files": "en/x*.json.gz"}, ["no file that matches 'en/x*"]),
        ({"source": "allenai/c4", "files": TRAIN, "revision": "v9"}, ["no such revision"]),
        ({"source": "owner/folders", "revision": "v9"}, ["no such revision"]),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_a_data_set_that_the_hub_refuses_is_one_line_with_a_way_out(given, fragments, refusals):
    line = refusals[json.dumps(given)]
    assert "\n" not in line
    for fragment in (f"'{given['source']}'", *fragments):
        assert fragment in line


@pytest.fixture(scope="module")
def refusals(client) -> dict[str, str]:
    """Ask for all of them at once: a process takes longer than an answer."""
    (mark,) = (
        mark
        for mark in test_a_data_set_that_the_hub_refuses_is_one_line_with_a_way_out.pytestmark
        if mark.name == "parametrize"
    )
    asked = [given for given, _ in mark.args[1]]
    keys = [json.dumps(given) for given in asked]
    return dict(zip(keys, client.ask(READ, asked), strict=True))


@pytest.mark.case(61)
def test_a_data_set_out_of_reach_is_one_line_with_a_way_out(client, tmp_path):
    stranger = Client(client.hub, tmp_path)
    asked = [{"source": "allenai/c4", "files": TRAIN}, {"source": "owner/folders"}]
    asked += [{"source": "owner/gated"}, {"source": "allenai/c4", "files": "en/*.json.gz"}]
    for line in stranger.ask(READ, asked, OFFLINE):
        assert "\n" not in line
        assert "the hub is out of reach (HF_HUB_OFFLINE is set)" in line
        assert "claq-exp fetch" in line and "a local file as path" in line
    (line,) = stranger.ask(READ, asked[3:], DOWN)
    assert "the hub is out of reach ([Errno 111] Connection refused)" in line


def test_a_model_that_is_not_to_be_had_is_one_line_with_a_way_out(client, tmp_path):
    asked = [("owner/gated", None), ("owner/none", None), ("owner/tiny", "v9")]
    said = client.ask(MODEL, asked)
    for (name, _), line, advice in zip(
        asked, said, ("accept its terms", "hf auth login", "no such revision"), strict=True
    ):
        assert f"model '{name}'" in line and advice in line
    for environment in (DOWN, OFFLINE):
        said += Client(client.hub, tmp_path).ask(MODEL, asked[:1], environment)
        assert "out of reach" in said[-1] and "claq-exp fetch" in said[-1]
    for line in said:
        assert "\n" not in line and line.endswith("or give a local folder as model.source")


def test_a_command_ends_with_one_line_where_the_hub_refuses(client, fetched):
    asked = [
        ["plan", *fetched.request, "model.source=owner/gated"],
        [*fetched.request, "calibration.source=owner/gated"],
    ]
    for code, _, error in client.ask(RUN, asked):
        assert code == 1
        (line,) = error.splitlines()
        assert "'owner/gated' is gated" in line
    assert client.noise == ""


def test_a_revision_is_honoured_and_a_moved_branch_is_another_model(client, tmp_path):
    first, second = model_files(tmp_path / "first"), model_files(tmp_path / "second", seed=1)
    copy = {**first, "README.md": b"another card"}
    place = Repository({"main": first, "copy": copy, "v2": second})
    client.hub.models["owner/moving"] = place
    asked = [("owner/moving", revision) for revision in (None, "copy", "v2")]
    main, same, other = client.ask(MODEL, asked)
    assert main == same != other
    place.branches["main"] = second
    assert client.ask(MODEL, asked) == [other, same, other]
    assert client.ask(MODEL, asked, OFFLINE) == [other, same, other]


def test_pickled_weights_are_fetched_where_there_are_no_others(client, tmp_path):
    files = model_files(tmp_path / "tiny")
    weights = io.BytesIO()
    torch.save(tiny_llama().state_dict(), weights)
    files = {name: content for name, content in files.items() if not name.endswith("tensors")}
    client.hub.models["owner/pickled"] = Repository(
        {"main": {**files, "pytorch_model.bin": weights.getvalue()}}
    )
    place = {"CLAQ_EXP_CACHE": str(tmp_path / "cache")}
    first = client.ask(MODEL, [("owner/pickled", None)], place)
    assert {"model.safetensors", "config.json"} <= {
        path.name for path in (tmp_path / "cache").rglob("*")
    }
    sent = {Path(name).name for name in client.hub.sent}
    assert "pytorch_model.bin" in sent
    assert not sent & {"tf_model.h5", "flax_model.msgpack", "model.onnx"}
    assert client.ask(MODEL, [("owner/pickled", None)], {**OFFLINE, **place}) == first
