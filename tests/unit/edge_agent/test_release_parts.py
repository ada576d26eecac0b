"""Which files a release is put together from, by the federation's rule."""

import pytest

from edge_agent.errors import TrustError
from edge_agent.release_parts import parts_of, round_n_bytes
from protocol.blocks import SENT, LoraBlock, LoraRule
from protocol.chain import BlobRef, Release


def lora_of(rule: LoraRule) -> LoraBlock:
    return LoraBlock(
        rank=2, alpha=1.0, target_modules=("q_proj",), sent=SENT[rule], rule=rule, init_seed=1
    )


def blob(number: int, what: int) -> BlobRef:
    return BlobRef(sha256=bytes([number, what]) + bytes(30), n_bytes=100 * (what + 1))


@pytest.fixture
def chain(make_manifest, make_release):
    """Releases 0 to 6, of which 4 is release 1 again."""

    def make(rule: LoraRule) -> list[Release]:
        manifest = make_manifest(lora=lora_of(rule))
        releases: list[Release] = []
        for number in range(7):
            same = 1 if number == 4 else number
            releases.append(
                make_release(
                    manifest,
                    after=releases[-1] if releases else None,
                    adapter=blob(same, 2),
                    sent=blob(same, 0),
                    rolled_back_to=1 if number == 4 else None,
                )
            )
        return releases

    return make


@pytest.mark.parametrize(
    ("rule", "number", "expected"),
    [
        (LoraRule.FEDIT, 0, [(0, 0, "AB")]),
        (LoraRule.FEDIT, 3, [(3, 0, "AB")]),
        (LoraRule.FLEXLORA, 5, [(5, 0, "AB")]),
        (LoraRule.FFA_LORA, 0, [(0, 0, "B"), (0, 2, "AB")]),
        (LoraRule.FFA_LORA, 3, [(3, 0, "B"), (0, 2, "AB")]),
        (LoraRule.FFA_LORA, 4, [(1, 0, "B"), (0, 2, "AB")]),
        (LoraRule.ROLORA, 0, [(0, 0, "B"), (0, 2, "AB")]),
        (LoraRule.ROLORA, 1, [(1, 0, "B"), (0, 2, "AB")]),
        (LoraRule.ROLORA, 2, [(2, 0, "A"), (1, 0, "B")]),
        (LoraRule.ROLORA, 3, [(3, 0, "B"), (2, 0, "A")]),
        (LoraRule.ROLORA, 4, [(1, 0, "B"), (0, 2, "AB")]),
        # From release 4, which is release 1 again, B was trained; A is that of release 0.
        (LoraRule.ROLORA, 5, [(5, 0, "B"), (0, 2, "AB")]),
        (LoraRule.ROLORA, 6, [(6, 0, "A"), (5, 0, "B")]),
    ],
)
def test_a_release_stands_on_what_was_changed_last(chain, rule, number, expected) -> None:
    releases = chain(rule)
    found = parts_of(releases[number], lora_of(rule), releases.__getitem__)
    told = [(ref.sha256[0], ref.sha256[1], "".join(factors)) for ref, factors in found]
    assert told == expected


def test_a_release_that_stands_on_an_unseen_one_is_refused(chain) -> None:
    releases = chain(LoraRule.ROLORA)
    with pytest.raises(TrustError, match="release 3 stands on one that was never seen"):
        parts_of(releases[3], lora_of(LoraRule.ROLORA), lambda _: None)


def test_the_size_that_is_told_is_that_of_the_larger_factor(chain) -> None:
    first = chain(LoraRule.ROLORA)[0]  # a file of 100 bytes with B, of 300 with both
    assert round_n_bytes(lora_of(LoraRule.ROLORA), first) == 200
    assert round_n_bytes(lora_of(LoraRule.FFA_LORA), first) == 100
