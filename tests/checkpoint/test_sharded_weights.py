"""Weights in several files: the same model, an index that transformers reads, no forged header."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_models import SOME_LINEAR, Written, change_json
from safetensors.torch import save_file
from transformers.utils.hub import get_checkpoint_shard_files

from claq_exp.checkpoint.manifest import write_manifest
from claq_exp.checkpoint.reader import load_model, read_layouts, read_unquantized, read_weights
from claq_exp.checkpoint.writer import checkpoint_sizes
from claq_exp.errors import CheckpointError
from claq_exp.tensor_files.shards import index_bytes, read_header, read_spans

SHARD_BYTES = 20_000
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def written(tiny_model: Path) -> Written:
    return Written(tiny_model)


@pytest.fixture(scope="module")
def whole(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written.write(tmp_path_factory.mktemp("checkpoints") / "whole")


@pytest.fixture(scope="module")
def sharded(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("checkpoints") / "sharded"
    return written.write(target, shard_bytes=SHARD_BYTES)


@pytest.fixture
def checkpoint(sharded: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sharded, tmp_path / "checkpoint"))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_one_file_is_enough_up_to_the_limit(whole):
    assert [path.name for path in whole.glob("model*")] == ["model.safetensors"]


def test_every_shard_keeps_the_limit_unless_one_tensor_is_larger(sharded):
    assert len(shards_of(sharded)) > 2
    assert not (sharded / "model.safetensors").exists()
    for spans in read_spans(sharded).values():
        size = sum(span.end - span.start for span in spans.values())
        assert size <= SHARD_BYTES or len(spans) == 1


def test_the_tensors_of_a_matrix_are_in_one_shard(sharded):
    places = json.loads((sharded / INDEX).read_text())["weight_map"]
    for name, layout in read_layouts(sharded).items():
        assert len({places[f"{name}.{suffix}"] for suffix in layout.stored_tensors()}) == 1


def test_transformers_understands_the_index(sharded):
    files, facts = get_checkpoint_shard_files(str(sharded), str(sharded / INDEX))
    assert [Path(file).name for file in files] == [path.name for path in shards_of(sharded)]
    assert len(facts["all_checkpoint_keys"]) == sum(len(read_header(Path(f))) for f in files)


def test_the_model_is_the_same_however_it_is_stored(whole, sharded):
    expected, found = load_model(whole).state_dict(), load_model(sharded).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for read in (read_unquantized, read_weights):
        assert [name for name, _ in read(sharded)] == [name for name, _ in read(whole)]


def test_the_ledger_counts_all_headers_and_the_index(whole, sharded):
    parameters = 1000
    one = checkpoint_sizes(whole, read_layouts(whole), parameters)
    many = checkpoint_sizes(sharded, read_layouts(sharded), parameters)
    files = [*shards_of(sharded), sharded / INDEX, sharded / "config.json"]
    assert many.bytes == sum(path.stat().st_size for path in files)
    assert many.ledger.total == 8 * many.bytes
    different = {k for k, v in many.ledger.as_dict().items() if v != one.ledger.as_dict()[k]}
    assert different == {"other"}


def test_the_planned_index_is_about_the_written_one(sharded):
    names = [name for spans in read_spans(sharded).values() for name in spans]
    planned = index_bytes(names, 2, 1)
    assert planned == pytest.approx((sharded / INDEX).stat().st_size, rel=0.01)
    assert index_bytes(names, 1, 1) == 0


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / INDEX, lambda data: change(data) and None)


def place(name: str, file: object) -> Callable[[Path], None]:
    return edit_index(lambda data: data["weight_map"].update({name: file}))


def rename_all(file: str) -> Callable[[Path], None]:
    def change(data: dict) -> None:
        data["weight_map"] = dict.fromkeys(data["weight_map"], file)

    return edit_index(change)


def swap_shards(folder: Path) -> None:
    first, second = shards_of(folder)[:2]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def add_whole_file(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")


def add_shard(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model-00099-of-00099.safetensors")


TAMPERINGS = {
    "shard missing": lambda folder: shards_of(folder)[1].unlink(),
    "index missing": lambda folder: (folder / INDEX).unlink(),
    "shards swapped": swap_shards,
    "a whole file too": add_whole_file,
    "a shard too many": add_shard,
    "tensor in another shard": place(f"{SOME_LINEAR}.codes_2", "model-00001-of-00002.safetensors"),
    "tensor that is nowhere": place("galaxy", "model-00001-of-00002.safetensors"),
    "file in another folder": place(f"{SOME_LINEAR}.codes_2", "../secret.safetensors"),
    "file that is a number": place(f"{SOME_LINEAR}.codes_2", 3),
    "all in another folder": rename_all("../checkpoint/model-00001-of-00002.safetensors"),
    "all in /": rename_all("/etc/passwd"),
    "tensor forgotten": edit_index(lambda data: data["weight_map"].pop("model.norm.weight")),
    "no tensors": edit_index(lambda data: data["weight_map"].clear()),
    "another size": edit_index(lambda data: data["metadata"].update(total_size=1)),
    "an unknown key": edit_index(lambda data: data.update(more=1)),
    "metadata a list": edit_index(lambda data: data.update(metadata=[])),
    "map a list": edit_index(lambda data: data.update(weight_map=[1])),
}


@pytest.mark.case(66)
@pytest.mark.parametrize("rewrite", [True, False], ids=["manifest agrees", "manifest as written"])
@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_an_index_that_does_not_fit_its_shards_is_refused(tampering, rewrite, checkpoint):
    TAMPERINGS[tampering](checkpoint)
    with pytest.raises(CheckpointError, match=r"checkpoint") as caught:
        if rewrite:
            write_manifest(checkpoint)
        load_model(checkpoint)
    assert "\n" not in str(caught.value)


def with_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


FORGED = {
    "empty": b"",
    "seven bytes": bytes(7),
    "huge header": with_header(b"{}", length=2**63),
    "header beyond the file": with_header(b"{}", length=3),
    "no JSON": with_header(b"{]"),
    "a list": with_header(b"[]"),
    "no UTF-8": with_header(b'{"\xff":1}'),
    "nested without end": with_header(b'{"x":' * 100_000),
    "a number without end": with_header(b'{"x":' + b"1" * 10_000 + b"}"),
    "entry a number": with_header(b'{"x":1}'),
    "entry twice": with_header(entry()[:-1] + b"," + entry()[1:], bytes(4)),
    "a key too many": with_header(
        b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"more":1}}'
    ),
    "unknown dtype": with_header(entry("U4"), bytes(4)),
    "dtype a list": with_header(entry([]), bytes(4)),
    "negative offset": with_header(entry(offsets=(-4, 0)), bytes(4)),
    "negative shape": with_header(entry(shape=(-2, -2)), bytes(4)),
    "fractional shape": with_header(entry(shape=(4.0,)), bytes(4)),
    "one offset": with_header(entry(offsets=(4,)), bytes(4)),
    "huge shape": with_header(entry(shape=(2**40, 2**40), offsets=(0, 2**80)), bytes(4)),
    "shape of another size": with_header(entry(shape=(5,)), bytes(4)),
    "a gap before": with_header(entry(offsets=(1, 5)), bytes(5)),
    "bytes left over": with_header(entry(), bytes(5)),
    "bytes missing": with_header(entry(), bytes(3)),
}


@pytest.mark.case(73)
@pytest.mark.parametrize("case", FORGED)
def test_a_forged_header_is_refused(case, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(FORGED[case])
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        read_header(path)
    assert len(str(caught.value)) < 400
