"""Data sets of the hub: which of their files are read, and how these arrive.

Only data files are fetched, at one commit; the loading scripts that some data sets carry are never
fetched and never run.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from edge_agent.data.sources import HubSource, detect_format
from edge_agent.errors import DataError

_HELD_OUT: Final = re.compile(r"(?:^|[^a-z])(?:test|valid|validation|eval|dev)(?:[^a-z]|$)")
_TRAINING: Final = re.compile(r"(?:^|[^a-z])train(?:[^a-z]|$)")
_METADATA: Final = re.compile(r"(?:^|/)(?:\.|dataset_infos?\.json|metadata\.json|config\.json)")
_N_FILES_SHOWN: Final = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class HubListing:
    """What a data set holds at one moment.

    Attributes:
        commit: full commit id; downloads name it, so that all files are of one moment.
        files: paths inside the data set.
    """

    commit: str
    files: tuple[str, ...]


class HubClient(Protocol):
    """What is asked of the hub."""

    def list_files(self, repo_id: str, revision: str | None) -> HubListing:
        """List a data set's files.

        Args:
            repo_id: `owner/name`.
            revision: branch, tag or commit; None is the newest.

        Returns:
            The commit that it resolves to, and the files there.

        Raises:
            DataError: there is no such data set, or the hub cannot be reached.
        """

    def download(self, repo_id: str, commit: str, filename: str) -> Path:
        """Fetch a file, or find it in the cache.

        Args:
            repo_id: `owner/name`.
            commit: full commit id.
            filename: path inside the data set.

        Returns:
            Where it lies on this machine.

        Raises:
            DataError: it cannot be fetched.
        """


class HuggingFaceHub:
    """The hub itself, through `huggingface_hub` and its cache."""

    def list_files(self, repo_id: str, revision: str | None) -> HubListing:
        """List a data set's files; see `HubClient`.

        Args:
            repo_id: `owner/name`.
            revision: branch, tag or commit; None is the newest.

        Returns:
            The commit that it resolves to, and the files there.

        Raises:
            DataError: there is no such data set, or the hub cannot be reached.
        """
        # Here and not above: an agent that reads a local file loads no hub client for it.
        from huggingface_hub import HfApi  # noqa: PLC0415

        try:
            info = HfApi().dataset_info(repo_id, revision=revision)
        except Exception as error:  # of several libraries, none to build on
            msg = f"the hub does not give the data set {repo_id}: {error}"
            raise DataError(msg) from error
        if info.sha is None:
            msg = f"the hub names no commit for the data set {repo_id}"
            raise DataError(msg)
        files = tuple(file.rfilename for file in info.siblings or ())
        return HubListing(commit=info.sha, files=files)

    def download(self, repo_id: str, commit: str, filename: str) -> Path:
        """Fetch a file, or find it in the cache; see `HubClient`.

        Args:
            repo_id: `owner/name`.
            commit: full commit id.
            filename: path inside the data set.

        Returns:
            Where it lies on this machine.

        Raises:
            DataError: it cannot be fetched.
        """
        from huggingface_hub import hf_hub_download  # noqa: PLC0415

        try:
            path = hf_hub_download(repo_id, filename, repo_type="dataset", revision=commit)
        except Exception as error:  # of several libraries, none to build on
            msg = f"{filename} of the data set {repo_id} cannot be fetched: {error}"
            raise DataError(msg) from error
        return Path(path)


def choose_files(source: HubSource, files: Sequence[str]) -> tuple[str, ...]:
    """Choose the files of a data set to train on.

    The named file; or all data files with `train` in their path; or the only data file that is
    not of a test or validation split. Anything less clear is refused: guessing could train on a
    test set.

    Args:
        source: what was asked for.
        files: paths inside the data set.

    Returns:
        Paths to read, sorted.

    Raises:
        DataError: the named file is not there, or the choice is not clear.
    """
    if source.filename is not None:
        if source.filename not in files:
            msg = f"{source}: there is no such file; there are {_listing(files)}"
            raise DataError(msg)
        detect_format(source.filename)
        return (source.filename,)
    data = sorted(name for name in files if _is_data(name))
    training = tuple(name for name in data if _TRAINING.search(name.lower()))
    others = tuple(name for name in data if not _HELD_OUT.search(name.lower()))
    chosen = training or others
    if len({detect_format(name) for name in chosen}) == 1 and (training or len(chosen) == 1):
        return chosen
    msg = (
        f"{source}: cannot tell which files to train on; name one as hub:{source.repo_id}:FILE. "
        f"There are {_listing(data or files)}"
    )
    raise DataError(msg)


def _is_data(name: str) -> bool:
    if _METADATA.search(name.lower()):
        return False
    try:
        detect_format(name)
    except DataError:
        return False
    return True


def _listing(files: Sequence[str]) -> str:
    more = len(files) - _N_FILES_SHOWN
    shown = ", ".join(sorted(files)[:_N_FILES_SHOWN]) or "no files"
    return f"{shown} and {more} more" if more > 0 else shown
