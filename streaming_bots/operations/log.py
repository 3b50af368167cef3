"""A filter for Serve's log."""

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
