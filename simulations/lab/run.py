"""The main loop of a run: rounds of visits, closed by the server's rules, noted as they end.

What a sitting finds in the folder it takes as done; what it does not find it does, with the same
chance. So a run that was killed, at whatever moment and however often, ends with the same releases,
bit for bit, as one that was not.
"""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from edge_agent.data.records import Record
from edge_agent.training.trainer import RoundRecipe
from privacy.updates import Float32Array, PlainUpdate, l2_norm
from protocol.base_description import BaseDescription
from protocol.blocks import FedAvgBlock, NoMasking
from protocol.guarantee import describe_privacy
from quant.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    flatten,
    initial_adapter,
    peft_config,
    to_safetensors,
    unflatten,
)
from simulations.errors import ExperimentError, OutputError
from simulations.lab import engines
from simulations.lab.attackers import Attackers
from simulations.lab.chance import RunChance
from simulations.lab.data import data_sha256, prepare_data
from simulations.lab.engines import Engine
from simulations.lab.experiment import Experiment
from simulations.lab.folder import RunFolder, read_card, read_vector
from simulations.lab.listening import Listener, Silent
from simulations.lab.probe import choose_group, steps_of_run
from simulations.lab.records import (
    Arm,
    EndNote,
    Fate,
    RoundNote,
    RunCard,
    ScoreNote,
    VisitNote,
)
from simulations.lab.scoring import Scorer
from simulations.lab.server import Closed, Release, VirtualServer
from simulations.lab.spending import Spending
from simulations.lab.terms import make_terms
from simulations.lab.timetable import PlannedRound, alone, timetable
from simulations.lab.visits import Setup, Visit, VisitResult
from simulations.population import read_population

_PACKAGES: Final = ("torch", "transformers", "peft", "bitsandbytes", "numpy", "sheepfold")
_WORTH_KEEPING_S: Final = 0.25
"""An update of an open round that took less is made again after a kill, not kept."""
_FAILED_ROUNDS: Final = 3
"""Times as many rounds as were wanted may be tried before a run gives up."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be run.

    Attributes:
        experiment: Resolved.
        arm: Who sees which records.
        client: Of a local arm, the client's number; None elsewhere.
        seed: Of all draws.
    """

    experiment: Experiment
    arm: Arm = Arm.FEDERATED
    client: int | None = None
    seed: int = 1

    @property
    def name(self) -> str:
        """For folders and tables."""
        who = self.arm.value if self.client is None else f"{self.arm.value}-{self.client}"
        return f"{who}-seed-{self.seed}"


def run(root: Path, request: Request, engine: Engine, listener: Listener | None = None) -> RunCard:
    """Run an experiment to its end, or go on with it.

    Guarantees:
        1. Equal requests and group sizes give equal releases, bit for bit, on machines of one kind:
           whatever the engine, the number of workers, and how often the run was killed.
        2. A run whose folder says that it ended is not touched, and is taken for no other run: of
           another experiment, population, arm, client or seed, or of other records.

    Args:
        root: The run's folder: new, empty, or of this very run.
        request: What is to be run.
        engine: Where agents train.
        listener: Told how it goes.

    Raises:
        SimulationError: The folder holds another run, or the experiment cannot be run.
        AgentError: Records, training or measuring.
        PrivacyError: No noise keeps to the ε that is asked for.
        QuantError: The base or the adapter.
        ServerError: A recipe that no federation can have.
    """
    told = Silent() if listener is None else listener
    with RunFolder(root) as folder:
        return _Sitting(folder, request, engine, told).go()


def is_of(card: RunCard, request: Request, *, data_sha256: str) -> bool:
    """Whether a card is of this very run: its experiment, population, records, arm, client, seed.

    Args:
        card: Of a folder.
        request: What is to be run.
        data_sha256: `data.data_sha256` of its records.

    Raises:
        PopulationError: The population cannot be read.
    """
    experiment = request.experiment
    return (
        (card.experiment_sha256, card.arm, card.client, card.seed)
        == (experiment.digest(), request.arm, request.client, request.seed)
        and card.population_sha256 == _population_sha256(experiment)
        and card.data_sha256 == data_sha256
    )


def holds_another(root: Path, card: RunCard) -> OutputError:
    """What to tell of a folder that is taken.

    Args:
        root: The folder.
        card: Of the run in it.
    """
    return OutputError(
        f"{root} holds another run: {card.experiment}, {card.arm.value}, seed {card.seed}, other "
        "values of the experiment perhaps, or other records; choose another --out, or remove it"
    )


def _population_sha256(experiment: Experiment) -> str | None:
    file = experiment.population.file
    return None if file is None else read_population(Path(file)).digest()


class _Sitting:
    """One process's work on a run."""

    def __init__(
        self, folder: RunFolder, request: Request, engine: Engine, listener: Listener
    ) -> None:
        self._folder = folder
        self._request = request
        self._experiment = request.experiment
        self._engine = engine
        self._listener = listener
        self._chance = RunChance(request.seed)
        self._visits: dict[tuple[int, int], VisitNote] = {}
        self._rounds: list[RoundNote] = []

    def go(self) -> RunCard:
        begun = time.perf_counter()
        if self._has_ended():
            return self._ended_card()
        section = self._experiment.base
        setup = Setup(
            model=section.model,
            revision=section.revision,
            device=self._experiment.engine.device,
            seed=self._request.seed,
            run=f"{self._experiment.digest()} {self._request.name}",
        )
        self._listener.stage(f"loading {section.model} in 4 bit")
        base = engines.describe(self._engine, setup)
        self._listener.stage("reading and splitting the records")
        self._data = prepare_data(self._experiment.data, seed=self._request.seed)
        terms = self._terms = make_terms(
            self._experiment, base, arm=self._request.arm, seed=self._request.seed
        )
        self._setup = replace(setup, manifest=terms.manifest.canonical())
        first = flatten(initial_adapter(base, terms.manifest.lora), terms.whole)
        card = self._open(first)
        self._setup = replace(self._setup, group=card.group_size)
        self._scorer = Scorer(
            self._folder,
            self._experiment.evaluation,
            arm=self._request.arm,
            n_rounds=terms.manifest.rounds.n_rounds,
            held_out=self._data.held_out,
            engine=self._engine,
            listener=self._listener,
        )
        self._read_notes()
        release = self._release(first)
        self._listener.begun(card, n_done=release.number)
        if release.number == 0:
            self._folder.write_vector(self._folder.release(0), first)
        if self._rounds or self._request.arm is Arm.BASE:  # what a killed sitting did not get to
            self._scorer.measure(self._setup, Release(number=0, vector=first))
            self._scorer.measure(self._setup, release)
        self._run_rounds(release, base)
        self._folder.append([EndNote(wall_s=time.perf_counter() - begun)])
        return card

    # Beginning

    def _has_ended(self) -> bool:
        return any(isinstance(note, EndNote) for note in self._folder.notes())

    def _ended_card(self) -> RunCard:
        """Of a run that is over, if it is the one that is asked for; no base is loaded for it."""
        card = read_card(self._folder.root)
        sha256 = data_sha256(self._experiment.data, seed=self._request.seed)
        if not is_of(card, self._request, data_sha256=sha256):
            raise holds_another(self._folder.root, card)
        return card

    def _open(self, first: Float32Array) -> RunCard:
        """Write the card, or find that of an earlier sitting, whose group size stays."""
        experiment, terms = self._experiment, self._terms
        earlier = read_card(self._folder.root) if self._folder.is_begun else None
        if earlier is not None:
            group = earlier.group_size
        elif experiment.engine.group != "auto":
            group = experiment.engine.group
        elif self._request.arm is Arm.FEDERATED:
            self._listener.stage("trying how many agents to train at once")
            order = sorted(range(len(self._data.sizes)), key=lambda k: -self._data.sizes[k])
            group = choose_group(
                self._engine,
                self._setup,
                first,
                [self._data.clients[client] for client in order[:16]],
                cohort=terms.manifest.rounds.cohort_target,
                n_steps=steps_of_run(terms.manifest, self._data.sizes),
            )
        else:
            group = 1
        masked = not isinstance(terms.manifest.masking, NoMasking)
        rounds = terms.manifest.rounds
        card = RunCard(
            experiment=experiment.name,
            arm=self._request.arm,
            client=self._request.client,
            seed=self._request.seed,
            experiment_sha256=experiment.digest(),
            manifest_sha256=terms.manifest.digest().hex(),
            base_fingerprint=terms.manifest.base.fingerprint.hex(),
            data_sha256=self._data.sha256,
            population_sha256=_population_sha256(experiment),
            n_clients=len(self._data.clients),
            n_held_out=len(self._data.held_out),
            n_repeated=self._data.n_repeated,
            n_values=terms.tensors.n_values,
            cohort=rounds.cohort_target,
            n_rounds=0 if self._request.arm is Arm.BASE else rounds.n_rounds,
            engine=self._engine.name,
            group_size=group,
            cryptography=experiment.engine.cryptography if masked else None,
            profile=terms.manifest.privacy.profile,
            guarantee=describe_privacy(terms.manifest.privacy, n_rounds=rounds.n_rounds),
            versions={name: importlib.metadata.version(name) for name in _PACKAGES},
            machine=engines.machine(self._engine, self._setup),
            began_at=time.time() if earlier is None else earlier.began_at,
        )
        self._folder.open_card(card, experiment=experiment.as_toml())
        if not self._folder.manifest.exists():
            text = json.dumps(terms.manifest.as_json(), indent=2, ensure_ascii=False)
            self._folder.write(self._folder.manifest, text.encode() + b"\n")
        if self._data.manifest is not None and not self._folder.partition.exists():
            self._data.manifest.save(self._folder.partition)
        if self._data.kept is not None and not self._folder.kept.exists():
            kept = [share.tolist() for share in self._data.kept]
            self._folder.write(self._folder.kept, json.dumps(kept).encode() + b"\n")
        return card

    def _read_notes(self) -> None:
        rounds: dict[int, RoundNote] = {}
        for note in self._folder.notes():
            match note:
                case VisitNote():
                    self._visits[note.round, note.agent] = note
                case RoundNote():
                    rounds[note.number] = note  # the last one is of a round that was made again
                case ScoreNote():
                    self._scorer.knows(note)
                case _:
                    pass
        self._rounds = [rounds[number] for number in sorted(rounds)]

    def _release(self, first: Float32Array) -> Release:
        """The newest one that lies there whole; what came after it is made again.

        A power cut may leave a line of the journal and take the file that it speaks of.
        """
        while True:
            made = [place for place, note in enumerate(self._rounds) if note.failure is None]
            if not made:
                self._rounds.clear()
                return Release(number=0, vector=first)
            number, last = len(made), self._rounds[made[-1]]
            vector = _whole(self._folder.release(number), sha256=last.release_sha256)
            state = self._folder.optimizer(number)
            if vector is not None and (state.exists() or not self._has_optimizer_state):
                return Release(
                    number=number,
                    vector=vector,
                    optimizer_state=state.read_bytes() if state.exists() else None,
                    clip_norm=last.next_clip_norm,
                )
            del self._rounds[made[-1] :]

    @property
    def _has_optimizer_state(self) -> bool:
        optimizer = self._terms.manifest.aggregation.optimizer
        return not isinstance(optimizer, FedAvgBlock)

    # Rounds

    def _run_rounds(self, release: Release, base: BaseDescription) -> None:
        if self._request.arm is Arm.BASE:
            self._write_adapter(release, base)
            return
        terms, rules = self._terms, self._terms.manifest.rounds
        server = VirtualServer(
            terms,
            self._chance,
            cryptography=self._experiment.engine.cryptography,
            vanish=self._experiment.population.vanish
            if self._request.arm is Arm.FEDERATED
            else 0.0,
        )
        section, n_clients = self._experiment.attack, len(self._data.clients)
        attackers = (
            Attackers(section, n_clients=n_clients, chance=self._chance)
            if section is not None and self._request.arm is Arm.FEDERATED
            else None
        )
        spending = Spending(terms.manifest, n_values=terms.tensors.n_values)
        for planned in self._plans():
            plan = _admitted(planned, spending)
            if plan.number <= len(self._rounds):
                self._charge(spending, plan, self._rounds[plan.number - 1].fates)
                continue
            if release.number >= rules.n_rounds:
                break
            if plan.number > _FAILED_ROUNDS * rules.n_rounds:
                reasons = [note.failure for note in self._rounds if note.failure is not None]
                msg = f"{plan.number - 1} rounds gave {release.number} releases: {reasons[-1]}"
                raise ExperimentError(msg)
            release = self._round(plan, release, server, attackers, spending)
        self._write_adapter(release, base)

    def _plans(self) -> Iterator[PlannedRound]:
        if self._request.arm is not Arm.FEDERATED:
            return alone(self._request.client or 0)
        terms, section = self._terms, self._experiment.population
        return timetable(
            section,
            terms.manifest.rounds,
            n_tokens=None if section.file is None else self._tokens(),
            n_clients=len(self._data.clients),
            down_n_bytes=terms.turns.at(0).layout.n_bytes,
            up_n_bytes=terms.turns.max_n_bytes,
            seed=self._request.seed,
        )

    def _tokens(self) -> list[int]:
        """That each client trains on in a round."""
        self._listener.stage("counting tokens, for devices to take their time")
        block, clients = self._terms.manifest.training, self._data.clients
        counts = engines.count_tokens(self._engine, self._setup, clients)
        if block.local_steps is None:
            return [(block.local_epochs or 1) * count for count in counts]
        n_drawn = block.local_steps * block.batch_size
        return [
            n_drawn * count // max(1, len(records))
            for count, records in zip(counts, clients, strict=True)
        ]

    def _charge(self, spending: Spending, plan: PlannedRound, fates: Mapping[int, Fate]) -> None:
        """Charge whoever began, or under P3 whoever is in the release.

        Args:
            spending: So far.
            plan: The round as it began.
            fates: As it ended.
        """
        exempt = {Fate.SPENT} if spending.begins_with_training else set(Fate) - {Fate.COUNTED}
        for agent in plan.fates:
            if fates[agent] in exempt:
                continue
            note = self._visits.get((plan.number, agent))
            n_examples = len(self._records(agent)) if note is None else note.n_examples
            spending.charge(agent, n_examples=n_examples)

    def _round(
        self,
        plan: PlannedRound,
        release: Release,
        server: VirtualServer,
        attackers: Attackers | None,
        spending: Spending,
    ) -> Release:
        begun = time.perf_counter()
        updates, waited_s = ([], 0.0) if plan.failure else self._train(plan, release)
        n_crafted: int | None = None
        if attackers is not None:
            updates, n_crafted = self._attacked(attackers, plan, release, updates)
        closed = (
            server.not_closed(release, plan.cohort, failure=plan.failure)
            if plan.failure
            else server.close(
                plan.number,
                release,
                updates,
                with_gap=self._scorer.is_due(release.number + 1),
            )
        )
        fates = self._fates(plan, closed)
        self._charge(spending, plan, fates)
        note = self._note(
            plan,
            closed,
            fates,
            epsilon=spending.epsilon,
            n_crafted=n_crafted,
            begun=begun,
            waited_s=waited_s,
        )
        made = closed.release
        if note.failure is None:
            self._folder.write_vector(self._folder.release(made.number), made.vector)
            if made.optimizer_state is not None:
                self._folder.write(self._folder.optimizer(made.number), made.optimizer_state)
        self._folder.append([note])
        self._rounds.append(note)
        self._folder.tidy(plan.number, made.number)
        self._listener.closed(note)
        if made.number == 1 and release.number == 0:
            self._scorer.measure(self._setup, release)
        if made.number > release.number:
            self._scorer.measure(self._setup, made)
        return made

    def _train(
        self, plan: PlannedRound, release: Release
    ) -> tuple[list[tuple[int, PlainUpdate]], float]:
        """The updates of a round, ascending by agent; and the seconds that were waited for them."""
        waited_s, fresh = 0.0, dict[int, Float32Array]()
        todo = [group for group in self._groups(plan) if not self._is_kept(plan.number, group)]
        mark = time.perf_counter()
        for results in engines.train(
            self._engine,
            self._setup,
            release.vector,
            [self._visits_of(plan, release, group) for group in todo],
        ):
            waited_s += time.perf_counter() - mark
            self._insist(results)
            self._keep(plan.number, results)
            fresh |= {one.agent: one.vector for one in results if one.vector is not None}
            mark = time.perf_counter()
        updates = []
        for agent in plan.cohort:
            note = self._visits[plan.number, agent]
            if note.error is None:
                vector = fresh.get(agent)
                if vector is None:  # of an earlier sitting
                    vector = self._kept(note)
                if vector is None:  # cannot be: it would have been trained again
                    msg = f"the update of client {agent} in round {plan.number} is gone"
                    raise OutputError(msg)
                updates.append((agent, PlainUpdate(vector=vector, weight=note.weight)))
        return updates, waited_s

    def _groups(self, plan: PlannedRound) -> list[tuple[int, ...]]:
        """The cohort in groups of like volume, the largest first: those train for equally long."""
        order = sorted(plan.cohort, key=lambda agent: (-len(self._records(agent)), agent))
        size = self._setup.group
        return [tuple(order[start : start + size]) for start in range(0, len(order), size)]

    def _is_kept(self, number: int, group: Sequence[int]) -> bool:
        """Whether an earlier sitting has trained it; a group's floats depend on all its members."""
        for agent in group:
            note = self._visits.get((number, agent))
            if note is None or (note.error is None and self._kept(note) is None):
                return False
        return True

    def _kept(self, note: VisitNote) -> Float32Array | None:
        """The update that a visit of an earlier sitting left, if it lies there whole."""
        vector = _readable(self._folder.update(note.round, note.agent))
        return None if vector is None or l2_norm(vector) != note.update_norm else vector

    def _insist(self, results: Sequence[VisitResult]) -> None:
        """A federation goes on without an agent whose training failed; a baseline has no other."""
        if self._request.arm is Arm.FEDERATED:
            return
        for result in results:
            if result.error is not None:
                msg = f"the {self._request.arm.value} model cannot be trained: {result.error}"
                raise ExperimentError(msg)

    def _records(self, agent: int) -> tuple[Record, ...]:
        if self._request.arm is Arm.CENTRALISED:
            return self._data.everything
        return self._data.clients[agent]

    def _visits_of(
        self, plan: PlannedRound, release: Release, group: Sequence[int]
    ) -> tuple[Visit, ...]:
        # A baseline trains for long at a stretch; an agent of a group is begun anew.
        state_path = None
        if self._request.arm is not Arm.FEDERATED:
            state_path = self._folder.training_state
        return tuple(
            Visit(
                round=plan.number,
                release=release.number,
                agent=agent,
                records=self._records(agent),
                state_path=state_path,
            )
            for agent in group
        )

    def _keep(self, number: int, results: Sequence[VisitResult]) -> None:
        notes = []
        for result in results:
            if result.vector is not None and result.train_s >= _WORTH_KEEPING_S:
                self._folder.write_vector(self._folder.update(number, result.agent), result.vector)
            note = VisitNote(
                round=number,
                agent=result.agent,
                n_examples=result.n_examples,
                n_tokens=result.n_tokens,
                n_steps=result.n_steps,
                first_loss=result.first_loss,
                last_loss=result.last_loss,
                weight=result.weight,
                update_norm=0.0 if result.vector is None else l2_norm(result.vector),
                train_s=result.train_s,
                error=result.error,
            )
            notes.append(note)
            self._visits[number, result.agent] = note
        self._folder.append(notes)
        for note in notes:
            self._listener.visited(note)

    def _attacked(
        self,
        attackers: Attackers,
        plan: PlannedRound,
        release: Release,
        updates: list[tuple[int, PlainUpdate]],
    ) -> tuple[list[tuple[int, PlainUpdate]], int]:
        layout = self._terms.turns.at(release.number).layout.tensors
        last_change: Float32Array | None = None
        if release.number > 0:
            before = read_vector(self._folder.release(release.number - 1))
            change = unflatten(release.vector - before, self._terms.whole)
            last_change = flatten(change, layout)
        return attackers.craft(plan.number, updates, layout=layout, last_change=last_change)

    def _visits_in(self, plan: PlannedRound) -> list[VisitNote]:
        return [self._visits[plan.number, agent] for agent in plan.cohort if not plan.failure]

    def _fates(self, plan: PlannedRound, closed: Closed) -> dict[int, Fate]:
        """What became of all that were selected."""
        failed = {
            note.agent: Fate.FAILED for note in self._visits_in(plan) if note.error is not None
        }
        fates = plan.fates | failed | dict(closed.fates)
        if closed.failure is not None:
            void = [agent for agent, fate in fates.items() if fate is Fate.COUNTED]
            fates |= dict.fromkeys(void, Fate.VOID)
        return fates

    def _note(
        self,
        plan: PlannedRound,
        closed: Closed,
        fates: dict[int, Fate],
        *,
        epsilon: float | None,
        n_crafted: int | None,
        begun: float,
        waited_s: float,
    ) -> RoundNote:
        terms = self._terms
        number = sum(note.failure is None for note in self._rounds)
        training, n_rounds = terms.manifest.training, terms.manifest.rounds.n_rounds
        recipe = RoundRecipe(
            training=training,
            schedule_start=number / n_rounds,
            schedule_end=(number + 1) / n_rounds,
            seed=0,
        )
        wall_s = time.perf_counter() - begun
        return RoundNote(
            number=plan.number,
            release=None if closed.failure else closed.release.number,
            fates=fates,
            n_cells=closed.n_cells,
            n_cells_removed=closed.n_cells_removed,
            update_norm=closed.update_norm,
            covariance_gap=closed.covariance_gap,
            learning_rate=recipe.learning_rate(0, 1),
            bytes_up=closed.up_n_bytes + self._late_n_bytes(plan),
            bytes_down=plan.n_fetched * terms.turns.at(number).layout.n_bytes,
            waited_s=plan.waited_s,
            duration_s=plan.duration_s,
            epsilon=epsilon,
            train_s=sum(note.train_s for note in self._visits_in(plan)),
            server_s=wall_s - waited_s,
            wall_s=wall_s,
            release_sha256=_sha256(closed.release.vector),
            next_clip_norm=closed.release.clip_norm,
            n_crafted=n_crafted,
            failure=closed.failure,
        )

    def _late_n_bytes(self, plan: PlannedRound) -> int:
        """Of updates in the open that came too late; under masks nothing is sent before cells."""
        masked = not isinstance(self._terms.manifest.masking, NoMasking)
        return 0 if masked else plan.late_n_bytes

    def _write_adapter(self, release: Release, base: BaseDescription) -> None:
        """The last release, for stock peft and for `sheepfold-agent`."""
        lora = self._terms.manifest.lora
        arrays = unflatten(release.vector, self._terms.whole)
        files = {
            WEIGHTS_NAME: to_safetensors(arrays),
            CONFIG_NAME: peft_config(base.base, lora),
        }
        for name, data in files.items():
            self._folder.write(self._folder.adapter / name, data)


def _admitted(plan: PlannedRound, spending: Spending) -> PlannedRound:
    """The round without those whose ledger refuses it."""
    spent = [agent for agent in plan.fates if not spending.admits(agent)]
    return replace(plan, fates=plan.fates | dict.fromkeys(spent, Fate.SPENT)) if spent else plan


def _readable(path: Path) -> Float32Array | None:
    try:
        return read_vector(path)
    except OutputError:
        return None


def _whole(path: Path, *, sha256: str) -> Float32Array | None:
    """A vector, if it lies there as it was written."""
    vector = _readable(path)
    return None if vector is None or _sha256(vector) != sha256 else vector


def _sha256(vector: Float32Array) -> str:
    return hashlib.sha256(vector.tobytes()).hexdigest()
