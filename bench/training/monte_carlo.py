"""Monte Carlo with the real generators: mean k1 against the exact KL on the support, 100,000 tokens per setting.

    python bench/training/monte_carlo.py [--tokens 100000]        writes bench/results/monte_carlo.json

The measurement and its claims are those of tests/rollout/test_monte_carlo.py, with more tokens. A setting whose claims
do not hold ends the script.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.common import ROOT, parser, write

sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "rollout")]
import test_monte_carlo as claims


def measured(generator: Any, name: str, settings: dict[str, Any], tokens: int) -> dict[str, Any]:
    """One row: a generator under one setting."""
    s, start = claims.sampling(settings), time.perf_counter()
    generator.sampling = s
    found = claims.measure(generator, claims.model(0), claims.model(1), s, tokens)
    claims.check(found, s)
    row = {"generator": name, "settings": settings, **dataclasses.asdict(found), "seconds": time.perf_counter() - start}
    print(
        f"{name:12} {json.dumps(settings):80} {found.tokens:7,} tokens, exact KL {found.exact_kl:.3f}, k1 off by "
        f"{found.difference / found.error:+.1f} standard errors ({found.difference:+.4f}), naive k1 by "
        f"{found.naive_bias:+.3f}; largest gap {found.max_gap:.1e}, {found.edge_tokens} edge, {row['seconds']:.0f} s"
    )
    return row


def main() -> None:
    p = parser(__doc__, "monte_carlo.json")
    p.add_argument("--tokens", type=int, default=100_000, help="per generator and setting")
    options = p.parse_args()
    policy = claims.model(0)
    with tempfile.TemporaryDirectory() as folder:
        generators = {
            "transformers": claims.transformers_generator(policy, claims.sampling({})),
            "vllm": claims.vllm_generator(policy, Path(folder)),
        }
        rows = [
            measured(generator, name, settings, options.tokens)
            for name, generator in generators.items()
            for settings in claims.SETTINGS
        ]
    write(options.output, {"tokens": options.tokens, "rows": rows})


if __name__ == "__main__":
    main()
