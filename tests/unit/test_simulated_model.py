"""The simulated model without sockets: what it reads, what it answers, how its replies go wrong."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import json
import uuid
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args

import msgspec
import pytest
from helpers import each
from hypothesis import given
from hypothesis import strategies as st

from microbatch.accounting.tokens import load_encoding
from microbatch.errors import (
    BadRequest,
    ConfigError,
    ConnectFailed,
    ContextTooLong,
    Filtered,
    RateLimited,
    ServerError,
    TransportTimeout,
)
from microbatch.messages import Usage
from microbatch.prompt.compose import compose, instruction, item_line
from microbatch.prompt.ids import IdKey
from microbatch.protocols import ChatCall, Transport
from microbatch.schema.answer_type import answer_type
from microbatch.testing.answers import json_type, simulated_answer, unwrap
from microbatch.testing.counting import Pieces, prompt_tokens, split
from microbatch.testing.faults import Fault, Faults, Kind
from microbatch.testing.model import SimulatedModel
from microbatch.testing.pace import Latency, paced
from microbatch.testing.reading import EndpointError
from microbatch.testing.transport import SimulatedTransport

TEXTS = [f"Product: thing number {number}\nIt is green, and somewhat useful." for number in range(8)]
LETTERS = "bcdfghjkmnpqrstvwxz"
IDS = [f"{number}{''.join(LETTERS[(number * 7 + place) % 19] for place in range(5))}" for number in range(1, 9)]
COLOUR = {"enum": ["red", "green", "blue"], "type": "string"}
PAIR = {
    "type": "object",
    "properties": {"colour": COLOUR, "why": {"type": "string"}},
    "required": ["colour", "why"],
    "additionalProperties": False,
}


def combined(schema: dict | None = None, texts: list[str] = TEXTS, **fields: Any) -> dict[str, Any]:
    """Write a combined prompt by hand, from the wire format's description."""
    words = f" Each answer matches this JSON Schema: {json.dumps(schema)}" if schema is not None else ""
    lines = "".join(f"[{name}] {json.dumps(text)}\n" for name, text in zip(IDS, texts, strict=False))
    prompt = 'Answer each. Reply {"results":[{"id":"...","answer":...}]}.' + words + "\n" + lines
    return {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}],
        **fields,
    }


def single(text: str = TEXTS[0], schema: dict | None = None, **fields: Any) -> dict[str, Any]:
    body = {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
        **fields,
    }
    if schema is not None:
        body["response_format"] = json_schema(schema)
    return body


def json_schema(schema: dict) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}


def whole(answer: dict) -> dict[str, Any]:
    element = {"type": "object", "properties": {"id": {"type": "string"}, "answer": answer}}
    return {"type": "object", "properties": {"results": {"type": "array", "items": element}}}


def wrapped(schema: dict) -> dict[str, Any]:
    return {"type": "object", "properties": {"answer": schema}, "required": ["answer"], "additionalProperties": False}


def say(model: SimulatedModel, body: dict) -> str:
    model.admit(body)
    return model.reply(model.read(body)).pieces.text


def results(text: str) -> list[tuple[str, Any]]:
    return [(element["id"], element["answer"]) for element in json.loads(text)["results"]]


# Reading


def test_a_combined_prompt_is_answered_item_by_item_under_its_ids_in_order():
    model = SimulatedModel(answer=lambda text, schema: text.upper())
    assert results(say(model, combined())) == list(zip(IDS, map(str.upper, TEXTS), strict=True))
    assert (model.calls, model.combined_calls, model.single_calls, model.items) == (1, 1, 0, 8)


def test_any_other_prompt_is_a_single_call():
    model = SimulatedModel(answer=lambda text, schema: text.upper())
    assert say(model, single()) == TEXTS[0].upper()
    assert (model.combined_calls, model.single_calls, model.items) == (0, 1, 1)


def test_the_shape_without_items_and_items_without_the_shape_are_single_calls():
    model = SimulatedModel()
    say(model, single('Explain {"results":[{"id":"...","answer":...}]} to me.'))
    say(model, single('[1bcdfg] "an item"\n'))
    assert (model.combined_calls, model.single_calls) == (0, 2)


def test_lines_that_look_like_items_above_the_last_ones_are_examples():
    body = combined(texts=TEXTS[:2])
    message = body["messages"][-1]
    message["content"] = 'As in\n[9zzzzz] "an example"\nso.\n' + message["content"]
    assert [name for name, _ in results(say(SimulatedModel(), body))] == IDS[:2]


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_any_text_reaches_the_answer_unchanged(texts: list[str]):
    model = SimulatedModel(answer=lambda text, schema: text)
    assert [answer for _, answer in results(say(model, combined(texts=texts)))] == texts


@pytest.mark.parametrize("kind", [str, Literal["red", "green"], dict[str, int], list[str]])
def test_what_the_library_composes_is_understood_and_its_schemas_pass_as_strict(kind):
    model = SimulatedModel()
    answers = answer_type(kind)
    prompt, ids = compose(instruction(answers.words), [item_line(text) for text in TEXTS], IdKey().draws(b"batch"))
    form = {"name": "reply", "schema": answers.batch_schema, "strict": kind != dict[str, int]}
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": prompt}],
        "response_format": {"type": "json_schema", "json_schema": form},
    }
    found = results(say(model, body))
    assert [name for name, _ in found] == ids
    for _, answer in found:
        answers.decode(json.dumps(answer))


def test_a_schema_in_words_and_one_in_response_format_ask_for_the_same():
    model = SimulatedModel()
    in_words = say(model, combined(PAIR))
    assert in_words == say(model, combined(PAIR, response_format=json_schema(whole(PAIR))))
    assert in_words == say(model, combined(response_format=json_schema(whole(PAIR))))
    assert all(list(answer) == ["colour", "why"] for _, answer in results(in_words))


@pytest.mark.parametrize("schema", [None, COLOUR, PAIR, wrapped(COLOUR), {}], ids=repr)
def test_an_item_gets_the_same_answer_in_a_batch_and_alone(schema):
    model = SimulatedModel()
    batched = [answer for _, answer in results(say(model, combined(schema)))]
    asked = schema if schema in (None, PAIR, wrapped(COLOUR)) else wrapped(schema)
    for text, answer in zip(TEXTS, batched, strict=True):
        alone = say(model, single(text, asked))
        if asked is not None:
            alone = json.loads(alone)
        assert (alone["answer"] if asked is not schema else alone) == answer


def test_an_answer_function_sees_the_same_text_and_schema_in_a_batch_and_alone():
    seen: list[tuple[str, dict | None]] = []
    model = SimulatedModel(answer=lambda text, schema: seen.append((text, schema)) or "red")
    say(model, combined(COLOUR, TEXTS[:1]))
    say(model, single(TEXTS[0], wrapped(COLOUR)))
    hint = {
        "role": "system",
        "content": f"Reply with JSON only, matching this JSON Schema: {json.dumps(wrapped(COLOUR))}",
    }
    lower = single()
    lower["messages"].insert(-1, hint)
    assert say(model, lower) == '{"answer":"red"}'
    assert seen == [(TEXTS[0], COLOUR)] * 3


def test_definitions_outside_the_wrapper_are_handed_on():
    schema = {**wrapped({"$ref": "#/$defs/Colour"}), "$defs": {"Colour": COLOUR}}
    assert unwrap(schema) == {"$ref": "#/$defs/Colour", "$defs": {"Colour": COLOUR}}
    assert json.loads(say(SimulatedModel(), single(schema=schema)))["answer"] in COLOUR["enum"]


def test_a_schema_in_the_callers_own_words_gives_the_same_text_in_a_batch_and_alone():
    system = {"role": "system", "content": f"Use this JSON Schema: {json.dumps(PAIR)}"}
    batch, alone = combined(), single()
    batch["messages"][0] = alone["messages"][0] = system
    model = SimulatedModel()
    assert results(say(model, batch))[0][1] == say(model, alone)
    assert isinstance(results(say(model, batch))[0][1], str)


def test_json_object_without_a_schema_still_gives_an_object():
    text = say(SimulatedModel(), single("Answer in JSON.", response_format={"type": "json_object"}))
    assert list(json.loads(text)) == ["answer"]
    model = SimulatedModel(answer=lambda text, schema: {"said": text})
    assert json.loads(say(model, single("JSON?", response_format={"type": "json_object"}))) == {"said": "JSON?"}


TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}


@pytest.mark.parametrize(
    ("choice", "reason"),
    [({"type": "function", "function": {"name": "look"}}, "stop"), ("required", "tool_calls"), ("any", "tool_calls")],
)
def test_a_tool_that_must_be_called_is_called_with_arguments_of_its_schema(choice, reason):
    model = SimulatedModel()
    reply = model.reply(model.read({**single("How many?"), "tools": [TOOL], "tool_choice": choice}))
    assert (reply.tool, reply.finish_reason) == ("look", reason)
    assert isinstance(json.loads(reply.pieces.text)["n"], int)


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_a_tool_that_may_be_called_is_not(choice):
    model = SimulatedModel()
    reply = model.reply(model.read({**single("How many?"), "tools": [TOOL], "tool_choice": choice}))
    assert (reply.tool, reply.finish_reason) == (None, "stop")


def test_a_tool_that_is_not_there_is_refused():
    choice = {"type": "function", "function": {"name": "other"}}
    with pytest.raises(EndpointError, match="not found"):
        SimulatedModel().read({**single("How many?"), "tools": [TOOL], "tool_choice": choice})


def test_a_text_in_parts_is_read_as_one():
    model = SimulatedModel(answer=lambda text, schema: text)
    parts = [
        {"type": "text", "text": "one "},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": "two"},
    ]
    assert say(model, single(parts)) == "one two"
    assert say(model, single(None)) == ""


def test_answers_may_be_structs_and_dates():
    class Found(msgspec.Struct):
        day: dt.date

    model = SimulatedModel(answer=lambda text, schema: Found(dt.date(2024, 5, 17)))
    assert results(say(model, combined({}, TEXTS[:1]))) == [(IDS[0], {"day": "2024-05-17"})]


def test_a_reply_schema_of_strings_asks_for_free_text():
    seen = []
    model = SimulatedModel(answer=lambda text, schema: seen.append(schema) or "yes")
    for schema in (whole({"type": "string"}), wrapped(COLOUR)):
        say(model, combined(texts=TEXTS[:1], response_format=json_schema(schema)))
    assert seen == [None, None]


@pytest.mark.parametrize(
    "line",
    [
        '[1bcdfg] "no end',
        "[1bcdfg] 7",
        '[1bcdfa] "a vowel"',
        '[bcdfg] "no number"',
        '1bcdfg "no brackets"',
        '[1bcdfg] "\\q"',
    ],
)
def test_a_line_that_is_no_item_is_not_read_as_one(line: str):
    model = SimulatedModel()
    say(model, single(f'Reply {{"results":[{{"id":"...","answer":...}}]}}\n{line}\n'))
    assert model.single_calls == 1


def test_words_that_spell_no_schema_ask_for_free_text():
    seen = []
    model = SimulatedModel(answer=lambda text, schema: seen.append(schema) or "yes")
    for words in (
        "JSON Schema: see below",
        'JSON Schema: "red"',
        f"JSON Schema: no\nJSON Schema: {json.dumps(COLOUR)}",
    ):
        body = single()
        body["messages"].insert(-1, {"role": "developer", "content": words})
        say(model, body)
    assert seen == [None, None, COLOUR]


# Answers


class Shade(enum.Enum):
    LIGHT = "light"
    DARK = "dark"


class Node(msgspec.Struct):
    name: str
    children: list[Node]
    twin: Node | None


class Cat(msgspec.Struct, tag=True):
    lives: Annotated[int, msgspec.Meta(ge=1, le=9)]


class Dog(msgspec.Struct, tag=True):
    good: bool


TYPES = [
    str,
    int,
    float,
    bool,
    None,
    Shade,
    Literal["a", "b", 3],
    Annotated[int, msgspec.Meta(gt=3, lt=5)],
    Annotated[int, msgspec.Meta(lt=-400)],
    Annotated[int, msgspec.Meta(ge=10, le=40, multiple_of=15)],
    Annotated[float, msgspec.Meta(gt=0, lt=1)],
    Annotated[float, msgspec.Meta(ge=0.001, le=0.002)],
    Annotated[str, msgspec.Meta(max_length=5)],
    Annotated[str, msgspec.Meta(min_length=900)],
    Annotated[list[int], msgspec.Meta(min_length=5, max_length=6)],
    Annotated[float, msgspec.Meta(gt=1, lt=1.001)],
    list,
    list[str],
    tuple[int, str],
    tuple[bool, ...],
    dict[str, int],
    int | str | None,
    Cat | Dog,
    Node,
    Any,
    dt.date,
    Annotated[dt.datetime, msgspec.Meta(tz=True)],
    bytes,
    uuid.UUID,
    Decimal,
]


@each("kind", TYPES)
def test_an_answer_conforms_to_its_schema(kind):
    schema = msgspec.json.schema(kind)
    for text in [*TEXTS, "", "日本語"]:
        msgspec.convert(simulated_answer(text, schema), kind)


def test_an_answer_depends_on_the_text_and_on_nothing_else():
    assert simulated_answer("red shoes", None) == simulated_answer("red shoes", None)
    assert len({simulated_answer(f"item {number}", None) for number in range(50)}) == 50
    assert {simulated_answer(f"item {number}", COLOUR) for number in range(50)} == set(COLOUR["enum"])
    # Known once and for all: a run tomorrow, in another process, gives the same.
    assert simulated_answer("red shoes", COLOUR) == "blue"


def test_free_text_is_made_of_the_texts_words_in_ten_to_sixty_words():
    lengths = set()
    for text in TEXTS:
        words = simulated_answer(text, None).replace(".", "").split()
        lengths.add(len(words))
        assert {word.lower() for word in words} <= {word.strip(":,.").lower() for word in text.split()}
    assert min(lengths) >= 10
    assert max(lengths) <= 60
    assert len(lengths) > 4


def test_a_reference_and_what_it_refers_to_give_the_same_answer():
    referring = {
        "$defs": {"C": COLOUR},
        "type": "object",
        "properties": {"c": {"$ref": "#/$defs/C"}},
        "required": ["c"],
    }
    written_out = {"type": "object", "properties": {"c": COLOUR}, "required": ["c"]}
    for text in TEXTS:
        assert simulated_answer(text, referring) == simulated_answer(text, written_out)


def test_all_of_is_merged():
    schema = {"allOf": [{"$ref": "#/$defs/P"}, {"properties": {"why": {"const": 1}}}], "$defs": {"P": PAIR}}
    assert simulated_answer("x", schema) == {"why": 1}


def test_a_type_list_gives_either_type():
    found = {json_type(simulated_answer(text, {"type": ["string", "null"]})) for text in TEXTS}
    assert found == {"string", "null"}


def test_properties_make_an_object_even_without_a_type_and_items_may_be_distinct():
    assert list(simulated_answer("x", {"properties": {"a": {"type": "null"}}, "required": ["a"]})) == ["a"]
    for text in TEXTS:
        drawn = simulated_answer(
            text, {"type": "array", "items": {"type": "boolean"}, "minItems": 9, "uniqueItems": True}
        )
        assert len(drawn) == len(set(drawn))


# Tokens


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_pieces_join_to_the_text_and_count_its_tokens(text: str):
    pieces = split(text)
    assert pieces.text == text
    assert pieces.tokens == len(load_encoding("o200k_base").encode_ordinary(text))
    assert all(pieces.texts)


def test_tokens_that_cut_a_character_are_one_piece():
    pieces = split("a 🧿🪬 b")
    assert "�" not in pieces.text
    assert len(pieces.texts) < pieces.tokens


def test_a_prompt_is_counted_by_the_cookbooks_rule():
    def count(text: str) -> int:
        return len(load_encoding("o200k_base").encode_ordinary(text))

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "name": "ann", "content": "Hello there"}]
    expected = (
        3 + (3 + count("system") + count("Be brief.")) + (3 + count("user") + count("Hello there") + count("ann") + 1)
    )
    assert prompt_tokens(messages) == expected
    model = SimulatedModel()
    body = {"model": "m", "messages": messages}
    assert model.reply(model.read(body)).usage.prompt_tokens == expected
    typed = {**body, "response_format": json_schema(wrapped(COLOUR))}
    schema = count(json.dumps(wrapped(COLOUR), separators=(",", ":")))
    assert model.reply(model.read(typed)).usage.prompt_tokens == expected + schema
    free = SimulatedModel(count_schema=False)
    assert free.reply(free.read(typed)).usage.prompt_tokens == expected


def test_max_tokens_cuts_the_reply_under_either_name():
    model = SimulatedModel()
    for name in ("max_tokens", "max_completion_tokens"):
        body = single(**{name: 5})
        reply = model.reply(model.read(body))
        assert (reply.usage.completion_tokens, reply.finish_reason) == (5, "length")
        assert simulated_answer(TEXTS[0], None).startswith(reply.pieces.text)
    enough = model.reply(model.read(single(max_tokens=10_000)))
    assert enough.finish_reason == "stop"


def test_the_context_holds_prompt_and_reply():
    tokens = SimulatedModel().read(single()).tokens
    tight = SimulatedModel(context_tokens=tokens + 3)
    reply = tight.reply(tight.read(single()))
    assert (reply.usage.completion_tokens, reply.finish_reason) == (3, "length")
    with pytest.raises(EndpointError, match="maximum context length") as caught:
        tight.read(single(max_tokens=4))
    assert caught.value.error["code"] == "context_length_exceeded"
    with pytest.raises(EndpointError, match=f"your messages resulted in {tokens} tokens"):
        SimulatedModel(context_tokens=tokens - 1).read(single())


def test_cached_prefixes_count_from_1024_tokens_in_steps_of_128():
    model = SimulatedModel(cached_prefixes=True)
    long = {"role": "system", "content": "word " * 1_300}

    def cached(text: str) -> int:
        return model.reply(
            model.read({"model": "m", "messages": [long, {"role": "user", "content": text}]})
        ).usage.cached_tokens

    assert cached("first") == 0
    assert cached("second") == 1280
    assert model.reply(model.read(single())).usage.cached_tokens == 0
    assert model.reply(model.read(single())).usage.cached_tokens == 0


# Options


@each(
    ("options", "fields", "status", "code", "param"),
    [
        ({"json_schema": "400"}, {"response_format": json_schema(PAIR)}, 400, "unsupported_value", "response_format"),
        ({"json_schema": "500"}, {"response_format": json_schema(PAIR)}, 500, None, None),
        (
            {"json_object": "400"},
            {"response_format": {"type": "json_object"}},
            400,
            "unsupported_value",
            "response_format",
        ),
        ({}, {"response_format": {"type": "json_object"}}, 400, None, "messages"),
        (
            {"max_tokens_name": "max_tokens"},
            {"max_completion_tokens": 9},
            400,
            "unsupported_parameter",
            "max_completion_tokens",
        ),
        ({"max_tokens_name": "max_completion_tokens"}, {"max_tokens": 9}, 400, "unsupported_parameter", "max_tokens"),
        ({"temperature_fixed": True}, {"temperature": 0}, 400, "unsupported_value", "temperature"),
        ({"stream_supported": False}, {"stream": True}, 400, "unsupported_value", "stream"),
        (
            {"stream_options": "400"},
            {"stream": True, "stream_options": {"include_usage": True}},
            400,
            "unsupported_parameter",
            "stream_options",
        ),
        ({}, {"stream_options": {"include_usage": True}}, 400, None, "stream_options"),
        ({}, {"max_tokens": 0}, 400, None, "max_tokens"),
        ({}, {"max_tokens": "9"}, 400, None, "max_tokens"),
        ({}, {"model": None}, 400, None, None),
        ({}, {"messages": []}, 400, "missing_required_parameter", "messages"),
        ({}, {"response_format": "json"}, 400, "invalid_value", "response_format"),
        ({}, {"response_format": json_schema(COLOUR)}, 400, None, "response_format"),
        (
            {},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": PAIR}}},
            400,
            "missing_required_parameter",
            "response_format.json_schema",
        ),
    ],
)
def test_what_is_not_supported_is_refused_in_the_providers_words(options, fields, status, code, param):
    with pytest.raises(EndpointError) as caught:
        SimulatedModel(**options).read(single(**fields))
    assert (caught.value.status, caught.value.error["code"], caught.value.error["param"]) == (status, code, param)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"temperature_fixed": True}, {"temperature": 1}),
        ({"max_tokens_name": "max_tokens"}, {"max_tokens": 9}),
        ({"max_tokens_name": "max_completion_tokens"}, {"max_completion_tokens": 9}),
        ({"json_object": "400"}, {"response_format": {"type": "text"}}),
    ],
)
def test_what_is_supported_is_not_refused(options, fields):
    assert say(SimulatedModel(**options), single(**fields))


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"type": "object", "properties": {}}, "'additionalProperties' is required"),
        ({**PAIR, "required": ["colour"]}, "Missing 'why'"),
        (wrapped({"type": "array", "items": {**PAIR, "additionalProperties": True}}), "'items'"),
        (wrapped({"anyOf": [COLOUR, {"allOf": [COLOUR]}]}), "'allOf' is not permitted"),
        ({**wrapped({"$ref": "#/$defs/P"}), "$defs": {"P": {**PAIR, "required": []}}}, r"'\$defs', 'P'"),
    ],
)
def test_a_strict_schema_outside_the_subset_is_refused(schema, complaint):
    form = json_schema(schema)
    form["json_schema"]["strict"] = True
    with pytest.raises(EndpointError, match=complaint):
        SimulatedModel().read(single(response_format=form))
    SimulatedModel(strict_schemas=False).read(single(response_format=form))
    form["json_schema"]["strict"] = False
    SimulatedModel().read(single(response_format=form))


def test_requests_and_replies_are_kept_only_when_asked():
    keeping, forgetting = SimulatedModel(record=True), SimulatedModel()
    texts = [say(keeping, single()), say(forgetting, single())]
    assert (keeping.requests, keeping.replies) == ([single()], texts[:1])
    assert (forgetting.requests, forgetting.replies) == ([], [])


@pytest.mark.parametrize(
    "options",
    [
        {"json_schema": "no"},
        {"json_object": "500"},
        {"context_tokens": 0},
        {"max_tokens_name": "tokens"},
        {"stream_options": ""},
    ],
)
def test_a_wrong_option_is_a_config_error_that_names_it(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SimulatedModel(**options)


# Faults


def spoiled(kind: Kind, schema: dict | None = None, seed: int = 0, body: dict | None = None) -> Any:
    model = SimulatedModel(faults=Faults(kind, rate=1, on="all", seed=seed))
    reply = model.reply(model.read(body or combined(schema)))
    assert model.faulted == 1
    return reply


TRUE = results(say(SimulatedModel(), combined(COLOUR)))
SEEDS = range(12)


def elements(kind: Kind, seed: int) -> list[tuple[str, Any]]:
    return results(spoiled(kind, COLOUR, seed).pieces.text)


@pytest.mark.parametrize("seed", SEEDS)
def test_faults_of_elements_do_what_they_say(seed: int):
    names, answers = [name for name, _ in TRUE], [answer for _, answer in TRUE]

    missing = elements("missing", seed)
    assert len(missing) == 7
    assert set(missing) < set(TRUE)

    twice = elements("duplicate", seed)
    assert len(twice) == 9
    assert list(dict.fromkeys(twice)) == TRUE

    previous = elements("previous_id", seed)
    assert [answer for _, answer in previous] == answers
    assert [name for name, _ in previous] in [names[: i + 1] + names[i : i + 1] + names[i + 2 :] for i in range(7)]

    following = elements("next_id", seed)
    assert [answer for _, answer in following] == answers
    assert [name for name, _ in following] in [names[:i] + names[i + 1 : i + 2] + names[i + 1 :] for i in range(7)]

    back = elements("shifted_back", seed)
    assert [name for name, _ in back] == names[:-1]
    assert [answer for _, answer in back] in [answers[:i] + answers[i + 1 :] for i in range(7)]

    forward = elements("shifted_forward", seed)
    assert [answer for _, answer in forward] == answers[:-1]
    assert [name for name, _ in forward] in [names[:i] + names[i + 1 :] for i in range(7)]

    more = elements("unknown", seed)
    (stranger,) = [element for element in more if element[0] not in names]
    assert [element for element in more if element is not stranger] == TRUE

    renamed = elements("renamed", seed)
    assert [answer for _, answer in renamed] == answers
    assert sum(name not in names for name, _ in renamed) == 1

    shuffled = elements("reordered", seed)
    assert shuffled != TRUE
    assert sorted(shuffled) == sorted(TRUE)

    assert elements("empty_results", seed) == []


@each(
    "schema",
    [
        None,
        COLOUR,
        PAIR,
        {"type": "integer"},
        {"anyOf": [COLOUR, {"type": "null"}]},
        {"enum": ["a", None]},
        {"const": "a"},
        {"type": ["string", "null"]},
    ],
)
@each("seed", SEEDS)
def test_wrong_type_spoils_one_answer_only(schema, seed: int):
    true = results(say(SimulatedModel(), combined(schema)))
    wrong = results(spoiled("wrong_type", schema, seed).pieces.text)
    assert [name for name, _ in wrong] == IDS
    ((_, bad),) = [element for element, good in zip(wrong, true, strict=True) if element != good]
    allowed = {json_type(answer) for _, answer in true}
    assert json_type(bad) not in allowed or bad == "none of these"


def test_wrong_type_finds_wrong_labels_as_well():
    values = {json.dumps(dict(elements("wrong_type", seed))[name]) for seed in range(60) for name in IDS}
    assert '"none of these"' in values


@each("schema", [None, COLOUR, PAIR, {"type": "integer"}])
@each("seed", range(30))
def test_broken_json_is_broken_in_one_element_and_keeps_all_ids(schema, seed: int):
    text = spoiled("broken_json", schema, seed).pieces.text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    whole_text = say(SimulatedModel(), combined(schema))
    assert abs(len(text) - len(whole_text)) <= 2
    assert all(f'{{"id":"{name}","answer":' in text for name in IDS)


def test_broken_json_comes_in_five_ways():
    whole_text = say(SimulatedModel(), combined(COLOUR))
    ways = set()
    for seed in range(60):
        text = spoiled("broken_json", COLOUR, seed).pieces.text
        if len(text) < len(whole_text):
            ways.add("brace" if text.count("}") < whole_text.count("}") else "unterminated")
        else:
            ways.add("newline" if "\n" in text else "escape" if "\\q" in text else "quote")
    assert ways == {"brace", "unterminated", "newline", "escape", "quote"}


@each("value", [42, "x", "", True, None, [1], {"answer": 'say "hi" \\ \u00e9\n'}, {}])
@each("seed", range(20))
def test_any_value_can_be_broken(value, seed: int):
    import random

    text = json.dumps(value)
    with pytest.raises(json.JSONDecodeError):
        json.loads(Fault("broken_json", random.Random(seed)).broken(text))


@pytest.mark.parametrize("seed", SEEDS)
def test_fenced_json_stands_in_a_fence_with_prose_around(seed: int):
    text = spoiled("fenced", COLOUR, seed).pieces.text
    before, fenced, _ = text.split("```", 2)
    assert before
    assert results(fenced.removeprefix("json")) == TRUE


@pytest.mark.parametrize("seed", SEEDS)
def test_faults_that_cut_keep_the_start_and_say_how_it_ended(seed: int):
    text = say(SimulatedModel(), combined(COLOUR))
    ends = {"truncated": ("length", "done"), "cut": (None, "cut"), "reset": (None, "reset"), "stall": (None, "stall")}
    for kind, (finish_reason, ending) in ends.items():
        reply = spoiled(kind, COLOUR, seed)
        assert text.startswith(reply.pieces.text)
        assert 0 < len(reply.pieces.text) < len(text)
        assert (reply.finish_reason, reply.ending) == (finish_reason, ending)
        assert reply.usage.completion_tokens == reply.pieces.tokens


def test_faults_of_the_whole_reply_do_what_they_say():
    blank, refusal, hang = spoiled("whitespace"), spoiled("refusal"), spoiled("hang")
    assert (blank.pieces.text, blank.finish_reason) == ("  \n ", "stop")
    assert refusal.refusal
    assert "sorry" in refusal.pieces.text
    assert (hang.pieces.text, hang.ending) == ("", "hang")
    model = SimulatedModel(faults=Faults("hang", rate=1, on="all"))
    say(model, single())
    assert (model.prompt_tokens, model.completion_tokens) == (0, 0)


def test_a_filter_speaks_up_either_way():
    seen = set()
    for seed in range(20):
        try:
            seen.add(spoiled("filtered", seed=seed).finish_reason)
        except EndpointError as error:
            seen.add(f"{error.status} {error.error['code']}")
    assert seen == {"content_filter", "400 content_filter"}


@pytest.mark.parametrize(("kind", "status"), [("http_400", 400), ("http_429", 429), ("http_500", 500)])
def test_faults_that_are_error_responses_are_raised(kind, status):
    model = SimulatedModel(faults=Faults(kind, rate=1, retry_after=3), record=True)
    with pytest.raises(EndpointError) as caught:
        say(model, combined())
    assert caught.value.status == status
    assert caught.value.retry_after == (3 if kind == "http_429" else None)
    assert (model.faulted, model.replies, model.prompt_tokens) == (1, [""], 0)


@each("kind", sorted({*get_args(Kind)} - {"http_400", "http_429", "http_500", "filtered"}))
def test_every_fault_changes_a_single_call(kind):
    for schema in (None, PAIR, wrapped(COLOUR)):
        body = single(schema=schema)
        clean = SimulatedModel()
        good = clean.reply(clean.read(body))
        bad = spoiled(kind, body=body)
        assert (bad.pieces.text, bad.finish_reason, bad.ending, bad.refusal) != (
            good.pieces.text,
            "stop",
            "done",
            False,
        )
        if kind in ("missing", "shifted_back", "empty_results"):
            assert bad.pieces.text.isspace()


def test_wrong_type_in_a_wrapped_single_keeps_the_wrapper():
    answer = json.loads(spoiled("wrong_type", body=single(schema=wrapped(COLOUR))).pieces.text)
    assert answer["answer"] not in COLOUR["enum"]


def test_a_batch_of_one_takes_every_fault_of_elements():
    for kind in ("missing", "duplicate", "shifted_back", "shifted_forward", "unknown", "renamed", "reordered"):
        spoiled(kind, body=combined(texts=TEXTS[:1]))


def test_the_seed_and_the_count_decide_which_replies_go_wrong():
    def pattern(seed: int, rate: float = 0.3) -> list[str | None]:
        faults = Faults(["missing", "cut"], rate=rate, seed=seed)
        drawn = [faults.draw(number, 0) for number in range(200)]
        return [fault.kind if fault else None for fault in drawn]

    assert pattern(1) == pattern(1)
    assert pattern(1) != pattern(2)
    assert 30 < 200 - pattern(1).count(None) < 90
    assert set(pattern(1)) == {None, "missing", "cut"}
    assert pattern(1, 0.0) == [None] * 200


def test_faults_keep_to_the_calls_they_are_meant_for():
    for on, spoiled_calls in (("combined", 1), ("single", 1), ("all", 2)):
        model = SimulatedModel(faults=Faults("whitespace", rate=1, on=on))
        blank = [say(model, body).isspace() for body in (combined(), single())]
        assert model.faulted == sum(blank) == spoiled_calls
        assert blank == [on != "single", on != "combined"]


def test_a_limit_ends_the_faults():
    model = SimulatedModel(faults=Faults("whitespace", rate=1, limit=2))
    assert [say(model, combined()).isspace() for _ in range(4)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["nothing"], {}),
        ([[]], {}),
        (["cut"], {"rate": 1.5}),
        (["cut"], {"rate": -1}),
        (["cut"], {"on": "none"}),
        (["cut"], {"limit": -1}),
    ],
)
def test_wrong_faults_are_config_errors(arguments, options):
    with pytest.raises(ConfigError):
        Faults(*arguments, **options)


# Time


def test_tokens_come_at_their_rate_after_the_first():
    pieces = split("one two three four")
    assert Latency(first_token=0.5, tokens_per_second=10).times(pieces, []) == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert Latency(first_token=None, tokens_per_second=0).times(pieces, []) == [0, 0, 0, 0]
    assert Latency(first_token=2, tokens_per_second=None).times(pieces, []) == [2, 2, 2, 2]


def test_elements_come_whole_at_their_rate():
    model = SimulatedModel(latency=Latency(first_token=1, element=0.5))
    reply = model.reply(model.read(combined(COLOUR)))
    arrived: dict[float, str] = {}
    for time, text in zip(reply.times, reply.pieces.texts, strict=True):
        arrived[time] = arrived.get(time, "") + text
    assert list(arrived) == [1 + 0.5 * number for number in range(1, 9)]
    text = ""
    for number, part in enumerate(arrived.values(), start=1):
        text += part
        assert text.count('"}') >= number
        assert text.count('"answer"') <= number
    alone = model.reply(model.read(single()))
    assert set(alone.times) == {1.5}


def test_a_piece_that_starts_where_an_element_ends_belongs_to_the_next():
    pieces = Pieces(["[", "ab", ",", "cde", "f", "]"], [1, 2, 3, 4, 5, 6])
    times = Latency(first_token=None, element=1).times(pieces, [3, 8])
    assert times == [1, 1, 2, 2, 2, 2]


async def test_whoever_is_behind_gets_all_that_is_due_at_once():
    loop = asyncio.get_running_loop()
    ranges = []
    async for first, end in paced([0.0, 0.0, 0.5, 0.75, 1.0, 2.0], loop.time()):
        ranges.append((first, end, loop.time()))
        if first == 2:
            loop.advance(0.5)
    assert ranges == [(0, 2, 0.0), (2, 3, 0.5), (3, 5, 1.0), (5, 6, 2.0)]


def test_negative_latency_is_a_config_error():
    with pytest.raises(ConfigError, match="first_token"):
        Latency(first_token=-1)


# The transport


def call(body: dict, **fields: Any) -> ChatCall:
    return ChatCall(messages=body["messages"], **fields)


async def sent(transport: SimulatedTransport, chat: ChatCall) -> tuple[list[str], Any]:
    pieces: list[str] = []
    return pieces, await transport.send(chat, pieces.append)


async def test_the_transport_streams_token_by_token_and_reports_what_the_model_counted():
    model = SimulatedModel()
    transport = SimulatedTransport(model)
    assert isinstance(transport, Transport)
    pieces, completion = await sent(transport, call(combined(), stream=True))
    assert [name for name, _ in results("".join(pieces))] == IDS
    assert len(pieces) > 50
    assert completion.finish_reason == "stop"
    assert completion.usage == model.reported == Usage(model.prompt_tokens, model.completion_tokens)
    assert completion.body is None
    await transport.aclose()


async def test_the_transport_gives_everything_at_once_when_not_streaming():
    (text,), completion = await sent(SimulatedTransport(SimulatedModel()), call(single(), model="gpt"))
    assert text == simulated_answer(TEXTS[0], None)
    assert completion.body["choices"][0]["message"]["content"] == text
    assert (completion.model, completion.body["model"]) == ("gpt", "gpt")


async def test_the_transport_respects_max_tokens_under_the_models_name():
    for name in (None, "max_tokens", "max_completion_tokens"):
        transport = SimulatedTransport(SimulatedModel(max_tokens_name=name))
        _, completion = await sent(transport, call(single(), max_tokens=4))
        assert (completion.finish_reason, completion.usage.completion_tokens) == ("length", 4)


async def test_the_transport_gives_the_hint_where_the_schema_is_refused():
    hint = f"Match this JSON Schema: {json.dumps(wrapped(COLOUR))}"
    chat = call(single(), schema=wrapped(COLOUR), hint=hint)
    enforced, words = SimulatedModel(record=True), SimulatedModel(json_schema="400", record=True)
    assert (await sent(SimulatedTransport(enforced), chat))[0] == (await sent(SimulatedTransport(words), chat))[0]
    assert "response_format" in enforced.requests[0]
    assert "response_format" not in words.requests[0]
    assert [message["role"] for message in words.requests[0]["messages"]] == ["system", "system", "user"]
    assert len(chat.messages) == 2


@pytest.mark.parametrize(
    ("kind", "error", "code"),
    [
        ("http_400", BadRequest, "invalid_value"),
        ("http_429", RateLimited, "rate_limit_exceeded"),
        ("http_500", ServerError, "server_error"),
        ("reset", ConnectFailed, None),
    ],
)
async def test_the_transport_raises_the_faults_of_the_wire(kind, error, code):
    transport = SimulatedTransport(SimulatedModel(faults=Faults(kind, rate=1, retry_after=7)))
    for stream in (True, False):
        with pytest.raises(error) as caught:
            await sent(transport, call(combined(), stream=stream))
        assert getattr(caught.value, "code", None) == code
        assert getattr(caught.value, "retry_after", None) == (7 if kind == "http_429" else None)


async def test_the_transport_tells_refusals_of_the_endpoint_apart():
    with pytest.raises(ContextTooLong) as caught:
        await sent(SimulatedTransport(SimulatedModel(context_tokens=5)), call(single()))
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "context_length_exceeded", "messages")
    assert "context_length_exceeded" in caught.value.body
    faults = Faults("filtered", rate=1, seed=next(seed for seed in range(9) if _is_400(seed)))
    with pytest.raises(Filtered):
        await sent(SimulatedTransport(SimulatedModel(faults=faults)), call(combined()))


def _is_400(seed: int) -> bool:
    try:
        spoiled("filtered", seed=seed)
    except EndpointError:
        return True
    return False


async def test_a_reply_that_just_ends_has_no_finish_reason_and_no_usage():
    model = SimulatedModel(faults=Faults("cut", rate=1))
    pieces, completion = await sent(SimulatedTransport(model), call(combined(), stream=True))
    assert pieces
    assert (completion.finish_reason, completion.usage) == (None, None)
    assert model.reported == Usage()
    assert model.completion_tokens > 0


async def test_a_reset_hands_out_what_came_before_only_when_streaming():
    for stream in (True, False):
        pieces: list[str] = []
        transport = SimulatedTransport(SimulatedModel(faults=Faults("reset", rate=1)))
        with pytest.raises(ConnectFailed):
            await transport.send(call(combined(), stream=stream), pieces.append)
        assert bool(pieces) is stream


async def test_a_refusal_is_no_text():
    for stream in (True, False):
        transport = SimulatedTransport(SimulatedModel(faults=Faults("refusal", rate=1)))
        pieces, completion = await sent(transport, call(combined(), stream=stream))
        assert pieces == []
        assert "sorry" in completion.refusal


@pytest.mark.parametrize("kind", ["hang", "stall"])
async def test_silence_ends_with_the_calls_timeout_or_its_cancellation(kind):
    model = SimulatedModel(faults=Faults(kind, rate=1))
    with pytest.raises(TransportTimeout):
        await sent(SimulatedTransport(model), call(combined(), timeout=0.01, stream=True))
    task = asyncio.create_task(sent(SimulatedTransport(model), call(combined())))
    await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert model.disconnects == 2


async def test_a_timeout_inside_the_answer_function_is_not_the_calls():
    def answer(text: str, schema: dict | None) -> str:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await sent(SimulatedTransport(SimulatedModel(answer=answer)), call(single(), timeout=5))


async def test_the_transport_takes_the_models_time_to_the_instant():
    transport = SimulatedTransport(SimulatedModel(latency=Latency(first_token=0.5, tokens_per_second=80)))
    loop = asyncio.get_running_loop()
    times: list[float] = []
    start = loop.time()
    completion = await transport.send(call(single(), stream=True), lambda _: times.append(loop.time() - start))
    assert times == pytest.approx([0.5 + number / 80 for number in range(completion.usage.completion_tokens)])
    start = loop.time()
    await transport.send(call(single()), lambda _: None)
    assert loop.time() - start == pytest.approx(times[-1])


async def test_elements_reach_the_transports_caller_whole():
    transport = SimulatedTransport(SimulatedModel(latency=Latency(first_token=0, element=1)))
    text, closed = "", {}

    def take(piece: str) -> None:
        nonlocal text
        text += piece
        closed.setdefault(text.count('"}'), asyncio.get_running_loop().time())

    await transport.send(call(combined(COLOUR), stream=True), take)
    assert [closed[number] for number in range(1, 9)] == pytest.approx(list(range(1, 9)))
