"""A small MCP server with one tool, `where`: over stdio as a program, and over streamable HTTP here.

`where` gives back its argument, and the directory or the headers that tell where the call came in.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import h11
import trio
from attrs import define, field

STDIO_PROGRAM = """
import json, os, sys

RESULTS = {
    "initialize": lambda p: {
        "protocolVersion": p["protocolVersion"],
        "capabilities": {"tools": {}},
        "serverInfo": {"name": "there", "version": "1"},
    },
    "tools/list": lambda p: {"tools": [{"name": "where", "inputSchema": {"type": "object"}}]},
    "tools/call": lambda p: {
        "content": [{"type": "text", "text": p["arguments"]["text"] + " from " + os.getcwd()}]
    },
}
for line in sys.stdin:
    message = json.loads(line)
    if "id" in message:
        result = RESULTS.get(message["method"], lambda p: {})(message.get("params"))
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"""


@define(eq=False)
class HttpMcpServer:
    """A running server: `url` is its endpoint, `requests` the headers of the requests it has had."""

    url: str
    requests: list[dict[str, str]] = field(factory=list)

    def result(self, method: str, params: Any) -> Any:
        if method == "initialize":
            return {
                "protocolVersion": params["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "there", "version": "1"},
            }
        if method == "tools/list":
            return {"tools": [{"name": "where", "inputSchema": {"type": "object"}}]}
        if method == "tools/call":
            return {"content": [{"type": "text", "text": params["arguments"]["text"] + " over HTTP"}]}
        return {}


@asynccontextmanager
async def serve_mcp() -> AsyncIterator[HttpMcpServer]:
    """Serve on a free loopback port until the block is left. Calls of tools are answered as event streams."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    server = HttpMcpServer(f"http://127.0.0.1:{port}/mcp")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, partial(_serve, server), listeners)
        yield server
        nursery.cancel_scope.cancel()


async def _serve(server: HttpMcpServer, stream: trio.SocketStream) -> None:
    http = h11.Connection(h11.SERVER)

    async def next_event() -> Any:
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(await stream.receive_some(65536))
        return event

    async def answer(status: int, content_type: str, body: bytes) -> None:
        headers = [("content-type", content_type), ("content-length", str(len(body)))]
        for event in (
            h11.Response(status_code=status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            await stream.send_all(http.send(event) or b"")

    try:
        while isinstance(request := await next_event(), h11.Request):
            server.requests.append({name.decode(): value.decode() for name, value in request.headers})
            body = b""
            while isinstance(event := await next_event(), h11.Data):
                body += event.data
            if request.method != b"POST":
                await answer(405, "text/plain", b"")
            else:
                message = json.loads(body)
                if "id" not in message:
                    await answer(202, "application/json", b"")
                else:
                    result = server.result(message["method"], message.get("params"))
                    text = json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result})
                    if message["method"] == "tools/call":
                        await answer(200, "text/event-stream", f"event: message\ndata: {text}\n\n".encode())
                    else:
                        await answer(200, "application/json", text.encode())
            if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                return
            http.start_next_cycle()
    except (trio.BrokenResourceError, h11.RemoteProtocolError):
        pass  # the client was killed or dropped the connection
    finally:
        await trio.aclose_forcefully(stream)
