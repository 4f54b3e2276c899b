"""What a server's /metrics answers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from daruma_trainer.contract import Role
from daruma_trainer.identity import Identity
from daruma_trainer.server.metrics import exposition
from saving_world import World

LABELS = 'index="0",job="j",role="Server"'


def scraped(**life: Any) -> dict[str, float]:
    me = Identity("n", "j", Role.SERVER, 0, 1, "")
    found = {"plane": None, "saver": None, "cuts": None} | life
    replicator = SimpleNamespace(bytes_total=11)
    server = SimpleNamespace(me=me, stale=2, life=SimpleNamespace(**found), replicator=replicator)
    lines = exposition(cast("Any", server)).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.replace(f"{{{LABELS}}}", ""): float(value) for name, value in pairs}


def test_before_the_first_membership_there_is_little_to_say() -> None:
    assert scraped() == {"daruma_stale_requests_total": 2.0}


def test_saves_and_cuts_that_were_given_up_are_counted(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin()
    world.background.run()
    world.train(3)
    world.cuts.abandoned = 4
    found = scraped(plane=world.plane, saver=world.saver, cuts=world.cuts)
    assert found["daruma_step"] == found["daruma_checkpoint_age_steps"] == 3
    before = found["daruma_checkpoint_bytes_total"]
    assert before == world.saver.bytes_total > 0
    assert found["daruma_cuts_abandoned_total"] == 4
    assert found["daruma_replica_bytes_total"] == 11
    world.cuts.take("00000001-0000000003")
    world.background.run()
    found = scraped(plane=world.plane, saver=world.saver, cuts=world.cuts)
    assert found["daruma_checkpoint_bytes_total"] > before, "a cut is bytes that were saved, too"
