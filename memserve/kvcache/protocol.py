"""The transfer protocol's two automata, as tables: what a ticket's sender and receiver do at every event (section 4.3).

    sender    ASKED -> SENDING -> SENT -> ENDED        or by DRAINING: failed, but its last posted call is under way
              (from SENDING on at once, where the addresses were reserved before)
    receiver  WAITING -> GRANTED -> DONE               or by QUARANTINED: failed, but the sender may still write

A ticket ends twice. Its outcome (SUCCEED, FAIL) ends by a deadline; its blocks, at either end, are released (RELEASE)
only when the writer is known to have stopped. docs/design.md shows the same tables; a test compares them cell by cell.
Knows no block, no message and no time: kvcache/transfers.py performs the actions.
"""

import enum


class SenderState(enum.StrEnum):
    """Of a ticket at its writer."""

    ASKED = "asked"
    SENDING = "sending"
    SENT = "sent"
    DRAINING = "draining"
    ENDED = "ended"


class SenderEvent(enum.StrEnum):
    """What happens to a ticket at its writer: a message of the receiver, or something here."""

    GRANT = "Grant"
    WAIT = "Wait"
    REFUSE = "Refuse"
    DRAINED = "last call drained"
    INSERTED = "Inserted"
    ABANDON = "Abandon"
    DEADLINE = "deadline"
    PEER_GONE = "receiver gone"


class ReceiverState(enum.StrEnum):
    """Of a ticket where it is written."""

    NONE = "none"
    WAITING = "waiting"
    GRANTED = "granted"
    QUARANTINED = "quarantined"
    DONE = "done"
    ENDED = "ended"


class ReceiverEvent(enum.StrEnum):
    """A first Ask is one of three events, by what the pool can do with it."""

    ASK_FITS = "Ask that fits"
    ASK_WAITS = "Ask that must wait"
    ASK_REFUSED = "Ask that cannot be served"
    ASK_AGAIN = "Ask again"
    ROOM = "blocks come free"
    DONE = "Done"
    ABANDON = "Abandon"
    DEADLINE = "deadline"
    ABORT_ACK = "AbortAck"
    PEER_GONE = "sender gone"


class Action(enum.StrEnum):
    """What to do on the way. The upper-case words of the tables; messages are sent under their own names."""

    POST = "post"
    SUCCEED = "succeed"
    FAIL = "fail"
    RELEASE = "release"
    ALLOCATE = "allocate"
    PUBLISH = "publish"
    GRANT = "Grant"
    WAIT = "Wait"
    REFUSE = "Refuse"
    DONE = "Done"
    INSERTED = "Inserted"
    ABANDON = "Abandon"
    ABORT_ACK = "AbortAck"


S, E, R, V, A = SenderState, SenderEvent, ReceiverState, ReceiverEvent, Action
SenderTable = dict[tuple[SenderState, SenderEvent], tuple[SenderState, tuple[Action, ...]]]
ReceiverTable = dict[tuple[ReceiverState, ReceiverEvent], tuple[ReceiverState, tuple[Action, ...]]]

# What is not in a table changes nothing: a repeat, or a message that was overtaken.
SENDER: SenderTable = {
    (S.ASKED, E.GRANT): (S.SENDING, (A.POST,)),
    (S.ASKED, E.REFUSE): (S.ENDED, (A.FAIL, A.RELEASE)),
    (S.ASKED, E.ABANDON): (S.ENDED, (A.FAIL, A.RELEASE, A.ABORT_ACK)),
    (S.ASKED, E.DEADLINE): (S.ENDED, (A.FAIL, A.RELEASE, A.ABANDON, A.ABORT_ACK)),
    (S.ASKED, E.PEER_GONE): (S.ENDED, (A.FAIL, A.RELEASE)),
    (S.SENDING, E.DRAINED): (S.SENT, (A.DONE,)),
    (S.SENDING, E.REFUSE): (S.DRAINING, (A.FAIL,)),
    (S.SENDING, E.ABANDON): (S.DRAINING, (A.FAIL,)),
    (S.SENDING, E.DEADLINE): (S.DRAINING, (A.FAIL, A.ABANDON)),
    (S.SENDING, E.PEER_GONE): (S.DRAINING, (A.FAIL,)),
    (S.SENT, E.REFUSE): (S.ENDED, (A.FAIL, A.RELEASE)),
    (S.SENT, E.INSERTED): (S.ENDED, (A.SUCCEED, A.RELEASE)),
    (S.SENT, E.ABANDON): (S.ENDED, (A.FAIL, A.RELEASE, A.ABORT_ACK)),
    (S.SENT, E.DEADLINE): (S.ENDED, (A.FAIL, A.RELEASE, A.ABANDON, A.ABORT_ACK)),
    (S.SENT, E.PEER_GONE): (S.ENDED, (A.FAIL, A.RELEASE)),
    (S.DRAINING, E.DRAINED): (S.ENDED, (A.RELEASE, A.ABORT_ACK)),
    (S.ENDED, E.ABANDON): (S.ENDED, (A.ABORT_ACK,)),
    (S.ENDED, E.GRANT): (S.ENDED, (A.ABANDON, A.ABORT_ACK)),
}
RECEIVER: ReceiverTable = {
    (R.NONE, V.ASK_FITS): (R.GRANTED, (A.ALLOCATE, A.GRANT)),
    (R.NONE, V.ASK_WAITS): (R.WAITING, (A.WAIT,)),
    (R.NONE, V.ASK_REFUSED): (R.ENDED, (A.REFUSE,)),
    (R.NONE, V.ABANDON): (R.ENDED, ()),
    (R.NONE, V.ABORT_ACK): (R.ENDED, ()),
    (R.WAITING, V.ASK_AGAIN): (R.WAITING, (A.WAIT,)),
    (R.WAITING, V.ROOM): (R.GRANTED, (A.ALLOCATE, A.GRANT)),
    (R.WAITING, V.ABANDON): (R.ENDED, ()),
    (R.WAITING, V.PEER_GONE): (R.ENDED, ()),
    (R.GRANTED, V.ASK_AGAIN): (R.GRANTED, (A.GRANT,)),
    (R.GRANTED, V.DONE): (R.DONE, (A.PUBLISH, A.INSERTED)),
    (R.GRANTED, V.ABANDON): (R.QUARANTINED, (A.FAIL,)),
    (R.GRANTED, V.DEADLINE): (R.QUARANTINED, (A.FAIL, A.ABANDON)),
    (R.GRANTED, V.ABORT_ACK): (R.ENDED, (A.FAIL, A.RELEASE)),
    (R.GRANTED, V.PEER_GONE): (R.ENDED, (A.FAIL, A.RELEASE)),
    (R.QUARANTINED, V.DONE): (R.ENDED, (A.RELEASE,)),
    (R.QUARANTINED, V.ABORT_ACK): (R.ENDED, (A.RELEASE,)),
    (R.QUARANTINED, V.PEER_GONE): (R.ENDED, (A.RELEASE,)),
    (R.DONE, V.ASK_AGAIN): (R.DONE, (A.INSERTED,)),
    (R.DONE, V.DONE): (R.DONE, (A.INSERTED,)),
    (R.ENDED, V.ASK_AGAIN): (R.ENDED, (A.REFUSE,)),
}


def sender_step(state: SenderState, event: SenderEvent) -> tuple[SenderState, tuple[Action, ...]]:
    """The sender's next state, and what it does on the way."""
    return SENDER.get((state, event), (state, ()))


def receiver_step(state: ReceiverState, event: ReceiverEvent) -> tuple[ReceiverState, tuple[Action, ...]]:
    """The receiver's next state, and what it does on the way."""
    return RECEIVER.get((state, event), (state, ()))
