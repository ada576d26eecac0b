"""Structured logs on standard error: events and numbers, no secrets, no bodies, no invite codes."""

import logging
import sys

import structlog

from aggregator_server.config import LogFormat


def configure_logs(log_format: LogFormat, *, verbose: bool = False) -> None:
    """Set up logging for a process that serves; libraries log through it at WARNING.

    Args:
        log_format: For people or for machines.
        verbose: Whether each request gets a line.
    """
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if log_format is LogFormat.JSON
        # Plain tracebacks: the pretty ones print local variables, and those hold secrets.
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    structured = log_format is LogFormat.JSON
    formatting = [structlog.processors.format_exc_info] if structured else []
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *formatting,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.DEBUG if verbose else logging.INFO
        ),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
