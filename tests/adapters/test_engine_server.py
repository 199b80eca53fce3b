"""The simulated engine's API, as a client of vLLM uses it."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise
from statistics import median
from typing import Any

import aiohttp
import pytest

from engines import DEADLINE_S, MODEL, running
from trimtab.engine_sim.model import Engine, EngineSpec, Sequence
from trimtab.engine_sim.server import EngineOptions, serve

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello there"}]
STUCK = 1e-6  # a speed at which no iteration ends while a test runs


async def test_a_completion_has_the_length_asked_for_and_tells_its_usage() -> None:
    async with running() as rig:
        status, answer = await rig.ask(prompt=[1, 2, 3], max_tokens=7, ignore_eos=True)

    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert answer["choices"][0]["text"] == " tok" * 7
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}
    assert usage.items() <= answer["usage"].items()


async def test_a_chat_answers_as_the_assistant() -> None:
    async with running() as rig:
        status, answer = await rig.ask(CHAT, messages=HELLO, max_tokens=4, ignore_eos=True)

    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"] == " tok" * 4
    assert answer["usage"]["prompt_tokens"] == 3  # eleven bytes


async def test_a_stream_brings_one_token_an_event_and_then_done() -> None:
    async with running() as rig:
        events = await rig.events(prompt="Hello", max_tokens=5, ignore_eos=True)

    assert {e["object"] for e in events} == {"text_completion"}
    assert len({(e["id"], e["created"], e["model"]) for e in events}) == 1
    assert [e["choices"][0]["text"] for e in events] == [" tok"] * 5
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 4 + ["length"]
    assert not any(e.get("usage") for e in events)


async def test_a_streamed_chat_first_says_who_speaks() -> None:
    async with running() as rig:
        events = await rig.events(CHAT, messages=HELLO, max_tokens=2, ignore_eos=True)

    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert [e["choices"][0]["delta"] for e in events] == [
        {"role": "assistant", "content": ""},
        {"content": " tok"},
        {"content": " tok"},
    ]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("path", "prompt"), [("", {"prompt": "Hi"}), (CHAT, {"messages": HELLO})])
async def test_usage_comes_as_a_last_event_when_asked_for(
    path: str, prompt: dict[str, Any]
) -> None:
    async with running() as rig:
        events = await rig.events(
            path or "/v1/completions",
            **prompt,
            max_tokens=3,
            ignore_eos=True,
            stream_options={"include_usage": True},
        )

    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 3
    assert not any(e.get("usage") for e in events[:-1])


async def test_a_stream_interval_sends_the_first_token_at_once_and_the_rest_in_groups() -> None:
    async with running(stream_interval=4) as rig:
        events = await rig.events(prompt="Hi", max_tokens=12, ignore_eos=True)

    assert [e["choices"][0]["text"].count("tok") for e in events] == [1, 4, 4, 3]


@pytest.mark.parametrize("stream_interval", [1, 3])
async def test_a_preempted_stream_still_brings_every_token_once(stream_interval: int) -> None:
    spec = EngineSpec(kv_capacity_tokens=100)
    async with running(spec=spec, stream_interval=stream_interval) as rig:
        streams = [rig.events(prompt=[0] * 40, max_tokens=30, ignore_eos=True) for _ in range(2)]
        answers = await asyncio.gather(*streams)
        preempted = await rig.value("vllm:num_preemptions_total")

    assert preempted >= 1
    for events in answers:
        assert sum(e["choices"][0]["text"].count("tok") for e in events) == 30


async def test_without_ignore_eos_the_length_follows_from_the_request() -> None:
    async with running(speed=1000.0) as one, running(speed=1000.0) as other:
        requests: list[dict[str, Any]] = [
            {"prompt": f"Question {i}", "max_tokens": 300} for i in range(20)
        ]
        here = [(await one.ask(**r))[1] for r in requests]
        there = [(await other.ask(**r))[1] for r in requests]
        seeded = (await one.ask(**requests[0], seed=1))[1]
        at_least = (await one.ask(**requests[0], min_tokens=300))[1]

    lengths = [answer["usage"]["completion_tokens"] for answer in here]
    assert lengths == [answer["usage"]["completion_tokens"] for answer in there]
    assert len(set(lengths)) > 10
    assert seeded["usage"]["completion_tokens"] != lengths[0]
    assert at_least["usage"]["completion_tokens"] == 300
    for answer, length in zip(here, lengths, strict=True):
        reason = answer["choices"][0]["finish_reason"]
        assert reason == ("length" if length == 300 else "stop")


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("", 0), ("Hell", 1), ("Hello", 2), ("äöü", 2), ([7] * 9, 9), (["Hello"], 2), ([[7] * 9], 9)],
)
async def test_a_prompt_is_counted_by_its_bytes_or_its_ids(prompt: object, tokens: int) -> None:
    async with running() as rig:
        status, answer = await rig.ask(prompt=prompt, max_tokens=1)

    if tokens:
        assert answer["usage"]["prompt_tokens"] == tokens
    else:
        assert status == 400


async def test_all_parts_of_all_messages_are_counted() -> None:
    parts = [{"type": "text", "text": "Hell"}, {"type": "image_url", "image_url": {"url": "x"}}]
    messages = [{"role": "system", "content": "Hell"}, {"role": "user", "content": parts}]
    async with running() as rig:
        _, answer = await rig.ask(CHAT, messages=messages, max_completion_tokens=1)

    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("body", "status", "kind", "param"),
    [
        (b"{", 400, "BadRequestError", None),
        (b"[]", 400, "BadRequestError", None),
        (b"{}", 400, "BadRequestError", "prompt"),
        (b'{"prompt": "x", "max_tokens": 0}', 400, "BadRequestError", "max_tokens"),
        (b'{"prompt": "x", "max_tokens": "many"}', 400, "BadRequestError", "max_tokens"),
        (b'{"prompt": "x", "n": 2}', 400, "BadRequestError", "n"),
        (b'{"prompt": "x", "min_tokens": 17}', 400, "BadRequestError", "min_tokens"),
        (b'{"prompt": [1, 2], "max_tokens": 999}', 400, "BadRequestError", "input_tokens"),
        (b'{"prompt": "x", "model": "huge"}', 404, "NotFoundError", "model"),
    ],
)
async def test_what_cannot_be_served_is_refused_in_the_form_of_vllm(
    body: bytes, status: int, kind: str, param: str | None
) -> None:
    spec = EngineSpec(kv_capacity_tokens=1000)
    async with running(spec=spec) as rig, rig.session.post("/v1/completions", data=body) as answer:
        error = (await answer.json())["error"]

    assert answer.status == error["code"] == status
    assert (error["type"], error["param"]) == (kind, param)
    assert error["message"]


async def test_a_request_id_comes_back_and_names_the_answer() -> None:
    headers = {"X-Request-Id": "abc-1"}
    async with running() as rig:
        for stream in (False, True):
            body = {"prompt": "Hi", "stream": stream}
            async with rig.session.post("/v1/completions", json=body, headers=headers) as answer:
                assert answer.headers["X-Request-Id"] == "abc-1"
                assert '"id":"cmpl-abc-1"' in await answer.text()


async def test_the_load_header_comes_on_whole_answers_only() -> None:
    async with running() as rig:
        seen = {}
        for form, stream in (("TEXT", False), ("JSON", False), ("TEXT", True)):
            async with rig.session.post(
                "/v1/completions",
                json={"prompt": "Hi", "stream": stream},
                headers={"endpoint-load-metrics-format": form},
            ) as answer:
                seen[form, stream] = answer.headers.get("endpoint-load-metrics")
                await answer.read()

    assert seen["TEXT", True] is None
    text, document = seen["TEXT", False], seen["JSON", False]
    assert text is not None
    assert "named_metrics.num_requests_waiting=0.0" in text
    assert document is not None
    assert json.loads(document.removeprefix("JSON "))["named_metrics"].keys() == {
        "kv_cache_usage_perc",
        "num_requests_waiting",
    }


async def test_the_other_endpoints_answer_as_vllm_does() -> None:
    async with running(spec=EngineSpec(kv_capacity_tokens=5000)) as rig:
        get = rig.session.get
        async with get("/v1/models") as answer:
            [card] = (await answer.json())["data"]
        assert (card["id"], card["max_model_len"]) == (MODEL, 5000)
        async with get("/version") as answer:
            assert await answer.json() == {"version": "0.32.0"}
        async with get("/load") as answer:
            assert await answer.json() == {"server_load": 0}
        for path in ("/health", "/ping"):
            async with get(path) as answer:
                assert (answer.status, await answer.read()) == (200, b"")
        async with get("/nowhere") as answer:
            assert answer.status == 404
        async with get("/v1/completions") as answer:
            assert answer.status == 405


async def test_an_old_client_gets_a_stream_without_chunks() -> None:
    async with running() as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.engine.port)
        body = b'{"prompt": "Hi", "stream": true, "max_tokens": 2, "ignore_eos": true}'
        writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(body)
        head, _, events = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    assert b"chunked" not in head
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


async def test_a_client_that_goes_away_while_waiting_frees_its_place() -> None:
    """The first request holds the only slot, so the second waits; neither sees a token."""
    async with running(speed=STUCK, spec=EngineSpec(max_sequences=1)) as rig:
        body = {"prompt": "Hi", "stream": True}
        first = await rig.session.post("/v1/completions", json=body)
        second = await rig.session.post("/v1/completions", json=body)
        assert await rig.value("vllm:num_requests_running") == 1
        assert await rig.value("vllm:num_requests_waiting") == 1

        second.close()
        await rig.until("vllm:num_requests_waiting", 0)
        first.close()
        await rig.until("vllm:num_requests_running", 0)

        assert await rig.value("vllm:kv_cache_usage_perc") == 0


async def test_a_client_that_goes_away_while_streaming_frees_its_slot() -> None:
    async with running(speed=1.0) as rig:
        body = {"prompt": "Hi", "stream": True, "max_tokens": 100_000, "ignore_eos": True}
        answer = await rig.session.post("/v1/completions", json=body)
        await answer.content.readuntil(b"\n\n")
        assert await rig.value("vllm:num_requests_running") == 1

        answer.close()

        await rig.until("vllm:num_requests_running", 0)
        assert await rig.value("vllm:kv_cache_usage_perc") == 0
        assert await rig.value("vllm:request_success_total", finished_reason="length") == 0


async def test_a_client_that_goes_away_while_waiting_for_a_whole_answer_frees_its_slot() -> None:
    async with running(speed=STUCK) as rig:
        task = asyncio.create_task(rig.ask(prompt="Hi"))
        await rig.until("vllm:num_requests_running", 1)

        task.cancel()

        await rig.until("vllm:num_requests_running", 0)


async def test_many_engines_serve_side_by_side() -> None:
    options = [EngineOptions(model=MODEL, speed=50.0) for _ in range(5)]
    async with serve(options) as fleet, aiohttp.ClientSession() as session:

        async def ask(url: str) -> int:
            async with session.post(f"{url}/v1/completions", json={"prompt": "Hi"}) as answer:
                return answer.status

        assert len(set(fleet.ports)) == 5
        assert await asyncio.gather(*(ask(e.url) for e in fleet.engines)) == [200] * 5
        assert [e.engine.counters.finished_total for e in fleet.engines] == [1] * 5


async def test_first_tokens_come_when_the_model_says() -> None:
    """The same arrivals through the pure model: timers, HTTP and the loop add only noise.

    The prompts need 1.1 s of prefill together, in iterations of up to 0.11 s; a request that
    arrives just before or just after the start of one may go into the other.
    """
    prompts_tokens = [5000, 100, 2500, 700, 1, 3000, 200, 1800, 400, 4000, 64, 5000]

    async def first_token_s(answer: aiohttp.ClientResponse) -> float:
        async with answer:
            await answer.content.readuntil(b"\n\n")
            return time.monotonic()

    async with running(speed=1.0) as rig, asyncio.timeout(DEADLINE_S):
        arrivals_s, tasks = [], []
        for tokens in prompts_tokens:
            body = {"prompt": [0] * tokens, "max_tokens": 40, "ignore_eos": True, "stream": True}
            answer = await rig.session.post("/v1/completions", json=body)  # accepted by now
            arrivals_s.append(time.monotonic())
            tasks.append(asyncio.create_task(first_token_s(answer)))
        firsts_s = await asyncio.gather(*tasks)

    measured_s = [first - arrived for first, arrived in zip(firsts_s, arrivals_s, strict=True)]
    expected_s = replay(arrivals_s, prompts_tokens, output_tokens=40)
    errors_s = [abs(m - e) for m, e in zip(measured_s, expected_s, strict=True)]
    assert max(expected_s) > 1.0
    assert median(errors_s) < 0.1
    assert max(errors_s) < 0.3


def replay(
    arrivals_s: list[float], prompts_tokens: list[int], *, output_tokens: int
) -> list[float]:
    """The times to first token that the model gives."""
    assert all(before <= after for before, after in pairwise(arrivals_s))
    engine = Engine()
    coming = [
        (at, Sequence(i, n, output_tokens))
        for i, (at, n) in enumerate(zip(arrivals_s, prompts_tokens, strict=True))
    ]
    ttft_s: dict[int, float] = {}
    now_s = arrivals_s[0]
    while coming or not engine.idle:
        while coming and coming[0][0] <= now_s:
            engine.submit(coming.pop(0)[1])
        if duration_s := engine.begin():
            now_s += duration_s
            for sequence in engine.end().first:
                ttft_s[sequence.id] = now_s - arrivals_s[sequence.id]
        elif coming:
            now_s = coming[0][0]
    return [ttft_s[i] for i in range(len(prompts_tokens))]
