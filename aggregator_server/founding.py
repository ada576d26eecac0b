"""How a federation begins: `init`, and the recipe that may be edited until somebody joins."""

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from aggregator_server.blobs import Blobs, open_blobs
from aggregator_server.charter import Charter, make_charter
from aggregator_server.config import ServerConfig
from aggregator_server.errors import ConfigError
from aggregator_server.helper.client import check_helper_url
from aggregator_server.keys import Keys, create_keys
from aggregator_server.masking.vectors import SUMS
from aggregator_server.releases import (
    ADAPTERS,
    blob_key,
    first_release,
    most_cells,
    sign_release,
    store_adapter,
)
from aggregator_server.selection import most_selected
from aggregator_server.store.database import Database
from aggregator_server.store.store import Store
from aggregator_server.template import render
from aggregator_server.uploads import UPLOADS
from privacy.fixed_point import agreed_layout
from protocol.base_description import BaseDescription
from protocol.blocks import HelperMasking, SumMasking
from protocol.clock import Clock
from protocol.errors import ProtocolError
from protocol.limits import MAX_JSON_BYTES, MAX_WAVE
from protocol.manifest import FederationManifest
from protocol.privacy import AgentPrivacy, CentralPrivacy
from protocol.rules import rules_of_lora
from protocol.signing import Signed, sign, verify
from protocol.wire import explain, parse
from quant.adapter import adapter_shapes, initial_adapter
from quant.companions import update_layout

CONFIG_NAME: Final = "federation.toml"
BASE_NAME: Final = "base.json"
_SQLITE: Final = "sqlite:///"
_ID_BYTES: Final = 16
_log = structlog.get_logger(__name__)


def found_federation(
    directory: Path, *, config: ServerConfig, base: BaseDescription, clock: Clock
) -> Charter:
    """Found a federation in a new folder: keys, database, release 0, `federation.toml`.

    Args:
        directory: Must not exist, or be empty.
        config: Its settings.
        base: The base model.
        clock: For the manifest's date.

    Raises:
        ConfigError: The recipe cannot work, the folder is not empty, or the database or the place
            for blobs is a federation's already.
        ManifestError: A target module is not in the base.
        KeyFileError: The keys cannot be written.
        StoreError: The database cannot be used.
        BlobError: Release 0 cannot be stored.
    """
    check_recipe(config, base)
    _make_directory(directory)
    database_url, blobs_url = places_of(directory, config)
    store = Store(Database(database_url))
    try:
        if store.is_founded():
            msg = "the database already holds a federation; give this one a database of its own"
            raise ConfigError(msg)
        blobs = open_blobs(blobs_url, min_free_bytes=config.server.min_free_bytes)
        _require_unused(blobs)
        keys = create_keys(directory)
        _write(directory / BASE_NAME, base.model_dump_json(indent=2) + "\n")
        manifest = build_manifest(
            config,
            base,
            server=keys.server.identity,
            registrar=keys.registrar.identity,
            federation=secrets.token_bytes(_ID_BYTES),
            created_at=clock.now(),
        )
        charter = _found(manifest, base, keys, store, blobs)
    finally:
        store.close()
    # Written last: a folder with a federation.toml is whole.
    _write(directory / CONFIG_NAME, render(config))
    return charter


def reconcile(
    directory: Path, *, config: ServerConfig, keys: Keys, store: Store, blobs: Blobs
) -> Charter:
    """Bring the manifest in line with `federation.toml` and `base.json`, while that is allowed.

    Args:
        directory: The federation's folder.
        config: What the file says now.
        keys: The server's keys.
        store: Holds the signed manifest.
        blobs: Where release 0 goes if it has to be made anew.

    Returns:
        The charter; a new one, with a new release 0, when the recipe was edited before anybody
        joined.

    Raises:
        ConfigError: The recipe was edited after an agent had joined; names the keys that differ.
    """
    base = load_base(directory / BASE_NAME)
    stored = _stored_manifest(store, keys)
    wanted = build_manifest(
        config,
        base,
        server=keys.server.identity,
        registrar=keys.registrar.identity,
        federation=stored.body.federation,
        created_at=stored.body.created_at,
    )
    if wanted == stored.body:
        return make_charter(stored, base, keys)
    changed = sorted(_differences(stored.body.as_json(), wanted.as_json()))
    if store.agents.any_enrolled():
        msg = (
            f"{CONFIG_NAME} or {BASE_NAME} differs from what the members accepted: "
            f"{', '.join(changed)}; change it back, or found another federation"
        )
        raise ConfigError(msg)
    replaced = store.releases.blobs()
    charter = _found(wanted, base, keys, store, blobs)
    _log.info("the manifest was edited; release 0 was made anew", changed=changed)
    for sha in replaced - store.releases.blobs():
        blobs.delete(blob_key(sha))
    return charter


def stored_charter(directory: Path, *, keys: Keys, store: Store) -> Charter:
    """The charter that is served, whatever `federation.toml` says by now.

    Raises:
        ConfigError: The keys, `base.json` and the database do not belong together.
    """
    return make_charter(_stored_manifest(store, keys), load_base(directory / BASE_NAME), keys)


def build_manifest(
    config: ServerConfig,
    base: BaseDescription,
    *,
    server: bytes,
    registrar: bytes,
    federation: bytes,
    created_at: float,
) -> FederationManifest:
    """The manifest that settings and a base make.

    Args:
        config: The settings.
        base: The base model.
        server: Identity of the server, 32 bytes.
        registrar: Identity of the registrar, 32 bytes.
        federation: The federation's id, 16 bytes.
        created_at: Seconds since the Unix epoch.

    Raises:
        ConfigError: The recipe cannot work; see `check_recipe`.
        ManifestError: A target module is not in the base.
    """
    check_recipe(config, base)
    layout = agreed_layout(
        update_layout(adapter_shapes(base, config.lora), config.lora, config.training),
        config.masking,
        config.privacy,
    )
    try:
        return FederationManifest(
            federation=federation,
            name=config.federation.name,
            description=config.federation.description,
            server=server,
            registrar=registrar,
            registrar_held_by_server=True,
            created_at=created_at,
            base=base.base,
            lora=config.lora,
            layout=layout.digest(),
            training=config.training,
            aggregation=config.aggregation,
            masking=config.masking,
            privacy=config.privacy,
            filter=config.filter,
            gate=config.gate,
            rounds=config.rounds,
            change_limits=config.change_limits,
        )
    except ValidationError as error:
        raise ConfigError(explain("the recipe", error)) from error


def check_recipe(config: ServerConfig, base: BaseDescription) -> None:
    """Refuse a recipe that no round could be made from.

    Raises:
        ConfigError: A round could have more updates than its release can name, or the LoRA rule
            does not go with the rest.
        AccountingError: The noise of P2 or P3 does not keep the ε that it promises.
        EncodingPlanError: A masked sum could wrap.
        ManifestError: A target module is not in the base.
    """
    for rule, is_broken in rules_of_lora(config).items():
        if is_broken:
            msg = f"lora.rule is {config.lora.rule}, so {rule}"
            raise ConfigError(msg)
    layout = update_layout(adapter_shapes(base, config.lora), config.lora, config.training)
    agreed_layout(layout, config.masking, config.privacy)
    if isinstance(config.privacy, AgentPrivacy | CentralPrivacy):
        from privacy.agent_accounting import require_kept  # noqa: PLC0415 - scipy, rarely needed

        require_kept(
            config.privacy,
            config.masking,
            n_values=layout.n_values,
            n_rounds=config.rounds.n_rounds,
        )
    if isinstance(config.masking, HelperMasking):
        check_helper_url(config.server.helper_url)
    rounds = config.rounds
    selected, most = most_selected(rounds), most_cells()
    if isinstance(config.masking, SumMasking) and selected > MAX_WAVE:
        msg = (
            f"rounds.cohort_target = {rounds.cohort_target} with over_selection = "
            f"{rounds.over_selection:g} selects {selected} agents; a masked round has at most "
            f"{MAX_WAVE}, as each is sent the list of all"
        )
        raise ConfigError(msg)
    if selected > most:
        msg = (
            f"rounds.cohort_target = {rounds.cohort_target} with over_selection = "
            f"{rounds.over_selection:g} selects {selected} agents; a release names each update "
            f"and may have {MAX_JSON_BYTES} bytes, which is enough for {most}: lower one of the two"
        )
        raise ConfigError(msg)


def places_of(directory: Path, config: ServerConfig) -> tuple[str, str]:
    """The URLs of database and blobs.

    Empty settings stand for places in the federation's folder; relative paths begin there.
    """
    folder = directory.resolve()
    database = config.server.database_url.get_secret_value() or _SQLITE + "federation.db"
    blobs = config.server.blobs_url.get_secret_value() or "blobs"
    if database.startswith(_SQLITE):
        database = f"{_SQLITE}{folder / database.removeprefix(_SQLITE)}"
    return database, blobs if "://" in blobs else str(folder / blobs)


def load_base(path: Path) -> BaseDescription:
    """Read a base description.

    Raises:
        ConfigError: It cannot be read, or is none.
    """
    try:
        return parse(BaseDescription, path.read_bytes())
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}; `sheepfold-agent describe-base` writes it"
        raise ConfigError(msg) from error
    except ProtocolError as error:
        msg = f"{path} is no base description: {error}"
        raise ConfigError(msg) from error


def _found(
    manifest: FederationManifest, base: BaseDescription, keys: Keys, store: Store, blobs: Blobs
) -> Charter:
    signed = sign(keys.server, "federation", manifest).signed
    charter = make_charter(signed, base, keys)
    files = store_adapter(blobs, manifest, initial_adapter(base, manifest.lora), number=0)
    release = first_release(manifest, files, created_at=manifest.created_at)
    row = sign_release(keys.server, release, round_number=None)
    store.found(signed.canonical(), row, files.rows())
    return charter


def _require_unused(blobs: Blobs) -> None:
    for prefix in (ADAPTERS, UPLOADS, SUMS):
        if found := blobs.names(prefix):
            msg = (
                f"blobs_url is not empty (it holds {prefix}/{found[0]}); give this federation a "
                "place of its own, as two would delete each other's files"
            )
            raise ConfigError(msg)


def _stored_manifest(store: Store, keys: Keys) -> Signed[FederationManifest]:
    signed = parse(Signed[FederationManifest], store.signed_manifest())
    try:
        verify(signed, "federation", key=keys.server.identity)
    except ProtocolError as error:
        msg = "the keys in keys/ are not those of the database; restore them from a backup"
        raise ConfigError(msg) from error
    return signed


def _differences(old: object, new: object, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            name = f"{where}.{key}" if where else key
            yield from _differences(old.get(key), new.get(key), name)
    elif json.dumps(old) != json.dumps(new):
        yield where


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        occupied = next(directory.iterdir(), None)
        if occupied is None:
            directory.chmod(0o700)  # the database holds invite codes
    except OSError as error:
        msg = f"cannot use {directory}: {error.strerror}"
        raise ConfigError(msg) from error
    if occupied is not None:
        msg = f"{directory} is not empty (it holds {occupied.name!r}); choose another folder"
        raise ConfigError(msg)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
