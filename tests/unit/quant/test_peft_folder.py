"""Finished adapters as their folders hold them: ours, and anyone's that is plain LoRA."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from quant import peft_folder
from quant.adapter import CONFIG_NAME, WEIGHTS_NAME, read_folder
from quant.base_model import LoadedBase, load_base
from quant.errors import AdapterError
from quant.model_card import PROVENANCE_NAME
from quant.peft_folder import attach, check_fits, read_finished

IDS = torch.arange(3, 40).reshape(1, -1)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def test_a_published_adapter_is_read_with_its_provenance(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path
) -> None:
    folder = make_adapter_folder(tmp_path / "a", random_base.description)
    adapter = read_finished(folder)
    assert adapter.provenance is not None
    assert adapter.provenance.release == 1
    assert adapter.provenance.base == random_base.description.base
    assert adapter.base_model == random_base.description.base.model
    assert (adapter.lora.rank, adapter.scale) == (4, 2.0)
    for name, array in read_folder(folder).items():
        np.testing.assert_array_equal(adapter.arrays[name], array)
    assert set(adapter.pairs()) == {
        module.name
        for module in random_base.description.linear_modules
        if module.name.endswith(("q_proj", "k_proj", "v_proj", "down_proj"))
    }


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_is_read_is_plain_lora_as_stock_peft_computes_it(
    random_base_dir: Path, make_adapter_folder, tmp_path: Path, stabilised: bool, dtype
) -> None:
    from peft import PeftModel

    base = load_base(random_base_dir, device=torch.device("cpu"))
    folder = make_adapter_folder(
        tmp_path / "a", base.description, foreign=True, config={"use_rslora": stabilised}
    )
    path = folder / WEIGHTS_NAME
    stored = {name: tensor.to(dtype) for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(stored, path)
    ours = attach(base, read_finished(folder))
    assert not ours.model.training
    stock = PeftModel.from_pretrained(
        load_base(random_base_dir, device=torch.device("cpu")).model, folder
    )
    wanted = logits(stock)
    torch.testing.assert_close(logits(ours.model), wanted, rtol=1e-4, atol=1e-4)
    with ours.disabled():
        assert float((logits(ours.model) - wanted).abs().max()) > 0.01  # the adapter does something


def test_a_missing_folder_and_one_without_adapter_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter folder: there is no such folder"):
        read_finished(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"no adapter folder: it has no adapter_config\.json"):
        read_finished(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "describes no adapter"),
        ('{"peft_type": "IA3"}', "describes IA3"),
        ('{"peft_type": "LORA"}', r"no rank and alpha: 'r'"),
        ('{"peft_type": "LORA", "r": 0, "lora_alpha": 8}', "rank"),
        ('{"peft_type": "LORA", "r": 1e400, "lora_alpha": 8}', "gives no rank and alpha"),
        ("[" * 100_000, "is not JSON"),
    ],
    ids=["no-json", "no-object", "another-method", "no-rank", "rank-0", "infinite", "nested"],
)
def test_bad_configurations_are_refused(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path, config: str, says: str
) -> None:
    folder = make_adapter_folder(tmp_path / "a", random_base.description)
    (folder / CONFIG_NAME).write_text(config)
    with pytest.raises(AdapterError, match=says):
        read_finished(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 1]]),
        ("layers_to_transform", [0]),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path, key: str, value: object
) -> None:
    folder = make_adapter_folder(tmp_path / "a", random_base.description, config={key: value})
    with pytest.raises(AdapterError, match=f"more than plain LoRA: {key} is"):
        read_finished(folder)


def test_weights_in_a_pickle_are_never_read(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path
) -> None:
    folder = make_adapter_folder(tmp_path / "a", random_base.description)
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="from safetensors only"):
        read_finished(folder)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.full((4, 64), float("nan")), "not finite"),
        (torch.zeros(4, 64, dtype=torch.int8), "not a factor's matrix"),
        (torch.zeros(64), "not a factor's matrix"),
    ],
    ids=["nan", "integers", "vector"],
)
def test_bad_tensors_are_refused(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path, tensor, says: str
) -> None:
    folder = make_adapter_folder(tmp_path / "a", random_base.description, foreign=True)
    path = folder / WEIGHTS_NAME
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, next(iter(tensors)): tensor}, path)
    with pytest.raises(AdapterError, match=says):
        read_finished(folder)


def test_weights_that_changed_since_they_were_published_are_refused(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path
) -> None:
    folder = make_adapter_folder(tmp_path / "a", random_base.description)
    path = folder / WEIGHTS_NAME
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: tensor * 2 for name, tensor in tensors.items()}, path)
    with pytest.raises(AdapterError, match=r"not what sheepfold\.json beside it describes"):
        read_finished(folder)
    (folder / PROVENANCE_NAME).unlink()
    assert read_finished(folder).provenance is None


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 800.0}, {"r": 8}, {"target_modules": ["proj"]}], ids=str
)
def test_a_configuration_that_changed_since_it_was_published_is_refused(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = make_adapter_folder(tmp_path / "a", random_base.description, config=changes)
    with pytest.raises(AdapterError, match=r"another rank, alpha or|does not target"):
        read_finished(folder)


@pytest.mark.parametrize("key", ["revision", "base_model_name_or_path"])
def test_a_name_that_is_no_text_is_refused(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path, key: str
) -> None:
    folder = make_adapter_folder(
        tmp_path / "a", random_base.description, foreign=True, config={key: {"a": 1}}
    )
    with pytest.raises(AdapterError, match=f"for '{key}', which must be a text"):
        read_finished(folder)


def test_tensors_that_stock_peft_would_leave_out_are_refused(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path
) -> None:
    folder = make_adapter_folder(
        tmp_path / "a",
        random_base.description,
        foreign=True,
        config={"target_modules": ["q_proj", "k_proj", "v_proj", "elsewhere"]},
    )
    with pytest.raises(AdapterError, match=r"down_proj', which adapter_config\.json does not"):
        read_finished(folder)


@pytest.mark.parametrize("foreign", [False, True], ids=["published", "foreign"])
def test_an_adapter_of_some_layers_only_is_read_as_such(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path, foreign: bool
) -> None:
    folder = make_adapter_folder(
        tmp_path / "a",
        random_base.description,
        foreign=foreign,
        target_modules=("layers.1.self_attn.q_proj", "v_proj"),
    )
    adapter = read_finished(folder)
    check_fits(adapter, random_base.description)
    assert adapter.lora.target_modules == ("layers.1.self_attn.q_proj", "v_proj")


@pytest.mark.parametrize("limit", [64, 3], ids=["few-layers", "more-than-a-manifest-holds"])
def test_an_adapter_that_lists_every_layer_in_full_is_read(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path, monkeypatch, limit: int
) -> None:
    monkeypatch.setattr(peft_folder, "MAX_TARGET_MODULES", limit)
    listed = [module.name for module in random_base.description.linear_modules]
    folder = make_adapter_folder(
        tmp_path / "a", random_base.description, foreign=True, config={"target_modules": listed}
    )
    adapter = read_finished(folder)
    check_fits(adapter, random_base.description)
    assert len(adapter.lora.target_modules) == (8 if limit == 64 else 4)


def test_an_adapter_for_another_base_is_refused(
    random_base: LoadedBase, make_adapter_folder, tmp_path: Path
) -> None:
    description = random_base.description
    wider = description.model_copy(
        update={
            "linear_modules": tuple(
                module.model_copy(update={"d_in": module.d_in * 2})
                for module in description.linear_modules
            )
        }
    )
    folder = make_adapter_folder(tmp_path / "wide", wider, foreign=True)
    with pytest.raises(AdapterError, match=r"another base than .*\(4, 256\).*--base"):
        attach(random_base, read_finished(folder))
    deeper = description.model_copy(
        update={
            "linear_modules": tuple(
                module.model_copy(update={"name": module.name.replace("layers.1", "layers.7")})
                for module in description.linear_modules
            )
        }
    )
    folder = make_adapter_folder(tmp_path / "deep", deeper, foreign=True)
    with pytest.raises(AdapterError, match="no such"):
        check_fits(read_finished(folder), description)
    folder = make_adapter_folder(tmp_path / "own", description)
    tensors = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    renamed = {name.replace("q_proj", "c_attn"): tensor for name, tensor in tensors.items()}
    shutil.copytree(folder, tmp_path / "names")
    (tmp_path / "names" / PROVENANCE_NAME).unlink()
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["target_modules"] = ["c_attn", "k_proj", "v_proj", "down_proj"]
    (tmp_path / "names" / CONFIG_NAME).write_text(json.dumps(config))
    safetensors.torch.save_file(renamed, tmp_path / "names" / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match=r"another base.*c_attn"):
        check_fits(read_finished(tmp_path / "names"), description)
    check_fits(read_finished(folder), description)
    assert json.loads((folder / CONFIG_NAME).read_text())["r"] == 4
