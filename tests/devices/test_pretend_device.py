"""The pretended device is a device: it reports itself, refuses to mix, and counts."""

from __future__ import annotations

import copy
import pickle

import pretend_device
import pytest
import torch
from conftest import tiny_llama
from pretend_tensor import MIXED
from torch import nn


@pytest.fixture
def numbers(pretend) -> torch.Tensor:
    return torch.arange(12.0, device=pretend).reshape(3, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda device: torch.zeros(3, device=device),
        lambda device: torch.tensor([1.0, 2.0], device=device),
        lambda device: torch.arange(3, device=device),
        lambda device: torch.randn(2, 3, device=device),
        lambda device: torch.ones(3).to(device),
        lambda device: torch.ones(3).to(device, torch.float16, copy=True),
        lambda device: nn.Linear(2, 3).to(device).weight,
        lambda device: nn.Linear(2, 3, device=device).half().weight,
        lambda device: torch.eye(3, device=device)[1:].t().float(),
        lambda device: torch.zeros(3, device=device).new_empty(2),
        lambda device: copy.deepcopy(nn.Linear(2, 3).to(device)).weight,
        lambda device: pickle.loads(pickle.dumps(torch.ones(3, device=device))),
    ],
)
def test_tensors_are_on_it(pretend, make):
    made = make(pretend)
    assert str(made.device) == f"{pretend}:0"
    assert made.cpu().device.type == "cpu"


def test_it_computes_what_the_cpu_does(pretend, numbers):
    plain = numbers.cpu()
    numbers[1:].mul_(2)
    numbers[0] = torch.ones(4, device=pretend)
    plain[1:].mul_(2)
    plain[0] = 1
    assert torch.equal(numbers.cpu(), plain)
    assert torch.equal((numbers @ numbers.t()).cpu(), plain @ plain.t())
    assert numbers.unsqueeze_(0).shape == (1, 3, 4)
    assert torch.equal(torch.linalg.qr(numbers).R.cpu(), torch.linalg.qr(plain[None]).R)


@pytest.mark.parametrize(
    "mix",
    [
        lambda own, other: own + other,
        lambda own, other: other * own,
        lambda own, other: own @ other.t(),
        lambda own, other: torch.cat([own, other]),
        lambda own, other: own.add_(other),
        lambda own, other: torch.where(own > 0, own, other),
        nn.functional.linear,
        torch.equal,
        lambda own, other: own.index_select(0, torch.tensor([0])),
        lambda own, other: nn.functional.embedding(torch.tensor([0]), own),
    ],
)
@pytest.mark.parametrize("inference", [True, False])
def test_operands_of_two_devices_are_refused(numbers, mix, inference):
    with torch.inference_mode(inference), pytest.raises(RuntimeError, match=MIXED):
        mix(numbers, torch.ones(3, 4))


def test_numbers_and_indices_of_the_cpu_are_taken_as_cuda_takes_them(numbers):
    assert (numbers + torch.tensor(1.0)).device == numbers.device
    assert (numbers * torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float32
    assert numbers[torch.tensor([2, 0])][0, 0].item() == 8.0
    numbers[torch.tensor([1])] = torch.tensor(7.0)
    assert numbers[1].tolist() == [7.0] * 4
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same"):
        torch.ones(3)[torch.tensor([0], device=numbers.device)]


def test_code_of_the_cpu_cannot_read_it(numbers):
    with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
        numbers.numpy()
    assert numbers.data_ptr() % 4 == 0
    with pytest.raises(RuntimeError, match="cannot be read by code that runs on the CPU"):
        int(numbers.data_ptr())
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=numbers.device, generator=torch.Generator())
    kernel = pretend_device.interpreted({})
    with pytest.raises(ValueError, match="cpu tensor"):
        kernel[(1,)](numbers, torch.ones(3))


@pytest.mark.parametrize("inference", [True, False])
def test_copies_and_waits_are_counted(pretend, numbers, inference):
    def counts(work) -> tuple[int, int, int]:
        with torch.inference_mode(inference), pretend_device.traffic() as seen:
            work()
        return seen.uploads.total(), seen.downloads.total(), seen.waits.total()

    assert counts(lambda: (numbers + 1).square().sum().softmax(0)) == (0, 0, 0)
    assert counts(lambda: torch.ones(3).to(pretend)) == (1, 0, 0)
    assert counts(lambda: (numbers.cpu(), numbers.to("cpu", torch.float16))) == (0, 2, 0)
    assert counts(lambda: numbers.to(pretend)) == (0, 0, 0)
    assert counts(lambda: torch.ones(3, 4).copy_(numbers)) == (0, 1, 0)
    assert counts(lambda: numbers.sum().item()) == (0, 0, 1)
    assert counts(lambda: bool((numbers > 0).any())) == (0, 0, 1)
    assert counts(lambda: numbers[numbers > 0]) == (0, 0, 1)
    assert counts(numbers.nonzero) == (0, 0, 1)
    with pretend_device.traffic() as seen:
        numbers.cpu()
    assert seen.bytes_down == 48
    (line,) = seen.downloads
    assert line.startswith("tests/devices/test_pretend_device.py:")


def test_gradients_are_those_of_the_cpu(pretend):
    layer, inputs = nn.Linear(4, 3), torch.randn(5, 4)
    layer(inputs).square().sum().backward()
    expected = layer.weight.grad
    layer.weight.grad = None
    start = inputs.clone().requires_grad_()
    (layer.to(pretend)(start.to(pretend)) ** 2).sum().backward()
    assert layer.weight.grad.device.type == pretend
    assert torch.allclose(layer.weight.grad.cpu(), expected)
    assert start.grad.device.type == "cpu"


def test_memory_is_counted_given_back_and_limited(pretend):
    module = torch.get_device_module(pretend)
    before = module.memory_allocated()
    with pretend_device.memory(1000):
        held = torch.zeros(200, device=pretend)
        view = held[10:]
        assert module.memory_allocated() - before == 800
        assert module.mem_get_info()[0] == 200
        with pytest.raises(torch.OutOfMemoryError):
            held + 1
        del held
        assert module.memory_allocated() - before == 800
        del view
        assert module.memory_allocated() == before
        torch.zeros(250, device=pretend)


def test_tied_weights_stay_tied_when_they_move(pretend):
    model = tiny_llama()
    for place in (pretend, "cpu", pretend):
        assert model.to(place).lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.device.type == place


def test_it_is_there_only_while_it_is_asked_for():
    assert not torch.accelerator.is_available() or torch.cuda.is_available()
