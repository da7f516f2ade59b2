"""The two automata of a ticket are the tables of docs/design.md, and never release what may still be written."""

import re
from pathlib import Path

import pytest

from memserve.kvcache.protocol import (
    RECEIVER,
    SENDER,
    Action,
    ReceiverEvent,
    ReceiverState,
    SenderEvent,
    SenderState,
    receiver_step,
    sender_step,
)

DESIGN = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")


def documented(name):
    """{(state, event): cell} of a table."""
    lines = DESIGN.split(f"<!-- table: {name} -->")[1].strip().split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    events = rows[0][1:]
    return {(row[0], event): cell for row in rows[2:] for event, cell in zip(events, row[1:], strict=True)}


@pytest.mark.parametrize(
    ("name", "table", "states", "events"),
    [("sender", SENDER, SenderState, SenderEvent), ("receiver", RECEIVER, ReceiverState, ReceiverEvent)],
)
def test_the_tables_are_the_documented_ones(name, table, states, events):
    cells = documented(name)
    assert set(cells) == {(s.value, e.value) for s in states for e in events}
    for state in states:
        for event in events:
            after, actions = table.get((state, event), (None, ()))
            cell = "-" if after is None else f"{after}: {', '.join(actions) or '-'}"
            assert cells[state.value, event.value] == cell, (state, event)


def test_a_sender_never_releases_while_its_calls_are_under_way():
    for (state, event), (_, actions) in SENDER.items():
        if state in (SenderState.SENDING, SenderState.DRAINING):
            assert Action.RELEASE not in actions or event is SenderEvent.DRAINED


def test_a_receiver_releases_what_was_granted_only_when_the_writer_has_stopped():
    stopped = {ReceiverEvent.DONE, ReceiverEvent.ABORT_ACK, ReceiverEvent.PEER_GONE}
    for (state, event), (_, actions) in RECEIVER.items():
        if state in (ReceiverState.GRANTED, ReceiverState.QUARANTINED) and Action.RELEASE in actions:
            assert event in stopped


def test_a_receiver_publishes_only_a_ticket_whose_outcome_is_open():
    publishing = [key for key, (_, actions) in RECEIVER.items() if Action.PUBLISH in actions]
    assert publishing == [(ReceiverState.GRANTED, ReceiverEvent.DONE)]


def test_what_is_in_no_table_changes_nothing():
    assert sender_step(SenderState.SENT, SenderEvent.WAIT) == (SenderState.SENT, ())
    assert receiver_step(ReceiverState.ENDED, ReceiverEvent.DONE) == (ReceiverState.ENDED, ())
    assert re.search("changes nothing", DESIGN)
