"""What an agent should do now: a pure answer from what the store knows of it."""

from typing import Final

from aggregator_server.store.rounds import TERMINAL
from aggregator_server.store.rows import AgentView
from protocol.chain import RoundManifest
from protocol.messages import TaskReply, TrainTask, WaitReason, WaitTask
from protocol.phases import RoundPhase
from protocol.signing import Signed
from protocol.wire import parse

RETRY_AFTER_S: Final = 1.0
FINISHED_RETRY_S: Final = 60.0


def task_reply(view: AgentView, *, after: int, n_rounds: int, has_space: bool) -> TaskReply:
    """The answer to a poll.

    | Situation | Task |
    | --- | --- |
    | the federation is finished | wait `finished` |
    | the open round has a place for the agent, above `after`, no update yet | train |
    | the open round has its update, or the agent is done with it (`after`) | wait `round-ending` |
    | the open round has no place for the agent | wait `not-selected`, or `set-aside` |
    | a round is being averaged | wait `round-ending` |
    | no round is open | wait `gathering-agents`, or `no-space` |

    Args:
        view: What the store knows.
        after: The last round that the agent is done with; no task of it or before is given.
        n_rounds: Rounds of the federation.
        has_space: Whether there is space for updates.
    """
    task = _task(view, after=after, n_rounds=n_rounds, has_space=has_space)
    return TaskReply(task=task, newest_release=view.newest_release)


def _task(view: AgentView, *, after: int, n_rounds: int, has_space: bool) -> TrainTask | WaitTask:
    row = view.round
    if view.n_releases_of_rounds >= n_rounds:
        return _wait(WaitReason.FINISHED, FINISHED_RETRY_S)
    if row is None or row.phase in TERMINAL:
        return _wait(WaitReason.GATHERING_AGENTS if has_space else WaitReason.NO_SPACE)
    if row.phase is not RoundPhase.OPEN or view.accepted:
        return _wait(WaitReason.ROUND_ENDING)
    if not view.selected:
        return _wait(WaitReason.SET_ASIDE if view.quarantined else WaitReason.NOT_SELECTED)
    if row.number <= after:
        return _wait(WaitReason.ROUND_ENDING)
    return TrainTask(round=parse(Signed[RoundManifest], row.manifest))


def _wait(reason: WaitReason, retry_after_s: float = RETRY_AFTER_S) -> WaitTask:
    return WaitTask(reason=reason, retry_after_s=retry_after_s)
