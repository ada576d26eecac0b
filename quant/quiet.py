"""Keeps libraries from telling users what they cannot act on."""

import logging


def quiet_libraries() -> None:
    """Silence a notice of bitsandbytes; call it before the first import of `quant.base_model`.

    At import it announces, to everyone, that it did not find a package that we keep out on purpose
    (TRAINING, trap 12).
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
