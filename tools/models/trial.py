"""One architecture: does it score like its own logits, and does it train?

In: a model type. Out: a Row. `fastkl train` is set up on a tiny random model of it as a user would have it, from a
folder, with the transformers generator in float32; the model that it loaded scores a ragged batch in the layout that it
chose, and then two steps run. Its own logits are those of the model before it was saved, one sequence at a time.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tools.models.tiny import kinds, save, tiny_config, tiny_model

LENGTHS = (3, (11, 4)), (6, (30, 22)), (1, (5, 8))
"""Tokens of the prompts that are scored, and of the completions of each; some are longer than every window."""

TOLERANCE = 2e-5
"""Nats. Two computations in float32 differ by so much: Gemma-4's own logits are 6e-6 off those in float64."""


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one architecture."""

    kind: str
    architecture: str
    outcome: str  # "trains", "refused" or "fails"
    layout: str = ""
    decoding: str = ""
    error: float | None = None  # nats, the largest at a token
    sentence: str = ""  # why it is refused, or how it fails
    seconds: float = 0.0

    def line(self) -> str:
        """For the terminal."""
        error = "" if self.error is None else f"{self.error:.1e}"
        cells = f"{self.kind:24} {self.outcome:8} {self.layout:7} {self.decoding:7} {error:8} {self.seconds:5.1f} s"
        return f"{cells}  {self.sentence}".rstrip()


class Refused(Exception):
    """The sentence that set-up ends with."""


def attempt(kind: str) -> Row:
    """The whole trial; what goes wrong is a row, too."""
    start, name, place = time.monotonic(), kinds()[kind], ""
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = str(Path(folder) / "model")
            row = trial(kind, name, Path(folder))
    except Refused as refusal:
        row = Row(kind, name, "refused", sentence=str(refusal))
    except Exception as failure:
        row = Row(kind, name, "fails", sentence=f"{type(failure).__name__}: {str(failure).strip()[:300]}")
    sentence = row.sentence.replace(place, "MODEL")
    return replace(row, sentence=sentence, seconds=time.monotonic() - start)


def trial(kind: str, name: str, folder: Path) -> Row:
    """Saves a tiny model, lets fastkl load it, scores, trains. Raises Refused where set-up refuses it."""
    import torch

    from fastkl.errors import UserError
    from fastkl.scoring.models import load_model
    from fastkl.training.loop import run_steps
    from fastkl.training.setup import set_up

    config = tiny_config(kind)
    model = tiny_model(config, name)
    name = type(model).__name__
    save(model, config, folder / "model")
    try:
        run = set_up(config_for(folder))
    except UserError as refusal:
        raise Refused(str(refusal)) from refusal
    layout, way = run.reference.layout, getattr(run.generator, "way", "")
    error = score_error(model, run.reference)
    before = {n: p.clone() for n, p in run.policy.model.named_parameters()}
    run_steps(run)
    moved = sum(not torch.equal(p, before[n]) for n, p in run.policy.model.named_parameters())
    saved = load_model(str(folder / "run" / "checkpoints" / "step-2"), torch.device("cpu"))
    lost = [n for n, p in saved.named_parameters() if not torch.equal(p, run.policy.model.get_parameter(n))]
    steps = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    if len(steps) != 2 or not moved or lost or not error <= TOLERANCE:
        found = f"{len(steps)} steps, {moved} tensors moved, {len(lost)} other ones in the checkpoint"
        return Row(kind, name, "fails", layout, way, error, found)
    return Row(kind, name, "trains", layout, way, error)


def config_for(folder: Path) -> Any:
    """Two steps of a built-in reward on two prompts of different lengths."""
    from fastkl.config.settings import TrainConfig

    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": " ".join(["ba", "do", "ce"] * n)}) + "\n" for n in (3, 1)))
    return TrainConfig(
        model=str(folder / "model"), prompts=str(prompts), reward=("starts_with_a",), generator="transformers", steps=2,
        dtype="float32", device="cpu", prompts_per_step=2, num_samples=4, max_new_tokens=12, warmup_steps=0,
        report_to=(), output=str(folder / "run"),
    )  # fmt: skip


def score_error(model: Any, scored: Any) -> float:
    """Largest difference in nats between the scores of random completions and the model's own logits, alone."""
    import torch

    from fastkl.sampling.params import Sampling
    from fastkl.scoring.pack import pack

    batch = random_batch(scored.model)
    ((_, micro),) = pack(batch, range(len(LENGTHS)), 1 << 30, torch.device("cpu"))
    with torch.no_grad():
        with scored.scoring():
            ours = scored(micro, sampling=Sampling(1.0, 64)).scores.policy_logprobs
        theirs = [
            own_logprobs(model, prompt.token_ids, completion.token_ids)
            for prompt, group in zip(batch.prompts, batch.completions, strict=True)
            for completion in group
        ]
    return float((ours.double() - torch.cat(theirs)).abs().max())


def random_batch(model: Any) -> Any:
    """Groups of random token ids of the lengths above; no special ones."""
    import torch

    from fastkl.scoring.head import head_of
    from fastkl.types import Completion, Prompt, RolloutBatch

    vocab = len(head_of(model).weight)
    torch.manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, vocab, (count,)).tolist())

    prompts = tuple(Prompt(ids(count), "", "", row) for row, (count, _) in enumerate(LENGTHS))
    completions = tuple(
        tuple(Completion(ids(count), (0.0,) * count, "length", "") for count in counts) for _, counts in LENGTHS
    )
    shape = len(LENGTHS), len(completions[0])
    return RolloutBatch(prompts, completions, torch.zeros(shape), torch.ones(shape, dtype=torch.bool), 0)


def own_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Any:
    """f64 [T]: log-softmax of the model's own logits, of the completion's tokens."""
    import torch

    logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]
