"""The model that edits and watching are tried in: made once, as every block leaves it as it was."""

from __future__ import annotations

from typing import Any

import pytest
from dense_edits import causal_model


@pytest.fixture(scope="session")
def model() -> Any:
    return causal_model()
