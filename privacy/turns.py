"""What the updates of each round look like: layout, and under masks the plan of their words.

In most federations all rounds are alike. Where agents send one factor in one round and the other in
the next, layouts take turns with the release that a round starts from. Server and agent both ask
`Turns.at`, so that no two places can differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from privacy.errors import EncodingPlanError
from privacy.fixed_point import EncodingPlan, agreed_layout
from protocol.blocks import CellMasking, HelperMasking
from protocol.layout import VectorLayout
from protocol.manifest import FederationManifest


@dataclass(frozen=True, kw_only=True)
class UpdateTerms:
    """What an update of a round looks like."""

    layout: VectorLayout
    """With step and amplitude under masks."""
    plan: EncodingPlan | None
    """None in the open mode."""

    @property
    def n_bytes(self) -> int:
        """Size of the body of an update, masked or not."""
        return self.layout.n_bytes if self.plan is None else self.plan.n_bytes


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The terms of every round of a federation.

    Guarantees:
        1. The terms depend on the manifest and on the number of the release that the round starts
           from, and on nothing else.
    """

    terms: tuple[UpdateTerms, ...]

    @classmethod
    def of(cls, layouts: Sequence[VectorLayout], manifest: FederationManifest) -> Self:
        """The terms of a federation.

        Args:
            layouts: Of what agents send, by turn; `quant.lora_turns.turn_layouts`.
            manifest: Says how updates are masked.

        Raises:
            EncodingPlanError: A masked sum could wrap.
            NoiseError: The same with noise, or its shares are too small.
        """
        masking, privacy = manifest.masking, manifest.privacy
        found = []
        for plain in layouts:
            layout, plan = agreed_layout(plain, masking, privacy), None
            if isinstance(masking, CellMasking | HelperMasking):
                plan = EncodingPlan.of(
                    layout, masking, max_weight=manifest.max_weight, privacy=privacy
                )
            found.append(UpdateTerms(layout=layout, plan=plan))
        return cls(terms=tuple(found))

    def at(self, release: int) -> UpdateTerms:
        """The terms of a round.

        Args:
            release: Number of the release that it starts from.
        """
        return self.terms[release % len(self.terms)]

    def plan_at(self, release: int) -> EncodingPlan:
        """How the updates of a masked round become words.

        Args:
            release: Number of the release that it starts from.

        Raises:
            EncodingPlanError: The federation masks nothing.
        """
        plan = self.at(release).plan
        if plan is None:
            msg = "this federation masks nothing, so there are no words to make"
            raise EncodingPlanError(msg)
        return plan

    @property
    def max_n_bytes(self) -> int:
        """Size of the largest update."""
        return max(terms.n_bytes for terms in self.terms)
