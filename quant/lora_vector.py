"""The numbers of an adapter as one vector, of which its factors are views.

A small base's step lasts as long as the start of its operations, and a vector needs few: one loads
a release, one clips a gradient, one steps the optimiser, one makes the update.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod

import numpy as np
import torch

from protocol.blocks import Factor
from protocol.layout import VectorLayout
from quant.adapter import AdapterArrays, Float32Array, factor_of, parts_of
from quant.errors import AdapterError

Shapes = dict[str, tuple[int, ...]]


class FactorOrder:
    """In what order factors stand in a vector: what is trained, then the rest, each by name.

    So what is trained is one piece, in the order in which an update travels (`VectorLayout`).

    Args:
        shapes: Of every tensor of the adapter, by PEFT's names.
        factors: Which are trained, of each pair.

    Attributes:
        shapes: Of all, in order.
        trained: Of those that are trained, in order.
        n_trained: Their values, with which the vector begins.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], factors: tuple[Factor, ...]) -> None:
        """Sort them."""
        self.factors = factors
        self.trained: Shapes = {
            name: shapes[name] for name in sorted(shapes) if factor_of(name) in factors
        }
        self._layout: VectorLayout | None = None
        rest = {name: shapes[name] for name in sorted(shapes) if name not in self.trained}
        self.shapes: Shapes = self.trained | rest
        self.n_trained = sum(map(prod, self.trained.values()))

    def is_of(self, layout: VectorLayout) -> bool:
        """Whether a layout's tensors are those that are trained, in this order.

        Args:
            layout: Of an update.
        """
        if layout is not self._layout:
            slots = [(slot.name, slot.shape) for slot in layout.slots if not slot.is_companion]
            if slots != list(self.trained.items()):
                return False
            self._layout = layout  # it is asked for every training
        return True


def split(vector: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A vector's parts by name: views.

    Args:
        vector: [n], or [K, n] of several adapters.
        shapes: Of all parts, in order.

    Returns:
        [*shape], or [K, *shape].
    """
    parts = vector.split([prod(shape) for shape in shapes.values()], dim=-1)
    named = zip(shapes.items(), parts, strict=True)
    return {name: part.view(*vector.shape[:-1], *shape) for (name, shape), part in named}


class OneAdapter(ABC):
    """One adapter's numbers, wherever they lie.

    Guarantees:
        1. `load` then `arrays` returns the same bytes.
        2. `weights` are the numbers themselves, in the order of the layout that `trains` accepts.
        3. What is refused changes nothing.
    """

    @property
    @abstractmethod
    def order(self) -> FactorOrder:
        """Of the factors in the vector."""

    @property
    @abstractmethod
    def vector(self) -> torch.Tensor:
        """The numbers themselves, [n_values] float32."""

    @property
    def weights(self) -> torch.Tensor:
        """Those that are trained, [n_trained] float32: whoever changes it changes them."""
        return self.vector[: self.order.n_trained]

    def trains(self, layout: VectorLayout) -> bool:
        """Whether `weights` are the tensors of a layout, in its order.

        Args:
            layout: Of an update.
        """
        return self.order.is_of(layout)

    def parts(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """A vector's parts by tensor name: views.

        Args:
            vector: [n_trained], in the order of `weights`.
        """
        return split(vector, self.order.trained)

    def shapes(self) -> Shapes:
        """Shape of every tensor of the adapter, by PEFT's names."""
        return dict(self.order.shapes)

    def load(self, arrays: Mapping[str, Float32Array]) -> None:
        """Put an adapter's numbers in place; tensors that are not named stay as they are.

        Args:
            arrays: float32 arrays by PEFT's names.

        Raises:
            AdapterError: A name or shape that this adapter does not have; nothing was changed.
        """
        shapes = self.order.shapes
        for name, array in arrays.items():
            if shapes.get(name) != array.shape:
                has = f"shape {shapes[name]}" if name in shapes else "no such tensor"
                msg = f"cannot load {name!r} of shape {array.shape}: the adapter has {has}"
                raise AdapterError(msg)
        host = self.vector.cpu()  # the numbers themselves, if this is where they lie
        numbers, start = host.numpy(), 0
        for name, shape in shapes.items():
            end = start + prod(shape)
            if name in arrays:
                numbers[start:end] = arrays[name].reshape(-1)
            start = end
        self.vector.copy_(host)

    def load_vector(self, vector: Float32Array, layout: VectorLayout) -> None:
        """Put all of an adapter's numbers in place.

        Args:
            vector: [n_values] float32.
            layout: Of all tensors.

        Raises:
            AdapterError: The vector or a tensor does not fit; nothing was changed.
        """
        fits = vector.shape == self.vector.shape and vector.dtype == np.float32
        if fits and self.order.n_trained == len(vector) and self.order.is_of(layout):
            self.vector.copy_(torch.from_numpy(vector))  # all is trained: it has the same order
        else:
            self.load(parts_of(vector, layout))

    def arrays(self) -> AdapterArrays:
        """A copy of the adapter's numbers as float32 arrays on the CPU."""
        numbers: Float32Array = self.vector.to("cpu", copy=True).numpy()
        shapes = self.order.shapes
        ends = np.cumsum([prod(shape) for shape in shapes.values()])[:-1]
        named = zip(shapes.items(), np.split(numbers, ends), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in named}
