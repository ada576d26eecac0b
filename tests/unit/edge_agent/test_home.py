"""The agent's home: private, for one process, and removable whole."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.errors import JournalError
from edge_agent.home import AgentHome
from protocol.signing import Signer


@pytest.fixture
def home(tmp_path: Path) -> AgentHome:
    found = AgentHome(tmp_path / "home")
    found.create()
    return found


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folders_are_the_owners_alone(home: AgentHome) -> None:
    for folder in (home.root, home.cache, home.updates):
        assert mode(folder) == 0o700
    home.root.chmod(0o755)
    home.create()
    assert mode(home.root) == 0o700


def test_the_key_is_made_once_and_private(home: AgentHome) -> None:
    first = home.load_or_create_signer()
    assert mode(home.key_path) == 0o600
    assert home.load_or_create_signer().identity == first.identity
    assert not list(home.root.glob("*.partial"))


def test_a_kill_while_the_key_is_made_leaves_no_damaged_key(
    home: AgentHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KillError(BaseException):
        """Stands for kill -9."""

    def kill(self: Signer) -> bytes:
        raise KillError

    with monkeypatch.context() as patched:
        patched.setattr(Signer, "private_bytes", kill)
        with pytest.raises(KillError):
            home.load_or_create_signer()
    assert not home.key_path.exists()
    identity = home.load_or_create_signer().identity
    assert home.load_or_create_signer().identity == identity


@pytest.mark.parametrize("text", ["", "AAAA", "not a key", "A" * 44, "\x80"])
def test_a_damaged_key_is_told_and_never_replaced(home: AgentHome, text: str) -> None:
    home.key_path.write_bytes(text.encode("latin-1"))
    with pytest.raises(JournalError, match="damaged; `forget` and join again"):
        home.load_or_create_signer()
    assert home.key_path.read_bytes() == text.encode("latin-1")


def test_one_process_at_a_time_works_in_a_home(home: AgentHome) -> None:
    lock = home.lock()
    with pytest.raises(JournalError, match="another agent already works"):
        AgentHome(home.root).lock()
    lock.release()
    AgentHome(home.root).lock().release()


def test_the_lock_of_a_killed_process_is_free(home: AgentHome) -> None:
    program = (
        "import os, pathlib, sys\n"
        "from filelock import FileLock\n"
        "lock = FileLock(sys.argv[1]); lock.acquire(timeout=0)\n"
        "os._exit(9)\n"
    )
    path = home.root / "agent.lock"
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert killed.returncode == 9
    home.lock().release()


def fill(home: AgentHome) -> None:
    home.load_or_create_signer()
    home.lock().release()
    names = [
        "journal.sqlite",
        "journal.sqlite-wal",
        "journal.sqlite-shm",
        "training.safetensors",
        "training.safetensors.partial",
        "agent.toml",
        "agent.key.partial",
        "cache/" + "ab" * 32,
        "cache/" + "cd" * 32 + ".partial",
        "updates/3-1.f32",
        "updates/4-1.f32.partial",
        "privacy.secret",
        "privacy.secret.partial",
    ]
    for name in names:
        (home.root / name).write_bytes(b"x")


def test_forgetting_leaves_nothing(home: AgentHome) -> None:
    fill(home)
    removed = home.forget()
    assert not home.root.exists()
    assert {home.key_path, home.journal_path, home.root} <= set(removed)
    assert home.forget() == []


def test_forgetting_leaves_what_the_agent_did_not_make(home: AgentHome) -> None:
    """Somebody gives a folder of his own as `--home`."""
    fill(home)
    kept = ["notes.txt", "cache/photo.jpg", "updates/2024-1.txt", "cache/" + "ab" * 31]
    for name in kept:
        (home.root / name).write_text("mine")
    home.forget()
    found = {str(path.relative_to(home.root)) for path in home.root.rglob("*") if path.is_file()}
    assert found == set(kept)


def test_only_downloads_count_as_cached(home: AgentHome) -> None:
    fill(home)
    (home.cache / "photo.jpg").write_text("mine")
    assert [path.name for path in home.cached_files()] == ["ab" * 32, "cd" * 32 + ".partial"]
    assert AgentHome(home.root / "nowhere").cached_files() == []
