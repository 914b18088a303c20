"""What tokens weigh is the same, whoever measures it, and reaches all that quantize."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from processes import start_ranks
from torch import Tensor

from claq_exp.calibration.streams import HiddenForm
from claq_exp.calibration.token_weights import TokenWeights
from claq_exp.checkpoint.store import BlockStore
from claq_exp.compose.experiment import compose_config
from claq_exp.models.discover import linears_of
from claq_exp.models.load import open_model
from claq_exp.payload import unpack_weight
from claq_exp.quantize.codebook import KMeans
from claq_exp.quantize.objective import OutputGradient
from claq_exp.quantize.precision import Fixed
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import NoReservation
from claq_exp.quantize.solver import Gptq
from claq_exp.run.assist import Quantization, assist
from claq_exp.run.watcher import UNWATCHED
from claq_exp.run.weighing import Weighing
from claq_exp.system.distributed import together

pytestmark = pytest.mark.other_process
RECIPE = Recipe(KMeans(), Fixed(3), NoReservation(), Gptq())


def weigh(source: Path, place: Path, batches: list[Tensor]) -> int:
    """Measure what tokens weigh, and quantize with it, on one rank or several."""
    torch.set_num_threads(1)
    with together() as ranks:
        if not ranks.is_first:
            return assist(ranks)
        model = open_model(source, place, dtype="float32", device="cpu")
        blocks = enumerate(model.blocks)
        names = tuple(f"{model.path}.{i}.{name}" for i, b in blocks for name in linears_of(b))
        weights = TokenWeights(place / "weights", batches, names, OutputGradient(2, clip=4.0))
        config = compose_config(
            ["model=hf", f"model.source={source}", "model.dtype=float32", "device=cpu", "threads=1"]
        )
        weighing = Weighing(config, source, place, weights, 2**60)
        ranks.tell(weighing)
        weighing.measure(model, ranks)
        store = BlockStore(place / "store", {"run": "test"})
        store.open()
        work = (config, source, place, batches, RECIPE, store.follower(), {}, HiddenForm())
        quantization = Quantization(*work, weights=weights)
        ranks.tell(quantization)
        quantization.quantize(model, store, UNWATCHED, ranks)
        torch.save({name: weights.of(name) for name in names}, place / "weights.pt")
        ranks.tell(None)
    return 0


def test_two_processes_find_what_one_finds(tmp_path):
    source, places = tmp_path / "model", [tmp_path / "one", tmp_path / "two"]
    tiny_llama(num_hidden_layers=2).save_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(256, (size, 24), generator=generator) for size in (4, 4, 2)]
    for place in places:
        place.mkdir()
    threads = torch.get_num_threads()
    weigh(source, places[0], batches)
    torch.set_num_threads(threads)
    ranks = start_ranks(weigh, places[1], source, places[1], batches, size=2)
    for rank in ranks:
        assert rank.exit_code() == 0, rank.output()
    one, two = (torch.load(place / "weights.pt") for place in places)
    assert one.keys() == two.keys()
    for name, parts in one.items():
        for own, other in zip(parts, two[name], strict=True):
            assert torch.allclose(own, other, rtol=1e-4, atol=1e-6), name
    stores = [BlockStore(place / "store", {"run": "test"}) for place in places]
    for store in stores:
        store.open()
    for name, packed in stores[0].packed().items():
        weight = unpack_weight(packed.layout, packed.tensors).dequantize()
        theirs = stores[1].packed()[name]
        other = unpack_weight(theirs.layout, theirs.tensors).dequantize()
        assert (weight - other).norm() < 0.05 * weight.norm(), name
