"""The command `fastkl eval`, whose help page goes on with __init__.py.

In: an `EvalConfig`. Out: a table on standard output, a JSON file, a JSONL file of completions. One model is in memory
at a time, with the reference where there is one. What can be checked without weights is checked for all models first.
"""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastkl.comparison.names import SHARED
from fastkl.comparison.table import as_table, differences
from fastkl.config.held_out import samples_of
from fastkl.config.settings import TrainConfig, settings
from fastkl.errors import UserError
from fastkl.evaluation.evaluate import Evaluation, Evaluator, evaluate
from fastkl.evaluation.plan import prompts_of
from fastkl.evaluation.text_loss import windows_of
from fastkl.report.loggers import to_json
from fastkl.report.metrics import taken_reward_names
from fastkl.rewards.call import check_columns
from fastkl.rewards.load import RewardFunction, load_rewards, prepare_rewards
from fastkl.rollout.generator import GENERATORS, Generator, choose_generator
from fastkl.rollout.requests import EngineOptions
from fastkl.sampling.params import Sampling
from fastkl.scoring import models
from fastkl.scoring.head import head_of
from fastkl.scoring.memory import micro_batch_tokens
from fastkl.scoring.score_tokens import check_same_logits, layout_of
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training.inputs import check_vocabulary, room_for_prompt
from fastkl.training.places import choose_device, compute_dtype, keep_freed_memory
from fastkl.version import __version__


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """What `fastkl eval` is told."""

    models: tuple[str, ...]
    output: Path
    samples: int = 8
    temperature: float = 1.0  # 0: the likeliest token
    pass_mark: float = 0.99
    text: str = ""
    reference: str = ""  # none: no KL
    shared: TrainConfig = field(default_factory=TrainConfig)  # of which prompts, rewards, sampling, generator count


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is to be evaluated, checked before any weight is read."""

    name: str
    source: str
    model_config: Any
    tokenizer: Any
    generator: str  # a name of GENERATORS; "" where there are no prompts
    evaluator: Evaluator


def compare(config: EvalConfig) -> str:
    """Evaluates the models and writes the files; returns the table. Raises UserError for a user's mistake."""
    check(config)
    device = choose_device(config.shared.device)
    dtype = compute_dtype(config.shared.dtype, device)
    models.quiet_transformers()
    if device.type == "cpu":
        keep_freed_memory()
    rewards = load_rewards(config.shared.reward, config.shared.reward_weights, taken_reward_names())
    subjects = [subject_of(name, config, rewards, device) for name in config.models]
    prepare_rewards(rewards, device)
    reference = scored(models.resolve_model(config.reference), device, dtype) if config.reference else None
    found: dict[str, Evaluation] = {}
    for subject in subjects:
        found[subject.name] = evaluated(subject, config, reference, device, dtype)
    write(config, found)
    return as_table(found, config.models[0])


def check(config: EvalConfig) -> None:
    """UserError for what is wrong whatever the models are."""
    shared = config.shared
    if not config.models:
        raise UserError("eval: name a model, or several (--model).")
    if twice := next((name for name in config.models if config.models.count(name) > 1), None):
        raise UserError(f"model: {twice!r} is named twice; name each model once.")
    if not shared.prompts and not config.text:
        raise UserError("eval: name what to evaluate on: --prompts with --reward, or --text.")
    if shared.prompts and not shared.reward:
        raise UserError("reward: names no function; say what a completion is worth (--reward).")
    if config.samples < 1:
        raise UserError(f"samples: {config.samples} is out of range; it must be 1 or more.")
    if not config.temperature >= 0 or config.temperature == float("inf"):
        raise UserError(f"temperature: {config.temperature} is out of range; it must be 0 or more.")
    for name, setting in settings().items():
        if name not in ("prompts", "reward"):
            setting.check(getattr(shared, name))
    if shared.reward_weights and len(shared.reward_weights) != len(shared.reward):
        raise UserError(f"reward_weights: {len(shared.reward_weights)} weights for {len(shared.reward)} functions.")
    if shared.min_tokens > shared.max_new_tokens:
        raise UserError(f"min_tokens: {shared.min_tokens} is more than max_new_tokens ({shared.max_new_tokens}).")
    if not config.output.parent.is_dir() or config.output.is_dir():
        raise UserError(f"output: {str(config.output)!r} is no file in a folder that exists; name another --output.")


def subject_of(name: str, config: EvalConfig, rewards: tuple[RewardFunction, ...], device: torch.device) -> Subject:
    """The model by its name, with its tokens of the prompts. UserError where it cannot be evaluated."""
    check_not_a_run(name)
    shared, source = config.shared, models.resolve_model(name)
    model_config, tokenizer = models.load_config(source), models.load_tokenizer(source)
    sampling = Sampling.of(shared, models.stop_token_ids(model_config, source, tokenizer))
    prompts = (
        prompts_of(shared, shared.prompts, tokenizer, room_for_prompt(shared, model_config)) if shared.prompts else []
    )
    check_columns(rewards, dict.fromkeys(column for prompt in prompts for column in prompt.columns))
    check_vocabulary(models.vocabulary(model_config), prompts, sampling)
    context = models.context_length(model_config)
    return Subject(
        name, source, model_config, tokenizer,
        choose_generator(shared.generator, model_config, device)[0] if prompts else "",
        Evaluator(
            prompts=tuple(prompts),
            rewards=rewards,
            num_samples=samples_of(config.samples, config.temperature),
            sampling=replace(sampling, temperature=config.temperature),
            scored_as=replace(sampling, temperature=config.temperature or 1.0),
            pass_mark=config.pass_mark,
            seed=shared.seed,
            reward_timeout=shared.reward_timeout,
            text=windows_of("text", config.text, tokenizer, context) if config.text else (),
        ),
    )  # fmt: skip


def check_not_a_run(name: str) -> None:
    """UserError for a run folder, which holds several models."""
    folder = Path(name).expanduser()
    there = sorted(path.name for path in (folder / "checkpoints").glob("*") if (path / "config.json").is_file())
    if there and not (folder / "config.json").exists():
        names = ", ".join(str(Path(name, "checkpoints", checkpoint)) for checkpoint in there)
        raise UserError(f"model: {name!r} is a run folder; name one of its checkpoints: {names}.")


def scored(source: str, device: torch.device, dtype: torch.dtype) -> ScoredModel:
    """The model, loaded and checked."""
    model = models.load_model(source, device).requires_grad_(False)
    return ScoredModel(model, layout_of(model, dtype), dtype)


def evaluated(
    subject: Subject, config: EvalConfig, reference: ScoredModel | None, device: torch.device, dtype: torch.dtype
) -> Evaluation:
    """One model's evaluation; it is out of memory afterwards."""
    policy = scored(subject.source, device, dtype)
    if reference is not None:
        check_same_logits(head_of(policy.model), head_of(reference.model))
    generator = start(subject, config, policy, dtype) if subject.generator else None
    try:
        tokens = config.shared.micro_batch_tokens or micro_batch_tokens(policy)
        return evaluate(subject.evaluator, generator, policy, reference, step=0, micro_batch_tokens=tokens)
    finally:
        if generator is not None:
            generator.close()
        del policy, generator
        gc.collect()


def start(subject: Subject, config: EvalConfig, policy: ScoredModel, dtype: torch.dtype) -> Generator:
    """The model's generator, running."""
    longest = max(len(prompt.token_ids) for prompt in subject.evaluator.prompts)
    return GENERATORS[subject.generator].start(
        EngineOptions(
            source=subject.source,
            policy=policy.model,
            tokenizer=subject.tokenizer,
            sampling=subject.evaluator.sampling,
            dtype=dtype,
            max_model_len=longest + config.shared.max_new_tokens,
            gpu_memory_utilization=config.shared.gpu_memory_utilization,
            log=config.output.with_suffix(".engine.log"),
        )
    )


def write(config: EvalConfig, found: dict[str, Evaluation]) -> None:
    """The JSON file and the completions beside it. UserError where they cannot be written."""
    told = {name: value for name, value in asdict(config).items() if name not in ("shared", "output", "models")}
    compared = differences(found, config.models[0])
    rows = [
        {"model": name, "metrics": found[name].metrics, "difference_from_first": compared.get(name, {})}
        for name in config.models
    ]
    settings_told = told | {name: getattr(config.shared, name) for name in SHARED}
    record = {"fastkl": __version__, "settings": settings_told, "models": rows}
    lines = [to_json({"model": name, **sample}) + "\n" for name in config.models for sample in found[name].samples]
    try:
        config.output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if lines:
            config.output.with_suffix(".samples.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as failure:
        reason = failure.strerror or failure
        raise UserError(f"output: {str(config.output)!r} cannot be written ({reason}); name another.") from failure
