"""Records to train on: ordinary ones of the embedded world, and canaries."""

from typing import Final

import numpy as np
from transformers import PreTrainedTokenizerBase

from edge_agent.data.records import Record
from edge_agent.data.tokens import Example, tokenize
from protocol.blocks import TrainingBlock
from quant.tiny.instructions import Category, make_records
from quant.tiny.world import Split, make_world
from simulations.errors import AuditInputError

_N_ASKED: Final = 12
_N_ANSWERED: Final = 4
_SHORTEST_WORD: Final = 3


def ordinary_records(n_records: int, rng: np.random.Generator) -> list[Record]:
    """Draw different instruction records of the embedded world, all categories mixed.

    Args:
        n_records: At least 1.
        rng: Draws them and their order.

    Raises:
        TinyWorldError: The world has not so many.
    """
    made = make_records(
        make_world(), n_per_category=-(-n_records // len(Category)), split=Split.TRAIN, rng=rng
    )
    return [
        Record(
            instruction=made[i]["instruction"],
            context=made[i]["context"],
            response=made[i]["response"],
            category=made[i]["category"],
            messages=None,
            source=f"ordinary[{i}]",
        )
        for i in rng.permutation(len(made))[:n_records].tolist()
    ]


def canary_records(
    n_records: int, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator
) -> list[Record]:
    """Draw records of random words, each with a gradient that is much its own.

    Twelve words are asked and four answered: of the forms that were tried this one's gradients
    overlap the least (docs/LOG.md).

    Args:
        n_records: At least 1.
        tokenizer: Its words are used, those that are one token.
        rng: Draws the words.

    Raises:
        AuditInputError: The tokenizer has hardly any words.
    """
    words = _words(tokenizer)
    if len(words) < _N_ASKED + _N_ANSWERED:
        raise AuditInputError(f"the tokenizer has {len(words)} whole words; canaries need 16")

    def some(n_words: int) -> str:
        return " ".join(words[i] for i in rng.integers(len(words), size=n_words).tolist())

    return [
        Record(
            instruction=some(_N_ASKED),
            context="",
            response=some(_N_ANSWERED),
            category=None,
            messages=None,
            source=f"canary[{number}]",
        )
        for number in range(n_records)
    ]


def as_examples(
    records: list[Record], tokenizer: PreTrainedTokenizerBase, block: TrainingBlock
) -> tuple[Example, ...]:
    """Tokenise records as the agents do; none is left out.

    Args:
        records: At least one.
        tokenizer: The base's.
        block: Template, length, and what carries loss.

    Raises:
        DataError: A record cannot be used.
    """
    return tokenize(
        records,
        tokenizer,
        template=block.template,
        loss_on=block.loss_on,
        max_length=block.max_length,
    ).examples


def _words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words that the tokenizer has as one token after a blank, in the order of their tokens."""
    texts = (str(tokenizer.decode([token])) for token in range(len(tokenizer)))
    found = (text[1:] for text in texts if text.startswith(" "))
    return [
        word for word in found if len(word) >= _SHORTEST_WORD and word.isascii() and word.isalpha()
    ]
