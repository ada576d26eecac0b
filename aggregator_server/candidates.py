"""Candidates: what a round would publish, made and stored before anyone judges it."""

from collections.abc import Collection

from aggregator_server.aggregation.fedavg import apply_mean
from aggregator_server.blobs import Blobs
from aggregator_server.charter import Charter
from aggregator_server.controls import store_control
from aggregator_server.filtering import FilterDecision
from aggregator_server.merging import Merger
from aggregator_server.releases import (
    AdapterFiles,
    Releases,
    store_adapter,
    store_file,
    with_vector,
)
from aggregator_server.store.rows import RoundRow
from aggregator_server.store.store import Store
from protocol.chain import (
    AggregationReport,
    BlobRef,
    FilterReport,
    NoisyAggregationReport,
    RoundManifest,
)
from protocol.signing import Signed
from protocol.wire import Digest, WireModel, parse


class Candidate(WireModel):
    """An adapter that may become a release; its files are stored."""

    adapter: BlobRef
    sent: BlobRef
    config: BlobRef
    optimizer_state: BlobRef | None
    control: BlobRef | None = None
    control_book: BlobRef | None = None
    accepted: tuple[Digest, ...]
    """Transcripts of the cells that are in it."""
    aggregation: AggregationReport | NoisyAggregationReport
    filter: FilterReport
    left_out: tuple[Digest, ...]
    """Transcripts of the cells that it does without, to please the evaluator."""

    @property
    def files(self) -> AdapterFiles:
        """Those that its release would show."""
        return AdapterFiles(
            adapter=self.adapter, sent=self.sent, config=self.config, control=self.control
        )

    @property
    def blobs(self) -> frozenset[bytes]:
        """The digests of all its files."""
        files = (self.adapter, self.sent, self.config, self.control)
        refs = (*files, self.optimizer_state, self.control_book)
        return frozenset(ref.sha256 for ref in refs if ref is not None)


class CandidateMaker:
    """Makes candidates of a round from its stored sums and the filter's decision.

    Args:
        store: Of the federation.
        blobs: Where files go.
        merger: Filters and averages.
        releases: The chain.
        charter: The manifest and what follows from it.
    """

    def __init__(
        self, store: Store, blobs: Blobs, merger: Merger, releases: Releases, charter: Charter
    ) -> None:
        """Take the parts."""
        self._store = store
        self._blobs = blobs
        self._merger = merger
        self._releases = releases
        self._charter = charter

    def make(self, row: RoundRow, *, left_out: Collection[bytes] = ()) -> Candidate:
        """What a round would publish.

        Args:
            row: Its filter has decided.
            left_out: Transcripts of cells to do without; the filter judges the others anew.

        Raises:
            AggregationError: Nothing is left, or a mean that is not finite.
            NoSpaceError: The files do not fit.
        """
        base = self._releases.get(parse(Signed[RoundManifest], row.manifest).body.release)
        cells = self._store.uploads.cells(row.number)
        decision = parse(FilterDecision, row.filter_report or "")
        if left_out:
            decision = self._merger.decide_without(cells, decision, left_out)
        merged = self._merger.merge(cells, decision, base)
        moved = apply_mean(self._releases.vector(base), merged.step)
        layout = self._charter.turns.at(base.number).layout
        arrays = with_vector(self._releases.arrays(base), moved, layout)
        files = store_adapter(self._blobs, self._charter.manifest, arrays, number=base.number + 1)
        state = merged.optimizer_state
        control = book = None
        if merged.control is not None:
            tensors = self._charter.layout.tensors
            control, book = store_control(self._blobs, *merged.control, tensors)
        return Candidate(
            adapter=files.adapter,
            sent=files.sent,
            config=files.config,
            optimizer_state=None if state is None else store_file(self._blobs, state),
            control=control,
            control_book=book,
            accepted=tuple(cell.transcript for cell in decision.cells if cell.removed is None),
            aggregation=merged.report,
            filter=decision.report,
            left_out=tuple(sorted(left_out)),
        )
