"""Which of a shard's saves stay in the store; what none of them names is deleted."""

from collections.abc import Callable, Collection, Iterable

from daruma_trainer.checkpoint.store import Store
from daruma_trainer.errors import StoreError
from daruma_trainer.server.background import Background


class Keeper:
    """Files of one incarnation of one shard, and of those before it. Deletes in the background."""

    def __init__(
        self,
        store: Store,
        background: Background,
        where: tuple[str, str],
        keep: int,
        failed: Callable[[StoreError | None], None],
    ) -> None:
        """`where`: the job's prefix, and this incarnation's folder. `keep`: so many manifests."""
        self._store = store
        self._background = background
        self._prefix, self._folder = where
        self.keep = keep
        self._failed = failed
        self._kept: list[tuple[str, frozenset[str]]] = []
        """The newest manifests, and the segments that each names."""
        self._files: set[str] = set()
        """What may lie in the store of this incarnation's running checkpoints."""

    def wrote(self, names: Iterable[str]) -> None:
        """Files of a save may lie there from now on, whether it became durable or not."""
        self._files.update(names)

    def add(self, manifest: str, segments: Iterable[str]) -> None:
        """A running checkpoint is durable: what came before it may be of no use any more."""
        if not self._kept:
            self._forget_predecessors()
        self._kept.append((manifest, frozenset(segments)))
        self._retire(self.keep)

    def only_newest(self) -> None:
        """Nobody may fall back to what came before the newest."""
        self._retire(1)

    def sweep(self, alive: Collection[int]) -> None:
        """Remove what killed saves of earlier incarnations left; `alive` may still be saving."""
        top, _, own = self._folder.rpartition("/")
        kept = {own, *(f"{incarnation:08d}" for incarnation in alive)}
        store = self._store

        def clean() -> None:
            store.sweep(top, lambda name: name.partition("/")[0] not in kept)

        self._background.submit(clean, lambda _result, error: self._failed(error))

    def forget_cuts(self, newest: str) -> None:
        """Delete this shard's files of cuts before `newest` that do not exist (any more)."""
        prefix, store, folders = self._prefix, self._store, self._folders

        def clean() -> None:
            exist = {n.removesuffix(".json") for n in store.list(f"{prefix}/cuts")}
            for folder in folders():
                for name in store.list(folder):
                    number = name.split(".")[0].removeprefix("cut-")
                    if name.startswith("cut-") and number < newest and number not in exist:
                        store.delete(f"{folder}/{name}")

        self._background.submit(clean, lambda _result, error: self._failed(error))

    def _folders(self) -> list[str]:
        """Return the folders of this incarnation and of those before it."""
        top, _, own = self._folder.rpartition("/")
        return [f"{top}/{name}" for name in self._store.list(top) if name <= own]

    def _forget_predecessors(self) -> None:
        """This incarnation's first save is durable: older running checkpoints are of no use."""
        store, folders, own = self._store, self._folders, self._folder

        def clean() -> None:
            for folder in folders():
                for name in store.list(folder) if folder != own else []:
                    if name.startswith(("manifest-", "segment-")):
                        store.delete(f"{folder}/{name}")

        self._background.submit(clean, lambda _result, error: self._failed(error))

    def _retire(self, keep: int) -> None:
        """Delete manifests beyond `keep`, and segments here that none of the others names."""
        self._kept = self._kept[-keep:]
        named = frozenset[str]().union(*({name} | segments for name, segments in self._kept))
        dead, self._files = self._files - named, self._files & named
        store = self._store

        def clean() -> None:
            # Manifests first: while one exists, so does what it names.
            for name in sorted(dead):
                store.delete(name)

        def cleaned(_result: object, error: StoreError | None) -> None:
            if error is not None:
                self._files |= dead
            self._failed(error)

        if dead:
            self._background.submit(clean, cleaned)
