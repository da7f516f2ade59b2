"""Modes: who does what with a request's KV, the paper's PD designs (section 5.1, Table 4). Pure; performs nothing."""

from abc import ABC, abstractmethod

from memserve.request import Role


class Mode(ABC):
    """One way to spread a request's phases over instances."""

    roles: frozenset[Role]

    @abstractmethod
    def held_after(self, num_prompt: int, num_generated: int) -> dict[Role, int]:
        """Tokens whose KV an instance of each role holds once the request has finished (whole blocks not yet rounded).

        The KV of the last generated token never exists.
        """


class Colocated(Mode):
    """Prefill and decode on the same instance: the baseline. With an index it is the paper's PD-CC, without it PD."""

    roles = frozenset({Role.COLOCATED})

    def held_after(self, num_prompt: int, num_generated: int) -> dict[Role, int]:
        return {Role.COLOCATED: num_prompt + max(num_generated - 1, 0)}
