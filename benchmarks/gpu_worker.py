"""The process that holds the GPU: it may hang or break, and is then ended and started again."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from common import Cell

STARTING_S = 120.0  # importing, and a context on the GPU


class Worker:
    """A process that answers requests, one after the other.

    Args:
        serve: what it runs: told of a connection, it sends a greeting, then an answer to each
            request it receives. An answer with the key "broken" says that the process is of no more
            use.
        method: how it is started.
    """

    def __init__(self, serve: Callable[[Connection], None], method: str = "spawn") -> None:
        self.serve = serve
        self.context: Any = multiprocessing.get_context(method)
        self.process: Any = None

    def ask(self, request: Any, seconds: float) -> dict[str, Cell] | None:
        """Return the answer, None where there was none in time; the process is then ended.

        Args:
            request: what the process is sent.
            seconds: to wait, the start of the process included.
        """
        ends = time.monotonic() + seconds
        if self.process is None:
            greeting = self.start(min(seconds, STARTING_S))
            if greeting is None or "why" in greeting:
                return greeting
        self.connection.send(request)
        return self._answer(ends - time.monotonic())

    def start(self, seconds: float) -> dict[str, Cell] | None:
        """Start the process and return its greeting, None where there was none in time."""
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(target=self.serve, args=(theirs,))
        self.process.start()
        theirs.close()
        return self._answer(seconds)

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None

    def _answer(self, seconds: float) -> dict[str, Cell] | None:
        """Return what the process sends, None where it sends nothing in time; end one that is
        broken or late."""
        answer: dict[str, Cell] | None = None
        try:
            if self.connection.poll(max(0.0, seconds)):
                answer = self.connection.recv()
        except (EOFError, OSError) as error:  # it ended itself
            answer = {"why": f"failed: the process ended ({type(error).__name__})", "broken": True}
        if answer is None or answer.pop("broken", False):
            self.stop()
        return answer
