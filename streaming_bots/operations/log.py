"""What reaches Serve's log."""

import logging


def traceback_once(record: logging.LogRecord) -> bool:
    """A filter for the log of Serve, which reports a failure once for each request that it meets.

    The traceback of an exception that several requests share is written with the first of them.
    """
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        if getattr(error, "was_logged", False):
            record.exc_info = None
            record.msg = f"{record.msg} {type(error).__name__}, see above."
        error.was_logged = True  # type: ignore[attr-defined]
    return True
