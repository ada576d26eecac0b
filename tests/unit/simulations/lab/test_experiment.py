"""Experiments as files: the paper's defaults, what is refused, what makes two the same."""

import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from protocol.blocks import LoraRule, LossOn, Schedule, Template
from quant.base_model import LoadedBase
from simulations.cli import app
from simulations.errors import ExperimentError
from simulations.lab.experiment import EngineKind, Experiment, load_experiment
from simulations.lab.records import Arm
from simulations.lab.series import sweep
from simulations.lab.terms import make_terms
from simulations.partition.schemes import Scheme


def load(tmp_path: Path, text: str) -> Experiment:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load_experiment(path)


def test_the_defaults_are_the_paper_s(base: LoadedBase) -> None:
    """FedIT, arXiv 2305.05644, section 4."""
    found = Experiment(name="paper")
    assert (found.data.scheme, found.data.n_clients, found.data.held_out) == (
        *(Scheme.SKEWED, 100, 10),
    )
    assert (found.data.alpha, found.baselines.epochs) == (0.5, 1)
    paper_s = found.with_values({"base.model": "a/7b-model"}).learning_rate
    assert (paper_s, found.learning_rate) == (1.5e-4, 0.006)  # an embedded base is no 7B model
    assert found.with_values({"federation.learning_rate": 0.1}).learning_rate == 0.1
    terms = make_terms(found, base.description, arm=Arm.FEDERATED, seed=1)
    rounds, training, lora = terms.manifest.rounds, terms.manifest.training, terms.manifest.lora
    assert (rounds.n_rounds, rounds.cohort_target) == (20, 5)
    assert (training.local_epochs, training.local_steps, training.batch_size) == (1, None, 32)
    assert (training.learning_rate, training.max_length) == (0.006, 512)
    assert (training.template, training.loss_on) == (Template.ALPACA, LossOn.ALL)
    assert training.schedule is Schedule.COSINE  # ours: one over all rounds
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 16.0, 0.05)
    assert set(lora.target_modules) == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.parametrize(
    "values",
    [
        {},
        {
            "description": 'of "everything"\n\tand ε\\',
            "seeds": [3, 1],
            "base.model": "hub/some-model",
            "base.revision": "main",
            "data.source": ["a.jsonl", "hub:b/c"],
            "data.by": "language",
            "data.max_records": 1000,
            "federation.epsilon": 2.5,
            "federation.learning_rate": 1e-5,
            "federation.lora_rule": "rolora",
            "federation.target_modules": ["q_proj"],
            "federation.filter": "robust",
            "attack.name": "alie",
            "engine.group": 4,
            "sweep": {"federation.epsilon": [2, 8, "none"], "federation.rank": [4, 8]},
        },
    ],
    ids=["defaults", "everything"],
)
def test_as_toml_is_the_whole_and_comes_back_the_same(
    tmp_path: Path, values: Mapping[str, Any]
) -> None:
    experiment = Experiment(name="mine").with_values(values)
    text = experiment.as_toml()
    found = load(tmp_path, text)
    # The learning rate that stands for none is written out as any other default.
    rate = {"federation.learning_rate": experiment.learning_rate}
    assert found == experiment.with_values(rate)
    assert found.as_toml() == text
    assert found.digest() == experiment.digest()
    tree = tomllib.loads(text)
    assert tree["federation"]["n_rounds"] == 20
    assert set(tree) >= {"base", "data", "federation", "population", "evaluation", "engine"}


def test_a_file_without_a_name_is_called_as_it_is(tmp_path: Path) -> None:
    assert load(tmp_path, "").name == "mine"
    assert load(tmp_path, 'name = "other"').name == "other"


def test_every_experiment_that_comes_along_can_be_loaded(base: LoadedBase) -> None:
    shipped = [
        path
        for path in resources.files("simulations.experiments").iterdir()
        if path.name.endswith(".toml")
    ]
    assert shipped
    for path in shipped:
        experiment = load_experiment(Path(str(path)))
        make_terms(experiment, base.description, arm=Arm.FEDERATED, seed=1)


def test_flags_give_an_experiment_its_base_its_records_and_a_sweep(
    tmp_path: Path, base: LoadedBase
) -> None:
    """As docs/benchmarks.md compares on Dolly the rules that a manifest can name."""
    rules = [rule.value for rule in LoraRule]
    swept = json.dumps({"federation.lora_rule": rules})
    flags = [
        *("--model", "bases/seven-million", "--data", "dolly.jsonl"),
        *("--set", "data.max_records=600", "--set", f"sweep={swept}"),
    ]
    shown = CliRunner().invoke(app, ["run", "dolly", "--show", *flags])
    found = load(tmp_path, shown.stdout)
    assert (found.base.model, found.data.source) == ("bases/seven-million", ("dolly.jsonl",))
    assert (found.data.max_records, found.federation.learning_rate) == (600, 0.015)
    members = sweep(found, seeds=(1, 2))
    assert [one.settings["federation.lora_rule"] for one in members[::2]] == rules
    for member in members:
        make_terms(member.request.experiment, base.description, arm=Arm.FEDERATED, seed=1)


def test_a_folder_of_the_same_name_hides_no_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dolly").mkdir()
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["run", "dolly", "--show"])
    assert load(tmp_path, shown.stdout).name == "dolly"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[federation]\nrnak = 8", "no key 'federation.rnak'; did you mean 'rank'"),
        ("[federatoin]\nrank = 8", "no key 'federatoin'; did you mean 'federation'"),
        ('[attack]\nname = "alie"\nshaer = 1', "no key 'attack.shaer'; did you mean 'share'"),
        ("[base]\nzzz = 8", r"no key 'base.zzz'; known: \['model', 'revision'\]"),
        ("[federation]\nrank = 0", "federation.rank"),
        ("[federation]\nbatch_size = 0", "federation.batch_size"),
        ('[federation]\nlearning_rate = "fast"', "federation.learning_rate"),
        ("[federation]\nlearning_rate = nan", "federation.learning_rate"),
        ("[federation]\nepsilon = -1", "federation.epsilon"),
        ('[federation]\nmasking = "helper"', "needs a second operator"),
        (
            "[federation]\nlocal_steps = 3\nlocal_epochs = 1",
            "set one of local_epochs and local_steps",
        ),
        ('[data]\nsource = ["embedded:world", "a.jsonl"]', "stands alone"),
        ('[data]\nby = "language"', "split by category"),
        ('[attack]\nname = "adaptive"', "probes a filter"),
        ('[attack]\nname = "bribery"', "attack.name"),
        ("[attack]\nshare = 0.1", "attack.name"),
        ("[engine]\ngroup = 0", "engine.group"),
        ("[engine]\nworkers = 4", "4 workers need kind = .processes. or .ray."),
        ('[population]\nfile = "x"\ndrop_out = 0.1', "a matter of its device classes"),
        ("[data]\nmax_records = 99", "max_records is 99, and each of 100 clients needs one"),
        ("[federation]\nover_selection = 20", "federation.over_selection"),
        ("seeds = [1, 2, 1]", "seeds: 1 is there twice"),
        ('[sweep]\n"federation.rank" = []', "federation.rank has .*; at least one value"),
        ('[sweep]\n"federation.rank" = [4, 8, 4]', r"\[4, 8, 4\]; .* none twice"),
        ('[baselines]\nlocal = ["median", "median"]', "none twice"),
        ("seeds = [4294967296]", "seeds"),
        ("[population]\ndrop_out = 1.0", "population.drop_out"),
        ("seeds = []", "seeds"),
        ('name = "../up"', "name"),
        ("[federation", "is no TOML"),
    ],
)
def test_what_cannot_be_is_refused_with_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ExperimentError, match=said) as caught:
        load(tmp_path, text)
    sentence = str(caught.value)
    assert sentence.count("\n") == 0
    assert "mine.toml" in sentence


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"cannot read .*gone.toml: No such file"):
        load_experiment(tmp_path / "gone.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ExperimentError, match="is no TOML"):
        load_experiment(tmp_path / "bytes.toml")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"federation.rnak": 8}, "did you mean 'rank'"),
        ({"federation.lora.rank": 8}, "there is no key 'federation.lora.rank'"),
        ({"name.first": 8}, "there is no key 'name.first'"),
        ({"nothing.at_all": 8}, "nothing"),
        ({"rank": 8}, "rank"),
        ({"federation.rank": "much"}, "federation.rank"),
        ({"federation.local_steps": 3, "federation.local_epochs": 3}, "set one of"),
        ({"attack.share": 0.3}, "attack.name"),
    ],
)
def test_a_value_of_no_key_and_no_value_of_a_key_are_refused(
    values: Mapping[str, object], said: str
) -> None:
    with pytest.raises(ExperimentError, match=said):
        Experiment(name="mine").with_values(values)


def test_values_change_what_they_name_and_nothing_else() -> None:
    before = Experiment(name="mine")
    after = before.with_values(
        {"federation.rank": 4, "seeds": [7], "attack.name": "clones", "engine.kind": "ray"}
    )
    assert (after.federation.rank, after.seeds, after.engine.kind) == (4, (7,), EngineKind.RAY)
    assert after.attack is not None
    back = after.with_values(
        {"federation.rank": 8, "seeds": [1], "attack.name": None, "engine.kind": "here"}
    )
    assert back == before
    assert before.federation.rank == 8


def test_no_attack_is_told_by_no_name() -> None:
    """As the points of a series tell it, some of which have an attack and one of which has none."""
    nothing = {"attack.name": None, "attack.share": None}
    calm = Experiment(name="mine")
    assert calm.with_values(nothing) == calm
    assert calm.with_values({"attack.name": "alie"}).with_values(nothing) == calm


def test_none_in_words_is_no_differential_privacy(tmp_path: Path) -> None:
    assert load(tmp_path, '[federation]\nepsilon = "none"').federation.epsilon is None
    private = Experiment(name="mine").with_values({"federation.epsilon": 2})
    assert private.federation.epsilon == 2.0
    assert private.with_values({"federation.epsilon": "none"}).federation.epsilon is None
    assert private.with_values({"federation.epsilon": None}).federation.epsilon is None
    with pytest.raises(ExperimentError, match=r"federation\.epsilon"):
        private.with_values({"federation.epsilon": "much"})


@pytest.mark.parametrize(
    "values",
    [
        {"seeds": [5]},
        {"sweep": {"federation.rank": [4]}},
        {"engine.kind": "processes"},
        {"engine.kind": "ray", "engine.workers": 4},
        {"engine.group": 2},
        {"engine.device": "cuda"},
        {"engine.cryptography": "real"},
        {"description": "of last Tuesday"},
    ],
)
def test_the_digest_does_not_say_how_or_how_often_it_is_run(values: Mapping[str, object]) -> None:
    experiment = Experiment(name="mine")
    assert experiment.with_values(values).digest() == experiment.digest()


@pytest.mark.parametrize(
    "values",
    [
        {"base.model": "hub/other"},
        {"data.n_clients": 99},
        {"data.per_category": 99},
        {"federation.rank": 4},
        {"federation.epsilon": 8},
        {"federation.masking": "cells"},
        {"population.drop_out": 0.1},
        {"population.vanish": 0.1},
        {"evaluation.answers": 3},
        {"attack.name": "clones"},
    ],
)
def test_the_digest_changes_with_what_decides_about_results(values: Mapping[str, object]) -> None:
    experiment = Experiment(name="mine")
    assert experiment.with_values(values).digest() != experiment.digest()
