"""The command line: its parser, and the exit status of a command."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final

from microbatch.cli import cache, calibrate, console, demo, environment, run, serve, simulate, spool, warm, worker
from microbatch.cli.console import StdoutError, UsageError, note
from microbatch.cli.logs import logging_to
from microbatch.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTION: Final = """\
Many questions with the same instructions leave as one combined prompt, and
every item gets its own answer.
"""
EXAMPLES: Final = """
examples:
  microbatch demo                     see what batching saves; needs no key
  microbatch run --help               ask about every line of a file
  microbatch calibrate --help         find the size of batches for such a file
  microbatch warm --help              fill a cache with the answers beforehand
  microbatch cache --help             see what a cache holds, delete some of it
  microbatch spool --help             queue questions for later, see what waits
  microbatch worker --help            answer what was queued
  microbatch serve --help             the gateway: batching for any OpenAI client
  microbatch simulate --port 8000     a simulated endpoint to develop against

OPENAI_API_KEY, OPENAI_BASE_URL and MICROBATCH_* are read from the environment,
or from .env in this directory; an address in .env is used only if .env holds
the key as well.
"""
_COMMANDS: Final = (run, calibrate, warm, cache, spool, worker, serve, demo, simulate)
"""Modules with the functions `add_arguments` and `run`; the docstring of each is the usage and help of its command."""


def _version() -> str:
    try:
        return version("microbatch")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="microbatch", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=form, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"microbatch {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in _COMMANDS:
        name = module.__name__.rpartition(".")[2]
        head, _, text = (module.__doc__ or "").partition("\n\n")
        usage, _, summary = head.partition(": ")
        description, heading, examples = text.partition("Examples:\n")
        command = commands.add_parser(
            name,
            usage=usage.strip("`"),
            help=summary.rstrip("."),
            description=description,
            epilog=heading.lower() + examples,
            formatter_class=form,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(command=module.run, name=name, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv*, the words after `microbatch` (None: those of the process), and return its exit status."""
    console.open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    args, unknown = parser.parse_known_args(words)
    if unknown:
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if not hasattr(args, "command"):
        parser.print_help(sys.stderr)
        return console.USAGE
    args.argv = words
    quiet = getattr(args, "quiet", False)
    console.hush(quiet)
    if quiet:
        args.progress = False
    environment.load_dotenv()
    try:
        with logging_to(args):
            status: int = args.command(args)
    except (UsageError, ConfigError) as error:  # nothing was sent
        note(f"microbatch {args.name}: {error}")
        return console.USAGE
    except StorageError as error:  # a file that is damaged, a server that has gone
        note(f"microbatch {args.name}: {error}")
        return console.SOME_FAILED
    except KeyboardInterrupt:
        return console.STOPPED
    except StdoutError as error:
        if not isinstance(error.__cause__, BrokenPipeError):  # as in `microbatch demo | head`
            note(f"microbatch {args.name}: {error}: {error.__cause__}")
        return console.SOME_FAILED
    return status
