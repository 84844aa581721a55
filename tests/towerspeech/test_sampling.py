"""Samples: fair, bounded, seeded."""

import random

import numpy as np

from towerspeech.sampling import reservoir


def test_a_reservoir_is_fair_bounded_and_counts():
    hits = np.zeros(50)
    for seed in range(2000):
        drawn, seen = reservoir((n for n in range(50)), 5, random.Random(seed))
        assert seen == 50 and len(set(drawn)) == 5
        hits[drawn] += 1
    assert abs(hits / 2000 - 0.1).max() < 0.035  # five standard deviations


def test_a_reservoir_keeps_all_of_a_few_rows_in_their_order():
    assert reservoir(iter("abc"), 5, random.Random(0)) == (["a", "b", "c"], 3)
    assert reservoir(iter(()), 5, random.Random(0)) == ([], 0)


def test_the_same_seed_draws_the_same():
    draws = [reservoir(range(1000), 20, random.Random(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
