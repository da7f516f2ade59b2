"""Modes: who does what with a request's KV, the paper's PD designs (section 5.1, Fig. 4, Table 4). Pure.

| mode           | steps of Table 4  | what it adds                                                          |
|----------------|-------------------|-----------------------------------------------------------------------|
| `pd_basic`     | 1                 | P sends a request's KV to D after its prefill                         |
| `pd_caching_1` | 1, 2              | P keeps the prompt's KV in its index                                  |
| `pd_caching_2` | 1, 2, 3, 4        | D indexes what it receives and generates: P sends the increment alone |
| `pd_caching_3` | 1, 2, 3, 4, 5     | D sends the KV it generated back to P                                 |

Each mode is the one before it with one step overridden. `Instance` performs the steps.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from memserve.request import Role


@dataclass(frozen=True)
class HandOff:
    """Steps 1 and 3: send the prompt's KV to the decode instance; `insert`: it indexes what it receives."""

    insert: bool


@dataclass(frozen=True)
class Insert:
    """Steps 2 and 4: keep what was computed here in the own index."""


@dataclass(frozen=True)
class GiveBack:
    """Step 5: send the KV computed while decoding back to the prefill instance, which indexes it."""


Step = HandOff | Insert | GiveBack


class Mode(ABC):
    """One way to spread a request's phases over instances."""

    roles: frozenset[Role]

    @abstractmethod
    def at_prefill_end(self) -> tuple[Step, ...]:
        """What the instance that prefilled does with the prompt's KV."""

    @abstractmethod
    def at_finish(self) -> tuple[Step, ...]:
        """What the instance that decoded does with the request's KV."""

    @abstractmethod
    def held_after(self, num_prompt: int, num_generated: int) -> dict[Role, int]:
        """Tokens whose KV an instance of each role holds once the request has finished (whole blocks not yet rounded).

        The KV of the last generated token never exists.
        """

    def inserts(self, role: Role) -> bool:
        """Whether an instance of this role keeps what it computes in its index."""
        steps = self.at_finish() if role is Role.DECODE else self.at_prefill_end()
        return Insert() in steps

    @property
    def hand_off(self) -> HandOff | None:
        """The hand-off after the prefill, if there is one."""
        return next((step for step in self.at_prefill_end() if isinstance(step, HandOff)), None)

    @property
    def keeps_received(self) -> bool:
        """Whether who receives a request indexes its KV: as the hand-off says, or where there is none as it does what
        it computes.
        """
        hand_off = self.hand_off
        return Insert() in self.at_prefill_end() if hand_off is None else hand_off.insert

    @property
    def gives_back(self) -> bool:
        return GiveBack() in self.at_finish()


class Colocated(Mode):
    """Prefill and decode on the same instance: the baseline. With an index it is the paper's PD-CC, without it PD."""

    roles = frozenset({Role.COLOCATED})

    def at_prefill_end(self) -> tuple[Step, ...]:
        return (Insert(),)

    def at_finish(self) -> tuple[Step, ...]:
        return (Insert(),)

    def held_after(self, num_prompt: int, num_generated: int) -> dict[Role, int]:
        return {Role.COLOCATED: num_prompt + max(num_generated - 1, 0)}


class PDBasic(Mode):
    """Disaggregated inference alone (1): nobody keeps anything."""

    roles = frozenset({Role.PREFILL, Role.DECODE})

    def at_prefill_end(self) -> tuple[Step, ...]:
        return (HandOff(insert=False),)

    def at_finish(self) -> tuple[Step, ...]:
        return ()

    def held_after(self, num_prompt: int, num_generated: int) -> dict[Role, int]:
        return {Role.PREFILL: 0, Role.DECODE: 0}


class PDCaching1(PDBasic):
    """Caching at P (1, 2): the same KV is sent to D again at every turn."""

    def at_prefill_end(self) -> tuple[Step, ...]:
        return (*super().at_prefill_end(), Insert())

    def held_after(self, num_prompt: int, num_generated: int) -> dict[Role, int]:
        return {Role.PREFILL: num_prompt, Role.DECODE: 0}


class PDCaching2(PDCaching1):
    """Caching at both (1, 2, 3, 4): D holds more than P, and P computes the answers of earlier turns again."""

    def at_prefill_end(self) -> tuple[Step, ...]:
        return (HandOff(insert=True), Insert())

    def at_finish(self) -> tuple[Step, ...]:
        return (Insert(),)

    def held_after(self, num_prompt: int, num_generated: int) -> dict[Role, int]:
        return {Role.PREFILL: num_prompt, Role.DECODE: num_prompt + max(num_generated - 1, 0)}


class PDCaching3(PDCaching2):
    """Caching at both with the way back (1 to 5): the gain grows with every turn."""

    def at_finish(self) -> tuple[Step, ...]:
        return (*super().at_finish(), GiveBack())

    def held_after(self, num_prompt: int, num_generated: int) -> dict[Role, int]:
        held = num_prompt + max(num_generated - 1, 0)
        return {Role.PREFILL: held, Role.DECODE: held}


def check_mode(mode: Mode) -> None:
    """Raises ValueError for a mode whose steps its roles cannot take."""
    name, roles = type(mode).__name__, getattr(mode, "roles", frozenset[Role]())
    if roles not in (Colocated.roles, PDBasic.roles):
        raise ValueError(f"{name}.roles={set(roles)}: expected {set(Colocated.roles)} or {set(PDBasic.roles)}")
    apart = roles == PDBasic.roles
    at_prefill_end: tuple[type[Step], ...] = (HandOff, Insert) if apart else (Insert,)
    at_finish: tuple[type[Step], ...] = (Insert, GiveBack) if apart else (Insert,)
    for method, allowed in ((mode.at_prefill_end, at_prefill_end), (mode.at_finish, at_finish)):
        for step in method():
            if not isinstance(step, allowed):
                words = " or ".join(kind.__name__ for kind in allowed)
                raise ValueError(f"{name}.{method.__name__} has {step!r}: expected {words}")
    if apart and mode.hand_off is None:
        raise ValueError(f"{name}.at_prefill_end={mode.at_prefill_end()}: expected a HandOff to the decode instance")
    _check_held(mode)


def _check_held(mode: Mode) -> None:
    """Raises ValueError unless the mode says of each of its roles how much it holds of the KV that exists."""
    num_prompt, num_generated = 16, 4
    held, most = mode.held_after(num_prompt, num_generated), num_prompt + num_generated - 1
    if set(held) != mode.roles or not all(0 <= num_tokens <= most for num_tokens in held.values()):
        name, roles = type(mode).__name__, ", ".join(sorted(mode.roles))
        raise ValueError(f"{name}.held_after({num_prompt}, {num_generated}) gave {held}: "
                         f"expected 0 to {most} tokens of each of {roles}")  # fmt: skip
