"""What is asked of a device that computes, by the functions that torch has for its kind.

`cuda` (which ROCm calls itself too), `xpu` and any other backend that torch knows answer alike.
"""

from __future__ import annotations

from types import ModuleType

import torch

CPU = "cpu"
ROCM = torch.version.hip is not None  # what torch calls cuda are AMD's devices


def is_known(device: str) -> bool:
    """Tell whether torch can compute on a device of this kind and say what memory it has."""
    try:
        return torch.device(device) == torch.device(CPU) or hasattr(_module(device), "mem_get_info")
    except RuntimeError:  # no name of a device, or of one that torch only has in name
        return False


def is_cpu(device: str | torch.device) -> bool:
    """Tell whether a device computes in the memory of the machine."""
    return torch.device(device).type == CPU


def count(kind: str) -> int:
    """Return how many devices of a kind there are."""
    module = _module(kind)
    return int(module.device_count()) if module.is_available() else 0


def name(device: str | torch.device) -> str:
    """Return what its maker calls a device."""
    return str(_module(device).get_device_name(device))


def free_and_total(device: str | torch.device) -> tuple[int, int]:
    """Return the bytes of a device's memory that are free, and all of them."""
    free, total = _module(device).mem_get_info(device)
    return int(free), int(total)


def synchronize(device: str | torch.device) -> None:
    """Wait until a device has done all that it was given; a CPU has."""
    if not is_cpu(device):
        _module(device).synchronize(device)


def _module(device: str | torch.device) -> ModuleType:
    module: ModuleType = torch.get_device_module(torch.device(device).type)
    return module
