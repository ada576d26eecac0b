"""`federation.toml` as `init` writes it: every key with a line that explains it."""

import json
from collections.abc import Mapping
from enum import Enum
from typing import Final

from pydantic import BaseModel, SecretStr

from aggregator_server.config import ServerConfig, without_password
from protocol.wire import b64u_encode

_HEADER: Final = """\
# The settings of this federation. Edit the recipe until the first agent enrols; from then on it
# is fixed, because it is what the volunteers accepted. [server] may change at any time (restart
# `sheepfold-server serve`); environment variables SHEEPFOLD_SERVER_<KEY> and flags go before it.
"""

_EXPLAINED: Final[Mapping[str, Mapping[str, str]]] = {
    "federation": {
        "name": "What volunteers see when they join.",
        "description": "A sentence or two about what is learnt, and for whom.",
    },
    "lora": {
        "rank": "Rank of the adapter: more can learn more, and costs more bytes each round.",
        "alpha": "Scale of the adapter; the update of a layer is alpha / rank * B * A.",
        "dropout": "Dropout before the adapter in training, 0 to 1.",
        "target_modules": "Linear layers that get an adapter, by the last part of their name.",
        "rule": '"fedit" averages A and B; "ffa-lora" keeps A fixed: half the bytes, exact; '
        '"rolora" trains B and A in turn: the same; "flexlora", in the open, averages products.',
        "init_seed": "Seed of A in release 0; drawn at random.",
        "min_rank": "Agents may train fewer rank rows, from this many on; unset: all train all.",
        "optional_modules": "Of target_modules, those that an agent may leave out.",
    },
    "training": {
        "template": '"alpaca" (the paper\'s) or "chat" (the tokenizer\'s own).',
        "loss_on": '"response" learns to answer; "all" learns the prompt too.',
        "max_length": "Longest record in tokens; longer ones lose their end.",
        "batch_size": "Records for each optimiser step.",
        "local_steps": "Optimiser steps in each round. Set this or local_epochs.",
        "local_epochs": "Passes over an agent's own records in each round. Or set local_steps.",
        "learning_rate": "Learning rate at its peak.",
        "schedule": 'Over the whole federation: "constant", "linear" or "cosine".',
        "final_frac": "What is left of the learning rate at the end, 0 to 1.",
        "beta1": "Adam's first decay.",
        "beta2": "Adam's second decay.",
        "eps": "Adam's epsilon.",
        "weight_decay": "Decoupled weight decay.",
        "proximal_mu": "Pull back to the round's start, where agents drift (FedProx); 0 is off.",
        "scaffold": "true corrects agents that drift by control variates (SCAFFOLD); masks off.",
        "max_grad_norm": "Gradients are clipped to this L2 norm; 0 turns clipping off.",
    },
    "aggregation": {
        "rule": '"fedavg": the weighted mean of the updates.',
        "optimizer": 'What becomes of the mean: kind "fedavg" adds it; "fedavgm", "fedadagrad", '
        '"fedadam" and "fedyogi" remember earlier ones.',
        "weighting": '"n_examples" weighs an agent by its records; "uniform" weighs all alike.',
        "max_weight": "No agent weighs more than this many records.",
    },
    "masking": {
        "mode": '"cells": the server sees sums only (secure aggregation); "helper": the same by a '
        'second operator; "off": single updates.',
        "word_bits": "Bits of a masked value on the wire, 16 or 32.",
        "max_change": "Largest change of one value in a round; larger ones are cut to it.",
        "clip_norm": "Largest L2 norm of an update; a longer one is shortened to it.",
        "cell_target": "Agents of a cell, as far as their number allows; 2 x this - 1 at most.",
        "min_cell": "Smallest cell, never below 5: fewer would hide too little.",
        "max_cell": "Largest cell; more leave less room for each value in a word.",
        "colluders": "Members that may collude with the server; never below the protocol's rule.",
        "stage_s": "Seconds that a cell waits for members that do not answer.",
        "ready_delay_s": "Agents wait up to this at random before READY, to hide training time.",
        "helper": "The helper's identity, from its helper.json.",
        "helper_key": "The key that agents seal their masks' seeds to, from the same.",
        "helper_wait_s": "Seconds after a round's cap that the helper is waited for.",
    },
    "privacy": {
        "profile": '"P0": no guarantee; "P1": each example, by DP-SGD on the agents; "P2": each '
        'agent, by noise under masks; "P3": each agent, from the public, by noise on the server.',
        "epsilon": "What an example (P1) or an agent may spend in all rounds together.",
        "delta": "With it: chance, about, that the bound fails; well below 1 / records or agents.",
        "clip_norm": "Largest L2 norm of one example's gradient (P1) or of an update.",
        "steps_per_clip": "That norm in steps of the ring.",
        "share_variance": "Of each agent's noise, in steps squared; it must keep epsilon.",
        "noise_multiplier": "Standard deviation of the noise on the sum / clip_norm; the same.",
        "adaptive": "The clip norm follows a quantile of the updates' norms, counted with noise.",
    },
    "filter": {
        "rule": '"none"; "robust": updates, or means of cells, are cut to the median norm; those '
        "out of scale, against the others, or copies are removed, a quarter at most. Of fewer than "
        "eight the geometric median is taken.",
    },
    "gate": {
        "rule": '"none": nobody looks at a candidate; "evaluator": one must let it pass.',
        "evaluator": "Its identity, as `sheepfold-agent identity` prints it.",
        "max_loss_increase": "A round may raise its held-out loss by so much (nats per token) ...",
        "max_category_loss_increase": "... and that of a single category by so much.",
        "max_retries": "In so many ways a candidate that fails is made again without some cells.",
        "wait_s": "Seconds that a round waits for it; then the old release stays.",
    },
    "rounds": {
        "n_rounds": "The federation is finished after this many successful rounds.",
        "cohort_target": "A round closes when this many updates have arrived.",
        "min_cohort": "A round needs this many agents to open, and this many updates to count.",
        "over_selection": "This many times the target is selected, as some will not finish.",
        "deadline_s": "Seconds after which a round closes with what has arrived.",
        "cap_s": "An upload that is moving at the deadline may go on until then (seconds).",
        "min_upload_bytes_per_s": "Slower than this, an upload does not count as moving.",
    },
    "change_limits": {
        "max_tensor_change_norm": "Agents refuse a release that changes a tensor by more (L2).",
    },
    "server": {
        "enrolment": '"invite" needs an invite to join; "open" lets anyone in.',
        "host": "Address to listen on.",
        "port": "Port to listen on; 0 takes any free one.",
        "public_url": "How agents reach this server, for the invite's join command; https://…",
        "tls_cert": "Certificate chain (PEM). Without one, only loopback is served.",
        "tls_key": "Its private key (PEM).",
        "behind_proxy": "true when a TLS proxy on this network stands in front of plain http.",
        "database_url": 'Empty: SQLite here. Or "postgresql://user@host/name"; a password belongs '
        "in the environment: SHEEPFOLD_SERVER_DATABASE_URL is the whole URL.",
        "blobs_url": 'Empty: a folder here. Or any fsspec URL of its own, as "s3://bucket/name".',
        "retention": '"delete" single updates once they are in a release, or "keep" them.',
        "helper_url": 'Where the helper of masking.mode = "helper" answers; https://…',
        "unmask_processes": "Processes that share the unmasking of large adapters.",
        "min_free_bytes": "Below this much free disk space, uploads are refused.",
        "presence_s": "An agent counts as present for this long after it was last seen (seconds).",
        "quarantine": "true: members against whom the evidence of many rounds repeats are drawn no "
        "more, until `agents readmit`.",
        "log_format": '"console" for people, "json" for machines.',
    },
}


def render(config: ServerConfig) -> str:
    """The text of `federation.toml` for these settings, each key explained.

    Guarantees:
        1. Reading the text gives these settings back, but for passwords in URLs.
        2. No password in a URL is written: the environment is the place for it.
    """
    sections = [_HEADER]
    for section, keys in _EXPLAINED.items():
        values: BaseModel = getattr(config, section)
        lines = [f"[{section}]"]
        for key, explanation in keys.items():
            if key not in type(values).model_fields:
                continue  # of another mode
            lines.append(f"# {explanation}")
            lines.append(_line(key, getattr(values, key)))
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def _line(key: str, value: object) -> str:
    # TOML has no null: one key means it by 0, the others by standing there as a comment.
    if value is None and key == "max_grad_norm":
        return f"{key} = 0"
    if value is None:
        return f"# {key} ="
    return f"{key} = {_toml(value)}"


def _toml(value: object) -> str:
    if isinstance(value, SecretStr):
        value = without_password(value.get_secret_value())
    elif isinstance(value, Enum):
        value = value.value
    elif isinstance(value, bytes):
        value = b64u_encode(value)
    if isinstance(value, BaseModel):
        pairs = (f"{key} = {_toml(getattr(value, key))}" for key in type(value).model_fields)
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's; DEL is the one character that TOML wants escaped besides.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
