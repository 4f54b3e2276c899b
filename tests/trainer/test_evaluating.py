"""What worker 0 finds the parameters worth: when it looks, and that it is heard."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from daruma_trainer.errors import GaveUpError
from daruma_trainer.worker.evaluating import Evaluation


class Client:
    """A worker whose servers answer, or are gone."""

    def __init__(self, index: int) -> None:
        self.me = SimpleNamespace(index=index)
        self.batch = 0
        self.gone = False
        self.did: list[str] = []

    def pull(self, _min_step: int) -> Any:
        self.did.append("pull")
        return SimpleNamespace(missing=SimpleNamespace(any=lambda: False))

    def say(self) -> None:
        self.did.append("say")

    @property
    def said(self) -> bool:
        return not self.gone

    def wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        if self.gone or not ready():
            raise GaveUpError(f"{what} did not come within {seconds:g} s")


def evaluation(index: int, every: int, found: Any = 0.5) -> tuple[Client, Evaluation]:
    client: Any = Client(index)
    made = Evaluation(client, lambda **values: client.did.append(f"report {values}"))

    def score() -> Any:
        client.did.append("score")
        return found

    made.choose(score, every)
    return client, made


@pytest.mark.parametrize(("every", "batches"), [(3, [3, 6]), (0, [])])
def test_worker_0_looks_after_every_so_many_batches(every: int, batches: list[int]) -> None:
    client, made = evaluation(0, every)
    seen = []
    for batch in range(1, 8):
        client.batch = batch
        made.after_batch()
        seen += [batch] * client.did.count("score")
        client.did.clear()
    assert seen == batches


def test_others_never_look() -> None:
    client, made = evaluation(1, 1)
    made.after_batch()
    made.of_result([lambda: client.did.append("write")])
    assert client.did == []


def test_a_program_that_has_no_function_is_not_asked() -> None:
    client: Any = Client(0)
    made = Evaluation(client, lambda **_: None)
    made.after_batch()
    made.of_result([])
    assert client.did == []


@pytest.mark.parametrize(
    ("found", "reported"), [(0.5, {"score": 0.5}), ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0})]
)
def test_the_result_is_pulled_written_scored_and_said(
    found: Any, reported: dict[str, float]
) -> None:
    client, made = evaluation(0, 0, found)
    made.of_result([lambda: client.did.append("write")])
    assert client.did == ["pull", "write", "score", f"report {reported}", "say"]


def test_where_a_server_is_gone_the_last_values_are_scored() -> None:
    client, made = evaluation(0, 0)
    client.gone = True
    made.of_result([lambda: client.did.append("write")])
    assert client.did == ["pull", "write", "score", "report {'score': 0.5}", "say"]
