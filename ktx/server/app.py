"""The routes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import ktx
from ktx.server import lora, static
from ktx.server.anthropic import messages
from ktx.server.auth import AccessPolicy, AuthMiddleware, owner_of
from ktx.server.errors import APIError, error_body, to_api_error
from ktx.server.metrics import Metrics
from ktx.server.ollama import routes as ollama
from ktx.server.openai import chat, completions
from ktx.server.openai import tokenize as tokenization
from ktx.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    CountTokensRequest,
    DetokenizeRequest,
    LoadAdapter,
    MessagesRequest,
    OllamaChat,
    OllamaGenerate,
    OllamaShow,
    ResponsesRequest,
    ResponseTokensRequest,
    TokenizeRequest,
    UnloadAdapter,
    parameters,
)
from ktx.server.responses import routes as stored_responses
from ktx.server.responses import serving
from ktx.server.state import ServerState
from ktx.server.stats import MachineStats
from ktx.server.streaming import ClientDisconnected, cancel_on_disconnect

log = logging.getLogger("ktx.server")
MAX_JSON_DEPTH = 128  # of brackets in a body


class JsonRoute(APIRoute):
    """Reads the body as JSON before anything is made of it, whatever its sender calls it. Ends what it does for a client that leaves."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def read(request: Request) -> Response:
            ignored: list[str] = []
            parameters.IGNORED_BY_REQUEST.set(ignored)
            try:
                if request.method != "POST":
                    return await handler(request)
                if body := await request.body():
                    request._json = parse_json(body)
                answer = await cancel_on_disconnect(request, handler(request))
                if ignored:
                    answer.headers[parameters.IGNORED_HEADER] = ", ".join(ignored)
                return answer
            except ClientDisconnected:
                return Response(status_code=499)
            except (RequestValidationError, HTTPException):
                raise
            except (
                Exception
            ) as error:  # told here: Starlette would raise it again behind the answer, and the connection end
                return _problem(request, error)

        return read


def parse_json(body: bytes) -> Any:
    """Problem 400 for what is no JSON, is nested too deeply, or holds halves of characters."""
    try:
        value = json.loads(body, parse_constant=_number, parse_float=_number)
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body is no UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise APIError(400, f"the body is nested deeper than {MAX_JSON_DEPTH} levels") from error
    except ValueError as error:
        raise APIError(400, f"the body is no JSON: {error}") from error
    level, depth = [value], 0
    while level := [
        inner
        for one in level
        if isinstance(one, dict | list)
        for inner in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise APIError(400, f"the body is nested deeper than {MAX_JSON_DEPTH} levels")
    if b"\\ud" in body or b"\\uD" in body:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise APIError(400, "the body holds half of a surrogate pair, which is no character") from error
    return value


def _number(text: str) -> float:
    """ValueError for what JSON has no number for, such as NaN, which Python reads and could not write again."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:32]} is no number of JSON's, or too large")
    return value


def make_app(state: ServerState, access: AccessPolicy | None = None) -> AuthMiddleware:
    """The whole server as one ASGI application."""
    return AuthMiddleware(make_routes(state)[0], access or AccessPolicy())


def make_routes(state: ServerState) -> tuple[FastAPI, Metrics]:
    """What stands behind the guard."""
    app = FastAPI(title="ktx", version=ktx.__version__, docs_url=None, redoc_url=None)
    metrics = Metrics(state)
    state.on_finished = metrics.finished
    routes = APIRouter(route_class=JsonRoute)
    _openai(routes, state)
    _adapters(routes, state)
    _responses(routes, state)
    _others(routes, state)
    _state(routes, state, metrics)
    app.include_router(routes)
    app.router.routes.extend(static.routes())
    app.add_exception_handler(RequestValidationError, _invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http)  # type: ignore[arg-type]
    return app, metrics


def _openai(routes: APIRouter, state: ServerState) -> None:
    def model(name: str) -> dict[str, Any]:
        """As OpenAI tells of it, with vLLM's length, and as Anthropic does: both have this path."""
        engine, _, _ = state.require_ready()
        return {
            "id": name,
            "object": "model",
            "created": state.created,
            "owned_by": "ktx",
            "root": state.path_of(name),
            "parent": state.models[0] if state.adapter_of(name) else None,
            "max_model_len": engine.context,
            "type": "model",
            "display_name": name,
            "created_at": state.created_iso,
            "max_input_tokens": engine.context,
            "max_tokens": engine.context,
        }

    @routes.get("/v1/models")
    @routes.get("/v1/models/", include_in_schema=False)
    async def models() -> dict[str, Any]:
        more = {"has_more": False, "first_id": state.names[0], "last_id": state.names[-1]}
        return {"object": "list", "data": [model(name) for name in state.names], **more}

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return model(state.resolve_model(name))

    @routes.post("/v1/chat/completions")
    async def chat_completions(fields: ChatCompletionRequest, request: Request) -> Any:
        return await chat.answer(state, fields, request)

    @routes.post("/v1/completions")
    async def plain_completions(fields: CompletionRequest, request: Request) -> Any:
        return await completions.answer(state, fields, request)

    @routes.post("/v1/embeddings")
    async def embeddings() -> Any:
        raise APIError(501, "this is a chat model, it makes no embeddings")

    @routes.post("/tokenize")
    async def tokenize(fields: TokenizeRequest) -> dict[str, Any]:
        return await tokenization.tokenize(state, fields)

    @routes.post("/detokenize")
    async def detokenize(fields: DetokenizeRequest) -> dict[str, Any]:
        return await tokenization.detokenize(state, fields)

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return tokenization.info(state)


def _adapters(routes: APIRouter, state: ServerState) -> None:
    @routes.post("/v1/load_lora_adapter")
    async def load_adapter(fields: LoadAdapter) -> Response:
        return await lora.load(state, fields)

    @routes.post("/v1/unload_lora_adapter")
    async def unload_adapter(fields: UnloadAdapter) -> Response:
        return await lora.unload(state, fields)

    @routes.get("/lora-adapters")
    async def listed_adapters() -> list[dict[str, Any]]:
        return lora.list_adapters(state)

    @routes.post("/lora-adapters")
    async def scale_adapters() -> Any:
        raise APIError(
            501,
            "adapters are not scaled for all requests at once: name one as the request's model, or give the request lora [{id, scale}]",
        )


def _responses(routes: APIRouter, state: ServerState) -> None:
    @routes.post("/v1/responses")
    async def respond(fields: ResponsesRequest, request: Request) -> Any:
        return await serving.answer(state, fields, request)

    @routes.post("/v1/responses/input_tokens")
    async def input_tokens(fields: ResponseTokensRequest, request: Request) -> Any:
        return await serving.count(state, fields, request)

    @routes.get("/v1/responses/{name}")
    async def retrieve(name: str, request: Request, stream: bool = False) -> Any:
        return stored_responses.retrieve(state.response_store, owner_of(request), name, stream)

    @routes.delete("/v1/responses/{name}")
    async def delete(name: str, request: Request) -> Any:
        return stored_responses.delete(state.response_store, owner_of(request), name)

    @routes.get("/v1/responses/{name}/input_items")
    async def input_items(
        name: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(max_length=256)] = None,
    ) -> Any:
        return stored_responses.input_items(state.response_store, owner_of(request), name, limit, order == "desc", after)

    @routes.post("/v1/responses/{name}/cancel")
    async def cancel(name: str, request: Request) -> Any:
        return stored_responses.cancel(state.response_store, owner_of(request), name)


def _others(routes: APIRouter, state: ServerState) -> None:
    @routes.post("/v1/messages")
    async def anthropic(fields: MessagesRequest, request: Request) -> Any:
        return await messages.answer(state, fields, request)

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(fields: CountTokensRequest) -> Any:
        return await messages.count(state, fields)

    @routes.post("/api/chat")
    async def ollama_chat(fields: OllamaChat, request: Request) -> Any:
        return await ollama.chat(state, fields, request)

    @routes.post("/api/generate")
    async def ollama_generate(fields: OllamaGenerate, request: Request) -> Any:
        return await ollama.generate(state, fields, request)

    @routes.post("/api/show")
    async def show(fields: OllamaShow) -> dict[str, Any]:
        return ollama.show(state, fields)

    @routes.post("/api/embed")
    @routes.post("/api/embeddings")
    async def ollama_embeddings() -> Any:
        raise APIError(501, "this is a chat model, it makes no embeddings")

    @routes.head("/api/tags", include_in_schema=False)
    @routes.get("/api/tags")
    async def tags() -> dict[str, Any]:
        return ollama.tags(state)

    @routes.get("/api/ps")
    async def ps() -> dict[str, Any]:
        return ollama.ps(state)

    @routes.head("/api/version", include_in_schema=False)
    @routes.get("/api/version")
    async def version() -> dict[str, str]:
        return {"version": ollama.VERSION}


def _state(routes: APIRouter, state: ServerState, metrics: Metrics) -> None:
    machine = MachineStats(state)

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def health() -> JSONResponse:
        status, body = state.health()
        return JSONResponse(body, status)

    @routes.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/machine")
    async def machine_stats() -> Response:
        return Response(to_json(machine.snapshot()), media_type="application/json")


def _respond(request: Request, problem: APIError) -> JSONResponse:
    message = problem.message.encode("utf-8", "replace").decode()[:4096]
    headers = {"retry-after": str(problem.retry)} if problem.retry else None
    body = error_body(request.url.path, problem.status, message, problem.code, problem.param, problem.details)
    return JSONResponse(body, problem.status, headers)


def _problem(request: Request, error: Exception) -> JSONResponse:
    problem = to_api_error(error)
    if problem.status == 500:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _respond(request, problem)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """The first thing that is wrong, by its place. Of several types that a field may have, the nearest fit is told."""
    found = error.errors()
    unknown = [one for one in found if one["type"] == "extra_forbidden"]
    first = max(found, key=lambda one: len(one["loc"])) if not unknown else unknown[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    if unknown:
        message = f"{place}: this server knows no such field"
    elif first["type"] == "parameter":
        message, place = str(first["msg"]), first["ctx"]["name"]
    elif first["type"] == "missing":
        message = f"{place}: is missing"
    elif first["type"] == "none_required":
        message = f"{place}: this server does not offer it"
    else:
        words = str(first["msg"]).removeprefix("Value error, ")
        message = f"{place}: {words}" if place else words
    return _respond(request, APIError(400, message, place or None))


async def _http(request: Request, error: HTTPException) -> JSONResponse:
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is nothing at {request.url.path}"
    return _respond(request, APIError(error.status_code, message))
