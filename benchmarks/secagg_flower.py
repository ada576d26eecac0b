"""The peer's side of the benchmark of masked sums: Flower's SecAgg+ in one process, no network.

Run it from the peers' environment, `make setup-bench`; it imports nothing of Sheepfold:

    .venv-bench/bin/python benchmarks/secagg_flower.py mask --n 10 --d 10000000 --repeats 3

Nothing of the protocol is written here. The server is `SecAggPlusWorkflow`: its `setup_stage`,
`share_keys_stage`, `collect_masked_vectors_stage` and `unmask_stage` run one after the other, as
its `__call__` has them. Each client is `secaggplus_mod` with a `Context` of its own. Between them
stands `Grid`, which hands the workflow's messages to the mod and the replies back. `num_shares` is
n, so everyone is everyone's neighbour. What is on the clock:

- `mask`: one call of `secaggplus_mod` in its stage "collect_masked_vectors": `decrypt` of the key
  shares, `parameters_to_ndarrays`, `parameters_multiply`, `quantize`; `pseudo_rand_gen` for the
  private mask and, after `generate_shared_key`, for each neighbour; `parameters_addition` or
  `parameters_subtraction` of each mask; `parameters_mod`, `ndarray_to_bytes`. The update, one
  float32 vector, lies there serialised before.
- `share`: one call of `secaggplus_mod` in its stage "share_keys": `create_shares` of the seed and
  of the private key, then `generate_shared_key` and `encrypt` for each other client. Apart from
  it, as `setup_time_s`, one call in its stage "setup": two times `generate_key_pairs`.
- `unmask`: `SecAggPlusWorkflow.unmask_stage` from the moment when the clients' shares have come
  back to the moment when it calls `Strategy.aggregate_fit`: `combine_shares` for every client;
  `pseudo_rand_gen` for every survivor and, after `generate_shared_key`, for every pair of a dropped
  client and a neighbour; `parameters_addition` or `parameters_subtraction` of each mask;
  `parameters_mod`, `factor_extract`, `dequantize`, `ndarrays_to_parameters`. The clients' answers
  and the strategy's own mean are not counted. Dropped clients have shared their keys and send no
  vector.
- `bytes`: no clock. A whole round; one client's replies are deflated into the objects that Flower
  pushes over the network, with `get_all_nested_objects` and `deflate`.

`parts_s` is the time within those functions in the same runs as `time_s`, summed over calls: a
timed wrapper stands where their caller looks them up. So it does for `factor_combine`, whose result
is the weight and the quantised vector before any mask: what `exact` compares with.
"""

import argparse
import copy
import gc
import json
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

MODULUS: Final = 2**32
"""Flower's default `modulus_range`; all other settings of the workflow are its defaults as well."""
N_EXAMPLES: Final = 1000
"""Of each client; Flower's default `max_weight`, so the weight is the largest that is allowed."""
SAMPLE_EVERY_S: Final = 0.002

CLIENT_PARTS: Final = {
    "mask": (
        "decrypt",
        "parameters_to_ndarrays",
        "parameters_multiply",
        "quantize",
        "generate_shared_key",
        "pseudo_rand_gen",
        "parameters_addition",
        "parameters_subtraction",
        "parameters_mod",
        "ndarray_to_bytes",
    ),
    "share": ("create_shares", "generate_shared_key", "encrypt"),
}
SERVER_PARTS: Final = (
    "combine_shares",
    "generate_shared_key",
    "pseudo_rand_gen",
    "parameters_addition",
    "parameters_subtraction",
    "parameters_mod",
    "dequantize",
    "ndarrays_to_parameters",
)


def import_flower() -> tuple[SimpleNamespace, float]:
    """What this needs of Flower, and the seconds that importing it took, numpy not counted."""
    began = time.perf_counter()
    names = {
        # The package exports a function of the module's own name, hence `import_module`.
        "mod": "flwr.client.mod.secure_aggregation.secaggplus_mod",
        "workflow": "flwr.server.workflow.secure_aggregation.secaggplus_workflow",
        "constants": "flwr.common.secure_aggregation.secaggplus_constants",
        "keys": "flwr.server.workflow.constant",
        "utils": "flwr.common.secure_aggregation.secaggplus_utils",
        "shamir": "flwr.common.secure_aggregation.crypto.shamir",
        "symmetric": "flwr.common.secure_aggregation.crypto.symmetric_encryption",
        "asymmetric": "flwr.supercore.primitives.asymmetric",
        "inflatable": "flwr.supercore.inflatable.inflatable_object",
        "identity": "flwr.supercore.task_identity",
        "compat": "flwr.compat.common.recorddict_compat",
        "legacy": "flwr.server.compat.legacy_context",
        "manager": "flwr.server.client_manager",
        "app": "flwr.app",
        "common": "flwr.common",
    }
    flower = SimpleNamespace(**{name: import_module(path) for name, path in names.items()})
    imports_s = time.perf_counter() - began
    # It would log stages that are held back on purpose as failed; `Round.run` checks the others.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    # What Flower's launcher tells the server's process: who it is.
    identity = flower.identity.TaskIdentity
    identity.task_id, identity.run_id, identity.node_id = 1, 1, 1
    return flower, imports_s


@contextmanager
def watched(
    module: ModuleType, names: Iterable[str], seen: Callable[[str, float, Any], None]
) -> Iterator[None]:
    """Report every call that a module makes of functions it has imported.

    Args:
        module: The caller.
        names: The functions, by their names in it.
        seen: Is told the name, the seconds, and what was returned.
    """
    originals = {name: getattr(module, name) for name in names}

    def wrapped(name: str) -> Callable[..., Any]:
        @wraps(originals[name])
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            returned = originals[name](*args, **kwargs)
            seen(name, time.perf_counter() - began, returned)
            return returned

        return call

    try:
        for name in originals:
            setattr(module, name, wrapped(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


class Parts:
    """Seconds within each function of Flower, one entry for each run."""

    def __init__(self) -> None:
        """Nothing has run yet."""
        self.runs: list[dict[str, float]] = []

    def begin(self) -> None:
        """What is seen from now on belongs to the next run."""
        self.runs.append({})

    def __call__(self, name: str, seconds: float, _returned: Any) -> None:
        """One call was seen."""
        run = self.runs[-1]
        run[name] = run.get(name, 0.0) + seconds


class Peak:
    """Peak of the resident set while the context is open, above what stood when it was opened.

    Taken twice: by a thread that samples it, which cannot while a function of C holds the
    interpreter's lock, and from the process's high-water mark, which Linux lets us reset.
    """

    def __enter__(self) -> Self:
        """Forget earlier peaks, and take what stands."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._most = self._standing = _resident_bytes()
        self._high_water_before = _high_water_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_EVERY_S):
            self._most = max(self._most, _resident_bytes())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Take the peaks."""
        high_water = _high_water_bytes()
        self._done.set()
        self._thread.join()
        self.bytes = {
            "sampled": self._most - self._standing,
            # A large parent leaves its own mark to us, and no reset removes that.
            "maxrss": (
                high_water - self._standing if high_water > self._high_water_before else None
            ),
        }


def _resident_bytes() -> int:
    with Path("/proc/self/statm").open("rb") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _high_water_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Grid:
    """Takes messages to the simulated clients and brings their replies, as Flower's Grid does.

    Attributes:
        dropped: Clients who no longer answer.
        held: Nobody answers: messages stay in `outbox`, for `answer`.
        outbox: The latest messages, by the client they go to.
        returned_at: When the latest replies were handed over: seconds of the clock and of the CPU.
        replies_of: A client whose replies are kept, by stage.
        replies: Those.
    """

    def __init__(self, flower: SimpleNamespace, node_ids: Sequence[int], d: int) -> None:
        """Clients without any state yet; each has an update of `d` numbers of its own."""
        self.dropped: set[int] = set()
        self.held = False
        self.outbox: dict[int, Any] = {}
        self.returned_at = (0.0, 0.0)
        self.replies_of: int | None = None
        self.replies: dict[str, Any] = {}
        self._flower = flower
        self._d = d
        self._order = {node_id: index for index, node_id in enumerate(node_ids)}
        self._contexts = {node_id: self.fresh_context(node_id) for node_id in node_ids}

    def fresh_context(self, node_id: int) -> Any:
        """The context of a client who has taken part in nothing."""
        app = self._flower.app
        return app.Context(
            run_id=1, node_id=node_id, node_config={}, state=app.RecordDict(), run_config={}
        )

    def send_and_receive(
        self, messages: Iterable[Any], *, timeout: float | None = None
    ) -> list[Any]:
        """The workflow calls this."""
        del timeout
        self.outbox = {message.metadata.dst_node_id: message for message in messages}
        replies = []
        for node_id, message in self.outbox.items():
            if self.held or node_id in self.dropped:
                continue
            delivered = self.delivered(message)
            config = delivered.content[self._flower.constants.RECORD_KEY_CONFIGS]
            stage = config[self._flower.constants.Key.STAGE]
            replies.append(self.answer(delivered))
            if node_id == self.replies_of:
                self.replies[stage] = replies[-1]
        self.returned_at = (time.perf_counter(), time.process_time())
        return replies

    def delivered(self, message: Any) -> Any:
        """The message with records of its own: the mod takes entries out of what it is given."""
        app = self._flower.app
        records = {name: record.copy() for name, record in message.content.items()}
        return app.Message(content=app.RecordDict(records), metadata=message.metadata)

    def answer(
        self, delivered: Any, *, parameters: Any = None, context: Any = None, state: Any = None
    ) -> Any:
        """One client's reply, by Flower's mod.

        Args:
            delivered: What it was sent.
            parameters: Its update; made here when None.
            context: Its context; None: the one it has.
            state: What it remembers of the protocol; None: what its context says.
        """
        node_id = delivered.metadata.dst_node_id
        if context is None:
            context = self._contexts[node_id]
        if state is not None:
            context.state[self._flower.constants.RECORD_KEY_STATE] = state

        def train(message: Any, _context: Any) -> Any:
            flower = self._flower
            result = flower.common.FitRes(
                status=flower.common.Status(flower.common.Code.OK, ""),
                parameters=self.update(node_id) if parameters is None else parameters,
                num_examples=N_EXAMPLES,
                metrics={},
            )
            content = flower.compat.fitres_to_recorddict(result, keep_input=True)
            return flower.app.Message(content, reply_to=message)

        return self._flower.mod.secaggplus_mod(delivered, context, train)

    def update(self, node_id: int) -> Any:
        """A client's update as its training hands it to the mod: one float32 vector, serialised."""
        rng = np.random.default_rng(self._order[node_id])
        vector = rng.standard_normal(self._d, dtype=np.float32)
        return self._flower.common.ndarrays_to_parameters([vector])

    def states(self) -> dict[int, Any]:
        """What every client remembers of the protocol; the mod replaces it and never changes it."""
        key = self._flower.constants.RECORD_KEY_STATE
        return {node_id: context.state[key] for node_id, context in self._contexts.items()}

    def restore(self, states: dict[int, Any]) -> None:
        """Put back what `states` returned."""
        key = self._flower.constants.RECORD_KEY_STATE
        for node_id, state in states.items():
            self._contexts[node_id].state[key] = state


class Round:
    """A round of Flower's workflow among n simulated clients.

    Attributes:
        node_ids: Random 63-bit numbers, as Flower's are.
        grid: Who carries messages.
        unmask_s: Seconds of the clock and of the CPU in the server's latest unmasking.
        state: What the workflow knows of the round.
    """

    def __init__(self, flower: SimpleNamespace, *, n: int, d: int, threshold: int) -> None:
        """Nothing has been sent yet."""
        self._flower = flower
        rng = np.random.default_rng(0)
        self.node_ids = [int(number) for number in rng.integers(1, 2**63, size=n)]
        self.grid = Grid(flower, self.node_ids, d)
        self.unmask_s = (0.0, 0.0)
        self._workflow = flower.workflow.SecAggPlusWorkflow(
            num_shares=n, reconstruction_threshold=threshold
        )
        self.state = flower.workflow.WorkflowState()
        self._context = self._server_context(n)

    def _server_context(self, n: int) -> Any:
        flower = self._flower
        manager = flower.manager.SimpleClientManager()
        for node_id in self.node_ids:
            manager.register(SimpleNamespace(cid=str(node_id), node_id=node_id))
        context = flower.legacy.LegacyContext(
            self.grid.fresh_context(1),
            strategy=flower.legacy.FedAvg(min_fit_clients=n, min_available_clients=n),
            client_manager=manager,
        )
        # Where `unmask_stage` ends and the strategy begins.
        context.strategy.aggregate_fit = self._stop_clock
        start = flower.common.ndarrays_to_parameters([np.zeros(1, np.float32)])
        context.state[flower.keys.MAIN_PARAMS_RECORD] = flower.compat.parameters_to_arrayrecord(
            start, keep_input=True
        )
        context.state[flower.keys.MAIN_CONFIGS_RECORD] = flower.app.ConfigRecord(
            {flower.keys.Key.CURRENT_ROUND: 1}
        )
        return context

    def _stop_clock(self, *_: Any) -> tuple[None, dict[str, Any]]:
        began, cpu_began = self.grid.returned_at
        self.unmask_s = (time.perf_counter() - began, time.process_time() - cpu_began)
        return None, {}

    def run(self, *stages: str) -> None:
        """Run stages of the workflow; all must succeed."""
        for stage in stages:
            assert getattr(self._workflow, stage)(self.grid, self._context, self.state), stage

    def messages_of(self, stage: str) -> dict[int, Any]:
        """What the workflow sends in a stage, by receiver; nobody gets it: the round ends here."""
        self.grid.held = True
        getattr(self._workflow, stage)(self.grid, self._context, self.state)
        return self.grid.outbox

    def collect(self) -> list[NDArray[np.int64]]:
        """Run the stage of masked vectors.

        Returns:
            The true sum modulo the modulus: of the weights, and of the quantised vectors.
        """
        sums: list[NDArray[np.int64]] = []

        def add(_name: str, _seconds: float, quantised: list[NDArray[Any]]) -> None:
            if not sums:
                sums.extend(np.zeros(part.shape, np.int64) for part in quantised)
            for total, part in zip(sums, quantised, strict=True):
                np.add(total, part, out=total)

        with watched(self._flower.mod, ["factor_combine"], add):
            self.run("collect_masked_vectors_stage")
        return [total % MODULUS for total in sums]

    def unmask(self, seen: Callable[[str, float, Any], None]) -> list[NDArray[np.int64]]:
        """Run the server's last stage; its time is then in `unmask_s`.

        Args:
            seen: Is told of the calls of `SERVER_PARTS`.

        Returns:
            As `collect`, but as the server found it.
        """
        found: list[NDArray[np.int64]] = []

        def keep(_name: str, _seconds: float, extracted: tuple[Any, list[Any]]) -> None:
            factor, vectors = extracted
            found[:] = [np.array([factor], np.int64), *vectors]

        with ExitStack() as stack:
            stack.enter_context(watched(self._flower.workflow, SERVER_PARTS, seen))
            stack.enter_context(watched(self._flower.workflow, ["factor_extract"], keep))
            self.run("unmask_stage")
        return found


def _same(some: Sequence[NDArray[Any]], other: Sequence[NDArray[Any]]) -> bool:
    return len(some) == len(other) and all(map(np.array_equal, some, other))


def _clocked(run: Callable[[], Any]) -> tuple[float, float, Any]:
    gc.collect()
    began, cpu_began = time.perf_counter(), time.process_time()
    returned = run()
    return time.perf_counter() - began, time.process_time() - cpu_began, returned


def measure_mask(flower: SimpleNamespace, *, n: int, d: int, threshold: int, repeats: int) -> Any:
    """One client's stage of masked vectors."""
    round_ = Round(flower, n=n, d=d, threshold=threshold)
    round_.run("setup_stage", "share_keys_stage")
    client = round_.node_ids[0]
    message = round_.messages_of("collect_masked_vectors_stage")[client]
    states = round_.grid.states()
    parameters = round_.grid.update(client)

    def stage() -> Any:
        return round_.grid.answer(
            round_.grid.delivered(message), parameters=parameters, state=states[client]
        )

    with Peak() as peak:
        stage()
    times, cpu_times, parts = [], [], Parts()
    quantised: list[Any] = []
    reply = None
    for _ in range(repeats):
        parts.begin()
        reply = None
        quantised.clear()
        with ExitStack() as stack:
            stack.enter_context(watched(flower.mod, CLIENT_PARTS["mask"], parts))
            stack.enter_context(
                watched(flower.mod, ["factor_combine"], lambda *seen: quantised.append(seen[2]))
            )
            seconds, cpu_seconds, reply = _clocked(stage)
        times.append(seconds)
        cpu_times.append(cpu_seconds)
    record = reply.content[flower.constants.RECORD_KEY_CONFIGS]
    masked = [
        flower.common.bytes_to_ndarray(part)
        for part in record[flower.constants.Key.MASKED_PARAMETERS]
    ]
    recovered = _without_masks(flower, masked, client, states)
    return {
        "time_s": times,
        "cpu_s": cpu_times,
        "parts_s": parts.runs,
        "peak_bytes": peak.bytes,
        "exact": _same(recovered, [part.astype(np.int64) % MODULUS for part in quantised[-1]]),
        "notes": [
            "time_s goes from the serialised float32 update to the serialised int64 masked vector",
            "peak_bytes is of one more call, before the timed ones; the serialised update stood",
            "pseudo_rand_gen is Mersenne Twister, seeded with the seed or key folded to 32 bits",
            "exact: masks from the neighbours' private keys come off and leave what was quantised",
        ],
    }


def _without_masks(
    flower: SimpleNamespace, masked: list[NDArray[Any]], client: int, states: dict[int, Any]
) -> list[NDArray[Any]]:
    """Take a client's masks off, with the keys of the other end of each pair."""
    own = states[client]
    signs = {own["rd_seed"]: -1}
    for node_id, state in states.items():
        if node_id != client:
            key = flower.symmetric.generate_shared_key(
                flower.asymmetric.bytes_to_private_key(state["sk1"]),
                flower.asymmetric.bytes_to_public_key(own["pk1"]),
            )
            signs[key] = -1 if client > node_id else 1
    for seed, sign in signs.items():
        mask = flower.utils.pseudo_rand_gen(seed, MODULUS, [part.shape for part in masked])
        masked = [part + sign * of_mask for part, of_mask in zip(masked, mask, strict=True)]
    return [part % MODULUS for part in masked]


def measure_share(flower: SimpleNamespace, *, n: int, threshold: int, repeats: int) -> Any:
    """One client's stages of keys and of shares."""
    round_ = Round(flower, n=n, d=1, threshold=threshold)
    grid = round_.grid
    client = round_.node_ids[0]
    round_.run("setup_stage")
    hello = grid.outbox[client]
    setup_times = [
        _clocked(lambda: grid.answer(grid.delivered(hello), context=grid.fresh_context(client)))[0]
        for _ in range(repeats)
    ]
    states = grid.states()
    message = round_.messages_of("share_keys_stage")[client]

    def stage() -> Any:
        return grid.answer(grid.delivered(message), state=states[client])

    times, cpu_times, parts = [], [], Parts()
    reply = None
    for _ in range(repeats):
        parts.begin()
        with watched(flower.mod, CLIENT_PARTS["share"], parts):
            seconds, cpu_seconds, reply = _clocked(stage)
        times.append(seconds)
        cpu_times.append(cpu_seconds)
    sent = reply.content[flower.constants.RECORD_KEY_CONFIGS]
    own = grid.states()[client]
    keys = dict(zip(own["ss2_dict:K"], own["ss2_dict:V"], strict=True))
    opened = [
        flower.utils.share_keys_plaintext_separate(flower.symmetric.decrypt(keys[to], text))
        for to, text in zip(
            sent[flower.constants.Key.DESTINATION_LIST],
            sent[flower.constants.Key.CIPHERTEXT_LIST],
            strict=True,
        )
    ][:threshold]
    seed = flower.shamir.combine_shares([share for _, _, share, _ in opened])
    private_key = flower.shamir.combine_shares([share for *_, share in opened])
    return {
        "time_s": times,
        "cpu_s": cpu_times,
        "parts_s": parts.runs,
        "setup_time_s": setup_times,
        "secrets_bytes": {"rd_seed": len(own["rd_seed"]), "sk1": len(own["sk1"])},
        "exact": seed == own["rd_seed"] and private_key == own["sk1"],
        "notes": [
            "sk1 is shared as its PEM text, 16 bytes at a time",
            "create_shares has threads, but its arithmetic is in Python: one runs at a time",
            "exact: shares of as many others as the threshold, decrypted, give both secrets back",
        ],
    }


def measure_unmask(
    flower: SimpleNamespace, *, n: int, d: int, drop: int, threshold: int, repeats: int
) -> Any:
    """The server's last stage."""
    round_ = Round(flower, n=n, d=d, threshold=threshold)
    round_.run("setup_stage", "share_keys_stage")
    round_.grid.dropped = set(round_.node_ids[:drop])
    true = round_.collect()
    state, states = round_.state, round_.grid.states()
    times, cpu_times, parts, exact = [], [], Parts(), []
    for _ in range(repeats):
        # The stage uses up both.
        round_.state = copy.deepcopy(state)
        round_.grid.restore(states)
        parts.begin()
        exact.append(_same(round_.unmask(parts), true))
        times.append(round_.unmask_s[0])
        cpu_times.append(round_.unmask_s[1])
    return {
        "time_s": times,
        "cpu_s": cpu_times,
        "parts_s": parts.runs,
        "exact": all(exact),
        "notes": [
            "the n clients' sharing and masking before it is Flower's own too, and not counted",
            "combine_shares interpolates in Python, over all shares that came, needed or not",
            "of a dropped client all n - 1 pairs are made; those with other dropped ones cancel",
            "exact: weights and vectors sum, modulo 2^32, to what the survivors had before masking",
        ],
    }


def measure_bytes(flower: SimpleNamespace, *, n: int, d: int, threshold: int) -> Any:
    """What one client uploads in a round."""
    round_ = Round(flower, n=n, d=d, threshold=threshold)
    round_.grid.replies_of = round_.node_ids[0]
    round_.run("setup_stage", "share_keys_stage")
    true = round_.collect()
    exact = _same(round_.unmask(lambda *_: None), true)
    replies = round_.grid.replies
    record = replies[flower.constants.Stage.COLLECT_MASKED_VECTORS].content[
        flower.constants.RECORD_KEY_CONFIGS
    ]
    masked = record[flower.constants.Key.MASKED_PARAMETERS]
    n_bytes = {stage: _wire_bytes(flower, reply) for stage, reply in replies.items()}
    return {
        "masked_bytes_per_parameter": sum(map(len, masked)) / d,
        "masked_dtypes": [str(flower.common.bytes_to_ndarray(part).dtype) for part in masked],
        "upload_bytes": n_bytes,
        "upload_total_bytes": sum(n_bytes.values()),
        "exact": exact,
        "notes": [
            "upload_bytes are each reply's deflated objects, without the requests they travel in",
            "the first part of the masked vector is the weight, one number",
            "exact: as for unmask",
        ],
    }


def _wire_bytes(flower: SimpleNamespace, message: Any) -> int:
    with flower.inflatable.no_object_id_recompute():
        objects = flower.inflatable.get_all_nested_objects(message)
        return sum(len(thing.deflate()) for thing in objects.values())


MEASURES: Final[dict[str, Callable[..., Any]]] = {
    "mask": measure_mask,
    "share": measure_share,
    "unmask": measure_unmask,
    "bytes": measure_bytes,
}


def default_threshold(n: int) -> int:
    """⌊(n + 20) / 2⌋ + 1 shares recover a secret; where n has not so many, above two thirds."""
    threshold = (n + 20) // 2 + 1
    return threshold if threshold < n else 2 * n // 3 + 1


def main() -> None:
    """Read the command line, measure, and print one JSON document."""
    parser = argparse.ArgumentParser(description="Flower's SecAgg+ in one process.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, n, d, repeats in (
        ("mask", 10, 10_000_000, 3),
        ("share", 100, None, 5),
        ("unmask", 100, 100_000, 1),
        ("bytes", 10, 10_000_000, None),
    ):
        command = commands.add_parser(name, help=MEASURES[name].__doc__)
        command.add_argument("--n", type=int, default=n, help="clients")
        command.add_argument("--threshold", type=int, help="shares that recover a secret")
        if d is not None:
            command.add_argument("--d", type=int, default=d, help="length of a vector")
        if repeats is not None:
            command.add_argument("--repeats", type=int, default=repeats)
        if name == "unmask":
            command.add_argument("--drop", type=int, default=0, help="clients without a vector")
    parameters = vars(parser.parse_args())
    command = parameters.pop("command")
    parameters["threshold"] = parameters["threshold"] or default_threshold(parameters["n"])
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    flower, imports_s = import_flower()
    report = {
        "peer": "flwr SecAgg+",
        "version": metadata.version("flwr"),
        "command": command,
        **parameters,
        "imports_s": imports_s,
        **MEASURES[command](flower, **parameters),
    }
    json.dump(report, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
