"""What is fixed for the life of a federation, in one value that every room is given."""

from collections.abc import Mapping
from dataclasses import dataclass

from aggregator_server.errors import ConfigError
from aggregator_server.keys import Keys
from privacy.fixed_point import agreed_layout
from privacy.turns import Turns
from protocol.base_description import BaseDescription
from protocol.blocks import CellMasking, HelperMasking
from protocol.layout import VectorLayout
from protocol.manifest import FederationManifest
from protocol.signing import Signed
from protocol.wire import b64u_encode
from quant.adapter import adapter_shapes
from quant.companions import update_layout, update_layouts


@dataclass(frozen=True, kw_only=True)
class MaskedTerms:
    """How a federation masks its updates, whatever the trust model."""

    masking: CellMasking | HelperMasking
    turns: Turns


@dataclass(frozen=True, kw_only=True)
class Charter:
    """The signed manifest, and what follows from it."""

    signed: Signed[FederationManifest]
    digest: bytes
    layout: VectorLayout
    """Of all that agents send, over all rounds: tensors of the adapter, and companions behind them.

    `turns` says what a round's updates hold."""
    turns: Turns
    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor of the adapter."""
    keys: Keys
    masked: MaskedTerms | None
    """None in the open mode."""

    @property
    def update_n_bytes(self) -> int:
        """Size of the body of the largest update, masked or not."""
        return self.turns.max_n_bytes

    @property
    def manifest(self) -> FederationManifest:
        """The manifest itself."""
        return self.signed.body

    @property
    def path_id(self) -> str:
        """The federation's id as it stands in paths."""
        return b64u_encode(self.manifest.federation)


def make_charter(signed: Signed[FederationManifest], base: BaseDescription, keys: Keys) -> Charter:
    """Check that a manifest, a base and keys belong together.

    Args:
        signed: The manifest, whose signature the caller has made or checked.
        base: The description of the base model.
        keys: The server's keys.

    Raises:
        ConfigError: They do not.
        EncodingPlanError: A masked sum could wrap.
        ManifestError: A target module is not in the base.
    """
    manifest = signed.body
    if (manifest.server, manifest.registrar) != (keys.server.identity, keys.registrar.identity):
        msg = "the keys in keys/ are not those of the manifest; restore them from a backup"
        raise ConfigError(msg)
    shapes = adapter_shapes(base, manifest.lora)
    layout = agreed_layout(
        update_layout(shapes, manifest.lora, manifest.training), manifest.masking, manifest.privacy
    )
    if layout.digest() != manifest.layout or base.base != manifest.base:
        msg = "base.json is not the manifest's base model; restore it from a backup"
        raise ConfigError(msg)
    turns = Turns.of(update_layouts(shapes, manifest.lora, manifest.training), manifest)
    terms = None
    if isinstance(manifest.masking, CellMasking | HelperMasking):
        terms = MaskedTerms(masking=manifest.masking, turns=turns)
    return Charter(
        signed=signed,
        digest=manifest.digest(),
        layout=layout,
        turns=turns,
        shapes=shapes,
        keys=keys,
        masked=terms,
    )
