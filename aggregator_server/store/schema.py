"""The tables, for SQLite and PostgreSQL alike.

Three rules stand in the schema itself, so that no fault of the code can break them: a round number
is one row with one digest, an agent has at most one accepted upload in a round, and a cell one
message of each kind from each member.
"""

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

SCHEMA_VERSION: Final = 4
"""Raised with every change that an older program cannot read."""

metadata: Final = MetaData()

meta = Table(
    "meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

agents = Table(
    "agents",
    metadata,
    Column("identity", LargeBinary(32), primary_key=True),
    Column("enrolled_at", Double, nullable=False),
    Column("revoked_at", Double),
    Column("last_seen", Double, nullable=False, index=True),
    Column("credential", LargeBinary, nullable=False),
    Column("barred", Boolean, nullable=False),
    Column("quarantined_at", Double),
    Column("judged_from", Integer, nullable=False),
)

invites = Table(
    "invites",
    metadata,
    Column("id", LargeBinary(32), primary_key=True),
    Column("code", LargeBinary(16)),
    Column("created_at", Double, nullable=False),
    Column("n_uses", Integer, nullable=False),
    Column("uses_left", Integer, nullable=False),
)

invite_uses = Table(
    "invite_uses",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("invite", LargeBinary(32), ForeignKey("invites.id"), nullable=False),
    Column("agent", LargeBinary(32), ForeignKey("agents.identity"), nullable=False),
    Column("used_at", Double, nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("phase", String(16), nullable=False),
    Column("manifest", LargeBinary, nullable=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True),
    Column("failure", Text),
    Column("filter_report", Text),
    Column("passed", Text),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("round", Integer, ForeignKey("rounds.number"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("task", LargeBinary, nullable=False),
    Column("candidates", Text, nullable=False),
    Column("asked_at", Double, nullable=False),
    Column("has_blobs", Boolean, nullable=False),
    Column("report", LargeBinary),
    Column("report_digest", LargeBinary(32)),
)

incidents = Table(
    "incidents",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("at", Double, nullable=False),
    Column("round", Integer),
    Column("kind", String(32), nullable=False),
    Column("text", Text, nullable=False),
)

selections = Table(
    "selections",
    metadata,
    Column("round", Integer, ForeignKey("rounds.number"), primary_key=True),
    Column("agent", LargeBinary(32), ForeignKey("agents.identity"), primary_key=True),
    Column("rank", LargeBinary(32), nullable=False),
    Column("withdrawn_reason", String(64)),
    Column("withdrawal_digest", LargeBinary(32)),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("round", Integer, nullable=False),
    Column("agent", LargeBinary(32), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("transcript", LargeBinary(32), index=True),
    Column("header", LargeBinary, nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("weight", Integer, nullable=False),
    Column("n_bytes", BigInteger, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("has_bytes", Boolean, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("accepted_at", Double),
    UniqueConstraint("round", "agent", "attempt"),
    Index("uploads_with_bytes", "has_bytes", "phase"),
)

Index(
    "one_accepted_upload",
    uploads.c.round,
    uploads.c.agent,
    unique=True,
    sqlite_where=uploads.c.phase == "accepted",
    postgresql_where=uploads.c.phase == "accepted",
)

parts = Table(
    "parts",
    metadata,
    Column("upload", Integer, ForeignKey("uploads.id"), primary_key=True),
    Column("n", Integer, primary_key=True),
    Column("sha256", LargeBinary(32), nullable=False),
    Column("n_bytes", Integer, nullable=False),
)

cells = Table(
    "cells",
    metadata,
    Column("transcript", LargeBinary(32), primary_key=True),
    Column("round", Integer, ForeignKey("rounds.number"), nullable=False, index=True),
    Column("phase", String(16), nullable=False),
    Column("members_digest", LargeBinary(32), nullable=False),
    Column("members", Text, nullable=False),
    Column("upload", Integer, ForeignKey("uploads.id"), unique=True),
    Column("sum_sha256", LargeBinary(32)),
    Column("has_sum", Boolean, nullable=False),
    Column("n_members", Integer, nullable=False),
    Column("weight_sum", BigInteger, nullable=False),
)

readies = Table(
    "readies",
    metadata,
    Column("round", Integer, ForeignKey("rounds.number"), primary_key=True),
    Column("agent", LargeBinary(32), ForeignKey("agents.identity"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("message", LargeBinary, nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    Column("wave", Integer),
)

waves = Table(
    "waves",
    metadata,
    Column("round", Integer, ForeignKey("rounds.number"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("message", LargeBinary, nullable=False),
)

masked_cells = Table(
    "masked_cells",
    metadata,
    Column("transcript", LargeBinary(32), primary_key=True),
    Column("round", Integer, ForeignKey("rounds.number"), nullable=False, index=True),
    Column("wave", Integer, nullable=False),
    Column("number", Integer, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("roster", LargeBinary, nullable=False),
    Column("stage_at", Double, nullable=False),
    Column("shared", Text),
    Column("survivors", Text),
    Column("failed", LargeBinary),
    Column("retried", Boolean, nullable=False),
)

cell_members = Table(
    "cell_members",
    metadata,
    Column("transcript", LargeBinary(32), ForeignKey("masked_cells.transcript"), primary_key=True),
    Column("agent", LargeBinary(32), ForeignKey("agents.identity"), primary_key=True),
    Column("round", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    UniqueConstraint("round", "agent", "attempt"),
)

cell_messages = Table(
    "cell_messages",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("transcript", LargeBinary(32), ForeignKey("masked_cells.transcript"), nullable=False),
    Column("agent", LargeBinary(32), ForeignKey("agents.identity"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("about", LargeBinary(32), nullable=False),
    Column("message", LargeBinary, nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
    UniqueConstraint("transcript", "agent", "kind", "about"),
)

releases = Table(
    "releases",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("signed", LargeBinary, nullable=False),
    Column("digest", LargeBinary(32), nullable=False, unique=True),
    Column("round", Integer, ForeignKey("rounds.number"), unique=True),
)

release_blobs = Table(
    "release_blobs",
    metadata,
    Column("release", Integer, ForeignKey("releases.number"), primary_key=True),
    Column("role", String(16), primary_key=True),
    Column("sha256", LargeBinary(32), nullable=False, index=True),
    Column("n_bytes", BigInteger, nullable=False),
)

counters = Table(
    "counters",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
