"""A model that is read block by block is the model in memory, to the bit, and takes less memory."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from quantized_models import Quantized, opened
from safetensors.torch import load_file, save_file
from tiny_architectures import ARCHITECTURES, token_batches
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from claq_exp.calibration.streams import HiddenForm
from claq_exp.checkpoint.reader import load_model as load_quantized
from claq_exp.checkpoint.reader import open_checkpoint
from claq_exp.checkpoint.writer import write_checkpoint
from claq_exp.errors import CalibrationError, NumericalError, SourceError
from claq_exp.evaluation.perplexity import Corpus, perplexity
from claq_exp.evaluation.predict import in_memory, streamed
from claq_exp.models.experts import fuse_experts, split_experts
from claq_exp.models.load import load_model, open_model
from claq_exp.models.stream import BlockedModel, StreamedModel, WholeModel
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.precision import OutlierOrder
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import Fixed
from claq_exp.quantize.solver import Gptq
from claq_exp.run.quantize import quantize_model
from claq_exp.run.watcher import Watcher

RECIPE = Recipe(KMeans(), OutlierOrder(2.5), Fixed(0.02), Gptq())
BATCHES = [*token_batches(2, size=4), token_batches(1, size=2, seed=1)[0]]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory) -> Path:
    """A model of each architecture, as transformers saves it: in bfloat16, in small shards."""
    place = tmp_path_factory.mktemp(request.param)
    model = ARCHITECTURES[request.param].build()
    fuse_experts(model)
    model.bfloat16().save_pretrained(place, max_shard_size=20_000)
    return place


def streamed_model(folder: Path, work: Path, dtype: str = "float32") -> StreamedModel:
    return open_model(folder, work, dtype=dtype, device="cpu")


def quantized(model: BlockedModel, place: Path, **options) -> Quantized:
    store = opened(place)
    quantize_model(model, BATCHES, RECIPE, store, **options)
    return Quantized(store.packed(), store.report("quantize"))


def assert_same(first: Quantized, second: Quantized) -> None:
    assert list(first.packed) == list(second.packed)
    for name, weight in first.packed.items():
        for suffix, tensor in weight.tensors.items():
            assert torch.equal(tensor, second.packed[name].tensors[suffix]), f"{name}.{suffix}"


def plainly_loaded(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    split_experts(model)
    return model.eval()


def test_it_loads_what_transformers_loads(folder, tmp_path):
    expected = plainly_loaded(folder)
    loaded = load_model(folder, dtype="float32", device="cpu")
    assert set(loaded.state_dict()) == set(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.inference_mode():
        assert torch.equal(loaded(BATCHES[0]).logits, expected(BATCHES[0]).logits)
    tied = expected.get_output_embeddings().weight is expected.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_quantized_block_by_block_it_is_what_comes_of_the_model_in_memory(folder, tmp_path):
    whole = quantized(WholeModel(plainly_loaded(folder)), tmp_path / "whole")
    parts = quantized(streamed_model(folder, tmp_path / "work"), tmp_path / "parts")
    assert_same(parts, whole)
    on_disk = quantized(
        streamed_model(folder, tmp_path / "work"),
        tmp_path / "disk",
        hidden_form=HiddenForm(on_disk=True),
    )
    assert_same(on_disk, whole)


def test_measured_block_by_block_a_model_has_the_same_logits(folder, tmp_path):
    model = plainly_loaded(folder)
    corpus = Corpus(torch.cat([*token_batches(2, size=4), *token_batches(1, size=1)]), "text")
    expected_logits, logits, shares = [], [], []
    expected = perplexity(
        in_memory(model, "cpu"), corpus, 2, on_logits=lambda _, row: expected_logits.append(row)
    )
    parts = streamed_model(folder, tmp_path / "work")
    for hidden_bytes in (1, 2**20):
        found = perplexity(
            streamed(parts, hidden_bytes),
            corpus,
            2,
            tick=shares.append,
            on_logits=lambda _, row: logits.append(row),
        )
        assert found == expected
        assert sum(shares) == pytest.approx(9)
        for ours, theirs in zip(logits, expected_logits, strict=True):
            assert torch.equal(ours, theirs)
        logits.clear()
        shares.clear()


def test_a_streamed_checkpoint_is_the_one_of_the_model_in_memory(folder, tmp_path, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = plainly_loaded(folder)
    whole = quantized(WholeModel(model), tmp_path / "whole")
    write_checkpoint(tmp_path / "a", model, tokenizer, whole.packed, torch.bfloat16)
    opened_model = streamed_model(folder, tmp_path / "work")
    parts = quantized(opened_model, tmp_path / "parts")
    write_checkpoint(
        tmp_path / "b",
        opened_model.model,
        tokenizer,
        parts.packed,
        torch.bfloat16,
        read=opened_model.read,
    )
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {path.name for path in (tmp_path / "b").iterdir()}
    for name in files - {"config.json", "manifest.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    corpus = Corpus(BATCHES[0], "text")
    dense = perplexity(in_memory(load_quantized(tmp_path / "b"), "cpu"), corpus, 2)
    assert perplexity(streamed(open_checkpoint(tmp_path / "b")), corpus, 2) == dense


def test_outside_of_its_contexts_no_weight_is_in_memory(folder, tmp_path):
    model = streamed_model(folder, tmp_path / "work")
    alive: list[weakref.ref] = []
    most = 0

    def parameters() -> int:
        nonlocal most
        gc.collect()
        held = [p for p in model.model.parameters() if not p.is_meta]
        alive.extend(weakref.ref(p) for p in held)
        most = max(most, sum(p.numel() for p in held))
        return len(held)

    assert parameters() == 0
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            parameters()
            assert not any(p.is_meta for p in block.parameters())
    assert most == max(blocks)
    with model.outside(head=True):
        parameters()
    assert parameters() == 0
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


class TestOneModel:
    """What does not depend on the architecture."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        model = ARCHITECTURES["llama"].build()
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    @staticmethod
    def change(folder: Path, change) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def test_names_without_the_models_prefix_are_found(self, folder, tmp_path):
        expected = plainly_loaded(folder).state_dict()

        def rename(tensors: dict[str, torch.Tensor]) -> None:
            for name in list(tensors):
                tensors[name.removeprefix("model.")] = tensors.pop(name)

        self.change(folder, rename)
        found = load_model(folder, dtype="float32", device="cpu").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    def test_only_the_rows_of_the_tokens_are_read_of_an_embedding(self, folder, tmp_path):
        model = streamed_model(folder, tmp_path / "work")
        tokens = torch.tensor([[5, 9, 5, 63]])
        with model.outside(head=False) as whole:
            table = whole.get_input_embeddings()
            rows = table(tokens)
            assert table.weight.shape[0] == 3
            assert whole.get_output_embeddings().weight.is_meta
        expected = plainly_loaded(folder).get_input_embeddings()(tokens)
        assert torch.equal(rows, expected)
        assert table.weight.is_meta
        assert isinstance(table, nn.Embedding)

    @pytest.mark.case(25)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_a_weight_that_is_not_finite_is_named_before_any_work(self, value, folder, tmp_path):
        def spoil(tensors: dict[str, torch.Tensor]) -> None:
            tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

        self.change(folder, spoil)
        with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj\.weight\[3, 5\] is"):
            streamed_model(folder, tmp_path / "work")

    @pytest.mark.case(57)
    def test_a_missing_shard_is_named(self, folder, tmp_path):
        model = plainly_loaded(folder)
        model.save_pretrained(tmp_path / "shards", max_shard_size=20_000)
        gone = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
        gone.unlink()
        with pytest.raises(SourceError, match=gone.name):
            streamed_model(tmp_path / "shards", tmp_path / "work")

    @pytest.mark.case(26)
    def test_hidden_states_beyond_float16_are_refused_or_kept_otherwise(self, folder, tmp_path):
        def blow_up(tensors: dict[str, torch.Tensor]) -> None:
            tensors["model.embed_tokens.weight"][:, 0] = 1e5

        self.change(folder, blow_up)
        with pytest.raises(CalibrationError, match=r"block 0.*float16.*calibration\.keep_in"):
            quantized(
                streamed_model(folder, tmp_path / "work"),
                tmp_path / "half",
                hidden_form=HiddenForm(torch.float16),
            )
        result = quantized(
            streamed_model(folder, tmp_path / "work"),
            tmp_path / "bfloat",
            hidden_form=HiddenForm(torch.bfloat16),
        )
        assert len(result.report) == 21

    def test_hidden_states_in_16_bits_change_little(self, folder, tmp_path):
        exact, half = (
            quantized(
                streamed_model(folder, tmp_path / "work"),
                tmp_path / str(dtype),
                hidden_form=HiddenForm(dtype),
            )
            for dtype in (None, torch.float16)
        )
        errors = [[row["output_error"] for row in found.report] for found in (exact, half)]
        assert errors[0] != errors[1]
        assert sum(errors[1]) == pytest.approx(sum(errors[0]), rel=0.1)

    def test_one_block_after_the_other_is_told(self, folder, tmp_path):
        told: list[str] = []
        watcher = Watcher(event=lambda name, data: told.append(f"{name} {data['block']}"))
        quantized(streamed_model(folder, tmp_path / "work"), tmp_path / "store", watcher=watcher)
        expected = [line for b in range(3) for line in [f"layer {b}"] * 7 + [f"block {b}"]]
        assert told == expected


@pytest.mark.case(103)
def test_as_much_is_in_memory_at_block_ten_as_at_block_two(tmp_path):
    architecture = dataclasses.replace(ARCHITECTURES["llama"], depth=12)
    architecture.build().save_pretrained(tmp_path / "model")
    held: list[int] = []

    def count(name: str, _: object) -> None:
        if name == "block":
            gc.collect()
            tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not o.is_meta]
            held.append(sum(t.untyped_storage().nbytes() for t in tensors))

    model = streamed_model(tmp_path / "model", tmp_path / "work")
    quantized(model, tmp_path / "store", watcher=Watcher(event=count))
    assert len(held) == 12
    assert held[9] == pytest.approx(held[1], rel=0.05)
