"""A server for one page, on 127.0.0.1 alone.

Its address has a secret path, so that other users of the machine cannot find it. Requests of other pages are refused:
a foreign `Host` (DNS rebinding), a foreign `Origin`, and a body that is not JSON, which a form of any page could send.
It serves the page's files and nothing else.
"""

import html
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject
from pipeline.system.signals import Interrupted

HOST = "127.0.0.1"
_FILES = Path(__file__).parent / "files"
MAX_BODY = 1_000_000  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Call = Callable[[JsonObject], JsonObject | Iterator[JsonObject]]


@dataclass(frozen=True)
class Site:
    """Name what a page consists of.

    Attributes:
        title: of the page.
        folder: has `page.html`, which is what the page's body holds, `page.js` and `page.css`. `style.css` of all pages
            comes before them.
        calls: functions by the name under which the page posts to them. Each takes the JSON object that was sent. It
            returns one, or an iterator of them, of which each is sent as a line of JSON as soon as it is there. One
            call runs at a time, in a thread. Its `UserError` reaches the page as `{"error": message}`, with status 400
            where no line was sent before.
    """

    title: str
    folder: Path
    calls: Mapping[str, Call]


def serve(site: Site, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C, which ends it as it should end. `port` 0 takes a free one.

    Raises:
        UserError: if the port is taken.
    """
    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        mend = "Take another one with --port, or leave the option out"
        raise UserError(f"cannot listen on {HOST}:{port}: {error.strerror}. {mend}") from None
    with listening:
        port = listening.getsockname()[1]
        token = secrets.token_urlsafe(18)
        app = application(site, token, port)
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1)
        try:
            say(f"http://{HOST}:{port}/{token}/")
            uvicorn.Server(config).run(sockets=[listening])
        except Interrupted:
            raise
        except KeyboardInterrupt:
            return


def application(site: Site, token: str, port: int) -> ASGIApp:
    """Return the site as an ASGI application, under the path `/TOKEN/`, for requests to that port."""
    busy = anyio.Lock()
    files = {"style.css": _FILES / "style.css"} | {name: site.folder / name for name in ("page.css", "page.js")}
    routes = [Route(f"/{token}/{name}", _sender(path)) for name, path in files.items()]
    routes.append(Route(f"/{token}/", lambda request: HTMLResponse(page_of(site))))
    routes += [Route(f"/{token}/{name}", _caller(call, busy), methods=["POST"]) for name, call in site.calls.items()]
    return _Guard(Starlette(routes=routes), port)


def page_of(site: Site) -> str:
    """Return the page as HTML: the head that all pages have, and the site's own body."""
    whole = Template((_FILES / "page.html").read_text(encoding="utf-8"))
    body = (site.folder / "page.html").read_text(encoding="utf-8")
    return whole.substitute(title=html.escape(site.title), body=body)


def _sender(path: Path) -> Callable[[Request], Response]:
    return lambda request: FileResponse(path)


def _caller(call: Call, busy: anyio.Lock) -> Callable[[Request], object]:
    """Return what answers a post with what `call` makes of it."""

    async def answer(request: Request) -> Response:
        try:
            body = json.loads(await request.body())
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return JSONResponse({"error": "the body is not a JSON object"}, 400)
        try:
            async with busy:
                result = await run_in_threadpool(call, body)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        if isinstance(result, dict):
            return JSONResponse(result)
        return StreamingResponse(_lines(request, result, busy), media_type="application/x-ndjson")

    return answer


async def _lines(request: Request, result: Iterator[JsonObject], busy: anyio.Lock) -> AsyncIterator[str]:
    """Yield the objects as lines. A page that is left meanwhile ends the iterator; one that was left begins none."""

    def following() -> JsonObject | None:
        try:
            return next(result, None)
        except UserError as error:
            return {"error": str(error)}

    async with busy:
        if await request.is_disconnected():  # starlette sees it only under some versions of the server's protocol
            return
        try:
            while (item := await run_in_threadpool(following)) is not None:
                yield json.dumps(item) + "\n"
        finally:
            close = getattr(result, "close", None)  # a generator's
            if close is not None:
                with anyio.CancelScope(shield=True):  # a page that was left cancels what is awaited here
                    await run_in_threadpool(close)


class _Guard:
    """Refuse what does not come from the page itself, and send our headers with every answer."""

    def __init__(self, app: ASGIApp, port: int):
        self._app = app
        self._hosts = {f"{name}:{port}" for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *ours]}
            await send(message)

        fault = self._fault(Request(scope))
        handler: ASGIApp = PlainTextResponse(fault, 403) if fault else self._app
        await handler(scope, receive, send_with_headers)

    def _fault(self, request: Request) -> str:
        """Return why a request is refused, or nothing."""
        headers = request.headers
        host = headers.get("host", "")
        if host not in self._hosts:
            return "this page is for a browser on this machine"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return "this page takes no requests of other pages"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "this page takes no requests of other pages"
        if request.method == "POST":
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return "a post must be application/json"
            length = headers.get("content-length", "")
            if not length.isdecimal() or int(length) > MAX_BODY:
                return f"a post must say its length, and have at most {MAX_BODY} bytes"
        return ""
