"""Every snippet of README and docs is run, and every command is run or parsed down to checked settings.

A page is a folder: blocks with a title are its files, and Python blocks run there in the order of the page. Commands of
`fastkl` go through the real command line; training itself is replaced by a check of everything that its settings
name. Commands of scripts go through the script's own parser.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from cases import slow_where
from packaging.requirements import Requirement
from pages import PAGES, ROOT, Snippet, commands, snippets
from torch.distributed.run import get_args_parser

import fastkl.cli
from fastkl.config.defaults import output_of
from fastkl.config.settings import TrainConfig, check_config
from fastkl.rollout.generator import GENERATORS

MARKS = {None, "slow", "not installed here", "run by its module"}  # the last: test_drop_in_page.py
LANGUAGES = {"python", "sh", "console", "yaml", "jsonl", "text"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Parsed(Exception):
    """A command line was parsed; what follows would be the work itself."""


def write_files(page: Path, folder: Path) -> None:
    """The page's titled blocks as files in `folder`."""
    for snippet in snippets(page):
        if snippet.title:
            path = folder / snippet.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(snippet.text, encoding="utf-8")


@pytest.fixture
def page_folder(tmp_path, monkeypatch):
    """A function that makes a page's files and goes into their folder."""

    def enter(page: Path) -> Path:
        write_files(page, tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        modules = set(sys.modules)
        forget.append(modules)
        return tmp_path

    forget: list[set[str]] = []
    generators = dict(GENERATORS)
    yield enter
    for name in set(GENERATORS) - set(generators):
        del GENERATORS[name]
    for modules in forget:  # the pages' own modules: another page may use the same name
        for name in set(sys.modules) - modules:
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def of_language(language: str, mark: str | None = None) -> list[Snippet]:
    return [s for page in PAGES for s in snippets(page) if s.language == language and s.mark == mark]


def place(case: Snippet | tuple[Path, str]) -> str:
    return case.place if isinstance(case, Snippet) else f"{case[0].name}: {case[1]}"


def run_python(snippet: Snippet) -> None:
    """Runs a block; a titled one, which is a file of the page's folder, is imported."""
    if snippet.title:
        importlib.import_module(snippet.title.removesuffix(".py"))
        return
    names: dict[str, object] = {"__name__": "snippet"}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(snippet.text, snippet.place, "exec"), names)


def test_every_block_says_what_it_is():
    found = [s for page in PAGES for s in snippets(page)]
    assert not [s.place for s in found if s.language not in LANGUAGES or s.mark not in MARKS]


@pytest.mark.parametrize("snippet", of_language("python"), ids=place)
def test_python_runs(snippet, page_folder):
    page_folder(snippet.page)
    run_python(snippet)


@pytest.mark.slow
@pytest.mark.parametrize("snippet", of_language("python", "slow"), ids=place)
def test_python_that_takes_long_runs(snippet, page_folder):
    page_folder(snippet.page)
    run_python(snippet)


@pytest.mark.parametrize("snippet", of_language("python", "not installed here"), ids=place)
def test_python_for_other_projects_compiles_and_takes_names_that_exist(snippet):
    for node in ast.walk(ast.parse(snippet.text)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fastkl"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("snippet", of_language("yaml"), ids=place)
def test_yaml_is_a_configuration(snippet, page_folder):
    from fastkl.config.files import load_config

    path = page_folder(snippet.page) / "settings.yaml"
    path.write_text(snippet.text)
    assert yaml.safe_load(snippet.text)
    check_settings(load_config(path))


@pytest.mark.parametrize("snippet", of_language("jsonl"), ids=place)
def test_jsonl_is_json(snippet):
    assert all(isinstance(json.loads(line), dict) for line in snippet.text.splitlines())


@pytest.mark.parametrize("snippet", of_language("console"), ids=place)
def test_what_a_command_prints_is_what_the_page_shows(snippet, page_folder, capsys):
    """Commands behind "$ "; a line "..." stands for any lines."""
    page_folder(snippet.page)
    for part in re.split(r"^\$ ", snippet.text, flags=re.M)[1:]:
        command, _, expected = part.partition("\n")
        program, *arguments = shlex.split(command)
        assert program == "fastkl"
        for earlier in of_language("python"):
            if earlier.page == snippet.page and not earlier.title and earlier.line < snippet.line:
                run_python(earlier)
        fastkl.cli.main(arguments)
        printed = capsys.readouterr()
        shown = printed.out + printed.err
        pattern = re.escape(expected).replace(re.escape("...\n"), "(?:.*\n)*?")
        assert re.fullmatch(pattern, shown), shown


CASES = sorted({(page, command) for page in PAGES for command in commands(page)})
FIRST = ("README.md", "CONTRIBUTING.md", "install.md", "first-run.md", "your-own.md", "recipes.md")  # pages


@pytest.mark.parametrize("case", slow_where(lambda case: case[0].name not in FIRST, CASES), ids=place)
def test_commands_are_understood(case, page_folder, monkeypatch):
    page, line = case
    folder = page_folder(page)
    for command in line.split(" && "):
        check_command(shlex.split(command, comments=True), folder, monkeypatch)


def check_command(words: list[str], folder: Path, monkeypatch) -> None:
    environment = {}
    while re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    program, *arguments = words
    match Path(program).name, arguments:
        case "fastkl", _:
            check_fastkl(arguments, folder, monkeypatch)
        case "make", [*targets]:
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert {t for t in targets if "=" not in t} <= set(rules)
        case "pip", ["install", *what]:
            for name in what:
                check_installable(name)
        case "uv", ["pip", "install", *what]:
            for name in what:
                check_installable(name)
        case "pip", ["uninstall", *_]:
            pass
        case "python" | "python3", ["-m", module, *rest]:
            assert importlib.util.find_spec(module)
            if module == "fastkl":
                check_fastkl(rest, folder, monkeypatch)
        case "python" | "python3", [script, *rest] if (folder / script).is_file():
            done = subprocess.run(
                [sys.executable, script, *rest], cwd=folder, capture_output=True, text=True,
                env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        case "python" | "python3", [script, *rest]:
            check_script(ROOT / script, rest, monkeypatch)
        case "srun", [*rest]:
            check_command(rest[rest.index("torchrun") :], folder, monkeypatch)
        case "torchrun", [*rest]:
            launched, _ = get_args_parser().parse_known_args(rest)
            assert importlib.util.find_spec(launched.training_script)
            if launched.training_script == "fastkl":
                (folder / "run.yaml").touch()
                check_fastkl(launched.training_script_args, folder, monkeypatch)
        case "mkdocs", [verb, *_]:
            assert verb in ("build", "serve")
        case "git" | "printf" | "pre-commit" | "ruff" | "pytest" | "cd", _:
            pass
        case _ if re.match(r"\w+=\$\(", words[0]):  # a shell's variable
            pass
        case _:
            pytest.fail(f"no check for {words}")


def check_installable(name: str) -> None:
    """A requirement, or this project with extras that exist."""
    own = re.fullmatch(r"(?:\./fastkl|\.)(?:\[([\w,-]+)\])?", name)
    if own:
        assert set((own[1] or "").split(",")) - {""} <= set(PROJECT["optional-dependencies"])
    elif not name.startswith("-") and "://" not in name and not name.endswith(".txt"):
        Requirement(name)


def check_script(script: Path, arguments: list[str], monkeypatch) -> None:
    """The script is there, and its own parser takes the arguments."""
    assert script.is_file(), script
    if "parse_" not in script.read_text(encoding="utf-8"):
        return  # it takes names of files

    def parse(parser, args=None, namespace=None):
        _, unknown = original(parser, args, namespace)
        assert not unknown
        raise Parsed

    def parse_known(parser, args=None, namespace=None):
        original(parser, args, namespace)
        raise Parsed

    original, before = argparse.ArgumentParser.parse_known_args, set(sys.modules)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")
    for name in set(sys.modules) - before:  # scripts of several folders have siblings of the same name
        if "/bench/" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


WORK = {
    "train": "fastkl.training.loop.train",
    "sweep": "fastkl.training.sweep.sweep",
    "eval": "fastkl.comparison.command.compare",
    "score": "fastkl.score_files.command.score_file",
    "report": "fastkl.report.page.write.write_report",
    "doctor": "fastkl.audit.doctor.diagnose",
    "export": "fastkl.training.export.export",
    "serve": "fastkl.rollout.serve.serve",
    "bench": "fastkl.microbench.run.run_bench",
    "storyteller": "tools.storyteller.make.make_storyteller",
}
"""The function that does a command's work once its command line is understood."""


def check_fastkl(arguments: list[str], folder: Path, monkeypatch) -> None:
    """The real command line accepts the arguments, and what they name can be used."""
    received: list[object] = []

    def work(*given, **options):
        received.extend(given)
        raise Parsed

    command = arguments[0]
    if len(arguments) == 1 and command != "train":  # a mention
        assert command.startswith("-") or command in WORK or command == "help"
        return
    if command in WORK:
        monkeypatch.setattr(WORK[command], work)
    monkeypatch.setattr("fastkl.distributed.launch.launch", lambda count, words: 0)
    monkeypatch.setattr("fastkl.training.early.place_of", lambda source: "text")  # prompts.jsonl is the reader's own
    make_what_is_continued(arguments, folder)
    try:
        assert fastkl.cli.main(arguments) == 0
    except SystemExit as end:
        assert end.code in (0, None)
    except Parsed:
        for value in received:
            if isinstance(value, TrainConfig):
                check_settings(value)


def make_what_is_continued(arguments: list[str], folder: Path) -> None:
    """Run folders that a command reads."""
    if "--resume" in arguments:
        output = arguments[arguments.index("--output") + 1] if "--output" in arguments else output_of(TrainConfig())
        (folder / output / "checkpoints" / "step-1").mkdir(parents=True)
    if "--fork" in arguments:
        run, _, step = arguments[arguments.index("--fork") + 1].partition(":")
        (folder / run / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (folder / run / "checkpoints" / f"step-{step}" / "checkpoint.json").write_text(
            json.dumps({"format": 1, "step": int(step), "files": {}, "config": {}})
        )
    if arguments[0] in ("report", "doctor"):
        for name in arguments[1:]:
            if not name.startswith("-") and "." not in name:
                (folder / name).mkdir(parents=True, exist_ok=True)


def check_settings(config: TrainConfig) -> None:
    """The settings fit together, and the files and functions that they name are there."""
    from fastkl.data.rows import read_rows
    from fastkl.rewards.load import load_rewards

    check_config(config)
    load_rewards(config.reward, config.reward_weights)
    if Path(config.prompts).is_file():
        assert list(read_rows(config.prompts))


SMALL = {"steps": 2, "prompts-per-step": 2, "num-samples": 2, "max-new-tokens": 8, "generator": "transformers"}
OWN_FUNCTIONS = [case for case in CASES if case[0].name == "extending.md" and case[1].startswith("fastkl train")]


@pytest.mark.slow
@pytest.mark.parametrize("case", OWN_FUNCTIONS, ids=place)
def test_functions_of_ones_own_train(case, page_folder):
    page, line = case
    folder = page_folder(page)
    small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    assert fastkl.cli.main([*shlex.split(line)[1:], *small]) == 0
    assert len(next(folder.glob("runs/*/metrics.jsonl")).read_text().splitlines()) == 2


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "your-own.md"], ids=lambda page: page.name)
def test_the_reward_takes_texts_and_chats(page, page_folder):
    page_folder(page)
    brevity = importlib.import_module("my_rewards").brevity
    texts = ["one two three", "one"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert brevity(prompts=["", ""], completions=texts, limit=[0, 0]) == [-0.3, -0.1]
    assert brevity(prompts=[[], []], completions=chats, limit=[0, 0]) == [-0.3, -0.1]


def test_the_pages_server_gives_rewards(page_folder):
    import threading
    from http.server import ThreadingHTTPServer

    from fastkl.rewards.call import compute_rewards
    from fastkl.rewards.load import load_rewards
    from fastkl.types import Completion, Prompt

    page_folder(ROOT / "docs" / "rewards.md")
    score = importlib.import_module("score_server").Score
    score.log_message = lambda *arguments: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), score)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    rewards = load_rewards([f"http://127.0.0.1:{server.server_port}/score"], None)
    completions = [Completion((1,), (0.0,), "stop", text) for text in ("it is 51", "it is 50")]
    result = compute_rewards(rewards, [Prompt((1,), "p", "p", 1, {"answer": "51"})], [completions], step=1)
    server.shutdown()
    server.server_close()
    assert result.total.tolist() == [[1.0, 0.0]]


def test_the_drop_in_loss_raises_what_is_better_than_its_baseline():
    """A step down the README's loss, without its KL, makes tokens with an advantage likelier and the others rarer."""
    import torch

    (snippet,) = (s for s in snippets(ROOT / "README.md") if "linear_token_scores" in s.text)
    torch.manual_seed(0)
    names: dict = {}
    exec(snippet.text.replace("0.05 * scores.kl", "0.0 * scores.kl"), names)
    hidden, head, advantages = names["hidden"], names["head"], names["advantages"]
    moved = hidden.detach() - 0.1 * hidden.grad
    again = names["linear_token_scores"](moved, head, None, None, names["target_ids"], temperature=0.7).policy_logprobs
    assert ((again - names["scores"].policy_logprobs) * advantages > 0).all()


def test_a_page_shows_files_of_the_repository_as_they_are():
    shown = [(ROOT / block.title, block.text) for page in PAGES for block in snippets(page) if block.title]
    same = [path for path, text in shown if path.is_file() and path.read_text(encoding="utf-8") == text]
    assert same == [path for path, _ in shown if path.is_file()] and ROOT / "bench/real/sums.yaml" in same
