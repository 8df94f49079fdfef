"""The input of `fastkl score`: lines of JSON in, jobs with token ids for the models out.

__init__.py says which fields a line may have. The input is read in windows of at most WINDOW_LINES lines and about
WINDOW_BYTES bytes: what is held in memory, what is sorted by length, and what is written at once. They depend on the
input's bytes alone, so that a resumed run meets the same ones (write.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastkl.config.files import with_settings
from fastkl.config.settings import TrainConfig, check_config
from fastkl.data.chat import is_chat, rendered
from fastkl.data.prompts import as_beginning
from fastkl.errors import UserError
from fastkl.sampling.params import Sampling, check_ids, replayed_names
from fastkl.sampling.rules import FILES, check_parameters

WINDOW_LINES = 256


WINDOW_BYTES = 1 << 18


NO_LIMIT = 1 << 30  # tokens of a completion: it is there already


PROMPT_NAMES = ("prompt_token_ids", "prompt")


COMPLETION_NAMES = ("token_ids", "sampled_token_ids", "completion")  # token ids, where there are any, are exact


Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the input that is neither blank nor settings."""

    number: int  # from 1, blank lines and settings counted
    raw: bytes
    settings: Mapping[str, Any]  # of the {"settings": ...} lines above it


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive rows of the input."""

    rows: tuple[Row, ...]
    start_bytes: int  # where in the input it begins
    end_bytes: int


@dataclass(frozen=True, slots=True)
class Job:
    """One completion to score. `prompt` and `completion` are texts until they have been tokenised."""

    number: int
    id: Any  # the line's own "id", for the output
    prompt: str | Tokens
    is_chat: bool  # whether `prompt` is a rendered chat, which brings its own special tokens
    completion: str | Tokens
    mask: Tokens | None  # 0/1 per completion token
    sampling: Sampling

    @property
    def prompt_ids(self) -> Tokens:
        """The prompt, which must have been tokenised."""
        assert not isinstance(self.prompt, str)
        return self.prompt

    @property
    def completion_ids(self) -> Tokens:
        """The completion, which must have been tokenised."""
        assert not isinstance(self.completion, str)
        return self.completion


@dataclass(frozen=True, slots=True)
class Malformed:
    """A line that cannot be scored."""

    number: int
    reason: str


def read_windows(lines: Iterable[bytes]) -> Iterator[Window]:
    """Cuts the input into windows, never reading past the one that it yields."""
    rows: list[Row] = []
    settings: dict[str, Any] = {}
    size = start = end = 0
    for number, raw in enumerate(lines, start=1):
        end += len(raw)
        if not raw.strip():
            continue
        if (found := settings_line(raw)) is not None:
            settings = settings | found
            continue
        rows.append(Row(number, raw, settings))
        size += len(raw)
        if len(rows) == WINDOW_LINES or size >= WINDOW_BYTES:
            yield Window(tuple(rows), start, end)
            rows, size, start = [], 0, end
    if rows:
        yield Window(tuple(rows), start, end)


def settings_line(raw: bytes) -> dict[str, Any] | None:
    """The settings of a line {"settings": {...}} that holds nothing else; None for any other line."""
    if b'"settings"' not in raw:
        return None
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    found = record["settings"] if isinstance(record, dict) and record.keys() == {"settings"} else None
    return found if isinstance(found, dict) else None


class JobReader:
    """Turns windows into jobs with token ids.

    source: the input's name, for messages. base: the sampling parameters of the options. stop_token_ids: the model's.
    context: tokens that a prompt with its completion may have; None: any number. vocab: token ids are below it.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Any,
        base: TrainConfig,
        *,
        stop_token_ids: Tokens,
        context: int | None,
        vocab: int,
    ) -> None:
        self.source, self.tokenizer, self.base = source, tokenizer, base
        self.stop_token_ids, self.context, self.vocab = stop_token_ids, context, vocab
        self._samplings: dict[str, Sampling] = {}  # by the parameters' JSON; lines mostly repeat them

    def jobs(self, window: Window) -> list[Job | Malformed]:
        """One entry per row, in order."""
        return [self._or_malformed(self._checked, job) for job in self._tokenized([*map(self._parsed, window.rows)])]

    def _or_malformed(self, step: Any, item: Any) -> Any:
        try:
            return item if isinstance(item, Malformed) else step(item)
        except UserError as mistake:
            reason = str(mistake).removeprefix("prompts: ")  # what prompts.py's messages begin with
            return Malformed(item.number, f"line {item.number} of {self.source!r}: {reason}")

    def _parsed(self, row: Row) -> Job | Malformed:
        return self._or_malformed(self._job, row)

    def _job(self, row: Row) -> Job:
        record = parsed(row.raw)
        prompt, completion = first_field(record, PROMPT_NAMES), first_field(record, COMPLETION_NAMES)
        chat = is_chat(prompt)
        if chat:
            prompt = rendered(prompt, "the line", self.tokenizer)
        return Job(
            row.number,
            id_of(record),
            text_or_ids("prompt", prompt),
            chat,
            text_or_ids("completion", completion),
            None if record.get("mask") is None else only_ids("mask", record["mask"]),
            self.sampling({**row.settings, **object_field("settings", record), **object_field("sampling", record)}),
        )

    def sampling(self, parameters: Mapping[str, Any]) -> Sampling:
        """The options' sampling with a line's parameters over it. UserError for one that cannot be replayed."""
        key = json.dumps(parameters, sort_keys=True)
        if key not in self._samplings:
            if len(self._samplings) > WINDOW_LINES:
                self._samplings.clear()
            sampling = sampling_of(parameters, self.base, self.stop_token_ids)
            check_ids(sampling, self.vocab)
            self._samplings[key] = sampling
        return self._samplings[key]

    def _tokenized(self, jobs: list[Job | Malformed]) -> list[Job | Malformed]:
        """All texts of the window together: prompts with special tokens, chats and completions without."""
        for name, special, chosen in (
            ("prompt", True, lambda job: isinstance(job.prompt, str) and not job.is_chat),
            ("prompt", False, lambda job: isinstance(job.prompt, str) and job.is_chat),
            ("completion", False, lambda job: isinstance(job.completion, str)),
        ):
            texts = {i: job for i, job in enumerate(jobs) if isinstance(job, Job) and chosen(job)}
            if texts:
                encoded = self.tokenizer([getattr(job, name) for job in texts.values()], add_special_tokens=special)
                for (i, job), token_ids in zip(texts.items(), encoded["input_ids"], strict=True):
                    if name == "prompt":
                        token_ids = as_beginning(token_ids, getattr(job, name), self.tokenizer)
                    tokenized: dict[str, Any] = {name: tuple(token_ids)}
                    jobs[i] = replace(job, **tokenized)
        return jobs

    def _checked(self, job: Job) -> Job:
        """The job, if the model can score it."""
        num_tokens = len(job.prompt) + len(job.completion)
        if not job.prompt:
            raise UserError("the prompt has no token for this tokenizer, so nothing predicts the completion's first.")
        if not job.completion:
            raise UserError("the completion has no token; there is nothing to score.")
        if self.context is not None and num_tokens > self.context:
            raise UserError(f"prompt and completion have {num_tokens} tokens, the model's context has {self.context}.")
        if not all(0 <= i < self.vocab for i in (*job.prompt, *job.completion)):
            wrong = next(i for i in (*job.prompt, *job.completion) if not 0 <= i < self.vocab)
            raise UserError(f"the token id {wrong} is not in the model's vocabulary, 0 to {self.vocab - 1}.")
        if job.mask is not None and (len(job.mask) != len(job.completion) or not {*job.mask} <= {0, 1}):
            raise UserError(f"mask must hold a 0 or 1 for each of the completion's {len(job.completion)} tokens.")
        return job


def parsed(raw: bytes) -> dict[str, Any]:
    """A line as an object. UserError if it is none."""
    try:
        record = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as failure:
        raise UserError(f"it is not JSON ({failure}).") from failure
    if not isinstance(record, dict):
        raise UserError('it is not a JSON object; write {"prompt": ..., "completion": ...}.')
    return record


def first_field(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of `names` that the line has. UserError if it has none."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise UserError(f"it has none of {', '.join(map(repr, names))} (its fields: {', '.join(map(repr, record))}).")


def text_or_ids(name: str, value: Any) -> str | Tokens:
    """A text as it is, a list of whole numbers as a tuple. UserError for anything else."""
    if isinstance(value, str) and name != "mask":
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"its {name} holds half of a surrogate pair, which is no character.")
        return value
    if isinstance(value, list) and all(isinstance(i, int) for i in value):  # true and false count as 1 and 0: masks
        return tuple(map(int, value))
    kinds = {"prompt": "a text, chat messages or token ids", "mask": "a list of 0 and 1"}
    raise UserError(f"its {name} is not {kinds.get(name, 'a text or token ids')}.")


def only_ids(name: str, value: Any) -> Tokens:
    """text_or_ids where a text makes no sense."""
    found = text_or_ids(name, value)
    if isinstance(found, str):
        raise UserError(f"its {name} is a text, not a list of token ids.")
    return found


def id_of(record: Mapping[str, Any]) -> str | int | None:
    """The line's "id", copied to the output."""
    found = record.get("id")
    if not isinstance(found, str | int | None):
        raise UserError("its id is neither a text nor a whole number.")
    return found


def object_field(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The line's own sampling parameters, from either field that may hold them."""
    found = record.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f'its {name} is not an object such as {{"temperature": 0.7, "top_k": 50}}.')
    return found


def sampling_of(parameters: Mapping[str, Any], base: TrainConfig, stop_token_ids: Tokens) -> Sampling:
    """How the completion was drawn: `base`, changed by `parameters` (names of vLLM's SamplingParams or of the doctor's
    settings; None: as in `base`). UserError for parameters that are wrong or cannot be replayed (rules.py)."""
    check_parameters(parameters, FILES)
    given = {name: parameters[name] for name in replayed_names() if parameters.get(name) is not None}
    if given.get("top_k") == -1:  # how engines spell "off"
        given["top_k"] = 0
    config = with_settings(replace(base, max_new_tokens=NO_LIMIT), given)
    check_config(config)
    stops = set(stop_token_ids)
    for name in ("stop_token_ids", "eos_token_ids"):
        stops |= set(only_ids(name, parameters.get(name) or []))
    return Sampling.of(config, tuple(sorted(stops)))
