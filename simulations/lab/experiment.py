"""An experiment: one TOML file, every default that of the paper.

`[federation]` takes what `sheepfold-server init` takes and becomes the very manifest that `init`
would make, so that ranges of masks, noise and the choice of the filter are those of a deployment.

Source: FedIT, arXiv 2305.05644, section 4: 100 clients by the second partition, 5 a round, 20
rounds, one local epoch, batch 32, 1.5e-4, 512 tokens, loss on prompt and response; rank 8, α 16,
dropout 0.05, six modules. Ours: one learning-rate schedule over all rounds.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from aggregator_server.private_recipes import Profile
from aggregator_server.recipes import Masking, Optimizer
from protocol.blocks import FilterRule, LoraRule, LossOn, Schedule, Template
from protocol.wire import explain
from simulations.attacks.names import UpdateAttack
from simulations.errors import ExperimentError
from simulations.lab.records import Arm, Cryptography
from simulations.partition.schemes import Scheme

WORLD: Final = "embedded:world"
"""The invented world that the embedded base has read of; its records are made as they are asked."""
EMBEDDED_BASE: Final = "embedded:tiny"
_PAPER_RATE: Final = 1.5e-4
_EMBEDDED_RATE: Final = 6e-3


def _none_of_word(value: object) -> object:
    return None if value == "none" else value


Epsilon = Annotated[Annotated[float, Field(gt=0.0)] | None, BeforeValidator(_none_of_word)]
"""TOML has no null: "none" stands for no differential privacy."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BaseSection(_Section):
    """The base model: `embedded:tiny`, a folder, or a model of the hub."""

    model: str = EMBEDDED_BASE
    revision: str | None = None


class DataSection(_Section):
    """Records, and who has which.

    Attributes:
        source: Files, data sets of the hub (`hub:owner/name`), or `embedded:world`.
        scheme: How they are split; see `sheepfold-sim partition`.
        n_clients: Over how many clients.
        held_out: Records of each category that nobody trains on.
        alpha: Of drawn schemes.
        min_records: Least records of a client; None: the scheme's own.
        by: Which column is split.
        max_records: Of all clients together; each keeps the same share of its own. None: all.
        per_category: Of the embedded world, records of each category.
    """

    source: tuple[str, ...] = (WORLD,)
    scheme: Scheme = Scheme.SKEWED
    n_clients: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    held_out: Annotated[int, Field(ge=1)] = 10
    alpha: Annotated[float, Field(gt=0.0)] = 0.5
    min_records: Annotated[int, Field(ge=1)] | None = None
    by: str = "category"
    max_records: Annotated[int, Field(ge=1)] | None = None
    per_category: Annotated[int, Field(ge=1)] = 1680

    @model_validator(mode="after")
    def _check(self) -> Self:
        if WORLD in self.source and (len(self.source) > 1 or self.by != "category"):
            msg = f"{WORLD} stands alone, and is split by category"
            raise ValueError(msg)
        if self.max_records is not None and self.max_records < self.n_clients:
            msg = (
                f"max_records is {self.max_records}, and each of {self.n_clients} clients needs one"
            )
            raise ValueError(msg)
        return self


class FederationSection(_Section):
    """What `sheepfold-server init` takes; the paper's values.

    `learning_rate` is the paper's where it is left out, but on the embedded base, which is 7,000
    times smaller: there it is one at which that base learns.
    """

    n_rounds: Annotated[int, Field(ge=1)] = 20
    cohort: Annotated[int, Field(ge=1)] = 5
    min_cohort: Annotated[int, Field(ge=1)] | None = None
    over_selection: Annotated[float, Field(ge=1.0, le=10.0)] = 1.0
    deadline_s: Annotated[float, Field(gt=0.0)] = 24 * 3600.0
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0.0)] | None = None
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    target_modules: tuple[str, ...] | None = None
    lora_rule: LoraRule | None = None
    template: Template = Template.ALPACA
    loss_on: LossOn = LossOn.ALL
    max_length: Annotated[int, Field(ge=1)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 32
    local_epochs: Annotated[int, Field(ge=1)] | None = None
    local_steps: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    schedule: Schedule = Schedule.COSINE
    proximal_mu: Annotated[float, Field(ge=0.0)] = 0.0
    optimizer: Optimizer = Optimizer.FEDAVG
    server_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    masking: Masking = Masking.OFF
    cell_target: int | None = None
    word_bits: Literal[16, 32] = 16
    epsilon: Epsilon = None
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    profile: Profile = Profile.EXAMPLE
    clip_norm: Annotated[float, Field(gt=0.0)] | None = None
    adaptive_clip: bool = False
    filter: FilterRule | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.masking is Masking.HELPER:
            msg = (
                'masking "helper" needs a second operator; in the laboratory it is "cells" or "off"'
            )
            raise ValueError(msg)
        if self.local_epochs is not None and self.local_steps is not None:
            msg = "set one of local_epochs and local_steps"
            raise ValueError(msg)
        return self


class PopulationSection(_Section):
    """Who comes, how fast, and who leaves.

    Attributes:
        file: Devices, networks, hours, as `sheepfold-sim timetable` reads it; None: all are there
            at any time, and no time passes.
        drop_out: Without a file, the chance that an agent begins a round and never finishes it.
        vanish: The chance that an agent that has finished leaves its masked cell, at any stage.
    """

    file: str | None = None
    drop_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    vanish: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.file is not None and self.drop_out > 0.0:
            msg = "with a file, drop_out is a matter of its device classes; leave it out here"
            raise ValueError(msg)
        return self


class EvaluationSection(_Section):
    """What is measured on the held-out records.

    Attributes:
        every: Held-out loss after every so many rounds, and always first and last; 0: only these.
        answers: Held-out records of each category that the first and the last release answer, for
            exact match and ROUGE-L; 0: none.
        max_new_tokens: Longest answer.
    """

    every: Annotated[int, Field(ge=0)] = 5
    answers: Annotated[int, Field(ge=0)] = 10
    max_new_tokens: Annotated[int, Field(ge=1)] = 128


class BaselinesSection(_Section):
    """The yardsticks of `compare`; they train without masks, noise or filter.

    Attributes:
        epochs: Passes of each over its records; the paper's one.
        centralised_learning_rate: None: the federation's. The rate that suits many short trainings
            need not suit one long one.
        local_learning_rate: The same of clients alone.
        local: Which clients alone, by the volume of their records.
    """

    epochs: Annotated[int, Field(ge=1)] = 1
    centralised_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    local_learning_rate: Annotated[float, Field(gt=0.0)] | None = None
    local: tuple[Literal["smallest", "median", "largest"], ...] = ("smallest", "median", "largest")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.local)) < len(self.local):
            msg = f"local: {list(self.local)}; none twice"
            raise ValueError(msg)
        return self


class AttackSection(_Section):
    """Clients that attack in every round in which they take part.

    Attributes:
        name: Of an attack on updates; see docs/results.md.
        share: Of all clients.
        omniscient: They see the honest updates too.
    """

    name: UpdateAttack
    share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    omniscient: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name is UpdateAttack.ADAPTIVE:
            msg = "the adaptive attack probes a filter; run benchmarks.robustness for it"
            raise ValueError(msg)
        return self


class EngineKind(StrEnum):
    """Where virtual agents run."""

    HERE = "here"
    """In the process of the command: the only way to share a GPU among agents."""
    PROCESSES = "processes"
    RAY = "ray"


class EngineSection(_Section):
    """How the agents are run; of all this, results depend on `group` alone.

    Attributes:
        kind: Where.
        workers: Processes, or actors of Ray; each has a base of its own and one thread.
        group: How many agents train at once over one base; "auto": a probe chooses, once, and the
            run keeps to it.
        device: `cpu`, `cuda`, `cuda:1`; None: a GPU where there is one.
        cryptography: Of masked sums.
    """

    kind: EngineKind = EngineKind.HERE
    workers: Annotated[int, Field(ge=1, le=4096)] = 1
    group: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] = "auto"
    device: str | None = None
    cryptography: Cryptography = Cryptography.EXACT_SUM

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind is EngineKind.HERE and self.workers > 1:
            msg = f'{self.workers} workers need kind = "processes" or "ray"; "here" is one process'
            raise ValueError(msg)
        return self


def _all_differ(seeds: tuple[int, ...]) -> tuple[int, ...]:
    for place, seed in enumerate(seeds):
        if seed in seeds[:place]:
            msg = f"{seed} is there twice"
            raise ValueError(msg)
    return seeds


Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**32)], ...],
    Field(min_length=1),
    AfterValidator(_all_differ),
]
"""At least one, none twice."""


class Experiment(_Section):
    """The whole file.

    Attributes:
        name: For folders and tables.
        seeds: Of `compare` and `sweep`; a single run takes the first.
        sweep: Values to try of any key, such as `"federation.epsilon" = [2, 8, "none"]`; all
            combinations are run.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    description: str = ""
    seeds: Seeds = (1,)
    base: BaseSection = BaseSection()
    data: DataSection = DataSection()
    federation: FederationSection = FederationSection()
    population: PopulationSection = PopulationSection()
    evaluation: EvaluationSection = EvaluationSection()
    baselines: BaselinesSection = BaselinesSection()
    attack: AttackSection | None = None
    engine: EngineSection = EngineSection()
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, values in self.sweep.items():
            if not values or any(one in values[:place] for place, one in enumerate(values)):
                msg = f"sweep: {key} has {list(values)}; at least one value, and none twice"
                raise ValueError(msg)
        return self

    @property
    def learning_rate(self) -> float:
        """The one that the federation trains with, and baselines without one of their own."""
        embedded = self.base.model == EMBEDDED_BASE
        return self.federation.learning_rate or (_EMBEDDED_RATE if embedded else _PAPER_RATE)

    def learning_rate_of(self, arm: Arm) -> float:
        """The one that an arm trains with.

        Args:
            arm: Which.
        """
        own = {
            Arm.CENTRALISED: self.baselines.centralised_learning_rate,
            Arm.LOCAL: self.baselines.local_learning_rate,
        }
        return own.get(arm) or self.learning_rate

    def with_values(self, values: Mapping[str, object]) -> "Experiment":
        """The experiment with other values of some keys.

        Args:
            values: By dotted key, such as `federation.rank`.

        Raises:
            ExperimentError: No such key, or a value that it cannot have.
        """
        tree = self.model_dump(mode="json", exclude_none=True)
        for key, value in values.items():
            section, _, name = key.rpartition(".")
            place = tree.setdefault(section, {}) if section else tree
            if "." in section or not isinstance(place, dict):
                msg = f"there is no key {key!r}; name one as section.key, such as federation.rank"
                raise ExperimentError(msg)
            if value is None:
                place.pop(name, None)
            else:
                place[name] = value
        if values.get("attack.name", "") is None:
            tree.pop("attack", None)  # without a name there is no attack
        return _validated(tree, "the experiment")

    def as_toml(self) -> str:
        """The whole of it as a file, every default written out."""
        federation = self.federation.model_copy(update={"learning_rate": self.learning_rate})
        resolved = self.model_copy(update={"federation": federation})
        tree = resolved.model_dump(mode="json", exclude_none=True)
        lines = [_line(key, value) for key, value in tree.items() if not isinstance(value, dict)]
        for section, values in tree.items():
            if isinstance(values, dict) and values:
                lines += ["", f"[{section}]", *(_line(key, one) for key, one in values.items())]
        return "\n".join(lines) + "\n"

    def digest(self) -> str:
        """SHA-256 of what decides about results, hexadecimal: all but seeds, sweep and engine."""
        rest = self.model_copy(
            update={"seeds": (0,), "sweep": {}, "engine": EngineSection(), "description": ""}
        )
        return hashlib.sha256(rest.as_toml().encode()).hexdigest()


def load_experiment(path: Path) -> Experiment:
    """Read an experiment.

    Args:
        path: A TOML file. Relative paths in it count from where the command is given.

    Raises:
        ExperimentError: It cannot be read, or has an unknown key or a value that cannot be.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}"
        raise ExperimentError(msg) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{path} is no TOML: {error}"
        raise ExperimentError(msg) from error
    tree.setdefault("name", path.stem)
    return _validated(tree, str(path))


def _line(key: str, value: object) -> str:
    # A JSON string, number, boolean or list of them is the same in TOML.
    name = key if key.replace("_", "").isalnum() else json.dumps(key)
    return f"{name} = {json.dumps(value, ensure_ascii=False, allow_nan=False)}"


def _validated(tree: Mapping[str, object], where: str) -> Experiment:
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise ExperimentError(_unknown_key(where, error) or explain(where, error)) from error


def _unknown_key(where: str, error: ValidationError) -> str | None:
    """A sentence for the first key that there is not, with the nearest that there is."""
    for one in error.errors(include_url=False):
        if one["type"] == "extra_forbidden":
            *sections, key = map(str, one["loc"])
            model: type[BaseModel] = Experiment
            for section in sections:
                annotation = model.model_fields[section].annotation
                model = next(
                    kind
                    for kind in (annotation, *get_args(annotation))
                    if isinstance(kind, type) and issubclass(kind, BaseModel)
                )
            near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {sorted(model.model_fields)}"
            return f"{where}: there is no key {'.'.join((*sections, key))!r}; {hint}"
    return None
