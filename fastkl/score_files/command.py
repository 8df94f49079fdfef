"""The command `fastkl score`, whose files are described in __init__.py, where its help page takes them from."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.kernels.operators import TokenScores, head_token_scores
from fastkl.sampling.params import replayed_names
from fastkl.sampling.replay import support_of
from fastkl.score_files.progress import ScoreView
from fastkl.score_files.read import Job, JobReader, Malformed, read_windows, sampling_of
from fastkl.score_files.write import start_output, to_line
from fastkl.scoring import models
from fastkl.scoring.head import head_of
from fastkl.scoring.pack import pack
from fastkl.scoring.score_tokens import check_same_logits, layout_of
from fastkl.scoring.scored_model import Hidden, ScoredModel
from fastkl.scoring.source import resolve_model
from fastkl.training.places import choose_device, compute_dtype
from fastkl.types import Completion, PackedBatch, Prompt, RolloutBatch
from fastkl.version import __version__


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """What `fastkl score` is told."""

    input: str  # JSONL file, or "-" for standard input
    model: str
    reference: str | None = None
    output: str | None = None  # None: beside the input; "-": standard output
    batch_tokens: int = 4096  # packed tokens per forward
    skip_malformed: bool = False
    resume: bool = False
    shared: TrainConfig = field(default_factory=TrainConfig)  # of which dtype, device and sampling count


def score_file(config: ScoreConfig) -> int:
    """Scores a file; returns the number of lines that were scored by this call. UserError for a user's mistake.

    Holds one window of the input at a time (read.py), whatever the file's length.
    """
    if config.batch_tokens < 1:
        raise UserError(f"batch_tokens: {config.batch_tokens} is out of range; it must be 1 or more.")
    sampling_of({}, config.shared, ())  # the options' own sampling must be right
    device = choose_device(config.shared.device)
    dtype = compute_dtype(config.shared.dtype, device)
    models.quiet_transformers()
    with open_input(config.input) as lines, contextlib.ExitStack() as stack:
        reader = job_reader(config)
        windows = read_windows(lines)
        path = output_path(config)
        if path is None:
            output: BinaryIO = sys.stdout.buffer
            output.write(to_line({"settings": header(config, dtype)}))
        else:
            windows = start_output(path, header(config, dtype), windows, config.resume)
            output = stack.enter_context(path.open("ab"))
        view = stack.enter_context(ScoreView(input_bytes(lines)))
        scorer, num_lines = None, 0
        for window in windows:
            jobs = reader.jobs(window)
            report_malformed(jobs, config.skip_malformed, view)
            if scorer is None:  # after the first lines have been found right
                scorer = Scorer.load(config, device, dtype)
                view.loaded()
            records = scorer.score(jobs, view)
            write(output, b"".join(map(to_line, records)), path)
            num_lines += len(records)
            malformed = sum(isinstance(job, Malformed) for job in jobs)
            view.window(window.start_bytes, window.end_bytes, len(records), malformed)
        view.finished("standard output" if path is None else str(path))
    return num_lines


def open_input(name: str) -> AbstractContextManager[BinaryIO]:
    """The input's bytes. UserError where it cannot be read."""
    if name == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return Path(name).expanduser().open("rb")
    except OSError as failure:
        raise UserError(f"score: {name!r} cannot be read ({failure.strerror}); name a JSONL file.") from failure


def input_bytes(lines: BinaryIO) -> int | None:
    """The input's size; None for a pipe."""
    try:
        return os.fstat(lines.fileno()).st_size or None
    except OSError:
        return None


def output_path(config: ScoreConfig) -> Path | None:
    """Where the scores go; None for standard output. rollouts.jsonl is scored into rollouts.scores.jsonl."""
    if config.output == "-" or (config.output is None and config.input == "-"):
        if config.resume:
            raise UserError("resume: standard output cannot be continued; name a file with --output.")
        return None
    if config.output is None:
        return Path(config.input).expanduser().with_suffix(".scores.jsonl")
    path = Path(config.output).expanduser()
    if config.input != "-" and path.exists() and path.samefile(Path(config.input).expanduser()):
        raise UserError(f"output: {config.output!r} is the input; choose another --output.")
    return path


def header(config: ScoreConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What shapes the numbers, for readers of the output and for --resume."""
    sampling = {name: getattr(config.shared, name) for name in replayed_names()}
    return {
        "fastkl": __version__,
        "model": config.model,
        "reference": config.reference,
        "dtype": str(dtype).removeprefix("torch."),
        "batch_tokens": config.batch_tokens,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in sampling.items()},
    }


def job_reader(config: ScoreConfig) -> JobReader:
    """The reader of the input's lines for the policy's tokenizer, vocabulary and context."""
    source = resolve_model(config.model)
    model_config, tokenizer = models.load_config(source), models.load_tokenizer(source)
    return JobReader(
        config.input,
        tokenizer,
        config.shared,
        stop_token_ids=models.stop_token_ids(model_config, source, tokenizer),
        context=models.context_length(model_config),
        vocab=model_config.get_text_config().vocab_size,
    )


def report_malformed(jobs: Sequence[Job | Malformed], skip: bool, view: ScoreView) -> None:
    """Reports every malformed line, or raises UserError for the first."""
    for job in jobs:
        if isinstance(job, Malformed):
            if not skip:
                raise UserError(f"score: {job.reason} Mend it and --resume, or go on without it: --skip-malformed.")
            view.note(f"skipped {job.reason}")


def write(output: BinaryIO, lines: bytes, path: Path | None) -> None:
    """Writes a window's lines. UserError where that fails."""
    try:
        output.write(lines)
        output.flush()
    except BrokenPipeError:
        raise
    except OSError as failure:
        reason = failure.strerror or failure
        raise UserError(
            f"output: {str(path or '-')!r} cannot be written ({reason}); free it and --resume."
        ) from failure


@dataclass(frozen=True, slots=True)
class Scorer:
    """Policy and reference, ready to score windows."""

    policy: ScoredModel
    reference: ScoredModel | None
    batch_tokens: int

    @classmethod
    def load(cls, config: ScoreConfig, device: torch.device, dtype: torch.dtype) -> Scorer:
        """Loads and checks the models; UserError for one that cannot be scored, or two that do not fit together.

        dtype: of the backbone's matrix products; weights, head and scores are float32.
        """
        sources = [resolve_model(name) for name in (config.model, config.reference) if name is not None]
        loaded = {source: models.load_model(source, device).requires_grad_(False) for source in dict.fromkeys(sources)}
        scored = [ScoredModel(loaded[source], layout_of(loaded[source], dtype), dtype) for source in sources]
        policy, reference = scored[0], scored[1] if len(scored) == 2 else None
        if reference is not None:
            check_same_logits(head_of(policy.model), head_of(reference.model))
        return cls(policy, reference, config.batch_tokens)

    @torch.no_grad()
    def score(self, jobs: Sequence[Job | Malformed], view: ScoreView) -> list[dict[str, Any]]:
        """The output's records, one per job, in order; similar lengths are scored together."""
        records: dict[int, dict[str, Any]] = {
            job.number: {"line": job.number, "error": job.reason} for job in jobs if isinstance(job, Malformed)
        }
        ready = [job for job in jobs if isinstance(job, Job)]
        ready.sort(key=lambda job: len(job.prompt) + len(job.completion))
        batch = as_rollouts(ready)
        for members, micro in pack(batch, range(len(ready)), self.batch_tokens, self.policy.device):
            chosen = [ready[i] for i in members]
            outside = 0.0
            for job, scores in zip(chosen, self._scores(chosen, micro), strict=True):
                record = records[job.number] = record_of(job, scores)
                outside += record["sums"].get("outside_support", 0)
            view.tokens(len(micro.target_ids), int(outside))
        return [records[job.number] for job in jobs]

    def _scores(self, jobs: Sequence[Job], micro: PackedBatch) -> Iterator[dict[str, list[float]]]:
        """The scores of each job's tokens."""
        policy = self._hidden(self.policy, micro)
        reference = None if self.reference is None else self._hidden(self.reference, micro)
        ends = micro.completion_cu_seqlens.tolist()
        owner = torch.repeat_interleave(torch.arange(len(jobs), device=self.policy.device), micro.completion_lengths)
        found: list[dict[str, list[float]]] = [{} for _ in jobs]
        samplings = dict.fromkeys(job.sampling for job in jobs)
        for sampling in samplings:  # one call of the operator for each
            mine = torch.tensor([job.sampling == sampling for job in jobs], device=self.policy.device)
            scores = head_token_scores(
                policy.states,
                policy.head,
                None if reference is None else reference.states,
                None if reference is None else reference.head,
                micro.target_ids,
                mask=mine[owner] if len(samplings) > 1 else None,
                temperature=sampling.temperature,
                support=support_of(sampling, micro.completion_positions, len(policy.head.weight)),
                check_values=True,  # NaN in a model is an error here, not a null in the output
            )
            values = {name: getattr(scores, name) for name in TokenScores.__slots__}
            lists = {name: value.tolist() for name, value in values.items() if value is not None}
            for i in mine.nonzero()[:, 0].tolist():
                found[i] = {name: value[ends[i] : ends[i + 1]] for name, value in lists.items()}
        return iter(found)

    def _hidden(self, model: ScoredModel, micro: PackedBatch) -> Hidden:
        with model.scoring():
            return model.hidden(micro)


def as_rollouts(jobs: Sequence[Job]) -> RolloutBatch:
    """The jobs as groups of one sample each, for pack.py."""
    prompts = tuple(Prompt(job.prompt_ids, "", "", job.number) for job in jobs)
    samples = tuple((Completion(job.completion_ids, (0.0,) * len(job.completion), "stop", ""),) for job in jobs)
    shape = len(jobs), 1
    return RolloutBatch(prompts, samples, torch.zeros(shape), torch.ones(shape, dtype=torch.bool), policy_version=0)


def record_of(job: Job, scores: dict[str, list[float]]) -> dict[str, Any]:
    """The output's line: nine digits, which a float32 survives unchanged; null where a score is infinite."""
    keep = job.mask or (1,) * len(job.completion)
    lists = {
        name: [float(f"{value:.9g}") if kept else 0.0 for value, kept in zip(values, keep, strict=True)]
        for name, values in scores.items()
    }
    return {
        "line": job.number,
        **({} if job.id is None else {"id": job.id}),
        "num_tokens": len(job.completion),
        "sums": {name: finite(float(f"{math.fsum(values):.9g}")) for name, values in lists.items()},
        "token_ids": list(job.completion),
        **{name: [finite(value) for value in values] for name, values in lists.items()},
    }


def finite(value: float) -> float | None:
    """The number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None
