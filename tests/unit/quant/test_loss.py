"""The loss of each example, in chunks, against transformers' own logits."""

import pytest
import torch

from quant.base_model import LoadedBase
from quant.loss import example_losses, is_plain_output_layer


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 300, (4, 25), generator=generator)
    loss_mask = torch.rand(4, 25, generator=generator) < 0.6
    loss_mask[2, 10:] = False
    return {"input_ids": input_ids, "loss_mask": loss_mask}


def loss_and_gradient(
    base: LoadedBase, batch: dict[str, torch.Tensor], chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = base.model.get_input_embeddings().weight
    weights.requires_grad_(True)
    weights.grad = None
    losses = example_losses(base.model, **batch, chunk=chunk)
    (losses * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    return losses.detach(), weights.grad.clone()


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_guarantee_2_neither_loss_nor_gradient_depends_on_the_chunk(
    random_base: LoadedBase, batch: dict[str, torch.Tensor], chunk: int
) -> None:
    losses, gradient = loss_and_gradient(random_base, batch, chunk)
    weights = random_base.model.get_input_embeddings().weight
    weights.grad = None
    logits = random_base.model(input_ids=batch["input_ids"]).logits
    expected = []
    for row in range(4):
        at = batch["loss_mask"][row, 1:].nonzero()[:, 0]
        targets = batch["input_ids"][row, at + 1]
        expected.append(torch.nn.functional.cross_entropy(logits[row, at], targets))
    torch.testing.assert_close(losses, torch.stack(expected))
    (torch.stack(expected) * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    torch.testing.assert_close(gradient, weights.grad, rtol=1e-4, atol=1e-6)


def test_guarantee_1_an_example_does_not_see_the_others_nor_their_padding(
    random_base: LoadedBase, batch: dict[str, torch.Tensor]
) -> None:
    """TRAINING, trap 4: transformers' token mean couples examples through their lengths."""
    together = example_losses(random_base.model, **batch)
    alone = example_losses(
        random_base.model,
        input_ids=batch["input_ids"][2:3, :10],
        loss_mask=batch["loss_mask"][2:3, :10],
    )
    torch.testing.assert_close(together[2:3], alone)


def test_logits_never_exist_for_more_positions_than_a_chunk(
    random_base: LoadedBase, batch: dict[str, torch.Tensor]
) -> None:
    seen: list[int] = []
    head = random_base.model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, out: seen.append(out.shape[0]))
    example_losses(random_base.model, **batch, chunk=16)
    n_learnt = int(batch["loss_mask"][:, 1:].sum())
    assert max(seen) <= 16
    assert sum(seen) == n_learnt < batch["input_ids"].numel()


def test_a_base_that_changes_its_logits_afterwards_is_seen(random_base: LoadedBase) -> None:
    ids = torch.arange(3, 20).reshape(1, -1)
    assert is_plain_output_layer(random_base.model, ids)
    whole = random_base.model.forward

    def squashed(**arguments: object) -> object:
        out = whole(**arguments)
        out.logits = 0.1 * torch.tanh(out.logits / 0.1)
        return out

    random_base.model.forward = squashed
    assert not is_plain_output_layer(random_base.model, ids)
