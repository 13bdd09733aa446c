"""The order of folders and modules: imports go down, none go in circles, vendors stay where they belong, files stay readable."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

import microbatch

HOME = Path(microbatch.__file__).parent

FOUNDATION = (
    *("messages", "errors", "checking", "policy", "protocols"),
    *("lru", "transience", "containment", "resources", "thoughts", "template"),
)
LAYERS = (
    *FOUNDATION,
    *("schema", "prompt", "accounting", "audit", "storage"),
    *("transports", "batching", "embedding"),
    "caching, spool, spending",
    "semantic",
    *("assembly", "bulk", "binding", "forwarding", "live_answer", "client", "blocking", "ray", "calibration"),
    "listening",
    *("openai", "gateway"),
    "demo, testing",
    *("cli", "__main__"),
)
"""Folders and top-level modules from the bottom up. Each may import those below, and none on its own level (one string)."""

CORE = {"msgspec"}
VENDORS = {
    "blocking": {"anyio"},
    "accounting": {"anyio", "genai_prices", "opentelemetry", "prometheus_client", "tiktoken"},
    "batching": {"anyio"},
    "embedding": {"anyio"},
    "cli": {"pyarrow", "tqdm", "uvloop"},
    "gateway": {"aiohttp"},
    "listening": {"aiohttp"},
    "semantic": {"anyio", "numpy", "usearch"},
    "spending": {"anyio"},
    "spool": {"anyio"},
    "storage": {"anyio", "redis"},
    "testing": {"aiohttp", "tiktoken"},
    "transports": {"aiohttp", "anyio", "multidict", "yarl"},
}
OPTIONAL = {
    *("genai_prices", "numpy", "opentelemetry", "prometheus_client", "pyarrow", "pydantic", "redis", "tqdm", "usearch"),
    "uvloop",
}

WAITING = {"anyio", "asyncio", "concurrent", "selectors", "signal", "socket", "ssl", "subprocess", "threading", "time"}
"""What a pure module does not import: it is told the time, and waits for nothing."""

# Below the client, only these know a clock, tasks, threads or sockets.
IMPURE = {
    "accounting": {"live", "otel", "prices", "tokens"},
    "batching": {
        "admission",
        "audits",
        "call_state",
        "dispatch",
        "engine",
        "fallback",
        "intake",
        "lane_table",
        "scheduler",
    },
    "blocking": {""},
    "ray": {""},
    "bulk": {""},
    "caching": {"answer_cache", "guard", "memory", "sqlite"},
    "resources": {""},
    "spool": {
        *("endpoint", "spool_client", "sqlite", "worker"),
        *("provider.api", "provider.input_file", "provider.output_file", "provider.worker"),
    },
    "embedding": {"embedder", "recovery"},
    "forwarding": {""},
    "live_answer": {""},
    "semantic": {"checks", "embedding", "index", "look_ups", "older"},
    "spending": {"spending"},
    "storage": {"coalescer", "redis", "sqlite"},
    "transports": {
        "accounts",
        "api_key",
        "attempt",
        "chat_wire",
        "connection",
        "embeddings",
        "first_form",
        "http",
        "limit_store",
        "openai_chat",
        "relay",
        "retry",
    },
}

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_BATCHING_FILES = 26

RANK = {name: rank for rank, level in enumerate(LAYERS) for name in level.split(", ")}
RANK[""] = len(LAYERS)  # the package itself


def modules():
    for path in sorted(HOME.rglob("*.py")):
        name = ".".join(path.relative_to(HOME).with_suffix("").parts)
        yield name.removesuffix(".__init__") if name != "__init__" else "", path


MODULES = dict(modules())


def top(name):
    return name.partition(".")[0]


@cache
def tree(name):
    return ast.parse(MODULES[name].read_text())


def imports(name, *, at_run_time=False):
    """Return the modules that a module imports, those for type checkers left out if *at_run_time*."""
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
            submodules = {each for each in inner if each.removeprefix("microbatch.") in MODULES}
            found.update(submodules if submodules == inner else {node.module, *submodules})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(name))
    return found


def foreign(name):
    """Return the packages outside this one that a module imports at run time."""
    return {top(each) for each in imports(name, at_run_time=True)} - {"microbatch"}


@cache
def ours():
    """Return the modules of this package that each module imports, those for type checkers included."""
    return {
        name: {
            "" if each == "microbatch" else each.removeprefix("microbatch.")
            for each in imports(name)
            if top(each) == "microbatch"
        }
        for name in MODULES
    }


def test_every_folder_and_top_level_module_has_its_place():
    assert {top(name) for name in MODULES} <= RANK.keys()


def test_imports_go_down():
    upwards = sorted(
        (name, other)
        for name, others in ours().items()
        for other in others
        if top(name) != top(other) and RANK[top(other)] >= RANK[top(name)]
    )
    assert upwards == []


def test_the_lists_above_hold_nothing_that_is_gone():
    assert {
        ".".join(filter(None, (folder, name))) for folder, names in IMPURE.items() for name in names
    } <= MODULES.keys()
    assert RANK.keys() == {top(name) for name in MODULES}


@pytest.mark.parametrize(
    ("folder", "below"), [("accounting", set()), ("storage", set()), ("transports", {"storage.redis"})]
)
def test_some_folders_stand_on_the_foundation_alone(folder, below):
    others = {
        other for name, others in ours().items() if top(name) == folder for other in others if top(other) != folder
    }
    assert {other for other in others if top(other) not in FOUNDATION} == below


def test_only_the_client_and_what_is_above_it_know_the_concrete_transport():
    knowing = {name for name, others in ours().items() if "transports.openai_chat" in others}
    assert {name for name in knowing if RANK[top(name)] < RANK["client"]} == set()


def cycle():
    """Return modules that import each other in a circle, imports for type checkers included; none if there is no circle."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            path.append(name)
            for other in sorted(ours()[name] & MODULES.keys()):
                if found := visit(other):
                    return found
            path.pop()
            done.add(name)
        return []

    return next(filter(None, map(visit, MODULES)), [])


def test_no_import_cycles_not_even_for_type_checkers():
    assert cycle() == []


@pytest.mark.parametrize("folder", sorted({*IMPURE, *FOUNDATION, "prompt", "schema"}))
def test_pure_modules_neither_wait_nor_know_the_time(folder):
    impure = {".".join(filter(None, (folder, name))) for name in IMPURE.get(folder, ())}
    assert {name for name in MODULES if top(name) == folder and foreign(name) & WAITING} <= impure


def test_each_folder_knows_its_own_vendors_only():
    known = set(sys.stdlib_module_names) | CORE
    foreigners = {name: foreign(name) - known - VENDORS.get(top(name), set()) for name in MODULES}
    assert {name: found for name, found in foreigners.items() if found} == {}


def test_what_is_optional_is_imported_late():
    for name in MODULES:
        body = tree(name).body
        names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in body if isinstance(node, ast.ImportFrom)]
        assert not {top(module) for module in names} & OPTIONAL, name


def test_no_module_is_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_MODULE_LINES} == {}


def test_no_function_is_long():
    lengths = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name in MODULES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def test_batching_is_a_folder_one_can_survey():
    files = [name for name in MODULES if name.startswith("batching.")]
    assert len(files) <= MAX_BATCHING_FILES, files


def test_every_module_has_a_docstring():
    assert [name for name in MODULES if len(ast.get_docstring(tree(name)) or "") <= 20] == []


def test_all_public_names_are_exported_and_documented():
    for name in microbatch.__all__:
        assert getattr(microbatch, name).__doc__, name
