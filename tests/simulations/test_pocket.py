"""The embedded base: the corpus keeps apart from every population, and the folder is what its card says."""

import itertools
import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fedoppu.client.jobs import ModelQuery
from fedoppu.client.model import LoadedBase, load_base, resolve_base
from fedoppu.client.prediction import BatchedPredictor
from fedoppu.client.prompts import PromptBuilder
from fedoppu.client.tasks import TASKS
from fedoppu.common.config import PromptSettings, RetrieverSettings
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.pocket.corpus import (
    Segment,
    document,
    documents,
    draw_reader,
    reading,
)
from fedoppu.simulations.pocket.train import (
    BOS,
    CONTEXT,
    EOS,
    PAD,
    SPECIAL,
    Settings,
    batches,
    encode,
    make,
    padded,
    rate_at,
    train_tokenizer,
)
from fedoppu.simulations.population import generate

TINY = Settings(
    vocabulary=300,
    tokenizer_documents=20,
    readings=20,
    width=16,
    layers=1,
    heads=2,
    feedforward=16,
    steps=2,
    batch_tokens=256,
)


@cache
def pocket() -> LoadedBase:
    return load_base(resolve_base("pocket"))


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(5, TINY)


# The corpus


def test_documents_are_a_function_of_seed_and_number() -> None:
    first = list(itertools.islice(documents(3), 6))
    assert list(itertools.islice(documents(3), 6)) == first
    assert list(itertools.islice(documents(3, 4), 2)) == first[4:]
    assert list(itertools.islice(documents(4), 6)) != first


def test_the_corpus_shares_no_text_with_a_population_of_the_same_seed() -> None:
    population = generate(
        "LaMP_2N", population="preferences", seed=0, target_users=30, base_users=30, queries=10
    )
    texts = {
        item.fields["text"] for user in population.target + population.base for item in user.history
    }
    prompts = {part.prompt for parts in itertools.islice(documents(0), 1200) for part in parts}
    articles = {p.partition("\n")[0].removeprefix("article: ") for p in prompts if "article" in p}
    assert len(texts) > 1500
    assert len(articles) > 1000
    assert texts.isdisjoint(articles)


def test_text_alone_tells_no_label() -> None:
    rng = Randomness.from_seed(9).stream("readers")
    readers = [draw_reader(15, rng) for _ in range(3000)]
    labels = np.array([reader.labels for reader in readers])
    shares = np.array([np.bincount(column, minlength=15) for column in labels.T]) / len(labels)
    assert shares == pytest.approx(np.full((16, 15), 1 / 15), abs=0.02)


def test_quality_alone_tells_no_rating() -> None:
    rng = Randomness.from_seed(9).stream("ratings")
    readers = [draw_reader(15, rng) for _ in range(4000)]
    for quality in (-1.0, 0.0, 1.0):
        ratings = [reader.rate(quality) for reader in readers]
        assert np.mean(ratings) == pytest.approx(3, abs=0.1)
        assert min(Counter(ratings).values()) > 0.05 * len(ratings)


def test_documents_use_the_prompts_of_every_task() -> None:
    endings = {
        part.prompt.rpartition("\n")[2]
        for parts in itertools.islice(documents(1), 300)
        for part in parts
        if part.answer
    }
    asked = {task.query.prompt.rpartition("\n")[2] for task in TASKS.values()}
    assert asked <= endings


def test_the_first_documents_only_read_where_asked_to() -> None:
    rng = Randomness.from_seed(0).child("pocket").stream("document", 0)
    assert next(documents(0, readings=1)) == reading(rng)
    rng = Randomness.from_seed(0).child("pocket").stream("document", 0)
    assert next(documents(0)) == document(rng)


# Training


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folders = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    for folder in folders:
        make(5, folder, TINY)
    return folders


def test_the_same_seed_gives_the_same_bytes(made: tuple[Path, Path]) -> None:
    names = sorted(path.name for path in made[0].iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    for name in names:
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()


def test_what_is_made_loads_as_a_base(made: tuple[Path, Path]) -> None:
    base = load_base(resolve_base(str(made[0])))
    assert base.tokenizer.decode(base.tokenizer.encode("one comet")) == "one comet"


def test_an_answer_weighs_more_than_text_and_the_end_is_learned() -> None:
    tokenizer = tiny_tokenizer()
    parts = (Segment("ab", " c"), Segment("d", ""))
    encoded = encode(parts, tokenizer, 0.25)
    spelled = [tokenizer.decode([token]) for token in encoded.tokens]
    weights = dict(zip(spelled, encoded.weights, strict=True))
    assert (encoded.tokens[0], encoded.tokens[-1]) == (BOS, EOS)
    assert (weights[SPECIAL[BOS]], weights["\n"], weights[SPECIAL[EOS]]) == (0.0, 1.0, 1.0)
    assert (weights["d"], weights["c" if "c" in weights else " c"]) == (0.25, 1.0)


def test_a_batch_holds_at_most_its_tokens_and_loses_no_document() -> None:
    tokenizer = tiny_tokenizer()
    encoded = [encode(parts, tokenizer, 0.1) for parts in itertools.islice(documents(5), 512)]
    read = batches(iter(encoded), 4096, Randomness.from_seed(5))
    found: list[int] = []
    for batch in read:
        tokens, weights = padded(batch)
        assert tokens.shape == weights.shape
        assert tokens.numel() <= 4096
        assert bool(((tokens != PAD) | (weights == 0)).all())
        found += [id(each) for each in batch]
        if len(found) == 512:
            break
    assert sorted(found) == sorted(id(each) for each in encoded)


def test_a_document_is_cut_at_the_context() -> None:
    tokenizer = tiny_tokenizer()
    encoded = encode((Segment("word " * 2000, " end"),), tokenizer, 0.1)
    assert len(encoded.tokens) == len(encoded.weights) == CONTEXT


def test_the_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [rate_at(step, 200) for step in range(200)]
    assert rates[0] == 0.1
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.001)


# The folder that is shipped


def test_pocket_is_small_and_has_the_promised_shape() -> None:
    facts = resolve_base("pocket")
    assert 1_000_000 <= facts.num_parameters <= 2_400_000
    assert facts.max_tokens >= 1024
    assert (facts.path / "model.safetensors").stat().st_size < 5_000_000
    config = json.loads((facts.path / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float16")
    assert 2000 <= config["vocab_size"] <= 4000


def test_the_card_says_what_pocket_is_and_is_not() -> None:
    card = (resolve_base("pocket").path / "README.md").read_text()
    for word in ("license: apache-2.0", "## Intended use", "## What it is not", "## Reproduce"):
        assert word in card


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_the_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer = pocket().tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_the_shipped_tokenizer_is_the_one_that_seed_0_makes(tmp_path: Path) -> None:
    train_tokenizer(0, Settings()).save_pretrained(tmp_path)
    shipped = resolve_base("pocket").path / "tokenizer.json"
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads(shipped.read_text())


def test_a_text_costs_25_to_45_tokens() -> None:
    tokenizer = pocket().tokenizer
    population = generate(
        "LaMP_2N", population="preferences", seed=600, target_users=5, base_users=0, queries=1
    )
    lengths = [
        len(tokenizer.encode(" " + item.fields["text"]))
        for user in population.target
        for item in user.history
    ]
    assert 25 <= np.percentile(lengths, 5) <= np.percentile(lengths, 95) <= 45


def accuracy(k: int) -> float:
    """Of the base alone on LaMP_2N, 15 labels: 12 users by 10 queries."""
    base = pocket()
    task = TASKS["LaMP_2N"]
    prompts = PromptBuilder(
        task,
        base.tokenizer,
        prompt=PromptSettings(),
        retriever=RetrieverSettings(),
        k=k,
        max_tokens=CONTEXT,
    )
    population = generate(
        "LaMP_2N", population="preferences", seed=601, target_users=12, base_users=0, queries=10
    )
    ready = [
        prompts.query(user.history, query, profile=None)
        for user in population.target
        for query in user.queries
    ]
    queries = [ModelQuery(each.id, each.prompt, (), each.labels) for each in ready]
    scores = list(BatchedPredictor(base).score(queries))
    picked = [task.labels[int(np.argmax(each))] for each in scores]
    return float(np.mean([label == each.gold for label, each in zip(picked, ready, strict=True)]))


def test_without_earlier_items_pocket_is_near_chance() -> None:
    assert accuracy(0) <= 0.15


def test_earlier_items_help_pocket() -> None:
    assert accuracy(2) >= 0.2


def test_pocket_reads_a_context_of_1024_tokens() -> None:
    base = pocket()
    prompt = np.resize(np.array(base.tokenizer.encode(" the comet"), np.int32), CONTEXT - 4)
    label = np.array([base.tokenizer.eos], np.int32)
    (score,) = BatchedPredictor(base).score([ModelQuery("long", prompt, (), (label,))])
    assert np.isfinite(score).all()
