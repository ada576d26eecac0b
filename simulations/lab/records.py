"""What a run notes: one line of JSON each, appended to its journal.

The journal is the truth. Tables, curves and the report are made of it.
"""

from enum import StrEnum
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Setting: TypeAlias = str | float | int | list[Any] | None
"""What a key of an experiment may be set to in a series; None: it has no value."""
FORMAT: Final = 1
"""Of journals and cards; raised where a field changes its meaning."""


class Note(BaseModel):
    """A line of a journal: every number finite, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Arm(StrEnum):
    """Who sees which records: what a run is a run of."""

    FEDERATED = "federated"
    BASE = "base"
    """Nobody trains: the base with the untouched adapter."""
    CENTRALISED = "centralised"
    """All clients' records in one place."""
    LOCAL = "local"
    """One client alone."""


class Cryptography(StrEnum):
    """How sums under masks were made."""

    REAL = "real"
    """Keys, shares, masks, check words: all of it, in this machine's memory."""
    EXACT_SUM = "exact-sum"
    """The encoded updates added in the ring, which is what unmasking gives, bit for bit."""


class Fate(StrEnum):
    """What became of an agent that a round selected."""

    COUNTED = "counted"
    LATE = "late"
    """It would have finished, and the round had closed."""
    DROPPED = "dropped"
    """It began and never finished."""
    VANISHED = "vanished"
    """It finished, and left its cell before its update counted."""
    CELL_LOST = "cell-lost"
    """Its cell lost too many members, and with them its sum."""
    FAILED = "failed"
    """Its training gave nothing that may be sent."""
    SPENT = "spent"
    """Its ledger has no ε left for another training, so it began none."""
    REMOVED = "removed"
    """The filter took its cell out."""
    VOID = "void"
    """Its update came in, and the round made no release."""


class VisitNote(Note):
    """One agent's training in one round.

    Attributes:
        round: From 1.
        agent: The client's number, from 0.
        n_examples: That it has.
        n_tokens: Useful tokens that it trained on; 0 where there is no update.
        n_steps: Of the optimiser.
        first_loss: Of its first batch, nats a token.
        last_loss: Of its last.
        weight: Of its update in the average.
        update_norm: L2 norm of its update.
        train_s: Its share of its group's time, forward, backward and optimiser.
        error: Why there is no update; None: there is one.
    """

    kind: Literal["visit"] = "visit"
    round: int
    agent: int
    n_examples: int
    n_tokens: int
    n_steps: int
    first_loss: float | None
    last_loss: float | None
    weight: int
    update_norm: float
    train_s: float
    error: str | None = None


class RoundNote(Note):
    """One round, closed.

    Attributes:
        number: From 1; failed rounds count.
        release: Number of the release that it made; None: it made none.
        fates: Of all that were selected, by the client's number.
        n_cells: Sums that the server saw; an update in the open is one.
        n_cells_removed: Of these, by the filter.
        update_norm: L2 norm of what was averaged.
        covariance_gap: What averaging the factors apart lost, relative to the update; estimated in
            rounds whose release is measured. None: it cannot be seen, or is zero by the rule.
        learning_rate: Of the round's first step.
        bytes_up: Of all agents' bodies, those that came too late too; without the messages of keys
            and shares that masks need.
        bytes_down: The release, to all that fetched it.
        waited_s: Simulated time until enough agents were there; None without a population.
        duration_s: Simulated time from opening to closing; None without a population.
        epsilon: The largest that any agent has spent so far; None without differential privacy.
        train_s: Of all visits together.
        server_s: Selection, encoding, masks, filter, average, writing: all but training.
        wall_s: From the round's beginning to its end, as the clock on the wall has it.
        next_clip_norm: C of the next round under profile P3; None: the manifest's.
        failure: Why the round made no release; None: it did.
        n_crafted: Updates that attackers made up; 0 too where they were too few in this round for
            their attack. None: nobody attacks.
    """

    kind: Literal["round"] = "round"
    number: int
    release: int | None
    fates: dict[int, Fate]
    n_cells: int
    n_cells_removed: int
    update_norm: float
    covariance_gap: float | None
    learning_rate: float
    bytes_up: int
    bytes_down: int
    waited_s: float | None
    duration_s: float | None
    epsilon: float | None
    train_s: float
    server_s: float
    wall_s: float
    release_sha256: str
    next_clip_norm: float | None = None
    failure: str | None = None
    n_crafted: int | None = None


class Measure(StrEnum):
    """How a model is measured on held-out records."""

    LOSS = "loss"
    """Nats a token of the response; lower is better."""
    EXACT_MATCH = "exact_match"
    """The share of answers that are exactly right."""
    ROUGE_L = "rouge_l"
    """Mean ROUGE-L of the answers, 0 to 1."""

    @property
    def lower_is_better(self) -> bool:
        """Whether it is."""
        return self is Measure.LOSS


class ScoreNote(Note):
    """One measure of one release in one category.

    Attributes:
        release: Number of the release; 0 is before any training.
        score: Mean over the category's records.
        n_examples: How many these are.
    """

    kind: Literal["score"] = "score"
    release: int
    measure: Measure
    category: str
    score: float
    n_examples: int


class AnswerNote(Note):
    """What the last release answered to a held-out record."""

    kind: Literal["answer"] = "answer"
    release: int
    category: str
    instruction: str
    wanted: str
    answer: str


class EndNote(Note):
    """The run is over."""

    kind: Literal["end"] = "end"
    wall_s: float
    """Of the sitting that ended it, loading included."""


AnyNote = Annotated[
    VisitNote | RoundNote | ScoreNote | AnswerNote | EndNote, Field(discriminator="kind")
]


class RunCard(Note):
    """What a run is, written when it begins; a run that is resumed must have the same.

    Attributes:
        format: Of the folder.
        experiment: Its name.
        arm: Who sees which records.
        client: Of a local arm, the client's number.
        seed: Of all draws but the partition's records' order in the file.
        experiment_sha256: Of the resolved experiment.
        manifest_sha256: Of the federation manifest that an operator would sign.
        base_fingerprint: Of the quantised base, hexadecimal.
        data_sha256: Of the data files, unpacked.
        population_sha256: Of the population's file; None: there is none.
        n_clients: In the partition.
        n_held_out: Records that nobody trains on; None: of a run that did not count them.
        n_repeated: Of these, asked word for word in a client's records too.
        n_values: Of an update.
        cohort: Agents that a round aims at; what an ε of profiles P2 and P3 is for.
        n_rounds: Planned.
        engine: What the agents ran in.
        group_size: How many virtual agents trained at once.
        cryptography: Of masked sums; None: nothing is masked.
        profile: Of differential privacy, P0 to P3.
        guarantee: What it promises, in words.
        versions: Of the packages that decide about results.
        machine: Processor or device.
        began_at: Seconds since the Unix epoch.
    """

    format: Literal[1] = FORMAT
    experiment: str
    arm: Arm
    client: int | None
    seed: int
    experiment_sha256: str
    manifest_sha256: str
    base_fingerprint: str
    data_sha256: str
    population_sha256: str | None = None
    n_clients: int
    n_held_out: int | None = None
    n_repeated: int | None = None
    n_values: int
    cohort: int
    n_rounds: int
    engine: str
    group_size: int
    cryptography: Cryptography | None
    profile: str
    guarantee: str
    versions: dict[str, str]
    machine: str
    began_at: float
