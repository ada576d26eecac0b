"""The embedded base model: where it lies. Imports neither torch nor transformers."""

from importlib.resources import files
from pathlib import Path
from typing import Final

EMBEDDED_NAME: Final = "embedded:tiny"
"""What manifests call the base that comes with Sheepfold."""


def tiny_base_path() -> Path:
    """The folder with the embedded base, its tokenizer and `base.json`."""
    return Path(str(files("quant.tiny") / "base"))
