"""The server of a page: for this machine alone, for its own page alone, and for no other file."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from pipeline.system.errors import UserError
from pipeline.web import server
from pipeline.web.server import Site, serve

closed = []


def echo(body):
    if "fault" in body:
        raise UserError(body["fault"])
    return {"got": body}


def count(body):
    try:
        for number in range(body["to"]):
            if number == body.get("fault_at"):
                raise UserError("no further")
            yield {"number": number}
            time.sleep(body.get("seconds", 0))
    finally:
        closed.append(body["to"])


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Port and secret path of a server at work."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in (("page.html", "<p>page</p>\n"), ("page.css", "p {}"), ("page.js", "1")):
        (folder / name).write_text(text)
    (folder / "secret.txt").write_text("secret")
    said = []
    site = Site("a & b", folder, {"echo": echo, "count": count})
    threading.Thread(target=serve, args=(site, 0, said.append), daemon=True).start()
    while not said:
        time.sleep(0.01)
    host, path = said[0].removeprefix("http://").split("/", 1)
    assert host.startswith("127.0.0.1:")
    return int(host.split(":")[1]), f"/{path}"


def ask(address, name="", body=None, headers=None, method=None, path=None):
    """Answer of the server: status, headers, text."""
    port, secret = address
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    kind = {"Content-Type": "application/json"} if body is not None else {}
    text = body if isinstance(body, str) else json.dumps(body)
    connection.request(
        method or ("GET" if body is None else "POST"),
        path or secret + name,
        None if body is None else text,
        kind | (headers or {}),
    )
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_its_page_and_its_calls(address):
    status, headers, text = ask(address)
    assert status == 200 and "<title>a &amp; b</title>" in text and "<body>\n<p>page</p>\n</body>" in text
    assert "default-src 'none'" in headers["content-security-policy"]
    loaded = re.findall(r'(?:href|src)="(\w+\.\w+)"', text)
    assert loaded == ["style.css", "page.css", "page.js"] and all(ask(address, name)[0] == 200 for name in loaded)
    assert json.loads(ask(address, "echo", {"a": 1})[2]) == {"got": {"a": 1}}
    status, _, text = ask(address, "count", {"to": 3})
    assert [json.loads(line) for line in text.splitlines()] == [{"number": 0}, {"number": 1}, {"number": 2}]


def test_a_mistake_of_the_user_reaches_the_page(address):
    status, _, text = ask(address, "echo", {"fault": "too long"})
    assert (status, json.loads(text)) == (400, {"error": "too long"})
    status, _, text = ask(address, "count", {"to": 3, "fault_at": 1})
    assert [json.loads(line) for line in text.splitlines()] == [{"number": 0}, {"error": "no further"}]
    assert ask(address, "count", {"to": 1})[0] == 200  # it is not held up
    for body in ("[1]", "{", "nothing"):
        assert ask(address, "echo", body)[0] == 400


def test_it_listens_on_this_machine_alone(address):
    port, _ = address
    others = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    others = sorted({*others, "127.0.0.2"} - {"127.0.0.1"})
    for other in others:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, port), timeout=5)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:{port}.evil.example"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("name", ["", "echo"])
def test_foreign_requests_are_refused(address, headers, name):
    port, _ = address
    headers = {key: value.format(port=port) for key, value in headers.items()}
    status, _, text = ask(address, name, {"a": 1} if name else None, headers)
    assert status == 403 and "page" in text and "got" not in text


def test_its_own_requests_are_not(address):
    port, _ = address
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        assert ask(address, "echo", {"a": 1}, headers)[0] == 200


def test_a_form_of_another_page_cannot_post(address):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert ask(address, "echo", '{"a": 1}', {"Content-Type": kind})[0] == 403
    assert ask(address, "echo", {"a": "x" * server.MAX_BODY})[0] == 403
    assert ask(address, "echo", method="GET")[0] == 405


def test_no_file_but_its_own(address):
    _, secret = address
    paths = [
        secret + name for name in ("secret.txt", "../secret.txt", "%2e%2e/secret.txt", "..%2fpage.html", "/etc/passwd")
    ]
    paths += ["/", "/style.css", "/page.html", "/echo", "//etc/passwd", "/wrong" + secret, secret[:-2] + "/"]
    for path in paths:
        status, _, text = ask(address, path=path)
        assert status == 404 and "secret" not in text and "root:" not in text, path


def test_whoever_leaves_ends_what_it_asked_for(address):
    port, secret = address
    closed.clear()
    body = json.dumps({"to": 1000, "seconds": 0.02})
    head = f"POST {secret}count HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert b"number" in connection.recv(4096) + connection.recv(4096)
    deadline = time.time() + 10
    while not closed:
        assert time.time() < deadline
        time.sleep(0.02)
    assert closed == [1000]
    assert ask(address, "echo", {})[0] == 200


def test_whoever_leaves_before_its_turn_begins_nothing(address):
    """Its request waits while another one is answered. What it asked for is not begun afterwards."""
    port, secret = address
    closed.clear()
    body = json.dumps({"to": 7})
    head = f"POST {secret}count HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    first = threading.Thread(target=ask, args=(address, "count", {"to": 4, "seconds": 0.2}))
    first.start()
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        time.sleep(0.2)  # it waits
    first.join()
    assert ask(address, "count", {"to": 2})[0] == 200  # behind both
    assert closed == [4, 2]


def test_a_taken_port_is_said(address, tmp_path):
    port, _ = address
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}: .*--port"):
        serve(Site("", tmp_path, {}), port, print)


SERVE = """
import sys
from pathlib import Path
from pipeline.system.signals import Stopped, stopping
from pipeline.web.server import Site, serve

try:
    with stopping():
        serve(Site("", Path(), {}), 0, lambda text: print(text, flush=True))
        print("ended", flush=True)
except Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


@pytest.mark.parametrize(("number", "code", "text"), [(signal.SIGINT, 0, "ended\n"), (signal.SIGTERM, 143, "")])
def test_it_ends_at_a_signal(number, code, text):
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port = int(process.stdout.readline().removeprefix("http://127.0.0.1:").split("/")[0])
    assert ask((port, "/"))[0] == 404  # it is at work
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (code, text, "")
