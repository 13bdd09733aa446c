"""`microbatch run`: asks about every line of a file and writes the answers to another."""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.accounting.stats import Stats
from microbatch.client import Microbatcher
from microbatch.commands import console, fingerprint
from microbatch.commands.answers import Answers, NotWritten, answer_line, error_object, failure_line
from microbatch.commands.console import note, say
from microbatch.commands.failures import Failures
from microbatch.commands.flags import add_settings, described, number, whole_number
from microbatch.commands.job import SIMULATED_MODEL, Job, prepare
from microbatch.commands.progress import Progress, make_bar
from microbatch.commands.reading import BadLine, requests
from microbatch.commands.resuming import already_answered, open_output
from microbatch.commands.stopping import stoppable
from microbatch.commands.summary import summarize, told
from microbatch.policy import FallbackPolicy, FlushPolicy
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.messages import Request, Result

USAGE = "microbatch run INPUT.jsonl -o OUTPUT.jsonl [options]"
HELP = "ask about every line of a JSON Lines file"
DESCRIPTION = """\
Ask a model about every line of a JSON Lines file, many lines in one prompt, and
write one line for each answer:

  {"custom_id", "output", "error", "route", "usage", "cost_usd"}

Lines are any JSON objects, with a --template that makes a question of them, or
OpenAI Batch requests (custom_id, body). A line's id is its custom_id, else its
id, else its number. The key is taken from OPENAI_API_KEY.

Exit status: 0 all answered, 1 some failed, 2 nothing sent because something is
wrong with the command or its files, 130 stopped (go on with --resume).
"""
EXAMPLES = r"""
examples:
  microbatch run products.jsonl -o answers.jsonl --model gpt-4.1-mini \
      --system @instructions.txt --labels electronics,clothing,home,other \
      --template "Product: {name}\nDescription: {description}"

  microbatch run products.jsonl -o answers.jsonl ... --resume    (after a crash)
  microbatch run products.jsonl -o try.jsonl ... --simulate      (costs nothing)
  microbatch run openai_batch.jsonl -o answers.jsonl
"""

POLICY = """\
A run waits for full batches; --max-wait, --low-max-wait, --idle and
--when-full are for live traffic and change nothing here.
"""

# --- the flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run`."""
    parser.add_argument("input", metavar="INPUT.jsonl", help="the lines to ask about")
    parser.add_argument(
        "-o", "--output", metavar="OUTPUT.jsonl", required=True, help="where the answers go, as they come"
    )
    _add_question(parser.add_argument_group("what is asked"))
    _add_endpoint(parser.add_argument_group("whom"))
    _add_running(parser.add_argument_group("the run"))
    policy = parser.add_argument_group("batching", POLICY)
    policy.add_argument(
        "--single", action="store_true", help="one call for each item, to compare; same as --max-batch-size 1"
    )
    policy.add_argument("--canary", action="store_true", help=f"{described(FallbackPolicy)['canary']} (default: off)")
    add_settings(policy, FlushPolicy)


def _add_question(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--system", metavar="TEXT|@FILE", help="instructions, the same for every line")
    group.add_argument(
        "--template",
        metavar="TEXT",
        help=r"the question, with fields of the line in braces; \n and \t are newline and tab, {{ and }} are braces",
    )
    answers = group.add_mutually_exclusive_group()
    answers.add_argument(
        "--labels", metavar="A,B,C|@FILE", help="the only answers allowed; in a file one a line, or a JSON list"
    )
    answers.add_argument("--schema", metavar="FILE", help="a JSON Schema that every answer keeps to")
    group.add_argument("--id-field", metavar="FIELD", help="the field that holds a line's id")
    group.add_argument("--max-tokens", metavar="N", type=whole_number(1), help="most tokens of one answer")
    group.add_argument("--temperature", metavar="T", type=number(0), help="sampling temperature")


def _add_endpoint(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="NAME", help="the model; OpenAI Batch lines may name their own")
    group.add_argument(
        "--base-url", metavar="URL", help="address of the API, up to /v1 (default: OPENAI_BASE_URL, else OpenAI)"
    )
    group.add_argument("--rpm", metavar="N", type=whole_number(1), help="send at most N requests in any minute")
    group.add_argument(
        "--tpm",
        metavar="N",
        type=whole_number(1),
        help="send at most N tokens in any minute, prompts and the answers reserved for them together",
    )
    group.add_argument(
        "--simulate",
        action="store_true",
        help=f"ask a simulated endpoint on this machine: made-up answers, nothing paid (default model: {SIMULATED_MODEL})",
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run: ask what has no answer yet"
    )
    group.add_argument(
        "--force",
        action="store_true",
        help="with --resume: go on though prompt or policy have changed; else: begin anew, keeping the old output under another name",
    )
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None, help="show progress (default: on a terminal)"
    )
    group.add_argument(
        "--json", action="store_true", help="print the summary as a JSON object, the last line of stdout"
    )


# --- the run


def run(args: argparse.Namespace) -> int:
    """Run it.

    Raises:
        UsageError: Something is wrong with the command or its files; nothing was sent.
    """
    job = prepare(args)
    try:
        with open_output(args) as answers:
            done = already_answered(args, job, answers)
            fingerprint.keep(args.output, job.settings)
            return asyncio.run(Run(args, job, answers, done).go())
    except NotWritten as error:  # at the last fsync
        note(f"microbatch run: {error}")
        return console.SOME_FAILED


class Run:
    """Asks, and writes down what comes back."""

    def __init__(self, args: argparse.Namespace, job: Job, answers: Answers, done: set[int]) -> None:
        self._args = args
        self._job = job
        self._answers = answers
        self._done = done
        self._items = job.survey.items - len(done)
        self._answered = 0
        self._failed = 0
        self._wall_s = 0.0
        self._failures = Failures()
        self._stats = Stats()
        self._progress = Progress(None, Stats)

    async def go(self) -> int:
        """Ask, tell how it went and return the exit status."""
        stopped, broken = True, None
        with stoppable():
            try:
                await self._ask()
            except (NotWritten, OSError) as error:  # the disk is full, or the input cannot be read on
                broken = error
            stopped = False
        return self._tell(stopped=stopped, broken=broken)

    async def _ask(self) -> None:
        async with AsyncExitStack() as stack:
            transport = self._job.transport or await self._simulated(stack)
            job = self._job
            batcher = await stack.enter_async_context(
                Microbatcher(transport, policy=job.policy, fallback=job.fallback, rate_limit=job.rate_limit)
            )
            loop = asyncio.get_running_loop()
            start = loop.time()
            try:
                with Progress(self._bar(), batcher.stats) as self._progress:
                    async for result in batcher.map(self._requests()):
                        await self._take(result)
            finally:
                self._wall_s = loop.time() - start
                self._stats = batcher.stats()

    async def _simulated(self, stack: AsyncExitStack) -> OpenAIChat:
        from microbatch.testing.endpoint import SimulatedEndpoint  # noqa: PLC0415 a server, which a real run does not need

        endpoint = await stack.enter_async_context(SimulatedEndpoint())
        return OpenAIChat(self._job.model, base_url=endpoint.base_url, api_key="simulated")

    def _bar(self) -> Any:
        wanted = self._args.progress
        return make_bar(self._items) if wanted or (wanted is None and sys.stderr.isatty()) else None

    def _requests(self) -> Iterator[Request]:
        job = self._job
        return requests(job.source, job.survey, job.questions, self._done, self._reject)

    def _reject(self, line: BadLine, name: str) -> None:
        """Write down that *line* cannot be asked about."""
        path = self._args.input
        message = f"{path}, line {line.number}: {line.problem}" + (f" ({line.detail})" if line.detail else "")
        error = {"type": "InputError", "message": message, "line": line.number, "field": line.field}
        self._fail(name, error)
        self._failures.add(line.problem, str(line.number), f"{path}, line ")

    async def _take(self, result: Result[Any]) -> None:
        name = result.id or ""
        if result.reply is None:
            error = error_object(result.error or RuntimeError("no reply"))
            self._fail(name, error)
            self._failures.add(f"{error['type']}: {error['message']}", name, "id ")
            return
        reply = await result.reply.settled()
        self._answers.write(answer_line(name, self._job.questions.output(reply.output), reply))
        self._answered += 1
        self._progress.advance()

    def _fail(self, name: str, error: dict[str, Any]) -> None:
        self._answers.write(failure_line(name, error))
        self._failed += 1
        self._progress.advance()

    # --- afterwards

    def _tell(self, *, stopped: bool, broken: Exception | None) -> int:
        for line in self._failures.told():
            note(line)
        args, stats = self._args, self._stats
        summary = summarize(stats, items=self._items, answered=self._answered, failed=self._failed, wall_s=self._wall_s)
        write = note if args.json else say
        simulated = self._job.model if self._job.simulated else None
        for line in told(summary, stats, simulated=simulated, single=self._job.policy.max_batch_size == 1):
            write(line)
        if args.json:
            say(msgspec.json.encode(summary).decode())
        if broken is not None:
            note(f"microbatch run: {broken}")
        if stopped or broken is not None or self._failed:
            note(_how_to_go_on(args, stopped=stopped))
        return console.STOPPED if stopped else console.SOME_FAILED if self._failed or broken is not None else console.OK


def _how_to_go_on(args: argparse.Namespace, *, stopped: bool) -> str:
    words = [word for word in args.argv if word not in ("--force", "--resume")]
    state = "Stopped; what was under way is given up, all" if stopped else "All"
    again = shlex.join(["microbatch", *words, "--resume"])
    return f"{state} answers so far are in {args.output}. To ask for the rest:\n  {again}"
