"""Policy and reference, loaded, laid out as scores them right, and tried before an engine starts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastkl.config.settings import TrainConfig
from fastkl.distributed.world import World
from fastkl.errors import UserError
from fastkl.report.terminal import View
from fastkl.scoring import backbone, compiled, models
from fastkl.scoring.adapters import WEIGHTS, add_adapters, load_adapters
from fastkl.scoring.head import check_head, head_of
from fastkl.scoring.pack import pack
from fastkl.scoring.placement import HeadCopy, moved, put_away
from fastkl.scoring.scored_model import ScoredModel, WithoutAdapters
from fastkl.scoring.shard import gathered, shard
from fastkl.scoring.unread import META, fill, is_unread
from fastkl.training import checkpoint
from fastkl.training.inputs import Inputs, max_sequence_tokens
from fastkl.training.places import give_back_gpu_memory, reference_place
from fastkl.training.resume import first_numbers
from fastkl.training.sharding import is_sharded, mesh_of
from fastkl.training.small_adamw import check_pieces
from fastkl.types import Completion, PackedBatch, Prompt, RolloutBatch

CPU = torch.device("cpu")


def ready_models(
    config: TrainConfig, inputs: Inputs, dtype: torch.dtype, view: View, world: World
) -> tuple[ScoredModel, ScoredModel | None, bytes | None]:
    """Policy and reference, loaded, with the layouts that score them right, and checked to be trainable and savable;
    and the first numbers of the reference, before any of them is rounded."""
    device, shards = inputs.device, is_sharded(config)

    def settled(model: nn.Module, source: str) -> ScoredModel:
        return (
            in_pieces(config, model, source, device, dtype, view, world) if shards else ScoredModel(model, dtype=dtype)
        )

    unread = dataclasses.replace(inputs, device=META) if shards else inputs
    scored, referred, first = load_models(config, unread, settled)
    policy = scored.model
    differ = referred is not None and (bool(inputs.teacher) or referred.device != scored.device)
    start = scored if referred is None or differ else referred
    probe = probe_batch(inputs.prompts[0], device)
    layout, layout_reason = checked_layout(start, inputs, config, probe)
    scored.layout = layout
    if referred:
        referred.layout = checked_layout(referred, inputs, config, probe)[0] if differ else layout
        send_to(referred, scored.device)
    if config.param_dtype == "bfloat16" and not shards:
        models.store_as_computed(policy, dtype, trained=True)
    check_trainable(scored, probe)
    if repaired := world.once(
        lambda: checkpoint.check_savable(inputs.folder / "checkpoints", policy, inputs.tokenizer)
    ):
        view.note(repaired)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    if world.size > 1:
        has = "a piece of every weight" if shards else "all weights"
        view.note(f"{world.size} processes, each with {has} and a share of the samples")
    view.note(f"generator: {inputs.generator} ({inputs.generator_reason})")
    view.note(f"backbone: {layout} ({layout_reason}), {str(dtype).removeprefix('torch.')} on {device.type}")
    return scored, referred, first


def in_pieces(
    config: TrainConfig, model: nn.Module, source: str, device: torch.device, dtype: torch.dtype, view: View,
    world: World,
) -> ScoredModel:  # fmt: skip
    """A loaded model of which each process keeps its pieces, in the dtypes that `ready_models` and `store_frozen` give
    to whole ones later: FSDP2 takes those that it finds."""
    is_frozen = not any(parameter.requires_grad for parameter in model.parameters())
    if not (is_frozen and config.reference_every):
        models.store_as_computed(model, dtype, trained=config.param_dtype == "bfloat16")
    found, is_empty = ScoredModel(model, dtype=dtype), is_unread(model)
    shard(found, device, mesh_of(config, world))
    if config.optimizer == "adamw8bit":
        check_pieces(model.named_parameters())
    if is_empty:
        fill(model, source, device)
    else:
        view.note(f"each process has all weights of {source} before it keeps its piece")
    return found


def load_models(
    config: TrainConfig, inputs: Inputs, settled: Callable[[nn.Module, str], ScoredModel]
) -> tuple[ScoredModel, ScoredModel | None, bytes | None]:
    """Policy and reference: one module, whose reference is without its adapters, or two; or no reference. And the
    reference's first numbers, as it was read.

    settled: makes of each, and of where it comes from, what scores, before the next is read, so that no process holds
    two whole models where they are sharded.
    """
    resumed, source = inputs.resumed, inputs.source
    if config.lora_rank:
        policy = models.load_model(source, inputs.device, four_bit=config.qlora)
        first = None if config.no_reference or inputs.teacher else first_numbers(policy, source)
        add_adapters(policy, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
        if resumed:
            load_adapters(resumed.folder, policy)
        scored = settled(policy, source)
        if inputs.teacher:
            return scored, *reference_of(config, inputs, settled)
        return scored, None if config.no_reference else WithoutAdapters(scored), first
    if resumed and (resumed.folder / WEIGHTS).is_file():
        raise UserError(f"lora_rank: the checkpoint {str(resumed.folder)!r} holds adapters; give the rank they have.")
    start = str(resumed.folder) if resumed else source
    if inputs.teacher:
        return settled(policy_of(inputs), start), *reference_of(config, inputs, settled)
    if config.no_reference:
        return settled(policy_of(inputs), start), None, None
    reference, first = reference_of(config, inputs, settled)
    scored = settled(policy_of(inputs), start)
    check_same_shape(scored.model, reference.model, resumed)
    return scored, reference, first


def policy_of(inputs: Inputs) -> Any:
    """The model that is trained: read from the checkpoint or the start, or the caller's own module, which is trained in
    place and gets a checkpoint's weights."""
    resumed, module = inputs.resumed, inputs.given.policy
    if module is None:
        return models.load_model(str(resumed.folder) if resumed else inputs.source, inputs.device)
    device = CPU if inputs.device == META else inputs.device  # it is here, and need not be read
    module = models.without_dropout(module).to(device)
    if resumed:
        saved = models.load_model(str(resumed.folder), device)
        check_same_shape(module, saved, resumed)
        module.load_state_dict(saved.state_dict())
    return module


def reference_of(
    config: TrainConfig, inputs: Inputs, settled: Callable[[nn.Module, str], ScoredModel]
) -> tuple[ScoredModel, bytes]:
    """The reference as a model of its own, and its first numbers."""
    source, model = inputs.teacher or inputs.source, reference_model(config, inputs)
    first = first_numbers(model, source)
    return settled(model, source), first


def reference_model(config: TrainConfig, inputs: Inputs) -> nn.Module:
    """The reference: the teacher, or the model that the policy starts from."""
    place = reference_place(config, inputs.device)
    return models.load_model(inputs.teacher or inputs.source, place).requires_grad_(False)


def send_to(reference: ScoredModel, device: torch.device) -> None:
    """Has a reference that is elsewhere send what it computes to the policy's device."""
    if reference.device != device:
        reference.head_copy = HeadCopy(device)
        reference.head_copy.of(head_of(reference.model))  # now: an engine measures what is left


def store_frozen(
    config: TrainConfig,
    inputs: Inputs,
    scored: ScoredModel,
    referred: ScoredModel | None,
    dtype: torch.dtype,
    world: World,
) -> None:
    """Keeps the matrices that nobody trains in the dtype in which they are computed."""
    if config.reference_every or is_sharded(config):
        return
    for frozen in (scored, referred) if referred and inputs.teacher and config.lora_rank else (referred or scored,):
        models.store_as_computed(frozen.model, dtype)
    if referred and "reference" in config.offload:
        referred.scores_on = inputs.device
        put_away(referred.model)
    give_back_gpu_memory(inputs.device)


def compile_layers(
    config: TrainConfig, inputs: Inputs, scored: ScoredModel, referred: ScoredModel | None, view: View
) -> None:
    """Has policy and reference run their layers compiled, if that is asked for. UserError where it changes anything."""
    if not config.compile:
        return
    slow = ", which makes nothing faster on a CPU" if inputs.device.type == "cpu" else ""
    view.note(f"compiling the layers{slow}; half a minute to some minutes ...")
    probe, layers = probe_batch(inputs.prompts[0], inputs.device), compiled.compiled_layers(scored.model)
    view.note(f"compiled: the policy's {compiled.use(scored, layers, probe, learns=True)}")
    if referred:
        theirs = layers if referred.model is scored.model else compiled.compiled_layers(referred.model)
        view.note(f"compiled: the reference's {compiled.use(referred, theirs, probe, learns=False)}")
    give_back_gpu_memory(inputs.device)


def checked_layout(scored: ScoredModel, inputs: Inputs, config: TrainConfig, probe: PackedBatch) -> tuple[str, str]:
    """How a model goes over a batch, and why; after a look at its head. UserError where it cannot be scored."""
    in_float32 = models.widened(scored.model) if scored.is_sharded else contextlib.nullcontext()
    with gathered(scored), in_float32:
        check_head(scored.model, list(inputs.prompts[0].token_ids))
        tokens = max_sequence_tokens(inputs, config)
        return backbone.choose_layout(scored.model, moved(probe, scored.device), scored.dtype, max_tokens=tokens)


def check_trainable(policy: ScoredModel, probe: PackedBatch) -> None:
    """UserError where a backward through the model fails: Reformer's wants training mode and one length only."""
    try:
        with policy.scoring():
            policy.hidden(probe).states.float().square().mean().backward()
    except Exception as failure:  # the model's own code
        raise UserError(
            f"model: {type(policy.model).__name__} cannot be trained ({models.first_line(failure)}); name another."
        ) from failure
    finally:
        policy.zero_grad(set_to_none=True)
    give_back_gpu_memory(policy.device)


def check_same_shape(policy: nn.Module, reference: nn.Module, resumed: checkpoint.Checkpoint | None) -> None:
    """A checkpoint of another model is not resumed."""
    if {n: p.shape for n, p in policy.named_parameters()} != {n: p.shape for n, p in reference.named_parameters()}:
        raise UserError(
            f"resume: the checkpoint {str(resumed.folder) if resumed else ''!r} holds another model than --model; "
            "name the model that the run was started with."
        )


def probe_batch(prompt: Prompt, device: torch.device) -> PackedBatch:
    """Sequences of different lengths, made of the prompt's own tokens, to try a backbone layout on: one that begins as
    the longest does, and two that go on otherwise after two tokens and at once."""
    ids = (prompt.token_ids * 9)[: max(9, min(64, len(prompt.token_ids)))]
    others = tuple(token - 1 if token else 1 for token in ids)
    samples = ids, ids[:3], ids[:2] + others[2:7], others[:4]
    completions = tuple(Completion(sample, (0.0,) * len(sample), "length", "") for sample in samples)
    rewards = torch.zeros(1, len(samples))
    batch = RolloutBatch((prompt,), (completions,), rewards, torch.ones_like(rewards, dtype=torch.bool), 0)
    short = dataclasses.replace(batch, prompts=(dataclasses.replace(prompt, token_ids=prompt.token_ids[:64]),))
    return pack(short, [0], 1 << 30, device)[0][1]
