"""The words of the generated language: topics, sentiment, approaches and everything between.

All of it was written for this project. No word belongs to two of the lists that carry meaning
(topics, sentiment, approaches), and none of those is a word of a label: a text never gives its
answer away.
"""

from collections.abc import Mapping
from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TOPICS: Final[Mapping[str, tuple[str, ...]]] = {
    "cooking": _words(
        "recipe oven flour butter garlic onion soup sauce bakery dough pepper kitchen chef basil"
        " lentil pastry skillet broth vinegar noodle cheese mushroom honey saffron dumpling"
    ),
    "football": _words(
        "striker goalkeeper stadium penalty coach league midfield referee kickoff tackle captain"
        " derby fixture scoreboard offside trophy defender substitute dribble relegation squad"
        " whistle tournament corner supporters"
    ),
    "astronomy": _words(
        "telescope galaxy comet orbit planet nebula asteroid lunar eclipse meteor observatory"
        " supernova satellite crater rocket astronaut gravity pulsar starlight spacecraft saturn"
        " jupiter cosmos constellation probe"
    ),
    "gardening": _words(
        "tulip compost seedling greenhouse pruning orchard fern hedge lawn rosebush trowel mulch"
        " orchid pollen sprout gardener lavender weeds trellis ivy perennial bulb soil blossom"
        " cactus"
    ),
    "finance": _words(
        "dividend broker mortgage interest bond inflation audit ledger credit banker equity"
        " currency treasury deficit invoice pension shareholder portfolio lender bankruptcy tariff"
        " loan savings auction accountant"
    ),
    "medicine": _words(
        "nurse vaccine surgeon clinic fever dosage diagnosis artery antibiotic insulin symptom"
        " hospital patient therapy allergy biopsy pharmacy bandage asthma infection tablet"
        " stethoscope ambulance kidney injection"
    ),
    "music": _words(
        "violin concerto drummer chorus melody orchestra guitar album rhythm pianist soprano"
        " trumpet ballad cello encore quartet lyric choir saxophone symphony tempo accordion"
        " harmony flute banjo"
    ),
    "sailing": _words(
        "harbor anchor sailboat tide lighthouse rudder mast skipper regatta buoy compass keel"
        " lagoon ferry dock mooring wharf seagull current canvas yacht oar reef navigator deckhand"
    ),
    "law": _words(
        "verdict judge jury lawsuit attorney statute testimony plaintiff tribunal courtroom"
        " appeal contract clause subpoena warrant witness bail prosecutor sentence notary evidence"
        " hearing parole settlement injunction"
    ),
    "computing": _words(
        "compiler server laptop keyboard algorithm database browser firmware robot router"
        " password encryption pixel processor backup chatbot software sensor kernel firewall"
        " debugger printer monitor network script"
    ),
    "weather": _words(
        "thunder drizzle hurricane blizzard humidity forecast frost rainfall lightning tornado"
        " barometer fog drought heatwave sleet monsoon breeze snowfall temperature cloud hail"
        " rainbow cyclone sunshine icicle"
    ),
    "railways": _words(
        "locomotive platform carriage conductor tunnel timetable junction freight signal viaduct"
        " railcar tram ticket depot sleeper turnstile commuter caboose track engineer steam"
        " luggage station subway crossing"
    ),
    "school": _words(
        "teacher homework classroom blackboard pupil lesson exam tuition notebook chalk recess"
        " campus lecture syllabus diploma principal essay quiz pencil textbook kindergarten"
        " semester spelling algebra dormitory"
    ),
    "clothing": _words(
        "silk tailor sweater velvet zipper denim scarf runway hemline embroidery button corduroy"
        " boutique gown sneaker wardrobe linen mitten collar jacket stitching wool handbag"
        " bracelet cardigan"
    ),
    "wildlife": _words(
        "badger falcon otter antelope beaver heron wolf panther elephant turtle penguin lizard"
        " moose hedgehog rhino giraffe owl raccoon burrow nest predator herd vulture squirrel"
        " habitat"
    ),
    "archaeology": _words(
        "pharaoh tomb pottery excavation mosaic relic fortress dynasty papyrus obelisk coin"
        " temple artifact sarcophagus manuscript monument amphora chariot ruin inscription museum"
        " emperor scroll fresco catacomb"
    ),
}

# From the worst to the best; a word of level i expresses a quality of about i - 3.
SENTIMENT: Final[tuple[tuple[str, ...], ...]] = (
    _words("horrible dreadful terrible awful disgusting atrocious abysmal appalling"),
    _words("bad poor shoddy disappointing annoying unpleasant clumsy defective"),
    _words("dull weak mediocre bland flimsy uneven forgettable tiresome"),
    _words("average ordinary acceptable passable plain standard usual moderate"),
    _words("decent nice pleasant solid handy tidy agreeable likeable"),
    _words("good great lovely impressive delightful charming reliable enjoyable"),
    _words("superb brilliant amazing outstanding flawless magnificent perfect wonderful"),
)

# Schools of thought of the generated papers (LaMP_1); the first word names the school.
APPROACHES: Final[tuple[tuple[str, ...], ...]] = (
    _words("bayesian posterior marginal"),
    _words("neural layered recurrent"),
    _words("symbolic logical axiomatic"),
    _words("spectral harmonic wavelet"),
    _words("evolutionary genetic mutating"),
    _words("fuzzy gradual rounded"),
    _words("causal interventional counterfactual"),
    _words("geometric affine convex"),
)

# Words that carry no meaning for any preference: the noise of every text.
FILLERS: Final[Mapping[str, tuple[str, ...]]] = {
    "who": _words(
        "neighbor stranger family visitor cousin mayor writer farmer student committee crowd"
        " sister brother uncle reporter friend group owner manager volunteer"
    ),
    "where": _words(
        "Arden Belmont Carrow Delby Eastmoor Fenwick Garston Holbrook Ivydale Jasper Kelton"
        " Linwood Marlow Norbury Oakham Penrith Quarry Redhill Selby Thornton"
    ),
    "when": _words(
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January March April June August"
        " October November morning evening winter summer autumn spring"
    ),
    "adj": _words(
        "quiet large small new old early late local distant sudden brief narrow public private"
        " common strange modern empty busy simple"
    ),
    "verb": _words(
        "changed found moved followed reached noticed crossed opened filled covered started ended"
        " missed joined entered surprised touched shared needed watched"
    ),
    "thing": _words(
        "tale plan letter photo list road bridge table window market village corridor meeting"
        " project report box question promise picture journey"
    ),
}
