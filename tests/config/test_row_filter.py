"""A list of integers, from Python, TOML, JSON and a flag."""

from __future__ import annotations

from typing import Any

import pytest

from sae_kernels.config import RowFilter


@pytest.mark.parametrize(
    ("given", "ids"),
    [((3, 1), (3, 1)), ([3, 1], (3, 1)), ("3,1", (3, 1)), ("3, 1", (3, 1)), (7, (7,)), ("", ())],
)
def test_token_ids_in_every_spelling(given: Any, ids: tuple[int, ...]) -> None:
    assert RowFilter(drop_tokens=given).drop_tokens == ids
    assert hash(RowFilter(drop_tokens=given)) == hash(RowFilter(drop_tokens=ids))


@pytest.mark.parametrize("given", ["3;1", "3,", "a", 1.5, True, [1.5], [True], ["3"], None])
def test_what_is_no_list_of_token_ids(given: Any) -> None:
    with pytest.raises(ValueError, match="drop_tokens: expected a list of integers such as"):
        RowFilter(drop_tokens=given)
