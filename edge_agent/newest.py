"""The newest release for its own member's use: no lock, no base model, nothing written down.

A working agent follows the chain for training and keeps what it verified (`following`). Whoever
only wants the adapter, to ask it something or to export it, may do so while that agent works: this
module reads the same journal and cache, asks the server what is newer, and leaves both alone.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.chain import check_change, check_releases
from edge_agent.errors import JournalError, TransportError, TrustError, UnreachableError
from edge_agent.home import AgentHome
from edge_agent.journal import Journal, Membership
from edge_agent.release_parts import parts_of
from edge_agent.transport import Transport
from privacy.fixed_point import agreed_layout
from protocol.blocks import LoraBlock
from protocol.chain import BlobRef, Release
from protocol.checks import Check
from protocol.clock import Clock
from protocol.manifest import FederationManifest
from protocol.wire import sha256
from quant.adapter import (
    AdapterArrays,
    factor_of,
    peft_config,
    read_arrays,
    to_safetensors,
)
from quant.companions import update_layout
from quant.errors import AdapterError
from quant.model_card import write_release


@dataclass(frozen=True, kw_only=True)
class NewestRelease:
    """A verified release with its adapter.

    Attributes:
        manifest: The pinned federation.
        release: The newest that could be had.
        weights: Bytes of its `adapter_model.safetensors`.
        note: Why there may be a newer one, in words for the owner; empty when there is none.
    """

    manifest: FederationManifest
    release: Release
    weights: bytes
    note: str

    def write(self, folder: Path) -> None:
        """Write it as a PEFT folder with provenance and card; made when missing."""
        write_release(
            folder,
            manifest=self.manifest,
            release=self.release,
            weights=self.weights,
            config=peft_config(self.manifest.base, self.manifest.lora),
        )


def joined(journal: Journal) -> Membership:
    """The membership of a home, also one that has ended.

    Raises:
        JournalError: Never joined.
    """
    member = journal.membership()
    if member is None:
        msg = "no federation was joined here; begin with `sheepfold-agent join`"
        raise JournalError(msg)
    return member


def connect(
    home: AgentHome, member: Membership, *, clock: Clock, patience_s: float
) -> Transport | None:
    """Connections to the federation's server; None for who has left, and contacts it no more.

    Args:
        home: Whose key signs.
        member: What was joined.
        clock: Time.
        patience_s: Give up on an unreachable server after this long.
    """
    if member.left_at is not None:
        return None
    transport = Transport(
        member.url, clock=clock, signer=home.load_or_create_signer(), patience_s=patience_s
    )
    transport.use_federation(member.federation.body)
    return transport


def newest_release(home: AgentHome, journal: Journal, transport: Transport | None) -> NewestRelease:
    """The newest release that continues the verified chain, with its adapter.

    Guarantees:
        1. The chain is unbroken and signed from the last release that the journal holds, and the
           bytes are the signed ones.
        2. The adapter has the layout that the owner agreed to, the factors that agents do not send
           are those of release 0, and no tensor moved further from it than the owner accepted.
        3. Home and journal stay as they are, so an agent may be at work there.

    Args:
        home: Whose cache is read.
        journal: Of the home.
        transport: To the server; None: use what is at hand.

    Raises:
        JournalError: Never joined, or no release has been seen and no server is asked.
        TrustError: The server's history or bytes contradict what was signed.
        TransportError: What is not at hand cannot be fetched.
    """
    manifest = joined(journal).federation.body
    first, last = journal.release(0), journal.newest_release()
    note = "" if transport is not None else "the server was not asked for newer releases"
    if transport is not None:
        try:
            first, last = _follow(manifest, journal, transport)
        except UnreachableError as error:
            if last is None:
                raise
            note = f"the server cannot be asked for newer releases: {error}"
    if first is None or last is None:
        msg = "no release has been seen yet; `sheepfold-agent run` fetches the first"
        raise JournalError(msg)
    source = _Source(home=home, journal=journal, lora=manifest.lora, transport=transport)
    weights = source.weights(last)
    _check(manifest, _read(first, source.weights(first)), _read(last, weights), last)
    return NewestRelease(manifest=manifest, release=last, weights=weights, note=note)


def _follow(
    manifest: FederationManifest, journal: Journal, transport: Transport
) -> tuple[Release, Release]:
    first, last = journal.release(0), journal.newest_release()
    seen: dict[int, Release] = {}

    def earlier(number: int) -> Release | None:
        return seen.get(number) or journal.release(number)

    while True:
        page = transport.releases(after=-1 if last is None else last.number)
        verified = check_releases(manifest, last, page.releases, earlier=earlier)
        seen |= {release.number: release for release in verified}
        if verified:
            last = verified[-1]
            first = first or verified[0]
        if first is None or last is None or (not verified and last.number < page.newest):
            msg = f"the server speaks of release {page.newest} but does not show it"
            raise TrustError(msg)
        if last.number >= page.newest:
            return first, last


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where the files of releases come from."""

    home: AgentHome
    journal: Journal
    lora: LoraBlock
    transport: Transport | None

    def weights(self, release: Release) -> bytes:
        """The whole adapter file of a release, from the cache or the server."""
        found = self._cached(release.adapter) or self._composed(release)
        if found is not None:
            return found
        if self.transport is None:
            msg = f"the adapter of release {release.number} is not in the cache of {self.home.root}"
            raise TransportError(msg)
        # Not into the cache: a working agent may be fetching the same file there.
        with tempfile.TemporaryDirectory() as folder:
            return self.transport.fetch(release.adapter, Path(folder)).read_bytes()

    def _cached(self, ref: BlobRef) -> bytes | None:
        try:
            data = (self.home.cache / ref.sha256.hex()).read_bytes()
        except OSError:  # never fetched, or a working agent has just made room
            return None
        return data if sha256(data) == ref.sha256 else None

    def _composed(self, release: Release) -> bytes | None:
        """Put together from what agents keep: what the last rounds changed, and the rest."""
        arrays: AdapterArrays = {}
        try:
            parts = parts_of(release, self.lora, self.journal.release)
        except TrustError:  # newer than what a working agent has seen
            return None
        for ref, _ in parts:
            found = self._cached(ref)
            if found is None:
                return None
            arrays = read_arrays(found) | arrays
        data = to_safetensors(arrays)
        return data if sha256(data) == release.adapter.sha256 else None


def _read(release: Release, weights: bytes) -> AdapterArrays:
    try:
        return read_arrays(weights)
    except AdapterError as error:
        msg = f"release {release.number} holds no adapter: {error}"
        raise TrustError(msg) from error


def _check(
    manifest: FederationManifest, first: AdapterArrays, newest: AdapterArrays, release: Release
) -> None:
    shapes = {name: array.shape for name, array in newest.items()}
    same = shapes == {name: array.shape for name, array in first.items()}
    layout = agreed_layout(
        update_layout(shapes, manifest.lora, manifest.training), manifest.masking, manifest.privacy
    )
    if not same or layout.digest() != manifest.layout:
        msg = f"release {release.number} has another layout than the federation's manifest"
        raise TrustError(msg, Check.OTHER_LAYOUT)
    for name, array in newest.items():
        if factor_of(name) not in manifest.lora.sent and not np.array_equal(array, first[name]):
            msg = f"release {release.number} changes {name}, which the manifest freezes"
            raise TrustError(msg)
    if release.number:
        check_change(
            first,
            newest,
            max_tensor_change_norm=manifest.change_limits.max_tensor_change_norm,
            n_releases=release.number,
        )
