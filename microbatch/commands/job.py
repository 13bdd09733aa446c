"""What `run` is to do, checked before anything is sent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.batching.request import read_options
from microbatch.commands import fingerprint
from microbatch.commands.console import UsageError
from microbatch.commands.flags import flag, read_settings
from microbatch.commands.questions import (
    BatchLines,
    Questions,
    Template,
    Templated,
    read_labels,
    read_schema,
    read_text,
)
from microbatch.commands.reading import Input, Survey
from microbatch.errors import ConfigError
from microbatch.policy import FallbackPolicy, FlushPolicy
from microbatch.transports.openai_chat import OpenAIChat
from microbatch.transports.rate_limit import RateLimit

if TYPE_CHECKING:
    import argparse

SIMULATED_MODEL = "gpt-4.1-mini"

# What decides which requests share a prompt, and so what the model is asked. The rest of the policy is about pace.
_SHAPING = ("max_batch_size", "max_batch_tokens", "max_prompt_tokens", "max_output_tokens", "merge")


class Job(msgspec.Struct):
    """A run whose settings have been checked."""

    source: Input
    survey: Survey
    questions: Questions
    policy: FlushPolicy
    fallback: FallbackPolicy
    rate_limit: RateLimit | None
    model: str | None
    transport: OpenAIChat | None
    settings: fingerprint.Settings

    @property
    def simulated(self) -> bool:
        """Whether the endpoint is the embedded one."""
        return self.transport is None


def prepare(args: argparse.Namespace) -> Job:
    """Check what the flags of `run` say, and read the input once.

    Raises:
        UsageError: Something is wrong with either.
    """
    policy = _policy(args)
    fallback = FallbackPolicy(canary=args.canary)
    rate_limit = RateLimit(rpm=args.rpm, tpm=args.tpm) if args.rpm or args.tpm else None
    model = args.model or (SIMULATED_MODEL if args.simulate else None)
    questions = _questions(args, model)
    transport = None if args.simulate else _transport(args, model)
    source = Input(args.input, id_field=args.id_field)
    if Path(args.output).exists() and Path(args.output).samefile(args.input):
        raise UsageError(f"-o {args.output!r} is the input itself")
    survey = source.survey(questions.fields)
    settings = _settings(args, policy, model, transport)
    return Job(source, survey, questions, policy, fallback, rate_limit, model, transport, settings)


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
        **{flag(name): getattr(policy, name) for name in _SHAPING},
        "--canary": args.canary,
    }
