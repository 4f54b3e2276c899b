"""Whatever happens to replicas and copies, in any order: see `replication_machine`."""

from hypothesis import HealthCheck, settings

from replication_machine import Replication
from soak import counted

STORIES, COUNTED = counted("stories of 30 steps: replicas, copies, promotions", 80, 5_000)
Replication.TestCase.settings = settings(
    max_examples=STORIES,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestReplication = COUNTED(Replication.TestCase)
