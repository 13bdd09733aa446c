"""`microbatch run`: asks about every line of a file and writes the answers to another."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.accounting.stats import Stats
from microbatch.batching.request import read_options
from microbatch.client import Microbatcher
from microbatch.commands import console, fingerprint
from microbatch.commands.answers import Answers, NotWritten, answer_line, error_object, failure_line
from microbatch.commands.console import UsageError, note, plural, say
from microbatch.commands.failures import Failures
from microbatch.commands.flags import add_settings, number, read_settings, whole_number
from microbatch.commands.progress import Progress, make_bar
from microbatch.commands.questions import (
    BatchLines,
    Questions,
    Template,
    Templated,
    read_labels,
    read_schema,
    read_text,
)
from microbatch.commands.reading import BadLine, Input, Survey, requests
from microbatch.commands.stopping import stoppable
from microbatch.commands.summary import summarize, told
from microbatch.errors import ConfigError
from microbatch.policy import FlushPolicy
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.messages import Request, Result

SIMULATED_MODEL = "gpt-4.1-mini"

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

# What decides which requests share a prompt, and so what the model is asked. The rest of the policy is about pace.
_SHAPING = ("max_batch_size", "max_batch_tokens", "max_prompt_tokens", "max_output_tokens")


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
    policy = parser.add_argument_group("batching", "The settings of FlushPolicy.")
    policy.add_argument(
        "--single", action="store_true", help="one call for each item, to compare; same as --max-batch-size 1"
    )
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


# --- the job


class Job(msgspec.Struct):
    """A run whose settings have been checked."""

    source: Input
    survey: Survey
    questions: Questions
    policy: FlushPolicy
    model: str | None
    transport: OpenAIChat | None
    settings: fingerprint.Settings

    @property
    def simulated(self) -> bool:
        """Whether the endpoint is the embedded one."""
        return self.transport is None


def run(args: argparse.Namespace) -> int:
    """Run it.

    Raises:
        UsageError: Something is wrong with the command or its files; nothing was sent.
    """
    job = _prepare(args)
    try:
        with _open_output(args) as answers:
            done = _already_answered(args, job, answers)
            fingerprint.keep(args.output, job.settings)
            return asyncio.run(Run(args, job, answers, done).go())
    except NotWritten as error:  # at the last fsync
        note(f"microbatch run: {error}")
        return console.SOME_FAILED


def _prepare(args: argparse.Namespace) -> Job:
    policy = _policy(args)
    model = args.model or (SIMULATED_MODEL if args.simulate else None)
    questions = _questions(args, model)
    transport = None if args.simulate else _transport(args, model)
    source = Input(args.input, id_field=args.id_field)
    if Path(args.output).exists() and Path(args.output).samefile(args.input):
        raise UsageError(f"-o {args.output!r} is the input itself")
    survey = source.survey(questions.fields)
    settings = _settings(args, policy, model, transport)
    return Job(source, survey, questions, policy, model, transport, settings)


def _policy(args: argparse.Namespace) -> FlushPolicy:
    if not args.single:
        return read_settings(args, FlushPolicy)
    if args.max_batch_size not in (None, 1):
        raise UsageError(f"--single means --max-batch-size 1, but --max-batch-size {args.max_batch_size} is given too")
    return read_settings(args, FlushPolicy, max_batch_size=1)


def _questions(args: argparse.Namespace, model: str | None) -> Questions:
    options: dict[str, Any] = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    if args.template is None:
        for name in ("system", "labels", "schema"):
            if getattr(args, name) is not None:
                raise UsageError(
                    f"--{name} needs a --template; lines without one are OpenAI Batch requests and say it all themselves"
                )
        return BatchLines(options=options, needs_model=model is None)
    if model is None:
        raise UsageError("no model: give --model NAME, or --simulate to try without one")
    labels = None if args.labels is None else read_labels(args.labels)
    schema = None if args.schema is None else read_schema(args.schema)
    system = None if args.system is None else read_text(args.system, "--system")
    questions = Templated(Template(args.template), system=system, labels=labels, schema=schema, options=options)
    try:
        read_options(
            str, None, None, None, None if schema is None else {"response_format": schema}, None, None, "normal"
        )
    except ConfigError as error:
        raise UsageError(f"--schema {args.schema}: {error}") from error
    return questions


def _transport(args: argparse.Namespace, model: str | None) -> OpenAIChat:
    if not os.environ.get("OPENAI_API_KEY") and not args.base_url and not os.environ.get("OPENAI_BASE_URL"):
        raise UsageError(
            "no API key: set the environment variable OPENAI_API_KEY, give --base-url for an endpoint that needs none, "
            "or --simulate to try without one"
        )
    try:
        return OpenAIChat(model, base_url=args.base_url)
    except ConfigError as error:
        words = str(error).replace("base_url", "--base-url" if args.base_url else "OPENAI_BASE_URL")
        raise UsageError(words.replace("api_key", "OPENAI_API_KEY")) from error


def _settings(
    args: argparse.Namespace, policy: FlushPolicy, model: str | None, transport: OpenAIChat | None
) -> fingerprint.Settings:
    """Return what must be the same when the run is resumed: all that decides what is asked, and of whom."""
    system = None if args.system is None else read_text(args.system, "--system")
    return {
        "endpoint": "simulated" if transport is None else transport.base_url,
        "--model": model,
        "--system": fingerprint.hashed(system),
        "--template": fingerprint.hashed(args.template),
        "--labels": fingerprint.hashed(None if args.labels is None else read_labels(args.labels)),
        "--schema": fingerprint.hashed(None if args.schema is None else read_schema(args.schema)),
        "--id-field": args.id_field,
        "--max-tokens": args.max_tokens,
        "--temperature": args.temperature,
        **{"--" + name.replace("_", "-"): getattr(policy, name) for name in _SHAPING},
    }


# --- the output there is


def _open_output(args: argparse.Namespace) -> Answers:
    """Open the output; an old one stays unless it is resumed, or moves aside with --force."""
    answers = Answers(args.output)
    if not answers.size or args.resume:
        return answers
    try:
        if not args.force:
            raise UsageError(
                f"{args.output!r} already holds answers: go on with --resume, choose another -o, or begin anew with --force "
                "(the old file is kept under another name)"
            )
        aside = next(path for path in _names_aside(args.output) if not path.exists())
        Path(args.output).rename(aside)
    finally:
        answers.close()
    note(f"the old output is now {str(aside)!r}")
    return Answers(args.output)


def _names_aside(path: str) -> Iterator[Path]:
    number = 1
    while True:
        yield Path(f"{path}.old{number}")
        number += 1


def _already_answered(args: argparse.Namespace, job: Job, answers: Answers) -> set[int]:
    """Return digests of the ids that need not be asked about, after a check that the rest will be asked in the same way."""
    if not answers.size:
        return set()
    changes = fingerprint.differences(args.output, job.settings)
    if not args.force and changes is None:
        raise UsageError(
            f"{str(fingerprint.path_beside(args.output))!r} is missing or broken, so nobody knows how {args.output!r} was made; "
            "--force goes on all the same"
        )
    if not args.force and changes:
        raise UsageError(
            f"{args.output!r} was made with other settings: {', '.join(changes)}. --force goes on all the same"
        )
    cut = answers.cut()
    done = answers.answered() & job.survey.names
    note(f"resuming: {len(done):,} of {plural(job.survey.items, 'item')} answered before")
    if cut:
        note(f"cut off an incomplete last line ({plural(cut, 'byte')})")
    return done


# --- the run


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
        self._failures = Failures()
        self._stats = Stats()
        self._progress = Progress(None, Stats)

    async def go(self) -> int:
        """Ask, tell how it went and return the exit status."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        stopped, broken = True, None
        with stoppable():
            try:
                await self._ask()
            except NotWritten as error:
                broken = error
            stopped = False
        return self._tell(loop.time() - start, stopped=stopped, broken=broken)

    async def _ask(self) -> None:
        async with AsyncExitStack() as stack:
            transport = self._job.transport or await self._simulated(stack)
            batcher = await stack.enter_async_context(Microbatcher(transport, policy=self._job.policy))
            try:
                with Progress(self._bar(), batcher.stats) as self._progress:
                    async for result in batcher.map(self._requests()):
                        await self._take(result)
            finally:
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
        message = f"{path}, line {line.number}: {line.problem}"
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

    def _tell(self, wall_s: float, *, stopped: bool, broken: NotWritten | None) -> int:
        for line in self._failures.told():
            note(line)
        args, stats = self._args, self._stats
        summary = summarize(stats, items=self._items, answered=self._answered, failed=self._failed, wall_s=wall_s)
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
    again = shlex.join(["microbatch", *words, "--resume"])
    return (
        f"{'Stopped; all' if stopped else 'All'} answers so far are in {args.output}. To ask for the rest:\n  {again}"
    )
