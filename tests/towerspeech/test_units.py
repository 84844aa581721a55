"""Unit ids as private-use characters."""

import random
import unicodedata

import pytest

from towerspeech import units
from towerspeech.errors import UserError


@pytest.mark.parametrize("offset", [units.OFFSET, 990000])  # SpireLM's and the original's
def test_text_round_trip(offset):
    ids = random.Random(0).choices(range(5000), k=300)
    text = units.to_text(ids, offset)
    assert len(text) == 300 and units.from_text(text, 5000, offset) == ids
    assert ord(units.to_text([0], offset)) == offset


def test_every_unit_is_a_four_byte_private_use_character():
    text = units.to_text(range(units.MAX_NUM_UNITS))
    assert {unicodedata.category(char) for char in text} == {"Co"}
    assert len(text.encode("utf-8")) == 4 * units.MAX_NUM_UNITS
    assert ord(text[-1]) == 0xFFFFD


@pytest.mark.parametrize("ids", [[], [5], [7, 7, 7, 3, 3, 7], [0, 0, 1, 1, 0]])
def test_collapse_equals_a_plain_loop(ids):
    plain = []
    for unit in ids:
        if not plain or plain[-1] != unit:
            plain.append(unit)
    assert units.collapse(ids) == plain


def test_range():
    units.check_range([], 10, "x")
    units.check_range([0, 9], 10, "x")
    with pytest.raises(UserError, match=r"a\.parquet, row 3: unit id 10 is outside 0\.\.9"):
        units.check_range([0, 10, 2], 10, "a.parquet, row 3")
    with pytest.raises(UserError, match="unit id -1 is"):
        units.check_range([-1, 10], 10, "x")
    with pytest.raises(UserError, match=r"text: unit id -\d+ is outside"):
        units.from_text("plain text", 5000)


def test_one_limit_of_units():
    """Plane 15 has 65,534 characters."""
    for num_units in (2, 5000, 65534):
        units.check_num_units(num_units)
        assert ord(units.to_text([num_units - 1])) <= 0xFFFFD
    for num_units in (-1, 0, 1, 65535):
        with pytest.raises(UserError, match=rf"--num_units is {num_units:,}\n.*give 2 to 65,534"):
            units.check_num_units(num_units)
