"""Weights & Biases out of reach: as a run starts, and from the middle of it to its end."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.helpers.killable_runs import Run, assert_same_training

CHANGES = ["algo=mdlm", "trainer.max_steps=4"]
ANSWERS = {
    "viewer": {"entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
    "upsertBucket": {
        "bucket": {
            "id": "b", "name": "z", "displayName": "y", "historyLineCount": 0,
            "project": {"id": "p", "name": "x", "entity": {"id": "e", "name": "me"}},
        },
        "inserted": True,
    },
    "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
    "model": None,  # the run is a new one
}  # fmt: skip


class WandbServer(ThreadingHTTPServer):
    """Lets an online run start, takes the first numbers sent to it, and is gone.

    Attributes:
        asked: names of the GraphQL queries and paths of the rest.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_query = self.path == "/graphql"
        query = json.loads(body)["query"] if is_query else ""
        name = re.search(r"(?:query|mutation) (\w+)", query)
        self.server.asked.append(name[1] if name else self.path)
        answer = json.dumps({"data": ANSWERS} if is_query else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        if self.path.endswith("/file_stream"):
            self.server.shutdown()
            self.server.server_close()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_wandb_cannot_be_reached(tmp_path, straight, count):
    """A requeued job must not end because the server is down: it logs offline instead."""
    run = Run(tmp_path, *CHANGES)
    output = run.run("wandb={project:x,name:y,id:z}", WANDB_API_KEY="0" * 40,
                     WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="5")  # fmt: skip
    assert "logging offline" in output
    assert_same_training(straight(*CHANGES), run.last())
    count("Weights & Biases cannot be reached as a run starts")


@pytest.mark.slow
def test_wandb_goes_away_during_a_run(tmp_path, straight, server, count):
    """Training goes on to its end, and so does the process: wandb alone would wait for ever."""
    run = Run(tmp_path, *CHANGES)
    output = run.run(
        "wandb={project:x,name:y,id:z,settings:{finish_timeout:5}}",
        preparation=f"""
import socket
def wait_until_it_is_gone(self, *args):
    while self.global_step == 2:
        try:
            socket.create_connection(("127.0.0.1", {server.server_port})).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.1)
before(Diffusion, "training_step", wait_until_it_is_gone)
""",
        timeout=120, WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}",
    )  # fmt: skip
    assert "UpsertBucket" in server.asked and server.asked[-1].endswith("/file_stream")
    assert "logging offline" not in output and "Syncing run" in output
    assert list(tmp_path.glob("outputs/*/*/*/wandb/run-*-z/run-z.wandb")), "for `wandb sync`"
    assert_same_training(straight(*CHANGES), run.last())
    count("Weights & Biases goes away during a run")
