"""The agent's control variate: taken over once, where a verified release counts its round."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_agent.consent import disclose
from edge_agent.controls import OwnControl
from edge_agent.errors import JournalError
from edge_agent.explaining import explain
from edge_agent.home import AgentHome
from edge_agent.journal import Journal, Part
from privacy.updates import PlainUpdate
from protocol.chain import CellRef, Release, RoundManifest
from protocol.layout import VectorLayout
from protocol.messages import UploadHeader, transcript_of_one
from protocol.phases import AgentEvent
from protocol.signing import Signer, sign
from quant.adapter import AdapterArrays

LAYOUT = VectorLayout.of_shapes({"a": (2, 3), "b": (4,)})
N_VALUES = LAYOUT.n_values


@dataclass
class FakeReleases:
    """Gives c, and the layout with room for Δc."""

    everyone: AdapterArrays = field(
        default_factory=lambda: {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    )
    layout: VectorLayout = LAYOUT

    def control(self) -> AdapterArrays:
        return self.everyone


@dataclass
class World:
    """A home whose agent takes part in rounds that a test makes."""

    home: AgentHome
    key: Signer
    make_round: Callable[..., RoundManifest]
    make_release: Callable[..., Release]
    releases: list[Release] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.home.create()
        self.start()
        self.publish(self.make_release())

    def start(self) -> None:
        """A new process."""
        self.journal = Journal(self.home.journal_path)
        self.control = OwnControl(home=self.home, journal=self.journal, releases=FakeReleases())  # type: ignore[arg-type]

    def publish(self, release: Release) -> None:
        self.releases.append(release)
        self.journal.add_release(release.number, sign(self.key, "release", release).signed)

    def begin(self, number: int) -> Part:
        manifest = self.make_round(round=number)
        return self.journal.begin_part(sign(self.key, "round", manifest).signed, now=1.0)

    def train(self, part: Part, value: float) -> PlainUpdate:
        """Begin a training and keep what it would leave: c_i of `value` everywhere."""
        self.control.begin(part)
        renewed = {"a": np.full((2, 3), value, np.float32), "b": np.full(4, value, np.float32)}
        return self.control.keep(part, update(), renewed)

    def upload(self, part: Part) -> bytes:
        """Journal the signed header; the transcript of its cell."""
        header = UploadHeader(
            federation=part.manifest.body.federation,
            round=part.round,
            attempt=part.attempt,
            agent=self.key.identity,
            round_digest=part.manifest.body.digest(),
            layout=LAYOUT.digest(),
            weight=1,
            body_sha256=bytes(32),
            body_n_bytes=4,
        )
        signed = sign(self.key, "upload", header).signed
        self.journal.move_part(part, AgentEvent.TRAINING_DONE, now=1.0, header=signed)
        self.journal.move_part(part, AgentEvent.UPLOAD_ACCEPTED, now=1.0)
        return transcript_of_one(signed)

    def close(
        self, part: Part, *, accepted: tuple[bytes, ...], rejected: tuple[bytes, ...] = ()
    ) -> None:
        """Publish the release of a round."""
        cells = {
            name: tuple(CellRef(transcript=item, members=bytes(32)) for item in found)
            for name, found in (("accepted", accepted), ("rejected", rejected))
        }
        self.publish(
            self.make_release(
                after=self.releases[-1],
                round=part.round,
                round_digest=part.manifest.body.digest(),
                **cells,
            )
        )

    def own(self) -> float:
        """c_i, of which all values are equal here."""
        values = self.control._own()
        assert len(set(values.tolist())) == 1
        return float(values[0])


def update() -> PlainUpdate:
    return PlainUpdate(vector=np.ones(N_VALUES, np.float32), weight=3)


@pytest.fixture
def world(
    tmp_path: Path,
    server_key: Signer,
    make_round: Callable[..., RoundManifest],
    make_release: Callable[..., Release],
) -> World:
    return World(AgentHome(tmp_path / "home"), server_key, make_round, make_release)


def test_guarantee_1_what_a_release_counts_is_taken_over_when_the_next_round_begins(
    world: World,
) -> None:
    part = world.begin(1)
    sent = world.train(part, 2.0)
    np.testing.assert_array_equal(sent.control, np.full(N_VALUES, 2.0))
    assert world.own() == 0.0
    world.close(part, accepted=(world.upload(part), bytes([9]) * 32))
    following = world.begin(2)
    sent = world.train(following, 5.0)
    assert world.own() == 2.0
    np.testing.assert_array_equal(sent.control, np.full(N_VALUES, 3.0))


def test_guarantee_2_what_is_sent_is_the_difference_to_what_corrected_the_training(
    world: World,
) -> None:
    part = world.begin(1)
    world.train(part, 2.0)
    world.close(part, accepted=(world.upload(part),))
    following = world.begin(2)
    variates = world.control.begin(following)
    variates.begin({"a": torch.zeros((2, 3)), "b": torch.zeros((4,))})
    gradients = {"a": torch.zeros((2, 3)), "b": torch.zeros((4,))}
    variates.correct(gradients)
    assert set(gradients["a"].flatten().tolist()) == {-2.0}  # c − c_i


@pytest.mark.parametrize("end", ["failed", "rejected", "never sent", "rolled back"])
def test_guarantee_1_a_round_that_did_not_count_it_leaves_it_as_it_was(
    world: World, end: str
) -> None:
    part = world.begin(1)
    world.train(part, 2.0)
    if end == "never sent":
        world.journal.move_part(part, AgentEvent.ABANDON, now=1.0)
        world.close(part, accepted=(bytes([9]) * 32,))
    else:
        transcript = world.upload(part)
        if end == "rejected":
            world.close(part, accepted=(bytes([9]) * 32,), rejected=(transcript,))
        elif end == "rolled back":
            again = {"adapter": world.releases[0].adapter, "rolled_back_to": 0}
            release = world.make_release(
                after=world.releases[-1], round=0, round_digest=None, **again
            )
            world.publish(release)
    world.train(world.begin(2), 5.0)
    assert world.own() == 0.0
    assert [number for number, _, _ in world.home.next_controls()] == [2]


def test_guarantee_1_a_kill_at_any_moment_applies_it_once(world: World) -> None:
    part = world.begin(1)
    world.train(part, 2.0)
    world.start()  # killed before the update was journalled: trained again
    part = world.begin(1)
    world.train(part, 2.0)
    world.start()
    transcript = world.upload(part)
    world.start()
    world.close(part, accepted=(transcript,))
    following = world.begin(2)
    for _ in range(3):  # killed in the middle of the next training, again and again
        sent = world.train(following, 5.0)
        np.testing.assert_array_equal(sent.control, np.full(N_VALUES, 3.0))
        world.start()
    assert world.own() == 2.0
    world.close(following, accepted=(world.upload(following),))
    world.control.begin(world.begin(3))
    assert world.own() == 5.0
    assert world.home.next_controls() == []


def test_an_agent_that_sits_out_rounds_takes_over_what_it_missed(world: World) -> None:
    part = world.begin(1)
    world.train(part, 2.0)
    transcript = world.upload(part)
    world.close(part, accepted=(transcript,))
    for number in (2, 3, 4):
        other = world.make_round(round=number)
        world.publish(
            world.make_release(after=world.releases[-1], round=number, round_digest=other.digest())
        )
    world.train(world.begin(5), 7.0)
    assert world.own() == 2.0


def test_a_damaged_file_is_told_and_nothing_is_trained(world: World) -> None:
    world.home.control.write_bytes(b"x" * 7)
    with pytest.raises(JournalError, match="is damaged"):
        world.control.begin(world.begin(1))


def test_what_is_kept_goes_with_the_home(world: World) -> None:
    part = world.begin(1)
    world.train(part, 2.0)
    world.close(part, accepted=(world.upload(part),))
    world.train(world.begin(2), 3.0)
    kept = {path.name for path in world.home.root.iterdir()}
    assert {"control.f32", "control-2-1.f32"} <= kept
    world.journal.close()
    world.home.forget()
    assert not world.home.root.exists()


def test_the_owner_is_told_that_mean_gradients_leave(make_manifest: Any) -> None:
    plain = make_manifest()
    manifest = make_manifest(training=plain.training.model_copy(update={"scaffold": True}))

    def leaves(of: Any) -> str:
        disclosure = disclose(of, server_host="h", base_folder=None, round_n_bytes=1_000_000)
        return " ".join(disclosure.what_leaves)

    assert "SCAFFOLD" in leaves(manifest)
    assert "2.00 MB" in leaves(manifest)
    assert "1.00 MB" in leaves(plain)
    assert "SCAFFOLD" not in leaves(plain)
    assert "SCAFFOLD" in " ".join(explain(manifest).learns)
    assert "SCAFFOLD" not in " ".join(explain(plain).learns)
