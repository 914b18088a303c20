"""llama.cpp's own quantizer, with an importance matrix from the calibration windows of a run.

    pip install --no-deps llama-cpp-py-sync && pip install cffi    # its wheel needs glibc 2.38
    python examples/peers/with_llama_cpp.py SOURCE.gguf TARGET.gguf IQ4_NL [WORDS]

SOURCE.gguf is the original in llama.cpp's form (its convert_hf_to_gguf.py writes one).  The third
word is a type as in llama.h: Q2_K, Q3_K_M, IQ2_XS, IQ3_XXS, IQ4_NL, ...  WORDS are those of the
command line that name the same model and the calibration text.
"""

from __future__ import annotations

import sys

import gguf
import torch
from needs import missing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import claq_exp

try:
    from llama_cpp_py_sync._cffi_bindings import ffi, get_lib
except ModuleNotFoundError as error:
    sys.exit(missing(error, "pip install --no-deps llama-cpp-py-sync && pip install cffi"))


@torch.inference_mode()
def importance(model: PreTrainedModel, windows: Tensor) -> dict[str, Tensor]:
    """Return linear layer -> mean square of each of its inputs over all tokens: [in] float32.

    That is what llama.cpp's own imatrix program stores.
    """
    sums: dict[str, Tensor] = {}

    def note(name: str) -> object:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].double().square().flatten(0, -2).sum(0)
            sums[name] = sums.get(name, 0.0) + squares

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(note(name))
    for window in windows:
        model(window[None], use_cache=False)
    return {name: (total / windows.numel()).float() for name, total in sums.items()}


def main(source: str, target: str, kind: str, *words: str) -> None:
    """Quantize a GGUF file into another one."""
    calibration = claq_exp.calibration_inputs(*words)
    model = AutoModelForCausalLM.from_pretrained(calibration.model, dtype=torch.float32).eval()
    architecture = gguf.GGUFReader(source).get_field("general.architecture").contents()
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)

    kept = []  # what C points to must outlive the call
    found = importance(model, calibration.windows)
    entries = ffi.new("struct llama_model_imatrix_data[]", len(found) + 1)  # the last one is empty
    for entry, (name, values) in zip(entries, found.items(), strict=False):
        kept += [
            ffi.new("char[]", f"{names.get_name(name)}.weight".encode()),
            ffi.new("float[]", values.tolist()),
        ]
        entry.name, entry.data, entry.size = kept[-2], kept[-1], len(values)

    library = get_lib()
    settings = library.llama_model_quantize_default_params()
    settings.nthread = torch.get_num_threads()
    settings.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.allow_requantize = True  # the original may be in Q4_1, as the default model's file is
    settings.imatrix = entries
    pointer = ffi.new("llama_model_quantize_params *", settings)
    library.llama_backend_init()
    if library.llama_model_quantize(source.encode(), target.encode(), pointer):
        sys.exit(f"llama.cpp could not quantize {source} to {kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
