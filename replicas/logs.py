"""Where the lines of our packages go inside a Serve process. Knows no Ray: Serve's logger is found by its name."""

from __future__ import annotations

import logging


def log_like_serve(package: str) -> None:
    """Lines of `package` go where Serve's own go: the replica's log file, as JSON.

    Serve has set its logger up before it makes a deployment's object, which is where this is called.
    """
    ours = logging.getLogger(package)
    ours.handlers = logging.getLogger("ray.serve").handlers
    ours.setLevel(logging.INFO)
    ours.propagate = False
