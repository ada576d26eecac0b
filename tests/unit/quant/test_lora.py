"""Our LoRA function against peft, against a loop, and with activations recomputed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from protocol.manifest import Factor, LoraBlock
from quant.adapter import AdapterArrays, initial_adapter, peft_config, to_safetensors, write_folder
from quant.base_model import LoadedBase, load_base
from quant.errors import AdapterError
from quant.lora import AdaptedModel, example_losses

LORA = LoraBlock(
    rank=4, alpha=12.0, target_modules=("q_proj", "o_proj", "gate_proj", "down_proj"), init_seed=5
)


def make_arrays(base: LoadedBase, lora: LoraBlock = LORA) -> AdapterArrays:
    """An adapter whose B is not zero, so that both factors have gradients."""
    rng = np.random.default_rng(0)
    return {
        name: array if array.any() else rng.normal(0, 0.05, array.shape).astype(np.float32)
        for name, array in initial_adapter(base.description, lora).items()
    }


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 300, (3, 20), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    loss_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    loss_mask[:, 8:] = True
    attention_mask[0, 15:] = 0
    loss_mask[0, 15:] = False
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}


@pytest.fixture
def adapted(random_base: LoadedBase) -> AdaptedModel:
    model = AdaptedModel(random_base, LORA)
    model.load(make_arrays(random_base))
    return model


def gradients(adapted: AdaptedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for factor in adapted.factors.values():
        factor.grad = None
    example_losses(adapted, **batch).mean().backward()
    return {name: factor.grad.clone() for name, factor in adapted.trainable.items()}


def test_guarantee_1_losses_and_gradients_equal_those_of_stock_peft(
    adapted: AdaptedModel, batch: dict[str, torch.Tensor], random_base_dir: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    found = gradients(adapted, batch)
    losses = example_losses(adapted, **batch)
    config = peft_config(adapted.base.description.base, LORA)
    write_folder(tmp_path, weights=to_safetensors(adapted.arrays()), config=config, card="")
    stock = PeftModel.from_pretrained(load_base(random_base_dir).model, tmp_path, is_trainable=True)
    logits = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = []
    for row in range(3):
        at = batch["loss_mask"][row, 1:].nonzero()[:, 0]
        targets = batch["input_ids"][row, at + 1]
        expected.append(torch.nn.functional.cross_entropy(logits[row, at], targets))
    torch.testing.assert_close(losses, torch.stack(expected))
    torch.stack(expected).mean().backward()
    trained = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in stock.named_parameters()
        if parameter.requires_grad
    }
    assert set(trained) == set(found)
    for name, gradient in trained.items():
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_guarantee_1_recomputed_activations_change_nothing(
    random_base: LoadedBase, batch: dict[str, torch.Tensor], dropout: float
) -> None:
    lora = LORA.model_copy(update={"dropout": dropout})
    adapted = AdaptedModel(random_base, lora)
    adapted.load(make_arrays(random_base, lora))
    adapted.state.dropout_seed = 17
    plain = gradients(adapted, batch)
    adapted.checkpoint_activations(enabled=True)
    recomputed = gradients(adapted, batch)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0)
    adapted.state.dropout_seed = 18
    same = all(torch.equal(gradients(adapted, batch)[name], plain[name]) for name in plain)
    assert same is (dropout == 0.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_guarantee_2_per_example_gradients_equal_a_loop(
    adapted: AdaptedModel, batch: dict[str, torch.Tensor], checkpointing: bool
) -> None:
    adapted.checkpoint_activations(enabled=checkpointing)
    with adapted.per_example_gradients() as found:
        example_losses(adapted, **batch).sum().backward()
    assert all(factor.grad is None for factor in adapted.factors.values())
    assert set(found) == set(adapted.trainable)
    for row in range(3):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for name, gradient in gradients(adapted, alone).items():
            torch.testing.assert_close(found[name][row], gradient, rtol=1e-4, atol=1e-7)


def test_guarantee_3_load_then_arrays_returns_the_same_bytes(adapted: AdaptedModel) -> None:
    arrays = make_arrays(adapted.base)
    adapted.load(arrays)
    assert to_safetensors(adapted.arrays()) == to_safetensors(arrays)


def test_an_adapter_of_another_shape_is_refused_whole(adapted: AdaptedModel) -> None:
    before = to_safetensors(adapted.arrays())
    arrays = adapted.arrays()
    first, last = min(arrays), max(arrays)
    arrays[first] += 1.0
    arrays[last] = np.zeros((2, 2), np.float32)
    with pytest.raises(AdapterError, match="shape"):
        adapted.load(arrays)
    assert to_safetensors(adapted.arrays()) == before


def test_the_base_alone_is_there_while_the_adapter_is_disabled(
    adapted: AdaptedModel, batch: dict[str, torch.Tensor]
) -> None:
    with_adapter = example_losses(adapted, **batch)
    with adapted.disabled():
        without = example_losses(adapted, **batch)
    adapted.load({name: np.zeros_like(array) for name, array in adapted.arrays().items()})
    torch.testing.assert_close(without, example_losses(adapted, **batch))
    assert not torch.equal(with_adapter, without)


def test_detaching_gives_the_base_back(
    adapted: AdaptedModel, batch: dict[str, torch.Tensor]
) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    base = adapted.base
    adapted.detach()
    layer = base.model.model.layers[0].self_attn.q_proj
    assert type(layer) is Linear4bit
    again = AdaptedModel(base, LORA)
    again.load(make_arrays(base))
    assert torch.isfinite(example_losses(again, **batch)).all()


def test_an_example_without_loss_tokens_has_loss_zero(
    adapted: AdaptedModel, batch: dict[str, torch.Tensor]
) -> None:
    batch["loss_mask"][1] = False
    losses = example_losses(adapted, **batch).detach()
    assert float(losses[1]) == 0.0
    assert float(losses[0]) > 0.0


def test_only_b_is_trainable_when_only_b_is_sent(random_base: LoadedBase) -> None:
    adapted = AdaptedModel(random_base, LORA.model_copy(update={"sent": (Factor.B,)}))
    assert all(name.endswith("lora_B.weight") for name in adapted.trainable)
    assert len(adapted.trainable) * 2 == len(adapted.factors)
