"""Where an adapter attaches."""

import pytest

from protocol.base_description import BaseDescription, LinearModule
from protocol.blocks import BaseBlock
from protocol.errors import ManifestError
from protocol.wire import parse

NAMES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.xq_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.mlp.gate.up",
    "model.layers.1.up",
    "q_proj",
)


@pytest.fixture
def base() -> BaseDescription:
    return BaseDescription(
        base=BaseBlock(
            model="m", source_dtype="float32", fingerprint=bytes(32), tokenizer_digest=bytes(32)
        ),
        architecture="LlamaForCausalLM",
        n_parameters=1,
        max_positions=512,
        has_chat_template=False,
        linear_modules=tuple(LinearModule(name=name, d_out=8, d_in=4) for name in NAMES),
    )


@pytest.mark.parametrize(
    ("targets", "hits"),
    [
        (("q_proj",), {0, 2, 5}),  # and not xq_proj
        (("up",), {3, 4}),
        (("gate.up",), {3}),
        (("q_proj", "up"), {0, 2, 3, 4, 5}),
        (("q_proj", "self_attn.q_proj"), {0, 2, 5}),
        ((NAMES[0],), {0}),
    ],
)
def test_a_target_stands_for_whole_last_parts_of_a_name(
    base: BaseDescription, targets: tuple[str, ...], hits: set[int]
) -> None:
    assert set(base.targets(targets)) == {NAMES[i] for i in hits}


@pytest.mark.parametrize("target", ["proj", "_proj", "Q_PROJ", "layers.0", "gate"])
def test_a_target_that_stands_for_nothing_is_refused_with_what_there_is(
    base: BaseDescription, target: str
) -> None:
    with pytest.raises(ManifestError, match=f"{target!r} is not in 'm'.*q_proj, up, xq_proj"):
        base.targets(("q_proj", target))


def test_a_description_round_trips(base: BaseDescription) -> None:
    assert parse(BaseDescription, base.canonical()) == base
