"""Tests of `daruma bench rework`: its arena against the servers' code, and what must hold of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daruma_trainer.bench.arena import BenchError
from daruma_trainer.bench.rework import command
from daruma_trainer.bench.rework.arena import Peer, Saves, Servers, even
from daruma_trainer.bench.rework.arms import (
    LOST,
    SERVERS,
    UNDISTURBED,
    Ack,
    Grid,
    Replication,
    Saving,
    Strategy,
)
from daruma_trainer.bench.rework.catalogue import PROGRAMS
from daruma_trainer.bench.rework.convolution import Convolution
from daruma_trainer.bench.rework.experiment import Size
from daruma_trainer.bench.rework.factors import Factors
from daruma_trainer.bench.rework.page import page
from daruma_trainer.bench.rework.perturbation import Kind, Sample, study, summarise
from daruma_trainer.bench.rework.problems import Problem, Samples, toy
from daruma_trainer.bench.rework.replicas import Replicas
from daruma_trainer.bench.rework.stats import cells, resamples, standing
from daruma_trainer.bench.rework.topics import Topics
from daruma_trainer.bench.rework.trial import (
    Plan,
    Run,
    fresh,
    go_on,
    run_seed,
    stream,
    target_of,
)
from daruma_trainer.bench.rework.updates import apply, join
from daruma_trainer.checkpoint.selection import Selection
from daruma_trainer.contract import SLOTS, place
from daruma_trainer.layout import TableLayout, TableSpec
from daruma_trainer.rules import Assign, rule_to_json

GRID = Grid(every=(8,), fractions=(0.125,), selections=(Selection.PRIORITY,))


def small_network() -> Convolution:
    rng = np.random.default_rng(0)
    return Convolution(Samples(rng.random((40, 65), np.float32), rng.integers(0, 4, 40), 4))


@cache
def toy_runs() -> tuple[Run, ...]:
    problem = toy()
    target, at = target_of(problem)
    return tuple(run_seed(problem, Plan(seed, 16, target, at / 2, GRID)) for seed in range(2))


def reductions(runs: Sequence[Run], arm: str) -> list[float]:
    found = {(c.arm, c.lost): c for c in cells(runs, GRID, 50)}
    got = [found[arm, lost].reduction for lost in LOST]
    return [r.mean for r in got if r is not None]


# The experiment


def test_priority_saves_most_of_the_rework_of_uneven_features() -> None:
    """The toy of the design: 32 failures, all streams fixed, so this is no matter of luck."""
    quarter, half, most = reductions(toy_runs(), "Partial Priority r=1/8 C=8")
    assert quarter >= 0.85
    assert half >= 0.80
    assert most >= 0.70


def test_freshest_costs_nothing_where_the_copy_is_exact() -> None:
    for run in toy_runs():
        for lost in LOST:
            exact = f"Freshest Sync C=8 lost={lost}/{SERVERS}"
            assert run.kappa[exact] == run.kappa[UNDISTURBED]
            assert not any(run.deltas[exact])
            assert all(run.deltas[f"Freshest Async, oldest C=8 lost={lost}/{SERVERS}"])


def test_what_a_worker_pushes_again_is_missing_nowhere() -> None:
    for run in toy_runs():
        for lost in LOST:
            for arm in ("Freshest Async, copies 2", "Chain Tail"):
                assert not any(run.deltas[f"{arm} C=8 lost={lost}/{SERVERS}"])
            assert any(run.deltas[f"Chain None C=8 lost={lost}/{SERVERS}"])


def test_freshest_costs_nothing_with_als() -> None:
    problem = Factors()
    # Far enough from the optimum, so that this takes moments.
    run = run_seed(problem, Plan(0, 3, 0.9, 4.0, GRID))
    assert run.undisturbed > 1
    assert run.kappa["Freshest Sync C=8 lost=3/4"] == run.kappa[UNDISTURBED]
    # Nothing is random in it: what a rollback throws away is what it costs.
    back = np.array(run.kappa["FullCheckpoint C=8"]) - run.kappa[UNDISTURBED]
    assert back.tolist() == [step % 8 for step in run.failures]


def test_a_seed_gives_the_same_numbers_again() -> None:
    problem = toy()
    plan = Plan(3, 2, 1.2, 5.0, GRID)
    first, again = run_seed(problem, plan), run_seed(problem, plan)
    assert first.kappa == again.kappa
    assert first.failures == again.failures


def test_what_does_not_get_there_counts_as_the_cap() -> None:
    problem = toy()
    arms = fresh(problem, problem.initial(stream(problem, 0, 1)))
    problem.budget = 5
    assert go_on(problem, arms, 3, 0.0, stream(problem, 0, 9)).tolist() == [15]


# The arena


@pytest.mark.parametrize("make", [toy, Factors, small_network], ids=["sgd", "assign", "adam"])
def test_many_arms_move_as_servers_do(make: Callable[[], Problem]) -> None:
    problem = make()
    values = problem.initial(stream(problem, 0, 1))
    servers = Servers("uid", problem, values)
    arms = join([fresh(problem, values)] * 3)
    rng = stream(problem, 0, 0)
    for step in range(1, 21):
        batch = problem.batch(rng, step)
        servers.push(step, problem.pushes(servers.state().values, batch))
        apply(arms, problem.pushes(arms.values, batch), problem.tables, problem.lr)
    real = servers.state()
    for mine, theirs in zip(arms.values, real.values, strict=True):
        np.testing.assert_allclose(mine, np.repeat(theirs, 3, axis=0), rtol=2e-5, atol=2e-6)
    assert all((a == b).all() for a, b in zip(arms.steps, real.steps, strict=True))


def test_a_server_comes_back_as_it_was_saved() -> None:
    problem = small_network()
    servers = Servers("uid", problem, problem.initial(stream(problem, 0, 1)))
    saves = Saves(servers, Saving(Strategy.PARTIAL, 4))
    cuts = Saves(servers, Saving(Strategy.FULL, 4))
    peer = Peer(servers)
    saves.begin()
    cuts.begin()
    rng = stream(problem, 0, 0)
    states = [servers.state()]
    for step in range(1, 7):
        batch = problem.batch(rng, step)
        servers.push(step, problem.pushes(servers.state().values, batch))
        saves.tick()
        cuts.tick()
        states.append(servers.state())
    peer.pull()
    live, saved = servers.planes[1].shard, saves.restore(1).shard
    layouts = [t.layout.rows for t in live.tables]
    for t, rows in enumerate(layouts):
        np.testing.assert_array_equal(saved.tables[t].data, states[4].values[t][0, rows])
        np.testing.assert_array_equal(saved.tables[t].state[1], states[4].moments[t][1][0, rows])
        assert saved.tables[t].steps.tolist() == [4] * len(rows)
    from_peer = saves.restore(1, peer).shard
    for t, rows in enumerate(layouts):
        np.testing.assert_array_equal(from_peer.tables[t].data, live.tables[t].data)
        np.testing.assert_array_equal(
            from_peer.tables[t].state[0], states[4].moments[t][0][0, rows]
        )
    for plane in cuts.roll_back():
        for t, table in enumerate(plane.shard.tables):
            rows = table.layout.rows
            np.testing.assert_array_equal(table.data, states[4].values[t][0, rows])


@pytest.mark.parametrize("make", [toy, Factors, small_network], ids=["sgd", "assign", "adam"])
def test_a_replica_has_what_its_chain_promises(make: Callable[[], Problem]) -> None:
    problem = make()
    servers = Servers("uid", problem, problem.initial(stream(problem, 0, 1)))
    tail, lazy = (Replicas(servers, r) for r in (Replication(Ack.TAIL), Replication(Ack.NONE, 4)))
    rng = stream(problem, 0, 0)
    states = [servers.state()]
    for replicas in (tail, lazy):
        replicas.begin()
    for step in range(1, 7):
        batch = problem.batch(rng, step)
        servers.push(step, problem.pushes(servers.state().values, batch))
        for replicas in (tail, lazy):
            replicas.pushed()
        states.append(servers.state())
    late, exact = lazy.promote(1), tail.promote(1)
    for t, table in enumerate(servers.planes[1].shard.tables):
        rows = table.layout.rows
        np.testing.assert_array_equal(exact.shard.tables[t].data, table.data)
        for mine, theirs in zip(exact.shard.tables[t].state, table.state, strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert exact.shard.tables[t].steps.tolist() == table.steps.tolist()
        np.testing.assert_array_equal(late.shard.tables[t].data, states[4].values[t][0, rows])
    # What is under way is not there yet, and is not made twice where it came.
    late = tail.promote(2)
    tail.deliver()
    np.testing.assert_array_equal(tail.promote(2).shard.tables[0].data, late.shard.tables[0].data)
    assert lazy.cost.data > 0


def test_copies_send_what_workers_do_not_have() -> None:
    for problem, sends in ((toy(), False), (small_network(), True)):
        servers = Servers("uid", problem, problem.initial(stream(problem, 0, 1)))
        replicas = Replicas(servers, Replication())
        replicas.begin()
        batch = problem.batch(stream(problem, 0, 0), 1)
        servers.push(1, problem.pushes(servers.state().values, batch))
        replicas.pushed()
        assert replicas.by_itself == sends == bool(replicas.cost.data)


def test_an_eighth_at_each_step_is_as_many_bytes_as_all_at_the_eighth() -> None:
    problem = toy()
    servers = Servers("uid", problem, problem.initial(stream(problem, 0, 1)))
    whole = Saves(servers, Saving(Strategy.PARTIAL, 8))
    parts = Saves(servers, Saving(Strategy.PARTIAL, 8, 0.125))
    before = whole.memory
    for saves in (whole, parts):
        saves.begin()
    first = whole.store.data
    assert parts.store.data == first > servers.nbytes
    rng = stream(problem, 0, 0)
    for step in range(1, 17):
        servers.push(step, problem.pushes(servers.state().values, problem.batch(rng, step)))
        whole.tick()
        parts.tick()
    assert whole.store.data == 3 * first
    # But for an eighth of a server's blocks, which is rounded.
    assert parts.store.data == pytest.approx(3 * first, rel=0.1)
    # One copy of the parameters is kept, whatever is saved, and buffers for the next save.
    assert whole.memory >= parts.memory > before + servers.nbytes


def test_ways_to_save_that_look_on_together_choose_as_each_would_alone() -> None:
    problem = toy()

    def saved(*savings: Saving) -> list[np.ndarray[Any, Any]]:
        """What the last of them brings back."""
        servers = Servers("uid", problem, problem.initial(stream(problem, 0, 1)))
        ways = [Saves(servers, saving) for saving in savings]
        for saves in ways:
            saves.begin()
        rng = stream(problem, 0, 0)
        for step in range(1, 31):
            servers.push(step, problem.pushes(servers.state().values, problem.batch(rng, step)))
            for saves in ways:
                saves.tick()
        return [ways[-1].restore(server).shard.tables[0].data for server in range(SERVERS)]

    last = Saving(Strategy.PARTIAL, 40, 0.125)
    others = [Saving(Strategy.PARTIAL, 8, 0.125, how) for how in Selection]
    for alone, together in zip(saved(last), saved(*others, last), strict=True):
        np.testing.assert_array_equal(alone, together)


# The programs


def test_gradients_of_the_network_are_those_of_its_loss() -> None:
    problem = small_network()
    values = problem.initial(np.random.default_rng(1))
    pushes = problem.pushes(values, np.arange(40))
    for t, (row, col) in [(0, (3, 9)), (0, (0, 4)), (1, (5, 72)), (1, (9, 3)), (2, (2, 64))]:
        ends = []
        for sign in (1, -1):
            moved = [v.copy() for v in values]
            moved[t][0, row, col] += sign * 5e-3
            ends.append(problem.losses(moved)[0])
        assert pushes[t][0, row, col] == pytest.approx((ends[0] - ends[1]) / 1e-2, abs=2e-4)


def test_topics_are_sampled_in_the_batch_alone_and_get_likelier() -> None:
    problem = Topics()
    values = problem.initial(np.random.default_rng(1))
    batch = problem.batch(np.random.default_rng(2), 1)
    (after,) = problem.pushes(values, batch)
    changed = (after != values[0])[0].any(axis=1)
    assert set(np.flatnonzero(changed).tolist()) <= set(batch[0].tolist())
    assert after.min() >= 0
    assert after.max() <= 9
    first = problem.losses(values)[0]
    for step in range(40):
        values = problem.pushes(values, problem.batch(np.random.default_rng(step), step))
    assert problem.losses(values)[0] < first - 0.1


# The placement


def test_what_a_server_holds_is_a_random_part_of_a_model() -> None:
    """E‖δ′‖² = p‖δ‖² over jobs, for a δ that is anything but spread evenly over the blocks."""
    rng = np.random.default_rng(5)
    blocks, jobs = 400, 60
    spec = TableSpec(0, "t", (blocks, 1), 1, rule_to_json(Assign()))
    # Heavy-tailed and sorted: a placement by ranges would fail this by far.
    squared = np.sort(rng.pareto(3.0, blocks))
    total = squared.sum()
    for lost in LOST:
        shares = []
        for job in range(jobs):
            owners = np.array(place(f"job-{job}", SERVERS))
            gone = np.flatnonzero(owners < lost)
            shares.append(squared[TableLayout(f"job-{job}", spec, gone).blocks].sum() / total)
        error = np.std(shares) / np.sqrt(jobs)
        assert abs(np.mean(shares) - lost / SERVERS) < 4 * error
        assert error < 0.03
    assert SLOTS % SERVERS == 0


# The bound


def test_no_perturbation_costs_more_than_its_bound() -> None:
    rows = study(60)
    assert sum(r.trials for r in rows) == 3 * 60 + 3 * 6
    assert [r.violations for r in rows] == [0] * 6
    # Straight away from the optimum the bound is reached.
    assert next(r for r in rows if r.kind == Kind.ADVERSARIAL).tightness > 0.95


def test_a_violation_would_be_counted() -> None:
    samples = [Sample(kind, rework, 2.5) for kind in Kind for rework in (3.0, 4.0)]
    assert [s.violations for s in summarise("made up", samples)] == [1, 1, 1]


# Statistics and the page


def test_the_bootstrap_draws_seeds_then_failures() -> None:
    weights = resamples(4, 10, 400)
    assert weights.sum(axis=1) == pytest.approx(1.0)
    by_seed = weights.reshape(400, 4, 10).sum(axis=2)
    # A seed left out takes all of its failures with it.
    assert (by_seed == 0).any()
    assert by_seed.mean(axis=0) == pytest.approx(0.25, abs=0.03)


def test_the_page_is_made_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = toy_runs()
    program = {
        "program": "toy", "title": "a toy", "tables": [["w", 65, 5, "sgd"]], "parameters": 325,
        "seeds": 4, "failures": 15, "date": "2026-01-01", "seconds": 2.0,
        "target": 0.7, "target_step": 180, "budget": 300, "cap": 900,
        "mtbf": 90.0, "young_daly": {"steps": 8, "save_steps": 0.4}, "concentration": 0.8,
        "cells": [c.to_json() for c in cells(runs, GRID, 50)],
        "standing": [s.to_json() for s in standing(runs)],
    }  # fmt: skip
    result = {
        "quick": True, "machine": "a machine", "date": "2026-01-01", "seconds": 1.0,
        "programs": [json.loads(json.dumps(program))],
        "perturbation": [s.to_json() for s in study(5)],
    }  # fmt: skip
    made = page(result, {"toy": "rework/toy.svg"})
    assert "| toy: reduction by Priority" in made
    assert "exactly 0 | 0 | met" in made
    assert "| Chain None C=8 |" in made
    assert "](rework/toy.svg)" in made
    assert "Not measured in this run: mlr, mf, cnn, lda." in made
    assert "0 violations in 18 | 0 | met" in made


def test_a_run_goes_on_with_what_was_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def measure(name: str, size: Size) -> dict[str, Any]:
        if name == "mf":
            raise BenchError("stopped here")
        measured.append(name)
        return {"program": name, "seeds": size.seeds, "failures": size.failures, "seconds": 1.0}

    monkeypatch.setattr(command, "measure", measure)
    file = tmp_path / "result.json"
    run = ["--quick", "--study", "rework", "--programs", "toy,mlr,mf", "--json", str(file)]
    assert command.main(run) == 1
    assert [p["program"] for p in json.loads(file.read_text())["programs"]] == ["toy", "mlr"]
    assert command.main([*run, "--resume"]) == 1
    assert measured == ["toy", "mlr"]
    assert command.main([*run, "--resume", "--seeds", "3"]) == 1
    assert measured == ["toy", "mlr"] * 2, "of another size"
    assert command.main([*run[1:], "--resume"]) == 2
    assert "another kind of run" in capsys.readouterr().err
    fewer = json.loads(file.read_text())
    file.write_text(json.dumps(fewer | {"arms": fewer["arms"][1:]}))
    assert command.main([*run, "--resume"]) == 2, "of before there was another arm"
    assert "another kind of run" in capsys.readouterr().err
    assert command.main(["--quick", "--resume"]) == 2
    assert "--json" in capsys.readouterr().err


def test_an_unknown_program_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--programs", "nothing"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in PROGRAMS)


def test_young_dalys_interval_is_an_arm_of_its_own() -> None:
    names = [s.name for s in replace(GRID, young_daly=21).savings()]
    assert names == ["FullCheckpoint C=8", "FullCheckpoint C=21", "Partial Priority r=1/8 C=8"]
    assert len(Grid().arms()) == 3 + 3 * 13 * 3 + 3 * 6 * 3


def test_where_blocks_are_equally_large_distance_is_priority() -> None:
    assert even(toy())
    assert even(Factors())
    assert not even(small_network())
