"""Clipping and noise on tensors, against one example at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.dp_sgd.mechanism import Mechanism, clip_and_add, release
from privacy.errors import ClippingError
from privacy.noise import SecureStream

SHAPES = {"a": (4, 3), "b": (5,)}
SECRET = bytes(range(32))


def make_noise(secret: bytes, step: int):
    """A stream's numbers, tensor after tensor."""
    stream = SecureStream.of(secret, "test", step)

    def noise(n_values: int) -> np.ndarray:
        values = np.empty(n_values)
        stream.fill_normal(values)
        return values

    return noise


def make_gradients(
    n_examples: int, *, scale: float = 1.0, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, n_examples)  # some are clipped, some are not
    return {
        name: torch.randn(n_examples, *shape, generator=generator)
        * sizes.view(-1, *[1] * len(shape))
        * scale
        for name, shape in SHAPES.items()
    }


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def flat(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensors[name].double().flatten().numpy() for name in SHAPES])


def by_hand(gradients: dict[str, torch.Tensor], clip_norm: float) -> np.ndarray:
    total = np.zeros(sum(math.prod(shape) for shape in SHAPES.values()))
    for row in range(len(gradients["a"])):
        one = flat({name: gradient[row] for name, gradient in gradients.items()})
        total += one * min(1.0, clip_norm / np.linalg.norm(one))
    return total


@settings(max_examples=40, deadline=None)
@given(
    n_examples=st.integers(1, 9),
    clip_norm=st.floats(1e-4, 1e4),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_the_sum_is_that_of_a_loop_over_the_examples(
    n_examples: int, clip_norm: float, scale: float, seed: int
) -> None:
    gradients, totals = make_gradients(n_examples, scale=scale, seed=seed), zeros()
    clipped = clip_and_add(gradients, totals, clip_norm=clip_norm)
    wanted = by_hand(gradients, clip_norm)
    assert np.linalg.norm(flat(totals) - wanted) <= 2e-5 * n_examples * clip_norm
    norms = [
        np.linalg.norm(flat({name: gradient[row] for name, gradient in gradients.items()}))
        for row in range(n_examples)
    ]
    assert clipped.n_examples == n_examples
    assert clipped.n_clipped == sum(norm > clip_norm for norm in norms)
    assert clipped.n_not_finite == 0


@settings(max_examples=60, deadline=None)
@given(exponent=st.floats(-20, 18), clip_exponent=st.floats(-6, 6), seed=st.integers(0, 10_000))
def test_guarantee_1_one_example_moves_the_sum_by_no_more_than_the_clip_norm(
    exponent: float, clip_exponent: float, seed: int
) -> None:
    clip_norm = 10.0**clip_exponent
    generator = torch.Generator().manual_seed(seed)
    one = {
        name: torch.randn(1, *shape, generator=generator) * 10.0**exponent
        for name, shape in SHAPES.items()
    }
    totals = zeros()
    clip_and_add(one, totals, clip_norm=clip_norm)
    assert np.linalg.norm(flat(totals)) <= clip_norm


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_guarantee_2_an_example_that_is_not_finite_adds_zero(bad: float) -> None:
    gradients = make_gradients(5)
    spoilt = {name: gradient.clone() for name, gradient in gradients.items()}
    spoilt["a"][2, 1, 1] = bad
    totals, others = zeros(), zeros()
    clipped = clip_and_add(spoilt, totals, clip_norm=1.0)
    rest = [0, 1, 3, 4]
    clip_and_add({name: g[rest] for name, g in gradients.items()}, others, clip_norm=1.0)
    np.testing.assert_allclose(flat(totals), flat(others), rtol=1e-6)
    assert clipped.n_not_finite == 1


@pytest.mark.parametrize("cuts", [[6], [1] * 6, [2, 4], [5, 1]])
def test_guarantee_3_the_cut_into_calls_does_not_matter(cuts: list[int]) -> None:
    gradients, totals, start = make_gradients(6), zeros(), 0
    for n_examples in cuts:
        part = {name: g[start : start + n_examples] for name, g in gradients.items()}
        clip_and_add(part, totals, clip_norm=0.5)
        start += n_examples
    np.testing.assert_allclose(flat(totals), by_hand(gradients, 0.5), rtol=2e-5, atol=1e-6)


def test_guarantee_4_an_error_in_between_leaves_the_totals_as_they_were(monkeypatch) -> None:
    """Else the trainer, which tries again with less at once, would add an example twice."""
    gradients, totals = make_gradients(3), zeros()
    calls, real = [], torch.tensordot

    def full(*args: object, **options: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == len(SHAPES):
            raise torch.OutOfMemoryError
        return real(*args, **options)

    monkeypatch.setattr(torch, "tensordot", full)
    with pytest.raises(torch.OutOfMemoryError):
        clip_and_add(gradients, totals, clip_norm=1.0)
    assert not flat(totals).any()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda g: g.pop("b"), "b has no gradient of single examples"),
        (lambda g: g.update(c=torch.zeros(3, 2)), "c is not trained here"),
        (lambda g: g.update(b=torch.zeros(5)), "b: gradients of shape"),
        (lambda g: g.update(b=torch.zeros(2, 5)), "different numbers of examples"),
    ],
)
def test_a_tensor_that_cannot_be_clipped_is_named_and_nothing_is_added(spoil, said) -> None:
    gradients, totals = make_gradients(3), zeros()
    spoil(gradients)
    with pytest.raises(ClippingError, match=said):
        clip_and_add(gradients, totals, clip_norm=1.0)
    assert not flat(totals).any()


def test_the_noise_has_the_stated_deviation_and_the_divisor_is_the_expected_batch() -> None:
    mechanism = Mechanism(clip_norm=0.3, noise_multiplier=1.7, expected_batch=12.5)
    n_values = 400_001
    sums = {"a": torch.full((n_values,), 2.0)}
    release(sums, mechanism, make_noise(SECRET, 0))
    std = 1.7 * 0.3 / 12.5
    errors = sums["a"].double().numpy() - 2.0 / 12.5
    assert abs(errors.mean()) < 5 * std / math.sqrt(n_values)
    assert abs(errors.std() / std - 1.0) < 5 / math.sqrt(2 * n_values)


def test_steps_and_secrets_have_noise_of_their_own_and_the_same_ones_the_same() -> None:
    mechanism = Mechanism(clip_norm=1.0, noise_multiplier=1.0, expected_batch=1.0)

    def noise(secret: bytes, step: int) -> np.ndarray:
        sums = {"a": torch.zeros(50_000), "b": torch.zeros(50_000)}
        release(sums, mechanism, make_noise(secret, step))
        return np.concatenate([sums["a"].numpy(), sums["b"].numpy()])

    first = noise(SECRET, 0)
    assert np.array_equal(first, noise(SECRET, 0))
    others = [noise(SECRET, 1), noise(bytes(32), 0), np.roll(first, 1), np.roll(first, 50_000)]
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / math.sqrt(len(first))


@pytest.mark.parametrize("name", ["clip_norm", "noise_multiplier", "expected_batch"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_mechanism_that_is_none_is_refused(name: str, value: float) -> None:
    values = {"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_batch": 8.0, name: value}
    with pytest.raises(ClippingError, match=f"{name} = .*finite and above 0"):
        Mechanism(**values)
