"""Where no GPU is, Triton's kernels run in its interpreter. That is decided when they are imported: so early."""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
