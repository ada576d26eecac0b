"""The server's and the registrar's private keys: two files that nobody else may read."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aggregator_server.errors import KeyFileError
from protocol.errors import ProtocolError
from protocol.signing import Signer
from protocol.wire import b64u_decode, b64u_encode

_FOLDER: Final = "keys"
_SERVER: Final = "server.key"
_REGISTRAR: Final = "registrar.key"
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The two signers of a federation whose registrar is held by the server."""

    server: Signer
    registrar: Signer


def create_keys(directory: Path) -> Keys:
    """Draw both keys and write them with mode 0600.

    Args:
        directory: The federation's folder; keys go to `keys/` in it.

    Raises:
        KeyFileError: A key file is already there, or cannot be written.
    """
    folder = directory / _FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    keys = Keys(server=Signer.generate(), registrar=Signer.generate())
    _write(folder / _SERVER, keys.server)
    _write(folder / _REGISTRAR, keys.registrar)
    return keys


def load_keys(directory: Path) -> Keys:
    """Read both keys.

    Raises:
        KeyFileError: A file is missing, damaged, or readable by group or world.
    """
    folder = directory / _FOLDER
    return Keys(server=_read(folder / _SERVER), registrar=_read(folder / _REGISTRAR))


def _write(path: Path, signer: Signer) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(b64u_encode(signer.private_bytes()) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror}"
        raise KeyFileError(msg) from error


def _read(path: Path) -> Signer:
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"cannot read the key {path}; restore it from a backup: agents know no other"
        raise KeyFileError(msg) from error
    if mode & _OTHERS:
        msg = f"others may read {path} (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}"
        raise KeyFileError(msg)
    try:
        return Signer.from_private_bytes(b64u_decode(text, n_bytes=32))
    except ProtocolError as error:
        msg = f"{path} holds no key; restore it from a backup"
        raise KeyFileError(msg) from error
