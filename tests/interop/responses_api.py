"""A model that follows a script: the streaming half of OpenAI's Responses API, on loopback.

It is what stands in for the model when a released `codex` runs in the tests. Each `POST …/responses` takes
the next turn of the script and is answered as a server-sent event stream; every body is recorded, so that a
test reads from the last one what the tools gave back.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import h11
import trio
from attrs import define, field, frozen


@frozen
class FunctionCall:
    """A tool call by the model: its name, its arguments (sent as JSON text), and its namespace if any."""

    name: str
    arguments: Mapping[str, object]
    namespace: str | None = None


@frozen
class ModelRequest:
    """The decoded body of one request to the model."""

    body: Mapping[str, Any]

    @property
    def tool_names(self) -> list[str]:
        """Names of the tools offered to the model."""
        return [str(tool.get("name", tool["type"])) for tool in self.body.get("tools", [])]

    @property
    def tool_outputs(self) -> list[str]:
        """The text each tool call of the conversation gave back, in the order of the calls.

        Raises:
            KeyError: If a call of the conversation has no output (yet).
        """
        items = self.body["input"]
        outputs = {i["call_id"]: _text(i["output"]) for i in items if i["type"] == "function_call_output"}
        return [outputs[i["call_id"]] for i in items if i["type"] == "function_call"]


Reply: TypeAlias = str | FunctionCall | Sequence[FunctionCall]
"""What the model answers: a final message, one tool call, or several at once."""

Turn: TypeAlias = Reply | Callable[[ModelRequest], Reply | Awaitable[Reply]]
"""A reply, or a function (maybe async) that makes it from the request it answers."""


@define(eq=False)
class ScriptedModel:
    """A running scripted model: `url` is the API's base (`http://127.0.0.1:PORT/v1`)."""

    url: str
    _script: list[Turn]
    requests: list[ModelRequest] = field(factory=list)

    @property
    def tool_outputs(self) -> list[str]:
        """`ModelRequest.tool_outputs` of the last request; empty before the first one."""
        return self.requests[-1].tool_outputs if self.requests else []

    async def next_reply(self, request: ModelRequest) -> Reply:
        """Record `request` and give the script's next reply; a script at its end says so as a message."""
        self.requests.append(request)
        turn = self._script.pop(0) if self._script else "The script is over."
        if not callable(turn):
            return turn
        reply = turn(request)
        return await reply if inspect.isawaitable(reply) else reply


@asynccontextmanager
async def serve_responses(turns: Iterable[Turn]) -> AsyncIterator[ScriptedModel]:
    """Serve a model that follows `turns` on a free loopback port until the block is left.

    An exception of a callable turn is raised out of the block (in a group): the script is part of the test.
    """
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    model = ScriptedModel(f"http://127.0.0.1:{port}/v1", list(turns))
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, partial(_serve_connection, model), listeners)
        yield model
        nursery.cancel_scope.cancel()


async def _serve_connection(model: ScriptedModel, stream: trio.SocketStream) -> None:
    """Answer the requests of one connection; a client that goes away ends it quietly."""
    try:
        await _Connection(model, stream).serve()
    except (trio.BrokenResourceError, h11.RemoteProtocolError):
        pass  # the client was killed or dropped the connection at its end: the requests before it count
    finally:
        await trio.aclose_forcefully(stream)


@define(eq=False)
class _Connection:
    """One HTTP/1.1 connection of the client."""

    _model: ScriptedModel
    _stream: trio.SocketStream
    _http: h11.Connection = field(factory=lambda: h11.Connection(h11.SERVER))

    async def serve(self) -> None:
        while True:
            request = await self._next_event()
            if not isinstance(request, h11.Request):
                return
            body = await self._read_body()
            await self._answer(request, body)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _answer(self, request: h11.Request, body: bytes) -> None:
        if (request.method, request.target) != (b"POST", b"/v1/responses"):
            await self._send(404, b"text/plain", b"only POST /v1/responses is scripted")
            return
        number = len(self._model.requests)
        reply = await self._model.next_reply(ModelRequest(json.loads(body)))
        await self._send(200, b"text/event-stream", _event_stream(number, reply))

    async def _read_body(self) -> bytes:
        parts = []
        while isinstance(event := await self._next_event(), h11.Data):
            parts.append(bytes(event.data))
        return b"".join(parts)

    async def _next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                await self._send_event(h11.InformationalResponse(status_code=100, headers=[]))
            self._http.receive_data(await self._stream.receive_some(65536))
        return event

    async def _send(self, status: int, content_type: bytes, body: bytes) -> None:
        headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body))]
        await self._send_event(h11.Response(status_code=status, headers=headers))
        await self._send_event(h11.Data(data=body))
        await self._send_event(h11.EndOfMessage())

    async def _send_event(self, event: h11.Event) -> None:
        await self._stream.send_all(self._http.send(event) or b"")


def _event_stream(number: int, reply: Reply) -> bytes:
    """The whole reply as server-sent events: created, one `output_item.done` per item, completed."""
    response_id = f"resp_{number}"
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    events: list[dict[str, object]] = [{"type": "response.created", "response": {"id": response_id}}]
    events += [{"type": "response.output_item.done", "item": item} for item in _items(number, reply)]
    events.append({"type": "response.completed", "response": {"id": response_id, "usage": usage}})
    return "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events).encode()


def _items(number: int, reply: Reply) -> list[dict[str, object]]:
    if isinstance(reply, str):
        content = [{"type": "output_text", "text": reply}]
        return [{"type": "message", "role": "assistant", "id": f"msg_{number}", "content": content}]
    calls = [reply] if isinstance(reply, FunctionCall) else reply
    return [
        {
            "type": "function_call",
            "call_id": f"call_{number}_{index}",
            "name": call.name,
            "arguments": json.dumps(dict(call.arguments)),
            **({} if call.namespace is None else {"namespace": call.namespace}),
        }
        for index, call in enumerate(calls)
    ]


def _text(output: str | list[Mapping[str, Any]]) -> str:
    """The text of a tool output, which is a string or a list of content items."""
    if isinstance(output, str):
        return output
    return "".join(item.get("text", "") for item in output)
