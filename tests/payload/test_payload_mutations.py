"""Hundreds of random changes of a stored matrix: it is refused in one line, or it is a matrix."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
import torch
from damages import VALUES, edit_json, limits
from payload_samples import SAMPLES
from torch import Tensor

from claq_exp.errors import CheckpointError
from claq_exp.payload import operand_of, read_layout, reserved_counts, unpack_weight
from claq_exp.runtime.kernels.reference import dense_rows

CHANGES = 200  # of each sample
Stored = tuple[dict, dict[str, Tensor]]
DTYPES = (torch.float16, torch.float32, torch.int8, torch.uint8, torch.int64)


def change_a_key(data: dict, _: dict[str, Tensor], dice: random.Random) -> None:
    data[dice.choice([*data, "x"])] = dice.choice([*VALUES, {"2": 10}, {"4": 5, "2": 5}, 10, 13])


def change_somewhere(data: dict, _: dict[str, Tensor], dice: random.Random) -> None:
    edit_json(data, dice)


def flip_a_bit(_: dict, tensors: dict[str, Tensor], dice: random.Random) -> None:
    name = dice.choice(list(tensors))
    content = bytearray(tensors[name].numpy().tobytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    flat = torch.frombuffer(content, dtype=tensors[name].dtype)
    tensors[name] = flat.reshape(tensors[name].shape)


def fill(_: dict, tensors: dict[str, Tensor], dice: random.Random) -> None:
    name = dice.choice(list(tensors))
    size = tensors[name].nbytes
    content = bytearray(dice.choice([bytes(size), b"\xff" * size, dice.randbytes(size)]))
    flat = torch.frombuffer(content, dtype=tensors[name].dtype)
    tensors[name] = flat.reshape(tensors[name].shape)


def drop(_: dict, tensors: dict[str, Tensor], dice: random.Random) -> None:
    del tensors[dice.choice(list(tensors))]


def swap(_: dict, tensors: dict[str, Tensor], dice: random.Random) -> None:
    one, two = dice.choice(list(tensors)), dice.choice(list(tensors))
    tensors[one], tensors[two] = tensors[two], tensors[one]


def rename(_: dict, tensors: dict[str, Tensor], dice: random.Random) -> None:
    names = ("codes_2", "codes_9", "codes_", "codebooks_2", "scales", "row_scales", "x")
    tensors[dice.choice(names)] = tensors.pop(dice.choice(list(tensors)))


def reshape(_: dict, tensors: dict[str, Tensor], dice: random.Random) -> None:
    name = dice.choice(list(tensors))
    tensor = tensors[name]
    shapes = (tensor[:-1], tensor.reshape(-1), tensor[None], tensor[..., :0], tensor.repeat(2, 1))
    tensors[name] = dice.choice(shapes)


def retype(_: dict, tensors: dict[str, Tensor], dice: random.Random) -> None:
    name = dice.choice(list(tensors))
    tensors[name] = tensors[name].to(dice.choice(DTYPES))


MUTATIONS: tuple[Callable[[dict, dict[str, Tensor], random.Random], None], ...] = (
    *(change_a_key, change_a_key, change_somewhere, flip_a_bit, flip_a_bit, flip_a_bit),
    *(fill, drop, swap, rename, reshape, retype),
)


def use(data: dict, tensors: dict[str, Tensor]) -> None:
    """Read a matrix in every way, and check that it is one."""
    layout = read_layout(data)
    payload = unpack_weight(layout, tensors)
    assert payload.layout() == layout
    assert payload.finite()
    dense = payload.dequantize()
    assert dense.shape == (layout.rows, layout.columns)
    assert bool(torch.isfinite(dense).all())
    assert int(reserved_counts(layout, tensors).sum()) == layout.reserved
    assert torch.equal(dense_rows(operand_of(layout, tensors), 0, layout.rows), dense)
    again = payload.pack()
    assert set(again) == set(tensors)
    for suffix, tensor in tensors.items():
        assert again[suffix].numpy().tobytes() == tensor.contiguous().numpy().tobytes(), suffix


@pytest.mark.case(66, 72)
@pytest.mark.parametrize("name", SAMPLES)
def test_a_changed_matrix_is_refused_in_one_line_or_is_a_matrix(name):
    payload = SAMPLES[name]
    refused = 0
    for seed in range(CHANGES):
        dice = random.Random(f"{name} {seed}")
        data = json.loads(json.dumps(payload.layout().to_json()))
        tensors = {suffix: tensor.clone() for suffix, tensor in payload.pack().items()}
        mutation = dice.choice(MUTATIONS)
        mutation(data, tensors, dice)
        try:
            with limits():
                use(data, tensors)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{mutation.__name__} with seed {seed}: {error!r}") from error
    assert refused > CHANGES / 3
