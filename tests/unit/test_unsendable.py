"""Calls that the transport cannot send: each caller gets the ConfigError, and nothing counts as an attempt."""

import asyncio
import pickle
from contextlib import asynccontextmanager

import pytest
from helpers import ask

import microbatch as mb
from microbatch.testing import ScriptedTransport


class Choosy(ScriptedTransport):
    """Refuses to send prompts with a certain word in them, as transports do that have no model or meet a header that is none."""

    def __init__(self, word=""):
        super().__init__()
        self.word = word
        self.refused = self.tried = 0

    async def send(self, call, on_text):
        await asyncio.sleep(0)
        self.tried += 1
        if self.word in str(call.messages):
            self.refused += 1
            raise mb.ConfigError("no model: name one")
        return await super().send(call, on_text)

    @asynccontextmanager
    async def forward(self, method, path, headers, body):
        if self.word in path:
            raise mb.ConfigError("no such path")
        yield path


def batcher_with(transport, **options):
    policy = options.pop("policy", mb.FlushPolicy(idle="wait", max_wait=0.1))
    return mb.Microbatcher(transport, policy=policy, tokens="bytes", **options)


def nothing_was_sent(stats):
    return not any((stats.upstream_calls, stats.fallback_calls, stats.retries, stats.forwarded, stats.unreported_calls))


def is_told(error, attempts=0):
    return type(error) is mb.ConfigError and str(error) == "no model: name one" and error.attempts == attempts


@pytest.mark.parametrize("size", [1, 2, 16])
async def test_every_caller_of_a_call_that_cannot_be_sent_gets_the_config_error(size):
    transport = Choosy()
    async with batcher_with(transport) as batcher:
        asked = (batcher.submit(ask(f"{number}")) for number in range(size))
        errors = await asyncio.gather(*asked, return_exceptions=True)
    assert all(map(is_told, errors))
    assert len({id(error) for error in errors}) == size
    assert nothing_was_sent(batcher.stats())
    assert batcher.stats().failed == size
    assert batcher.stats().lanes_parted == 0


@pytest.mark.parametrize("options", [{"priority": "high"}, {"params": {"seed": 1}}])
async def test_so_does_a_caller_whose_request_goes_alone(options):
    async with batcher_with(Choosy()) as batcher:
        with pytest.raises(mb.ConfigError) as caught:
            await batcher.submit(ask("x"), **options)
    assert is_told(caught.value)
    assert nothing_was_sent(batcher.stats())


async def test_so_do_those_who_share_a_call():
    async with batcher_with(Choosy()) as batcher:
        asked = (batcher.submit(ask("x"), temperature=0) for _ in range(3))
        errors = await asyncio.gather(*asked, return_exceptions=True)
    assert all(map(is_told, errors))
    assert nothing_was_sent(batcher.stats())


async def test_so_does_each_item_of_a_map():
    async with batcher_with(Choosy()) as batcher:
        results = [result async for result in batcher.map(ask(f"{number}") for number in range(40))]
    assert all(is_told(result.error) for result in results)
    assert nothing_was_sent(batcher.stats())


async def test_so_does_a_caller_who_has_something_relayed():
    async with batcher_with(Choosy("bad")) as batcher:
        with pytest.raises(mb.ConfigError, match="no such path"):
            async with batcher.forward("GET", "/bad", {}):
                pytest.fail("it was sent")
        assert nothing_was_sent(batcher.stats())
        with pytest.raises(mb.ConfigError, match="the caller's own"):
            async with batcher.forward("GET", "/good", {}):
                raise mb.ConfigError("the caller's own")
        assert batcher.stats().upstream_calls == batcher.stats().forwarded == 1


async def test_one_request_that_cannot_be_sent_fails_no_other():
    transport = Choosy("bad")
    async with batcher_with(transport) as batcher:
        texts = [*map(str, range(15)), "bad"]
        outcomes = await asyncio.gather(*(batcher.submit(ask(text)) for text in texts), return_exceptions=True)
    assert [reply.output for reply in outcomes[:-1]] == [text.upper() for text in texts[:-1]]
    assert is_told(outcomes[-1])
    stats = batcher.stats()
    assert stats.upstream_calls == len(transport.calls) == transport.tried - transport.refused
    assert stats.fallback_calls == stats.upstream_calls  # the first call of all was not sent


async def test_what_was_not_sent_takes_nothing_of_a_rate_limit():
    transport = Choosy("bad")
    async with batcher_with(transport, rate_limit=mb.RateLimit(rpm=2)) as batcher:
        for _ in range(10):
            with pytest.raises(mb.ConfigError):
                await batcher.submit(ask("bad"), priority="high")
        for _ in range(2):
            await batcher.submit(ask("x"), priority="high")
    assert asyncio.get_running_loop().time() == 0.0


async def test_what_was_not_sent_earns_no_retries():
    class Broken(Choosy):
        async def send(self, call, on_text):
            if "bad" in str(call.messages):
                return await super().send(call, on_text)
            raise mb.ConnectFailed("nobody is there")

    async with batcher_with(Broken("bad"), retry=mb.RetryPolicy(budget=0.5, reserve=0)) as batcher:
        with pytest.raises(mb.ConfigError):
            await batcher.submit(ask("bad"), priority="high")
        with pytest.raises(mb.ConnectFailed):
            await batcher.submit(ask("x"), priority="high")
    assert (batcher.stats().upstream_calls, batcher.stats().retries, batcher.stats().retries_denied) == (1, 0, 1)


async def test_what_could_not_be_sent_again_keeps_the_attempts_before():
    class Losing(Choosy):
        async def send(self, call, on_text):
            self.tried += 1
            if self.tried == 1:
                raise mb.ConnectFailed("nobody is there")
            raise mb.ConfigError("no model: name one")

    transport = Losing()
    async with batcher_with(transport, retry=mb.RetryPolicy(base=0, reserve=1, budget=0)) as batcher:
        with pytest.raises(mb.ConfigError) as caught:
            await batcher.submit(ask("x"), priority="high")
        assert is_told(caught.value, attempts=1)
        assert (batcher.stats().upstream_calls, batcher.stats().retries) == (1, 0)
        # and the retry that was not made can be made by another
        transport.tried = 0
        with pytest.raises(mb.ConfigError) as caught:
            await batcher.submit(ask("x"), priority="high")
        assert is_told(caught.value, attempts=1)


async def test_a_config_error_in_the_middle_of_an_answer_is_a_failed_attempt():
    class Odd(ScriptedTransport):
        async def send(self, call, on_text):
            on_text("something")
            raise mb.ConfigError("too late")

    async with batcher_with(Odd(), retry=mb.RetryPolicy(max_attempts=1)) as batcher:
        with pytest.raises(mb.TransportError, match="raised ConfigError"):
            await batcher.submit(ask("x"), priority="high")
    assert batcher.stats().upstream_calls == 1


def test_the_error_tells_its_attempts_wherever_it_comes_from():
    assert mb.ConfigError("x").attempts == 0
    error = mb.ConfigError("x")
    error.attempts = 2
    assert pickle.loads(pickle.dumps(error)).attempts == 2
