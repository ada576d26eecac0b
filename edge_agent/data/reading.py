"""Read the records of a source, and account for every entry that was left out."""

from collections.abc import Iterator
from pathlib import Path

from edge_agent.data.entries import Entry, iterate_entries
from edge_agent.data.fields import has_no_input_marker, parse_entry
from edge_agent.data.hub import HubClient, HuggingFaceHub, choose_files
from edge_agent.data.records import MalformedLog, OnMalformed, ReadReport, Record
from edge_agent.data.sources import FileSource, HubSource, parse_source
from edge_agent.errors import DataError, MalformedRecordError


def read_records(
    source: str | Path | FileSource | HubSource,
    *,
    on_malformed: OnMalformed = OnMalformed.SKIP,
    hub: HubClient | None = None,
) -> tuple[list[Record], ReadReport]:
    """Read instructions from a file or from a data set of the hub.

    JSON, JSON Lines, CSV and Parquet, each also packed with xz or gzip; the field names that
    `fields` lists. Texts are kept as they stand.

    Guarantees:
        1. `n_read` is the number of entries in the source; each is among the records or counted
           as malformed, with file and line (or index) and the reason for the first few.
        2. With `OnMalformed.FAIL` the first malformed entry raises, and nothing is returned.
        3. Only a `HubSource` (or its `hub:` form) contacts a host; nothing of it is executed.

    Args:
        source: a path, a `hub:` name, or what `parse_source` returned.
        on_malformed: whether a malformed entry is skipped and counted, or fatal.
        hub: stands in for the hub; None is the real one.

    Returns:
        The records in the source's order, at least one, and the report.

    Raises:
        MalformedRecordError: an entry is malformed and `on_malformed` is FAIL.
        DataError: the source does not exist, cannot be read any further, holds no entries, or
            only malformed ones.
    """
    if not isinstance(source, FileSource | HubSource):
        source = parse_source(source)
    name = str(source) if isinstance(source, HubSource) else source.path.name
    log = MalformedLog(on_malformed)
    records: list[Record] = []
    n_read = n_markers = 0
    for entry in _entries(source, hub):
        n_read += 1
        try:
            if isinstance(entry, MalformedRecordError):
                raise entry
            records.extend(parse_entry(entry))
            n_markers += has_no_input_marker(entry)
        except MalformedRecordError as error:
            log.add(error)
    if n_read == 0:
        msg = f"{name} holds no records"
        raise DataError(msg)
    if not records:
        first = log.first[0]
        msg = f"none of the {n_read} records in {name} can be used; the first, {first.location}: "
        raise DataError(msg + first.reason)
    report = ReadReport(
        source=name,
        n_read=n_read,
        n_records=len(records),
        n_malformed=log.n_malformed,
        n_no_input_markers=n_markers,
        malformed=log.first,
    )
    return records, report


def _entries(
    source: FileSource | HubSource, hub: HubClient | None
) -> Iterator[Entry | MalformedRecordError]:
    """Yield the entries of all files that the source stands for."""
    if isinstance(source, FileSource):
        yield from iterate_entries(source.path, source.path.name)
        return
    client = HuggingFaceHub() if hub is None else hub
    listing = client.list_files(source.repo_id, source.revision)
    for filename in choose_files(source, listing.files):
        path = client.download(source.repo_id, listing.commit, filename)
        yield from iterate_entries(path, f"{source.repo_id}/{filename}")
