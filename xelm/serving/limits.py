"""How much a server does at once, and for how long it waits."""

from dataclasses import dataclass

from clustering.errors import UserError

MOST_BYTES = 4 * 2**20
"""Bytes of a request's body, at most."""
MOST_HEAD_BYTES = 2**16
"""Bytes of the first line and the headers of a request, at most."""
MOST_LOG_PROBABILITIES = 2**17
"""Log probabilities that one request may ask for: tokens that are scored, each with itself and its
alternatives."""
HEAD_SECONDS = 10.0
"""Seconds within which the first line and the headers of a request must arrive."""
BODY_SECONDS = 30.0
"""Seconds within which the body of a request must arrive."""
IDLE_SECONDS = 5
"""Seconds for which a connection is kept open between two requests."""
WRITE_SECONDS = 30.0
"""Seconds after which a client that does not read its answer is disconnected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of each request, and of all together."""

    tokens: int = 1024
    """Tokens that each text of a request may have drawn."""
    seconds: float = 300.0
    """Seconds after which a continuation ends."""
    texts: int = 32
    """Texts that are continued at once."""
    waiting: int = 128
    """Further texts that may wait; beyond, requests are refused."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("tokens", self.tokens, 1),
            ("texts", self.texts, 1),
            ("waiting", self.waiting, 0),
        ):
            if value < least:
                raise UserError(f"the limit of {name} must be at least {least}; got {value}")
        if not 0 < self.seconds < float("inf"):
            raise UserError(f"the limit of seconds must be above 0; got {self.seconds}")

    @property
    def connections_per_client(self) -> int:
        """Connections that one client address may have. More than its requests could be queued, so
        that a proxy, behind which all clients have one address, is not limited earlier than the
        queue is."""
        return self.texts + self.waiting + 64

    @property
    def connections(self) -> int:
        """Connections of all clients together."""
        return self.connections_per_client + 512
