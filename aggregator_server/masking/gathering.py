"""Waves of cells: when ready agents are cut into cells, and when a failed cell tries again."""

from collections import Counter
from collections.abc import Collection
from typing import Final

import structlog

from aggregator_server.charter import Charter
from aggregator_server.masking.cells import Cells
from aggregator_server.masking.formation import form_cells
from aggregator_server.store.cells import OVER
from aggregator_server.store.rows import MaskedCellRow, ReadyRow, RoundRow
from aggregator_server.store.store import Store
from protocol.blocks import CellMasking
from protocol.chain import RoundManifest
from protocol.clock import Clock
from protocol.masked import Failed, Ready
from protocol.phases import CellPhase
from protocol.signing import Signed
from protocol.wire import parse

FIRST_WAVE: Final = 1
_log = structlog.get_logger(__name__)


class Waves:
    """Cuts ready agents into cells: the first wave of a round, and second tries of failed cells.

    Guarantees:
        1. A cell that failed is tried again once at most, with its own members less the blamed and
           those whose update counts already.

    Args:
        store: Where READY messages and cells are.
        charter: The federation's.
        masking: The manifest's block.
        cells: At work.
        clock: Time.
        presence_s: For how long an agent that was seen counts as present.
    """

    def __init__(
        self,
        *,
        store: Store,
        charter: Charter,
        masking: CellMasking,
        cells: Cells,
        clock: Clock,
        presence_s: float,
    ) -> None:
        """Keep nothing in memory."""
        self._store = store
        self._charter = charter
        self._masking = masking
        self._cells = cells
        self._clock = clock
        self._presence_s = presence_s

    def waiting(self, row: RoundRow) -> tuple[ReadyRow, ...]:
        """The READY messages of present agents that wait for a cell, fit to be in one.

        One that has expired, or shows a key that another one shows too, would make every other
        member refuse its cell.
        """
        now = self._clock.now()
        rows = self._store.readies.waiting(row.number, seen_after=now - self._presence_s)
        readies = {found.agent: parse(Signed[Ready], found.message).body for found in rows}
        n_shown = Counter(
            key for ready in readies.values() for key in (ready.sealing_key, ready.masking_key)
        )
        return tuple(
            found
            for found in rows
            if readies[found.agent].expires_at > now
            and readies[found.agent].credential.body.expires_at > now
            and n_shown[readies[found.agent].sealing_key] == 1
            and n_shown[readies[found.agent].masking_key] == 1
        )

    def form(
        self,
        manifest: RoundManifest,
        readies: Collection[ReadyRow],
        *,
        wave: int,
        retry_of: bytes | None = None,
    ) -> None:
        """Journal a list of ready agents with its cells.

        Raises:
            StaleWriteError: One of them has sent another READY, or the round has moved on.
        """
        formation = form_cells(
            tuple(readies),
            wave=wave,
            manifest=manifest,
            masking=self._masking,
            signer=self._charter.keys.server,
            now=self._clock.now(),
        )
        self._store.readies.form(
            formation.wave, formation.cells, formation.members, retry_of=retry_of
        )
        _log.info(
            "cells formed",
            round=manifest.round,
            wave=wave,
            n_agents=len(readies),
            n_cells=len(formation.cells),
        )

    def advance(self, row: RoundRow, manifest: RoundManifest) -> bool:
        """Move every cell of a round on, and take up failed ones.

        Returns:
            Whether all of them are over for good.

        Raises:
            StaleWriteError: A message came meanwhile, or the round has ended; look again.
        """
        for cell in self._store.cells.of_round(row.number):
            self._advance_cell(cell)
        rows = self._store.cells.of_round(row.number)
        for cell in rows:
            if cell.phase is CellPhase.FAILED and not cell.retried:
                self._try_again(row, manifest, cell)
        rows = self._store.cells.of_round(row.number)
        return all(
            cell.phase is CellPhase.UNMASKED or (cell.phase is CellPhase.FAILED and cell.retried)
            for cell in rows
        )

    def _advance_cell(self, cell: MaskedCellRow) -> None:
        while cell.phase not in OVER and self._cells.advance(cell):
            found = self._store.cells.get(cell.transcript)
            if found is None:  # cannot be: cells are never deleted
                return
            cell = found

    def _try_again(self, row: RoundRow, manifest: RoundManifest, cell: MaskedCellRow) -> None:
        blamed = frozenset(
            parse(Signed[Failed], cell.failed).body.blamed if cell.failed is not None else ()
        )
        members = {member.agent for member in self._store.cells.members(cell.transcript)}
        eligible = members - blamed - self._store.cells.confirmers(cell.transcript)
        ready = [found for found in self.waiting(row) if found.agent in eligible]
        late = self._clock.now() >= cell.stage_at + self._masking.stage_s
        if len(eligible) < self._masking.min_cell:
            self._give_up(cell, "too few members are left")
        elif len(ready) == len(eligible) or late:
            if len(ready) < self._masking.min_cell:
                self._give_up(cell, "too few members came back")
                return
            wave = self._store.readies.n_waves(row.number) + 1
            self.form(manifest, ready, wave=wave, retry_of=cell.transcript)

    def _give_up(self, cell: MaskedCellRow, reason: str) -> None:
        self._store.cells.give_up(cell.transcript)
        _log.warning("a failed cell is lost", round=cell.round, cell=cell.number, reason=reason)
