"""The server's application: all routes, the parsing of JSON bodies and the error handlers."""

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
MAX_JSON_DEPTH = 128  # nesting of arrays and objects in a body


class JsonRoute(APIRoute):
    """A route that parses its body as JSON, whatever its content type, and is cancelled when the client disconnects."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wraps FastAPI's handler: parses the body, cancels on disconnect, converts errors, lists ignored fields."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            """Answers a request; the header IGNORED_HEADER lists the parameters that had no effect."""
            ignored: list[str] = []
            parameters.IGNORED_BY_REQUEST.set(ignored)
            try:
                if request.method != "POST":
                    return await handler(request)
                if body := await request.body():  # parsed here with our limits; FastAPI reads the result
                    request._json = parse_json(body)
                response = await cancel_on_disconnect(request, handler(request))
                if ignored:
                    response.headers[parameters.IGNORED_HEADER] = ", ".join(ignored)
                return response
            except ClientDisconnected:
                return Response(status_code=499)
            except (RequestValidationError, HTTPException):
                raise
            # Handled here, because Starlette would raise it again after the response and close the connection.
            except Exception as error:
                return _handle_error(request, error)

        return handle


def parse_json(body: bytes) -> Any:
    """Parses a JSON body.

    Raises:
        APIError: 400, the body is not valid UTF-8 or JSON, is nested too deeply, or contains a single surrogate.
    """
    try:
        value = json.loads(body, parse_constant=_parse_number, parse_float=_parse_number)
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise APIError(400, f"the body is nested deeper than {MAX_JSON_DEPTH} levels") from error
    except ValueError as error:
        raise APIError(400, f"the body is not valid JSON: {error}") from error
    # Level by level instead of recursively: `values` are the containers' members at one depth.
    values, depth = [value], 0
    while values := [
        child
        for container in values
        if isinstance(container, dict | list)
        for child in (container.values() if isinstance(container, dict) else container)
    ]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise APIError(400, f"the body is nested deeper than {MAX_JSON_DEPTH} levels")
    if b"\\ud" in body or b"\\uD" in body:  # only such an escape can give a surrogate
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise APIError(400, "the body contains half of a surrogate pair, which is not a character") from error
    return value


def _parse_number(text: str) -> float:
    """Parses a number; raises ValueError for NaN and infinity, which Python's parser accepts but JSON does not have."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:32]} is not a JSON number, or too large")
    return value


def make_app(state: ServerState, access: AccessPolicy | None = None) -> AuthMiddleware:
    """Returns the server's ASGI application: the routes behind the authentication middleware."""
    return AuthMiddleware(make_routes(state)[0], access or AccessPolicy())


def make_routes(state: ServerState) -> tuple[FastAPI, Metrics]:
    """Returns the application behind the authentication middleware, and its metrics."""
    app = FastAPI(title="ktx", version=ktx.__version__, docs_url=None, redoc_url=None)
    metrics = Metrics(state)
    state.on_finished = metrics.record_finished
    routes = APIRouter(route_class=JsonRoute)
    _add_openai(routes, state)
    _add_adapters(routes, state)
    _add_responses(routes, state)
    _add_anthropic_and_ollama(routes, state)
    _add_monitoring(routes, state, metrics)
    app.include_router(routes)
    app.router.routes.extend(static.make_routes())
    app.add_exception_handler(RequestValidationError, _handle_invalid_request)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _handle_http_error)  # type: ignore[arg-type]
    return app, metrics


def _add_openai(routes: APIRouter, state: ServerState) -> None:
    """Adds OpenAI's models, chat completions and completions routes, and vLLM's tokenize routes."""

    def model(name: str) -> dict[str, Any]:
        """Returns the entry of a model or adapter, with the fields of OpenAI, vLLM (max_model_len) and Anthropic, which
        share this path.
        """
        loaded, parent = state.require_model(), state.names.first if state.names.adapter(name) else None
        return {
            "id": name,
            "object": "model",
            "created": state.created,
            "owned_by": "ktx",
            "root": loaded.path(name),
            "parent": parent,
            "max_model_len": loaded.engine.context,
            "type": "model",
            "display_name": name,
            "created_at": state.created_iso,
            "max_input_tokens": loaded.engine.context,
            "max_tokens": loaded.engine.context,
        }

    @routes.get("/v1/models")
    @routes.get("/v1/models/", include_in_schema=False)
    async def models() -> dict[str, Any]:
        names = state.names.all
        page_fields = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
        return {"object": "list", "data": [model(name) for name in names], **page_fields}

    @routes.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        state.names.check(name)
        return model(name)

    @routes.post(chat.PATH)
    async def chat_completions(fields: ChatCompletionRequest) -> Response:
        return await chat.answer(state.require_model(fields.model), fields)

    @routes.post(completions.PATH)
    async def plain_completions(fields: CompletionRequest) -> Response:
        return await completions.answer(state.require_model(fields.model), fields)

    @routes.post("/v1/embeddings")
    async def embeddings() -> Response:
        raise APIError(501, "this is a chat model; it provides no embeddings")

    @routes.post("/tokenize")
    async def tokenize(fields: TokenizeRequest) -> dict[str, Any]:
        return await tokenization.tokenize(state.require_model(fields.model), fields)

    @routes.post("/detokenize")
    async def detokenize(fields: DetokenizeRequest) -> dict[str, Any]:
        return await tokenization.detokenize(state.require_model(fields.model), fields)

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return tokenization.tokenizer_info(state.require_model())


def _add_adapters(routes: APIRouter, state: ServerState) -> None:
    """Adds the routes that load and unload LoRA adapters, as vLLM's, and that list them, as llama.cpp's."""

    @routes.post("/v1/load_lora_adapter")
    async def load_adapter(fields: LoadAdapter) -> Response:
        root = lora.adapter_root(state.settings)
        return await lora.load(state.require_model().engine, state.names, root, fields)

    @routes.post("/v1/unload_lora_adapter")
    async def unload_adapter(fields: UnloadAdapter) -> Response:
        lora.adapter_root(state.settings)
        return await lora.unload(state.require_model().engine, state.names, fields)

    @routes.get("/lora-adapters")
    async def listed_adapters() -> list[dict[str, Any]]:
        return lora.list_adapters(state.require_model())

    @routes.post("/lora-adapters")
    async def scale_adapters() -> Response:
        raise APIError(
            501,
            "the scale of an adapter cannot be set for all requests; use the adapter as the request's model, or add"
            " lora [{id, scale}] to the request",
        )


def _add_responses(routes: APIRouter, state: ServerState) -> None:
    """Adds the routes of OpenAI's Responses API; a stored response belongs to the API key that requested it."""

    @routes.post(serving.PATH)
    async def respond(fields: ResponsesRequest, request: Request) -> Response:
        return await serving.answer(state.require_model(fields.model), state.response_store, owner_of(request), fields)

    @routes.post("/v1/responses/input_tokens")
    async def input_tokens(fields: ResponseTokensRequest, request: Request) -> dict[str, Any]:
        return await serving.count(state.require_model(fields.model), state.response_store, owner_of(request), fields)

    @routes.get("/v1/responses/{name}")
    async def retrieve(name: str, request: Request, stream: bool = False) -> dict[str, Any]:
        return stored_responses.retrieve(state.response_store, owner_of(request), name, stream)

    @routes.delete("/v1/responses/{name}")
    async def delete(name: str, request: Request) -> dict[str, Any]:
        return stored_responses.delete(state.response_store, owner_of(request), name)

    @routes.get("/v1/responses/{name}/input_items")
    async def input_items(
        name: str,
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(max_length=256)] = None,
    ) -> dict[str, Any]:
        # the input items of a stored response, in pages of `limit` items
        return stored_responses.input_items(
            state.response_store, owner_of(request), name, limit, order == "desc", after
        )

    @routes.post("/v1/responses/{name}/cancel")
    async def cancel(name: str, request: Request) -> dict[str, Any]:
        return stored_responses.cancel(state.response_store, owner_of(request), name)


def _add_anthropic_and_ollama(routes: APIRouter, state: ServerState) -> None:
    """Adds Anthropic's and Ollama's routes."""

    @routes.post(messages.PATH)
    async def anthropic(fields: MessagesRequest) -> Response:
        return await messages.answer(state.require_model(fields.model), fields)

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(fields: CountTokensRequest) -> Response:
        return await messages.count(state.require_model(fields.model), fields)

    @routes.post("/api/chat")
    async def ollama_chat(fields: OllamaChat) -> Response:
        return await ollama.chat(state.require_model(fields.model), fields)

    @routes.post("/api/generate")
    async def ollama_generate(fields: OllamaGenerate) -> Response:
        return await ollama.generate(state.require_model(fields.model), fields)

    @routes.post("/api/show")
    async def show(fields: OllamaShow) -> dict[str, Any]:
        return ollama.show_model(state.require_model(fields.model or fields.name or ""), state.created_iso, fields)

    @routes.post("/api/embed")
    @routes.post("/api/embeddings")
    async def ollama_embeddings() -> Response:
        raise APIError(501, "this is a chat model; it provides no embeddings")

    @routes.head("/api/tags", include_in_schema=False)
    @routes.get("/api/tags")
    async def tags() -> dict[str, Any]:
        return ollama.list_models(state.require_model(), state.created_iso)

    @routes.get("/api/ps")
    async def ps() -> dict[str, Any]:
        return ollama.list_loaded_models(state.require_model())

    @routes.head("/api/version", include_in_schema=False)
    @routes.get("/api/version")
    async def version() -> dict[str, str]:
        return {"version": ollama.VERSION}


def _add_monitoring(routes: APIRouter, state: ServerState, metrics: Metrics) -> None:
    """Adds /health (whether the engine can answer), /metrics (Prometheus' format) and /machine (for the web page)."""
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


def _error_response(request: Request, error: APIError) -> JSONResponse:
    """Returns an error in the format of the route's protocol."""
    message = error.message.encode("utf-8", "replace").decode()[:4096]
    headers = {"retry-after": str(error.retry)} if error.retry else None
    body = error_body(request.url.path, error.status, message, error.code, error.param, error.details)
    return JSONResponse(body, error.status, headers)


def _handle_error(request: Request, error: Exception) -> JSONResponse:
    """Converts an exception to an error response; logs it if it is a bug."""
    api_error = to_api_error(error)
    if api_error.status == 500:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error_response(request, api_error)


async def _handle_invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
    """Reports the first invalid field.

    A field with several types has one error per type; the one with the longest path is the closest match.
    """
    errors = error.errors()
    unknown_fields = [item for item in errors if item["type"] == "extra_forbidden"]
    first = max(errors, key=lambda item: len(item["loc"])) if not unknown_fields else unknown_fields[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body")
    if unknown_fields:
        message = f"{param}: this server has no such field"
    elif first["type"] == "parameter":  # of ktx.server.protocol.parameters, with a text of ours
        message, param = str(first["msg"]), first["ctx"]["name"]
    elif first["type"] == "missing":
        message = f"{param}: is missing"
    elif first["type"] == "none_required":
        message = f"{param}: this server does not support it"
    else:
        reason = str(first["msg"]).removeprefix("Value error, ")
        message = f"{param}: {reason}" if param else reason
    return _error_response(request, APIError(400, message, param or None))


async def _handle_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Converts Starlette's errors, such as an unknown route."""
    message = str(error.detail)
    if error.status_code == 404:
        message = f"no such route: {request.url.path}"
    return _error_response(request, APIError(error.status_code, message))
