"""Secure aggregation against Flower's SecAgg+, on the same machine, in one run.

    make setup-bench
    python -m benchmarks.secagg [--quick] --json FILE

Each side runs in a process of its own; sides alternate. The exact sum is checked on both. Ours is
the shipped code without HTTP, disk and journal, as the peer is driven in-process too; what the peer's
figures hold stands in `secagg_flower.py`.
"""  # noqa: E501 - one sentence

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from protocol import limits

limits.MAX_CELL = 128  # type: ignore[misc]  # one cell of 100, for the comparison alone

from benchmarks.report import (  # noqa: E402 - the limit above must stand before
    Row,
    add_options,
    as_markdown,
    in_own_process,
    write_report,
)

MODULE = "benchmarks.secagg"
PEER = "Flower SecAgg+"
PEER_PYTHON = Path(".venv-bench/bin/python")
PEER_SCRIPT = Path(__file__).with_name("secagg_flower.py")
FIGURE = Path("docs/images/secagg.png")
_MB = 1e6


def side(job: dict[str, Any]) -> dict[str, Any]:
    """What one process of ours measures; `job["do"]` says what."""
    do: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "mask": _mask,
        "share": _share,
        "unmask": _unmask,
        "limit": _limit,
        "crowd": _crowd,
        "bytes": _bytes,
        "growth": _growth,
    }
    return do[job["do"]](job)


def _mask(job: dict[str, Any]) -> dict[str, Any]:
    """One client from its bundle to its masked vector: open shares, encode, mask, digest."""
    import numpy as np

    from benchmarks import secagg_cells as sim
    from benchmarks.resident import ResidentPeak
    from privacy.fixed_point import encode
    from privacy.noise import SecureStream

    cell = sim.shared_cell(job["n"], job["d"], sim.masking_for(job["n"]))
    update = sim.update_of(job["d"], 1)
    times: list[float] = []
    peak = None
    # In memory as the peer's result is; in a file as the agent's is, where memory is the question.
    file: IO[bytes] = io.BytesIO(bytes(cell.plan.n_bytes))
    if job.get("file"):
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    for member in cell.members[: job["repeats"] + 1]:
        bundle = cell.server.bundle_for(member.identity)
        watch = ResidentPeak()
        began = time.perf_counter()
        plan = member.agent.receive_bundle(bundle)
        payload = encode(update, weight=1, plan=cell.plan, stream=SecureStream())
        file.seek(0)
        sim.mask_into(file, payload, plan, cell.plan)
        times.append(time.perf_counter() - began)
        if peak is None:
            peak = watch.above_bytes()
    file.seek(0)
    masked = np.frombuffer(bytearray(file.read()), cell.plan.dtype)
    file.close()
    # The masks come off again by the other ends' keys: what is left is the payload.
    from privacy.fixed_point import split_sum
    from privacy.masking import Mask, MaskAdder

    undone = masked
    MaskAdder(
        [Mask(seed=mask.seed, sign=-1 if mask.sign > 0 else 1) for mask in plan.masks],
        word_bits=16,
    ).add(undone)
    exact = np.array_equal(split_sum(undone, plan.checks, cell.plan, n_members=1), payload)
    return {"time_s": times[1:], "peak_bytes": peak, "exact": bool(exact)}


def _share(job: dict[str, Any]) -> dict[str, Any]:
    """One client from its roster to its sealed shares, all checks of the roster included."""
    from benchmarks import secagg_cells as sim
    from privacy.secagg.derive import ShareKind, agree, open_shares
    from privacy.shares import Rebuilder

    cell = sim.make_cell(job["n"], 10, sim.masking_for(job["n"]))
    times = []
    for member in cell.members[: job["repeats"] + 1]:
        began = time.perf_counter()
        shares = member.agent.receive_roster(cell.ready_list, cell.roster)
        times.append(time.perf_counter() - began)
    dealer = cell.members[0]
    shares = dealer.agent.receive_roster(cell.ready_list, cell.roster)
    found = {}
    for place, member in enumerate(cell.members[1 : cell.server.cell.threshold + 1]):
        secret = agree(
            member.agent.state.sealing_private_key, dealer.agent.state.ready.body.sealing_key
        )
        found[place + 2] = open_shares(
            secret,
            shares.ciphertexts[place],
            transcript=cell.server.cell.transcript,
            sender=dealer.identity,
            receiver=member.identity,
        )
    rebuilder = Rebuilder(tuple(found))
    exact = all(
        rebuilder.secret([pair[index] for pair in found.values()]) == secret
        for index, secret in (
            (0, dealer.agent.state.self_seed),
            (1, dealer.agent.state.masking_private_key),
        )
    )
    return {"time_s": times[1:], "exact": exact, "kinds": [kind.value for kind in ShareKind]}


def _unmask(job: dict[str, Any]) -> dict[str, Any]:
    """The server from the revealed shares to the checked sum, adding up the vectors included."""
    import numpy as np

    from aggregator_server.unmask import Unmasker
    from benchmarks import secagg_cells as sim

    times, exact = [], True
    size = job["cell"]
    for _ in range(job["repeats"]):
        taken = 0.0
        for _number in range(job["n"] // size):
            masking = sim.masking_for(size)
            n_drops = job["drop"] * size // job["n"]
            cell, vectors, total = sim.prepared(size, job["d"], n_drops, masking)
            found, time_s = sim.unmask(cell, vectors, Unmasker(job.get("processes", 1)))
            taken += time_s
            exact = exact and bool(np.array_equal(found, total))
        times.append(taken)
    return {"time_s": times, "exact": exact}


def _limit(job: dict[str, Any]) -> dict[str, Any]:
    """Expanding and adding one mask, against the bare cipher stream plus one addition."""
    import numpy as np
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CTR

    from privacy.masking import CHUNK_BYTES, Mask, MaskAdder

    n_words = job["d"]
    words, other = np.zeros(n_words, np.uint16), np.ones(n_words, np.uint16)
    key, zeros, buffer = os.urandom(32), bytes(CHUNK_BYTES), bytearray(CHUNK_BYTES)
    ours, bare = [], []
    for _ in range(job["repeats"] + 1):
        began = time.perf_counter()
        MaskAdder([Mask(seed=key, sign=1)], word_bits=16).add(words)
        ours.append(time.perf_counter() - began)
        began = time.perf_counter()
        cipher = Cipher(AES(key), CTR(bytes(16))).encryptor()
        for _chunk in range(0, 2 * n_words, CHUNK_BYTES):
            cipher.update_into(zeros, buffer)
        np.add(words, other, out=words)
        bare.append(time.perf_counter() - began)
    return {"ours_s": ours[1:], "bare_s": bare[1:]}


def _crowd(job: dict[str, Any]) -> dict[str, Any]:
    """A crowd in cells: drop-outs at every stage, late messages, exact or lost."""
    from benchmarks import secagg_cells as sim
    from privacy.secagg.cells import cell_sizes
    from protocol.blocks import CellMasking

    masking = CellMasking(max_change=0.02, clip_norm=1e6, cell_target=16, max_cell=31)
    rng = random.Random(job["seed"])  # noqa: S311 - who drops out, no secret
    began = time.process_time()
    results = [
        sim.crowd_cell(size, job["d"], masking, rng, 0.10)
        for size in cell_sizes(job["n"], masking.cell_target)
    ]
    finished = [result for result in results if result["lost"] is None]
    return {
        "n_cells": len(results),
        "n_lost": len(results) - len(finished),
        "lost": [result["lost"] for result in results if result["lost"] is not None],
        "n_gone": sum(result["n_gone"] for result in results),
        "exact": all(result["exact"] for result in finished),
        "cpu_s": time.process_time() - began,
    }


def _bytes(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes up of one client in all stages."""
    from benchmarks import secagg_cells as sim

    cell = sim.shared_cell(job["n"], job["d"], sim.masking_for(job["n"]))
    for member in cell.members:
        cell.take_bundle(member)
        cell.upload(member, bytes(32))
    cell.server.close_uploading()
    confirmed = cell.confirm(cell.members)
    if confirmed is None:
        raise RuntimeError("too few confirmed")
    cell.reveal(cell.members, confirmed)
    state = cell.members[0].agent.state
    messages = {
        "ready": state.ready,
        "shares": state.shares,
        "header": state.upload,
        "confirm": state.confirm,
        "reveal": state.reveal,
    }
    sizes = {name: len(message.canonical()) for name, message in messages.items() if message}
    sizes["vector"] = cell.plan.n_bytes
    return {
        "bytes": sizes,
        "per_parameter": cell.plan.n_bytes / job["d"],
        "total_per_parameter": sum(sizes.values()) / job["d"],
    }


def _growth(job: dict[str, Any]) -> dict[str, Any]:
    """How server and client time grow with d, and the server's with n at a fixed cell size."""
    from aggregator_server.unmask import Unmasker
    from benchmarks import secagg_cells as sim
    from privacy.fixed_point import encode
    from privacy.noise import SecureStream

    size, found = 16, {"d": [], "n": []}
    masking = sim.masking_for(size)
    for d in job["ds"]:
        cell, vectors, _ = sim.prepared(size, d, 2, masking)
        server_s = min(sim.unmask(cell, vectors, Unmasker())[1] for _ in range(3))
        member = cell.members[-1]
        plan, update = member.agent.mask_plan(), sim.update_of(d, 1)
        with tempfile.TemporaryFile() as file:
            began = time.perf_counter()
            payload = encode(update, weight=1, plan=cell.plan, stream=SecureStream())
            sim.mask_into(file, payload, plan, cell.plan)
            client_s = time.perf_counter() - began
        found["d"].append({"d": d, "server_s": server_s, "client_s": client_s})
        del vectors
    for n in job["ns"]:
        server_s = 0.0
        for _ in range(n // size):
            cell, vectors, _ = sim.prepared(size, 100_000, 2, masking)
            server_s += sim.unmask(cell, vectors, Unmasker())[1]
        found["n"].append({"n": n, "server_s": server_s})
    return found


def peer(*arguments: str) -> dict[str, Any]:
    """Run Flower's side."""
    done = subprocess.run(
        [str(PEER_PYTHON), str(PEER_SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        msg = f"the peer failed on {arguments}: {done.stderr.strip()[-800:]}"
        raise RuntimeError(msg)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(*, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """All rows.

    Args:
        quick: Small sizes, for trying.
    """
    d, n, runs = (200_000, 20, 1) if quick else (10_000_000, 100, 3)
    details: dict[str, Any] = {}

    def say(text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)

    def ours(**job: object) -> dict[str, Any]:
        say(f"ours: {job}")
        result: dict[str, Any] = in_own_process(MODULE, job)
        details.setdefault("ours", []).append({**job, **result})
        if result.get("exact") is False:
            msg = f"a sum of ours is not exact: {job}"
            raise RuntimeError(msg)
        return result

    def theirs(*arguments: object) -> dict[str, Any]:
        say(f"peer: {arguments}")
        result = peer(*(str(argument) for argument in arguments))
        details.setdefault("peer", []).append(result)
        if result.get("exact") is False:
            msg = f"a sum of the peer's is not exact: {arguments}"
            raise RuntimeError(msg)
        return result

    mask = ours(do="mask", n=10, d=d, repeats=runs)
    mask_peer = theirs("mask", "--n", 10, "--d", d, "--repeats", runs)
    share = ours(do="share", n=n, repeats=runs)
    share_peer = theirs("share", "--n", n, "--repeats", runs)
    unmasked = {}
    for drop in (0, n // 10):
        d_server = d // 100
        unmasked[drop] = {
            "whole": ours(do="unmask", n=n, cell=n, d=d_server, drop=drop, repeats=runs),
            "cells": ours(do="unmask", n=n, cell=10, d=d_server, drop=drop, repeats=runs),
            "peer": theirs("unmask", "--n", n, "--d", d_server, "--drop", drop),
        }
    size = ours(do="bytes", n=10, d=d)
    size_peer = theirs("bytes", "--n", 10, "--d", d)
    limit = ours(do="limit", d=2 * d, repeats=5 * runs)
    crowds = [
        ours(do="crowd", n=10 * n, d=d // 100, seed=seed) for seed in range(1, 1 + min(2, runs))
    ]
    large = ours(do="mask", n=10, d=2 * d, repeats=runs, file=True)
    ds = [d // 100, d // 10, d // 2, d, 2 * d]
    growth = ours(do="growth", ds=ds, ns=[16, 32, 64, 128, 256])

    def rate(time_s: list[float], target: float, what: str, peers: list[float]) -> Row:
        # One figure of the peer's stands for all of its runs where a run takes minutes.
        repeated = peers if len(peers) == len(time_s) else peers * len(time_s)
        return Row.of(what, time_s, repeated, peer_name=PEER, unit="s", target=target)

    rows = [
        rate(mask["time_s"], 1 / 10, f"client masking, n = 10, d = {d:,}", mask_peer["time_s"]),
        Row.of(
            "its peak memory above what stood",
            [mask["peak_bytes"] / _MB],
            [mask_peer["peak_bytes"]["sampled"] / _MB],
            peer_name=PEER,
            unit="MB",
            target=1 / 4,
        ),
        rate(share["time_s"], 1 / 20, f"client key sharing, n = {n}", share_peer["time_s"]),
        *(
            rate(
                found[kind]["time_s"],
                1 / 100,
                f"server unmask, n = {n} as {name}, d = {d // 100:,}, {drop} dropped",
                found["peer"]["time_s"],
            )
            for drop, found in unmasked.items()
            for kind, name in (("whole", "one cell"), ("cells", f"{n // 10} cells of 10"))
        ),
        Row.of(
            "bytes up for each parameter, the masked vector",
            [size["per_parameter"]],
            [size_peer["masked_bytes_per_parameter"]],
            peer_name=PEER,
            unit="B",
            target=2.1 / 8,
        ),
        Row.of(
            f"expand and add one mask, {2 * d:,} words of 16 bits",
            limit["ours_s"],
            limit["bare_s"],
            peer_name="AES-256-CTR stream plus one numpy add",
            unit="s",
            target=1.5,
        ),
        Row.of(
            f"masking {2 * d:,} values: peak memory above what stood",
            [large["peak_bytes"] / 2**20],
            None,
            peer_name="a limit of 64 MiB beside the stored vector",
            unit="MiB",
        ),
        Row.of(
            f"{10 * n:,} agents in cells of 16, 10 % vanish: cells lost, of {crowds[0]['n_cells']}",
            [float(crowd["n_lost"]) for crowd in crowds],
            None,
            peer_name="every finished cell exact",
            unit="cells",
        ),
        Row.of(
            "the same, all agents and the server on one core",
            [crowd["cpu_s"] for crowd in crowds],
            None,
            peer_name="",
            unit="CPU s",
        ),
    ]
    details["growth"] = growth
    return rows, details


def draw(growth: dict[str, Any], target: Path) -> None:
    """The cost as d and n grow.

    Args:
        growth: From the benchmark.
        target: A PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ds = [row["d"] for row in growth["d"]]
    for key, name in (("server_s", "server, cell of 16, 2 dropped"), ("client_s", "client")):
        left.loglog(ds, [row[key] for row in growth["d"]], marker="o", label=name)
    last = growth["d"][-1]
    left.loglog(
        ds,
        [last["server_s"] * d / last["d"] for d in ds],
        linestyle=":",
        color="grey",
        label="linear",
    )
    left.set_xlabel("parameters d")
    left.set_ylabel("seconds")
    ns = [row["n"] for row in growth["n"]]
    right.plot(ns, [row["server_s"] for row in growth["n"]], marker="o", label="server")
    end = growth["n"][-1]
    right.plot(ns, [end["server_s"] * n / end["n"] for n in ns], ":", color="grey", label="linear")
    right.set_xlabel("agents n, cells of 16, d = 100,000")
    right.set_ylabel("seconds")
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table for a page")
    parser.add_argument("--figure", type=Path, default=None, help="draw cost by d and n here")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(side(json.loads(args.job))))
        return
    if not PEER_PYTHON.exists():
        parser.error("the peer is not installed: make setup-bench")
    rows, details = measure(quick=args.quick)
    write_report(rows, module=MODULE, json_target=args.json, details=details)
    if args.markdown is not None:
        args.markdown.write_text(as_markdown(rows), encoding="utf-8")
    if args.figure is not None:
        draw(details["growth"], args.figure)


if __name__ == "__main__":
    main()
