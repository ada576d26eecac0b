"""Puts a working agent together: home, lock, base, data, connections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from edge_agent.agent import Agent, AgentEventReport
from edge_agent.charging import RoundCharges, noise_of_agents
from edge_agent.config import AgentSettings, DpEngine
from edge_agent.data.reading import read_records
from edge_agent.data.records import ReadReport, Record
from edge_agent.data.tokens import TokenizedData, tokenize
from edge_agent.errors import JournalError, TrustError
from edge_agent.home import AgentHome
from edge_agent.journal import Journal, Membership
from edge_agent.member import Member, OwnersCell, OwnersPart
from edge_agent.membership import record_outgoing
from edge_agent.own_part import chosen_lora
from edge_agent.politeness import OwnersWishes
from edge_agent.private import (
    PrivacyTerms,
    PrivateRounds,
    make_terms,
    record_bytes,
    require_owners_epsilon,
)
from edge_agent.training.gradients import noise_threads
from edge_agent.training.planning import fitting_rank
from edge_agent.transport import Transport
from privacy.agent_accounting import require_kept
from privacy.ledger import Ledger
from protocol.checks import Check
from protocol.clock import Clock
from protocol.guarantee import describe_privacy
from protocol.manifest import FederationManifest
from protocol.privacy import ExamplePrivacy, NoPrivacy
from protocol.wire import b64u_decode
from quant.adapter import adapter_shapes, sent_layout
from quant.base_model import (
    LoadedBase,
    limit_device_memory,
    load_base,
    parse_device,
    set_threads,
)
from quant.errors import FingerprintError
from quant.lora import AdaptedModel

_GB: Final = 1_000_000_000


def load_federation_base(manifest: FederationManifest, settings: AgentSettings) -> LoadedBase:
    """Load the federation's base with the owner's limits, and prove that it is the same.

    Raises:
        BaseModelError: It cannot be loaded.
        FingerprintError: It is another base.
    """
    if settings.threads is not None:
        set_threads(settings.threads)
    block = manifest.base
    device = None if settings.device is None else parse_device(settings.device)
    base = load_base(
        settings.base or block.model,
        revision=None if settings.base else block.revision,
        device=device,
        expected=block,
    )
    max_bytes = _max_vram_bytes(settings)
    if max_bytes is not None:
        limit_device_memory(max_bytes, base.device)
    return base


def _max_vram_bytes(settings: AgentSettings) -> int | None:
    return None if settings.max_vram_gb is None else int(settings.max_vram_gb * _GB)


def load_data(
    source: str, manifest: FederationManifest, base: LoadedBase, settings: AgentSettings
) -> tuple[TokenizedData, ReadReport, Sequence[Record]]:
    """Read and tokenise the owner's records as the manifest says.

    Raises:
        DataError: The source cannot be read, or holds nothing to train on.
    """
    records, report = read_records(source, on_malformed=settings.on_malformed)
    block = manifest.training
    data = tokenize(
        records,
        base.tokenizer,
        template=block.template,
        loss_on=block.loss_on,
        max_length=block.max_length,
        on_malformed=settings.on_malformed,
    )
    return data, report, records


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A prepared agent; as a context it holds the home's lock and the connections."""

    agent: Agent
    wishes: OwnersWishes
    transport: Transport
    ledger: Ledger | None
    release_lock: Callable[[], None]

    def __enter__(self) -> Self:
        """Begin to work."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give lock and connections back."""
        self.transport.close()
        if self.ledger is not None:
            self.ledger.close()
        self.release_lock()


def prepare(
    home: AgentHome,
    journal: Journal,
    settings: AgentSettings,
    *,
    clock: Clock,
    on_event: Callable[[AgentEventReport], None],
    patience_s: float | None = None,
) -> Worker:
    """Load base and data, and put a working agent together.

    Args:
        home: Its lock is taken, and given back when the worker's context ends.
        journal: Of the home; stays the caller's.
        settings: What the owner allows.
        clock: Time.
        on_event: Told what happens.
        patience_s: Give up on an unreachable server after this long; None: never.

    Raises:
        JournalError: Never joined, left, expired, or another process works here.
        QuantError: The base cannot be used.
        TrustError: It is another base than the federation's.
        DataError: The data cannot be used.
        PrivacyError: The ledger cannot be used, or no noise keeps to what is asked for.
    """
    member = _active_membership(journal, clock.now())
    require_owners_epsilon(member.federation.body, settings.epsilon)
    lock = home.lock()
    ledger: Ledger | None = None
    try:
        signer = home.load_or_create_signer()
        wishes = OwnersWishes(journal, clock, settings.allowed_hours)

        def tell_retry(reason: str, pause_s: float) -> None:
            text = f"{reason}; again in {pause_s:.0f} s"
            on_event(AgentEventReport(kind="retrying", text=text))

        transport = Transport(
            member.url,
            clock=clock,
            signer=signer,
            on_outgoing=record_outgoing(journal, clock),
            on_retry=tell_retry,
            stopped=wishes.stopping,
            patience_s=patience_s,
        )
        manifest = member.federation.body
        transport.use_federation(manifest)
        on_event(AgentEventReport(kind="loading", text=f"base model {manifest.base.model}"))
        try:
            base = load_federation_base(manifest, settings)
        except FingerprintError as error:
            raise TrustError(str(error), Check.OTHER_BASE) from error
        data, report, records = load_data(member.data, manifest, base, settings)
        on_event(
            AgentEventReport(
                kind="data",
                text=f"{len(data.examples)} examples; {report.n_malformed} records malformed, "
                f"{data.report.n_truncated} cut to {manifest.training.max_length} tokens",
            )
        )
        _require_noise(manifest, base)
        private: PrivateRounds | None = None
        terms: PrivacyTerms | None = None
        event = noise_of_agents(manifest)
        if isinstance(manifest.privacy, ExamplePrivacy):
            on_event(AgentEventReport(kind="privacy", text="finding the noise that ε takes"))
            terms = make_terms(
                manifest, n_examples=len(data.examples), owners_epsilon=settings.epsilon
            )
            event = terms.event
        charges: RoundCharges | None = None
        if event is not None:
            ledger = Ledger(settings.ledger_path)
            charges = RoundCharges(
                event=event,
                ledger=ledger,
                data_set=ledger.data_set(record_bytes(records)),
                agent=signer.identity,
                federation=manifest.federation,
                n_rounds=manifest.rounds.n_rounds,
            )
        if terms is not None and charges is not None:
            private = PrivateRounds(
                terms=terms,
                charges=charges,
                secret_path=home.privacy_secret,
                n_noise_threads=noise_threads(base.device, allowed=settings.threads),
                adapt=_engine(settings),
            )
            on_event(AgentEventReport(kind="privacy", text=terms.describe()))
        elif not isinstance(manifest.privacy, NoPrivacy):
            text = describe_privacy(manifest.privacy, n_rounds=manifest.rounds.n_rounds)
            on_event(AgentEventReport(kind="privacy", text=text))
        agent = Agent(
            member=Member(
                home=home,
                journal=journal,
                membership=member,
                signer=signer,
                owners_cell=OwnersCell(
                    min_cell=settings.min_cell,
                    friends=frozenset(b64u_decode(name, n_bytes=32) for name in settings.friends),
                    min_friends=settings.min_friends,
                ),
                owners_part=_owners_part(settings, manifest, base, data, on_event),
                private=private,
                charges=None if private is not None else charges,
            ),
            transport=transport,
            base=base,
            data=data,
            wishes=wishes,
            clock=clock,
            on_event=on_event,
            max_vram_bytes=_max_vram_bytes(settings),
        )
    except BaseException:
        if ledger is not None:
            ledger.close()
        lock.release()
        raise
    return Worker(
        agent=agent,
        wishes=wishes,
        transport=transport,
        ledger=ledger,
        release_lock=lock.release,
    )


def _owners_part(
    settings: AgentSettings,
    manifest: FederationManifest,
    base: LoadedBase,
    data: TokenizedData,
    on_event: Callable[[AgentEventReport], None],
) -> OwnersPart:
    """What the owner chose; where nothing was said of the rank, the largest that fits the card."""
    rank, lora = settings.rank, manifest.lora
    if rank is None and lora.min_rank is not None:
        rank = fitting_rank(
            base,
            chosen_lora(lora, OwnersPart(left_out=settings.leave_out)),
            lowest=lora.min_rank,
            longest=max((len(example.input_ids) for example in data.examples), default=1),
            private=isinstance(manifest.privacy, ExamplePrivacy),
            max_vram_bytes=_max_vram_bytes(settings),
        )
    if rank is not None and rank < lora.rank:
        on_event(AgentEventReport(kind="rank", text=f"trains {rank} of {lora.rank} rank rows"))
    return OwnersPart(rank=rank, left_out=settings.leave_out)


def _engine(settings: AgentSettings) -> type[AdaptedModel]:
    """What makes gradients of single examples."""
    if settings.dp_engine is DpEngine.SHEEPFOLD:
        return AdaptedModel
    from quant.opacus_model import OpacusModel  # noqa: PLC0415 - slow to import, rarely asked for

    return OpacusModel


def _require_noise(manifest: FederationManifest, base: LoadedBase) -> None:
    """Refuse a manifest that promises agents an ε that its noise does not keep (P2, P3)."""
    shapes = adapter_shapes(base.description, manifest.lora)
    require_kept(
        manifest.privacy,
        manifest.masking,
        n_values=sent_layout(shapes, manifest.lora.sent).n_values,
        n_rounds=manifest.rounds.n_rounds,
    )


def _active_membership(journal: Journal, now: float) -> Membership:
    member = journal.membership()
    if member is None:
        msg = "no federation was joined here; begin with `sheepfold-agent join`"
        raise JournalError(msg)
    if member.left_at is not None:
        msg = "this membership was revoked by `leave`; `join` again to take part"
        raise JournalError(msg)
    if member.credential is not None and member.credential.body.expires_at <= now:
        msg = "this membership has expired; `join` again to take part"
        raise JournalError(msg)
    if member.credential is None:  # told before a base is fetched and loaded in vain
        msg = "the enrolment was not finished; run `join` again"
        raise JournalError(msg)
    return member
