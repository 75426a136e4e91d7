"""How a long command tells what it is doing: stages with their times, and a live picture while there is one to show."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.status import Status
from rich.text import Text

from pipeline.service.watch import StreamView, line, screen

LINE_EVERY_SECONDS = 4.0
FRAME_EVERY_SECONDS = 0.25


class Narrator:
    """Tells on standard error. On a terminal the stage that runs has a spinner and the stream a picture; elsewhere, lines."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.stages: list[dict[str, object]] = []
        """One row a stage: `stage`, `seconds`."""
        self._status: Status | None = None
        self._live: Live | None = None
        self._shown_at = 0.0

    def tell(self, text: str) -> None:
        """One line that stays."""
        self.console.print(Text(f"  {text}"), soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """A part of the work; what it yields says how it stands. Its time is told in the end, even if it failed."""
        began = time.monotonic()
        if self.console.is_terminal:
            self._status = self.console.status(f"[bold]{name}[/bold] …")
            self._status.start()
        else:
            self.console.print(Text(f"{name} …"))
        mark = "✗"
        try:
            yield lambda text: self._update(name, text)
            mark = "✓"
        finally:
            self.end_picture()
            if self._status:
                self._status.stop()
                self._status = None
            seconds = time.monotonic() - began
            self.stages.append({"stage": name, "seconds": round(seconds, 1)})
            self.console.print(Text(f"{mark} {name} ({seconds:.1f} s)", style="green" if mark == "✓" else "red"))

    def _update(self, name: str, text: str) -> None:
        if self._status:
            self._status.update(Text.assemble((name, "bold"), f" … {text}"))

    def picture(self, view: StreamView, headline: str) -> None:
        """The stream as it is now; may be called as often as one likes."""
        now = time.monotonic()
        if self.console.is_terminal:
            if now - self._shown_at >= FRAME_EVERY_SECONDS:
                self._draw(view, headline)
                self._shown_at = now
        elif now - self._shown_at >= LINE_EVERY_SECONDS:
            self.tell(f"{headline} | {line(view)}")
            self._shown_at = now

    def end_picture(self) -> None:
        """The last picture stays where it is."""
        if self._live:
            self._live.stop()
            self._live = None

    def _draw(self, view: StreamView, headline: str) -> None:
        if self._status:  # a terminal has room for one thing that moves
            self._status.stop()
            self._status = None
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        self._live.update(
            Group(
                screen(view, self.console, "millrace demo"),
                Text(f"  {headline}", style="bold", no_wrap=True, overflow="ellipsis"),
            ),
            refresh=True,
        )
