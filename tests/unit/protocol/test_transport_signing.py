"""The signature of a request, and what a replay meets."""

import base64
import contextlib
import datetime as dt
import hashlib
import re
from collections.abc import Callable

import pytest
from http_message_signatures import HTTPMessageSigner, algorithms
from http_message_signatures.digests import ContentDigest

from protocol.errors import SignatureError
from protocol.limits import NONCE_BYTES, SIGNATURE_WINDOW_S
from protocol.signing import Signer
from protocol.transport_signing import (
    TAG,
    BodyDigestError,
    ReplayedSignatureError,
    ReplayGuard,
    StaleSignatureError,
    VerifiedRequest,
    _Message,
    _OneKey,
    sign_request,
    verify_request,
)
from protocol.wire import b64u_encode

URL = "https://server.example/v1/federations/AAAA/task?after=3&wait=20"
BODY = b'{"a":1}'
NONCE = bytes(range(NONCE_BYTES))
CREATED = 1_800_000_000

Headers = dict[str, str]


def lower(headers: Headers) -> Headers:
    return {name.lower(): value for name, value in headers.items()}


@pytest.fixture
def headers(agent_key: Signer) -> Headers:
    return lower(
        sign_request(agent_key, method="POST", url=URL, body=BODY, created=CREATED, nonce=NONCE)
    )


def check(headers: Headers, *, method: str = "POST", url: str = URL, body: bytes = BODY):
    return verify_request(method=method, url=url, headers=headers, body=body)


class _AnyDigest(ContentDigest):
    """Leaves a digest as it stands, however wrong."""

    @classmethod
    def prepare(cls, headers, body, *, use_existing_digest):
        if body is not None and "Content-Digest" not in headers:
            cls.add(headers, body)


class _HandSigner(HTTPMessageSigner):
    content_digest_class = _AnyDigest


@pytest.fixture
def sign_by_hand(agent_key: Signer) -> Callable[..., Headers]:
    """Signatures that `sign_request` would not make."""

    def make(
        *,
        covered: tuple[str, ...] = ("@method", "@path", "@query", "content-digest"),
        label: str = "sheepfold",
        signer: Signer = agent_key,
        extra: Headers | None = None,
        **changes: object,
    ) -> Headers:
        message = _Message(method="POST", url=URL, headers=dict(extra or {}))
        settings = {
            "key_id": b64u_encode(signer.identity),
            "created": dt.datetime.fromtimestamp(CREATED, tz=dt.UTC),
            "nonce": b64u_encode(NONCE),
            "label": label,
            "tag": TAG,
            "covered_component_ids": covered,
            "append_if_signature_exists": True,
            "body": BODY if "content-digest" in covered else None,
            **changes,
        }
        _HandSigner(
            signature_algorithm=algorithms.ED25519, key_resolver=_OneKey(signer.private_key)
        ).sign(message, **settings)  # type: ignore[arg-type]
        return message.headers

    return make


def test_guarantee_1_what_was_signed_is_verified(headers: Headers, agent_key: Signer) -> None:
    verified = check(headers)
    assert verified == VerifiedRequest(identity=agent_key.identity, created=CREATED, nonce=NONCE)


def test_the_authority_may_be_another_behind_a_proxy(headers: Headers) -> None:
    check(headers, url=URL.replace("https://server.example", "http://10.0.0.1:8000"))


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("method", "PUT"),
        ("method", "GET"),
        ("url", URL.replace("AAAA", "AAAB")),
        ("url", URL.replace("/task", "/task/")),
        ("url", URL.replace("/v1", "//v1")),
        ("url", URL.replace("/task", "/t%61sk")),
        ("url", URL.replace("after=3", "after=4")),
        ("url", URL.replace("&wait=20", "")),
        ("url", URL.partition("?")[0]),
        ("url", URL + "&"),
    ],
)
def test_guarantee_1_another_method_path_or_query_is_refused(
    headers: Headers, change: str, value: str
) -> None:
    with pytest.raises(SignatureError, match="does not hold"):
        check(headers, **{change: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("body", [b"", b'{"a":2}', BODY + b" ", BODY[:-1]])
def test_guarantee_1_another_body_is_refused_as_damaged(headers: Headers, body: bytes) -> None:
    with pytest.raises(BodyDigestError, match="send it again"):
        check(headers, body=body)


def test_guarantee_1_a_body_with_its_own_digest_is_not_what_was_signed(headers: Headers) -> None:
    body = b'{"a":2}'
    digest = hashlib.sha256(body).digest()
    forged = {**headers, "content-digest": f"sha-256=:{base64.b64encode(digest).decode()}:"}
    with pytest.raises(SignatureError, match="does not hold") as caught:
        check(forged, body=body)
    assert not isinstance(caught.value, BodyDigestError)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"created=\d+", f"created={CREATED + 1}"),
        (r'nonce="[^"]+"', f'nonce="{b64u_encode(bytes(16))}"'),
        (r'tag="[^"]+"', 'tag="sheepfold/v1/other"'),
        (r'keyid="[^"]+"', f'keyid="{b64u_encode(Signer.from_private_bytes(bytes(32)).identity)}"'),
        (r'alg="[^"]+"', 'alg="hmac-sha256"'),
        (r'"@method" ', ""),
        (r'"@method" "@path"', '"@path" "@method"'),
        (r";created=\d+", ""),
        (r"$", ";expires=99999999999"),
        (r"$", ';surprise="1"'),
    ],
)
def test_guarantee_1_altered_parameters_are_refused(
    headers: Headers, pattern: str, replacement: str
) -> None:
    altered = re.sub(pattern, replacement, headers["signature-input"], count=1)
    assert altered != headers["signature-input"]
    with pytest.raises(SignatureError):
        check({**headers, "signature-input": altered})


@pytest.mark.parametrize("name", ["signature", "signature-input", "content-digest"])
def test_a_missing_header_is_refused(headers: Headers, name: str) -> None:
    with pytest.raises(SignatureError):
        check({key: value for key, value in headers.items() if key != name})


@pytest.mark.parametrize("missing", ["@method", "@path", "@query", "content-digest"])
def test_a_signature_that_covers_less_is_refused(
    sign_by_hand: Callable[..., Headers], missing: str
) -> None:
    components = ("@method", "@path", "@query", "content-digest")
    covered = tuple(name for name in components if name != missing)
    headers = sign_by_hand(covered=covered)
    # The digest is there, only not signed.
    with pytest.raises(SignatureError, match=f'does not cover "{missing}"'):
        check({"content-digest": "sha-256=:AAAA:", **lower(headers)})


def test_another_tag_or_label_is_refused(sign_by_hand: Callable[..., Headers]) -> None:
    check(lower(sign_by_hand()))
    for changes in ({"tag": "other/v1/request"}, {"tag": None}, {"label": "other"}):
        with pytest.raises(SignatureError):
            check(lower(sign_by_hand(**changes)))


@pytest.mark.parametrize("nonce", [None, "", "AAAA", "*" * 22, b64u_encode(bytes(17))])
def test_a_nonce_of_another_form_is_refused(
    sign_by_hand: Callable[..., Headers], nonce: str | None
) -> None:
    with pytest.raises(SignatureError):
        check(lower(sign_by_hand(nonce=nonce)))


@pytest.mark.parametrize(
    "key_id", ["", "AAAA", "not a key", b64u_encode(bytes(33)), b64u_encode(bytes(32)) + "="]
)
def test_a_key_of_another_form_is_refused(
    sign_by_hand: Callable[..., Headers], key_id: str
) -> None:
    with pytest.raises(SignatureError):
        check(lower(sign_by_hand(key_id=key_id)))


def test_a_key_that_did_not_sign_is_refused(sign_by_hand: Callable[..., Headers]) -> None:
    """Impersonation: a valid signature, under another's name."""
    victim = b64u_encode(Signer.generate().identity)
    with pytest.raises(SignatureError, match="does not hold"):
        check(lower(sign_by_hand(key_id=victim)))


def test_signatures_of_others_under_other_labels_are_left_alone(
    sign_by_hand: Callable[..., Headers], agent_key: Signer
) -> None:
    proxy = Signer.generate()
    ours = sign_by_hand()
    both = sign_by_hand(label="proxy", tag="proxy/1", signer=proxy, extra=ours)
    assert 'tag="proxy/1"' in both["Signature-Input"]
    assert check(lower(both)).identity == agent_key.identity


def test_a_second_signature_with_our_tag_does_not_lend_its_key(
    sign_by_hand: Callable[..., Headers], agent_key: Signer
) -> None:
    """Impersonation: our label names one key, another label with our tag is valid under it."""
    attacker, victim = Signer.generate(), agent_key
    genuine = sign_by_hand()
    both = sign_by_hand(label="second", signer=attacker, extra=genuine)
    assert check(lower(both)).identity == victim.identity
    # And the other way round: what is verified is what stands under our label.
    swapped = {
        name: value.replace("sheepfold=", "third=").replace("second=", "sheepfold=")
        for name, value in lower(both).items()
    }
    assert check(swapped).identity == attacker.identity


def test_a_label_that_stands_twice_is_refused(headers: Headers) -> None:
    doubled = {
        **headers,
        "signature-input": f"{headers['signature-input']}, {headers['signature-input']}",
        "signature": f"{headers['signature']}, {headers['signature']}",
    }
    with pytest.raises(SignatureError):
        check(doubled)


@pytest.mark.parametrize("algorithm", ["md5=:AAAA:", "sha-512=:AAAA:", "sha-256=?1", "x"])
def test_a_digest_of_another_kind_is_refused(
    sign_by_hand: Callable[..., Headers], algorithm: str
) -> None:
    headers = lower(sign_by_hand(extra={"Content-Digest": algorithm}))
    with pytest.raises(SignatureError):
        check(headers)


@pytest.mark.parametrize(
    "junk", ["", "x", "sheepfold", "sheepfold=()", "sheepfold=1", 'a="b', "\x00", "é", "," * 1000]
)
def test_junk_is_refused_and_never_escapes_as_another_error(headers: Headers, junk: str) -> None:
    for name in ("signature", "signature-input", "content-digest"):
        with pytest.raises(SignatureError):
            check({**headers, name: junk})


@pytest.mark.parametrize("url", ["/v1/x", "https://", "https://h/ä", "https://h/a b", ""])
def test_a_malformed_url_is_neither_signed_nor_verified(
    agent_key: Signer, headers: Headers, url: str
) -> None:
    with pytest.raises(SignatureError):
        sign_request(agent_key, method="GET", url=url, body=b"", created=CREATED, nonce=NONCE)
    with pytest.raises(SignatureError):
        check(headers, url=url)


@pytest.mark.parametrize("created", [10**12, 10**300])
def test_a_time_beyond_the_calendar_cannot_be_signed(agent_key: Signer, created: int) -> None:
    with pytest.raises(SignatureError, match="cannot sign"):
        sign_request(agent_key, method="GET", url=URL, body=b"", created=created, nonce=NONCE)


def test_an_empty_body_is_covered_too(agent_key: Signer) -> None:
    headers = lower(
        sign_request(agent_key, method="GET", url=URL, body=b"", created=CREATED, nonce=NONCE)
    )
    assert check(headers, method="GET", body=b"").created == CREATED
    with pytest.raises(BodyDigestError):
        check(headers, method="GET", body=b"x")


# Freshness

START = 1_000_000.0


def request(created: float, *, nonce: int = 0, identity: int = 0) -> VerifiedRequest:
    return VerifiedRequest(
        identity=bytes([identity]) * 32, created=int(created), nonce=nonce.to_bytes(NONCE_BYTES)
    )


@pytest.fixture
def guard() -> ReplayGuard:
    return ReplayGuard(started_at=START)


def test_guarantee_1_a_signature_is_admitted_once(guard: ReplayGuard) -> None:
    signed = request(START + 10)
    guard.admit(signed, now=START + 10)
    for now in (START + 10, START + 11, START + 10 + SIGNATURE_WINDOW_S):
        with pytest.raises(ReplayedSignatureError, match="already used"):
            guard.admit(signed, now=now)
    for later in (1, 2, 3, 10):
        with pytest.raises(StaleSignatureError):
            guard.admit(signed, now=START + 10 + later * SIGNATURE_WINDOW_S + 1)


def test_another_nonce_or_another_agent_is_another_signature(guard: ReplayGuard) -> None:
    now = START + 5
    guard.admit(request(now), now=now)
    guard.admit(request(now, nonce=1), now=now)
    guard.admit(request(now, identity=1), now=now)
    with pytest.raises(ReplayedSignatureError):
        guard.admit(request(now - 1, nonce=1), now=now)


def test_a_refused_signature_is_not_remembered(guard: ReplayGuard) -> None:
    now = START + 1000
    with pytest.raises(StaleSignatureError):
        guard.admit(request(now - SIGNATURE_WINDOW_S - 1), now=now)
    guard.admit(request(now), now=now)


def test_the_window_ends_where_it_says(guard: ReplayGuard) -> None:
    now = START + 1000
    guard.admit(request(now - SIGNATURE_WINDOW_S), now=now)
    with pytest.raises(StaleSignatureError, match="the limit is 300 s"):
        guard.admit(request(now - SIGNATURE_WINDOW_S - 1, nonce=1), now=now)


def test_guarantee_1_a_signature_from_before_the_start_is_stale() -> None:
    before = ReplayGuard(started_at=START)
    signed = request(START + 100)
    before.admit(signed, now=START + 100)
    for restarted_at in (START + 100, START + 100.5, START + 101, START + 200):
        after = ReplayGuard(started_at=restarted_at)
        for wait_s in (0, 1, 50, 100, 299):
            with pytest.raises(StaleSignatureError):
                after.admit(signed, now=restarted_at + wait_s)


@pytest.mark.parametrize("ahead_s", [0, 10, 200, SIGNATURE_WINDOW_S])
def test_guarantee_1_a_future_dated_signature_does_not_outlive_a_restart(ahead_s: int) -> None:
    """Replay: signed ahead of time, used, the server restarts, used again."""
    signed = request(START + 100 + ahead_s)
    for restart_at in (0, 10, 20, 150, ahead_s, ahead_s + 10):
        guard = ReplayGuard(started_at=START)
        n_admitted = 0
        for second in range(0, 3 * SIGNATURE_WINDOW_S, 10):  # the attacker tries all the time
            now = START + 100 + second
            if second == restart_at:
                guard = ReplayGuard(started_at=now)
            with contextlib.suppress(StaleSignatureError, ReplayedSignatureError):
                guard.admit(signed, now=now)
                n_admitted += 1
        assert n_admitted <= 1


def test_a_signature_ahead_of_the_clock_is_stale_until_its_time(guard: ReplayGuard) -> None:
    now = START + 50
    for ahead_s in (1, SIGNATURE_WINDOW_S, SIGNATURE_WINDOW_S + 1):
        with pytest.raises(StaleSignatureError, match="ahead"):
            guard.admit(request(now + ahead_s), now=now)
    guard.admit(request(now), now=now)


def test_guarantee_1_holds_when_the_clock_jumps_ahead_and_back(guard: ReplayGuard) -> None:
    now = START + 100
    signed = request(now)
    guard.admit(signed, now=now)
    with pytest.raises(StaleSignatureError):
        guard.admit(request(now, nonce=1), now=now + 10_000)  # everything is forgotten
    with pytest.raises(StaleSignatureError):
        guard.admit(signed, now=now + 1)
    guard.admit(request(now + 1, nonce=2), now=now + 2)


def test_guarantee_2_memory_is_bounded_by_one_window(guard: ReplayGuard) -> None:
    per_second = 3
    largest = 0
    for second in range(1, 4 * SIGNATURE_WINDOW_S):
        now = START + second
        for n in range(per_second):
            # Some are signed early in the window, some late: order of arrival is not order of time.
            created = now - (n * 120 if second > 250 else 0)
            guard.admit(request(created, nonce=second * 10 + n), now=now)
        largest = max(largest, len(guard._seen))
        assert len(guard._seen) == len(guard._by_time)
    assert largest <= per_second * (SIGNATURE_WINDOW_S + 1)
    with pytest.raises(StaleSignatureError):
        guard.admit(request(START), now=START + 10_000)
    assert not guard._seen
    assert not guard._by_time
