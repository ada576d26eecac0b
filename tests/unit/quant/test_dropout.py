"""Dropout as a function of example and layer."""

import numpy as np
import pytest
import torch

from quant.dropout import _running_sums, drop, dropped_places, streams_of

D = 48


def mask(
    n_tokens: int, seeds: list[int], *, layer: int = 3, probability: float = 0.05
) -> np.ndarray:
    x = torch.ones(len(seeds), n_tokens, D)
    streams = streams_of(torch.tensor(seeds), n_layers=layer + 1)[layer]
    places = dropped_places(x, streams=streams, probability=probability)
    return drop(x, places).numpy() == 0.0


@pytest.mark.parametrize("probability", [0.01, 0.05, 0.3, 0.9])
def test_guarantee_1_each_value_is_dropped_with_the_probability(probability: float) -> None:
    found = mask(400, list(range(20)), probability=probability)
    n_values = found.size
    spread = (probability * (1 - probability) / n_values) ** 0.5
    assert abs(found.mean() - probability) < 4.5 * spread
    # Neighbours, in a token and across tokens, know nothing of each other.
    flat = found.reshape(20, -1).astype(np.float64)
    for distance in (1, 2, D):
        together = (flat[:, distance:] * flat[:, :-distance]).mean()
        assert abs(together - probability**2) < 6 * probability / n_values**0.5


def test_guarantee_1_examples_and_layers_have_masks_of_their_own() -> None:
    one, other = mask(300, [7, 8])
    deeper = mask(300, [7], layer=4)[0]
    for a, b in ((one, other), (one, deeper)):
        together = float((a & b).mean())
        assert abs(together - 0.05**2) < 5 * (0.05**2 / a.size) ** 0.5


@pytest.mark.parametrize("seed", [0, -1, 2**62, -(2**63)])
def test_guarantee_2_neither_padding_nor_company_changes_an_examples_mask(seed: int) -> None:
    alone = mask(37, [seed])[0]
    np.testing.assert_array_equal(mask(90, [4, seed, 5])[1][:37], alone)


def test_examples_that_a_base_hands_on_as_one_row_of_tokens_keep_their_masks() -> None:
    x = torch.ones(2, 30, D)
    streams = torch.tensor([1, 2])
    together = drop(x, dropped_places(x, streams=streams, probability=0.2))
    flat = x.reshape(60, D)
    apart = drop(flat, dropped_places(flat, streams=streams, probability=0.2))
    assert torch.equal(together.reshape(60, D), apart)


def test_another_number_of_streams_than_of_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 streams for a batch of shape"):
        dropped_places(torch.ones(3, 4, D), streams=torch.tensor([1, 2]), probability=0.1)


def test_a_gpus_way_of_adding_up_gives_the_same_sums() -> None:
    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    gaps = torch.randint(0, 60, (3, 4 * 512), generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        _running_sums(gaps.as_subclass(OnGpu)).as_subclass(torch.Tensor), gaps.cumsum(1)
    )
