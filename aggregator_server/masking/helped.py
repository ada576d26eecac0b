"""A round under helper masks: the uploads are complete, the helper knows their masks' sums."""

from collections.abc import Sequence

import numpy as np
import structlog

from aggregator_server.blobs import Blobs
from aggregator_server.charter import Charter, MaskedTerms
from aggregator_server.errors import HelperError
from aggregator_server.helper.client import HelperClient
from aggregator_server.masking.vectors import PartReader, put_sum
from aggregator_server.store.rows import CellRow, RoundRow, UploadRow
from aggregator_server.store.store import Store
from aggregator_server.unmask import Unmasker
from aggregator_server.uploads import stored_parts
from privacy.errors import SumError
from privacy.fixed_point import N_TAIL_WORDS, checked_sum
from privacy.secagg import cells
from privacy.secagg.derive import check_words, survivors_hash
from protocol.blocks import HelperMasking
from protocol.chain import RoundManifest
from protocol.errors import SignatureError
from protocol.helped import HelperAnswer, HelperRequest, HelperUpload, MaskSum
from protocol.masked import Entries, ReadyList, entries_json
from protocol.phases import CellPhase
from protocol.signing import Signed, sign, verify
from protocol.wire import b64u_encode, canonical_json, domain_hash, parse

_log = structlog.get_logger(__name__)


class HelpedRounds:
    """Closes rounds with the helper's answer.

    Guarantees:
        1. The same request is made after a restart: all of it follows from what is journalled.
        2. A sum is published only when the helper's signature holds and the check words add up.

    Args:
        store: Where uploads and cells are.
        blobs: Where vectors and sums are.
        charter: The federation's.
        terms: How it masks.
        masking: The manifest's block.
        client: To the helper.
    """

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        charter: Charter,
        terms: MaskedTerms,
        masking: HelperMasking,
        client: HelperClient,
    ) -> None:
        """Keep nothing in memory."""
        self._store = store
        self._blobs = blobs
        self._charter = charter
        self._turns = terms.turns
        self._masking = masking
        self._client = client

    def close(self, row: RoundRow, signed_manifest: Signed[RoundManifest]) -> int:
        """Ask the helper, take the masks off, journal the sums.

        Returns:
            How many cells gave a sum.

        Raises:
            HelperError: The helper cannot be reached, or refuses; nothing was journalled.
            BlobError: A vector or sum cannot be read or written now.
        """
        manifest = signed_manifest.body
        uploads = self._store.uploads.accepted(row.number)
        by_agent = {upload.agent: upload for upload in uploads}
        messages = {agent: parse(HelperUpload, upload.header) for agent, upload in by_agent.items()}
        listed = ReadyList(
            federation=manifest.federation,
            round=manifest.round,
            round_digest=manifest.digest(),
            wave=1,
            entries=tuple(
                (agent, messages[agent].header.body.digest()) for agent in sorted(messages)
            ),
        )
        request = HelperRequest(
            federation=self._charter.signed,
            round=signed_manifest,
            uploads_list=listed,
            uploads=tuple(messages[agent] for agent in sorted(messages)),
        )
        answer = self._ask(request)
        drawn = cells.assign(listed, self._masking.cell_target)
        entries = dict(listed.entries)
        found = []
        for item in answer.sums:
            members = tuple(identity for identity, _ in item.members)
            if (
                item.cell >= len(drawn)
                or not set(members) <= set(drawn[item.cell])
                or any(entries[identity] != digest for identity, digest in item.members)
            ):
                msg = "the helper's answer names other members than the round's cells have"
                raise HelperError(msg)
            cell = self._unmask(item, manifest, [by_agent[member] for member in members], listed)
            if cell is not None:
                found.append(cell)
        self._store.cells.add_sums(row.number, found)
        return len(found)

    def _ask(self, request: HelperRequest) -> HelperAnswer:
        signed = self._client.ask(sign(self._charter.keys.server, "helper-request", request).signed)
        try:
            verify(signed, "helper-answer", key=self._masking.helper)
        except SignatureError as error:
            msg = f"the answer is not the pinned helper's: {error}"
            raise HelperError(msg) from error
        if signed.body.request != request.digest():
            msg = "the helper answers another request"
            raise HelperError(msg)
        return signed.body

    def _unmask(
        self,
        item: MaskSum,
        manifest: RoundManifest,
        uploads: Sequence[UploadRow],
        listed: ReadyList,
    ) -> CellRow | None:
        plan = self._turns.plan_at(manifest.release)
        vectors = tuple(stored_parts(self._store, upload) for upload in uploads)
        words = Unmasker().unmask(
            PartReader(blobs=self._blobs, vectors=vectors),
            (),
            n_words=plan.n_words,
            word_bits=plan.word_bits,
        )
        words -= np.frombuffer(self._client.fetch(item.words), plan.dtype)
        checks = check_words(manifest.digest(), word_bits=plan.word_bits)
        try:
            payload = checked_sum(words, checks, plan, n_members=len(uploads))
        except SumError as error:
            _log.warning("a cell is lost", round=manifest.round, cell=item.cell, error=str(error))
            return None
        transcript = helped_transcript(listed, item.cell)
        entries: Entries = item.members
        return CellRow(
            transcript=transcript,
            round=manifest.round,
            phase=CellPhase.UNMASKED,
            members_digest=survivors_hash(entries),
            members=canonical_json(entries_json(entries)).decode("ascii"),
            upload=None,
            n_members=len(entries),
            weight_sum=int(payload[-N_TAIL_WORDS]),
            sum_sha256=put_sum(self._blobs, transcript, payload),
        )


def helped_transcript(listed: ReadyList, cell: int) -> bytes:
    """What stands for T in a release: H("helped-cell", list digest, cell)."""
    return domain_hash("helped-cell", b64u_encode(listed.digest()), cell)
