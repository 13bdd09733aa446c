"""Where the package's log records go while a command runs: warnings to stderr, and with `--log-file` all from INFO on to a file."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
from typing import TYPE_CHECKING, Final

from microbatch.cli.arguments import without_secrets
from microbatch.cli.console import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator

    from microbatch.accounting.events import Called

_FORM: Final = "%(asctime)s %(levelname)s %(message)s"

logger: Final = logging.getLogger("microbatch")


class CallLog:
    """A hook that logs each call when it has ended, without any text."""

    def on_call(self, event: Called) -> None:
        """Log *event*."""
        usage, error = event.usage, event.error
        tokens = "tokens unknown" if usage is None else f"{usage.prompt_tokens}+{usage.completion_tokens} tokens"
        ended = event.finish_reason if error is None else f"{type(error).__name__}: {error}"
        level = logging.INFO if error is None else logging.WARNING
        logger.log(
            level,
            "%s call of %d, %s, %d attempts, %.3f s, %s: %s",
            *(event.route, event.size, event.model, event.attempts, event.duration, tokens, ended),
        )


def call_logs() -> list[object]:
    """Return the hook that logs calls, if there is a place for its records."""
    return [CallLog()] if logger.isEnabledFor(logging.INFO) else []


@contextlib.contextmanager
def logging_to(args: argparse.Namespace) -> Generator[None]:
    """Send log records to the places that the flags of the command name, until the block ends.

    Raises:
        UsageError: The log file cannot be written.
    """
    path, quiet = getattr(args, "log_file", None), getattr(args, "quiet", False)
    level = logger.level
    handlers: list[logging.Handler] = []
    try:
        if path is not None:
            try:
                # Makes a file anew that logrotate has renamed.
                handlers.append(logging.handlers.WatchedFileHandler(path, encoding="utf-8"))
            except OSError as error:
                raise UsageError(f"--log-file: cannot write {path!r}: {error.strerror}") from None
            handlers[0].setFormatter(logging.Formatter(_FORM))
        if path is not None or quiet:
            # Any handler of the logger stands in place of Python's last resort, which writes warnings to stderr.
            console = logging.StreamHandler(sys.stderr)
            console.setLevel(logging.ERROR if quiet else logging.WARNING)
            handlers.append(console)
        for handler in handlers:
            logger.addHandler(handler)
        if path is not None:
            logger.setLevel(min(logging.INFO, level or logging.INFO))
            logger.info("microbatch %s", " ".join(without_secrets(args.argv)))
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
