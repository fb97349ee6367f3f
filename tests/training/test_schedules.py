"""Schedules: learning rates, phases, and the order of the examples."""

import itertools
import math
import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neko_lean.recipe import load_recipe
from neko_lean.training.schedules import (
    Phase,
    batches,
    cooldown_steps,
    latest_cooldown,
    learning_rate,
    phases,
)

FORGET, RETAIN = [30, 20, 40, 10, 25, 35, 15], [20] * 12


def recipe(**change):
    given = {"forget_rows": 2, "retain_rows": 4, "max_steps": 0, **change}
    if not given["max_steps"] or given.get("order") == "chunks":
        given["epochs"] = 3.0
    return load_recipe("neko", given)


def test_the_learning_rate_warms_up_and_decays():
    rates = [learning_rate(recipe(lr=1.0, warmup=0.4), step, 10) for step in range(1, 11)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0]) and rates[-1] == pytest.approx(1 / 6)


def calibrated(steps):
    return load_recipe("calibrated", {"lr": 1.0, "stop": "forgotten", "eval_every": 5, "max_steps": steps})


def test_until_forgotten_the_learning_rate_is_constant_and_then_falls():
    rates = [learning_rate(calibrated(100), step, 100, cooldown_from=10) for step in range(1, 13)]
    assert rates == pytest.approx([1.0] * 10 + [2 / 3, 1 / 3])


@given(steps=st.integers(2, 500))
def test_a_run_that_never_forgets_still_ends_with_a_low_learning_rate(steps):
    start = latest_cooldown(steps)
    rates = [learning_rate(calibrated(steps), step, steps) for step in range(1, steps + 1)]
    assert rates[:start] == [1.0] * start and all(later <= rate for rate, later in itertools.pairwise(rates))
    assert start + cooldown_steps(start) <= steps < start + 1 + cooldown_steps(start + 1)
    assert 0 <= rates[-1] <= 0.5


def test_order_together_is_one_phase_with_epochs_of_the_larger_set():
    (phase,) = phases(recipe(), FORGET, RETAIN, random.Random(0))
    assert phase == Phase(list(range(7)), 3 * 4)
    (phase,) = phases(recipe(max_steps=5), FORGET, RETAIN, random.Random(0))
    assert phase.steps == 5
    (phase,) = phases(recipe(order="alternating"), FORGET, RETAIN, random.Random(0))
    assert phase.steps == 3 * 4 * 2


@given(rows=st.integers(1, 40), chunk=st.integers(1, 12), most=st.integers(0, 60))
def test_chunks_cover_the_forget_set_once(rows, chunk, most):
    chosen = recipe(order="chunks", chunk_rows=chunk, max_steps=most)
    chunks = phases(chosen, [20] * rows, RETAIN, random.Random(1))
    if most:
        assert sum(phase.steps for phase in chunks) <= most
    else:
        assert sorted(n for phase in chunks for n in phase.forget) == list(range(rows))
        assert all(phase.steps == 3 * math.ceil(len(phase.forget) / 2) for phase in chunks)


def test_steps_of_a_chunk_take_its_examples_and_the_whole_retain_set():
    chosen = recipe(order="chunks", chunk_rows=3)
    phase = phases(chosen, FORGET, RETAIN, random.Random(0))[1]
    steps = list(islice(batches(chosen, phase, FORGET, RETAIN, random.Random(0)), 30))
    assert {n for forget, _ in steps for n in forget} == set(phase.forget)
    assert {n for _, retain in steps for n in retain} == set(range(12))
    assert all(forget and retain for forget, retain in steps)


def test_order_alternating_takes_one_set_per_step():
    chosen = recipe(order="alternating")
    (phase,) = phases(chosen, FORGET, RETAIN, random.Random(0))
    steps = list(islice(batches(chosen, phase, FORGET, RETAIN, random.Random(0)), phase.steps))
    assert [bool(forget) for forget, _ in steps] == [True, False] * (phase.steps // 2)
    assert all(bool(forget) != bool(retain) for forget, retain in steps)
    seen = [n for forget, _ in steps for n in forget]
    assert all(seen.count(n) >= 3 for n in range(7))


def test_learning_rates_of_shipped_recipes():
    memorize = load_recipe("memorize", {"lr": 1.0, "warmup": 0.2})
    rates = [learning_rate(memorize, step, 10) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(0.125)
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    neko = load_recipe("neko", {"lr": 1.0})
    assert [learning_rate(neko, step, 4) for step in range(1, 5)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(load_recipe("neko", {"schedule": "constant"}), 400, 500) == 5e-5
