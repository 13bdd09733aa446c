"""The endpoint of these tests: a simulated one whose model does what the callers' own words ask for."""

from __future__ import annotations

import json
from typing import Any

from cities import model_answer

from microbatch.testing import Latency, SimulatedEndpoint


class ToolEndpoint(SimulatedEndpoint):
    """Answers in JSON where there is a schema, and where the messages before the question ask for it in words."""

    def __init__(self) -> None:
        super().__init__(answer=self._say, latency=Latency(first_token=0, tokens_per_second=0))
        self._in_words = False

    def read(self, body: dict[str, Any]) -> Any:
        # A test asks in one way only, so that the latest request tells.
        self._in_words = "json" in json.dumps(body["messages"][:-1]).lower()
        return super().read(body)

    def _say(self, text: str, schema: dict[str, Any] | None) -> Any:
        if schema is None and self._in_words:
            return json.dumps(model_answer(text, {}))
        return model_answer(text, schema)
