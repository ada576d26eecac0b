"""The chain of releases, rollback and export."""

import pytest

from aggregator_server.errors import ChainError
from aggregator_server.releases import sign_release, verify_chain
from protocol.chain import CellRef, Release
from protocol.messages import ReleasePage, WaitReason
from protocol.phases import RoundPhase
from protocol.problems import ProblemType
from protocol.signing import Signed, Signer
from protocol.wire import parse
from quant.adapter import read_folder
from quant.model_card import read_provenance


@pytest.fixture
def case(make_case, start_round):
    """A federation with three releases of rounds."""
    case = make_case(cohort_target=2, n_rounds=10)
    agents, manifest = start_round(case, 2)
    for _ in range(3):
        manifest = agents[0].round()
        for agent in agents:
            agent.upload(manifest, agent.constant(1))
        case.advance()
    case.agents = agents
    return case


@pytest.fixture
def chain(case):
    return list(case.federation.releases.all())


def check(case, chain) -> int:
    return verify_chain(
        chain, server=case.manifest.server, federation_digest=case.manifest.digest()
    )


def resigned(case, release):
    row = sign_release(case.federation.charter.keys.server, release, round_number=None)
    return parse(type(next(iter(case.federation.releases.all()))), row.signed)


def test_an_unbroken_chain_verifies(case, chain):
    assert check(case, chain) == 3


def test_bad_chain_without_its_first_release(case, chain):
    with pytest.raises(ChainError, match="stands where"):
        check(case, chain[1:])


def test_bad_chain_with_a_release_left_out(case, chain):
    with pytest.raises(ChainError, match="stands where 2"):
        check(case, [chain[0], chain[1], chain[3]])


def test_bad_chain_with_a_release_changed(case, chain):
    body = chain[2].body.model_copy(update={"created_at": 1.0})
    with pytest.raises(ChainError, match="does not hold"):
        check(case, [*chain[:2], chain[2].model_copy(update={"body": body}), chain[3]])


def test_bad_chain_with_a_release_changed_and_signed_anew(case, chain):
    forged = resigned(case, chain[1].body.model_copy(update={"created_at": 1.0}))
    with pytest.raises(ChainError, match="release 2 does not name its predecessor"):
        check(case, [chain[0], forged, *chain[2:]])


def test_bad_chain_signed_by_another_key(case, chain):
    row = sign_release(Signer.generate(), chain[3].body, round_number=None)
    other = parse(type(chain[0]), row.signed)
    with pytest.raises(ChainError, match="not by the expected"):
        check(case, [*chain[:3], other])


def test_bad_chain_of_another_manifest(case, chain):
    with pytest.raises(ChainError, match="another manifest"):
        verify_chain(chain, server=case.manifest.server, federation_digest=bytes(32))


def test_bad_chain_with_a_round_number_that_falls(case, chain):
    forged = resigned(case, chain[3].body.model_copy(update={"round": 1}))
    with pytest.raises(ChainError, match="of round 1, before 2"):
        check(case, [*chain[:3], forged])


def test_no_release_is_no_chain(case):
    with pytest.raises(ChainError, match="no release"):
        check(case, [])


def test_releases_are_paged_by_number(case):
    page = parse(ReleasePage, case.client.get(f"{case.prefix}/releases?after=1").content)
    assert [signed.body.number for signed in page.releases] == [2, 3]
    assert page.newest == 3
    whole = parse(ReleasePage, case.client.get(f"{case.prefix}/releases").content)
    assert len(whole.releases) == 4


def test_a_page_stays_below_the_limit_of_a_reply(case, monkeypatch):
    from aggregator_server import releases as releases_module

    monkeypatch.setattr(releases_module, "_PAGE_BYTES", 2000)
    page = parse(ReleasePage, case.federation.releases.page(after=-1))
    assert 1 <= len(page.releases) < 4
    assert page.newest == 3


def test_a_page_is_canonical_json(case):
    page = case.federation.releases.page(after=0)
    assert parse(ReleasePage, page).canonical() == page
    none = case.federation.releases.page(after=3)
    assert parse(ReleasePage, none) == ReleasePage(releases=(), newest=3)


def test_a_release_of_the_most_cells_goes_into_one_reply(case):
    from aggregator_server.releases import most_cells, sign_release
    from protocol.limits import MAX_JSON_BYTES

    cell = CellRef(transcript=bytes(32), members=bytes(32))
    newest = case.federation.releases.newest()
    largest = 2**53 - 1
    release = newest.model_copy(
        update={
            "accepted": (cell,) * most_cells(),
            "round": largest,
            "aggregation": newest.aggregation.model_copy(update={"n_cells": largest}),
        }
    )
    row = sign_release(case.federation.charter.keys.server, release, round_number=None)
    page = ReleasePage(releases=(parse(Signed[Release], row.signed),), newest=largest)
    assert len(page.canonical()) <= MAX_JSON_BYTES
    assert most_cells() > 8000


class TestChainAtTheStart:
    @pytest.fixture
    def short(self, monkeypatch):
        from aggregator_server import releases as releases_module

        monkeypatch.setattr(releases_module, "_N_CHECKED_AT_START", 2)

    @pytest.mark.parametrize("number", [2, 3])
    def test_a_release_changed_at_the_end_of_the_chain_is_refused(self, case, short, number):
        self.change(case, number)
        with pytest.raises(ChainError, match=f"release {number}"):
            case.federation.releases.verify_newest()

    def test_the_time_it_takes_does_not_grow_with_the_chain(self, case, short):
        self.change(case, 0)
        assert case.federation.releases.verify_newest() == 3
        with pytest.raises(ChainError, match="release 0"):
            case.federation.releases.verify()

    def change(self, case, number: int) -> None:
        from sqlalchemy import update

        from aggregator_server.store.schema import releases

        signed = parse(Signed[Release], case.federation._store.releases.get(number).signed)
        body = signed.body.model_copy(update={"created_at": 1.0})
        changed = signed.model_copy(update={"body": body}).canonical()
        with case.federation._store._database.writing() as connection:
            connection.execute(
                update(releases).where(releases.c.number == number).values(signed=changed)
            )


class TestRollback:
    def test_a_rollback_is_a_new_release_with_the_old_files(self, case):
        release = case.federation.releases.roll_back(1)
        old = case.federation.releases.get(1)
        assert (release.number, release.rolled_back_to) == (4, 1)
        assert (release.adapter, release.sent) == (old.adapter, old.sent)
        assert case.federation.releases.verify() == 4

    def test_a_rollback_fails_the_open_round_with_its_reason(self, case, problem_of):
        agents = case.agents
        manifest = agents[0].round()
        case.federation.releases.roll_back(2)
        row = case.federation._store.rounds.get(manifest.round)
        assert row.phase is RoundPhase.FAILED
        assert row.failure == "the operator rolled back to release 2"
        refused = agents[0].upload(manifest, agents[0].constant(1))
        assert problem_of(refused) is ProblemType.ROUND_CLOSED
        case.advance()
        following = agents[0].round()
        assert following.release == 4
        assert following.round == manifest.round + 1

    def test_a_rollback_counts_as_no_round(self, case):
        before = case.federation.status().n_releases_of_rounds
        case.federation.releases.roll_back(0)
        assert case.federation.status().n_releases_of_rounds == before

    def test_a_rollback_while_averaging_wins_over_the_round(self, case, monkeypatch):
        agents, uploads = case.agents, case.federation.uploads
        manifest = agents[0].round()
        for agent in agents:
            agent.upload(manifest, agent.constant(1))
        load = uploads.load

        def roll_back_meanwhile(upload):
            monkeypatch.undo()
            case.federation.releases.roll_back(0)
            return load(upload)

        monkeypatch.setattr(uploads, "load", roll_back_meanwhile)
        case.advance()
        newest = case.federation.releases.newest()
        assert (newest.number, newest.rolled_back_to) == (4, 0)
        assert case.federation._store.rounds.get(manifest.round).phase is RoundPhase.FAILED

    def test_rolling_back_to_a_release_that_is_not_there_says_which_is_the_newest(self, case):
        with pytest.raises(ChainError, match="no release 9; the newest is 3"):
            case.federation.releases.roll_back(9)


def test_an_exported_folder_holds_the_adapter(case, tmp_path):
    folder = tmp_path / "adapter"
    case.federation.releases.export(3, folder)
    arrays = read_folder(folder)
    wanted = case.federation.releases.arrays(case.federation.releases.get(3))
    assert all((arrays[name] == wanted[name]).all() for name in wanted)
    card = (folder / "README.md").read_text()
    assert "ε = ∞" in card
    told = read_provenance(folder)
    assert told is not None
    assert (told.release, told.n_agents) == (3, 2)
    assert told.release_digest == case.federation.releases.get(3).digest()


def test_a_file_that_changed_on_disk_is_not_exported(case, tmp_path):
    release = case.federation.releases.get(3)
    path = case.directory / "blobs" / "adapters" / release.adapter.sha256.hex()
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ChainError, match="changed on disk"):
        case.federation.releases.export(3, tmp_path / "adapter")


def test_a_tampered_chain_is_not_served(case, monkeypatch):
    from sqlalchemy import delete

    from aggregator_server.federation import open_federation
    from aggregator_server.store.schema import release_blobs, releases

    with case.federation._store._database.writing() as connection:
        connection.execute(delete(release_blobs).where(release_blobs.c.release == 2))
        connection.execute(delete(releases).where(releases.c.number == 2))
    with pytest.raises(ChainError, match="stands where 2"):
        open_federation(case.directory, clock=case.clock, environment={})


def test_agents_hear_of_the_newest_release_with_every_poll(case):
    reply = case.agents[0].task(after=99)
    assert reply.newest_release == 3
    assert reply.task.reason is WaitReason.ROUND_ENDING
