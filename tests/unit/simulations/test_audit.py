"""Audits: what they find where there is no noise, and that claims hold where there is."""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from edge_agent.data.records import Record
from edge_agent.training import gradients as gradients_module
from edge_agent.training.gradients import PrivateGradient
from edge_agent.training.sampling import PoissonBatches
from edge_agent.training.trainer import LocalTrainer, RoundRecipe, TrainerOptions
from privacy.auditing.one_run import one_run_epsilon
from privacy.dp_sgd import mechanism as mechanism_module
from privacy.errors import AccountingError
from protocol.blocks import Factor
from protocol.clock import SystemClock
from quant.adapter import peft_config, to_safetensors, write_folder
from quant.base_model import LoadedBase, load_base, set_threads
from quant.errors import AdapterError
from quant.tiny import EMBEDDED_NAME
from simulations import cli_audit
from simulations.audit import report, run
from simulations.audit.canaries import (
    CanaryAudit,
    View,
    audit_canaries,
    pooled,
    run_canaries,
)
from simulations.audit.figure import draw, draw_release
from simulations.audit.membership import (
    MembershipAudit,
    Score,
    audit_release,
)
from simulations.audit.probe import Probe, Seen, first_rows, probe_updates
from simulations.audit.recipe import AuditRecipe, Protection, ReleaseRules, make_claim
from simulations.audit.records import as_examples, canary_records, ordinary_records
from simulations.audit.run import AuditResult, run_audit
from simulations.audit.scores import clipped, noise_std_of, step_log_odds, update_coefficients
from simulations.audit.training import Subject
from simulations.cli import app
from simulations.errors import AuditInputError, ClaimRefutedError, OutputError
from simulations.yardsticks import train_in_one_place

OFF = Protection()
STRONG = Protection(epsilon=1.0)
SMALL = AuditRecipe(
    protections=(OFF, STRONG),
    n_canaries=96,
    n_ordinary=16,
    n_steps=3,
    n_members=32,
    n_non_members=64,
    n_member_steps=40,
    probe_sizes=(1, 10),
    n_probes=3,
)
"""A few seconds of one core; what it claims at 99.9 % holds as at full size."""


def secret_of(seed: int) -> bytes:
    """Fixed, so that these tests give what they gave."""
    return bytes([seed]) * 32


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    set_threads(1)
    return load_base(EMBEDDED_NAME)


@pytest.fixture
def subject(base: LoadedBase) -> Iterator[Subject]:
    found = Subject(base, SMALL.lora())
    yield found
    found.close()


def audited(subject: Subject, protection: Protection) -> CanaryAudit:
    return audit_canaries(subject, SMALL, SMALL.canary_claim(protection), secret_of=secret_of)


# --- canaries ---------------------------------------------------------------------------------


def test_guarantee_without_noise_the_bound_is_clearly_positive(subject: Subject) -> None:
    """At 99.9 %, from what each step shows, and from the update alone."""
    found = audited(subject, OFF)
    assert math.isinf(found.claim.epsilon)
    assert found.headline.pooled.confidence == 0.999
    assert found.headline.pooled.epsilon_lower_bound > 2.0
    assert found.view(View.UPDATE).pooled.epsilon_lower_bound > 0.5
    assert not found.refuted


def test_guarantee_with_noise_the_bound_stays_under_the_claim(subject: Subject) -> None:
    """At 99.9 %, by an audit that could have found more than twice the claim."""
    found = audited(subject, STRONG)
    assert 0.99 < found.claim.epsilon <= 1.0
    assert found.headline.pooled.largest_bound > 2.0 * found.claim.epsilon
    for view in found.views:
        assert view.pooled.epsilon_lower_bound < found.claim.epsilon
    assert not found.refuted


def test_noise_that_is_not_added_refutes_the_claim(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_noise(totals: Any, mechanism: Any, stream: Any) -> None:
        for total in totals.values():
            total.div_(mechanism.expected_batch)

    monkeypatch.setattr(gradients_module, "release", without_noise)
    found = audited(subject, STRONG)
    assert found.refuted


def test_clipping_that_does_not_clip_refutes_the_claim(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unclipped(per_example: Any, totals: Any, *, clip_norm: float, **rest: Any) -> Any:
        return mechanism_module.clip_and_add(per_example, totals, clip_norm=1e6, **rest)

    monkeypatch.setattr(gradients_module, "clip_and_add", unclipped)
    assert audited(subject, STRONG).refuted


def test_coins_are_fair_and_their_own(subject: Subject) -> None:
    recipe = replace(SMALL, n_ordinary=8, n_steps=1, n_canaries=64)
    claim = recipe.canary_claim(OFF)
    first, again, other = (run_canaries(subject, recipe, claim, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.included, again.included)
    for view in View:
        np.testing.assert_array_equal(first.scores[view], again.scores[view])
    assert not np.array_equal(first.included, other.included)
    assert 16 < first.included.sum() < 48


def test_the_divisor_does_not_tell_the_coins(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(SMALL, n_ordinary=8, n_steps=1, n_canaries=16)
    divisors = []
    train = subject.train

    def watched(*args: Any, **options: Any) -> Any:
        trained = train(*args, **options)
        divisors.append((len(args[0]), trained.steps[0].divisor))
        return trained

    monkeypatch.setattr(subject, "train", watched)
    for seed in range(3):
        run_canaries(subject, recipe, recipe.canary_claim(STRONG), seed=seed)
    assert len({n_examples for n_examples, _ in divisors}) > 1
    assert {divisor for _, divisor in divisors} == {recipe.sampling_probability * 16}


def test_runs_are_pooled_by_their_guesses(subject: Subject) -> None:
    recipe = replace(SMALL, n_ordinary=8, n_steps=1, n_canaries=16)
    found = audit_canaries(subject, recipe, recipe.canary_claim(OFF))
    for view in found.views:
        n_right = sum(audit.n_right for audit in view.runs)
        assert pooled(view.runs) == view.pooled
        assert (view.pooled.n_canaries, view.pooled.n_guesses) == (32, 16)
        assert view.pooled.epsilon_lower_bound == one_run_epsilon(
            n_canaries=32, n_guesses=16, n_right=n_right, delta=1e-5, confidence=0.999
        )


# --- scores -----------------------------------------------------------------------------------


def test_step_log_odds_are_those_of_the_gaussian_test_written_out() -> None:
    rng = np.random.default_rng(5)
    n, d, noise_std, probability = 5, 7, 0.8, 0.3
    gradients = rng.normal(size=(n, d)).astype(np.float32)
    released = rng.normal(size=d).astype(np.float32)
    prior = rng.uniform(0.1, 0.6, n)
    found = step_log_odds(
        gradients, released, prior=prior, probability=probability, noise_std=noise_std
    )
    wide = gradients.astype(np.float64)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        mean = prior[others] @ wide[others]
        spread = wide[others].T @ np.diag(prior[others] * (1 - prior[others])) @ wide[others]
        inverse = np.linalg.inv(noise_std**2 * np.eye(d) + spread)

        def log_density(at: np.ndarray, inverse: np.ndarray = inverse) -> float:
            return float(-0.5 * at @ inverse @ at)

        rest = released.astype(np.float64) - mean
        ratio = log_density(rest - wide[i]) - log_density(rest)
        assert found[i] == pytest.approx(
            math.log(1 - probability + probability * math.exp(ratio)), abs=1e-4
        )


def test_an_example_that_is_always_drawn_has_the_whole_ratio() -> None:
    gradients = np.eye(3, dtype=np.float32)
    released = np.array([1.0, 0.0, 1.0], np.float32)
    odds = step_log_odds(gradients, released, prior=np.full(3, 0.5), probability=1.0, noise_std=0.5)
    np.testing.assert_allclose(odds, [2.0, -2.0, 2.0], atol=1e-6)


@pytest.mark.parametrize("noise_std", [0.0, 0.3, 2.0])
def test_noise_is_measured_and_not_believed(noise_std: float) -> None:
    rng = np.random.default_rng(4)
    gradients = (rng.normal(size=(20, 5000)) / 50).astype(np.float32)
    noise = rng.normal(size=5000) * noise_std
    released = (gradients[:9].sum(axis=0) + noise).astype(np.float32)
    assert noise_std_of(gradients, released) == pytest.approx(noise_std, rel=0.05, abs=1e-3)


def test_update_coefficients_find_the_gradients_that_an_update_is_made_of() -> None:
    rng = np.random.default_rng(3)
    gradients = (rng.normal(size=(6, 400)) + 2.0 * rng.normal(size=400)).astype(np.float32)
    gradients[5] = 0.0
    update = -(gradients[1] + gradients[4])
    found = update_coefficients(gradients, update)
    assert set(np.argsort(found)[-2:].tolist()) == {1, 4}
    assert found[5] == 0.0


def test_clipping_shortens_what_is_too_long_and_nothing_else() -> None:
    gradients = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(
        clipped(gradients, clip_norm=1.0), [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]], rtol=1e-6
    )


# --- the training that is audited -------------------------------------------------------------


def make_examples(subject: Subject, n_records: int = 12) -> Any:
    block = SMALL.training(batch_size=4, n_steps=3)
    records = ordinary_records(n_records, np.random.default_rng(1))
    return records, as_examples(records, subject.base.tokenizer, block), block


def test_what_is_audited_is_the_agents_private_training(subject: Subject) -> None:
    """Guarantee 1 and 2 of `Subject`: its rule, its sampler, and nothing changed by watching."""
    _, examples, block = make_examples(subject)
    claim = make_claim(STRONG, delta=1e-5, sampling_probability=0.4, n_steps=3)
    secret = secret_of(9)
    found = subject.train(examples, block, claim, seed=4, clip_norm=0.7, secret=secret)
    mechanism = claim.mechanism(clip_norm=0.7, n_examples=len(examples))
    trainer = LocalTrainer(
        subject.adapted,
        examples,
        RoundRecipe(training=block, schedule_start=0.0, schedule_end=1.0, seed=4),
        sampler=PoissonBatches(n_examples=len(examples), probability=0.4, secret=secret),
        clock=SystemClock(),
        options=TrainerOptions(rule=PrivateGradient(mechanism=mechanism, secret=secret)),
    )
    wanted = trainer.run(subject.start, subject.layout, weight=1).update.vector
    np.testing.assert_array_equal(found.update, wanted)
    assert len(found.steps) == 3
    assert all(step.divisor == pytest.approx(0.4 * 12) for step in found.steps)


def test_without_noise_it_is_the_agents_ordinary_training(subject: Subject) -> None:
    records, examples, block = make_examples(subject)
    claim = make_claim(OFF, delta=1e-5, sampling_probability=0.5, n_steps=3)
    found = subject.train(examples, block, claim, seed=4, clip_norm=1.0)
    wanted = train_in_one_place(subject.adapted, records, block, subject.start, n_steps=3, seed=4)
    for name, array in wanted.items():
        np.testing.assert_allclose(found.final[name], array, rtol=0, atol=1e-6)
    assert [step.divisor for step in found.steps] == [4.0, 4.0, 4.0]


def test_a_steps_gradient_is_the_mean_of_its_examples_gradients(subject: Subject) -> None:
    _, examples, block = make_examples(subject, n_records=4)
    claim = make_claim(OFF, delta=1e-5, sampling_probability=1.0, n_steps=3)
    last = subject.train(examples, block, claim, seed=4, clip_norm=1.0).steps[2]
    mean = subject.gradients(last.weights, examples).mean(axis=0)
    np.testing.assert_allclose(last.gradient, mean, rtol=1e-3, atol=1e-5)


def test_canaries_are_of_words_that_are_one_token(base: LoadedBase) -> None:
    records = canary_records(50, base.tokenizer, np.random.default_rng(2))
    assert len({record.instruction for record in records}) == 50
    for record in records:
        words = f"{record.instruction} {record.response}".split()
        assert len(words) == 16
        assert all(
            len(base.tokenizer.encode(f" {w}", add_special_tokens=False)) == 1 for w in words
        )


# --- claims -----------------------------------------------------------------------------------


def test_a_claim_never_shows_an_epsilon_alone() -> None:
    text = SMALL.canary_claim(STRONG).describe()
    for part in (
        *("δ = 1e-05", "each example", "add or remove one", "against whoever sees"),
        *("Poisson sampling with q = 0.5", "noise multiplier", "3 steps", "PLD"),
    ):
        assert part in text
    assert SMALL.canary_claim(OFF).describe().endswith("ε = ∞")


def test_noise_that_promises_nothing_claims_nothing() -> None:
    claim = SMALL.canary_claim(Protection(noise_multiplier=0.01))
    assert "ε = ∞ at δ" in claim.describe()
    assert "protects little" in claim.describe()
    assert claim.as_json()["epsilon"] is None
    assert claim.as_json()["profile"] == "P0"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Protection(epsilon=1.0, noise_multiplier=1.0), "not both"),
        (lambda: Protection(epsilon=0.0), "ε = 0; it must be"),
        (lambda: Protection(noise_multiplier=math.inf), "multiplier = inf"),
        (lambda: replace(SMALL, delta=0.0), "delta is 0; it lies between"),
        (lambda: replace(SMALL, confidence=1.0), "confidence is 1"),
        (lambda: replace(SMALL, sampling_probability=1.5), "probability is 1.5"),
        (lambda: replace(SMALL, n_canaries=7), "7 canaries tell nothing"),
        (lambda: replace(SMALL, protections=()), "nothing to audit"),
        (lambda: ReleaseRules(delta=2.0), "delta is 2"),
        (
            lambda: SMALL.canary_claim(OFF).mechanism(clip_norm=1.0, n_examples=3),
            "has no mechanism",
        ),
    ],
)
def test_settings_that_make_no_audit_are_refused(make: Any, message: str) -> None:
    with pytest.raises(AuditInputError, match=message):
        make()


def test_a_target_that_no_noise_keeps_to_is_refused() -> None:
    with pytest.raises(AccountingError, match="even a noise multiplier"):
        SMALL.canary_claim(Protection(epsilon=1e-6))


# --- all of it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> AuditResult:
    """A whole audit of the embedded base; noise and sampling are the system's."""
    told: list[tuple[str, int, int]] = []
    found = run_audit(
        replace(SMALL, n_canaries=24, n_steps=2, n_runs=1), lambda *event: told.append(event)
    )
    assert ("canaries, ε = 1", 1, 1) in told
    assert ("tokens in an update", 15, 15) in told
    return found


def memberships(result: AuditResult) -> tuple[MembershipAudit, MembershipAudit]:
    off, strong = result.memberships
    return off, strong


def test_a_release_without_noise_tells_its_members(result: AuditResult) -> None:
    off, _ = memberships(result)
    assert off.score(Score.RELATIVE).auc_interval[0] > 0.55
    assert off.members.release.mean() < off.non_members.release.mean()


def test_a_release_with_noise_does_not_exceed_what_is_claimed(result: AuditResult) -> None:
    _, strong = memberships(result)
    assert strong.protection is not None
    for row in strong.scores:
        # (ε, δ) bounds TPR − FPR by (e^ε − 1 + 2δ) / (e^ε + 1), so balanced accuracy by 0.732.
        assert row.found.balanced_accuracy < 0.732
        assert row.found.epsilon_lower_bound < strong.protection.epsilon


def probe_of(result: AuditResult, seen: Seen, n_examples: int = 1) -> Probe:
    assert result.probes is not None
    return next(p for p in result.probes if (p.seen, p.n_examples) == (seen, n_examples))


def test_tokens_of_a_gradient_are_found_where_they_are_fewer_than_directions(
    result: AuditResult,
) -> None:
    one = probe_of(result, Seen.GRADIENT)
    assert one.n_unknown < 3 * SMALL.probe_rank
    assert one.precision == 1.0
    assert one.recall > 0.9


def test_of_more_tokens_than_directions_few_are_found(result: AuditResult) -> None:
    many = probe_of(result, Seen.GRADIENT, 10)
    assert many.n_unknown > 3 * SMALL.probe_rank
    assert many.recall < 0.2


def test_adamw_hides_tokens_from_this_probe_unless_its_eps_is_large(result: AuditResult) -> None:
    assert probe_of(result, Seen.UPDATE).n_right == 0
    linear = probe_of(result, Seen.LINEAR)
    assert linear.precision == 1.0
    assert linear.recall > 0.8


def test_noise_hides_tokens_from_the_probe(result: AuditResult) -> None:
    noisy = probe_of(result, Seen.NOISY)
    assert noisy.n_right == 0
    assert 0.3 < noisy.auc < 0.7


def test_without_a_there_is_nothing_to_probe(base: LoadedBase) -> None:
    recipe = replace(SMALL, sent=(Factor.B,))
    subject = Subject(base, recipe.lora())
    with pytest.raises(AuditInputError, match="B alone is sent"):
        probe_updates(subject, recipe, noise=None)
    only_b = {name: array for name, array in subject.start.items() if "lora_B" in name}
    with pytest.raises(AuditInputError, match="nothing to probe"):
        first_rows(only_b)
    subject.close()


def test_the_numbers_of_the_json_are_finite_and_those_of_the_audit(result: AuditResult) -> None:
    found = json.loads(json.dumps(report.as_json(result), allow_nan=False))
    off, strong = found["canaries"]
    assert off["claim"]["epsilon"] is None
    assert off["claim"]["profile"] == "P0"
    assert strong["claim"]["epsilon"] == result.canaries[1].claim.epsilon
    for key in ("delta", "unit", "neighbouring", "adversary", "sampling", "noise_multiplier"):
        assert strong["claim"][key] is not None
    headline = strong["views"][strong["headline"]]
    assert headline["epsilon_lower_bound"] == (
        result.canaries[1].headline.pooled.epsilon_lower_bound
    )
    assert found["probe"][0]["precision"] == 1.0


def test_tables_fit_a_terminal_of_eighty_and_show_what_was_found(result: AuditResult) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(report.canary_table(result))
    console.print(report.membership_table(result))
    table = report.probe_table(result)
    assert table is not None
    console.print(table)
    console.print(report.release_table(result.memberships[0]))
    lines = console.file.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    text = " ".join(" ".join(lines).split())
    assert "…" not in text
    for part in ("noise off", "ε = 1", "∞", "δ = 1e-05", "99.9 %", "add or remove one", "100 %"):
        assert part in text


def refuted(result: AuditResult) -> AuditResult:
    """The same, had the audit of the strong noise found ε ≥ 1.5."""
    off, strong = result.canaries
    headline = strong.headline
    found = replace(headline, pooled=replace(headline.pooled, epsilon_lower_bound=1.5))
    others = tuple(view for view in strong.views if view is not headline)
    return replace(result, canaries=(off, replace(strong, views=(found, *others))))


def test_a_bound_above_the_claim_is_an_error(result: AuditResult) -> None:
    report.require_claims(result)
    wrong = r"finds ε ≥ 1\.500 at 99\.9 % confidence where the claim is ε ≤ 0\.99.*one of them"
    with pytest.raises(ClaimRefutedError, match=wrong):
        report.require_claims(refuted(result))


def test_figures_are_pictures(result: AuditResult, tmp_path: Path) -> None:
    draw(result, tmp_path / "a.png")
    draw_release(result.memberships[0], tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="cannot draw"):
        draw(result, tmp_path / "no" / "a.png")


# --- a given release --------------------------------------------------------------------------


def write_records(path: Path, records: list[Record]) -> Path:
    lines = [
        json.dumps(
            {"instruction": r.instruction, "context": r.context, "response": r.response},
            ensure_ascii=False,
        )
        for r in records
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def release(base: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A PEFT folder, the records it was trained on, and others."""
    root = tmp_path_factory.mktemp("release")
    subject = Subject(base, SMALL.lora())
    rng = np.random.default_rng(8)
    block = SMALL.training(batch_size=8, n_steps=30)
    records = ordinary_records(48, rng)
    examples = as_examples(records[:24], base.tokenizer, block)
    claim = make_claim(OFF, delta=1e-5, sampling_probability=0.5, n_steps=30)
    trained = subject.train(examples, block, claim, seed=1, clip_norm=1.0)
    subject.close()
    write_folder(
        root / "adapter",
        weights=to_safetensors(trained.final),
        config=peft_config(base.description.base, SMALL.lora()),
        card="",
    )
    members = write_records(root / "in.jsonl", records[:24])
    others = write_records(root / "out.jsonl", records[24:])
    return root / "adapter", members, others


def test_members_of_a_release_are_told_from_others(release: tuple[Path, Path, Path]) -> None:
    found = audit_release(*release, rules=ReleaseRules())
    assert found.score(Score.RELATIVE).found.auc > 0.65
    assert len(found.members.base) == len(found.non_members.base) == 24
    # The reference is the base alone: higher for members than what they were trained to.
    assert found.members.base.mean() > 5 * found.members.release.mean()
    assert "ε = ∞" in found.claim
    again = audit_release(*release, rules=ReleaseRules())
    assert again.scores == found.scores


def test_the_command_audits_a_release(release: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, members, others = release
    arguments = [
        *("audit", "--release", str(folder), "--members", str(members)),
        *("--non-members", str(others), "--base", EMBEDDED_NAME, "--json", "-"),
        *("--figure", str(tmp_path / "a.png")),
    ]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    scores = json.loads(found.stdout)["scores"]
    assert scores["relative loss"]["auc"] > 0.65
    assert scores["loss ratio"]["n_members"] == 24
    assert (tmp_path / "a.png").exists()


def test_a_record_in_both_files_is_refused(
    release: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder, members, others = release
    lines = [*others.read_text("utf-8").splitlines(), members.read_text("utf-8").splitlines()[0]]
    both = tmp_path / "both.jsonl"
    both.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(AuditInputError, match="1 records are in both files"):
        audit_release(folder, members, both, rules=ReleaseRules())


def test_a_single_record_is_too_few(release: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, members, others = release
    one = tmp_path / "one.jsonl"
    one.write_text(others.read_text("utf-8").splitlines()[0], encoding="utf-8")
    with pytest.raises(AuditInputError, match="24 members and 1 non-members"):
        audit_release(folder, members, one, rules=ReleaseRules())


def test_what_is_no_release_is_refused(release: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, members, others = release
    with pytest.raises(AdapterError, match="is no adapter folder"):
        audit_release(tmp_path, members, others, rules=ReleaseRules())


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--release", "a"], "--release needs --members and --non-members"),
        (["--members", "a.jsonl"], "need --release"),
        (["--no-noise", "--epsilon", "1"], "excludes"),
        (["--sent", "A"], "must be A,B or B"),
        (["--canaries", "3"], "--canaries"),
        (
            [*("--release", "a", "--members", "b", "--non-members", "c"), "--no-noise"],
            "is what it is",
        ),
    ],
)
def test_options_that_contradict_are_wrong_usage(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(app, ["audit", *arguments], env={"COLUMNS": "200"})
    assert found.exit_code == 2
    assert message in " ".join(found.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--delta", "0"], AuditInputError, "delta is 0"),
        (["--epsilon", "-1"], AuditInputError, "ε = -1"),
        (["--sampling", "0"], AuditInputError, "sampling probability is 0"),
        (["--epsilon", "1e-9"], AccountingError, "even a noise multiplier"),
    ],
)
def test_values_that_make_no_audit_are_one_sentence(
    arguments: list[str], error: type[Exception], message: str
) -> None:
    found = CliRunner().invoke(app, ["audit", *arguments])
    assert isinstance(found.exception, error)
    assert message in str(found.exception)


def test_an_error_of_the_accountant_is_one_sentence_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from simulations import cli

    monkeypatch.setattr("sys.argv", ["sheepfold-sim", "audit", "--epsilon", "1e-9"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: even a noise multiplier")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], ["noise off", "ε = 8", "ε = 1"]),
        (["--no-noise"], ["noise off"]),
        (["--epsilon", "3", "--epsilon", "2"], ["noise off", "ε = 3", "ε = 2"]),
        (["--noise-multiplier", "0.8"], ["noise off", "z = 0.8"]),
    ],
)
def test_the_command_audits_what_was_asked_for(
    result: AuditResult, monkeypatch: pytest.MonkeyPatch, arguments: list[str], names: list[str]
) -> None:
    asked: list[AuditRecipe] = []

    def remembered(recipe: AuditRecipe, tell: Any) -> AuditResult:
        asked.append(recipe)
        return result

    monkeypatch.setattr(run, "run_audit", remembered)
    options = ["--seeds", "3", "--seed", "7", "--canaries", "40", "--steps", "9", "--sent", "B"]
    found = CliRunner().invoke(app, ["audit", *arguments, *options, "--json", "-"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == report.as_json(result)
    (recipe,) = asked
    assert [protection.name for protection in recipe.protections] == names
    assert (recipe.n_runs, recipe.seed, recipe.n_canaries, recipe.n_steps) == (3, 7, 40, 9)
    assert recipe.sent == (Factor.B,)


def test_the_command_fails_where_a_claim_is_refuted(
    result: AuditResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_audit", lambda recipe, tell: refuted(result))
    ended = CliRunner().invoke(app, ["audit"])
    assert isinstance(ended.exception, ClaimRefutedError)
    assert "Lower bounds" in ended.stdout


def test_help_comes_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli_audit.__name__ == "simulations.cli_audit"
    found = CliRunner().invoke(app, ["audit", "--help"])
    assert found.exit_code == 0
    assert "--non-members" in found.stdout
