"""Tests of daruma_trainer.rules: each rule is its torch namesake."""

from typing import Any

import numpy as np
import pytest

from daruma_trainer.contract import ContractError
from daruma_trainer.rules import (
    SGD,
    TILE,
    Adagrad,
    Adam,
    Add,
    Assign,
    Rule,
    rule_from_json,
    rule_to_json,
)

SIZE = TILE + 100  # more than one tile, and a shorter last one


def ours(
    rule: Rule, start: np.ndarray[Any, Any], grads: list[np.ndarray[Any, Any]], lr: float
) -> np.ndarray[Any, Any]:
    data = start.copy()
    state = tuple(np.zeros_like(data) for _ in rule.state_names)
    for step, grad in enumerate(grads, start=1):
        rule.apply(data, grad, state, lr, step)
    return data


def torchs(
    make: Any, start: np.ndarray[Any, Any], grads: list[np.ndarray[Any, Any]]
) -> np.ndarray[Any, Any]:
    import torch  # takes seconds: only the process that runs this pays for it

    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = make(torch.optim, [param])
    for grad in grads:
        param.grad = torch.from_numpy(grad.copy())
        optimizer.step()
    found: np.ndarray[Any, Any] = param.detach().numpy()
    return found


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (SGD(), lambda optim, p: optim.SGD(p, lr=0.01)),
        (SGD(momentum=0.9), lambda optim, p: optim.SGD(p, lr=0.01, momentum=0.9)),
        (
            SGD(momentum=0.9, dampening=0.1, weight_decay=0.01),
            lambda optim, p: optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.1, weight_decay=0.01),
        ),
        (
            SGD(momentum=0.9, nesterov=True, weight_decay=0.01),
            lambda optim, p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
        ),
        (Adam(), lambda optim, p: optim.Adam(p, lr=0.01)),
        (
            Adam(beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.01),
            lambda optim, p: optim.Adam(p, lr=0.01, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.01),
        ),
        (Adagrad(), lambda optim, p: optim.Adagrad(p, lr=0.01)),
        (
            Adagrad(weight_decay=0.01, eps=1e-6),
            lambda optim, p: optim.Adagrad(p, lr=0.01, weight_decay=0.01, eps=1e-6),
        ),
    ],
    ids=lambda value: "torch" if callable(value) else str(value),
)
def test_a_rule_equals_torchs_over_100_steps(rule: Rule, make: Any) -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(size=SIZE).astype(np.float32)
    grads = [rng.normal(size=SIZE).astype(np.float32) for _ in range(100)]
    np.testing.assert_allclose(
        ours(rule, start, grads, 0.01), torchs(make, start, grads), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("rule", [SGD(momentum=0.9, dampening=0.5), Adam(), Adagrad()], ids=str)
def test_rows_that_differ_in_their_steps_are_updated_as_each_alone(rule: Rule) -> None:
    rng = np.random.default_rng(2)
    shape = (300, TILE // 100)
    data, push = rng.normal(size=(2, *shape)).astype(np.float32)
    state = tuple(rng.random(shape).astype(np.float32) for _ in rule.state_names)
    steps = rng.integers(1, 5, (len(data), 1))
    alone = data.copy()
    kept = tuple(s.copy() for s in state)
    for i, step in enumerate(steps[:, 0].tolist()):
        rule.apply(alone[i], push[i], tuple(s[i] for s in kept), 0.1, step)
    rule.apply(data, push, state, 0.1, steps)
    for array, expected in zip((data, *state), (alone, *kept), strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("rule", [SGD(momentum=0.9), Adam(), Adagrad(), Add(), Assign()], ids=str)
def test_the_change_that_a_rule_tells_is_the_change_it_makes(rule: Rule) -> None:
    rng = np.random.default_rng(1)
    data = rng.normal(size=SIZE).astype(np.float32)
    before = data.copy()
    state = tuple(np.zeros_like(data) for _ in rule.state_names)
    told = rule.apply(data, rng.normal(size=SIZE).astype(np.float32), state, 0.1, 1)
    assert told == pytest.approx(float(np.sum((data - before).astype(np.float64) ** 2)), rel=1e-3)


def test_add_adds_and_assign_assigns() -> None:
    data = np.ones(3, np.float32)
    Add().apply(data, np.array([1, 2, 3], np.float32), (), 0.5, 1)
    assert data.tolist() == [2, 3, 4]
    Assign().apply(data, np.array([7, 8, 9], np.float32), (), 0.5, 1)
    assert data.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    "rule",
    [SGD(momentum=0.5, nesterov=True), Adam(), Adagrad(), Add(), Assign(), Assign(labels=20)],
    ids=str,
)
def test_rules_read_back(rule: Rule) -> None:
    assert rule_from_json(rule_to_json(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"rule": "magic"}',
        '{"rule": "sgd", "momentum": 1.5}',
        '{"rule": "sgd", "momentum": -0.1}',
        '{"rule": "sgd", "nesterov": 1}',
        '{"rule": "adam", "eps": 1e400}',
        '{"rule": "adam", "foo": 1}',
        '{"rule": "assign", "labels": -1}',
        '{"rule": "assign", "labels": 2.5}',
        '{"rule": "assign", "labels": 1000000}',
    ],
)
def test_rules_out_of_bounds_are_refused(text: str) -> None:
    with pytest.raises(ContractError):
        rule_from_json(text)
