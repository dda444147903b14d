"""Who is asking: API keys, known by their SHA-256 only, to tenants. Knows no routes; never keeps or logs a key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from router.errors import Unauthorized
from router.settings import ApiKey

DEFAULT_TENANT = "default"


class Authenticator:
    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._digests = [(bytes.fromhex(key.sha256), key.tenant) for key in keys]

    def tenant(self, headers: Mapping[str, str]) -> str:
        """Of a request with these headers (lower-case names): `Authorization: Bearer KEY` or `x-api-key: KEY`.

        Raises `Unauthorized`. Every digest is compared, whichever matches, so that time tells nothing about the keys.
        """
        if not self._digests:
            return DEFAULT_TENANT
        key = _presented_key(headers)
        if key is None:
            raise Unauthorized("An API key is needed: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'.")
        presented = hashlib.sha256(key.encode("latin-1")).digest()
        found: str | None = None
        for digest, tenant in self._digests:
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None:
            raise Unauthorized("The API key is not valid here.")
        return found


def _presented_key(headers: Mapping[str, str]) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip() or None
