"""The table of bench/training/reuse.py, from runs that are written down by hand."""

from __future__ import annotations

from bench.training.reuse import reward_at, table


def run(seconds: list[float], reward: list[float]) -> dict:
    constant = {key: [1.0] * len(reward) for key in ("kl", "well_formed")}
    return {"seconds": seconds, "reward": reward, "step_us_per_token": 10.0, **constant}


def test_a_reward_counts_from_the_moment_its_step_is_over():
    slow = run([10.0, 20.0, 30.0], [1.0, 2.0, 6.0])
    assert [reward_at(slow, seconds) for seconds in (5.0, 10.0, 29.9, 30.0)] == [1.0, 1.0, 1.5, 3.0]


def test_contenders_are_compared_at_the_same_seconds_up_to_the_shortest_runs_end():
    results = {
        "1 update": [run([4.0, 8.0], [1.0, 3.0]), run([4.0, 8.0], [3.0, 5.0])],
        "2 updates": [run([5.0, 10.0], [2.0, 4.0]), run([5.0, 10.0], [2.0, 4.0])],
    }
    head, _, one, two = table(results).splitlines()
    assert "reward after 2 s | reward after 4 s | reward after 6 s | reward after 8 s" in head
    assert one.startswith("| 1 update | 2 ± 1 | 2 ± 1 | 2 ± 1 | 3 ± 1 |")
    assert two.startswith("| 2 updates | 2 ± 0 | 2 ± 0 | 2 ± 0 | 2 ± 0 |")
