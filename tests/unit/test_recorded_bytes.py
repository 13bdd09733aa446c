"""Bytes that other releases read and write: prompts, cache keys and entries, spools, batch files, and what the commands print.

`recorded_bytes.json` holds what the release before this layout of the package made of the cases below. A difference means that
answers in caches are lost, that workers of two releases disagree about a spool, or that a script cannot read a summary.
`python tests/unit/test_recorded_bytes.py` records anew, which is right only after a deliberate change of a format.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import re
import sqlite3
import sys
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pytest
from helpers import serving

import microbatch as mb
from microbatch.__main__ import main
from microbatch.testing import ScriptedTransport, VirtualClockLoop

RECORDED = Path(__file__).with_name("recorded_bytes.json")
ENDINGS = ["".join(random.Random(n).choices("bcdfghjkmnpqrstvwxz", k=5)) for n in range(64)]
SECRET = bytes(range(32))


class Label(Enum):
    HOME = "home"
    OTHER = "other"


class Verdict(msgspec.Struct):
    """A judgement."""

    label: Literal["home", "beauty"]
    score: Annotated[int, msgspec.Meta(ge=0, le=10)]
    reason: str | None = None


class Point(TypedDict):
    x: float
    y: float


SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "theirs",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"b": {"type": "string"}, "a": {"$ref": "#/$defs/n"}},
            "required": ["b", "a"],
            "additionalProperties": False,
            "$defs": {"n": {"type": "integer"}},
        },
    },
}
VERDICT = {"label": "home", "score": 3, "reason": None}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
TEXTS = ("red shoes", 'two\nlines, "quoted" \\ back', "\u2028 caf\u00e9 \U0001f600 \t[1abcde]")


def ask(text, system="Shout.", **user):
    return [{"role": "system", "content": system}, {"role": "user", "content": text, **user}]


EXAMPLES = [{"role": "user", "content": "blue"}, {"role": "assistant", "content": "BLUE"}]

# By name: what the callers of a case share, and what the model answers to each text.
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "text": ({}, str.upper),
    "literal": ({"output_type": Literal["home", "other"]}, "home"),
    "enum": ({"output_type": Label}, "other"),
    "bool": ({"output_type": bool}, True),
    "number": ({"output_type": float}, 1.5),
    "list": ({"output_type": list[int]}, [1, 2]),
    "struct": ({"output_type": Verdict}, VERDICT),
    "typed dict": ({"output_type": Point}, {"x": 1.0, "y": 2.0}),
    "optional": ({"output_type": int | None}, None),
    "mapping": ({"output_type": dict[str, int]}, {"a": 1}),
    "own schema": ({"params": {"response_format": SCHEMA}}, {"b": "x", "a": 1}),
    "json object": ({"params": {"response_format": {"type": "json_object"}}}, {"b": 1}),
    "model": ({"model": "gpt-4o", "temperature": 0.0}, str.upper),
    "max_tokens": ({"max_tokens": 40, "output_type": Literal["home", "other"]}, "home"),
    "params": ({"params": {"seed": 7, "top_p": 0.5}, "temperature": 1.0}, str.upper),
    "tools": ({"params": {"tools": [TOOL]}}, str.upper),
    "several choices": ({"params": {"n": 2}}, str.upper),
    "headers": ({"headers": {"X-Team": "a", "Authorization": "Bearer sk-theirs"}}, str.upper),
    "tenant": ({"tenant": "shop", "priority": "high"}, str.upper),
}
MESSAGES = {
    "no instructions": [[{"role": "user", "content": text}] for text in TEXTS],
    "Message objects": [[mb.Message("developer", "Be kind."), mb.Message("user", text)] for text in TEXTS],
    "examples": [[ask("")[0], *EXAMPLES, {"role": "user", "content": text}] for text in TEXTS],
    "text parts": [ask([{"type": "text", "text": text}]) for text in TEXTS],
    "an image": [ask([{"type": "image_url", "image_url": {"url": f"data:,{number}"}}]) for number in range(2)],
    "names": [ask(text, name="ann") for text in TEXTS],
}


class Kept:
    """A cache that holds its secret still and tells what it was asked for and given."""

    def __init__(self):
        self.entries: dict[bytes, bytes] = {}
        self.asked: list[str] = []
        self.given: list[Any] = []

    async def secret(self):
        return SECRET

    async def get_many(self, keys):
        self.asked += [key.hex() for key in keys]
        return [self.entries.get(key) for key in keys]

    async def set_many(self, entries):
        for key, value, ttl in entries:
            self.entries[key] = value
            fields = msgspec.msgpack.decode(value)
            assert msgspec.msgpack.encode(fields) == value  # so the fields and their order are all that the bytes say
            tag, own_key, text, model, *figures, body, size, kind, tenant = fields
            assert own_key == key
            # Times and shares of tokens vary; what they are does not.
            types = [type(each).__name__ for each in (*figures, ttl)]
            digests = [digest and digest.hex() for digest in (kind, tenant)]
            self.given.append([tag, key.hex(), text, model, *types, body, size, *digests])

    async def aclose(self):
        pass


class Spooled(mb.SQLiteSpool):
    """A spool that tells what was put."""

    def __init__(self, path):
        super().__init__(path)
        self.items: list[Any] = []

    async def put(self, items):
        self.items += [[item.name.tenant, item.name.id, item.digest.hex(), item.payload.decode()] for item in items]
        return await super().put(items)


def plain(value):
    """Return what JSON can say of *value*, with bytes as text."""
    text = msgspec.json.encode(value, enc_hook=lambda other: other.decode() if isinstance(other, bytes) else other)
    return json.loads(text)


def told(call):
    """Return a call as the transport got it."""
    names = (
        "messages",
        "model",
        "params",
        "headers",
        "schema",
        "strict",
        "hint",
        "max_tokens",
        "stream",
        "timeout",
        "bound",
    )
    return plain({name: getattr(call, name) for name in names})


def batcher(transport, **options):
    policy = mb.FlushPolicy(max_wait=0.1, idle="wait")
    return mb.Microbatcher(transport, policy=policy, tokens="bytes", draw_ids=lambda count: ENDINGS[:count], **options)


async def calls(messages, shared, answer, **options):
    """Return the calls that *messages*, submitted at once, lead to, and the answers."""
    transport = ScriptedTransport(answer=answer if callable(answer) else lambda _: answer)
    transport.model = "gpt-4.1-mini"
    async with batcher(transport, **options) as asking:
        replies = await asyncio.gather(*(asking.submit(each, **shared) for each in messages))
    return {"calls": [told(each.call) for each in transport.calls], "texts": [reply.text for reply in replies]}


async def prompts():
    """Return what the transport gets for each case."""
    questions = [ask(text) for text in TEXTS]
    found = {name: await calls(questions, *case) for name, case in CASES.items()}
    found |= {name: await calls(messages, {}, "SO") for name, messages in MESSAGES.items()}
    found["one alone"] = await calls(questions[:1], {"output_type": Verdict}, VERDICT)
    found["verified"] = await calls(questions, {}, str.upper, fallback=mb.FallbackPolicy(resolve="verified"))
    return found


async def canary():
    """Return the prompt that ends in a canary, and what it is answered with."""
    transport = ScriptedTransport(
        lambda call: call.reply(
            (name, text.rpartition(": ")[2] if "Reply with" in text else "yes") for name, text in call.items
        )
    )
    async with batcher(transport, fallback=mb.FallbackPolicy(canary=True)) as asking:
        await asyncio.gather(*(asking.submit(ask(text)) for text in TEXTS))
    return [told(each.call) for each in transport.calls]


async def asked_again():
    """Return the calls after a reply that leaves one request out, and after one that is no JSON."""
    found = {}
    for name, step in {
        "one missing": lambda call: call.reply((name, text.upper()) for name, text in call.items[:-1]),
        "one misshapen": lambda call: call.reply(
            (name, 5 if not n else "yes") for n, (name, _) in enumerate(call.items)
        ),
    }.items():
        transport = ScriptedTransport(step)
        async with batcher(transport) as asking:
            await asyncio.gather(*(asking.submit(ask(text)) for text in TEXTS))
        found[name] = [told(each.call) for each in transport.calls]
    return found


async def cached():
    """Return the keys that a cache is asked for, and the entries it is given, of each case."""
    found = {}
    cases = {**CASES, "ttl": ({"ttl": 60.0}, str.upper)}
    for name, (shared, answer) in cases.items():
        cache = Kept()
        messages = [ask(text) for text in TEXTS]
        await calls(messages, shared, answer, cache=cache)
        await calls(messages, shared, answer, cache=cache)
        found[name] = {"asked": cache.asked, "given": cache.given}
    cache = Kept()
    await calls(MESSAGES["examples"], {}, "SO", cache=cache, normalize=str.strip)
    found["normalize"] = {"asked": cache.asked, "given": cache.given}
    return found


async def spooled():
    """Return what a spool is given for each case."""
    with tempfile.TemporaryDirectory() as folder:
        spool = Spooled(Path(folder) / "spool.sqlite")
        transport = ScriptedTransport()
        transport.model = "gpt-4.1-mini"
        async with mb.Microbatcher(transport, spool=spool, tokens="bytes") as asking:
            for name, (shared, _) in CASES.items():
                options = {key: value for key, value in shared.items() if key not in ("headers", "priority")}
                await asking.enqueue(ask(TEXTS[1]), id=name, **options)
            for name, messages in MESSAGES.items():
                await asking.enqueue(messages[0], id=name)
        return spool.items


async def figures():
    """Return the names of the figures of a batcher."""
    async with batcher(ScriptedTransport()) as asking:
        stats = asking.stats()
    return [name for name in dir(stats) if not name.startswith("_") and not callable(getattr(stats, name))]


# --- over HTTP, and from the command line


async def bodies():
    """Return the bodies of requests over HTTP: a combined one, one alone, one with tools."""
    with serving(record=True) as endpoint:
        transport = mb.OpenAIChat("gpt-4.1-mini", api_key="sk-test", base_url=endpoint.base_url)
        alone = ({"output_type": bool}, CASES["tools"][0])
        together = ({"output_type": Verdict}, {"max_tokens": 9})
        for count, shared in [(1, each) for each in alone] + [(2, each) for each in together]:
            async with batcher(transport) as asking:
                await asyncio.gather(*(asking.submit(ask(text), **shared) for text in TEXTS[:count]))
        return endpoint.requests


def write_lines(prefix, count):
    lines = [{"id": f"{prefix}{number}", "name": f"thing {number}"} for number in range(count)]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def command(*words):
    """Run a command; return its status and the JSON it prints, of times and tokens (ids are random there) only the names."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        status = main([*words, "--json"])
    printed = json.loads(out.getvalue().splitlines()[-1])
    varies = re.compile(r"_s$|_tokens$|cost_usd$")
    return {"status": status} | {name: "varies" if varies.search(name) else value for name, value in printed.items()}


def layout(path):
    """Return the tables, indices and marks of a SQLite file."""
    with contextlib.closing(sqlite3.connect(path)) as file:
        made = {name: " ".join(sql.split()) for name, sql in file.execute("SELECT name, sql FROM sqlite_master") if sql}
        marks = {name: file.execute(f"PRAGMA {name}").fetchone()[0] for name in ("user_version", "application_id")}
    return {**made, **marks}


def stored_answer(path):
    """Return what a spool keeps of the first answer, its times, tokens and prices left out."""
    with contextlib.closing(sqlite3.connect(path)) as file:
        answer = json.loads(file.execute("SELECT result FROM results").fetchone()[0])
    usage = {name: type(value).__name__ for name, value in answer["usage"].items()}
    return {name: "varies" if isinstance(value, float) else value for name, value in answer.items()} | {"usage": usage}


QUESTION = ("--template", "Product: {name}", "--system", "Sort.", "--labels", "home,other")
ALWAYS = ("--merge", "always")


def commands():
    """Return what `run`, `warm`, `spool` and `worker` print and write."""
    write_lines("p", 20)
    found = {
        "run": command("run", "in.jsonl", "-o", "out.jsonl", *QUESTION, "--simulate", "--temperature", "0", *ALWAYS),
        "warm": command("warm", "in.jsonl", "--cache", "c.sqlite", *QUESTION, "--simulate"),
        "spool --put": command("spool", "s.sqlite", "--put", "in.jsonl", *QUESTION, "--model", "m"),
        "spool": command("spool", "s.sqlite"),
        "worker": command("worker", "s.sqlite", "--until-empty", "--simulate", "--low-max-wait", "0.1"),
    }
    rows = sorted(map(json.loads, Path("out.jsonl").read_text().splitlines()), key=lambda row: row["custom_id"])
    return {
        **found,
        ".digest": Path("out.jsonl.digest").read_text(),
        "row": {name: type(value).__name__ for name, value in rows[0].items()},
        "digests": [row["digest"] for row in rows],
        "layout of a spool": layout("s.sqlite"),
        "layout of a cache": layout("c.sqlite"),
        "stored answer": stored_answer("s.sqlite"),
    }


def batch_file():
    """Return the file that a worker uploads to a provider's batch API, its random parts left out."""
    for number, question in enumerate((QUESTION, ("--template", "{name}", "--max-tokens", "60"))):
        write_lines(f"{number}-", 3)
        command("spool", "s2.sqlite", "--put", "in.jsonl", *question, "--model", "m")
    uploads = []
    with serving(record=True) as endpoint:
        add = endpoint.files.add

        def recording(owner, name, purpose, content):
            if purpose == "batch":
                uploads.append(content.decode())
            return add(owner, name, purpose, content)

        endpoint.files.add = recording
        flags = ("--until-empty", "--poll", "0.02", "--base-url", endpoint.base_url)
        report = command("worker", "s2.sqlite", "--provider-batch", *flags)
    content = re.sub(r'"custom_id":"[0-9a-f]+-', '"custom_id":"TOKEN-', "".join(uploads))
    content = re.sub(r"\b(\d+)[bcdfghjkmnpqrstvwxz]{5}\b", r"\1ENDING", content)
    return {"lines": content.splitlines(), "worker": report}


def virtually(work):
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(work())


PARTS = {
    "prompts": lambda: virtually(prompts),
    "canary": lambda: virtually(canary),
    "asked again": lambda: virtually(asked_again),
    "cache": lambda: virtually(cached),
    "spool": lambda: asyncio.run(spooled()),
    "stats": lambda: virtually(figures),
    "bodies": lambda: asyncio.run(bodies()),
    "commands": commands,
    "batch file": batch_file,
}


@pytest.mark.parametrize("part", PARTS)
def test_what_others_read_is_as_it_was(part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("OPENAI_", "MICROBATCH_"))]:
        monkeypatch.delenv(name)
    recorded = json.loads(RECORDED.read_bytes())[part]
    found = plain(PARTS[part]())
    if part == "stats":
        assert set(recorded) <= set(found)  # more may be told
    elif isinstance(recorded, dict):
        assert [name for name in recorded if recorded[name] != found.get(name)] == []
    assert part == "stats" or msgspec.json.encode(found) == msgspec.json.encode(recorded)  # the order of keys included


def lines_of(part):
    """Return *part* as JSON with a line for each of its cases, for the sake of whoever reads a difference."""
    if isinstance(part, dict):
        inner = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in part.items()]
        return "{\n" + ",\n".join(inner) + "\n}"
    return "[\n" + ",\n".join(map(json.dumps, part)) + "\n]"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        parts = [f"{json.dumps(part)}: {lines_of(plain(make()))}" for part, make in PARTS.items()]
    sys.stdout.write("{\n" + ",\n".join(parts) + "\n}\n")
