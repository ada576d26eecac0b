"""One byte range of a file."""

import pytest

from aggregator_server.errors import Refusal
from aggregator_server.web.ranges import parse_range
from protocol.problems import ProblemType


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-9", (0, 10)),
        ("bytes=10-", (10, 100)),
        ("bytes=-5", (95, 100)),
        ("bytes=-500", (0, 100)),
        ("bytes=90-500", (90, 100)),
        ("bytes=99-99", (99, 100)),
        ("bytes=0-1,5-6", None),
        ("bytes=9-3", None),
        ("bytes=", None),
        ("bytes=-", None),
        ("items=0-9", None),
        ("bytes=a-b", None),
        ("bytes=1e3-", None),
    ],
)
def test_a_range_is_honoured_or_ignored(header, expected):
    found = parse_range(header, n_bytes=100)
    assert (None if found is None else (found.start, found.stop)) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_a_range_beyond_the_end_is_refused(header):
    with pytest.raises(Refusal) as caught:
        parse_range(header, n_bytes=100)
    assert caught.value.problem is ProblemType.BAD_RANGE


def test_content_range_names_the_last_byte():
    part = parse_range("bytes=10-19", n_bytes=100)
    assert part is not None
    assert part.content_range == "bytes 10-19/100"
