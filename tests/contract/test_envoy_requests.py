"""What a request looks like decides where it goes; nothing that a client sends is a crash."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from rig_envoy import MODEL, run_rig
from trimtab.envoy_config import BODY_LIMIT_BYTES, PoolRoute

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TWO_POOLS = {
    PoolRoute("small", models=("tiny", "mini")): [0],
    PoolRoute("large", hostnames=("large.example",)): [1],
}
TWO_MODELS = ("tiny", "large")
JSON = {"content-type": "application/json"}


def ask(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "hello", "max_tokens": 1, **more}


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 10_000):
        yield body[start : start + 10_000]


async def test_the_model_decides_between_pools() -> None:
    async with run_rig(TWO_MODELS, pools=TWO_POOLS) as rig:
        for model in TWO_MODELS:
            status, answer = await rig.gateway.post(ask(model))
            assert (status, answer["model"]) == (200, model)


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "application/JSON"])
async def test_spellings_of_the_media_type_make_no_difference(media_type: str) -> None:
    async with run_rig(TWO_MODELS, pools=TWO_POOLS) as rig:
        body = json.dumps(ask("tiny")).encode()
        status, _ = await rig.gateway.post(body, headers={"content-type": media_type})
        assert status == 200


async def test_the_path_and_the_host_decide_before_the_model() -> None:
    async with run_rig(TWO_MODELS, pools=TWO_POOLS) as rig:
        status, answer = await rig.gateway.post(ask("tiny"), path="/small/v1/completions")
        assert (status, answer["model"]) == (200, "tiny")
        status, answer = await rig.gateway.get("/v1/models", headers={"host": "LARGE.example:8000"})
        assert answer["data"][0]["id"] == "large"
        assert answer["data"][0]["owned_by"] != "trimtab"


async def test_an_unknown_model_gets_404_in_openai_form_with_the_models_there_are() -> None:
    async with run_rig(TWO_MODELS, pools=TWO_POOLS) as rig:
        status, answer = await rig.gateway.post(ask('gpt-"x"'))
        assert status == 404
        assert answer["error"] == {
            "message": 'The model `gpt-"x"` does not exist. '
            "The models served here are: tiny, mini, large.",
            "type": "NotFoundError",
            "param": "model",
            "code": 404,
        }


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'{"prompt": "no model"}', b'{"model": 7}', b"\xff\xfe"]
)
async def test_a_body_that_names_no_model_gets_4xx_in_openai_form(body: bytes) -> None:
    async with run_rig(TWO_MODELS, pools=TWO_POOLS) as rig:
        status, answer = await rig.gateway.post(body, headers=JSON)
        assert status in {400, 404}
        assert "tiny, mini, large" in answer["error"]["message"]


async def test_several_pools_list_the_models_of_all() -> None:
    async with run_rig(TWO_MODELS, pools=TWO_POOLS) as rig:
        status, answer = await rig.gateway.get("/v1/models")
        assert status == 200
        assert [model["id"] for model in answer["data"]] == ["tiny", "mini", "large"]
        assert {model["object"] for model in answer["data"]} == {"model"}


async def test_a_pool_that_is_alone_gets_everything() -> None:
    """Its engines answer unknown models and paths themselves."""
    async with run_rig() as rig:
        assert (await rig.gateway.post(ask(MODEL)))[0] == 200
        status, answer = await rig.gateway.post(ask("unknown"))
        assert status == 404
        assert "unknown" in answer["error"]["message"]
        assert (await rig.gateway.get("/version"))[0] == 200
        assert (await rig.gateway.get("/llama/version"))[0] == 200
        assert (await rig.gateway.post(b""))[0] in {400, 422}


@pytest.mark.parametrize("pools", [None, {PoolRoute(MODEL): [0], PoolRoute("other"): [1]}])
async def test_ten_megabytes_pass_whole_and_chunked(pools: dict[PoolRoute, list[int]]) -> None:
    async with run_rig(pools=pools) as rig:
        body = json.dumps(ask(MODEL, user="x" * 10_000_000)).encode()
        assert (await rig.gateway.post(body, headers=JSON))[0] == 200
        assert (await rig.gateway.post(in_pieces(body), headers=JSON))[0] == 200


async def test_a_small_chunked_body_passes() -> None:
    async with run_rig(TWO_MODELS, pools=TWO_POOLS) as rig:
        body = in_pieces(json.dumps(ask("large")).encode())
        assert (await rig.gateway.post(body, headers=JSON))[0] == 200


async def test_a_body_above_the_limit_gets_413_in_openai_form() -> None:
    async with run_rig() as rig:
        status, answer = await rig.gateway.post(b"x" * (BODY_LIMIT_BYTES + 1), headers=JSON)
        assert status == 413
        assert answer["error"]["type"] == "BadRequestError"


async def test_a_listener_without_a_pool_says_so_in_openai_form() -> None:
    async with run_rig([], pools={}) as rig:
        status, answer = await rig.gateway.get("/v1/models")
        assert status == 503
        assert "No pool" in answer["error"]["message"]


async def test_a_client_finds_its_request_id_at_the_engine_and_back() -> None:
    async with run_rig() as rig:
        url = f"{rig.gateway.url}/v1/models"
        async with rig.gateway.session.get(url, headers={"x-request-id": "mine"}) as answer:
            assert answer.headers["x-request-id"] == "mine"
