"""The storyteller: its language, its checker, the shipped model, and that it can be remade."""

from __future__ import annotations

import hashlib
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from fastkl.storyteller import check, model_path, story, story_nats, well_formed_share
from fastkl.storyteller.checker import split_sentences
from fastkl.storyteller.grammar import expand, templates
from fastkl.storyteller.lexicon import GENDER, WORDS

ROOT = Path(__file__).resolve().parents[2]
ADJECTIVES = {word for category in ("trait", "look", "taste", "scene", "weather") for word in WORDS[category]}
SWAPPED = {"he": "she", "she": "he", "him": "her", "her": "him", "his": "her"}


def sentences(text: str) -> list[str]:
    return [" ".join(words) for words in split_sentences(text)]


def is_well_formed(text: str) -> bool:
    """Whether the text is one finished, well-formed sentence."""
    found = check(text)
    return found.num_well_formed == found.num_sentences == 1 and text[-1] in ".!?"


@cache
def told_sentences() -> list[str]:
    return [sentence for seed in range(200) for sentence in sentences(story(seed))]


def rejected_share(corrupt: Callable[[list[str], random.Random], list[str] | None]) -> tuple[float, int]:
    """Share of rejected sentences among those that `corrupt` changed, and their number."""
    rng = random.Random(0)
    results = []
    for sentence in told_sentences():
        corrupted = corrupt(sentence.split(), rng)
        if corrupted is not None and corrupted != sentence.split():
            results.append(not is_well_formed(" ".join(corrupted)))
    return sum(results) / len(results), len(results)


# The language ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_seed_tells_the_same_story_on_every_machine():
    text = "\n".join(story(seed) for seed in range(200))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "028205c42f5ecc0848aec169bf3699fed33dac0c8ecca28611cb9343cc8f2086"
    )


@pytest.mark.slow
def test_importing_the_language_needs_the_standard_library_only():
    code = (
        "import sys, fastkl.storyteller as s; s.check(s.story(1)); "
        "assert not {'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@cache
def three_thousand() -> list[str]:
    """Stories, of the first seeds."""
    return [story(seed) for seed in range(3000)]


@pytest.mark.slow
def test_stories_use_at_least_800_words_and_nearly_every_letter_can_alliterate():
    words = {word.strip('.,!?"').lower() for text in three_thousand() for word in text.split()}
    assert len(words) >= 800

    def initials(*categories: str) -> set[str]:
        return {word[0] for category in categories for word in WORDS[category]}

    names = {name[0].lower() for name in GENDER}
    letters = (
        names & initials("kind", "thing") & initials("trait", "look") & initials("go", "cheer") & initials("manner")
    )
    assert len(letters) >= 20, sorted(letters)


@pytest.mark.slow
def test_there_are_more_than_1e9_stories_and_no_two_of_3000_are_equal():
    from tools.storyteller.measure import num_stories_at_least

    assert num_stories_at_least() >= 10**9
    # A second bound, by counting: first, third and last sentences with names and kinds blanked out hardly depend on
    # each other, so that the product of the numbers of forms seen is about a lower bound too.
    stories = three_thousand()
    assert len(set(stories)) == 3000
    blank = set(GENDER) | set(WORDS["kind"])

    def form(sentence: str) -> str:
        return " ".join("_" if word.strip('.,!?"') in blank else word for word in sentence.split())

    firsts = {form(sentences(text)[0]) for text in stories}
    lasts = {form(sentences(text.removesuffix(" The end."))[-1]) for text in stories}
    middles = {form(sentences(text)[2]) for text in stories}
    assert len(firsts) * len(middles) * len(lasts) >= 10**9


@pytest.mark.slow
def test_openings_vary_and_most_stories_begin_once_upon_a_time():
    stories = three_thousand()[:1000]
    share = sum(text.startswith("Once upon a time") for text in stories) / 1000
    assert abs(share - 0.6) < 4 * math.sqrt(0.6 * 0.4 / 1000)
    assert len({" ".join(text.split()[:2]) for text in stories if not text.startswith("Once upon")}) > 20


def test_every_template_is_told_and_its_weights_add_up_to_one():
    lines = [line for section in templates().values() for line in section]
    assert len(lines) >= 120 and len(set(lines)) == len(lines)
    for line in lines:
        assert sum(sentence.weight for sentence in expand(line)) == pytest.approx(1.0)


@pytest.mark.slow
def test_pronouns_without_a_name_in_their_sentence_speak_of_the_one_last_named_as_subject():
    feminine = {"she", "her"}
    num_pronouns = 0
    for seed, text in enumerate(three_thousand()[:1000]):
        last = None
        for sentence in sentences(text):
            words = [word.strip('.,!?"') for word in sentence.split()]
            names = [word for word in words if word in GENDER]
            pronouns = {word.lower() for word in words} & {"he", "she", "him", "his", "her"}
            if not names and pronouns and last is not None:
                num_pronouns += 1
                assert (GENDER[last] == "f") == bool(pronouns & feminine), (seed, sentence)
            if names:  # "Tim ..." is about Tim; who else is a subject would take a parse
                last = names[0] if words[0] == names[0] and len(names) == 1 and not pronouns else None
    assert num_pronouns > 100


# The checker -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_sentence_of_300_stories_is_well_formed():
    for seed in range(10_000, 10_300):
        found = check(story(seed))
        assert found.num_well_formed == found.num_sentences >= 6, story(seed)


def test_sentences_that_were_never_told_are_recognised():
    assert is_well_formed("Once upon a time, Fiona was a furry friendly funny fox.")
    assert is_well_formed("Tim the tiny turtle timidly tiptoed to the tiny tranquil town.") is False  # tiny, twice
    assert is_well_formed("Tim the timid turtle tidily, tenderly tiptoed to the town.") is False  # no such template
    assert is_well_formed("So Tim the timid turtle tidily, tenderly tiptoed to the tiny tranquil town.")
    assert is_well_formed('"Why are you so sad, Bella?" he boldly bellowed.')
    assert is_well_formed("Tim and Tom slowly sang near the sunny shore.")


@pytest.mark.parametrize(
    "text",
    [
        "to the tall tall tall tall tall",
        "Once upon a time, there was a tall tall tall tall turtle named Tim.",
        "tall tall tall tall.",
        "The the the the.",
        "Tim Tim Tim Tim Tim.",
        "Once upon a time, there was a a timid turtle named Tim.",
        "Tim slowly sang slowly.",
        "Turtle the to tiptoed tall Tim a.",
        "Tim the Tom slowly sang.",
        "tim slowly sang.",
        "Tim slowly sang",
        "Tim Slowly sang.",
        "Once upon a time, there was an timid turtle named Tim.",
        "Once upon a time, there was a anxious ant named Tim.",
        "Tim and Tim slowly sang near the sunny shore.",
        "Tim was glad, glad and glad.",
        "Once upon a time, there was a tall tall turtle named Tim.",
        '"I feel so sad," said Tim',
        '"I feel so sad, said Tim.',
        "Tim was so sad that she slowly wept.",
    ],
)
def test_collapsed_or_broken_text_is_rejected(text: str):
    assert check(text).num_well_formed == 0


def test_an_unfinished_last_sentence_counts_only_once_it_can_no_longer_become_well_formed():
    full = story(5)
    words = full.split()
    num_finished = 0
    for i in range(1, len(words) + 1):
        num_finished += words[i - 1][-1] in ".!?"
        found = check(" ".join(words[:i]))
        assert found.num_well_formed == found.num_sentences == num_finished, words[:i]
    assert check("Tim slowly sang. And they lived of of").num_sentences == 2
    assert check("Tim slowly sang. And they lived happ").num_sentences == 1


def test_a_sentence_told_twice_in_one_text_counts_once():
    found = check("Tim slowly sang. Tim slowly sang. Tim slowly sang.")
    assert (found.num_well_formed, found.num_sentences) == (1, 3)


def test_pronouns_agree_with_the_character_last_named():
    assert check("Tim slowly sang. He slowly danced.").num_well_formed == 2
    assert check("Tim slowly sang. She slowly danced.").num_well_formed == 1
    assert check("Tess slowly sang. She was so sad that she wildly wept.").num_well_formed == 2
    assert check("Tess slowly sang. She was so sad that he wildly wept.").num_well_formed == 1


@pytest.mark.slow
def test_repeated_words_are_rejected():
    def repeat(words: list[str], rng: random.Random) -> list[str]:
        i = rng.randrange(len(words))
        return [*words[: i + 1], *words[i:]]

    share, num = rejected_share(repeat)
    assert share == 1.0 and num > 1500


@pytest.mark.slow
def test_a_pronoun_of_the_wrong_gender_is_rejected():
    rng = random.Random(0)
    rejected = []
    for seed in range(300):
        words = story(seed).split()
        places = [i for i, word in enumerate(words) if word.strip('.,!?"').lower() in SWAPPED]
        if places:
            i = rng.choice(places)
            core = words[i].strip('.,!?"')
            other = SWAPPED[core.lower()]
            words[i] = words[i].replace(core, other.capitalize() if core[0].isupper() else other)
            found = check(" ".join(words))
            rejected.append(found.num_well_formed < found.num_sentences)
    assert len(rejected) > 200 and sum(rejected) / len(rejected) >= 0.99


@pytest.mark.slow
def test_dropping_a_word_that_is_no_adjective_or_adverb_is_rejected():
    optional = ADJECTIVES | set(WORDS["manner"])

    def drop(words: list[str], rng: random.Random) -> list[str] | None:
        places = [i for i, word in enumerate(words) if word.strip('.,!?"').lower() not in optional]
        i = rng.choice(places)
        return words[:i] + words[i + 1 :] if len(words) > 2 else None

    share, num = rejected_share(drop)
    assert share >= 0.98 and num > 1500


def test_swapping_neighbours_that_are_not_both_adjectives_is_rejected():
    def swap(words: list[str], rng: random.Random) -> list[str] | None:
        places = [i for i in range(len(words) - 1) if not {words[i], words[i + 1]} <= ADJECTIVES]
        i = rng.choice(places) if places else None
        return None if i is None else [*words[:i], words[i + 1], words[i], *words[i + 2 :]]

    share, num = rejected_share(swap)
    assert share >= 0.98 and num > 1500


def test_shuffled_words_are_rejected():
    share, num = rejected_share(lambda words, rng: rng.sample(words, len(words)) if len(words) > 4 else None)
    assert share >= 0.99 and num > 1000


@pytest.mark.slow
def test_every_word_is_read_as_its_own_category_only():
    """A place where a deed belongs, and the like: replace one slot word by a word that no category shares with it."""
    rng = random.Random(0)
    everything = sorted({word for words in WORDS.values() for word in words})
    categories = {word: {name for name, words in WORDS.items() if word in words} for word in everything}
    rejected = []
    for sentence in told_sentences():
        words = sentence.split()
        places = [i for i, word in enumerate(words) if word in categories]
        if places:
            i = rng.choice(places)
            strangers = [word for word in rng.sample(everything, 40) if not categories[word] & categories[words[i]]]
            words[i] = next(word for word in strangers if (word[0] in "aeiou") == (words[i][0] in "aeiou"))
            rejected.append(not is_well_formed(" ".join(words)))
    assert len(rejected) > 1500 and sum(rejected) / len(rejected) >= 0.97


@pytest.mark.slow
def test_the_checker_reads_2000_sentences_per_second():
    texts = [story(seed) for seed in range(300)]
    check(texts[0])  # builds the trie
    started = time.process_time()
    num_sentences = sum(check(text).num_sentences for text in texts)
    assert num_sentences / (time.process_time() - started) >= 2000


def test_well_formed_share_pools_sentences_over_texts():
    assert well_formed_share(["Tim slowly sang.", "Tim slowly sang. Sang. Sing."]) == 0.5
    assert well_formed_share(["Once upon", ""]) == 0.0


@pytest.mark.slow
def test_an_installed_package_says_in_one_sentence_that_remaking_the_model_needs_a_checkout(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "fastkl").symlink_to(ROOT / "fastkl")
    code = (
        "import sys; from pathlib import Path; "
        f"sys.path = [{str(site)!r}, *(p for p in sys.path if not Path(p, 'tools', 'storyteller').is_dir())]; "
        "from fastkl.cli import main; sys.exit(main(['storyteller', '--output', 'new']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "needs a checkout of the repository" in done.stderr


# Making it ---------------------------------------------------------------------------------------------------------


def test_muon_updates_by_the_orthogonal_factor_of_the_nesterov_momentum():
    import torch

    from tools.storyteller.muon import Muon, orthogonal

    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        matrix = torch.randn(shape)
        u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        singular = torch.linalg.svdvals(orthogonal(matrix).double())
        assert singular.min() > 0.6 and singular.max() < 1.3
        along = (u.T @ orthogonal(matrix).double() @ vt.T).diagonal()  # U^T O V would be the identity
        assert along.min() > 0.6 and along.max() < 1.3

    weight, gradients = torch.nn.Parameter(torch.zeros(24, 40)), torch.randn(2, 24, 40)
    muon = Muon([weight], lr=0.1, momentum=0.9)
    expected, average = torch.zeros(24, 40), torch.zeros(24, 40)
    for gradient in gradients:
        weight.grad = gradient.clone()
        muon.step()
        average = 0.9 * average + 0.1 * gradient
        expected -= 0.1 * 0.2 * 40**0.5 * orthogonal(0.1 * gradient + 0.9 * average)
    assert torch.allclose(weight, expected, atol=1e-6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same tiny recipe."""
    from tools.storyteller import measure
    from tools.storyteller.make import make_storyteller

    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    patch = pytest.MonkeyPatch()
    patch.setattr(measure, "NUM_HELD_OUT", 32)
    for folder in folders:
        make_storyteller(
            folder,
            seed=3,
            steps=12,
            stories_per_step=4,
            num_eval_samples=4,
            vocab_size=600,
            hidden_size=32,
            num_layers=1,
            log=lambda _: None,
        )
    patch.undo()
    return folders


@pytest.mark.slow
def test_remaking_gives_the_same_files(tiny: list[Path]):
    first, second = tiny
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in first.iterdir()
    }
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_sharpening_multiplies_every_logit():
    import torch

    from tools.storyteller.make import new_model, sharpen, train_tokenizer

    model = new_model(train_tokenizer([story(0)], 300), 32, 1)
    ids = torch.arange(20)[None]
    before = model(ids).logits
    sharpen(model, 1.35)
    assert torch.allclose(model(ids).logits, 1.35 * before, atol=1e-6)


@pytest.mark.slow
def test_training_lowers_the_cross_entropy_of_new_stories():
    import torch

    from tools.storyteller.make import batches, new_model, train, train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer([story(seed) for seed in range(200)], 600)
    curve = train(new_model(tokenizer, 32, 1), tokenizer, batches(tokenizer, 0, 40, 4), 40, lambda _: None)
    assert [num_stories for num_stories, _ in curve] == [16 * i for i in range(1, 11)]
    assert curve[0][1] < math.log(600) + 0.1 and curve[-1][1] < curve[0][1] - 1.0


@pytest.mark.slow
def test_batches_hold_every_story_once_and_similar_lengths_together():
    from tools.storyteller.make import batches, encode, train_tokenizer

    tokenizer = train_tokenizer([story(seed) for seed in range(100)], 600)
    rows = [row for batch in batches(tokenizer, 500, 10, 4) for row in batch]
    assert sorted(rows) == sorted(encode(tokenizer, [story(500 + i) for i in range(40)]))
    spans = [max(map(len, batch)) - min(map(len, batch)) for batch in batches(tokenizer, 500, 8, 4)]
    assert sum(spans) / len(spans) < 30


# The shipped model -------------------------------------------------------------------------------------------------


@cache
def shipped():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(model_path())


def test_the_shipped_model_has_the_promised_shape():
    import torch
    from safetensors.torch import load_file

    model, tokenizer = shipped()
    config = model.config
    assert config.model_type == "llama" and config.tie_word_embeddings and config.head_dim in (32, 64)
    assert 1_000_000 <= model.num_parameters() <= 4_000_000 and len(tokenizer) == config.vocab_size
    assert config.storyteller and model.generation_config.top_k == 0
    files = list(model_path().iterdir())
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert not {path.suffix for path in files} - {".json", ".md", ".safetensors"}
    assert {tensor.dtype for tensor in load_file(model_path() / "model.safetensors").values()} == {torch.float16}


def test_a_tokenised_prompt_is_a_prefix_of_a_tokenised_story_and_texts_survive_the_round_trip():
    _, tokenizer = shipped()
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == end != tokenizer.pad_token_id
    prompt = tokenizer("Once upon a time")["input_ids"]
    assert prompt[0] == end and end not in prompt[1:]
    for seed in range(100):
        text = story(seed)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert ids[: len(prompt)] == prompt or not text.startswith("Once upon a time")


@pytest.mark.slow
def test_held_out_cross_entropy_is_within_10_percent_of_the_generators_entropy():
    import torch

    model, tokenizer = shipped()
    nats = []
    for seed in range(-1, -33, -1):
        ids = torch.tensor([[*tokenizer(story(seed))["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logprobs = model(ids).logits.double().log_softmax(-1)
        nats.append(-logprobs[0, :-1].gather(1, ids[0, 1:, None]).sum().item())
    entropy = sum(story_nats(seed) for seed in range(-1, -33, -1))
    assert entropy * 0.98 < sum(nats) < 1.10 * entropy


@pytest.mark.slow
def test_at_least_95_percent_of_the_sentences_that_the_shipped_model_samples_are_well_formed():
    from tools.storyteller.measure import sample

    checks = [check(text) for text in sample(*shipped(), "Once upon a time", 64, max_new_tokens=160, seed=11)]
    num_sentences = sum(found.num_sentences for found in checks)
    share = sum(found.num_well_formed for found in checks) / num_sentences
    error = math.sqrt(sum((c.num_well_formed - share * c.num_sentences) ** 2 for c in checks)) / num_sentences
    assert num_sentences > 400 and share + 2 * error >= 0.95 and share >= 0.93, (share, error)
