"""From the stored sums of a round's cells to the step of the global adapter.

What is decided (`merge_rules`) depends on the manifest and the stored sums alone, and can be done
again after a kill: the filter's decision is journalled, the optimiser's state belongs to a release.
"""

from collections.abc import Collection, Sequence
from functools import partial

from aggregator_server.blobs import Blobs
from aggregator_server.charter import Charter
from aggregator_server.controls import stored_control
from aggregator_server.errors import AggregationError
from aggregator_server.filtering import FilterDecision
from aggregator_server.masking.vectors import load_sum
from aggregator_server.merge_rules import Merged, MergeRules, RoundSums, Start
from aggregator_server.phase import base_release
from aggregator_server.releases import Releases
from aggregator_server.store.rows import BlobRole, CellRow
from aggregator_server.store.store import Store
from aggregator_server.uploads import Uploads
from privacy.fixed_point import EncodingPlan
from privacy.updates import CellSum
from protocol.chain import NoisyAggregationReport, Release


class Merger:
    """Filters and averages the cells of one federation's rounds, read from where they are stored.

    Guarantees:
        1. All that is random comes from the operating system, and is drawn when it is needed.

    Args:
        store: Of the federation.
        blobs: Where sums lie.
        uploads: Reads plain updates.
        releases: The chain.
        charter: The manifest and what follows from it.
    """

    def __init__(
        self, store: Store, blobs: Blobs, uploads: Uploads, releases: Releases, charter: Charter
    ) -> None:
        """Take the parts; nothing is read yet."""
        self._store = store
        self._blobs = blobs
        self._uploads = uploads
        self._releases = releases
        self._charter = charter
        self._rules = MergeRules(charter.manifest, charter.layout.tensors)

    def decide(self, cells: Sequence[CellRow]) -> FilterDecision:
        """Judge the cells of a round.

        Args:
            cells: All that gave a sum.

        Raises:
            AggregationError: None of them can be used.
        """
        return self._rules.decide(self._of_round(cells))

    def decide_without(
        self, cells: Sequence[CellRow], decision: FilterDecision, left_out: Collection[bytes]
    ) -> FilterDecision:
        """Judge anew those that a decision kept, but for some.

        Args:
            cells: All that gave a sum.
            decision: On these; what it removed stays removed.
            left_out: Transcripts of those that are left out.

        Raises:
            AggregationError: None is left, or none of them can be used.
        """
        return self._rules.decide_without(self._of_round(cells), decision, left_out)

    def merge(self, cells: Sequence[CellRow], decision: FilterDecision, base: Release) -> Merged:
        """The step of a round.

        Args:
            cells: All that gave a sum, in the order of the decision.
            decision: What the filter decided.
            base: The release that the round started from.

        Raises:
            AggregationError: Cells and decision do not match, or a mean that is not finite.
            NoiseError: See `noisy_mean`.
        """
        releases = self._releases
        start = Start(
            vector=partial(releases.vector, base),
            optimizer_state=partial(releases.hidden_file, base.number, BlobRole.OPTIMIZER),
            clip_norm=partial(self._clip_norm, base),
            control=partial(stored_control, releases, base, self._charter.layout.tensors),
        )
        return self._rules.merge(self._sums(cells, base.number), decision, start)

    def _of_round(self, cells: Sequence[CellRow]) -> RoundSums[CellRow]:
        """Of the one round that cells belong to."""
        return self._sums(cells, base_release(self._store, cells[0].round))

    def _sums(self, cells: Sequence[CellRow], release: int) -> RoundSums[CellRow]:
        """Of a round that started from a release."""
        terms = self._charter.turns.at(release)
        return RoundSums(cells=cells, load=partial(self._load, plan=terms.plan), terms=terms)

    def _clip_norm(self, base: Release) -> float | None:
        """Of the round: what the last noisy release says, also behind a rollback; None: none does.

        Profile P3 alone.
        """
        release = base
        while not isinstance(release.aggregation, NoisyAggregationReport):
            if release.number == 0:
                return None
            release = self._releases.get(release.number - 1)
        return release.aggregation.next_clip_norm

    def _load(self, cell: CellRow, *, plan: EncodingPlan | None) -> CellSum:
        if cell.upload is not None:
            return self._uploads.load(self._store.uploads.get(cell.upload))
        if plan is None or cell.sum_sha256 is None:
            msg = f"cell {cell.transcript.hex()[:8]} of round {cell.round} has no sum"
            raise AggregationError(msg)
        return load_sum(self._blobs, cell.transcript, cell.sum_sha256, plan)
