"""TRL without vLLM, which it imports wherever it is installed: a third of the time that collecting the tests took, and
no trainer here generates with it."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import import_utils

import_utils.is_vllm_available = lambda min_version=None: False
