"""Hydra's own features: each works, or is refused with the word that has its effect."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from claq_exp.cli import main
from claq_exp.compose.experiment import compose_config, without_globs
from claq_exp.compose.options import groups, own_folders
from claq_exp.compose.places import packaged_folder
from claq_exp.compose.words import read_words, word_of
from claq_exp.errors import ConfigError
from claq_exp.sweep.grid import check_grid

OWN = {
    "experiment/mine.yaml": "# @package _global_\n"
    "defaults:\n  - override /precision: fixed\nseed: 5\n",
    "experiment/no_header.yaml": "seed: 5\n",
    "experiment/broken.yaml": "seed: [1,\nname: 3\n",
    "experiment/idle.yaml": "# @package _global_\nhydra: {run: {dir: elsewhere}}\n",
    "model/small.yaml": "defaults: [hf, _self_]\nname: small\nsource: some/model\n",
    "corpus/stories.yaml": "defaults: [text, _self_]\npath: stories.txt\n",
    "sweep/ours.yaml": "# @package _global_\nname: mine\nhydra:\n  mode: MULTIRUN\n"
    "  sweeper: {params: {seed: '1,2,3', experiment: glob(mi*)}}\n",
    "sweep/no_mode.yaml": "# @package _global_\nhydra: {sweeper: {params: {seed: '1,2'}}}\n",
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "my options"
    for name, text in OWN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copy(packaged_folder("sweeps") / "seeds.yaml", folder / "sweep/copied.yaml")
    return folder


@pytest.fixture(autouse=True)
def logging_as_before():
    """Hydra sets up Python's logging for the whole process when it prints."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


@pytest.fixture
def complaint(capfd):
    def read(*words: str) -> str:
        assert main(list(words)) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert line.startswith("claq-exp: ")
        return line

    return read


@pytest.mark.parametrize(
    "text",
    ["a,b (1)", 'say "no"', "back\\slash", "ends\\", 'a\\"b', "it's = [x]", "", "ünï=ü", "1.5"],
)
def test_any_text_is_a_word(text):
    config = compose_config(["model=hf", word_of("model.source", text or "x"), word_of("seed", 7)])
    assert config.model.source == (text or "x")
    assert config.seed == 7


def test_numbers_lists_and_nothing_are_words():
    assert word_of("evaluation.kl_windows", None) == "evaluation.kl_windows=null"
    words = {"strict": True, "evaluation.after": ["quantize"], "reservation.ratio": 0.25}
    config = compose_config([word_of(key, value) for key, value in words.items()])
    assert config.strict is True
    assert config.evaluation.after == ["quantize"]
    assert config.reservation["ratio"] == 0.25


@pytest.mark.case(138)
@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("experiment=glob(rtn_4*)", "rtn_4bit,rtn_4bit_g128"),
        ("experiment=glob([rtn_*],exclude=[*_g*,*2bit])", "rtn_3bit,rtn_4bit"),
        ("experiment=glob(claq_2*)", "claq_2.12,claq_2.24"),
        ("experiment=glob(linear/or_*)", "linear/or_2.3,linear/or_2.6"),
    ],
)
def test_a_pattern_stands_for_the_options_of_one_folder(word, options):
    assert without_globs([word]) == [f"experiment=choice({options})"]
    grid = check_grid([word, "seed=1,2"])
    assert grid.jobs == 2 * (options.count(",") + 1)
    assert word not in grid.overrides


@pytest.mark.case(138)
@pytest.mark.parametrize(
    ("word", "fragments"),
    [
        ("experiment=glob(nothing*)", ["no option matches", "rtn_4bit"]),
        ("seed=glob(1*)", ["options of a group", "experiment"]),
        ("seed=interval(1,3)", ["hydra/sweeper=optuna", "range("]),
        ("seed=range(3,1)", ["lists no value"]),
        ("seed=range(1,3,0)", ["a step of 0"]),
        ("hydra.sweeper.params.seed=1,2", ["add -m: seed=1"]),
        ("hydra.sweeper.max_batch_size=0", ["max_batch_size is 0"]),
        ("hydra.mode=RUN", ["no effect with -m"]),
    ],
)
def test_a_list_of_values_that_is_none_is_refused(word, fragments, complaint):
    line = complaint("-m", "threads=1", word)
    for fragment in fragments:
        assert fragment in line


@pytest.mark.case(138)
@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("reservation.ratio=range(0.01,0.03,0.005)", [0.01, 0.015, 0.02, 0.025]),
        ("reservation.ratio=shuffle(range(0.1,0.4,0.1))", [0.1, 0.2, 0.3]),
        ("reservation.ratio=sort(0.2,0.1)", [0.1, 0.2]),
        ("reservation.ratio=tag(a,choice(0.1,0.2))", [0.1, 0.2]),
    ],
)
def test_listed_numbers_are_those_that_a_person_would_type(word, values):
    found = [config.reservation["ratio"] for config in check_grid([word]).configs]
    assert sorted(found) == values


IDLE = [
    ("hydra.run.dir=x", "outputs= and name="),
    ("++hydra.run.dir=x", "outputs= and name="),
    ("hydra.sweep.dir=x", "outputs= and name="),
    ("hydra.sweep.subdir=x", "outputs= and name="),
    ("hydra.job.chdir=true", "relative to the folder"),
    ("hydra.job.name=x", "hydra.launcher.name="),
    ("hydra.output_subdir=x", "results.json"),
    ("hydra/job_logging=default", "third_party.log"),
    ("hydra.verbose=true", "--debug"),
    ("hydra.help.app_name=x", "leave it out"),
    ("+hydra.anything=x", "leave it out"),
]


@pytest.mark.case(139)
@pytest.mark.parametrize(("word", "instead"), IDLE)
@pytest.mark.parametrize("swept", [["-m"], []])
def test_a_setting_of_hydra_without_effect_is_refused_with_the_word_that_has_it(
    word, instead, swept, complaint
):
    line = complaint(*swept, word)
    assert f"{word} has no effect here" in line
    assert instead in line


@pytest.mark.case(139)
@pytest.mark.parametrize(
    "word",
    [
        "hydra/launcher=processes",
        "hydra/sweeper=optuna",
        "+hydra.job.env_set.X=1",
        "+hydra.callbacks.mine._target_=my.Callback",
        "hydra.hydra_logging.root.level=INFO",
    ],
)
def test_a_setting_of_sweeps_is_refused_without_one_and_taken_with_one(word, complaint):
    assert f"{word} has an effect in a sweep only" in complaint(word)
    assert check_grid([word, "seed=choice(1,2)"]).jobs


@pytest.mark.case(139)
@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--config-name", "x"], ["--config-name", "experiment=NAME"]),
        (["-cp", "/tmp"], ["-cp", "--config-dir"]),
        (["--experimental-rerun", "x"], ["results.json"]),
        (["--run"], ["leave it out"]),
        (["--resolve"], ["go with --cfg"]),
        (["--package", "model"], ["go with --cfg"]),
        (["--cfg", "wrong"], ["invalid choice", "hydra"]),
        (["--cfg", "job", "--info"], ["do not go together"]),
        (["--cfg", "job", "-m", "seed=1,2"], ["leave out -m"]),
        (["--cfg", "job", "seed=1,2"], ["choose one to print"]),
        (["plan", "--cfg", "job"], ["claq-exp run --cfg"]),
        (["plan", "-m", "seed=1,2"], ["one experiment"]),
        (["plan", "sweep=bit_widths"], ["sweep=bit_widths is many experiments"]),
        (["sweep=bit_widths", "hydra.mode=RUN"], ["sweep=bit_widths has an effect in a sweep"]),
        (["hydra.searchpath=[/nowhere]"], ["there is no /nowhere", "--config-dir"]),
        (["--config-dir", "conf", "plan"], ["the command comes first: claq-exp plan"]),
        (["calibration.path=a,b.txt"], ["-m", """'calibration.path="a,b.txt"'"""]),
        (["calibration.path=a (1).txt"], ["""'calibration.path="a (1).txt"'"""]),
        (["experiment="], ["experiment=: no such option", "rtn_4bit"]),
        (["hydra.launcher.n_jobs=2"], ["there are: _target_"]),
    ],
    ids=lambda case: " ".join(case)[:50],
)
def test_a_flag_or_word_that_cannot_work_is_one_line(words, fragments, complaint):
    line = complaint(*words)
    for fragment in fragments:
        assert fragment in line


def test_flags_may_stand_anywhere_and_overrides_keep_their_order():
    words = read_words(["a=1", "-m", "~b", "--config-dir", "one", "c=2", "-cd=two"])
    assert words.overrides == ["a=1", "~b", "c=2"]
    assert [folder.name for folder in words.folders] == ["one", "two"]
    assert words.multirun


@pytest.mark.case(139)
@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--cfg", "job", "--package", "precision", "precision.bits=7"], ["target_bits"]),
        (["--cfg", "job", "-p", "calibration", "--resolve", "seed=8"], ["seed: 8"]),
        (["--cfg", "hydra", "-p", "hydra.sweep"], ["subdir"]),
        (["--info", "searchpath"], ["conf"]),
        (["--info", "defaults"], ["activation/none"]),
        (["-sc", "install=bash"], ["complete"]),
    ],
    ids=lambda case: " ".join(case)[:50],
)
def test_what_hydra_prints(words, fragments, capsys):
    words = [word for word in words if word != "precision.bits=7"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for fragment in fragments:
        assert fragment in printed


@pytest.mark.parametrize("command", ["", "run ", "plan "])
def test_a_shell_completes_options_after_a_command_too(command, capsys, monkeypatch):
    monkeypatch.setenv("COMP_LINE", f"claq-exp {command}experiment=rtn_4")
    assert main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out.split() == ["experiment=rtn_4bit", "experiment=rtn_4bit_g128"]


@pytest.mark.case(140)
def test_options_of_a_folder_of_ones_own_go_before_those_of_the_package(own, capsys):
    (own / "precision").mkdir()
    (own / "precision/fixed.yaml").write_text("name: fixed\nbits: 6\n", encoding="utf-8")
    with own_folders((own,)):
        config = compose_config(["experiment=mine"])
        assert (config.seed, config.precision["bits"]) == (5, 6)
        assert compose_config(["model=small"]).model.source == "some/model"
        words = ["+corpus@evaluation.corpora.s=stories"]
        assert compose_config(words).evaluation.corpora["s"].path == "stories.txt"
        assert "mine" in groups()["experiment"]
        grid = check_grid(["sweep=ours"])
        assert [config.seed for config in grid.configs] == [1, 2, 3]
        assert {config.precision["bits"] for config in grid.configs} == {6}
    assert "mine" not in groups()["experiment"]
    assert compose_config(["precision=fixed"]).precision["bits"] != 6
    assert main(["--help", "--config-dir", str(own)]) == 0
    assert "no_header" in capsys.readouterr().out


@pytest.mark.case(140)
@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["experiment=no_header"], ["experiment=no_header", "# @package _global_"]),
        (["sweep=copied", "-m"], ["sweep=copied", "# @package _global_"]),
        (["experiment=broken"], ["broken.yaml, line "]),
        (["experiment=idle"], ["hydra.run.dir has no effect here"]),
        (["experiment=minee"], ["did you mean 'mine'?"]),
        (["sweep=no_mode"], ["sweep=no_mode has an effect in a sweep only; add -m"]),
    ],
    ids=lambda case: " ".join(case)[:50],
)
def test_a_file_of_ones_own_that_would_have_no_effect_is_refused(words, fragments, own, complaint):
    line = complaint("--config-dir", str(own), *words)
    for fragment in fragments:
        assert fragment in line


@pytest.mark.case(140)
def test_a_folder_that_is_none_of_options_is_refused(own, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, fragment in [
        (tmp_path / "nothing", "no such folder"),
        (tmp_path / "empty", "holds no folder of options"),
        (own / "experiment", "holds no folder of options"),
    ]:
        with pytest.raises(ConfigError, match=fragment), own_folders((folder,)):
            pass
    shutil.copy(own / "sweep/ours.yaml", own / "sweep/seeds.yaml")
    with pytest.raises(ConfigError, match="sweep of claq_exp has this name"), own_folders((own,)):
        pass
    (own / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="take the place of all defaults"), own_folders((own,)):
        pass


@pytest.mark.case(140)
def test_what_a_sweep_needs_is_fetched_for_all_its_jobs(own, tiny_run, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("a cat", encoding="utf-8")
    text = next(word for word in tiny_run if word.startswith("calibration.path=")).partition("=")[2]
    words = [word for word in tiny_run if not word.startswith("calibration.path=")]
    assert main(["fetch", "-m", *words, f"calibration.path={text},{other}"]) == 0
    printed = capsys.readouterr().out
    assert text in printed
    assert str(other) in printed
