"""Update rules: what a server does with a push. numpy kernels, tiled to the cache.

Each equals its torch.optim namesake within 1e-6 over 100 steps. Arrays are float32, contiguous; the
optimizer's state arrays have the shape of the data. Step counters belong to blocks, so a block
whose moments were lost starts again with a bias correction of its own (measured to be nearly as
good as exact moments; a wrong one is worse than a full rollback).

Single rows are updated lazily, as torch.optim.SparseAdam and Adagrad do with sparse gradients: what
is not pushed does not move, nor do its moments, nor does it decay. A block counts each push that
has any of its rows once, and a row's bias correction is its block's: SparseAdam's is its whole
table's. Where every push has all rows both are the same, and that of the dense kernels.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np

from daruma_trainer.contract import ContractError
from daruma_trainer.layout import Floats, Ints

TILE = 16 << 10
"""Elements worked on at once: three arrays of them stay in a core's cache; larger is slower."""


class Rule(Protocol):
    """How a push changes the parameters."""

    name: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]
    gradient: ClassVar[bool]
    """Whether a push is a gradient (meaned under Sync) or the change itself (summed)."""

    def apply(
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int | Ints
    ) -> float:
        """Change `data` and `state` in place; all of one shape, flat or (rows, cols).

        `step` counts the updates of these blocks, this one included (1: the first); of single rows,
        whose blocks may differ, it is an array (rows, 1). Returns the squared L2 norm of the
        change, which costs next to nothing while it is in the cache.
        """


@dataclass(frozen=True, slots=True)
class SGD:
    """torch.optim.SGD, with momentum, dampening, weight decay and Nesterov's variant."""

    lr: float = 0.01
    """Where the worker's parameter groups begin; each push carries its own."""

    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    name: ClassVar[str] = "sgd"
    state_names: ClassVar[tuple[str, ...]] = ("momentum",)
    gradient: ClassVar[bool] = True

    def apply(
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int | Ints
    ) -> float:
        """See Rule.apply; with momentum 0 the momentum array is neither read nor written."""
        change = 0.0
        first = np.equal(step, 1)
        for tile, room in _tiles(data, 1):
            x, g, t = data[tile], push[tile], room[0]
            if self.weight_decay:
                np.multiply(x, np.float32(self.weight_decay), out=t)
                t += g
                g = t
            if self.momentum:
                m = state[0][tile]
                m *= np.float32(self.momentum)
                m += g * np.float32(1 - self.dampening) if self.dampening else g
                if first.any():
                    np.copyto(m, g, where=first[tile] if first.ndim else first)
                g = np.add(g, m * np.float32(self.momentum), out=t) if self.nesterov else m
            np.multiply(g, np.float32(lr), out=t)
            x -= t
            change += _squared(t)
        return change


@dataclass(frozen=True, slots=True)
class Adam:
    """torch.optim.Adam (weight decay added to the gradient, no amsgrad)."""

    lr: float = 0.001

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    name: ClassVar[str] = "adam"
    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    gradient: ClassVar[bool] = True

    def apply(
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int | Ints
    ) -> float:
        """See Rule.apply."""
        size = _by_step(step, lambda s: lr / (1 - self.beta1**s))
        root = _by_step(step, lambda s: 1 / math.sqrt(1 - self.beta2**s))
        change = 0.0
        for tile, room in _tiles(data, 2):
            x, g, m, v = data[tile], push[tile], state[0][tile], state[1][tile]
            t, u = room
            if self.weight_decay:
                np.multiply(x, np.float32(self.weight_decay), out=u)
                u += g
                g = u
            np.subtract(g, m, out=t)
            t *= np.float32(1 - self.beta1)
            m += t
            np.multiply(g, g, out=t)
            t *= np.float32(1 - self.beta2)
            v *= np.float32(self.beta2)
            v += t
            np.sqrt(v, out=t)
            t *= root[tile] if root.ndim else root
            t += np.float32(self.eps)
            np.divide(m, t, out=t)
            t *= size[tile] if size.ndim else size
            x -= t
            change += _squared(t)
        return change


@dataclass(frozen=True, slots=True)
class Adagrad:
    """torch.optim.Adagrad."""

    lr: float = 0.01

    eps: float = 1e-10
    weight_decay: float = 0.0
    name: ClassVar[str] = "adagrad"
    state_names: ClassVar[tuple[str, ...]] = ("sum",)
    gradient: ClassVar[bool] = True

    def apply(
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int | Ints
    ) -> float:
        """See Rule.apply."""
        del step
        change = 0.0
        for tile, room in _tiles(data, 2):
            x, g, s = data[tile], push[tile], state[0][tile]
            t, u = room
            if self.weight_decay:
                np.multiply(x, np.float32(self.weight_decay), out=u)
                u += g
                g = u
            np.multiply(g, g, out=t)
            s += t
            np.sqrt(s, out=t)
            t += np.float32(self.eps)
            np.divide(g, t, out=t)
            t *= np.float32(lr)
            x -= t
            change += _squared(t)
        return change


@dataclass(frozen=True, slots=True)
class Add:
    """The push is added: counts, sums. Its learning rate is ignored."""

    name: ClassVar[str] = "add"
    state_names: ClassVar[tuple[str, ...]] = ()
    gradient: ClassVar[bool] = False

    def apply(
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int | Ints
    ) -> float:
        """See Rule.apply."""
        del state, lr, step
        data += push
        return _squared(push)


@dataclass(frozen=True, slots=True)
class Assign:
    """The push is the new value.

    labels: values are whole numbers below this that stand for nothing but themselves, such as the
    topics of an LDA. How far a block has moved is then how often each occurs, in total variation
    times its values (SCAR's distance for topics). 0: values are numbers, and it is the L2 norm.
    """

    labels: int = 0
    name: ClassVar[str] = "assign"
    state_names: ClassVar[tuple[str, ...]] = ()
    gradient: ClassVar[bool] = False

    def apply(
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int | Ints
    ) -> float:
        """See Rule.apply."""
        del state, lr, step
        change = push - data
        np.copyto(data, push)
        return _squared(change)


MAX_LABELS = 4096
RULES: dict[str, Any] = {rule.name: rule for rule in (SGD, Adam, Adagrad, Add, Assign)}


def rule_to_json(rule: Rule) -> str:
    """Write a rule canonically, so that equal rules are equal texts."""
    return json.dumps({"rule": rule.name, **asdict(rule)}, sort_keys=True)  # type: ignore[call-overload]


def rule_from_json(text: str) -> Rule:
    """Read and bound a rule; ContractError says which value is wrong."""
    raw = json.loads(text)
    kind = RULES.get(raw.pop("rule", None)) if isinstance(raw, dict) else None
    if kind is None:
        raise ContractError(f"no update rule {text[:80]!r}; there are {', '.join(RULES)}")
    types = {f.name: f.type for f in fields(kind)}
    for key, value in raw.items():
        if key not in types or (types[key] is bool) != isinstance(value, bool):
            raise ContractError(f"{kind.name}.{key}: unknown, or of another type")
        if not (isinstance(value, int | float) and math.isfinite(value) and 0 <= value < 1e6):
            raise ContractError(f"{kind.name}.{key} is {value!r}: at least 0 and finite")
        if types[key] is int and not (isinstance(value, int) and value <= MAX_LABELS):
            raise ContractError(f"{kind.name}.{key} is {value}: a whole number to {MAX_LABELS:,}")
        if key in ("beta1", "beta2", "momentum") and value >= 1:
            raise ContractError(f"{kind.name}.{key} is {value}: less than 1")
    rule: Rule = kind(**raw)
    return rule


def state_names(rule: Rule) -> tuple[str, ...]:
    """Return what a rule keeps beside the parameters: nothing for SGD without momentum."""
    idle = isinstance(rule, SGD) and not rule.momentum
    return () if idle else rule.state_names


def _tiles(data: Floats, scratch: int) -> Iterator[tuple[slice, Floats]]:
    """Cut an array into tiles, along its first axis; each with so many arrays to work in."""
    count = max(1, TILE // max(1, data[:1].size))
    room = np.empty((scratch, *data[:count].shape), np.float32)
    for a in range(0, len(data), count):
        yield slice(a, a + count), room[:, : len(data) - a]


def _squared(values: Floats) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _by_step(step: int | Ints, value: Callable[[int], float]) -> Any:
    """Compute what follows from the step, in the shape of `step`.

    By the same arithmetic for many: what a row becomes must not depend on its company.
    """
    if isinstance(step, int):
        return np.float32(value(step))
    steps, each = np.unique(step, return_inverse=True)
    return np.array([value(s) for s in steps.tolist()], np.float32)[each].reshape(step.shape)
