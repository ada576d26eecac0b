"""What the server must know of a base model that it never loads.

`sheepfold-agent describe-base` writes it with torch; `sheepfold-server init --base` reads it
without.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from protocol import limits
from protocol.blocks import BaseBlock
from protocol.errors import ManifestError
from protocol.wire import WireModel

Axis = Annotated[int, Field(ge=1, le=2**31 - 1)]


class LinearModule(WireModel):
    """A linear layer that an adapter can attach to."""

    name: Annotated[str, Field(min_length=1, max_length=limits.MAX_TENSOR_NAME_CHARS)]
    d_out: Axis
    d_in: Axis


class BaseDescription(WireModel):
    """A base model: how to name it, how to recognise it, where adapters attach."""

    version: Literal[1] = 1
    base: BaseBlock
    architecture: Annotated[str, Field(min_length=1, max_length=200)]
    n_parameters: Annotated[int, Field(ge=1, le=limits.MAX_COUNT)]
    max_positions: Annotated[int, Field(ge=1, le=limits.MAX_COUNT)]
    has_chat_template: bool
    linear_modules: Annotated[tuple[LinearModule, ...], Field(min_length=1, max_length=20_000)]

    def targets(self, target_modules: tuple[str, ...]) -> Mapping[str, LinearModule]:
        """The linear layers that an adapter attaches to, by full name.

        Args:
            target_modules: Names such as `"q_proj"`; each stands for every layer whose full name
                is it or ends in `"." + it` (the rule of peft).

        Raises:
            ManifestError: A name stands for no layer of this base.
        """
        chosen: dict[str, LinearModule] = {}
        for target in target_modules:
            hits = [
                module
                for module in self.linear_modules
                if module.name == target or module.name.endswith("." + target)
            ]
            if not hits:
                known = sorted({module.name.rpartition(".")[2] for module in self.linear_modules})
                msg = (
                    f"target module {target!r} is not in {self.base.model!r}; "
                    f"its linear layers are called: {', '.join(known)}"
                )
                raise ManifestError(msg)
            chosen.update({module.name: module for module in hits})
        return chosen
