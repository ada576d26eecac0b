"""How the agent chooses the settings of a step; a fake stands in for the GPU's counters."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from edge_agent.errors import OutOfMemoryError
from edge_agent.training import planning
from edge_agent.training.planning import CudaMeter, choose_settings, measure, workload_of
from protocol.blocks import LoraBlock
from quant.base_model import LoadedBase
from quant.errors import BaseModelError
from quant.fitting import USABLE_FRAC, choose
from quant.lora import AdaptedModel
from quant.memory import StepSettings

GB = 10**9
LONGEST = 40


@dataclass
class FakeMeter:
    """Says what a test wants; the work is really done."""

    limit: int
    answers: list[int | BaseException] = field(default_factory=list)
    times: list[float] = field(default_factory=lambda: [1.0, 4.0])
    n_measured: int = 0
    n_timed: int = 0

    def limit_bytes(self) -> int:
        return self.limit

    def added_bytes(self, work: Callable[[], None]) -> int:
        work()
        answer = self.answers[self.n_measured]
        self.n_measured += 1
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def seconds(self, work: Callable[[], None]) -> float:
        work()
        self.n_timed += 1
        return self.times[self.n_timed > 3]  # three of a size; a disturbed one is longer


@pytest.fixture
def adapted(random_base: LoadedBase) -> AdaptedModel:
    lora = LoraBlock(
        rank=4, alpha=8.0, dropout=0.1, target_modules=("q_proj", "down_proj"), init_seed=7
    )
    return AdaptedModel(random_base, lora)


def predicted(adapted: AdaptedModel, settings: StepSettings, *n_tokens: int) -> list[int]:
    """What steps of one sequence are predicted to add."""
    workload = workload_of(adapted, longest=LONGEST)
    steps = []
    for n in n_tokens:
        probed = replace(workload, max_length=n)
        found = probed.predict(replace(settings, micro_tokens=n)).estimate
        steps.append(found.step)
    return steps


# On the CPU


def test_cpu_with_memory_to_spare_takes_the_default_settings(adapted: AdaptedModel) -> None:
    chosen = choose_settings(adapted, longest=LONGEST, free_ram_bytes=8 * GB)
    assert chosen.settings == StepSettings()
    assert chosen.text == "steps of up to 4,096 tokens"


def test_cpu_uses_at_most_half_of_what_is_free(adapted: AdaptedModel) -> None:
    workload = workload_of(adapted, longest=LONGEST)
    free = 12_000_000
    chosen = choose_settings(adapted, longest=LONGEST, free_ram_bytes=free)
    assert chosen.settings != StepSettings()
    weights = workload.shape.weight_bytes(workload.device.compute)
    assert workload.predict(chosen.settings).estimate.total - weights <= free / 2


def test_cpu_short_of_memory_trains_in_the_smallest_steps_and_says_so(
    adapted: AdaptedModel,
) -> None:
    """Guarantee 2 of `choose_settings`, second half."""
    chosen = choose_settings(adapted, longest=LONGEST, free_ram_bytes=1000)
    assert chosen.settings.micro_tokens == LONGEST
    assert "GB are free, so the smallest" in chosen.text
    assert "\n" not in chosen.text


def test_free_memory_of_the_system_is_asked_for(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr(planning.psutil, "virtual_memory", Memory)
    assert choose_settings(adapted, longest=LONGEST).settings.micro_tokens == LONGEST


def test_a_base_that_cannot_be_predicted_gets_the_default_settings(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guarantee 2 of `choose_settings`, first half."""

    def refuse(*_: object, **__: object) -> None:
        msg = "memory cannot be predicted for 'x'"
        raise BaseModelError(msg)

    monkeypatch.setattr(planning, "read_shape", refuse)
    chosen = choose_settings(adapted, longest=LONGEST, meter=FakeMeter(limit=1))
    assert chosen.settings == StepSettings()
    assert "memory cannot be predicted for 'x'" in chosen.text


# With a meter, as on a GPU


def test_two_probe_steps_correct_the_prediction(adapted: AdaptedModel) -> None:
    first = choose(workload_of(adapted, longest=LONGEST), limit_bytes=GB)
    small, large = predicted(adapted, first.settings, 256, 1024)
    meter = FakeMeter(limit=GB, answers=[2 * small + 1000, 2 * large + 1000])
    calibration = measure(adapted, workload_of(adapted, longest=LONGEST), first, meter)
    assert calibration is not None
    assert meter.n_measured == 2
    assert calibration.slope == pytest.approx(2.0)
    assert calibration.offset == pytest.approx(1000, abs=1)


def test_settings_follow_the_corrected_prediction_and_the_owner_is_told(
    adapted: AdaptedModel,
) -> None:
    workload = workload_of(adapted, longest=LONGEST)
    first = workload.predict(StepSettings())
    limit = int(first.estimate.total / USABLE_FRAC) + 1000
    small, large = predicted(adapted, StepSettings(), 256, 1024)
    exact = choose_settings(
        adapted, longest=LONGEST, meter=FakeMeter(limit=limit, answers=[small, large])
    )
    assert exact.settings == StepSettings()
    dearer = choose_settings(
        adapted, longest=LONGEST, meter=FakeMeter(limit=limit, answers=[3 * small, 3 * large])
    )
    assert dearer.settings.micro_tokens < 4096
    assert dearer.text.startswith("steps of up to ")
    assert dearer.text.endswith("GB, predicted after two probe steps")


def test_the_times_of_probe_steps_say_what_a_micro_batch_costs(adapted: AdaptedModel) -> None:
    """A small base on a fast GPU: starting the kernels takes longer than computing."""
    answers: list[int | BaseException] = [10**6, 4 * 10**6]
    times = [5.0 + 256 * 1e-3, 5.0 + 1024 * 1e-3]
    meter = FakeMeter(limit=GB, answers=answers, times=times)
    chosen = choose_settings(adapted, longest=LONGEST, meter=meter)
    assert chosen.settings.micro_cost_tokens == 5000
    assert meter.n_timed == 6


def test_probes_leave_adapter_and_generators_as_they_were(adapted: AdaptedModel) -> None:
    """Guarantee 1 of `choose_settings`."""
    before = {name: array.tobytes() for name, array in adapted.arrays().items()}
    generator = torch.get_rng_state()
    meter = FakeMeter(limit=GB, answers=[10**6, 4 * 10**6])
    choose_settings(adapted, longest=LONGEST, meter=meter)
    assert meter.n_measured == 2
    assert {name: array.tobytes() for name, array in adapted.arrays().items()} == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(factor.grad is None for factor in adapted.trainable.values())
    assert not adapted.base.model.is_gradient_checkpointing


def test_micro_batches_smaller_than_a_probe_are_not_probed(adapted: AdaptedModel) -> None:
    workload = workload_of(adapted, longest=LONGEST)
    smallest = workload.predict(StepSettings(micro_tokens=LONGEST, loss_chunk=256)).estimate.total
    meter = FakeMeter(limit=int(smallest / USABLE_FRAC) + 1000)
    chosen = choose_settings(adapted, longest=LONGEST, meter=meter)
    assert meter.n_measured == 0
    assert chosen.settings.micro_tokens < 1024
    assert chosen.text.endswith("GB, predicted")


def test_a_card_too_small_is_refused_with_what_is_needed(adapted: AdaptedModel) -> None:
    with pytest.raises(OutOfMemoryError, match=r"needs .* at the least, .* may be used: allow"):
        choose_settings(adapted, longest=LONGEST, meter=FakeMeter(limit=1000))


def test_a_probe_that_does_not_fit_leads_to_the_smallest_steps(adapted: AdaptedModel) -> None:
    meter = FakeMeter(limit=GB, answers=[10**6, torch.OutOfMemoryError("no room")])
    chosen = choose_settings(adapted, longest=LONGEST, meter=meter)
    assert chosen.settings.micro_tokens == LONGEST
    assert "a probe step did not fit" in chosen.text
    assert not adapted.base.model.is_gradient_checkpointing


# The meter of a GPU


def test_cuda_meter_counts_what_is_free_and_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 4 * GB)
    device = torch.device("cuda", 0)
    free = CudaMeter(device=device, max_bytes=None, context_bytes=GB)
    assert free.limit_bytes() == 15 * GB
    assert CudaMeter(device=device, max_bytes=8 * GB, context_bytes=GB).limit_bytes() == 8 * GB
    assert CudaMeter(device=device, max_bytes=80 * GB, context_bytes=GB).limit_bytes() == 15 * GB


def test_cuda_meter_measures_the_peak_above_what_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1000)
    meter = CudaMeter(device=torch.device("cuda", 0), max_bytes=None, context_bytes=0)
    assert meter.added_bytes(lambda: done.append("work")) == 700
    assert done == ["synchronize", "reset", "work", "synchronize"]


def test_cuda_meter_takes_the_time_from_kernel_to_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            done.append(f"record on {stream}")

        def elapsed_time(self, _: object) -> float:
            return 1500.0

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    meter = CudaMeter(device=torch.device("cuda", 0), max_bytes=None, context_bytes=0)
    assert meter.seconds(lambda: done.append("work")) == 1.5
    record = "record on stream of cuda:0"
    assert done == ["synchronize", record, "work", record, "synchronize"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_meter_sees_a_tensor_come_and_go() -> None:
    device = torch.device("cuda", 0)
    meter = CudaMeter(device=device, max_bytes=None, context_bytes=0)
    assert meter.added_bytes(lambda: torch.empty(2**20, device=device).fill_(0)) == 2**22
