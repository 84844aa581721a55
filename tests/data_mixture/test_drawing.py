"""The seeded draw against what a fair and complete draw must give."""

import numpy as np
import pytest

from data_mixture.drawing import FEWEST_PARTS, READ_FOR_ONE, Draw, Round, evenly, key, uniform


def drawn(draw: Draw, rounds: list[Round], items: list[int]) -> list[list[int]]:
    """Of each part the numbers of the items that the last round takes."""
    found = []
    for part, count in enumerate(items):
        takes = draw.takes(part, rounds)
        found.append([] if takes is None else np.flatnonzero(takes(0, count)).tolist())
    return found


def test_uniform_numbers_are_uniform_and_known():
    """The first outputs of SplitMix64 with seed 1234567, as its authors' and others' implementations print them."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(number * 2**53) for number in uniform(1234567, range(4))] == [number >> 11 for number in known]
    numbers = uniform(key("x"), np.arange(100_000))
    counts, _ = np.histogram(numbers, 100, (0, 1))
    assert abs(counts - 1000).max() < 160  # five standard deviations
    assert 0.49 < numbers.mean() < 0.51 and abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02


@pytest.mark.parametrize("share", [0.003, 0.2, 0.77])
def test_items_are_taken_evenly_wherever_one_begins_to_ask(share):
    """Of 64 in a row the share but for one; all are as likely, and neighbours do not hang together."""
    taken = evenly(5, 0, 64_000) < share
    assert abs(taken.reshape(-1, 64).sum(axis=1) - 64 * share).max() <= 1
    assert taken.mean() == pytest.approx(share, abs=0.002)
    by_place = np.mean([evenly(seed, 0, 64) < share for seed in range(3000)], axis=0)
    assert abs(by_place - share).max() < 5 * (share * (1 - share) / 3000) ** 0.5
    for first, count in ((0, 1), (63, 2), (64, 64), (1000, 8192), (129, 0)):
        assert np.array_equal(evenly(5, first, count), evenly(5, 0, 64_000)[first : first + count])


def test_rounds_take_no_item_twice_and_at_last_all():
    items = [50 + 7 * part for part in range(40)]
    draw = Draw("a", 3, items)
    rounds, taken = [draw.first_round(0.02)], [set() for _ in items]
    for _ in range(30):
        for part, numbers in enumerate(drawn(draw, rounds, items)):
            assert not taken[part] & {*numbers}
            taken[part] |= {*numbers}
        if rounds[-1] == Round(len(items), 1.0):
            break
        rounds.append(draw.next_round(rounds[-1], 0.5))
    assert rounds[-1] == Round(len(items), 1.0)
    assert [len(numbers) for numbers in taken] == items


@pytest.mark.parametrize("parts", [1, 5, 300])
@pytest.mark.parametrize("share", [0.004, 0.1, 0.6])
def test_the_first_round_takes_the_share_that_is_wanted(parts, share):
    items = np.random.default_rng(0).integers(2_000, 6_000, parts).tolist()
    draw = Draw("a", 1, items)
    first = draw.first_round(share)
    count = sum(map(len, drawn(draw, [first], items)))
    wanted = share * sum(items)
    strata = 1 + sum(items[part] for part in draw.order[: first.parts]) / 64
    assert abs(count - 1.02 * wanted) < 4 * (strata * 0.25) ** 0.5 + 0.01 * wanted
    read = sum(items[part] for part in draw.order[: first.parts])
    assert read <= max(READ_FOR_ONE * 1.3 * wanted, 1.5 * FEWEST_PARTS * sum(items) / parts)


def test_a_round_that_falls_short_is_followed_by_one_that_does_not():
    """Half of what was expected is there, in many parts and in one."""
    for parts in (300, 1):
        items = [4_000] * parts
        draw = Draw("a", 0, items)
        rounds = [draw.first_round(0.1)]
        wanted = 2 * 0.1 * sum(items)  # as if documents were half as long as the sample said
        met = sum(map(len, drawn(draw, rounds, items)))
        rounds.append(draw.next_round(rounds[-1], met / wanted))
        met += sum(map(len, drawn(draw, rounds, items)))
        assert 0.97 * wanted < met < 1.12 * wanted


def test_seeds_and_names_draw_differently():
    items = [10_000] * 3
    draws = [drawn(Draw(name, seed, items), [Round(3, 0.5)], items) for name, seed in (("a", 0), ("a", 1), ("b", 0))]
    again = drawn(Draw("a", 0, items), [Round(3, 0.5)], items)
    assert draws[0] == again
    for one, other in ((0, 1), (0, 2)):
        both = {*draws[one][0]} & {*draws[other][0]}
        assert 2_200 < len(both) < 2_800  # a half of a half
    assert not np.array_equal(draws[0][0], draws[0][1])


def test_all_that_is_wanted_is_taken_in_order():
    draw = Draw("a", 0, [5, 6, 7])
    assert draw.first_round(0.99) == draw.first_round(7.5) == Round(3, 1.0)
    assert drawn(draw, [Round(3, 1.0)], [5, 6, 7]) == [[*range(5)], [*range(6)], [*range(7)]]
