"""Servers killed, frozen and lied to: real processes, one membership, no operator."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import softmax
from daruma_trainer.checkpoint.manifest import Manifest
from daruma_trainer.contract import (
    SLOTS,
    ExitCode,
    Member,
    Membership,
    Role,
    Settings,
    slots_from_hex,
    slots_to_hex,
)
from daruma_trainer.layout import TableSpec
from daruma_trainer.rules import Add, rule_to_json
from daruma_trainer.server.fencing import STILL_SECONDS
from daruma_trainer.wire import Kind, Refusal, from_bitmap, mask_of
from local_cluster import LocalCluster, freshest, local_cluster, lose_and_replace, stepped
from raw_member import RawMember
from soak import counted

pytestmark = pytest.mark.faults
SOFTMAX = (softmax.__file__, "120")
THROWS, COUNTED = counted("malformed requests to a live server, three at once", 200, 10_000)
ALL = mask_of(np.arange(SLOTS))
SPEC = TableSpec(0, "t", (64, 4), 1, rule_to_json(Add()))


def trained(folder: Path, consistency: str, *, disturb: bool) -> dict[str, np.ndarray[Any, Any]]:
    folder.mkdir()
    config = Settings(consistency=consistency, store=f"file://{folder}/store", every=20)
    with local_cluster(folder, servers=2, workers=2, settings=config, program=SOFTMAX) as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 30, "30 steps")
        if disturb:
            lose_and_replace(cluster, 1)
            epoch = cluster.membership.epoch
            cluster.until(lambda: stepped(cluster, epoch), "a step afterwards")
            cluster.tell(raise_epoch=True, recovery=None)
        cluster.finish()
        return cluster.result(folder / "store")


def test_sync_with_a_lost_server_ends_bit_for_bit_like_without(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", "Sync", disturb=False)
    disturbed = trained(tmp_path / "disturbed", "Sync", disturb=True)
    assert plain.keys() == disturbed.keys()
    for name, values in plain.items():
        assert values.tobytes() == disturbed[name].tobytes(), name


def test_async_with_a_lost_server_goes_on_and_learns(tmp_path: Path) -> None:
    values = trained(tmp_path / "async", "Async", disturb=True)
    assert all(np.isfinite(v).all() for v in values.values())
    assert np.abs(values["weight"]).max() > 0


def raw_job(folder: Path, workers: int = 2) -> LocalCluster:
    """One server and no worker processes: the test speaks for the workers."""
    cluster = LocalCluster(folder, 1, 0, Settings())
    cluster.start(Role.SERVER, 0, 1)
    members = (
        *cluster.membership.members,
        *(Member(Role.WORKER, w, 1, f"w{w}") for w in range(workers)),
    )
    cluster.membership = Membership(
        "uid-of-the-test", "test", "job", 1, 1, workers, members, Settings()
    )
    server = cluster.membership.of(Role.SERVER)[0]
    put(cluster, server)
    return cluster


def put(cluster: LocalCluster, server: Member) -> None:
    body = json.dumps(cluster.membership.to_json()).encode()
    cluster.until(
        lambda: cluster.call(server, "PUT", "/v1/membership", body) == 204, "the membership"
    )


def initialised(cluster: LocalCluster, worker: RawMember) -> None:
    assert worker.create(SPEC).kind is Kind.OK
    header, _ = worker.ask(Kind.INIT, worker.push_body(0, 1, ALL, np.zeros((64, 4))))
    assert header.kind is Kind.OK


def test_a_push_whose_acknowledgement_died_is_applied_once(tmp_path: Path) -> None:
    cluster = raw_job(tmp_path)
    try:
        server = cluster.membership.of(Role.SERVER)[0]
        with (
            RawMember("worker-0-1", server, cluster.membership) as w0,
            RawMember("worker-1-1", server, cluster.membership) as w1,
        ):
            initialised(cluster, w0)
            assert w1.create(SPEC).kind is Kind.OK
            body = w0.push_body(0, 1, ALL, np.ones((64, 4)))
            w0.send(Kind.PUSH, body)  # its answer is never read: it dies with the server
            cluster.until(lambda: float(w1.pull(ALL).values[0].sum()) == 256, "the push is applied")
            copy = w1.pull(ALL)
            cluster.kill(server.id)
            gone = server
            new = cluster.start(Role.SERVER, 0, 2)
            workers = tuple(m for m in cluster.membership.members if m.role is Role.WORKER)
            cluster.membership = Membership(
                "uid-of-the-test", "test", "job", 3, 1, 2, (new, *workers), Settings(),
                initialised=True, recovery=1,
            )  # fmt: skip
            put(cluster, new)
            assert gone.incarnation < new.incarnation
        with (
            RawMember("worker-0-1", new, cluster.membership) as w0,
            RawMember("worker-1-1", new, cluster.membership) as w1,
        ):
            assert w1.create(SPEC).kind is Kind.OK
            plan = {
                "recovery": 1, "epoch": 3, "member": "server-0-2",
                "sources": [
                    {"kind": "peer", "slots": slots_to_hex(range(SLOTS)), "member": "worker-1-1"}
                ],
            }  # fmt: skip
            assert cluster.call(new, "POST", "/v1/restore", json.dumps(plan).encode()) == 204
            w1.give_copy(copy)
            cluster.until(lambda: cluster.report(Role.SERVER, 0).ready == SLOTS, "all is restored")
            header, frames = w0.ask(Kind.PUSH, body)
            assert header.kind is Kind.ACK
            assert from_bitmap(frames[1][:128]).all(), "it has the push already"
            assert float(w0.pull(ALL).values[0].sum()) == 256
            cluster.until(lambda: cluster.report(Role.SERVER, 0).duplicate == 1, "it is counted")
    finally:
        cluster.close()


def test_a_frozen_and_replaced_server_accepts_nothing_that_counts(tmp_path: Path) -> None:
    config = Settings(store=f"file://{tmp_path}/store", every=20)
    with local_cluster(tmp_path, servers=2, workers=2, settings=config, program=SOFTMAX) as cluster:
        cluster.until(lambda: cluster.report(Role.WORKER, 0).step >= 30, "30 steps")
        frozen = cluster.membership.member(Role.SERVER, 1)
        assert frozen is not None
        cluster.kill(frozen.id, signal.SIGSTOP)
        since = time.monotonic()
        members = tuple(m for m in cluster.membership.members if m is not frozen)
        epoch = cluster.membership.epoch + 1
        cluster.tell(raise_epoch=True, members=members, initialised=True, recovery=epoch)
        workers = cluster.membership.of(Role.WORKER)
        cluster.until(
            lambda: all(cluster.report(Role.WORKER, w.index).copies for w in workers), "copies"
        )
        cluster.replace_server(1, freshest(cluster, 1))
        epoch = cluster.membership.epoch
        cluster.until(lambda: stepped(cluster, epoch), "a step")
        # Frozen for less, it cannot know; its acknowledgements count for nobody all the same.
        cluster.until(lambda: time.monotonic() - since > STILL_SECONDS + 0.2, "it stood still")
        cluster.kill(frozen.id, signal.SIGCONT)
        # A push for the frozen incarnation, as an old message that was under way would be.
        with RawMember("worker-0-1", frozen) as late:
            slots = mask_of(np.array(slots_from_hex(cluster.slots(1))))
            late.send(Kind.PUSH, late.push_body(0, 500, slots, np.zeros((0, 0))))
            answers = iter(lambda: late.receive(1.0), None)
            kinds = {found[0].kind for found in answers if found is not None}
            assert not kinds & {Kind.ACK, Kind.STATE, Kind.OK}
        assert cluster.processes[frozen.id].wait(30) == ExitCode.STALE
        saved = []
        for path in (tmp_path / "store").rglob("manifest-*.json"):
            with contextlib.suppress(FileNotFoundError):  # there is a newer one
                saved.append(Manifest.decode(path.read_bytes()))
        assert saved
        assert all((m.slots.last < 500).all() for m in saved), "it saved what it had no right to"
        cluster.tell(raise_epoch=True, recovery=None)
        cluster.finish()


def test_stale_and_foreign_requests_are_refused_by_name(tmp_path: Path) -> None:
    cluster = raw_job(tmp_path)
    try:
        server = cluster.membership.of(Role.SERVER)[0]
        with RawMember("worker-0-1", server, cluster.membership) as worker:
            initialised(cluster, worker)
            body = worker.push_body(0, 1, ALL, np.ones((64, 4)))
            wrong = [
                ({"incarnation": 9}, Refusal.STALE_INCARNATION),
                ({"generation": 3}, Refusal.WRONG_GENERATION),
                ({"epoch": 8}, Refusal.UNSURE),
            ]
            for changes, refusal in wrong:
                header, _ = worker.ask(Kind.PUSH, body, **changes)
                assert (header.kind, header.flags) == (Kind.REFUSED, refusal)
            other = TableSpec(0, "t", (64, 5), 1, SPEC.rule)
            assert worker.create(other).flags == Refusal.TABLE_MISMATCH
            assert float(worker.pull(ALL).values[0].sum()) == 0
        with RawMember("worker-0-7", server) as impostor:
            header, _ = impostor.ask(Kind.PUSH, body)
            assert (header.kind, header.flags) == (Kind.REFUSED, Refusal.STALE_INCARNATION)
    finally:
        cluster.close()


def test_without_the_token_nothing_is_answered(tmp_path: Path) -> None:
    cluster = raw_job(tmp_path)
    try:
        server = cluster.membership.of(Role.SERVER)[0]
        with RawMember("worker-0-1", server, token="guessed") as stranger:
            stranger.send(Kind.HELLO, [b"{}"])
            assert stranger.receive(1.0) is None
        body = json.dumps(cluster.membership.to_json()).encode()
        for method, path in [
            ("GET", "/v1/view"), ("PUT", "/v1/membership"), ("POST", "/v1/restore"),
            ("POST", "/v1/checkpoint"),
        ]:  # fmt: skip
            assert (
                cluster.call(server, method, path, body if method != "GET" else None, token="x")
                == 401
            )
        assert cluster.call(server, "GET", "/healthz", token="") == 200
        assert cluster.call(server, "GET", "/metrics", token="") == 200
    finally:
        cluster.close()


@COUNTED
def test_malformed_bodies_and_frames_change_nothing_and_crash_nothing(tmp_path: Path) -> None:
    cluster = raw_job(tmp_path)
    try:
        server = cluster.membership.of(Role.SERVER)[0]
        with RawMember("worker-0-1", server, cluster.membership) as worker:
            initialised(cluster, worker)
            good = [bytes(f) for f in worker.push_body(0, 1, ALL, np.ones((64, 4)))]

            @settings(max_examples=THROWS, deadline=None, suppress_health_check=list(HealthCheck))
            @given(st.data())
            def throw(data: st.DataObject) -> None:
                kind = data.draw(
                    st.sampled_from(
                        [
                            Kind.CREATE,
                            Kind.INIT,
                            Kind.PULL,
                            Kind.RESYNC,
                            Kind.REPORT,
                            Kind.CUT,
                            Kind.COPY,
                            Kind.MEMBERSHIP,
                            Kind.PUSH,
                        ]
                    )
                )
                frames = data.draw(st.lists(st.binary(max_size=200), min_size=1, max_size=4))
                worker.send(kind, frames)
                worker.send_raw(data.draw(st.lists(st.binary(max_size=80), min_size=1, max_size=4)))
                worker.send(
                    Kind.PUSH, [good[0][: data.draw(st.integers(0, len(good[0]) - 1))], *good[1:]]
                )

            throw()
            bodies = [
                b"",
                b"{",
                b"[]",
                b"null",
                b'{"epoch": "x"}',
                b'{"kind": "final", "number": "../x"}',
                b"[" * 9999,
            ]
            for path, method in [
                ("/v1/membership", "PUT"),
                ("/v1/restore", "POST"),
                ("/v1/checkpoint", "POST"),
            ]:
                for body in bodies:
                    assert cluster.call(server, method, path, body) in (400, 409)
            with socket.create_connection(
                ("127.0.0.1", int((server.agent or ":0").rpartition(":")[2])), timeout=5
            ) as raw:
                raw.sendall(b"PUT /v1/membership HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n")
                assert raw.recv(64).startswith(b"HTTP/1.1 401")
            assert float(worker.pull(ALL).values[0].sum()) == 0, "nothing was applied"
        assert cluster.alive(server.id)
    finally:
        cluster.close()


def test_a_server_starts_without_torch() -> None:
    code = "import sys, daruma_trainer.server.serve; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_job_starts_from_the_result_of_another_with_other_numbers(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    config = Settings(store=f"file://{first}/store", every=20)
    with local_cluster(first, servers=3, workers=1, settings=config, program=SOFTMAX) as cluster:
        cluster.finish()
        learnt = cluster.result(first / "store")
        cut = next((first / "store").rglob("cuts/*.json"))
    config = Settings(store=f"file://{second}/store", every=0, restore_from=f"file://{cut}")
    still = (SOFTMAX[0], "0")
    with local_cluster(second, servers=2, workers=2, settings=config, program=still) as cluster:
        cluster.finish()
        again = cluster.result(second / "store")
    for name, values in learnt.items():
        assert values.tobytes() == again[name].tobytes(), name
