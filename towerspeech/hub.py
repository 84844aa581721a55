"""Data sets of the Hugging Face hub: whatever goes wrong with them becomes one message."""

import contextlib
from collections.abc import Iterator

from towerspeech.errors import UserError


@contextlib.contextmanager
def asking_hub(name: str, remedy: str) -> Iterator[None]:
    """Around calls of the datasets library that may ask the hub for ``name``, quietly.

    Raises:
        UserError: The hub is not reached, has no such data set, or it is gated or malformed; it ends with the remedy.
    """
    import datasets
    from huggingface_hub.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()  # its retries; the message below says it once
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many classes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: the hub did not give it ({reason})", remedy) from None
