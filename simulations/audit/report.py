"""What the audits show: tables, sentences, JSON. An ε never stands alone."""

import math
from types import TracebackType
from typing import Any, Final, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from privacy.auditing.one_run import Audit
from simulations.audit.canaries import HEADLINE, CanaryAudit, View, ViewAudit
from simulations.audit.membership import MembershipAudit, Score, ScoreAudit
from simulations.audit.probe import Probe, Seen
from simulations.audit.recipe import NEIGHBOURING, UNIT, AuditRecipe
from simulations.audit.run import AuditResult
from simulations.errors import ClaimRefutedError

_SHORT: Final = {
    View.STEPS: "each step's gradient",
    View.UPDATE: "the update",
    View.COSINE: "the same, by cosine",
    View.RELEASE: "losses of the release",
}


class AuditDisplay:
    """A bar of progress on a terminal, a line for each stage elsewhere.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        """Begin with nothing shown."""
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Begin."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()

    def tell(self, stage: str, done: int, total: int) -> None:
        """A part of a stage is done."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
            if not self._console.is_terminal:
                self._console.print(f"• {stage}", highlight=False)
        self._progress.update(self._tasks[stage], completed=done)


# Tables


def canary_table(result: AuditResult) -> Group:
    """The lower bounds on ε beside what is claimed, by what is seen and by protection."""
    recipe = result.recipe
    n_all = recipe.n_runs * recipe.n_canaries
    shown = _table(f"Lower bounds on ε from {n_all} canaries in {recipe.n_runs} runs")
    shown.add_column("what is seen", no_wrap=True)
    for protection in recipe.protections:
        shown.add_column(protection.name, justify="right", no_wrap=True)
    shown.add_row("claimed: ε ≤", *(epsilon_text(audit.claim.epsilon) for audit in result.canaries))
    shown.add_section()
    for view in View:
        cells = [_bound(audit.view(view).pooled) for audit in result.canaries]
        shown.add_row(_SHORT[view], *cells, style="bold" if view is HEADLINE else "")
    return _with_note(
        shown,
        f"At δ = {recipe.delta:g} for each {UNIT} ({NEIGHBOURING}); each bound by itself at "
        f"{100 * recipe.confidence:g} % confidence. In brackets the right guesses of all. At most "
        f"{result.canaries[0].headline.pooled.largest_bound:.2f} can be found; 0 proves nothing.",
    )


def membership_table(result: AuditResult) -> Group:
    """Each score's AUC, by protection."""
    first = result.memberships[0].scores[0].found
    shown = _table(
        f"Membership in a release: {first.n_members} members, {first.n_non_members} others"
    )
    shown.add_column("score", no_wrap=True)
    for protection in result.recipe.protections:
        shown.add_column(protection.name, justify="right", no_wrap=True)
    claims = [audit.protection for audit in result.memberships]
    shown.add_row(
        "claimed: ε ≤", *(epsilon_text(math.inf if c is None else c.epsilon) for c in claims)
    )
    shown.add_section()
    for score in Score:
        cells = [_interval(audit.score(score)) for audit in result.memberships]
        shown.add_row(score.formula, *cells)
    return _with_note(
        shown,
        "AUC with its 95 % interval; 0.5 is a guess. b: loss under the base, r: under the release.",
    )


def release_table(audit: MembershipAudit) -> Group:
    """All that membership inference found on one release."""
    first = audit.scores[0].found
    shown = _table(
        f"Membership in the release: {first.n_members} members, {first.n_non_members} others"
    )
    for name in ("score", "AUC", "accuracy", f"TPR at {100 * first.max_fpr:g} % FPR", "ε ≥"):
        shown.add_column(name, justify="left" if name == "score" else "right", no_wrap=True)
    for row in audit.scores:
        low, high = row.tpr_interval
        shown.add_row(
            row.score.formula,
            _interval(row),
            f"{row.found.balanced_accuracy:.3f}",
            f"{row.found.tpr:.3f} ({low:.3f} to {high:.3f})",
            f"{row.found.epsilon_lower_bound:.2f}",
        )
    return _with_note(
        shown,
        "With 95 % intervals; accuracy is balanced. b: loss under the base, r: under the release. "
        f"ε is estimated at δ = {first.delta:g} for each {UNIT} ({NEIGHBOURING}; against anyone "
        "with the release): records of one release are not independent.",
    )


def probe_table(result: AuditResult) -> Group | None:
    """Tokens found in one step; None where A was not sent."""
    if result.probes is None:
        return None
    rank = result.recipe.probe_rank
    shown = _table(f"Tokens found in one step on an adapter of rank {rank}")
    for name in ("seen", "records", "tokens", "directions", "precision", "recall", "AUC"):
        shown.add_column(name, justify="left" if name == "seen" else "right", no_wrap=True)
    for probe in result.probes:
        precision = "none" if probe.precision is None else f"{100 * probe.precision:.0f} %"
        seen = probe.seen.value
        if result.probed_noise is not None and probe.seen is Seen.NOISY:
            seen = f"gradient, noise {result.probed_noise.noise_multiplier:.3g}"
        shown.add_row(
            seen,
            str(probe.n_examples),
            f"{probe.n_unknown:.1f}",
            f"{probe.n_directions:.1f}",
            precision,
            f"{100 * probe.recall:.0f} %",
            f"{probe.auc:.2f}",
        )
    return _with_note(
        shown,
        "Tokens of a batch beside the template's, which all records have. Directions: at most "
        f"{3 * rank}, the rank for each of queries, keys and values; with more tokens than that "
        "most are hidden, and none is safe.",
    )


def sentences(result: AuditResult) -> list[str]:
    """What is claimed of each training, in full."""
    said = []
    for protection, canaries, members in zip(
        result.recipe.protections, result.canaries, result.memberships, strict=True
    ):
        said.append(f"{protection.name}: {canaries.claim.describe()}.")
        if members.protection is not None and members.protection.noise_multiplier is not None:
            said.append(f"  membership: {members.claim}.")
    if result.probes is None:
        said.append("B alone is sent, so A does not change: no probe for tokens.")
    return said


def require_claims(result: AuditResult) -> None:
    """Refuse a result that contradicts what is claimed.

    Raises:
        ClaimRefutedError: A bound exceeds the claimed ε.
    """
    for audit in result.canaries:
        if audit.refuted:
            found = audit.headline.pooled
            msg = (
                f"the audit finds ε ≥ {found.epsilon_lower_bound:.3f} at {100 * found.confidence:g}"
                f" % confidence where the claim is {audit.claim.describe()}: one of them is wrong; "
                "please report it"
            )
            raise ClaimRefutedError(msg)


def _table(title: str) -> Table:
    return Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title)


def _with_note(table: Table, note: str) -> Group:
    return Group(table, Text(note + "\n", style="dim"))


def epsilon_text(epsilon: float) -> str:
    """An ε of a table or a figure, which says δ and the rest elsewhere."""
    return f"{epsilon:.2f}" if math.isfinite(epsilon) else "∞"


def _bound(audit: Audit) -> str:
    return f"{audit.epsilon_lower_bound:.2f} ({audit.n_right}/{audit.n_guesses})"


def _interval(row: ScoreAudit) -> str:
    low, high = row.auc_interval
    return f"{row.found.auc:.2f} ({low:.2f} to {high:.2f})"


# JSON


def as_json(result: AuditResult) -> dict[str, Any]:
    """All numbers; all finite. Where nothing is claimed `epsilon` is None."""
    recipe = result.recipe
    return {
        "unit": UNIT,
        "neighbouring": NEIGHBOURING,
        "confidence": recipe.confidence,
        "seeds": list(range(recipe.seed, recipe.seed + recipe.n_runs)),
        "noise_from": "the operating system, not seeded",
        "lora_sent": [factor.value for factor in recipe.sent],
        "canaries": [
            {"name": protection.name, **_canary_json(audit)}
            for protection, audit in zip(recipe.protections, result.canaries, strict=True)
        ],
        "membership": [
            {
                "name": protection.name,
                "claim": None if audit.protection is None else audit.protection.as_json(),
                "scores": _scores_json(audit),
            }
            for protection, audit in zip(recipe.protections, result.memberships, strict=True)
        ],
        "probe": None if result.probes is None else _probe_json(result.probes, recipe),
    }


def release_json(audit: MembershipAudit) -> dict[str, Any]:
    """Membership inference on one release, in numbers."""
    return {
        "unit": UNIT,
        "neighbouring": NEIGHBOURING,
        "adversary": "anyone with the release",
        "claim": audit.claim,
        "scores": _scores_json(audit),
    }


def _canary_json(audit: CanaryAudit) -> dict[str, Any]:
    return {
        "claim": audit.claim.as_json(),
        "headline": HEADLINE.value,
        "refuted": audit.refuted,
        "views": {view.view.value: _view_json(view) for view in audit.views},
    }


def _view_json(view: ViewAudit) -> dict[str, Any]:
    pooled = view.pooled
    return {
        "adversary": view.view.adversary,
        "epsilon_lower_bound": pooled.epsilon_lower_bound,
        "largest_bound": pooled.largest_bound,
        "delta": pooled.delta,
        "confidence": pooled.confidence,
        "n_canaries": pooled.n_canaries,
        "n_guesses": pooled.n_guesses,
        "n_right": pooled.n_right,
        "by_run": [audit.epsilon_lower_bound for audit in view.runs],
        "auc_by_run": list(view.aucs),
    }


def _scores_json(audit: MembershipAudit) -> dict[str, Any]:
    return {
        row.score.value: {
            "formula": row.score.formula,
            "auc": row.found.auc,
            "auc_interval": list(row.auc_interval),
            "balanced_accuracy": row.found.balanced_accuracy,
            "tpr": row.found.tpr,
            "tpr_interval": list(row.tpr_interval),
            "max_fpr": row.found.max_fpr,
            "epsilon_estimate": row.found.epsilon_lower_bound,
            "delta": row.found.delta,
            "confidence": row.found.confidence,
            "n_members": row.found.n_members,
            "n_non_members": row.found.n_non_members,
        }
        for row in audit.scores
    }


def _probe_json(probes: tuple[Probe, ...], recipe: AuditRecipe) -> list[dict[str, Any]]:
    return [
        {
            "seen": probe.seen.value,
            "rank": recipe.probe_rank,
            "n_examples": probe.n_examples,
            "n_batches": probe.n_batches,
            "n_unknown_tokens": probe.n_unknown,
            "n_directions": probe.n_directions,
            "precision": probe.precision,
            "recall": probe.recall,
            "auc": probe.auc,
        }
        for probe in probes
    ]
