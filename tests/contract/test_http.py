"""Contract of HTTP: what an environment sends, what comes back, and what is said when nothing does."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from execenv import Environment, FromVariable, HttpFailed, HttpResponse, UsageError
from tests.conftest import SERVER_VARIABLES
from tests.http_origin import GZIPPED, PIECE, Received, open_origin

SECRET = "s3cret"


def echoed(response: HttpResponse) -> Any:
    assert response.status == 200
    return json.loads(response.body)


def common(received: Received) -> dict[str, str]:
    """The headers that nobody asked for."""
    return {name.lower(): value for name, value in received.headers if not name.lower().startswith("x-")}


# What is sent.


async def test_nothing_is_added_but_accept_and_host(environment: Environment) -> None:
    async with open_origin() as origin:
        response = await environment.http.request("GET", origin.url("/echo?a=b#fragment"))
        (received,) = origin.received
    assert echoed(response)["target"] == "/echo?a=b"
    assert common(received) == {"accept": "*/*", "host": f"127.0.0.1:{origin.port}"}
    assert response.header("Content-Type") == "application/json"
    assert response.header("content-length") == str(len(response.body))


async def test_headers_keep_repeats_and_their_order(environment: Environment) -> None:
    async with open_origin() as origin:
        pairs = [("X-One", "1"), ("x-one", "2"), ("X-Empty", ""), ("X-Word", "é"), ("Accept", "text/plain")]
        await environment.http.request("GET", origin.url("/echo"), headers=pairs)
        await environment.http.request("GET", origin.url("/echo"), headers={"X-Map": "yes", "Host": "h.test"})
        first, second = origin.received
    assert first.values("x-one") == ["1", "2"]
    assert first.values("x-empty") == [""]
    assert first.values("x-word") == ["é".encode().decode("latin-1")]
    assert first.values("accept") == ["text/plain"]
    assert (second.values("x-map"), second.values("host")) == (["yes"], ["h.test"])


async def test_body_is_sent_as_it_is(environment: Environment) -> None:
    body = bytes(range(256)) * 4096
    async with open_origin() as origin:
        await environment.http.request("POST", origin.url("/echo"), body=body)
        await environment.http.request("POST", origin.url("/echo"), body=b"")
        first, second = origin.received
    assert (first.method, first.body, first.values("content-length")) == ("POST", body, [str(len(body))])
    assert (second.method, second.body) == ("POST", b"")


async def test_method_is_sent_as_it_is(environment: Environment) -> None:
    async with open_origin() as origin:
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "FOO", "get"):
            await environment.http.request(method, origin.url("/echo"))
        assert [one.method for one in origin.received] == ["PUT", "DELETE", "PATCH", "OPTIONS", "FOO", "get"]


async def test_credentials_of_the_url_become_basic_authentication(environment: Environment) -> None:
    async with open_origin() as origin:
        await environment.http.request("GET", origin.url("/echo", host="u:p%3A@127.0.0.1"))
        (received,) = origin.received
    assert received.values("authorization") == ["Basic dTpwOg=="]
    assert received.target == "/echo"


async def test_header_may_end_with_a_variable_of_the_environment(environment: Environment) -> None:
    async with open_origin() as origin:
        headers = {"X-Key": FromVariable("CONTRACT_SECRET", "Bearer ")}
        await environment.http.request("GET", origin.url("/echo"), headers=headers)
        (received,) = origin.received
        assert received.values("x-key") == ["Bearer " + SERVER_VARIABLES["CONTRACT_SECRET"]]
        with pytest.raises(HttpFailed, match="requires executor environment variable NOT_THERE") as caught:
            await environment.http.request(
                "GET", origin.url("/echo"), headers={"X-Key": FromVariable("NOT_THERE")}
            )
        assert caught.value.kind == "invalid"
        assert len(origin.received) == 1


# What comes back.


async def test_any_status_is_a_response(environment: Environment) -> None:
    async with open_origin() as origin:
        for status in (200, 201, 400, 404, 500, 503):
            response = await environment.http.request("GET", origin.url(f"/status/{status}"))
            assert (response.status, response.body) == (status, b"text")
        for status in (204, 304):
            response = await environment.http.request("GET", origin.url(f"/status/{status}"))
            assert (response.status, response.body) == (status, b"")


async def test_headers_come_back_in_lower_case_with_their_repeats(environment: Environment) -> None:
    async with open_origin() as origin:
        response = await environment.http.request("GET", origin.url("/headers"))
    names = sorted(response.headers)
    assert names == [("content-length", "2"), ("x-a", "1"), ("x-a", "2"), ("x-b", "between"), ("x-empty", "")]


async def test_response_to_head_has_no_body(environment: Environment) -> None:
    async with open_origin() as origin:
        response = await environment.http.request("HEAD", origin.url("/status/200"))
    assert (response.status, response.body, response.header("content-length")) == (200, b"", "4")


async def test_body_is_not_decompressed(environment: Environment) -> None:
    async with open_origin() as origin:
        response = await environment.http.request("GET", origin.url("/gzip"))
    assert response.body == GZIPPED
    assert gzip.decompress(response.body) == b"zipped text"


async def test_large_body_is_complete(environment: Environment) -> None:
    async with open_origin() as origin:
        response = await environment.http.request("GET", origin.url(f"/bytes/{len(PIECE) * 64 + 1}"))
    assert response.body == PIECE * 64 + PIECE[:1]


async def test_body_may_be_chunked_or_end_with_the_connection(environment: Environment) -> None:
    async with open_origin() as origin:
        assert (await environment.http.request("GET", origin.url("/chunked"))).body == b"chunk0chunk1chunk2"
        assert (await environment.http.request("GET", origin.url("/until-close"))).body == b"to the end"


async def test_connections_are_used_again(environment: Environment) -> None:
    async with open_origin() as origin:
        for _ in range(3):
            await environment.http.request("GET", origin.url("/chunked"))
            async with environment.http.stream("GET", origin.url("/chunked")) as response:
                await response.read()
        assert len(origin.received) == 6
        assert origin.connections < 6  # the reference may ask for the next before the last is free


# Streams.


async def test_stream_gives_pieces_while_they_arrive(environment: Environment) -> None:
    async with open_origin() as origin, environment.http.stream("GET", origin.url("/held")) as response:
        assert (response.status, response.header("Transfer-Encoding")) == (200, "chunked")
        for piece in (b"one", b"two"):
            origin.send_held(piece)
            assert await response.receive() == piece
        origin.send_held(b"")
        assert await response.receive() == b""
        assert await response.receive() == b""


async def test_stream_is_complete_and_in_order(environment: Environment) -> None:
    async with open_origin() as origin:
        async with environment.http.stream("GET", origin.url(f"/bytes/{len(PIECE) * 256}")) as response:
            assert await response.read() == PIECE * 256
        async with environment.http.stream("GET", origin.url("/status/204")) as response:
            assert [piece async for piece in response] == []


async def test_streams_do_not_wait_for_each_other(environment: Environment) -> None:
    async with open_origin() as origin, environment.http.stream("GET", origin.url("/held")):
        async with environment.http.stream("GET", origin.url("/bytes/100000")) as response:
            assert len(await response.read()) == 100_000
        assert (await environment.http.request("GET", origin.url("/echo"))).status == 200


async def test_block_may_be_left_in_the_middle_of_a_body(environment: Environment) -> None:
    async with open_origin() as origin:
        async with environment.http.stream("GET", origin.url("/held")) as response:
            origin.send_held(b"one")
            assert await response.receive() == b"one"
        with pytest.raises(trio.ClosedResourceError):
            await response.receive()
        assert (await environment.http.request("GET", origin.url("/echo"))).status == 200


# Redirects.


async def test_redirect_of_a_get_is_followed(environment: Environment) -> None:
    async with open_origin() as origin:
        for status in (301, 302, 303, 307, 308):
            url = origin.url(f"/redirect/{status}?to=/echo")
            response = await environment.http.request("GET", url, headers={"X-Kept": "yes"})
            assert echoed(response)["method"] == "GET"
            assert origin.received[-1].values("x-kept") == ["yes"]
            assert origin.received[-1].values("referer") == [url]


async def test_redirect_makes_a_get_of_a_post_unless_its_status_keeps_it(environment: Environment) -> None:
    async with open_origin() as origin:
        for status, method, redirected in (
            (301, "POST", "GET"),
            (302, "POST", "GET"),
            (303, "POST", "GET"),
            (307, "POST", "POST"),
            (308, "POST", "POST"),
            (302, "PUT", "PUT"),
            (303, "PUT", "GET"),
            (303, "HEAD", "HEAD"),
        ):
            body = None if method == "HEAD" else b"body"
            await environment.http.request(
                method,
                origin.url(f"/redirect/{status}?to=/echo"),
                body=body,
                headers={"Content-Type": "text/x"},
            )
            last = origin.received[-1]
            kept = redirected == method and body is not None
            assert (last.method, last.body) == (redirected, b"body" if kept else b""), (status, method)
            assert last.values("content-type") == (
                ["text/x"] if redirected == method and status != 303 else []
            )


async def test_redirect_to_another_server_takes_no_secrets_along(environment: Environment) -> None:
    secret = {"Authorization": SECRET, "Cookie": SECRET, "Proxy-Authorization": SECRET, "X-Kept": "yes"}
    async with open_origin() as origin, open_origin() as other:
        where = origin.url(f"/redirect/307?to={other.url('/echo')}")
        await environment.http.request("POST", where, body=b"body", headers=secret)
        await environment.http.request("GET", origin.url("/redirect/302?to=/echo"), headers=secret)
        (there,) = other.received
    assert (there.method, there.body, there.values("x-kept")) == ("POST", b"body", ["yes"])
    assert SECRET not in str(there.headers)
    assert there.values("referer") == [origin.url("/")]
    assert origin.received[-1].values("authorization") == [SECRET]


async def test_redirects_are_not_followed_if_so_asked(environment: Environment) -> None:
    async with open_origin() as origin:
        url = origin.url("/redirect/302?to=/echo")
        response = await environment.http.request("GET", url, follow_redirects=False)
        assert (response.status, response.header("location")) == (302, "/echo")
        assert len(origin.received) == 1


async def test_redirect_that_leads_nowhere_is_the_response(environment: Environment) -> None:
    async with open_origin() as origin:
        for path in ("/redirect/302", "/redirect/302?to=http://[", "/redirect/300?to=/echo"):
            response = await environment.http.request("GET", origin.url(path))
            assert (response.status // 100, response.body) == (3, b"moved")


async def test_ten_redirects_are_followed_and_no_more(environment: Environment) -> None:
    async with open_origin() as origin:
        assert (await environment.http.request("GET", origin.url("/redirects/10"))).status == 200
        with pytest.raises(HttpFailed, match="too many redirects") as caught:
            await environment.http.request("GET", origin.url("/redirects/11"))
        assert caught.value.kind == "redirect"
        with pytest.raises(HttpFailed, match="unsupported URL scheme: ftp") as caught:
            await environment.http.request("GET", origin.url("/redirect/302?to=ftp://x/"))
        assert caught.value.kind == "redirect"


# Failures.


async def test_server_that_does_not_answer_well_is_a_failure(environment: Environment) -> None:
    async with open_origin() as origin:
        unused = f"http://u:{SECRET}@127.0.0.1:1/path?key={SECRET}#{SECRET}"
        for url in (unused, origin.url("/hang-up"), origin.url("/garbage"), origin.url(scheme="https")):
            with pytest.raises(HttpFailed, match="no response came") as caught:
                await environment.http.request("GET", url)
            assert caught.value.kind == "request"
            assert SECRET not in f"{caught.value} {caught.value.__cause__} {caught.value.url}"
        assert caught.value.url == origin.url(scheme="https")


async def test_body_that_breaks_off_is_a_failure(environment: Environment) -> None:
    async with open_origin() as origin:
        for path in ("/cut", "/cut-chunked"):
            with pytest.raises(HttpFailed, match="the body broke off") as caught:
                await environment.http.request("GET", origin.url(path))
            assert caught.value.kind == "body"
            async with environment.http.stream("GET", origin.url(path)) as response:
                assert await response.receive() == b"12345"
                with pytest.raises(HttpFailed, match="the body broke off") as caught:
                    await response.receive()
            assert caught.value.kind == "body"


async def test_timeout_is_for_headers_and_body_together(environment: Environment) -> None:
    async with open_origin() as origin:
        for path in ("/silent", "/half", "/redirect/302?to=/silent"):
            with pytest.raises(HttpFailed, match=r"not finished within 0\.2 s") as caught:
                await environment.http.request("GET", origin.url(path), timeout=0.2)
            assert caught.value.kind == "timeout"
        async with environment.http.stream("GET", origin.url("/half"), timeout=0.5) as response:
            assert await response.receive() == b"12345"
            with pytest.raises(HttpFailed) as caught:
                await response.receive()
        assert caught.value.kind == "timeout"
        with pytest.raises(HttpFailed) as caught:
            await environment.http.request("GET", origin.url("/echo"), timeout=0)
        assert caught.value.kind == "timeout"
        assert (await environment.http.request("GET", origin.url("/echo"), timeout=20)).status == 200


async def test_request_that_cannot_be_is_refused(environment: Environment) -> None:
    async with open_origin() as origin:
        url = origin.url("/echo")
        for method, where, headers, reason in (
            ("G T", url, {}, "method is invalid"),
            ("", url, {}, "method is invalid"),
            ("GET", "nope", {}, "relative URL without a base"),
            ("GET", "http://", {}, "empty host"),
            ("GET", "http://h:99999/", {}, "invalid port number"),
            ("GET", "ftp://x/", {}, "only supports http and https URLs, got ftp"),
            ("GET", url, {"a b": "1"}, "header name is invalid"),
            ("GET", url, {"a": "1\n2"}, "header value is invalid for a"),
        ):
            with pytest.raises(HttpFailed, match=reason) as caught:
                await environment.http.request(method, where, headers=headers)
            assert caught.value.kind == "invalid"
        assert origin.received == []


async def test_wrong_calls_say_what_is_right(environment: Environment) -> None:
    with pytest.raises(UsageError, match="bytes, not str"):
        await environment.http.request("POST", "http://127.0.0.1:1/", body="text")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="seconds"):
        await environment.http.request("POST", "http://127.0.0.1:1/", timeout=-1)
    async with (
        open_origin() as origin,
        environment.http.stream("GET", origin.url("/held")) as response,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(response.receive)
        await wait_all_tasks_blocked()
        with pytest.raises(UsageError, match="another task is reading"):
            await response.receive()
        origin.send_held(b"piece")


async def test_reading_goes_on_after_a_cancelled_wait(environment: Environment) -> None:
    async with open_origin() as origin, environment.http.stream("GET", origin.url("/held")) as response:
        for piece in (b"one", b"two"):
            with trio.move_on_after(0.02) as scope:
                await response.receive()
            assert scope.cancelled_caught
            origin.send_held(piece)
            assert await response.receive() == piece
