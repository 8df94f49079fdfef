"""fastkl's scoring inside TRL 1.16's RLOOTrainer, GRPOTrainer and DistillationTrainer, switched on for one block.

    from fastkl.integrations.trl import fastkl_scoring

    trainer = RLOOTrainer(model, reward_funcs=reward, args=config, train_dataset=prompts)
    with fastkl_scoring(trainer):
        trainer.train()

Inside the block the trainer's log-probs (old, reference, policy), its entropy and with them its KL come from
`fastkl.linear_token_scores`: policy and reference share one pass over the vocabulary wherever both are needed. From
them TRL's code computes what it computed before: rewards, advantages, clipping, loss, metrics. With untruncated
sampling the trained weights are TRL's own up to rounding. What differs:

* The log-probs are those of the distribution that was sampled from. Under top_k, top_p, min_p, min_new_tokens (vLLM:
  min_tokens, allowed_token_ids) or suppress_tokens, policy and reference are scored on the set S of tokens that the
  policy could draw when it drew them; TRL's own KL is off by log pi(S) there and goes negative. What cannot be replayed
  (repetition_penalty, bad words, beams, ...) is refused by name before training starts. The entropy stays that of the
  whole vocabulary.
* Fewer forwards. Where the loss sees the weights that sampled (one iteration, no stale batches), one policy forward
  gives both the old log-probs and the loss: RLOO runs two forwards instead of three. See `reuse_forward`.
* Only the tokens of completions go through the head, in float32, also under autocast.
* Positions count from a row's first token, as they did in generation; TRL counts padding on the left, too.
* One more metric where policy and reference are scored together: `kl_exact`, the mean of the exact KL over the whole
  vocabulary, which sees what a KL on S or a sampled estimate cannot.

A DistillationTrainer keeps everything but its loss, which is computed with four products of a head instead of six
(distillation.py).

Refused by name: other versions of TRL, subclasses with a scoring of their own, images, FSDP, DeepSpeed, torch.compile,
Liger layers, continuous batching, rollout functions, prompt-learning adapters, active dropout, and models whose head is
not known to `fastkl.models.head_of`. Its vLLM mode is supported in code and by the same table of parameters as fastkl's
own, but has not been run (TRL's needs a GPU).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fastkl.integrations.trl.checks import check_trainer, check_version
from fastkl.integrations.trl.distillation import fused_loss, is_distillation
from fastkl.integrations.trl.forward import base_model_of, forward_task
from fastkl.integrations.trl.sampling import sampling_of
from fastkl.integrations.trl.scorer import Scorer

__all__ = ["fastkl_scoring"]


@contextmanager
def fastkl_scoring(trainer: Any, *, reuse_forward: bool | None = None) -> Iterator[None]:
    """Scores the trainer's tokens with fastkl while the block runs: `with fastkl_scoring(trainer): trainer.train()`.

    trainer: a trl.RLOOTrainer, trl.GRPOTrainer or trl.DistillationTrainer of TRL 1.16, in any state; nothing but this
    trainer and its models is touched, and both are given back as they were. Settings are read on entry.

    reuse_forward: whether the forward that gives the old log-probs is kept and differentiated in the loss, where TRL
    runs the same one again. It holds the activations (with gradient checkpointing: the layers' inputs) of a whole
    generation batch: if that is one micro-batch, no more than the loss needs anyway, otherwise steps_per_generation
    times as much. None: where it costs no memory. True: wherever it is exact. False: never. Runs on several processes,
    batches used more than once, and trainers without old log-probs (a DistillationTrainer, a GRPOTrainer in some
    settings) are not affected.

    Raises UserError, before anything runs, for what cannot be scored exactly (see the module).
    """
    check_version()
    if is_distillation(trainer):
        with fused_loss(trainer):
            yield
        return
    check_trainer(trainer)
    scorer = Scorer(trainer, sampling_of(trainer), reuse_forward)
    with ExitStack() as stack:
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                stack.enter_context(forward_task(base_model_of(trainer, model)))
        stack.enter_context(scorer.installed())
        yield
