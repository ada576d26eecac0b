"""Caps in bytes, counts and seconds, stated once for agent and server.

They bound what either side reads before it has checked a signature, so a peer can never make the
other allocate more than these.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

MAX_JSON_BYTES: Final = 1 * MIB
"""Largest JSON body of a request or a reply (a manifest of 1,000 tensors has about 200 kB)."""

MAX_HELPER_REQUEST_BYTES: Final = 64 * MIB
"""Largest request to a helper: some 20,000 agents, each with a header and a sealed seed."""

PART_BYTES: Final = 4 * MIB
"""Size of each numbered part of an upload; only the last one may be shorter."""

MAX_UPDATE_BYTES: Final = 2 * GIB
"""Largest update: 512 M float32 values, 25 times a rank-8 adapter of a 7B model."""

MAX_PARTS: Final = MAX_UPDATE_BYTES // PART_BYTES

MAX_TENSORS: Final = 20_000
MAX_TENSOR_VALUES: Final = 2**31 - 1
MAX_TENSOR_NAME_CHARS: Final = 256
MAX_TARGET_MODULES: Final = 64
MAX_TEXT_CHARS: Final = 2_000
"""Longest free text in a manifest (a description, a reason)."""

MAX_COUNT: Final = 2**53 - 1
"""Largest integer of canonical JSON."""

MAX_ROUNDS: Final = 100_000
MAX_COHORT: Final = 100_000
MAX_WEIGHT: Final = 1_000_000
"""Largest cap on an agent's FedAvg weight."""

MIN_CELL: Final = 5
"""Fewest members of a masked cell: below that a sum hides too little."""

MAX_CELL: Final = 64
"""Most members of a masked cell: what each is sent grows with the square of their number."""

MAX_WAVE: Final = 10_000
"""Agents of a READY LIST: every one of them is sent the whole of it."""

MAX_READY_ATTEMPTS: Final = 9
"""READY messages of an agent in a round: one digit, so that all have one size."""

MAX_RELEASES_PER_REPLY: Final = 100

# The evaluator's gate
MAX_CANDIDATES: Final = 8
"""Adapters that an evaluator is asked about at once."""
MAX_CATEGORIES: Final = 32
MAX_CATEGORY_CHARS: Final = 64

LONG_POLL_S: Final = 20.0
"""Longest time the server holds a poll before it answers `wait`."""

SIGNATURE_WINDOW_S: Final = 300
"""A transport signature older than this, or ahead of the server's clock, is refused as stale."""

NONCE_BYTES: Final = 16
INVITE_CODE_BYTES: Final = 16
"""128 bits: the least that an invite may have."""

CREDENTIAL_LIFETIME_S: Final = 365 * 24 * 3600

# Differential privacy
MAX_EPSILON: Final = 500.0
"""Above it a bound says nothing that anyone could use."""
MAX_DELTA: Final = 1e-3
