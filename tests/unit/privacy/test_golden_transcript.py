"""A second, deliberately naive implementation, held against golden transcripts and the real one.

Everything up to "The real implementation" is written from PROTOCOL and the standards alone: whole
numbers, `hashlib`, `hmac`, `json` and `base64`; nothing of `privacy` or `protocol`. X25519 is the
ladder of RFC 7748, AES the tables of FIPS 197, GCM the polynomials of SP 800-38D. The cryptography
library only verifies Ed25519. Slow, and easy to compare with the text.
"""

import base64
import hashlib
import hmac
import json
import math
import runpy
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from privacy.errors import MaskedMessageError
from privacy.fixed_point import EncodingPlan, agreed_layout, decode, encode, split_sum, with_checks
from privacy.masking import MaskAdder
from privacy.noise import SecureStream
from privacy.secagg.agent import SecAggAgent
from privacy.secagg.checks import CellPolicy
from privacy.secagg.server import CellServer
from protocol.blocks import CellMasking
from protocol.checks import Check, CheckError
from protocol.layout import VectorLayout
from protocol.masked import Confirmed, MaskedHeader, ReadyList, Reveal, Roster, Shares
from protocol.messages import Credential
from protocol.signing import Signed, Signer, sign
from protocol.wire import parse

VECTORS = Path(__file__).parents[2] / "vectors"


# Bytes (PROTOCOL, "Bytes")


def read(name: str) -> Any:
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


def b64u(data: bytes) -> str:
    return base64.b64encode(data).decode().translate({43: "-", 47: "_", 61: None})


def unb64u(text: str) -> bytes:
    return base64.b64decode(text.translate({45: "+", 95: "/"}) + "=" * (-len(text) % 4))


def naive_hash(name: str, *values: Any) -> bytes:
    """H(name, …). These documents hold names, whole numbers and ASCII texts only."""
    text = json.dumps(["sheepfold/v1/" + name, *values], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def signature_holds(signed: Any, name: str, *, key: bytes) -> bool:
    """Whether `key` signed the body as a document of this kind."""
    if unb64u(signed["key"]) != key:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(
            unb64u(signed["signature"]), naive_hash(name, signed["body"])
        )
    except InvalidSignature:
        return False
    return True


# HKDF-SHA256 (RFC 5869)


def hkdf(secret: bytes, salt: bytes, info: bytes, n_bytes: int = 32) -> bytes:
    prk = hmac.new(salt or bytes(32), secret, hashlib.sha256).digest()
    output = block = b""
    counter = 1
    while len(output) < n_bytes:
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha256).digest()
        output += block
        counter += 1
    return output[:n_bytes]


# X25519 (RFC 7748, section 5)

P25519 = 2**255 - 19


def x25519(scalar: bytes, point: bytes) -> bytes:
    k = int.from_bytes(scalar, "little")
    k &= ~7
    k &= (1 << 255) - 1
    k |= 1 << 254
    u = int.from_bytes(point, "little") % 2**255 % P25519
    x2, z2, x3, z3 = 1, 0, u, 1
    for bit in range(254, -1, -1):
        odd = k >> bit & 1
        if odd:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb = a * a % P25519, b * b % P25519
        e = aa - bb
        da, cb = d * a % P25519, c * b % P25519
        x3 = (da + cb) ** 2 % P25519
        z3 = u * (da - cb) ** 2 % P25519
        x2 = aa * bb % P25519
        z2 = e * (aa + 121665 * e) % P25519
        if odd:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, P25519 - 2, P25519) % P25519).to_bytes(32, "little")


def public_of(private: bytes) -> bytes:
    return x25519(private, (9).to_bytes(32, "little"))


# AES-256 (FIPS 197) and its counter mode (SP 800-38A)


def double(a: int) -> int:
    return a << 1 ^ (0x11B if a & 0x80 else 0)


def make_sbox() -> list[int]:
    box = [0x63] * 256
    p = q = 1
    while True:
        p = p ^ double(p)  # times 3
        q ^= q << 1
        q ^= q << 2
        q ^= q << 4
        q &= 0xFF
        if q & 0x80:
            q ^= 0x09  # divided by 3
        rotated = [(q << n | q >> (8 - n)) & 0xFF for n in range(5)]
        box[p] = rotated[0] ^ rotated[1] ^ rotated[2] ^ rotated[3] ^ rotated[4] ^ 0x63
        if p == 1:
            return box


SBOX = make_sbox()


def expand_key(key: bytes) -> list[list[int]]:
    words = [list(key[at : at + 4]) for at in range(0, 32, 4)]
    constant = 1
    while len(words) < 60:
        word = list(words[-1])
        if len(words) % 8 == 0:
            word = [SBOX[byte] for byte in word[1:] + word[:1]]
            word[0] ^= constant
            constant = double(constant)
        elif len(words) % 8 == 4:
            word = [SBOX[byte] for byte in word]
        words.append([a ^ b for a, b in zip(words[-8], word, strict=True)])
    return [[byte for word in words[at : at + 4] for byte in word] for at in range(0, 60, 4)]


def aes(round_keys: list[list[int]], block: bytes) -> bytes:
    state = [a ^ b for a, b in zip(block, round_keys[0], strict=True)]
    for number in range(1, 15):
        state = [SBOX[state[(at + 4 * (at % 4)) % 16]] for at in range(16)]
        if number < 14:
            mixed = []
            for at in range(0, 16, 4):
                column = state[at : at + 4]
                total = column[0] ^ column[1] ^ column[2] ^ column[3]
                mixed += [
                    column[i] ^ total ^ double(column[i] ^ column[(i + 1) % 4]) for i in range(4)
                ]
            state = mixed
        state = [a ^ b for a, b in zip(state, round_keys[number], strict=True)]
    return bytes(state)


def key_stream(key: bytes, n_bytes: int, *, counter: int = 0) -> bytes:
    round_keys = expand_key(key)
    n_blocks = -(-n_bytes // 16)
    blocks = [aes(round_keys, (counter + i).to_bytes(16, "big")) for i in range(n_blocks)]
    return b"".join(blocks)[:n_bytes]


# AES-256-GCM with a nonce of twelve zeros and no further data (SP 800-38D)


def gf_times(x: int, y: int) -> int:
    product = 0
    for bit in range(127, -1, -1):
        if y >> bit & 1:
            product ^= x
        x = x >> 1 ^ (0xE1 << 120 if x & 1 else 0)
    return product


def gcm_seal(key: bytes, plaintext: bytes) -> bytes:
    h = int.from_bytes(aes(expand_key(key), bytes(16)), "big")
    stream = key_stream(key, 16 + len(plaintext), counter=1)
    body = bytes(a ^ b for a, b in zip(plaintext, stream[16:], strict=True))
    tag = 0
    for at in range(0, len(body), 16):
        tag = gf_times(tag ^ int.from_bytes(body[at : at + 16].ljust(16, b"\0"), "big"), h)
    tag = gf_times(tag ^ 8 * len(body), h)
    return body + (tag ^ int.from_bytes(stream[:16], "big")).to_bytes(16, "big")


# Shamir's sharing over 2^256 + 297

P = 2**256 + 297


def deal(secret: bytes, coefficients: bytes, n_shares: int) -> list[bytes]:
    """Share x is Σ a_k x^k; 48 bytes, big-endian, give one a_k, from a_1 on."""
    numbers = [int.from_bytes(secret, "big")]
    numbers += [
        int.from_bytes(coefficients[at : at + 48], "big") for at in range(0, len(coefficients), 48)
    ]
    return [
        (sum(a * x**k for k, a in enumerate(numbers)) % P).to_bytes(33, "big")
        for x in range(1, n_shares + 1)
    ]


def rebuild(shares: dict[int, bytes]) -> int:
    total = 0
    for x, share in shares.items():
        term = int.from_bytes(share, "big")
        for other in shares:
            if other != x:
                term = term * other * pow(other - x, P - 2, P) % P
        total += term
    return total % P


# The masked round


class Naive:
    """A transcript, computed anew from what its members drew."""

    def __init__(self, case: Any) -> None:
        self.case = case
        self.readies = [signed["body"] for signed in case["roster"]["body"]["members"]]
        self.ids = [unb64u(ready["agent"]) for ready in self.readies]
        self.n, self.t = len(self.ids), case["roster"]["body"]["threshold"]
        self.T = naive_hash("roster", case["roster"]["body"])
        self.k = case["word_bits"]
        self.alive = [i for i in range(self.n) if i != case["drops"]]

    def secret(self, i: int, name: str) -> bytes:
        return bytes.fromhex(self.case["members"][i][name])

    # Shares

    def shares_of(self, i: int) -> dict[str, list[bytes]]:
        return {
            "self": deal(self.secret(i, "self_seed"), self.secret(i, "self_coefficients"), self.n),
            "mask": deal(
                self.secret(i, "masking_private"), self.secret(i, "mask_coefficients"), self.n
            ),
        }

    def share_digest(self, i: int, j: int, kind: str, share: bytes) -> bytes:
        return naive_hash(
            "share", b64u(self.T), b64u(self.ids[i]), b64u(self.ids[j]), kind, b64u(share)
        )

    def commitment(self, i: int, seed: bytes) -> bytes:
        return naive_hash("self", b64u(self.T), b64u(self.ids[i]), b64u(seed))

    def sealed(self, i: int, j: int) -> bytes:
        agreed = x25519(self.secret(i, "sealing_private"), unb64u(self.readies[j]["sealing_key"]))
        key = hkdf(agreed, self.T, b"sheepfold/v1/seal" + self.ids[i] + self.ids[j])
        shares = self.shares_of(i)
        return gcm_seal(key, shares["self"][j] + shares["mask"][j])

    def shares_header(self, i: int) -> Any:
        others = [j for j in range(self.n) if j != i]
        shares = self.shares_of(i)
        return {
            "version": 1,
            "transcript": b64u(self.T),
            "agent": b64u(self.ids[i]),
            "commitment": b64u(self.commitment(i, self.secret(i, "self_seed"))),
            "ciphertexts": [b64u(hashlib.sha256(self.sealed(i, j)).digest()) for j in others],
            **{
                f"{kind}_shares": [
                    b64u(self.share_digest(i, j, kind, shares[kind][j])) for j in others
                ]
                for kind in ("self", "mask")
            },
        }

    # Masks

    def u2(self) -> Any:
        return [
            [b64u(identity), b64u(naive_hash("shares", shares["header"]["body"]))]
            for identity, shares in zip(self.ids, self.case["shares"], strict=True)
        ]

    def t2(self) -> bytes:
        return naive_hash("bundle", b64u(self.T), self.u2())

    def numbers(self, stream: bytes, n_bytes: int) -> list[int]:
        return [
            int.from_bytes(stream[at : at + n_bytes], "little")
            for at in range(0, len(stream), n_bytes)
        ]

    def expanded(self, seed: bytes) -> list[int]:
        n_bytes = self.k // 8
        return self.numbers(key_stream(seed, len(self.case["sum"]) * n_bytes), n_bytes)

    def self_mask(self, i: int, seed: bytes) -> list[int]:
        return self.expanded(hkdf(seed, self.t2(), b"sheepfold/v1/self" + self.ids[i]))

    def pair_mask(self, private: bytes, i: int, j: int) -> list[int]:
        """What i adds or subtracts on account of j; `private` is i's or, for j, its own."""
        agreed = x25519(private, unb64u(self.readies[j]["masking_key"]))
        low, high = sorted([self.ids[i], self.ids[j]])
        stream = self.expanded(hkdf(agreed, self.t2(), b"sheepfold/v1/mask" + low + high))
        return stream if self.ids[i] == low else [-word for word in stream]

    def check_words(self) -> list[int]:
        n_bytes = self.k // 8
        return self.numbers(hkdf(self.t2(), b"", b"sheepfold/v1/check", 16 * n_bytes), n_bytes)

    def with_checks(self, payload: list[int]) -> list[int]:
        """Check word j stands before (j + 1)/16 of the vector's end, the last one at its end."""
        n_words = len(payload) + 16
        words = list(payload)
        for j, check in enumerate(self.check_words()):
            words.insert((j + 1) * n_words // 16 - 1, check)
        return words

    def payload(self, i: int) -> list[int]:
        """The update, weighted and rounded; here no update is longer than the clip norm."""
        member, slots = self.case["members"][i], self.case["layout"]["slots"]
        raw = bytes.fromhex(member["update"])
        values = list(struct.unpack(f"<{len(raw) // 4}f", raw))
        assert math.sqrt(sum(value**2 for value in values)) < self.case["masking"]["clip_norm"]
        numbers = self.numbers(key_stream(self.secret(i, "rounding_key"), 4 * len(values)), 4)
        words, flag = [], 0
        for slot in slots:
            scale = member["weight"] / self.case["max_weight"] / slot["step"]
            for at in range(slot["offset"], slot["offset"] + math.prod(slot["shape"])):
                e = math.floor(values[at] * scale + numbers[at] / 2**32)
                clamped = max(-slot["clip_amplitude"], min(slot["clip_amplitude"], e))
                flag |= int(clamped != e)
                words.append(clamped % 2**self.k)
        return [*words, member["weight"], 1, flag]

    def masked(self, i: int) -> list[int]:
        parts = [self.with_checks(self.payload(i)), self.self_mask(i, self.secret(i, "self_seed"))]
        private = self.secret(i, "masking_private")
        parts += [self.pair_mask(private, i, j) for j in range(self.n) if j != i]
        return [sum(words) % 2**self.k for words in zip(*parts, strict=True)]

    def body(self, words: list[int]) -> bytes:
        return b"".join(word.to_bytes(self.k // 8, "little") for word in words)

    # The end

    def u3(self) -> Any:
        return [
            [b64u(self.ids[i]), b64u(naive_hash("masked-upload", upload["body"]))]
            for i, upload in zip(self.alive, self.case["uploads"], strict=True)
        ]

    def reveal(self, i: int) -> Any:
        def given(kind: str, dealers: list[int]) -> Any:
            return [[b64u(self.ids[d]), b64u(self.shares_of(d)[kind][i])] for d in dealers]

        return {
            "version": 1,
            "transcript": b64u(self.T),
            "agent": b64u(self.ids[i]),
            "self_seed": b64u(self.secret(i, "self_seed")),
            "self_shares": given("self", [d for d in self.alive if d != i]),
            "mask_shares": given("mask", [self.case["drops"]]),
        }

    def revealed_shares(self, dealer: int, kind: str) -> dict[int, bytes]:
        """From the REVEAL messages as they stand in the transcript."""
        found = {}
        for reveal in self.case["reveals"]:
            x = self.ids.index(unb64u(reveal["body"]["agent"])) + 1
            for name, share in reveal["body"][f"{kind}_shares"]:
                if unb64u(name) == self.ids[dealer]:
                    found[x] = unb64u(share)
        return found

    def unmasked(self) -> list[int]:
        """The sum as the server gets it: from masked vectors and REVEAL messages alone."""
        seeds = {
            self.ids.index(unb64u(reveal["body"]["agent"])): unb64u(reveal["body"]["self_seed"])
            for reveal in self.case["reveals"]
        }
        gone, silent = self.case["drops"], self.case["vanishes"]
        seeds[silent] = rebuild(self.revealed_shares(silent, "self")).to_bytes(32, "big")
        private = rebuild(self.revealed_shares(gone, "mask")).to_bytes(32, "big")
        assert public_of(private) == unb64u(self.readies[gone]["masking_key"])
        vectors = [
            self.numbers(bytes.fromhex(self.case["masked"][i]), self.k // 8) for i in self.alive
        ]
        total = [sum(words) for words in zip(*vectors, strict=True)]
        for i in self.alive:
            commitment = self.case["shares"][i]["header"]["body"]["commitment"]
            assert b64u(self.commitment(i, seeds[i])) == commitment
            own = self.self_mask(i, seeds[i])
            pair = self.pair_mask(private, gone, i)  # what the one that is gone would have put in
            total = [a - b + c for a, b, c in zip(total, own, pair, strict=True)]
        return [word % 2**self.k for word in total]


# The naive functions, held against the standards


def test_the_naive_ladder_is_that_of_the_standard() -> None:
    for case in read("rfc7748_x25519.json")["cases"]:
        scalar, u = bytes.fromhex(case["scalar"]), bytes.fromhex(case["u"])
        assert x25519(scalar, u).hex() == case["result"]


def test_the_naive_hkdf_is_that_of_the_standard() -> None:
    for case in read("rfc5869_hkdf.json")["cases"]:
        ikm, salt, info = (bytes.fromhex(case[name]) for name in ("ikm", "salt", "info"))
        assert hkdf(ikm, salt, info, case["size"]).hex() == case["okm"]


def test_the_naive_cipher_is_that_of_the_standard() -> None:
    case = read("sp800_38a_aes256_ctr.json")
    stream = key_stream(bytes.fromhex(case["key"]), 64, counter=int(case["counter"], 16))
    assert stream.hex() == "".join(block["output"] for block in case["blocks"])


def test_the_naive_seal_is_that_of_the_standard() -> None:
    # Of Wycheproof's cases those with our parameters: none of its nonces is zero, so the nonce is
    # put where ours has zeros.
    n_cases = 0
    for case in read("wycheproof_aes_gcm.json")["cases"]:
        nonce = bytes.fromhex(case["iv"])
        if case["result"] != "valid" or len(case["key"]) != 64 or case["aad"] or len(nonce) != 12:
            continue
        key, plaintext = bytes.fromhex(case["key"]), bytes.fromhex(case["msg"])
        first = int.from_bytes(nonce, "big") << 32 | 1
        stream = key_stream(key, 16 + len(plaintext), counter=first)
        zero = key_stream(key, 16 + len(plaintext), counter=1)
        body = bytes(a ^ b for a, b in zip(plaintext, stream[16:], strict=True))
        # The same ciphertext under our nonce has the same hash, so the tags differ by the streams.
        as_ours = bytes(a ^ b for a, b in zip(body, zero[16:], strict=True))
        tag = bytes(
            a ^ b ^ c for a, b, c in zip(gcm_seal(key, as_ours)[-16:], zero, stream, strict=False)
        )
        assert (body.hex(), tag.hex()) == (case["ct"], case["tag"])
        n_cases += 1
    assert n_cases > 0


# The golden transcripts

GOLDEN = read("secagg_v1.json")
CASES = [pytest.param(case, id=case["name"]) for case in GOLDEN["cases"]]
golden = pytest.mark.parametrize("case", CASES)


@golden
def test_golden_documents_are_signed_by_whom_they_name(case: Any) -> None:
    server, registrar = (
        Ed25519PrivateKey.from_private_bytes(bytes.fromhex(case[name])).public_key()
        for name in ("server", "registrar")
    )
    assert signature_holds(case["ready_list"], "ready-list", key=server.public_bytes_raw())
    assert signature_holds(case["roster"], "roster", key=server.public_bytes_raw())
    for signed in case["roster"]["body"]["members"]:
        agent = unb64u(signed["body"]["agent"])
        credential = signed["body"]["credential"]
        assert signature_holds(signed, "ready", key=agent)
        assert signature_holds(credential, "credential", key=registrar.public_bytes_raw())
        assert credential["body"]["agent"] == signed["body"]["agent"]
    for name, documents in (
        ("shares", [shares["header"] for shares in case["shares"]]),
        ("masked-upload", case["uploads"]),
        ("reveal", case["reveals"]),
    ):
        for signed in documents:
            key = unb64u(signed["body"]["agent"])
            assert signature_holds(signed, name, key=key)
            assert not signature_holds(signed, "ready", key=key)
    for confirm in case["confirmed"]["confirmations"]:
        key = Ed25519PublicKey.from_public_bytes(unb64u(confirm["agent"]))
        key.verify(unb64u(confirm["signature"]), bytes.fromhex(case["confirm_hash"]))
    assert len(case["confirmed"]["confirmations"]) == 5


@golden
def test_golden_keys_and_cell(case: Any) -> None:
    naive = Naive(case)
    assert naive.T.hex() == case["transcript"]
    assert (naive.n, naive.t, case["roster"]["body"]["colluders"]) == (6, (6 + 1) // 2 + 1, 1)
    for i, ready in enumerate(naive.readies):
        for name in ("sealing", "masking"):
            assert b64u(public_of(naive.secret(i, f"{name}_private"))) == ready[f"{name}_key"]
        assert b64u(naive.secret(i, "nonce")) == ready["nonce"]
        entry = [ready["agent"], b64u(naive_hash("ready", ready))]
        assert case["ready_list"]["body"]["entries"][i] == entry
    assert naive.ids == sorted(naive.ids)
    digest = naive_hash("ready-list", case["ready_list"]["body"])
    assert case["roster"]["body"]["list_digest"] == b64u(digest)


@golden
def test_golden_draw(case: Any) -> None:
    body = case["ready_list"]["body"]
    digest = naive_hash("ready-list", body)
    seed = naive_hash("cells", body["round_digest"], b64u(digest), body["beacon"])
    ranked = sorted(
        (unb64u(identity) for identity, _ in body["entries"]),
        key=lambda identity: hmac.new(seed, identity, hashlib.sha256).digest(),
    )
    assert len(ranked) // case["masking"]["cell_target"] == 1  # one cell: all of them
    assert sorted(ranked) == Naive(case).ids


@golden
def test_golden_shares(case: Any) -> None:
    naive = Naive(case)
    for i, shares in enumerate(case["shares"]):
        assert shares["header"]["body"] == naive.shares_header(i)
        assert shares["ciphertexts"] == [b64u(naive.sealed(i, j)) for j in range(6) if j != i]


@golden
def test_golden_masked_vectors(case: Any) -> None:
    naive = Naive(case)
    assert naive.u2() == case["u2"]
    assert naive.t2().hex() == case["bundle"]
    assert naive.check_words() == case["check_words"]
    for i in range(naive.n):
        assert naive.payload(i) == case["payloads"][i]
        if i == case["drops"]:
            assert case["masked"][i] is None
            continue
        body = naive.body(naive.masked(i))
        assert body.hex() == case["masked"][i]
        header = case["uploads"][naive.alive.index(i)]["body"]
        assert header == {
            "version": 1,
            "transcript": b64u(naive.T),
            "bundle": b64u(naive.t2()),
            "agent": b64u(naive.ids[i]),
            "body_sha256": b64u(hashlib.sha256(body).digest()),
            "body_n_bytes": len(body),
        }


@golden
def test_golden_confirmations_and_reveals(case: Any) -> None:
    naive = Naive(case)
    assert naive.u3() == case["u3"]
    assert naive_hash("survivors", naive.u3()).hex() == case["survivors_hash"]
    confirm = naive_hash("confirm", b64u(naive.t2()), naive.u3())
    assert confirm.hex() == case["confirm_hash"]
    revealers = [i for i in naive.alive if i != case["vanishes"]]
    assert [reveal["body"] for reveal in case["reveals"]] == [naive.reveal(i) for i in revealers]


@golden
def test_golden_rebuilt_secrets(case: Any) -> None:
    naive = Naive(case)
    for dealer, kind, name in (
        (case["drops"], "mask", "masking_private"),
        (case["vanishes"], "self", "self_seed"),
    ):
        shares = naive.revealed_shares(dealer, kind)
        assert len(shares) == naive.t == 4
        assert rebuild(shares).to_bytes(32, "big").hex() == case["rebuilt"][name]
        assert naive.secret(dealer, name).hex() == case["rebuilt"][name]
        shares.popitem()
        assert rebuild(shares) != int(case["rebuilt"][name], 16)


@golden
def test_golden_sum(case: Any) -> None:
    naive = Naive(case)
    total = naive.unmasked()
    assert total == case["sum"]
    ring = 2**naive.k
    payload = [
        sum(words) % ring for words in zip(*(naive.payload(i) for i in naive.alive), strict=True)
    ]
    positions = {(j + 1) * len(total) // 16 - 1: j for j in range(16)}
    for at, j in positions.items():
        assert total[at] == naive.check_words()[j] * 5 % ring
    assert [word for at, word in enumerate(total) if at not in positions] == payload
    assert payload[-3:] == [case["weight_sum"], case["n_members"], case["n_clipped"]]
    signed = [word - ring if word >= ring // 2 else word for word in payload[:-3]]
    step = case["layout"]["slots"][0]["step"]
    values = struct.pack(f"<{len(signed)}f", *(word * step for word in signed))
    assert values.hex() == case["values"]


@golden
def test_golden_amplitudes_never_wrap(case: Any) -> None:
    masking = case["masking"]
    half = 2 ** (case["word_bits"] - 1) - 1
    for slot in case["layout"]["slots"]:
        assert masking["max_cell"] * (slot["clip_amplitude"] + 1) <= half
        assert masking["max_cell"] * (slot["clip_amplitude"] + 2) > half
        assert slot["step"] == masking["max_change"] / slot["clip_amplitude"]


# Bad cases, of the naive implementation


@golden
def test_a_bad_share_has_another_digest_and_gives_another_secret(case: Any) -> None:
    naive, bad = Naive(case), case["bad"]["bad_share"]
    dealer, share = case["drops"], bytes.fromhex(bad["share"])
    digests = case["shares"][dealer]["header"]["body"]["mask_shares"]
    digest = naive.share_digest(dealer, bad["receiver"], bad["kind"], share)
    assert b64u(digest) not in digests
    shares = naive.revealed_shares(dealer, "mask")
    assert bad["receiver"] + 1 in shares
    shares[bad["receiver"] + 1] = share
    assert rebuild(shares) != int(case["rebuilt"]["masking_private"], 16)


@golden
def test_bad_keys_give_no_secret_or_have_another_form(case: Any) -> None:
    naive = Naive(case)
    for key in case["bad"]["bad_low_order_keys"]:
        for i in range(2):
            assert x25519(naive.secret(i, "masking_private"), bytes.fromhex(key)) == bytes(32)
    for key in case["bad"]["bad_not_canonical_keys"]:
        assert int.from_bytes(bytes.fromhex(key), "little") >= P25519


@golden
def test_a_bad_t2_is_signed_and_of_other_members(case: Any) -> None:
    naive, bad = Naive(case), case["bad"]["bad_t2"]
    other = naive_hash("bundle", b64u(naive.T), naive.u2()[:-1])
    assert other.hex() == bad["bundle"] != case["bundle"]
    assert unb64u(bad["upload"]["body"]["bundle"]) == other
    assert signature_holds(bad["upload"], "masked-upload", key=naive.ids[0])
    # Its masks and check words are others.
    seed = naive.secret(0, "self_seed")
    info = b"sheepfold/v1/self" + naive.ids[0]
    assert hkdf(seed, other, info) != hkdf(seed, naive.t2(), info)


# The real implementation


class Real:
    """The real implementation in the place of each member and of the server."""

    def __init__(self, case: Any) -> None:
        self.case = case
        masking = self.parsed(CellMasking, case["masking"])
        layout = self.parsed(VectorLayout, case["layout"])
        shapes = {slot.name: slot.shape for slot in layout.slots}
        assert agreed_layout(VectorLayout.of_shapes(shapes), masking) == layout
        self.plan = EncodingPlan.of(layout, masking, max_weight=case["max_weight"])
        self.ready_list = self.parsed(Signed[ReadyList], case["ready_list"])
        self.roster = self.parsed(Signed[Roster], case["roster"])
        body = self.roster.body
        self.policy = CellPolicy(
            federation=body.federation,
            round=body.round,
            round_digest=body.round_digest,
            server=Signer.from_private_bytes(bytes.fromhex(case["server"])).identity,
            registrar=Signer.from_private_bytes(bytes.fromhex(case["registrar"])).identity,
            masking=masking,
            body_n_bytes=self.plan.n_bytes,
            min_members=5,
        )
        self.agents = []
        for member, signed in zip(case["members"], case["roster"]["body"]["members"], strict=True):
            names = ("sealing_private", "masking_private", "self_seed", "nonce")
            names = (*names, "self_coefficients", "mask_coefficients")
            draws = iter([bytes.fromhex(member[name]) for name in names])
            self.agents.append(
                SecAggAgent.begin(
                    Signer.from_private_bytes(bytes.fromhex(member["signing_private"])),
                    self.policy,
                    credential=self.parsed(Signed[Credential], signed["body"]["credential"]),
                    attempt=signed["body"]["attempt"],
                    expires_at=signed["body"]["expires_at"],
                    entropy=lambda n_bytes, draws=draws: self.drawn(draws, n_bytes),
                )
            )
        self.server = CellServer(body, body_n_bytes=self.plan.n_bytes, word_bits=case["word_bits"])

    @staticmethod
    def drawn(draws: Any, n_bytes: int) -> bytes:
        data: bytes = next(draws)
        assert len(data) == n_bytes
        return data

    @staticmethod
    def parsed(model: Any, document: Any) -> Any:
        return parse(model, json.dumps(document))

    def alive(self) -> list[Any]:
        return [agent for i, agent in enumerate(self.agents) if i != self.case["drops"]]

    def share(self) -> None:
        for agent, shares in zip(self.agents, self.case["shares"], strict=True):
            assert agent.receive_roster(self.ready_list, self.roster).as_json() == shares
            parsed = self.parsed(Shares, shares)
            self.server.check_shares(parsed)
            self.server.shares[parsed.header.body.agent] = parsed
        self.server.close_sharing()

    def mask(self, i: int) -> Any:
        member = self.case["members"][i]
        payload = encode(
            np.frombuffer(bytes.fromhex(member["update"]), "<f4"),
            weight=member["weight"],
            plan=self.plan,
            stream=SecureStream(bytes.fromhex(member["rounding_key"])),
        )
        assert payload.tolist() == self.case["payloads"][i]
        masks = self.agents[i].receive_bundle(self.server.bundle_for(self.identity(i)))
        words = with_checks(payload, masks.checks, self.plan, 0, self.plan.n_words)
        MaskAdder(masks.masks, word_bits=self.case["word_bits"]).add(words)
        return words

    def identity(self, i: int) -> bytes:
        identity: bytes = self.agents[i].state.ready.body.agent
        return identity

    def upload(self) -> None:
        uploads = iter(self.case["uploads"])
        for i, agent in enumerate(self.agents):
            words = self.mask(i)
            if i == self.case["drops"]:
                continue
            assert words.tobytes().hex() == self.case["masked"][i]
            document = next(uploads)
            header = agent.sign_upload(hashlib.sha256(words.tobytes()).digest())
            assert header.as_json() == document
            parsed = self.parsed(Signed[MaskedHeader], document)
            self.server.check_upload(parsed)
            self.server.uploads[parsed.body.agent] = parsed
            agent.uploaded()
        self.server.close_uploading()

    def confirm_and_reveal(self) -> None:
        confirmed = self.parsed(Confirmed, self.case["confirmed"])
        reveals = iter(self.case["reveals"])
        for agent, confirm in zip(self.alive(), confirmed.confirmations, strict=True):
            assert agent.receive_survivors(self.server.survivors()) == confirm
            self.server.check_confirm(confirm)
            self.server.confirms[confirm.agent] = confirm
        assert self.server.confirmed() == confirmed
        for agent in self.alive():
            if agent is not self.agents[self.case["vanishes"]]:
                document = next(reveals)
                assert agent.receive_confirmed(confirmed).as_json() == document
                parsed = self.parsed(Signed[Reveal], document)
                self.server.check_reveal(parsed)
                self.server.reveals[parsed.body.agent] = parsed


@golden
def test_the_real_implementation_repeats_every_message_and_the_sum(case: Any) -> None:
    real = Real(case)
    members = [agent.state.ready.as_json() for agent in real.agents]
    assert members == case["roster"]["body"]["members"]
    assert real.roster.body.transcript().hex() == case["transcript"]
    real.share()
    assert real.server.bundle_hash().hex() == case["bundle"]
    real.upload()
    real.confirm_and_reveal()
    recovery = real.server.recover()
    assert recovery is not None
    assert recovery.blamed == ()
    assert recovery.checks.tolist() == case["check_words"]
    total = np.zeros(real.plan.n_words, real.plan.dtype)
    for vector in case["masked"]:
        if vector is not None:
            total += np.frombuffer(bytes.fromhex(vector), real.plan.dtype)
    MaskAdder(recovery.masks, word_bits=case["word_bits"]).add(total)
    assert total.tolist() == case["sum"]
    found = decode(split_sum(total, recovery.checks, real.plan, n_members=5), real.plan)
    assert found.values.tobytes().hex() == case["values"]
    assert (found.weight_sum, found.n_members, found.n_clipped) == (
        case["weight_sum"],
        case["n_members"],
        case["n_clipped"],
    )


@golden
def test_the_real_implementation_refuses_bad_keys(case: Any) -> None:
    server = Signer.from_private_bytes(bytes.fromhex(case["server"]))
    member = Signer.from_private_bytes(bytes.fromhex(case["members"][5]["signing_private"]))
    keys = case["bad"]["bad_low_order_keys"] + case["bad"]["bad_not_canonical_keys"]
    for key in keys:
        for which in ("sealing_key", "masking_key"):
            real = Real(case)
            ready = real.roster.body.members[5].body.model_copy(update={which: bytes.fromhex(key)})
            members = (*real.roster.body.members[:5], sign(member, "ready", ready).signed)
            entries = (*real.ready_list.body.entries[:5], (ready.agent, ready.digest()))
            listed = real.ready_list.body.model_copy(update={"entries": entries})
            roster = real.roster.body.model_copy(
                update={"members": members, "list_digest": listed.digest()}
            )
            with pytest.raises(CheckError) as caught:
                real.agents[0].receive_roster(
                    sign(server, "ready-list", listed).signed, sign(server, "roster", roster).signed
                )
            assert caught.value.check is Check.WEAK_KEY


@golden
def test_the_real_implementation_refuses_a_bad_t2(case: Any) -> None:
    real = Real(case)
    real.share()
    real.upload()
    bad = real.parsed(Signed[MaskedHeader], case["bad"]["bad_t2"]["upload"])
    with pytest.raises(MaskedMessageError, match="other members"):
        real.server.check_upload(bad)
    survivors = real.server.survivors()
    changed = survivors.model_copy(update={"headers": (bad, *survivors.headers[1:])})
    with pytest.raises(CheckError) as caught:
        real.agents[1].receive_survivors(changed)
    assert caught.value.check is Check.BAD_SURVIVORS


@golden
def test_the_real_implementation_names_who_reveals_a_bad_share(case: Any) -> None:
    real = Real(case)
    real.share()
    real.upload()
    real.confirm_and_reveal()
    bad = case["bad"]["bad_share"]
    liar = real.identity(bad["receiver"])
    signer = Signer.from_private_bytes(
        bytes.fromhex(case["members"][bad["receiver"]]["signing_private"])
    )
    body = real.server.reveals[liar].body
    ((dealer, _),) = body.mask_shares
    body = body.model_copy(update={"mask_shares": ((dealer, bytes.fromhex(bad["share"])),)})
    reveal = sign(signer, "reveal", body).signed
    real.server.check_reveal(reveal)
    real.server.reveals[liar] = reveal
    assert real.server.recover() is None  # three good shares are left, four are needed
    late = real.agents[case["vanishes"]].receive_confirmed(real.server.confirmed())
    real.server.reveals[late.body.agent] = late
    recovery = real.server.recover()
    assert recovery is not None
    assert recovery.blamed == (liar,)


def test_the_golden_file_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(VECTORS / "make_secagg_vectors.py"))
    assert json.loads(json.dumps(script["vectors"]())) == GOLDEN
