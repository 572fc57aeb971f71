"""`rlhf push` against a stand-in of the hub on 127.0.0.1: what goes there, who may read it, and that it asks first.

The command is a process of its own, since its libraries read HF_ENDPOINT once.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.export import folder

COMMIT = "c" * 40
REPO = "me/policy"
TOKEN = "hf_of_the_test"
WEIGHTS = bytes(range(256)) * 8
ABOUT = {"run": "tiny", "stage": "dpo", "as": "merged", "base": None}


class Hub(ThreadingHTTPServer):
    """The calls that huggingface_hub makes for an upload. It keeps repositories, their files, and all requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.fails_at: str | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle_call(self) -> None:
        hub = self.server
        path = self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append((self.command, path))
        if not path.startswith("/blobs/"):
            hub.tokens.add(self.headers.get("Authorization"))
        if hub.fails_at is not None and hub.fails_at in path:
            self.answer({"error": "no"}, 403, X_Error_Message="You may not write here")
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            private = wanted.get("visibility") == "private" or wanted.get("private", False)
            hub.repos[name] = {"private": private, "files": {}}
            self.answer({"url": f"{hub.endpoint}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = []
            for wanted in json.loads(body)["objects"]:
                upload = {"href": f"{hub.endpoint}/blobs/{wanted['oid']}", "header": {}}
                objects.append(wanted | {"actions": {"upload": upload}})
            self.answer({"transfer": "basic", "objects": objects})
        elif path.startswith("/blobs/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/blobs/")
            hub.blobs[path.removeprefix("/blobs/")] = body
            self.answer({})
        elif path == f"/api/models/{REPO}/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": self.mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif path == f"/api/models/{REPO}/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
            self.answer({"commitUrl": f"{hub.endpoint}/{REPO}/commit/{COMMIT}", "commitOid": COMMIT})
        elif re.fullmatch(rf"/api/models/{REPO}(/revision/main)?", path) and REPO in hub.repos:
            self.answer({"id": REPO, "private": hub.repos[REPO]["private"], "sha": COMMIT, "siblings": []})
        elif path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "orgs": []})
        else:
            self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

    do_GET = do_POST = do_PUT = do_HEAD = handle_call

    @staticmethod
    def mode(path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    def commit(self, lines: list[dict]) -> None:
        files = self.server.repos[REPO]["files"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def export(tmp_path):
    """A folder as `rlhf export` leaves it."""
    path = tmp_path / "policy"
    path.mkdir()
    (path / "model.safetensors").write_bytes(WEIGHTS)
    (path / "README.md").write_text("---\nlibrary_name: transformers\n---\n# tiny\n")
    folder.seal(path, ABOUT)
    return path


@pytest.fixture
def push(hub, export, tmp_path):
    """`push(*arguments, said="y")`: the command, with an answer to its question."""

    def call(*arguments, said="y\n", **environment):
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "pipeline", "push", str(export), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, input=said, capture_output=True, text=True, env=os.environ | own | environment
        )

    return call


def written(hub: Hub) -> list[tuple[str, str]]:
    return [(method, path) for method, path in hub.asked if method not in ("GET", "HEAD")]


def test_an_export_is_uploaded_as_it_is_and_private(hub, export, push):
    done = push(REPO)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.repos[REPO]["private"] is True
    assert hub.repos[REPO]["files"] == {path.name: path.read_bytes() for path in export.iterdir()}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    for words in ("model.safetensors", "2 KiB", f" KiB, to {REPO} (new), private", "Upload them?", "Uploaded: "):
        assert words in done.stdout
    assert TOKEN not in done.stdout


@pytest.mark.parametrize("said", ["n\n", ""])
def test_nothing_goes_before_it_was_allowed(hub, push, said):
    done = push(REPO, said=said)
    assert done.returncode == 2
    assert "nothing was uploaded" in done.stderr
    assert written(hub) == []


def test_public_and_without_a_question_only_when_told(hub, push):
    done = push(REPO, "--public", "--yes", said="")
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.repos[REPO]["private"] is False
    assert "PUBLIC: everybody can read it" in done.stdout


def test_a_public_repository_is_not_written_to_by_default(hub, push):
    hub.repos[REPO] = {"private": False, "files": {}}
    done = push(REPO)
    assert done.returncode == 2
    assert "is public already; say `--public`" in done.stderr
    assert written(hub) == []
    hub.repos[REPO] = {"private": True, "files": {"notes.md": b"mine"}}
    done = push(REPO)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.repos[REPO]["files"]["notes.md"] == b"mine"  # what else is there stays
    assert "a repository that is there already" in done.stdout


def test_what_is_no_export_or_has_changed(hub, export, push):
    (export / "model.safetensors").write_bytes(b"other")
    assert "has changed since it was exported" in push(REPO).stderr
    (export / "model.safetensors").write_bytes(WEIGHTS)
    (export / "secret.txt").write_text("mine")
    assert "secret.txt is no file of the export; move it away" in push(REPO).stderr
    (export / "secret.txt").unlink()
    (export / folder.FILE).unlink()
    assert "expected a folder that `rlhf export` has written" in push(REPO).stderr
    assert hub.asked == []


def test_an_adapter_on_a_folder_of_this_machine_is_refused(hub, export, push):
    (export / folder.FILE).unlink()
    folder.seal(export, ABOUT | {"as": "adapter", "base": "/home/me/model"})
    done = push(REPO)
    assert done.returncode == 2
    assert "the adapter's base is /home/me/model, which nobody else has" in done.stderr
    assert hub.asked == []


def test_what_the_hub_refuses_is_one_message(hub, push):
    for place in ("/api/repos/create", "/preupload/", "/commit/main"):
        hub.fails_at = place
        done = push(REPO)
        assert done.returncode == 2, place
        assert done.stderr.startswith(f"error: the hub refuses '{REPO}'")
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stderr
    hub.fails_at = "/blobs/"
    done = push(REPO)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_without_a_hub_or_a_name_or_offline(push):
    offline = push(REPO, HF_HUB_OFFLINE="1")
    assert (offline.returncode, "switched off by HF_HUB_OFFLINE" in offline.stderr) == (2, True)
    away = push(REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert (away.returncode, "the hub cannot be reached" in away.stderr) == (2, True)
    assert "is no name of a repository" in push("my policy").stderr
