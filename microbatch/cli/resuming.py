"""What becomes of an output that is there already: nothing is asked twice, and nothing that was paid for is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from microbatch.cli import fingerprint
from microbatch.cli.answers import Answers, free_names
from microbatch.cli.console import UsageError, note, plural
from microbatch.cli.flags import flag
from microbatch.cli.questions import LineError, question_digest, read_labels, read_schema, read_text
from microbatch.cli.reading import Line, digest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from microbatch.cli.plan import Job
    from microbatch.messages import Request

# What decides which requests share a prompt, and so what the model is asked. The rest of the policy is about pace.
_SHAPING = ("max_batch_size", "max_batch_tokens", "max_prompt_tokens", "max_output_tokens", "merge")


# What is part of a question, and so of its digest.
_ASKED = frozenset({"--model", "--system", "--template", "--labels", "--schema", "--max-tokens", "--temperature"})


class Resumed(msgspec.Struct):
    """What was found in an output.

    Attributes:
        done: Digests of the ids that need not be asked about.
        changed: Ids whose answer belongs to another question than theirs of today.
        reused: Ids that were given an answer which the same question has got under another id.
    """

    done: set[int] = set()
    changed: int = 0
    reused: int = 0


def open_output(args: argparse.Namespace) -> Answers:
    """Open the output; an old one stays unless it is resumed, or moves aside with --force."""
    if Path(args.output).exists() and Path(args.output).samefile(args.input):
        raise UsageError(f"-o {args.output!r} is the input itself")
    answers = Answers(args.output)
    if not answers.size or args.resume:
        return answers
    try:
        if not args.force:
            raise UsageError(
                f"{args.output!r} already holds answers: go on with --resume, choose another -o, or begin anew with --force "
                "(the old file is kept under another name)"
            )
        aside = next(free_names(args.output))
        Path(args.output).rename(aside)
        if fingerprint.path_beside(args.output).exists():
            fingerprint.path_beside(args.output).rename(fingerprint.path_beside(str(aside)))
    finally:
        answers.close()
    note(f"the old output is now {str(aside)!r}")
    return Answers(args.output)


def resume(args: argparse.Namespace, job: Job, answers: Answers) -> Resumed:
    """Return what need not be asked about, and leave in the output what belongs to the questions of today.

    An answer counts if its id and the digest of its question are those of a line of the input. The answer to a question that stands
    under another id now is written under that one too. If an answer in the output belongs to another question, the output is
    written anew without what is out of date, and the file as it was is kept under another name.

    Raises:
        UsageError: The rest would be asked in another way, or the output cannot be read or written.
    """
    if not answers.size:
        return Resumed()
    trusts = _may_trust_ids(args, job)
    cut = answers.cut()
    written, model = answers.written_before(), job.transport.model
    found, undated = Resumed(done=set()), 0
    kept: list[tuple[int, str]] = []
    moved: list[tuple[int, str]] = []
    for line, request in _asked(job):
        name, question = digest(line.name), None if request is None else question_digest(request, model)
        row = written.rows.get(name)
        if row is not None and (trusts or (args.force if row.digest is None else row.digest == question)):
            kept.append((row.start, line.name))
            continue
        found.changed += row is not None
        undated += row is not None and row.digest is None
        same = None if question is None else written.questions.get(question)
        if same is not None:
            moved.append((same.start, line.name))
    found.done, found.reused = {digest(name) for _, name in (*kept, *moved)}, len(moved)
    note(f"resuming: {len(found.done):,} of {plural(job.survey.items, 'item')} answered before")
    if cut:
        note(f"cut off an incomplete last line ({plural(cut, 'byte')})")
    _keep(args, answers, found, kept, moved)
    for words in _told(found, undated):
        note(words)
    return found


def _may_trust_ids(args: argparse.Namespace, job: Job) -> bool:
    """Return whether ids alone decide, because another question is asked now of every line and that was forced.

    Raises:
        UsageError: The settings of today differ from those of the output, or those are unknown, and --force is not given.
    """
    changes = fingerprint.differences(args.output, settings(args, job))
    if not args.force and changes is None:
        raise UsageError(
            f"{str(fingerprint.path_beside(args.output))!r} is missing or broken, so nobody knows how {args.output!r} was made; "
            "--force goes on all the same"
        )
    if not args.force and changes:
        raise UsageError(
            f"{args.output!r} was made with other settings: {', '.join(changes.values())}. --force goes on all the same"
        )
    asked = [name for name in changes or () if name in _ASKED]
    if asked:
        note(f"--force: answers stay with their ids, though {', '.join(asked)} and so the questions are others now")
    return bool(asked)


def _asked(job: Job) -> Iterator[tuple[Line, Request | None]]:
    """Yield the lines that have an id, each with its question; None if it cannot be asked about."""
    for line in job.source:
        if line.number > job.survey.last:
            return
        if isinstance(line, Line):
            try:
                yield line, job.questions.request(line.record, line.name)
            except LineError:
                yield line, None


def _keep(
    args: argparse.Namespace,
    answers: Answers,
    found: Resumed,
    kept: list[tuple[int, str]],
    moved: list[tuple[int, str]],
) -> None:
    """Write the answers to *moved* questions; if any answer is out of date, write the output anew."""
    if not found.changed:
        for start, name in moved:
            answers.write(answers.row_at(start, name))
        return
    aside = next(free_names(args.output))
    answers.replace([*kept, *moved], aside)
    if fingerprint.path_beside(args.output).exists():
        shutil.copyfile(fingerprint.path_beside(args.output), fingerprint.path_beside(str(aside)))
    note(f"the output as it was is now {str(aside)!r}")


def _told(found: Resumed, undated: int) -> Iterator[str]:
    if found.changed - undated:
        yield f"{plural(found.changed - undated, 'id')} had the answer to another question, which does not count"
    if undated:
        yield (
            f"{plural(undated, 'answer')} of an older release, which did not keep what was asked, are asked for anew; "
            "--resume --force keeps them"
        )
    if found.reused:
        yield f"{plural(found.reused, 'question')} answered before under another id, and not asked again"


def settings(args: argparse.Namespace, job: Job) -> fingerprint.Settings:
    """Return what must be the same when the run is resumed: all that decides what is asked, and of whom."""
    system = None if args.system is None else read_text(args.system, "--system")
    return {
        "endpoint": job.transport.base_url,
        "--model": job.transport.model,
        "--system": fingerprint.hashed(system),
        "--template": fingerprint.hashed(args.template),
        "--labels": fingerprint.hashed(None if args.labels is None else read_labels(args.labels)),
        "--schema": fingerprint.hashed(None if args.schema is None else read_schema(args.schema)),
        "--id-field": args.id_field,
        "--max-tokens": args.max_tokens,
        "--temperature": args.temperature,
        **{flag(name): getattr(job.policy, name) for name in _SHAPING},
        "--canary": args.canary,
    }
