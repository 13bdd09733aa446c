"""What is confidential stays out of everything that gets copied into tickets and log archives."""

from __future__ import annotations

import asyncio
import logging
import pickle
import traceback

import pytest
from helpers import ask

import microbatch as mb
from microbatch.testing import Faults, SimulatedEndpoint

KEY = "sk-canary-4217-key"
HEADER = "canary-4217-header"
PROMPT = "canary-4217-prompt"
SYSTEM = "canary-4217-system"
SECRETS = (KEY, HEADER, PROMPT, SYSTEM)


def everything_said_of(error):
    return [
        repr(error),
        str(error),
        "".join(traceback.format_exception(error)),
        repr(pickle.loads(pickle.dumps(error)).__dict__),
        pickle.dumps(error).decode("latin-1"),
    ]


@pytest.mark.promise(of="secrets")
@pytest.mark.parametrize(
    "trouble",
    ["http_400", "http_429", "http_500", "refusal", "filtered", "whitespace", "broken_json", "reset", "401", None],
)
async def test_no_key_header_or_text_is_in_any_repr_error_log_line_or_pickle(trouble, caplog, request):
    caplog.set_level(logging.DEBUG)
    faults = None if trouble in (None, "401") else Faults(trouble, rate=1.0, on="all", retry_after=0.0)
    async with SimulatedEndpoint(faults=faults, api_keys=["other"] if trouble == "401" else None) as endpoint:
        transport = mb.OpenAIChat("m", base_url=endpoint.base_url, api_key=KEY)
        policy = mb.RetryPolicy(max_attempts=2, base=0.001)
        async with mb.Microbatcher(
            transport, retry=policy, rate_limit=mb.RateLimit(rpm=10**6), tokens="bytes"
        ) as batcher:
            ended = await asyncio.gather(
                *(
                    batcher.submit(ask(f"{PROMPT} {number}", SYSTEM), output_type=list[int], headers={"X-Who": HEADER})
                    for number in range(3)
                ),
                return_exceptions=True,
            )
            said = [repr(batcher), repr(batcher.stats()), repr(transport), repr(batcher._parts.accounts.of(None, {}))]
            engine = batcher._engine
            said += [repr(each) for each in (engine.lanes, engine.scheduler, batcher._parts.tokens)]
    for each in ended:
        said += everything_said_of(each) if isinstance(each, BaseException) else [repr(each)]
    said += [record.getMessage() for record in caplog.records if record.name == "microbatch"]
    said += [record.exc_text or "" for record in caplog.records]
    if trouble in ("http_400", "http_429", "http_500", "401"):  # some answers come through the other kinds of trouble
        assert all(isinstance(each, mb.StatusError) for each in ended)
    assert [text for text in said for secret in SECRETS if secret in text] == []
