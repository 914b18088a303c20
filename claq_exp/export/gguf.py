"""GGUF files, which llama.cpp reads: any checkpoint of a Llama-like model, dequantized.

Names of tensors are the `gguf` package's.  The rows of q and k are reordered as llama.cpp's
convert_hf_to_gguf.py does for `llama`, whose rotary embedding turns neighbouring pairs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from errno import EEXIST
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from claq_exp.checkpoint.reader import check_dtype, open_checkpoint, read_layouts, read_rounding
from claq_exp.errors import ConfigError, NumericalError, one_of
from claq_exp.export.gguf_vocabulary import read_vocabulary
from claq_exp.models.skeleton import tied_names
from claq_exp.system.files import sync_folder

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap
    from transformers import PretrainedConfig

    from claq_exp.models.stream import StreamedModel

ENDING = ".gguf"
ARCHITECTURES = {  # model_type -> the package's name of its architecture
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
}
PERMUTED = "LLAMA"
BLOCK = 32  # numbers of a block of Q8_0
FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def write_gguf(folder: Path, target: Path, *, dtype: str, trust_remote_code: bool = False) -> None:
    """Write a checkpoint as a GGUF file, published by rename.

    dtype: of matrices, float16, float32 or q8_0; vectors are float32.  A matrix whose rows are no
    multiple of 32 is float16 in place of Q8_0.
    Raises ConfigError for a model, a tokenizer or a target that cannot be written.
    """
    if target.suffix != ENDING:
        raise ConfigError(f"'{target}' is no name of a GGUF file; let it end in {ENDING}")
    layouts = read_layouts(folder)
    if read_rounding(folder) is not None:
        raise ConfigError(
            "format=gguf does not round activations as this checkpoint does; use format=dense"
        )
    opened = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    if dtype != "float32":
        check_dtype(folder, layouts, "float16")
    write_opened(opened, folder, target, dtype=dtype, trust_remote_code=trust_remote_code)


def write_opened(
    opened: StreamedModel,
    folder: Path,
    target: Path,
    *,
    dtype: str,
    trust_remote_code: bool = False,
) -> None:
    """Write an open model, of an original too, as `write_gguf`; its tokenizer is in `folder`."""
    tensors = _Tensors.of(opened, dtype)
    rows = opened.model.get_input_embeddings().get_parameter("weight").shape[0]
    vocabulary = read_vocabulary(folder, rows, trust_remote_code=trust_remote_code)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        path = Path(scratch) / target.name
        writer = _writer(path, opened.model.config, tensors.architecture, dtype)
        vocabulary.add_to(writer)
        tensors.add_to(writer)
        if target.exists():
            raise FileExistsError(EEXIST, "another process made this file meanwhile", str(target))
        path.rename(target)
    sync_folder(target.parent)


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a file.  names: of the file -> of the model; tied ones once."""

    opened: StreamedModel
    architecture: str
    dtype: str
    names: dict[str, str]

    @staticmethod
    def of(opened: StreamedModel, dtype: str) -> _Tensors:
        """Name the tensors.  Raises ConfigError for a model that is not known."""
        model = opened.model
        architecture = _architecture(model.config)
        known, names = _name_map(model.config, architecture), {}
        tied = tied_names(model)
        for name in (name for name in model.state_dict() if name not in tied):
            found = known.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise ConfigError(
                    f"format=gguf has no name for the tensor {name}; use format=dense"
                )
            names[found] = name
        return _Tensors(opened, architecture, dtype, names)

    def add_to(self, writer: GGUFWriter) -> None:
        """Write header, fields and tensors, one tensor at a time."""
        from gguf import GGML_QUANT_SIZES

        state = self.opened.model.state_dict()
        for name, own in self.names.items():
            shape = tuple(state[own].shape)
            kind = self._kind(shape)
            block, stored = GGML_QUANT_SIZES[kind]
            *leading, row = shape
            in_bytes = (*leading, row // block * stored) if kind.name == "Q8_0" else shape
            number: Any = {"F16": np.float16, "F32": np.float32}.get(kind.name, np.uint8)
            size = state[own].numel() // block * stored
            writer.add_tensor_info(name, in_bytes, np.dtype(number), size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in self._arrays():
            writer.write_tensor_data(data)
        writer.close()

    def _arrays(self) -> Iterator[NDArray[Any]]:
        from gguf import quantize

        for own in self.names.values():
            tensor = self._permuted(own, self.opened.read(own).float())
            kind = self._kind(tuple(tensor.shape))
            data = quantize(tensor.contiguous().numpy(), kind)
            if kind.name == "F16" and not np.isfinite(data).all():
                raise NumericalError(f"{own} holds a number beyond float16; use dtype=float32")
            yield data

    def _kind(self, shape: tuple[int, ...]) -> Any:
        """Return how a tensor is stored."""
        from gguf import GGMLQuantizationType as Kind

        if len(shape) < 2 or self.dtype == "float32":
            return Kind.F32
        return Kind.Q8_0 if self.dtype == "q8_0" and shape[-1] % BLOCK == 0 else Kind.F16

    def _permuted(self, name: str, tensor: Tensor) -> Tensor:
        """Put the rows of q and k in llama.cpp's order: halves of a head become pairs."""
        if self.architecture != PERMUTED or not name.rpartition(".")[0].endswith(
            ("self_attn.q_proj", "self_attn.k_proj")
        ):
            return tensor
        config = self.opened.model.config
        queries = ".q_proj." in name
        heads = config.num_attention_heads if queries else config.num_key_value_heads
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _architecture(config: PretrainedConfig) -> str:
    if config.model_type not in ARCHITECTURES:
        known = one_of("architecture of format=gguf", config.model_type, ARCHITECTURES)
        raise ConfigError(f"{known}; or use format=dense")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"format=gguf does not write the rotary embedding '{rope['rope_type']}'; use "
            "format=dense and llama.cpp's own convert_hf_to_gguf.py"
        )
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        raise ConfigError("format=gguf does not write a sliding window; use format=dense")
    return ARCHITECTURES[config.model_type]


def _name_map(config: PretrainedConfig, architecture: str) -> TensorNameMap:
    from gguf import MODEL_ARCH, get_tensor_name_map

    return get_tensor_name_map(MODEL_ARCH[architecture], config.num_hidden_layers)


def _writer(path: Path, config: PretrainedConfig, architecture: str, dtype: str) -> GGUFWriter:
    """Return a writer with what is known of the model."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, MODEL_ARCH_NAMES[MODEL_ARCH[architecture]])
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(config.model_type)
    writer.add_file_type(LlamaFileType[FILE_TYPES[dtype]])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    return writer
