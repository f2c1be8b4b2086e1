"""Shared by all tests: the repository on sys.path, and where real data may lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Tiny models gain nothing from a second thread, and on a busy machine lose much. Set before torch
# is imported; the processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import DataFolder
from material import articles, corpus_of, small_tokenizer


@pytest.fixture(scope="session")
def raw_data() -> Path:
    """A raw folder with real data: TLM_RAW_DATA, else ../shared/data. Skips where there is none."""
    folder = Path(os.environ.get("TLM_RAW_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "wikipedia").is_dir():
        pytest.skip("no real data: set TLM_RAW_DATA to a raw folder")
    return folder


@pytest.fixture(scope="session")
def corpus() -> DataFolder:
    """A data folder in memory: 100 articles, 20 held out, 200 pieces, texts of 32 tokens."""
    texts = [article["text"] for article in articles(120)]
    return corpus_of(texts[20:], texts[:20], small_tokenizer())


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes to hours; left out unless asked for with -m "
                            "slow. TLM_RELIABILITY=FILE keeps the figures")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow and not config.getoption("-m"):
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)
