"""The agent's door: who is let in, what is read, and how much of it."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daruma_trainer import agent as module
from daruma_trainer.agent import Agent, Command, Outcome, ViewCell
from daruma_trainer.contract import MAX_CONTROL_BYTES, Report

TOKEN = "the-token"
PASS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def commands() -> list[Command]:
    return []


@pytest.fixture(scope="module")
def agent(commands: list[Command]) -> Iterator[Agent]:
    def obey(command: Command) -> Outcome:
        commands.append(command)
        return Outcome()

    made = Agent(
        ("127.0.0.1", 0),
        TOKEN,
        ViewCell(Report("server-0-1", 0, "Joining")),
        obey,
        lambda: b"m 1\n",
    )
    yield made
    made.close()


def ask(
    agent: Agent, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=20)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_the_token_opens_the_view_and_nothing_else_does(agent: Agent) -> None:
    status, body = ask(agent, "GET", "/v1/view?after=0&wait=0", PASS)
    assert (status, json.loads(body)["own"]["id"]) == (200, "server-0-1")
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {TOKEN}x"}):
        status, body = ask(agent, "GET", "/v1/view", headers)
        assert (status, json.loads(body)["error"]) == (401, "Unauthorized")


def test_a_view_says_how_long_its_owner_has_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, report = ViewCell(Report("server-0-1", 0, "Ready")), Report("server-0-1", 1, "Ready")
    assert cell.wait(0, 0.0).still < module.STILL_SECONDS
    monkeypatch.setattr(module, "STILL_SECONDS", 0.0)
    monkeypatch.setattr(module, "TURN_SECONDS", 0.01)
    first, second = cell.wait(0, 0.0), cell.wait(0, 0.0)
    assert 0.01 <= first.still <= second.still - 0.01
    # Its process was stopped with all its threads: the agent waits for the owner's next turn.
    monkeypatch.setattr(module, "TURN_SECONDS", 60.0)
    turn = threading.Timer(0.05, cell.publish, (1, report, {}))
    turn.start()
    view = cell.wait(0, 0.0)
    assert (view.epoch, view.still < first.still + second.still) == (1, True)
    turn.join()


def test_health_and_metrics_need_no_token(agent: Agent) -> None:
    assert ask(agent, "GET", "/healthz", {}) == (200, b"ok\n")
    assert ask(agent, "GET", "/metrics", {}) == (200, b"m 1\n")


@pytest.mark.parametrize("length", ["²", "-1", "1e3", "", "9" * 30, str(MAX_CONTROL_BYTES + 1)])
def test_a_body_of_no_or_too_great_a_length_is_not_read(agent: Agent, length: str) -> None:
    with socket.create_connection(("127.0.0.1", agent.port), timeout=20) as raw:
        head = f"PUT /v1/membership HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n"
        raw.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
        assert b" 413 " in raw.recv(4096)


@given(
    path=st.sampled_from(["/v1/membership", "/v1/restore", "/v1/checkpoint", "/v1/no"]),
    method=st.sampled_from(["PUT", "POST"]),
    body=st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["kind", "number", "epoch", "members"]), inner)
            ),
        ).map(lambda raw: json.dumps(raw).encode()),
    ),
)
def test_bodies_that_are_no_command_are_refused_by_name(
    agent: Agent, commands: list[Command], path: str, method: str, body: bytes
) -> None:
    before = len(commands)
    status, answer = ask(agent, method, path, PASS, body)
    if len(commands) == before:
        assert status in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND)
        assert json.loads(answer)["error"] in ("Malformed", "NotFound")


def test_more_connections_than_there_is_room_for_are_closed_unread(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Handler, "timeout", 2.0)
    idle = [
        socket.create_connection(("127.0.0.1", agent.port), timeout=20)
        for _ in range(module.MAX_CONNECTIONS + 20)
    ]
    try:
        # Those beyond the limit are closed at once, the idle ones after their time.
        for connection in idle:
            assert connection.recv(1) == b""
    finally:
        for connection in idle:
            connection.close()
    assert threading.active_count() < module.MAX_CONNECTIONS
    assert ask(agent, "GET", "/healthz", {})[0] == 200
