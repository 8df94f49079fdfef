"""Drawing ahead: in a thread, with a barrier, by one version of the weights; what is drawn can be kept and restored."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from threaded_world import in_threads
from toy import prompt

from fastkl.distributed.world import World
from fastkl.rollout.ahead import Ahead, Rollout
from fastkl.rollout.requests import Request, grouped, requests_of
from fastkl.types import Completion

CPU = torch.device("cpu")
PROMPTS = (prompt(1, 2), prompt(3), prompt(4, 5, 6))


class Slow:
    """A generator that draws when it is let; a completion's ids are its request's place and the weights' version."""

    def __init__(self):
        self.go, self.version, self.threads = threading.Event(), 0, []

    def generate(self, requests: list[Request]) -> list[Completion]:
        self.threads.append(threading.current_thread().name)
        assert self.go.wait(20)
        if self.version < 0:
            raise RuntimeError("the engine has died")
        ids = [(r.prompt_index, r.sample_index, self.version) for r in requests]
        return [Completion(i, (-0.1 * i[0] - 1 / 3, -2.5, -1e-30), "stop", f"{i}") for i in ids]


def begun(step: int, version: int) -> tuple[Rollout, list[Request]]:
    rollout = Rollout(step, version, PROMPTS, {"epoch": 0, "position": 3 * step})
    return rollout, requests_of(PROMPTS, 2, seed=1, step=step)


def expected(version: int):
    generator = Slow()
    generator.version = version
    generator.go.set()
    return grouped(generator.generate(requests_of(PROMPTS, 2, seed=1, step=1)), 2)


def test_the_caller_goes_on_while_it_is_drawn_and_the_barrier_waits_for_all_of_it():
    generator = Slow()
    ahead = Ahead(generator, 2, beside=True, device=CPU)
    assert ahead.wait() is None and ahead.take(1) is None, "nothing was begun"
    ahead.begin(*begun(2, 0))
    assert not ahead.rollout.completions, "the caller is here, and nothing can have been drawn"
    threading.Timer(0.1, generator.go.set).start()
    assert ahead.wait().completions == expected(0)
    generator.version = 1  # the push, after the barrier
    rollout = ahead.take(2)
    assert rollout == replace(begun(2, 0)[0], completions=expected(0)), "drawn by the weights before the push"
    ahead.begin(*begun(3, 1))
    assert ahead.take(3).completions == expected(1) and ahead.take(4) is None
    assert {name.rpartition("_")[0] for name in generator.threads} == {"rollout"}
    ahead.close()


def test_a_generator_without_weights_of_its_own_has_drawn_before_the_caller_goes_on():
    generator = Slow()
    generator.go.set()
    ahead = Ahead(generator, 2, beside=False, device=CPU)
    ahead.begin(*begun(2, 0))
    generator.version = 1
    assert ahead.take(2).completions == expected(0) and generator.threads == [threading.main_thread().name]


def test_what_keeps_it_from_drawing_is_raised_where_the_completions_are_needed():
    generator = Slow()
    generator.version = -1
    generator.go.set()
    ahead = Ahead(generator, 2, beside=True, device=CPU)
    ahead.begin(*begun(2, 0))
    assert ahead.wait().completions == (), "the step that is under way can be completed"
    with pytest.raises(RuntimeError, match="the engine has died"):
        ahead.take(2)
    ahead.close()


def test_several_processes_draw_a_share_each_and_all_get_everything():
    def drawn(world: World):
        generator = Slow()
        generator.go.set()
        ahead = Ahead(generator, 2, world, beside=True, device=CPU)
        ahead.begin(*begun(2, 0))
        found = ahead.take(2)
        ahead.close()
        return found.completions

    assert in_threads(2, drawn) == [expected(0)] * 2


def test_a_failure_in_one_process_leaves_every_process_without_the_rollout():
    def waited(world: World):
        generator = Slow()
        generator.version = -1 if world.rank else 0
        generator.go.set()
        ahead = Ahead(generator, 2, world, beside=True, device=CPU)
        ahead.begin(*begun(2, 0))
        found = ahead.wait()
        ahead.close()
        return found.completions

    assert in_threads(2, waited) == [(), ()]


def test_a_rollout_is_restored_to_the_bit_and_only_for_the_prompts_that_it_was_drawn_for():
    whole = replace(begun(2, 1)[0], completions=expected(1))
    words, tensors = whole.in_words(), whole.tensors()
    assert Rollout.restored(words, tensors, PROMPTS, whole.position) == whole
    assert Rollout.restored(words, tensors, (*PROMPTS[:2], prompt(4, 5, 7)), whole.position) is None
