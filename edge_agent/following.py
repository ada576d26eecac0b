"""Follows the chain of releases and holds the global adapter that training starts from."""

from collections.abc import Callable

import numpy as np

from edge_agent.chain import check_change, check_releases
from edge_agent.errors import JournalError, OtherBytesError, TrustError
from edge_agent.home import AgentHome
from edge_agent.journal import Journal
from edge_agent.release_parts import Parts, parts_of
from edge_agent.transport import Transport
from privacy.fixed_point import agreed_layout
from privacy.turns import Turns
from protocol.base_description import BaseDescription
from protocol.blocks import Factor
from protocol.chain import BlobRef, Release
from protocol.checks import Check
from protocol.manifest import FederationManifest
from protocol.wire import sha256
from quant.adapter import (
    AdapterArrays,
    adapter_shapes,
    factor_of,
    from_safetensors,
    to_safetensors,
    unflatten,
)
from quant.companions import update_layout, update_layouts
from quant.errors import AdapterError


class ReleaseFollower:
    """What an agent has verified of its federation's releases.

    Guarantees:
        1. An adapter is handed out only when its release continues the verified chain, its bytes
           are the signed ones, and no tensor moved further than the owner accepted.
        2. Factors that agents do not send are those of release 0, whatever a release holds.

    Args:
        home: Where downloads are kept.
        journal: Where the verified chain is kept.
        manifest: The pinned federation.
        base: The agent's own base.
        transport: To the server.

    Raises:
        TrustError: The manifest's layout is not the one of this base.
        EncodingPlanError: A masked sum could wrap.
    """

    def __init__(
        self,
        *,
        home: AgentHome,
        journal: Journal,
        manifest: FederationManifest,
        base: BaseDescription,
        transport: Transport,
    ) -> None:
        """Compute the layout; nothing is fetched yet."""
        self._home = home
        self._journal = journal
        self._manifest = manifest
        self._transport = transport
        self._shapes = adapter_shapes(base, manifest.lora)
        sent = update_layout(self._shapes, manifest.lora, manifest.training)
        self.layout = agreed_layout(sent, manifest.masking, manifest.privacy)
        layouts = update_layouts(self._shapes, manifest.lora, manifest.training)
        self.turns = Turns.of(layouts, manifest)
        if self.layout.digest() != manifest.layout:
            msg = "the manifest's layout is not the one of its base and adapter; nothing is trained"
            raise TrustError(msg, Check.OTHER_LAYOUT)
        self._accepted: tuple[int, AdapterArrays] | None = None

    def follow(self, newest: int) -> bool:
        """Fetch and verify the releases between the last verified one and `newest`, if any."""
        last = self._journal.newest_release()
        moved = last is None or last.number < newest
        while last is None or last.number < newest:
            page = self._transport.releases(after=-1 if last is None else last.number)
            verified = check_releases(
                self._manifest, last, page.releases, earlier=self._journal.release
            )
            if not verified:
                msg = f"the server speaks of release {newest} but does not show it"
                raise TrustError(msg, Check.BROKEN_CHAIN)
            for release, signed in zip(verified, page.releases, strict=True):
                self._journal.add_release(release.number, signed)
            last = verified[-1]
        return moved

    def newest(self) -> tuple[Release, AdapterArrays]:
        """The newest verified release with its arrays, fetched and checked.

        Raises:
            TrustError: The bytes are not the released ones, or moved too far.
            AgentError: It cannot be fetched, or there is no release yet.
        """
        release = self._journal.newest_release()
        if release is None:
            msg = "no release has been seen yet"
            raise JournalError(msg)
        number, before = self._accepted or self._last_accepted()
        if number == release.number:
            self._accepted = (number, before)
            return release, before
        arrays = self._arrays_of(release)
        check_change(
            before,
            arrays,
            max_tensor_change_norm=self._manifest.change_limits.max_tensor_change_norm,
            n_releases=release.number - number,
        )
        self._accepted = (release.number, arrays)
        self._prune_cache(release)
        return release, arrays

    def control(self) -> AdapterArrays:
        """SCAFFOLD's c of the newest verified release, in the tensors that are sent; zero at first.

        Raises:
            TrustError: The bytes are not the released ones, or no such tensors.
            AgentError: It cannot be fetched, or there is no release yet.
        """
        release = self._journal.newest_release()
        ref = None if release is None else release.control
        if release is None or ref is None:
            zero = np.zeros(self.layout.tensors.n_values, np.float32)
            return unflatten(zero, self.layout.tensors)
        return self._trusted(release, lambda: self._read(ref, self._manifest.lora.sent))

    def _last_accepted(self) -> tuple[int, AdapterArrays]:
        """The adapter that this agent last trained from, or release 0.

        A part that was only begun does not count: its release may be the one to be checked.
        """
        trained = [part for part in self._journal.parts() if part.trained]
        number = trained[-1].manifest.body.release if trained else 0
        release = self._journal.release(number)
        if release is None:  # cannot be: the chain was followed from release 0 on
            msg = f"release {number} is not in the verified chain"
            raise TrustError(msg)
        return number, self._arrays_of(release)

    def _prune_cache(self, newest: Release) -> None:
        """Keep the parts of the newest release, and release 0; the rest can be fetched again."""
        kept = {ref.sha256.hex() for ref, _ in self._parts_of(newest)}
        first = self._journal.release(0)
        if newest.control is not None:
            kept.add(newest.control.sha256.hex())
        if first is not None:
            kept.add(first.adapter.sha256.hex())
        for path in self._home.cached_files():
            if path.name not in kept:
                path.unlink()

    def _arrays_of(self, release: Release) -> AdapterArrays:
        return self._trusted(release, lambda: self._checked_arrays_of(release))

    @staticmethod
    def _trusted(release: Release, read: Callable[[], AdapterArrays]) -> AdapterArrays:
        try:
            return read()
        except OtherBytesError as error:
            raise TrustError(str(error), Check.OTHER_ADAPTER) from error
        except AdapterError as error:
            msg = f"release {release.number} cannot be used: {error}"
            raise TrustError(msg, Check.BROKEN_ADAPTER) from error

    def _read(self, ref: BlobRef, factors: tuple[Factor, ...]) -> AdapterArrays:
        path = self._transport.fetch(ref, self._home.cache)
        shapes = {n: shape for n, shape in self._shapes.items() if factor_of(n) in factors}
        return from_safetensors(path.read_bytes(), shapes)

    def _checked_arrays_of(self, release: Release) -> AdapterArrays:
        arrays: AdapterArrays = {}
        for ref, factors in self._parts_of(release):
            arrays = self._read(ref, factors) | arrays
        if sha256(to_safetensors(arrays)) != release.adapter.sha256:
            msg = f"release {release.number} does not hold what its signature promises"
            raise TrustError(msg, Check.OTHER_ADAPTER)
        return arrays

    def _parts_of(self, release: Release) -> Parts:
        return parts_of(release, self._manifest.lora, self._journal.release)
