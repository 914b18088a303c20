"""How fast a packed checkpoint generates, and what its layers cost, each kernel beside dense."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from claq_exp.checkpoint.reader import read_layouts
from claq_exp.errors import ConfigError
from claq_exp.models.ends import in_blocks
from claq_exp.models.load import forward_dtype, load_config
from claq_exp.models.towers import text_config
from claq_exp.run_folder.find import checkpoint_folder
from claq_exp.runtime.kernels import DENSE, FASTEST, choose_kernel
from claq_exp.runtime.linear import QuantizedLinear, quantized_linears
from claq_exp.runtime.load import load_checkpoint
from claq_exp.system.accelerator import synchronize
from claq_exp.system.machine import choose_device, device_name, settle

if TYPE_CHECKING:
    from claq_exp.config import ExperimentConfig

PROMPT = 8  # tokens that generation starts from
TOKENS = 64  # that are generated
REPEATS = 3
ENOUGH_SECONDS = 20.0  # of generation with one kernel
LEAST_SECONDS = 0.2  # that a linear is timed for
IN_TURN = 16  # layers of a form


@dataclass(frozen=True)
class GenerationRow:
    """Greedy generation with one way of keeping the linear layers.

    tokens_per_second: of the fastest of several runs; None where the kernel cannot be used, for the
    reason in `note`.  linear_bytes: of the quantized linear layers in memory.
    """

    kernel: str
    tokens_per_second: float | None
    linear_bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class LinearRow:
    """One kind of layer with one row of activations.

    seconds: kernel -> time of one product, `dense` being torch's.  stored_bytes: packed;
    dense_bytes: in the type of the model.
    """

    layer: str
    rows: int
    columns: int
    bits: str
    stored_bytes: int
    dense_bytes: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Benched:
    """What `claq-exp bench runtime` prints.  device: what it ran on."""

    device: str
    generation: list[GenerationRow]
    linears: list[LinearRow]


def bench_checkpoint(config: ExperimentConfig, on_step: Callable[[str], None]) -> Benched:
    """Time `config.checkpoint` on `config.device`, in the type `config.model.dtype`.

    on_step: told what comes next.  Raises ConfigError without a checkpoint, CheckpointError for a
    damaged one.
    """
    if config.checkpoint is None:
        raise ConfigError(
            "bench needs checkpoint=FOLDER, e.g. checkpoint=outputs/default/RUN/checkpoint"
        )
    folder = checkpoint_folder(config.checkpoint)
    device = choose_device(config.device)
    dtype = forward_dtype(config.model.dtype, load_config(folder), device)
    settle(config.seed, config.threads)
    generation = bench_generation(folder, dtype=dtype, device=device, on_step=on_step)
    on_step("single layers")
    linears = bench_linears(folder, dtype=dtype, device=device)
    return Benched(f"{device_name(device)}, {dtype}", generation, linears)


def kernels_for(device: str) -> list[str]:
    """Return the kernels that are meant for a device, the fastest first."""
    own = FASTEST.get(torch.device(device).type)
    return ["reference"] if own is None else [own, "reference"]


def bench_generation(
    folder: Path, *, dtype: str, device: str, on_step: Callable[[str], None]
) -> list[GenerationRow]:
    """Generate TOKENS tokens with dense weights and with the kernels for the device.

    Dense weights are those of the checkpoint, dequantized: what the original model's would take.
    on_step: told which kernel comes next.
    """
    rows = []
    for kernel in (DENSE, *kernels_for(device)):
        on_step(f"generating with {kernel}")
        try:
            model = load_checkpoint(folder, dtype=dtype, device=device, kernel=kernel)
        except ConfigError as error:
            rows.append(GenerationRow(kernel, None, None, str(error)))
            continue
        spent: list[float] = []
        while len(spent) < REPEATS and sum(spent) < ENOUGH_SECONDS:
            spent.append(_generation_seconds(model))
        rows.append(GenerationRow(kernel, TOKENS / min(spent), _linear_bytes(model, folder)))
        del model
    return rows


@torch.inference_mode()
def bench_linears(folder: Path, *, dtype: str, device: str) -> list[LinearRow]:
    """Time the layers of each shape and form of a checkpoint, dense and with kernels in turn.

    Several layers of a form take turns, so that none is in a core's own caches, as in generation.
    """
    model = load_checkpoint(folder, dtype=dtype, device=device)
    rows = []
    for name, layers in _by_form(quantized_linears(model)).items():
        layer, operands = layers[0], [layer.operand() for layer in layers]
        inputs = torch.randn(1, layer.in_features, device=device, dtype=_dtype(model))
        dense = [layer.dequantize().to(inputs.dtype) for layer in layers]
        calls = {DENSE: _in_turn([partial(nn.functional.linear, inputs, one) for one in dense])}
        for kernel in kernels_for(device):
            try:
                chosen = [choose_kernel(kernel, operand) for operand in operands]
            except ConfigError:
                continue
            calls[kernel] = _in_turn(
                [
                    partial(one.multiply, operand, inputs)
                    for one, operand in zip(chosen, operands, strict=True)
                ]
            )
        rows.append(
            LinearRow(
                layer=name.rpartition(".")[2],
                rows=layer.out_features,
                columns=layer.in_features,
                bits="/".join(map(str, layer.layout.widths())),
                stored_bytes=layer.layout.ledger().total // 8,
                dense_bytes=dense[0].numel() * dense[0].element_size(),
                seconds=_fastest(calls, device),
            )
        )
    return rows


def _in_turn(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """Return a call that makes the next of several calls each time."""
    following = itertools.cycle(calls)

    def call() -> Tensor:
        return next(following)()

    return call


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _by_form(layers: Mapping[str, QuantizedLinear]) -> dict[str, list[QuantizedLinear]]:
    """Return the first few layers of each shape and set of widths, under the first one's name."""
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, list[QuantizedLinear]] = {}
    for name, layer in layers.items():
        form = (layer.out_features, layer.in_features, tuple(layer.layout.widths()))
        found.setdefault(first.setdefault(form, name), []).append(layer)
    return {name: same[:IN_TURN] for name, same in found.items()}


@torch.inference_mode()
def _generation_seconds(model: Any) -> float:
    vocabulary = text_config(model.config).vocab_size
    prompt = torch.arange(PROMPT, device=model.device)[None] % vocabulary
    started = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    synchronize(model.device)
    return time.perf_counter() - started


def _linear_bytes(model: nn.Module, folder: Path) -> int:
    """Return the bytes that the quantized layers take in memory, what kernels derived included."""
    total = 0
    for name in in_blocks(read_layouts(folder)):
        module = model.get_submodule(name)
        if isinstance(module, QuantizedLinear):
            total += module.resident_bytes()
        else:
            weight = module.get_parameter("weight")
            total += weight.numel() * weight.element_size()
    return total


def _fastest(calls: Mapping[str, Callable[[], Tensor]], device: str) -> dict[str, float]:
    """Return the least seconds of each call, run in turn."""
    least = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()  # compiles, and fills caches
    stop = time.perf_counter() + LEAST_SECONDS * len(calls)
    while time.perf_counter() < stop:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            synchronize(device)
            least[name] = min(least[name], time.perf_counter() - started)
    return least
