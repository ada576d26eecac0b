"""Bytes by name, in a folder or any other file system that fsspec knows.

Names come from digests and numbers of this program, never from a request.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import fsspec

from aggregator_server.errors import BlobError, BlobMissingError, ConfigError, NoSpaceError
from protocol.limits import KIB, MIB

_CHUNK_BYTES: Final = 128 * KIB
"""Of a file: each download under way has a chunk or two in memory."""
_REMOTE_CHUNK_BYTES: Final = MIB
"""Of an object store, where each chunk is a request."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Blobs(Protocol):
    """Where bytes are kept.

    Guarantees:
        1. `put` is atomic and durable: once it returns, the whole blob survives a power cut;
           before, nothing is there under that name.
        2. A full disk raises `NoSpaceError` and stores nothing.
    """

    def put(self, key: str, data: bytes) -> None:
        """Store a blob; the same name again replaces it.

        Raises:
            NoSpaceError: No space; nothing was stored.
            BlobError: It cannot be written.
        """
        ...

    def read(self, key: str) -> bytes:
        """A whole blob.

        Raises:
            BlobMissingError: No such blob.
            BlobError: It cannot be read.
        """
        ...

    def stream(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` (exclusive) in chunks.

        Raises:
            BlobMissingError: No such blob.
            BlobError: It cannot be read.
        """
        ...

    def delete_all(self, prefix: str) -> None:
        """Delete every blob whose name begins with `prefix` + "/"; none is no error.

        Raises:
            BlobError: One cannot be deleted; calling again goes on.
        """
        ...

    def delete(self, key: str) -> None:
        """Delete a blob; a missing one is no error.

        Raises:
            BlobError: It cannot be deleted.
        """
        ...

    def names(self, prefix: str) -> tuple[str, ...]:
        """What comes next, after `prefix` + "/", in the names that begin so; each once.

        Raises:
            BlobError: They cannot be listed.
        """
        ...

    def tidy(self, prefix: str) -> None:
        """Delete what killed writes have left right under `prefix`; while none is going on.

        Raises:
            BlobError: It cannot be deleted.
        """
        ...

    def require_space(self, n_bytes: int) -> None:
        """Refuse when `n_bytes` more would leave less than the configured free space.

        Raises:
            NoSpaceError: Too little is left.
            BlobError: The disk does not tell.
        """
        ...


def open_blobs(url: str, *, min_free_bytes: int) -> Blobs:
    """Open a place for blobs.

    Args:
        url: A folder's path, or an fsspec URL such as `s3://bucket/name`.
        min_free_bytes: Free space that a folder's disk must keep.

    Raises:
        ConfigError: fsspec knows no such file system, or its driver is not installed.
    """
    if "://" not in url or url.startswith("file://"):
        return FolderBlobs(Path(url.removeprefix("file://")), min_free_bytes=min_free_bytes)
    try:
        file_system, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        msg = f"blobs_url: {error}"
        raise ConfigError(msg) from error
    return FsspecBlobs(file_system, root)


class FolderBlobs:
    """Blobs as files in a folder: temporary file, fsync, rename, fsync of the folder."""

    def __init__(self, root: Path, *, min_free_bytes: int) -> None:
        """Use a folder, made when missing."""
        self._root = root
        self._min_free_bytes = min_free_bytes
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, key: str, data: bytes) -> None:
        """Store a blob; see `Blobs.put`."""
        self.require_space(len(data))
        path = self._root / key
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            _fsync_folders(path.parent, self._root)
        except OSError as error:
            raise _write_error(key, error) from error

    def read(self, key: str) -> bytes:
        """A whole blob; see `Blobs.read`."""
        try:
            return (self._root / key).read_bytes()
        except OSError as error:
            raise _read_error(key, error) from error

    def stream(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop`; see `Blobs.stream`."""
        try:
            with (self._root / key).open("rb") as file:
                file.seek(start)
                while start < stop:
                    chunk = file.read(min(_CHUNK_BYTES, stop - start))
                    if not chunk:
                        msg = f"blob {key} is shorter than {stop} bytes"
                        raise BlobError(msg)
                    start += len(chunk)
                    yield chunk
        except OSError as error:
            raise _read_error(key, error) from error

    def delete_all(self, prefix: str) -> None:
        """Delete by prefix; see `Blobs.delete_all`."""
        try:
            shutil.rmtree(self._root / prefix)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _delete_error(prefix, error) from error

    def delete(self, key: str) -> None:
        """Delete a blob; see `Blobs.delete`."""
        try:
            (self._root / key).unlink(missing_ok=True)
        except OSError as error:
            raise _delete_error(key, error) from error

    def names(self, prefix: str) -> tuple[str, ...]:
        """What comes next in the names; see `Blobs.names`."""
        try:
            found = sorted(path.name for path in (self._root / prefix).iterdir())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise _read_error(prefix, error) from error
        return tuple(name for name in found if not name.startswith("."))

    def tidy(self, prefix: str) -> None:
        """Delete temporary files; see `Blobs.tidy`."""
        try:
            for path in (self._root / prefix).glob(".*"):
                path.unlink()
        except OSError as error:
            raise _delete_error(prefix, error) from error

    def require_space(self, n_bytes: int) -> None:
        """Refuse when space is short; see `Blobs.require_space`."""
        try:
            free = shutil.disk_usage(self._root).free
        except OSError as error:
            raise _read_error(str(self._root), error) from error
        if free - n_bytes < self._min_free_bytes:
            msg = (
                f"{free} bytes are free; {n_bytes} more would leave less than "
                f"min_free_bytes = {self._min_free_bytes}"
            )
            raise NoSpaceError(msg)


class FsspecBlobs:
    """Blobs in any other file system of fsspec; object stores put atomically by themselves.

    Its drivers raise whatever the libraries beneath them raise, so every fault is a `BlobError`:
    one that passes must not end a round.
    """

    def __init__(self, file_system: Any, root: str) -> None:  # noqa: ANN401 - fsspec has no types
        """Use a file system under a root."""
        self._fs = file_system
        self._root = root.rstrip("/")

    def put(self, key: str, data: bytes) -> None:
        """Store a blob; see `Blobs.put`."""
        path = self._path(key)
        try:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data)
        except Exception as error:
            raise _write_error(key, error) from error

    def read(self, key: str) -> bytes:
        """A whole blob; see `Blobs.read`."""
        try:
            return bytes(self._fs.cat_file(self._path(key)))
        except Exception as error:
            raise _read_error(key, error) from error

    def stream(self, key: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop`; see `Blobs.stream`."""
        while start < stop:
            end = min(start + _REMOTE_CHUNK_BYTES, stop)
            try:
                chunk = bytes(self._fs.cat_file(self._path(key), start=start, end=end))
            except Exception as error:
                raise _read_error(key, error) from error
            if len(chunk) != end - start:
                msg = f"blob {key} is shorter than {stop} bytes"
                raise BlobError(msg)
            start = end
            yield chunk

    def delete_all(self, prefix: str) -> None:
        """Delete by prefix; see `Blobs.delete_all`."""
        try:
            self._fs.invalidate_cache()
            self._fs.rm(self._path(prefix), recursive=True)
        except FileNotFoundError:
            return
        except Exception as error:
            raise _delete_error(prefix, error) from error

    def delete(self, key: str) -> None:
        """Delete a blob; see `Blobs.delete`."""
        try:
            self._fs.rm_file(self._path(key))
        except FileNotFoundError:
            return
        except Exception as error:
            raise _delete_error(key, error) from error

    def names(self, prefix: str) -> tuple[str, ...]:
        """What comes next in the names; see `Blobs.names`."""
        try:
            self._fs.invalidate_cache()  # other processes write and delete too
            found = self._fs.ls(self._path(prefix), detail=False)
        except FileNotFoundError:
            return ()
        except Exception as error:
            raise _read_error(prefix, error) from error
        return tuple(sorted({path.rstrip("/").rpartition("/")[2] for path in found}))

    def tidy(self, prefix: str) -> None:
        """Object stores show a blob when it is whole: there is nothing to delete."""

    def require_space(self, n_bytes: int) -> None:
        """Object stores do not tell their free space: a write that fails says so."""

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"


def _fsync_folders(folder: Path, root: Path) -> None:
    # The name of a new file is durable only once its folder is, and so on up to the root.
    while True:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if folder == root:
            return
        folder = folder.parent


def _write_error(key: str, error: Exception) -> BlobError:
    if isinstance(error, OSError) and error.errno in _FULL:
        return NoSpaceError(f"no space for blob {key}; nothing was stored")
    return BlobError(f"cannot write blob {key}: {_reason(error)}")


def _read_error(key: str, error: Exception) -> BlobError:
    if isinstance(error, FileNotFoundError):
        return BlobMissingError(f"there is no blob {key}")
    return BlobError(f"cannot read blob {key}: {_reason(error)}")


def _delete_error(key: str, error: Exception) -> BlobError:
    return BlobError(f"cannot delete blob {key}: {_reason(error)}")


def _reason(error: Exception) -> str:
    # The class alone of what is not the operating system's: its text may hold a URL's secrets.
    told = error.strerror if isinstance(error, OSError) else None
    return told or type(error).__name__
