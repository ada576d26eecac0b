"""Who takes part in each round, and what becomes of them."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from protocol.blocks import RoundsBlock
from simulations.errors import ExperimentError, PopulationError
from simulations.lab.experiment import PopulationSection
from simulations.lab.records import Fate
from simulations.lab.timetable import PlannedRound, alone, timetable

DEVICE = """
[[device]]
name = "{name}"
share = 1
tokens_per_s = {speed}
up_bytes_per_s = 1e6
down_bytes_per_s = 1e6
{more}
"""


def rounds(
    section: PopulationSection | None = None,
    *,
    n: int = 5,
    n_clients: int = 20,
    n_tokens: list[int] | None = None,
    seed: int = 1,
    **rules: Any,
) -> list[PlannedRound]:
    values = {"n_rounds": 5, "cohort_target": 5, "min_cohort": 2, "over_selection": 1.0, **rules}
    found = timetable(
        section or PopulationSection(),
        RoundsBlock(**values),
        n_tokens=n_tokens,
        n_clients=n_clients,
        down_n_bytes=1000,
        up_n_bytes=1000,
        seed=seed,
    )
    return list(itertools.islice(found, n))


def test_without_a_population_all_that_are_selected_count_and_no_time_passes() -> None:
    for number, one in enumerate(rounds(), start=1):
        assert one.number == number
        assert set(one.fates.values()) == {Fate.COUNTED}
        assert one.cohort == tuple(sorted(one.fates))
        assert len(one.cohort) == 5
        assert one.waited_s is one.duration_s is one.failure is None


def test_over_selection_never_makes_a_cohort_larger_than_its_target() -> None:
    """As the server closes a round: who comes later, in no time too, comes too late."""
    for one in rounds(n=20, over_selection=2.0):
        assert len(one.fates) == 10
        assert len(one.cohort) == 5
        assert list(one.fates.values()).count(Fate.LATE) == 5
    found = rounds(PopulationSection(drop_out=0.4), n=50, over_selection=2.0)
    sizes = {len(one.cohort) for one in found}
    assert max(sizes) == 5
    agents = {agent for one in found for agent in one.cohort}
    assert agents == set(range(20))  # no client comes first of all


def test_equal_seeds_select_the_same_and_others_others() -> None:
    assert rounds() == rounds()
    assert rounds() != rounds(seed=2)
    cohorts = {one.cohort for one in rounds(n=20)}
    assert len(cohorts) > 10


def test_every_client_is_selected_now_and_then() -> None:
    seen = {agent for one in rounds(n=60) for agent in one.fates}
    assert seen == set(range(20))


def test_a_cohort_larger_than_the_run_is_all_of_it() -> None:
    assert {one.cohort for one in rounds(n_clients=3)} == {(0, 1, 2)}


def test_drop_outs_are_as_many_as_were_asked_for_and_never_count() -> None:
    section = PopulationSection(drop_out=0.3)
    found = rounds(section, n=200, over_selection=2.0, min_cohort=1, cohort_target=10)
    fates = [fate for one in found for fate in one.fates.values()]
    assert abs(fates.count(Fate.DROPPED) / len(fates) - 0.3) < 0.04
    for one in found:
        assert set(one.cohort) == {a for a, fate in one.fates.items() if fate is Fate.COUNTED}


def test_a_round_that_too_few_finish_says_why() -> None:
    found = rounds(PopulationSection(drop_out=0.9), n=20, min_cohort=5)
    failed = [one for one in found if one.failure is not None]
    assert failed
    assert all("too few uploads" in (one.failure or "") for one in failed)
    assert [one.number for one in found] == list(range(1, 21))


def test_a_population_s_devices_decide_who_is_late(tmp_path: Path) -> None:
    path = tmp_path / "population.toml"
    devices = DEVICE.format(name="fast", speed=1000, more="spread = 0.3")
    devices += DEVICE.format(name="slow", speed=1, more="spread = 0.3")
    path.write_text("n_agents = 3\n" + devices)  # the run says how many there are
    section = PopulationSection(file=str(path))
    found = rounds(section, n=10, n_tokens=[500] * 20, over_selection=2.0)
    for one in found:
        assert one.waited_s == 0.0
        assert one.duration_s is not None
        assert one.duration_s > 0.0
    assert any(Fate.LATE in one.fates.values() for one in found)
    assert max(agent for one in found for agent in one.fates) > 3
    # With ten times as much to do for everyone, rounds take about ten times as long.
    longer = rounds(section, n=10, n_tokens=[5000] * 20, over_selection=2.0)
    totals = [sum(one.duration_s or 0.0 for one in each) for each in (longer, found)]
    assert totals[0] / totals[1] == pytest.approx(10, rel=0.05)


def test_a_population_s_hours_decide_when_a_round_can_open(tmp_path: Path) -> None:
    path = tmp_path / "population.toml"
    hours = "hours = [" + ",".join(["0"] * 20 + ["1"] * 4) + "]"
    path.write_text("n_agents = 1\n" + DEVICE.format(name="night", speed=100, more=hours))
    first = rounds(PopulationSection(file=str(path)), n=1, n_tokens=[100] * 20)[0]
    assert first.waited_s is not None
    assert 0 < first.waited_s <= 24 * 3600


def test_a_population_that_is_never_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "population.toml"
    path.write_text("n_agents = 1\n" + DEVICE.format(name="gone", speed=100, more="hours = [0]"))
    with pytest.raises(PopulationError, match="never"):
        rounds(PopulationSection(file=str(path)), n_tokens=[100] * 20)
    with pytest.raises(PopulationError, match=r"cannot read .*nowhere.toml"):
        rounds(PopulationSection(file=str(tmp_path / "nowhere.toml")), n_tokens=[100] * 20)


def test_more_agents_than_there_are_clients_are_refused() -> None:
    with pytest.raises(ExperimentError, match="a round needs 4 agents, and there are 3 clients"):
        rounds(n_clients=3, min_cohort=4)


def test_a_baseline_has_one_round_of_one_client() -> None:
    [only] = alone(4)
    assert only == PlannedRound(number=1, fates={4: Fate.COUNTED}, n_fetched=1)
    assert only.cohort == (4,)
