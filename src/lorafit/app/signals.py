"""SIGTERM, SIGINT and SIGUSR1 ask a command to stop where nothing is lost; a second one ends it at once.

Most of the time that means now: `Stopped` is raised wherever the program is, and what it was writing disappears
(`files.py`). Inside `noted` a signal is only remembered, for a loop that asks `reason` between its steps and has
something to save.

Under torchrun a second one says nothing new: it passes on what the terminal has sent to all processes already, and
ends by SIGKILL what is still there after half a minute.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lorafit.world import VARIABLES

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_state: dict[str, str | bool | None] = {"reason": None, "raises": True}


class Stopped(BaseException):
    """A signal arrived. Like KeyboardInterrupt no Exception, so that nothing takes it for an error it can handle."""


def reason() -> str | None:
    """The name of the signal that arrived, if one did."""
    arrived = _state["reason"]
    return str(arrived) if arrived else None


@contextmanager
def watched(leaving: bool) -> Iterator[None]:
    """Inside, signals mean `Stopped`. `leaving`: the process ends afterwards, and no signal changes how."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can
        yield
        return
    _state.update(reason=None, raises=True)
    before = {number: signal.signal(number, _arrived) for number in WATCHED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler)


@contextmanager
def noted() -> Iterator[None]:
    """Inside, a signal is remembered and nothing else; one that came before stops here."""
    _state["raises"] = False
    try:
        if arrived := reason():
            raise Stopped(arrived)
        yield
    finally:
        _state["raises"] = True


def keyboard() -> None:
    """From here on Ctrl-C is Python's KeyboardInterrupt again: for a conversation, where it only cuts an answer."""
    if signal.getsignal(signal.SIGINT) is _arrived:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave() -> None:
    """The command is about to end, and says why: torchrun, which another process has told, does not cut it off."""
    if _in_company() and signal.getsignal(signal.SIGTERM) is _arrived:
        for each in WATCHED:
            signal.signal(each, signal.SIG_IGN)


def _in_company() -> bool:
    return all(name in os.environ for name in VARIABLES)


def _arrived(number: int, frame: FrameType | None) -> None:
    _state["reason"] = signal.Signals(number).name
    for each in WATCHED:
        signal.signal(each, signal.SIG_IGN if _in_company() else signal.SIG_DFL)
    if _state["raises"]:
        raise Stopped(_state["reason"])
