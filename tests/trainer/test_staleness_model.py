"""How far apart workers may be: no batch is made of values that lack another's older than allowed.

Real servers' shards, copies and positions; messages arrive in any order between workers and
servers, workers die, are replaced, leave.
"""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from daruma_trainer.contract import Settings
from daruma_trainer.rules import Add
from planes import COLS, Planes, Seat
from soak import counted

WORKERS, SERVERS = 3, 2
workers = st.integers(0, WORKERS - 1)
servers = st.integers(0, SERVERS - 1)


class Staleness(RuleBasedStateMachine):
    @initialize(
        mode=st.sampled_from(["Bounded", "Bounded", "Sync"]),
        staleness=st.integers(0, 3),
        least=st.integers(0, 3),
    )
    def begin(self, mode: str, staleness: int, least: int) -> None:
        self.bound = staleness if mode == "Bounded" else 0
        config = Settings(consistency=mode, max_staleness=self.bound, min_replicas=least)
        # Each column counts one worker's batches.
        self.planes = Planes(
            config, Add(), servers=SERVERS, workers=WORKERS,
            gives=lambda w, _b: np.eye(WORKERS, COLS, dtype=np.float32)[w],
        )  # fmt: skip
        self.made: list[list[int]] = [[] for _ in range(WORKERS)]
        """By worker: the batches that its present incarnation made."""
        self.given: set[tuple[int, int, int]] = set()
        """(server, worker, batch) of pushes that arrived."""
        self.unheard: dict[int, set[int]] = {}
        """By worker that entered: servers that do not know its position yet."""
        self.behind: list[set[int]] = [set() for _ in range(SERVERS)]
        """By server: workers of whose loss it has not heard."""
        self.left: set[int] = set()

    def entered(self, w: int) -> bool:
        return self.planes.seats[w].resumed

    def may_make(self, seat: Seat) -> bool:
        there = seat.resumed and seat.index not in self.left
        return there and not seat.missing and not self.unheard.get(seat.index) and not seat.flying

    @rule(w=workers)
    def enter(self, w: int) -> None:
        """A worker's program begins, once every server knows of it."""
        seat = self.planes.seats[w]
        if seat.resumed or any(w in behind for behind in self.behind):
            return
        self.planes.enter(seat)
        self.unheard[w] = set(range(SERVERS))

    @rule(w=workers, server=servers)
    def hear_position(self, w: int, server: int) -> None:
        if server in self.unheard.get(w, set()):
            self.unheard[w].discard(server)
            seat = self.planes.seats[w]
            assert self.planes.resync(seat, server) == [], "nothing was lost: no server was"
            self.planes.ask(seat, server, self.planes.pace(seat))

    @rule(w=workers)
    def make(self, w: int) -> None:
        seat = self.planes.seats[w]
        if not self.may_make(seat):
            return
        needed = seat.batch - self.bound
        for other in self.planes.seats:
            if other is seat or not other.resumed or other.index in self.left:
                continue
            # Whoever is there is not further behind, and all that it made up to that is seen.
            assert other.batch >= needed, (w, seat.batch, other.index, other.batch)
            due = [b for b in self.made[other.index] if b <= needed]
            if due:
                has = seat.copy.last[:, other.index]
                assert (has >= max(due)).all(), (w, seat.batch, other.index, has)
        self.planes.make(seat)
        self.made[w].append(seat.batch)

    @rule(w=workers, server=servers)
    def arrive(self, w: int, server: int) -> None:
        seat = self.planes.seats[w]
        if any(s == server for s, _ in seat.flying):
            self.given.add((server, w, next(b for s, b in seat.flying if s == server)))
            self.planes.arrive(seat, server)
            self.planes.ask(seat, server, self.planes.pace(seat))

    @rule(w=workers)
    def step(self, w: int) -> None:
        """As it mostly goes."""
        self.make(w)
        for server in range(SERVERS):
            self.arrive(w, server)

    @rule(w=workers)
    def lose(self, w: int) -> None:
        if w in self.left:
            return
        self.planes.lose(w)
        self.made[w].clear()
        self.unheard.pop(w, None)
        for behind in self.behind:
            behind.add(w)

    @rule(server=servers)
    def tell(self, server: int) -> None:
        self.behind[server].clear()
        self.planes.tell(server)

    @rule(w=workers)
    @precondition(lambda self: not self.left)
    def leave(self, w: int) -> None:
        """One worker's data end before the others'."""
        seat = self.planes.seats[w]
        if self.may_make(seat):
            self.left.add(w)
            self.planes.leave(seat)

    def counted(self, server: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """How many of each worker's batches a server was given."""
        mine = [w for s, w, _ in self.given if s == server]
        return np.bincount(mine, minlength=WORKERS).astype(np.float32)

    @invariant()
    def nothing_is_applied_twice(self) -> None:
        for server in range(SERVERS):
            assert (self.planes.values(server) <= self.counted(server)).all()

    def come_back(self) -> None:
        for server in range(SERVERS):
            self.tell(server)
        for w in range(WORKERS):
            self.enter(w)
            for server in range(SERVERS):
                self.hear_position(w, server)

    def catch_up(self, live: set[int]) -> None:
        """Let who is ahead have given to no step that the others have yet to make."""
        most = max(self.planes.seats[w].batch for w in live)
        for _ in range(self.bound + 1):
            for w in live:
                if self.planes.seats[w].batch < most:
                    self.step(w)

    def teardown(self) -> None:
        """Everybody comes back: nobody waits for ever, and all that was given was applied once."""
        if not hasattr(self, "planes"):
            return
        self.come_back()
        for _ in range(3 * (self.bound + 2)):
            for w in range(WORKERS):
                for server in range(SERVERS):
                    while any(s == server for s, _ in self.planes.seats[w].flying):
                        self.arrive(w, server)
                self.step(w)
        live = set(range(WORKERS)) - self.left
        self.catch_up(live)
        for w in live:
            assert self.made[w], f"worker {w} waits for ever"
        for server in range(SERVERS):
            assert (self.planes.values(server) == self.counted(server)).all()


STORIES, COUNTED = counted("stories of 40 steps: staleness and elastic steps", 150, 5_000)
Staleness.TestCase.settings = settings(max_examples=STORIES, stateful_step_count=40, deadline=None)
TestStaleness = COUNTED(Staleness.TestCase)
