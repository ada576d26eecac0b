"""The trainer's state file: one atomic safetensors file, never pickle.

It holds the trained factors, the moments of Adam, and as metadata the step, the settings of a step,
the loss scale and the digest of everything that the run depends on. A file of another run is
refused, so a state is never resumed with other data, another recipe or another starting adapter.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from edge_agent.durable import write_durably
from edge_agent.errors import CheckpointError
from quant.memory import StepSettings

_METADATA_KEY = "sheepfold"


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What the steps so far amount to, for whoever watches; it changes no step."""

    n_tokens: int = 0
    """Useful tokens of all batches."""
    first_loss: float | None = None
    """Of the first batch that was of anybody, nats a token; it may be NaN or infinite."""
    last_loss: float | None = None

    def after(self, loss: float | None, *, n_tokens: int) -> "Tally":
        """With one more step.

        Args:
            loss: Of its batch; None: a batch of nobody has none.
            n_tokens: Of its batch.
        """
        if loss is None:
            return self
        first = loss if self.first_loss is None else self.first_loss
        return Tally(n_tokens=self.n_tokens + n_tokens, first_loss=first, last_loss=loss)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands, apart from its tensors."""

    run: str
    """Hexadecimal digest of what the run depends on."""
    step: int
    """Optimiser steps done."""
    settings: StepSettings
    loss_scale: float
    tally: Tally


def save_state(path: Path, progress: Progress, tensors: dict[str, torch.Tensor]) -> None:
    """Write a state file: either the old one or the new one exists, whatever happens.

    Args:
        path: The file; its folder must exist.
        progress: Where the run stands.
        tensors: What to keep, by name; copied to the CPU.

    Raises:
        CheckpointError: It cannot be written, for instance because the disk is full; the old file
            is untouched.
    """
    data = safetensors.torch.save(
        {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()},
        metadata={_METADATA_KEY: json.dumps(asdict(progress))},
    )
    try:
        write_durably(path, data)
    except OSError as error:
        msg = f"cannot save the training state to {path}: {error}; free some space"
        raise CheckpointError(msg) from error


def load_state(path: Path, *, run: str) -> tuple[Progress, dict[str, torch.Tensor]] | None:
    """Read a state file of this run.

    Args:
        path: The file.
        run: The run's digest.

    Returns:
        The progress and the tensors, or None when there is no file, it belongs to another run, or
        it cannot be read: then training begins anew, which loses time but nothing else.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            kept = json.loads(file.metadata()[_METADATA_KEY])
            parts = {
                "settings": StepSettings(**kept["settings"]),
                "tally": Tally(**kept["tally"]),
            }
            progress = Progress(**{**kept, **parts})
            if progress.run != run:
                return None
            return progress, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
