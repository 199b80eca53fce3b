"""What an engine hears and says over HTTP: OpenAI requests in, vLLM's forms of answers out.

Simulated tokens carry no meaning, only length: a text prompt has one token for every four bytes
of UTF-8 (begun ones count), a prompt of token ids as many as it has ids, and every output token
reads " tok". With `ignore_eos` an answer has exactly `max_tokens`; without it a length is drawn
from the prompt and the seed, so that the same request gets the same answer from every engine.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from http import HTTPStatus
from statistics import NormalDist
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

BYTES_PER_TOKEN = 4  # of English text, about, with the vocabularies of current models
OUTPUT_TEXT = " tok"
DRAWN_MEDIAN_TOKENS, DRAWN_SIGMA = 150, 0.8  # answers of a chat: log-normal
DONE = b"data: [DONE]\n\n"

ERROR_TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.SERVICE_UNAVAILABLE: "Service Unavailable",
}


class ApiError(Exception):
    """A refusal in vLLM's form: `{"error": {"message", "type", "param", "code"}}`."""

    def __init__(self, status: HTTPStatus, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = json.dumps(
            {
                "error": {
                    "message": message,
                    "type": ERROR_TYPES[status],
                    "param": param,
                    "code": status.value,
                }
            },
            separators=(",", ":"),
        ).encode()


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of request share; unknown fields are ignored, as vLLM does."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    seed: int | None = None
    n: Annotated[int | None, Field(ge=1, le=1)] = None
    """One answer a request: parallel sampling is not simulated."""


class CompletionRequest(_Request):
    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=1)]
    )
    max_tokens: Annotated[int | None, Field(ge=1)] = 16


class ContentPart(BaseModel):
    type: str = "text"
    text: str = ""


class Message(BaseModel):
    role: str
    content: str | list[ContentPart] | None = None


class ChatRequest(_Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request as the engine sees it: two lengths, and how the answer is wanted."""

    chat: bool
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    stream: bool
    include_usage: bool

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        return "length" if self.output_tokens == self.max_tokens else "stop"


def parse(body: bytes, *, chat: bool, model: str, max_model_len: int) -> Ask:
    """Read a request's body.

    Raises:
        ApiError: not JSON, fields missing or wrong, another model, or more tokens than fit.
    """
    try:
        request = (ChatRequest if chat else CompletionRequest).model_validate_json(body)
    except ValidationError as error:
        where = error.errors()[0]["loc"]
        raise ApiError(
            HTTPStatus.BAD_REQUEST, complaints(error), str(where[0]) if where else None
        ) from None
    if request.model is not None and request.model != model:
        raise ApiError(
            HTTPStatus.NOT_FOUND, f"The model `{request.model}` does not exist.", "model"
        )
    prompt = _text(request) if isinstance(request, ChatRequest) else _single(request.prompt)
    prompt_bytes = prompt.encode() if isinstance(prompt, str) else repr(prompt).encode()
    prompt_tokens = (
        max(1, math.ceil(len(prompt_bytes) / BYTES_PER_TOKEN))
        if isinstance(prompt, str)
        else len(prompt)
    )
    max_tokens = request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = max(1, max_model_len - prompt_tokens)
    if prompt_tokens + max_tokens > max_model_len:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"This model's maximum context length is {max_model_len} tokens. However, you"
            f" requested {max_tokens} output tokens and your prompt contains {prompt_tokens}"
            f" input tokens, for a total of {prompt_tokens + max_tokens} tokens. Please reduce"
            " the length of the input prompt or the number of requested output tokens.",
            "input_tokens",
        )
    if request.min_tokens > max_tokens:
        raise ApiError(
            HTTPStatus.BAD_REQUEST,
            f"min_tokens must be less than or equal to max_tokens={max_tokens},"
            f" got {request.min_tokens}.",
            "min_tokens",
        )
    drawn_tokens = (
        max_tokens if request.ignore_eos else _draw_tokens(prompt_bytes, seed=request.seed)
    )
    return Ask(
        chat=chat,
        prompt_tokens=prompt_tokens,
        output_tokens=min(max(drawn_tokens, request.min_tokens, 1), max_tokens),
        max_tokens=max_tokens,
        stream=request.stream,
        include_usage=request.stream_options is not None and request.stream_options.include_usage,
    )


def complaints(error: ValidationError) -> str:
    """Say in one line which fields are wrong, and how."""
    return "; ".join(
        ".".join(str(step) for step in complaint["loc"])
        + ": " * bool(complaint["loc"])
        + complaint["msg"]
        for complaint in error.errors(include_url=False, include_context=False)
    )


def _single(prompt: str | list[int] | list[str] | list[list[int]]) -> str | list[int]:
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        return prompt[0]
    return prompt


def _text(request: ChatRequest) -> str:
    """All that is said, without the template a real engine would put around it."""
    return "".join(
        message.content
        if isinstance(message.content, str)
        else "".join(part.text for part in message.content or ())
        for message in request.messages
    )


def _draw_tokens(prompt: bytes, *, seed: int | None) -> int:
    digest = hashlib.blake2b(prompt + repr(seed).encode(), digest_size=8).digest()
    quantile = (int.from_bytes(digest) + 0.5) / 2**64
    return math.ceil(DRAWN_MEDIAN_TOKENS * math.exp(DRAWN_SIGMA * NormalDist().inv_cdf(quantile)))


class Answer:
    """The JSON forms of one answer, whole or in server-sent events.

    The parts that do not change are put together once: a busy fleet sends tens of thousands of
    events a second.
    """

    def __init__(self, ask: Ask, *, request_id: str, model: str, created: int) -> None:
        self._ask = ask
        self.id = f"{'chatcmpl' if ask.chat else 'cmpl'}-{request_id}"
        kind = "chat.completion" if ask.chat else "text_completion"
        chunk = "chat.completion.chunk" if ask.chat else "text_completion"
        head = f'{{"id":{json.dumps(self.id)},"object":"%s","created":{created},"model":'
        self._whole = (head % kind) + json.dumps(model)
        self._event = "data: " + (head % chunk) + json.dumps(model)

    def event(self, tokens: int, *, last: bool) -> bytes:
        """The server-sent event that brings `tokens` more of the text."""
        text = OUTPUT_TEXT * tokens
        reason = f'"{self._ask.finish_reason}","stop_reason":null' if last else "null"
        if self._ask.chat:
            choice = f'{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":'
            return f'{self._event},"choices":[{choice}{reason},"token_ids":null}}]}}\n\n'.encode()
        if not last:
            reason = 'null,"stop_reason":null'
        choice = f'{{"index":0,"text":"{text}","logprobs":null,"finish_reason":{reason}'
        tail = ',"prompt_token_ids":null,"token_ids":null}]}\n\n'
        return f'{self._event},"choices":[{choice}{tail}'.encode()

    def opening(self) -> bytes:
        """What precedes the first token's event: a chat says who speaks."""
        if not self._ask.chat:
            return b""
        choice = (
            '{"index":0,"delta":{"role":"assistant","content":""},'
            '"logprobs":null,"finish_reason":null}'
        )
        return f'{self._event},"choices":[{choice}],"prompt_token_ids":null}}\n\n'.encode()

    def closing(self) -> bytes:
        """What follows the last token's event."""
        if not self._ask.include_usage:
            return DONE
        return f'{self._event},"choices":[],"usage":{self._usage()}}}\n\n'.encode() + DONE

    def whole(self) -> bytes:
        text = OUTPUT_TEXT * self._ask.output_tokens
        if self._ask.chat:
            said = (
                f'"message":{{"role":"assistant","content":"{text}","refusal":null,'
                '"annotations":null,"audio":null,"function_call":null,"tool_calls":[],'
                '"reasoning":null}'
            )
        else:
            said = f'"text":"{text}"'
        choice = (
            f'{{"index":0,{said},"logprobs":null,"finish_reason":"{self._ask.finish_reason}",'
            '"stop_reason":null,"token_ids":null}'
        )
        usage = f'{self._usage()[:-1]},"prompt_tokens_details":null}}'
        return f'{self._whole},"choices":[{choice}],"usage":{usage}}}'.encode()

    def _usage(self) -> str:
        ask = self._ask
        return (
            f'{{"prompt_tokens":{ask.prompt_tokens},'
            f'"total_tokens":{ask.prompt_tokens + ask.output_tokens},'
            f'"completion_tokens":{ask.output_tokens}}}'
        )


def models(model: str, *, max_model_len: int, created: int) -> bytes:
    """The answer to `GET /v1/models`."""
    card = {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "vllm",
        "root": model,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [],
    }
    return json.dumps({"object": "list", "data": [card]}, separators=(",", ":")).encode()
