"""Spooled requests answered by a provider's batch API: the real spool, transport and endpoint, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from helpers import PATIENCE, ask
from shop import TEXTS, Label, right

from microbatch.accounting.prices import Price
from microbatch.errors import ConfigError, ConnectFailed, StorageError
from microbatch.messages import Usage
from microbatch.policy import FlushPolicy, RetryPolicy
from microbatch.spool.payload import Answer, Payload
from microbatch.spool.provider.api import OpenAIBatchApi
from microbatch.spool.provider.worker import MAX_LESSONS, ProviderBatches
from microbatch.spool.records import Name, Spool
from microbatch.spool.redis import RedisSpool
from microbatch.spool.sqlite import SQLiteSpool
from microbatch.testing import Faults, SimulatedEndpoint
from microbatch.testing.quota import Quota
from microbatch.testing.reading import EndpointError
from microbatch.transports.chat_wire import BatchWire
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


MODEL = "gpt-4.1-mini"
PRICE = Price(0.40, 1.60, 0.10)
# Texts of the catalogue take some 300 bytes; so sixteen of them fit.
ROOMY = FlushPolicy(max_batch_tokens=16_000)
POLL = 0.02


def price(model, asked):
    return PRICE if MODEL in (model, asked) else None


class Site:
    """A spool, an endpoint, and what leads from one to the other."""

    def __init__(self, spool: Spool, endpoint: SimulatedEndpoint, transport: OpenAIChat) -> None:
        self.spool = spool
        self.endpoint = endpoint
        self.transport = transport

    def api(self) -> OpenAIBatchApi:
        wire = BatchWire(None, where="the endpoint")
        return OpenAIBatchApi(self.transport.forward, wire.refusal, retry=RetryPolicy(base=0.01, max_attempts=2))

    def worker(self, api: Any = None, **options: Any) -> ProviderBatches:
        settled = {"policy": ROOMY, "price": price, "poll_interval": POLL, "until_empty": True, **options}
        return ProviderBatches(self.spool, api or self.api(), BatchWire(MODEL, where="the endpoint"), **settled)

    async def put(self, texts: list[str], *, tenant: str | None = None, start: int = 0, **asked: Any) -> list[Name]:
        names = [Name(tenant, str(number)) for number in range(start, start + len(texts))]
        items = [Payload.of(ask(text), **asked).item(name) for name, text in zip(names, texts, strict=True)]
        assert await self.spool.put(items) == ["new"] * len(texts)
        return names

    async def answers(self, names: list[Name]) -> list[Answer]:
        found = await self.spool.find(names)
        assert Counter(each.state for each in found) == {"done": len(names)}, Counter(each.error for each in found)
        return [Answer.decode(each.result or b"") for each in found]

    async def deliveries(self) -> dict[str, int]:
        """How often each request was delivered."""
        return {kept.name.id: kept.deliveries async for kept in self.spool.export()}

    @property
    def sizes(self) -> list[int]:
        """How many requests each prompt carried, in the order in which they were run."""
        assert self.endpoint.record
        return [max(1, len(items_of(body))) for body in self.endpoint.requests]


def items_of(body: dict[str, Any]) -> list[str]:
    """The texts in a combined prompt."""
    return [
        json.loads(text) for text in re.findall(r"^\[\w+\] (\".*\")$", body["messages"][-1]["content"], re.MULTILINE)
    ]


async def drained(worker: ProviderBatches) -> ProviderBatches:
    async with asyncio.timeout(PATIENCE):
        await worker.run()
    return worker


@contextlib.asynccontextmanager
async def opened(place: Path | str, **options: Any):
    async with SimulatedEndpoint(**{"record": True, **options}) as endpoint:
        spool: Spool = RedisSpool(place) if isinstance(place, str) else SQLiteSpool(place / "spool.sqlite")
        await spool.open()
        transport = OpenAIChat(MODEL, base_url=endpoint.base_url, api_key="sk-canary-key")
        try:
            yield Site(spool, endpoint, transport)
        finally:
            await transport.aclose()
            await spool.aclose()


@pytest_asyncio.fixture(params=["sqlite", "redis"])
async def site(request, tmp_path):
    place = tmp_path if request.param == "sqlite" else request.getfixturevalue("redis_url")
    async with opened(place) as site:
        yield site


# Answers


@pytest.mark.parametrize("output_type", [str, Label])
async def test_three_jobs_worth_of_requests_are_all_answered_right(site, output_type):
    texts = TEXTS[:60]
    names = await site.put(texts, output_type=output_type)
    worker = await drained(site.worker(max_requests=20))
    answers = await site.answers(names)
    assert [answer.reply(output_type).output for answer in answers] == [right(text, output_type) for text in texts]
    assert (worker.done.answered, worker.done.failed, worker.done.returned) == (60, 0, 0)
    assert (worker.done.jobs, worker.done.lines) == (3, 6)
    assert (site.endpoint.batches_created, site.endpoint.batch_lines, site.endpoint.calls) == (3, 6, 0)
    assert sorted(site.sizes) == [4, 4, 4, 16, 16, 16]
    assert {(answer.route, answer.model, answer.finish_reason) for answer in answers} == {("batch", MODEL, "stop")}
    assert {answer.batch_size for answer in answers} == {4, 16}
    assert all(answer.request_id for answer in answers)
    assert (await site.spool.counts()).depth == 0


async def test_the_cost_is_half_the_price_and_shares_add_up_to_what_was_reported(site):
    names = await site.put(TEXTS[:50], output_type=Label)
    done = (await drained(site.worker())).done
    answers = await site.answers(names)
    total = sum((answer.usage for answer in answers), Usage())
    assert total == done.usage == site.endpoint.reported
    assert total.prompt_tokens > 0
    assert not total.estimated
    assert done.cost_usd == pytest.approx(PRICE.cost(total) / 2, abs=1e-9)
    assert sum(answer.cost_usd for answer in answers) == pytest.approx(done.cost_usd, abs=1e-9)


async def test_a_batch_is_charged_by_its_own_tier_if_there_is_one(site):
    names = await site.put(TEXTS[:20], output_type=Label)
    tiered = Price(0.40, 1.60, tiers={"batch": Price(0.30, 0.90)})
    done = (await drained(site.worker(price=lambda *_: tiered))).done
    assert done.cost_usd == pytest.approx(Price(0.30, 0.90).cost(done.usage), abs=1e-9)
    assert sum(answer.cost_usd for answer in await site.answers(names)) == pytest.approx(done.cost_usd, abs=1e-9)


async def test_without_a_price_the_cost_is_unknown_and_of_others_it_is_known(site):
    names = await site.put(TEXTS[:5], model="other")
    done = (await drained(site.worker())).done
    assert done.cost_usd is None
    assert done.unpriced > 0
    assert {answer.cost_usd for answer in await site.answers(names)} == {None}
    worker = site.worker()
    await site.put(TEXTS[:5], model="other", start=20)
    priced = await site.put(TEXTS[:5], start=40)
    done = (await drained(worker)).done
    assert done.unpriced > 0
    costs = [answer.cost_usd for answer in await site.answers(priced)]
    assert sum(costs) == pytest.approx(done.cost_usd, abs=1e-9)
    assert done.cost_usd > 0


async def test_a_file_holds_one_model_only(site):
    one = await site.put(TEXTS[:20], model="one")
    other = await site.put(TEXTS[:20], model="other", start=20)
    done = (await drained(site.worker())).done
    assert (done.jobs, done.returned, done.failed) == (2, 0, 0)
    for names, model in ((one, "one"), (other, "other")):
        assert {answer.model for answer in await site.answers(names)} == {model}


async def test_tenants_never_share_a_prompt(site):
    mine = await site.put([f"mine: {text}" for text in TEXTS[:20]], tenant="mine")
    yours = await site.put([f"yours: {text}" for text in TEXTS[:20]], tenant="yours")
    nobodys = await site.put([f"nobody's: {text}" for text in TEXTS[:20]])
    await drained(site.worker())
    prompts = [items_of(body) or [body["messages"][-1]["content"]] for body in site.endpoint.requests]
    assert [len({text.partition(":")[0] for text in prompt}) for prompt in prompts] == [1] * 6
    for names, word in ((mine, "mine"), (yours, "yours"), (nobodys, "nobody's")):
        answers = await site.answers(names)
        assert [answer.text for answer in answers] == [right(f"{word}: {text}") for text in TEXTS[:20]]


@pytest.mark.parametrize(
    "asked",
    [{"temperature": 0.5}, {"max_tokens": 90}, {"params": {"top_p": 0.5}}, {"output_type": Label}, {"model": MODEL}],
)
async def test_whatever_differs_keeps_requests_apart(site, asked):
    await site.put(TEXTS[:3])
    await site.put(TEXTS[3:6], start=3, **asked)
    await drained(site.worker())
    assert sorted(site.sizes) == [3, 3]
    differing = [{**body, "messages": None} for body in site.endpoint.requests]
    assert differing[0] != differing[1] or asked == {"model": MODEL}


async def test_a_request_of_its_own_kind_goes_alone_and_keeps_its_body(site):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    names = await site.put(TEXTS[:3], params={"tools": [tool]})
    await drained(site.worker())
    assert site.sizes == [1, 1, 1]
    assert all(body["messages"] == ask(body["messages"][1]["content"]) for body in site.endpoint.requests)
    for answer, text in zip(await site.answers(names), TEXTS, strict=False):
        assert (answer.route, answer.batch_size, answer.text) == ("single", 1, right(text))
        assert answer.body["choices"][0]["message"]["content"] == answer.text


async def test_prompts_keep_to_the_budgets(site):
    await site.put(TEXTS[:40], max_tokens=150)
    await drained(site.worker(policy=FlushPolicy(max_batch_tokens=16_000, max_output_tokens=1_000)))
    # 1.2 x 150 + 16 = 196 for each answer, so five fit.
    assert set(site.sizes) == {5}
    assert {body["max_tokens"] for body in site.endpoint.requests} == {5 * 196}
    site.endpoint.requests.clear()
    await site.put(TEXTS[:40], start=40)
    await drained(site.worker(policy=FlushPolicy(max_batch_tokens=3_000)))
    prompts = [body["messages"][-1]["content"] for body in site.endpoint.requests]
    assert max(len(prompt.encode()) for prompt in prompts) <= 3_000 + 16 * 8
    assert max(site.sizes) > 2


async def test_lines_use_up_no_quota_of_live_calls(tmp_path):
    async with opened(tmp_path, quota=Quota(rpm=1)) as site:
        names = await site.put(TEXTS[:40])
        await drained(site.worker())
        await site.answers(names)
        assert site.endpoint.quota_refusals == 0


# What goes wrong with a line


async def test_lines_whose_time_ran_out_go_again_in_full_batches(tmp_path):
    async with opened(tmp_path, batch_expires=2) as site:
        names = await site.put(TEXTS[:64])
        worker = site.worker()
        await worker.submit_some()
        async with asyncio.timeout(PATIENCE):
            while not await worker.poll():  # noqa: ASYNC110 - polling is the API
                await asyncio.sleep(POLL)
        assert (worker.done.answered, worker.done.returned, worker.done.failed) == (32, 32, 0)
        assert (await site.spool.counts()).waiting == (32, 0, 0)
        site.endpoint.batch_expires = 0
        await drained(worker)
        assert [answer.text for answer in await site.answers(names)] == [right(text) for text in TEXTS[:64]]
        assert site.endpoint.batches_created == 2
        assert site.sizes == [16, 16, 16, 16]


async def test_a_failed_line_goes_in_half_batches_next_and_then_alone(tmp_path):
    async with opened(tmp_path, faults=Faults("http_500", rate=1, on="all", limit=3)) as site:
        names = await site.put(TEXTS[:16])
        worker = await drained(site.worker())
        assert [answer.text for answer in await site.answers(names)] == [right(text) for text in TEXTS[:16]]
        assert site.sizes == [16, 8, 8] + [1] * 16
        assert (worker.done.jobs, worker.done.failed) == (3, 32)
        assert set((await site.deliveries()).values()) == {3}


async def test_jobs_in_which_every_line_fails_cost_no_request_its_chances(tmp_path):
    """Six jobs of four lines that all fail, which is more than kills a request."""
    async with opened(tmp_path, faults=Faults("http_500", rate=1, on="all", limit=24)) as site:
        names = await site.put(TEXTS[:64])
        worker = await drained(site.worker())
        assert [answer.text for answer in await site.answers(names)] == [right(text) for text in TEXTS[:64]]
        assert (worker.done.jobs, worker.done.failed, worker.done.returned) == (7, 0, 6 * 64)


async def test_jobs_in_which_every_line_fails_for_ever_are_not_tried_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("microbatch.spool.provider.worker.LONGEST_PAUSE", POLL)
    async with opened(tmp_path, faults=Faults("http_500", rate=1, on="all")) as site:
        await site.put(TEXTS[:64])
        worker = await drained(site.worker())
        assert (await site.spool.counts()).dead == 64
        assert worker.done.jobs >= MAX_LESSONS


async def test_who_fails_alone_time_and_again_is_dead_and_harms_no_other(site):
    texts = [*TEXTS[:15], "the bad one"]
    site.endpoint.faults = None
    real = site.endpoint.read

    def read(body):
        if "the bad one" in body["messages"][-1]["content"]:
            raise EndpointError(400, "Invalid prompt.", param="messages", code="content_filter")
        return real(body)

    site.endpoint.read = read
    names = await site.put(texts)
    await drained(site.worker())
    assert [answer.text for answer in await site.answers(names[:15])] == [right(text) for text in texts[:15]]
    (dead,) = [letter async for letter in site.spool.dead_letters()]
    assert (dead.item.name, dead.deliveries) == (names[15], 5)
    assert dead.error.startswith("Filtered: ")
    assert "bad one" not in dead.error
    # 16 together, 2 x 8, then the 8 that were with it alone, and it alone twice more.
    assert site.sizes == [16, 8, 8] + [1] * 8 + [1, 1]


@pytest.mark.parametrize(
    "kind",
    ["missing", "broken_json", "duplicate", "previous_id", "unknown", "renamed", "reordered", "fenced", "wrong_type"],
)
async def test_a_damaged_reply_costs_only_what_is_damaged_and_nobody_gets_another_s_answer(tmp_path, kind):
    async with opened(tmp_path, faults=Faults(kind, rate=1, limit=2)) as site:
        names = await site.put(TEXTS[:48], output_type=Label)
        worker = await drained(site.worker())
        answers = await site.answers(names)
        assert [answer.reply(Label).output for answer in answers] == [right(text, Label) for text in TEXTS[:48]]
        assert site.endpoint.faulted == 2
        harmless = kind in ("unknown", "reordered", "fenced")
        assert worker.done.failed == 0 if harmless else 2 <= worker.done.failed <= 4
        total = sum((answer.usage for answer in answers), Usage())
        assert (total == worker.done.usage) == harmless
        assert worker.done.usage == site.endpoint.reported


@pytest.mark.parametrize("kind", ["shifted_back", "shifted_forward", "missing", "truncated"])
async def test_a_reply_that_gets_its_canary_wrong_is_distrusted_as_a_whole(tmp_path, kind):
    async with opened(tmp_path, faults=Faults(kind, rate=1, limit=1, seed=1)) as site:
        names = await site.put(TEXTS[:16], output_type=Label)
        worker = await drained(site.worker(canary=True))
        answers = await site.answers(names)
        assert [answer.reply(Label).output for answer in answers] == [right(text, Label) for text in TEXTS[:16]]
        assert worker.done.failed == (1 if kind == "missing" else 16)
        assert all(len(items_of(body)) in (1, 9, 17) or kind == "missing" for body in site.endpoint.requests)


async def test_a_truncated_reply_keeps_its_complete_elements(tmp_path):
    async with opened(tmp_path, faults=Faults("truncated", rate=1, limit=1, seed=3)) as site:
        names = await site.put(TEXTS[:16])
        worker = site.worker()
        await worker.submit_some()
        async with asyncio.timeout(PATIENCE):
            while not await worker.poll():  # noqa: ASYNC110 - polling is the API
                await asyncio.sleep(POLL)
        assert 0 < worker.done.answered < 16
        assert worker.done.answered + worker.done.failed == 16
        (cut,) = site.endpoint.replies
        assert worker.done.answered == cut.count('"},{"id"') + cut.endswith('"}')
        await drained(worker)
        assert [answer.text for answer in await site.answers(names)] == [right(text) for text in TEXTS[:16]]


@pytest.mark.parametrize("kind", ["refusal", "whitespace", "cut", "filtered"])
async def test_a_reply_without_any_answer_is_nobody_s_answer(tmp_path, kind):
    async with opened(tmp_path, faults=Faults(kind, rate=1, on="all", limit=2)) as site:
        names = await site.put(TEXTS[:4])
        await drained(site.worker())
        assert [answer.text for answer in await site.answers(names)] == [right(text) for text in TEXTS[:4]]
        assert site.sizes[0] == 4


async def test_a_typed_reply_that_is_cut_or_wrong_alone_is_asked_again(tmp_path):
    kinds = ["truncated", "wrong_type", "broken_json"]
    async with opened(tmp_path, faults=Faults(kinds, rate=1, on="single", limit=3)) as site:
        names = await site.put(TEXTS[:1], output_type=Label)
        await drained(site.worker())
        (answer,) = await site.answers(names)
        assert answer.reply(Label).output == right(TEXTS[0], Label)
        assert site.sizes == [1] * 4


async def test_too_many_requests_are_no_request_s_fault(tmp_path):
    async with opened(tmp_path, faults=Faults("http_429", rate=1, on="all", limit=2)) as site:
        names = await site.put(TEXTS[:32])
        worker = await drained(site.worker())
        await site.answers(names)
        assert (worker.done.failed, worker.done.returned) == (0, 32)
        assert site.sizes == [16] * 4


@pytest.mark.parametrize(
    ("options", "asked", "changed"),
    [
        ({"max_tokens_name": "max_completion_tokens"}, {"max_tokens": 90}, "max_completion_tokens"),
        ({"temperature_fixed": True}, {"temperature": 0.0}, None),
        ({"json_schema": "400"}, {"output_type": Label}, "response_format"),
    ],
)
async def test_what_the_endpoint_does_not_support_is_learned_and_no_request_s_fault(tmp_path, options, asked, changed):
    async with opened(tmp_path, **options) as site:
        names = await site.put(TEXTS[:32], **asked)
        worker = await drained(site.worker())
        kind = asked.get("output_type", str)
        assert [each.reply(kind).output for each in await site.answers(names)] == [
            right(text, kind) for text in TEXTS[:32]
        ]
        assert (worker.done.failed, worker.done.returned, worker.done.jobs) == (0, 32, 2)
        assert site.sizes == [16] * 4
        before, after = site.endpoint.requests[0], site.endpoint.requests[-1]
        assert before != after
        assert changed is None or changed in after


async def test_an_endpoint_that_refuses_in_circles_does_not_keep_a_request_for_ever(site):
    real = site.endpoint.read

    def read(body):
        for name in ("max_tokens", "max_completion_tokens"):
            if name in body:
                raise EndpointError(400, f"Unsupported parameter: '{name}'.", param=name, code="unsupported_parameter")
        return real(body)

    site.endpoint.read = read
    names = await site.put(TEXTS[:1], max_tokens=90)
    await drained(site.worker())
    (found,) = await site.spool.find(names)
    assert found.state == "dead"
    assert "max_" in found.error
    assert site.endpoint.batches_created < 20


async def test_a_request_that_cannot_be_read_is_put_back_as_its_own_fault(site):
    good = await site.put(TEXTS[:5])
    item = Payload.of(ask("x")).item(Name(None, "bad"))
    await site.spool.put([type(item)(item.name, item.digest, b"{")])
    worker = await drained(site.worker())
    await site.answers(good)
    (dead,) = [letter async for letter in site.spool.dead_letters()]
    assert (dead.item.name.id, dead.deliveries) == ("bad", 5)
    assert worker.done.jobs == 1


# What goes wrong with a batch


class Crash(BaseException):
    """The process dies here."""


class Dying:
    """An API that dies, once, before or after a call."""

    def __init__(self, api: Any, method: str, *, after: bool, error: BaseException) -> None:
        self._api = api
        self._method = method
        self._after = after
        self._error: BaseException | None = error

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._api, name)
        if name != self._method or self._error is None:
            return real

        async def once(*args: Any) -> Any:
            error, self._error = self._error, None
            if error is None:
                return await real(*args)
            if self._after:
                await real(*args)
            raise error

        return once


@pytest.mark.parametrize(
    ("method", "after"), [("upload", False), ("upload", True), ("create", False), ("create", True)]
)
async def test_a_crash_while_a_batch_is_made_never_bills_twice(site, method, after):
    names = await site.put(TEXTS[:40])
    dying = site.worker(Dying(site.api(), method, after=after, error=Crash()), lease=0.2)
    with pytest.raises(Crash):
        await dying.submit_some()
    counts = await site.spool.counts()
    assert (counts.waiting, counts.in_job) == ((0, 0, 0), 40)
    worker = await drained(site.worker())
    assert [answer.text for answer in await site.answers(names)] == [right(text) for text in TEXTS[:40]]
    assert site.endpoint.batches_created == 1
    assert site.endpoint.batch_lines == 3
    assert (worker.done.jobs, worker.done.answered) == (0, 40)


async def test_a_crash_before_anything_is_recorded_leaves_the_requests_to_others(site):
    names = await site.put(TEXTS[:10])

    class Dead:
        async def begin_job(self, *args, **options):
            raise Crash

        def __getattr__(self, name):
            return getattr(site.spool, name)

    dying = ProviderBatches(Dead(), site.api(), BatchWire(MODEL, where="x"), lease=0.1)
    with pytest.raises(Crash):
        await dying.submit_some()
    async with asyncio.timeout(PATIENCE):
        while (await site.spool.counts()).leased:  # noqa: ASYNC110 else the next worker may find a part of them free
            await asyncio.sleep(0.01)
    await drained(site.worker())
    await site.answers(names)
    assert site.endpoint.batches_created == 1


@pytest.mark.parametrize("method", ["job_items", "finish", "give_back", "end_job"])
async def test_a_crash_while_results_are_stored_loses_and_repeats_nothing(tmp_path, method):
    async with opened(tmp_path, faults=Faults("missing", rate=1, limit=1)) as site:
        names = await site.put(TEXTS[:20])
        spool = Dying(site.spool, method, after=method != "job_items", error=Crash())

        class Options:
            """A spool that dies; the methods take options by name."""

            def __getattr__(self, name):
                real = getattr(spool, name)

                async def call(*args, **options):
                    if name != method:
                        return await getattr(site.spool, name)(*args, **options)
                    if spool._error is not None:
                        if spool._after:
                            await getattr(site.spool, name)(*args, **options)
                        error, spool._error = spool._error, None
                        raise error
                    return await real(*args, **options)

                return call

        dying = ProviderBatches(
            Options(), site.api(), BatchWire(MODEL, where="x"), policy=ROOMY, poll_interval=POLL, lease=0.2
        )
        await dying.submit_some()
        with pytest.raises(Crash):
            async with asyncio.timeout(PATIENCE):
                while True:
                    await dying.poll()
                    await asyncio.sleep(POLL)
        await drained(site.worker())
        assert [answer.text for answer in await site.answers(names)] == [right(text) for text in TEXTS[:20]]
        assert sorted(site.sizes) == [1, 4, 16]


async def test_a_batch_whose_making_was_not_answered_is_found_and_not_made_again(site):
    names = await site.put(TEXTS[:40])
    lost = ConnectFailed("the connection broke")
    worker = await drained(site.worker(Dying(site.api(), "create", after=True, error=lost)))
    await site.answers(names)
    assert site.endpoint.batches_created == 1
    assert worker.done.jobs == 1


async def test_a_batch_that_was_made_though_the_provider_says_it_failed_is_not_made_again(site):
    names = await site.put(TEXTS[:40])
    real = site.endpoint.batches.create
    failed: list[Any] = []

    def create(owner, asked):
        batch = real(owner, asked)
        if not failed:
            failed.append(batch)
            raise EndpointError(500, "The server had an error while processing your request.", kind="server_error")
        return batch

    site.endpoint.batches.create = create
    await drained(site.worker())
    await site.answers(names)
    assert failed
    assert site.endpoint.batches_created == 1


async def test_a_batch_that_was_not_made_after_all_is_made_from_the_same_file(site):
    names = await site.put(TEXTS[:40])
    lost = ConnectFailed("could not connect")
    await drained(site.worker(Dying(site.api(), "create", after=False, error=lost)))
    await site.answers(names)
    assert site.endpoint.batches_created == 1


async def test_a_batch_is_found_behind_many_others(site, monkeypatch):
    monkeypatch.setattr("microbatch.spool.provider.api.PAGE", 7)
    names = await site.put(TEXTS[:5])
    dying = site.worker(Dying(site.api(), "create", after=True, error=Crash()), lease=0.1)
    with pytest.raises(Crash):
        await dying.submit_some()
    api = site.api()
    file = await api.upload("x", b'{"custom_id":"1"}\n')
    for number in range(30):
        await api.create(file, {"microbatch_job": str(number)})
    await drained(site.worker())
    await site.answers(names)
    assert site.endpoint.batches_created == 31


async def test_a_refused_batch_puts_its_requests_back_unharmed(site):
    names = await site.put(TEXTS[:20])
    site.endpoint.api_keys = {"another"}  # read when routes are made
    await site.endpoint.aclose()
    await site.endpoint.open()
    worker = site.worker()
    assert await worker.submit_some()
    assert (worker.done.returned, worker.done.failed) == (20, 0)
    counts = await site.spool.counts()
    assert (counts.waiting, counts.in_job) == ((20, 0, 0), 0)
    assert not await worker.submit_some()  # it rests
    site.endpoint.api_keys = None
    await site.endpoint.aclose()
    await site.endpoint.open()
    await drained(worker)
    await site.answers(names)
    assert site.endpoint.batches_created == 1


async def test_a_batch_that_is_cancelled_is_no_request_s_fault(tmp_path):
    async with opened(tmp_path, batch_seconds=30) as site:
        names = await site.put(TEXTS[:40])
        worker = site.worker()
        await worker.submit_some()
        site.endpoint.batch_seconds = 0
        ((batch,),) = [site.endpoint.batches.of("Bearer sk-canary-key")]
        site.endpoint.batches.cancel("Bearer sk-canary-key", batch.id)
        await drained(worker)
        await site.answers(names)
        assert (worker.done.failed, worker.done.returned) == (0, 40)
        assert site.sizes == [16, 16, 8] or sorted(site.sizes) == [8, 16, 16]


async def test_a_provider_that_takes_less_at_once_gets_less_at_once(tmp_path):
    async with opened(tmp_path, batch_tokens=3_000) as site:
        names = await site.put(TEXTS[:64], output_type=Label)
        worker = await drained(site.worker())
        assert [each.reply(Label).output for each in await site.answers(names)] == [
            right(text, Label) for text in TEXTS[:64]
        ]
        assert worker.done.failed == 0
        assert worker.done.returned >= 64


async def test_a_line_that_the_provider_names_is_blamed_alone(site):
    good, bad = await site.put(TEXTS[:16]), await site.put(["x"], start=16, params={"user": "bad"})
    real = BatchWire.body

    class Streaming(BatchWire):
        def body(self, call):
            body = real(self, call)
            return {**body, "stream": True} if body.get("user") else body

    worker = ProviderBatches(
        site.spool, site.api(), Streaming(MODEL, where="x"), policy=ROOMY, poll_interval=POLL, until_empty=True
    )
    await drained(worker)
    await site.answers(good)
    (found,) = await site.spool.find(bad)
    assert (found.state, found.error) == ("dead", "the provider refused the line (invalid_request)")
    assert worker.done.failed == 5


async def test_an_outage_while_a_batch_runs_is_waited_out(tmp_path):
    async with opened(tmp_path, batch_seconds=0.5) as site:
        names = await site.put(TEXTS[:20])
        task = asyncio.create_task(drained(site.worker(poll_interval=0.05)))
        async with asyncio.timeout(PATIENCE):
            while not site.endpoint.batches_created:  # noqa: ASYNC110 - what an endpoint does has no event
                await asyncio.sleep(0.01)
        await site.endpoint.aclose()
        await asyncio.sleep(0.3)
        await site.endpoint.open()
        await task
        await site.answers(names)
        assert site.endpoint.batches_created == 1


async def test_lost_results_are_asked_for_again(site):
    names = await site.put(TEXTS[:16])
    real = site.endpoint.files.add
    lost: list[str] = []

    def add(owner, name, purpose, content):
        file = real(owner, name, purpose, content)
        if purpose == "batch_output" and not lost:
            lost.append(file.id)
            site.endpoint.files.delete(owner, file.id)
        return file

    site.endpoint.files.add = add
    worker = await drained(site.worker())
    await site.answers(names)
    assert lost
    assert worker.done.failed == 16


async def test_nothing_of_ours_stays_at_the_provider_but_results(site):
    await site.put(TEXTS[:20])
    await drained(site.worker())
    assert [file.purpose for file in site.endpoint.files.of("Bearer sk-canary-key")] == ["batch_output"]


async def test_a_batch_that_the_provider_has_forgotten_is_given_up_only_after_days(site, monkeypatch):
    names = await site.put(TEXTS[:5])
    worker = site.worker()
    await worker.submit_some()
    ((batch,),) = [site.endpoint.batches.of("Bearer sk-canary-key")]
    batch.owner = "another"
    assert not await worker.poll()
    assert (await site.spool.counts()).in_job == 5
    monkeypatch.setattr("microbatch.spool.provider.worker.PATIENCE", -1.0)
    await worker.poll()
    assert (await site.spool.counts()).waiting == (5, 0, 0)
    await drained(worker)
    await site.answers(names)
    assert worker.done.failed == 0


async def test_a_batch_s_id_that_could_not_be_recorded_at_first_is_recorded_later(tmp_path):
    async with opened(tmp_path, batch_seconds=30) as site:
        await site.put(TEXTS[:5])
        real, failing = site.spool.update_job, [StorageError("the disk is full")]

        async def update_job(job):
            if failing:
                raise failing.pop()
            await real(job)

        site.spool.update_job = update_job
        worker = site.worker(lease=0.1)
        with pytest.raises(StorageError):
            await worker.submit_some()
        await worker.poll()
        async with asyncio.timeout(PATIENCE):
            while not (jobs := await site.spool.take_jobs(5, lease=60)):  # noqa: ASYNC110 - when a lease is over nobody tells
                await asyncio.sleep(POLL)
        (job,) = jobs
        assert job.batch_id == "batch_00000001"
        assert site.endpoint.batches_created == 1


# Workers


async def test_what_is_under_way_goes_to_the_next_worker_at_once_when_one_stops(tmp_path):
    async with opened(tmp_path, batch_seconds=4) as site:
        names = await site.put(TEXTS[:20])
        first = site.worker(lease=600, until_empty=False)
        running = asyncio.create_task(first.run())
        async with asyncio.timeout(PATIENCE):
            while not site.endpoint.batches_created:  # noqa: ASYNC110 - what an endpoint does has no event
                await asyncio.sleep(0.01)
        first.stop()
        async with asyncio.timeout(PATIENCE):
            await running
        assert (await site.spool.counts()).in_job == 20  # so it has not waited for the batch
        second = await drained(site.worker(lease=600))
        await site.answers(names)
        assert (second.done.jobs, second.done.answered) == (0, 20)
        assert site.endpoint.batches_created == 1


async def test_a_cancelled_worker_gives_back_what_it_had_taken(site):
    await site.put(TEXTS[:20])
    taken = asyncio.Event()

    class Slow:
        def __getattr__(self, name):
            return getattr(site.spool, name)

        async def begin_job(self, *args, **options):
            taken.set()
            await asyncio.Event().wait()

    worker = ProviderBatches(Slow(), site.api(), BatchWire(MODEL, where="x"), lease=600)
    task = asyncio.create_task(worker.run())
    async with asyncio.timeout(PATIENCE):
        await taken.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await site.spool.counts()).waiting == (20, 0, 0)


async def test_leases_are_renewed_as_long_as_a_batch_takes(tmp_path):
    # The lease is much longer than a loaded machine keeps a renewal waiting; the batch takes longer still.
    async with opened(tmp_path, batch_seconds=4.0) as site:
        names = await site.put(TEXTS[:20])
        both = [site.worker(lease=3.0), site.worker(lease=3.0)]
        await asyncio.gather(*map(drained, both))
        await site.answers(names)
        assert site.endpoint.batches_created == 1
        assert sorted(worker.done.answered for worker in both) == [0, 20]


async def test_several_workers_share_a_spool(tmp_path):
    async with opened(tmp_path, batch_seconds=0.1) as site:
        texts = TEXTS * 3
        names = await site.put(texts)
        workers = [site.worker(max_requests=30) for _ in range(3)]
        await asyncio.gather(*map(drained, workers))
        assert [answer.text for answer in await site.answers(names)] == [right(text) for text in texts]
        assert sum(worker.done.answered for worker in workers) == len(texts)
        assert sum(site.sizes) == len(texts)


async def test_requests_that_name_no_model_stop_the_worker_and_stay(site):
    await site.put(TEXTS[:3])
    worker = ProviderBatches(site.spool, site.api(), BatchWire(None, where="x"))
    with pytest.raises(ConfigError, match="no model"):
        await drained(worker)
    assert (await site.spool.counts()).waiting == (3, 0, 0)


async def test_progress_is_told(site):
    await site.put(TEXTS[:20])
    seen: list[tuple[int, int]] = []
    await drained(site.worker(progress=lambda done: seen.append((done.jobs, done.answered))))
    assert seen[0] == (1, 0)
    assert seen[-1] == (1, 20)


@pytest.mark.parametrize("wrong", [{"lease": 0}, {"poll_interval": 0}, {"max_requests": 0}, {"max_jobs": 0}])
async def test_a_setting_out_of_range_is_a_config_error(site, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        site.worker(**wrong)


async def test_no_key_is_in_the_spool_or_in_a_file(tmp_path):
    async with opened(tmp_path, batch_seconds=5) as site:
        await site.put(TEXTS[:20])
        await site.worker().submit_some()
        owner = "Bearer sk-canary-key"
        (file,) = site.endpoint.files.of(owner)
        assert b"canary" not in file.content
        assert not any(b"canary" in path.read_bytes() for path in tmp_path.iterdir())
