"""opacus' hooks in the place of our own function."""

import numpy as np
import pytest
import torch

from protocol.blocks import Factor, LoraBlock
from quant.adapter import initial_adapter
from quant.base_model import LoadedBase, load_base
from quant.errors import AdapterError
from quant.lora import AdaptedModel
from quant.loss import example_losses
from quant.opacus_model import OpacusModel

MODULES = ("q_proj", "v_proj", "down_proj")


def make_lora(sent: tuple[Factor, ...] = (Factor.A, Factor.B), dropout: float = 0.0) -> LoraBlock:
    return LoraBlock(
        rank=4, alpha=8.0, dropout=dropout, target_modules=MODULES, sent=sent, init_seed=7
    )


@pytest.fixture
def other_base(random_base_dir) -> LoadedBase:
    return load_base(random_base_dir, device=torch.device("cpu"))


def gradients(model: AdaptedModel, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 300, (5, 17), generator=generator)
    mask = torch.rand(ids.shape, generator=generator) < 0.7
    mask[:, 1] = True
    model.model.train()
    losses = example_losses(model.model, input_ids=ids, loss_mask=mask)
    with model.per_example_gradients() as found:
        losses.sum().backward()
    return found


@pytest.mark.parametrize(
    ("sent", "trained"),
    [
        ((Factor.A, Factor.B), (Factor.A, Factor.B)),
        ((Factor.B,), (Factor.B,)),
        ((Factor.A, Factor.B), (Factor.A,)),  # in its turn
    ],
)
def test_guarantee_1_its_gradients_are_ours(
    random_base: LoadedBase,
    other_base: LoadedBase,
    sent: tuple[Factor, ...],
    trained: tuple[Factor, ...],
) -> None:
    lora = make_lora(sent)
    ours, theirs = AdaptedModel(random_base, lora), OpacusModel(other_base, lora)
    ours.train_only(trained)
    theirs.train_only(trained)
    rng = np.random.default_rng(5)
    arrays = {
        name: array + rng.normal(0, 0.05, array.shape).astype(np.float32)
        for name, array in initial_adapter(random_base.description, lora).items()
    }
    for model in (ours, theirs):
        model.load(arrays)
    for seed in (0, 1):  # the second shows that nothing is left of the first
        wanted, found = gradients(ours, seed), gradients(theirs, seed)
        assert wanted.keys() == found.keys() == ours.trainable.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        assert all(parameter.grad is None for parameter in theirs.model.parameters())
    ours.detach()
    theirs.detach()


def test_guarantee_2_recomputed_activations_are_refused(random_base: LoadedBase) -> None:
    model = OpacusModel(random_base, make_lora())
    model.checkpoint_activations(0)
    with pytest.raises(AdapterError, match="cannot compute activations again"):
        model.checkpoint_activations(1)
    model.detach()


def test_dropout_is_refused(random_base: LoadedBase) -> None:
    with pytest.raises(AdapterError, match=r"works without dropout; the adapter has 0\.05"):
        OpacusModel(random_base, make_lora(dropout=0.05))


def test_without_its_adapter_the_base_is_as_it_was(random_base: LoadedBase) -> None:
    ids = torch.arange(3, 20)[None]
    plain = random_base.model(input_ids=ids).logits
    lora = make_lora()
    model = OpacusModel(random_base, lora)
    rng = np.random.default_rng(5)
    start = initial_adapter(random_base.description, lora)
    model.load(
        {name: array + rng.random(array.shape).astype("f4") for name, array in start.items()}
    )
    model.model.eval()
    with torch.no_grad():
        assert not torch.allclose(model.model(input_ids=ids).logits, plain)
        with model.disabled():
            torch.testing.assert_close(model.model(input_ids=ids).logits, plain)
    model.detach()
    torch.testing.assert_close(random_base.model(input_ids=ids).logits, plain)
