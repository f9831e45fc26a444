"""Texts of --experiment-index: which indices they name, and which are refused."""

import pytest

from incremental_cifar.command_line import parse_indices
from incremental_cifar.config import UserError


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("3", [3]),
        ("0-3", [0, 1, 2, 3]),
        ("0,2,5-7", [0, 2, 5, 6, 7]),
        (" 4 - 5, 2-4,3", [2, 3, 4, 5]),
        ("99999", [99_999]),
        (",".join(["0-99999"] * 10_000), list(range(100_000))),  # in no time
    ],
    ids=lambda value: str(value)[:20],
)
def test_indices_are_sorted_and_without_repeats(text, indices):
    assert parse_indices(text) == indices


@pytest.mark.parametrize(
    "text",
    ["", "first", "-1", "3-1", "1-2-3", "100000", "0-100000", "0,", "1.5", "\u0663", "0\n1", "9" * 10_000],
    ids=lambda text: text[:10],
)
def test_other_texts_are_refused_in_one_line(text):
    with pytest.raises(UserError) as caught:
        parse_indices(text)
    message = str(caught.value)
    assert message.startswith("--experiment-index: got ") and "from 0 to 99999" in message and len(message) < 200
