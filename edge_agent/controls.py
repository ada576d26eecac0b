"""SCAFFOLD's c_i in the agent's home: kept back until the chain says that its round counted it.

Server and agent must renew c and c_i together, or c is no longer the agents' mean. An agent writes
its next c_i beside the finished update, and takes it over once a release names its update among
those that counted; a round that failed, or a filter that left it out, leaves c_i as it was. The
release is signed and in the verified chain, so nothing else needs to be remembered.
"""

from dataclasses import replace
from typing import Final

import numpy as np

from edge_agent.durable import write_durably
from edge_agent.errors import JournalError
from edge_agent.following import ReleaseFollower
from edge_agent.home import AgentHome
from edge_agent.journal import Journal, Part
from edge_agent.training.control_variates import ControlVariates
from privacy.updates import Float32Array, PlainUpdate
from protocol.messages import transcript_of_one
from quant.adapter import AdapterArrays, flatten, unflatten, vector_from_bytes, vector_to_bytes
from quant.errors import AdapterError

_ROOM: Final = "free some space, and start again"


class OwnControl:
    """The agent's control variate.

    Guarantees:
        1. A next c_i is taken over exactly where a verified release counts its update, and once,
           whenever the process is killed.
        2. What is sent is the difference to the c_i that the training was corrected with.

    Args:
        home: Where it is kept.
        journal: Knows the parts and the verified chain.
        releases: Give the federation's c.
    """

    def __init__(self, *, home: AgentHome, journal: Journal, releases: ReleaseFollower) -> None:
        """Nothing is read yet."""
        self._home = home
        self._journal = journal
        self._releases = releases
        self._tensors = releases.layout.tensors

    def begin(self, part: Part) -> ControlVariates:
        """What corrects the training of a part.

        Args:
            part: About to be trained; its release is the newest of the chain.

        Raises:
            JournalError: The file is damaged, or cannot be taken over.
            TrustError: The release's c is not what was signed.
            TransportError: It cannot be fetched.
        """
        self._settle(part.round)
        return ControlVariates(
            own=unflatten(self._own(), self._tensors), everyone=self._releases.control()
        )

    def keep(self, part: Part, update: PlainUpdate, renewed: AdapterArrays) -> PlainUpdate:
        """Keep the next c_i until its round is over.

        Args:
            part: The part that was trained.
            update: Its update.
            renewed: The next c_i.

        Returns:
            The update with Δc_i.

        Raises:
            JournalError: It cannot be written.
        """
        control = flatten(renewed, self._tensors)
        path = self._home.next_control(part.round, part.attempt)
        try:
            write_durably(path, vector_to_bytes(control))
        except OSError as error:
            msg = f"cannot keep the control variate at {path}: {error}; {_ROOM}"
            raise JournalError(msg) from error
        return replace(update, control=control - self._own())

    def _settle(self, round_number: int) -> None:
        """Take over what earlier rounds counted, and drop the rest."""
        for number, attempt, path in self._home.next_controls():
            if number >= round_number:
                continue
            part = self._journal.part(number, attempt)
            try:
                if part is not None and self._counted(part):
                    path.replace(self._home.control)
                else:
                    path.unlink()
            except OSError as error:
                msg = f"cannot renew the control variate in {self._home.root}: {error}; {_ROOM}"
                raise JournalError(msg) from error

    def _counted(self, part: Part) -> bool:
        if part.header is None:
            return False
        transcript = transcript_of_one(part.header)
        release = self._journal.newest_release()
        while release is not None and release.round >= part.round:
            if release.round_digest == part.manifest.body.digest():
                return any(cell.transcript == transcript for cell in release.accepted)
            release = self._journal.release(release.number - 1) if release.number else None
        return False

    def _own(self) -> Float32Array:
        try:
            data = self._home.control.read_bytes()
        except FileNotFoundError:
            return np.zeros(self._tensors.n_values, np.float32)
        except OSError as error:
            msg = f"cannot read the control variate {self._home.control}: {error}"
            raise JournalError(msg) from error
        try:
            return vector_from_bytes(data, self._tensors)
        except AdapterError as error:
            msg = f"the control variate {self._home.control} is damaged: {error}; restore the home"
            raise JournalError(msg) from error
