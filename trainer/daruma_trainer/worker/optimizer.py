"""A torch optimizer whose step is taken by the servers."""

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from daruma_trainer.errors import ConfigurationError
from daruma_trainer.layout import Floats, Ints
from daruma_trainer.rules import SGD, Rule
from daruma_trainer.worker.pushes import Update

if TYPE_CHECKING:
    from daruma_trainer.worker.job import Job


class Optimizer(torch.optim.Optimizer):
    """Pushes gradients, pulls parameters. Learning rates are read from `param_groups` at each
    step, so torch's schedulers work on it; clipping happens before `step`, as usual.

    Of a sparse gradient (`torch.nn.Embedding(sparse=True)`) the rows that it has are pushed, and no
    others move, whatever the rule (`rules`)."""

    def __init__(self, job: "Job", params: Iterable[Any], rule: Rule | None) -> None:
        chosen = rule if rule is not None else SGD()
        groups = _named_groups(params)
        names = [group.pop("names") for group in groups]
        super().__init__(groups, {"lr": getattr(chosen, "lr", 0.01)})
        self._job = job
        self._tables: list[tuple[int, torch.nn.Parameter]] = []
        for group, group_names in zip(self.param_groups, names, strict=True):
            own = _rule_of(group, chosen)
            for name, param in zip(group_names, group["params"], strict=True):
                values = param.detach().to("cpu", torch.float32).numpy()
                spec = job.add_table(name, tuple(param.shape), own, values)
                self._tables.append((spec.id, param))
        job.begin()
        job.after_pull(self.write_back)
        self.write_back()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients as one batch, and take the parameters that follow from it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lr_of = {id(p): float(g["lr"]) for g in self.param_groups for p in g["params"]}
        updates = []
        for table, param in self._tables:
            if param.grad is None:
                continue
            updates.append(Update(table, lr_of[id(param)], *_gradient_of(param.grad)))
        self._job.exchange(tuple(updates))
        return loss

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy what was pulled into the parameters, on whatever device they are."""
        for table, param in self._tables:
            param.copy_(torch.from_numpy(self._job.values(table).reshape(tuple(param.shape))))


def _gradient_of(grad: torch.Tensor) -> tuple[Floats, Ints | None]:
    """Return a gradient as (rows, cols), and which rows these are if it is sparse.

    A copy: it is kept until all servers have it, and zero_grad may come before that.
    """
    grad = grad.detach()
    rows = None
    if grad.is_sparse and grad.sparse_dim() == 1:
        grad = grad.coalesce()
        rows = grad.indices()[0].to("cpu", copy=True).numpy()
        grad = grad.values()
    elif grad.layout != torch.strided:
        grad = grad.to_dense()
    values = np.ascontiguousarray(grad.to("cpu", torch.float32, copy=True).numpy())
    count, cols = (values.shape[0], values.shape[1:]) if values.ndim else (1, ())
    return values.reshape(count, math.prod(cols)), rows


def _rule_of(group: dict[str, Any], rule: Rule) -> Rule:
    """Return the rule of one parameter group: the job's, with what the group says otherwise.

    The rate travels with each push, so it does not make a rule of its own.
    """
    own = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
    known = {f.name for f in fields(cast("Any", rule))}
    if unknown := sorted(own.keys() - known):
        raise ConfigurationError(
            f"a parameter group has {', '.join(unknown)}: "
            f"{type(rule).__name__} takes {', '.join(sorted(known))}"
        )
    return cast("Rule", replace(cast("Any", rule), **own))


def _named_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Bring parameters, named parameters or groups into groups with names."""
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    out = []
    count = 0
    for group in groups:
        members = list(group["params"])
        names, found = [], []
        for member in members:
            name, param = member if isinstance(member, tuple) else (f"p{count}", member)
            names.append(name)
            found.append(param)
            count += 1
        out.append({**group, "params": found, "names": names})
    return out
