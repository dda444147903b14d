"""Serve is given HAProxy without splicing, and the user's own choice is left alone."""

from __future__ import annotations

import os
import subprocess

import pytest

from cluster.haproxy import BINARY_VARIABLE, prefer_launcher


def test_the_launcher_becomes_the_bundled_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BINARY_VARIABLE, "")  # so that it is gone afterwards
    monkeypatch.delenv(BINARY_VARIABLE)
    prefer_launcher()
    launcher = os.environ[BINARY_VARIABLE]
    version = subprocess.run([launcher, "-v"], capture_output=True, text=True, timeout=20, check=True)
    assert version.stdout.startswith("HAProxy version")


def test_another_haproxy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BINARY_VARIABLE, "/usr/sbin/haproxy")
    prefer_launcher()
    assert os.environ[BINARY_VARIABLE] == "/usr/sbin/haproxy"
