"""The newest release for its member's own use, beside an agent at work."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import JournalError, TransportError, TrustError, UnreachableError
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from edge_agent.newest import connect, joined, newest_release
from protocol.base_description import BaseDescription, LinearModule
from protocol.blocks import BaseBlock, ChangeLimitsBlock, Factor, LoraBlock
from protocol.chain import BlobRef, Release
from protocol.messages import ReleasePage
from protocol.signing import Signed, sign
from protocol.wire import sha256
from quant.adapter import adapter_shapes, initial_adapter, read_folder, sent_layout, to_safetensors
from quant.model_card import read_provenance

BASE = BaseDescription(
    base=BaseBlock(
        model="made/up", source_dtype="float32", fingerprint=bytes(32), tokenizer_digest=bytes(32)
    ),
    architecture="LlamaForCausalLM",
    n_parameters=4096,
    max_positions=512,
    has_chat_template=False,
    linear_modules=tuple(
        LinearModule(name=f"model.layers.{layer}.self_attn.{name}", d_out=8, d_in=16)
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    ),
)


@dataclass
class FakeTransport:
    """By the names of `Transport`; `down` is raised instead of an answer."""

    releases_made: list[Signed[Release]] = field(default_factory=list)
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    down: Exception | None = None
    page_size: int = 2

    def releases(self, *, after: int) -> ReleasePage:
        self.asked.append(f"releases after {after}")
        if self.down is not None:
            raise self.down
        page = self.releases_made[after + 1 : after + 1 + self.page_size]
        return ReleasePage(releases=tuple(page), newest=self.releases_made[-1].body.number)

    def fetch(self, ref: BlobRef, folder: Path) -> Path:
        self.asked.append(f"blob {ref.sha256.hex()[:4]}")
        path = folder / ref.sha256.hex()
        path.write_bytes(self.blobs[ref.sha256])
        return path


@dataclass
class Member:
    """A home that joined, and its server."""

    home: AgentHome
    journal: Journal
    server: FakeTransport
    manifest: object
    make_release: object
    key: object
    arrays: list = field(default_factory=list)

    def publish(self, arrays, **changes) -> Release:
        sent = {
            slot.name: arrays[slot.name] for slot in self._layout().slots if slot.name in arrays
        }
        files = {"adapter": to_safetensors(arrays), "sent": to_safetensors(sent)}
        for data in files.values():
            self.server.blobs[sha256(data)] = data
        after = self.server.releases_made[-1].body if self.server.releases_made else None
        refs = {
            name: BlobRef(sha256=sha256(data), n_bytes=len(data)) for name, data in files.items()
        }
        release = self.make_release(self.manifest, after=after, **{**refs, **changes})
        self.server.releases_made.append(sign(self.key, "release", release).signed)
        self.arrays.append(arrays)
        return release

    def _layout(self):
        return sent_layout(adapter_shapes(BASE, self.manifest.lora), self.manifest.lora.sent)

    def moved(self, by: float, factors: tuple[Factor, ...] = (Factor.A, Factor.B)):
        last = self.arrays[-1]
        ends = tuple(f".lora_{factor}.weight" for factor in factors)
        return {name: array + np.float32(by * name.endswith(ends)) for name, array in last.items()}

    def cache(self, ref: BlobRef) -> None:
        (self.home.cache / ref.sha256.hex()).write_bytes(self.server.blobs[ref.sha256])

    def state(self) -> set[tuple[str, bytes]]:
        files = (path for path in self.home.root.rglob("*") if path.is_file())
        return {(path.name, path.read_bytes()) for path in files if "journal" not in path.name}


@pytest.fixture
def make_member(tmp_path: Path, server_key, make_manifest, make_release):
    journals = []

    def make(sent: tuple[Factor, ...] = (Factor.A, Factor.B), **changes) -> Member:
        lora = LoraBlock(
            rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"), sent=sent, init_seed=7
        )
        layout = sent_layout(adapter_shapes(BASE, lora), sent)
        manifest = make_manifest(base=BASE.base, lora=lora, layout=layout.digest(), **changes)
        home = AgentHome(tmp_path / "home")
        home.create()
        journal = Journal(home.journal_path)
        journals.append(journal)
        federation = sign(server_key, "federation", manifest).signed
        journal.join(url="https://h", federation=federation, data="x", now=1.0)
        member = Member(home, journal, FakeTransport(), manifest, make_release, server_key)
        member.publish(initial_adapter(BASE, lora))
        return member

    yield make
    for journal in journals:
        journal.close()


@pytest.fixture
def member(make_member) -> Member:
    return make_member()


def get(member: Member, transport: object = ...):
    transport = member.server if transport is ... else transport
    return newest_release(member.home, member.journal, transport)


def test_the_newest_release_is_had_over_several_pages_and_written_as_a_peft_folder(
    member: Member, tmp_path: Path
) -> None:
    for _ in range(5):
        member.publish(member.moved(0.1))
    newest = get(member)
    assert (newest.release.number, newest.note) == (5, "")
    newest.write(tmp_path / "adapter")
    for name, array in read_folder(tmp_path / "adapter").items():
        np.testing.assert_array_equal(array, member.arrays[5][name])
    told = read_provenance(tmp_path / "adapter")
    assert told is not None
    assert told.release_digest == newest.release.digest()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "made/up"


def test_home_and_journal_stay_as_they_are_while_an_agent_works_there(member: Member) -> None:
    member.publish(member.moved(0.1))
    lock = member.home.lock()
    before = member.state()
    assert get(member).release.number == 1
    assert member.state() == before
    assert member.journal.newest_release() is None
    lock.release()


@pytest.mark.parametrize("sent", [(Factor.A, Factor.B), (Factor.B,)], ids=["A-and-B", "B"])
def test_without_the_server_the_newest_that_was_verified_is_used_from_the_cache(
    make_member, sent
) -> None:
    member = make_member(sent)
    for _ in range(2):
        member.publish(member.moved(0.1, sent))
    first, newest = member.server.releases_made[0].body, member.server.releases_made[1].body
    for signed in member.server.releases_made[:2]:
        member.journal.add_release(signed.body.number, signed)
    member.cache(first.adapter)
    member.cache(newest.sent)
    member.server.down = UnreachableError("no answer")
    for transport, note in ((member.server, "cannot be asked"), (None, "was not asked")):
        found = get(member, transport)
        assert found.release == newest
        assert note in found.note
        assert sha256(found.weights) == newest.adapter.sha256
    assert not [asked for asked in member.server.asked if asked.startswith("blob")]


def test_with_nothing_at_hand_and_no_server_there_is_one_sentence(member: Member) -> None:
    with pytest.raises(JournalError, match="no release has been seen yet"):
        get(member, None)
    member.server.down = UnreachableError("no answer")
    with pytest.raises(UnreachableError, match="no answer"):
        get(member)
    signed = member.server.releases_made[0]
    member.journal.add_release(0, signed)
    with pytest.raises(TransportError, match="release 0 is not in the cache"):
        get(member, None)


def test_a_damaged_cache_is_not_used(member: Member) -> None:
    member.publish(member.moved(0.1))
    ref = member.server.releases_made[1].body.adapter
    (member.home.cache / ref.sha256.hex()).write_bytes(b"damaged")
    assert sha256(get(member).weights) == ref.sha256


def test_who_has_left_contacts_nobody(member: Member, clock) -> None:
    transport = connect(member.home, joined(member.journal), clock=clock, patience_s=0.0)
    assert transport is not None
    transport.close()
    member.journal.leave(2.0)
    assert connect(member.home, joined(member.journal), clock=clock, patience_s=0.0) is None


def test_nothing_was_joined(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    with pytest.raises(JournalError, match="sheepfold-agent join"):
        joined(journal)
    journal.close()


# A server that lies


def test_attack_a_broken_chain_is_refused(member: Member) -> None:
    member.publish(member.moved(0.1))
    member.publish(member.moved(0.1))
    del member.server.releases_made[1]
    with pytest.raises(TrustError, match="chain of releases is broken"):
        get(member)


def test_attack_a_release_that_is_spoken_of_but_not_shown_is_refused(member: Member) -> None:
    member.publish(member.moved(0.1))
    member.server.page_size = 0
    with pytest.raises(TrustError, match="does not show it"):
        get(member)


def test_attack_a_changed_frozen_factor_is_refused(make_member) -> None:
    member = make_member((Factor.B,))
    member.publish(member.moved(0.1))  # A too
    with pytest.raises(TrustError, match="which the manifest freezes"):
        get(member)


def test_attack_another_layout_is_refused(member: Member) -> None:
    arrays = {name: np.concatenate([array, array]) for name, array in member.arrays[0].items()}
    member.publish(arrays)
    with pytest.raises(TrustError, match="another layout"):
        get(member)


def test_attack_an_adapter_that_moved_too_far_is_refused(make_member) -> None:
    member = make_member(change_limits=ChangeLimitsBlock(max_tensor_change_norm=1.0))
    member.publish(member.moved(10.0))
    with pytest.raises(TrustError, match="above the limit"):
        get(member)


def test_attack_a_release_without_an_adapter_is_refused(member: Member) -> None:
    data = b"junk"
    ref = BlobRef(sha256=sha256(data), n_bytes=len(data))
    member.server.blobs[ref.sha256] = data
    member.publish(member.moved(0.1), adapter=ref)
    with pytest.raises(TrustError, match="release 1 holds no adapter"):
        get(member)
