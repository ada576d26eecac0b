"""Manifests: what is accepted, and how the rest is refused."""

import copy
import json
from collections.abc import Callable

import pytest
from pydantic import BaseModel, ValidationError

from protocol.chain import Release, RoundManifest
from protocol.errors import ManifestError
from protocol.guarantee import describe_privacy, privacy_json
from protocol.manifest import FederationManifest
from protocol.privacy import ExamplePrivacy
from protocol.signing import Signer
from protocol.wire import b64u_encode, domain_hash, parse

MakeManifest = Callable[..., FederationManifest]


def altered(document: BaseModel, path: str, value: object) -> bytes:
    """The document's JSON with one value exchanged; a value of `...` removes the key."""
    whole = copy.deepcopy(document.as_json())  # type: ignore[attr-defined]
    for kind in (
        "masking.off.",
        "privacy.P0.",
        "gate.none.",
    ):  # as messages name it, and the data does not
        path = path.replace(kind, kind.split(".")[0] + ".")
    *parents, last = path.split(".")
    where = whole
    for key in parents:
        where = where[key]
    if value is ...:
        del where[last]
    else:
        where[last] = value
    return json.dumps(whole).encode()


def refusal(kind: type[BaseModel], data: bytes) -> str:
    with pytest.raises(ManifestError) as caught:
        parse(kind, data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_document_round_trips(
    make_manifest: MakeManifest,
    make_round: Callable[..., RoundManifest],
    make_release: Callable[..., Release],
) -> None:
    first = make_release()
    for document in (make_manifest(), make_round(), first, make_release(after=first)):
        again = parse(type(document), document.canonical())
        assert again == document
        assert again.digest() == document.digest()
        assert again.canonical() == document.canonical()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("version", 2),
        ("base.version", 2),
        ("lora.version", 2),
        ("training.version", 2),
        ("masking.off.version", 2),
        ("privacy.P0.version", 2),
        ("aggregation.version", 2),
        ("filter.version", 2),
        ("gate.none.version", 2),
        ("rounds.version", 2),
        ("change_limits.version", 2),
        ("masking.mode", "mixnet"),
        ("privacy.profile", "P9"),
        ("privacy.profile", None),
        ("aggregation.rule", "krum"),
        ("filter.rule", "median"),
        ("gate.rule", "oracle"),
        ("base.quantization", "int8"),
        ("base.source_dtype", "int8"),
        ("training.template", "own"),
        ("training.schedule", "cyclic"),
        ("training.loss_on", "prompt"),
        ("aggregation.weighting", "by-trust"),
        ("lora.sent.0", "C"),
    ],
)
def test_an_unknown_version_mode_rule_or_profile_is_refused_by_its_name(
    make_manifest: MakeManifest, path: str, value: object
) -> None:
    if path == "lora.sent.0":
        data = altered(make_manifest(), "lora.sent", [value, "B"])
    else:
        data = altered(make_manifest(), path, value)
    message = refusal(FederationManifest, data)
    assert f": {path}: " in message
    assert repr(value) in message


@pytest.mark.parametrize(
    "path",
    ["code", "base.code", "lora.code", "training.dp_noise", "masking.off.threshold", "rounds.x"],
)
def test_an_unknown_key_is_refused_by_its_name(make_manifest: MakeManifest, path: str) -> None:
    message = refusal(FederationManifest, altered(make_manifest(), path, 1))
    assert f": {path}: " in message


@pytest.mark.parametrize(
    "path", ["federation", "server", "base", "base.fingerprint", "lora.init_seed", "rounds"]
)
def test_a_missing_key_is_refused_by_its_name(make_manifest: MakeManifest, path: str) -> None:
    message = refusal(FederationManifest, altered(make_manifest(), path, ...))
    assert f": {path}: Field required" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", ""),
        ("name", "x" * 201),
        ("description", "x" * 2_001),
        ("created_at", -1.0),
        ("created_at", 1e15),
        ("federation", b64u_encode(bytes(15))),
        ("server", b64u_encode(bytes(31))),
        ("lora.rank", 0),
        ("lora.rank", 1025),
        ("lora.rank", 8.5),
        ("lora.alpha", 0.0),
        ("lora.dropout", 1.0),
        ("lora.target_modules", []),
        ("lora.target_modules", ["q_proj\n"]),
        ("lora.target_modules", ["q proj"]),
        ("lora.target_modules", ["../x"]),
        ("lora.target_modules", [".*"]),
        ("lora.target_modules", ["q_proj"] * 2),
        ("lora.target_modules", [f"m{i}" for i in range(65)]),
        ("lora.sent", []),
        ("lora.sent", ["A"]),
        ("lora.sent", ["B", "A"]),
        ("lora.sent", ["B", "B"]),
        ("lora.init_seed", -1),
        ("lora.init_seed", 2**53),
        ("lora.min_rank", 0),
        ("lora.min_rank", 8),
        ("lora.min_rank", 9),
        ("lora.optional_modules", ["o_proj"]),
        ("lora.optional_modules", ["q_proj", "q_proj"]),
        ("lora.optional_modules", ["q_proj", "v_proj"]),
        ("training.max_length", 15),
        ("training.batch_size", 0),
        ("training.local_steps", 0),
        ("training.local_steps", 2**53),
        ("training.learning_rate", 0.0),
        ("training.learning_rate", 1.1),
        ("training.beta1", 1.0),
        ("training.eps", 0.0),
        ("training.final_frac", 1.5),
        ("training.max_grad_norm", 0.0),
        ("aggregation.max_weight", 0),
        ("aggregation.max_weight", 1_000_001),
        ("rounds.n_rounds", 0),
        ("rounds.over_selection", 0.5),
        ("rounds.deadline_s", 0.0),
        ("rounds.min_upload_bytes_per_s", 0.0),
        ("change_limits.max_tensor_change_norm", 0.0),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(
    make_manifest: MakeManifest, path: str, value: object
) -> None:
    message = refusal(FederationManifest, altered(make_manifest(), path, value))
    block, _, field = path.rpartition(".")
    assert f": {path}" in message or (f": {block}: " in message and field in message)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("training.local_epochs", 2, "exactly one of local_steps and local_epochs"),
        ("training.local_steps", None, "exactly one of local_steps and local_epochs"),
        ("rounds.min_cohort", 3, "min_cohort 3 is above cohort_target 2"),
        ("rounds.cap_s", 3600.0, "cap_s 3600.0 is before deadline_s"),
        ("registrar_held_by_server", False, "registrar is the server's own key"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    make_manifest: MakeManifest, path: str, value: object, says: str
) -> None:
    assert says in refusal(FederationManifest, altered(make_manifest(), path, value))


def test_a_separate_registrar_may_say_so(make_manifest: MakeManifest, agent_key: Signer) -> None:
    manifest = make_manifest(registrar=agent_key.identity, registrar_held_by_server=False)
    assert parse(FederationManifest, manifest.canonical()) == manifest


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("deadline_at", 1.0, "out of order"),
        ("cap_at", 1.0, "out of order"),
        ("opened_at", 1.9e9, "out of order"),
        ("schedule_start", 0.75, "schedule_start is after schedule_end"),
        ("schedule_end", 1.5, "schedule_end"),
        ("round", 0, "round"),
        ("round", 2**31, "round"),
        ("update_n_bytes", 0, "update_n_bytes"),
        ("update_n_bytes", 2**31 + 4, "update_n_bytes"),
        ("release", -1, "release"),
        ("version", 2, "version"),
        ("code", "x", "code"),
    ],
)
def test_a_round_that_contradicts_itself_is_refused(
    make_round: Callable[..., RoundManifest], path: str, value: object, says: str
) -> None:
    assert says in refusal(RoundManifest, altered(make_round(), path, value))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("previous", b64u_encode(bytes(32)), "exactly release 0 has no predecessor"),
        ("round_digest", b64u_encode(bytes(32)), "release 0 comes from no round"),
        ("number", 1, "exactly release 0 has no predecessor"),
        ("verdict.rule", "oracle", "verdict"),
        ("verdict.accepted", False, "verdict.none.accepted"),
        ("rolled_back_to", 0, "rolled_back_to is 0: it must be below 0"),
        ("filter.rule", "norm", "filter.rule"),
        ("aggregation.rule", "median", "aggregation.rule"),
        ("aggregation.update_norm", -1.0, "aggregation.none.update_norm"),
        ("adapter.n_bytes", 2**31 + 1, "adapter.n_bytes"),
        ("adapter.url", "http://x", "adapter.url"),
        ("version", 2, "version"),
    ],
)
def test_a_release_that_contradicts_itself_is_refused(
    make_release: Callable[..., Release], path: str, value: object, says: str
) -> None:
    assert says in refusal(Release, altered(make_release(), path, value))


def test_every_field_is_in_the_digest(
    make_manifest: MakeManifest,
    make_round: Callable[..., RoundManifest],
    make_release: Callable[..., Release],
) -> None:
    """A field that were left out could be changed under a valid signature."""
    first = make_release()
    last = make_release(after=first, control=first.sent)
    for document in (make_manifest(), make_round(), last):
        hashed = document.as_json()
        assert set(hashed) == set(type(document).model_fields)
        name = {FederationManifest: "federation", RoundManifest: "round", Release: "release"}
        assert document.digest() == domain_hash(name[type(document)], hashed)
        for field in hashed:
            changed = {**hashed, field: "changed"}
            assert domain_hash(name[type(document)], changed) != document.digest()


def test_two_kinds_of_documents_never_share_a_digest(
    make_manifest: MakeManifest, make_release: Callable[..., Release]
) -> None:
    release, manifest = make_release(), make_manifest()
    assert len({release.digest(), manifest.digest()}) == 2


NOISE = {"version": 1, "profile": "P1", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}


def with_noise(manifest: FederationManifest, **changes: object) -> dict[str, object]:
    data = copy.deepcopy(manifest.as_json())
    data["privacy"] = {**NOISE, **changes}
    data["aggregation"]["weighting"] = "uniform"
    data["lora"]["dropout"] = 0.0
    data["training"] |= {"local_steps": 10, "local_epochs": None}
    return data


def test_a_manifest_with_noise_is_read_and_described(make_manifest: MakeManifest) -> None:
    found = parse(FederationManifest, json.dumps(with_noise(make_manifest())).encode())
    assert found.privacy == ExamplePrivacy(epsilon=8.0, delta=1e-5, clip_norm=1.0)
    told = privacy_json(found)
    wanted = {"epsilon", "delta", "unit", "neighbouring", "adversary", "sampling"}
    assert wanted | {"noise_multiplier", "rounds", "accountant"} <= told.keys()
    assert privacy_json(make_manifest()) == {"profile": "P0", "epsilon": None}


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("aggregation", "weighting", "n_examples", "weighting must be"),
        ("lora", "dropout", 0.05, "dropout must be 0"),
        ("training", "local_steps", None, "local_steps must be set"),
    ],
)
def test_what_tells_of_the_data_beside_the_noise_is_refused(
    make_manifest: MakeManifest, section: str, key: str, value: object, said: str
) -> None:
    data = with_noise(make_manifest())
    data[section][key] = value
    if value is None:
        data[section]["local_epochs"] = 1
    assert said in refusal(FederationManifest, json.dumps(data).encode())


@pytest.mark.parametrize(
    ("key", "value"),
    [("epsilon", 0), ("epsilon", 1e6), ("delta", 0), ("delta", 0.5), ("clip_norm", -1.0)],
)
def test_a_bound_that_means_nothing_is_refused(
    make_manifest: MakeManifest, key: str, value: float
) -> None:
    data = with_noise(make_manifest(), **{key: value})
    assert key in refusal(FederationManifest, json.dumps(data).encode())


AGENTS = {
    "version": 1,
    "profile": "P2",
    "epsilon": 8.0,
    "delta": 1e-5,
    "clip_norm": 0.5,
    "steps_per_clip": 65536,
    "share_variance": 1e9,
}
CENTRAL = {
    "version": 1,
    "profile": "P3",
    "epsilon": 8.0,
    "delta": 1e-5,
    "clip_norm": 0.5,
    "noise_multiplier": 1.9,
    "adaptive": None,
}
CELLS = {"mode": "cells", "word_bits": 32, "max_change": 0.5, "clip_norm": 0.5}


def with_agents_noise(
    manifest: FederationManifest, privacy: dict[str, object], masking: dict[str, object] | None
) -> dict[str, object]:
    data = copy.deepcopy(manifest.as_json())
    data |= {"privacy": privacy}
    if masking is not None:
        data["masking"] = masking
    data["aggregation"]["weighting"] = "uniform"
    data["rounds"] |= {"cohort_target": 10, "min_cohort": 10, "over_selection": 1.3}
    return data


def read(data: dict[str, object]) -> FederationManifest:
    return parse(FederationManifest, json.dumps(data).encode())


@pytest.mark.parametrize(
    ("privacy", "masking", "said"),
    [
        (AGENTS, CELLS, ("P2: ε ≤ 8 at δ = 1e-05 for each agent", "within what masking promises")),
        (CENTRAL, None, ("P3: ε ≤ 8 at δ = 1e-05 for each agent", "not the server", "1.9")),
        (CENTRAL, CELLS, ("public only",)),
        (CENTRAL | {"adaptive": {"count_std": 4.0}}, None, ("adaptive",)),
    ],
)
def test_noise_of_agents_is_read_and_described(
    make_manifest: MakeManifest, privacy, masking, said: tuple[str, ...]
) -> None:
    found = read(with_agents_noise(make_manifest(), privacy, masking))
    text = describe_privacy(found.privacy, n_rounds=found.rounds.n_rounds)
    for part in (*said, "PLD", "no sampling", "clip norm 0.5"):
        assert part in text
    told = privacy_json(found)
    wanted = {"epsilon", "delta", "unit", "neighbouring", "adversary", "sampling", "accountant"}
    assert wanted <= told.keys()
    assert told["unit"] == "agent"


@pytest.mark.parametrize(
    ("privacy", "masking", "changes", "said"),
    [
        (AGENTS, CELLS, {"aggregation.weighting": "n_examples"}, "weighting must be"),
        (CENTRAL, None, {"aggregation.weighting": "n_examples"}, "weighting must be"),
        (AGENTS, None, {}, 'masking.mode must be "cells"'),
        (AGENTS, CELLS | {"word_bits": 16}, {}, "word_bits must be 32"),
        (AGENTS, CELLS | {"max_change": 0.1}, {}, "max_change must equal privacy.clip_norm"),
        (AGENTS, CELLS | {"clip_norm": 0.6}, {}, "masking.clip_norm must equal privacy.clip_norm"),
        (CENTRAL, CELLS | {"clip_norm": 0.6}, {}, "clip_norm must equal privacy.clip_norm"),
        (AGENTS, CELLS, {"rounds.over_selection": 2.0}, "cell_target must be above 10"),
        (CENTRAL | {"adaptive": {"count_std": 4.0}}, CELLS, {}, 'needs masking.mode = "off"'),
        (CENTRAL | {"adaptive": {"count_std": 0.9}}, None, {}, "would spend it all"),
    ],
)
def test_blocks_that_break_the_noise_of_agents_are_refused(
    make_manifest: MakeManifest, privacy, masking, changes, said: str
) -> None:
    data = with_agents_noise(make_manifest(), privacy, masking)
    for path, value in changes.items():
        section, key = path.split(".")
        data[section][key] = value
    assert said in refusal(FederationManifest, json.dumps(data).encode())


def test_ranks_and_modules_of_ones_own_are_read(make_manifest: MakeManifest) -> None:
    plain = make_manifest()
    assert not plain.lora.is_mixed
    assert not {"min_rank", "optional_modules"} & plain.as_json()["lora"].keys()
    for changes in ({"min_rank": 2}, {"optional_modules": ["v_proj"]}):
        data = copy.deepcopy(plain.as_json())
        data["lora"] |= changes
        found = read(data)
        assert found.lora.is_mixed
        assert found.digest() != plain.digest()
        assert read(found.as_json()) == found


def test_scaffold_is_read_and_refused_where_single_updates_are_not_seen(
    make_manifest: MakeManifest,
) -> None:
    plain = make_manifest()
    assert "scaffold" not in plain.as_json()["training"]
    data = copy.deepcopy(plain.as_json())
    data["training"]["scaffold"] = True
    assert read(data).training.scaffold
    weighs_alike = {"aggregation": {**data["aggregation"], "weighting": "uniform"}}
    private = {"version": 1, "profile": "P1", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
    for changes in (
        {"masking": CELLS, "rounds": {**data["rounds"], "cohort_target": 9, "min_cohort": 9}},
        {"privacy": private},
        {"privacy": CENTRAL},
        {"lora": {**data["lora"], "min_rank": 2}},
    ):
        message = refusal(
            FederationManifest, json.dumps({**data, **weighs_alike, **changes}).encode()
        )
        wanted = 'training.scaffold is true, so masking.mode must be "off", privacy.profile "P0"'
        assert wanted in message


@pytest.mark.parametrize(("privacy", "masking"), [(AGENTS, CELLS), (CENTRAL, None)])
def test_noise_on_updates_does_not_go_with_ranks_of_ones_own(
    make_manifest: MakeManifest, privacy, masking
) -> None:
    data = with_agents_noise(make_manifest(), privacy, masking)
    data["lora"] |= {"min_rank": 2}  # type: ignore[operator]
    message = refusal(FederationManifest, json.dumps(data).encode())
    assert f"privacy.profile is {privacy['profile']}, so lora.min_rank" in message
    assert "noise of its own" in message


@pytest.mark.parametrize(("back", "from_round"), [(1, False), (2, False), (0, True), (1, True)])
def test_a_release_goes_back_to_an_earlier_one_and_then_comes_from_no_round(
    make_release: Callable[..., Release], back: int, from_round: bool
) -> None:
    """Or an agent that looks for the parts of an older adapter would look in a circle."""
    first = make_release()
    digest = {"round_digest": bytes([4]) * 32 if from_round else None}
    make_release(after=first, round_digest=None, rolled_back_to=0)
    with pytest.raises(ValidationError, match="it must be below 1"):
        make_release(after=first, rolled_back_to=back, **digest)
