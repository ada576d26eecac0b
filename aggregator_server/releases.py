"""Releases: signed, chained, and stored by the digest of their files."""

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aggregator_server.blobs import Blobs
from aggregator_server.charter import Charter
from aggregator_server.errors import ChainError, Refusal
from aggregator_server.store.rows import HIDDEN_ROLES, BlobRole, BlobRow, ReleaseRow, blob_rows
from aggregator_server.store.store import Store
from privacy.updates import Float32Array
from protocol.blocks import FilterRule
from protocol.chain import (
    AggregationReport,
    BlobRef,
    CellRef,
    FilterReport,
    NoisyAggregationReport,
    NoVerdict,
    Release,
    Verdict,
)
from protocol.clock import Clock
from protocol.errors import SignatureError
from protocol.layout import VectorLayout
from protocol.limits import MAX_JSON_BYTES, MAX_RELEASES_PER_REPLY
from protocol.manifest import FederationManifest
from protocol.messages import ReleasePage
from protocol.problems import ProblemType
from protocol.signing import Signed, Signer, sign, verify
from protocol.wire import parse, sha256
from quant.adapter import (
    AdapterArrays,
    factor_of,
    flatten,
    from_safetensors,
    peft_config,
    to_safetensors,
    unflatten,
)
from quant.lora_turns import changed_factors
from quant.model_card import write_release

ADAPTERS: Final = "adapters"
"""Where the files of releases are kept among the blobs."""
_PAGE_BYTES: Final = MAX_JSON_BYTES - 64 * 1024
"""Room for the releases of one reply; the rest is for the reply's own keys."""
_RELEASE_BYTES: Final = 32 * 1024
"""More than a signed release has that names no cell; an evaluator's report is most of it."""
_N_CHECKED_AT_START: Final = 50


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """The files that a release shows, which are already stored."""

    adapter: BlobRef
    sent: BlobRef
    config: BlobRef
    control: BlobRef | None = None

    def rows(self) -> tuple[BlobRow, ...]:
        """As the store keeps them."""
        by_role = {
            BlobRole.ADAPTER: self.adapter,
            BlobRole.SENT: self.sent,
            BlobRole.CONFIG: self.config,
            BlobRole.CONTROL: self.control,
        }
        return blob_rows(by_role)


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What a round hands over to its release."""

    number: int
    digest: bytes
    files: AdapterFiles
    accepted: tuple[CellRef, ...]
    rejected: tuple[CellRef, ...] = ()
    aggregation: AggregationReport | NoisyAggregationReport
    filter: FilterReport
    verdict: Verdict
    optimizer_state: BlobRef | None = None
    """Of the server's optimiser after this round; stored already."""
    control_book: BlobRef | None = None
    """Whose control variates `files.control` is the mean of; stored already."""


class Releases:
    """The chain of releases.

    Guarantees:
        1. The chain is unbroken: each release names its predecessor's digest, numbers grow by one.
        2. The files of a release are durable before the release is journalled.
    """

    def __init__(self, store: Store, blobs: Blobs, charter: Charter, clock: Clock) -> None:
        """Serve the releases that the store knows."""
        self._store = store
        self._blobs = blobs
        self._charter = charter
        self._clock = clock

    def newest(self) -> Release:
        """The newest release.

        Raises:
            ChainError: There is none.
        """
        row = self._store.releases.newest()
        if row is None:
            msg = "the federation has no release"
            raise ChainError(msg)
        return parse_release(row).body

    def get(self, number: int) -> Release:
        """A release by number.

        Raises:
            ChainError: There is no such release.
        """
        row = self._store.releases.get(number)
        if row is None:
            msg = f"there is no release {number}; the newest is {self.newest().number}"
            raise ChainError(msg)
        return parse_release(row).body

    def page(self, *, after: int) -> bytes:
        """The releases after a number, as many as one reply holds.

        Args:
            after: -1 for all.

        Returns:
            Canonical JSON of a `ReleasePage`.
        """
        rows = self._rows(after)
        # Put together from what is stored, which is canonical already: every agent asks for every
        # release, and one that names a thousand cells takes long to read and to write.
        empty = ReleasePage(releases=(), newest=self.newest().number).canonical()
        return empty.replace(b"[]", b"[" + b",".join(row.signed for row in rows) + b"]")

    def all(self, *, after: int = -1) -> Iterable[Signed[Release]]:
        """Every release after a number, oldest first."""
        while rows := self._rows(after):
            yield from (parse_release(row) for row in rows)
            after = rows[-1].number

    def _rows(self, after: int) -> tuple[ReleaseRow, ...]:
        return self._store.releases.page(
            after=after, limit=MAX_RELEASES_PER_REPLY, max_bytes=_PAGE_BYTES
        )

    def vector(self, release: Release) -> Float32Array:
        """What agents of a round start from: [n_values] float32 in the order of the tensors.

        Raises:
            ChainError: The release's file has changed on disk.
            BlobError: It cannot be read.
        """
        layout = self._charter.turns.at(release.number).layout
        return flatten(self.arrays(release), layout.tensors)

    def arrays(self, release: Release) -> AdapterArrays:
        """The whole adapter of a release.

        Raises:
            ChainError: Its file has changed on disk.
            BlobError: It cannot be read.
        """
        data = self.file(release.adapter)
        return from_safetensors(data, self._charter.shapes)

    def file(self, ref: BlobRef) -> bytes:
        """A file of a release.

        Raises:
            ChainError: It has changed on disk.
            BlobError: It cannot be read.
        """
        data = self._blobs.read(blob_key(ref.sha256))
        if sha256(data) != ref.sha256:
            msg = f"file {ref.sha256.hex()} has changed on disk; restore it from a backup"
            raise ChainError(msg)
        return data

    def blob_n_bytes(self, sha: bytes) -> int:
        """The size of a blob that a release names.

        Raises:
            Refusal: No release names it (`not-found`).
        """
        n_bytes = self._store.releases.blob_n_bytes(sha)
        if n_bytes is None:
            raise Refusal(ProblemType.NOT_FOUND, "no release names this blob")
        return n_bytes

    def blob_chunks(self, sha: bytes, start: int, stop: int) -> Iterable[bytes]:
        """Bytes `start` to `stop` of a blob that a release names.

        Raises:
            BlobError: It cannot be read.
        """
        return self._blobs.stream(blob_key(sha), start, stop)

    def publish(self, result: RoundResult) -> Release:
        """Publish what a round made, and end the round, in one step.

        Args:
            result: The round.

        Raises:
            StaleWriteError: The round or the chain has moved on.
        """
        files = result.files
        previous = self.newest()
        release = Release(
            federation=self._charter.manifest.federation,
            number=previous.number + 1,
            round=result.number,
            previous=previous.digest(),
            federation_digest=self._charter.digest,
            round_digest=result.digest,
            adapter=files.adapter,
            sent=files.sent,
            config=files.config,
            control=files.control,
            accepted=result.accepted,
            rejected=result.rejected,
            aggregation=result.aggregation,
            filter=result.filter,
            verdict=result.verdict,
            created_at=self._clock.now(),
        )
        row = sign_release(self._charter.keys.server, release, round_number=result.number)
        hidden = {
            BlobRole.OPTIMIZER: result.optimizer_state,
            BlobRole.CONTROL_BOOK: result.control_book,
        }
        self._store.publish(row, (*files.rows(), *blob_rows(hidden)))
        return release

    def hidden_file(self, number: int, role: BlobRole) -> bytes | None:
        """A file of a release that is shown to nobody; None where it has none.

        Args:
            number: The release.
            role: One of `HIDDEN_ROLES`.

        Raises:
            ChainError: It has changed on disk.
            BlobError: It cannot be read.
        """
        row = self._store.releases.blob_of(number, role)
        if row is None:
            return None
        return self.file(BlobRef(sha256=row.sha256, n_bytes=row.n_bytes))

    def roll_back(self, number: int) -> Release:
        """Publish an older adapter again, as a new release; a round under way fails.

        Args:
            number: The release whose adapter is wanted.

        Raises:
            ChainError: There is no such release.
            StaleWriteError: Another release came in between; nothing was written.
        """
        old = self.get(number)
        previous = self.newest()
        files = AdapterFiles(
            adapter=old.adapter, sent=old.sent, config=old.config, control=old.control
        )
        release = Release(
            federation=self._charter.manifest.federation,
            number=previous.number + 1,
            round=previous.round,
            previous=previous.digest(),
            federation_digest=self._charter.digest,
            round_digest=None,
            adapter=files.adapter,
            sent=files.sent,
            config=files.config,
            control=files.control,
            accepted=(),
            rejected=(),
            aggregation=AggregationReport(rule="none", n_cells=0, n_agents=0, update_norm=0.0),
            filter=FilterReport(rule=FilterRule.NONE, n_cells=0, n_rejected=0),
            verdict=NoVerdict(),
            rolled_back_to=number,
            created_at=self._clock.now(),
        )
        row = sign_release(self._charter.keys.server, release, round_number=None)
        reason = f"the operator rolled back to release {number}"
        hidden = (self._store.releases.blob_of(number, role) for role in sorted(HIDDEN_ROLES))
        rows = (*files.rows(), *(found for found in hidden if found is not None))
        self._store.roll_back(row, rows, reason=reason)
        return release

    def export(self, number: int, folder: Path) -> Release:
        """Write a release as a PEFT folder.

        Raises:
            ChainError: There is no such release, or a file of it has changed on disk.
            BlobError: A file cannot be read.
        """
        release = self.get(number)
        write_release(
            folder,
            manifest=self._charter.manifest,
            release=release,
            weights=self.file(release.adapter),
            config=self.file(release.config),
        )
        return release

    def verify(self) -> int:
        """Check the whole chain.

        Returns:
            The newest number.

        Raises:
            ChainError: It is broken.
        """
        return self._verify(self.all(), None)

    def verify_newest(self) -> int:
        """Check the end of the chain, in a time that does not grow with it.

        Returns:
            The newest number.

        Raises:
            ChainError: It is broken there.
        """
        first = self.newest().number - _N_CHECKED_AT_START
        previous = self.get(first) if first >= 0 else None
        return self._verify(self.all(after=max(first, -1)), previous)

    def _verify(self, releases: Iterable[Signed[Release]], previous: Release | None) -> int:
        return verify_chain(
            releases,
            server=self._charter.keys.server.identity,
            federation_digest=self._charter.digest,
            previous=previous,
        )


def first_release(
    manifest: FederationManifest, files: AdapterFiles, *, created_at: float
) -> Release:
    """Release 0, which no round made."""
    return Release(
        federation=manifest.federation,
        number=0,
        round=0,
        previous=None,
        federation_digest=manifest.digest(),
        round_digest=None,
        adapter=files.adapter,
        sent=files.sent,
        config=files.config,
        accepted=(),
        rejected=(),
        aggregation=AggregationReport(rule="none", n_cells=0, n_agents=0, update_norm=0.0),
        filter=FilterReport(rule=FilterRule.NONE, n_cells=0, n_rejected=0),
        verdict=NoVerdict(),
        created_at=created_at,
    )


def store_adapter(
    blobs: Blobs, manifest: FederationManifest, arrays: AdapterArrays, *, number: int
) -> AdapterFiles:
    """Store an adapter's three files under their digests.

    Args:
        blobs: Where to.
        manifest: Says which factors are sent.
        arrays: The whole adapter.
        number: Of the release: the factors that its round changed are what agents fetch.

    Raises:
        NoSpaceError: They do not fit.
    """
    changed = changed_factors(manifest.lora.rule, number)
    sent = {name: array for name, array in arrays.items() if factor_of(name) in changed}
    return AdapterFiles(
        adapter=store_file(blobs, to_safetensors(arrays)),
        sent=store_file(blobs, to_safetensors(sent)),
        config=store_file(blobs, peft_config(manifest.base, manifest.lora)),
    )


def with_vector(arrays: AdapterArrays, vector: Float32Array, layout: VectorLayout) -> AdapterArrays:
    """The whole adapter with the factors of a round replaced; others stay as they were."""
    return {**arrays, **unflatten(vector, layout.tensors)}


def sign_release(server: Signer, release: Release, *, round_number: int | None) -> ReleaseRow:
    """A release as it is journalled."""
    signed = sign(server, "release", release).signed
    return ReleaseRow(
        number=release.number,
        signed=signed.canonical(),
        digest=release.digest(),
        round=round_number,
    )


def parse_release(row: ReleaseRow) -> Signed[Release]:
    """A journalled release."""
    return parse(Signed[Release], row.signed)


def verify_chain(
    releases: Iterable[Signed[Release]],
    *,
    server: bytes,
    federation_digest: bytes,
    previous: Release | None = None,
) -> int:
    """Check that releases follow one another, from number 0 or from one that is trusted.

    Guarantees:
        1. Returns only when every release is signed by the server, belongs to the federation,
           names the digest of the one before, and is numbered one higher.

    Args:
        releases: Oldest first.
        server: The pinned identity.
        federation_digest: Of the manifest.
        previous: The release before the first one; None when that is number 0.

    Returns:
        The newest number.

    Raises:
        ChainError: The first release that does not follow.
    """
    for signed in releases:
        number = 0 if previous is None else previous.number + 1
        try:
            release = verify(signed, "release", key=server).body
        except SignatureError as error:
            msg = f"release {signed.body.number}: {error}"
            raise ChainError(msg) from error
        if release.number != number:
            msg = f"release {release.number} stands where {number} should"
            raise ChainError(msg)
        if release.federation_digest != federation_digest:
            msg = f"release {number} belongs to another manifest"
            raise ChainError(msg)
        expected = None if previous is None else previous.digest()
        if not _same(release.previous, expected):
            msg = f"release {number} does not name its predecessor's digest"
            raise ChainError(msg)
        if previous is not None and release.round < previous.round:
            msg = f"release {number} is of round {release.round}, before {previous.round}"
            raise ChainError(msg)
        previous = release
    if previous is None:
        msg = "the federation has no release"
        raise ChainError(msg)
    return previous.number


def most_cells() -> int:
    """How many cells a release can name and still go into one reply (`limits.MAX_JSON_BYTES`)."""
    cell = CellRef(transcript=bytes(32), members=bytes(32))
    return (_PAGE_BYTES - _RELEASE_BYTES) // (len(cell.canonical()) + 1)


def blob_key(sha: bytes) -> str:
    """Where a file of a release is kept."""
    return f"{ADAPTERS}/{sha.hex()}"


def _same(found: bytes | None, expected: bytes | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return hmac.compare_digest(found, expected)


def store_file(blobs: Blobs, data: bytes) -> BlobRef:
    """Store a file of a release, or of a candidate for one, under its digest.

    Raises:
        NoSpaceError: It does not fit.
    """
    ref = BlobRef(sha256=sha256(data), n_bytes=len(data))
    blobs.put(blob_key(ref.sha256), data)
    return ref
