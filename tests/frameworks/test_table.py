"""The table of frameworks in the documentation; needs no framework."""

from __future__ import annotations

import pytest
from table import CLIENT, GATEWAY, MOST_CALLS, NO_ANSWER, documented, written


def test_every_mode_is_combined_by_the_gateway():
    through = {case: calls for case, calls in documented().items() if case[2] == GATEWAY}
    assert len(through) > 40
    assert {case for case, calls in through.items() if int(calls) > MOST_CALLS} == set()


@pytest.mark.parametrize(("right", "calls", "said"), [(16, 1, "1"), (16, 16, "16"), (0, 16, NO_ANSWER)])
def test_a_row_says_how_many_calls_were_made_or_that_nobody_was_answered(right, calls, said):
    _, _, line = written([("openai", "parse", CLIENT, right, calls, "")]).splitlines()
    assert line.startswith(f"| openai | parse | - | {said} | openai ")
