"""Rollouts ahead: the completions of step t + 1 are drawn while step t trains, by the weights that step t begins with.

    generator   draws 1 | draws 2 with weights 0 | draws 3 with weights 1 | ...
    trainer             | step 1 -> weights 1    | step 2 -> weights 2    | ...

The borders are barriers: a step ends when it has trained and the next one's completions are all there, and only then
does the generator get new weights. So every completion is drawn by one version of the weights, that of every step but
the first is one update older than the policy it trains, and nothing is thrown away: a run stays a function of its seed.

In: requests. Out: a `Rollout`, which a checkpoint keeps whole, so that a resumed run goes on with the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fastkl.distributed.world import ALONE, World
from fastkl.rollout.dealt import Columns, Engines, collected, digest
from fastkl.rollout.generator import Generator
from fastkl.rollout.requests import Request, grouped
from fastkl.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Rollout:
    """A step's completions, before their rewards are known."""

    step: int  # that trains on it
    version: int  # of the weights that draw it: the step after which they were
    prompts: tuple[Prompt, ...]  # [B]
    position: dict[str, int]  # in the prompts, before these were taken
    completions: tuple[tuple[Completion, ...], ...] = ()  # [B][K]; () before they are drawn

    def tensors(self) -> dict[str, torch.Tensor]:
        """The numbers of the completions, for a file of tensors: i32 and f64 [tokens], i64 [B * K]."""
        columns = Columns.of([completion for group in self.completions for completion in group])
        return {
            "token_ids": torch.from_numpy(columns.token_ids),
            "logprobs": torch.from_numpy(columns.logprobs),
            "lengths": torch.tensor(columns.lengths, dtype=torch.int64),
        }

    def in_words(self) -> dict[str, Any]:
        """The rest, as JSON holds it; of the prompts a hash, since they are taken again."""
        words = [[c.finish_reason, c.text] for group in self.completions for c in group]
        return {"step": self.step, "version": self.version, "prompts": of_prompts(self.prompts), "words": words}

    @classmethod
    def restored(
        cls,
        words: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        prompts: tuple[Prompt, ...],
        position: dict[str, int],
    ) -> Rollout | None:
        """What `in_words` and `tensors` have kept; None where these prompts, taken at `position`, are other ones."""
        if words["prompts"] != of_prompts(prompts):
            return None
        ids, values = tensors["token_ids"].numpy(), tensors["logprobs"].numpy()
        kept = Columns(ids, values, tensors["lengths"].tolist(), [(reason, text) for reason, text in words["words"]])
        completions = grouped(kept.completions(), len(kept.lengths) // len(prompts))
        return cls(words["step"], words["version"], prompts, position, completions)


def of_prompts(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts' token ids."""
    return digest(prompt.token_ids for prompt in prompts)


class Ahead:
    """Draws one rollout at a time, for a caller who has other things to do meanwhile.

    beside: draw in a thread, beside the caller; without it (for a generator that draws with the policy's own weights)
    it is drawn before `begin` returns. device: the one that the thread works on.
    """

    def __init__(
        self, generator: Generator, num_samples: int, world: World = ALONE, *, beside: bool, device: torch.device
    ) -> None:
        self.generator, self.num_samples, self.world = generator, num_samples, world
        self.engines = Engines.of(generator, world)
        self.rollout: Rollout | None = None  # that was begun last, or restored, and has not been taken
        self._drawing: Future[list[Completion]] | None = None  # this process's part of it
        self._failure: BaseException | None = None
        on_device = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "rollout", on_device) if beside else None

    def begin(self, rollout: Rollout, requests: Sequence[Request]) -> None:
        """Starts to draw it. The generator is not to be used, nor given weights, until `wait`."""
        assert self.rollout is None, "the rollout before it has not been taken"
        mine = self.engines.dealt(requests)
        self.rollout = rollout
        if self._thread:
            self._drawing = self._thread.submit(self.generator.generate, mine)
        else:
            self._drawing = Future()
            self._drawing.set_result(self.generator.generate(mine))

    def wait(self) -> Rollout | None:
        """The rollout, once it is drawn; without completions where that has failed; None where none was begun."""
        if self._drawing is not None and self.rollout is not None:
            self._failure = self._drawing.exception()
            drawn = None if self._failure else Columns.of(self._drawing.result())
            self._drawing = None
            completions = collected(drawn, self.engines)
            if completions is not None:
                self.rollout = replace(self.rollout, completions=grouped(completions, self.num_samples))
        return self.rollout

    def take(self, step: int) -> Rollout | None:
        """The rollout of this step, which is the caller's then; None where none was begun. Raises what has kept the
        generator, or that of another process, from drawing it."""
        rollout, self.rollout = self.wait(), None
        assert rollout is None or rollout.step == step
        if rollout and not rollout.completions:
            with self.world.together():
                if self._failure:
                    raise self._failure
                self.world.everybodys(None)  # raises what has failed in another process
        return rollout

    def close(self) -> None:
        """Waits for what is being drawn, which nothing interrupts, and draws nothing any more."""
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
