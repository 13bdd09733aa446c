r"""`microbatch run INPUT... -o OUTPUT.jsonl [options]`: ask about every record of files.

Ask a model about every record of JSON Lines, JSON arrays, CSV, TSV or Parquet,
many records in one prompt, and write one line for each answer:

  {"custom_id", "output", "error", "route", "usage", "cost_usd", "digest",
   "batch_size", "lane_kind", "period"}

A record has fields, of which a --template makes a question, or it is an OpenAI
Batch request (custom_id, body) or a body (model, messages). Its id is its
custom_id, else its id, else its number. The key is taken from OPENAI_API_KEY,
which is sent to OpenAI and OPENAI_BASE_URL only, or from the variable of
--api-key-env.

OUTPUT may end in .jsonl, .csv, .tsv or .parquet, the first three also with .gz;
--output-format says it for other names, and openai-batch is the format of the
output files of OpenAI's batch API. A table has the columns custom_id, output,
error, route, those of the usage, and cost_usd; an error is JSON, and so is an
output that is no text. Each answer is added to OUTPUT.journal.jsonl when it
comes; the table is written from that when the run ends or is stopped. JSON
Lines are their own journal. With -o - answers go to stdout as they come, and
all else to stderr; such a run cannot be resumed.

With --audit some of the answers that came from combined prompts are asked for
again alone, and compared. Where combining does harm, batches become smaller,
and at the end the run asks again what the larger ones have answered.
OUTPUT.audit keeps the figures.

The digest is that of the question; the batch size, the kind of lane and its
period say which batch gave the answer. --resume asks about records without an
answer, and about those whose question has changed; an answer follows a question
that moved to another record.

While the endpoint does not answer at all, nothing more is read or sent; the run
goes on when it answers again. A key or an account that is refused from the
start ends the run. Ctrl-C and SIGTERM let the calls under way end.

Exit status: 0 all answered, 1 some failed or left unasked, or with --audit not
asked again, 2 nothing sent because something is wrong with the command or its
files, 3 the rest would exceed --max-cost (go on with --resume, which may spend
as much again), 130 stopped (go on with --resume).

Examples:
  microbatch run products.jsonl -o answers.jsonl --model gpt-4.1-mini \
      --system @instructions.txt --labels electronics,clothing,home,other \
      --template "Product: {name}\nDescription: {description}"

  microbatch run products.jsonl -o answers.jsonl ... --resume    (after a crash)
  microbatch run products.jsonl -o try.jsonl ... --simulate      (costs nothing)
  microbatch run products.jsonl ... --dry-run  (says what it would ask and cost)
  microbatch run products.jsonl -o answers.jsonl ... --cache answers.sqlite
                                    (what was asked before costs nothing)
  microbatch run openai_batch.jsonl -o answers.jsonl
  microbatch run products.jsonl -o answers.jsonl ... --max-cost 5
                                    (spends at most 5 dollars)
  microbatch run products.csv -o answers.csv ... --join
                               (every row with its answer, in the same order)
  zcat products.csv.gz | microbatch run - -o answers.jsonl ... --limit 100
  microbatch run products.jsonl -o answers.jsonl ... --audit
                              (keep only what combining does not change)
"""

from __future__ import annotations

import asyncio
import shlex
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.cli import console
from microbatch.cli.arguments import add_audit, add_bulk, add_flag, without_secrets
from microbatch.cli.asking_again import AskingAgain
from microbatch.cli.audit_summary import audit_figures, audit_lines
from microbatch.cli.bulk_run import BulkRun
from microbatch.cli.console import UsageError, note, plural, seconds
from microbatch.cli.dry_run import add_dry_run, dry_run
from microbatch.cli.plan import prepare
from microbatch.cli.reading.input import InputChanged
from microbatch.cli.reading.questions import question_digest
from microbatch.cli.resume import Resumed, open_output, resume
from microbatch.cli.semantic import add_semantic_cache, semantic_figures, semantic_lines
from microbatch.cli.summary import DAMAGE, alone, comparison, damage, fields, merging, remarks, reuse, skipped
from microbatch.cli.writing.output import NotWritten, answer_line, failure_line
from microbatch.cli.writing.standard_output import StandardOutput
from microbatch.cli.writing.target import STDOUT, target_of
from microbatch.cli.writing.writers import FORMATS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from microbatch.cli.plan import Plan
    from microbatch.cli.reading.input import Input
    from microbatch.cli.writing.output import OutputFile
    from microbatch.cli.writing.target import Target
    from microbatch.messages import Reply, Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run`."""
    parser.set_defaults(parser=parser)
    output = (
        "where the answers go: a file whose name ends in .jsonl, .csv, .tsv or .parquet, the first three also with .gz, or in "
        "anything else for JSON Lines; - is stdout"
    )
    parser.add_argument("-o", "--output", metavar="OUTPUT", help=f"{output}; needed but for --dry-run")
    form = "the format, where the name of the output does not say it; openai-batch: as in the output files of OpenAI's batch API"
    parser.add_argument("--output-format", choices=FORMATS, help=form)
    group = add_bulk(parser, "the run", merge="auto")
    resume = "go on with an interrupted run, or one whose input has changed: ask what has no answer yet"
    add_flag(group, "--resume", resume)
    force = (
        "with --resume: go on although prompt or policy have changed, and keep the answers to the old prompt; "
        "else: begin anew, keeping the old output under another name"
    )
    add_flag(group, "--force", force)
    join = (
        "write every record of the input, or of --limit and --sample, with its answer, in the order of the input, when the run ends; "
        "answers are kept in OUTPUT.journal.jsonl as they come"
    )
    add_flag(group, "--join", join)
    add_audit(group)
    add_semantic_cache(group)
    add_dry_run(group)


def run(args: argparse.Namespace) -> int:
    """Ask about every line, and return the exit status."""
    if args.dry_run:
        return dry_run(args)
    if args.expect_tokens is not None:
        raise UsageError("--expect-tokens is for --dry-run")
    if args.output is None:
        args.parser.error("no output: give -o OUTPUT.jsonl, or --dry-run")
    plan, source = prepare(args)
    target = target_of(args, plan.transport.model)
    try:
        with open_output(target, source) as output:
            return _ask(args, plan, source, target, output)
    except NotWritten as error:  # at the last fsync
        note(f"microbatch run: {error}")
        return console.SOME_FAILED


def _ask(
    args: argparse.Namespace, plan: Plan, source: Input, target: Target, output: OutputFile | StandardOutput
) -> int:
    model = plan.transport.model
    resumed = resume(args, plan, source, target, output)
    again = None if plan.audit is None else AskingAgain(plan.audit, output, source)

    def take(request: Request, reply: Reply[Any]) -> None:
        answer = reply.output if source.questions.schema is None else msgspec.json.decode(reply.output)
        period = 0 if again is None else again.period(reply)
        line = answer_line(request.id or "", answer, reply, question_digest(request, model), period)
        output.write(target.line(line, reply))

    def fail(name: str, error: dict[str, Any], request: Request | None) -> None:
        output.write(failure_line(name, error, None if request is None else question_digest(request, model)))

    bulk = BulkRun(args, plan, source, take, fail, done=resumed.done, again=again, begin=resumed.begin)
    asyncio.run(bulk.go())
    written = not bulk.begun or isinstance(output, StandardOutput) or _complete(output, target, source)
    lines, figures = [*summary_lines(bulk, plan)], summarize(bulk, resumed)
    if again is not None:
        lines += audit_lines(again, bulk.stats)
        figures |= audit_figures(again, bulk.stats)
    if plan.semantic is not None:
        lines += semantic_lines(bulk.stats)
        figures |= semantic_figures(bulk.stats)
    bulk.report(args, lines, figures)
    _note_rest(args, bulk, target.path if written else target.journal)
    return bulk.status if written or bulk.status != console.OK else console.SOME_FAILED


def _complete(journal: OutputFile, target: Target, source: Input) -> bool:
    """Leave one line for each id in the journal, and write the output from it; return whether the output is as it should be."""
    try:
        journal.compact()
        if target.is_written_at_end:
            target.write(journal, source)
    except UsageError as error:
        note(f"microbatch run: {error}; of several lines with the same custom_id the last one counts")
        return not target.is_written_at_end
    except (InputChanged, NotWritten) as error:
        note(
            f"microbatch run: {error}; the answers are in {journal.path!r}, and with --resume the output is written from it"
        )
        return False
    return True


def _note_rest(args: argparse.Namespace, bulk: BulkRun, place: str) -> None:
    """Note the number of items that are left, the *place* of the answers, and the command that asks about the rest."""
    if bulk.unanswering is not None:
        note(f"{plural(bulk.unasked, 'item')} left unasked.")
    if bulk.status != console.OK and place != STDOUT:
        words = [word for word in args.argv if word not in ("--force", "--resume")]
        note(f"{'Stopped; all' if bulk.stopped else 'All'} answers so far are in {place}. To ask for the rest:")
        note(f"  {shlex.join(['microbatch', *without_secrets(words), '--resume'])}")


def summarize(bulk: BulkRun, resumed: Resumed) -> dict[str, Any]:
    """Return the figures of a run, as `--json` prints them."""
    stats = bulk.stats
    return {
        "items": bulk.items,
        "answered": bulk.answered,
        "failed": bulk.failed,
        **fields(stats, "upstream_calls", "batches", "fallback_calls", "retries", "prompt_tokens", "completion_tokens"),
        **fields(stats, "unbatched_calls", "unbatched_prompt_tokens", "cost_usd", "unbatched_cost_usd"),
        "wall_s": round(bulk.wall_s, 3),
        "changed": resumed.changed,
        "reused": resumed.reused,
        "unasked": bulk.unasked,
        "alone_by_field": stats.alone_by_field,
        **fields(stats, *DAMAGE, "singles_compared", "unpriced_calls", "merge_rules"),
        "skipped": bulk.skipped,
    }


def summary_lines(bulk: BulkRun, plan: Plan) -> Iterator[str]:
    """Yield the figures of a run for people."""
    unasked = f", {bulk.unasked:,} left unasked" if bulk.unasked else ""
    answered = f"{bulk.answered:,} of {plural(bulk.items, 'item')} answered, {bulk.failed:,} failed"
    yield f"{answered}{unasked}, in {seconds(bulk.wall_s)}"
    yield from skipped(bulk.skipped)
    if bulk.stats.answered:
        yield f"\n{comparison(bulk.stats)}\n"
    reused = [
        *merging(bulk.stats, plan),
        *reuse(bulk.stats),
        *([] if plan.single else alone(bulk.stats)),
        *damage(bulk.stats),
    ]
    if reused:
        yield from (*reused, "")
    yield from remarks(bulk.stats, plan, asked_again=bulk.asked_again)
