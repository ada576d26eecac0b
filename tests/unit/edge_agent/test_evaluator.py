"""The trusted evaluator: what it trusts, what it measures, what it signs."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from edge_agent.data.records import Record
from edge_agent.data.tokens import tokenize
from edge_agent.errors import EvaluationError, JournalError, RefusedError, TrustError
from edge_agent.evaluation import held_out_loss
from edge_agent.evaluator import Evaluator, pin_federation
from edge_agent.home import AgentHome
from protocol.blocks import EvaluatorGate, LoraBlock, NoGate
from protocol.chain import BlobRef
from protocol.gating import EvaluationReport
from protocol.limits import MAX_CATEGORIES
from protocol.messages import Acknowledged, Discovery, EvaluationReply, EvaluationTask
from protocol.problems import ProblemType, problem_document
from protocol.signing import Signed, Signer, sign, verify
from protocol.wire import sha256
from quant.adapter import initial_adapter, to_safetensors
from quant.base_model import load_base
from quant.lora import AdaptedModel

LORA = LoraBlock(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"), init_seed=3)


def make_records(n_categories: int = 2) -> list[Record]:
    return [
        Record(
            instruction=f"Name thing {k}.",
            context="",
            response=f"It is {category} {k}.",
            category=f"category {category}",
            messages=None,
            source=f"line {k}",
        )
        for category in range(n_categories)
        for k in range(3)
    ]


@dataclass
class FakeTransport:
    """By the names of `Transport`: tasks to hand out, files to fetch, reports that arrived."""

    federation: Signed
    tasks: list[Signed] = field(default_factory=list)
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    reports: list[Signed[EvaluationReport]] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    refusal: ProblemType | None = None

    def discover(self) -> Discovery:
        return Discovery(federation=self.federation, enrolment="open", server_time=1.0)

    def use_federation(self, manifest) -> None:
        pass

    def evaluation(self, *, wait_s: float) -> EvaluationReply:
        task = self.tasks.pop(0) if self.tasks else None
        return EvaluationReply(task=task, finished=task is None)

    def fetch(self, ref: BlobRef, folder: Path) -> Path:
        return self._give("release", ref, folder)

    def fetch_candidate(self, ref: BlobRef, folder: Path) -> Path:
        return self._give("candidate", ref, folder)

    def _give(self, what: str, ref: BlobRef, folder: Path) -> Path:
        self.fetched.append(what)
        path = folder / ref.sha256.hex()
        path.write_bytes(self.blobs[ref.sha256])
        return path

    def report(self, report: Signed[EvaluationReport]) -> Acknowledged:
        if self.refusal is not None:
            raise RefusedError(problem_document(self.refusal, detail="no", server_time=1.0))
        self.reports.append(report)
        return Acknowledged()


@dataclass
class World:
    """A gated federation on a real tiny base, its server's key and its evaluator's home."""

    home: AgentHome
    signer: Signer
    server: Signer
    manifest: object
    transport: FakeTransport
    base: object
    base_dir: Path
    said: list[str] = field(default_factory=list)

    def blob(self, data: bytes) -> BlobRef:
        self.transport.blobs[sha256(data)] = data
        return BlobRef(sha256=sha256(data), n_bytes=len(data))

    def adapter(self, by: float) -> dict[str, np.ndarray]:
        """Release 0's adapter with every value of B moved."""
        start = initial_adapter(self.base.description, LORA)
        return {name: a + np.float32(by * (".lora_B." in name)) for name, a in start.items()}

    def ask(self, *candidates: bytes, key: Signer | None = None, **changes) -> EvaluationTask:
        fields = {
            "federation": self.manifest.federation,
            "round": 1,
            "round_digest": bytes(32),
            "attempt": 1,
            "current": self.blob(to_safetensors(self.adapter(0.0))),
            "candidates": tuple(self.blob(data) for data in candidates),
        }
        task = EvaluationTask(**{**fields, **changes})
        self.transport.tasks.append(sign(key or self.server, "evaluation-task", task).signed)
        return task

    def run(self, records: list[Record] | None = None) -> None:
        evaluator = Evaluator(
            home=self.home,
            manifest=self.manifest,
            transport=self.transport,
            signer=self.signer,
            base=load_base(self.base_dir),  # one adapter at a time may be attached to a base
            records=records or make_records(),
            say=self.said.append,
        )
        evaluator.run(stopped=lambda: False, until_finished=True)


@pytest.fixture
def world(tmp_path, random_base, random_base_dir, server_key, make_manifest) -> World:
    home = AgentHome(tmp_path / "evaluator")
    home.create()
    signer = home.load_or_create_signer()
    manifest = make_manifest(
        base=random_base.description.base,
        lora=LORA,
        gate=EvaluatorGate(evaluator=signer.identity),
    )
    transport = FakeTransport(sign(server_key, "federation", manifest).signed)
    return World(home, signer, server_key, manifest, transport, random_base, random_base_dir)


def test_guarantee_1_it_signs_the_losses_of_the_very_bytes(world: World) -> None:
    candidates = [to_safetensors(world.adapter(by)) for by in (0.05, 0.5)]
    task = world.ask(*candidates)
    world.run()
    (signed,) = world.transport.reports
    report = verify(signed, "evaluation", key=world.signer.identity).body
    assert report.task == task.digest()
    assert report.candidates == tuple(map(sha256, candidates))
    assert (report.categories, report.n_records) == (("category 0", "category 1"), (3, 3))
    adapted = AdaptedModel(world.base, LORA)
    block = world.manifest.training
    examples = tokenize(
        make_records(),
        world.base.tokenizer,
        template=block.template,
        loss_on=block.loss_on,
        max_length=block.max_length,
    ).examples
    for by, row in zip((0.0, 0.05, 0.5), report.losses, strict=True):
        adapted.load(world.adapter(by))
        scores = held_out_loss(adapted.model, examples, pad_id=0)
        expected = [one.score for one in scores.by_category.values()]
        assert row == pytest.approx(expected, rel=1e-5)
    assert len({round(row[0], 6) for row in report.losses}) == 3


def test_guarantee_2_what_cannot_be_scored_is_reported_as_such(world: World) -> None:
    infinite = world.adapter(1.0)
    name = next(iter(infinite))
    infinite[name] = np.full_like(infinite[name], 3e38)
    world.ask(b"no adapter", to_safetensors(infinite), to_safetensors(world.adapter(0.1)))
    world.run()
    losses = world.transport.reports[0].body.losses
    assert losses[1] == losses[2] == (None, None)
    assert None not in losses[0] + losses[3]


def test_guarantee_3_no_text_of_a_record_is_in_a_report(world: World) -> None:
    world.ask(to_safetensors(world.adapter(0.1)))
    world.run()
    told = world.transport.reports[0].canonical()
    assert b"Name thing" not in told
    assert b"It is" not in told


def test_other_records_show_in_the_report(world: World) -> None:
    for records in (make_records(), make_records(), make_records(3)):
        world.ask(to_safetensors(world.adapter(0.1)))
        world.run(records)
    first, same, other = (report.body for report in world.transport.reports)
    assert first.data == same.data != other.data
    assert first == same


def test_the_adapter_that_passed_is_not_scored_twice(world: World) -> None:
    passed = to_safetensors(world.adapter(0.1))
    world.ask(passed)
    world.ask(to_safetensors(world.adapter(0.2)), round=2, current=world.blob(passed))
    world.run()
    assert world.transport.fetched == ["release", "candidate", "candidate"]
    first, second = (report.body for report in world.transport.reports)
    assert second.losses[0] == first.losses[1]


def test_downloads_do_not_stay(world: World) -> None:
    world.ask(to_safetensors(world.adapter(0.1)))
    world.run()
    assert world.home.cached_files() == []


def test_it_tells_what_passes_and_why_not(world: World) -> None:
    world.ask(to_safetensors(world.adapter(0.0)), to_safetensors(world.adapter(50.0)))
    world.run()
    assert any("candidate 1: loss" in line and "passes" in line for line in world.said)
    assert any("candidate 2: loss" in line and "does not pass" in line for line in world.said)


def test_a_task_of_another_key_or_federation_is_not_answered(world: World) -> None:
    world.ask(to_safetensors(world.adapter(0.1)), key=world.signer)
    with pytest.raises(TrustError):
        world.run()
    world.ask(to_safetensors(world.adapter(0.1)), federation=bytes([9]) * 16)
    with pytest.raises(TrustError, match="another federation"):
        world.run()
    assert world.transport.reports == []


def test_a_round_that_went_on_is_told_and_others_are_judged(world: World) -> None:
    world.ask(to_safetensors(world.adapter(0.1)))
    world.transport.refusal = ProblemType.ROUND_CLOSED
    world.run()
    assert any("went on without this report" in line for line in world.said)
    world.ask(to_safetensors(world.adapter(0.1)))
    world.transport.refusal = ProblemType.BAD_SIGNATURE
    with pytest.raises(RefusedError):
        world.run()


def test_a_current_adapter_that_cannot_be_scored_is_the_operators_fault(world: World) -> None:
    world.ask(to_safetensors(world.adapter(0.1)), current=world.blob(b"no adapter"))
    with pytest.raises(EvaluationError, match="current adapter"):
        world.run()


def test_too_many_categories_are_refused_before_anything_is_asked(world: World) -> None:
    with pytest.raises(EvaluationError, match="at most 32"):
        world.run(make_records(MAX_CATEGORIES + 1))


def test_the_federation_is_pinned(world: World, make_manifest) -> None:
    manifest = pin_federation(world.home, world.transport, world.signer)
    assert manifest == world.manifest
    assert pin_federation(world.home, world.transport, world.signer) == manifest
    other = make_manifest(name="Another", gate=world.manifest.gate)
    world.transport.federation = sign(world.server, "federation", other).signed
    with pytest.raises(TrustError, match="another federation than the one kept"):
        pin_federation(world.home, world.transport, world.signer)
    (world.home.root / "federation.json").write_text("{")
    with pytest.raises(JournalError, match="damaged"):
        pin_federation(world.home, world.transport, world.signer)


@pytest.mark.parametrize("gate", [NoGate(), EvaluatorGate(evaluator=bytes([5]) * 32)])
def test_it_serves_no_federation_that_names_another(world: World, make_manifest, gate) -> None:
    manifest = make_manifest(gate=gate)
    world.transport.federation = sign(world.server, "federation", manifest).signed
    with pytest.raises(TrustError, match="not this key"):
        pin_federation(world.home, world.transport, world.signer)
    assert not (world.home.root / "federation.json").exists()
