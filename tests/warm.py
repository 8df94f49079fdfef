"""Imported by the process that the tests' processes are forked from: everything that a run imports, and what its first
use computes in Python alone. Nothing here computes with torch, since threads do not survive a fork."""

from __future__ import annotations

import atexit
import gc
import importlib

MODULES = (
    *("fastkl.cli.commands", "fastkl.training.loop", "fastkl.distributed.team", "fastkl.rollout.transformers"),
    *("fastkl.report.page.write", "fastkl.storyteller.checker", "torch.utils.tensorboard", "torch.distributed.fsdp"),
    *("torch._dynamo", "torch.distributed.tensor", "transformers.models.llama.modeling_llama"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.tokenization_utils_tokenizers", "transformers.generation", "safetensors.torch", "jinja2", "peft"),
)

for name in MODULES:
    importlib.import_module(name)
importlib.import_module("fastkl.storyteller.checker").well_formed_share(["Once there was a king."])
importlib.import_module("fastkl.report.page.write").template()
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
gc.collect()
gc.freeze()  # what is here now stays, and no process has to look through it again
atexit.register(gc.unfreeze)  # or Triton's bindings complain of what is left at the end
