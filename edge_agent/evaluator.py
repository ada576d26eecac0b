"""The trusted evaluator: scores candidates on the operator's records before they are published.

It is no member of the federation: it trains nothing and sends no update. Its key stands in the
federation's manifest, and its signed report is what every agent looks for in a release. It keeps
nothing but its key and the manifest that it met first; whatever was asked while it was away is
asked again.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from edge_agent.chain import check_discovery, check_evaluation_task
from edge_agent.data.records import UNCATEGORIZED, Record
from edge_agent.data.tokens import tokenize
from edge_agent.durable import write_durably
from edge_agent.errors import EvaluationError, JournalError, RefusedError, TrustError
from edge_agent.evaluation import held_out_loss
from edge_agent.home import AgentHome
from edge_agent.private import record_bytes
from edge_agent.transport import Transport
from protocol.blocks import EvaluatorGate
from protocol.chain import BlobRef
from protocol.checks import Check
from protocol.errors import ProtocolError
from protocol.gating import EvaluationReport, objection
from protocol.limits import LONG_POLL_S, MAX_CATEGORIES, MAX_CATEGORY_CHARS
from protocol.manifest import FederationManifest
from protocol.messages import EvaluationTask
from protocol.problems import Advice
from protocol.signing import Signed, Signer, format_fingerprint, sign
from protocol.wire import b64u_encode, parse, sha256
from quant.adapter import adapter_shapes, from_safetensors
from quant.base_model import LoadedBase
from quant.errors import AdapterError
from quant.lora import AdaptedModel

_PINNED: Final = "federation.json"
Losses = Mapping[str, float]
"""By category, in nats per token; empty where a loss is not finite."""


def pin_federation(home: AgentHome, transport: Transport, signer: Signer) -> FederationManifest:
    """The manifest of the server's federation, kept from the first time on.

    Args:
        home: Where it is kept.
        transport: To the server; addresses the federation afterwards.
        signer: The evaluator's key.

    Raises:
        TrustError: The signature does not hold, the federation is another one than before, or it
            names another evaluator.
        TransportError: The server cannot be reached.
        JournalError: What was kept cannot be read.
    """
    path = home.root / _PINNED
    signed = transport.discover()
    manifest = check_discovery(signed, None)
    if path.exists():
        try:
            known = parse(Signed[FederationManifest], path.read_bytes()).body
        except (OSError, ProtocolError) as error:
            msg = f"{path} is damaged; remove it to trust the server's federation anew"
            raise JournalError(msg) from error
        if known.digest() != manifest.digest():
            msg = (
                f"the server shows another federation than the one kept in {path}, whose server "
                f"has the key {format_fingerprint(known.server)}; use another --home"
            )
            raise TrustError(msg, Check.FOREIGN_SIGNATURE)
    gate = manifest.gate
    if not isinstance(gate, EvaluatorGate) or gate.evaluator != signer.identity:
        named = (
            "nobody" if not isinstance(gate, EvaluatorGate) else format_fingerprint(gate.evaluator)
        )
        msg = (
            f"this federation's evaluator is {named}, not this key "
            f"({b64u_encode(signer.identity)}): give --evaluator to `sheepfold-server init`"
        )
        raise TrustError(msg)
    if not path.exists():
        write_durably(path, signed.federation.canonical())
    transport.use_federation(manifest)
    return manifest


class Evaluator:
    """Answers what the server asks about candidates.

    Guarantees:
        1. What it signs are losses on its own records of the very bytes that it names.
        2. A candidate that cannot be used, or whose loss is not finite, is reported as such.
        3. No record, prompt or answer leaves the machine: a report holds the categories' names,
           their sizes and their mean losses.

    Args:
        home: Downloads go to its cache, and are removed after each report.
        manifest: From `pin_federation`.
        transport: To the server, with the evaluator's key.
        signer: That key.
        base: The federation's; its fingerprint has been checked.
        records: What candidates are scored on.
        say: Told what happens, in words.

    Raises:
        DataError: No record can be used.
        EvaluationError: Too many categories, or one with too long a name.
    """

    def __init__(
        self,
        *,
        home: AgentHome,
        manifest: FederationManifest,
        transport: Transport,
        signer: Signer,
        base: LoadedBase,
        records: Sequence[Record],
        say: Callable[[str], None],
    ) -> None:
        """Tokenise the records; nothing is asked yet."""
        block = manifest.training
        data = tokenize(
            records,
            base.tokenizer,
            template=block.template,
            loss_on=block.loss_on,
            max_length=block.max_length,
        )
        self._examples = data.examples
        self._home = home
        self._manifest = manifest
        self._transport = transport
        self._signer = signer
        self._say = say
        self._shapes = adapter_shapes(base.description, manifest.lora)
        self._adapted = AdaptedModel(base, manifest.lora)
        self._pad_id = base.pad_id
        self._data = sha256(b"".join(sha256(record) for record in record_bytes(records)))
        counts: dict[str, int] = {}
        for example in self._examples:
            name = example.category or UNCATEGORIZED
            counts[name] = counts.get(name, 0) + 1
        self._counts = dict(sorted(counts.items()))
        longest = max(self._counts, key=len)
        if len(counts) > MAX_CATEGORIES or len(longest) > MAX_CATEGORY_CHARS:
            msg = (
                f"the records have {len(counts)} categories, the longest name has {len(longest)} "
                f"characters; at most {MAX_CATEGORIES} and {MAX_CATEGORY_CHARS}"
            )
            raise EvaluationError(msg)
        self._known: dict[bytes, Losses] = {}

    def run(self, *, stopped: Callable[[], bool], until_finished: bool = False) -> None:
        """Answer until stopped.

        Args:
            stopped: Asked between tasks.
            until_finished: End with the federation's last release.

        Raises:
            TrustError: The server asks what it may not.
            TransportError: It cannot be reached, or refuses.
        """
        n_records, n_categories = len(self._examples), len(self._counts)
        self._say(f"scores candidates on {n_records} records of {n_categories} categories")
        while not stopped():
            reply = self._transport.evaluation(wait_s=LONG_POLL_S)
            if reply.task is not None:
                self._answer(check_evaluation_task(reply.task, self._manifest))
            elif reply.finished and until_finished:
                return

    def judge(self, task: EvaluationTask) -> EvaluationReport:
        """Score the candidates of a task, and the adapter that they would replace.

        Args:
            task: Its signature has been checked.

        Raises:
            EvaluationError: The current adapter's loss is not finite: the base or the records are
                at fault.
            TransportError: An adapter cannot be fetched.
        """
        current = self._losses(task.current, self._transport.fetch)
        if not current:
            msg = f"the loss of the current adapter {task.current.sha256.hex()} is not finite"
            raise EvaluationError(msg)
        rows = [current]
        rows += [self._losses(ref, self._transport.fetch_candidate) for ref in task.candidates]
        return EvaluationReport(
            federation=task.federation,
            round=task.round,
            task=task.digest(),
            evaluator=self._signer.identity,
            data=self._data,
            current=task.current.sha256,
            candidates=tuple(ref.sha256 for ref in task.candidates),
            categories=tuple(self._counts),
            n_records=tuple(self._counts.values()),
            losses=tuple(tuple(row.get(name) for name in self._counts) for row in rows),
        )

    def _answer(self, task: EvaluationTask) -> None:
        self._say(f"round {task.round}: {len(task.candidates)} candidate(s) to score")
        report = self.judge(task)
        gate = self._manifest.gate
        for index in range(len(report.candidates)):
            before, after = report.mean_loss(0), report.mean_loss(index + 1)
            found = objection(report, index, gate) if isinstance(gate, EvaluatorGate) else None
            verdict = "passes" if found is None else f"does not pass: {found}"
            self._say(f"candidate {index + 1}: loss {before:.4f} -> {after:.4f}, {verdict}")
        try:
            self._transport.report(sign(self._signer, "evaluation", report).signed)
        except RefusedError as error:
            if error.document.advice is not Advice.DISCARD:
                raise
            self._say(f"round {task.round} went on without this report: {error}")
        kept = {task.current.sha256, *report.candidates}
        self._known = {sha: losses for sha, losses in self._known.items() if sha in kept}
        for path in self._home.cached_files():
            path.unlink()

    def _losses(self, ref: BlobRef, fetch: Callable[[BlobRef, Path], Path]) -> Losses:
        if ref.sha256 not in self._known:
            data = fetch(ref, self._home.cache).read_bytes()
            try:
                self._adapted.load(from_safetensors(data, self._shapes))
                scores = held_out_loss(self._adapted.model, self._examples, pad_id=self._pad_id)
                found = {name: one.score for name, one in scores.by_category.items()}
            except (AdapterError, EvaluationError) as error:
                self._say(f"adapter {ref.sha256.hex()[:8]} cannot be scored: {error}")
                found = {}
            self._known[ref.sha256] = found
        return self._known[ref.sha256]
