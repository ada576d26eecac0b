"""Loading a base in NF4, recognising it, and refusing what cannot work."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from protocol.blocks import BaseBlock, LoraBlock
from protocol.wire import parse
from quant.adapter import initial_adapter
from quant.base_model import (
    LoadedBase,
    check_same_base,
    default_compute_dtype,
    fingerprint,
    linear_modules,
    load_base,
    parse_device,
)
from quant.errors import BaseModelError, FingerprintError
from quant.lora import AdaptedModel
from quant.loss import example_losses

CPU = torch.device("cpu")
Edit = Callable[[Path], None]


@pytest.fixture
def copy_of(random_base_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint that a test may damage."""

    def make(name: str = "copy") -> Path:
        folder = tmp_path / name
        shutil.copytree(random_base_dir, folder)
        return folder

    return make


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder: Path, **options: object) -> LoadedBase:
    return load_base(folder, device=CPU, **options)  # type: ignore[arg-type]


# The fingerprint


def test_guarantee_1_the_fingerprint_depends_on_the_checkpoint_alone(
    random_base: LoadedBase, random_base_dir: Path, copy_of: Callable[..., Path]
) -> None:
    expected = random_base.description.base
    n_threads = torch.get_num_threads()
    try:
        for dtype, n in ((torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 1)):
            torch.set_num_threads(n)
            found = load(random_base_dir, compute_dtype=dtype)
            assert found.description.base == expected
            assert found.compute_dtype is dtype
    finally:
        torch.set_num_threads(n_threads)
    moved = load(copy_of("elsewhere")).description.base
    assert moved.fingerprint == expected.fingerprint
    assert moved.tokenizer_digest == expected.tokenizer_digest


def test_the_fp32_original_is_another_base_than_its_bf16_copy(
    random_base: LoadedBase, copy_of: Callable[..., Path]
) -> None:
    folder = copy_of()
    edit_weights(folder, lambda tensors: tensors.update({k: v.float() for k, v in tensors.items()}))
    edit_config(folder, dtype="float32")
    found = load(folder).description.base
    assert found.source_dtype == "float32"
    assert random_base.description.base.source_dtype == "bfloat16"
    assert found.fingerprint != random_base.description.base.fingerprint


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.input_layernorm.weight",
    ],
)
def test_one_unquantised_value_changes_the_fingerprint(
    random_base: LoadedBase, copy_of: Callable[..., Path], name: str
) -> None:
    folder = copy_of()

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] += 0.125

    edit_weights(folder, nudge)
    assert load(folder).description.base.fingerprint != random_base.description.base.fingerprint


@pytest.mark.parametrize("what", ["codes", "absmax", "nested absmax", "offset", "embedding"])
def test_every_number_of_the_quantised_base_is_in_its_fingerprint(
    random_base: LoadedBase, what: str
) -> None:
    model = random_base.model
    before = fingerprint(model)
    assert fingerprint(model) == before
    weight = dict(linear_modules(model))["model.layers.1.mlp.down_proj"].weight
    state = weight.quant_state
    tensor = {
        "codes": weight.data,
        "absmax": state.absmax,
        "nested absmax": state.state2.absmax,
        "offset": state.offset,
        "embedding": model.get_input_embeddings().weight.data,
    }[what]
    last = tensor.reshape(-1)[-1:]
    last.add_(1)
    assert fingerprint(model) != before
    last.sub_(1)


def test_the_sign_of_one_quantised_weight_changes_the_fingerprint(
    random_base: LoadedBase, copy_of: Callable[..., Path]
) -> None:
    folder = copy_of()

    def flip(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["model.layers.1.mlp.down_proj.weight"].view(-1)
        block = weight[:64].abs()
        weight[block.argsort()[50]] *= -1  # large, but not the block's largest: the scale stays

    edit_weights(folder, flip)
    assert load(folder).description.base.fingerprint != random_base.description.base.fingerprint


@pytest.mark.parametrize("what", ["vocabulary", "template", "special"])
def test_another_tokenizer_changes_its_digest_and_not_the_fingerprint(
    random_base: LoadedBase, copy_of: Callable[..., Path], what: str
) -> None:
    from transformers import AutoTokenizer

    folder = copy_of()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if what == "template":
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
    elif what == "special":
        tokenizer.eos_token = "<pad>"
    else:
        tokenizer.add_tokens(["sheepfold"])
    tokenizer.save_pretrained(folder)
    found, before = load(folder).description, random_base.description
    assert found.base.tokenizer_digest != before.base.tokenizer_digest
    assert found.base.fingerprint == before.base.fingerprint
    assert found.has_chat_template is (what == "template")


# Guarantee 2: the federation's base or none


def test_guarantee_2_the_expected_base_is_accepted_under_any_name(
    random_base: LoadedBase, copy_of: Callable[..., Path]
) -> None:
    expected = random_base.description.base.model_copy(update={"model": "org/name"})
    assert load(copy_of(), expected=expected).description.base.model == "copy"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source_dtype": "float32"}, "stored in bfloat16; the federation's is float32"),
        ({"fingerprint": bytes(32)}, "another checkpoint. Fetch 'org/name', revision any"),
        ({"tokenizer_digest": bytes(32)}, "the tokenizer of 'copy' is another one"),
    ],
)
def test_guarantee_2_another_base_is_refused_with_what_differs(
    random_base: LoadedBase, copy_of: Callable[..., Path], change: dict[str, object], says: str
) -> None:
    expected = random_base.description.base.model_copy(update={"model": "org/name", **change})
    with pytest.raises(FingerprintError, match=says) as caught:
        load(copy_of(), expected=expected)
    assert "org/name" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_revision_to_fetch_is_named(random_base: LoadedBase) -> None:
    found = random_base.description.base
    expected = found.model_copy(update={"fingerprint": bytes(32), "revision": "abc123"})
    with pytest.raises(FingerprintError, match="revision abc123"):
        check_same_base(found, expected)


# Guarantee 3, and training


def gradients(base: LoadedBase, adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 40).reshape(1, -1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for factor in adapted.factors.values():
        factor.grad = None
    example_losses(adapted.model, input_ids=ids, loss_mask=mask).sum().backward()
    return {name: factor.grad.clone() for name, factor in adapted.factors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guarantee_3_a_gradient_before_an_evaluation_equals_the_one_after_it(
    random_base_dir: Path, dtype: torch.dtype
) -> None:
    """TRAINING, trap 1: an evaluation pass repacks the weights on some processors."""
    base = load(random_base_dir, compute_dtype=dtype)
    assert not any(module.support_avx512bf16_for_cpu for _, module in linear_modules(base.model))
    lora = LoraBlock(rank=4, alpha=8.0, target_modules=("q_proj", "down_proj"), init_seed=1)
    adapted = AdaptedModel(base, lora)
    arrays = initial_adapter(base.description, lora)
    adapted.load({name: array if array.any() else array + 0.01 for name, array in arrays.items()})
    before = gradients(base, adapted)
    adapted.model.eval()
    with torch.inference_mode():
        adapted.model(input_ids=torch.arange(3, 40).reshape(1, -1))
    adapted.model.train()
    after = gradients(base, adapted)
    for name, gradient in before.items():
        assert gradient.any()
        assert torch.equal(gradient, after[name]), name


def test_backward_multiplies_by_the_weights_of_forward(random_base: LoadedBase) -> None:
    """bitsandbytes' backward dequantises to the checkpoint's dtype, bfloat16 here."""
    generator = torch.Generator().manual_seed(0)
    for name, module in linear_modules(random_base.model):
        x = torch.randn(5, module.in_features, generator=generator, requires_grad=True)
        towards = torch.randn(5, module.out_features, generator=generator)
        (module(x) * towards).sum().backward()
        whole = module(torch.eye(module.in_features)).T  # [d_out, d_in]
        torch.testing.assert_close(x.grad, towards @ whole, rtol=1e-5, atol=1e-6, msg=name)


def test_nothing_of_the_base_is_trained_and_checkpointing_is_possible(
    random_base: LoadedBase,
) -> None:
    assert not any(parameter.requires_grad for parameter in random_base.model.parameters())
    assert random_base.model.training


def test_a_base_with_dropout_of_its_own_computes_the_same_twice(
    copy_of: Callable[..., Path],
) -> None:
    """Resuming exactly is impossible where the base draws from torch's global generator."""
    folder = copy_of()
    edit_config(folder, attention_dropout=0.5)
    base = load(folder)
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.inference_mode():
        assert torch.equal(base.model(input_ids=ids).logits, base.model(input_ids=ids).logits)


def test_the_compute_dtype_of_the_processor_is_float32() -> None:
    assert default_compute_dtype(CPU) is torch.float32


# The description


def test_the_description_counts_names_and_measures(random_base: LoadedBase) -> None:
    description = random_base.description
    assert description.architecture == "LlamaForCausalLM"
    assert description.max_positions == 512
    assert not description.has_chat_template
    assert len(description.linear_modules) == 14
    shapes = {module.name: (module.d_out, module.d_in) for module in description.linear_modules}
    assert shapes["model.layers.0.self_attn.k_proj"] == (32, 64)
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 128)
    n_vocabulary = len(random_base.tokenizer)
    n_layer = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 2 * 64
    assert description.n_parameters == 2 * n_layer + 64 + 2 * n_vocabulary * 64
    assert parse(type(description), description.canonical()) == description


def test_biases_are_counted_and_fingerprinted(copy_of: Callable[..., Path]) -> None:
    found = []
    for value in (0.0, 1.0):
        folder = copy_of(f"bias-{value}")
        edit_config(folder, mlp_bias=True)

        def add(tensors: dict[str, torch.Tensor], value: float = value) -> None:
            for layer in (0, 1):
                for name, size in (("gate_proj", 128), ("up_proj", 128), ("down_proj", 64)):
                    bias = torch.full((size,), value, dtype=torch.bfloat16)
                    tensors[f"model.layers.{layer}.mlp.{name}.bias"] = bias

        edit_weights(folder, add)
        found.append(load(folder).description)
    assert found[0].base.fingerprint != found[1].base.fingerprint
    without = load(copy_of("plain")).description
    assert found[0].n_parameters == without.n_parameters + 2 * (128 + 128 + 64)


@pytest.mark.parametrize("form", ["path", "text", "relative", "with a slash"])
def test_a_path_of_the_machine_never_gets_into_the_description(
    copy_of: Callable[..., Path], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("my-model")
    source: str | Path = folder
    if form == "text":
        source = str(folder)
    elif form == "with a slash":
        source = f"{folder}/"
    elif form == "relative":
        monkeypatch.chdir(folder)
        source = "."
    description = load_base(source, device=CPU).description
    assert description.base.model == "my-model"
    for piece in folder.parent.parts[1:]:
        assert piece.encode() not in description.canonical()


def test_a_tilde_stands_for_the_owners_folder(
    copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(copy_of("my-model").parent))
    assert load_base("~/my-model", device=CPU).description.base.model == "my-model"


# Refusals


def drop(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return edit


def configure(**changes: object) -> Edit:
    return lambda folder: edit_config(folder, **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    return lambda folder: edit_weights(folder, lambda tensors: (change(tensors), None)[1])


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def only_pickle(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def own_code(folder: Path) -> None:
    (folder / "conf.py").write_text("raise SystemExit('code of the model ran')\n")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "conf.Own"})


def without_end(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        pytest.param(
            configure(model_type="t5"), "'t5', which is not a causal", id="encoder-decoder"
        ),
        pytest.param(
            configure(is_encoder_decoder=True), "not a causal language model", id="says-so"
        ),
        pytest.param(configure(model_type="vit"), "not a causal language model", id="vision"),
        pytest.param(configure(model_type="moonlight"), "`moonlight`", id="unknown-type"),
        pytest.param(
            configure(quantization_config={"quant_method": "gptq", "bits": 4}),
            r"already quantised \(gptq\)",
            id="gptq",
        ),
        pytest.param(
            configure(quantization_config={"load_in_8bit": True}), "already quantised", id="8bit"
        ),
        pytest.param(own_code, "custom code", id="own-code"),
        pytest.param(drop("config.json"), "cannot read the configuration", id="no-config"),
        pytest.param(drop("model.safetensors"), "model.safetensors", id="no-weights"),
        pytest.param(only_pickle, "model.safetensors", id="only-pickle"),
        pytest.param(truncate, "cannot load", id="truncated"),
        pytest.param(
            weights(lambda tensors: tensors.pop(Q_PROJ)), f"{Q_PROJ} is missing", id="missing"
        ),
        pytest.param(
            weights(lambda tensors: tensors.pop("model.norm.weight")),
            "model.norm.weight is missing",
            id="missing-norm",
        ),
        pytest.param(
            weights(lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:32].clone()})),
            f"{Q_PROJ} has another shape",
            id="other-shape",
        ),
        pytest.param(
            weights(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)),
            "not finite",
            id="not-finite",
        ),
        pytest.param(
            drop("tokenizer.json"), "cannot read the tokenizer|no tokenizer.json", id="slow"
        ),
        pytest.param(without_end, "no end-of-sequence token", id="no-eos"),
    ],
)
def test_what_cannot_work_is_refused_with_one_sentence(
    copy_of: Callable[..., Path], edit: Edit, says: str
) -> None:
    folder = copy_of()
    edit(folder)
    with pytest.raises(BaseModelError, match=says) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_an_encoder_that_poses_as_a_language_model_is_refused(
    copy_of: Callable[..., Path],
) -> None:
    from transformers import BertConfig, BertLMHeadModel

    folder = copy_of()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=320,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertLMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    with pytest.raises(BaseModelError, match="sees those after it"):
        load(folder)


@pytest.mark.parametrize(
    "source", [Path("nowhere"), "./nowhere", "/no/where", "~/nowhere", "a/b/c"]
)
def test_a_missing_folder_is_named_as_such(source: str | Path) -> None:
    with pytest.raises(BaseModelError, match="there is no folder"):
        load_base(source, device=CPU)


def test_a_model_that_the_hub_does_not_give_is_named() -> None:
    with pytest.raises(BaseModelError, match="cannot read the configuration of 'no-org/no-model'"):
        load_base("no-org/no-model", device=CPU)


def test_blocks_of_equal_content_are_the_same_base(random_base: LoadedBase) -> None:
    block = random_base.description.base
    check_same_base(block, BaseBlock(**block.model_dump()))


def test_the_fingerprint_covers_the_configuration_that_changes_the_numbers(
    random_base_dir: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    original = load_base(random_base_dir).description.base.fingerprint
    for key, value, same in (
        ("rms_norm_eps", 1e-3, False),
        ("hidden_act", "gelu", False),
        ("transformers_version", "0.0.1", True),
        ("use_cache", False, True),
    ):
        copy = tmp_path / key
        shutil.copytree(random_base_dir, copy)
        config = json.loads((copy / "config.json").read_text())
        config[key] = value
        (copy / "config.json").write_text(json.dumps(config))
        found = load_base(copy).description.base.fingerprint
        assert (found == original) is same, key


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "gpu", "", "meta", "9" * 99])
def test_a_device_that_is_not_there_is_named_with_those_that_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BaseModelError, match=r"there is no device .* here; there are cpu and no"):
        parse_device(name)
    assert parse_device("cpu") == CPU


def test_a_gpu_is_found_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse_device("cuda") == torch.device("cuda", 0)
    assert parse_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(BaseModelError, match="cuda:0, cuda:1"):
        parse_device("cuda:2")
