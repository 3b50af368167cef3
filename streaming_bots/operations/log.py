"""Filters for the logs of Serve and asyncio."""

import logging


def traceback_once(record: logging.LogRecord) -> bool:
    """Drop the traceback of an exception that Serve has already logged for another request."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        if getattr(error, "was_logged", False):
            record.exc_info = None
            record.msg = f"{record.msg} {type(error).__name__}, see above."
        error.was_logged = True  # type: ignore[attr-defined]
    return True


def not_the_end_of_an_unread_batch(record: logging.LogRecord) -> bool:
    """Drop asyncio's complaint that nobody has read a StopAsyncIteration.

    If a client leaves, `@serve.batch` ends that client's stream in a future that no one reads.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], StopAsyncIteration))
