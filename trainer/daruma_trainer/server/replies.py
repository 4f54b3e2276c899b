"""What a server answers, and which worker has asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from daruma_trainer.contract import ContractError, Role
from daruma_trainer.wire import Frame, Kind, Refusal, encode_json


@dataclass(frozen=True, slots=True)
class Reply:
    """What to send back."""

    kind: Kind
    body: Sequence[Frame]
    flags: int = 0


def refuse(refusal: Refusal, message: str) -> Reply:
    """Answer with a named error and a sentence."""
    return Reply(Kind.REFUSED, [encode_json({"message": message})], refusal)


def worker_of(identity: str) -> int:
    """Return the index in a worker's id; ContractError for any other id."""
    role, _, rest = identity.partition("-")
    index, _, incarnation = rest.partition("-")
    if role != Role.WORKER.value.lower() or not index.isdigit() or not incarnation.isdigit():
        raise ContractError(f"{identity!r} is no worker")
    return int(index)
