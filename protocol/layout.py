"""The order of an adapter's numbers in one flat vector: metadata only, no arrays.

Agent and server compute the layout from the manifest and compare digests, so "value 17" means the
same weight on every machine. `step` and `clip_amplitude` are the slots of the masked mode's
fixed-point encoding (PROTOCOL, "Encoding"); they are absent in the open mode.

Behind the tensors may stand companions, numbers that go through the same sum beside them. Which,
the federation manifest says:

| name | shape | values |
| --- | --- | --- |
| `control` | all values of the tensors | how the agent's control variate changed (SCAFFOLD) |
| `participation` | modules by name × rank | 1 where the agent trained the rank row, else 0 |

Under masks, where there is no `control`, a companion has neither step nor amplitude: it travels as
the weight word does, as the agent's weight or 0.
"""

from collections.abc import Iterator
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from protocol import limits
from protocol.wire import WireModel, domain_hash

CONTROL: Final = "control"
"""How an agent's control variate changed, for each value of the tensors in their order."""
PARTICIPATION: Final = "participation"
"""Which rank rows an agent trained, where ranks and modules may differ."""
COMPANIONS: Final = frozenset({CONTROL, PARTICIPATION})
"""What may stand behind the tensors. No tensor has such a name: PEFT's all begin alike."""

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

    @property
    def is_companion(self) -> bool:
        """Whether it is no tensor of the adapter."""
        return self.name in COMPANIONS


class VectorLayout(WireModel):
    """All tensors of the vector, in order.

    Guarantees:
        1. Slots follow one another without gap or overlap, sorted by name, from offset 0.
        2. Equal digests mean equal names, shapes, offsets, steps and amplitudes.
        3. Companions stand behind all tensors, so the tensors are the vector's beginning.

    Raises (at construction, as a `pydantic.ValidationError`; `wire.parse` turns it into
    `ManifestError`): a gap, an overlap, names out of order or twice, a tensor behind a companion,
    or more values than `limits.MAX_UPDATE_BYTES` holds as float32.
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
            if previous in COMPANIONS and not slot.is_companion:
                msg = f"tensor {slot.name!r} stands behind the companion {previous!r}"
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
            step: Δ of every tensor in the masked mode; companions have none.
            clip_amplitude: A of every tensor in the masked mode; companions have none.

        Raises:
            pydantic.ValidationError: The tensors exceed the limits.
        """
        slots = []
        offset = 0
        for name in sorted(shapes):
            is_tensor = name not in COMPANIONS
            slot = TensorSlot(
                name=name,
                shape=shapes[name],
                offset=offset,
                step=step if is_tensor else None,
                clip_amplitude=clip_amplitude if is_tensor else None,
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

    @property
    def tensors(self) -> "VectorLayout":
        """The adapter's tensors alone: the vector's beginning.

        Raises:
            pydantic.ValidationError: There is none.
        """
        if not self.slots[-1].is_companion:
            return self
        return VectorLayout(slots=tuple(slot for slot in self.slots if not slot.is_companion))

    def companion(self, name: str) -> slice | None:
        """Where a companion stands in the vector; None where the federation has none."""
        places = (where for slot, where in self.slices() if slot.name == name)
        return next(places, None) if name in COMPANIONS else None

    def slices(self) -> Iterator[tuple[TensorSlot, slice]]:
        """Each tensor with its place in the vector."""
        for slot in self.slots:
            yield slot, slice(slot.offset, slot.offset + slot.n_values)

    def digest(self) -> bytes:
        """The hash that the federation manifest carries."""
        return domain_hash("layout", self.as_json())
