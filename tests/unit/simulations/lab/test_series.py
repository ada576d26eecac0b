"""Series: that each of their runs can be, before the first one begins."""

from typing import Any

import pytest

from simulations.errors import ExperimentError
from simulations.lab.experiment import Experiment
from simulations.lab.series import arms, check, sweep


def swept(small: Experiment, **values: object) -> Experiment:
    return small.with_values(
        {"sweep": {key.replace("__", "."): one for key, one in values.items()}}
    )


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("federation__masking", ["off", "cells"], "masking cells: .*min_cohort 5 is above"),
        ("federation__target_modules", [["q_proj"], ["z_proj"]], "z_proj"),
        ("data__n_clients", [6, 5000], "n_clients 5000: .*records"),
        ("data__source", [["embedded:world"], ["gone.jsonl"]], "gone.jsonl.*: .*gone.jsonl"),
    ],
)
def test_a_point_that_cannot_be_is_named_before_the_first_run(
    small: Experiment, fake: Any, key: str, values: list[object], said: str
) -> None:
    members = sweep(swept(small, **{key: values}), seeds=(1, 2))
    with pytest.raises(ExperimentError, match=said):
        check(members, fake)
    assert not fake.trained
    check(members[:2], fake)


def test_the_arms_of_a_comparison_can_be(small: Experiment, fake: Any) -> None:
    check(arms(small, seeds=(1, 2)), fake)
