"""Resuming a run from its output: no question is sent twice, and no answer that was paid for is lost.

The settings of a run are kept beside its output, in OUTPUT.digest, so that a resumed run asks the same questions in the same way.
The functions raise `UsageError` if they differ, or if a file cannot be read or written.
"""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.cli.arguments import flag
from microbatch.cli.asking_again import record_path
from microbatch.cli.console import UsageError, note, plural
from microbatch.cli.input import BadLine, id_digest, question_digest
from microbatch.cli.output import OutputFile, free_names, replacing

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from microbatch.cli.input import Input
    from microbatch.cli.plan import Plan

Settings = dict[str, Any]
"""Each setting by its flag. Texts are kept as digests: prompts may be confidential, and long."""

# These decide which requests share a prompt, and so what the model is asked. The rest of the policy is about pace.
_SHAPING: Final = ("max_batch_size", "max_batch_tokens", "max_prompt_tokens", "max_output_tokens")

# These follow from prices and limits unless they are given, so that one that is not given fits any other.
_DERIVED: Final = ("--merge",)

# These are part of a question, and so of its digest.
_IN_QUESTION: Final = ("--model", "--system", "--template", "--labels", "--schema", "--max-tokens", "--temperature")


class Resumed(msgspec.Struct):
    """The answers that a resumed run has found.

    Attributes:
        done: Digests of the ids that are not asked about.
        changed: Number of ids whose answer belongs to another question than theirs.
        reused: Number of ids that were given the answer to the same question under another id.
    """

    done: set[int] = set()
    changed: int = 0
    reused: int = 0


def open_output(args: argparse.Namespace) -> OutputFile:
    """Open the output."""
    if Path(args.output).exists() and Path(args.output).samefile(args.input):
        raise UsageError(f"-o {args.output!r} is the input itself")
    return OutputFile(args.output)


def resume(args: argparse.Namespace, plan: Plan, source: Input, output: OutputFile) -> Resumed:
    """Return the ids that need not be asked about, and remove answers to other questions from the output.

    An answer counts if its id and the digest of its question are those of a line of the input. If the question of a line was
    answered under another id, the answer is written under its own id too. If an answer belongs to another question, the output is
    rewritten without it, and a copy of the old file is kept. Settings that differ from those of the output need --force. Without
    --resume an output that holds answers is refused, or emptied with --force, which keeps a copy too.
    """
    if output.size and not args.resume:
        if not args.force:
            raise UsageError(
                f"{args.output!r} already holds answers: go on with --resume, choose another -o, or begin anew with --force "
                "(the old file is kept under another name)"
            )
        _rewrite(output, [])
    if not output.size:
        record_path(output.path).unlink(missing_ok=True)  # it belongs to other answers
        return Resumed()
    trusts_ids = _check_settings(args, plan, source)
    rows = output.rows()
    found, undated = Resumed(done=set()), 0
    kept: list[tuple[int, str]] = []
    moved: list[tuple[int, str]] = []
    for name, question in _questions(plan, source):
        row = rows.by_id.get(id_digest(name))
        if row is not None and (trusts_ids or (args.force if row.digest is None else row.digest == question)):
            kept.append((row.start, name))
            continue
        found.changed += row is not None
        undated += row is not None and row.digest is None
        same = None if question is None else rows.by_question.get(question)
        if same is not None:
            moved.append((same.start, name))
    found.done, found.reused = {id_digest(name) for _, name in (*kept, *moved)}, len(moved)
    note(f"resuming: {len(found.done):,} of {plural(source.items, 'item')} answered before")
    if rows.cut:
        note(f"cut off an incomplete last line ({plural(rows.cut, 'byte')})")
    if found.changed:
        _rewrite(output, [*kept, *moved])
    else:
        for start, name in moved:
            output.write(output.row_at(start, name))
    if found.changed - undated:
        note(f"{plural(found.changed - undated, 'id')} had the answer to another question, which does not count")
    if undated:
        note(
            f"{plural(undated, 'answer')} of an older release, which did not record the question, will be asked for anew; "
            "--resume --force keeps them"
        )
    if found.reused:
        note(f"{plural(found.reused, 'question')} answered before under another id, and not asked again")
    return found


def _questions(plan: Plan, source: Input) -> Iterator[tuple[str, str | None]]:
    """Yield each id of the input with the digest of its question; None if its line cannot be asked about."""
    for row in source.rows():
        if not isinstance(row, BadLine):
            yield row[1].id or "", question_digest(row[1], plan.transport.model)
        elif row.name is not None:
            yield row.name, None


def _rewrite(output: OutputFile, rows: list[tuple[int, str]]) -> None:
    """Leave only *rows* in the output, and keep it and what is beside it as they were under another name."""
    aside = next(free_names(output.path))
    output.replace(rows, aside)
    for beside in (settings_path, record_path):
        if beside(output.path).exists():
            shutil.copyfile(beside(output.path), beside(str(aside)))
    note(f"the output as it was is now {str(aside)!r}")


# --- settings


def settings(args: argparse.Namespace, plan: Plan, source: Input) -> Settings:
    """Return the settings that decide what is asked, and where; a resumed run must have the same."""
    questions = source.questions
    # These are left out unless they are given, as in the files of releases that had no such settings.
    added = {
        "combine_params": sorted(plan.policy.combine_params),
        "max_latency": plan.policy.max_latency,
        "max_excess": None if plan.audit is None else plan.audit.max_excess,
    }
    return {
        "endpoint": plan.transport.base_url,
        "--model": plan.transport.model,
        "--system": hashed(questions.system),
        "--template": hashed(args.template),
        "--labels": hashed(questions.labels),
        "--schema": hashed(questions.schema),
        "--id-field": args.id_field,
        "--max-tokens": args.max_tokens,
        "--temperature": args.temperature,
        **{flag(name): getattr(plan.policy, name) for name in _SHAPING},
        "--merge": None if plan.policy.merge == "auto" else plan.policy.merge,
        "--canary": args.canary,
        **{flag(name): value for name, value in added.items() if value},
    }


def hashed(value: object) -> str | None:
    """Return a digest that stands for a text or a schema in the settings; None for None."""
    return None if value is None else "sha256:" + sha256(msgspec.json.encode(value)).hexdigest()


def settings_path(output: str) -> Path:
    """Return the path of the settings of the run into *output*."""
    return Path(output + ".digest")


def keep_settings(output: str, settings: Settings) -> None:
    """Write *settings* beside *output*, whole or not at all. Raise `UsageError` if they cannot be written."""
    path = settings_path(output)
    try:
        with replacing(path) as file:
            file.write(msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n")
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from None


def differences(output: str, settings: Settings) -> dict[str, str] | None:
    """Return the settings in which the run into *output* differed, each with a description; None if they are unknown."""
    try:
        kept = msgspec.json.decode(settings_path(output).read_bytes(), type=Settings)
    except (OSError, ValueError):
        return None
    names = [name for name in {**settings, **kept} if settings.get(name) != kept.get(name)]
    names = [name for name in names if name not in _DERIVED or None not in (settings.get(name), kept.get(name))]
    return {name: f"{name} ({_difference(kept.get(name), settings.get(name))})" for name in names}


def _difference(before: object, now: object) -> str:
    if any(isinstance(value, str) and value.startswith("sha256:") for value in (before, now)):
        return "added" if before is None else "left out" if now is None else "changed"
    old, new = ("not set" if value is None else str(value) for value in (before, now))
    return f"was {old}, is {new}"


def _check_settings(args: argparse.Namespace, plan: Plan, source: Input) -> bool:
    """Return whether ids alone decide which answers count, because --force is given and every question differs."""
    changes = differences(args.output, settings(args, plan, source))
    if not args.force and changes is None:
        raise UsageError(
            f"{str(settings_path(args.output))!r} is missing or damaged, so the settings of {args.output!r} are unknown; "
            "--force goes on without them"
        )
    if not args.force and changes:
        raise UsageError(
            f"{args.output!r} was made with other settings: {', '.join(changes.values())}. --force goes on all the same"
        )
    asked = [name for name in changes or () if name in _IN_QUESTION]
    if asked:
        note(f"--force: answers are kept by their ids, although {', '.join(asked)} and so the questions have changed")
    return bool(asked)
