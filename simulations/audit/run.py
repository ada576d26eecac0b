"""All audits of the embedded base, one after the other."""

from dataclasses import dataclass

from protocol.blocks import Factor
from quant.base_model import load_base, set_threads
from quant.tiny import EMBEDDED_NAME
from simulations.audit.canaries import CanaryAudit, audit_canaries
from simulations.audit.membership import MembershipAudit, audit_members
from simulations.audit.probe import Probe, n_probe_batches, probe_updates
from simulations.audit.recipe import AuditRecipe, Claim, Tell
from simulations.audit.training import Subject


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditResult:
    """What was found, by protection in the recipe's order.

    `probes` is None where B alone is sent: A then does not change.
    """

    recipe: AuditRecipe
    canaries: tuple[CanaryAudit, ...]
    memberships: tuple[MembershipAudit, ...]
    probes: tuple[Probe, ...] | None
    probed_noise: Claim | None


def run_audit(recipe: AuditRecipe, tell: Tell = lambda *_: None) -> AuditResult:
    """Audit every protection of a recipe on the embedded base, on one thread.

    Args:
        recipe: What is audited.
        tell: Told how it goes.

    Raises:
        AccountingError: A claim that cannot be made.
        TrainingError: A training that gave nothing.
    """
    # Before any work: a target that no noise keeps to fails at once.
    canary_claims = [recipe.canary_claim(one) for one in recipe.protections]
    member_claims = [recipe.member_claim(one) for one in recipe.protections]
    set_threads(1)
    base = load_base(EMBEDDED_NAME)
    subject = Subject(base, recipe.lora())
    canaries, memberships = [], []
    for protection, claim in zip(recipe.protections, canary_claims, strict=True):
        stage = f"canaries, {protection.name}"
        n_done = 0
        tell(stage, 0, recipe.n_runs)

        def on_run(stage: str = stage) -> None:
            nonlocal n_done
            n_done += 1
            tell(stage, n_done, recipe.n_runs)

        canaries.append(audit_canaries(subject, recipe, claim, on_run=on_run))
    for protection, claim in zip(recipe.protections, member_claims, strict=True):
        tell(f"membership, {protection.name}", 0, 1)
        memberships.append(audit_members(subject, recipe, claim))
        tell(f"membership, {protection.name}", 1, 1)
    subject.close()
    noise = next((claim for claim in canary_claims if claim.noise_multiplier is not None), None)
    probes = None
    if Factor.A in recipe.sent:
        prober = Subject(base, recipe.lora(recipe.probe_rank))
        n_all, n_probed = n_probe_batches(recipe, noise=noise), 0

        def on_batch() -> None:
            nonlocal n_probed
            n_probed += 1
            tell("tokens in an update", n_probed, n_all)

        probes = probe_updates(prober, recipe, noise=noise, on_batch=on_batch)
        prober.close()
    return AuditResult(
        recipe=recipe,
        canaries=tuple(canaries),
        memberships=tuple(memberships),
        probes=probes,
        probed_noise=noise,
    )
