"""Advantages and loss levels against their formulas, a loop over samples in float64, and against TRL's and verl's."""

from __future__ import annotations

import statistics
from types import SimpleNamespace

import pytest
import torch
from group_case import LONGEST, G, K, group_case
from toy import STOP, toy_batch, toy_config, toy_model
from toy_step import step_gradient

from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.objective.advantages import ADVANTAGES, EPSILON, find_advantage, scaled
from fastkl.objective.kl_estimators import Penalty
from fastkl.objective.loss_levels import LOSS_LEVELS
from fastkl.objective.rloo import Objective
from fastkl.sampling.params import Sampling

REWARDS = [[1.0, 4.0, 7.0, 100.0], [5.0, -2.0, 0.5, 0.25], [3.0, 3.0, 3.0, 3.0]]
VALID = [[True, True, True, False], [True, True, True, True], [True, True, True, True]]
LENGTHS = [[2, 3, 5, 9], [1, 1, 7, 2], [4, 4, 4, 4]]


def by_hand(name: str, scale: str = "none") -> list[list[float]]:
    """The advantages of REWARDS by the formulas, one sample at a time."""
    counted = [[r for r, v in zip(group, ok, strict=True) if v] for group, ok in zip(REWARDS, VALID, strict=True)]
    tokens = [r for g in range(3) for k in range(4) if VALID[g][k] for r in [REWARDS[g][k]] * LENGTHS[g][k]]
    everything = [r for group in counted for r in group]
    found = []
    for g, group in enumerate(counted):
        row = []
        for k, r in enumerate(REWARDS[g]):
            if not VALID[g][k]:
                row.append(0.0)
                continue
            mean, spread = statistics.fmean(group), statistics.stdev(group)
            value = {
                "rloo": r - (sum(group) - r) / (len(group) - 1),
                "none": r,
                "dr_grpo": r - mean,
                "grpo": (r - mean) / (spread + EPSILON),
                "reinforce_pp": (r - statistics.fmean(tokens)) / (statistics.variance(tokens) + 1e-8) ** 0.5,
            }[name]
            by = {"none": 1.0, "group": spread + EPSILON, "batch": statistics.stdev(everything) + EPSILON}[scale]
            row.append(value / by)
        found.append(row)
    return found


def computed(name: str, scale: str = "none", rewards=REWARDS, valid=VALID, lengths=LENGTHS) -> torch.Tensor:
    advantage = scaled(find_advantage(name), scale)
    more = [torch.tensor(lengths)] if advantage.whole_step else []
    return advantage.function(torch.tensor(rewards, dtype=torch.float64), torch.tensor(valid), *more)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        *((name, "none") for name in ADVANTAGES),
        *((n, s) for n in ("rloo", "dr_grpo", "none") for s in ("group", "batch")),
    ],
)
def test_every_advantage_is_its_formula(name, scale):
    expected = torch.tensor(by_hand(name, scale), dtype=torch.float64)
    torch.testing.assert_close(computed(name, scale), expected, rtol=0, atol=1e-9)


def test_grpo_is_dr_grpo_in_units_of_the_groups_spread():
    assert torch.equal(computed("grpo"), computed("dr_grpo", "group"))


def test_a_reward_that_does_not_count_changes_nothing():
    other = [[1.0, 4.0, 7.0, -1e6], *REWARDS[1:]]
    for name in ADVANTAGES:
        assert torch.equal(computed(name), computed(name, rewards=other)), name


def written_out_gradient(policy, reference, batch, config: TrainConfig) -> dict[str, torch.Tensor]:
    """The documented loss, one completion at a time from the model's own logits, differentiated by autograd."""
    terms, rewards = [], torch.zeros(3, 4, dtype=torch.float64)
    for b, group in enumerate(batch.completions):
        for k, completion in enumerate(group):
            if not batch.valid[b, k]:
                continue
            ids = torch.tensor([batch.prompts[b].token_ids + completion.token_ids])
            y = torch.tensor(completion.token_ids)[:, None]
            logp, ref = (
                m(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)[-len(y) - 1 : -1]
                for m in (policy, reference)
            )
            k1 = (logp - ref).gather(1, y).sum().detach()
            rewards[b, k] = float(batch.rewards[b, k]) - (config.kl_coef * k1 if config.kl_placement == "reward" else 0)
            kl = (logp.exp() * (logp - ref)).sum(1)
            terms.append((b, k, logp.gather(1, y)[:, 0], kl, -(logp.exp() * logp).sum(1)))
    lengths = [[len(c.token_ids) for c in group] for group in batch.completions]
    advantages = computed(config.advantage, config.advantage_scale, rewards.tolist(), batch.valid.tolist(), lengths)
    sums, num_tokens, n = [], 0, len(terms)
    for b, k, logp, kl, entropy in terms:
        of_tokens = -advantages[b, k] * logp - config.entropy_coef * entropy
        if config.kl_placement == "loss":
            of_tokens = of_tokens + config.kl_coef * kl
        sums.append(of_tokens.sum() / (len(logp) if config.loss_level == "mean" else 1))
        num_tokens += len(logp)
    divided_by = {"sum": n, "mean": n, "token": num_tokens, "max_length": n * config.max_new_tokens}
    loss = torch.stack(sums).sum() / divided_by[config.loss_level]
    gradients = torch.autograd.grad(loss, list(policy.parameters()))
    return dict(zip((name for name, _ in policy.named_parameters()), gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"advantage": "dr_grpo"},
    {"advantage": "grpo", "loss_level": "mean"},
    {"advantage": "grpo", "loss_level": "token", "kl_estimator": "exact", "kl_placement": "loss"},
    {"advantage": "reinforce_pp"},
    {"advantage": "reinforce_pp", "kl_estimator": "exact", "kl_placement": "loss", "entropy_coef": 0.2},
    {"advantage_scale": "batch", "loss_level": "max_length", "micro_batch_tokens": 1},
    {"advantage_scale": "group", "kl_coef": 0.0},
    {"entropy_coef": 0.3},
    {"entropy_coef": 0.3, "loss_level": "mean", "micro_batch_tokens": 1},
    {"loss_level": "max_length", "kl_estimator": "exact", "kl_placement": "loss"},
], ids=str)  # fmt: skip
def test_gradient_of_the_whole_step_is_that_of_the_written_out_loss(options):
    policy, reference = toy_model(0), toy_model(1).requires_grad_(False)
    config = toy_config(max_new_tokens=6, **({"kl_placement": "reward"} | options))
    check_config(config)
    batch = toy_batch(policy)
    gradient, outcome = step_gradient(policy, reference, batch, config)
    assert int(batch.valid.sum()) == 11 and outcome.applied
    expected = written_out_gradient(policy, reference, batch, config)
    size = max(float(g.abs().max()) for g in expected.values())
    for name, theirs in expected.items():
        torch.testing.assert_close(gradient[name], theirs, rtol=0, atol=3e-7 * size, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("options", "words"), [
    ({"advantage": "grpo", "advantage_scale": "group"}, "advantage_scale: the advantage grpo is in units of a spread"),
    ({"reward_clip": (1.0, -1.0)}, "reward_clip: 1 -1 is no range"),
    ({"reward_clip": (1.0,)}, "reward_clip: 1 is no range"),
    ({"advantage": "grpo", "kl_estimator": "exact", "kl_placement": "reward"}, "kl_estimator: exact in the reward has"),
    ({"advantage": "dr_grpo", "kl_credit": "caused"}, "kl_credit: caused gives each token a KL in units"),
    ({"loss_level": "mean", "kl_credit": "caused"}, "kl_credit: caused is biased with loss_level mean"),
    ({"loss_level": "token", "kl_reduction": "mean", "kl_estimator": "k2", "kl_placement": "loss"},
     "kl_reduction: mean"),
    ({"advantage": "none", "advantage_scale": "group", "num_samples": 1}, "num_samples: 1 leaves"),
    ({"loss_level": "tokens"}, "loss_level: unknown 'tokens'. Did you mean 'token'"),
], ids=str)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        check_config(TrainConfig(**options))


def test_what_is_refused_beside_a_penalty_is_allowed_without_one():
    check_config(TrainConfig(advantage="grpo", kl_estimator="exact", kl_placement="reward", kl_coef=0.0))


@pytest.mark.slow
def test_an_advantage_of_ones_own_may_ask_for_the_whole_step(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "def by_length(rewards, valid, lengths):\n"
        "    return (rewards - rewards[valid].mean()).masked_fill(~valid, 0.0) / lengths.clamp(min=1)\n\n"
        "by_length.whole_step = True\nby_length.min_samples = 1\n"
    )
    policy, reference = toy_model(0), toy_model(1).requires_grad_(False)
    config = toy_config(advantage=f"{path}:by_length", kl_placement="reward", micro_batch_tokens=1)
    gradient, outcome = step_gradient(policy, reference, toy_batch(policy), config)
    assert outcome.applied and any(g.abs().max() > 1e-6 for g in gradient.values())


def objective_of(advantage: str, level: str, penalty: Penalty, **options) -> Objective:
    sampling = Sampling(1.0, LONGEST, stop_token_ids=(STOP,))
    return Objective(penalty, scaled(ADVANTAGES[advantage], "none"), sampling, loss_level=level, **options)


def normalizer_of(level: str, case) -> float:
    return LOSS_LEVELS[level].normalizer(float(G * K), float(case.lengths.sum()), LONGEST)


TRL_LOSSES = {"mean": "grpo", "token": "bnpo", "max_length": "dr_grpo", "sum": "luspo"}
VERL_LOSSES = {"mean": "seq-mean-token-mean", "token": "token-mean", "max_length": "seq-mean-token-sum-norm",
               "sum": "seq-mean-token-sum"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", TRL_LOSSES)
def test_factors_are_the_gradient_of_trls_loss(level):
    """GRPOTrainer._compute_loss on the same tensors: advantages of the group, k3 in the loss, an entropy bonus.

    TRL averages its entropy bonus over tokens whatever the loss, which is the level "token" here.
    """
    pytest.importorskip("trl_without_vllm")
    case = group_case(drift=0.0)
    entropy_coef = 0.3 if level == "token" else 0.0
    objective = objective_of("grpo", level, Penalty(0.1, "k3", "loss"), entropy_coef=entropy_coef)
    ours = case.factors(objective, normalizer_of(level, case))
    logprobs, entropy = case.logprobs.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    loss = trl_loss(case, logprobs, entropy, TRL_LOSSES[level], computed_grpo(case), 0.1, entropy_coef)
    expected = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True)
    torch.testing.assert_close(ours["policy_logprobs"], expected[0], rtol=0, atol=1e-7)
    if entropy_coef:
        torch.testing.assert_close(ours["entropy"], expected[1], rtol=0, atol=1e-7)


def computed_grpo(case) -> torch.Tensor:
    """TRL's lines: mean and spread of the group, NaN-proof; f64 [S]."""
    from trl.trainer.utils import nanstd

    mean, spread = case.rewards.mean(1, keepdim=True), nanstd(case.rewards, dim=1)[:, None]
    return ((case.rewards - mean) / (spread + 1e-4)).flatten()


def trl_loss(case, logprobs, entropy, loss_type, advantages, beta, entropy_coef=0.0, **options) -> torch.Tensor:
    """GRPOTrainer._compute_loss of a trainer that is only what this method reads."""
    from collections import defaultdict

    import trl

    lists = defaultdict(list)
    trainer = SimpleNamespace(
        **({"epsilon_low": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token"} | options),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta, use_vllm=False,
        loss_type=loss_type, max_completion_length=LONGEST, current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=bool(entropy_coef), use_adaptive_entropy=False, entropy_coef=entropy_coef,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(gather=lambda x: x, num_processes=1, sync_gradients=False, reduce=lambda x, **_: x),
        model=SimpleNamespace(training=True), _metrics={"train": lists}, current_train_batch_size=len(logprobs),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
    )  # fmt: skip
    ids = torch.zeros(len(logprobs), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids.expand(-1, LONGEST),
        "completion_mask": case.mask.double(), "advantages": advantages, "ref_per_token_logps": case.ref_logprobs,
        "num_items_in_batch": case.mask.sum(), "old_per_token_logps": case.old_logprobs,
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "reinforce_pp"])
def test_advantages_are_verls(name):
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    case = group_case()
    at_end = torch.zeros_like(case.logprobs)
    at_end[torch.arange(G * K), case.lengths - 1] = case.rewards.flatten()
    mask, index = case.mask.double(), [str(g) for g in range(G) for _ in range(K)]
    if name == "reinforce_pp":
        config = SimpleNamespace(gamma=1.0)
        theirs, _ = algos.compute_reinforce_plus_plus_outcome_advantage(at_end, mask, config=config)
    elif name == "rloo":
        theirs, _ = algos.compute_rloo_outcome_advantage(at_end, mask, index)
    else:
        theirs, _ = algos.compute_grpo_outcome_advantage(
            at_end, mask, index, epsilon=EPSILON, norm_adv_by_std_in_grpo=name == "grpo"
        )
    lengths = case.lengths.view(G, K).tolist()
    ours = computed(name, rewards=case.rewards.tolist(), valid=[[True] * K] * G, lengths=lengths)
    torch.testing.assert_close(ours.flatten()[:, None] * mask, theirs * mask, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", VERL_LOSSES)
def test_factors_are_the_gradient_of_verls_aggregated_loss(level):
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    case = group_case()
    ours = case.factors(objective_of("none", level, Penalty(0.0)), normalizer_of(level, case))
    logprobs = case.logprobs.clone().requires_grad_()
    losses = -case.rewards.flatten()[:, None] * logprobs
    loss = algos.agg_loss(losses, case.mask.double(), VERL_LOSSES[level], loss_scale_factor=LONGEST)
    (expected,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(ours["policy_logprobs"], expected, rtol=0, atol=1e-7)
