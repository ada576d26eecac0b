"""SCAFFOLD's c among the files of a release: shown to agents, with a book that nobody is shown."""

from aggregator_server.aggregation.scaffold import ControlBook, initial_control
from aggregator_server.blobs import Blobs
from aggregator_server.releases import Releases, store_file
from aggregator_server.store.rows import BlobRole
from privacy.updates import Float32Array
from protocol.chain import BlobRef, Release
from protocol.layout import VectorLayout
from protocol.wire import parse
from quant.adapter import flatten, from_safetensors, to_safetensors, unflatten


def stored_control(
    releases: Releases, release: Release, tensors: VectorLayout
) -> tuple[Float32Array, ControlBook]:
    """C as a release has it, and whose it is the mean of; zero before the first round.

    Args:
        releases: The chain.
        release: Of a federation with SCAFFOLD.
        tensors: Layout of the adapter's values.

    Raises:
        ChainError: A file of it has changed on disk.
        BlobError: It cannot be read.
    """
    book = releases.hidden_file(release.number, BlobRole.CONTROL_BOOK)
    if release.control is None or book is None:
        return initial_control(tensors.n_values)
    shapes = {slot.name: slot.shape for slot in tensors.slots}
    arrays = from_safetensors(releases.file(release.control), shapes)
    return flatten(arrays, tensors), parse(ControlBook, book)


def store_control(
    blobs: Blobs, control: Float32Array, book: ControlBook, tensors: VectorLayout
) -> tuple[BlobRef, BlobRef]:
    """Store c, in names and shapes as adapters have them, and its book.

    Args:
        blobs: Where to.
        control: [n_values] float32.
        book: Whose mean it is.
        tensors: Layout of the adapter's values.

    Raises:
        NoSpaceError: They do not fit.
    """
    arrays = unflatten(control, tensors)
    return store_file(blobs, to_safetensors(arrays)), store_file(blobs, book.canonical())
