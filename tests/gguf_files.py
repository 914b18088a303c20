"""A tiny Llama as a GGUF file, written as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from conftest import byte_tokenizer
from transformers import LlamaForCausalLM

WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    path: Path, model: LlamaForCausalLM, kind: str | None = None, *, vocabulary: bool = True
) -> None:
    """Write a Llama with tied embeddings and 257 tokens: all bytes, and a merged pair.

    kind: type of the matrices in blocks, as GGUF calls it; None for float16.
    """
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if vocabulary:
        _add_vocabulary(writer)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            place = _place(name.removesuffix(".weight"))
            values = _as_stored(tensor.float().numpy(), place, config)
            if kind and place.startswith("blk.") and values.ndim > 1:
                raw = gguf.GGMLQuantizationType[kind]
                packed = gguf.quants.quantize(values.astype(np.float32), raw)
                writer.add_tensor(f"{place}.weight", packed, raw_dtype=raw)
            else:
                writer.add_tensor(f"{place}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    vocabulary = byte_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _place(name: str) -> str:
    if name in WHOLE:
        return WHOLE[name]
    _, _, block, part = name.split(".", 3)
    return f"blk.{block}.{PARTS[part]}"


def _as_stored(values: np.ndarray, place: str, config: object) -> np.ndarray:
    """Norms stay in 32 bits; the rows of queries and keys are ordered for another rotation."""
    if values.ndim == 1:
        return values
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if count := heads.get(place.rpartition(".")[2]):
        halves = values.reshape(count, 2, values.shape[0] // count // 2, -1)
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return values.astype(np.float16)
