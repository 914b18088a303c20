"""How the checkpoints of this folder were made, by their owners' packages, from one tiny Llama.

    pip install auto-round llmcompressor bitsandbytes torchao hqq
    python tests/data/foreign/make.py NAME ...

NAME: auto_round gptq awq compressed_tensors packed_zeros bitsandbytes torchao hqq.  `made.json`
of a folder has the packages' versions, and the logits that the package gave for the first eight
tokens.
Made with auto-round 0.16.1, llmcompressor 0.14.0.1, bitsandbytes 0.50.2, torchao 0.18.0,
hqq 0.2.8.post1, gptqmodel 7.7.0, torch 2.13 and transformers 5.24.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
TOKENS = torch.arange(8)[None]
KEPT = ("config.json", "model.safetensors", "qmodel.pt")


def tiny(**changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        dtype=torch.float16,
        **{"intermediate_size": 96, "num_key_value_heads": 2, **changes},
    )
    return LlamaForCausalLM(config).half().eval()


def windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (1, 64), generator=generator) for _ in range(8)]


def auto_round(source: Path, target: Path, form: str = "auto_round", bits: int = 3) -> None:
    from auto_round import AutoRound
    from conftest import byte_tokenizer

    options = {"bits": bits, "group_size": 32, "sym": False, "iters": 2, "batch_size": 4}
    options |= {"nsamples": 8, "seqlen": 64, "dataset": windows(), "enable_torch_compile": False}
    rounding = AutoRound(load(source), byte_tokenizer(), device_map="cpu", **options)
    rounding.quantize_and_save(str(target), format=form)


def gptq(source: Path, target: Path) -> None:
    auto_round(source, target, "auto_gptq", 4)


def awq(source: Path, target: Path) -> None:
    auto_round(source, target, "auto_awq", 4)


def compressed_tensors(source: Path, target: Path, *, symmetric: bool = True) -> None:
    from conftest import byte_tokenizer
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group", "group_size": 32, "actorder": None}
    group = {"targets": ["Linear"], "weights": weights}
    ids = [window[0].tolist() for window in windows()]
    model = load(source)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 64] * 8}),
        processor=byte_tokenizer(),
        recipe=GPTQModifier(ignore=["lm_head"], config_groups={"group_0": group}),
        max_seq_length=64,
        num_calibration_samples=8,
    )
    model.save_pretrained(target, save_compressed=True)


def packed_zeros(source: Path, target: Path) -> None:
    compressed_tensors(source, target, symmetric=False)


def bitsandbytes(source: Path, target: Path) -> None:
    from transformers import BitsAndBytesConfig

    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    load(source, BitsAndBytesConfig(load_in_4bit=True, **four)).save_pretrained(target)


def torchao(source: Path, target: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    load(source, TorchAoConfig(Int8WeightOnlyConfig())).save_pretrained(target)


def hqq(source: Path, target: Path) -> None:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model, settings = load(source), BaseQuantizeConfig(nbits=3, group_size=32, axis=1)
    AutoHQQHFModel.quantize_model(
        model, quant_config=settings, compute_dtype=torch.float16, device="cpu"
    )
    AutoHQQHFModel.save_quantized(model, str(target))


def load(source: Path, settings: object = None) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float16, quantization_config=settings, device_map={"": "cpu"}
    )


MAKERS = {  # and the packages behind each
    "auto_round": (auto_round, ["auto-round"]),
    "gptq": (gptq, ["auto-round", "gptqmodel", "optimum"]),
    "awq": (awq, ["auto-round", "gptqmodel"]),
    "compressed_tensors": (compressed_tensors, ["llmcompressor", "compressed-tensors"]),
    "packed_zeros": (packed_zeros, ["llmcompressor", "compressed-tensors"]),
    "bitsandbytes": (bitsandbytes, ["bitsandbytes"]),
    "torchao": (torchao, ["torchao"]),
    "hqq": (hqq, ["hqq"]),
}
SHAPES = {  # its kernel for processors takes multiples of 64
    "bitsandbytes": {"intermediate_size": 128, "num_key_value_heads": 4}
}


def main(names: list[str]) -> None:
    from claq_exp.foreign.found import find_foreign
    from claq_exp.foreign.load import load_foreign

    for name in names:
        make, packages = MAKERS[name]
        with TemporaryDirectory() as place:
            tiny(**SHAPES.get(name, {})).save_pretrained(Path(place) / "tiny")
            make(Path(place) / "tiny", Path(place) / "made")
            whole = next(Path(place).glob("made/**/config.json")).parent  # AutoRound makes another
            (HERE / name).mkdir(exist_ok=True)
            for file in KEPT:
                if (whole / file).is_file():
                    shutil.copy(whole / file, HERE / name / file)
        model = load_foreign(find_foreign(HERE / name), dtype="float32", device="cpu")
        with torch.inference_mode():
            logits = model(TOKENS).logits[0, -1, :16]
        made = {"packages": {p: version(p) for p in [*packages, "torch", "transformers"]}}
        made["logits"] = [round(value, 4) for value in logits.float().tolist()]
        (HERE / name / "made.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    main(sys.argv[1:] or list(MAKERS))
