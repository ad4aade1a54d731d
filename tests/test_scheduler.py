"""The policy of the queue, without a model: what runs next, and what a caller gets."""

from __future__ import annotations

import numpy as np
import pytest

from shared_engine import Document, EngineClosedError, EngineError, PartialResultError, Request
from shared_engine.scheduler import (
    QUERY_STEPS_IN_A_ROW,
    STEPS_AHEAD,
    TEXTS_PER_CHUNK,
    Call,
    Scheduler,
    Sequence,
)


def call(count: int, role: str = "document") -> Call:
    return Call(Request([Document("x")] * count, role), np.zeros((count, 2), np.float32))


def ids(tokens: int) -> np.ndarray:
    return np.zeros(tokens, np.int32)


def tokenise(scheduler: Scheduler, tokens: int = 10) -> list[tuple[Call, int]]:
    chunk = scheduler.next_chunk()
    scheduler.add([Sequence(owner, row, ids(tokens)) for owner, row in chunk])
    return chunk


def owners(step: list[Sequence]) -> list[Call]:
    return list(dict.fromkeys(sequence.call for sequence in step))


def test_a_step_holds_at_most_its_tokens_and_loses_nobody():
    scheduler, one = Scheduler(100), call(40)
    lengths = np.random.default_rng(0).integers(1, 60, 40)
    scheduler.put(one, [ids(n) for n in lengths])
    seen = []
    while len(seen) < 40:
        step = scheduler.next_step()
        assert sum(len(s.ids) for s in step) <= 100
        seen += [s.row for s in step]
    assert seen == list(range(40))


def test_a_sequence_over_the_budget_runs_alone():
    scheduler, one = Scheduler(100), call(3)
    scheduler.put(one, [ids(500), ids(10), ids(500)])
    assert [[s.row for s in scheduler.next_step()] for _ in range(3)] == [[0], [1], [2]]


def test_one_step_serves_many_small_callers():
    scheduler = Scheduler(100)
    calls = [call(1) for _ in range(8)]
    for each in calls:
        scheduler.put(each, [ids(10)])
    assert owners(scheduler.next_step()) == calls


def test_queries_go_first_but_documents_are_not_starved():
    scheduler, bulk = Scheduler(10), call(4)
    scheduler.put(bulk, [ids(10)] * 4)
    scheduler.put(call(40, "query"), [ids(10)] * 40)
    roles = [scheduler.next_step()[0].call.request.role for _ in range(44)]
    assert roles[:QUERY_STEPS_IN_A_ROW] == ["query"] * QUERY_STEPS_IN_A_ROW
    waits = np.diff(np.flatnonzero(np.array(roles) == "document"))
    assert waits.max() <= QUERY_STEPS_IN_A_ROW + 1
    assert roles.count("document") == 4


def test_a_query_runs_right_after_the_step_in_progress():
    scheduler = Scheduler(10)
    scheduler.put(call(100), [ids(10)] * 100)
    for _ in range(5):
        assert scheduler.next_step()[0].call.request.role == "document"
        scheduler.put(call(1, "query"), [ids(3)])
        assert scheduler.next_step()[0].call.request.role == "query"


def test_bulk_callers_take_turns():
    scheduler = Scheduler(10)
    first, second = call(6), call(6)
    scheduler.put(first, [ids(10)] * 6)
    scheduler.put(second, [ids(10)] * 6)
    turns = [owners(scheduler.next_step())[0] for _ in range(12)]
    assert turns == [first, second] * 6


def test_tokenising_runs_a_bounded_way_ahead():
    scheduler, big, small = Scheduler(100), call(5 * TEXTS_PER_CHUNK), call(3)
    scheduler.put(big)
    assert len(tokenise(scheduler)) == TEXTS_PER_CHUNK  # 2,560 tokens: more than enough ahead
    assert big.tokens_ready >= STEPS_AHEAD * 100
    scheduler.put(small)
    assert tokenise(scheduler) == [(small, row) for row in range(3)]  # big waits, small does not
    while big.tokens_ready >= STEPS_AHEAD * 100:
        scheduler.next_step()
    assert {owner for owner, _ in tokenise(scheduler)} == {big}


def test_small_calls_share_a_chunk():
    scheduler = Scheduler(100)
    calls = [call(2) for _ in range(5)]
    for each in calls:
        scheduler.put(each)
    assert tokenise(scheduler) == [(each, row) for each in calls for row in range(2)]


def test_a_cancelled_call_leaves_the_queue():
    scheduler, gone, stays = Scheduler(10), call(50), call(2)
    scheduler.put(gone, [ids(10)] * 50)
    scheduler.put(stays, [ids(10)] * 2)
    assert gone.future.cancel()
    assert owners(scheduler.next_step()) == [stays]
    late = call(3)
    scheduler.put(late)
    late.future.cancel()
    scheduler.close()
    assert scheduler.next_chunk() is None
    assert owners(scheduler.next_step()) == [stays]
    assert scheduler.next_step() is None


def test_closing_drains_or_cancels_and_refuses_more():
    for cancel in (False, True):
        scheduler = Scheduler(10)
        known, unknown = call(2), call(2)
        scheduler.put(known, [ids(10)] * 2)
        scheduler.put(unknown)
        scheduler.close(cancel)
        with pytest.raises(EngineClosedError):
            scheduler.put(call(1))
        assert known.future.cancelled() == unknown.future.cancelled() == cancel
        if not cancel:
            tokenise(scheduler)
            assert sorted(len(scheduler.next_step()) for _ in range(4)) == [1, 1, 1, 1]
        assert scheduler.next_chunk() is None
        assert scheduler.next_step() is None


def test_a_call_ends_when_its_last_row_does():
    one = call(3)
    one.deliver([2, 0], np.array([[2, 2, 9], [0, 1, 9]], np.float32), tokens=7)
    assert not one.future.done()
    one.deliver([1], np.array([[1, 1, 9]], np.float32), tokens=2)
    assert one.future.result().tolist() == [[0, 1], [1, 1], [2, 2]]


def test_failed_rows_are_named_and_the_others_kept():
    one = call(3)
    one.deliver([0, 2], np.ones((2, 2), np.float32), tokens=4)
    one.fail(1, EngineError("no luck"))
    error = one.future.exception()
    assert isinstance(error, PartialResultError)
    assert "1 of 3 inputs failed, the first: no luck" in str(error)
    assert list(error.errors) == [1]
    assert np.isnan(error.vectors[1]).all()
    assert error.vectors[[0, 2]].tolist() == [[1, 1], [1, 1]]
    alone = call(1)
    alone.fail(0, EngineError("no luck"))
    assert isinstance(alone.future.exception(), EngineError)
