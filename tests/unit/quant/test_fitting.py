"""Calibration by two probes, and the choice of a step's settings."""

from dataclasses import replace

import pytest

from quant.errors import MemoryLimitError
from quant.fitting import (
    MOST_MICRO_COST_TOKENS,
    USABLE_FRAC,
    Calibration,
    Probe,
    Workload,
    calibrate,
    choose,
    least,
    limit_for,
    longest_that_fits,
    micro_cost,
)
from quant.memory import MICRO_COST_TOKENS, Device, StepSettings
from quant.model_shape import FloatType, LoraShape, ModelShape

GB = 10**9
SHAPE = ModelShape(
    model_type="llama",
    hidden=4096,
    intermediate=11008,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    vocab=32000,
    max_positions=4096,
)
WORKLOAD = Workload(
    shape=SHAPE,
    lora=LoraShape(rank=8, modules=frozenset(SHAPE.linears)),
    device=Device.cuda(),
    max_length=512,
)
ON_CPU = replace(WORKLOAD, device=Device.cpu())
CARDS = [6, 8, 10, 12, 16, 24, 48, 80]


# Calibration


def test_corrected_prediction_meets_both_probes() -> None:
    """Guarantee 1 of `calibrate`."""
    probes = [Probe(predicted=300, measured=420), Probe(predicted=1100, measured=1380)]
    found = calibrate(probes)
    assert found.slope == pytest.approx(1.2)
    assert found.offset == pytest.approx(60)
    assert [found.offset + found.slope * p.predicted for p in probes] == pytest.approx([420, 1380])


@pytest.mark.parametrize(
    "measured", [(900, 500), (900, 900), (420, 1380)], ids=["falls", "flat", "rises"]
)
def test_corrected_prediction_is_never_below_a_measurement(measured: tuple[int, int]) -> None:
    """Guarantee 2 of `calibrate`."""
    probes = [
        Probe(predicted=300, measured=measured[0]),
        Probe(predicted=1100, measured=measured[1]),
    ]
    found = calibrate(probes)
    for probe in probes:
        assert found.offset + found.slope * probe.predicted >= probe.measured - 1e-6


@pytest.mark.parametrize(
    "probes",
    [
        [],
        [Probe(predicted=1, measured=1)],
        [Probe(predicted=0, measured=1), Probe(predicted=2, measured=2)],
        [Probe(predicted=1, measured=1), Probe(predicted=2, measured=-2)],
    ],
    ids=["none", "one", "nothing-predicted", "nothing-measured"],
)
def test_calibration_refuses_what_is_no_pair_of_probes(probes: list[Probe]) -> None:
    with pytest.raises(ValueError, match="two probes"):
        calibrate(probes)


@pytest.mark.parametrize("cost", [200, 1500, 60_000])
def test_a_micro_batchs_cost_is_what_its_tokens_do_not_explain(cost: int) -> None:
    """Guarantee 1 of `micro_cost`."""
    assert micro_cost({1024: 2e-4 * (cost + 1024), 256: 2e-4 * (cost + 256)}) == cost


@pytest.mark.parametrize(
    ("times", "cost"),
    [
        ((1.0, 1.0), MOST_MICRO_COST_TOKENS),
        ((1.0, 0.5), MOST_MICRO_COST_TOKENS),
        ((1.0, 1.0 + 1e-9), MOST_MICRO_COST_TOKENS),
        ((1.0, 9.0), MICRO_COST_TOKENS),
        ((1.0, 4.0), MICRO_COST_TOKENS),
    ],
)
def test_a_micro_batchs_cost_has_limits(times: tuple[float, float], cost: int) -> None:
    """Guarantee 2 of `micro_cost`."""
    assert micro_cost({256: times[0], 1024: times[1]}) == cost


def test_a_micro_batchs_cost_takes_two_times() -> None:
    with pytest.raises(ValueError, match="two steps, not 1"):
        micro_cost({256: 1.0})


def test_calibration_corrects_the_step_and_leaves_what_stands() -> None:
    settings = StepSettings(micro_tokens=2048, n_checkpointed_layers=10)
    raw = WORKLOAD.predict(settings).estimate
    corrected = WORKLOAD.predict(settings, Calibration(offset=3e8, slope=1.25)).estimate
    assert corrected.standing == raw.standing
    assert corrected.step == pytest.approx(3e8 + 1.25 * raw.step, abs=5)
    tensors = corrected.standing + corrected.step
    assert corrected.fragmentation == pytest.approx(0.05 * tensors, abs=1)


def test_a_machine_of_the_predicted_kind_needs_no_correction() -> None:
    probes = []
    for n_tokens in (256, 1024):
        step = replace(WORKLOAD, max_length=n_tokens).predict(
            StepSettings(micro_tokens=n_tokens, n_checkpointed_layers=32)
        )
        probes.append(Probe(predicted=step.estimate.step, measured=step.estimate.step))
    found = calibrate(probes)
    assert found.slope == pytest.approx(1.0)
    assert found.offset == pytest.approx(0.0, abs=1.0)


# The largest micro-batch of a budget


@pytest.mark.parametrize("max_length", [1, 100, 512, 2048, 4000])
@pytest.mark.parametrize("micro_tokens", [256, 2048, 4096])
def test_predicted_micro_batch_is_as_large_as_the_budget_allows(
    micro_tokens: int, max_length: int
) -> None:
    batch = replace(WORKLOAD, max_length=max_length).batch(micro_tokens)
    assert batch.n_tokens >= max(micro_tokens, max_length)
    assert batch.length >= max_length
    assert batch.n_tokens < max(micro_tokens, max_length) + batch.n_sequences


# The choice


@pytest.mark.parametrize("gigabytes", CARDS)
@pytest.mark.parametrize("device", [Device.cuda(), Device.cpu()], ids=["cuda", "cpu"])
def test_choice_stays_within_92_percent_of_the_limit(device: Device, gigabytes: int) -> None:
    """Guarantee 1 of `choose`."""
    found = choose(replace(WORKLOAD, device=device), limit_bytes=gigabytes * GB)
    assert found.estimate.total <= 0.92 * gigabytes * GB


@pytest.mark.parametrize("gigabytes", CARDS)
def test_no_more_layers_are_checkpointed_than_needed(gigabytes: int) -> None:
    """Guarantee 2 of `choose`."""
    found = choose(WORKLOAD, limit_bytes=gigabytes * GB)
    n_checkpointed = found.settings.n_checkpointed_layers
    if n_checkpointed == 0:
        return
    fewer = replace(found.settings, n_checkpointed_layers=n_checkpointed - 1)
    assert WORKLOAD.predict(fewer).estimate.total > USABLE_FRAC * gigabytes * GB


def test_some_card_of_the_list_needs_some_but_not_all_layers_checkpointed() -> None:
    chosen = [choose(WORKLOAD, limit_bytes=card * GB).settings for card in CARDS]
    counts = [settings.n_checkpointed_layers for settings in chosen]
    assert counts == sorted(counts, reverse=True)
    assert any(0 < count < SHAPE.n_layers for count in counts)
    assert counts[-1] == 0


@pytest.mark.parametrize("gigabytes", CARDS)
def test_gpu_fills_2048_tokens_before_it_spares_checkpoints(gigabytes: int) -> None:
    """Guarantee 3 of `choose`."""
    found = choose(WORKLOAD, limit_bytes=gigabytes * GB).settings
    if found.micro_tokens < 2048:
        filled = [
            WORKLOAD.predict(
                StepSettings(micro_tokens=2048, loss_chunk=256, n_checkpointed_layers=n)
            )
            for n in range(SHAPE.n_layers + 1)
        ]
        assert min(f.estimate.total for f in filled) > USABLE_FRAC * gigabytes * GB


def test_small_card_gets_small_micro_batches_and_a_large_one_large() -> None:
    small, large = (choose(WORKLOAD, limit_bytes=card * GB).settings for card in (6, 80))
    assert small.micro_tokens < 2048
    assert large == StepSettings(micro_tokens=8192)


def test_cpu_takes_smaller_micro_batches_before_it_computes_twice() -> None:
    roomy = choose(ON_CPU, limit_bytes=200 * GB).settings
    assert roomy == StepSettings()
    weights = SHAPE.weight_bytes(FloatType.FLOAT32)
    tight = choose(ON_CPU, limit_bytes=weights + 12 * GB).settings
    assert tight.micro_tokens < 4096
    assert tight.n_checkpointed_layers == 0


def test_calibration_changes_the_choice() -> None:
    plain = choose(WORKLOAD, limit_bytes=24 * GB)
    assert plain.settings.n_checkpointed_layers == 0
    dearer = choose(WORKLOAD, limit_bytes=24 * GB, calibration=Calibration(slope=2.0))
    assert dearer.settings.n_checkpointed_layers > 0
    assert dearer.estimate.total <= 0.92 * 24 * GB


def test_private_training_counts_the_gradients_of_each_example() -> None:
    private = replace(WORKLOAD, private=True)
    settings = StepSettings(micro_tokens=4096)
    assert private.predict(settings).estimate.per_example == 8 * 4 * 19_988_480
    assert (
        private.predict(StepSettings(micro_tokens=512)).estimate.per_example == 4 * 4 * 19_988_480
    )


def test_what_cannot_fit_is_refused_with_what_is_needed() -> None:
    with pytest.raises(MemoryLimitError) as refusal:
        choose(WORKLOAD, limit_bytes=5 * GB)
    needed = least(WORKLOAD).estimate.total
    assert str(refusal.value) == (
        f"training with examples of 512 tokens needs {needed / GB:.1f} GB at the least, and 4.6 GB "
        f"(92% of 5.0 GB) may be used: allow {limit_for(needed) / GB:.1f} GB, or take shorter "
        "examples or a smaller base"
    )
    assert choose(WORKLOAD, limit_bytes=limit_for(needed)).estimate.total == needed
    with pytest.raises(MemoryLimitError):
        choose(WORKLOAD, limit_bytes=int(needed / USABLE_FRAC) - GB // 100)


def test_longest_example_that_fits_fits_and_a_longer_one_does_not() -> None:
    limit = 6 * GB
    longest = longest_that_fits(WORKLOAD, limit_bytes=limit)
    assert longest is not None
    assert longest % 64 == 0
    assert choose(replace(WORKLOAD, max_length=longest), limit_bytes=limit)
    with pytest.raises(MemoryLimitError):
        choose(replace(WORKLOAD, max_length=longest + 64), limit_bytes=limit)
    assert longest_that_fits(WORKLOAD, limit_bytes=GB) is None
    assert longest_that_fits(WORKLOAD, limit_bytes=1000 * GB) == SHAPE.max_positions


@pytest.mark.parametrize("gigabytes", [10, 12, 16, 24, 80])
def test_private_training_has_as_many_examples_at_once_as_fit(gigabytes: int) -> None:
    """Else a logical batch of short examples is cut into many small micro-batches."""
    private = replace(WORKLOAD, private=True)
    limit = gigabytes * GB
    choice = choose(private, limit_bytes=limit)
    n_examples = choice.settings.max_examples
    assert n_examples is not None
    assert choice.estimate.total <= USABLE_FRAC * limit
    assert choice.estimate.per_example == n_examples * 4 * 19_988_480
    twice = private.predict(replace(choice.settings, max_examples=2 * n_examples))
    assert n_examples == 64 or twice.estimate.total > USABLE_FRAC * limit
