"""How the audits look: scores of those in and out, and ROC curves."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from simulations.audit.canaries import HEADLINE, CanaryAudit
from simulations.audit.membership import MembershipAudit, Score
from simulations.audit.recipe import UNIT, AuditRecipe
from simulations.audit.report import epsilon_text
from simulations.audit.run import AuditResult
from simulations.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#999999"
_COLOURS: Final = (_ORANGE, _BLUE, "#009e73", "#cc79a7")
_N_BINS: Final = 30


def draw(result: AuditResult, path: Path) -> None:
    """Draw the scores of canaries in and out by protection, and the ROC of membership.

    Args:
        result: What to draw.
        path: A PNG.

    Raises:
        OutputError: The picture cannot be written.
    """
    names = [protection.name for protection in result.recipe.protections]
    figure, axes = _figure(len(names) + 1)
    for where, name, audit in zip(axes, names, result.canaries, strict=False):
        _draw_canaries(where, name, audit, result.recipe)
    for name, member, colour in zip(names, result.memberships, _cycle(len(names)), strict=True):
        _draw_roc(axes[-1], name, member, Score.RELATIVE, colour)
    _finish_roc(axes[-1], "Membership in a release,\nby relative loss")
    _save(figure, path)


def draw_release(audit: MembershipAudit, path: Path) -> None:
    """Draw the scores of members and others, and the ROC of every score.

    Args:
        audit: What to draw.
        path: A PNG.

    Raises:
        OutputError: The picture cannot be written.
    """
    figure, axes = _figure(2)
    _histograms(
        axes[0],
        audit.members.scores(Score.RATIO),
        audit.non_members.scores(Score.RATIO),
        ("members", "non-members"),
    )
    axes[0].set_title("Loss ratio")
    axes[0].set_xlabel("loss under the base − loss under the release")
    for score, colour in zip(Score, _cycle(len(Score)), strict=True):
        _draw_roc(axes[1], score.value, audit, score, colour)
    _finish_roc(axes[1], "Membership in the release")
    _save(figure, path)


def _figure(n_axes: int) -> tuple[Any, list["Axes"]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    figure = Figure(figsize=(4.2 * n_axes, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, n_axes, squeeze=False)[0])


def _cycle(n_colours: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(n_colours)]


def _draw_canaries(where: "Axes", name: str, audit: CanaryAudit, recipe: AuditRecipe) -> None:
    inside = np.concatenate([run.scores[HEADLINE][run.included] for run in audit.runs])
    outside = np.concatenate([run.scores[HEADLINE][~run.included] for run in audit.runs])
    _histograms(where, _squashed(inside), _squashed(outside), ("canaries in", "canaries out"))
    found = audit.headline.pooled
    claimed = epsilon_text(audit.claim.epsilon)
    where.set_title(
        f"{name}: found ε ≥ {found.epsilon_lower_bound:.2f}, claimed ε ≤ {claimed}\n"
        f"δ = {recipe.delta:g}, {UNIT}, {100 * recipe.confidence:g} % confidence",
        fontsize=10,
    )
    where.set_xlabel("log of the odds of “in”, as sign · log(1 + |s|)")


def _squashed(values: np.ndarray) -> np.ndarray:
    """Without noise the odds are astronomical."""
    squashed: np.ndarray = np.sign(values) * np.log1p(np.abs(values))
    return squashed


def _histograms(
    where: "Axes", inside: np.ndarray, outside: np.ndarray, labels: tuple[str, str]
) -> None:
    both = np.concatenate([inside, outside])
    edges = np.histogram_bin_edges(both, bins=_N_BINS).tolist()
    for values, label, colour in zip((inside, outside), labels, (_ORANGE, _GREY), strict=True):
        where.hist(values.tolist(), bins=edges, alpha=0.6, label=label, color=colour)
    where.set_ylabel("count")
    where.legend(fontsize=8)


def _draw_roc(where: "Axes", name: str, audit: MembershipAudit, score: Score, colour: str) -> None:
    inside, outside = audit.members.scores(score), audit.non_members.scores(score)
    thresholds = np.unique(np.concatenate([inside, outside]))[::-1]
    true_rates = [0.0, *((inside >= t).mean() for t in thresholds)]
    false_rates = [0.0, *((outside >= t).mean() for t in thresholds)]
    area = audit.score(score).found.auc
    where.step(false_rates, true_rates, where="post", color=colour, label=f"{name}: {area:.2f}")


def _finish_roc(where: "Axes", title: str) -> None:
    where.plot([0, 1], [0, 1], color=_GREY, linestyle=":", linewidth=1)
    where.set_xlabel("false positive rate")
    where.set_ylabel("true positive rate")
    where.set_title(title, fontsize=10)
    where.legend(title="AUC", fontsize=8, loc="lower right")


def _save(figure: Any, path: Path) -> None:  # noqa: ANN401 - matplotlib is imported late
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # a folder that is not there; an unknown ending
        msg = f"cannot draw {path}: {error}"
        raise OutputError(msg) from error
