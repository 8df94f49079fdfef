"""Options that people who come from TRL, verl or OpenRLHF type: what they are called here, or why there are none.

The names are those of TRL's GRPOConfig, RLOOConfig, ModelConfig and ScriptArguments (transformers' TrainingArguments
included), of OpenRLHF's train_ppo_ray, and of verl's ppo_trainer.yaml.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

OURS: dict[str, str] = {
    "--model": "model_name_or_path pretrain actor_rollout_ref.model.path",
    "--prompts": "dataset dataset_name prompt_data data.train_files",
    "--reward": "reward_funcs remote_rm_url custom_reward_function.path custom_reward_function.name",
    "--reward model:ID": "reward_pretrain reward_model_path reward_model.model.path",
    "--dynamic-sampling": "dynamic_filtering dynamic_filtering_enable filter_groups algorithm.filter_groups.enable",
    "--prompts hub:ID?config=NAME&split=NAME": "dataset_config dataset_train_split",
    "--prompt-column": "input_key data.prompt_key",
    "--revision": "model_revision",
    "--shuffle": "shuffle_dataset data.shuffle",
    "--long-prompts": "data.filter_overlong_prompts",
    "--kl-coef": "beta init_kl_coef algorithm.kl_ctrl.kl_coef actor_rollout_ref.actor.kl_loss_coef",
    "--kl-estimator": "algorithm.kl_penalty actor_rollout_ref.actor.kl_loss_type",
    "--kl-placement": "use_kl_loss algorithm.use_kl_in_reward actor_rollout_ref.actor.use_kl_loss",
    "--advantage": "baseline advantage_estimator algorithm.adv_estimator",
    "--reference": "ref_model_name_or_path teacher_model_name_or_path distillation.teacher_model.model_path",
    "--advantage-scale": "scale_rewards normalize_advantages normalize_reward",
    "--reward-clip": "reward_clip_range",
    "--loss-level": "loss_type actor_rollout_ref.actor.loss_agg_mode",
    "--entropy-coef": "entropy_loss_coef actor_rollout_ref.actor.entropy_coeff",
    "--truncated drop": "mask_truncated_completions",
    "--reference-every": "sync_ref_model ref_model_sync_steps",
    "--reference-share": "ref_model_mixup_alpha",
    "--epochs": "num_iterations max_epochs actor_rollout_ref.actor.ppo_epochs",
    "--updates-per-rollout": "steps_per_generation actor_rollout_ref.actor.ppo_mini_batch_size",
    "--clip": "epsilon epsilon_high eps_clip actor_rollout_ref.actor.clip_ratio",
    "--clip-level": "importance_sampling_level",
    "--importance": "vllm_importance_sampling_correction enable_vllm_is_correction",
    "--importance-cap": "vllm_importance_sampling_clip_max vllm_importance_sampling_cap vllm_is_truncated_threshold",
    "--num-samples": "num_generations n_samples_per_prompt actor_rollout_ref.rollout.n",
    "--prompts-per-step": "rollout_batch_size data.train_batch_size",
    "--max-new-tokens": "max_completion_length generate_max_len data.max_response_length",
    "--generator": "use_vllm actor_rollout_ref.rollout.name",
    "--gpu-memory-utilization": "vllm_gpu_memory_utilization actor_rollout_ref.rollout.gpu_memory_utilization",
    "--lora-rank": "lora_r actor_rollout_ref.model.lora_rank",
    "--lora-alpha": "actor_rollout_ref.model.lora_alpha",
    "--qlora": "load_in_4bit",
    "--optimizer adamw8bit": "optim",
    "--offload": "adam_offload actor_rollout_ref.actor.fsdp_config.optimizer_offload",
    "--shard": "deepspeed fsdp fsdp_config zero_stage actor_rollout_ref.actor.strategy",
    "--nproc": "num_processes nproc_per_node trainer.n_gpus_per_node actor_num_gpus_per_node",
    "--engine-tp": "vllm_tensor_parallel_size actor_rollout_ref.rollout.tensor_model_parallel_size",
    "--engine-sleep": "vllm_enable_sleep vllm_enable_sleep_mode actor_rollout_ref.rollout.free_cache_engine",
    "--engines": "vllm_server_base_url vllm_server_host vllm_server_port vllm_mode vllm_num_engines",
    "--rollout-ahead": "async_train",
    "--lora-targets": "lora_target_modules target_modules actor_rollout_ref.model.target_modules",
    "--lr": "learning_rate actor_learning_rate actor_rollout_ref.actor.optim.lr",
    "--lr-decay": "lr_scheduler_type lr_scheduler",
    "--warmup-steps": "warmup_ratio lr_warmup_ratio",
    "--weight-decay": "l2",
    "--max-grad-norm": "max_norm",
    "--steps": "max_steps num_train_epochs num_episodes trainer.total_training_steps trainer.total_epochs",
    "--micro-batch-tokens": "gradient_accumulation_steps micro_train_batch_size use_dynamic_batch "
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "--dtype bfloat16": "bf16",
    "--output": "output_dir run_name save_path ckpt_path trainer.default_local_dir trainer.experiment_name",
    "--save-every": "save_steps trainer.save_freq",
    "--keep-checkpoints": "save_total_limit max_ckpt_num",
    "--resume": "resume_from_checkpoint load_checkpoint trainer.resume_mode",
    "--eval-prompts": "eval_dataset eval_data data.val_files do_eval eval_on_start trainer.val_before_train",
    "--eval-every": "eval_steps eval_strategy trainer.test_freq",
    "--eval-samples": "num_generations_eval eval_n_samples_per_prompt actor_rollout_ref.rollout.val_kwargs.n",
    "--eval-temperature": "actor_rollout_ref.rollout.val_kwargs.temperature",
    "--best": "metric_for_best_model load_best_model_at_end",
    "--report-to": "use_wandb use_tensorboard trainer.logger",
}
"""Our option, and its names elsewhere."""

NOT_HERE: dict[str, str] = {
    "per_device_train_batch_size train_batch_size generation_batch_size": (
        "a step takes --prompts-per-step times --num-samples completions, and --micro-batch-tokens bounds its memory"
    ),
    "delta policy_loss_type": "the ratio is cut as in PPO, by --clip, at the level of --clip-level",
    "critic_pretrain critic_learning_rate gamma lambd": "there is no critic",
    "use_peft": "adapters are asked for by their rank: --lora-rank 16",
    "lora_dropout": "dropout would count as KL; adapters have none",
    "load_in_8bit": "frozen matrices are in 4 bits (--lora-rank 16 --qlora) or as they are",
    "trainer.nnodes num_machines actor_num_nodes": (
        "several machines are started by torchrun: torchrun --nnodes 2 --nproc-per-node 8 -m fastkl train"
    ),
    "fp16": "float16 overflows; use --dtype bfloat16",
    "logging_steps log_completions": "every step is logged; --sample-every says how often completions are shown",
    "push_to_hub": "the command `fastkl export` uploads a finished model",
    "max_prompt_length prompt_max_len data.max_prompt_length": (
        "prompts are never cut; --long-prompts says what becomes of one that does not fit the model's context"
    ),
}
"""Names elsewhere, and why there is no such option here."""


VERL = ("actor_rollout_ref.", "algorithm.", "critic.", "data.", "reward_model.", "trainer.")
"""Where the names of verl's settings begin."""


def answer(option: str, known: Iterable[str]) -> str:
    """What `option` (with or without dashes) is here, begins with a space; nothing for a name nobody uses.

    known: the options of the command; an answer that is not among them would not help.
    """
    name = _plain(option)
    for ours, theirs in OURS.items():
        if name in theirs.split() and ours.split()[0] in known:
            return f" Here it is {ours}."
    why = next((why for theirs, why in NOT_HERE.items() if name in theirs.split()), "")
    if not why and name.startswith(VERL):
        why = "it is a setting of verl without a counterpart"
    return f" Not here: {why}." if why else ""


def nearest_answer(option: str, known: Iterable[str]) -> str:
    """The same for a mistyped name, --learning-rte: the name elsewhere that it is most like, and its answer."""
    theirs = [name for names in (*OURS.values(), *NOT_HERE) for name in names.split()]
    for name in difflib.get_close_matches(_plain(option), theirs, n=1, cutoff=0.8):
        if said := answer(name, known):
            return f" Did you mean {name.replace('_', '-')!r}?{said}"
    return ""


def _plain(option: str) -> str:
    """A name as it is written in the tables."""
    return option.lstrip("+-").replace("-", "_")
