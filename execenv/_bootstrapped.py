"""The server where it was shipped to (`execenv._bootstrap`): what `execenv serve --listen stdio` does.

Without the command line, and so without the libraries that only that needs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def load_server() -> Callable[[], None]:
    """Import all of it; what serves stdin and stdout until stdin ends."""
    # Until Trio has its own handlers a signal ends us here; nothing was started yet.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: os._exit(0))
    import gc
    import logging
    from functools import partial

    import trio

    from execenv import codec, server
    from execenv.transports import stdio  # noqa: F401 - compiling it may take a while, so not at its first use

    logging.basicConfig(level=logging.WARNING, format="execenv: %(levelname)s %(name)s: %(message)s")
    codec.converter()
    gc.freeze()  # what is imported now stays: the collector need not look at it again
    return partial(trio.run, server.run_until_signalled, partial(server.serve_stdio, whole_program=True))
