"""Between an update's real numbers and words of Z_2^k that can be summed under masks.

A tensor has a step Δ and an integer amplitude A; its value x becomes
e = clamp(⌊x/Δ + u⌋, −A, A) with u uniform in [0, 1), so e·Δ is x on average. The weight w of an
agent is applied before: x stands for (w/W)·x. The vector of words is

    tensors · companions · w · 1 · clipped flag, with 16 check words spread evenly between and
    after them.

A companion is a count of weights, as w itself is: the word is w where an agent trained the rank row
and 0 where not, so it survives the sum exactly, needs no step, and is in no norm.

Nothing wraps: m_max·(A + 1) ≤ 2^(k−1) − 1 for the signed values, m_max·W ≤ 2^k − 1 for weights.

Source: PROTOCOL, "Encoding"; stochastic rounding as in Bonawitz et al., MLSys 2019.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from privacy.distributed_noise import AgentNoise, agent_noise, noisy_update
from privacy.errors import EncodingPlanError, SumError, UpdateRangeError
from privacy.masking import Words, word_dtype
from privacy.noise import SecureStream
from privacy.updates import Float32Array, Float64Array, l2_norm
from protocol.blocks import CellMasking, HelperMasking, MaskingBlock, SumMasking
from protocol.layout import PARTICIPATION, VectorLayout
from protocol.limits import MAX_UPDATE_BYTES
from protocol.privacy import CentralPrivacy, PrivacyBlock

N_CHECK_WORDS: Final = 16
N_TAIL_WORDS: Final = 3
"""The weight, the count and the clipped flag."""
_CHUNK_VALUES: Final = 1 << 16


def amplitude_of(*, word_bits: Literal[16, 32], max_members: int) -> int:
    """The largest A for which a cell of `max_members` never wraps.

    Raises:
        EncodingPlanError: None is left: the cell is too large for the word.
    """
    amplitude = ((1 << (word_bits - 1)) - 1) // max_members - 1
    if amplitude < 1:
        msg = (
            f"a cell of {max_members} leaves no room in words of {word_bits} bits; lower "
            "masking.max_cell or set masking.word_bits = 32"
        )
        raise EncodingPlanError(msg)
    return amplitude


def agreed_layout(
    layout: VectorLayout, masking: MaskingBlock, privacy: PrivacyBlock | None = None
) -> VectorLayout:
    """The layout of a federation: with the step and amplitude of every tensor where it masks.

    Args:
        layout: Names, shapes and offsets.
        masking: The manifest's block.
        privacy: The manifest's block; under P2 one step holds for all tensors, and noise has room.

    Raises:
        EncodingPlanError: A sum could wrap.
        NoiseError: The same with noise, or its shares are too small.
    """
    if not isinstance(masking, SumMasking):
        return layout
    noise = None if privacy is None else agent_noise(privacy, masking, n_values=layout.n_values)
    if noise is None:
        amplitude = amplitude_of(word_bits=masking.word_bits, max_members=masking.max_cell)
        step = masking.max_change / amplitude
    else:
        amplitude, step = noise.amplitude, noise.step
    shapes = {slot.name: slot.shape for slot in layout.slots}
    return VectorLayout.of_shapes(shapes, step=step, clip_amplitude=amplitude)


@dataclass(frozen=True, kw_only=True)
class EncodingPlan:
    """How a federation's updates become words; equal on every machine.

    Guarantees:
        1. No sum over at most `max_members` members wraps, in values or in weights.

    Raises (at construction):
        EncodingPlanError: A sum could wrap, or the layout has no step or amplitude.
    """

    layout: VectorLayout
    """Of what agents send; companions have no step."""
    word_bits: Literal[16, 32]
    max_members: int
    """m_max, the largest cell."""
    max_weight: int
    """W, the largest weight."""
    clip_norm: float
    """C, the largest L2 norm of an update."""
    noise: AgentNoise | None = None
    """What each agent adds, under profile P2."""
    is_noised_later: bool = False
    """Profile P3: the server adds noise to a sum, and before that nothing of it may show."""

    def __post_init__(self) -> None:
        """Refuse what could wrap."""
        half = 2 ** (self.word_bits - 1) - 1
        for slot in self.layout.tensors.slots:
            if slot.step is None or slot.clip_amplitude is None:
                msg = f"{slot.name!r} has no step or amplitude"
                raise EncodingPlanError(msg)
            if self.max_members * (slot.clip_amplitude + 1) > half:
                msg = (
                    f"{self.max_members} members of amplitude {slot.clip_amplitude} wrap a word "
                    f"of {self.word_bits} bits in {slot.name!r}"
                )
                raise EncodingPlanError(msg)
        if self.max_members * self.max_weight > 2**self.word_bits - 1:
            msg = (
                f"{self.max_members} members of weight {self.max_weight} wrap a word of "
                f"{self.word_bits} bits"
            )
            raise EncodingPlanError(msg)
        if self.n_bytes > MAX_UPDATE_BYTES:
            msg = f"{self.n_bytes} bytes of words; the limit is {MAX_UPDATE_BYTES}"
            raise EncodingPlanError(msg)

    @classmethod
    def of(
        cls,
        layout: VectorLayout,
        masking: CellMasking | HelperMasking,
        *,
        max_weight: int,
        privacy: PrivacyBlock | None = None,
    ) -> "EncodingPlan":
        """The plan of a manifest.

        Args:
            layout: With step and amplitude; see `agreed_layout`.
            masking: The manifest's block.
            max_weight: W.
            privacy: The manifest's block.
        """
        n_values = layout.n_values
        return cls(
            noise=None if privacy is None else agent_noise(privacy, masking, n_values=n_values),
            is_noised_later=isinstance(privacy, CentralPrivacy),
            layout=layout,
            word_bits=masking.word_bits,
            max_members=masking.max_cell,
            max_weight=max_weight,
            clip_norm=masking.clip_norm,
        )

    @property
    def dtype(self) -> Any:  # noqa: ANN401 - one of two dtypes, of Words
        """The type of a word, little-endian."""
        return word_dtype(self.word_bits)

    @property
    def n_payload(self) -> int:
        """Words without the check words."""
        return self.layout.n_values + N_TAIL_WORDS

    @property
    def n_words(self) -> int:
        """Length of a masked vector."""
        return self.n_payload + N_CHECK_WORDS

    @property
    def n_bytes(self) -> int:
        """Size of a masked vector, the body of an upload."""
        return self.n_words * (self.word_bits // 8)

    @property
    def rounding_norm(self) -> float:
        """√(Σ d_l Δ_l²): what rounding adds to the norm of an update, at most."""
        tensors = self.layout.tensors.slots  # a companion is not rounded
        squares = (slot.n_values * float(slot.step or 0.0) ** 2 for slot in tensors)
        return math.sqrt(math.fsum(squares))

    def check_positions(self) -> tuple[int, ...]:
        """Where the check words stand in a masked vector; the last word is one."""
        return tuple((j + 1) * self.n_words // N_CHECK_WORDS - 1 for j in range(N_CHECK_WORDS))


def encode(
    vector: Float32Array,
    *,
    weight: int,
    plan: EncodingPlan,
    stream: SecureStream,
    participation: Float32Array | None = None,
) -> Words:
    """An update as words: tensors, companions, weight, one, clipped flag.

    The result is made once for each update and stored: rounding anew would let two sums of the
    same update differ, and their difference tell of it.

    Guarantees:
        1. On average over `stream`, a value that is not clipped is unchanged.
        2. ‖Δ·e‖ ≤ (w/W)·C + √(Σ d_l Δ_l²), checked (PROTOCOL, check 15).
        3. Under profile P2, the words hold the agent's share of the noise; under P2 and P3, no
           flag.
        4. A participation's word is the weight or 0, exactly; clip and norm do not count it.

    Args:
        vector: [n_values] float32 in the order of the layout's tensors; unchanged.
        weight: w, 1 to W.
        plan: Of the federation.
        stream: Fresh.
        participation: [n_rows] float32 of 0 and 1, where the layout has it.

    Returns:
        [n_payload] words.

    Raises:
        UpdateRangeError: NaN or infinity, another length, a weight outside 1 to W, a participation
            other than 0 and 1 or where there should be none, or an encoding that is longer than it
            may be.
    """
    tensors = plan.layout.tensors
    if vector.shape != (tensors.n_values,):
        msg = f"an update of {vector.shape}, the layout has {tensors.n_values} values"
        raise UpdateRangeError(msg)
    _check_participation(participation, plan)
    if plan.noise is not None:
        words = np.empty(plan.n_payload, plan.dtype)
        words[: plan.layout.n_values] = noisy_update(vector, plan.noise, stream).view(np.uint32)
        words[-N_TAIL_WORDS:] = (1, 1, 0)
        return words
    if not 1 <= weight <= plan.max_weight:
        msg = f"weight {weight} is not from 1 to {plan.max_weight}"
        raise UpdateRangeError(msg)
    norm = l2_norm(vector)
    if not np.isfinite(norm):
        msg = "the update has values that are not finite"
        raise UpdateRangeError(msg)
    shrink = min(1.0, plan.clip_norm / norm) if norm > 0.0 else 1.0
    share = weight / plan.max_weight
    words = np.empty(plan.n_payload, plan.dtype)
    signed = words.view(np.int16 if plan.word_bits == 16 else np.int32)
    # Two buffers that stay in the cache: new ones for each run would cost more than the arithmetic.
    values, draws = np.empty(_CHUNK_VALUES), np.empty(_CHUNK_VALUES)
    clipped = shrink < 1.0
    squares = 0.0
    for slot, where in tensors.slices():
        step, amplitude = float(slot.step or 0.0), int(slot.clip_amplitude or 0)
        n_squares = 0.0
        for run in _runs(where):
            value, noise = values[: run.stop - run.start], draws[: run.stop - run.start]
            np.copyto(value, vector[run])  # first: a product in float32 would round with a bias
            value *= shrink * share / step
            stream.fill_uniform(noise)
            np.add(value, noise, out=value)
            np.floor(value, out=value)
            square = np.multiply(value, value, out=noise)
            if square.max() > amplitude**2:
                clipped = True
                np.clip(value, -amplitude, amplitude, out=value)
                np.multiply(value, value, out=square)
            n_squares += float(square.sum())
            signed[run] = value
        squares += n_squares * step * step
    if participation is not None:
        words[tensors.n_values : -N_TAIL_WORDS] = participation.astype(plan.dtype) * weight
    words[-N_TAIL_WORDS:] = (weight, 1, int(clipped and not plan.is_noised_later))
    longest = share * plan.clip_norm + plan.rounding_norm
    if np.sqrt(squares) > longest * (1.0 + 1e-9):
        msg = f"the encoded update has norm {np.sqrt(squares):.6g}; at most {longest:.6g} is agreed"
        raise UpdateRangeError(msg)
    return words


def _check_participation(participation: Float32Array | None, plan: EncodingPlan) -> None:
    where = plan.layout.companion(PARTICIPATION)
    n_rows = 0 if where is None else where.stop - where.start
    found = np.empty(0, np.float32) if participation is None else participation
    if found.shape != (n_rows,) or not np.isin(found, (0.0, 1.0)).all():
        msg = f"participation of {found.shape} values; expected {n_rows}, each 0 or 1"
        raise UpdateRangeError(msg)


def _runs(where: slice) -> Iterator[slice]:
    for start in range(where.start, where.stop, _CHUNK_VALUES):
        yield slice(start, min(start + _CHUNK_VALUES, where.stop))


def with_checks(payload: Words, checks: Words, plan: EncodingPlan, start: int, stop: int) -> Words:
    """Words `start` to `stop` of the vector that is masked: the payload with the check words in it.

    Args:
        payload: [n_payload].
        checks: [16].
        plan: Of the federation.
        start: First word.
        stop: One past the last.

    Returns:
        [stop − start] words, a copy.
    """
    run = np.empty(stop - start, plan.dtype)
    fill_with_checks(run, payload, checks, plan, start)
    return run


def fill_with_checks(
    run: Words, payload: Words, checks: Words, plan: EncodingPlan, start: int
) -> None:
    """As `with_checks`, into `run`, which says how many words are wanted.

    Args:
        run: Written to.
        payload: [n_payload].
        checks: [16].
        plan: Of the federation.
        start: First word.
    """
    at, stop = start, start + len(run)
    n_before = 0
    for index, position in enumerate(plan.check_positions()):
        if position < at:
            n_before = index + 1
            continue
        if position >= stop:
            break
        run[at - start : position - start] = payload[at - index : position - index]
        run[position - start] = checks[index]
        at, n_before = position + 1, index + 1
    run[at - start :] = payload[at - n_before : stop - n_before]


@dataclass(frozen=True, kw_only=True)
class DecodedSum:
    """What a cell's sum says."""

    values: Float32Array
    """Σ (w/W)·x, [n_values] float32, of the tensors."""
    weight_sum: int
    n_members: int
    n_clipped: int
    row_weights: Float64Array | None
    """Σ w over the members that say they trained the rank row, [n_rows], exact; None: all do."""


def split_sum(words: Words, checks: Words, plan: EncodingPlan, *, n_members: int) -> Words:
    """Check an unmasked sum and take the check words out of it.

    Args:
        words: [n_words], every mask removed.
        checks: [16], those of one member.
        plan: Of the federation.
        n_members: How many were summed.

    Returns:
        [n_payload] words.

    Raises:
        SumError: Another length, or the check words, the count, the weight or the flags are not
            those of `n_members` members: a mask is missing or wrong, or a member lies about its
            count.
    """
    if words.shape != (plan.n_words,):
        msg = f"a sum of {words.shape} words, {plan.n_words} are expected"
        raise SumError(msg)
    positions = np.array(plan.check_positions())
    expected: Words = (checks.astype(np.uint64) * np.uint64(n_members)).astype(plan.dtype)
    if not np.array_equal(words[positions], expected):
        msg = "check words do not add up: a mask is missing, wrong or misaligned"
        raise SumError(msg)
    keep = np.ones(len(words), np.bool_)
    keep[positions] = False
    payload: Words = words[keep]
    weight_sum, count, n_clipped = (int(word) for word in payload[-N_TAIL_WORDS:])
    if count != n_members:
        msg = f"the count word says {count}, {n_members} members were summed"
        raise SumError(msg)
    if not n_members <= weight_sum <= n_members * plan.max_weight:
        msg = f"weights add up to {weight_sum}; {n_members} members have at most {plan.max_weight}"
        raise SumError(msg)
    if n_clipped > n_members and not plan.is_noised_later:
        msg = f"{n_clipped} of {n_members} members say that they clipped"
        raise SumError(msg)
    return payload


def checked_sum(words: Words, checks: Words, plan: EncodingPlan, *, n_members: int) -> Words:
    """As `split_sum`, and the mean is no longer than an honest one can be.

    Every honest update has a norm of at most C, so has their weighted mean, but for the rounding
    and, under P2, noise. A
    weight that lies, or words that are no update, can make it as long as this and no longer. Under
    P3 that is not looked at, since whether it fails would tell of a sum without noise; such a mean
    is clipped anyway.

    Raises:
        SumError: See `split_sum`; or the mean is longer than C allows (LEARNING, "Filtering").
    """
    payload = split_sum(words, checks, plan, n_members=n_members)
    if plan.is_noised_later:
        return payload
    found = decode(payload, plan)
    per_weight = plan.max_weight / found.weight_sum
    longest = plan.clip_norm + n_members * per_weight * plan.rounding_norm
    if plan.noise is not None:
        longest += plan.noise.longest_of_mean(n_members)
    norm = l2_norm(found.values) * per_weight
    if not norm <= longest * (1.0 + 1e-6):
        msg = f"the mean of the cell has norm {norm:.6g}; at most {longest:.6g} is agreed"
        raise SumError(msg)
    return payload


def decode(payload: Words, plan: EncodingPlan) -> DecodedSum:
    """The numbers of a checked sum.

    Args:
        payload: [n_payload] words from `split_sum`.
        plan: Of the federation.

    Raises:
        SumError: Another length.
    """
    if payload.shape != (plan.n_payload,):
        msg = f"a sum of {payload.shape} words, {plan.n_payload} are expected"
        raise SumError(msg)
    signed: NDArray[np.signedinteger] = payload.view(np.int16 if plan.word_bits == 16 else np.int32)
    values = np.empty(plan.layout.tensors.n_values, np.float32)
    for slot, where in plan.layout.tensors.slices():
        for run in _runs(where):
            values[run] = signed[run] * np.float64(slot.step or 0.0)
    weight_sum, count, n_clipped = (int(word) for word in payload[-N_TAIL_WORDS:])
    rows = plan.layout.companion(PARTICIPATION)
    return DecodedSum(
        values=values,
        weight_sum=weight_sum,
        n_members=count,
        n_clipped=n_clipped,
        row_weights=None if rows is None else payload[rows].astype(np.float64),
    )
