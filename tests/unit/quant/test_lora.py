"""Our LoRA function against peft, against a loop, and with activations recomputed."""

from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model

from protocol.blocks import Factor, LoraBlock
from quant.adapter import (
    AdapterArrays,
    factor_of,
    initial_adapter,
    peft_config,
    to_safetensors,
    write_folder,
)
from quant.base_model import LoadedBase, linear_modules, load_base
from quant.errors import AdapterError
from quant.lora import AdaptedModel
from quant.loss import example_losses

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
    loss_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    loss_mask[:, 8:] = True
    loss_mask[0, 15:] = False
    return {"input_ids": input_ids, "loss_mask": loss_mask}


@pytest.fixture
def adapted(random_base: LoadedBase) -> AdaptedModel:
    model = AdaptedModel(random_base, LORA)
    model.load(make_arrays(random_base))
    return model


def gradients(adapted: AdaptedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for factor in adapted.factors.values():
        factor.grad = None
    example_losses(adapted.model, **batch).mean().backward()
    return {name: factor.grad.clone() for name, factor in adapted.trainable.items()}


def test_guarantee_1_losses_and_gradients_equal_those_of_stock_peft(
    adapted: AdaptedModel, batch: dict[str, torch.Tensor], random_base_dir: Path, tmp_path: Path
) -> None:
    found = gradients(adapted, batch)
    losses = example_losses(adapted.model, **batch)
    config = peft_config(adapted.base.description.base, LORA)
    write_folder(tmp_path, weights=to_safetensors(adapted.arrays()), config=config, card="")
    stock = PeftModel.from_pretrained(load_base(random_base_dir).model, tmp_path, is_trainable=True)
    attention_mask = torch.ones_like(batch["input_ids"])
    attention_mask[0, 15:] = 0
    logits = stock(input_ids=batch["input_ids"], attention_mask=attention_mask).logits
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
    adapted.seed_dropout([17, 18, 19])
    plain = gradients(adapted, batch)
    adapted.checkpoint_activations(99)
    recomputed = gradients(adapted, batch)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0)
    adapted.seed_dropout([17, 18, 20])
    same = all(torch.equal(gradients(adapted, batch)[name], plain[name]) for name in plain)
    assert same is (dropout == 0.0)


def unquantised(base: LoadedBase) -> LoadedBase:
    """Every 4-bit layer replaced by a plain one with the same values in float32."""
    for name, module in list(linear_modules(base.model)):
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(base.model.get_submodule(parent), last, plain)
    return base


class Recomputation(StrEnum):
    """The three modes in which our function must be exact (TRAINING, trap 3)."""

    NONE = "none"
    REENTRANT = "reentrant"
    NON_REENTRANT = "non-reentrant"

    def switch_on(self, adapted: AdaptedModel) -> None:
        if self is Recomputation.NON_REENTRANT:
            adapted.checkpoint_activations(99)
        elif self is Recomputation.REENTRANT:
            adapted.base.model.activation_checkpointing_enable({"use_reentrant": True})


def stock_peft(base: LoadedBase, lora: LoraBlock, arrays: AdapterArrays) -> PeftModel:
    """peft's own layers with its own autograd, without any of ours."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft's annotation says int
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base.model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.from_numpy(arrays[name.replace(".default", "")])
    return model


@pytest.mark.parametrize("mode", list(Recomputation))
@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_guarantees_1_and_2_gradients_equal_those_of_peft_on_random_shapes(
    random_base_dir: Path, mode: Recomputation, quantised: bool, seed: int
) -> None:
    """The sum over the batch, and each example's against peft on that example alone."""
    rng = np.random.default_rng(seed)
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    chosen = tuple(sorted(rng.choice(modules, size=int(rng.integers(1, 8)), replace=False)))
    lora = LoraBlock(
        rank=int(rng.integers(1, 17)),
        alpha=float(rng.uniform(1, 40)),
        target_modules=chosen,
        init_seed=seed,
    )
    n_examples, n_tokens = int(rng.integers(1, 6)), int(rng.integers(2, 40))
    batch = {
        "input_ids": torch.from_numpy(rng.integers(3, 300, (n_examples, n_tokens))),
        "loss_mask": torch.from_numpy(rng.random((n_examples, n_tokens)) < 0.7),
    }
    batch["loss_mask"][:, 1] = True
    bases = [load_base(random_base_dir, device=torch.device("cpu")) for _ in range(2)]
    if not quantised:
        bases = [unquantised(base) for base in bases]
    arrays = make_arrays(bases[0], lora)
    adapted, peft_model = AdaptedModel(bases[0], lora), stock_peft(bases[1], lora, arrays)
    adapted.load(arrays)
    mode.switch_on(adapted)
    summed = gradients(adapted, batch)
    with adapted.per_example_gradients() as found:
        for factor in adapted.factors.values():
            factor.grad = None
        example_losses(adapted.model, **batch).sum().backward()
    assert all(factor.grad is None for factor in adapted.factors.values())
    assert set(found) == set(summed) == set(adapted.trainable)
    total = {name: torch.zeros_like(gradient) for name, gradient in summed.items()}
    for row in range(n_examples):
        peft_model.zero_grad()
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        example_losses(peft_model, **alone).sum().backward()
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                ours = name.replace(".default", "")
                total[ours] += parameter.grad / n_examples
                assert_near(found[ours][row], parameter.grad)
    for name, gradient in total.items():
        assert_near(summed[name], gradient)


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    error = torch.linalg.vector_norm(found - wanted)
    assert float(error) <= 1e-5 * float(torch.linalg.vector_norm(wanted)) + 1e-9


def test_only_the_first_layers_are_recomputed_when_so_many_are_asked_for(
    adapted: AdaptedModel, batch: dict[str, torch.Tensor]
) -> None:
    n_forwards = {}
    for number, layer in enumerate(adapted.base.model.model.layers):
        n_forwards[number] = 0

        def count(*_: object, number: int = number) -> None:
            n_forwards[number] += 1

        layer.mlp.register_forward_pre_hook(count)
    assert adapted.n_layers == 2
    adapted.checkpoint_activations(1)
    gradients(adapted, batch)
    assert n_forwards == {0: 2, 1: 1}
    adapted.checkpoint_activations(0)
    gradients(adapted, batch)
    assert n_forwards == {0: 3, 1: 2}


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_dropout_drops_the_share_that_was_asked_for_and_keeps_the_mean(
    random_base: LoadedBase, dropout: float
) -> None:
    lora = LoraBlock(rank=64, alpha=64.0, target_modules=("q_proj",), init_seed=1, dropout=dropout)
    adapted = AdaptedModel(random_base, lora)
    layer = random_base.model.model.layers[0].self_attn.q_proj
    identity = {name: np.eye(64, dtype=np.float32) for name in adapted.factors}
    adapted.load(identity)
    x = torch.ones(4, 500, 64)
    adapted.seed_dropout(range(4))
    with torch.no_grad():
        passed = layer(x) - layer.base_layer(x)
    kept = passed.abs() > 0.5
    n_values = x.numel()
    margin = 4 * (dropout * (1 - dropout) / n_values) ** 0.5
    assert abs(float((~kept).float().mean()) - dropout) < margin
    torch.testing.assert_close(
        passed[kept], torch.full_like(passed[kept], 1 / (1 - dropout)), rtol=1e-3, atol=1e-4
    )


def test_backward_sees_the_mask_of_forward(adapted: AdaptedModel) -> None:
    lora = LORA.model_copy(update={"dropout": 0.5})
    base = adapted.base
    adapted.detach()
    dropping = AdaptedModel(base, lora)
    dropping.load(make_arrays(base, lora))
    dropping.seed_dropout([5, 2**64 - 1])
    layer = base.model.model.layers[0].self_attn.q_proj
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 64, generator=generator, requires_grad=True)
    towards = torch.randn(2, 3, 64, generator=generator)
    (layer(x) * towards).sum().backward()
    found = x.grad.clone()
    step = torch.randn(2, 3, 64, generator=generator)
    # The output is linear in x, in A and in B, so each difference quotient is exact.
    with torch.no_grad():
        before = (layer(x) * towards).sum()
        change = (layer(x + step) * towards).sum() - before
        torch.testing.assert_close((found * step).sum(), change, rtol=1e-3, atol=1e-3)
        for name, factor in dropping.factors.items():
            if "layers.0" in name and "q_proj" in name:
                step = torch.randn(factor.shape, generator=generator)
                factor.add_(step)
                change = (layer(x) * towards).sum() - before
                factor.sub_(step)
                torch.testing.assert_close((factor.grad * step).sum(), change, rtol=1e-3, atol=1e-3)


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
    with_adapter = example_losses(adapted.model, **batch)
    with adapted.disabled():
        without = example_losses(adapted.model, **batch)
    adapted.load({name: np.zeros_like(array) for name, array in adapted.arrays().items()})
    torch.testing.assert_close(without, example_losses(adapted.model, **batch))
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
    assert torch.isfinite(example_losses(again.model, **batch)).all()


def test_an_example_without_loss_tokens_has_loss_zero(
    adapted: AdaptedModel, batch: dict[str, torch.Tensor]
) -> None:
    batch["loss_mask"][1] = False
    losses = example_losses(adapted.model, **batch).detach()
    assert float(losses[1]) == 0.0
    assert float(losses[0]) > 0.0


def test_only_b_is_trainable_when_only_b_is_sent(random_base: LoadedBase) -> None:
    adapted = AdaptedModel(random_base, LORA.model_copy(update={"sent": (Factor.B,)}))
    assert all(name.endswith("lora_B.weight") for name in adapted.trainable)
    assert len(adapted.trainable) * 2 == len(adapted.factors)


def test_factors_may_be_trained_in_turn(
    adapted: AdaptedModel, batch: dict[str, torch.Tensor]
) -> None:
    both = gradients(adapted, batch)
    for factor in (Factor.A, Factor.B):
        adapted.train_only((factor,))
        alone = gradients(adapted, batch)
        assert alone.keys() == adapted.trainable.keys()
        assert {factor_of(name) for name in alone} == {factor}
        for name, gradient in alone.items():
            torch.testing.assert_close(gradient, both[name])
    adapted.train_only((Factor.A, Factor.B))
    assert gradients(adapted, batch).keys() == both.keys()


def test_a_layer_that_is_used_twice_adds_its_gradients_by_example(adapted: AdaptedModel) -> None:
    layer = adapted.base.model.model.layers[0].self_attn.q_proj
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randn(3, 4, 64, generator=generator) for _ in range(2))

    def by_example(*inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        with adapted.per_example_gradients() as found:
            torch.stack([layer(x).square().sum() for x in inputs]).sum().backward()
        return found

    both, one, other = by_example(first, second), by_example(first), by_example(second)
    assert len(both) == 2
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, one[name] + other[name])


def test_examples_handed_on_as_one_are_refused_where_each_needs_a_gradient(
    adapted: AdaptedModel,
) -> None:
    layer = adapted.base.model.model.layers[0].self_attn.q_proj
    rows = torch.ones(12, 64)  # as OPT's feed-forward layers get them
    layer(rows).sum().backward()
    with (
        adapted.per_example_gradients(),
        pytest.raises(AdapterError, match="gets the examples of a batch as one"),
    ):
        layer(rows).sum().backward()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_gradients_of_each_example_equal_those_of_opacus_hooks(
    random_base_dir: Path, batch: dict[str, torch.Tensor]
) -> None:
    """The field's reference, where it works: on a 4-bit base, without recomputed activations."""
    from opacus.grad_sample import GradSampleModule

    bases = [load_base(random_base_dir, device=torch.device("cpu")) for _ in range(2)]
    arrays = make_arrays(bases[0], LORA)
    adapted, peft_model = AdaptedModel(bases[0], LORA), stock_peft(bases[1], LORA, arrays)
    adapted.load(arrays)
    with adapted.per_example_gradients() as ours:
        example_losses(adapted.model, **batch).sum().backward()
    hooked = GradSampleModule(peft_model, loss_reduction="sum", strict=False)
    example_losses(peft_model, **batch).sum().backward()
    theirs = {
        name.replace(".default", ""): parameter.grad_sample
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    hooked.remove_hooks()
    assert set(theirs) == set(ours)
    for name, gradient in theirs.items():
        assert gradient.shape == ours[name].shape
        assert_near(ours[name], gradient)
