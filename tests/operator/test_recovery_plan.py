"""Plans: each slot from the freshest copy that can be reached."""

from hypothesis import given
from hypothesis import strategies as st

from daruma_operator.api.spec import StrategyName
from daruma_operator.recovery.plan import Plan, plan_slots
from daruma_operator.recovery.strategies import PRESETS, keeps_running, preset_of, rolls_back
from daruma_trainer.contract import Copies, SourceKind, Version, slots_from_hex, slots_to_hex

FRESHEST = PRESETS[StrategyName.FRESHEST].sources
PARTIAL = PRESETS[StrategyName.PARTIAL].sources


def copies(lineage: int, position: int, slots: list[int]) -> Copies:
    return Copies(lineage, position, slots_to_hex(slots))


def first_for(plan: Plan, slot: int) -> str | None:
    for source in plan.sources:
        if slot in slots_from_hex(source.slots):
            return source.member or source.kind.value
    return None


def test_the_freshest_peer_stands_first_for_each_slot() -> None:
    held = {
        "worker-0-1": [copies(1, 5, [1, 2]), copies(1, 9, [3])],
        "worker-1-1": [copies(1, 7, [1, 2, 3])],
    }
    plan = plan_slots([1, 2, 3], FRESHEST, held, stored=True)
    assert [first_for(plan, s) for s in (1, 2, 3)] == ["worker-1-1", "worker-1-1", "worker-0-1"]
    assert plan.exact_peers
    assert plan.oldest == Version(1, 7)
    assert plan.sources[-1].kind is SourceKind.RUNNING_CHECKPOINT


def test_a_copy_of_an_abandoned_lineage_never_wins() -> None:
    held = {"worker-0-1": [copies(1, 900, [1])], "worker-1-1": [copies(4, 3, [1])]}
    assert first_for(plan_slots([1], FRESHEST, held, stored=False), 1) == "worker-1-1"


def test_what_no_peer_has_comes_from_the_store_or_is_missing() -> None:
    held = {"worker-0-1": [copies(1, 5, [1])]}
    plan = plan_slots([1, 2], FRESHEST, held, stored=True)
    assert first_for(plan, 2) == "runningCheckpoint"
    assert (plan.unsourced, plan.exact_peers) == (0, False)
    assert plan_slots([1, 2], FRESHEST, held, stored=False).unsourced == 1


def test_partial_takes_no_peers() -> None:
    held = {"worker-0-1": [copies(1, 5, [1])]}
    plan = plan_slots([1], PARTIAL, held, stored=True)
    assert [s.kind for s in plan.sources] == [SourceKind.RUNNING_CHECKPOINT]
    assert plan_slots([1], PARTIAL, held, stored=False).unsourced == 1


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 9), st.sets(st.integers(0, 7))), max_size=8
    )
)
def test_no_slot_is_given_a_staler_copy_than_there_is(
    held: list[tuple[int, int, set[int]]],
) -> None:
    members = {
        f"worker-{i}-1": [copies(lineage, position, sorted(slots))]
        for i, (lineage, position, slots) in enumerate(held)
    }
    plan = plan_slots(list(range(8)), FRESHEST, members, stored=False)
    missing = 0
    for slot in range(8):
        best = max((Version(a, b) for a, b, slots in held if slot in slots), default=None)
        chosen = first_for(plan, slot)
        if best is None or chosen is None:
            assert best is None
            assert chosen is None
            missing += 1
            continue
        lineage, position, _ = held[int(chosen.split("-")[1])]
        assert Version(lineage, position) == best
    assert plan.unsourced == missing


def test_presets_say_what_has_to_be_kept() -> None:
    assert rolls_back([StrategyName.FRESHEST, StrategyName.FULL_CHECKPOINT])
    assert not rolls_back([StrategyName.FRESHEST])
    assert keeps_running([StrategyName.PARTIAL])
    assert not keeps_running([StrategyName.FULL_CHECKPOINT])
    assert preset_of("FullCheckpoint").rollback
    assert set(PRESETS) == set(StrategyName)
