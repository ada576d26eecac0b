"""Simulated rounds: who is there, who finishes, and when the server's own rules close them."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from protocol.blocks import RoundsBlock
from simulations.cli import app
from simulations.errors import PopulationError
from simulations.population import (
    DeviceClass,
    Fate,
    Population,
    PopulationFile,
    Workload,
    read_population,
    shares_by_class,
    simulate,
)

WORK = Workload(n_tokens=60_000, down_n_bytes=10_000_000, up_n_bytes=20_000_000)
FAST = {"name": "fast", "share": 1.0, "tokens_per_s": 1000.0, "up_bytes_per_s": 2e6}
TOML = """
n_agents = 40
time_zones = 3

[[device]]
name = "fast"
share = 1
tokens_per_s = 1000
up_bytes_per_s = 2e6
down_bytes_per_s = 10e6
spread = 0.1

[[device]]
name = "slow"
share = 3
tokens_per_s = 100
up_bytes_per_s = 0.5e6
down_bytes_per_s = 5e6
drop_out = 0.2
hours = [1,1,1,1,1,1,0.5,0.2,0,0,0,0,0,0,0,0,0,0.2,0.5,0.8,1,1,1,1]
"""


def make_class(**changes) -> DeviceClass:
    return DeviceClass(**{**FAST, "down_bytes_per_s": 10e6, **changes})


def make_population(*classes: DeviceClass, n_agents: int = 20, seed: int = 1) -> Population:
    file = PopulationFile(n_agents=n_agents, device=classes or (make_class(),))
    return Population.of(file, seed=seed)


def make_rules(**changes) -> RoundsBlock:
    return RoundsBlock(
        **{
            "n_rounds": 3,
            "cohort_target": 5,
            "min_cohort": 2,
            "over_selection": 2.0,
            "deadline_s": 3600.0,
            "cap_s": 4000.0,
            **changes,
        }
    )


def test_a_round_lasts_as_long_as_fetching_training_and_uploading() -> None:
    rounds = simulate(make_population(), make_rules(), WORK, seed=1)
    assert [one.number for one in rounds] == [1, 2, 3]
    for one in rounds:
        assert one.duration_s == pytest.approx(1.0 + 60.0 + 10.0)
        assert one.failure is None
        assert one.waited_s == 0.0
        assert len(one.fates) == 10
        assert (one.down_n_bytes, one.up_n_bytes) == (10 * 10_000_000, 10 * 20_000_000)


def test_the_target_closes_a_round_and_who_is_slower_is_late() -> None:
    population = make_population(make_class(spread=0.5))
    (one, *_) = simulate(population, make_rules(), WORK, seed=1)
    assert one.n(Fate.ACCEPTED) == 5
    assert one.n(Fate.LATE) == 5
    speed = {fate: [] for fate in Fate}
    for agent, fate in one.fates.items():
        speed[fate].append(population.speed[agent])
    assert min(speed[Fate.ACCEPTED]) > max(speed[Fate.LATE])
    assert one.duration_s == pytest.approx(71.0 / min(speed[Fate.ACCEPTED]))


def test_selecting_more_makes_rounds_shorter_and_wastes_work() -> None:
    population = make_population(make_class(spread=0.6), n_agents=100)

    def mean_of(over_selection: float) -> tuple[float, float]:
        rules = make_rules(n_rounds=30, over_selection=over_selection)
        rounds = simulate(population, rules, WORK, seed=1)
        return (
            float(np.mean([one.duration_s for one in rounds])),
            float(np.mean([one.n(Fate.LATE) for one in rounds])),
        )

    few, many = mean_of(1.0), mean_of(3.0)
    assert many[0] < 0.7 * few[0]
    assert few[1] == 0 < many[1]


def test_who_drops_out_holds_its_place_until_the_deadline() -> None:
    population = make_population(make_class(drop_out=0.5), n_agents=6)
    rules = make_rules(cohort_target=6, over_selection=1.0)
    (one, *_) = simulate(population, rules, WORK, seed=2)
    assert 0 < one.n(Fate.DROPPED) < 5
    assert one.duration_s == 3600.0
    assert one.failure is None


def test_too_few_updates_fail_a_round_and_it_is_tried_again() -> None:
    population = make_population(make_class(drop_out=0.6), n_agents=6)
    rules = make_rules(cohort_target=6, min_cohort=3, over_selection=1.0, n_rounds=20)
    rounds = simulate(population, rules, WORK, seed=1)
    failed = [one for one in rounds if one.failure is not None]
    assert failed
    assert "too few uploads" in failed[0].failure
    assert len(rounds) - len(failed) == 20


def test_where_every_round_fails_that_is_said() -> None:
    population = make_population(make_class(drop_out=1.0))
    with pytest.raises(PopulationError, match="3 rounds failed"):
        simulate(population, make_rules(), WORK, seed=1)


def test_an_upload_that_moves_extends_a_round() -> None:
    slow = make_class(up_bytes_per_s=20_000.0)
    rules = make_rules(
        cohort_target=5, over_selection=1.0, deadline_s=600.0, cap_s=1200.0, n_rounds=1
    )
    (one,) = simulate(make_population(slow), rules, WORK, seed=1)
    assert one.duration_s == pytest.approx(61.0 + 1000.0)
    assert one.n(Fate.ACCEPTED) == 5
    crawling = make_class(up_bytes_per_s=10_000.0)  # below rounds.min_upload_bytes_per_s
    with pytest.raises(PopulationError, match="too few uploads"):
        simulate(make_population(crawling), rules, WORK, seed=1)


def test_rounds_wait_for_the_hours_at_which_agents_are_there() -> None:
    hours = tuple(1.0 if hour == 12 else 0.0 for hour in range(24))
    rounds = simulate(make_population(make_class(hours=hours)), make_rules(), WORK, seed=1)
    assert rounds[0].waited_s > 0.0
    never = make_class(hours=(0.0,))
    with pytest.raises(PopulationError, match="in 30 days there were never 2 of 20 agents"):
        simulate(make_population(never), make_rules(), WORK, seed=1)


def test_presence_is_one_draw_for_each_agent_and_hour() -> None:
    population = make_population(make_class(hours=(0.3,)), n_agents=5000)
    first = population.present(7 * 3600.0)
    assert (population.present(7 * 3600.0 + 3599.0) == first).all()
    assert (population.present(8 * 3600.0) != first).any()
    assert first.mean() == pytest.approx(0.3, abs=0.03)


def test_agents_of_other_zones_have_other_days() -> None:
    night = tuple(1.0 if hour < 8 else 0.0 for hour in range(24))
    file = PopulationFile(n_agents=2400, time_zones=24, device=(make_class(hours=night),))
    population = Population.of(file, seed=1)
    shares = [population.present(hour * 3600.0).mean() for hour in range(24)]
    assert shares == pytest.approx([1 / 3] * 24, abs=0.05)


def test_guarantee_2_equal_seeds_give_equal_rounds() -> None:
    def run(seed: int):
        population = make_population(make_class(spread=0.5, drop_out=0.2), n_agents=50)
        return simulate(population, make_rules(), WORK, seed=seed)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_fast_devices_make_more_of_the_updates_than_their_share() -> None:
    population = make_population(
        make_class(), make_class(name="slow", tokens_per_s=100.0), n_agents=200
    )
    rounds = simulate(population, make_rules(n_rounds=20), WORK, seed=1)
    shares = shares_by_class(population, rounds)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["fast"] > 0.7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("n_agents = 3", "device"),
        (TOML.replace("n_agents = 40", "n_agents = 0"), "n_agents"),
        (TOML.replace("share = 3", "share = -1"), "device.1.share"),
        (TOML.replace("spread = 0.1", "spreed = 0.1"), "spreed"),
        (TOML.replace("hours = [1,", "hours = ["), "expected 1 or 24"),
        ("n_agents = ", "cannot read"),
    ],
)
def test_a_file_that_describes_no_population_is_refused(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "population.toml"
    path.write_text(text)
    with pytest.raises(PopulationError, match=says):
        read_population(path)


def test_the_command_tells_times_bytes_and_who_takes_part(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "population.toml"
    path.write_text(TOML)
    out = tmp_path / "found.json"
    options = ["--rounds", "4", "--deadline-s", "7200", "--json", str(out)]
    result = CliRunner().invoke(app, ["timetable", str(path), *options])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["minutes of a round"]["lowest"] <= found["minutes of a round"]["mean"]
    assert found["updates from fast"]["mean"] + found["updates from slow"]["mean"] == pytest.approx(
        1.0
    )
    assert "minutes of a round" in result.output


def test_two_devices_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "volunteers.toml"
    path.write_text(TOML.replace('"slow"', '"fast"'))
    with pytest.raises(PopulationError, match="two devices are called 'fast'"):
        read_population(path)
