"""Shared by all tests: the repository on sys.path, and where real data may lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def raw_data() -> Path:
    """A raw folder with real data: the environment variable TLM_RAW_DATA, else ../shared/data; skips where there is none."""
    folder = Path(os.environ.get("TLM_RAW_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "wikipedia").is_dir():
        pytest.skip("no real data: set TLM_RAW_DATA to a raw folder")
    return folder
