"""The flags of the commands that ask: what, whom, in which company, and what is shown meanwhile."""

from __future__ import annotations

import argparse

from microbatch.cli.flags import add_settings, described, number, whole_number
from microbatch.cli.simulated import SIMULATED_MODEL
from microbatch.policy import FallbackPolicy, FlushPolicy
from microbatch.spool.endpoint import GIVE_UP_AFTER

POLICY = """\
Bulk work waits for full batches; --max-wait, --low-max-wait, --idle and
--when-full are for live traffic and change nothing here.
"""


def add_question(group: argparse._ArgumentGroup) -> None:
    """Add what decides what is asked about a line of the input."""
    group.add_argument("--system", metavar="TEXT|@FILE", help="instructions, the same for every line")
    group.add_argument(
        "--template",
        metavar="TEXT",
        help=r"the question, with fields of the line in braces; \n and \t are newline and tab, {{ and }} are braces",
    )
    answers = group.add_mutually_exclusive_group()
    answers.add_argument(
        "--labels", metavar="A,B,C|@FILE", help="the only answers allowed; in a file one a line, or a JSON list"
    )
    answers.add_argument("--schema", metavar="FILE", help="a JSON Schema that every answer keeps to")
    group.add_argument("--id-field", metavar="FIELD", help="the field that holds a line's id")
    group.add_argument("--max-tokens", metavar="N", type=whole_number(1), help="most tokens of one answer")
    group.add_argument("--temperature", metavar="T", type=number(0), help="sampling temperature")


def add_endpoint(group: argparse._ArgumentGroup) -> None:
    """Add who is asked, and how fast."""
    group.add_argument("--model", metavar="NAME", help="the model; OpenAI Batch lines may name their own")
    group.add_argument(
        "--base-url", metavar="URL", help="address of the API, up to /v1 (default: OPENAI_BASE_URL, else OpenAI)"
    )
    group.add_argument("--rpm", metavar="N", type=whole_number(1), help="send at most N requests in any minute")
    group.add_argument(
        "--tpm",
        metavar="N",
        type=whole_number(1),
        help="send at most N tokens in any minute, prompts and the answers reserved for them together",
    )
    group.add_argument(
        "--simulate",
        action="store_true",
        help=f"ask a simulated endpoint on this machine: made-up answers, nothing paid (default model: {SIMULATED_MODEL})",
    )


def add_policy(group: argparse._ArgumentGroup) -> None:
    """Add what decides which requests share a prompt."""
    group.add_argument(
        "--single", action="store_true", help="one call for each item, to compare; same as --max-batch-size 1"
    )
    group.add_argument("--canary", action="store_true", help=f"{described(FallbackPolicy)['canary']} (default: off)")
    add_settings(group, FlushPolicy)


def add_patience(group: argparse._ArgumentGroup) -> None:
    """Add how long an endpoint that does not answer is waited for."""
    group.add_argument(
        "--give-up-after",
        metavar="SECONDS",
        type=number(0),
        default=GIVE_UP_AFTER,
        help="while nothing is answered, try again now and then, but leave the rest unasked after so long without a single "
        f"answer (default: {GIVE_UP_AFTER:g})",
    )


def add_telling(group: argparse._ArgumentGroup) -> None:
    """Add what is shown, and for whom."""
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None, help="show progress (default: on a terminal)"
    )
    group.add_argument(
        "--json", action="store_true", help="print the summary as a JSON object, the last line of stdout"
    )
