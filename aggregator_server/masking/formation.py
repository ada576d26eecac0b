"""From READY messages to a signed list and signed rosters: pure, and repeated by every agent."""

from collections.abc import Sequence
from dataclasses import dataclass

from aggregator_server.store.rows import CellMemberRow, MaskedCellRow, ReadyRow, WaveRow
from privacy.secagg import cells
from protocol.blocks import CellMasking
from protocol.chain import RoundManifest
from protocol.masked import Ready, ReadyList, Roster
from protocol.phases import CellPhase
from protocol.signing import Signed, Signer, sign
from protocol.wire import parse


@dataclass(frozen=True, kw_only=True)
class Formation:
    """A list with its cells, as it is journalled."""

    wave: WaveRow
    cells: tuple[MaskedCellRow, ...]
    members: tuple[CellMemberRow, ...]


def form_cells(
    readies: Sequence[ReadyRow],
    *,
    wave: int,
    manifest: RoundManifest,
    masking: CellMasking,
    signer: Signer,
    now: float,
) -> Formation:
    """Cut ready agents into cells (PROTOCOL, "Cells").

    Args:
        readies: At least `min_cell`, of distinct agents, whose checks have run.
        wave: The list's number.
        manifest: The round.
        masking: The federation's block.
        signer: The server.
        now: Seconds since the Unix epoch.
    """
    by_agent = {row.agent: row for row in readies}
    signed = {row.agent: parse(Signed[Ready], row.message) for row in readies}
    ready_list = ReadyList(
        federation=manifest.federation,
        round=manifest.round,
        round_digest=manifest.digest(),
        wave=wave,
        entries=tuple((agent, by_agent[agent].digest) for agent in sorted(by_agent)),
    )
    rows, members = [], []
    for number, identities in enumerate(cells.assign(ready_list, masking.cell_target)):
        colluders = cells.colluders(len(identities), wanted=masking.colluders)
        roster = Roster(
            federation=manifest.federation,
            round=manifest.round,
            round_digest=manifest.digest(),
            list_digest=ready_list.digest(),
            cell=number,
            formed_at=int(now),
            members=tuple(signed[agent] for agent in identities),
            threshold=cells.threshold(len(identities), colluders),
            colluders=colluders,
        )
        transcript = roster.transcript()
        rows.append(
            MaskedCellRow(
                transcript=transcript,
                round=manifest.round,
                wave=wave,
                number=number,
                phase=CellPhase.SHARING,
                roster=sign(signer, "roster", roster).signed.canonical(),
                stage_at=now,
                shared=None,
                survivors=None,
                failed=None,
                retried=False,
            )
        )
        members += [
            CellMemberRow(
                transcript=transcript,
                agent=agent,
                round=manifest.round,
                attempt=by_agent[agent].attempt,
            )
            for agent in identities
        ]
    message = sign(signer, "ready-list", ready_list).signed.canonical()
    return Formation(
        wave=WaveRow(round=manifest.round, number=wave, message=message),
        cells=tuple(rows),
        members=tuple(members),
    )
