"""What a helper does: check a round's uploads, add up the masks of each cell, answer once.

Its folder holds two keys, a journal of answers, and the sums of the newest round of each
federation. What it has answered for a round stays its answer, whatever it is asked later.
"""

import hashlib
import os
import re
import sqlite3
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from aggregator_server.errors import ConfigError, KeyFileError, Refusal
from privacy.errors import MaskedMessageError, ShareError
from privacy.helper import HelpedCell, HelperKey, check_helped, mask_seed, seal_context
from privacy.masking import CHUNK_BYTES, Mask, MaskAdder, word_dtype
from protocol.blocks import HelperMasking
from protocol.chain import BlobRef, RoundManifest
from protocol.errors import ProtocolError
from protocol.helped import HelperAnswer, HelperDescription, HelperRequest, MaskSum
from protocol.problems import ProblemType
from protocol.signing import Signed, Signer, sign
from protocol.wire import b64u_decode, b64u_encode, parse

DESCRIPTION_NAME: Final = "helper.json"
_KEYS: Final = "helper.keys"
_JOURNAL: Final = "answers.sqlite"
_SUMS: Final = "sums"
_SHA: Final = re.compile(r"[0-9a-f]{64}")
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_log = structlog.get_logger(__name__)
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS answers (
    federation BLOB NOT NULL,
    round INTEGER NOT NULL,
    request BLOB NOT NULL,
    answer BLOB,
    PRIMARY KEY (federation, round)
) STRICT
"""


def found_helper(directory: Path) -> HelperDescription:
    """Draw a helper's keys in a new folder, and write `helper.json` for the other operator.

    Raises:
        ConfigError: The folder holds a helper already, or cannot be used.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / _KEYS
        signer, key = Signer.generate(), HelperKey.generate()
        text = f"{b64u_encode(signer.private_bytes())}\n{b64u_encode(key)}\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        description = HelperDescription(
            helper=signer.identity, helper_key=HelperKey(key).public_bytes
        )
        (directory / DESCRIPTION_NAME).write_bytes(description.canonical() + b"\n")
    except FileExistsError as error:
        msg = f"{directory} holds a helper's keys already; choose another folder"
        raise ConfigError(msg) from error
    except OSError as error:
        msg = f"cannot use {directory}: {error.strerror}"
        raise ConfigError(msg) from error
    return description


def load_description(path: Path) -> HelperDescription:
    """Read the `helper.json` that the helper's operator handed over.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        return parse(HelperDescription, path.read_bytes())
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}; `sheepfold-server helper init` writes it"
        raise ConfigError(msg) from error
    except ProtocolError as error:
        msg = f"{path} describes no helper: {error}"
        raise ConfigError(msg) from error


class HelperService:
    """A helper at work.

    Guarantees:
        1. For each (federation, round) it answers one request; the same one gets the stored answer,
           any other is refused, across restarts.
        2. It adds up masks of whole cells only, each of at least the agreed size, of agents whose
           signature and credential hold, each once.

    Args:
        directory: Made by `found_helper`.
        servers: Identities that may ask; empty: any server whose federation pins this helper.

    Raises:
        KeyFileError: The keys cannot be used.
        ConfigError: The journal cannot be used.
    """

    def __init__(self, directory: Path, *, servers: frozenset[bytes] = frozenset()) -> None:
        """Read the keys, open the journal."""
        self._directory = directory
        self._servers = servers
        self._signer, self._key = _load_keys(directory)
        self.description = HelperDescription(
            helper=self._signer.identity, helper_key=self._key.public_bytes
        )
        self._lock = threading.Lock()
        (directory / _SUMS).mkdir(mode=0o700, exist_ok=True)
        try:
            self._db = sqlite3.connect(
                directory / _JOURNAL, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(_SCHEMA)
        except sqlite3.DatabaseError as error:
            msg = f"{directory / _JOURNAL} is no journal of a helper: {error}"
            raise ConfigError(msg) from error

    def close(self) -> None:
        """Close the journal."""
        self._db.close()

    def answer(self, signed: Signed[HelperRequest]) -> Signed[HelperAnswer]:
        """Add up the masks of a round's cells.

        Args:
            signed: The server's request.

        Raises:
            Refusal: Something in it does not hold (`bad-message`), or another request of this
                round was answered before (`conflict`).
        """
        try:
            cells = check_helped(signed, own=self.description)
        except MaskedMessageError as error:
            raise Refusal(ProblemType.BAD_MESSAGE, str(error)) from error
        server = signed.body.federation.body.server
        if self._servers and server not in self._servers:
            raise Refusal(
                ProblemType.UNKNOWN_FEDERATION,
                f"this helper does not serve {b64u_encode(server)}; ask its operator",
            )
        with self._lock:
            stored = self._begin(signed)
            return stored if stored is not None else self._sum(signed, cells)

    def sum_path(self, name: str) -> Path:
        """The file of a mask sum by its SHA-256 in hexadecimal.

        Raises:
            Refusal: No such sum (`not-found`).
        """
        path = self._directory / _SUMS / name
        if not _SHA.fullmatch(name) or not path.exists():
            raise Refusal(ProblemType.NOT_FOUND, "there is no such sum")
        return path

    def _begin(self, signed: Signed[HelperRequest]) -> Signed[HelperAnswer] | None:
        manifest, digest = signed.body.round.body, signed.body.digest()
        row = self._db.execute(
            "SELECT request, answer FROM answers WHERE federation = ? AND round = ?",
            (manifest.federation, manifest.round),
        ).fetchone()
        if row is None:
            # Before a seed is opened: what is asked next for this round must be this again.
            self._db.execute(
                "INSERT INTO answers VALUES (?, ?, ?, NULL)",
                (manifest.federation, manifest.round, digest),
            )
            return None
        if row[0] != digest:
            raise Refusal(
                ProblemType.CONFLICT,
                f"round {manifest.round} was asked for with other uploads; one answer is given",
            )
        return None if row[1] is None else parse(Signed[HelperAnswer], row[1])

    def _sum(
        self, signed: Signed[HelperRequest], cells: Iterable[HelpedCell]
    ) -> Signed[HelperAnswer]:
        request = signed.body
        manifest, masking = request.round.body, request.federation.body.masking
        if not isinstance(masking, HelperMasking):  # cannot be: it was checked
            raise Refusal(ProblemType.BAD_MESSAGE, "the federation has no helper")
        sums, unopened = [], []
        for cell in cells:
            seeds, failed = self._open(cell, manifest)
            unopened += failed
            if len(seeds) >= masking.min_cell:
                words = self._write_sum(tuple(seeds.values()), manifest, masking)
                members = tuple(
                    (upload.header.body.agent, upload.header.body.digest())
                    for upload in cell.uploads
                    if upload.header.body.agent in seeds
                )
                sums.append(MaskSum(cell=cell.number, members=members, words=words))
        answer = HelperAnswer(
            request=request.digest(), sums=tuple(sums), unopened=tuple(sorted(unopened))
        )
        made = sign(self._signer, "helper-answer", answer).signed
        self._db.execute(
            "UPDATE answers SET answer = ? WHERE federation = ? AND round = ?",
            (made.canonical(), manifest.federation, manifest.round),
        )
        self._forget_older(manifest)
        _log.info("masks added up", round=manifest.round, n_cells=len(sums))
        return made

    def _open(
        self, cell: HelpedCell, manifest: RoundManifest
    ) -> tuple[dict[bytes, bytes], list[bytes]]:
        seeds: dict[bytes, bytes] = {}
        failed = []
        for upload in cell.uploads:
            agent = upload.header.body.agent
            try:
                seed = self._key.open(upload.sealed, context=seal_context(manifest, agent))
            except ShareError:
                failed.append(agent)
                continue
            seeds[agent] = mask_seed(seed, manifest, agent)
        return seeds, failed

    def _write_sum(
        self, seeds: tuple[bytes, ...], manifest: RoundManifest, masking: HelperMasking
    ) -> BlobRef:
        adder = MaskAdder([Mask(seed=seed, sign=1) for seed in seeds], word_bits=masking.word_bits)
        dtype = word_dtype(masking.word_bits)
        digest = hashlib.sha256()
        temporary = self._directory / _SUMS / ".new"
        left = manifest.update_n_bytes
        with temporary.open("wb") as file:
            while left:
                words = np.zeros(min(left, CHUNK_BYTES) // dtype.itemsize, dtype)
                adder.add(words)
                digest.update(words.data)
                file.write(words.data)
                left -= words.nbytes
            file.flush()
            os.fsync(file.fileno())
        sha = digest.digest()
        temporary.replace(self._directory / _SUMS / sha.hex())
        return BlobRef(sha256=sha, n_bytes=manifest.update_n_bytes)

    def _forget_older(self, manifest: RoundManifest) -> None:
        """Delete the sums that only earlier rounds of this federation name."""
        rows = self._db.execute("SELECT federation, round, answer FROM answers").fetchall()
        named: dict[bool, set[str]] = {True: set(), False: set()}
        for federation, number, answer in rows:
            if answer is not None:
                old = federation == manifest.federation and number < manifest.round
                body = parse(Signed[HelperAnswer], answer).body
                named[old] |= {item.words.sha256.hex() for item in body.sums}
        for name in named[True] - named[False]:
            (self._directory / _SUMS / name).unlink(missing_ok=True)


def _load_keys(directory: Path) -> tuple[Signer, HelperKey]:
    path = directory / _KEYS
    try:
        mode = path.stat().st_mode
        signing, sealing = path.read_text(encoding="ascii").split()
        signer = Signer.from_private_bytes(b64u_decode(signing, n_bytes=32))
        key = HelperKey(b64u_decode(sealing))
    except (OSError, ValueError, ProtocolError) as error:
        msg = f"cannot read the keys in {path}; `sheepfold-server helper init` makes them"
        raise KeyFileError(msg) from error
    if mode & _OTHERS:
        msg = f"others may read {path} (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}"
        raise KeyFileError(msg)
    return signer, key
