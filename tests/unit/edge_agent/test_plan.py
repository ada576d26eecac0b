"""`sheepfold-agent plan`: from a configuration alone, as typed."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_agent import cli
from edge_agent.errors import ConfigError
from edge_agent.plan import Plan, find_config, parse_memory, plan_model
from quant.errors import BaseModelError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "memory.md"
GB = 10**9

# As published with these models; what does not matter here is left out.
CONFIGS = {
    "Llama 3.2 1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "Llama 2 7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    "Llama 3.1 8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "Llama 2 13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
}

Type = Callable[..., tuple[int, str, str]]


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """A model's folder that holds its configuration and nothing else."""

    def make(name: str = "Llama 2 7B", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        config = {"model_type": "llama", **CONFIGS[name], **changes}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sheepfold-agent", "plan", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def make_plan(folder: Path, **changes: Any) -> Plan:
    values = {"gpu": "24GB", "length": 512, "rank": 8, "private": False}
    return plan_model(str(folder), **{**values, **changes})


def test_plan_shows_each_term_and_the_settings_that_fit(
    type_in: Type, make_folder: Callable[..., Path]
) -> None:
    code, out, _ = type_in(str(make_folder()), "--gpu", "24GB")
    assert code == 0
    for term in ("base in NF4", "adapter", "activations", "loss", "driver", "fragmentation"):
        assert term in out
    assert "6,738.4 million parameters" in " ".join(out.split())
    assert "█" in out
    assert "Fits: micro-batches of 2,048 tokens, no layer computed twice" in " ".join(out.split())


def test_plan_says_what_would_have_to_change(
    type_in: Type, make_folder: Callable[..., Path]
) -> None:
    code, out, _ = type_in(str(make_folder()), "--gpu", "6GB", "--length", "2048")
    assert code == 1
    said = " ".join(out.split())
    longest = make_plan(make_folder(), gpu="6GB", length=2048).longest
    assert longest is not None
    assert f"or --length {longest}, or a smaller base." in said
    assert "Does not fit: " in said
    code, out, _ = type_in(str(make_folder()), "--gpu", "6GB", "--length", str(longest))
    assert code == 0


def test_card_that_the_plan_asks_for_is_enough(make_folder: Callable[..., Path]) -> None:
    refused = make_plan(make_folder(), gpu="3GB")
    assert not refused.fits
    assert refused.longest is None
    needed = refused.as_json()["needed_gpu_bytes"]
    assert isinstance(needed, int)
    assert make_plan(make_folder(), gpu=f"{needed / GB}GB").fits
    assert not make_plan(make_folder(), gpu=f"{needed / GB - 0.1}GB").fits


def test_dp_shows_the_gradients_of_each_example(
    type_in: Type, make_folder: Callable[..., Path]
) -> None:
    code, out, _ = type_in(str(make_folder()), "--dp", "--rank", "16")
    assert code == 0
    assert "gradients by example (DP)" in out


def test_json_holds_terms_that_add_up(type_in: Type, make_folder: Callable[..., Path]) -> None:
    code, out, _ = type_in(str(make_folder()), "--json", "-")
    assert code == 0
    found = json.loads(out)
    assert found["fits"] is True
    assert found["n_adapter_parameters"] == 19_988_480
    terms = found["bytes"]
    total = terms.pop("total")
    passing = max(terms.pop("output_layer"), terms.pop("recomputed") + terms.pop("backward"))
    assert total == sum(terms.values()) + passing
    assert total <= found["usable_frac"] * found["gpu_bytes"]
    assert set(found["settings"]) == {
        "micro_tokens",
        "max_examples",
        "loss_chunk",
        "n_checkpointed_layers",
        "micro_cost_tokens",
    }


def test_json_file_goes_with_the_table(
    type_in: Type, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    _, out, _ = type_in(str(make_folder()), "--json", str(tmp_path / "plan.json"))
    assert "Fits" in out
    assert json.loads((tmp_path / "plan.json").read_text())["length"] == 512


def test_embedded_base_a_folder_and_a_file_are_found(make_folder: Callable[..., Path]) -> None:
    folder = make_folder()
    assert find_config(str(folder)) == folder / "config.json"
    assert find_config(str(folder / "config.json")) == folder / "config.json"
    assert find_config("embedded:tiny").is_file()
    with pytest.raises(BaseModelError, match="there is no folder or configuration"):
        find_config("./nowhere")


def test_of_a_hub_model_the_configuration_alone_is_fetched(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str, str, str | None]] = []

    def download(repo_id: str, filename: str, *, revision: str | None) -> str:
        asked.append((repo_id, filename, revision))
        return str(make_folder() / "config.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = plan_model(
        "owner/model", gpu="24GB", length=512, rank=8, private=False, revision="main"
    )
    assert found.model == "owner/model"
    assert asked == [("owner/model", "config.json", "main")]


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        msg = "no route\nto host"
        raise OSError(msg)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(BaseModelError, match=r"^the hub does not give .* 'owner/model': no route$"):
        find_config("owner/model")


def test_another_class_is_refused_in_one_sentence(
    type_in: Type, make_folder: Callable[..., Path]
) -> None:
    code, _, err = type_in(str(make_folder(model_type="mixtral")))
    assert code == 1
    assert "its type is 'mixtral'" in " ".join(err.split())


def test_length_beyond_the_models_positions_is_refused(make_folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="--length 5000 is more than the 4096 tokens"):
        make_plan(make_folder(), length=5000)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("24GB", 24 * GB), ("24", 24 * GB), ("11.5 gb", 11_500_000_000), ("8GiB", 8 * 2**30)],
)
def test_memory_is_read_as_typed(text: str, n_bytes: int) -> None:
    assert parse_memory(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "24TB", "-3GB", "0GB", "24 GB of it", "nan"])
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="looks like 24GB"):
        parse_memory(text)


# The page


def row(name: str, plan: Plan) -> str:
    found, settings = plan.choice.estimate, plan.choice.settings
    n_layers = plan.workload.shape.n_layers
    cells = [
        name,
        *(f"{n / GB:.2f}" for n in (found.weights, found.standing - found.weights)),
        *(f"{n / GB:.2f}" for n in (found.step, found.context + found.fragmentation)),
        f"**{found.total / GB:.1f}**",
        f"{settings.micro_tokens:,}",
        f"{settings.loss_chunk:,}",
        f"{settings.n_checkpointed_layers} of {n_layers}",
        f"{plan.longest:,}",
    ]
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("gpu", ["24GB", "12GB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tables_of_the_page_are_what_the_code_computes(
    make_folder: Callable[..., Path], name: str, gpu: str
) -> None:
    plan = make_plan(make_folder(name), gpu=gpu)
    assert plan.fits
    section = PAGE.read_text(encoding="utf-8").partition(f"<!-- {gpu} -->")[2].partition("<!--")[0]
    assert row(name, plan) in section


@pytest.mark.parametrize("text", ["9" * 400 + "GB", "100001GiB"])
def test_a_card_larger_than_any_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="looks like 24GB"):
        parse_memory(text)
