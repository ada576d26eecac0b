"""What an agent checks by itself (PROTOCOL): one code, number and plain sentence for each check.

A check that fails ends the attempt: it is logged, shown to the owner, and nothing secret is sent.
Checks 8, 13 and 16 have no code: they hold by construction. Keys are drawn anew for each attempt
and erased at its end; what is revealed follows from two disjoint sets, once; and no message has a
field for a figure of the data.
"""

from enum import StrEnum
from typing import Final

from protocol.errors import ProtocolError


class Check(StrEnum):
    """A check by its code."""

    FOREIGN_SIGNATURE = "foreign-signature"
    BROKEN_CHAIN = "broken-chain"
    UNGATED = "ungated"
    STALE_MANIFEST = "stale-manifest"
    OTHER_ADAPTER = "other-adapter"
    OTHER_BASE = "other-base"
    OTHER_LAYOUT = "other-layout"
    SMALL_CELL = "small-cell"
    LARGE_CELL = "large-cell"
    WRONG_THRESHOLD = "wrong-threshold"
    WRONG_ASSIGNMENT = "wrong-assignment"
    FOREIGN_ENTRY = "foreign-entry"
    BAD_CREDENTIAL = "bad-credential"
    EDITED_ENTRY = "edited-entry"
    DUPLICATE_MEMBER = "duplicate-member"
    WEAK_KEY = "weak-key"
    EXPIRED_READY = "expired-ready"
    TOO_FEW_FRIENDS = "too-few-friends"
    SPENT_READY = "spent-ready"
    KEY_REUSE = "key-reuse"
    BAD_BUNDLE = "bad-bundle"
    BAD_SURVIVORS = "bad-survivors"
    TWO_SURVIVORS = "two-survivors"
    UNCONFIRMED = "unconfirmed"
    CONSUMED = "consumed"
    NO_RETRY = "no-retry"
    OUT_OF_RANGE = "out-of-range"
    NOT_FINITE = "not-finite"
    BROKEN_ADAPTER = "broken-adapter"
    MOVED_TOO_FAR = "moved-too-far"
    UNMOVED = "unmoved"

    @property
    def number(self) -> int:
        """Its number in PROTOCOL's list, 1 to 18."""
        return _TABLE[self][0]

    @property
    def code(self) -> str:
        """Number and code as the owner reads them: `[check 4, wrong-threshold]`."""
        return f"[check {self.number}, {self.value}]"

    @property
    def sentence(self) -> str:
        """For the owner."""
        return _TABLE[self][1]


_TABLE: Final[dict[Check, tuple[int, str]]] = {
    Check.FOREIGN_SIGNATURE: (1, "A document is not signed by the key that you pinned."),
    Check.BROKEN_CHAIN: (1, "The server's releases do not follow one another."),
    Check.UNGATED: (1, "A release lacks the word of the evaluator that you were promised."),
    Check.STALE_MANIFEST: (1, "The server offers a round that is over, or not of this chain."),
    Check.OTHER_ADAPTER: (2, "The adapter is not the one that was signed."),
    Check.OTHER_BASE: (2, "The base model is not the one that you accepted."),
    Check.OTHER_LAYOUT: (2, "The server wants other numbers than those you accepted."),
    Check.SMALL_CELL: (3, "Too few agents would hide your update."),
    Check.LARGE_CELL: (3, "The cell is larger than the manifest allows, so sums could wrap."),
    Check.WRONG_THRESHOLD: (4, "The server lowers how many must agree before a mask is removed."),
    Check.WRONG_ASSIGNMENT: (4, "The server put you into a cell that the draw does not give."),
    Check.FOREIGN_ENTRY: (5, "A member of your cell did not sign what the server says of it."),
    Check.BAD_CREDENTIAL: (5, "A member of your cell has no valid credential."),
    Check.EDITED_ENTRY: (5, "The server changed your own message."),
    Check.DUPLICATE_MEMBER: (5, "A member or key stands in your cell twice."),
    Check.WEAK_KEY: (5, "A member's key is one that anybody could use."),
    Check.EXPIRED_READY: (5, "A member's message had expired when the cell was formed."),
    Check.TOO_FEW_FRIENDS: (6, "Too few of the members that you trust are in your cell."),
    Check.SPENT_READY: (7, "The server uses your message for a second cell."),
    Check.KEY_REUSE: (9, "One key is used for sealing and for masking."),
    Check.BAD_BUNDLE: (10, "The shares of your cell are not what its members signed."),
    Check.BAD_SURVIVORS: (11, "The list of survivors is not one that your cell can have."),
    Check.TWO_SURVIVORS: (11, "The server shows a second list of survivors."),
    Check.UNCONFIRMED: (12, "Too few members confirm the list of survivors that you confirmed."),
    Check.CONSUMED: (14, "Your update already counts; it is in no second sum."),
    Check.NO_RETRY: (14, "Nothing allows your update to be tried again."),
    Check.OUT_OF_RANGE: (15, "Your update does not fit the agreed range."),
    Check.NOT_FINITE: (15, "Your update has values that are not finite."),
    Check.BROKEN_ADAPTER: (17, "The received adapter is none, or has values that are not finite."),
    Check.MOVED_TOO_FAR: (17, "The received adapter moved further than you accepted."),
    Check.UNMOVED: (18, "Training changed nothing, which is a fault: nothing is sent."),
}


class CheckError(ProtocolError):
    """A check of PROTOCOL's list failed: `check` says which, the message says what was found."""

    def __init__(self, check: Check, found: str) -> None:
        """Name the check and what was found."""
        super().__init__(f"{check.sentence} {found} {check.code}")
        self.check = check
        self.found = found
