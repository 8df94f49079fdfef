"""How many kernels a decoder layer takes, as it is and with --compile.

    python bench/training/compiled_layer.py [--output FILE]

One layer of Qwen2.5's kind, packed, with float32 weights under bfloat16 autocast, on a CPU. Of the uncompiled layer,
every operation of PyTorch counts that computes or copies something, and none that only makes a view or memory. Of the
compiled one, the generated kernels count, and PyTorch's operations between them: matrix products and attention. On a
GPU each is one launch at least, so that the counts are a prediction. Attention is one operation on either side, as
there.

The layer is so small that its time is that of PyTorch's calls and of the compiler's guards: what a GPU waits for. Times
are medians of passes in which both take turns, on one thread.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import common
from fastkl.scoring import attention, backbone, compiled
from fastkl.scoring.scored_model import ScoredModel

NO_KERNEL = (
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "t", "permute", "expand", "slice", "select"),
    *("unsqueeze", "squeeze", "as_strided", "alias", "detach", "split", "split_with_sizes", "unfold", "_to_copy"),
    *("empty", "empty_strided", "empty_like", "resize_", "set_", "lift_fresh", "result_type", "is_nonzero", "item"),
    *("zeros", "ones", "new_zeros", "conj", "resolve_conj", "resolve_neg", "narrow", "chunk", "unbind"),
)
"""Operations that compute nothing."""


class OneCall:
    """In the place of a packed row: causal attention over all of it, one operation."""

    def attend(self, query: Any, key: Any, value: Any, how: attention.How) -> torch.Tensor:
        """See attention.Row."""
        out = torch.nn.functional.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=how.scale
        )
        return out[0].transpose(0, 1)


def kernels_in(events: list[Any]) -> int:
    """Operations at the bottom that compute something, and generated kernels."""
    return sum(counts(event) for event in events)


def counts(event: Any) -> bool:
    """Whether an event is a kernel's."""
    if "cpp_fused" in event.name and not event.name.startswith("Torch"):
        return True
    if not event.name.startswith("aten::") or event.name.removeprefix("aten::") in NO_KERNEL:
        return False
    return not any(map(holds_kernel, event.cpu_children))


def holds_kernel(event: Any) -> bool:
    """Whether an event is a kernel's, or one of those inside of it is."""
    return counts(event) or any(map(holds_kernel, event.cpu_children))


class Case:
    """A layer with its inputs, whose passes run as those of a training step do: autocast is around a forward alone, so
    that every forward casts the weights."""

    def __init__(self) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        config = Qwen2Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=64,
        )  # fmt: skip
        self.scored = ScoredModel(Qwen2ForCausalLM(config), "packed", torch.bfloat16)
        (self.layer,) = self.scored.model.model.layers
        self.hidden = torch.randn(1, 8, 16, requires_grad=True)
        turns = self.scored.model.model.rotary_emb(self.hidden, torch.arange(8)[None])
        self.others = {"position_embeddings": turns, "attention_mask": None, "packed_rows": OneCall()}

    def forward(self) -> torch.Tensor:
        """The layer's hidden states."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(self.hidden, **self.others)

    def backward(self, out: torch.Tensor) -> None:
        """Gradients of the input and of every weight."""
        torch.autograd.grad(out, [self.hidden, *self.layer.parameters()], torch.ones_like(out))


def counted(case: Case) -> dict[str, int]:
    """The kernels of the layer's forward, of its backward, and of a forward without gradients."""
    with case.scored.scoring():
        for _ in range(2):  # the second is counted, when all is compiled
            with profile(activities=[ProfilerActivity.CPU]) as forward:
                out = case.forward()
            with profile(activities=[ProfilerActivity.CPU]) as backward:
                case.backward(out)
            with profile(activities=[ProfilerActivity.CPU]) as scoring, torch.no_grad():
                case.forward()
    seen = {"forward": forward, "backward": backward, "forward_without_gradient": scoring}
    return {name: kernels_in(profiled.events()) for name, profiled in seen.items()}


def timed(case: Case) -> tuple[float, float]:
    """Milliseconds of the processor, for a forward and for its backward, on one thread."""
    with case.scored.scoring():
        start = time.thread_time()
        out = case.forward()
        between = time.thread_time()
        case.backward(out)
        return 1e3 * (between - start), 1e3 * (time.thread_time() - between)


def main() -> None:
    """Counts both, then times both, prints and writes."""
    p = common.parser(__doc__, "cpu/compiled_layer.json")
    p.add_argument("--rounds", type=int, default=200)
    options = p.parse_args()
    from torch._dynamo.utils import counters
    from torch._inductor import config

    torch.set_num_threads(1)
    backbone.register_packed_attention()
    config.cpp.enable_kernel_profile = True  # generated kernels are events, too
    case = Case()
    ways: dict[str, Any] = {"uncompiled": {}, "compiled": compiled.compiled_layers(case.scored.model)}
    found: dict[str, Any] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for name, layers in ways.items():
        case.scored.compiled = layers
        found[name] = {"kernels": counted(case)}
    for name, layers in [*ways.items()] * options.rounds:
        case.scored.compiled = layers
        times[name].append(timed(case))
    for name, passes in times.items():
        found[name]["forward_ms"] = median(forward for forward, _ in passes)
        found[name]["backward_ms"] = median(backward for _, backward in passes)
    found["graphs"] = counters["stats"]["unique_graphs"]
    print(json.dumps(found, indent=1))
    common.write(options.output, found)


if __name__ == "__main__":
    main()
