"""Key files: private, whole, and never silently another key."""

import pytest

from aggregator_server.errors import KeyFileError
from aggregator_server.keys import create_keys, load_keys


def test_keys_come_back_as_they_were_written(tmp_path):
    made = create_keys(tmp_path)
    read = load_keys(tmp_path)
    assert read.server.identity == made.server.identity
    assert read.registrar.identity == made.registrar.identity
    assert made.server.identity != made.registrar.identity


def test_key_files_are_readable_by_their_owner_only(tmp_path):
    create_keys(tmp_path)
    for path in (tmp_path / "keys").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_may_read_is_refused_with_the_remedy(tmp_path, mode):
    create_keys(tmp_path)
    path = tmp_path / "keys" / "server.key"
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
        load_keys(tmp_path)


def test_a_damaged_key_is_refused_without_showing_it(tmp_path):
    create_keys(tmp_path)
    path = tmp_path / "keys" / "server.key"
    secret = path.read_text().strip()
    path.write_text(secret[:-1])
    with pytest.raises(KeyFileError) as caught:
        load_keys(tmp_path)
    assert secret[:10] not in str(caught.value)


def test_existing_keys_are_never_overwritten(tmp_path):
    create_keys(tmp_path)
    with pytest.raises(KeyFileError, match="exists"):
        create_keys(tmp_path)


def test_missing_keys_ask_for_the_backup(tmp_path):
    with pytest.raises(KeyFileError, match="backup"):
        load_keys(tmp_path)
