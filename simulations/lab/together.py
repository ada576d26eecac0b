"""Trains several agents at once: their micro-batches share one pass through the frozen base.

Each agent is the agent's own `LocalTrainer`: its batches, its rule, its clipping, its optimiser.
Only forward and backward are shared, with every example under its agent's adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from edge_agent.data.batches import collate
from edge_agent.errors import AgentError, CheckpointError, DataError, TrainingError
from edge_agent.training.gradients import Given, Wanted
from edge_agent.training.trainer import Session, TrainingResult, is_out_of_memory
from quant.lora_stack import StackedModel
from quant.loss import example_losses


def train_together(
    stack: StackedModel, sessions: Sequence[Session]
) -> list[TrainingResult | AgentError]:
    """Drive trainings to their ends, a micro-batch of each at a time.

    Guarantees:
        1. Each result equals that of the training by itself, within float32 rounding.
        2. One that fails, for its records too, ends alone; the others go on.

    Args:
        stack: Session k trains its slot k.
        sessions: At most as many as there are slots.

    Returns:
        What each ended with, in order.

    Raises:
        CheckpointError: The state of a training cannot be written.
    """
    ended: dict[int, TrainingResult | AgentError] = {}
    wanted: dict[int, Wanted] = {}
    answers: dict[int, Given | None] = dict.fromkeys(range(len(sessions)))
    n_fitting = len(sessions)
    while answers:
        wanted = {}
        for slot, given in answers.items():
            try:
                wanted[slot] = sessions[slot].send(given)
            except StopIteration as end:
                ended[slot] = cast("TrainingResult", end.value)
            except CheckpointError:  # of the folder, not of the training: it can go on
                raise
            except (DataError, TrainingError) as error:
                ended[slot] = error
        answers = {}
        slots = sorted(wanted)
        while slots:
            found = answered(stack, {slot: wanted[slot] for slot in slots[:n_fitting]})
            # Where so many did not fit at once, the next ones are not even tried.
            n_fitting, slots = min(n_fitting, found.n_at_once), slots[len(found.answers) :]
            answers |= found.answers
    return [ended[slot] for slot in range(len(sessions))]


@dataclass(frozen=True, kw_only=True, eq=False)
class Answered:
    """What a stack answers.

    Attributes:
        answers: By slot; None for one whose micro-batch does not fit into memory.
        n_at_once: How many slots fitted into one pass.
    """

    answers: dict[int, Given | None]
    n_at_once: int


def answered(stack: StackedModel, wanted: Mapping[int, Wanted]) -> Answered:
    """Gradients of the micro-batches of several slots; what does not fit is tried in halves.

    Args:
        stack: With the adapters as they stand.
        wanted: By slot, at least one; all with the same `per_example` and `loss_chunk`.
    """
    try:
        return Answered(answers=dict(_at_once(stack, wanted)), n_at_once=len(wanted))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    slots = sorted(wanted)
    if len(slots) == 1:
        return Answered(answers={slots[0]: None}, n_at_once=1)
    halves = [
        answered(stack, {slot: wanted[slot] for slot in half})
        for half in (slots[: len(slots) // 2], slots[len(slots) // 2 :])
    ]
    return Answered(
        answers=halves[0].answers | halves[1].answers,
        n_at_once=min(half.n_at_once for half in halves),
    )


def _at_once(stack: StackedModel, wanted: Mapping[int, Wanted]) -> dict[int, Given]:
    rows = stack.assign({slot: len(want.examples) for slot, want in wanted.items()})
    ordered = [wanted[slot] for slot in rows.slots]
    examples = [example for want in ordered for example in want.examples]
    stack.seed_dropout([seed for want in ordered for seed in want.dropout_seeds])
    device = stack.base.device
    batch = collate(examples, pad_id=stack.base.pad_id)
    per_example = ordered[0].per_example
    gradients = None if per_example else stack.fresh_gradients(rows.slots)
    losses = example_losses(
        stack.model,
        input_ids=batch.input_ids.to(device),
        loss_mask=batch.loss_mask.to(device),
        chunk=ordered[0].loss_chunk,
    )
    scales = torch.repeat_interleave(
        torch.tensor([want.loss_scale for want in ordered]), torch.tensor(rows.counts)
    )
    total = (losses * scales.to(device)).sum()
    if gradients is not None:
        total.backward()
        sums = losses.detach()
        found = {
            slot: Given(loss_sum=float(sums[part].sum()), gradient=gradients[slot])
            for slot, part in rows.parts()
        }
    else:
        with stack.per_example_gradients() as by_example:
            total.backward()
        sums = losses.detach()
        found = {
            slot: Given(
                loss_sum=float(sums[part].sum()),
                by_example={name: gradient[part] for name, gradient in by_example.items()},
            )
            for slot, part in rows.parts()
        }
    return {slot: given.at_scale(wanted[slot].loss_scale) for slot, given in found.items()}
