"""The commands of `fastkl`: one function each, whose signature is its options and whose docstring is its help page.

What a command needs is imported when it runs, so that help and every mistake in the settings come at once.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from inspect import Parameter as Option
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Group, Parameter
from cyclopts.help import DefaultFormatter, PanelSpec
from rich.box import SIMPLE

import fastkl.audit
import fastkl.comparison
import fastkl.score_files
from fastkl.comparison.names import SHARED as EVALUATED
from fastkl.config.defaults import output_of, resolved
from fastkl.config.files import load_config, with_settings
from fastkl.config.setting import Setting
from fastkl.config.settings import TrainConfig, settings
from fastkl.errors import UserError, printable
from fastkl.sampling.params import replayed_names
from fastkl.training.run_folder import nothing_left, started_with

HEADINGS = tuple(dict.fromkeys(setting.heading for setting in settings().values()))
VALUES = {str: "TEXT", int: "N", float: "X", bool: None}
MAIN_JOB, SWEEP = TrainConfig(), TrainConfig(output="runs/sweep")
NO_TASK = TrainConfig(prompts="", reward=())
Command = Callable[..., int]

app = App(
    name="fastkl",
    usage="Usage: fastkl COMMAND [OPTION ...]",
    help=(fastkl.__doc__ or "").partition("\n")[0],
    help_format="plaintext",
    help_formatter=DefaultFormatter(panel_spec=PanelSpec(box=SIMPLE, padding=(0, 0))),
    help_epilogue="Example: fastkl train --kl-coef 0.1 --output runs/mine\nAbout one command: fastkl help COMMAND",
    version=f"fastkl {fastkl.__version__}",
    version_flags=("--version", "-V"),
    default_parameter=Parameter(
        negative_iterable=(), consume_multiple=True, allow_repeating=True, show_default=False, show_choices=False
    ),
    group_parameters=Group("Options", sort_key=0),
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)


def about(metavar: str | None, help: str, **more: Any) -> Parameter:
    """What the help page says about an option."""
    return Parameter(metavar=metavar, help=help, **more)


def command(
    usage: str, example: str, text: str | None = "", *, options: Iterable[str] = (), defaults: TrainConfig = MAIN_JOB
) -> Callable[[Command], Command]:
    """Makes a function a command. Its help page goes on with what follows the first paragraph of `text`.

    Besides its own parameters it takes an option for each setting named in `options`. Those that are given reach the
    function as keywords, as text: config/ gives them their types, as it does in YAML.
    """

    def add(function: Command) -> Command:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [option(settings()[name], getattr(defaults, name)) for name in options]
        function.__signature__ = signature.replace(parameters=own + added)  # type: ignore[attr-defined]
        app.command(
            function,
            usage=f"Usage: fastkl {function.__name__} {usage}",
            help="\n\n".join((inspect.getdoc(function) or "", (text or "").partition("\n\n")[2])),
            help_epilogue=f"Example: {example}",
            sort_key=len([*app]),
        )
        return function

    return add


def option(setting: Setting, default: Any) -> Option:
    """The option of a setting, under its heading."""
    kind, unset = (bool, False) if setting.type is bool else (tuple[str, ...], ()) if setting.is_list else (str, "")
    value = "|".join((*setting.choices, *(["FILE.py:FUNCTION"] if setting.own else []))) or VALUES[setting.type]
    shown = "" if kind is bool else f" [{replace(setting, default=default).default_text}]"
    heading = Group(setting.heading, sort_key=1 + HEADINGS.index(setting.heading))
    opposite = {"negative": f"--with-{setting.name[3:]}"} if setting.name.startswith("no_") else {}
    note = about(f"{value} ..." if setting.is_list else value, setting.help + shown, group=heading, **opposite)
    return Option(setting.name, Option.KEYWORD_ONLY, default=unset, annotation=Annotated[kind, note])


DASH = {"allow_leading_hyphen": True}  # the value may be "-"
ConfigFile = Annotated[Path | None, about("FILE", "YAML file with any of these settings; options win over it.")]


@command("[OPTION ...]", "fastkl train --prompts prompts.jsonl --reward rewards.py:score", options=settings())
def train(
    *,
    config: ConfigFile = None,
    nproc: Annotated[int, about("N", "Processes on this machine, one for each GPU. [1]")] = 1,
    **given: Any,
) -> int:
    """Train a model.

    Without options: the embedded main job, a story model that learns to alliterate.
    Settings come from the defaults [in brackets], then from --config, then from
    options; with --resume, the run's own settings take the place of the
    defaults, with --fork those of the run that is forked. Where no step is left,
    --resume says so and ends with 0.
    """
    from fastkl.distributed.launch import launch
    from fastkl.distributed.start import launched
    from fastkl.training.early import check_names
    from fastkl.training.engines import check_engine_groups

    world = launched()
    watched = world.is_first and sys.stdout.isatty()
    say = partial(print, flush=True) if watched else lambda message: None
    with world.together():
        run = world.once(lambda: asked_for(given, config))
        check_names(run, say)
        if nproc < 1 or (nproc > 1 and world.size > 1):
            raise UserError(f"nproc: {nproc} processes cannot be started here; use 1 or more, and not under torchrun.")
        check_engine_groups(run, nproc * world.size)
    if finished := nothing_left(run):
        if world.is_first:
            print(printable(finished))
        return 0
    if nproc > 1:
        return launch(nproc, without_nproc(sys.argv[1:]))
    say("reading prompts, tokenizer and the model's settings ...")
    from fastkl.distributed.world import AGREED, LostProcess, OtherFailed
    from fastkl.rollout.agreement import StaleEngineError
    from fastkl.training import loop

    try:
        result = loop.train(run)
    except (loop.Diverged, StaleEngineError, LostProcess, OtherFailed) as stop:
        if world.is_first or not getattr(stop, AGREED, False):
            print(f"fastkl: {printable(str(stop))}", file=sys.stderr)
        return 1
    if result.saved_step < result.step and world.is_first:
        saved = f"step {result.saved_step}" if result.saved_step else "none"
        print(f"fastkl: step {result.step} is not saved; the newest checkpoint is {saved}.", file=sys.stderr)
    if result.saved_step < result.step:
        return 1
    return 130 if result.stopped else 0


def without_nproc(words: Sequence[str]) -> list[str]:
    """A command line without --nproc N or --nproc=N."""
    kept: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "--nproc":
            words[:1] = []
        elif not word.startswith("--nproc="):
            kept.append(word)
    return kept


def asked_for(given: dict[str, Any], config: Path | None) -> TrainConfig:
    """The run's settings; processes that torchrun has started again go on with what they have left."""
    from fastkl.distributed.start import num_restarts

    run = resolved(merged(given, config))
    is_begun = num_restarts() > 0 and (Path(run.output).expanduser() / "config.yaml").is_file()
    return replace(run, resume=True) if is_begun else run


def merged(given: dict[str, Any], config: Path | None) -> TrainConfig:
    """The defaults (with --resume what the run was started with, with --fork the other run's settings), then --config,
    then the options."""
    base = MAIN_JOB
    if given.get("fork") and not given.get("resume"):
        from fastkl.training.fork import origin, settings_of

        base = settings_of(origin(given["fork"]))
        given = given | {"fork": base.fork}
    if given.get("resume"):
        folder = Path(output_of(with_settings(load_config(config) if config else base, given))).expanduser()
        if (started := started_with(folder)) is not None:
            base = replace(started, output=str(folder))
    return with_settings(load_config(config, base) if config else base, given)


@command(
    "--vary NAME VALUE ... [OPTION ...]",
    "fastkl sweep --vary kl_coef 0 0.2 --vary seed 0 1 2 --output runs/sweep",
    options=[name for name in settings() if name != "kl_coef"],
    defaults=SWEEP,
)
def sweep(
    *,
    vary: Annotated[tuple[str, ...], about("NAME VALUE ...", "A setting and its values; may be repeated.")] = (),
    kl_coef: Annotated[tuple[str, ...], about("X ...", "Short for --vary kl_coef X ...")] = (),
    config: ConfigFile = None,
    **given: Any,
) -> int:
    """Train once for each combination of some settings' values, and compare.

    Each run has its folder, OUTPUT/NAME-VALUE, and OUTPUT/report.html compares
    them; of runs that differ in the seed alone it shows mean and spread. Items of
    a list are joined by commas: --vary reward alliteration alliteration,judges:tone
    Options are those of `fastkl train`. A sweep that was stopped goes on with the
    same command and --resume.
    """
    from fastkl.training.sweep import EXAMPLE, parse_varied, sweep

    varied = parse_varied([*vary, *(["kl_coef", *kl_coef] if kl_coef else [])])
    if not varied:
        raise UserError(f"sweep: name what to vary. Example: {EXAMPLE}")
    return sweep(with_settings(load_config(config, SWEEP) if config else SWEEP, given), varied)


@command(
    "--model NAME ... [OPTION ...]",
    "fastkl eval --model a b --prompts q.jsonl --reward rewards.py:score",
    fastkl.comparison.__doc__,
    options=[name for name in settings() if name in EVALUATED],
    defaults=NO_TASK,
)
def eval(
    *,
    model: Annotated[tuple[str, ...], about("NAME ...", "The models or checkpoints to compare.")] = (),
    samples: Annotated[int, about("N", "Completions of each prompt. [8]")] = 8,
    temperature: Annotated[float, about("X", "Sampling temperature; 0 takes the likeliest token. [1.0]")] = 1.0,
    pass_mark: Annotated[float, about("X", "A reward of at least this much is a pass. [0.99]", name="--pass")] = 0.99,
    text: Annotated[str, about("FILE", "A text whose loss is measured, in nats per token.")] = "",
    reference: Annotated[str, about("NAME", "A model to which the exact KL is measured.")] = "",
    output: Annotated[Path, about("FILE.json", "The same as JSON. [eval.json]")] = Path("eval.json"),
    **given: Any,
) -> int:
    """Evaluate models on prompts that they were not trained on, and compare."""
    shared = with_settings(NO_TASK, given)
    from fastkl.comparison.command import EvalConfig, compare

    print(compare(EvalConfig(model, output, samples, temperature, pass_mark, text, reference, shared)))
    return 0


@command(
    "FILE.jsonl --model NAME [OPTION ...]",
    "fastkl score rollouts.jsonl --model ./policy --reference ./sft",
    fastkl.score_files.__doc__,
    options=(*replayed_names(), "dtype", "device"),
)
def score(
    input: Annotated[str, about(None, 'Completions; "-" is standard input.', name="FILE.jsonl", **DASH)],
    /,
    *,
    model: Annotated[str, about("NAME", "The policy: a local folder or a hub id.")],
    reference: Annotated[str | None, about("NAME", "The reference; without it, no KL is computed.")] = None,
    output: Annotated[str | None, about("FILE", 'Scores; "-" is standard output. [FILE.scores.jsonl]', **DASH)] = None,
    batch_tokens: Annotated[int, about("N", "Tokens per forward, prompts included. [4096]")] = 4096,
    skip_malformed: Annotated[bool, about(None, "Report lines that cannot be scored and go on.", negative=())] = False,
    resume: Annotated[bool, about(None, "Continue the output where it ends.", negative=())] = False,
    **given: Any,
) -> int:
    """Score completions under a policy and a reference, from JSONL to JSONL."""
    shared = with_settings(MAIN_JOB, given)
    from fastkl.score_files.command import ScoreConfig, score_file

    score_file(ScoreConfig(input, model, reference, output, batch_tokens, skip_malformed, resume, shared))
    return 0


@command("DIR ... [OPTION ...]", "fastkl report runs/sweep/*")
def report(
    *folders: Annotated[Path, about(None, "Run folder; several are compared.", name="DIR")],
    output: Annotated[Path | None, about("FILE", "The page. [report.html beside the run or the runs]")] = None,
) -> int:
    """Write one self-contained HTML page about one run or several."""
    if not folders:
        raise UserError("report: name a run folder, or several (DIR).")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"report: there is no run folder {str(folder)!r}.")
    from fastkl.report.page.write import write_report

    print(write_report(list(folders), output))
    return 0


@command("RUN|FILE.jsonl [OPTION ...]", "fastkl doctor runs/alliteration", fastkl.audit.__doc__)
def doctor(
    path: Annotated[Path | None, about(None, "Run folder, or rollouts.", name="RUN|FILE.jsonl")] = None,
    /,
    *,
    table: Annotated[bool, about(None, "Compute the table of docs/negative-kl.md instead.", negative=())] = False,
) -> int:
    """Audit the KL of a run or of another trainer's rollouts.

    The exit code is 0 where the estimate is not significantly negative, 1
    where it is, 2 for what cannot be read or is no number, and 3 where fewer
    than ten completions are scored: too few to tell.
    """
    if table:
        from fastkl.audit.negative_kl import table as computed

        print(computed())
        return 0
    if path is None:
        raise UserError("doctor: name a run folder or a JSONL file of rollouts (or --table).")
    from fastkl.audit.doctor import diagnose

    diagnosis = diagnose(path)
    print(printable(diagnosis.text()))
    return diagnosis.exit_code


@command("RUN --output DIR [OPTION ...]", "fastkl export runs/alliteration --output models/alliterating")
def export(
    run: Annotated[Path, about(None, "Run folder.", name="RUN")],
    /,
    *,
    output: Annotated[Path, about("DIR", "The new folder.")],
    step: Annotated[str, about("N|best", "Which checkpoint. [the newest]")] = "",
    merge: Annotated[bool, about(None, "Add a run's adapters to the weights, for a model without any.")] = False,
    push_to_hub: Annotated[str, about("ID", "Upload it to the hub, too; a new repository is private.")] = "",
) -> int:
    """Write a run's model as a folder of its own.

    It holds what from_pretrained loads (model, tokenizer, a model card), and
    nothing of the trainer's state.
    """
    from fastkl.training.export import export, push

    print(export(run.expanduser(), output.expanduser(), step, merge=merge))
    if push_to_hub:
        print(push(output.expanduser(), push_to_hub))
    return 0


@command("MODEL [OPTION ...]", "fastkl serve storyteller --port 8001")
def serve(
    model: Annotated[str, about(None, "The model that is to be trained.", name="MODEL")],
    /,
    *,
    port: Annotated[int, about("N", "Where it listens. [8001]")] = 8001,
    host: Annotated[str, about("HOST", "The interface. [127.0.0.1]")] = "127.0.0.1",
    dtype: Annotated[str, about("TYPE", "float32, bfloat16; the training's own. [auto]")] = "auto",
    max_model_len: Annotated[int, about("N", "Tokens of a prompt with its completion. [the model's own]")] = 0,
    gpu_memory_utilization: Annotated[float, about("X", "Share of the GPU's memory. [0.9]")] = 0.9,
    tensor_parallel_size: Annotated[int, about("N", "GPUs that divide the model among them. [1]")] = 1,
) -> int:
    """Start a vLLM server that draws the completions of a training.

    The training is started with --engines and the addresses of such servers, and
    gives them its weights. Whoever reaches the port can replace the model: keep
    it on the loopback interface, or on a private network.
    """
    settings()["dtype"].check(dtype)
    import torch

    from fastkl.rollout.serve import serve
    from fastkl.training.places import choose_device, compute_dtype

    device = choose_device("auto")
    name = str(compute_dtype(dtype, device)).removeprefix("torch.")
    serve(
        model,
        host=host,
        port=port,
        dtype=name,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        num_gpus=torch.cuda.device_count() if device.type == "cuda" else 0,
        tensor_parallel_size=tensor_parallel_size,
    )
    return 0


@command("[OPTION ...]", "fastkl bench --budget 60")
def bench(
    *,
    output: Annotated[Path, about("DIR", "bench.json and pictures. [runs/bench]")] = Path("runs/bench"),
    budget: Annotated[float, about("S", "Seconds after which no row starts. [150]")] = 150.0,
) -> int:
    """Time the scoring operators against their floors and peers, as this machine allows."""
    from fastkl.microbench import run

    run.run_bench(output, budget_s=budget)
    return 0


@command("--output DIR [OPTION ...]", "fastkl storyteller --output models/storyteller")
def storyteller(
    *,
    output: Annotated[Path, about("DIR", "Where model and tokenizer go.")],
    seed: Annotated[int, about("N", "Another seed, another model. [0]")] = 0,
) -> int:
    """Remake the embedded model (in a checkout of fastkl)."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output: {str(output)!r} is a file, not a folder; choose another --output.")
    try:
        from tools.storyteller.make import make_storyteller
    except ModuleNotFoundError as missing:
        if str(missing.name).partition(".")[0] != "tools":
            raise
        raise UserError("storyteller: needs a checkout of the repository; a wheel holds the finished model.") from None

    make_storyteller(output, seed=seed)
    return 0
