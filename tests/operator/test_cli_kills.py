"""`--kill`: what is understood, what is refused, when it is due."""

import pytest

from daruma_operator.cli.kills import Kill, check_kills, due, parse_kill
from daruma_operator.errors import UsageError
from daruma_trainer.contract import Role


def test_a_kill_reads_as_it_is_written() -> None:
    assert parse_kill("server-1@step=50") == Kill(Role.SERVER, 1, 50)
    assert str(parse_kill("worker-12@step=0")) == "worker-12@step=0"


@pytest.mark.parametrize(
    "text", ["", "server-1", "server@step=5", "chief-0@step=5", "server-1@step=-1", "server-1@50"]
)
def test_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="as in server-1@step=50"):
        parse_kill(text)


def test_a_member_that_the_job_lacks_is_refused() -> None:
    check_kills([Kill(Role.SERVER, 1, 5)], servers=2, workers=1)
    with pytest.raises(UsageError, match="the job has 1 workers, counted from 0"):
        check_kills([Kill(Role.WORKER, 1, 5)], servers=2, workers=1)


def test_due_from_its_step_on() -> None:
    kills = [Kill(Role.SERVER, 0, 5), Kill(Role.SERVER, 1, 9)]
    assert [due(kills, step) for step in (4, 5, 9)] == [[], kills[:1], kills]
