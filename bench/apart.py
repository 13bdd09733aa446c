"""Processes of their own: for a measurement that must not count what others left behind, and for the simulated endpoint.

A module that is measured so must not import matplotlib when it is imported: its memory would be in the figures.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parent.parent


def command(function: Callable[..., Any], **settings: Any) -> list[str]:
    """Return what runs *function* with *settings*, which are JSON, and prints what it returns as JSON; to be run in `ROOT`."""
    return [sys.executable, "-m", __name__, f"{function.__module__}:{function.__name__}", json.dumps(settings)]


def measured(function: Callable[..., Any], *, patience: float, **settings: Any) -> Any:
    """Run *function*, which may be `async`, in a process of its own; return what it found.

    Raises:
        RuntimeError: It failed.
        subprocess.TimeoutExpired: It took longer than *patience* seconds.
    """
    done = subprocess.run(
        command(function, **settings), cwd=ROOT, capture_output=True, check=False, text=True, timeout=patience
    )
    if done.returncode:
        raise RuntimeError(f"{function.__module__}.{function.__name__} failed with {settings}:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


@contextmanager
def simulated_endpoint(first_token: float = 0.0, tokens_per_second: float = 0.0) -> Iterator[str]:
    """Yield the base URL of a simulated endpoint in another process, so that what is measured here is the client alone."""
    pace = ["--first-token", str(first_token), "--tokens-per-second", str(tokens_per_second)]
    words = [sys.executable, "-m", "microbatch", "simulate", "--port", "0", *pace]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "MICROBATCH_"))}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean) as process:
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError("the simulated endpoint has not said where it listens")
            yield url
        finally:
            process.terminate()


def main(name: str, settings: str) -> None:
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function)(**json.loads(settings))
    print(json.dumps(asyncio.run(found) if inspect.iscoroutine(found) else found))


if __name__ == "__main__":
    main(*sys.argv[1:])
