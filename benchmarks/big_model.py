"""Quantizes a model that is larger than the memory it may take, and holds it to its target.

Writes a random checkpoint of Llama's shape in bfloat16, shard by shard, quantizes it with
`claq-exp` in a process under a hard limit of address space, and compares the peak of every block
with 1.5 x (a block in float32 + hidden states) + 1 GiB and with what `claq-exp plan` said.

    python benchmarks/big_model.py --folder /tmp/big --blocks 28 --limit-gib 8
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import command_line, note, parse
from tiny_model import byte_tokenizer, write_text
from transformers import LlamaConfig

from claq_exp.compose.experiment import compose_config
from claq_exp.models.skeleton import skeleton
from claq_exp.run.plan import Plan, plan_for
from claq_exp.system.files import write_json
from claq_exp.tensor_files.tensor_file import write_tensors

GIB = 2**30
FLAT = 0.05  # by how much a later block's peak may differ from the second's


def main() -> int:
    """Print the table; return 1 where a target is missed."""
    parser = command_line(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for model and runs")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--limit-gib", type=float, default=8.0, help="of address space")
    parser.add_argument("overrides", nargs="*", help="more GROUP.FIELD=VALUE of claq-exp")
    quick = {"hidden": 128, "intermediate": 128, "blocks": 2, "vocabulary": 256}
    arguments = parse(parser, **quick, windows=2, seqlen=64)
    model = arguments.folder / f"random-{arguments.hidden}-{arguments.blocks}"
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.hidden // 128,
        num_key_value_heads=max(1, arguments.hidden // 384),
        vocab_size=arguments.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    if not (model / "config.json").is_file():
        write_model(config, model)
    words = overrides(arguments, model)
    planned = plan_for(compose_config(words), "cpu")
    started = time.perf_counter()
    code = run_limited(words, int(arguments.limit_gib * GIB), arguments.folder / "run.log")
    seconds = time.perf_counter() - started
    if code:
        print((arguments.folder / "run.log").read_text()[-2000:])
        print(f"claq-exp ended with {code} after {seconds:.0f} s")
        return 1
    block = sum(p.numel() for p in skeleton(config).model.layers[0].parameters())
    return judge(arguments, planned, 4 * block, seconds)


def write_model(config: LlamaConfig, folder: Path) -> None:
    """Write a random model, one file a block, and a tokenizer of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: p for n, p in skeleton(config, torch.bfloat16).named_parameters()}
    state.pop("lm_head.weight", None)  # tied
    shards: dict[str, list[str]] = {}
    for name in state:
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)

    def random_tensor(name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(state[name].shape, dtype=torch.bfloat16)
        scale = 0.02
        return torch.empty(state[name].shape, dtype=torch.bfloat16).normal_(
            std=scale, generator=generator
        )

    for file, names in shards.items():
        like = {name: state[name] for name in names}
        write_tensors(folder / file, like, ((name, random_tensor(name)) for name in names))
    places = {name: file for file, names in shards.items() for name in names}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    byte_tokenizer().save_pretrained(folder)
    write_text(folder / "text.txt", 20000)
    config.save_pretrained(folder)


def overrides(arguments: argparse.Namespace, model: Path) -> list[str]:
    """Return the words behind `claq-exp`."""
    return [
        "model=hf",
        f"model.source={model}",
        "calibration=text",
        f"calibration.path={model / 'text.txt'}",
        f"calibration.windows={arguments.windows}",
        f"calibration.seqlen={arguments.seqlen}",
        "calibration.batch_size=1",
        "evaluation=none",
        "tracking=none",
        f"outputs={arguments.folder / 'outputs'}",
        *arguments.overrides,
    ]


def run_limited(words: list[str], limit: int, log: Path) -> int:
    """Run claq-exp in a process that cannot map more than `limit` bytes; return its exit code."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    command = [sys.executable, "-m", "claq_exp", *words, "resume=never"]
    with log.open("w") as out:
        return subprocess.run(
            command, stdout=out, stderr=out, preexec_fn=limited, check=False
        ).returncode


def judge(arguments: argparse.Namespace, planned: Plan, block: int, seconds: float) -> int:
    """Print what was planned, what happened and what was to be kept to."""
    results = max(
        (arguments.folder / "outputs").glob("*/*/results.json"), key=lambda p: p.stat().st_mtime
    )
    lines = (results.parent / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    peaks = [event["peak_memory_bytes"] for event in events if event["event"] == "block"]
    hidden = planned.hidden_bytes
    target = 1.5 * (block + hidden) + GIB
    second, last = peaks[1], peaks[min(9, len(peaks) - 1)]
    found = json.loads(results.read_text())
    size = found["size"]["checkpoint_bytes"]
    whole = max(e["peak_memory_bytes"] for e in events if "peak_memory_bytes" in e)
    quantizing = sum(found["timings"][key] or 0 for key in ("calibrate", "hessian", "solve"))
    rows = {
        "parameters": f"{planned.parameters / 1e9:.2f} B",
        "a block in float32, hidden states": f"{block / GIB:.2f} + {hidden / GIB:.2f} GiB",
        "peak of a block, worst": f"{max(peaks) / GIB:.2f} GiB, target {target / GIB:.2f} GiB",
        "block 10 beside block 2": f"{last / second:.3f}",
        "peak of the run": f"{whole / GIB:.2f} GiB, planned {planned.needs.memory / GIB:.2f} GiB",
        "checkpoint": f"{size} bytes, planned {planned.sizes.bytes} bytes",
        "quantizing": f"{quantizing:.0f} s, planned {planned.seconds['quantize']:.0f} s",
        "in all": f"{seconds:.0f} s, planned {sum(planned.seconds.values()):.0f} s",
    }
    for name, value in rows.items():
        print(f"{name:36} {value}")
    note(
        arguments,
        parameters=planned.parameters,
        worst_block_bytes=max(peaks),
        target_bytes=target,
        later_over_second=last / second,
        peak_bytes=whole,
        planned_peak_bytes=planned.needs.memory,
        checkpoint_bytes=size,
        planned_checkpoint_bytes=planned.sizes.bytes,
        quantizing_s=float(quantizing),
        seconds=seconds,
    )
    missed = max(peaks) > target or abs(last / second - 1) > FLAT
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
