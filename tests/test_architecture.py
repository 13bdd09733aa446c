"""Who may import whom: downwards only, no cycles, vendors only where they belong."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import microbatch

HOUSE = Path(microbatch.__file__).parent

# Rooms from the bottom up; a room may import itself as far as it says so, and any room below it.
WORDS = ["errors", "messages", "policy", "protocols"]
PURE = [
    "accounting.events",
    "accounting.prices",
    "accounting.stats",
    "batching.permits",
    "batching.attribution",
    "batching.bounds",
    "batching.batch_limits",
    "prompt.canary",
    "schema.validate",
    "batching.estimates",
    "schema.decode",
    "prompt.demultiplexer",
    "batching.expected",
    "schema.find_json",
    "batching.single_flight",
    "batching.overhead",
    "schema.response_format",
    "batching.lane",
    "batching.lane_history",
    "batching.models",
    "prompt.compose",
    "batching.single_queue",
    "schema.envelope",
    "batching.request",
    "prompt.scanner",
    "schema.answer_type",
    "batching.ticket",
    "batching.stride",
    "batching.fair_queue",
    "prompt.outcome",
    "schema.strict",
    "prompt.thoughts",
    "schema.traverse",
    "batching.events",
    "schema.python_types",
    "batching.economics",
    "caching.entry",
    "caching.key",
    "caching.warming",
    "spool.payload",
    "spool.records",
    "transports.bound_refusals",
    "transports.breaker",
    "transports.bucket",
    "transports.concurrency",
    "transports.error_parsing",
    "transports.capabilities",
    "transports.finish_reasons",
    "transports.lenient",
    "transports.limit_headers",
    "transports.rate_limit",
    "lru",
    "transience",
    "transports.refusals",
    "transports.reply_reader",
    "transports.reported_usage",
    "transports.retry_budget",
    "transports.sse",
]
WAITING = [
    "batching.bulk",
    "batching.dispatch",
    "batching.engine",
    "batching.call_state",
    "batching.fallback",
    "batching.intake",
    "batching.lane_table",
    "batching.admission",
    "batching.scheduler",
]
VENDORS = {
    "accounting": {"tiktoken", "anyio", "genai_prices", "opentelemetry", "prometheus_client"},
    "caching": set(),
    "spool": {"anyio"},
    "storage": {"anyio", "redis"},
    "transports": {"aiohttp", "multidict", "yarl"},
    "testing": {"aiohttp", "tiktoken"},
}
CORE = {"msgspec"}


def modules():
    for path in sorted(HOUSE.rglob("*.py")):
        name = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
        yield name.removesuffix(".__init__") if name != "__init__" else "", path


MODULES = dict(modules())
NAMES = MODULES.keys()


def imports(path, *, at_run_time):
    """The modules that *path* imports, those for type checkers left out if *at_run_time*."""
    found = set()

    def visit(node):
        if at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in inner if name.removeprefix("microbatch.") in NAMES}
            found.update(submodules if submodules == inner else {node.module, *submodules})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


OURS = {
    name: {m.removeprefix("microbatch.") for m in imports(path, at_run_time=True) if m.startswith("microbatch.")}
    & MODULES.keys()
    for name, path in MODULES.items()
}


def test_no_import_cycles():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(OURS[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in OURS:
        visit(name)


def test_the_words_import_only_each_other_in_order():
    for position, name in enumerate(WORDS):
        assert OURS[name] <= set(WORDS[:position]), name


@pytest.mark.parametrize("name", PURE)
def test_pure_rooms_neither_wait_nor_know_vendors(name):
    foreign = {module.split(".")[0] for module in imports(MODULES[name], at_run_time=True)} - {"microbatch"}
    assert foreign <= set(sys.stdlib_module_names) | CORE
    assert not foreign & {"asyncio", "socket", "threading", "time"}
    assert OURS[name] <= {*WORDS, *PURE}


@pytest.mark.parametrize("name", WAITING)
def test_the_batching_rooms_wait_but_know_no_vendor(name):
    foreign = {module.split(".")[0] for module in imports(MODULES[name], at_run_time=True)} - {"microbatch"}
    assert foreign <= set(sys.stdlib_module_names) | CORE | {"anyio"}
    assert OURS[name] <= {*WORDS, *PURE, *WAITING}


@pytest.mark.parametrize("folder", sorted(VENDORS))
def test_a_folder_knows_its_own_vendors_only(folder):
    for name, path in MODULES.items():
        if name.split(".")[0] == folder:
            foreign = {module.split(".")[0] for module in imports(path, at_run_time=True)} - {"microbatch"}
            assert foreign - set(sys.stdlib_module_names) <= CORE | VENDORS[folder], name


# What a folder may import beside itself and the words.
NEIGHBOURS = {
    "accounting": set(),
    "transports": {"lru"},
    "storage": set(),
    "caching": {"lru", "resources", "transience", "storage", *PURE},
    "spool": {"storage", *PURE},
}


@pytest.mark.parametrize("folder", sorted(NEIGHBOURS))
def test_folders_do_not_reach_into_each_other(folder):
    for name, others in OURS.items():
        if name.split(".")[0] == folder:
            foreign = {other for other in others if other.split(".")[0] not in (folder, *WORDS)}
            assert {other for other in foreign if not {other, other.split(".")[0]} & NEIGHBOURS[folder]} == set(), name


def test_what_is_optional_is_imported_late():
    for name, path in MODULES.items():
        top = ast.parse(path.read_text()).body
        names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in top if isinstance(node, ast.ImportFrom)]
        optional = {"genai_prices", "opentelemetry", "prometheus_client", "pydantic", "redis", "tqdm", "uvloop"}
        assert not {module.split(".")[0] for module in names} & optional, name


def test_only_the_client_and_what_is_above_it_stack_concrete_parts():
    above = {"", "client", "cli", "__main__", "demo", "gateway", "testing"}
    for name, others in OURS.items():
        if name.split(".")[0] not in above:
            assert not others & {"client", "cli", "transports.openai_chat"}, name


def test_every_file_says_what_it_is_for():
    for name, path in MODULES.items():
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, name
        assert len(docstring) > 20, name


def test_all_public_names_are_exported_and_documented():
    for name in microbatch.__all__:
        assert getattr(microbatch, name).__doc__, name
