"""Half of the servers at once, then all: adopted, replaced, from a directory and from S3."""

import json
import sys
from typing import Any

import pytest
from members import incarnations, kill
from testcluster import API_ADDRESS
from testjobs import JobNamespace

from daruma_trainer.contract import Role, member_id
from s3_server import environment, s3_server


def delete(jobs: JobNamespace, name: str, *servers: int) -> None:
    numbers = incarnations(jobs.status(name), Role.SERVER)
    pods = [f"{name}-server-{i}-{numbers[i]}" for i in servers]
    jobs.cluster.kubectl(
        "delete", "pods", *pods, "-n", jobs.name, "--grace-period=1", "--wait=false"
    )


def guests(status: dict[str, Any]) -> list[int]:
    """Return the servers that live in others' pods."""
    return [
        m["index"]
        for m in status["members"]
        if not m["pod"].endswith(member_id(Role(m["role"]), m["index"], m["incarnation"]))
    ]


def test_two_of_four_are_adopted_and_return_and_then_all_four_are_lost(jobs: JobNamespace) -> None:
    # It must not end while another test has the operator away, for however long that takes.
    endless, think_ms = 1_000_000, "300"
    recovery = {"placement": "Adopt"}
    jobs.cluster.apply(
        jobs.manifest("adopt", servers=4, steps=endless, think_ms=think_ms, recovery=recovery)
    )
    jobs.at_step("adopt", 10)
    before = jobs.pods("adopt")
    delete(jobs, "adopt", 1, 3)

    def handed_back() -> dict[str, Any] | None:
        status = jobs.status("adopt")
        back = [i for r in status["recoveries"] if r["cause"] == "HandBack" for i in r["indexes"]]
        whole = status["phase"] == "Running" and not guests(status) and sorted(back) == [1, 3]
        return status if whole else None

    status = jobs.cluster.until(handed_back, "the slots are where hashing wants them", 120)
    first = status["recoveries"][0]
    assert (first["placement"], first["cause"]) == ("Adopt", "ServerLost")
    survivors = {m["pod"] for m in status["members"]} & set(before)
    assert len(survivors) == 4, "two servers and two workers"
    assert {pod: jobs.pods("adopt")[pod] for pod in survivors} == {
        pod: before[pod] for pod in survivors
    }
    for index in range(4):
        kill(jobs, "adopt", Role.SERVER, index)

    def all_back() -> dict[str, Any] | None:
        status = jobs.status("adopt")
        lost = [r for r in status["recoveries"] if r["cause"] != "HandBack"][1:]
        whole = {i for r in lost for i in r["indexes"]} == {0, 1, 2, 3}
        return status if whole and status["phase"] == "Running" and not guests(status) else None

    status = jobs.cluster.until(all_back, "all four are back", 120)
    assert {r["outcome"] for r in status["recoveries"]} == {"Succeeded"}
    assert status["restarts"]["workers"] == 0
    jobs.at_step("adopt", status["progress"]["step"] + 5)


def test_two_of_four_are_restored_from_s3(jobs: JobNamespace) -> None:
    if jobs.cluster.folder is None:
        pytest.skip("the S3 server stands beside our own cluster's control plane")
    with s3_server("saves", host=API_ADDRESS, prefix=jobs.cluster.prefix) as port:
        reached = environment(port, API_ADDRESS)
        jobs.cluster.apply(
            {
                "apiVersion": "v1", "kind": "Secret", "stringData": reached,
                "metadata": {"name": "s3", "namespace": jobs.name},
            },
            jobs.manifest(
                "bucket",
                servers=4,
                steps=120,
                checkpoint={
                    "store": "s3://saves/jobs", "secretRef": {"name": "s3"},
                    "every": 40, "fraction": 0.25,
                },
                recovery={"strategy": "Partial"},
            ),
        )  # fmt: skip
        jobs.at_step("bucket", 30)
        delete(jobs, "bucket", 0, 2)
        status = jobs.ended("bucket")
        (record,) = status["recoveries"]
        assert (record["strategy"], record["placement"]) == ("Partial", "Replace")
        assert record["sources"] == {"runningCheckpoint": pytest.approx(512, abs=40)}
        assert status["result"]["uri"].startswith("s3://saves/jobs/")
        exported = jobs.scratch / "bucket.safetensors"
        jobs.cluster.run(
            "env", *(f"{k}={v}" for k, v in reached.items()), sys.executable, "-m",
            "daruma_operator.cli.main", "export", status["result"]["uri"], "-o", str(exported),
        )  # fmt: skip
        size = int.from_bytes(exported.read_bytes()[:8], "little")
        header = json.loads(exported.read_bytes()[8 : 8 + size])
        assert header["weight"]["shape"] == [5, 32]


def test_a_replica_is_promoted_and_the_chain_is_made_whole_again(jobs: JobNamespace) -> None:
    recovery = {"strategy": "Chain", "chain": {"replicas": 2, "ack": "Tail"}}
    endless, think_ms = 1_000_000, "100"
    jobs.cluster.apply(
        jobs.manifest("chain", servers=3, steps=endless, think_ms=think_ms, recovery=recovery)
    )

    def replicated() -> dict[str, Any] | None:
        status = jobs.status("chain")
        conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
        calm = status.get("phase") == "Running" and not guests(status)
        return status if calm and conditions.get("Replicated") == "True" else None

    before = jobs.cluster.until(replicated, "every shard has its replica", 120)
    homes = {m["index"]: (m["node"], m["pod"]) for m in before["members"] if m["role"] == "Server"}
    for replica in before["replicas"]:
        assert replica["pod"] != homes[replica["index"]][1]
    made = jobs.pods("chain")
    kill(jobs, "chain", Role.SERVER, 1)

    def recovered() -> dict[str, Any] | None:
        status = jobs.status("chain")
        return status if status["recoveries"] else None

    (record,) = jobs.cluster.until(recovered, "the replica serves", 60)["recoveries"][:1]
    assert (record["strategy"], record["placement"]) == ("Chain", "Promote")
    assert list(record["sources"]) == ["replica"]
    assert record["pushes"]["lost"] == 0
    status = jobs.cluster.until(replicated, "the slots are back, with new replicas", 120)
    assert [r["cause"] for r in status["recoveries"]] == ["ServerLost", "HandBack"]
    assert {r["outcome"] for r in status["recoveries"]} == {"Succeeded"}
    assert len(set(jobs.pods("chain").items()) & set(made.items())) == 4, "but one, as they were"
    jobs.at_step("chain", status["progress"]["step"] + 5)
