"""TRL's own RLOO tests, with fastkl's scoring and without: what passes without it has to pass with it.

    python bench/training/trl_suite.py --trl-tests PATH/TO/trl/tests/test_rloo_trainer.py [--output FILE.json]
                                       [--source TEXT] [-k EXPRESSION]

Runs a test file of a TRL checkout (same version as the installed one; the file imports testing_utils.py beside it)
twice, in processes of their own, and compares test by test. In the second run RLOOTrainer.train and .evaluate run
inside `fastkl_scoring`; tests that call neither have nothing to do with the switch and are counted apart. The tests'
hub models and data sets are stood in for by tiny local ones, made here from their names, so that nothing is downloaded;
weights are random, so a test that needs the real ones may fail in both runs. The checkout's conftest.py is not loaded,
and the tests see none of the caller's environment variables.

Exit code 1 if any test passes without the switch and fails with it in another way than by a UserError, which is how
the switch refuses what it cannot score (those are listed).
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from bench.common import ROOT, parser, write

SWITCH = "FASTKL_TRL_SWITCH"
VOCAB, PAD, EOS = 151_680, 151_643, 151_645  # the tests write Qwen's ids
UNK, RIGHT_PAD, IMAGE, IMAGE_BEGIN, IMAGE_END = PAD + 1, *range(EOS + 1, EOS + 5)
TEMPLATE = """{% for m in messages %}{{ m['role'] + ' ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for part in m['content'] %}{{ '<image_begin>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}\
{{ ' <|im_end|> ' }}{% endfor %}"""
IMAGE_SIZE, PATCH_SIZE, NUM_PATCHES = 28, 14, 4
scored_tests: set[str] = set()  # ids of the tests that ran a trainer under the switch


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
            scored_tests.add(os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)"))
            return method(trainer, *args, **options)

    return run


def pytest_runtest_teardown(item: Any) -> None:
    """Reports whether the test ran a trainer under the switch."""
    if item.nodeid in scored_tests:
        item.user_properties.append(("scored", True))


# Stand-ins for the hub


def make_tokenizer(folder: Path) -> Any:
    """A byte tokenizer with as many ids as Qwen's, and its special ones, and a few for images."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<|endoftext|>": PAD, "<|im_end|>": EOS, "<unk>": UNK, "<|finetune_right_pad_id|>": RIGHT_PAD}
    special |= {"<image>": IMAGE, "<image_begin>": IMAGE_BEGIN, "<image_end>": IMAGE_END}
    ids = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    ids |= {f"w{i}": i for i in range(len(ids), VOCAB) if i not in special.values()} | special
    backend = Tokenizer(models.BPE(ids, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<image_begin>", "eoi_token": "<image_end>"},
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: Path, name: str) -> None:
    """A tiny random model of the class in a name like tiny-Qwen2ForCausalLM-2.5."""
    import torch
    import transformers

    named = re.fullmatch(r"tiny-(\w+?)(-.*)?", name)
    kind = named.group(1) if named else name
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": PAD}
    sizes: dict[str, Any] = {
        **{"vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 32, "moe_intermediate_size": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2},
        **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
        **{"max_position_embeddings": 512, **ids},
    }
    if kind == "Gemma3ForConditionalGeneration":
        sizes = {
            **{"text_config": sizes, "vision_config": vision_sizes(), "mm_tokens_per_image": NUM_PATCHES, **ids},
            **{"image_token_index": IMAGE, "boi_token_index": IMAGE_BEGIN, "eoi_token_index": IMAGE_END},
        }
    elif kind.endswith("ForSequenceClassification"):
        sizes["num_labels"] = 1
    elif not kind.endswith("ForCausalLM") or not hasattr(transformers, kind):
        raise NotImplementedError("nothing here makes one")
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    cls(cls.config_class(**sizes)).save_pretrained(folder)
    tokenizer = make_tokenizer(folder)
    if kind == "Gemma3ForConditionalGeneration":
        images = transformers.Gemma3ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
        transformers.Gemma3Processor(images, tokenizer, TEMPLATE, image_seq_length=NUM_PATCHES).save_pretrained(folder)


def vision_sizes() -> dict[str, Any]:
    """A vision tower to match; without the pooling head, which image-text models leave unused."""
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}
    return layers | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "vision_use_head": False}


def make_dataset(folder: Path, tests: str) -> None:
    """The prompts that the tests name, as text and as messages, under the configurations that they ask for."""
    from datasets import Dataset

    folder.mkdir(parents=True)
    texts = list(dict.fromkeys(re.findall(r'{"prompt": "([^"]+)"}', tests))) or ["Beautiful is better than", "Complex"]
    chats = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    rows = {"standard_prompt_only": [{"prompt": text} for text in texts], "conversational_prompt_only": chats}
    if folder.name == "zen-image":
        from PIL import Image

        pictures = [Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), color) for color in ("red", "green")]
        with_image = [chat | {"image": picture} for chat, picture in zip(chats, pictures, strict=False)]
        rows = {"conversational_prompt_only": with_image}
    header = ["---", "configs:"]
    for name, lines in rows.items():
        header += [f"- config_name: {name}", "  data_files:"]
        for split, part in (("train", lines), ("test", lines[:2])):
            Dataset.from_list(part).to_parquet(folder / f"{name}-{split}.parquet")
            header += [f"  - split: {split}", f"    path: {name}-{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))


def make_stand_ins(root: Path, tests: str) -> dict[str, str]:
    """Everything that the tests load by a name under trl-internal-testing/; returns what could not be made, and why."""
    failed: dict[str, str] = {}
    for name in sorted(set(re.findall(r"trl-internal-testing/([\w.-]+)", tests))):
        folder = root / "trl-internal-testing" / name
        try:
            make_dataset(folder, tests) if name in ("zen", "zen-image") else make_model(folder, name)
        except Exception as failure:  # any: the tests that need it will fail in both runs, and the report says why
            failed[name] = str(failure).splitlines()[0]
    return failed


# The two runs


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test."""

    state: str  # passed, failed, skipped or missing
    message: str = ""
    scored: bool = False  # whether fastkl scored a trainer's tokens in it


def run_tests(file: Path, root: Path, switch: bool, expression: str) -> dict[str, Outcome]:
    """Test name -> outcome, from a process that sees little of this one's environment."""
    report = root / f"report-{int(switch)}.xml"
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = kept | {
        **{"HOME": str(root), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        **{"PYTHONPATH": os.pathsep.join(filter(None, paths)), SWITCH: str(int(switch))},
    }
    command = [sys.executable, "-m", "pytest", str(file), "--noconftest", "-q", "--tb=line", f"--junitxml={report}"]
    command += ["-p", "bench.training.trl_suite", "-p", "no:cacheprovider", *(["-k", expression] if expression else [])]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # tests ran, and some of them may have failed
        sys.exit(f"pytest could not run the tests:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        state = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
        lines = [] if problem is None else (problem.get("message") or "").splitlines()
        scored = case.find("properties/property[@name='scored']") is not None
        found[case.get("name")] = Outcome(state, lines[0] if lines else "", scored)
    return found


def compare(without: dict[str, Outcome], with_switch: dict[str, Outcome]) -> dict[str, Any]:
    """The tests by what the switch changed."""
    groups: dict[str, Any] = {"passed_scored": [], "passed_unscored": [], "refused": {}, "broken": {}, "not_run": {}}
    for name, before in without.items():
        after = with_switch.get(name, Outcome("missing"))
        if before.state != "passed":
            groups["not_run"][name] = f"{before.state}: {before.message[:160]}"
        elif after.state == "passed":
            groups["passed_scored" if after.scored else "passed_unscored"].append(name)
        elif "UserError" in after.message:
            groups["refused"][name] = after.message[:300]
        else:
            groups["broken"][name] = f"{after.state}: {after.message[:300]}"
    return groups


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--trl-tests", type=Path, required=True, metavar="FILE", help="a checkout's RLOO test file")
    p.add_argument("--output", type=Path, help="write the comparison as JSON")
    p.add_argument("--source", default="", help="where the test file is from, for the record")
    p.add_argument("-k", dest="expression", default="", help="run these tests only (pytest's -k)")
    args = p.parse_args()
    file = args.trl_tests.resolve()
    if not file.exists():
        p.error(f"there is no file {args.trl_tests}")
    with tempfile.TemporaryDirectory() as folder:
        missing = make_stand_ins(Path(folder), file.read_text())
        runs, seconds = [], []
        for switch in (False, True):
            start = time.monotonic()
            runs.append(run_tests(file, Path(folder), switch, args.expression))
            seconds.append(round(time.monotonic() - start, 1))
    groups = compare(*runs)
    print(f"{len(groups['passed_scored'])} tests that train or evaluate pass without the switch and with it")
    print(f"{len(groups['passed_unscored'])} pass, too, and never score a token")
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
        text = file.read_bytes()
        about = {"source": args.source, "characters": len(text.decode()), "sha256": hashlib.sha256(text).hexdigest()}
        took = dict(zip(("without", "with_switch"), seconds, strict=True))
        write(args.output, {"test_file": about, "seconds": took, "no_stand_in": missing, **groups})
    sys.exit(1 if groups["broken"] else 0)


if __name__ == "__main__":
    main()
