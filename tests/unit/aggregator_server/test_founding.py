"""`init`, and what may be edited until somebody joins."""

import re

import pytest

from aggregator_server.errors import (
    ConfigError,
    SchemaError,
    StaleWriteError,
    StoreBusyError,
)
from aggregator_server.federation import open_federation
from aggregator_server.founding import CONFIG_NAME, found_federation
from aggregator_server.recipes import Masking, RecipeOptions, make_config
from aggregator_server.releases import sign_release
from protocol.errors import ManifestError
from protocol.signing import verify


def edit(case, old: str, new: str) -> None:
    path = case.directory / CONFIG_NAME
    text = path.read_text()
    assert re.search(old, text, re.MULTILINE)
    path.write_text(re.sub(old, new, text, flags=re.MULTILINE))


def reopen(case, *, may_edit: bool = True):
    case.federation.close()
    case.federation = open_federation(
        case.directory, clock=case.clock, environment={}, may_edit=may_edit
    )
    return case.federation


def test_init_makes_a_federation_whose_first_release_changes_nothing(make_case):
    case = make_case()
    release = case.federation.releases.get(0)
    arrays = case.federation.releases.arrays(release)
    assert all(not array.any() for name, array in arrays.items() if ".lora_B." in name)
    verify(case.federation.charter.signed, "federation", key=case.manifest.server)
    assert case.federation.releases.verify() == 0


def test_init_refuses_a_folder_that_is_not_empty(make_case, base, clock, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    config = make_config(RecipeOptions(name="Test"), base)
    with pytest.raises(ConfigError, match=r"not empty \(it holds 'thesis.tex'\)"):
        found_federation(tmp_path, config=config, base=base, clock=clock)


def test_init_keeps_everything_private(make_case):
    assert make_case().directory.stat().st_mode & 0o077 == 0


def test_init_refuses_a_module_that_the_base_lacks_and_writes_nothing(base, clock, tmp_path):
    options = RecipeOptions(name="Test", target_modules=("q_porj",), masking=Masking.OFF)
    with pytest.raises(ManifestError, match="q_porj"):
        make_config(options, base)
    config = make_config(RecipeOptions(name="Test", masking=Masking.OFF), base)
    lora = config.lora.model_copy(update={"target_modules": ("q_porj",)})
    config = config.model_copy(update={"lora": lora})
    with pytest.raises(ManifestError, match="q_porj"):
        found_federation(tmp_path / "new", config=config, base=base, clock=clock)
    assert not (tmp_path / "new").exists()


def test_opening_again_gives_the_same_manifest(make_case):
    case = make_case()
    before = case.federation.charter.signed
    assert reopen(case).charter.signed == before


def test_a_recipe_edited_before_anybody_joined_makes_release_0_anew(make_case):
    case = make_case()
    before = case.federation.charter
    first = case.federation.releases.get(0)
    edit(case, "^rank = 4", "rank = 8")
    after = reopen(case)
    assert after.charter.manifest.lora.rank == 8
    assert after.charter.path_id == before.path_id
    assert after.charter.keys.server.identity == before.keys.server.identity
    assert after.releases.get(0).adapter != first.adapter
    assert after.releases.verify() == 0


def test_a_name_edited_before_anybody_joined_keeps_the_adapter(make_case):
    case = make_case()
    first = case.federation.releases.get(0)
    edit(case, '^name = "Test"', 'name = "Other"')
    after = reopen(case).releases.get(0)
    assert after.adapter == first.adapter
    assert after.federation_digest != first.federation_digest


def test_a_recipe_edited_after_an_agent_joined_is_refused_naming_the_keys(make_case, make_agents):
    case = make_case()
    make_agents(case, 1)
    edit(case, "^rank = 4", "rank = 8")
    edit(case, "^learning_rate = .*", "learning_rate = 0.5")
    with pytest.raises(ConfigError) as caught:
        reopen(case)
    message = str(caught.value)
    assert "lora.rank" in message
    assert "training.learning_rate" in message
    assert "lora.alpha" not in message


def test_one_who_joined_and_left_still_fixes_the_recipe(make_case, make_agents):
    case = make_case()
    (agent,) = make_agents(case, 1)
    agent.revoke()
    edit(case, "^rank = 4", "rank = 8")
    with pytest.raises(ConfigError, match="differs from what the members accepted"):
        reopen(case)


def test_how_the_server_is_run_may_be_edited_at_any_time(make_case, make_agents):
    case = make_case()
    make_agents(case, 1)
    edit(case, "^presence_s = .*", "presence_s = 99.0")
    assert reopen(case).config.server.presence_s == 99.0


def test_commands_beside_the_server_never_change_the_manifest(make_case):
    case = make_case()
    before = case.federation.charter.signed
    edit(case, "^rank = 4", "rank = 8")
    assert reopen(case, may_edit=False).charter.signed == before


def test_a_manifest_is_never_replaced_once_somebody_joined(make_case, make_agents):
    case = make_case()
    make_agents(case, 1)
    charter = case.federation.charter
    row = sign_release(charter.keys.server, case.federation.releases.get(0), round_number=None)
    with pytest.raises(StaleWriteError, match="the manifest is fixed"):
        case.federation._store.found(charter.signed.canonical(), row, ())


def test_keys_of_another_federation_are_refused(make_case):
    case, other = make_case(), make_case()
    (case.directory / "keys" / "server.key").write_text(
        (other.directory / "keys" / "server.key").read_text()
    )
    with pytest.raises(ConfigError, match="restore them from a backup"):
        reopen(case)


def test_another_base_is_refused_once_somebody_joined(make_case, make_agents):
    case = make_case()
    make_agents(case, 1)
    path = case.directory / "base.json"
    path.write_text(path.read_text().replace("synthetic/tiny", "synthetic/other"))
    with pytest.raises(ConfigError, match=r"base\.model"):
        reopen(case)


def test_a_base_that_is_none_is_refused(make_case):
    case = make_case()
    (case.directory / "base.json").write_text("{}")
    with pytest.raises(ConfigError, match="no base description"):
        reopen(case)


def test_a_database_of_a_newer_version_is_refused_clearly(make_case):
    from sqlalchemy import update

    from aggregator_server.store.schema import meta

    case = make_case()
    with case.federation._store._database.writing() as connection:
        connection.execute(update(meta).where(meta.c.key == "schema_version").values(value=b"99"))
    with pytest.raises(SchemaError, match="schema version 99, this server knows 4"):
        reopen(case)


def test_a_database_without_a_federation_is_refused(make_case):
    case = make_case()
    case.federation.close()
    for path in case.directory.glob("federation.db*"):
        path.unlink()
    with pytest.raises(SchemaError, match="sheepfold-server init"):
        open_federation(case.directory, clock=case.clock, environment={})


def test_a_database_holds_one_federation(make_case, base, clock, tmp_path):
    case = make_case()
    config = make_config(RecipeOptions(name="Second"), base)
    from pydantic import SecretStr

    server = config.server.model_copy(
        update={"database_url": SecretStr(f"sqlite:///{case.directory / 'federation.db'}")}
    )
    with pytest.raises(ConfigError, match="already holds a federation"):
        found_federation(
            tmp_path / "second",
            config=config.model_copy(update={"server": server}),
            base=base,
            clock=clock,
        )


@pytest.mark.parametrize("url", ["mysql://u:hunter2@h/d", "nonsense", "oracle+x://a:hunter2@b/c"])
def test_another_kind_of_database_is_refused_without_its_password(make_case, url):
    case = make_case()
    edit(case, '^database_url = ""', f'database_url = "{url}"')
    with pytest.raises(ConfigError) as caught:
        reopen(case)
    assert "hunter2" not in str(caught.value)
    assert "sqlite" in str(caught.value)


def test_a_round_of_more_updates_than_its_release_can_name_is_refused(base, clock, tmp_path):
    config = make_config(RecipeOptions(name="Test", cohort_target=8000, masking=Masking.OFF), base)
    with pytest.raises(ConfigError) as caught:
        found_federation(tmp_path / "new", config=config, base=base, clock=clock)
    message = str(caught.value)
    assert "cohort_target = 8000 with over_selection = 1.3 selects 10400" in message
    assert "1048576 bytes" in message
    assert "\n" not in message
    assert not (tmp_path / "new").exists()


def test_a_cohort_edited_beyond_what_a_release_can_name_is_refused(make_case):
    case = make_case()
    edit(case, "^over_selection = .*", "over_selection = 10.0")
    edit(case, "^cohort_target = .*", "cohort_target = 900")
    with pytest.raises(ConfigError, match="selects 9000 agents"):
        reopen(case)


def test_a_place_for_blobs_that_another_federation_uses_is_refused(base, clock, tmp_path):
    options = RecipeOptions(name="Test", blobs_url=str(tmp_path / "shared"))
    config = make_config(options, base)
    found_federation(tmp_path / "one", config=config, base=base, clock=clock)
    with pytest.raises(ConfigError, match="blobs_url is not empty"):
        found_federation(tmp_path / "two", config=config, base=base, clock=clock)
    assert not list((tmp_path / "two").glob("keys/*"))


def test_relative_places_begin_in_the_federations_folder(base, clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = RecipeOptions(name="Test", database_url="sqlite:///my.db", blobs_url="my-blobs")
    found_federation(tmp_path / "fed", config=make_config(options, base), base=base, clock=clock)
    assert (tmp_path / "fed" / "my.db").is_file()
    assert (tmp_path / "fed" / "my-blobs" / "adapters").is_dir()
    monkeypatch.chdir("/")
    open_federation(tmp_path / "fed", clock=clock, environment={}).close()


def test_release_0_made_anew_leaves_no_file_of_the_old_one(make_case, blob_files):
    case = make_case()
    edit(case, "^rank = 4", "rank = 8")
    release = reopen(case).releases.get(0)
    files = {ref.sha256.hex() for ref in (release.adapter, release.sent, release.config)}
    assert blob_files(case) == {f"adapters/{name}" for name in files}


def test_a_database_that_does_not_answer_is_told_in_one_sentence(base, clock, tmp_path):
    url = "postgresql://somebody:hunter2@127.0.0.1:1/nothing"
    config = make_config(RecipeOptions(name="Test", database_url=url), base)
    with pytest.raises(StoreBusyError, match="does not answer") as caught:
        found_federation(tmp_path / "new", config=config, base=base, clock=clock)
    assert "hunter2" not in str(caught.value)
    assert not list((tmp_path / "new").iterdir())  # init can be tried again
