"""A filter for Serve's log."""

import logging


def traceback_once(record: logging.LogRecord) -> bool:
    """Filter Serve's log, which reports a failure once for each request that it affects.

    If several requests share an exception, only the first report includes the traceback.
    """
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        if getattr(error, "was_logged", False):
            record.exc_info = None
            record.msg = f"{record.msg} {type(error).__name__}, see above."
        error.was_logged = True  # type: ignore[attr-defined]
    return True
