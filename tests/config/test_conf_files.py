"""Every file of conf/ and sweeps/ is a valid choice, and choices win in the documented order."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from claq_exp.compose.experiment import compose_all, compose_config, compose_unless_sweep
from claq_exp.compose.options import groups
from claq_exp.compose.places import packaged_folder
from claq_exp.config import (
    FAMILIES,
    CalibrationConfig,
    CorpusConfig,
    EvaluationConfig,
    ExperimentConfig,
    ModelConfig,
)
from claq_exp.errors import ConfigError
from claq_exp.sweep.grid import check_grid
from claq_exp.tracking.limits import TrackingConfig

ROOT = Path(__file__).resolve().parents[2]
CONF, SWEEPS = ROOT / "conf", ROOT / "sweeps"
LAUNCHERS = sorted(path.stem for path in CONF.glob("hydra/launcher/*.yaml"))
OPTIONS = sorted(
    path.relative_to(CONF).as_posix()
    for path in CONF.glob("*/**/*.yaml")
    if not path.is_relative_to(CONF / "hydra")
)
PRESETS = [  # of a strategy, with other fields
    name
    for name in OPTIONS
    if name.partition("/")[0] in FAMILIES and "\ndefaults: [" in (CONF / name).read_text()
]
STRATEGIES = [
    name for name in OPTIONS if name.partition("/")[0] in FAMILIES and name not in PRESETS
]
EXPERIMENTS = sorted(
    name.removeprefix("experiment/").removesuffix(".yaml")
    for name in OPTIONS
    if name.startswith("experiment/")
)
CORPUS = "evaluation.corpora.wikipedia"
SWEEP_NAMES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
NEEDS = {
    "precision/none.yaml": ["allocation=rate_distortion"],
    "model/hf.yaml": ["model.source=owner/name"],
    "calibration/text.yaml": ["calibration.path=some.txt"],
    "corpus/text.yaml": ["evaluation.corpora.wikipedia.path=some.txt"],
    **{
        f"codebook/{name}.yaml": ["precision=fixed", "precision.bits=4", "reservation=none"]
        for name in ("bfp", "group_table", "lo_bcq", "mxfp4", "nvfp4", "uniform", "vsq")
    },
    **{
        f"{end}/allocated.yaml": [
            "allocation=rate_distortion",
            "budget.kind=model",
            "budget.bits=4",
        ]
        for end in ("embedding", "head")
    },
    "codebook/row_kmeans.yaml": ["precision=fixed", "precision.bits=4"],
    "reservation/iht.yaml": ["solver=quantease"],
    "codebook/svid.yaml": ["precision=fixed", "precision.bits=1", "reservation=none"],
}


def content(path: Path) -> dict:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values.pop("defaults", None)
    return values


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + str(key)] = value
    return found


def choice(file: str) -> str:
    """The override that chooses a file's option."""
    group, option = file.removesuffix(".yaml").split("/")
    return f"corpus@{CORPUS}={option}" if group == "corpus" else f"{group}={option}"


APART = [*FAMILIES, "corpus", "experiment"]  # groups whose options have something to go with them


@cache
def composed_with(file: str) -> ExperimentConfig:
    """An experiment with a file's option; with it go those of other groups, to compose less."""
    alone = file in NEEDS or file.partition("/")[0] in APART
    files = (file,) if alone else next(row for row in ROWS if file in row)
    return composed(files)


def rows() -> list[tuple[str, ...]]:
    """Files that are chosen together, one of a group at most."""
    groups_of = defaultdict(list)
    for name in OPTIONS:
        if name not in NEEDS and name.partition("/")[0] not in APART:
            groups_of[name.partition("/")[0]].append(name)
    return [tuple(filter(None, row)) for row in zip_longest(*groups_of.values())]


ROWS = rows()


@cache
def composed(files: tuple[str, ...]) -> ExperimentConfig:
    needs = (word for file in files for word in NEEDS.get(file, []))
    return compose_config([*map(choice, files), *needs])


@pytest.mark.case(77)
@pytest.mark.parametrize("file", [name for name in OPTIONS if not name.startswith("experiment/")])
def test_every_option_of_every_group_composes_with_the_values_of_its_file(file):
    group = file.partition("/")[0]
    place = CORPUS if group == "corpus" else group
    config = composed_with(file).as_dict()
    given = {text.partition("=")[0] for text in NEEDS.get(file, [])} | {"model.name"}
    for part in place.split("."):
        config = config[part]
    composed = flat(config)
    for key, value in flat(content(CONF / file)).items():
        if f"{place}.{key}" not in given and "${" not in str(value):
            assert composed[key] == value, key


@pytest.mark.case(77, 78)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_beats_the_defaults(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    config = compose_config([f"experiment={name}"]).as_dict()
    for chosen in yaml.safe_load(text)["defaults"]:
        ((group, option),) = chosen.items()
        assert config[group.removeprefix("override /")]["name"] == option
    composed = flat(config)
    for key, value in flat(content(CONF / "experiment" / f"{name}.yaml")).items():
        assert composed[key] == value, key


@pytest.mark.parametrize("file", STRATEGIES)
def test_the_file_of_a_strategy_shows_every_field_with_its_default(file):
    family, option = file.removesuffix(".yaml").split("/")
    strategy = FAMILIES[family][option]
    assert content(CONF / file) == {"name": option, **dataclasses.asdict(strategy())}


@pytest.mark.parametrize("file", PRESETS)
def test_a_preset_is_a_strategy_with_other_fields(file):
    family = file.partition("/")[0]
    base, own = yaml.safe_load((CONF / file).read_text(encoding="utf-8"))["defaults"]
    changed = content(CONF / file)
    usual = content(CONF / family / f"{base}.yaml")
    assert own == "_self_"
    assert changed.keys() < usual.keys() - {"name"}
    assert getattr(composed_with(file), family) == usual | changed


@pytest.mark.parametrize(
    ("group", "schema"),
    [
        ("model", ModelConfig),
        ("calibration", CalibrationConfig),
        ("evaluation", EvaluationConfig),
        ("corpus", CorpusConfig),
        ("tracking", TrackingConfig),
    ],
)
def test_the_files_of_a_group_name_no_field_that_the_schema_lacks(group, schema):
    known = {field.name for field in dataclasses.fields(schema)}
    named = set().union(*(content(path) for path in (CONF / group).glob("*.yaml")))
    assert named
    assert named <= known


HUB_MODELS = sorted({path.stem for path in (CONF / "model").glob("*.yaml")} - {"hf"})


@pytest.mark.parametrize("option", [name for name in HUB_MODELS if name != "smollm2_135m"])
def test_a_model_of_the_hub_is_a_name_and_a_source_on_top_of_hf(option):
    text = (CONF / "model" / f"{option}.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["defaults"] == ["hf", "_self_"]
    assert set(content(CONF / "model" / f"{option}.yaml")) <= {"name", "source", "dtype"}
    assert re.match(r"# .+: [\d.]+ (million|billion) weights, .*hub.*\.\n", text)
    model = composed_with(f"model/{option}.yaml").model
    assert model.name == option
    assert re.fullmatch(r"[\w-]+/[\w.-]+", model.source)
    assert not model.trust_remote_code


@pytest.mark.parametrize("family", FAMILIES)
def test_every_strategy_is_an_option_and_every_option_a_strategy(family):
    presets = {Path(file).stem for file in PRESETS if file.partition("/")[0] == family}
    assert set(groups()[family]) == set(FAMILIES[family]) | presets


def test_groups_lists_every_folder_and_the_sweeps():
    folders = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra"}
    assert set(groups()) == folders | {"sweep", "hydra/launcher"}
    assert groups()["sweep"] == SWEEP_NAMES
    assert groups()["hydra/launcher"] == LAUNCHERS


def test_hydra_has_no_presets_but_those_of_launchers():
    assert {path.parent for path in (CONF / "hydra").rglob("*.yaml")} == {CONF / "hydra/launcher"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_composes_with_the_values_of_its_file_on_top_of_the_plugins(name):
    text = (CONF / f"hydra/launcher/{name}.yaml").read_text(encoding="utf-8")
    plugin, own = yaml.safe_load(text)["defaults"]
    assert own == "_self_"
    if plugin == "ray" and not importlib.util.find_spec("ray"):
        pytest.skip("the Ray launcher is not installed")
    composed = compose_all([f"hydra/launcher={name}"]).hydra.launcher
    plain = compose_all([f"hydra/launcher={plugin}"]).hydra.launcher
    assert composed._target_ == plain._target_
    values = flat(OmegaConf.to_container(composed))
    for key, value in flat(content(CONF / f"hydra/launcher/{name}.yaml")).items():
        assert values[key] == value, key


@pytest.mark.case(77)
@pytest.mark.parametrize("name", SWEEP_NAMES)
def test_every_job_of_every_sweep_is_valid_and_its_comment_counts_them(name):
    text = (SWEEPS / f"{name}.yaml").read_text(encoding="utf-8")
    sweeper = yaml.safe_load(text)["hydra"]["sweeper"]
    lists = [str(values).split(",") for values in sweeper["params"].values()]
    expected = sweeper.get("n_trials") or math.prod(map(len, lists))
    grid = check_grid([f"sweep={name}"])
    assert grid.jobs == expected
    assert grid.search == ("n_trials" in sweeper)
    assert re.search(r"\((\d+) runs\)", text)[1] == str(expected)
    assert f"claq-exp report outputs/{name}" in text
    assert grid.base.name == name


def test_a_sweep_is_told_from_a_single_run():
    assert compose_unless_sweep(["sweep=bit_widths"]) is None
    assert compose_unless_sweep(["precision.target_bits=2.5"]) is not None


@pytest.mark.case(78)
@pytest.mark.parametrize("order", [1, -1])
def test_a_value_on_the_command_line_beats_the_experiment_wherever_it_stands(order):
    words = ["experiment=kmeans_3bit", "precision.bits=5"][::order]
    config = compose_config(words)
    assert config.precision == {"name": "fixed", "bits": 5}
    assert config.reservation == {"name": "none"}


@pytest.mark.case(78)
@pytest.mark.parametrize(
    "words",
    [
        ["experiment=claq_2.12", "reservation=none"],
        ["experiment=kmeans_3bit", "precision=outlier_order"],
        ["experiment=gptq_4bit_g64", "codebook=kmeans"],
    ],
    ids=" ".join,
)
def test_an_option_on_the_command_line_beats_the_experiment(words):
    group, _, option = words[1].partition("=")
    assert getattr(compose_config(words), group)["name"] == option


def test_an_unnamed_experiment_leaves_the_defaults():
    defaults = {
        "codebook": "kmeans",
        "precision": "outlier_order",
        "reservation": "outlier_order",
        "solver": "gptq",
    }
    config = compose_config([])
    assert {group: getattr(config, group)["name"] for group in defaults} == defaults
    assert config.model.name == "smollm2_135m"


def test_a_conf_folder_of_the_working_directory_is_not_taken(tmp_path, monkeypatch):
    (tmp_path / "conf" / "precision").mkdir(parents=True)
    (tmp_path / "conf" / "config.yaml").write_text("seed: 7\n", encoding="utf-8")
    (tmp_path / "conf" / "precision" / "mine.yaml").write_text("name: fixed\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert compose_config([]).seed == 0
    assert packaged_folder("conf") == CONF
    with pytest.raises(ConfigError, match="precision=mine: no such option"):
        compose_config(["precision=mine"])


def test_a_strategy_of_ones_own_is_found_by_its_dotted_name(tmp_path, monkeypatch):
    (tmp_path / "rules_of_threes.py").write_text(
        "import dataclasses, torch\n"
        "from claq_exp.quantize.precision import Precision\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Threes(Precision):\n"
        "    offset: int = 0\n"
        "    def plan(self, statistics):\n"
        "        return torch.full((statistics.shape[1],), 3 + self.offset, dtype=torch.uint8)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["precision=fixed", "~precision.bits", "precision.name=rules_of_threes:Threes"]
    strategy = compose_config([*words, "+precision.offset=1"]).recipe().precision
    assert type(strategy).__name__ == "Threes"
    assert strategy.offset == 1
    config = compose_config(["precision.name=rules_of_threes:Threes"])  # over the default's fields
    assert config.precision == {"name": "rules_of_threes:Threes", "offset": 0}
    assert "rules_of_threes_Threes-reserve" in config.recipe_name()


def test_hooks_are_commands_of_the_environment_and_need_no_network():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (hooks,) = [repo["hooks"] for repo in repos if repo["repo"] == "local"]
    assert len(repos) == 1
    assert all(hook["language"] == "system" for hook in hooks)
    programs = {hook["entry"].split()[0] for hook in hooks}
    assert programs == {"ruff", "mypy"}
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{program}>=' in pyproject for program in programs)


def test_the_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = runpy.run_path(str(ROOT / ".ci" / "oldest_pins.py"))["pins"](project)
    pinned = dict(pin.partition(";")[0].split("==") for pin in pins)
    for line in project["dependencies"]:  # each has a lower bound and an upper one
        name, lower, _ = re.fullmatch(r"([\w-]+)>=([\d.]+),<([\d.]+)", line).groups()
        assert pinned[name] == lower
    assert "pytest" in pinned
    assert "hydra-ray-launcher" not in pinned


def test_a_built_wheel_finds_its_own_conf_and_sweeps(tmp_path):
    pytest.importorskip("hatchling", reason="the build backend, to build without a network")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "--disable-pip-version-check", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("claq_exp-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    shipped = {
        f"claq_exp/{path.relative_to(ROOT).as_posix()}"
        for folder in (CONF, SWEEPS)
        for path in folder.rglob("*.yaml")
    }
    assert shipped <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "claq_exp").rglob("*.py")}
    assert modules <= names
    assert "claq_exp/py.typed" in names  # type checkers read our annotations only with this file
    assert not [name for name in names if name.startswith(("tests/", "conf/", "sweeps/"))]
    code = (
        "from claq_exp.compose.places import packaged_folder as f\n"
        "print(f('conf'))\nprint(f('sweeps'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
    ).stdout.split()
    package = tmp_path / "site" / "claq_exp"
    assert found == [str(package / "conf"), str(package / "sweeps")]
