"""Settings: one file, the environment, flags; errors that help."""

import dataclasses
import json

import pytest
from pydantic import SecretStr

from aggregator_server.aggregation.optimizers import optimizer_of
from aggregator_server.config import (
    Enrolment,
    LogFormat,
    Retention,
    ServerConfig,
    parse_config,
    secret_settings,
    without_password,
)
from aggregator_server.errors import ConfigError
from aggregator_server.founding import build_manifest, check_recipe
from aggregator_server.private_recipes import PrivacyOptions, Profile
from aggregator_server.recipes import (
    OPTIMIZERS,
    Masking,
    Optimizer,
    RecipeOptions,
    make_config,
)
from aggregator_server.template import _EXPLAINED, render
from privacy.accounting import SampledGaussian, spent
from privacy.errors import AccountingError, PrivacyError
from protocol.blocks import (
    SENT,
    CellMasking,
    EvaluatorGate,
    FilterRule,
    HelperMasking,
    LoraRule,
    NoMasking,
    Weighting,
)
from protocol.privacy import AgentPrivacy, CentralPrivacy, ExamplePrivacy
from protocol.signing import Signer

OPTIONS = RecipeOptions(name="Test")


@pytest.fixture
def config(base) -> ServerConfig:
    return make_config(OPTIONS, base)


def parse_text(text, *, environment=None, flags=None) -> ServerConfig:
    return parse_config(text, source="x.toml", environment=environment or {}, flags=flags or {})


def test_the_written_file_parses_to_the_same_values(config):
    assert parse_text(render(config)) == config


def test_the_written_file_keeps_every_kind_of_value(base):
    options = dataclasses.replace(
        OPTIONS,
        name='Zoë\'s "quoted" \\ name \x7f\ttab',
        description="two\nlines — ünïcode 🐑",
        local_steps=7,
        lora_rule=LoraRule.FFA_LORA,
        learning_rate=3e-5,
    )
    config = make_config(options, base)
    server = config.server.model_copy(
        update={
            "retention": Retention.KEEP,
            "log_format": LogFormat.JSON,
            "behind_proxy": True,
            "database_url": SecretStr("postgresql://u@host:5432/db?sslmode=require"),
            "blobs_url": SecretStr("s3://bucket/name"),
            "presence_s": 41.5,
        }
    )
    training = config.training.model_copy(update={"max_grad_norm": None})
    config = config.model_copy(update={"server": server, "training": training})
    assert parse_text(render(config)) == config


@pytest.mark.parametrize(
    ("url", "written"),
    [
        ("postgresql://u:p%40ss@host/db", "postgresql://u@host/db"),
        ("postgresql://u:p/a:ss@host:5432/db", "postgresql://u@host:5432/db"),
        ("postgresql://:secret@/db", "postgresql://@/db"),
        ("postgresql://host/db?user=u&password=secret", "postgresql://host/db?user=u"),
        ("postgresql://host/db?PassWord=secret&user=u", "postgresql://host/db?user=u"),
        ("postgresql://h/db?sslpassword=x&sslmode=require", "postgresql://h/db?sslmode=require"),
        ("ftp://u:secret@host/folder", "ftp://u@host/folder"),
    ],
)
def test_no_password_in_a_url_is_written(config, url, written):
    for key in ("database_url", "blobs_url"):
        server = config.server.model_copy(update={key: SecretStr(url)})
        text = render(config.model_copy(update={"server": server}))
        again = getattr(parse_text(text).server, key)
        assert again.get_secret_value() == written
        assert secret_settings(server) == [f"SHEEPFOLD_SERVER_{key.upper()}"]
        assert secret_settings(parse_text(text).server) == []


@pytest.mark.parametrize(
    "url", ["sqlite:////abs/x.db", "postgresql://u@h:1/db?a=b", "s3://b/n", "/folder", "a:b@c"]
)
def test_a_url_without_a_password_is_written_as_it_is(url):
    assert without_password(url) == url


@pytest.mark.parametrize("url", ["fed.example.org", "http://", "https://a b", "https://a\n--yes"])
def test_a_public_url_is_one(config, url):
    text = render(config).replace('public_url = ""', f"public_url = {json.dumps(url)}")
    with pytest.raises(ConfigError, match="public_url"):
        parse_text(text)


@pytest.mark.parametrize("rule", LoraRule)
def test_what_is_sent_follows_from_the_rule_and_an_older_file_still_says_it(config, rule):
    lora = config.lora.model_copy(update={"rule": rule, "sent": SENT[rule]})
    text = render(config.model_copy(update={"lora": lora}))
    assert "\nsent" not in text
    assert parse_text(text).lora == lora
    older = text.replace(f'rule = "{rule.value}"', f"sent = {json.dumps(SENT[rule])}", 1)
    usual = LoraRule.FFA_LORA if rule is LoraRule.FFA_LORA else LoraRule.FEDIT
    if SENT[rule] == SENT[usual]:
        assert parse_text(older).lora.rule is usual


def test_every_setting_is_explained(config):
    for section, model in ((name, getattr(config, name)) for name in ServerConfig.model_fields):
        fields = set(type(model).model_fields) - {"version"}
        if section == "lora":
            fields -= {"sent"}  # which follows from the rule
        if section == "masking":  # whose modes have settings of their own
            modes = (NoMasking, CellMasking, HelperMasking)
            fields = {field for mode in modes for field in mode.model_fields} - {"version"}
        if section == "privacy":
            profiles = (ExamplePrivacy, AgentPrivacy, CentralPrivacy)
            fields |= {field for profile in profiles for field in profile.model_fields} - {
                "version"
            }
        if section == "gate":
            fields |= set(EvaluatorGate.model_fields) - {"version"}
        assert fields == set(_EXPLAINED[section]), section


@pytest.mark.parametrize(
    ("line", "named"),
    [("[training]\nlearnign_rate = 1", "learning_rate"), ("[sever]\nport = 1", "server")],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(line, named):
    with pytest.raises(ConfigError, match=f"did you mean '{named}'"):
        parse_text(line)


def test_a_key_of_the_protocol_version_is_not_a_setting():
    with pytest.raises(ConfigError, match=r"unknown key 'lora\.version'"):
        parse_text("[lora]\nversion = 2")


def test_the_environment_beats_the_file_and_a_flag_beats_both(config):
    text = render(config)
    assert parse_text(text).server.port == 8750
    environment = {"SHEEPFOLD_SERVER_PORT": "9000", "SHEEPFOLD_SERVER_ENROLMENT": "open"}
    changed = parse_text(text, environment=environment).server
    assert (changed.port, changed.enrolment) == (9000, Enrolment.OPEN)
    assert parse_text(text, environment=environment, flags={"port": 9001}).server.port == 9001
    assert parse_text(text, environment=environment, flags={"port": None}).server.port == 9000


def test_an_unknown_variable_of_the_environment_is_refused(config):
    with pytest.raises(ConfigError, match=r"SHEEPFOLD_SERVER_PROT.*SHEEPFOLD_SERVER_PORT"):
        parse_text(render(config), environment={"SHEEPFOLD_SERVER_PROT": "1"})


def test_a_password_in_a_setting_is_never_shown(config):
    text = render(config).replace(
        'database_url = ""', 'database_url = ["postgresql://u:hunter2@h"]'
    )
    with pytest.raises(ConfigError) as caught:
        parse_text(text)
    assert "hunter2" not in str(caught.value)
    assert "database_url" in str(caught.value)
    good = parse_text(render(config), environment={"SHEEPFOLD_SERVER_DATABASE_URL": "x:hunter2"})
    assert "hunter2" not in repr(good)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("rank = 8", "rank = 0", "lora.rank"),
        ("rank = 8", 'rank = "8"', "lora.rank"),
        ("port = 8750", "port = 70000", "server.port"),
        ("min_cohort = 5", "min_cohort = 6", "min_cohort 6 is above cohort_target 5"),
        ("presence_s = 120.0", "presence_s = 10.0", "server.presence_s"),
        ("learning_rate = 0.00015", "learning_rate = nan", "training.learning_rate"),
        ("rank = 8", "rank = 1979-05-27", "not JSON serializable"),
        ("rank = 8", "rank = ", "is not TOML"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(config, old, new, named):
    text = render(config)
    assert old in text
    with pytest.raises(ConfigError, match=named):
        parse_text(text.replace(old, new))


def test_a_missing_file_says_who_writes_it(tmp_path):
    from aggregator_server.config import load_config

    with pytest.raises(ConfigError, match="sheepfold-server init"):
        load_config(tmp_path / "federation.toml", environment={})


def test_default_modules_are_the_papers_where_the_base_has_them(base):
    assert make_config(OPTIONS, base).lora.target_modules == ("q_proj", "v_proj")


def test_a_recipe_out_of_range_is_one_sentence(base):
    with pytest.raises(ConfigError, match="rank"):
        make_config(dataclasses.replace(OPTIONS, rank=0), base)


def test_a_recipe_with_epsilon_is_one_that_the_protocol_takes(base):
    config = make_config(with_privacy(epsilon=3.0, delta=1e-6, clip_norm=0.5), base)
    assert config.privacy == ExamplePrivacy(epsilon=3.0, delta=1e-6, clip_norm=0.5)
    assert config.aggregation.weighting is Weighting.UNIFORM
    assert (config.lora.dropout, config.training.local_epochs) == (0.0, None)
    assert config.lora.sent == ("B",)
    assert parse_text(render(config)) == config


@pytest.mark.parametrize("epsilon", [0.0, -1.0, 1e9, float("nan")])
def test_an_epsilon_that_is_none_is_refused(base, epsilon):
    with pytest.raises(ConfigError, match="epsilon"):
        make_config(with_privacy(epsilon=epsilon), base)
    for profile in (Profile.AGENT, Profile.CENTRAL):
        with pytest.raises((PrivacyError, ConfigError), match=r"ε|epsilon"):
            make_config(with_privacy(epsilon=epsilon, profile=profile), base)


@pytest.mark.parametrize("cohort", [10, 20, 32])
def test_a_recipe_for_agents_has_the_noise_and_the_masks_that_its_epsilon_takes(base, cohort):
    options = with_privacy(cohort_target=cohort, n_rounds=5, epsilon=8.0, profile=Profile.AGENT)
    config = make_config(options, base)
    privacy, masking = config.privacy, config.masking
    assert isinstance(privacy, AgentPrivacy)
    assert (masking.mode, masking.word_bits) == ("cells", 32)
    assert masking.clip_norm == masking.max_change == privacy.clip_norm
    assert masking.min_cell == config.rounds.min_cohort == cohort
    assert masking.max_cell >= config.rounds.over_selection * cohort
    check_recipe(config, base)  # which accounts for it
    weaker = privacy.model_copy(update={"share_variance": privacy.share_variance / 2})
    with pytest.raises(AccountingError, match="P2 promises ε ≤ 8 over 5 rounds"):
        check_recipe(config.model_copy(update={"privacy": weaker}), base)
    assert parse_text(render(config)) == config


@pytest.mark.parametrize("masking", [Masking.CELLS, Masking.OFF])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_recipe_with_noise_on_the_server(base, masking, adaptive):
    options = with_privacy(
        cohort_target=10,
        masking=masking,
        epsilon=2.0,
        profile=Profile.CENTRAL,
        adaptive_clip=adaptive,
    )
    if adaptive and masking is Masking.CELLS:
        with pytest.raises(ConfigError, match=r"adaptive needs masking\.mode"):
            check_manifest(make_config(options, base), base)
        return
    config = make_config(options, base)
    check_manifest(config, base)
    assert isinstance(config.privacy, CentralPrivacy)
    assert (config.privacy.adaptive is not None) is adaptive
    event = SampledGaussian(
        noise_multiplier=config.privacy.noise_multiplier, sampling_probability=1.0, n_steps=20
    )
    assert 1.99 < spent([event], delta=1e-5).epsilon <= 2.0
    assert parse_text(render(config)) == config


@pytest.mark.parametrize("kind", list(Optimizer))
def test_a_recipe_with_an_optimiser_and_a_filter_is_written_and_read(base, kind):
    options = dataclasses.replace(OPTIONS, optimizer=OPTIMIZERS[kind], filter=FilterRule.ROBUST)
    config = make_config(options, base)
    assert parse_text(render(config)) == config
    check_manifest(config, base)
    assert optimizer_of(config.aggregation.optimizer).rule == kind.value


def test_the_usual_optimiser_is_no_part_of_what_is_signed(base):
    """A key that came later is left out where it says nothing."""
    told = make_config(OPTIONS, base)
    assert "optimizer" not in told.aggregation.as_json()
    assert "proximal_mu" not in told.training.as_json()
    other = dataclasses.replace(OPTIONS, optimizer=OPTIMIZERS[Optimizer.FEDADAM])
    assert make_config(other, base).aggregation.as_json()["optimizer"]["kind"] == "fedadam"


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"cohort_target": 7, "masking": Masking.OFF}, FilterRule.NONE),
        ({"cohort_target": 8, "masking": Masking.OFF}, FilterRule.ROBUST),
        ({"cohort_target": 79, "cell_target": 10}, FilterRule.NONE),
        ({"cohort_target": 80, "cell_target": 10}, FilterRule.ROBUST),
        ({"cohort_target": 8, "masking": Masking.OFF, "filter": FilterRule.NONE}, FilterRule.NONE),
        ({"cohort_target": 2, "filter": FilterRule.ROBUST}, FilterRule.ROBUST),
        (
            {"cohort_target": 8, "masking": Masking.OFF, "lora_rule": LoraRule.FLEXLORA},
            FilterRule.NONE,
        ),
        (
            {
                "cohort_target": 20,
                "privacy": PrivacyOptions(epsilon=8.0, profile=Profile.CENTRAL, clip_norm=0.5),
            },
            FilterRule.NONE,
        ),
    ],
)
def test_the_filter_is_on_where_a_round_has_enough_to_judge(base, options, rule):
    config = make_config(dataclasses.replace(OPTIONS, **options), base)
    assert config.filter.rule is rule


def test_p3_allows_no_filter(base):
    options = dataclasses.replace(
        with_privacy(cohort_target=10, epsilon=2.0, profile=Profile.CENTRAL),
        filter=FilterRule.ROBUST,
    )
    with pytest.raises(ConfigError, match=r'filter.rule must be "none"'):
        check_manifest(make_config(options, base), base)


def test_masks_stay_off_under_p3_unless_asked_for(base):
    """Its guarantee takes honest members under masks."""
    for profile, mode in ((Profile.CENTRAL, "off"), (Profile.EXAMPLE, "cells")):
        config = make_config(with_privacy(cohort_target=10, epsilon=2.0, profile=profile), base)
        assert config.masking.mode == mode


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"profile": Profile.AGENT, "masking": Masking.OFF}, "P2 needs masked cells"),
        ({"profile": Profile.EXAMPLE, "adaptive_clip": True}, "--adaptive-clip is for"),
        ({"epsilon": None, "adaptive_clip": True}, "--adaptive-clip is for"),
    ],
)
def test_options_that_do_not_go_together_are_refused(base, options, said):
    with pytest.raises(ConfigError, match=said):
        make_config(with_privacy(**{"epsilon": 8.0, "cohort_target": 20, **options}), base)


def with_privacy(**options):
    names = {field.name for field in dataclasses.fields(PrivacyOptions)}
    privacy = PrivacyOptions(**{key: options.pop(key) for key in names & options.keys()})
    return dataclasses.replace(OPTIONS, privacy=privacy, **options)


def check_manifest(config, base):
    server, registrar = (Signer.generate().identity for _ in range(2))
    build_manifest(
        config,
        base,
        server=server,
        registrar=registrar,
        federation=bytes(16),
        created_at=1.8e9,
    )
