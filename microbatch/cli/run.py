"""`microbatch run`: asks about every line of a file and writes the answers to another."""

from __future__ import annotations

import asyncio
import shlex
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.cli import console, fingerprint
from microbatch.cli.answers import Answers, NotWritten, answer_line, failure_line
from microbatch.cli.arguments import POLICY, add_endpoint, add_patience, add_policy, add_question, add_telling
from microbatch.cli.bulk_run import Work
from microbatch.cli.console import note, plural, tell
from microbatch.cli.plan import Job, prepare
from microbatch.cli.resuming import Resumed, open_output, resume, settings
from microbatch.cli.stores import CACHE_HELP
from microbatch.cli.summary import summarize, told

if TYPE_CHECKING:
    import argparse

    from microbatch.messages import Reply

USAGE = "microbatch run INPUT.jsonl -o OUTPUT.jsonl [options]"
HELP = "ask about every line of a JSON Lines file"
DESCRIPTION = """\
Ask a model about every line of a JSON Lines file, many lines in one prompt, and
write one line for each answer:

  {"custom_id", "output", "error", "route", "usage", "cost_usd", "digest"}

Lines are any JSON objects, with a --template that makes a question of them, or
OpenAI Batch requests (custom_id, body). A line's id is its custom_id, else its
id, else its number. The key is taken from OPENAI_API_KEY.

The digest is that of the question. --resume asks what has no answer yet, and
what has one to another question; an answer goes along with a question that
moved to another line.

While the endpoint does not answer at all, nothing more is read or sent; the run
goes on when it answers again. A key or an account that is refused from the
start ends it. Ctrl-C and SIGTERM let the calls under way end.

Exit status: 0 all answered, 1 some failed or left unasked, 2 nothing sent
because something is wrong with the command or its files, 130 stopped (go on
with --resume).
"""
EXAMPLES = r"""
examples:
  microbatch run products.jsonl -o answers.jsonl --model gpt-4.1-mini \
      --system @instructions.txt --labels electronics,clothing,home,other \
      --template "Product: {name}\nDescription: {description}"

  microbatch run products.jsonl -o answers.jsonl ... --resume    (after a crash)
  microbatch run products.jsonl -o try.jsonl ... --simulate      (costs nothing)
  microbatch run products.jsonl -o answers.jsonl ... --cache answers.sqlite
                                             (what was ever asked costs nothing)
  microbatch run openai_batch.jsonl -o answers.jsonl
"""

# --- the flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run`."""
    parser.add_argument("input", metavar="INPUT.jsonl", help="the lines to ask about")
    parser.add_argument(
        "-o", "--output", metavar="OUTPUT.jsonl", required=True, help="where the answers go, as they come"
    )
    add_question(parser.add_argument_group("what is asked"))
    add_endpoint(parser.add_argument_group("whom"))
    _add_running(parser.add_argument_group("the run"))
    add_policy(parser.add_argument_group("batching", POLICY))


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--cache", metavar="FILE|URL", help=CACHE_HELP)
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted run, or one whose input has changed: ask what has no answer yet",
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="with --resume: go on though prompt or policy have changed, and keep the answers to the old prompt; "
        "else: begin anew, keeping the old output under another name",
    )
    add_patience(group)
    add_telling(group)


# --- the run


def run(args: argparse.Namespace) -> int:
    """Run it.

    Raises:
        UsageError: Something is wrong with the command or its files; nothing was sent.
    """
    job = prepare(args)
    try:
        with open_output(args) as answers:
            resumed = resume(args, job, answers)
            fingerprint.keep(args.output, settings(args, job))
            return asyncio.run(Run(args, job, answers, resumed).go())
    except NotWritten as error:  # at the last fsync
        note(f"microbatch run: {error}")
        return console.SOME_FAILED


class Run:
    """Asks, and writes down what comes back."""

    def __init__(self, args: argparse.Namespace, job: Job, answers: Answers, resumed: Resumed) -> None:
        self._args = args
        self._job = job
        self._answers = answers
        self._resumed = resumed
        self._work = Work(
            job,
            self._take,
            self._fail,
            done=resumed.done,
            progress=args.progress,
            give_up_after=args.give_up_after,
        )

    async def go(self) -> int:
        """Ask, tell how it went and return the exit status."""
        await self._work.go()
        self._tell()
        return self._work.status

    def _take(self, name: str, reply: Reply[Any]) -> None:
        output = self._job.questions.output(reply.output)
        self._answers.write(answer_line(name, output, reply, self._work.digest_of(name)))

    def _fail(self, name: str, error: dict[str, Any]) -> None:
        self._answers.write(failure_line(name, error, self._work.digest_of(name)))

    def _tell(self) -> None:
        args, work, stats = self._args, self._work, self._work.stats
        for line in work.failures.told(others="; the output tells them all"):
            note(line)
        summary = summarize(
            stats,
            items=work.items,
            answered=work.answered,
            failed=work.failed,
            wall_s=work.wall_s,
            changed=self._resumed.changed,
            reused=self._resumed.reused,
            unasked=work.unasked,
        )
        write = note if args.json else tell
        for line in told(summary, stats, simulated=self._job.simulated, single=self._job.policy.max_batch_size == 1):
            write(line)
        if args.json:
            tell(msgspec.json.encode(summary).decode())
        for why in (work.unanswering, work.broken):
            if why is not None:
                note(f"microbatch run: {why}")
        if work.unanswering is not None:
            note(f"{plural(work.unasked, 'item')} left unasked.")
        if work.status != console.OK:
            note(_how_to_go_on(args, stopped=work.stopped))


def _how_to_go_on(args: argparse.Namespace, *, stopped: bool) -> str:
    words = [word for word in args.argv if word not in ("--force", "--resume")]
    again = shlex.join(["microbatch", *words, "--resume"])
    return (
        f"{'Stopped; all' if stopped else 'All'} answers so far are in {args.output}. To ask for the rest:\n  {again}"
    )
