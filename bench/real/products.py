"""How much of a step of against_trl.py is matrix products, which no trainer can leave out.

    python bench/real/model.py MODEL
    python bench/real/products.py MODEL [--task sums] [--new-tokens 16]

Runs fastkl's part of against_trl.py. Then it multiplies, in the same type and with the same model's matrices, what each
stage of such a step has to: in generation every prompt once and the tokens in as many batches as the longest answer has
tokens; the reference's layers once; in the update the policy's layers forward and backward (two products for each
matrix), both heads, and the two products of the policy's head backward. Layers and heads of reference and policy take
as many rows as in the run, in which equal tokens after equal ones are computed once. Seconds of products are medians of
rounds, rows those of steps. Writes bench/results/cpu/real_products.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.real import against_trl, task
from bench.real.against_trl import B, K


def forward(matrices: Sequence[Tensor], rows: int) -> None:
    """x W' for each matrix W [out, in], with x [rows, in]."""
    for matrix in matrices:
        torch.ones(rows, matrix.shape[1]) @ matrix.T


def backward(matrices: Sequence[Tensor], rows: int) -> None:
    """g W and g' x for each matrix, with g [rows, out]."""
    for matrix in matrices:
        gradient = torch.ones(rows, matrix.shape[0])
        gradient @ matrix
        gradient.T @ torch.ones(rows, matrix.shape[1])


def stages(
    layers: Sequence[Tensor], head: Sequence[Tensor], prompts: int, answers: int, longest: int, rows: dict[str, int]
) -> dict[str, Callable[[], None]]:
    """The products of each stage. prompts, answers: their tokens in a step; longest: tokens of the longest answer;
    rows: as `counted_run` has them."""

    def generate() -> None:
        forward(layers, prompts)
        for _ in range(longest):
            forward([*layers, *head], answers // longest)

    def update() -> None:
        forward(layers, rows["layers"])
        forward([*head, *head], rows["heads"])
        backward(head, rows["heads"])
        backward(layers, rows["layers"])

    return {"generate": generate, "score": lambda: forward(layers, rows["layers"]), "update": update}


def counted_run(model: str, chosen: str, new_tokens: int, steps: int) -> dict[str, Any]:
    """fastkl's run, and `rows` of each step: how many go through layers and heads, and how many tokens the sequences
    have."""
    from fastkl.training import loop

    seen: list[dict[str, int]] = []
    pack = loop.pack

    def counted(*given: Any, **options: Any) -> Any:
        packed = pack(*given, **options)
        parts = [micro for _, micro in packed]
        computed = [len(micro.tree.source) for micro in parts if micro.tree]
        heads, tokens = [len(micro.state_positions) for micro in parts], [len(micro.input_ids) for micro in parts]
        seen.append({"layers": sum(computed), "heads": sum(heads), "tokens": sum(tokens)})
        return packed

    loop.pack = counted
    try:
        return against_trl.fastkl_run(model, chosen, new_tokens, steps, 0) | {"rows": seen}
    finally:
        loop.pack = pack


def prompt_tokens(model: str, chosen: str, seed: int, steps: int) -> float:
    """Tokens of the prompts of a step, on average over the first `steps` of a run."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = against_trl.in_order(chosen, seed)[: steps * B]
    made = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] for row in rows]
    return sum(map(len, made)) / steps


def main() -> None:
    p = common.parser(__doc__, "cpu/real_products.json")
    p.add_argument("model", type=Path)
    p.add_argument("--task", choices=tuple(task.TASKS), default="sums")
    p.add_argument("--new-tokens", type=int, default=16)
    p.add_argument("--steps", type=int, default=4, help="counted steps of the run")
    p.add_argument("--rounds", type=int, default=5)
    given = p.parse_args()
    run = common.run_alone(counted_run, str(given.model), given.task, given.new_tokens, given.steps)
    counted = slice(common.WARM_UP_STEPS, None)
    answers = round(fmean(run["lengths"][counted]) * B * K)
    rows = {name: round(median(step[name] for step in run["rows"][counted])) for name in run["rows"][0]}
    prompts = round(prompt_tokens(str(given.model), given.task, 0, given.steps + common.WARM_UP_STEPS))

    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if against_trl.in_bfloat16() else torch.float32
    torch.set_default_dtype(dtype)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype)
    layers = [m.weight.detach() for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    calls = stages(layers, [model.lm_head.weight.detach()], prompts, answers, given.new_tokens, rows)
    found = {}
    for name, call in calls.items():
        call()
        products = median(common.seconds_of(call) for _ in range(given.rounds))
        found[name] = {"step_s": median(run["stages"][f"time/{name}_s"][counted]), "products_s": products}
        print(f"{name:9} {found[name]['step_s']:6.2f} s, of products {products:6.2f} s")
    job = {"task": given.task, "new_tokens": given.new_tokens, "prompt_tokens": prompts, "answer_tokens": answers}
    job |= {"rows": rows, "rows_of_steps": run["rows"]}
    common.write(given.output, {"job": job, "step_s": median(run["step_s"]), "results": found})


if __name__ == "__main__":
    main()
