"""What becomes of an output that is there already: nothing is asked twice, and nothing that was paid for is lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from microbatch.commands import fingerprint
from microbatch.commands.answers import Answers
from microbatch.commands.console import UsageError, note, plural
from microbatch.commands.flags import flag
from microbatch.commands.questions import read_labels, read_schema, read_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from microbatch.commands.job import Job

# What decides which requests share a prompt, and so what the model is asked. The rest of the policy is about pace.
_SHAPING = ("max_batch_size", "max_batch_tokens", "max_prompt_tokens", "max_output_tokens", "merge")


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
        aside = next(path for path in _names_aside(args.output) if not path.exists())
        Path(args.output).rename(aside)
        if fingerprint.path_beside(args.output).exists():
            fingerprint.path_beside(args.output).rename(fingerprint.path_beside(str(aside)))
    finally:
        answers.close()
    note(f"the old output is now {str(aside)!r}")
    return Answers(args.output)


def _names_aside(path: str) -> Iterator[Path]:
    number = 1
    while True:
        yield Path(f"{path}.old{number}")
        number += 1


def already_answered(args: argparse.Namespace, job: Job, answers: Answers) -> set[int]:
    """Return digests of the ids that need not be asked about, after a check that the rest will be asked in the same way."""
    if not answers.size:
        return set()
    changes = fingerprint.differences(args.output, settings(args, job))
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
