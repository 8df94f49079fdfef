"""`fastkl score` against plain transformers loops: tokens per second, models loaded, on the embedded storyteller.

    python bench/score.py [--lines 1024] [--rounds 3] [--batch-tokens 4096] [--output bench/results/score.json]

The job: held-out stories as prompt (four words) and completion (the rest), a policy (the storyteller with a little
noise in its weights) and a reference (the storyteller itself), float32. All contenders read the same JSONL and write
policy and reference log-probs, entropy and exact KL of every token as JSONL. They are timed from the moment the models
are loaded to the last line written, and run in turn, `--rounds` times; the median counts.

    fastkl             fastkl score, as the command runs it
    one at a time      for each line, both models' logits and log_softmax
    padded batches     32 lines at a time, right-padded, in the file's order; log_softmax of all logits
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.common import parser, read_lines, write
from fastkl.score_files import command
from fastkl.storyteller import model_path
from tools.storyteller.measure import held_out_stories

NAMES = ("policy_logprobs", "ref_logprobs", "entropy", "kl")
ROWS_AT_ONCE = 32


def make_job(folder: Path, num_lines: int) -> None:
    """policy/ and stories.jsonl."""
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * 0.02)
    model.save_pretrained(folder / "policy")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder / "policy")
    with (folder / "stories.jsonl").open("w") as file:
        for story in held_out_stories(num_lines):
            words = story.split(" ")
            file.write(json.dumps({"prompt": " ".join(words[:4]), "completion": " " + " ".join(words[4:])}) + "\n")


def with_fastkl(folder: Path, batch_tokens: int) -> float:
    """Seconds of `fastkl score` after the models are loaded; writes fastkl.jsonl."""
    started: list[float] = []
    loaded = command.ScoreView.loaded
    command.ScoreView.loaded = lambda view: (loaded(view), started.append(time.perf_counter()))[0]
    output = folder / "fastkl.jsonl"
    output.unlink(missing_ok=True)
    settings = command.TrainConfig(dtype="float32", device="cpu")
    command.score_file(
        command.ScoreConfig(
            str(folder / "stories.jsonl"), str(folder / "policy"), "storyteller", str(output), batch_tokens,
            shared=settings,
        )
    )  # fmt: skip
    command.ScoreView.loaded = loaded
    return time.perf_counter() - started[0]


def plain_loop(folder: Path, rows_at_once: int) -> float:
    """Seconds of a loop on transformers; writes plain.jsonl."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        for name in (folder / "policy", model_path())
    )
    start = time.perf_counter()
    with (folder / "plain.jsonl").open("w") as output, torch.inference_mode():
        for lines in batches(folder / "stories.jsonl", rows_at_once):
            pairs = [
                (tokenizer(x["prompt"]).input_ids, tokenizer(x["completion"], add_special_tokens=False).input_ids)
                for x in lines
            ]
            rows = [torch.tensor(prompt + completion) for prompt, completion in pairs]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            logp, logq = (m(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (policy, reference))
            targets, p = ids[:, 1:, None], logp.exp()
            values = (logp.gather(2, targets), logq.gather(2, targets), -(p * logp).sum(2), (p * (logp - logq)).sum(2))
            for row, (prompt, completion) in enumerate(pairs):
                span = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
                found = {name: value[row, span].flatten().tolist() for name, value in zip(NAMES, values, strict=True)}
                output.write(json.dumps({"token_ids": completion, **found}) + "\n")
    return time.perf_counter() - start


def batches(path: Path, size: int) -> Iterator[list[dict[str, Any]]]:
    """The file's lines, `size` at a time."""
    lines = read_lines(path)
    return (lines[i : i + size] for i in range(0, len(lines), size))


def difference(folder: Path) -> tuple[int, float]:
    """(tokens of the completions, largest difference between the two files' numbers)."""
    ours, theirs = read_lines(folder / "fastkl.jsonl")[1:], read_lines(folder / "plain.jsonl")
    gaps = [
        (torch.tensor(a[name]) - torch.tensor(b[name])).abs().max()
        for a, b in zip(ours, theirs, strict=True)
        for name in NAMES
    ]
    return sum(row["num_tokens"] for row in ours), float(torch.stack(gaps).max())


def main() -> None:
    p = parser(__doc__, "score.json")
    p.add_argument("--lines", type=int, default=1024)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--batch-tokens", type=int, default=4096)
    options = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_job(folder, options.lines)
        contenders: dict[str, Callable[[], float]] = {
            "fastkl": lambda: with_fastkl(folder, options.batch_tokens),
            "one at a time": lambda: plain_loop(folder, 1),
            "padded batches": lambda: plain_loop(folder, ROWS_AT_ONCE),
        }
        seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(options.rounds):
            for contender, measure in contenders.items():
                seconds[contender].append(measure())
        num_tokens, gap = difference(folder)
    results = {
        contender: {"seconds": times, "tokens_per_second": num_tokens / statistics.median(times)}
        for contender, times in seconds.items()
    }
    for contender, found in results.items():
        print(f"{contender:16} {found['tokens_per_second']:9,.0f} tokens/s   {[round(s, 2) for s in found['seconds']]}")
    print(f"{num_tokens:,} tokens; largest difference of a number {gap:.1e} nats")
    job = {
        "lines": options.lines,
        "tokens": num_tokens,
        "batch_tokens": options.batch_tokens,
        "largest_difference": gap,
    }
    write(options.output, {"job": job, "results": results})


if __name__ == "__main__":
    main()
