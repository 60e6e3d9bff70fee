"""Silence progress bars and warnings of libraries for a while; xdit raises what matters as an error."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("diffusers", "transformers", "accelerate", "peft", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries while a pipeline is loaded, and restore their settings afterwards."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    bars = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            for library in bars:
                library.disable_progress_bar()
            yield
        finally:
            for library in bars:
                library.enable_progress_bar()
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
