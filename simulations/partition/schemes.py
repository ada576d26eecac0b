"""Splits a data set over clients: the two schemes of arXiv 2305.05644, and four to compare with.

All begin alike: sort by category, draw the held-out records of each, keep the rest in category
order. What is split is a column, called categories here whatever it holds: tasks, languages, files
(see `columns`). No scheme looks at a record's text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from simulations.errors import PartitionError

IndexArray = NDArray[np.int64]

DEFAULT_MIN_RECORDS: Final = 40
"""The paper's least number of records of a client, for its second scheme."""

_LARGEST_ALPHA: Final = 1e9
"""Beyond it shares are equal to a record, and far beyond it the draws overflow."""

_HELD_OUT_STREAM, _SPLIT_STREAM = 0, 1
"""Which stream of a seed draws the held-out records, and which the split."""


class Scheme(StrEnum):
    """How records are split over clients."""

    EQUAL_VOLUME = "equal-volume"
    """The paper's first: equal volume, few categories a client."""
    SKEWED = "skewed"
    """The paper's second, which it ran: unequal volume and skewed categories."""
    IID = "iid"
    """Records at random, equal volume."""
    DIRICHLET = "dirichlet"
    """Each category by proportions from a symmetric Dirichlet distribution, without a cap."""
    QUANTITY = "quantity"
    """Records at random, volumes by proportions from one symmetric Dirichlet distribution."""
    BY_CATEGORY = "by-category"
    """By the column: one of its values a client (a category, or a language if that is split);
    several, whole, where there are fewer clients than values."""


DRAWN_SCHEMES: Final = (Scheme.SKEWED, Scheme.DIRICHLET, Scheme.QUANTITY)
"""The schemes that draw volumes, and draw again where a client gets too little."""


def default_min_records(scheme: Scheme) -> int:
    """The least number of records of a client: the paper's for its own scheme, else 1."""
    return DEFAULT_MIN_RECORDS if scheme is Scheme.SKEWED else 1


@dataclass(frozen=True, kw_only=True)
class PartitionRecipe:
    """What a partition is made by.

    Attributes:
        scheme: How records are split.
        n_clients: Over how many clients, N.
        seed: Not negative. Equal recipes on equal categories give equal partitions.
        n_held_out: Records of each category that no client gets.
        alpha: Concentration of the Dirichlet distribution of `DRAWN_SCHEMES`.
        min_records: With fewer at its smallest client, `DRAWN_SCHEMES` draw again; the other
            schemes do not draw volumes.
        max_tries: How often they draw before they give up.
    """

    scheme: Scheme
    n_clients: int
    seed: int
    n_held_out: int = 10
    alpha: float = 0.5
    min_records: int = DEFAULT_MIN_RECORDS
    max_tries: int = 1000

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            PartitionError: A value out of its range.
        """
        for name, least in (
            *(("n_clients", 1), ("seed", 0), ("n_held_out", 0)),
            *(("min_records", 1), ("max_tries", 1)),
        ):
            if getattr(self, name) < least:
                msg = f"{name} is {getattr(self, name)}; it must be at least {least}"
                raise PartitionError(msg)
        if not 0.0 < self.alpha <= _LARGEST_ALPHA:
            msg = f"alpha is {self.alpha}; it must be above 0 and at most {_LARGEST_ALPHA:g}"
            raise PartitionError(msg)


@dataclass(frozen=True, kw_only=True, eq=False)
class Partition:
    """Indices of records: those held out, and each client's.

    Attributes:
        recipe: What it was made by.
        held_out: Indices, ascending; read-only.
        clients: For each client its indices, ascending, at least one; read-only.
        n_tries: Draws until the smallest client had enough; 1 for schemes that draw no volumes.
    """

    recipe: PartitionRecipe
    held_out: IndexArray
    clients: tuple[IndexArray, ...]
    n_tries: int

    def __post_init__(self) -> None:
        """Check that no record is given twice, and that each client has one.

        Raises:
            PartitionError: The indices are no partition.
        """
        for number, share in enumerate(self.clients):
            if share.size == 0:
                msg = (
                    f"client {number} of {len(self.clients)} gets no record; choose fewer clients "
                    "or another scheme"
                )
                raise PartitionError(msg)
        parts = (self.held_out, *self.clients)
        given = np.sort(np.concatenate(parts))
        if not np.array_equal(given, np.arange(given.size)):
            msg = "the indices are no partition: a record is given twice, or to nobody"
            raise PartitionError(msg)
        for part in parts:
            part.flags.writeable = False

    @property
    def n_records(self) -> int:
        """Records in all, those held out included."""
        return self.held_out.size + sum(share.size for share in self.clients)

    @property
    def sizes(self) -> IndexArray:
        """Records of each client, int64 [N]."""
        return np.array([share.size for share in self.clients], np.int64)

    def counts(self, categories: Sequence[str]) -> tuple[tuple[str, ...], IndexArray]:
        """How many records of each category a client has.

        Args:
            categories: The column that was split.

        Returns:
            The categories' names in alphabetical order, C of them, and int64 [N, C].

        Raises:
            PartitionError: The column has another number of records.
        """
        if len(categories) != self.n_records:
            msg = f"{len(categories)} categories for a partition of {self.n_records} records"
            raise PartitionError(msg)
        names, codes = np.unique(np.asarray(categories, np.str_), return_inverse=True)
        rows = [np.bincount(codes[share], minlength=names.size) for share in self.clients]
        return tuple(names.tolist()), np.stack(rows).astype(np.int64)


def make_partition(categories: Sequence[str], recipe: PartitionRecipe) -> Partition:
    """Split records over clients by a column, such as their categories.

    Guarantees:
        1. Every record is either held out or with exactly one client, and no client is empty.
        2. Exactly `n_held_out` records of each category are held out, and which ones depends on
           the seed, not on the scheme or the number of clients.
        3. The same categories and recipe give the same indices; no global generator is used.

    Args:
        categories: Of each record, in the data set's order; `SourceData.column`.
        recipe: How to split.

    Returns:
        The partition.

    Raises:
        PartitionError: A category has too few records, there are more clients than records, or no
            draw in `max_tries` gave the smallest client enough.

    Source: arXiv 2305.05644, section 4.1, and its published code; LEARNING, "The two partition
    schemes, in words".
    """
    names, codes = np.unique(np.asarray(categories, np.str_), return_inverse=True)
    in_order = np.argsort(codes, kind="stable")  # by category, each in the data set's order
    groups = np.split(in_order, np.cumsum(np.bincount(codes))[:-1]) if names.size else []
    rng = _generator(recipe.seed, _HELD_OUT_STREAM)
    held_out, kept = [], []
    for name, group in zip(names, groups, strict=True):
        if group.size < recipe.n_held_out:
            msg = (
                f"{str(name)!r} has {group.size} records, fewer than the {recipe.n_held_out} to "
                "hold out; choose a smaller number"
            )
            raise PartitionError(msg)
        chosen = np.zeros(group.size, np.bool_)
        chosen[rng.choice(group.size, recipe.n_held_out, replace=False)] = True
        held_out.append(group[chosen])
        kept.append(group[~chosen])
    n_left = sum(group.size for group in kept)
    if recipe.n_clients > n_left:
        msg = (
            f"{recipe.n_clients} clients cannot share {n_left} records ({codes.size} less "
            f"{codes.size - n_left} held out); choose fewer clients"
        )
        raise PartitionError(msg)
    split = _SCHEMES[recipe.scheme]
    clients, n_tries = split(kept, recipe, _generator(recipe.seed, _SPLIT_STREAM))
    return Partition(
        recipe=recipe,
        held_out=np.sort(np.concatenate(held_out)),
        clients=tuple(np.sort(share) for share in clients),
        n_tries=n_tries,
    )


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))


_Split = tuple[list[IndexArray], int]
"""Each client's indices, and the number of tries."""


def _equal_volume(
    kept: list[IndexArray], recipe: PartitionRecipe, rng: np.random.Generator
) -> _Split:
    """Two of 2N consecutive shards each; a shard lies in one category or across a border."""
    shards = np.array_split(np.concatenate(kept), 2 * recipe.n_clients)
    order = rng.permutation(len(shards))
    pairs = zip(order[::2], order[1::2], strict=True)
    return [np.concatenate([shards[first], shards[second]]) for first, second in pairs], 1


def _iid(kept: list[IndexArray], recipe: PartitionRecipe, rng: np.random.Generator) -> _Split:
    return np.array_split(rng.permutation(np.concatenate(kept)), recipe.n_clients), 1


def _by_category(
    kept: list[IndexArray], recipe: PartitionRecipe, rng: np.random.Generator
) -> _Split:
    """Deal categories to clients in turn, or clients to categories, whichever are more."""
    shares: list[list[IndexArray]] = [[] for _ in range(recipe.n_clients)]
    for number, group in enumerate(kept):
        owners = range(number, recipe.n_clients, len(kept)) or [number % recipe.n_clients]
        for owner, part in zip(
            owners, np.array_split(rng.permutation(group), len(owners)), strict=True
        ):
            shares[owner].append(part)
    return [np.concatenate(parts) for parts in shares], 1


def _skewed(kept: list[IndexArray], recipe: PartitionRecipe, rng: np.random.Generator) -> _Split:
    """The paper's second scheme: who holds a fair share already gets nothing more."""
    fair_share = sum(group.size for group in kept) / recipe.n_clients
    return _drawn(kept, recipe, rng, cap=fair_share)


def _dirichlet(kept: list[IndexArray], recipe: PartitionRecipe, rng: np.random.Generator) -> _Split:
    return _drawn(kept, recipe, rng, cap=np.inf)


def _quantity(kept: list[IndexArray], recipe: PartitionRecipe, rng: np.random.Generator) -> _Split:
    """One draw for all records, as if they were of one category."""
    return _drawn([np.concatenate(kept)], recipe, rng, cap=np.inf)


def _drawn(
    kept: list[IndexArray], recipe: PartitionRecipe, rng: np.random.Generator, *, cap: float
) -> _Split:
    """Cut each category by drawn proportions, until the smallest client has enough.

    Args:
        kept: Each category's training records.
        recipe: Clients, α, the least number of records, tries.
        rng: Goes on from try to try.
        cap: A client that holds so many records gets none of the categories that follow.
    """
    n_records = sum(group.size for group in kept)
    if recipe.min_records * recipe.n_clients > n_records:
        msg = (
            f"{recipe.n_clients} clients with at least {recipe.min_records} records each need "
            f"{recipe.min_records * recipe.n_clients}; there are {n_records}: choose fewer clients "
            "or a smaller minimum"
        )
        raise PartitionError(msg)
    smallest_yet = 0
    for n_tries in range(1, recipe.max_tries + 1):
        cuts, sizes = _draw_once(kept, recipe, rng, cap)
        smallest = int(sizes.min())
        if smallest >= recipe.min_records:
            return _shares(cuts, recipe.n_clients), n_tries
        smallest_yet = max(smallest_yet, smallest)
    msg = (
        f"{recipe.max_tries} tries, and at best the smallest of {recipe.n_clients} clients had "
        f"{smallest_yet} records of the {recipe.min_records} wanted; choose fewer clients, a "
        f"smaller minimum, or an alpha above {recipe.alpha:g}"
    )
    raise PartitionError(msg)


_Cut = tuple[IndexArray, IndexArray]
"""A category's records in random order, and the N + 1 places between which each client's lie."""


def _draw_once(
    kept: list[IndexArray], recipe: PartitionRecipe, rng: np.random.Generator, cap: float
) -> tuple[list[_Cut], IndexArray]:
    """Draw how each category is cut; with it, how many records each client gets of all."""
    cuts = []
    sizes = np.zeros(recipe.n_clients, np.int64)
    for group in (group for group in kept if group.size):
        shuffled = rng.permutation(group)
        drawn = rng.dirichlet(np.full(recipe.n_clients, recipe.alpha))
        open_share = np.where(sizes < cap, drawn, 0.0)
        if open_share.sum() == 0.0:
            # With a tiny α all of the drawn mass can lie on clients that are full: any one that
            # is not takes the category, as the limit of small α has it.
            open_share[rng.choice(np.flatnonzero(sizes < cap))] = 1.0
        ends = np.cumsum(open_share / open_share.sum()) * group.size
        places = np.append(0, ends.astype(np.int64))
        places[-1] = group.size
        sizes += np.diff(places)
        cuts.append((shuffled, places))
    return cuts, sizes


def _shares(cuts: list[_Cut], n_clients: int) -> list[IndexArray]:
    return [
        np.concatenate([records[places[client] : places[client + 1]] for records, places in cuts])
        for client in range(n_clients)
    ]


_SCHEMES: Final[
    dict[Scheme, Callable[[list[IndexArray], PartitionRecipe, np.random.Generator], _Split]]
] = {
    Scheme.EQUAL_VOLUME: _equal_volume,
    Scheme.SKEWED: _skewed,
    Scheme.IID: _iid,
    Scheme.DIRICHLET: _dirichlet,
    Scheme.QUANTITY: _quantity,
    Scheme.BY_CATEGORY: _by_category,
}
