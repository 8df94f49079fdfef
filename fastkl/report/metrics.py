"""The table of metrics: every key of metrics.jsonl with its title, unit, number format and formula.

In: a `FinishedStep`. Out: the step's line of metrics.jsonl (`metrics_of`), and docs/metrics.md, which
`python -m fastkl.report.metrics` prints. The terminal, the report page and the trackers take names, units and formats
from here and have no lists of keys of their own, so a new metric is one entry of METRICS. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastkl.audit.thresholds import SIGMAS, WINDOW_STEPS
from fastkl.report.numbers import number, percent

if TYPE_CHECKING:
    from fastkl.report.step_metrics import FinishedStep

Value = float | int | None


@dataclass(frozen=True, slots=True)
class Metric:
    """One key of metrics.jsonl, or a family of them: the part in capitals of "reward/NAME" stands for any name."""

    key: str
    title: str
    about: str  # one sentence, the caption of its chart
    unit: str
    formula: str  # in the notation of objective/rloo.py, for docs/metrics.md
    value: Callable[[FinishedStep], Value | Mapping[str, Value]]  # None: not logged; of a family: values by name
    label: str = ""  # the title's short form, for rows, columns and legends
    write: Callable[[float], str] = number
    panel: bool = False  # a row of the terminal's panel, a column of the page's table, a chart of a comparison
    card: bool = False  # a card on top of the page, a column of a comparison
    plain: str = ""  # its part of the terminal's plain lines, of {text} (as `write` writes it), {value} or {label}
    brief: str = ""  # its part of the panel's lines of small numbers, made of the same
    chart: str = ""  # heading of the chart on a run's page; metrics with the same heading share it
    from_zero: bool = False  # its axis reaches 0
    band: str = ""  # key of the standard deviation that is drawn around it
    area_to: str = ""  # key of the line down to which the area below it is filled
    exact: str = ""  # key of a less noisy measure of the same quantity, which the page prefers
    whole: str = ""  # key of a family's sum; the members are drawn as shares of it
    change: bool = False  # the page compares the last step with the first
    summary: Literal["last", "median"] = "last"  # the one number of a whole run
    sparse: bool = False  # measured before the first step and now and then: a line goes from one value to the next

    @property
    def name(self) -> str:
        """Label, or the title where there is no shorter form."""
        return self.label or self.title

    @property
    def heading(self) -> str:
        """The name with its unit, for the columns of tables; shares are written with a percent sign."""
        return self.name if self.is_share or not self.unit else f"{self.name}, {self.unit}"

    @property
    def is_share(self) -> bool:
        """Whether its values are shares of 1."""
        return self.write is percent

    @property
    def is_family(self) -> bool:
        """Whether it stands for several keys."""
        return CAPITALS.search(self.key) is not None

    def labels(self, keys: Iterable[str]) -> dict[str, str]:
        """Its keys among `keys`, in their order, each with its label; in a family the label is the name's part."""
        if not self.is_family:
            return {self.key: self.name} if self.key in keys else {}
        start, end = CAPITALS.split(self.key)
        own = {metric.key for metric in METRICS}
        closer = [other for other in METRICS if other.is_family and len(other.key) > len(self.key)]
        members = [key for key in keys if self.may_hold(key) and key not in own]
        members = [key for key in members if not any(other.may_hold(key) for other in closer)]
        return {key: self.label + key[len(start) : len(key) - len(end)] for key in members}

    def may_hold(self, key: str) -> bool:
        """Whether a family's `key` has the form of its own."""
        start, end = CAPITALS.split(self.key)
        return key.startswith(start) and key.endswith(end)


CAPITALS = re.compile("[A-Z]+")


STAGES = ("generate", "reward", "score", "update", "sync")  # of a step, in order; each has a time, 0 where it has none


CAPTIONS = {  # of charts that several metrics share
    "Reward": "Mean per completion; the band is one standard deviation.",
    "KL from the original": "Summed over a completion: estimated from the samples (k1), and exact.",
    "Cross entropies": "Of the completions, under both models; the area between is the KL per token.",
    "Where the time goes": "Each stage's share of the time.",
    "Held-out pass rate": "At least one of k samples passes; the band is one standard error.",
}


def _held_out(key: str) -> Callable[[FinishedStep], Value]:
    return lambda s: s.evaluation.get(key)


def _held_out_family(start: str) -> Callable[[FinishedStep], Mapping[str, Value]]:
    """Those of `evaluation` that begin so and are no entries of their own."""
    own = {f"{start}1"} if start == "eval/pass@" else set()
    return lambda s: {
        key.removeprefix(start): value
        for key, value in s.evaluation.items()
        if key.startswith(start) and key not in own
    }


def _kl(value: Callable[[FinishedStep], Value]) -> Callable[[FinishedStep], Value]:
    """What needs a reference: not logged by a run without one."""
    return lambda s: value(s) if s.report.has_reference else None


METRICS: tuple[Metric, ...] = (
    Metric("step", "Step", "Number of the step; 0 is an evaluation before the first.", "", "0, 1, 2, ...",
           lambda s: s.report.step),
    Metric("reward/raw", "Reward", "Mean per completion.", "mean per completion",
           "mean_i r_i over the samples with a reward", lambda s: float(s.rewards.mean()),
           label="reward", panel=True, card=True, plain="  reward {text}", chart="Reward", band="reward/std",
           change=True),
    Metric("reward/std", "Spread of the rewards", "Standard deviation over the step's completions.", "per completion",
           "sqrt(mean_i (r_i - mean_j r_j)^2)", lambda s: float(s.rewards.std(correction=0))),
    Metric("reward/penalized", "Penalised reward", "The reward less the KL penalty.", "mean per completion",
           "mean_i R_i, R_i = r_i - beta * KL_i; r_i alone where the KL is in the loss",
           lambda s: s.mean["reward_penalized"],
           label="after the KL penalty", chart="Reward"),
    Metric("reward/drawn", "Reward of all that was drawn",
           "Without the choice that --dynamic-sampling makes; not logged without it.", "mean per completion",
           "mean of r_i over the step's samples and those that were replaced",
           lambda s: s.report.redraws.mean_reward if s.report.redraws else None,
           label="of all drawn", chart="Reward"),
    Metric("reward/NAME", "Reward function NAME", "Each function's own mean, before weights.", "mean per completion",
           "mean over the completions that the function applies to; also what it gives to log_metric",
           lambda s: s.report.reward_by_function,
           chart="Reward functions", plain="  {label} {text}", brief="{label} {text}"),
    Metric("kl/mean", "KL from the original", "Reverse, whatever is charged; summed over a completion.",
           "nats per completion",
           "mean_i sum_t w_it (log pi(y_it) - log q(y_it)); w = 1, but pi(y_it) / e(y_it) for stale samples",
           _kl(lambda s: s.report.kl_of(s.mean)),
           label="KL", panel=True, card=True, plain="  kl {text}", chart="KL from the original", from_zero=True,
           exact="kl/exact"),
    Metric("kl/per_token", "KL per token", "Mean over all scored tokens.", "nats per token",
           "(1 / N) sum_it w_it (log pi(y_it) - log q(y_it)), w as in kl/mean",
           _kl(lambda s: s.report.kl_of(s.per_token))),
    Metric("kl/exact", "Exact KL", "Over the whole vocabulary at every position, summed over a completion.",
           "nats per completion",
           "mean_i sum_t sum_v pi(v) (log pi(v) - log q(v)), v any id", _kl(lambda s: s.mean["kl_exact"]),
           label="exact KL", chart="KL from the original", from_zero=True),
    Metric("kl/support", "Exact KL on the support", "Over the ids that could be sampled, summed over a completion.",
           "nats per completion",
           "as kl/exact, with v, pi and q on the ids that could be sampled", _kl(lambda s: s.mean["kl_support"])),
    Metric("kl/off_support", "KL off the support",
           "The part of the exact KL that a sampled estimate cannot see: mass on ids that could not be sampled.",
           "nats per completion", "mean_i sum_t [KL_t(pi, q) - pi(S) KL_t(pi_S, q_S)], S the ids that could be sampled",
           _kl(lambda s: s.mean["kl_off_support"])),
    Metric("support/outside", "Tokens outside of the support",
           "Sampled tokens that the sampling settings, replayed on the trainer's logits, would not have allowed.",
           "of tokens", "tokens y_it that are not in S / N; they are scored as if they were", lambda s:
           s.total.num_outside / s.num_tokens, write=percent),
    Metric("kl/divergence", "Divergence charged",
           "The forward KL or the Jensen-Shannon divergence that --kl-direction charges; not logged with reverse.",
           "nats per completion", "mean_i sum_t D_t, D by --kl-direction, --kl-estimator and --kl-reduction",
           _kl(lambda s: None if s.report.kl_direction == "reverse" else s.mean["kl_penalized"]),
           label="divergence", from_zero=True),
    Metric("kl/penalty", "KL penalty", "What the KL costs.", "reward per completion",
           "beta * mean_i KL_i, by --kl-direction, --kl-estimator and --kl-reduction",
           _kl(lambda s: s.report.kl_coef * s.mean["kl_penalized"])),
    Metric("kl/coef", "KL coefficient", "Constant without --kl-target.", "reward per nat",
           "beta", _kl(lambda s: s.report.kl_coef)),
    Metric("kl/alarm", "KL alarm", "1 where the KL estimate is below zero, which no KL is.", "",
           f"mean of kl/mean over the last {WINDOW_STEPS} steps < -{SIGMAS:g} standard errors",
           _kl(lambda s: int(s.kl_alarm))),
    Metric("lm_cross_entropy", "Policy cross entropy", "Of the completions, under the policy.", "nats per token",
           "-(1 / N) sum_it log pi(y_it)", lambda s: -s.per_token["logprob"],
           label="policy CE", panel=True, plain="  ce {text}", chart="Cross entropies"),
    Metric("original_lm_cross_entropy", "Original cross entropy", "Of the completions, under the original model.",
           "nats per token",
           "-(1 / N) sum_it log q(y_it)", _kl(lambda s: -s.per_token["ref_logprob"]),
           label="original CE", panel=True, plain="/{text}", chart="Cross entropies", area_to="lm_cross_entropy"),
    Metric("entropy", "Entropy", "Of the policy's next-token distribution.", "nats per token",
           "-(1 / N) sum_it sum_v pi(v) log pi(v), v any id", lambda s: s.per_token["entropy"],
           label="entropy", panel=True, chart="Entropy"),
    Metric("diversity/distinct_2", "Distinct-2", "Different word pairs among all.", "of word pairs",
           "distinct pairs of adjacent words / all pairs, over the step's completions (Li et al. 2016)",
           lambda s: s.distinct_2,
           label="distinct-2", write=percent, panel=True, card=True, plain="  distinct-2 {text}",
           chart="Diversity", change=True),
    Metric("grammar/well_formed", "Well formed", "Share of all sentences.", "of sentences",
           "sentences of the storyteller's grammar / all sentences; models that speak its language only",
           lambda s: s.well_formed,
           label="well formed", write=percent, panel=True, card=True, plain="  well-formed {text}",
           chart="Grammar"),
    Metric("completion/mean_length", "Length", "Mean length of a completion.", "tokens",
           "mean_i T_i over all completions", lambda s: float(s.lengths.mean()),
           label="length", plain="  length {text}", brief="length {text}", chart="Length", from_zero=True),
    Metric("completion/truncated_share", "Cut completions", "Completions cut at max_new_tokens among all.",
           "of completions",
           "completions without an end-of-sequence token / all completions",
           lambda s: sum(c.finish_reason == "length" for c in s.completions) / len(s.completions),
           label="cut", write=percent, plain="  cut {text}", brief="cut {text}", chart="Cut at the length limit"),
    Metric("groups/skipped", "Prompts left out", "Prompts with too few scorable samples for an advantage.", "prompts",
           "number of prompts without a scored sample", lambda s: int((~s.scored.any(dim=1)).sum())),
    Metric("groups/no_signal", "Prompts without a signal", "Prompts whose samples all have the same reward.", "prompts",
           "number of prompts with samples that take part and rewards that do not differ",
           lambda s: sum(bool(v.any()) and bool((r[v] == r[v][0]).all())
                         for r, v in zip(s.report.batch.rewards, s.report.batch.valid, strict=True))),
    Metric("groups/replaced", "Prompts replaced", "Prompts drawn anew by --dynamic-sampling; not logged without it.",
           "prompts", "number of groups that were drawn and left out, since their rewards did not differ",
           lambda s: s.report.redraws.num_replaced if s.report.redraws else None),
    Metric("steps/skipped", "Steps skipped", "Steps so far whose loss or gradient was not finite.", "steps",
           "number of steps without an update, since the run began", lambda s: s.skipped_steps),
    Metric("eval/reward", "Held-out reward", "Mean per completion of the held-out prompts.", "mean per completion",
           "mean over the held-out prompts of mean_k r_k", _held_out("eval/reward"),
           label="held-out reward", panel=True, card=True, sparse=True, band="eval_error/reward"),
    Metric("eval/reward/NAME", "Held-out reward function NAME",
           "Each function's own mean, before weights, where there are several.",
           "mean per completion", "as reward/NAME, over the held-out completions", _held_out_family("eval/reward/"),
           sparse=True),
    Metric("eval/pass@1", "Held-out pass@1", "Share of the held-out completions whose reward is a pass.",
           "of completions", "as eval/pass@K", _held_out("eval/pass@1"),
           label="held-out pass@1", write=percent, panel=True, card=True, chart="Held-out pass rate", sparse=True,
           band="eval_error/pass@1", from_zero=True),
    Metric("eval/pass@K", "Held-out pass@K", "At least one of K samples of a held-out prompt passes.", "of prompts",
           "mean over the held-out prompts of 1 - C(n - c, K) / C(n, K), c of n samples with r >= --eval-pass; K = 1, "
           "2, 4, ... and n (Chen et al. 2021)", _held_out_family("eval/pass@"),
           label="held-out pass@", write=percent, chart="Held-out pass rate", sparse=True, from_zero=True),
    Metric("eval/length", "Held-out length", "Mean length of a held-out completion.", "tokens",
           "mean over the held-out prompts of mean_k T_k", _held_out("eval/length"), label="held-out length",
           sparse=True),
    Metric("eval/truncated_share", "Held-out completions cut", "Held-out completions cut at max_new_tokens among all.",
           "of completions", "as completion/truncated_share", _held_out("eval/truncated_share"),
           label="held-out cut", write=percent, sparse=True),
    Metric("eval/kl", "Held-out KL from the original",
           "Exact, over the whole vocabulary at every position of the held-out completions.", "nats per completion",
           "mean over the held-out prompts of mean_k sum_t KL_t(pi, q), at the training's temperature, v any id",
           _held_out("eval/kl"), label="held-out KL", sparse=True),
    Metric("eval/loss", "Held-out loss", "Of the text of --eval-text, at temperature 1 over the whole vocabulary.",
           "nats per token", "-(1 / N) sum_t log pi(y_t), N the text's tokens", _held_out("eval/loss"),
           label="held-out loss", chart="Held-out loss", sparse=True),
    Metric("eval_error/NAME", "Standard error of eval/NAME", "Over the held-out prompts.", "that of eval/NAME",
           "sqrt(var(x) / P), x_1 ... x_P the prompts' own values", _held_out_family("eval_error/"), sparse=True),
    Metric("time/eval_s", "Time of the evaluation", "Not a part of time/step_s.", "seconds",
           "time that it took, where there was one", _held_out("time/eval_s"), sparse=True),
    Metric("loss", "Loss", "Its gradient is the update's; its value has no meaning of its own.", "",
           "-(1 / normalizer) sum_i A_i sum_t log pi(y_it), plus the KL where it is in the loss",
           lambda s: s.total.loss),
    Metric("grad_norm", "Gradient norm", "Before it is clipped.", "",
           "norm of the gradient of all parameters", lambda s: s.report.outcome.grad_norm,
           plain="  gradient {text}", brief="gradient {text}"),
    Metric("lr", "Learning rate", "By --warmup-steps and --lr-decay.", "", "the optimizer's", lambda s: s.lr,
           plain="  lr {text}", brief="lr {text}"),
    Metric("tokens/generated", "Tokens generated", "Tokens of all completions so far.", "tokens",
           "sum of T_i since the run began", lambda s: s.tokens_generated),
    Metric("throughput/tokens_per_second", "Speed", "Completion tokens over the whole step's time.",
           "tokens per second",
           "sum_i T_i / time/step_s", lambda s: float(s.lengths.sum()) / s.step_seconds,
           label="speed", panel=True, card=True, plain="  {text} tok/s", chart="Speed", from_zero=True,
           summary="median"),
    Metric("time/STAGE_s", "Time of stage STAGE", "One of " + ", ".join(STAGES) + ".", "seconds",
           "time that the step spent in the stage", lambda s: dict.fromkeys(STAGES, 0.0) | dict(s.seconds),
           chart="Where the time goes", whole="time/step_s"),
    Metric("time/reward/NAME", "Time of reward function NAME", "From its call to its last answer.", "seconds",
           "wall time; functions that wait overlap, so that together they may take less",
           lambda s: s.report.reward_notes.seconds),
    Metric("time/retried/NAME", "Repeated requests of NAME",
           "Requests to the server of this reward that failed and were made again.", "requests",
           "number of requests without a usable answer but the last", lambda s: s.report.reward_notes.retried),
    Metric("time/step_s", "Step time", "All stages of the step.", "seconds",
           "sum of the stages' times", lambda s: s.step_seconds,
           label="step", plain="  {value:.1f} s"),
    Metric("memory/peak_rss_gb", "Memory", "Largest resident size so far, of the run's processes added up.", "GB",
           "sum over this process and its children of VmHWM / 10^9",
           lambda s: in_gigabytes(s.peak_rss_bytes), label="memory", brief="memory {text} GB"),
    Metric("memory/peak_gpu_gb", "GPU memory", "Largest sum of the trainer's tensors on the GPU so far.", "GB",
           "torch.cuda.max_memory_allocated() / 10^9, where there is a GPU; without an engine of its own process",
           lambda s: in_gigabytes(s.peak_gpu_bytes), label="GPU memory", brief="GPU {text} GB"),
    Metric("mismatch/mean_abs_logprob", "Generator against trainer",
           "Mean gap between their log-probs of the same tokens.", "nats per token",
           "(1 / N) sum_it abs(log e(y_it) - log pi(y_it)); with --rollout-ahead, as the next two, over a few tokens "
           "that are drawn after the step's push", lambda s: s.compared.mean_gap,
           label="gap", chart="Generator against trainer", from_zero=True),
    Metric("mismatch/max_abs_logprob", "Largest gap", "Largest gap between their log-probs of the same token.", "nats",
           "max_it abs(log e(y_it) - log pi(y_it))", lambda s: s.compared.gap_max),
    Metric("mismatch/engine_kl", "KL of generator and trainer", "Estimated from the samples; never below zero.",
           "nats per token",
           "(1 / N) sum_it (w - 1 - log w), w = pi(y_it) / e(y_it)", lambda s:
           s.compared.engine_kl_sum / max(1, s.compared.num_tokens)),
    Metric("mismatch/weights_cut", "Weights cut", "Importance weights cut at --importance-cap among all.", "of tokens",
           "tokens whose weight was above the cap / N", lambda s: s.total.num_weights_cut / s.num_tokens,
           write=percent),
    Metric("reuse/updates", "Updates of the rollout", "Of several per rollout, those that were applied.", "updates",
           "number of optimizer steps; not logged where there is one per rollout",
           lambda s: s.report.outcome.reused.num_updates if s.report.outcome.reused else None),
    Metric("reuse/clipped", "Ratios cut", "Tokens whose ratio to the policy that sampled was cut by --clip.",
           "of tokens", "tokens of all updates with a ratio beyond the clip and no gradient / all of them",
           lambda s: s.report.outcome.reused.clipped_share if s.report.outcome.reused else None, write=percent),
    Metric("reuse/drift", "Drift within a rollout",
           "How far the policy has moved from the one that sampled, before the last update.", "nats per token",
           "(1 / N) sum_it (w - 1 - log w), w = pi(y_it) / e(y_it), over the last update's tokens",
           lambda s: s.report.outcome.reused.drift if s.report.outcome.reused else None),
    Metric("policy_version", "Policy version", "Version of the weights that sampled the completions.", "",
           "step - 1; step - 2 where they were drawn ahead", lambda s: s.report.batch.policy_version),
    Metric("stale/age", "Age of the samples",
           "Updates since the weights that sampled all of the step's completions; with --rollout-ahead.", "updates",
           "step - 1 - policy_version", lambda s:
           s.report.step - 1 - s.report.batch.policy_version if s.report.canary else None),
    Metric("stale/drift", "Drift since sampling",
           "How far the policy has moved from the one that sampled, before the update; with --rollout-ahead.",
           "nats per token", "(1 / N) sum_it (w - 1 - log w), w = pi(y_it) / e(y_it)", lambda s:
           s.total.engine_kl_sum / s.num_tokens if s.report.canary else None),
    Metric("stale/effective", "Effective samples",
           "What the uncut importance weights of whole completions leave of the samples; with --rollout-ahead.",
           "of completions", "(sum_i W_i)^2 / (n sum_i W_i^2), W_i = prod_t pi(y_it) / e(y_it), over the n scored ones",
           lambda s: s.effective_share if s.report.canary else None, write=percent),
)  # fmt: skip


def written(form: Literal["plain", "brief"], step: Mapping[str, Value]) -> list[str]:
    """The parts of a step's plain line, or of the panel's lines of small numbers, for what the step has. A family of
    one is left out: with a single reward function, it repeats the reward."""
    parts = []
    for metric in METRICS:
        labels = metric.labels(step)
        if not (pattern := getattr(metric, form)) or (metric.is_family and len(labels) < 2):
            continue
        for key, label in labels.items():
            if (value := step.get(key)) is not None:
                parts.append(pattern.format(text=metric.write(value), value=value, label=label))
    return parts


def in_gigabytes(size_bytes: int | None) -> float | None:
    """10^9 bytes; None stays None."""
    return None if size_bytes is None else size_bytes / 1e9


def metrics_of(step: FinishedStep) -> dict[str, float | int]:
    """The step's line of metrics.jsonl, in the table's order."""
    line: dict[str, Value] = {}
    for metric in METRICS:
        value = metric.value(step)
        if isinstance(value, Mapping):
            line |= {metric.key.replace(CAPITALS.findall(metric.key)[0], name): one for name, one in value.items()}
        else:
            line[metric.key] = value
    return {key: value for key, value in line.items() if value is not None}


def reward_names(keys: Iterable[str]) -> list[str]:
    """The names of the reward functions among the keys of a step, in order."""
    return [name for metric in METRICS if metric.key == "reward/NAME" for name in metric.labels(keys).values()]


def taken_reward_names() -> list[str]:
    """What no reward function may be called in "reward/NAME": the table has these keys for other numbers."""
    return [metric.key.removeprefix("reward/") for metric in METRICS if metric.key.startswith("reward/")]


def markdown() -> str:
    """docs/metrics.md."""
    rows = [
        f"| `{metric.key}` | **{metric.title}.** {metric.about} | {metric.unit} | {metric.formula} |"
        for metric in METRICS
    ]
    return "\n".join([INTRODUCTION, "| Key | What it says | Unit | Formula |", "|---|---|---|---|", *rows, ""])


INTRODUCTION = """# Metrics

Every step of a run writes one line of `metrics.jsonl`; an evaluation before the first step writes one with step 0.
TensorBoard, W&B and trackio get the same keys, the terminal and the report page show some of them. This page is made
from the table in `fastkl/report/metrics.py` by `python -m fastkl.report.metrics > docs/metrics.md`.

Notation: sample i of the step has the completion y_i1 ... y_iT_i; r_i is its reward, beta the KL coefficient. pi is the
policy, q the reference, e the generator's record; log pi(y) and log q(y) are those on the ids that could be sampled.
Means run over the scored samples and N is the number of their tokens. Logarithms are natural. A value that is not
finite is written as null. With `--no-reference` everything that has q or beta in its formula is left out. Two runs with
equal settings may differ in `time/`, `throughput/` and `memory/` only.
"""


if __name__ == "__main__":
    print(markdown(), end="")
