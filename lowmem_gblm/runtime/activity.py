"""What a command is doing while no step of a run can be counted: look-ups, downloads, imports.

What takes longer is logged, by the logger of this package: the command line shows the log as
progress, and in Python `logging` decides.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

_FIRST_S = 2.0
_AGAIN_S = 30.0
_log = logging.getLogger(__name__)


@contextmanager
def activity(what: str) -> Iterator[None]:
    """Run the body; log as INFO what it is, once it takes two seconds, and every half a minute.

    As DEBUG, the seconds that it took.
    """
    start, ended = time.monotonic(), Event()
    Thread(target=_tell, args=(what, start, ended), name="activity", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _log.debug("%s: %.1f s", what, time.monotonic() - start)


def _tell(what: str, start: float, ended: Event) -> None:
    pause = _FIRST_S
    while not ended.wait(pause):
        _log.info("%s … %.0f s", what, time.monotonic() - start)
        pause = _AGAIN_S
