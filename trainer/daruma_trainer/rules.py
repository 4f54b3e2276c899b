"""Update rules: what a server does with a push. numpy kernels, tiled to the cache.

Each equals its torch.optim namesake within 1e-6 over 100 steps. Arrays are (rows, cols) float32,
contiguous, whole blocks; the optimizer's state arrays have the shape of the data. Step counters
belong to blocks, so a block whose moments were lost starts again with a bias correction of its
own (measured to be nearly as good as exact moments; a wrong one is worse than a full rollback).
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np

from daruma_trainer.contract import ContractError
from daruma_trainer.layout import Floats

TILE = 16 << 10
"""Elements worked on at once: three arrays of them stay in a core's cache; larger is slower."""


class Rule(Protocol):
    """How a push changes the parameters."""

    name: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]
    gradient: ClassVar[bool]
    """Whether a push is a gradient (meaned under Sync) or the change itself (summed)."""

    def apply(
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int
    ) -> float:
        """Change `data` and `state` in place; all flat and of one length.

        `step` counts the updates of these blocks, this one included (1: the first). Returns the
        squared L2 norm of the change, which costs next to nothing while it is in the cache.
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
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int
    ) -> float:
        """See Rule.apply; with momentum 0 the momentum array is neither read nor written."""
        change = 0.0
        scratch = np.empty(min(TILE, data.size), np.float32)
        for a in range(0, data.size, TILE):
            x, g = data[a : a + TILE], push[a : a + TILE]
            t = scratch[: x.size]
            if self.weight_decay:
                np.multiply(x, np.float32(self.weight_decay), out=t)
                t += g
                g = t
            if self.momentum:
                m = state[0][a : a + TILE]
                if step == 1:
                    np.copyto(m, g)
                else:
                    m *= np.float32(self.momentum)
                    m += g * np.float32(1 - self.dampening) if self.dampening else g
                g = np.add(g, m * np.float32(self.momentum), out=t) if self.nesterov else m
            np.multiply(g, np.float32(lr), out=t)
            x -= t
            change += float(np.dot(t, t))
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
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int
    ) -> float:
        """See Rule.apply."""
        size = np.float32(lr / (1 - self.beta1**step))
        root = np.float32(1 / math.sqrt(1 - self.beta2**step))
        change = 0.0
        scratch = np.empty((2, min(TILE, data.size)), np.float32)
        for a in range(0, data.size, TILE):
            x, g = data[a : a + TILE], push[a : a + TILE]
            m, v = state[0][a : a + TILE], state[1][a : a + TILE]
            t, u = scratch[0, : x.size], scratch[1, : x.size]
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
            t *= root
            t += np.float32(self.eps)
            np.divide(m, t, out=t)
            t *= size
            x -= t
            change += float(np.dot(t, t))
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
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int
    ) -> float:
        """See Rule.apply."""
        del step
        change = 0.0
        scratch = np.empty((2, min(TILE, data.size)), np.float32)
        for a in range(0, data.size, TILE):
            x, g = data[a : a + TILE], push[a : a + TILE]
            s = state[0][a : a + TILE]
            t, u = scratch[0, : x.size], scratch[1, : x.size]
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
            change += float(np.dot(t, t))
        return change


@dataclass(frozen=True, slots=True)
class Add:
    """The push is added: counts, sums. Its learning rate is ignored."""

    name: ClassVar[str] = "add"
    state_names: ClassVar[tuple[str, ...]] = ()
    gradient: ClassVar[bool] = False

    def apply(
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int
    ) -> float:
        """See Rule.apply."""
        del state, lr, step
        data += push
        return float(np.dot(push, push))


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
        self, data: Floats, push: Floats, state: tuple[Floats, ...], lr: float, step: int
    ) -> float:
        """See Rule.apply."""
        del state, lr, step
        change = push - data
        np.copyto(data, push)
        return float(np.dot(change, change))


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
