"""How unlike the clients of a partition are, in numbers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulations.errors import PartitionError
from simulations.partition.schemes import IndexArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Heterogeneity:
    """Clients against the federation, which is all clients' records together.

    Attributes:
        total_variation: Of each client's distribution of categories from the federation's,
            float64 [N]: half the sum of absolute differences, the share of its records that would
            have to be of another category. 0 if alike; 1 − share for a client of one category
            that has this share of the federation.
        effective_categories: Of each client, float64 [N]: exp of the entropy of its distribution,
            so k where it holds k categories alike and nothing else.
        federation_effective_categories: The same of the federation.
        volume_gini: Gini coefficient of the clients' numbers of records: 0 if equal, towards 1
            where one has nearly all.
    """

    total_variation: FloatArray
    effective_categories: FloatArray
    federation_effective_categories: float
    volume_gini: float

    @property
    def mean_total_variation(self) -> float:
        """Mean over clients, each counting alike; by chance above 0 where clients have few."""
        return float(self.total_variation.mean())

    @property
    def mean_effective_categories(self) -> float:
        """Mean over clients, each counting alike."""
        return float(self.effective_categories.mean())

    def as_json(self) -> dict[str, float]:
        """The numbers that speak for all clients."""
        return {
            "mean_total_variation": self.mean_total_variation,
            "mean_effective_categories": self.mean_effective_categories,
            "federation_effective_categories": self.federation_effective_categories,
            "volume_gini": self.volume_gini,
        }


def measure_heterogeneity(counts: IndexArray) -> Heterogeneity:
    """Measure how far clients are from what they hold together.

    Guarantees:
        1. Where all clients have the same distribution, every total variation is 0.
        2. Of a client with one category alone, it is 1 minus the category's share.
        3. The order of clients and of categories does not matter, nor do categories nobody holds.

    Args:
        counts: Records of each client and category, int64 [N, C], as `Partition.counts` gives.

    Raises:
        PartitionError: There is no client, or one without a record.
    """
    if counts.size == 0 or not (counts.sum(axis=1) > 0).all():
        msg = "a client without records has no distribution to measure"
        raise PartitionError(msg)
    volumes = counts.sum(axis=1)  # [N]
    local = counts / volumes[:, np.newaxis]  # [N, C]
    federation = counts.sum(axis=0) / volumes.sum()  # [C]
    return Heterogeneity(
        total_variation=0.5 * np.abs(local - federation).sum(axis=1),
        effective_categories=_effective(local),
        federation_effective_categories=float(_effective(federation[np.newaxis])[0]),
        volume_gini=_gini(volumes),
    )


def _effective(shares: FloatArray) -> FloatArray:
    """Exp of the entropy of each row; 0·log 0 is 0."""
    logarithms = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return np.asarray(np.exp(-(shares * logarithms).sum(axis=1)), np.float64)


def _gini(volumes: IndexArray) -> float:
    """Half the mean absolute difference of two clients, over the mean."""
    n = volumes.size
    ranks = 2.0 * np.arange(1, n + 1) - n - 1.0
    return float((ranks * np.sort(volumes)).sum() / (n * volumes.sum()))
