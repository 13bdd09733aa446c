"""The command line: `microbatch run`, `warm`, `spool`, `worker`, `serve`, `demo`, `simulate`."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from microbatch.cli import console, demo, dotenv, run, serve, simulate, spool, warm, worker
from microbatch.cli.console import NotHeard, UsageError, note
from microbatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

DESCRIPTION = """\
Many questions with the same instructions leave as one combined prompt, and
every item gets its own answer.
"""
EXAMPLES = """
examples:
  microbatch demo                     see what batching saves; needs no key
  microbatch run --help               ask about every line of a file
  microbatch warm --help              fill a cache with the answers beforehand
  microbatch spool --help             queue questions for later, see what waits
  microbatch worker --help            answer what was queued
  microbatch serve --help             the gateway: batching for any OpenAI client
  microbatch simulate --port 8000     a simulated endpoint to develop against

OPENAI_API_KEY, OPENAI_BASE_URL and MICROBATCH_* come from the environment, or
from .env in this directory; an address in there counts only with a key in there.
"""


def _version() -> str:
    try:
        return version("microbatch")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="microbatch",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"microbatch {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add(commands, "run", run, run.run)
    _add(commands, "warm", warm, warm.run)
    _add(commands, "spool", spool, spool.run)
    _add(commands, "worker", worker, worker.run)
    _add(commands, "serve", serve, serve.run)
    _add(commands, "demo", demo, demo.run)
    _add(commands, "simulate", simulate, simulate.run)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    module: ModuleType,
    command: Callable[[argparse.Namespace], int],
) -> None:
    parser = commands.add_parser(
        name,
        usage=module.USAGE,
        help=module.HELP,
        description=module.DESCRIPTION,
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.set_defaults(command=command, name=name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: The words after `microbatch`; None takes those of the process.
    """
    console.open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    args = parser.parse_args(words)
    if not hasattr(args, "command"):
        parser.print_help(sys.stderr)
        return console.USAGE
    args.argv = words
    dotenv.load()
    try:
        status: int = args.command(args)
    except (UsageError, ConfigError) as error:
        note(f"microbatch {args.name}: {error}")
        return console.USAGE
    except KeyboardInterrupt:
        return console.STOPPED
    except NotHeard as error:
        if not isinstance(error.__cause__, BrokenPipeError):  # as in `microbatch demo | head`
            note(f"microbatch {args.name}: {error}: {error.__cause__}")
        return console.SOME_FAILED
    return status
