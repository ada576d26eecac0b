"""SCAFFOLD's control variates in a training: each step's gradient, less the agent's own drift.

An agent whose data are unlike the others' walks towards its own optimum in every local step. c_i is
its mean gradient of the last round that counted, c the mean of all agents'; each step's gradient g
becomes g + c − c_i, which points where all together would go. The next c_i is the mean of this
round's stochastic gradients g, before the correction.

Source: Karimireddy et al., "SCAFFOLD", arXiv 1910.06378, algorithm 1. Its option II sets
c_i⁺ = c_i − c + (x − y_i) / (K·η). Under SGD, as there, y_i = x − η·Σ (g_k + c − c_i), so this *is*
the mean of the g_k. We compute that mean itself, since we step by Adam: there (x − y_i) / (K·η)
would hold signs more than gradients. So c and c_i are gradients under Adam too, and Adam is given
corrected ones; the paper's theorems are for SGD and do not cover that, and docs/LOG.md has a case
where it did not help. g is the gradient after clipping, the one that a step would take without the
correction, and is not clipped again.
"""

import hashlib
from collections.abc import Mapping
from typing import Final

import torch

from edge_agent.training.gradients import Gradients
from quant.adapter import AdapterArrays

_PREFIX: Final = "control_sum/"


class ControlVariates:
    """What corrects the steps of one training, and what it leaves for the next.

    Guarantees:
        1. A training that is resumed from its state gives the same variate as an uninterrupted one.
        2. With c = c_i, as before the first round, no gradient changes.

    Args:
        own: c_i, by tensor name.
        everyone: c, by tensor name.
    """

    def __init__(self, own: AdapterArrays, everyone: AdapterArrays) -> None:
        """Nothing is summed yet."""
        self._correction = {
            name: torch.from_numpy(everyone[name] - own[name]) for name in sorted(everyone)
        }
        self._sums: Gradients = {}

    def __repr__(self) -> str:
        """For the digest of a run: another correction is another run."""
        digest = hashlib.sha256()
        for name, tensor in self._correction.items():
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return f"ControlVariates(sha256:{digest.hexdigest()})"

    def begin(self, trainable: Mapping[str, torch.Tensor]) -> None:
        """A training begins anew.

        Args:
            trainable: What is trained: its names, shapes and device are those of the gradients.
        """
        self._sums = {name: torch.zeros_like(tensor.detach()) for name, tensor in trainable.items()}

    def correct(self, gradients: Gradients) -> None:
        """Note a step's gradient, and correct it in place.

        Args:
            gradients: After clipping.
        """
        for name, gradient in gradients.items():
            self._sums[name].add_(gradient)
            correction = self._correction[name].to(gradient.device)
            self._correction[name] = correction  # moved once
            gradient.add_(correction)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the state file of a training keeps."""
        return {_PREFIX + name: tensor for name, tensor in self._sums.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave, after `begin`."""
        for name, total in self._sums.items():
            total.copy_(tensors[_PREFIX + name])

    def renewed(self, n_steps: int) -> AdapterArrays:
        """The next c_i: the mean of the steps' gradients, float32.

        Args:
            n_steps: Of the training, at least 1.
        """
        return {name: (total / n_steps).cpu().numpy() for name, total in self._sums.items()}
