"""What other libraries get of ours are copies, and the process is afterwards as it was before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import shutil
import warnings
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from task_rows import made_rows, write_rows
from transformers import PreTrainedTokenizerFast

from claq_exp.checkpoint.manifest import CARD
from claq_exp.cli import main
from claq_exp.config import TaskConfig
from claq_exp.evaluation.lending import unchanged_process
from claq_exp.evaluation.tasks import check_tasks
from claq_exp.evaluation.zero_shot import score_tasks

QUESTIONS = [{"question": f"{i} cats and a dog?", "answer": f"so #### {i + 1}"} for i in range(3)]
pytestmark = pytest.mark.case(134)


def without_padding() -> PreTrainedTokenizerFast:
    """A tokenizer without a token for padding: lm-eval adds one."""
    backend = byte_tokenizer().backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=backend.id_to_token(1))


def without_unknown() -> PreTrainedTokenizerFast:
    """One that has an end of text and no padding, which lm-eval sets to the former."""
    backend = byte_tokenizer().backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=backend.id_to_token(1))


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, str]:
    tokenizer.save_pretrained(folder)
    return files_of(folder)


@pytest.mark.parametrize(
    ("name", "metric", "make"),
    [
        ("piqa", "acc", without_padding),
        ("piqa", "acc", without_unknown),
        ("gsm8k", "exact_match,strict-match", without_unknown),
    ],
)
def test_tokenizer_and_settings_of_the_model_are_as_before(name, metric, make, tmp_path):
    rows = made_rows("piqa", 3) if name == "piqa" else QUESTIONS
    task = TaskConfig(metric=metric, data=str(write_rows(tmp_path / "rows.jsonl", rows)))
    model = tiny_llama(max_position_embeddings=512).float().train()
    tokenizer = make()
    before = saved(tokenizer, tmp_path / "before")
    config, generation = model.config.to_json_string(), model.generation_config.to_json_string()
    held = model.config
    score_tasks(model, tokenizer, {name: task}, 2)
    assert (len(tokenizer), tokenizer.pad_token) == (256, None)
    assert saved(tokenizer, tmp_path / "after") == before
    assert model.config is held
    assert model.config.to_json_string() == config
    assert model.generation_config.to_json_string() == generation
    assert model.training


def test_what_lm_eval_does_to_its_copies_does_not_come_back(tmp_path, monkeypatch):
    """Another release may change more than today's does."""
    whole = lm_eval.evaluate

    def greedy(adapter, *arguments, **options):
        adapter.model.config.use_cache = False
        adapter.model.config.rope_parameters["rope_theta"] = 1.0
        adapter.model.generation_config.max_length = 7
        adapter.tokenizer.padding_side = "left"
        adapter.tokenizer.model_max_length = 3
        return whole(adapter, *arguments, **options)

    monkeypatch.setattr(lm_eval, "evaluate", greedy)
    model, tokenizer = tiny_llama().float(), byte_tokenizer()
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    sides = tokenizer.padding_side, tokenizer.model_max_length
    data = str(write_rows(tmp_path / "rows.jsonl", made_rows("piqa", 2)))
    score_tasks(model, tokenizer, {"piqa": TaskConfig(data=data)}, 2)
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert (tokenizer.padding_side, tokenizer.model_max_length) == sides


def state() -> dict:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "filters": list(warnings.filters),
        "levels": {name: logging.getLogger(name).level for name in ("", "lm_eval", "transformers")},
        "handlers": list(logging.root.handlers),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "products": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    }


def test_checking_and_scoring_leave_the_process_as_it_was(tmp_path):
    data = str(write_rows(tmp_path / "rows.jsonl", made_rows("arc_easy", 3)))
    tasks = {"arc_easy": TaskConfig(data=data)}
    model, tokenizer = tiny_llama().float(), without_padding()
    before = state()
    check_tasks(tasks)
    first = score_tasks(model, tokenizer, tasks, 2)
    assert state() == before
    assert score_tasks(model, tokenizer, tasks, 2) == first  # a second time in one process


@pytest.mark.parametrize(
    "change",
    [
        lambda: random.seed(5),
        lambda: np.random.seed(5),
        lambda: torch.manual_seed(5),
        lambda: os.environ.update(CLAQ_EXP_TEST="1", HOME="elsewhere"),
        lambda: os.environ.pop("PATH"),
        lambda: warnings.simplefilter("error"),
        lambda: logging.getLogger("lm_eval").setLevel(logging.DEBUG),
        lambda: logging.root.addHandler(logging.NullHandler()),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
        lambda: torch.use_deterministic_algorithms(mode=True),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
    ],
)
@pytest.mark.parametrize("error", [None, ValueError])
def test_a_change_of_the_process_is_taken_back(change, error):
    before = state()
    with contextlib.suppress(ValueError), unchanged_process():
        change()
        assert state() != before
        if error:
            raise error
    assert state() == before


def test_a_task_changes_no_byte_of_a_checkpoint(tiny_run, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "A"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    data = write_rows(tmp_path / "rows.jsonl", made_rows("piqa", 2))
    words = [*tiny_run, f"model.source={folder}", "experiment=rtn_4bit", "evaluation=none"]
    task = ["+evaluation.zero_shot.piqa.metric=acc", f"+evaluation.zero_shot.piqa.data={data}"]
    drops = [word for word in words if not word.startswith("evaluation.")]
    assert main([*drops, "name=without"]) == 0
    assert main([*drops, *task, "name=with"]) == 0
    assert main([*drops, *task, "name=again"]) == 0  # the original's score is found
    held = {
        name: files_of(next((tmp_path / "outputs" / name).glob("*/checkpoint")))
        for name in ("without", "with", "again")
    }
    cards = [files.pop(CARD) for files in held.values()]  # say what was measured
    assert cards[0] != cards[1]
    assert held["with"] == held["without"]
    assert held["again"] == held["without"]
