"""Text of others on the owner's terminal: a name or a sentence, never an instruction to it."""

from rich.markup import escape


def plain(text: str) -> str:
    """One line without control signs, whatever a server or a file put into it.

    An escape sequence could erase what `join` shows before it asks, and a line break could imitate
    one of its sections; both become spaces.

    Args:
        text: From anywhere.
    """
    return "".join(sign if sign.isprintable() else " " for sign in text)


def shown(text: str) -> str:
    """Text of a model for a terminal: its line breaks and tabs stay, other control signs do not.

    Args:
        text: From a model, which may have learnt escape sequences from anyone's records.
    """
    return "".join(sign if sign.isprintable() or sign in "\n\t" else " " for sign in text)


def escaped(text: str) -> str:
    """`plain` text that rich prints as it stands, brackets included."""
    return escape(plain(text))
