"""Put the tables of a cut together, from the shards of all servers."""

import numpy as np

from daruma_trainer.checkpoint.manifest import Cut, newest_cut, read_manifest
from daruma_trainer.checkpoint.reading import read_blocks
from daruma_trainer.checkpoint.store import Store, open_store
from daruma_trainer.errors import ConfigurationError, DamagedError, StoreAwayError, StoreError
from daruma_trainer.layout import Floats, TableSpec


def open_cut(uri: str) -> tuple[Store, Cut]:
    """Open what `status.result.uri` names: a cut's file, or a job's folder (its newest cut).

    ConfigurationError: it is neither. StoreError: it cannot be read.
    """
    store, _, name = _open(uri)
    return store, Cut.decode(store.read(name))


def load(uri: str) -> dict[str, Floats]:
    """Put all tables of what `open_cut` opens together, by name.

    DamagedError: it is not whole; the message names the newest cut before it, if there is one.
    """
    store, root, name = _open(uri)
    try:
        return load_state(store, Cut.decode(store.read(name)))
    except StoreAwayError:
        raise
    except StoreError as error:
        older = newest_cut(store, name.rpartition("/cuts/")[0], before=name)
        hint = "and there is no cut before it"
        if older is not None:
            hint = f"the cut before it, of step {older[1].step}, is {root}/{older[0]}"
        raise DamagedError(f"{uri} is damaged: {error}; {hint}") from error


def _open(uri: str) -> tuple[Store, str, str]:
    """Return the store, its URI, and the name of a cut's file in it."""
    # <store>/<namespace>/<name>/<uid>[/cuts/<number>.json]
    parts = uri.rstrip("/").split("/")
    depth = 5 if parts[-1].endswith(".json") else 3
    if len(parts) < depth + 3:
        raise ConfigurationError(
            f"{uri} is no checkpoint: name the job's status.result.uri, "
            "<store>/<namespace>/<name>/<uid>/cuts/<number>.json, or the folder <uid>"
        )
    root, name = "/".join(parts[:-depth]), "/".join(parts[-depth:])
    store = open_store(root)
    if depth == 3:
        found = newest_cut(store, name)
        if found is None:
            raise StoreError(f"{uri} holds no complete cut; was the job ever saved?")
        name = found[0]
    return store, root, name


def load_state(store: Store, cut: Cut) -> dict[str, Floats]:
    """Put all tables of a cut together, by name. DamagedError: a part is missing or not whole."""
    tables: dict[int, TableSpec] = {}
    arrays: dict[int, Floats] = {}
    found: dict[int, int] = {}
    for path in cut.shards:
        manifest = read_manifest(store, path)
        for table in manifest.tables:
            if tables.setdefault(table.id, table) != table:
                raise DamagedError(f"{path}: table {table.name!r} differs from other shards'")
            arrays.setdefault(table.id, np.zeros((table.rows, table.cols), np.float32))
        # One block at a time: a whole shard's records would double the memory needed.
        for key in manifest.blocks:
            blocks, damaged = read_blocks(store, manifest, [key])
            if damaged:
                raise DamagedError(f"{path}: {damaged[0]}")
            table, first = tables[key[0]], key[1] * tables[key[0]].block_rows
            rows = arrays[table.id][first : first + table.block_rows]
            if not rows.size or blocks[0].data.size != rows.size:
                raise DamagedError(f"{path}: block {key[1]} of table {table.name!r} does not fit")
            rows[:] = blocks[0].data.reshape(rows.shape)
            found[table.id] = found.get(table.id, 0) + 1
    for table in tables.values():
        if found.get(table.id, 0) != table.blocks:
            raise DamagedError(
                f"table {table.name!r}: {found.get(table.id, 0)} of {table.blocks} blocks are there"
            )
    return {t.name: arrays[t.id].reshape(t.shape) for t in tables.values()}
