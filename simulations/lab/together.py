"""Trains several agents at once: their micro-batches share one pass through the frozen base.

Each agent is the agent's own `LocalTrainer`: its batches, its rule, its clipping, its optimiser.
Only forward and backward are shared, with every example under its agent's adapter.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch

from edge_agent.data.batches import collate
from edge_agent.errors import TrainingError
from edge_agent.training.gradients import Given, Wanted
from edge_agent.training.trainer import Session, TrainingResult, is_out_of_memory
from quant.lora_stack import StackedModel
from quant.loss import example_losses


def train_together(
    stack: StackedModel, sessions: Sequence[Session]
) -> list[TrainingResult | TrainingError]:
    """Drive trainings to their ends, a micro-batch of each at a time.

    Guarantees:
        1. Each result equals that of the training by itself, within float32 rounding.
        2. One that fails ends alone; the others go on.

    Args:
        stack: Session k trains its slot k.
        sessions: At most as many as there are slots.

    Returns:
        What each ended with, in order.
    """
    ended: dict[int, TrainingResult | TrainingError] = {}
    wanted: dict[int, Wanted] = {}
    answers: dict[int, Given | None] = dict.fromkeys(range(len(sessions)))
    while answers:
        wanted = {}
        for slot, given in answers.items():
            try:
                wanted[slot] = sessions[slot].send(given)
            except StopIteration as end:
                ended[slot] = cast("TrainingResult", end.value)
            except TrainingError as error:
                ended[slot] = error
        answers = answered(stack, wanted) if wanted else {}
    return [ended[slot] for slot in range(len(sessions))]


def answered(stack: StackedModel, wanted: Mapping[int, Wanted]) -> dict[int, Given | None]:
    """Gradients of the micro-batches of several slots; None for one that does not fit into memory.

    What does not fit at once is tried in halves.

    Args:
        stack: With the adapters as they stand.
        wanted: By slot, at least one; all with the same `per_example` and `loss_chunk`.
    """
    try:
        return dict(_at_once(stack, wanted))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    slots = sorted(wanted)
    if len(slots) == 1:
        return {slots[0]: None}
    found: dict[int, Given | None] = {}
    for half in (slots[: len(slots) // 2], slots[len(slots) // 2 :]):
        found |= answered(stack, {slot: wanted[slot] for slot in half})
    return found


def _at_once(stack: StackedModel, wanted: Mapping[int, Wanted]) -> dict[int, Given]:
    rows = stack.assign({slot: len(want.examples) for slot, want in wanted.items()})
    ordered = [wanted[slot] for slot in rows.slots]
    examples = [example for want in ordered for example in want.examples]
    stack.seed_dropout([seed for want in ordered for seed in want.dropout_seeds])
    device = stack.base.device
    batch = collate(examples, pad_id=stack.base.pad_id)
    for factor in stack.trainable.values():
        factor.grad = None
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
    by_example: dict[str, torch.Tensor] | None = None
    if ordered[0].per_example:
        with stack.per_example_gradients() as by_example:
            total.backward()
    else:
        total.backward()
    sums = losses.detach()
    found = {}
    for (slot, part), want in zip(rows.parts(), ordered, strict=True):
        gradients = {
            name: cast("torch.Tensor", factor.grad)[slot]
            if by_example is None
            else by_example[name][part]
            for name, factor in stack.trainable.items()
        }
        if want.loss_scale != 1.0:
            for gradient in gradients.values():
                gradient.div_(want.loss_scale)
        found[slot] = Given(loss_sum=float(sums[part].sum()), gradients=gradients)
    return found
