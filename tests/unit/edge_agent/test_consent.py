"""What `join` tells the owner."""

import pytest

from edge_agent.consent import disclose, hub_host
from edge_agent.plain_text import escaped, plain
from protocol.blocks import AggregationBlock, BaseBlock, Factor, LoraBlock, LoraRule, Weighting
from protocol.signing import format_fingerprint
from quant.tiny import EMBEDDED_NAME


def tell(manifest, **options):
    settings = {
        "server_host": "example.org:8443",
        "base_folder": None,
        "round_n_bytes": 4_200_000,
        **options,
    }
    return disclose(manifest, **settings)


def test_what_leaves_is_named(make_manifest) -> None:
    text = "\n".join(tell(make_manifest()).what_leaves)
    for piece in (
        "factors A and B of a LoRA adapter of rank 4",
        "public key and signatures",
        "network address",
        "number of your examples (at most 10000 is said)",
        "one of four codes",
        "Never: your records",
    ):
        assert piece in text


def test_what_does_not_leave_is_not_named(make_manifest) -> None:
    manifest = make_manifest(
        lora=LoraBlock(
            rank=8, alpha=1.0, target_modules=("q_proj",), sent=(Factor.B,), init_seed=1
        ),
        aggregation=AggregationBlock(weighting=Weighting.UNIFORM),
    )
    text = "\n".join(tell(manifest).what_leaves)
    assert "the factors B of" in text
    assert "number of your examples" not in text


def test_factors_that_take_turns_are_told(make_manifest) -> None:
    lora = LoraBlock(
        rank=8, alpha=1.0, target_modules=("q_proj",), rule=LoraRule.ROLORA, init_seed=1
    )
    text = "\n".join(tell(make_manifest(lora=lora)).what_leaves)
    assert "the factors B or A, which take turns, of a LoRA adapter of rank 8" in text


def test_the_size_of_an_update_is_told(make_manifest) -> None:
    assert "an adapter update of 4.20 MB" in tell(make_manifest()).what_leaves[0]


def test_the_server_and_the_hub_are_named(make_manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    hosts = tell(make_manifest()).hosts
    assert hosts == (
        "example.org:8443",
        "huggingface.co (to download the base model synthetic/tiny)",
    )
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example:1234/x")
    assert hub_host() == "mirror.example:1234"
    assert tell(make_manifest()).hosts[1].startswith("mirror.example:1234 ")


def test_a_base_that_is_there_already_contacts_nobody(make_manifest) -> None:
    assert tell(make_manifest(), base_folder="/models/x").hosts == ("example.org:8443",)
    base = make_manifest().base
    embedded = make_manifest(base=BaseBlock(**{**dict(base), "model": EMBEDDED_NAME}))
    assert tell(embedded).hosts == ("example.org:8443",)
    with_data = tell(embedded, data_from_hub=True).hosts
    assert len(with_data) == 2
    assert "data set" in with_data[1]


def test_what_is_not_promised_is_said(make_manifest, server_key, agent_key) -> None:
    warnings = tell(make_manifest()).warnings
    text = "\n".join(warnings)
    assert "ε = ∞" in text
    assert "Masking is off" in text
    assert "decides who is a member" in text
    assert format_fingerprint(server_key.identity) in text
    apart = make_manifest(registrar=agent_key.identity, registrar_held_by_server=False)
    assert "decides who is a member" not in "\n".join(tell(apart).warnings)


# The owner's terminal


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("Notes of Zoë 🐑 “1”", "Notes of Zoë 🐑 “1”"),
        ("a\x1b[2J\x1b[Hb", "a [2J [Hb"),
        ("a\nWhat is not promised\n• nothing", "a What is not promised • nothing"),
        ("a\r\tb\x00\x7f\x9b", "a  b   "),
        ("abc\u202edcb", "abc dcb"),
        ("a\u2028b", "a b"),
    ],
)
def test_text_of_others_cannot_steer_the_terminal(given: str, shown: str) -> None:
    assert plain(given) == shown


@pytest.mark.parametrize(
    "text",
    ["[bold red]x[/]", "[/]", r"\[bold]", "[1, 2]", "['a']", "[link=http://x]y[/link]"],
)
def test_brackets_are_shown_as_they_stand(text: str) -> None:
    from rich.text import Text

    assert Text.from_markup(f"[bold]{escaped(text)} end[/]").plain == f"{text} end"
