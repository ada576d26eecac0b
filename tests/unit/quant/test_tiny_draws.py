"""Single draws: numpy's own, one for one."""

import numpy as np
import pytest

from quant.tiny.draws import Draws

BOUNDS = (1, 2, 3, 7, 12, 13, 36, 48, 1000, 65537, 2**31, 2**31 + 1, 3 * 2**30 + 5, 2**32 - 1)


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.MT19937])
def test_every_draw_is_the_generator_s_own_which_goes_on_behind_it(
    kind: type[np.random.BitGenerator],
) -> None:
    ours, theirs = (np.random.Generator(kind(5)) for _ in range(2))
    draws = Draws(ours)
    for round_number in range(300):
        for n in BOUNDS:
            assert draws.below(n) == theirs.integers(n)
        items = "abcdefghij"[: 1 + round_number % 10]
        assert draws.pick(items) == items[theirs.integers(len(items))]
        assert draws.shuffled(items) == [items[i] for i in theirs.permutation(len(items))]
        assert ours.random() == theirs.random()


def test_words_that_would_favour_small_numbers_are_refused() -> None:
    # Of four equal parts of the words this bound has no use for one.
    n = 3 * 2**30
    drawn = np.array([Draws(np.random.default_rng(seed)).below(n) for seed in range(4000)])
    counts = np.bincount(drawn // 2**30, minlength=3)
    assert np.abs(counts - 4000 / 3).max() < 4 * np.sqrt(4000 * 2 / 9)
