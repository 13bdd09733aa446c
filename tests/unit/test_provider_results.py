"""What a batch that is over has come to: by its files alone, written here by hand."""

from __future__ import annotations

import json
import re
from itertools import chain

import msgspec
import pytest
from helpers import ask

from microbatch.accounting.prices import Price
from microbatch.errors import StorageError
from microbatch.messages import Usage
from microbatch.policy import FlushPolicy
from microbatch.prompt.compose import instruction, item_line
from microbatch.schema.answer_type import answer_type
from microbatch.spool.endpoint import Cause
from microbatch.spool.payload import Answer, Payload
from microbatch.spool.provider.api import RemoteBatch
from microbatch.spool.provider.input_file import Composer, Content, read
from microbatch.spool.provider.output_file import Results
from microbatch.spool.records import Delivery, Name
from microbatch.transports.chat_wire import BatchWire

PRICE = Price(1.0, 4.0)


def delivery(text, number=0, *, deliveries=1, tenant=None, **asked):
    payload = Payload.of(text if isinstance(text, list) else ask(text), model="m", **asked)
    return Delivery(payload.item(Name(tenant, str(number))), deliveries, "lease", 0.0)


class Job:
    """A job of *texts*, and what its provider says."""

    def __init__(self, draft, content, deliveries):
        self.lines = draft.lines
        self.content = content
        self.deliveries = deliveries

    @classmethod
    async def of(cls, texts, *, deliveries=1, policy=None, canary=False, **asked):
        taken = [delivery(text, number, deliveries=deliveries, **asked) for number, text in enumerate(texts)]
        composer = Composer(BatchWire(None, where="x"), policy or FlushPolicy(), canary=canary)
        (draft,), rejected = await composer.drafts(taken)
        assert not rejected
        return cls(draft, await draft.content(0.0), taken)

    async def results(self, *files, status="completed", errors=None, tied=None):
        told = {"id": "b", "status": status, "errors": None if errors is None else {"data": errors}}
        batch = msgspec.convert(told, RemoteBatch)
        waiting = self.deliveries if tied is None else tied
        tied = {each.item.name.key: each for each in waiting}
        results = Results(batch, self.content, tied, BatchWire(None, where="x"), lambda *_: PRICE)
        await results.read(files)
        return results


def row(custom_id, body=None, *, status=200, error=None):
    response = None if body is None else {"status_code": status, "request_id": "req", "body": body}
    return json.dumps({"id": "x", "custom_id": custom_id, "response": response, "error": error}).encode() + b"\n"


def completion(text, finish_reason="stop", **fields):
    message = {"role": "assistant", "content": text}
    return {
        "model": "m-1",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 101, "completion_tokens": 11},
        **fields,
    }


def combined(line, answers):
    return json.dumps(
        {"results": [{"id": name, "answer": answer} for name, answer in zip(line.ids, answers, strict=False)]}
    )


def texts_of(results):
    return {each.item.name.id: Answer.decode(raw).text for each, raw in results.answers}


def counts(why):
    """Whether the request may be the cause."""
    return why.cause is not Cause.ENDPOINT


def open_of(results):
    return {each.item.name.id: why for why, left in results.open.items() for each in left}


async def test_answers_go_to_whom_the_recorded_ids_name_whatever_the_order_of_the_rows():
    job = await Job.of([f"text {number}" for number in range(6)], policy=FlushPolicy(max_batch_size=3))
    first, second = job.lines
    rows = [
        row(second.custom_id, completion(combined(second, ["d", "e", "f"]))),
        row(first.custom_id, completion(combined(first, ["a", "b", "c"]))),
    ]
    results = await job.results(b"".join(rows))
    assert texts_of(results) == dict(zip("012345", "abcdef", strict=True))
    assert not results.open
    assert results.trouble is None


async def test_shares_add_up_to_the_usage_and_cost_half():
    job = await Job.of(["one", "two, which is longer", "three"])
    (line,) = job.lines
    results = await job.results(row(line.custom_id, completion(combined(line, ["a", "bb", "ccc"]))))
    answers = [Answer.decode(raw) for _, raw in results.answers]
    assert sum((each.usage for each in answers), Usage()) == results.usage == Usage(101, 11)
    assert sum(each.cost_usd for each in answers) == pytest.approx(results.cost_usd)
    assert results.cost_usd == pytest.approx(PRICE.cost(Usage(101, 11)) / 2)
    assert answers[1].usage.prompt_tokens > answers[0].usage.prompt_tokens
    assert answers[2].usage.completion_tokens > answers[0].usage.completion_tokens


async def test_a_reply_without_usage_leaves_an_estimate_that_is_marked():
    for texts in (["one", "two"], ["one"]):
        job = await Job.of(texts)
        (line,) = job.lines
        said = combined(line, ["a", "b"]) if line.ids else "a"
        results = await job.results(row(line.custom_id, completion(said, usage=None)))
        answers = [Answer.decode(raw) for _, raw in results.answers]
        assert len(answers) == len(texts)
        assert all(each.usage.estimated for each in answers)


async def test_a_request_that_no_longer_waits_is_passed_over_and_harms_no_other():
    job = await Job.of(["one", "two", "three"])
    (line,) = job.lines
    out = row(line.custom_id, completion(combined(line, ["a", "b", "c"])))
    results = await job.results(out, tied=[job.deliveries[1]])
    assert texts_of(results) == {"1": "b"}
    assert not results.open
    assert results.usage == Usage(101, 11)
    nobody = await job.results(out, tied=[])
    assert (nobody.answers, nobody.open, nobody.usage) == ([], {}, Usage())


@pytest.mark.parametrize(
    ("said", "answered", "words"),
    [
        (lambda ids: [(ids[0], "a"), (ids[2], "c")], "02", "MissingAnswer"),
        (lambda ids: [(ids[0], "a"), (ids[1], 5), (ids[2], "c")], "02", "MalformedAnswer.*does not fit"),
        (lambda ids: [(ids[0], "a"), (ids[1], "x"), (ids[1], "b"), (ids[2], "c")], "02", "MalformedAnswer.*several"),
        (lambda ids: [(ids[0], "a"), ("2bcdfg", "x"), (ids[2], "c")], "02", "MissingAnswer"),
        (lambda ids: [(ids[0], "a"), ("2", "x"), (ids[2], "c")], "02", "MissingAnswer"),
    ],
)
async def test_damage_costs_only_what_is_damaged(said, answered, words):
    job = await Job.of(["one", "two", "three"])
    (line,) = job.lines
    body = completion(json.dumps({"results": [{"id": name, "answer": answer} for name, answer in said(line.ids)]}))
    results = await job.results(row(line.custom_id, body))
    assert "".join(texts_of(results)) == answered
    ((name, why),) = open_of(results).items()
    assert name == "1"
    assert counts(why)
    assert re.match(words, why.error)
    assert results.trouble is None


async def test_a_reply_at_the_token_limit_keeps_what_is_complete():
    job = await Job.of(["one", "two", "three"])
    (line,) = job.lines
    text = combined(line, ["a", "b", "c"])
    results = await job.results(row(line.custom_id, completion(text[: text.index('"c"')], "length")))
    assert texts_of(results) == {"0": "a", "1": "b"}
    # What is begun is there, and broken; what is not begun is missing.
    assert open_of(results)["2"].error.startswith("MalformedAnswer")
    results = await job.results(row(line.custom_id, completion(text[: text.index(line.ids[1])], "length")))
    assert open_of(results)["2"].error.startswith("TruncatedReply")


async def test_nothing_of_a_reply_that_was_cut_off_is_trusted_since_second_copies_may_have_been_on_their_way():
    job = await Job.of(["one", "two"])
    (line,) = job.lines
    results = await job.results(row(line.custom_id, completion(combined(line, ["a", "b"]), None)))
    assert not results.answers
    assert [why.error for why in results.open] == [
        "TransportError: the reply was cut off: it ended without a finish_reason"
    ]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (completion("", "content_filter"), "Filtered"),
        (completion(None, None), "TransportError"),
        (completion(" \n "), "MissingAnswer"),
        ({"choices": []}, "ServerError"),
        ({"error": {"message": "no", "code": 500}}, "ServerError"),
    ],
)
async def test_a_reply_without_answers_leaves_all_open_and_counted(body, words):
    job = await Job.of(["one", "two"])
    (line,) = job.lines
    found = open_of(await job.results(row(line.custom_id, body)))
    assert set(found) == {"0", "1"}
    assert all(counts(why) and why.error.startswith(words) for why in found.values()), found


@pytest.mark.parametrize(
    ("status", "error", "counted"),
    [
        (400, {}, True),
        (500, {}, True),
        (413, {}, True),
        (429, {}, False),
        (401, {}, False),
        (404, {}, False),
        (503, {}, False),
        (429, {"code": "insufficient_quota"}, False),
    ],
)
async def test_a_refused_line_counts_if_it_may_be_to_blame(status, error, counted):
    job = await Job.of(["one", "two"])
    (line,) = job.lines
    results = await job.results(b"", row(line.custom_id, {"error": {"message": "secret", **error}}, status=status))
    assert {counts(why) for why in open_of(results).values()} == {counted}
    assert (results.trouble is None) == counted
    assert all("secret" not in why.error for why in results.open)


@pytest.mark.parametrize("status", [500, 504, 524, 408])
@pytest.mark.parametrize("answered", [0, 1])
async def test_lines_that_all_fail_in_a_way_that_may_be_the_endpoints_are_not_to_blame(status, answered):
    job = await Job.of([f"text {number}" for number in range(8)], policy=FlushPolicy(max_batch_size=2))
    rows = [row(line.custom_id, {"error": {}}, status=status) for line in job.lines[answered:]]
    rows += [row(line.custom_id, completion(combined(line, ["a", "b"]))) for line in job.lines[:answered]]
    results = await job.results(*rows)
    assert len(open_of(results)) == 8 - 2 * answered
    assert {results.blames(why) for why in open_of(results).values()} == {bool(answered)}
    assert (results.trouble is None) == bool(answered)


@pytest.mark.parametrize(
    ("status", "error", "counted"),
    [
        ("completed", None, True),
        ("completed", {"code": "odd", "message": "x"}, True),
        ("expired", {"code": "batch_expired", "message": "x"}, False),
        ("expired", None, False),
        ("cancelled", None, False),
    ],
)
async def test_a_line_without_a_reply_counts_unless_the_batch_was_stopped(status, error, counted):
    job = await Job.of(["one", "two"])
    (line,) = job.lines
    files = [b"" if error is None else row(line.custom_id, error=error)]
    found = open_of(await job.results(*files, status=status))
    assert {counts(why) for why in found.values()} == {counted}
    assert all(status in why.error for why in found.values())


@pytest.mark.parametrize(
    ("errors", "blamed"),
    [
        ([{"code": "token_limit_exceeded"}], ""),
        ([], ""),
        (None, ""),
        ([{"code": "invalid_json_line", "line": 2}], "23"),
        ([{"code": "odd", "line": 1}, {"code": "odd", "line": 2}], "0123"),
        ([{"code": "model_not_found", "line": 1, "param": "body.model"}], ""),
        ([{"code": "odd", "line": 0}, {"code": "odd", "line": 99}], ""),
    ],
)
async def test_of_a_refused_batch_those_lines_are_to_blame_that_are_named(errors, blamed):
    job = await Job.of(["a", "b", "c", "d"], policy=FlushPolicy(max_batch_size=2))
    found = open_of(await job.results(status="failed", errors=errors))
    assert "".join(name for name, why in found.items() if counts(why)) == blamed
    assert len(found) == 4


async def test_rows_that_cannot_be_read_or_are_nobody_s_are_passed_over():
    job = await Job.of(["one", "two"])
    (line,) = job.lines
    good = row(line.custom_id, completion(combined(line, ["a", "b"])))
    again = row(line.custom_id, completion(combined(line, ["x", "y"])))
    junk = b'{"custom_id": 5}\n\xff\n{"custom_id"\n\n' + row("another-1", completion("x"))
    results = await job.results(junk + good + again)
    assert texts_of(results) == {"0": "a", "1": "b"}


async def test_single_calls_are_read_as_live_ones():
    typed = await Job.of(["one"], deliveries=3, output_type=int)
    (line,) = typed.lines
    assert (line.ids, line.sizes) == ([], [])
    results = await typed.results(row(line.custom_id, completion('Sure: ```json\n{"answer": 7}\n```')))
    (answer,) = [Answer.decode(raw) for _, raw in results.answers]
    assert (answer.text, answer.route, answer.batch_size, answer.usage) == ("7", "single", 1, Usage(101, 11))
    assert answer.body["choices"]
    for body, words in (
        (completion("no"), "MalformedAnswer"),
        (completion('{"answer"', "length"), "TruncatedReply"),
        (completion('{"answer":7}', "content_filter"), "Filtered"),
    ):
        ((why, _),) = (await typed.results(row(line.custom_id, body))).open.items()
        assert counts(why)
        assert why.error.startswith(words)


async def test_a_blank_answer_is_none_except_where_the_body_is_what_matters():
    blank = await Job.of(["one"], deliveries=3)
    (line,) = blank.lines
    assert not (await blank.results(row(line.custom_id, completion("")))).answers
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tools = await Job.of(["one"], params={"tools": [tool]})
    (line,) = tools.lines
    ((_, raw),) = (await tools.results(row(line.custom_id, completion("", "tool_calls")))).answers
    assert Answer.decode(raw).body["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_tool_that_must_be_called_shares_a_line_and_each_answer_is_a_call_of_it():
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    forced = {"tools": [tool], "tool_choice": "required"}
    for texts, said in ((["one", "two"], None), (["one"], '{"n":0}')):
        job = await Job.of(texts, params=forced)
        (line,) = job.lines
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": said}}
        body = completion(combined(line, [{"n": 0}, {"n": 1}]) if said is None else None)
        if said is not None:
            body["choices"][0]["message"]["tool_calls"] = [call]
        answers = [Answer.decode(raw) for _, raw in (await job.results(row(line.custom_id, body))).answers]
        assert [json.loads(answer.value) for answer in answers] == [{"n": 0}, {"n": 1}][: len(texts)]
        for answer in answers:
            (found,) = answer.body["choices"][0]["message"]["tool_calls"]
            assert found["function"] == {"name": "f", "arguments": answer.text}


async def test_a_wrong_canary_distrusts_the_whole_reply_and_a_right_one_is_nobody_s_answer():
    job = await Job.of(["one", "two"], canary=True)
    (line,) = job.lines
    assert len(line.ids) == 3
    results = await job.results(row(line.custom_id, completion(combined(line, ["a", "b", line.canary]))))
    assert texts_of(results) == {"0": "a", "1": "b"}
    assert sum((Answer.decode(raw).usage for _, raw in results.answers), Usage()) == Usage(101, 11)
    for answers in (["a", "b", "wrong"], ["a", "b"], [line.canary] * 2):
        results = await job.results(row(line.custom_id, completion(combined(line, answers))))
        assert not results.answers
        assert {why.error for why in results.open} == {
            "MalformedAnswer: the combined reply got its canary wrong, so none of its answers is trusted"
        }


@pytest.mark.parametrize(("canary", "limit", "lines"), [(False, 4 * 28, 1), (True, 4 * 28 + 20, 2)])
async def test_a_canary_has_its_part_of_the_budgets(canary, limit, lines):
    texts = ["one", "two", "three", "four"]
    job = await Job.of(texts, canary=canary, max_tokens=10)
    (sent,) = map(json.loads, (await job.content.file()).splitlines())
    assert sent["body"]["max_tokens"] == limit
    schema = sent["body"].get("response_format", {}).get("json_schema", {}).get("schema")
    assert schema == answer_type(str).batch_schema == answer_type(str).watched_schema
    # Just enough for the four: what the canary takes is missing.
    enough = len(instruction(answer_type(str).words)) + sum(len(item_line(text)) + 2 + 8 for text in texts)
    tight = await Job.of(texts, canary=canary, policy=FlushPolicy(max_batch_tokens=enough))
    assert len(tight.lines) == lines


async def test_a_typed_canary_has_room_in_the_schema():
    job = await Job.of(["one", "two"], canary=True, output_type=int)
    (sent,) = map(json.loads, (await job.content.file()).splitlines())
    assert sent["body"]["response_format"]["json_schema"]["schema"] == answer_type(int).watched_schema


# What is recorded


async def test_what_is_recorded_of_a_job_comes_back_and_its_file_with_it():
    job = await Job.of(["one", "two 日本 🧿"])
    again = Content.decode(job.content.encode())
    assert again == job.content
    (sent,) = [json.loads(each) for each in (await again.file()).splitlines()]
    assert (sent["custom_id"], sent["method"], sent["url"]) == (job.lines[0].custom_id, "POST", "/v1/chat/completions")
    assert all(name in sent["body"]["messages"][-1]["content"] for name in job.lines[0].ids)
    assert "one" not in repr(again)


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x93"])
async def test_a_damaged_record_is_a_storage_error(raw):
    with pytest.raises(StorageError, match="damaged"):
        Content.decode(raw)


@pytest.mark.parametrize(
    ("model", "max_tokens", "sent"),
    [
        ("gpt-4o-mini", None, 3 * 4 * (16 + 256)),
        ("gpt-4-turbo", None, 3 * 4 * (16 + 256)),
        ("gpt-5-mini", None, 3 * 4 * (16 + 256) + 16_000),
        ("gpt-4o-mini", 10, 4 * 28),
        ("somebody's own", None, None),  # a refusal would cost a day
    ],
)
async def test_a_combined_line_is_bounded_where_the_model_s_own_limit_is_known(model, max_tokens, sent):
    payloads = [Payload.of(ask(f"text {number}"), model=model, max_tokens=max_tokens) for number in range(4)]
    taken = [Delivery(each.item(Name(None, str(number))), 1, "lease", 0.0) for number, each in enumerate(payloads)]
    (draft,), _ = await Composer(BatchWire(None, where="x"), FlushPolicy()).drafts(taken)
    (line,) = map(json.loads, (await (await draft.content(0.0)).file()).splitlines())
    assert line["body"].get("max_tokens") == sent


async def test_a_line_s_name_is_no_other_job_s():
    one, other = await Job.of(["one"]), await Job.of(["one"])
    assert {line.custom_id for line in one.lines}.isdisjoint(line.custom_id for line in other.lines)


async def test_files_keep_to_the_provider_s_limits(monkeypatch):
    monkeypatch.setattr("microbatch.spool.provider.input_file.MAX_LINES", 3)
    taken = [delivery(f"text {number}", number, deliveries=3) for number in range(10)]
    drafts, _ = await Composer(BatchWire(None, where="x"), FlushPolicy()).drafts(taken)
    assert [len(draft.lines) for draft in drafts] == [3, 3, 3, 1]
    assert list(chain.from_iterable(draft.deliveries for draft in drafts)) == taken
    monkeypatch.setattr("microbatch.spool.provider.input_file.MAX_FILE_BYTES", 1_200)
    taken.append(delivery("x" * 2_000, 10, deliveries=3))
    drafts, rejected = await Composer(BatchWire(None, where="x"), FlushPolicy()).drafts(taken)
    assert [one for one, _ in rejected] == taken[10:]
    for draft in drafts:
        assert len(await (await draft.content(0.0)).file()) <= 1_200


async def test_a_text_too_long_to_share_a_prompt_goes_alone():
    taken = [delivery("x" * 20_000, 0), delivery("short", 1), delivery("short too", 2)]
    (draft,), _ = await Composer(BatchWire(None, where="x"), FlushPolicy(max_batch_tokens=50_000)).drafts(taken)
    assert sorted(len(line.names) for line in draft.lines) == [1, 2]


@pytest.mark.parametrize(("most", "lines"), [(None, 1), (1_000, 2), (1_000_000, 1), (1, 16)])
async def test_the_whole_prompt_has_a_budget_too(most, lines):
    taken = [delivery("t" * 50, number) for number in range(16)]
    policy = FlushPolicy(max_batch_tokens=50_000, max_prompt_tokens=most)
    (draft,), _ = await Composer(BatchWire(None, where="x"), policy).drafts(taken)
    assert len(draft.lines) == lines
    file = await (await draft.content(0.0)).file()
    for sent in map(json.loads, file.splitlines()):
        prompt = "".join(message["content"] for message in sent["body"]["messages"])
        assert lines in (1, 16) or len(prompt) <= 1_000 + 16 * 8


def test_a_request_that_cannot_be_combined_has_no_line():
    assert read(delivery("one")).line == b'"one"'
    assert read(delivery("one", params={"n": 2})).line == b""
    text, image = {"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "data:,"}}
    assert read(delivery([{"role": "user", "content": [text]}])).line == b'"one"'
    assert read(delivery([{"role": "user", "content": [text, image]}])).line == b""


@pytest.mark.parametrize("thought", ["<think>Perhaps {}?</think>\n", "Perhaps {}?\n</think>\n\n"])
async def test_drafts_in_a_thought_are_no_answers(thought):
    job = await Job.of(["one", "two"])
    (line,) = job.lines
    said = thought.format(combined(line, ["draft", "draft"])) + combined(line, ["a", "b"])
    results = await job.results(row(line.custom_id, completion(said)))
    assert [Answer.decode(raw).text for _, raw in results.answers] == ["a", "b"]
    cut = await job.results(
        row(line.custom_id, completion(thought.format(combined(line, ["draft", "draft"])), "length"))
    )
    assert (cut.answers, set(open_of(cut))) == ([], {"0", "1"})


async def test_a_lone_text_loses_its_thought():
    job = await Job.of(["one"])
    (line,) = job.lines
    results = await job.results(row(line.custom_id, completion("<think>hm</think>\n\nYes.")))
    (answer,) = [Answer.decode(raw) for _, raw in results.answers]
    assert answer.text == "Yes."
    assert answer.body["choices"][0]["message"]["content"] == "<think>hm</think>\n\nYes."


async def test_reasoning_tokens_are_divided_like_the_others():
    job = await Job.of(["one", "two"])
    (line,) = job.lines
    usage = {"prompt_tokens": 101, "completion_tokens": 90, "completion_tokens_details": {"reasoning_tokens": 81}}
    results = await job.results(row(line.custom_id, completion(combined(line, ["a", "b"]), usage=usage)))
    shares = [Answer.decode(raw).usage for _, raw in results.answers]
    assert sum(shares, Usage()) == results.usage == Usage(101, 90, reasoning_tokens=81)
