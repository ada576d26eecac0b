"""Known attacks on updates that are not alike: the default pipeline against the plain mean.

Honest updates are a common signal, one of four directions of kind (whose data differ), noise of
three times the signal, and lengths that vary. A fifth of the units collude. Errors are distances to
the honest units' own mean, in lengths of that mean.
"""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from aggregator_server.aggregation.robust.outcome import Rule
from aggregator_server.aggregation.robust.pipeline import Mode
from aggregator_server.aggregation.robust.rules import aggregate
from aggregator_server.aggregation.robust.units import ArrayUnits
from protocol.layout import VectorLayout

N_VALUES = 4000
LAYOUT = VectorLayout.of_shapes({"a": (N_VALUES // 2,), "b": (N_VALUES // 2,)})


def make_honest(rng, n):
    signal = rng.standard_normal(N_VALUES)
    kinds = rng.standard_normal((4, N_VALUES))
    noise = rng.standard_normal((n, N_VALUES))
    updates = signal + 1.2 * kinds[rng.integers(0, 4, n)] + 3.0 * noise
    return updates * rng.lognormal(0.0, 0.3, (n, 1)) / np.sqrt(N_VALUES)


def scaling(rng, honest, m):
    """Honest updates, a hundred times as long and turned round."""
    return -100.0 * honest[rng.integers(0, len(honest), m)]


def scaling_ahead(rng, honest, m):
    """One common direction, a hundred times as long."""
    return 100.0 * np.tile(rng.standard_normal(N_VALUES) / np.sqrt(N_VALUES), (m, 1))


def sign_flip(rng, honest, m):
    """The honest mean turned round, at an honest length."""
    mean = honest.mean(axis=0)
    length = np.median(np.linalg.norm(honest, axis=1))
    jitter = 0.1 * rng.standard_normal((m, N_VALUES)) / np.sqrt(N_VALUES)
    return -length * (mean / np.linalg.norm(mean) + jitter)


def alie(z):
    """A little is enough (Baruch et al. 2019): every value z standard deviations off the mean."""

    def attack(rng, honest, m):
        jitter = 0.1 * rng.standard_normal((m, N_VALUES)) / np.sqrt(N_VALUES)
        return honest.mean(axis=0) - z * honest.std(axis=0) + jitter

    return attack


def z_max(n, m):
    """The paper's z: as many honest values as the attack needs for a majority lie beyond it."""
    n_supporters = n // 2 + 1 - m
    return NormalDist().inv_cdf((n - m - n_supporters) / (n - m))


def min_max(rng, honest, m):
    """As far against the mean as no farther from any honest update than these are (NDSS 2021)."""
    mean = honest.mean(axis=0)
    against = -mean / np.linalg.norm(mean)
    widest = max(np.linalg.norm(honest - one, axis=1).max() for one in honest)
    low, high = 0.0, 1e3
    for _ in range(40):
        middle = (low + high) / 2
        farthest = np.linalg.norm(honest - (mean + middle * against), axis=1).max()
        low, high = (middle, high) if farthest <= widest else (low, middle)
    jitter = 0.1 * rng.standard_normal((m, N_VALUES)) / np.sqrt(N_VALUES)
    return mean + low * against + jitter


def errors(
    attack: Callable[..., np.ndarray], rules: tuple[Rule, ...], *, n: int, m: int, mode: Mode
) -> dict[Rule, float]:
    """The largest error over three draws, by rule."""
    worst = dict.fromkeys(rules, 0.0)
    for draw in range(3):
        rng = np.random.default_rng(draw)
        honest = make_honest(rng, n - m)
        means = np.concatenate([honest, attack(rng, honest, m)]).astype(np.float32)
        order = rng.permutation(n)
        units = ArrayUnits(means[order], np.ones(n, np.int64))
        honest_mean = honest.mean(axis=0)
        for rule in rules:
            seed = bytes([draw]) * 32
            found = aggregate(units, rule, mode=mode, layout=LAYOUT, seed=seed)
            gap = np.linalg.norm(found.mean - honest_mean) / np.linalg.norm(honest_mean)
            worst[rule] = max(worst[rule], float(gap))
    return worst


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(
    ("attack", "harm"),
    [
        pytest.param(scaling, 20.0, id="scaling"),
        pytest.param(scaling_ahead, 10.0, id="scaling_ahead"),
        pytest.param(sign_flip, 0.6, id="sign_flip"),
        pytest.param(alie(1.5), 0.6, id="alie_1.5"),
        pytest.param(min_max, 0.5, id="min_max"),
    ],
)
def test_the_pipeline_stays_near_the_honest_mean_where_the_plain_mean_does_not(attack, harm, mode):
    found = errors(attack, (Rule.MEAN, Rule.PIPELINE), n=40, m=8, mode=mode)
    assert found[Rule.MEAN] > harm
    assert found[Rule.PIPELINE] < 0.35
    assert found[Rule.PIPELINE] < 0.6 * found[Rule.MEAN]


def test_alie_at_the_papers_z_max_hides_among_the_honest_and_moves_the_mean_little():
    z = z_max(40, 8)
    assert 0.2 < z < 0.4
    found = errors(alie(z), (Rule.MEAN, Rule.PIPELINE), n=40, m=8, mode=Mode.OPEN)
    assert found[Rule.PIPELINE] < 0.45


def test_without_an_attack_a_quarter_of_unlike_updates_costs_little():
    def nobody(rng, honest, m):
        return np.zeros((m, N_VALUES))

    found = errors(nobody, (Rule.PIPELINE,), n=40, m=0, mode=Mode.OPEN)
    assert found[Rule.PIPELINE] < 0.45


@pytest.mark.parametrize("attack", [scaling, scaling_ahead])
def test_under_eight_units_the_capped_median_bounds_what_two_colluders_do(attack):
    found = errors(attack, (Rule.MEAN, Rule.PIPELINE), n=7, m=2, mode=Mode.OPEN)
    assert found[Rule.MEAN] > 10.0
    assert found[Rule.PIPELINE] < 1.0
