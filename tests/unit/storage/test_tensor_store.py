"""A store of tensors that several threads use at once."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from lowmem_gblm.storage.tensor_store import TensorStore


@pytest.fixture
def hasty_threads():
    """Threads take turns after every few instructions."""
    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(former)


def test_one_thread_may_hold_tensors_while_another_drops_others(
    hasty_threads: None, tmp_path: Path
) -> None:
    store, tensor = TensorStore(tmp_path, 0, "", str), torch.ones(1)

    def hold() -> None:
        for item in range(10_000):
            store.hold(f"held-{item % 2}", item, tensor)

    holding = threading.Thread(target=hold)
    holding.start()
    while holding.is_alive():
        store.drop("held-0")
    holding.join()
    store.drop("held-0")
    assert not store.holds("held-0", 9_998)
    assert all(store.holds("held-1", item) for item in range(1, 10_000, 2))
