"""The order of an adapter's numbers in one flat vector: metadata only, no arrays.

Agent and server compute the layout from the manifest and compare digests, so "value 17" means the
same weight on every machine. `step` and `clip_amplitude` are the slots of the masked mode's
fixed-point encoding (PROTOCOL, "Encoding"); they are absent in the open mode.
"""

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import Field, model_validator

from protocol import limits
from protocol.wire import WireModel, domain_hash

Name = Annotated[str, Field(min_length=1, max_length=limits.MAX_TENSOR_NAME_CHARS)]
Axis = Annotated[int, Field(ge=1, le=limits.MAX_TENSOR_VALUES)]


class TensorSlot(WireModel):
    """One tensor of the vector: row-major, starting at `offset` values."""

    name: Name
    shape: Annotated[tuple[Axis, ...], Field(min_length=1, max_length=8)]
    offset: Annotated[int, Field(ge=0)]
    step: Annotated[float, Field(gt=0.0)] | None = None
    clip_amplitude: Annotated[int, Field(ge=1, le=limits.MAX_COUNT)] | None = None

    @property
    def n_values(self) -> int:
        """Number of values of this tensor."""
        n_values = 1
        for axis in self.shape:
            n_values *= axis
        return n_values


class VectorLayout(WireModel):
    """All tensors of the vector, in order.

    Guarantees:
        1. Slots follow one another without gap or overlap, sorted by name, from offset 0.
        2. Equal digests mean equal names, shapes, offsets, steps and amplitudes.

    Raises (at construction, as a `pydantic.ValidationError`; `wire.parse` turns it into
    `ManifestError`): a gap, an overlap, names out of order or twice, or more values than
    `limits.MAX_UPDATE_BYTES` holds as float32.
    """

    slots: Annotated[tuple[TensorSlot, ...], Field(min_length=1, max_length=limits.MAX_TENSORS)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        offset = 0
        previous = ""
        for slot in self.slots:
            if slot.name <= previous:
                msg = f"tensor names must ascend: {slot.name!r} after {previous!r}"
                raise ValueError(msg)
            if slot.offset != offset:
                msg = f"{slot.name!r} starts at {slot.offset}; the one before ends at {offset}"
                raise ValueError(msg)
            offset += slot.n_values
            previous = slot.name
        if offset * 4 > limits.MAX_UPDATE_BYTES:
            msg = f"{offset} float32 values exceed {limits.MAX_UPDATE_BYTES} bytes"
            raise ValueError(msg)
        return self

    @classmethod
    def of_shapes(
        cls,
        shapes: dict[str, tuple[int, ...]],
        *,
        step: float | None = None,
        clip_amplitude: int | None = None,
    ) -> Self:
        """Lay tensors out by ascending name.

        Args:
            shapes: Shape by tensor name; at least one.
            step: Δ of every tensor in the masked mode.
            clip_amplitude: A of every tensor in the masked mode.

        Raises:
            pydantic.ValidationError: The tensors exceed the limits.
        """
        slots = []
        offset = 0
        for name in sorted(shapes):
            slot = TensorSlot(
                name=name,
                shape=shapes[name],
                offset=offset,
                step=step,
                clip_amplitude=clip_amplitude,
            )
            slots.append(slot)
            offset += slot.n_values
        return cls(slots=tuple(slots))

    @property
    def n_values(self) -> int:
        """Length of the vector."""
        last = self.slots[-1]
        return last.offset + last.n_values

    @property
    def n_bytes(self) -> int:
        """Size of the vector as little-endian float32, the body of an open-mode upload."""
        return 4 * self.n_values

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.slots)

    def slices(self) -> Iterator[tuple[TensorSlot, slice]]:
        """Each tensor with its place in the vector."""
        for slot in self.slots:
            yield slot, slice(slot.offset, slot.offset + slot.n_values)

    def digest(self) -> bytes:
        """The hash that the federation manifest carries."""
        return domain_hash("layout", self.as_json())
