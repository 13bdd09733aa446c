"""The simulated endpoint's files and batches over real sockets, seen by a plain HTTP client."""

from __future__ import annotations

import asyncio
import io
import json
import signal
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from helpers import TRIES

from microbatch.cli.main import main
from microbatch.errors import ConfigError
from microbatch.testing.batch_api import input_file, routes
from microbatch.testing.endpoint import SimulatedEndpoint
from microbatch.testing.faults import Faults
from microbatch.testing.quota import Quota

pytestmark = pytest.mark.slow


OVER = {"completed", "failed", "expired", "cancelled"}
PATIENCE = 30.0
CHAT = "/v1/chat/completions"


def line(name: str, text: str = "Hi.", **body: Any) -> dict[str, Any]:
    message = {"role": "user", "content": text}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": {"model": "m", "messages": [message], **body}}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


class Caller:
    """A client with one key."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: SimulatedEndpoint, key: str = "k") -> None:
        self.session = session
        self.endpoint = endpoint
        self.headers = {"Authorization": f"Bearer {key}"}

    async def ask(self, method: str, path: str, **sent: Any) -> tuple[int, Any]:
        url = self.endpoint.base_url + path
        async with self.session.request(method, url, headers=self.headers, **sent) as response:
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.read()

    async def get(self, path: str) -> Any:
        status, body = await self.ask("GET", path)
        assert status == 200, body
        return body

    async def refused(self, method: str, path: str, **sent: Any) -> tuple[int, dict[str, Any]]:
        status, body = await self.ask(method, path, **sent)
        assert status >= 400, body
        assert body["error"].keys() == {"message", "type", "param", "code"}
        return status, body["error"]

    @staticmethod
    def form(content: bytes, purpose: str = "batch") -> aiohttp.FormData:
        form = aiohttp.FormData()
        form.add_field("purpose", purpose)
        form.add_field("file", io.BytesIO(content), filename="in.jsonl", content_type="application/jsonl")
        return form

    async def upload(self, content: bytes) -> str:
        status, body = await self.ask("POST", "/files", data=self.form(content))
        assert status == 200, body
        return body["id"]

    async def create(self, file: str, **more: Any) -> dict[str, Any]:
        asked = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **more}
        status, body = await self.ask("POST", "/batches", json=asked)
        assert status == 200, body
        return body

    async def start(self, *lines: Any, **more: Any) -> dict[str, Any]:
        return await self.create(await self.upload(jsonl(*lines)), **more)

    async def until(self, name: str, statuses: set[str]) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE):
            while (batch := await self.get(f"/batches/{name}"))["status"] not in statuses:  # noqa: ASYNC110 - polling is the API
                await asyncio.sleep(0.005)
        return batch

    async def run(self, *lines: Any, **more: Any) -> dict[str, Any]:
        return await self.until((await self.start(*lines, **more))["id"], OVER)

    async def lines(self, file: str | None) -> list[dict[str, Any]]:
        if file is None:
            return []
        content = await self.get(f"/files/{file}/content")
        return [json.loads(each) for each in content.splitlines()]


@pytest_asyncio.fixture
async def session():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session:
        yield session


@pytest_asyncio.fixture
async def endpoint():
    async with SimulatedEndpoint(answer=lambda text, schema: text.upper()) as endpoint:
        yield endpoint


@pytest.fixture
def caller(session, endpoint):
    return Caller(session, endpoint)


# Files


async def test_a_file_is_kept_as_it_was_uploaded(caller):
    content = jsonl(line("1"), line("2", "日本 🧿"))
    file = await caller.upload(content)
    told = await caller.get(f"/files/{file}")
    assert (told["object"], told["filename"], told["purpose"], told["bytes"]) == (
        "file",
        "in.jsonl",
        "batch",
        len(content),
    )
    assert await caller.get(f"/files/{file}/content") == content


async def test_files_are_listed_newest_first_and_by_purpose(caller):
    files = [await caller.upload(jsonl(line("1"))) for _ in range(3)]
    listed = await caller.get("/files?purpose=batch&limit=2")
    assert ([each["id"] for each in listed["data"]], listed["has_more"]) == (files[:0:-1], True)
    rest = await caller.get(f"/files?after={listed['last_id']}")
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (files[:1], False)
    assert (await caller.get("/files?purpose=batch_output"))["data"] == []


async def test_a_deleted_file_is_gone(caller):
    file = await caller.upload(jsonl(line("1")))
    assert await caller.ask("DELETE", f"/files/{file}") == (200, {"id": file, "object": "file", "deleted": True})
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        status, error = await caller.refused(method, f"/files/{file}{path}")
        assert (status, error["message"]) == (404, f"No such File object: {file}")


async def test_an_upload_without_a_file_a_purpose_or_content_is_refused(caller):
    status, error = await caller.refused("POST", "/files", json={"purpose": "batch"})
    assert (status, error["message"]) == (400, "The request must be multipart/form-data.")
    form = aiohttp.FormData({"purpose": "batch", "other": "x"}, default_to_multipart=True)
    assert (await caller.refused("POST", "/files", data=form))[1]["param"] == "file"
    assert (await caller.refused("POST", "/files", data=caller.form(b"x", "fine-tune")))[1]["param"] == "purpose"
    assert (await caller.refused("POST", "/files", data=caller.form(b"")))[1]["message"] == "File is empty."


async def test_a_file_may_be_larger_than_any_call_but_not_too_large(caller, monkeypatch):
    large = b"x" * (70 * 2**20)
    file = await caller.upload(large)
    assert (await caller.get(f"/files/{file}"))["bytes"] == len(large)
    monkeypatch.setattr(routes, "MAX_FILE_BYTES", 1_000)
    status, error = await caller.refused("POST", "/files", data=caller.form(b"x" * 1_001))
    assert status == 413
    assert "1001 bytes" in error["message"]
    await caller.upload(b"x" * 1_000)


# Batches


async def test_every_line_is_answered_once_as_a_live_call_would_be(caller, endpoint):
    texts = {f"r-{number}": f"thing {number}" for number in range(20)}
    batch = await caller.run(*(line(name, text) for name, text in texts.items()), metadata={"job": "x"})
    assert (batch["object"], batch["endpoint"], batch["completion_window"]) == ("batch", CHAT, "24h")
    assert (batch["status"], batch["errors"], batch["error_file_id"], batch["metadata"]) == (
        "completed",
        None,
        None,
        {"job": "x"},
    )
    assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
    lines = await caller.lines(batch["output_file_id"])
    assert {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in lines} == {
        name: text.upper() for name, text in texts.items()
    }
    assert all(each.keys() == {"id", "custom_id", "response", "error"} for each in lines)
    assert all(each["error"] is None and each["response"]["status_code"] == 200 for each in lines)
    assert len({each["id"] for each in lines}) == len({each["response"]["request_id"] for each in lines}) == 20
    _, live = await caller.ask("POST", "/chat/completions", json=line("x", "thing 0")["body"])
    (same,) = (each["response"]["body"] for each in lines if each["custom_id"] == "r-0")
    assert (same["choices"], same["usage"], same["object"]) == (live["choices"], live["usage"], live["object"])
    assert (await caller.get(f"/files/{batch['output_file_id']}"))["purpose"] == "batch_output"


@pytest.mark.parametrize("count", [2, 3, 50])
async def test_the_output_is_in_another_order_than_the_input(caller, count):
    names = [str(number) for number in range(count)]
    batch = await caller.run(*map(line, names))
    found = [each["custom_id"] for each in await caller.lines(batch["output_file_id"])]
    assert found != names
    assert sorted(found, key=int) == names


async def test_lines_are_no_calls_and_use_up_no_quota(session):
    async with SimulatedEndpoint(quota=Quota(rpm=1, tpm=1_000), record=True) as endpoint:
        caller = Caller(session, endpoint)
        batch = await caller.run(*(line(str(number)) for number in range(5)))
        assert batch["request_counts"]["completed"] == 5
        assert (endpoint.calls, endpoint.batch_lines, endpoint.batches_created) == (0, 5, 1)
        assert (endpoint.quota_refusals, endpoint.peak_requests, endpoint.peak_tokens) == (0, 0, 0)
        assert (endpoint.single_calls, endpoint.items) == (5, 5)
        assert endpoint.reported.prompt_tokens == endpoint.prompt_tokens > 0
        assert len(endpoint.requests) == len(endpoint.replies) == 5
        body = line("x")["body"]
        assert (await caller.ask("POST", "/chat/completions", json=body))[0] == 200
        assert (await caller.refused("POST", "/chat/completions", json=body))[0] == 429
        assert (endpoint.calls, endpoint.batch_lines) == (2, 5)


async def test_a_refused_line_is_in_the_error_file_and_harms_no_other(caller):
    batch = await caller.run(line("good"), line("bad", max_tokens=0))
    assert (batch["status"], batch["request_counts"]) == ("completed", {"total": 2, "completed": 1, "failed": 1})
    assert [each["custom_id"] for each in await caller.lines(batch["output_file_id"])] == ["good"]
    (failed,) = await caller.lines(batch["error_file_id"])
    assert (failed["custom_id"], failed["error"], failed["response"]["status_code"]) == ("bad", None, 400)
    assert failed["response"]["body"]["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("kind", "status"),
    [("http_500", 500), ("http_429", 429), ("http_400", 400), ("reset", 500), ("stall", 500), ("hang", 500)],
)
async def test_the_model_s_faults_befall_lines_too(session, kind, status):
    async with SimulatedEndpoint(faults=Faults(kind, rate=1, on="all", limit=2)) as endpoint:
        caller = Caller(session, endpoint)
        batch = await caller.run(*(line(str(number)) for number in range(5)))
        assert batch["request_counts"] == {"total": 5, "completed": 3, "failed": 2}
        failed = await caller.lines(batch["error_file_id"])
        assert [each["response"]["status_code"] for each in failed] == [status, status]
        assert endpoint.faulted == 2


async def test_a_batch_without_one_good_line_has_no_output_file(session):
    async with SimulatedEndpoint(faults=Faults("http_500", rate=1, on="all")) as endpoint:
        batch = await Caller(session, endpoint).run(line("1"))
        assert (batch["status"], batch["output_file_id"]) == ("completed", None)


async def test_a_reply_without_a_finish_reason_is_one_all_the_same(session):
    async with SimulatedEndpoint(faults=Faults("cut", rate=1, on="all")) as endpoint:
        caller = Caller(session, endpoint)
        batch = await caller.run(line("1"))
        (cut,) = await caller.lines(batch["output_file_id"])
        assert cut["response"]["body"]["choices"][0]["finish_reason"] is None


async def test_an_answer_function_that_raises_is_the_endpoint_s_trouble(session):
    def answer(text, schema):
        raise RuntimeError("no")

    async with SimulatedEndpoint(answer=answer) as endpoint:
        caller = Caller(session, endpoint)
        (failed,) = await caller.lines((await caller.run(line("1")))["error_file_id"])
        assert failed["response"]["status_code"] == 500


async def test_a_batch_takes_its_time_and_passes_through_its_states(session):
    states = ["validating", "in_progress", "finalizing", "completed"]
    async with SimulatedEndpoint(batch_seconds=0.5) as endpoint:
        caller = Caller(session, endpoint)
        seen: list[str] = []
        counts: list[int] = []
        for _ in range(TRIES):  # a loaded machine may look too seldom to see every state
            start = asyncio.get_running_loop().time()
            name = (await caller.start(*(line(str(number)) for number in range(10))))["id"]
            seen.clear()
            counts.clear()
            while not seen or seen[-1] not in OVER:
                batch = await caller.get(f"/batches/{name}")
                counts.append(batch["request_counts"]["completed"])
                if batch["status"] not in seen:
                    seen.append(batch["status"])
                await asyncio.sleep(0.005)
            assert seen == [state for state in states if state in seen]
            assert asyncio.get_running_loop().time() - start >= 0.5
            assert counts == sorted(counts)
            if seen == states and len(set(counts)) > 5:
                break
        assert seen == states
        assert len(set(counts)) > 5
        stamps = [batch[f"{state}_at"] for state in ("created", "in_progress", "finalizing", "completed")]
        assert stamps == sorted(stamps)
        assert batch["expires_at"] == batch["created_at"] + 86_400
        assert (batch["failed_at"], batch["expired_at"], batch["cancelled_at"]) == (None, None, None)


@pytest.mark.parametrize(("expires", "left"), [(3, 3), (0.3, 3), (99, 10), (1.0, 10), (1, 1)])
async def test_the_lines_whose_time_runs_out_are_named_in_the_error_file(session, expires, left):
    async with SimulatedEndpoint(batch_expires=expires) as endpoint:
        caller = Caller(session, endpoint)
        batch = await caller.run(*(line(str(number)) for number in range(10)))
        assert batch["status"] == "expired"
        assert batch["request_counts"] == {"total": 10, "completed": 10 - left, "failed": 0}
        done = await caller.lines(batch["output_file_id"])
        expired = await caller.lines(batch["error_file_id"])
        assert {each["error"]["code"] for each in expired} == {"batch_expired"}
        assert {each["response"] for each in expired} == {None}
        assert len(expired) == left
        assert {each["custom_id"] for each in (*done, *expired)} == set(map(str, range(10)))
        endpoint.batch_expires = 0
        assert (await caller.run(line("1")))["status"] == "completed"


async def test_a_cancelled_batch_keeps_what_was_done(session):
    async with SimulatedEndpoint(batch_seconds=60) as endpoint:
        caller = Caller(session, endpoint)
        name = (await caller.start(*(line(str(number)) for number in range(10))))["id"]
        endpoint.batch_seconds = 0.0
        other = await caller.run(line("other"))
        assert (await caller.ask("POST", f"/batches/{name}/cancel"))[1]["status"] == "cancelling"
        batch = await caller.until(name, OVER)
        assert (batch["status"], batch["output_file_id"]) == ("cancelled", None)
        assert batch["cancelled_at"] >= batch["cancelling_at"]
        for over in (name, other["id"]):
            status, error = await caller.refused("POST", f"/batches/{over}/cancel")
            assert status == 409
            assert error["message"].startswith("Cannot cancel a batch with status")
    async with SimulatedEndpoint(batch_seconds=10) as endpoint:
        caller = Caller(session, endpoint)
        name = (await caller.start(*(line(str(number)) for number in range(100))))["id"]
        async with asyncio.timeout(PATIENCE):
            while endpoint.batch_lines < 3:  # noqa: ASYNC110 - what an endpoint does by itself has no event
                await asyncio.sleep(0.01)
        await caller.ask("POST", f"/batches/{name}/cancel")
        batch = await caller.until(name, OVER)
        done = await caller.lines(batch["output_file_id"])
        assert (batch["status"], len(done)) == ("cancelled", batch["request_counts"]["completed"])
        assert 3 <= len(done) == endpoint.batch_lines < 100


# What is refused


@pytest.mark.parametrize(
    ("asked", "status", "param", "code"),
    [
        ({"input_file_id": None}, 400, "input_file_id", "missing_required_parameter"),
        ({"input_file_id": "file-x"}, 404, "id", None),
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint", "invalid_value"),
        ({"completion_window": "1h"}, 400, "completion_window", "invalid_value"),
        ({"metadata": {"a": 1}}, 400, "metadata", "invalid_value"),
        ({"metadata": ["a"]}, 400, "metadata", "invalid_value"),
        ({"metadata": {"a" * 65: "b"}}, 400, "metadata", "invalid_value"),
        ({"metadata": {"a": "b" * 513}}, 400, "metadata", "invalid_value"),
        ({"metadata": {str(number): "b" for number in range(17)}}, 400, "metadata", "invalid_value"),
    ],
)
async def test_a_malformed_batch_is_refused_at_once(caller, endpoint, asked, status, param, code):
    file = await caller.upload(jsonl(line("1")))
    sent = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", **asked}
    found, error = await caller.refused("POST", "/batches", json=sent)
    assert (found, error["param"], error["code"]) == (status, param, code)
    assert endpoint.batches_created == 0


@pytest.mark.parametrize("field", ["input_file_id", "endpoint", "completion_window"])
async def test_every_field_of_a_batch_is_needed(caller, field):
    file = await caller.upload(jsonl(line("1")))
    sent = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    del sent[field]
    status, error = await caller.refused("POST", "/batches", json=sent)
    assert (status, error["param"], error["code"]) == (400, field, "missing_required_parameter")
    assert (await caller.refused("POST", "/batches", data=b"[]"))[0] == 400


async def test_an_output_file_is_no_input(caller):
    batch = await caller.run(line("1"))
    sent = {"input_file_id": batch["output_file_id"], "endpoint": CHAT, "completion_window": "24h"}
    assert (await caller.refused("POST", "/batches", json=sent))[1]["param"] == "input_file_id"


WRONG = [
    ("duplicate_custom_id", "custom_id", 2, jsonl(line("1"), line("1"))),
    ("invalid_json_line", None, 2, jsonl(line("1")) + b'{"custom_id":\n'),
    ("invalid_json_line", None, 1, b"5\n"),
    ("invalid_method", "method", 1, jsonl({**line("1"), "method": "GET"})),
    ("url_mismatch", "url", 1, jsonl({**line("1"), "url": "/v1/embeddings"})),
    ("missing_required_parameter", "custom_id", 1, jsonl({**line("1"), "custom_id": ""})),
    ("missing_required_parameter", "body.model", 1, jsonl({**line("1"), "body": {"messages": []}})),
    ("model_mismatch", "body.model", 2, jsonl(line("1"), line("2", model="other"))),
    ("invalid_request", "body.stream", 1, jsonl(line("1", stream=True))),
    ("empty_file", None, None, b"\n \n"),
]


@pytest.mark.parametrize(("code", "param", "number", "content"), WRONG)
async def test_a_file_with_a_wrong_line_fails_the_batch_before_any_line_is_answered(
    caller, endpoint, code, param, number, content
):
    name = (await caller.create(await caller.upload(content)))["id"]
    batch = await caller.until(name, OVER)
    assert (batch["status"], batch["output_file_id"], batch["error_file_id"]) == ("failed", None, None)
    assert batch["errors"]["object"] == "list"
    (error,) = batch["errors"]["data"]
    assert (error["code"], error["param"], error["line"]) == (code, param, number)
    assert error["message"]
    assert batch["request_counts"]["total"] == endpoint.batch_lines == 0


async def test_too_many_lines_fail_the_batch_and_many_wrong_ones_are_not_all_told(caller, monkeypatch):
    monkeypatch.setattr(input_file, "MAX_LINES", 60)
    assert (await caller.run(*(line(str(number)) for number in range(60))))["status"] == "completed"
    batch = await caller.run(*(line(str(number)) for number in range(61)))
    assert [error["code"] for error in batch["errors"]["data"]] == ["too_many_tasks"]
    assert len((await caller.run(*[line("1")] * 60))["errors"]["data"]) == 50


async def test_an_input_that_is_deleted_before_it_is_read_fails_the_batch(session):
    async with SimulatedEndpoint(batch_seconds=1) as endpoint:
        caller = Caller(session, endpoint)
        batch = await caller.start(line("1"))
        await caller.ask("DELETE", f"/files/{batch['input_file_id']}")
        batch = await caller.until(batch["id"], OVER)
        assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "invalid_input_file")


async def test_what_is_enqueued_at_once_is_limited_by_key(session):
    lines = [line(str(number)) for number in range(10)]
    size = len(jsonl(*lines)) // 4
    async with SimulatedEndpoint(batch_tokens=size * 3 // 2, batch_seconds=0.4) as endpoint:
        one, other = Caller(session, endpoint), Caller(session, endpoint, "other")
        first = await one.start(*lines)
        await one.until(first["id"], {"in_progress"})
        second = await one.run(*lines)
        assert (second["status"], second["errors"]["data"][0]["code"]) == ("failed", "token_limit_exceeded")
        foreign = await other.run(*lines)
        assert foreign["status"] == "completed"
        await one.until(first["id"], {"completed"})
        assert (await one.run(*lines))["status"] == "completed"


# Whose it is


async def test_files_and_batches_belong_to_the_key_that_made_them(session, endpoint):
    mine, foreign = Caller(session, endpoint, "mine"), Caller(session, endpoint, "foreign")
    batch = await mine.run(line("1"))
    for file in (batch["input_file_id"], batch["output_file_id"]):
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert (await foreign.refused(method, f"/files/{file}{path}"))[0] == 404
    for method, path in (("GET", ""), ("POST", "/cancel")):
        assert (await foreign.refused(method, f"/batches/{batch['id']}{path}"))[0] == 404
    sent = {"input_file_id": batch["input_file_id"], "endpoint": CHAT, "completion_window": "24h"}
    assert (await foreign.refused("POST", "/batches", json=sent))[0] == 404
    assert (await foreign.get("/files"))["data"] == (await foreign.get("/batches"))["data"] == []
    assert [each["id"] for each in (await mine.get("/batches"))["data"]] == [batch["id"]]


async def test_a_key_that_is_not_let_in_gets_nothing(session):
    async with SimulatedEndpoint(api_keys={"good"}) as endpoint:
        stranger = Caller(session, endpoint, "bad")
        for method, path in (("GET", "/files"), ("POST", "/files"), ("GET", "/batches"), ("POST", "/batches")):
            assert (await stranger.refused(method, path))[0] == 401
        await Caller(session, endpoint, "good").run(line("1"))


async def test_batches_are_listed_newest_first_page_by_page(caller):
    names = [(await caller.start(line("1"), metadata={"n": str(number)}))["id"] for number in range(5)]
    pages, after = [], ""
    while True:
        page = await caller.get(f"/batches?limit=2{after}")
        pages.append([each["id"] for each in page["data"]])
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    assert pages == [names[4:2:-1], names[2:0:-1], names[:1]]
    everything = await caller.get("/batches")
    assert [each["metadata"]["n"] for each in everything["data"]] == ["4", "3", "2", "1", "0"]
    for query in ("limit=0", "limit=101", "limit=x", "after=batch_x"):
        assert (await caller.refused("GET", f"/batches?{query}"))[0] == 400


# The endpoint's own life


async def test_a_batch_outlives_an_outage_of_the_endpoint(session):
    async with SimulatedEndpoint(batch_seconds=4) as endpoint:
        caller = Caller(session, endpoint)
        batch = await caller.start(*(line(str(number)) for number in range(20)))
        async with asyncio.timeout(PATIENCE):
            while not 3 <= endpoint.batch_lines < 20:  # noqa: ASYNC110 - what an endpoint does by itself has no event
                await asyncio.sleep(0.01)
        await endpoint.aclose()
        stood = endpoint.batch_lines
        await asyncio.sleep(1)  # in which five lines would have had their turn
        assert endpoint.batch_lines == stood
        await endpoint.open()
        batch = await caller.until(batch["id"], OVER)
        assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
        assert endpoint.batch_lines == 20


@pytest.mark.parametrize(
    "options", [{"batch_seconds": -1}, {"batch_expires": -1}, {"batch_expires": 1.5}, {"batch_tokens": 0}]
)
async def test_an_option_out_of_range_is_a_config_error(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SimulatedEndpoint(**options)


# The command


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], (10.0, 0, None)),
        (["--batch-seconds", "0.5", "--batch-expires", "3", "--batch-tokens", "9000"], (0.5, 3, 9_000)),
        (["--batch-expires", "100%"], (10.0, 1.0, None)),
        (["--batch-expires", "2.5%"], (10.0, 0.025, None)),
    ],
)
def test_the_command_makes_batches_go_as_it_is_told(words, options, monkeypatch, capsys):
    opened = []

    async def seen(self, real=SimulatedEndpoint.open):
        await real(self)
        opened.append((self.batch_seconds, self.batch_expires, self.batch_tokens))
        self.batch_lines = 7
        self.files.add("", "in.jsonl", "batch", b"x")
        self.batches.create("", {"input_file_id": "file-00000001", "endpoint": CHAT, "completion_window": "24h"})
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)

    monkeypatch.setattr(SimulatedEndpoint, "open", seen)
    assert main(["simulate", *words]) == 0
    assert opened == [options]
    assert [type(each) for each in opened[0]] == [type(each) for each in options]
    assert "served 0 calls, 7 lines of 1 batch job: " in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["101%", "x%", "-1", "0.5"])
def test_a_number_of_lines_is_whole_and_a_share_a_percentage(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["simulate", f"--batch-expires={wrong}"])
    assert "--batch-expires" in capsys.readouterr().err
