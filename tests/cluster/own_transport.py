"""A transport of one's own: `transport=gloo transport._target_=cluster.own_transport.Narrow +transport.gb_per_s=1`."""

import threading

from memserve.transfer import Gloo


class Narrow(Gloo):
    """Gloo on a wire of gb_per_s at most: who posts a move is held up for as long as its bytes take."""

    def __init__(self, store, *, gb_per_s, channels=1, patience_s=60.0, host=""):
        super().__init__(store, channels=channels, patience_s=patience_s, host=host)
        self._gb_per_s = gb_per_s

    def post(self, move_id, move, ready_ns):
        threading.Event().wait(move.num_bytes / (self._gb_per_s * 1e9))
        super().post(move_id, move, ready_ns)
