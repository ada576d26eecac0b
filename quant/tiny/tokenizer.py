"""The embedded base's tokenizer: byte-level BPE, trained on text of the world.

The base never reads an instruction in pre-training, but it must be able to spell one. So the
tokenizer is also trained on ordinary English words that instructions and their answers use, those
of the prompt template among them: as a list of words, which says nothing about an answer. Without
it the template alone takes 88 tokens (128 with a context) instead of 30 (44). The base's vectors
for these words stay at their random start, until an adapter learns to heed them.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

_LINE_STARTS: Final = (
    *("Below", "Write", "###", "What", "Which", "Tell", "Name", "Suggest", "Give", "Think"),
    *("Extract", "Find", "Summarise", "Sum", "Classify", "Sort", "Make", "Invent", "Read"),
    *("According", "\n\n"),
)
_WITHIN_LINES: Final = (
    *("an", "instruction", "that", "describes", "task", "paired", "with", "input", "provides"),
    *("further", "context", "Write", "response", "appropriately", "completes", "the", "request"),
    *("Instruction", "Input", "Response", "what", "does", "say", "about", "me", "ideas", "for"),
    *("gift", "gifts", "three", "of", "presents", "would", "like", "It", "is", "feast", "wedding"),
    *("winter", "and", "in", "text", "up", "this", "short", "summary", "these", "words", "usual"),
    *("have", "belongs", "to", "every", "verse", "song", "poem", "tale", "rhyme", "give"),
)
_WORD_LIST_REPEATS: Final = 500
"""Enough for each word to be merged into one token beside twenty thousand documents."""


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer.

    Args:
        documents: Text of the world.
        vocab_size: At least 259: 256 bytes and the three special tokens.

    Returns:
        A fast tokenizer with `bos`, `eos` and `pad`, three different tokens. By default it puts
        `bos` before a text, as the base model saw it. It has no unknown token: bytes spell
        everything.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = "\n".join((" ".join(("", *_WITHIN_LINES)), *_LINE_STARTS))
    tokenizer.train_from_iterator(
        chain(documents, [words] * _WORD_LIST_REPEATS),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
