"""Resuming a run from its output: no question is sent twice, and no answer that was paid for is lost.

The settings of a run are kept beside its output, in OUTPUT.digest, so that a resumed run asks the same questions in the same way.
The functions raise `UsageError` if they differ, or if a file cannot be read or written.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.cli.arguments import flag
from microbatch.cli.asking_again import record_path
from microbatch.cli.console import UsageError, plural, remark
from microbatch.cli.digests import Digests
from microbatch.cli.reading.input import BadLine, id_digest
from microbatch.cli.reading.questions import question_digest
from microbatch.cli.writing.output import OutputFile, Rows, replacing
from microbatch.cli.writing.standard_output import StandardOutput
from microbatch.cli.writing.target import STDOUT
from microbatch.transports.credentials import says_who

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Iterable, Iterator

    from microbatch.cli.plan import Plan
    from microbatch.cli.reading.input import Input
    from microbatch.cli.writing.output import Row
    from microbatch.cli.writing.target import Target

Settings = dict[str, Any]
"""Each setting by its flag. Texts are kept as digests: prompts may be confidential, and long."""

# These decide which requests share a prompt, and so what the model is asked. The rest of the policy is about pace.
_SHAPING: Final = ("max_batch_size", "max_batch_tokens", "max_prompt_tokens", "max_output_tokens")

# These follow from prices and limits unless they are given, so that one that is not given fits any other.
_DERIVED: Final = ("--merge",)

# These are part of a question, and so of its digest.
_IN_QUESTION: Final = (
    *(
        "--model",
        "--system",
        "--template",
        "--labels",
        "--schema",
        "--examples",
        "--max-tokens",
        "--temperature",
        "--param",
    ),
)


class Resumed(msgspec.Struct):
    """The state in which a run begins.

    Attributes:
        done: Digests of the ids that are not asked about.
        changed: Number of ids whose answer belongs to another question than theirs.
        reused: Number of ids that were given the answer to the same question under another id.
        begin: Brings the files of the output into the state in which the run begins. Until it is called, they stay as they are.
    """

    done: Digests = msgspec.field(default_factory=Digests)
    changed: int = 0
    reused: int = 0
    begin: Callable[[], None] = lambda: None


@contextmanager
def open_output(target: Target, source: Input) -> Generator[OutputFile | StandardOutput]:
    """Open the journal of the output, or stdout. A file that was created for it is removed if the block raises while it is empty."""
    if target.path == STDOUT:
        with StandardOutput(target) as stdout:
            yield stdout
        return
    for path in (target.path, target.journal):
        if source.is_one_of(path):
            raise UsageError(f"-o {target.path!r} is the input itself")
    with OutputFile(target.journal, target.path) as output:
        try:
            yield output
        except BaseException:
            output.discard()
            raise


def resume(
    args: argparse.Namespace, plan: Plan, source: Input, target: Target, output: OutputFile | StandardOutput
) -> Resumed:
    """Return the ids that need not be asked about.

    An answer counts if its id and the digest of its question are those of a line of the input. If the question of a line was
    answered under another id, the answer is written under its own id too. If an answer belongs to another question, the output is
    rewritten without it, and a copy of the old file is kept. Settings that differ from those of the output need --force. Without
    --resume an output that holds answers is refused, or emptied with --force, which keeps a copy too.
    """
    if isinstance(output, StandardOutput):
        if args.resume:
            raise UsageError("--resume needs the answers of the earlier run, and -o - keeps none; name a file")
        return Resumed(begin=output.begin)
    stale = target.is_written_at_end and not output.size and Path(target.path).exists()
    if (stale or (output.size and not args.resume)) and not args.force:
        raise _not_overwritten(target, resumable=not stale)
    now = settings(args, plan, source)
    if output.size and args.resume:
        trusts_ids = _check_settings(args, now)
        return _Matches(args, plan, source, target, output, trusts_ids=trusts_ids).resumed(now)

    def begin() -> None:
        if output.size or stale:
            _rewrite(output, target, [])
        record_path(target.path).unlink(missing_ok=True)  # it belongs to other answers
        keep_settings(target.path, now)

    return Resumed(begin=begin)


def _not_overwritten(target: Target, *, resumable: bool) -> UsageError:
    anew = "choose another -o, or begin anew with --force (the old file is kept under another name)"
    if resumable:
        return UsageError(f"{target.path!r} already holds answers: go on with --resume, {anew}")
    return UsageError(
        f"{target.path!r} exists, and there is no {target.journal!r} from which a run could go on: {anew}"
    )


class _Matches:
    """The lines of the input, each with the answer in the output that belongs to it."""

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Plan,
        source: Input,
        target: Target,
        output: OutputFile,
        *,
        trusts_ids: bool,
    ) -> None:
        self._force = args.force
        self._model = plan.transport.model
        self._source = source
        self._target = target
        self._output = output
        self._trusts_ids = trusts_ids
        self._rows = output.rows()

    def resumed(self, settings: Settings) -> Resumed:
        """Return what the run begins with, and describe it on stderr."""
        found, undated = Resumed(), 0
        for name, row, start in self._answers():
            if start is not None:
                found.done.add(id_digest(name))
            if row is None or start != row.start:
                found.reused += start is not None
                found.changed += row is not None
                undated += row is not None and row.question is None
        if found.changed and self._source.partial:
            raise UsageError(
                f"{plural(found.changed, 'id')} have the answer to another question. Resume without --limit and --sample: the output "
                "is rewritten then, without the answers to what they leave out"
            )
        self._describe(found, undated)
        if not (found.changed or found.reused):
            self._rows = Rows()  # which are large, and needed no more

        def begin() -> None:
            if found.changed:
                rows = ((start, name) for name, _, start in self._answers() if start is not None)
                _rewrite(self._output, self._target, rows)
            elif found.reused:
                for name, row, start in self._answers():
                    if row is None and start is not None:
                        self._output.write(self._output.row_at(start, name))
            keep_settings(self._target.path, settings)
            self._rows = Rows()

        found.begin = begin
        return found

    def _answers(self) -> Iterator[tuple[str, Row | None, int | None]]:
        """Yield each id of the input, the answer under that id, and the offset of the answer that counts; None if there is none."""
        rows = self._rows
        for name, digest in self._questions():
            row, question = rows.of_id(id_digest(name)), rows.question(digest)
            if row is not None and (
                self._trusts_ids or (self._force if row.question is None else row.question == question)
            ):
                yield name, row, row.start
            else:
                yield name, row, None if question is None else rows.answer_to(question)

    def _questions(self) -> Iterator[tuple[str, str | None]]:
        """Yield each id of the input with the digest of its question; None if its line cannot be asked about."""
        for row in self._source.rows():
            if not isinstance(row, BadLine):
                yield row[1].id or "", question_digest(row[1], self._model)
            elif row.name is not None:
                yield row.name, None

    def _describe(self, found: Resumed, undated: int) -> None:
        remark(f"resuming: {len(found.done):,} of {plural(self._source.items, 'item')} answered before")
        if self._rows.cut:
            remark(f"cut off an incomplete last line ({plural(self._rows.cut, 'byte')})")
        if found.changed - undated:
            remark(f"{plural(found.changed - undated, 'id')} had the answer to another question, which does not count")
        if undated:
            remark(
                f"{plural(undated, 'answer')} of an older release, which did not record the question, will be asked for anew; "
                "--resume --force keeps them"
            )
        if found.reused:
            remark(f"{plural(found.reused, 'question')} answered before under another id, and not asked again")


def _rewrite(output: OutputFile, target: Target, rows: Iterable[tuple[int, str]]) -> None:
    """Leave only *rows* in the journal; keep it, the output and what is beside it as they were under another name."""
    aside, journal = target.free_names()
    output.replace(rows, journal)
    if target.is_written_at_end and Path(target.path).exists():
        Path(target.path).replace(aside)
    for beside in (settings_path, record_path):
        if beside(target.path).exists():
            shutil.copyfile(beside(target.path), beside(str(aside)))
    remark(f"the output as it was is now {str(journal)!r}")


# --- settings


def settings(args: argparse.Namespace, plan: Plan, source: Input) -> Settings:
    """Return the settings that decide what is asked, and where; a resumed run must have the same."""
    questions = source.questions
    # These are left out unless they are given, as in the files of releases that had no such settings.
    added = {
        "combine_params": sorted(plan.policy.combine_params),
        "max_latency": plan.policy.max_latency,
        "examples": hashed(questions.examples or None),
        "max_excess": None if plan.audit is None else plan.audit.max_excess,
    }
    return {
        "endpoint": plan.transport.base_url,
        "--model": plan.transport.model,
        "--system": hashed(questions.system),
        "--template": hashed(questions.template),
        "--labels": hashed(questions.labels),
        "--schema": hashed(questions.schema),
        "--id-field": args.id_field,
        "--max-tokens": args.max_tokens,
        "--temperature": args.temperature,
        **{flag(name): getattr(plan.policy, name) for name in _SHAPING},
        "--merge": None if plan.policy.merge == "auto" else plan.policy.merge,
        "--canary": args.canary,
        **{flag(name): value for name, value in added.items() if value},
        **{name: hashed(value) for name, value in _of_requests(args).items() if value},
    }


def _of_requests(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return what flags add to every request. Credentials are left out: a new key asks the same."""
    headers = [(name.lower(), value) for name, value in args.header if not says_who(name)]
    query = [(name, value) for name, value in args.query if not says_who(name)]
    found = {"--param": args.param, "--header": headers, "--query": query}
    return {name: {key: dict(pairs)[key] for key in sorted(dict(pairs))} for name, pairs in found.items()}


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


def _check_settings(args: argparse.Namespace, now: Settings) -> bool:
    """Return whether ids alone decide which answers count, because --force is given and every question differs."""
    changes = differences(args.output, now)
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
        remark(f"--force: answers are kept by their ids, although {', '.join(asked)} and so the questions have changed")
    return bool(asked)
