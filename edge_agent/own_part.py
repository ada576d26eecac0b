"""What of the federation's adapter this agent trains: all of it, or what its owner chose.

Where the manifest allows ranks and modules of an agent's own (`LoraBlock.is_mixed`), it trains the
first rank rows of the modules that it has, and sends zeros for the rest, with a number for each row
that says which is which. Every agent sends the same number of bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edge_agent.errors import ConfigError
from edge_agent.member import OwnersPart
from privacy.updates import PlainUpdate
from protocol.base_description import BaseDescription
from protocol.blocks import LoraBlock
from protocol.layout import VectorLayout
from quant.adapter import AdapterArrays, adapter_shapes, sent_layout
from quant.errors import AdapterError
from quant.mixed_ranks import crop, own_lora, pad, participation


@dataclass(frozen=True, kw_only=True)
class OwnPart:
    """The part of an adapter that one agent trains."""

    lora: LoraBlock
    """As an adapter of its own, with the federation's scale."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of its tensors."""
    layout: VectorLayout
    """Of those that are sent."""
    whole: VectorLayout
    """Of the federation's tensors that are sent."""
    is_mixed: bool
    """Whether the federation allows others to train another part."""

    def trained(self, layout: VectorLayout) -> VectorLayout:
        """What an agent of this part trains of a round's tensors.

        Args:
            layout: Of what agents send in the round.
        """
        return self.layout if self.is_mixed else layout.tensors

    def start_of(self, arrays: AdapterArrays) -> AdapterArrays:
        """What training starts from: this part of the global adapter.

        Raises:
            AdapterError: The adapter is not the federation's.
        """
        return crop(arrays, self.shapes)

    def spread(self, update: PlainUpdate) -> PlainUpdate:
        """This part's update as one of the whole adapter, with the rows that it trained.

        Guarantees:
            1. Values of rows and modules that were not trained are exactly zero.

        Raises:
            AdapterError: An update of another length.
        """
        if not self.is_mixed:
            return update
        return replace(
            update,
            vector=pad(update.vector, self.layout, self.whole),
            participation=participation(self.layout, self.whole),
        )


def own_part(base: BaseDescription, lora: LoraBlock, owner: OwnersPart) -> OwnPart:
    """The part that an owner chose.

    Args:
        base: The agent's own base.
        lora: The manifest's block.
        owner: What the owner chose.

    Raises:
        ConfigError: The manifest does not allow it.
        ManifestError: A target module is not in the base.
    """
    own = chosen_lora(lora, owner)
    shapes = adapter_shapes(base, own)
    return OwnPart(
        lora=own,
        shapes=shapes,
        layout=sent_layout(shapes, own.sent),
        whole=sent_layout(adapter_shapes(base, lora), lora.sent),
        is_mixed=lora.is_mixed,
    )


def chosen_lora(lora: LoraBlock, owner: OwnersPart) -> LoraBlock:
    """The adapter that an agent attaches to its base.

    Args:
        lora: The manifest's block.
        owner: What the owner chose.

    Raises:
        ConfigError: The manifest does not allow it.
    """
    try:
        return own_lora(lora, rank=owner.rank, left_out=owner.left_out)
    except AdapterError as error:
        msg = f"{error}; change --rank or --leave-out (rank, leave_out in agent.toml)"
        raise ConfigError(msg) from error
