"""What the generated users promise: each test names a promise, on populations of seeds of its own."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

from fedoppu.client.tasks import TASKS
from fedoppu.common.errors import UsageError
from fedoppu.common.randomness import Randomness
from fedoppu.simulations.population import Population, generate, stream_users
from fedoppu.simulations.population.forms import entitle, plain_tweet, styled_tweet
from fedoppu.simulations.population.generate import LONGEST, SHORTEST, Kind, draw_length
from fedoppu.simulations.population.language import (
    NUM_TOPICS,
    TEMPLATES,
    TOPIC_WORDS,
    Text,
    compose,
    sentiment_word,
)
from fedoppu.simulations.population.preferences import (
    DIFFERENT,
    Preferences,
    Style,
    draw_common,
    draw_user,
)
from fedoppu.simulations.population.words import APPROACHES, FILLERS, SENTIMENT

ALL = tuple(TASKS)
RNG = Randomness.from_seed(77)


@cache
def drawn(task: str, kind: Kind = "preferences", seed: int = 501) -> Population:
    return generate(task, population=kind, seed=seed, target_users=25, base_users=15, queries=10)


def heterogeneity(population: Population) -> float:
    """Chi-square of users by categories over its degrees of freedom: about 1 for equal users."""
    labels = TASKS["LaMP_2N"].labels
    users = population.target + population.base
    counts = np.array(
        [[sum(h.fields["category"] == label for h in u.history) for label in labels] for u in users]
    )
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    freedom = (len(users) - 1) * (len(labels) - 1)
    return float(((counts - expected) ** 2 / expected).sum() / freedom)


def noise_rate(population: Population) -> float:
    return float(np.mean([d.answer != d.truth for d in population.truths.values()]))


# The language


def test_no_word_carries_two_meanings() -> None:
    lists = [*TOPIC_WORDS, *SENTIMENT, *APPROACHES, *FILLERS.values()]
    counts = Counter(word for words in lists for word in words)
    assert [word for word, count in counts.items() if count > 1] == []


def test_every_topic_has_at_least_24_words() -> None:
    assert NUM_TOPICS == 16
    assert min(len(words) for words in TOPIC_WORDS) >= 24


def test_no_text_can_hold_a_word_of_a_label() -> None:
    labels = " ".join(TASKS["LaMP_2N"].labels + TASKS["LaMP_2M"].labels)
    meant = {w for w in labels.replace("-", " ").split() if len(w) > 2}
    lists = [*TOPIC_WORDS, *SENTIMENT, *APPROACHES, *FILLERS.values()]
    assert meant.isdisjoint(word for words in lists for word in words)


def test_each_opening_holds_two_topic_words_and_a_review_four_sentiment_words() -> None:
    for openings, closings in TEMPLATES.values():
        assert len(openings) == len(closings) == 6
        assert all(opening.count("{t}") == 2 for opening in openings)
    first, second = TEMPLATES["review"]
    assert {clause.count("{s}") for clause in first + second} == {2}


@pytest.mark.parametrize("genre", ["news", "movie", "review", "abstract"])
def test_a_text_has_20_to_40_words_and_begins_with_its_keywords(genre: str) -> None:
    rng = RNG.stream("texts", genre)
    for index in range(200):
        text = compose(genre, index % NUM_TOPICS, rng)  # type: ignore[arg-type]
        assert 20 <= len(str(text).split()) <= 40
        assert set(text.keywords) <= set(TOPIC_WORDS[index % NUM_TOPICS])
        at = [text.clauses[0].index(word) for word in text.keywords]
        assert at == sorted(at)


def test_most_topic_words_of_a_text_are_of_its_topic_but_not_all() -> None:
    rng = RNG.stream("strays")
    topic_of = {word: topic for topic, words in enumerate(TOPIC_WORDS) for word in words}
    own = stray = 0
    for index in range(500):
        topic = index % NUM_TOPICS
        for word in str(compose("news", topic, rng)).replace(".", "").replace(",", "").split():
            own += topic_of.get(word) == topic
            stray += topic_of.get(word, topic) != topic
    assert 0.03 < stray / (own + stray) < 0.15


def test_sentiment_words_tell_a_quality_but_no_single_word_does() -> None:
    rng = RNG.stream("sentiment")
    level = {word: i - 3 for i, words in enumerate(SENTIMENT) for word in words}
    qualities = rng.normal(0, 1, 400)
    read = np.array([[level[sentiment_word(q, rng)] for _ in range(4)] for q in qualities])
    one = np.corrcoef(qualities, read[:, 0])[0, 1]
    four = np.corrcoef(qualities, read.mean(1))[0, 1]
    assert one < 0.92 < four < 0.99


# Format


@pytest.mark.parametrize("task", ALL)
def test_inputs_are_lamps_and_every_answer_is_known_to_the_task(task: str) -> None:
    population = drawn(task)
    for user in population.target + population.base:
        for query in user.queries:
            fields = TASKS[task].parse_input(query.fields["input"])
            assert TASKS[task].render_input(fields) == query.fields["input"]
            TASKS[task].check_target(query.fields["gold"])
        for item in user.history:
            assert set(TASKS[task].item_fields) <= set(item.fields)
            shape = TASKS[task].item_format(item.fields)
            if task != "LaMP_1":
                TASKS[task].check_target(item.fields[shape.target])


@pytest.mark.parametrize("task", ALL)
def test_records_are_dated_in_order_and_named_once(task: str) -> None:
    population = drawn(task)
    users = population.target + population.base
    assert len({user.user_id for user in users}) == len(users) == 40
    for user in users:
        records = user.history + user.queries
        assert len({record.id for record in records}) == len(records)
        days = [record.time for record in records]
        assert days == sorted(set(days))


def test_a_paper_of_a_query_does_not_tell_its_school() -> None:
    schools = {word for words in APPROACHES for word in words}
    for user in drawn("LaMP_1").target:
        for query in user.queries:
            title = TASKS["LaMP_1"].parse_input(query.fields["input"])["title"]
            assert schools.isdisjoint(title.split())


# Draws


def test_the_same_seed_gives_the_same_users_and_another_seed_another_population() -> None:
    def users(seed: int) -> Population:
        return generate(
            "LaMP_2N", population="preferences", seed=seed, target_users=2, base_users=1, queries=2
        )

    assert users(1).target == users(1).target
    assert users(1).target != users(2).target
    assert list(users(1).common.labels) != list(users(2).common.labels)


@pytest.mark.parametrize("task", ALL)
def test_a_user_depends_neither_on_the_other_users_nor_on_the_number_of_queries(task: str) -> None:
    few = generate(
        task, population="preferences", seed=501, target_users=1, base_users=0, queries=3
    )
    assert few.target[0].history == drawn(task).target[0].history
    assert few.target[0].queries == drawn(task).target[0].queries[:3]


def test_histories_are_heavy_tailed_with_a_mean_of_at_least_30() -> None:
    lengths = np.array([draw_length(RNG.stream("length", i)) for i in range(2000)])
    assert (lengths.min(), lengths.max()) == (SHORTEST, LONGEST) == (15, 80)
    assert 28 <= np.median(lengths) <= 32 < np.mean(lengths) < 37
    assert np.mean(lengths > 60) > 0.08


# Preferences


@pytest.mark.parametrize("task", ["LaMP_1", "LaMP_2N", "LaMP_2M"])
def test_at_least_a_third_of_every_map_is_private(task: str) -> None:
    population = drawn(task)
    for preferences in population.preferences.values():
        private = np.mean(preferences.labels != population.common.labels)
        assert 1 / 3 <= private < 1 / 2


def test_a_population_map_uses_every_label() -> None:
    for labels in (8, 15):
        common = draw_common(labels, RNG.stream("common", labels))
        assert set(common.labels) == set(range(labels))


@pytest.mark.parametrize("task", ALL)
def test_at_least_8_percent_of_the_answers_are_noise(task: str) -> None:
    assert 0.08 <= noise_rate(drawn(task)) <= 0.13


@pytest.mark.parametrize("task", ALL)
def test_the_oracle_is_right_but_for_the_noise(task: str) -> None:
    population = drawn(task)
    golds = {
        (user.user_id, query.id): query.fields["gold"]
        for user in population.target + population.base
        for query in user.queries
    }
    assert golds.keys() == population.oracle.keys()
    right = np.mean([gold == population.oracle[key] for key, gold in golds.items()])
    assert 0.85 <= right <= 0.95


def test_the_oracle_of_a_category_is_the_users_own_map() -> None:
    population = drawn("LaMP_2N")
    for (user, record), draft in population.truths.items():
        label = population.preferences[user].labels[draft.topic]
        assert draft.truth == TASKS["LaMP_2N"].labels[label]
        assert population.oracle.get((user, record), draft.truth) == draft.truth


def test_the_oracle_of_a_rating_is_severity_applied_to_quality() -> None:
    user = Preferences(
        np.full(16, 1 / 16), np.zeros(16, np.int64), -1.0, 0.5, 0.0, Style(0, False, 0)
    )
    assert [user.rate(quality) for quality in (-9, -1, 0, 1, 2.2, 9)] == [1, 2, 2, 2, 3, 5]


def test_mean_quality_is_independent_of_severity() -> None:
    common = draw_common(15, RNG.stream("population"))
    users = [draw_user(common, DIFFERENT, 15, RNG.stream("user", i)) for i in range(3000)]
    traits = np.array([[u.shift, np.log(u.scale), u.mean_quality] for u in users])
    correlations = np.corrcoef(traits.T)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.06
    assert traits.std(0) == pytest.approx([0.8, 0.4, 0.8], rel=0.06)


def test_mean_ratings_alone_leave_severity_open() -> None:
    # Mean quality and shift weigh equally in a mean rating: it explains about half of the shift.
    common = draw_common(15, RNG.stream("population"))
    users = [draw_user(common, DIFFERENT, 15, RNG.stream("user", i)) for i in range(1500)]
    noise = RNG.stream("qualities").standard_normal((1500, 40))
    ratings = [
        np.mean([u.rate(u.mean_quality + e) for e in row])
        for u, row in zip(users, noise, strict=True)
    ]
    explained = np.corrcoef(ratings, [u.shift for u in users])[0, 1] ** 2
    assert 0.3 < explained < 0.65


def test_a_style_has_one_form_for_a_text_and_different_phrases_differ() -> None:
    text = Text(("the comet in Selby moved my orbit", "we still wait"), ("comet", "orbit"))
    styles = [Style(p, r, e) for p in range(8) for r in (False, True) for e in range(4)]
    assert entitle("headline", Style(0, False, 1), text) == "Why comet matters for orbit today"
    assert entitle("title", Style(2, True, 0), text) == "On the role of orbit in comet"
    assert styled_tweet(Style(1, True, 1), text) == (
        "ok so we still wait, and the comet in Selby moved my orbit #comet"
    )
    assert plain_tweet(text) == "the comet in Selby moved my orbit, and we still wait"
    assert len({entitle("headline", style, text) for style in styles}) == 64
    assert len({entitle("title", style, text) for style in styles}) == 64
    assert len({styled_tweet(style, text) for style in styles}) == 64


def test_a_style_is_independent_of_the_topic() -> None:
    population = drawn("LaMP_4")
    for user in population.target:
        styles = {
            item.fields["title"].split()[0]
            for item in user.history
            if population.truths[user.user_id, item.id].answer
            == population.truths[user.user_id, item.id].truth
            and population.preferences[user.user_id].style.pattern in (0, 1, 3, 4, 5, 7)
        }
        assert len(styles) <= 1


# The null population


@pytest.mark.parametrize("task", ALL)
def test_null_users_have_equal_preferences(task: str) -> None:
    population = drawn(task, "null")
    for user in population.preferences.values():
        assert list(user.labels) == list(population.common.labels)
        assert list(user.mix) == list(population.common.mix)
        assert (user.shift, user.scale, user.mean_quality) == (0.0, 1.0, 0.0)
        assert user.style == population.common.style
    assert 0.08 <= noise_rate(population) <= 0.13


def test_null_lengths_tell_nothing_of_topics_ratings_or_noise() -> None:
    population = generate(
        "LaMP_3", population="null", seed=502, target_users=250, base_users=0, queries=1
    )
    rows = []
    for user in population.target:
        drafts = [population.truths[user.user_id, item.id] for item in user.history]
        quality = np.mean([draft.quality for draft in drafts if draft.quality is not None])
        noise = np.mean([draft.answer != draft.truth for draft in drafts])
        topic = np.mean([draft.topic == 3 for draft in drafts])
        rows.append([len(drafts), quality, noise, topic])
    correlations = np.corrcoef(np.array(rows).T)[0, 1:]
    assert np.abs(correlations).max() < 0.15


def test_null_users_share_one_distribution_of_categories_and_others_do_not() -> None:
    assert heterogeneity(drawn("LaMP_2N", "null")) == pytest.approx(1, abs=0.15)
    assert heterogeneity(drawn("LaMP_2N")) > 5


# Errors


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(UsageError, match=r"task must be one of LaMP_1.*got LaMP_9"):
        generate("LaMP_9", population="null", seed=0, target_users=1, base_users=0, queries=1)


def test_an_unknown_population_is_refused() -> None:
    with pytest.raises(UsageError, match="population must be one of preferences, null, got odd"):
        generate(
            "LaMP_3",
            population="odd",  # type: ignore[arg-type]
            seed=0,
            target_users=1,
            base_users=0,
            queries=1,
        )


@pytest.mark.parametrize(
    ("target_users", "base_users", "queries", "complaint"),
    [
        (0, 1, 1, "target_users must be at least 1, got 0"),
        (1, -1, 1, "base_users must be at least 0, got -1"),
        (1, 1, 0, "queries must be at least 1, got 0"),
    ],
)
def test_numbers_below_their_bound_are_refused(
    target_users: int, base_users: int, queries: int, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        generate(
            "LaMP_3",
            population="null",
            seed=0,
            target_users=target_users,
            base_users=base_users,
            queries=queries,
        )


@pytest.mark.parametrize("task", TASKS)
def test_users_one_at_a_time_are_those_of_the_whole_population(task: str) -> None:
    whole = generate(
        task, population="preferences", seed=3, target_users=3, base_users=2, queries=2
    )
    truths: dict[tuple[str, str], str] = {}
    for role, users in (("target", whole.target), ("base", whole.base)):
        found = stream_users(
            task, role, count=len(users), population="preferences", seed=3, queries=2
        )
        for user, (drawn, own) in zip(users, found, strict=True):
            assert drawn == user
            truths |= {(user.user_id, query): truth for query, truth in own.items()}
    assert truths == whole.oracle
