"""As warm.py, for the runs that generate with vLLM: its import takes longer than all others together."""

from __future__ import annotations

import gc
import importlib
import os

gc.unfreeze()
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
for name in (
    *("vllm.v1.engine.llm_engine", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.v1.sample.sampler"),
    *("vllm.model_executor.models.registry", "vllm.model_executor.models.llama", "vllm.entrypoints.llm"),
):
    importlib.import_module(name)
gc.collect()
gc.freeze()
