"""The directory of endpoints, in a store that tells others of a value some time after `set` has returned."""

import pytest
from torch.distributed import HashStore, Store

from memserve.transfer.directory import Directory, Endpoint, Memory


class LateStore(Store):
    """A client of a store: what it sets goes there before its next question, as a TCPStore's does at the latest."""

    def __init__(self, server: Store) -> None:
        super().__init__()
        self._server, self._unsent = server, []

    def set(self, key, value):
        self._unsent.append((key, value))

    def get(self, key):
        return self._served().get(key)

    def add(self, key, amount):
        return self._served().add(key, amount)

    def append(self, key, value):
        self._served().append(key, value)

    def check(self, keys):
        return self._served().check(keys)

    def _served(self) -> Store:
        for key, value in self._unsent:
            self._server.set(key, value)
        self._unsent.clear()
        return self._server


@pytest.fixture
def clients():
    """Two directories of one server."""
    server = HashStore()
    stores = [LateStore(server), LateStore(server)]
    yield [Directory(store, "mapped") for store in stores]
    del stores  # torch keeps no Python object of a store


def test_an_endpoint_is_known_to_all_once_it_is_published(clients):
    one, other = clients
    one.publish(0, Endpoint("h", 1, [Memory(64)]))
    assert other.find(0) == Endpoint("h", 1, [Memory(64)])


def test_who_enters_is_seen_by_whoever_shuts_or_is_turned_away(clients):
    own, peer = clients
    own.publish(0, Endpoint("h", 1, [Memory(64)]))
    peer.publish(1, Endpoint("", 2**22 + 1, []))
    own.shut(0)
    assert own.visitors(0) == [] and not peer.enter(0, 1)
