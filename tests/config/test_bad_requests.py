"""A request that cannot be carried out ends in one line on standard error and leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from claq_exp.cli import main

REQUEST, RUN = 2, 1


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CLAQ_EXP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def run(tiny_run) -> Callable[..., int]:
    return lambda *words, command="run": main([command, *tiny_run, "threads=1", *words])


@pytest.fixture
def refusal(capfd) -> Callable[..., str]:
    """Read what was complained about: one line, and no traceback before it."""

    def read() -> str:
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        assert lines[0].startswith("claq-exp: ")
        return lines[0]

    return read


@pytest.fixture
def failure(capfd) -> Callable[..., str]:
    """Read why a run stopped: the last line, after those of the stages; no traceback."""

    def read() -> str:
        error = capfd.readouterr().err
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.strip()]
        assert [line for line in lines if line.startswith("claq-exp: ")] == lines[-1:]
        return lines[-1]

    return read


def left_behind(outputs: Path) -> list[str]:
    return sorted(path.relative_to(outputs).as_posix() for path in outputs.rglob("*"))


WORDS = [
    (["foo=1"], ["foo", "no such key", "seed"]),
    (["precison.bits=3"], ["precison.bits", "did you mean 'precision'?"]),
    (["calibration.widnows=3"], ["calibration.widnows", "did you mean 'windows'?", "seqlen"]),
    (["seed=abc"], ["seed", "abc", "Integer"]),
    (["codebook=kmean"], ["codebook=kmean", "did you mean 'kmeans'?", "uniform"]),
    (["precision=rules:Mine"], ["a class of your own is precision.name=rules:Mine"]),
    (["precision.name=os:Rule", "precision.share=1"], ["needs a plus: +precision.share=..."]),
    (["experiment=nothing"], ["experiment=nothing", "claq_2.12", "rtn_4bit"]),
    (["sweep=nothing"], ["sweep=nothing", "bit_widths"]),
    (["+precision.foo=1"], ["precision=outlier_order", "'foo'", "target_bits, threshold"]),
    (["precision.target_bits=9"], ["precision.target_bits=9", "2 to 4"]),
    (["precision=rate_distortion"], ["is now allocation=rate_distortion"]),
    (["reservation=rate_distortion"], ["is now part of allocation=rate_distortion"]),
    (["precision.importance=output"], ["is now allocation.importance"]),
    (["frobnicate"], ["'frobnicate'", "KEY=VALUE"]),
    (["model.source=模型"], ["cannot be read as an override", "'model.source=\"模型\"'"]),
    (["--frobnicate"], ["'--frobnicate'", "--help"]),
    (["precision.target_bits=[1,"], ["'precision.target_bits=[1,'", "KEY=VALUE"]),
    (["a b=c d"], ["'a b=c d'", "KEY=VALUE"]),
]
ALLOCATED = ["embedding=allocated", "allocation=rate_distortion"]
VALUES = [
    (["stream=sometimes"], ["stream", "sometimes", "auto", "false", "true"]),
    (["stream=true", "runtime.kernel=reference"], ["stream=true", "runtime.kernel=reference"]),
    (["calibration.keep_in=int8"], ["calibration.keep_in", "int8", "bfloat16"]),
    (["+calibration.widnows=3"], ["widnows", "calibration"]),
    (["seed=1.5"], ["seed", "1.5", "Integer"]),
    (["seed=-1"], ["seed is -1", "0"]),
    (["seed=4294967296"], ["seed is 4294967296"]),
    (["model.trust_remote_code=maybe"], ["model.trust_remote_code", "maybe", "bool"]),
    (["model.dtype=int8"], ["model.dtype 'int8'", "bfloat16, float16, float32"]),
    (["threads=0"], ["threads is 0"]),
    (["resume=bogus"], ["resume 'bogus'", "auto, never, required"]),
    (["device=tpu"], ["device 'tpu'", "auto, cpu, cuda, cuda:N"]),
    (["tracking.name=tensorboard"], ["tracking.name 'tensorboard'", "none, wandb"]),
    (["name=../elsewhere"], ["name '../elsewhere'", "names a folder"]),
    (["model.name=a/b"], ["model.name 'a/b'", "names a folder"]),
    (["precision.name=oracle"], ["precision.name 'oracle'", "fixed, hessian, layer_map"]),
    (["precision.name=nowhere.at_all:Rule"], ["'nowhere.at_all:Rule' cannot be imported"]),
    (["precision.name=nowhere:Rule"], ["no module nowhere", "type the command where nowhere.py"]),
    (["precision.name=os:getcwd"], ["'os:getcwd' is not a class"]),
    (["~precision.name"], ["precision.name is missing", "fixed, outlier_order"]),
    (["precision.target_bits=1.5"], ["precision.target_bits=1.5", "2 to 4"]),
    (["precision.target_bits=nan"], ["precision.target_bits=nan", "2 to 4"]),
    (["precision.target_bits=abc"], ["target_bits", "abc", "Float"]),
    (["evaluation.after=[load]"], ["evaluation.after 'load'", "quantize"]),
    (["precision=none"], ["precision=none", "allocation=rate_distortion"]),
    (["experiment=claq_2.12", "allocation=rate_distortion"], ["precision=none reservation=none"]),
    (["allocation=rate_distortion", "codebook=quantile"], ["codebook=kmeans"]),
    (["allocation=rate_distortion", "allocation.large=2"], ["allocation.small", "large=2"]),
    (["precision.low_bits=2"], ["precision.low_bits and precision.high_bits", "both or neither"]),
    (["precision=fixed", "precision.bits=0"], ["precision.bits is 0", "1 to 8"]),
    (["precision=fixed", "precision.bits=9"], ["precision.bits is 9", "1 to 8"]),
    (["precision=fixed", "precision.bits=3.5"], ["bits", "3.5", "Integer"]),
    (["reservation.ratio=-0.1"], ["reservation.ratio is -0.1", "0 to 1"]),
    (["reservation.ratio=2"], ["reservation.ratio is 2", "0 to 1"]),
    (["reservation.ratio=nan"], ["reservation.ratio is nan", "0 to 1"]),
    (["solver.damping=0"], ["solver.damping is 0"]),
    (["codebook=uniform", "reservation=none"], ["one width", "precision=fixed"]),
    (["codebook=uniform", "precision=fixed"], ["reservation=none"]),
    (["codebook=uniform", "codebook.group_size=-1"], ["codebook.group_size is -1"]),
    (["codebook=uniform", "codebook.zero_point=half"], ["codebook.zero_point", "real, whole"]),
    (
        ["codebook=group_table", "codebook.scale_bits=3"],
        ["codebook.scale_bits '3'", "6, 7, 8"],
    ),
    (["calibration.windows=0"], ["calibration.windows is 0"]),
    (["evaluation.batch_size=0"], ["evaluation.batch_size is 0"]),
    (["evaluation.context=1"], ["evaluation.context is 1", "from 2, or model"]),
    (["evaluation.context=whole"], ["evaluation.context is whole", "or model"]),
    (["evaluation.batch_size=many"], ["evaluation.batch_size is many", "or auto"]),
    (["evaluation.bos=never"], ["evaluation.bos 'never'", "auto, text, window"]),
    (["calibration.draw=last"], ["draw 'last'", "documents, first, positions, shuffled"]),
    (["calibration.lines=all"], ["lines 'all'", "rows, stripped, whole"]),
    (["evaluation.kl_windows=-1"], ["kl_windows is -1", "null"]),
    (["evaluation.kl_windows=1.5"], ["kl_windows", "1.5", "Integer"]),
    (["model.source="], ["model.source is empty"]),
    (["embedding=sums"], ["embedding=sums", "none, uniform"]),
    (["embedding=kmeans", "embedding.bits=9"], ["embedding=kmeans", "bits is 9", "1 to 8"]),
    (["embedding=uniform", "embedding.group_size=-1"], ["group_size is -1", "0 for whole rows"]),
    (["embedding=kmeans", "embedding.solver=best"], ["solver 'best'", "gptq, nearest"]),
    (["embedding=kmeans", "embedding.lookup=-1"], ["lookup is -1", "0 to 100"]),
    (["embedding=kmeans", "embedding.rows=some"], ["rows 'some'", "equal, frequency"]),
    (["embedding=allocated"], ["embedding=allocated", "allocation=rate_distortion"]),
    ([*ALLOCATED, "budget.bits=4"], ["embedding=allocated", "budget.kind=model"]),
    ([*ALLOCATED, "budget.bits=4", "budget.kind=nominal"], ["budget.kind=model and budget.bits"]),
    ([*ALLOCATED, "budget.kind=model"], ["budget.kind=model and budget.bits"]),
    (
        [*ALLOCATED, "budget.bits=4", "budget.kind=model", "allocation.importance=output"],
        ["embedding=allocated", "allocation.importance=fisher"],
    ),
    (["embedding=allocated", "embedding.looked_up_bits=9"], ["looked_up_bits is 9", "1 to 8"]),
    (["head=allocated"], ["head=allocated", "allocation=rate_distortion"]),
    (["head=sums"], ["head=sums", "kmeans, none, same, uniform"]),
    (["tune=biases"], ["tune=biases", "none, norms"]),
    (["tune.name=biases"], ["tune.name 'biases'", "none, norms", "package.module:Class"]),
    (["tune=norms", "tune.steps=0"], ["tune.steps is 0", "whole number from 1"]),
    (["tune=norms", "tune.batch=0"], ["tune.batch is 0", "whole number from 1"]),
    (["tune=norms", "tune.learning_rate=2"], ["tune.learning_rate is 2", "between 0 and 1"]),
    (["tune=norms", "+tune.epochs=2"], ["epochs", "steps"]),
    (["activation=int", "activation.bits=9"], ["activation=int", "9 bits", "1 to 8"]),
    (["activation=int", "activation.scope=layer"], ["scope 'layer'", "static, tensor, token"]),
    (["activation=nvfp4", "activation.array=-1"], ["arrays of -1", "positive array"]),
    (["activation=lo_bcq", "activation.codebooks=5"], ["4/64/8/5", "4/64/8/8", "books=local"]),
    (["activation=lo_bcq", "activation.books=no.json"], ["books=no.json", "cannot be read"]),
    (["codebook=mxfp4", "precision=fixed", "precision.bits=3"], ["4 bits", "precision.bits=4"]),
    (["codebook=svid", "precision=fixed", "reservation=none"], ["not 4 bits", "precision.bits=1"]),
    (["codebook=row_kmeans"], ["one width", "precision=fixed"]),
    (["allocation=rate_distortion", "codebook=row_kmeans"], ["codebook=kmeans"]),
    (["codebook=row_kmeans", "codebook.price=high"], ["codebook.price 'high'", "diagonal"]),
    (["codebook=row_kmeans", "codebook.power=9"], ["codebook.power is 9", "0 to 8"]),
    (
        ["solver=alternating", "codebook=uniform", "precision=fixed", "reservation=none"],
        ["not free", "codebook=row_kmeans", "solver=quantease"],
    ),
    (["reservation=iht"], ["while the matrix is solved", "solver=quantease"]),
    (["reservation=iht", "solver=quantease", "reservation.step=far"], ["column, matrix"]),
    (["solver=quantease", "solver.escape_every=1"], ["escape_every is 1", "0 for no escapes"]),
    (["solver.refit=false"], ["a field of solver=quantease"]),
    (["solver=alternating", "codebook.shared=true"], ["not free", "solver=quantease"]),
    (["transform.alpha=1"], ["no such key", "a field of transform=smooth"]),
    (["precision.bits=3"], ["no such key", "a field of precision=fixed"]),
    (["codebook=svid", "reservation=none"], ["one width", "precision=fixed"]),
    (["experiment=svid_1bit", "reservation=outlier_order"], ["reservation=none"]),
    (["allocation=rate_distortion", "codebook=svid"], ["codebook=kmeans"]),
    (["codebook=lo_bcq", "precision=fixed", "precision.bits=9"], ["precision.bits is 9"]),
    (["calibration.path="], ["a text needs a path"]),
    (["calibration.encoding=klingon"], ["encoding 'klingon' is not known", "cp1252"]),
]


@pytest.mark.case(74)
@pytest.mark.parametrize(("words", "fragments"), WORDS, ids=lambda case: " ".join(case)[:60])
def test_a_wrong_override_is_one_line_that_names_it_and_the_alternatives(
    words, fragments, run, refusal, outputs
):
    assert run(*words) == REQUEST
    line = refusal()
    for fragment in fragments:
        assert fragment in line
    assert not outputs.exists()


@pytest.mark.case(40, 41, 43, 74, 76)
@pytest.mark.parametrize(("words", "fragments"), VALUES, ids=lambda case: " ".join(case)[:60])
def test_a_wrong_value_is_one_line_that_says_what_may_stand_there(words, fragments, run, refusal):
    assert run(*words, command="plan") == REQUEST  # as `run`, in half the time
    line = refusal()
    for fragment in fragments:
        assert fragment in line


@pytest.mark.case(74, 75)
@pytest.mark.parametrize("words", [["=3"], ["precision=null"]], ids=" ".join)
def test_an_override_that_hydra_itself_trips_over_is_one_line(words, run, refusal, outputs):
    assert run(*words) == REQUEST
    assert words[0] in refusal()
    assert not outputs.exists()


@pytest.mark.case(75)
def test_several_values_without_the_flag_for_a_grid_point_to_that_flag(run, refusal, outputs):
    assert run("seed=1,2") == REQUEST
    line = refusal()
    assert "seed=1,2" in line
    assert "-m" in line
    assert not outputs.exists()


def test_a_value_with_odd_characters_is_told_to_be_quoted(run, refusal):
    assert run("calibration.source=wheel://name==1/x.txt") == REQUEST
    assert "quotes" in refusal()


def test_a_key_below_an_empty_part_says_that_there_is_nothing(run, refusal):
    assert run("evaluation=none") == REQUEST
    line = refusal()
    assert "evaluation.corpora.wikipedia" in line
    assert not line.endswith("there are: ")


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is not None,
    reason="the Ray launcher is installed",
)
@pytest.mark.parametrize("launcher", ["ray_cluster", "ray"])
def test_a_missing_launcher_says_what_to_install(launcher, run, refusal):
    assert run("-m", f"hydra/launcher={launcher}", "seed=1,2") == REQUEST
    line = refusal()
    assert "hydra/launcher=ray is not installed" in line
    assert "pip install 'claq-exp[ray]'" in line


def test_an_unknown_launcher_names_those_that_there_are(run, refusal):
    assert run("-m", "hydra/launcher=proceses", "seed=1,2") == REQUEST
    line = refusal()
    assert "did you mean 'processes'?" in line
    for launcher in ("basic", "joblib", "slurm", "slurm_local", "ray_cluster"):
        assert launcher in line


def test_the_fields_of_a_strategy_are_those_that_can_be_set(run, refusal):
    words = ["codebook=uniform", "precision=fixed", "reservation=none", "+codebook.foo=1"]
    assert run(*words) == REQUEST
    line = refusal()
    assert "group_size" in line
    assert "mixed_widths" not in line


def test_an_unknown_command_word_names_the_commands(refusal):
    assert main(["frobnicate"]) == REQUEST
    line = refusal()
    for command in ("run", "plan", "report", "evaluate", "fetch"):
        assert command in line


def test_an_unknown_option_flag_points_to_help(refusal):
    assert main(["--frobnicate"]) == REQUEST
    assert "--help" in refusal()


def test_printing_a_config_with_a_wrong_key_is_one_line(refusal):
    assert main(["--cfg", "job", "foo=1"]) == REQUEST
    assert "foo" in refusal()


@pytest.mark.parametrize("command", ["plan", "fetch", "evaluate"])
def test_other_commands_refuse_a_wrong_override_the_same_way(command, run, refusal, outputs):
    assert run("foo=1", command=command) == REQUEST
    assert "foo: no such key" in refusal()
    assert not outputs.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_device_that_is_not_there(device, run, refusal, outputs):
    assert run(f"device={device}") == REQUEST
    assert f"device={device}: this machine has 0 CUDA devices" in refusal()
    assert not outputs.exists()


@pytest.mark.case(61)
def test_a_text_file_that_is_missing(run, refusal, outputs, tmp_path):
    assert run(f"calibration.path={tmp_path}/nothing.txt") == REQUEST
    assert "nothing.txt' does not exist" in refusal()
    assert not outputs.exists()


def test_a_text_of_another_content_than_pinned(run, refusal, outputs, text_file):
    assert run(f"calibration.sha256={'0' * 64}") == RUN
    line = refusal()
    assert str(text_file) in line
    assert "0" * 64 in line
    assert not outputs.exists()


def test_task_rows_of_another_content_than_pinned(run, refusal, outputs, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n', encoding="utf-8")
    task = f"{{data: '{rows}', sha256: '{'0' * 64}'}}"
    assert run(f"+evaluation.zero_shot.piqa={task}") == RUN
    assert str(rows) in refusal()
    assert not outputs.exists()


@pytest.mark.case(89)
def test_a_task_that_lm_eval_does_not_have(run, refusal, outputs):
    assert run("+evaluation.zero_shot.piqaa.rows=5") == REQUEST
    line = refusal()
    assert "'piqaa'" in line
    assert "piqa" in line.partition("similar: ")[2]
    assert not outputs.exists()


@pytest.mark.case(58, 59)
@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["calibration.windows=5000"], ["calibration", "5000", "calibration.windows"]),
        (["calibration.seqlen=129"], ["calibration.seqlen is 129", "128"]),
        (
            ["evaluation.corpora.wikipedia.windows=5000"],
            ["evaluation.corpora.wikipedia", "5000"],
        ),
        (
            ["evaluation.context=129"],
            ["evaluation.context is 129", "128"],
        ),
    ],
    ids=lambda case: " ".join(case)[:60],
)
def test_windows_that_text_or_model_do_not_give(words, fragments, run, failure, outputs):
    assert run(*words) == REQUEST
    line = failure()
    for fragment in fragments:
        assert fragment in line
    assert left_behind(outputs) == []


@pytest.mark.case(14)
def test_an_outputs_folder_that_is_a_file(run, failure, tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    assert run(f"outputs={tmp_path}/taken") in (REQUEST, RUN)
    assert "taken" in failure()


# Models


def changed(model: Path, folder: Path, change: Callable[[Path], object]) -> str:
    shutil.copytree(model, folder)
    change(folder)
    return f"model.source={folder}"


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def set_entry(name: str, place: tuple[int, ...], value: float) -> Callable[[Path], None]:
    return edited(lambda state: state[name].__setitem__(place, value))


def config_with(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")

    return edit


def test_a_model_folder_that_is_missing(run, refusal, outputs, tmp_path):
    assert run(f"model.source={tmp_path}/nothing") == REQUEST
    assert f"model folder '{tmp_path}/nothing' does not exist" in refusal()
    assert not outputs.exists()


@pytest.mark.case(55)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_model_folder_without_a_needed_file(file, run, refusal, outputs, tiny_model, tmp_path):
    source = changed(tiny_model, tmp_path / "model", lambda folder: (folder / file).unlink())
    assert run(source) == REQUEST
    assert f"'{tmp_path}/model' has no " in (line := refusal())
    assert file.removeprefix("model") in line
    assert not outputs.exists()


@pytest.mark.case(55)
def test_a_model_without_tokenizer(run, failure, tiny_model, tmp_path):
    def remove(folder: Path) -> None:
        for path in folder.glob("tok*"):
            path.unlink()

    assert run(changed(tiny_model, tmp_path / "model", remove)) == RUN
    line = failure()
    assert "tokenizer" in line
    assert not line.endswith(":")


@pytest.mark.parametrize("size", [0, 5000])
def test_a_weights_file_that_is_cut_short(size, run, failure, tiny_model, tmp_path):
    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    assert run(changed(tiny_model, tmp_path / "model", cut)) == RUN
    assert str(tmp_path / "model") in failure()


def test_a_model_that_lacks_a_tensor(run, failure, tiny_model, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    source = changed(tiny_model, tmp_path / "model", edited(lambda state: state.pop(name)))
    assert run(source) == RUN
    assert name in failure()


def test_a_tensor_of_another_shape_is_named(run, failure, tiny_model, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    change = edited(lambda state: state.update({name: state[name][:5].contiguous()}))
    assert run(changed(tiny_model, tmp_path / "model", change)) == RUN
    assert "up_proj" in failure()


@pytest.mark.case(53)
def test_a_model_that_is_no_causal_language_model(run, failure, tiny_model, tmp_path):
    assert run(changed(tiny_model, tmp_path / "model", config_with(model_type="t5"))) != 0
    assert str(tmp_path / "model") in failure()


@pytest.mark.case(25)
def test_a_weight_that_is_nan_is_named_with_its_place(run, failure, tiny_model, tmp_path):
    change = set_entry("model.layers.1.mlp.up_proj.weight", (3, 5), float("nan"))
    source = changed(tiny_model, tmp_path / "model", change)
    assert run(source) == RUN
    line = failure()
    assert "model.layers.1.mlp.up_proj" in line
    assert "weight[3, 5] is nan" in line


@pytest.mark.case(25)
def test_a_weight_that_is_nan_is_named_where_nothing_is_measured(
    run, failure, tiny_model, tmp_path
):
    change = set_entry("model.layers.1.mlp.up_proj.weight", (3, 5), float("nan"))
    source = changed(tiny_model, tmp_path / "model", change)
    assert run(source, "~evaluation.corpora.wikipedia") == RUN
    line = failure()
    assert "model.layers.1.mlp.up_proj" in line
    assert "weight[3, 5] is nan" in line


@pytest.mark.case(25)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_outside_linear_layers_that_is_not_finite_is_named(
    value, run, failure, tiny_model, tmp_path
):
    change = set_entry("model.layers.1.input_layernorm.weight", (3,), value)
    assert run(changed(tiny_model, tmp_path / "model", change)) == RUN
    assert f"model.layers.1.input_layernorm.weight[3] is {value}" in failure()


def test_activations_beyond_the_dtype_are_named_with_their_layer(
    run, failure, tiny_model, tmp_path
):
    change = set_entry("model.layers.1.input_layernorm.weight", (3,), 6e4)
    source = changed(tiny_model, tmp_path / "model", change)
    assert run(source, "model.dtype=float16", "~evaluation.corpora.wikipedia") == RUN
    line = failure()
    assert "model.layers.1.self_attn.q_proj" in line
    assert "NaN or infinite" in line
    assert "model.dtype" in line


@pytest.fixture
def planted(tiny_model, tmp_path) -> tuple[Path, Path]:
    """A model that brings code: (its folder, a file that exists once the code has run)."""
    mark = tmp_path / "executed"
    folder = tmp_path / "planted"
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    changed(tiny_model, folder, config_with(model_type="evil", auto_map=auto_map))
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class EvilConfig(LlamaConfig):\n"
        "    model_type = 'evil'\n"
        "class EvilModel(LlamaForCausalLM):\n"
        "    config_class = EvilConfig\n",
        encoding="utf-8",
    )
    return folder, mark


@pytest.mark.case(56)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_code_that_comes_with_a_model_is_not_run(command, planted, run, refusal):
    folder, mark = planted
    assert run(f"model.source={folder}", command=command) == REQUEST
    assert "model.trust_remote_code=true" in refusal()
    assert not mark.exists()
    assert "evil" not in sys.modules


def test_code_that_comes_with_a_model_is_run_when_it_is_allowed(planted, run, outputs, monkeypatch):
    folder, mark = planted
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent))
    words = [f"model.source={folder}", "model.trust_remote_code=true", "experiment=rtn_4bit"]
    assert run(*words) == 0
    assert mark.exists()
    (checkpoint,) = outputs.rglob("checkpoint")
    assert run(*words, f"checkpoint={checkpoint}", command="evaluate") == 0


# Evaluating and reporting


@pytest.fixture(scope="module")
def checkpoint(tiny_model, text_file, tmp_path_factory) -> Path:
    outputs = tmp_path_factory.mktemp("checkpoint")
    words = ["experiment=rtn_4bit", "model=hf", f"model.source={tiny_model}", "calibration=text"]
    words += [f"calibration.path={text_file}", "calibration.windows=2", "threads=1"]
    words += ["calibration.seqlen=32", "evaluation=none", "tracking=none", f"outputs={outputs}"]
    assert main(words) == 0
    (folder,) = outputs.glob("default/*/checkpoint")
    return folder


def test_evaluate_without_a_checkpoint_says_how_to_name_one(run, refusal, outputs):
    assert run(command="evaluate") == REQUEST
    assert "checkpoint=" in refusal()
    assert not outputs.exists()


def test_evaluate_refuses_a_folder_that_is_no_checkpoint(run, refusal, outputs, tiny_model):
    assert run(f"checkpoint={tiny_model.parent}", command="evaluate") == REQUEST
    assert "no folder with a config.json" in refusal()
    assert run(f"checkpoint={tiny_model / 'config.json'}", command="evaluate") == REQUEST
    assert "is a file and no GGUF" in refusal()
    assert not outputs.exists()


def test_evaluate_refuses_a_checkpoint_with_a_flipped_byte(
    run, failure, outputs, checkpoint, tmp_path
):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert run(f"checkpoint={folder}", command="evaluate") == RUN
    assert f"{weights} is not the file that was written" in failure()
    assert list(outputs.rglob("results.json")) == []


def test_evaluate_leaves_nothing_of_a_request_that_it_refuses(run, failure, outputs, checkpoint):
    words = [f"checkpoint={checkpoint}", "evaluation.context=129"]
    assert run(*words, command="evaluate") == REQUEST
    assert "evaluation.context is 129" in failure()
    assert left_behind(outputs) == []


def test_evaluate_finds_the_home_folder_in_outputs(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run(f"checkpoint={checkpoint}", "outputs='~/measured'", command="evaluate") == 0
    assert list(tmp_path.glob("home/measured/default/evaluation-*/results.json"))


def test_report_needs_a_folder_with_finished_runs(refusal, tmp_path):
    assert main(["report", str(tmp_path)]) == REQUEST
    assert f"no finished run below '{tmp_path}'" in refusal()
    assert main(["report", str(tmp_path / "nothing")]) == REQUEST
    assert "nothing' is no folder" in refusal()
    assert main(["report"]) == REQUEST
    assert "report needs a folder" in refusal()


def test_report_names_a_key_that_no_run_has(refusal, checkpoint):
    folder = checkpoint.parents[1]
    assert main(["report", str(folder), "--by", "precison.bits"]) == REQUEST
    assert "precison.bits" in refusal()
