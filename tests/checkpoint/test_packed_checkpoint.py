"""A checkpoint on disk: whole, counted to the byte, and refused where it was tampered with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_models import (
    SHARED_LINEAR,
    SOME_LINEAR,
    Written,
    change_json,
    change_tensors,
)
from safetensors import safe_open
from safetensors.torch import load_file

from claq_exp.checkpoint.manifest import check_manifest, write_manifest
from claq_exp.checkpoint.reader import (
    check_checkpoint,
    load_model,
    read_layouts,
    read_unquantized,
    read_weights,
)
from claq_exp.checkpoint.writer import checkpoint_sizes, write_checkpoint
from claq_exp.errors import CheckpointError, ClaqError, ConfigError
from claq_exp.models.load import load_model as load_original
from claq_exp.payload.packing import pack, unpack
from claq_exp.runtime.load import load_checkpoint
from claq_exp.system.files import write_json
from claq_exp.tensor_files.shards import read_header


@pytest.fixture(scope="module")
def written(tiny_model: Path) -> Written:
    return Written(tiny_model)


@pytest.fixture(scope="module")
def original(written: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written.write(tmp_path_factory.mktemp("checkpoints") / "checkpoint")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def test_the_loaded_model_is_the_model_that_was_written(written, original):
    loaded = load_model(original).state_dict()
    for name, tensor in written.model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_the_loaded_model_computes_what_the_written_one_computes(written, original):
    tokens = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        loaded = load_model(original)
        assert torch.equal(loaded(tokens).logits, written.model(tokens).logits)
    assert not loaded.training


@pytest.mark.case(69)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_load_in_the_wanted_dtype(written, original, dtype):
    weight = load_model(original, dtype=dtype).get_submodule(SOME_LINEAR).weight
    expected = written.quantized[SOME_LINEAR].dequantize().to(getattr(torch, dtype))
    assert torch.equal(weight, expected)


def test_weights_come_back_bit_by_bit(written, original):
    read = dict(read_weights(original))
    assert set(read) == set(written.quantized)
    for name, weight in read.items():
        expected = written.quantized[name].dequantize()
        assert weight.dequantize().numpy().tobytes() == expected.numpy().tobytes()


@pytest.mark.case(51)
def test_tied_weights_are_stored_once_and_tied_again(original):
    with safe_open(original / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a dict
    model = load_model(original)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.case(45)
def test_the_ledger_is_the_bytes_on_disk(written, original):
    layouts = read_layouts(original)
    parameters = sum(parameter.numel() for parameter in written.model.parameters())
    sizes = checkpoint_sizes(original, layouts, parameters)
    stored = load_file(original / "model.safetensors")
    packed, kept = 0, 0
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        if module in layouts and suffix != "bias":
            assert 8 * tensor.nbytes == layouts[module].stored_tensors()[suffix].bits
            packed += 8 * tensor.nbytes
        else:
            kept += 8 * tensor.nbytes
    files = [original / "model.safetensors", original / "config.json"]
    assert sizes.bytes == sum(path.stat().st_size for path in files)
    assert sizes.ledger.total == 8 * sizes.bytes
    assert sizes.ledger.unquantized == kept
    assert sizes.ledger.total - sizes.ledger.unquantized - sizes.ledger.other == packed
    by_account = sizes.ledger.as_dict()
    for account in set(by_account) - {"other", "unquantized", "embedding"}:
        expected = sum(weight.ledger().as_dict()[account] for weight in written.quantized.values())
        assert by_account[account] == expected > 0


def test_bits_per_weight_are_sizes_over_weights(written, original):
    parameters = sum(parameter.numel() for parameter in written.model.parameters())
    sizes = checkpoint_sizes(original, read_layouts(original), parameters)
    weights = sum(weight.codes.numel() for weight in written.quantized.values())
    codes = sum(
        int(weight.column_bits.sum()) * len(weight.codes) for weight in written.quantized.values()
    )
    reserved = sum(
        (16 - weight.column_bits.double().mean()) * len(weight.reserved.rows)
        for weight in written.quantized.values()
    )
    assert sizes.nominal == pytest.approx(float(codes + reserved) / weights)
    assert sizes.linear == (sizes.ledger.total - sizes.ledger.unquantized) / weights
    assert sizes.model == 8 * sizes.bytes / parameters
    assert sizes.nominal < sizes.linear < sizes.model


def test_every_tensor_of_the_dense_model_is_read_once_packed_or_as_stored(written, original):
    kept = [name for name, _ in read_unquantized(original)]
    packed = [f"{name}.weight" for name, _ in read_weights(original)]
    assert sorted(kept + packed) == sorted(set(written.model.state_dict()) - {"lm_head.weight"})


@pytest.mark.case(18)
def test_an_existing_folder_is_refused_and_left_alone(written, tmp_path):
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "mine.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match="exists already"):
        written.write(target)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


class FailingTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        assert (Path(folder) / "model.safetensors").is_file()
        raise OSError("no space left on device")


@pytest.mark.case(17)
def test_a_write_that_fails_leaves_nothing_behind(written, tmp_path):
    target = tmp_path / "new" / "checkpoint"
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(target, written.model, FailingTokenizer(), written.packed, torch.float16)
    assert list((tmp_path / "new").iterdir()) == []
    written.write(target)
    check_manifest(target)


def test_the_config_of_the_model_in_memory_does_not_change(written, tmp_path):
    before = written.model.config.to_dict()
    written.write(tmp_path / "checkpoint")
    assert written.model.config.to_dict() == before


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        change_json(
            folder / "config.json", lambda data: data["quantization_config"].update(changes)
        )

    return edit


def edit_model(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", lambda data: data.update(changes))


def edit_layout(linear: str = SOME_LINEAR, **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        change_json(
            folder / "config.json",
            lambda data: data["quantization_config"]["modules"][linear].update(changes),
        )

    return edit


def edit_tensor(
    suffix: str,
    change: Callable[[torch.Tensor], torch.Tensor | None],
    linear: str = SOME_LINEAR,
):
    def edit(folder: Path) -> None:
        def replaced(tensors: dict[str, torch.Tensor]) -> None:
            name = f"{linear}.{suffix}"
            changed = change(tensors.pop(name))
            if changed is not None:
                tensors[name] = changed.contiguous()

        change_tensors(folder, replaced)

    return edit


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = torch.nan
    return tensor


def with_row_outside(packed: torch.Tensor) -> torch.Tensor:
    rows = unpack(packed, 6, len(packed) * 8 // 6)
    rows[1] = 63  # the matrix has 48 rows
    return pack(rows, 6)[: len(packed)]


def with_padding(packed: torch.Tensor) -> torch.Tensor:
    packed[-1] |= 128
    return packed


def with_rows_out_of_order(packed: torch.Tensor) -> torch.Tensor:
    rows = unpack(packed, 6, len(packed) * 8 // 6)
    return pack(rows.flip(0), 6)[: len(packed)]


def forget_norm(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))


def misshape_norm(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(47)}))


def invent_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.galaxy": torch.ones(2)}))


def forget_layout(folder: Path) -> None:
    change_json(
        folder / "config.json",
        lambda data: data["quantization_config"]["modules"].pop(SOME_LINEAR),
    )


def replace_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


CONTENT_TAMPERINGS = {
    "codes of another shape": (edit_tensor("codes_2", lambda codes: codes[:-1]), "codes_2"),
    "codes of another dtype": (edit_tensor("codes_2", lambda codes: codes.int()), "codes_2"),
    "codebook missing": (edit_tensor("codebooks_4", lambda _: None), "codebooks_4"),
    "codebook with NaN": (edit_tensor("codebooks_4", with_nan), "codebooks_4"),
    "reserved value NaN": (edit_tensor("reserved_values", with_nan), "reserved_values"),
    "reserved row outside": (edit_tensor("reserved_rows", with_row_outside), "reserved"),
    "reserved rows out of order": (
        edit_tensor("reserved_rows", with_rows_out_of_order),
        SOME_LINEAR,
    ),
    "reserved counts of another column": (
        edit_tensor("reserved_counts", lambda counts: counts.roll(1)),
        SOME_LINEAR,
    ),
    "reserved entries with codes": (
        edit_tensor("codes_4", lambda codes: codes | 255),
        "code other than 0",
    ),
    "padding bits": (edit_tensor("reserved_rows", with_padding), "padding"),
    "column scale NaN": (
        edit_tensor("column_scales", with_nan, SHARED_LINEAR),
        f"{SHARED_LINEAR}: column_scales",
    ),
    "row scales missing": (
        edit_tensor("row_scales", lambda _: None, SHARED_LINEAR),
        "row_scales",
    ),
    "layout with codebooks no longer shared": (
        edit_layout(SHARED_LINEAR, kind="column_codebooks"),
        SHARED_LINEAR,
    ),
    "layout with shared codebooks": (edit_layout(kind="shared_codebooks"), SOME_LINEAR),
    "layout without row scales": (edit_layout(SHARED_LINEAR, row_scaled=False), SHARED_LINEAR),
    "layout with a flag in words": (edit_layout(row_scaled="yes"), "row_scaled"),
    "layout of unknown kind": (edit_layout(kind="galaxy"), "galaxy"),
    "layout of other rows": (edit_layout(rows=47), SOME_LINEAR),
    "layout of other widths": (edit_layout(columns_per_width={"2": 48}), SOME_LINEAR),
    "layout with rows in words": (edit_layout(rows="many"), ""),
    "layout with an unknown key": (edit_layout(colour="red"), "layout"),
    "layout of negative columns": (edit_layout(columns_per_width={"2": 50, "4": -2}), "-2"),
    "layout of width nine": (edit_layout(columns_per_width={"9": 48}), "'9'"),
    "layout of more in one column": (edit_layout(most_reserved=47), SOME_LINEAR),
    "layout of a huge matrix": (edit_layout(rows=2**40), SOME_LINEAR),
    "layout without reserved entries": (edit_layout(reserved=0), SOME_LINEAR),
    "layout forgotten": (forget_layout, SOME_LINEAR),
    "no layouts": (edit_config(modules={}), "quantized layers"),
    "layouts in a list": (edit_config(modules=[1]), "quantized layers"),
    "config with an unknown key": (edit_config(bits=4), "unknown key 'bits'"),
    "earlier version": (edit_config(format_version=1), "format version 1"),
    "version in words": (edit_config(format_version="2"), "format version 2"),
    "future version": (edit_config(format_version=5), "format version 5"),
    "no version": (edit_config(format_version=None), "format version None"),
    "another method": (edit_config(quant_method="gptq"), "claq_exp"),
    "norm missing": (forget_norm, "model.norm.weight"),
    "norm of another shape": (misshape_norm, "model.norm.weight"),
    "tensor too many": (invent_tensor, "model.galaxy"),
    "config of more blocks": (edit_model(num_hidden_layers=10**9), "blocks"),
    "config of a wider model": (edit_model(intermediate_size=80), "shape"),
    "config of no known model": (edit_model(model_type="galaxy"), "config.json"),
    "config with words for numbers": (edit_model(hidden_size="many"), "config.json"),
    "config nested without end": (replace_text("config.json", '{"a":' * 10**5), "config.json"),
    "config a list": (replace_text("config.json", "[]"), ""),
    "config no JSON": (replace_text("config.json", "{"), "config.json"),
    "quantization config a list": (replace_text("config.json", '{"quantization_config": []}'), ""),
    "weights no safetensors": (replace_text("model.safetensors", "{}"), "model.safetensors"),
}


@pytest.mark.case(66, 67, 73)
@pytest.mark.parametrize("kernel", ["dense", "reference"])
@pytest.mark.parametrize("tampering", CONTENT_TAMPERINGS)
def test_content_that_contradicts_itself_is_refused_though_the_manifest_agrees(
    tampering, kernel, checkpoint
):
    tamper, named = CONTENT_TAMPERINGS[tampering]
    tamper(checkpoint)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        write_manifest(checkpoint)
        load_checkpoint(checkpoint, kernel=kernel)
    assert named in str(caught.value)
    assert str(checkpoint) in str(caught.value)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILE_TAMPERINGS = {
    "flipped bit": lambda folder: flip_bit(folder / "model.safetensors"),
    "truncated": lambda folder: truncate(folder / "model.safetensors"),
    "missing weights": lambda folder: (folder / "model.safetensors").unlink(),
    "missing tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "changed config": edit_layout(most_reserved=47),
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "cut manifest": lambda folder: (
        truncate(folder / "manifest.json") or truncate(folder / "manifest.json")
    ),
    "empty manifest": replace_text("manifest.json", "{}"),
    "manifest a list": replace_text("manifest.json", "[]"),
    "manifest of other folders": lambda folder: change_json(
        folder / "manifest.json",
        lambda data: data["files"].update({"../secret": {"bytes": 0, "sha256": ""}}),
    ),
    "missing config": lambda folder: (folder / "config.json").unlink(),
    "missing folder": shutil.rmtree,
}


@pytest.mark.case(68)
@pytest.mark.parametrize("tampering", FILE_TAMPERINGS)
def test_a_file_that_is_not_the_one_written_is_refused(tampering, checkpoint):
    FILE_TAMPERINGS[tampering](checkpoint)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_model(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_a_damaged_tensor_is_named(checkpoint):
    path = checkpoint / "model.safetensors"
    span = read_header(path)[f"{SOME_LINEAR}.codes_2"]
    content = bytearray(path.read_bytes())
    content[span.start] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{SOME_LINEAR}\.codes_2 differs"):
        load_model(checkpoint)


def test_the_manifest_lists_every_file_and_tensor(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in checkpoint.iterdir()} - {
        "manifest.json"
    }
    tensors = load_file(checkpoint / "model.safetensors")
    assert set(manifest["tensors"]) == set(tensors)
    for name, entry in manifest["tensors"].items():
        content = tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert entry["shape"] == list(tensors[name].shape)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "facts",
    [{"dtype": "F32"}, {"shape": [1]}, {"file": "other.safetensors"}, {"sha256": "0"}, {"more": 1}],
)
def test_a_manifest_that_says_something_else_of_a_tensor_is_refused(facts, checkpoint):
    change_json(
        checkpoint / "manifest.json",
        lambda data: data["tensors"]["model.norm.weight"].update(facts),
    )
    with pytest.raises(CheckpointError, match="other tensors"):
        load_model(checkpoint)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pkl"])
def test_a_pickle_is_refused_even_when_it_is_listed(name, checkpoint):
    (checkpoint / name).write_bytes(b"")
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match="can hold code"):
        load_model(checkpoint, trust_remote_code=True)


@pytest.mark.parametrize("name", ["adapter_config.json", "extra.safetensors", "vocab.txt"])
def test_a_file_that_is_not_listed_is_refused(name, checkpoint):
    (checkpoint / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name} is not in the manifest"):
        load_model(checkpoint)


def test_notes_and_hidden_files_may_be_added(checkpoint):
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (checkpoint / name).write_text("mine")
    load_model(checkpoint)


def ask_in_config(folder: Path) -> None:
    edit_model(auto_map={"AutoConfig": "evil.Config"})(folder)


def ask_in_tokenizer(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", lambda data: data.update(auto_map={}))


@pytest.mark.parametrize(
    "ask",
    [ask_in_config, ask_in_tokenizer, lambda folder: (folder / "evil.py").write_text("1 / 0")],
)
def test_code_in_a_checkpoint_is_only_allowed_by_the_caller(ask, checkpoint):
    ask(checkpoint)
    write_manifest(checkpoint)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_model(checkpoint)
    check_checkpoint(checkpoint, trust_remote_code=True)


def test_code_that_the_library_did_not_need_is_not_asked_for(written, tmp_path):
    written.model.config.auto_map = {"AutoConfig": "evil.Config"}
    try:
        folder = written.write(tmp_path / "checkpoint")
    finally:
        del written.model.config.auto_map
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    load_model(folder)


def test_published_files_can_be_read_by_others(original):
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in original.iterdir())


def test_an_ordinary_model_folder_is_no_checkpoint(tiny_model):
    with pytest.raises(ConfigError, match="not quantized by claq_exp"):
        load_model(tiny_model)


def test_a_checkpoint_is_not_quantized_again(checkpoint):
    with pytest.raises(ClaqError, match="quantized"):
        load_original(checkpoint, dtype="float32", device="cpu")


def test_json_that_cannot_hold_a_number_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"value": float("nan")})
    assert json.loads(path.read_text()) == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]
