"""One suite for every place where blobs can be kept."""

import errno
import secrets

import fsspec
import pytest

from aggregator_server.blobs import FolderBlobs, FsspecBlobs, open_blobs
from aggregator_server.errors import BlobError, BlobMissingError, ConfigError, NoSpaceError

PLACES = ["folder", "memory", "local-fsspec"]


@pytest.fixture(params=PLACES)
def blobs(request, tmp_path):
    if request.param == "folder":
        return FolderBlobs(tmp_path, min_free_bytes=0)
    if request.param == "memory":
        return FsspecBlobs(fsspec.filesystem("memory"), f"/{secrets.token_hex(8)}")
    return FsspecBlobs(fsspec.filesystem("file"), str(tmp_path))


def test_a_blob_comes_back_as_it_was_put(blobs):
    data = bytes(range(256)) * 5000
    blobs.put("a/b/c", data)
    assert blobs.read("a/b/c") == data


def test_the_same_name_again_replaces_the_blob(blobs):
    blobs.put("x", b"old")
    blobs.put("x", b"new!")
    assert blobs.read("x") == b"new!"


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 10), (5, 3_000_000), (7, 7), (2_999_999, 3_000_000)]
)
def test_a_range_is_streamed(blobs, start, stop):
    data = secrets.token_bytes(3_000_000)
    blobs.put("x", data)
    assert b"".join(blobs.stream("x", start, stop)) == data[start:stop]


def test_a_range_beyond_the_end_is_an_error_and_not_short(blobs):
    blobs.put("x", b"123")
    with pytest.raises(BlobError, match="shorter"):
        list(blobs.stream("x", 0, 4))


def test_a_missing_blob_is_named(blobs):
    with pytest.raises(BlobMissingError, match="no/such"):
        blobs.read("no/such")
    with pytest.raises(BlobMissingError, match="no/such"):
        list(blobs.stream("no/such", 0, 1))


def test_deleting_is_idempotent(blobs):
    blobs.put("x", b"1")
    blobs.delete("x")
    blobs.delete("x")
    with pytest.raises(BlobMissingError):
        blobs.read("x")


def test_deleting_by_prefix_takes_whole_names_only(blobs):
    for key in ("uploads/1/a", "uploads/1/b", "uploads/11/a"):
        blobs.put(key, b"1")
    blobs.delete_all("uploads/1")
    blobs.delete_all("uploads/1")
    blobs.delete_all("uploads/7")
    assert blobs.read("uploads/11/a") == b"1"
    for key in ("uploads/1/a", "uploads/1/b"):
        with pytest.raises(BlobMissingError):
            blobs.read(key)


def test_an_empty_blob_is_a_blob(blobs):
    blobs.put("empty", b"")
    assert blobs.read("empty") == b""
    assert not list(blobs.stream("empty", 0, 0))


class TestFolder:
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
    def test_a_failed_write_leaves_nothing_behind(self, tmp_path, monkeypatch, call, number):
        from aggregator_server import blobs as module

        def fail(*_args: object) -> None:
            raise OSError(number, "failed")

        blobs = FolderBlobs(tmp_path, min_free_bytes=0)
        owner = module.os if call == "fsync" else module.Path
        monkeypatch.setattr(owner, call, fail)
        with pytest.raises(BlobError) as caught:
            blobs.put("x", b"data")
        monkeypatch.undo()
        assert isinstance(caught.value, NoSpaceError) == (number != errno.EIO)
        assert not list(tmp_path.iterdir())

    def test_a_replaced_blob_keeps_its_old_bytes_when_the_write_fails(self, tmp_path, monkeypatch):
        from aggregator_server import blobs as module

        def fail(*_args: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        blobs = FolderBlobs(tmp_path, min_free_bytes=0)
        blobs.put("x", b"old")
        monkeypatch.setattr(module.os, "fsync", fail)
        with pytest.raises(NoSpaceError):
            blobs.put("x", b"new")
        assert blobs.read("x") == b"old"

    def test_too_little_free_space_refuses_before_writing(self, tmp_path):
        blobs = FolderBlobs(tmp_path, min_free_bytes=2**62)
        with pytest.raises(NoSpaceError, match="min_free_bytes"):
            blobs.put("x", b"1")
        assert not list(tmp_path.iterdir())


def test_a_url_or_a_path_opens_the_right_place(tmp_path):
    assert isinstance(open_blobs(str(tmp_path / "a"), min_free_bytes=0), FolderBlobs)
    assert isinstance(open_blobs(f"file://{tmp_path / 'b'}", min_free_bytes=0), FolderBlobs)
    assert isinstance(open_blobs("memory://bucket", min_free_bytes=0), FsspecBlobs)
    assert (tmp_path / "b").is_dir()


def test_an_unknown_file_system_is_a_setting_that_cannot_be_honoured():
    with pytest.raises(ConfigError, match="blobs_url"):
        open_blobs("nonsense://bucket", min_free_bytes=0)


def test_names_are_listed_one_step_at_a_time(blobs):
    assert blobs.names("uploads") == ()
    for key in ("uploads/1/a", "uploads/1/b", "uploads/11/a", "adapters/x"):
        blobs.put(key, b"1")
    assert blobs.names("uploads") == ("1", "11")
    assert blobs.names("uploads/1") == ("a", "b")
    assert blobs.names("adapters") == ("x",)


def test_tidying_leaves_every_blob(blobs):
    blobs.put("adapters/x", b"1")
    blobs.tidy("adapters")
    blobs.tidy("nothing")
    assert blobs.read("adapters/x") == b"1"


def test_a_write_that_was_killed_is_tidied_away(tmp_path):
    blobs = FolderBlobs(tmp_path, min_free_bytes=0)
    blobs.put("adapters/x", b"1")
    (tmp_path / "adapters" / ".y.0123456789abcdef").write_bytes(b"half")
    assert blobs.names("adapters") == ("x",)
    blobs.tidy("adapters")
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["x"]


@pytest.mark.parametrize("call", ["put", "read", "stream", "delete", "delete_all", "names"])
def test_whatever_a_driver_raises_is_a_fault_that_may_pass(call):
    class Driver:
        def __getattr__(self, name: str):
            if name in {"makedirs", "invalidate_cache"}:
                return lambda *_args, **_options: None
            message = "cannot reach https://key:hunter2@bucket"
            raise RuntimeError(message)

    blobs = FsspecBlobs(Driver(), "bucket")
    arguments = {"put": ("x", b"1"), "stream": ("x", 0, 1)}.get(call, ("x",))
    with pytest.raises(BlobError, match="RuntimeError") as caught:
        list(getattr(blobs, call)(*arguments) or ())
    assert not isinstance(caught.value, BlobMissingError)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [("delete", ("x",)), ("names", ("x",)), ("tidy", ("x",)), ("require_space", (1,))],
)
def test_a_folder_that_cannot_be_read_is_a_fault_that_may_pass(
    tmp_path, monkeypatch, call, arguments
):
    from aggregator_server import blobs as module

    def fail(*_args: object, **_options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    blobs = FolderBlobs(tmp_path, min_free_bytes=0)
    for name in ("unlink", "iterdir", "glob"):
        monkeypatch.setattr(module.Path, name, fail)
    monkeypatch.setattr(module.shutil, "disk_usage", fail)
    with pytest.raises(BlobError, match="Input/output error") as caught:
        getattr(blobs, call)(*arguments)
    monkeypatch.undo()
    assert not isinstance(caught.value, NoSpaceError)
