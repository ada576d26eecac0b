"""Keys and documents that the tests of several packages need; every call makes valid ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.base_description import BaseDescription
from protocol.blocks import BaseBlock, LoraBlock, RoundsBlock, Template, TrainingBlock
from protocol.chain import (
    AggregationReport,
    BlobRef,
    FilterReport,
    NoVerdict,
    Release,
    RoundManifest,
)
from protocol.manifest import FederationManifest
from protocol.signing import Signer
from protocol.wire import sha256

NOW = 1_800_000_000.0


@pytest.fixture
def server_key() -> Signer:
    return Signer.from_private_bytes(bytes(range(32)))


@pytest.fixture
def agent_key() -> Signer:
    return Signer.from_private_bytes(bytes(range(32, 64)))


@pytest.fixture
def make_manifest(server_key: Signer) -> Callable[..., FederationManifest]:
    def make(**changes: Any) -> FederationManifest:
        values = {
            "federation": bytes(range(16)),
            "name": "Test",
            "server": server_key.identity,
            "registrar": server_key.identity,
            "registrar_held_by_server": True,
            "created_at": NOW,
            "base": BaseBlock(
                model="synthetic/tiny",
                source_dtype="bfloat16",
                fingerprint=bytes([1]) * 32,
                tokenizer_digest=bytes([2]) * 32,
            ),
            "lora": LoraBlock(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"), init_seed=7),
            "layout": bytes([3]) * 32,
            "training": TrainingBlock(local_steps=10, learning_rate=1e-3),
            "rounds": RoundsBlock(n_rounds=3, cohort_target=2, min_cohort=1),
        }
        return FederationManifest(**{**values, **changes})

    return make


@pytest.fixture
def make_release(
    make_manifest: Callable[..., FederationManifest],
) -> Callable[..., Release]:
    """Release 0, or one that follows `after`."""

    def make(
        manifest: FederationManifest | None = None, *, after: Release | None = None, **changes: Any
    ) -> Release:
        manifest = manifest or make_manifest()
        number = 0 if after is None else after.number + 1
        blob = BlobRef(sha256=bytes([number]) * 32, n_bytes=100)
        values = {
            "federation": manifest.federation,
            "number": number,
            "round": number,
            "previous": None if after is None else after.digest(),
            "federation_digest": manifest.digest(),
            "round_digest": None
            if after is None or changes.get("rolled_back_to") is not None
            else bytes([4]) * 32,
            "adapter": blob,
            "sent": blob,
            "config": blob,
            "accepted": (),
            "rejected": (),
            "aggregation": AggregationReport(
                rule="none" if after is None else "fedavg", n_cells=0, n_agents=0, update_norm=0.0
            ),
            "filter": FilterReport(rule="none", n_cells=0, n_rejected=0),
            "verdict": NoVerdict(),
            "created_at": NOW,
        }
        return Release(**{**values, **changes})

    return make


@pytest.fixture
def make_round(
    make_manifest: Callable[..., FederationManifest], make_release: Callable[..., Release]
) -> Callable[..., RoundManifest]:
    """A round that starts from `release`."""

    def make(
        manifest: FederationManifest | None = None,
        release: Release | None = None,
        /,
        **changes: Any,
    ) -> RoundManifest:
        manifest = manifest or make_manifest()
        release = release or make_release(manifest)
        values = {
            "federation": manifest.federation,
            "federation_digest": manifest.digest(),
            "round": release.number + 1,
            "release": release.number,
            "release_digest": release.digest(),
            "sent": release.sent,
            "selection_seed": bytes([5]) * 32,
            "cohort_size": 2,
            "schedule_start": 0.0,
            "schedule_end": 0.5,
            "update_n_bytes": 400,
            "opened_at": NOW,
            "deadline_at": NOW + 3600.0,
            "cap_at": NOW + 7200.0,
        }
        return RoundManifest(**{**values, **changes})

    return make


@pytest.fixture
def make_adapter_folder(
    make_manifest: Callable[..., FederationManifest], make_release: Callable[..., Release]
) -> Callable[..., Path]:
    """A published adapter whose B is not zero, as a PEFT folder; `config` changes its settings."""
    import numpy as np

    from quant.adapter import initial_adapter, peft_config, to_safetensors, write_folder
    from quant.model_card import write_release

    def make(
        folder: Path,
        base: BaseDescription,
        *,
        foreign: bool = False,
        template: Template = Template.ALPACA,
        config: dict[str, Any] | None = None,
        target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "down_proj"),
    ) -> Path:
        lora = LoraBlock(rank=4, alpha=8.0, target_modules=target_modules, init_seed=7)
        rng = np.random.default_rng(1)
        weights = to_safetensors(
            {
                name: array if array.any() else rng.normal(0, 0.05, array.shape).astype(np.float32)
                for name, array in initial_adapter(base, lora).items()
            }
        )
        settings = {**json.loads(peft_config(base.base, lora)), **(config or {})}
        as_bytes = json.dumps(settings).encode()
        if foreign:
            write_folder(folder, weights=weights, config=as_bytes, card="# Somebody's\n")
            return folder
        training = TrainingBlock(local_steps=10, learning_rate=1e-3, template=template)
        manifest = make_manifest(base=base.base, lora=lora, training=training)
        release = make_release(
            manifest,
            after=make_release(manifest),
            adapter=BlobRef(sha256=sha256(weights), n_bytes=len(weights)),
            aggregation=AggregationReport(rule="fedavg", n_cells=3, n_agents=3, update_norm=0.5),
        )
        write_release(folder, manifest=manifest, release=release, weights=weights, config=as_bytes)
        return folder

    return make
