"""The membership that members get: a pure function of status, spec and the job's uid."""

from collections.abc import Iterable

from daruma_operator.api.job import TrainingJob
from daruma_operator.api.spec import StrategyName, TrainingJobSpec
from daruma_operator.api.status import MemberStatus, TrainingJobStatus
from daruma_operator.recovery.strategies import PRESETS, keeps_running, rolls_back
from daruma_trainer.contract import Member, Membership, Replay, Rollback, Settings, SourceKind


def ladder_of(spec: TrainingJobSpec) -> tuple[StrategyName, ...]:
    """Return the strategy and its fallbacks, in the order in which they are tried."""
    return (spec.recovery.strategy, *spec.recovery.fallback)


def members_of(members: Iterable[MemberStatus]) -> tuple[Member, ...]:
    """Return members of a status as the contract has them."""
    return tuple(Member(m.role, m.index, m.incarnation, m.pod, m.address, m.node) for m in members)


def membership_of(job: TrainingJob, status: TrainingJobStatus, store: str | None) -> Membership:
    """Return what `status` announces. Whatever changes in it, the epoch was raised with it."""
    return Membership(
        job_uid=job.uid,
        namespace=job.namespace,
        name=job.name,
        epoch=status.epoch,
        servers=job.spec.servers.replicas,
        workers=job.spec.workers.replicas,
        members=members_of(status.members),
        settings=settings_of(job.spec, store),
        initialised=status.initialised,
        rollback=Rollback(status.rollback.generation, status.rollback.cut),
        recovery=None if status.recovery is None else status.recovery.id,
        handing=members_of(status.handing),
        replicas=members_of(status.replicas),
        saved=status.initialised and status.checkpoint is not None,
    )


def settings_of(spec: TrainingJobSpec, store: str | None) -> Settings:
    """Return everything of the spec that servers and workers use."""
    checkpoint, replay = spec.checkpoint, spec.recovery.replay
    ladder = ladder_of(spec)
    return Settings(
        consistency=str(spec.consistency.mode),
        max_staleness=spec.consistency.max_staleness,
        min_replicas=spec.workers.min_replicas,
        store=store,
        every=checkpoint.every,
        fraction=checkpoint.fraction,
        selection=str(checkpoint.selection),
        keep=checkpoint.keep,
        cuts=rolls_back(ladder) and store is not None,
        running=keeps_running(ladder) and store is not None,
        final=checkpoint.final,
        restore_from=checkpoint.restore_from,
        block_bytes=spec.block_bytes,
        meanwhile=PRESETS[spec.recovery.strategy].meanwhile,
        inexact=PRESETS[spec.recovery.strategy].sources == {SourceKind.RUNNING_CHECKPOINT},
        replay=Replay(
            max_pending=replay.max_pending,
            max_age_seconds=float(replay.max_age_seconds),
            combine=str(replay.combine),
            trust=replay.trust,
            max_gap=replay.max_gap,
        ),
        replicas=spec.replicas,
        chain=spec.chained,
        ack=str(spec.recovery.chain.ack) if spec.chained else "None",
        every_updates=spec.recovery.chain.every,
        pulls_from_replicas=spec.pulls_from_replicas,
        copies=spec.recovery.copies,
        max_uncovered=spec.recovery.max_uncovered,
        copies_bytes_per_second=spec.recovery.copies_bytes_per_second,
        progress_seconds=float(spec.recovery.timeouts.progress_seconds),
    )
