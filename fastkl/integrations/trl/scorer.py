"""The scoring that replaces a TRL trainer's: which forwards run when, and what they hand to TRL's own code.

A step of the trainer has two places that score tokens, and TRL asks for them call by call:

    rollout (_generate_and_score_completions)   the old policy, then the reference
    loss    (_compute_loss)                     the policy, with gradient

Here each place makes at most one pass, over policy and reference together if both are needed, and TRL's calls are
answered from it. RLOO needs both at the rollout, since the KL is part of the reward. GRPO needs the reference in the
loss alone where TRL asks for no old log-probs; then the rollout scores nothing. If the weights of the loss are those of
the rollout, the rollout's forward may be kept for the loss, gradient and all ("reuse").

Where the loss comes after an update, its logits no longer tell which tokens could be drawn at the rollout. Then the
rollout records them for the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastkl.errors import UserError
from fastkl.integrations.trl.checks import REPLACED
from fastkl.integrations.trl.forward import balancing_loss, base_model_of
from fastkl.integrations.trl.rows import KEPT, ROW, Completions, RowScores, in_rollout_order
from fastkl.integrations.trl.support import KeptIds, kept_support, record
from fastkl.kernels.operators import Head, head_token_scores
from fastkl.objective.kl_estimators import sampled_logprobs, sampled_ref_logprobs
from fastkl.sampling.params import Sampling
from fastkl.sampling.replay import support_of


class Scorer:
    """Scores one trainer's tokens while installed. Holds what a rollout leaves for the losses that follow it."""

    def __init__(self, trainer: Any, sampling: Sampling, reuse_forward: bool | None) -> None:
        from trl import GRPOTrainer

        args = trainer.args
        self.trainer, self.sampling = trainer, sampling
        self.own = {name: getattr(trainer, name) for name in REPLACED}
        # TRL's own condition for "the loss sees the weights that sampled"
        aligned = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0
        corrects_engine = trainer.use_vllm and getattr(trainer, "vllm_importance_sampling_correction", False)
        self.aligned = aligned
        self.scores_at_rollout = not (isinstance(trainer, GRPOTrainer) and aligned and not corrects_engine)
        one_micro_batch = args.steps_per_generation == 1  # its activations are held for the loss anyway
        self.reuse = reuse_forward is not False
        self.reuse_in_training = (
            aligned
            and args.num_iterations == 1
            and trainer.accelerator.num_processes == 1
            and (one_micro_batch if reuse_forward is None else reuse_forward)
            and (one_micro_batch or not trainer.aux_loss_enabled)  # that loss depends on which rows are together
        )
        self.rollout: list[RowScores] = []  # of the rollout under way, one per chunk of rows
        self.for_loss: dict[int, RowScores] = {}  # chunk -> its scores, kept for the loss
        self.loss: RowScores | None = None  # of the loss under way
        self.checkpointing = False  # whether the trainer uses gradient checkpointing; TRL turns it off for rollouts

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts the four methods below in the place of the trainer's, on this instance."""
        for name in REPLACED:
            setattr(self.trainer, name, getattr(self, name.lstrip("_")))
        try:
            yield
        finally:
            for name in REPLACED:
                delattr(self.trainer, name)
            self.for_loss.clear()

    # The four methods, in the order in which a step calls them

    def prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's; if the losses will continue kept forwards, a new batch returns to the order of these forwards.

        TRL shuffles the rows of a generation batch into micro-batches. When all of them make one optimizer step, the
        order changes nothing but the rounding of its sum.
        """
        trainer = self.trainer
        before = trainer._buffered_inputs
        inputs = self.own["_prepare_inputs"](generation_batch)
        if not (trainer.model.training and self.for_loss and trainer._buffered_inputs is not before):
            return inputs
        trainer._buffered_inputs = in_rollout_order(trainer._buffered_inputs)
        return trainer._buffered_inputs[trainer._step % trainer.args.steps_per_generation]

    def generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, with the scores of one pass."""
        self.rollout, self.for_loss = [], {}
        self.checkpointing = self.trainer.model.is_gradient_checkpointing
        output = self.own["_generate_and_score_completions"](inputs)
        output[ROW] = torch.arange(len(output["completion_ids"]))
        if self.rollout and self.rollout[0].kept is not None:
            output[KEPT] = [kept for scores in self.rollout for kept in scores.kept]
        self.rollout = []
        return output

    def get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Answers TRL's calls: in the loss the policy's scores; in the rollout the policy's, then the reference's."""
        if any(value is not None for value in multimodal.values()):
            raise UserError("fastkl_scoring does not support images; train without it.")
        if self.loss is not None:
            return self.loss.policy, self.loss.entropy, self.loss.balancing_loss
        if not self.scores_at_rollout:  # the loss will score the reference along with the policy
            return torch.zeros_like(input_ids[:, -logits_to_keep:], dtype=torch.float32), None, None
        if self.rollout:
            return torch.cat([scores.ref for scores in self.rollout]), None, None
        self.rollout = self.score_rollout(input_ids, attention_mask, logits_to_keep, batch_size or len(input_ids))
        return torch.cat([scores.policy.detach() for scores in self.rollout]), None, None

    def compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's, on scores that are at hand when it asks: the rollout's if they were kept, else those of one pass."""
        scores = None
        if self.for_loss:
            scores = self.for_loss.pop(int(inputs[ROW][0]) // len(inputs[ROW]))
        if scores is None:
            scores = self.score(
                model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].shape[1],
                reference=not self.scores_at_rollout and self.trainer.beta != 0.0,
                kept=inputs.get(KEPT),
            )
            self.log_exact_kl([scores])
            if scores.ref is not None:
                inputs = {**inputs, "ref_per_token_logps": scores.ref}
        self.loss = scores
        try:
            return self.own["_compute_loss"](model, inputs)
        finally:
            self.loss = None

    # One pass

    def score_rollout(
        self, input_ids: Tensor, attention_mask: Tensor, num_tokens: int, chunk_rows: int
    ) -> list[RowScores]:
        """Scores of a generation batch under policy and reference, chunk by chunk of rows; kept where they serve."""
        training = self.trainer.model.training
        chunks = [slice(i, i + chunk_rows) for i in range(0, len(input_ids), chunk_rows)]
        keep = self.reuse_in_training if training else self.reuse and len(chunks) == 1
        with self.with_gradient() if keep and training else torch.no_grad():
            found = [
                self.score(
                    self.trainer.model,
                    input_ids[rows],
                    attention_mask[rows],
                    num_tokens,
                    reference=self.trainer.beta != 0.0,
                    record_kept=training and not self.aligned,
                    for_loss=keep,
                )
                for rows in chunks
            ]
        if keep:
            self.for_loss = dict(enumerate(found))
        self.log_exact_kl(found)
        return found

    def score(
        self,
        model: Any,
        input_ids: Tensor,  # i64 [b, L]
        attention_mask: Tensor,  # i64 [b, L]
        num_tokens: int,  # T: completions are the last T columns
        *,
        reference: bool,
        kept: Sequence[KeptIds] | None = None,
        record_kept: bool = False,
        for_loss: bool = True,
    ) -> RowScores:
        """One forward of the policy, one of the reference if wanted, and one pass over the vocabulary for both.

        kept: what could be drawn, as recorded earlier. record_kept: whether to record it, where the logits tell.
        for_loss: whether TRL will ask for what only its loss needs, entropy and auxiliary loss.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        balances = for_loss and self.trainer.aux_loss_enabled
        completions = Completions.of(input_ids, attention_mask, num_tokens)
        asked = [name for name, wanted in (("entropy", for_loss), ("kl", reference)) if wanted]
        ref: dict[str, Any] = {}
        recorded = kept

        def policy_task(backbone: Any, head: Head) -> dict[str, Tensor]:
            nonlocal recorded
            hidden = completions.predicting(backbone.last_hidden_state)
            support = support_of(self.sampling, completions.positions, len(head.weight))
            if record_kept and support is not None and support.is_recomputed:
                lengths = completions.mask.sum(1)
                recorded = record(support, hidden, head, completions.target_ids, self.sampling.temperature, lengths)
            if recorded is not None:
                support = kept_support(recorded, hidden.device)
            scores = head_token_scores(
                hidden, head, ref.get("hidden"), ref.get("head"), completions.target_ids,
                temperature=self.sampling.temperature, support=support, outputs=asked,
            )  # fmt: skip
            found = {"policy": sampled_logprobs(scores), "ref": sampled_ref_logprobs(scores)}
            found |= {"entropy": scores.entropy, "kl": scores.kl}
            found = {name: completions.in_rows(x) for name, x in found.items() if x is not None}
            if balances:
                base = base_model_of(self.trainer, self.trainer.model)
                found["balancing_loss"] = balancing_loss(base, backbone.router_logits, attention_mask)
            return found

        with self.trainer.accelerator.autocast():
            if reference:
                with self.reference_model() as ref_model, torch.no_grad():
                    ref = ref_model(**inputs, fastkl_task=completions.reference_task)
            found = model(**inputs, **({"output_router_logits": True} if balances else {}), fastkl_task=policy_task)
        kl = found["kl"].detach() if reference else None
        return RowScores(
            found["policy"],
            found.get("ref"),
            found.get("entropy"),
            kl,
            completions.mask,
            recorded if record_kept else None,
            found.get("balancing_loss"),
        )

    @contextmanager
    def reference_model(self) -> Iterator[Any]:
        """The reference: a model of its own, or the policy with its adapter off (or the adapter named "ref" on)."""
        trainer = self.trainer
        if trainer.ref_model is not None:
            yield trainer.ref_model
            return
        from trl.models.utils import disable_gradient_checkpointing
        from trl.trainer.utils import use_adapter

        model = trainer.accelerator.unwrap_model(trainer.model)
        with (
            use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None),
            disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        ):
            yield trainer.model

    @contextmanager
    def with_gradient(self) -> Iterator[None]:
        """Gradients on, and checkpointed as the trainer wants it: TRL's rollout turns both off."""
        model = self.trainer.model
        if self.checkpointing:
            model.gradient_checkpointing_enable(self.trainer.args.gradient_checkpointing_kwargs)
        try:
            with torch.enable_grad():
                yield
        finally:
            if self.checkpointing:
                model.gradient_checkpointing_disable()

    def log_exact_kl(self, found: Sequence[RowScores]) -> None:
        """Adds the mean of the exact KL per token, over all processes, to the trainer's metrics."""
        if found[0].kl is None:
            return
        trainer = self.trainer
        nats = torch.stack([(s.kl * s.mask).sum() for s in found]).sum()
        tokens = torch.stack([s.mask.sum() for s in found]).sum()
        totals = torch.stack([nats, tokens.float()])
        total, count = trainer.accelerator.reduce(totals, reduction="sum").tolist()
        mode = "train" if trainer.model.training else "eval"
        trainer._metrics[mode]["kl_exact"].append(total / max(count, 1.0))
