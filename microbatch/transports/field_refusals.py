"""Refusals of what a request asks for beside its messages: fields that an endpoint does not take, and the place of a system message.

A 400, 404, 422 or 501 that names a field which was sent is about that field, in whatever words. Where it names nothing, the request's
form may be at fault nevertheless, which only trying tells.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from microbatch.transports.bound_refusals import read_refusal
from microbatch.transports.error_text import prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from microbatch.protocols import ChatCall
    from microbatch.transports.error_parsing import Fault

STATUSES: Final = frozenset({200, 400, 404, 422, 501})
MAX_TOKENS_NAMES: Final = ("max_tokens", "max_completion_tokens")
OPTIONAL: Final = frozenset({"stream", "stream_options", "temperature", "prompt_cache_key"})
"""Fields without which a call is much the same."""

_NOT_FOUND, _NOT_IMPLEMENTED = 404, 501
_AROUND: Final = 8  # characters before or after a name that make it part of a quotation

_UNSUPPORTED_CODES: Final = frozenset(
    {"unsupported_parameter", "unsupported_value", "unknown_parameter", "extra_forbidden", "UnsupportedParamsError"}
)
# LiteLLM passes OpenAI's words on without the fields: "...OpenAIException - Unsupported parameter: 'max_tokens' is not..." and
# has its own: "...UnsupportedParamsError: openai does not support parameters: ['temperature'], for model=..."
_UNSUPPORTED_ONE: Final = re.compile(r"(?i)unsupported (?:parameter|value): [`'\"](\w+)")
_UNSUPPORTED_LIST: Final = re.compile(r"does not support parameters: \[?([^\]\n]{1,200})")
# Words of servers that do not know a field, or do not take it; others speak of its value.
_UNKNOWN: Final = re.compile(
    r"(?i)\bun(?:known|recogni[sz]ed|expected|supported)|\bextra[_ ](?:inputs?|fields?|forbidden)|\b(?:not|n't|no longer) (?:be )?"
    r"(?:support|permit|allow|accept|recogni|implement|available)|\bdeprecated|\bcannot find field|\badditional propert|\binstead\b"
    r"|\bno such\b|\binvalid (?:parameter|argument|field|name)|\bremoved\b|\bnot a valid (?:parameter|field)"
)
_NAMED: Final[Mapping[str, re.Pattern[str]]] = {
    "stream_options": re.compile(r"(?i)\bstream[_ -]?options\b|\binclude[_ -]?usage\b"),
    "temperature": re.compile(r"(?i)\btemperature\b"),
    "prompt_cache_key": re.compile(r"\bprompt_cache_key\b"),
    "max_tokens": re.compile(r"\bmax_tokens\b"),
    "max_completion_tokens": re.compile(r"\bmax_completion_tokens\b"),
    "stream": re.compile(r"(?i)(?<![-\w])stream(?:s|ing|ed)?(?![-\w])"),
}
_FORMAT: Final = re.compile(
    r"(?i)response[ _-]?(?:format|schema)|\bjson[ _-]?(?:schemas?|objects?|mode)\b|\bjson (?:output|format|response)|\bgrammars?\b"
    r"|structured[ _-]?(?:outputs?|generation|responses?|decoding)|\bguided[ _-](?:json|decoding)"
    r"|\bconstrained[ _-](?:decoding|generation)|\boutput[ _]format\b|\b(?:invalid|unknown|unsupported) format\b"
)
# Response formats are supported and this schema is not. OpenAI: "Invalid schema for response_format 'answers': ..."; llama-server:
# "JSON schema conversion failed"; Groq: "minItems is not supported"; vLLM: "The provided JSON schema contains features not supported
# by xgrammar"; Gemini: "Unknown name "additionalProperties" at 'generation_config.response_schema'".
_SCHEMA: Final = re.compile(
    r"(?i)\b(?:invalid|unsupported) (?:json )?schema\b|\bschema (?:is )?(?:invalid|not valid|too )|schema conversion failed|"
    r"(?<!json_)\bschema (?:contains|has|uses|produces)\b|\bname \W?\w+\W? at '[^']*schema|"
    r"\b(?:(?:min|max)(?:Items|Length|Properties|imum)|exclusiveM(?:in|ax)imum|multipleOf|uniqueItems|prefixItems|pattern|"
    r"patternProperties|additionalProperties|anyOf|allOf|oneOf|\$ref|\$defs|const|enum)\b[`'\"]?:? (?:is|are) not "
    r"(?:supported|permitted|allowed)"
)
# DashScope: "This model only support stream mode, please enable the stream parameter", "parameter.enable_thinking must be set to
# false for non-streaming calls"; ChatGPT's backend: "Stream must be set to true".
_STREAMS_ONLY: Final = re.compile(
    r"(?i)\bnon[- ]?stream|\bonly (?:supports? |available (?:in|with|as) )?(?:the )?stream|"
    r"\bstream(?:ing)?[`'\"]?(?: mode| output| parameter)? (?:only|(?:is )?required|must be)|"
    r"\bstream[`'\"]? ?(?:=|to|as) ?[`'\"]?true|\b(?:enable|requires?|use|set) (?:the )?[`'\"]?stream"
)
# Chat templates, as servers quote them: "System message must be at the beginning", "Conversation roles must alternate
# user/assistant/user/assistant/...", "System role not supported", "Developer instruction is not enabled for models/...".
_SYSTEM: Final = re.compile(r"(?i)\bsystem\b|\broles?\b|\balternat|\bdeveloper instruction|\bchat[ _]?template")
_SOME_FIELD: Final = re.compile(
    r"(?i)\b(?:requested|unsupported|unknown|unrecogni[sz]ed|invalid|extra|these|some) (?:request )?"
    r"(?:parameters?|arguments?|fields?|inputs|options?)\b|\binvalid[_ ](?:parameter|argument)"
    r"|\b(?:parameters?|arguments?|fields?) (?:is|are) (?:invalid|not|un)"
)
# Gemini: "Invalid value at 'encoding_format'"; others: "base64 is not supported".
_ENCODING: Final = re.compile(r"(?i)\bencoding[ _-]?format\b|\bbase[ _-]?64\b")
_OF_EMBEDDINGS: Final = re.compile(
    r"(?i)\binputs?\b|\bdimensions?\b|\bmodels?\b|\bbatch|\btokens?\b|\btexts?\b|\bempty\b|\btoo (?:large|long|many)\b"
)
# Groq (json_validate_failed, tool_use_failed): the model's reply did not pass the endpoint's own check; another one may.
_BAD_REPLY: Final = re.compile(
    r"(?i)json_validate_failed|tool_use_failed|\b(?:failed|unable|could not|did not)(?: to)? (?:generate|produce|return|output)(?: a)?"
    r"(?: valid)? (?:json|structured|tool call)|\bmodel(?:'s)? (?:output|response|reply) (?:is|was|did|does) not (?:valid|match)"
)


class Refusal(msgspec.Struct, frozen=True):
    """The subject of a refusal.

    Attributes:
        fields: Fields that were sent and are not taken, by name.
        streams_only: Whether only streamed replies are offered.
        format: Whether the response format is not supported, or this schema, or neither is said.
        bad_reply: Whether the endpoint has rejected what its own model wrote.
        unclear: "some" if it is about some field that it does not name, "all" if it says nothing about anything in the request.
    """

    fields: frozenset[str] = frozenset()
    streams_only: bool = False
    format: str = ""
    bad_reply: bool = False
    unclear: Literal["", "some", "all"] = ""


class _Words:
    """The words of a refusal, without those that it quotes of the prompt: users write about temperatures and streams, too."""

    def __init__(self, text: str, contents: Iterable[Any]) -> None:
        self._text = " ".join(text.split())
        self._prompt = prompt_of(contents)

    def have(self, pattern: re.Pattern[str]) -> bool:
        """Return whether *pattern* is found outside quotations."""
        return any(not self._is_quoted(*found.span()) for found in pattern.finditer(self._text))

    def _is_quoted(self, start: int, end: int) -> bool:
        before, after = self._text[max(0, start - _AROUND) : end], self._text[start : end + _AROUND]
        whole = end - start + _AROUND  # else there is too little around it to tell
        return any(len(part) == whole and part in self._prompt for part in (before, after))


def read_fields(fault: Fault, sent: Iterable[str], call: ChatCall, *, streams: bool, bound: int) -> Refusal:
    """Return the subject of *fault*, the refusal of *call*.

    Args:
        fault: The refusal.
        sent: The fields in question that were sent.
        call: The call that was refused.
        streams: Whether a stream was asked for.
        bound: The limit on the reply that was sent, or 0.
    """
    text, params, words = fault.text, call.params, _Words(fault.text, _contents(call))
    if _BAD_REPLY.search(text):
        return Refusal(bad_reply=True)
    told = _told(fault)
    foreign = fault.param is not None and not any(
        pattern.search(fault.param) for pattern in (*_NAMED.values(), _FORMAT)
    )
    fields = {name for name in sent if name in told or (not foreign and words.have(_NAMED[name]))}
    unknown = _UNKNOWN.search(text) is not None
    if len(fields) > 1:
        fields.discard("stream")  # of several, the word that may be about something else
    streams_only = not streams and _STREAMS_ONLY.search(fault.message) is not None
    if "stream" in fields - told and not streams and (streams_only or not unknown):
        fields.discard("stream")  # it is sent as false
        streams_only = True
    if "temperature" in fields - told and not _is_usual(params.get("temperature")):
        fields.discard("temperature")
    if "prompt_cache_key" in fields - told and not unknown:
        fields.discard("prompt_cache_key")  # the caller's own is not sound
    for name in fields.intersection(MAX_TOKENS_NAMES) - told:
        limits = read_refusal(fault.message, fault.status, bound)
        if not unknown or (limits is not None and any(limit is not None for limit in msgspec.structs.astuple(limits))):
            fields.discard(name)  # the number is too large
    form = "schema" if words.have(_SCHEMA) else "format" if told & {"response_format"} or words.have(_FORMAT) else ""
    known = bool(form) or fault.param is not None or any(pattern.search(text) for pattern in _NAMED.values())
    known = known or any(re.search(rf"\b{re.escape(name)}\b", text) for name in params if name not in _NAMED)
    known = known or read_refusal(text, fault.status, bound) is not None
    some = fault.status == _NOT_IMPLEMENTED or _SOME_FIELD.search(text) is not None
    return Refusal(
        frozenset(fields),
        streams_only,
        form,
        unclear="" if known else "some" if some else "" if fault.status == _NOT_FOUND else "all",
    )


def names_system(fault: Fault, call: ChatCall) -> bool:
    """Return whether the refusal of *call* is about a system message, or about the template that places it."""
    return _Words(fault.text, _contents(call)).have(_SYSTEM)


def refuses_encoding(fault: Fault, inputs: Iterable[str]) -> bool | None:
    """Return whether the refusal of an embeddings call is about `encoding_format`; None if it says nothing about anything in the call.

    *inputs* are the texts of the call.
    """
    if "encoding_format" in {fault.param, *_told(fault)}:
        return True
    words = _Words(fault.text, inputs)
    if words.have(_ENCODING):
        return True
    return False if fault.param is not None or words.have(_OF_EMBEDDINGS) else None


def _contents(call: ChatCall) -> Iterable[Any]:
    return (message.get("content") for message in call.messages)


def _told(fault: Fault) -> set[str]:
    """Return the request fields that the endpoint expressly says it does not know or does not take."""
    names = set(_UNSUPPORTED_ONE.findall(fault.message))
    for group in _UNSUPPORTED_LIST.findall(fault.message):
        names.update(re.findall(r"\w+", group))
    if fault.code in _UNSUPPORTED_CODES and fault.param:
        names.add(fault.param)
    return names


def _is_usual(temperature: Any) -> bool:
    """Return whether OpenAI takes this temperature, so that a refusal of it is about the field and not about its value."""
    return isinstance(temperature, int | float) and 0 <= temperature <= 2  # noqa: PLR2004
