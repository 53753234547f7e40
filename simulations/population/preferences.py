"""What a generated user likes: the known ground truth of a population.

Two kinds of preference: bound to topics (which label a user gives to which topic), and independent
of topics (how severely a user rates, and in which form a user writes). The population has a map of
its own; each user keeps a part of it. Severity cannot be read off the frequencies of a user's
ratings, because the mean quality of what a user rates varies as well, independently.

The null population is the same with every difference between users set to zero: its users are
exchangeable.
"""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedoppu.simulations.population.language import NUM_TOPICS

PATTERNS: Final = 8
ENDINGS: Final = 4


@dataclass(frozen=True)
class Style:
    """The form in which a user writes, whatever the topic.

    Attributes:
        pattern: Which phrase, 0 to 7.
        is_reversed: Whether the second part of the text comes first.
        ending: Which ending, 0 to 3.
    """

    pattern: int
    is_reversed: bool
    ending: int


@dataclass(frozen=True)
class Preferences:
    """One user's latent preferences.

    Attributes:
        mix: (num_topics,) float64, how often the user meets each topic; sums to 1.
        labels: (num_topics,) int64, the user's label of each topic.
        shift: Severity: what is added to a rating.
        scale: Severity: rating points for each level of quality; positive.
        mean_quality: Mean quality of what the user rates, in levels.
        style: The user's form.
    """

    mix: NDArray[np.float64] = field(repr=False)
    labels: NDArray[np.int64]
    shift: float
    scale: float
    mean_quality: float
    style: Style

    def rate(self, quality: float) -> int:
        """The noiseless rating of a quality, 1 to 5."""
        return max(1, min(5, round(3 + self.shift + self.scale * quality)))


@dataclass(frozen=True)
class Variation:
    """How much users differ; all zero and false makes them exchangeable.

    Attributes:
        overrides: Topics of the map that are private to each user.
        has_own_mix: Whether each user has a topic mix, Dirichlet of concentration .5.
        has_own_style: Whether each user has a style, uniform.
        shift_sd: Of the severity's shift, in rating points.
        log_scale_sd: Of the logarithm of the severity's scale.
        mean_quality_sd: Of the mean quality of what a user rates, in levels.
    """

    overrides: int = 7
    has_own_mix: bool = True
    has_own_style: bool = True
    shift_sd: float = 0.8
    log_scale_sd: float = 0.4
    mean_quality_sd: float = 0.8


DIFFERENT: Final = Variation()
EXCHANGEABLE: Final = Variation(0, False, False, 0.0, 0.0, 0.0)
CONCENTRATION: Final = 0.5


def draw_style(rng: np.random.Generator) -> Style:
    """A style, uniformly."""
    return Style(int(rng.integers(PATTERNS)), bool(rng.integers(2)), int(rng.integers(ENDINGS)))


def draw_common(num_labels: int, rng: np.random.Generator) -> Preferences:
    """Draws what users have in common: a map that uses every label, a mix and a style."""
    labels = rng.permutation(num_labels)[rng.permutation(NUM_TOPICS) % num_labels]
    mix = rng.dirichlet(np.full(NUM_TOPICS, CONCENTRATION))
    return Preferences(mix, labels.astype(np.int64), 0.0, 1.0, 0.0, draw_style(rng))


def draw_user(
    common: Preferences, variation: Variation, num_labels: int, rng: np.random.Generator
) -> Preferences:
    """Draws one user.

    Args:
        common: Of the population.
        variation: How much users differ.
        num_labels: Labels of the task.
        rng: Of this user alone.
    """
    labels = common.labels.copy()
    private = rng.permutation(NUM_TOPICS)[: variation.overrides]
    # One of the other labels, uniformly: an override is never the population's label.
    labels[private] = (labels[private] + rng.integers(1, num_labels, len(private))) % num_labels
    own_mix = rng.dirichlet(np.full(NUM_TOPICS, CONCENTRATION))
    shift, log_scale, mean_quality = rng.standard_normal(3)
    own_style = draw_style(rng)
    return Preferences(
        mix=own_mix if variation.has_own_mix else common.mix,
        labels=labels,
        shift=variation.shift_sd * float(shift),
        scale=float(np.exp(variation.log_scale_sd * log_scale)),
        mean_quality=variation.mean_quality_sd * float(mean_quality),
        style=own_style if variation.has_own_style else common.style,
    )
