"""Options of a server: where it listens and for whom, and limits of sizes, numbers and times."""

from dataclasses import dataclass
from pathlib import Path

from clustering.errors import UserError

MOST_BYTES = 4 * 2**20
"""Largest number of bytes of a request's body."""
MOST_HEAD_BYTES = 2**16
"""Largest number of bytes of a request's first line and headers."""
MOST_LOG_PROBABILITIES = 2**17
"""Largest number of log probabilities of a request: each token that is scored counts once, and once
for each alternative."""
HEAD_SECONDS = 10.0
"""Seconds within which the first line and the headers of a request must arrive."""
BODY_SECONDS = 30.0
"""Seconds within which the body of a request must arrive."""
IDLE_SECONDS = 5
"""Seconds for which a connection is kept open between two requests."""
WRITE_SECONDS = 30.0
"""Seconds after which a client that does not read its response is disconnected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Where a server listens, and who may use it."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_file: str | Path | None = None
    """File with the API key that requests must have. None: the variable XELM_API_KEY, if set."""
    cors_origins: tuple[str, ...] = ()
    """Web pages that may send requests, such as https://example.org; may be given several times.
    Empty: none but the server's own page."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UserError(f"a port is between 0 and 65535; got {self.port}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of requests; a sequence is one prompt, continued once."""

    max_tokens: int = 1024
    """Largest number of tokens that are generated for a sequence."""
    max_seconds: float = 300.0
    """Seconds after which a sequence ends."""
    max_sequences: int = 32
    """Largest number of sequences that are generated at once."""
    max_waiting: int = 128
    """Largest number of further sequences that wait; beyond, requests are refused."""
    prompt_tokens_per_step: int | None = None
    """Number of tokens of prompts that are read between two tokens of running sequences, counted
    for each expert that reads them; tokens behind a long text count for more, as they take longer.
    None: 64 on CPUs, 512 on accelerators."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_tokens", self.max_tokens, 1),
            ("max_sequences", self.max_sequences, 1),
            ("max_waiting", self.max_waiting, 0),
            ("prompt_tokens_per_step", self.prompt_tokens_per_step, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}; got {value}")
        if not 0 < self.max_seconds < float("inf"):
            raise UserError(f"max_seconds must be above 0; got {self.max_seconds}")

    @property
    def connections_per_client(self) -> int:
        """Largest number of connections of one client address. It is larger than the queue, so that
        a proxy, whose clients all have one address, reaches the limit of the queue first."""
        return self.max_sequences + self.max_waiting + 64

    @property
    def connections(self) -> int:
        """Largest number of connections of all clients together."""
        return self.connections_per_client + 512
