"""The loss of each example, without ever holding the logits of a whole batch.

Positions that nothing is learnt from never reach the output layer, and the others reach it a chunk
at a time: with a vocabulary of 32,000 the logits of 4,096 tokens, in three copies, would outweigh
everything else of a small model's step.
"""

from typing import Any, Final, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from quant.memory import DEFAULT_LOSS_CHUNK

CausalLM = PreTrainedModel | PeftModel

_FP16_SCALE: Final = 2.0**10
"""Keeps probabilities of a large vocabulary above float16's smallest number."""


def example_losses(
    model: CausalLM,
    *,
    input_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    chunk: int = DEFAULT_LOSS_CHUNK,
) -> torch.Tensor:
    """The mean cross-entropy of each example over its own loss tokens.

    Guarantees:
        1. The loss and the gradient of one example never depend on another: the token mean of
           transformers couples examples through their lengths (TRAINING, trap 4).
        2. Neither depends on `chunk`, up to float32 rounding.

    No attention mask is needed: the padding is on the right and attention is causal, so no token
    ever sees it. Without one, attention runs in the kernels that skip what the mask would hide.

    Args:
        model: A decoder-only model of transformers or peft.
        input_ids: [B, T] int64, padded on the right with any token.
        loss_mask: [B, T] bool, True where a token is predicted with loss; False for padding.
            Column 0 is ignored.
        chunk: Positions whose logits exist at once, at least 1.

    Returns:
        [B] float32; 0 for an example without loss tokens.
    """
    causal = _plain(model)
    hidden = _last_hidden(causal, input_ids)  # [B, T, h]
    predicted = loss_mask[:, 1:]  # [B, T-1]: the token at t+1 is predicted at t
    example = predicted.nonzero(as_tuple=True)[0]  # [N]
    head = cast("torch.nn.Module", causal.get_output_embeddings())
    losses: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden[:, :-1][predicted], input_ids[:, 1:][predicted], head, chunk
    )  # [N]
    sums = torch.zeros(len(input_ids), device=losses.device).index_add(0, example, losses)
    return sums / predicted.sum(1).clamp(min=1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row; its gradient by the row is made in forward, while logits exist.

    Forward and backward together then cost what an ordinary output layer costs: nothing is
    computed twice, and [N, h] is kept in place of [N, V].

    Source: cut cross-entropy, arXiv 2411.09009, section 3, without its custom kernels.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives the context no public type
        hidden: torch.Tensor,  # [N, h]
        targets: torch.Tensor,  # [N]
        head: torch.nn.Module,
        chunk: int,
    ) -> torch.Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        learns = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden, dtype=torch.float32) if learns else None
        scale = _FP16_SCALE if hidden.dtype is torch.float16 else 1.0
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            with torch.set_grad_enabled(learns):
                part = hidden[rows].detach().requires_grad_(learns)
                logits = head(part).float()  # [n, V]
                loss = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none")
                total = loss.sum() * scale
            losses[rows] = loss.detach()
            if gradient is not None:
                gradient[rows] = torch.autograd.grad(total, part)[0].float() / scale
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - torch gives the context no public type
        g: torch.Tensor,  # [N]
    ) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * g.unsqueeze(1)).to(ctx.dtype), None, None, None


def _plain(model: CausalLM) -> PreTrainedModel:
    return cast(
        "PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model
    )


def _last_hidden(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    body: Any = model.base_model
    return cast("torch.Tensor", body(input_ids=input_ids, use_cache=False).last_hidden_state)


def is_plain_output_layer(model: PreTrainedModel, input_ids: torch.Tensor) -> bool:
    """Whether a model's logits are its output layer on the last hidden state, and nothing more.

    Gemma 2 squashes its logits afterwards, Granite and Cohere scale them; `example_losses` would
    be wrong there.

    Args:
        model: A decoder-only model.
        input_ids: [B, T] int64 to try it on.

    Returns:
        True where both agree to 1 % on these tokens.
    """
    head = cast("torch.nn.Module", model.get_output_embeddings())
    with torch.inference_mode():
        hidden = _last_hidden(model, input_ids)
        logits = model(input_ids=input_ids, use_cache=False).logits
        return bool(torch.allclose(head(hidden).float(), logits.float(), rtol=1e-2, atol=1e-3))
