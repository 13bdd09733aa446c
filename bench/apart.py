"""Processes: for a measurement that must not include what others left behind, and for the simulated endpoint.

A module that is measured this way must not import matplotlib at its top: its memory would be in the figures.
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
    """Return the command that calls *function* with *settings* and prints its result, both as JSON; to be run in `ROOT`."""
    return [sys.executable, "-m", __name__, f"{function.__module__}:{function.__name__}", json.dumps(settings)]


def measured(function: Callable[..., Any], *, patience: float = 1_800.0, **settings: Any) -> Any:
    """Return the result of *function*, which may be `async`, from a process of its own.

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
def server(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run Python with *words*, a server that prints its URL first; yield its process and that URL."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "MICROBATCH_"))}
    with subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=clean, cwd=ROOT
    ) as process:
        try:
            url = process.stdout.readline().strip()
            if not url:
                raise RuntimeError(f"{' '.join(words)} has not printed its URL")
            yield process, url
        finally:
            process.terminate()


@contextmanager
def simulated_endpoint(first_token: float = 0.0, tokens_per_second: float = 0.0) -> Iterator[str]:
    """Yield the base URL of a simulated endpoint in another process, so that only the client is measured."""
    pace = ("--first-token", str(first_token), "--tokens-per-second", str(tokens_per_second))
    with server("-m", "microbatch", "simulate", "--port", "0", *pace) as (_, url):
        yield url


def main(name: str, settings: str) -> None:
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), function)(**json.loads(settings))
    print(json.dumps(asyncio.run(found) if inspect.iscoroutine(found) else found))


if __name__ == "__main__":
    main(*sys.argv[1:])
