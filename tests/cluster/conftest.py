"""What needs real Ray actors, tasks and processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flow.gates import Gate


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)
