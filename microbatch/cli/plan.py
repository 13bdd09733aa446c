"""What a command is to ask, checked before anything is sent."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.batching.request import read_options
from microbatch.cli.console import UsageError
from microbatch.cli.flags import read_settings
from microbatch.cli.questions import (
    BatchLines,
    Questions,
    Template,
    Templated,
    read_labels,
    read_schema,
    read_text,
)
from microbatch.cli.reading import Input, Survey
from microbatch.cli.resting import DirectTransport, RestingTransport
from microbatch.cli.simulated import SIMULATED_MODEL, SimulatedChat
from microbatch.cli.stores import bulk_cache_at
from microbatch.client import Microbatcher
from microbatch.errors import ConfigError
from microbatch.policy import FallbackPolicy, FlushPolicy, RetryPolicy
from microbatch.transports.openai_chat import OpenAIChat
from microbatch.transports.rate_limit import RateLimit

if TYPE_CHECKING:
    import argparse

    from microbatch.caching.guard import Guard
    from microbatch.protocols import Transport
    from microbatch.spool.endpoint import Endpoint


class Job(msgspec.Struct):
    """Settings that have been checked, and an input that has been read once."""

    source: Input
    survey: Survey
    questions: Questions
    policy: FlushPolicy
    fallback: FallbackPolicy
    rate_limit: RateLimit | None
    cache: Guard | None
    transport: OpenAIChat | SimulatedChat

    @property
    def simulated(self) -> str | None:
        """The model whose prices stand in for those of the embedded endpoint; None if the endpoint is a real one."""
        return self.transport.model if isinstance(self.transport, SimulatedChat) else None

    def batcher(self, endpoint: Endpoint) -> Microbatcher:
        """Return what asks as far as *endpoint* allows, not yet open."""
        return Microbatcher(
            RestingTransport(self.transport, endpoint),
            policy=self.policy,
            fallback=self.fallback,
            rate_limit=self.rate_limit,
            cache=self.cache,
        )


def prepare(args: argparse.Namespace) -> Job:
    """Check what the flags of `asking` say, and read the input once.

    Raises:
        UsageError: Something is wrong with either.
    """
    policy = read_policy(args)
    fallback = FallbackPolicy(canary=args.canary)
    rate_limit = RateLimit(rpm=args.rpm, tpm=args.tpm) if args.rpm or args.tpm else None
    cache = None if args.cache is None else bulk_cache_at(args.cache)
    model = args.model or (SIMULATED_MODEL if args.simulate else None)
    questions = read_questions(args, needs_model=model is None)
    transport = SimulatedChat(model) if args.simulate else read_transport(args, model)
    source = Input(args.input, id_field=args.id_field)
    survey = source.survey(questions.fields)
    return Job(source, survey, questions, policy, fallback, rate_limit, cache, transport)


def prober(transport: Transport) -> Microbatcher:
    """Return what asks once, without a cache, past any rest; not yet open. *transport* is opened and closed by others."""
    return Microbatcher(DirectTransport(transport), retry=RetryPolicy(max_attempts=1))


def read_policy(args: argparse.Namespace) -> FlushPolicy:
    """Return when requests leave.

    Raises:
        UsageError: A value is out of range, or two flags contradict each other.
    """
    if not args.single:
        return read_settings(args, FlushPolicy)
    if args.max_batch_size not in (None, 1):
        raise UsageError(f"--single means --max-batch-size 1, but --max-batch-size {args.max_batch_size} is given too")
    return read_settings(args, FlushPolicy, max_batch_size=1)


def read_questions(args: argparse.Namespace, *, needs_model: bool) -> Questions:
    """Return what is asked about each line.

    Args:
        args: What `asking.add_question` has added.
        needs_model: Whether nothing but a line itself can name the model.

    Raises:
        UsageError: A flag, or the file it names, is wrong.
    """
    options: dict[str, Any] = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    if args.template is None:
        for name in ("system", "labels", "schema"):
            if getattr(args, name) is not None:
                raise UsageError(
                    f"--{name} needs a --template; lines without one are OpenAI Batch requests and say it all themselves"
                )
        return BatchLines(options=options, needs_model=needs_model)
    if needs_model:
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


def read_transport(args: argparse.Namespace, model: str | None) -> OpenAIChat:
    """Return the way to the endpoint.

    Raises:
        UsageError: There is no key, or the address is wrong.
    """
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
