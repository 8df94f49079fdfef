"""TRL's own RLOO tests, with fastkl's scoring and without: what passes without it has to pass with it.

    python bench/trl_suite.py --trl-tests PATH/TO/trl/tests/test_rloo_trainer.py [--output FILE.json] [-k EXPRESSION]

Runs a test file of a TRL checkout (same version as the installed one; the file imports testing_utils.py beside it)
twice, in processes of their own, and compares test by test. In the second run RLOOTrainer.train and .evaluate run
inside `fastkl_scoring`. The tests' hub models and data sets are stood in for by tiny local ones, made here from their
names, so that nothing is downloaded; weights are random, so a test that needs the real ones may fail in both runs. The
checkout's conftest.py is not loaded, and the tests see none of the caller's environment variables.

Exit code 1 if any test passes without the switch and fails with it in another way than by a UserError, which is how
the switch refuses what it cannot score (those are listed).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SWITCH = "FASTKL_TRL_SWITCH"
VOCAB, PAD, EOS = 151_680, 151_643, 151_645  # the tests write Qwen's ids
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
NUM_PROMPTS = 2  # three epochs of them, six steps, make a test
WORDS = ["better", "beautiful", "is", "than", "ugly", "simple", "complex", "flat", "sparse", "errors", "never"]


def pytest_configure(config: Any) -> None:
    """This file is also the plugin of both runs; in the second, trainers train and evaluate under the switch."""
    if SWITCH not in os.environ:
        return
    import torch
    from trl import RLOOConfig, RLOOTrainer

    if not torch.cuda.is_available():
        RLOOConfig.__init__ = on_cpu(RLOOConfig.__init__)
    if os.environ[SWITCH] == "1":
        for name in ("train", "evaluate"):
            setattr(RLOOTrainer, name, switched(getattr(RLOOTrainer, name)))


def on_cpu(init: Callable[..., None]) -> Callable[..., None]:
    """The configuration's constructor with the settings without which TRL refuses a machine that has no GPU."""

    @wraps(init)
    def run(config: Any, *args: Any, **settings: Any) -> None:
        init(config, *args, **({"use_cpu": True, "bf16": False} | settings))

    return run


def switched(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method inside `fastkl_scoring`, unless the trainer is inside already (an evaluation during training)."""
    from fastkl.integrations.trl import fastkl_scoring

    @wraps(method)
    def run(trainer: Any, *args: Any, **options: Any) -> Any:
        if "_compute_loss" in vars(trainer):
            return method(trainer, *args, **options)
        with fastkl_scoring(trainer):
            return method(trainer, *args, **options)

    return run


# Stand-ins for the hub


def make_tokenizer(folder: Path) -> None:
    """A byte tokenizer with as many ids as Qwen's, and its special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<|endoftext|>": PAD, "<|im_end|>": EOS, "<unk>": PAD + 1, "<|finetune_right_pad_id|>": EOS + 1}
    ids = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    ids |= {f"w{i}": i for i in range(len(ids), VOCAB) if i not in special.values()} | special
    backend = Tokenizer(models.BPE(ids, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def make_model(folder: Path, name: str) -> None:
    """A tiny random model of the class in a name like tiny-Qwen2ForCausalLM-2.5."""
    import torch
    import transformers

    kind = re.fullmatch(r"tiny-(\w+?)(-.*)?", name).group(1)
    if not kind.endswith(("ForCausalLM", "ForSequenceClassification")):
        raise NotImplementedError(f"no stand-in is made for {kind}")
    cls = getattr(transformers, kind)
    sizes = {
        **{"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4},
        **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"max_position_embeddings": 512, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": PAD},
    }
    if kind.endswith("ForSequenceClassification"):
        sizes["num_labels"] = 1
    torch.manual_seed(0)
    cls(cls.config_class(**sizes)).save_pretrained(folder)
    make_tokenizer(folder)


def make_dataset(folder: Path) -> None:
    """Prompts as text and as messages, under the names of the configurations that the tests ask for."""
    folder.mkdir(parents=True)
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(2 + i % 4)) for i in range(NUM_PROMPTS)]
    rows = {
        "standard_prompt_only": [{"prompt": text} for text in texts],
        "conversational_prompt_only": [{"prompt": [{"role": "user", "content": text}]} for text in texts],
    }
    header = ["---", "configs:"]
    for name, lines in rows.items():
        header += [f"- config_name: {name}", "  data_files:"]
        for split, part in (("train", lines), ("test", lines[:4])):
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(json.dumps(line) for line in part))
            header += [f"  - split: {split}", f"    path: {name}-{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))


def make_stand_ins(root: Path, tests: str) -> dict[str, str]:
    """Everything that the tests load by a name under trl-internal-testing/; returns what could not be made, and why."""
    failed: dict[str, str] = {}
    for name in sorted(set(re.findall(r"trl-internal-testing/([\w.-]+)", tests))):
        folder = root / "trl-internal-testing" / name
        try:
            make_dataset(folder) if name == "zen" else make_model(folder, name)
        except Exception as failure:  # any: the tests that need it will fail in both runs, and the report says why
            failed[name] = str(failure).splitlines()[0]
    return failed


# The two runs


def run_tests(file: Path, root: Path, switch: bool, expression: str) -> dict[str, tuple[str, str]]:
    """Test name -> (passed | failed | skipped, message), from a process that sees little of this one's environment."""
    report = root / f"report-{int(switch)}.xml"
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    paths = [str(ROOT), str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = kept | {
        **{"HOME": str(root), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        **{"PYTHONPATH": os.pathsep.join(filter(None, paths)), SWITCH: str(int(switch))},
    }
    command = [sys.executable, "-m", "pytest", str(file), "--noconftest", "-p", Path(__file__).stem, "-q", "--tb=line"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", *(["-k", expression] if expression else [])]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if not report.exists():
        sys.exit(f"pytest wrote no report:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
        found[case.get("name")] = (outcome, "" if problem is None else (problem.get("message") or "").splitlines()[0])
    return found


def compare(without: dict[str, tuple[str, str]], with_switch: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """The tests by what the switch changed."""
    groups: dict[str, Any] = {"passed_both": [], "refused": {}, "broken": {}, "not_run": {}}
    for name, (outcome, message) in without.items():
        ours, our_message = with_switch.get(name, ("missing", ""))
        if outcome != "passed":
            groups["not_run"][name] = f"{outcome}: {message[:160]}"
        elif ours == "passed":
            groups["passed_both"].append(name)
        elif "UserError" in our_message:
            groups["refused"][name] = our_message[:300]
        else:
            groups["broken"][name] = our_message[:300]
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-tests", type=Path, required=True, metavar="FILE", help="a checkout's RLOO test file")
    parser.add_argument("--output", type=Path, help="write the comparison as JSON")
    parser.add_argument("-k", dest="expression", default="", help="run these tests only (pytest's -k)")
    args = parser.parse_args()
    file = args.trl_tests.resolve()
    if not file.exists():
        parser.error(f"there is no file {args.trl_tests}")
    with tempfile.TemporaryDirectory() as folder:
        missing = make_stand_ins(Path(folder), file.read_text())
        runs = [run_tests(file, Path(folder), switch, args.expression) for switch in (False, True)]
    groups = compare(*runs)
    print(f"{len(groups['passed_both'])} tests pass without the switch and with it")
    for title, key in (
        ("refused by the switch, by name", "refused"),
        ("not comparable: not passed without the switch either", "not_run"),
        ("BROKEN by the switch", "broken"),
    ):
        print(f"{len(groups[key])} {title}")
        for name, message in groups[key].items():
            print(f"    {name}: {message}")
    for name, reason in missing.items():
        print(f"no stand-in for {name}: {reason}")
    if args.output:
        versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}
        args.output.write_text(json.dumps({"versions": versions, "no_stand_in": missing, **groups}, indent=1))
    sys.exit(1 if groups["broken"] else 0)


if __name__ == "__main__":
    main()
