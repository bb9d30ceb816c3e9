"""What `toy` is told about CartPole's and MountainCar's pictures, and what it is tested with.

No training sentence is a prompt or baseline of the VLM-RM paper's Table 3, one of the paraphrases,
or a near copy of one (tests/test_toy.py compares their content words).
"""

from itertools import product
from typing import NamedTuple

CARTPOLE, MOUNTAIN_CAR = "CartPole", "MountainCar"


class Meaning(NamedTuple):
    """Sentences that describe the same states.

    Attributes:
        scene: what is to be seen; None: nothing that `toy` knows.
        quantity: the state that counts: angle (degrees, to the right), cart or position (the
            environment's); None: the sentences describe every picture of the scene.
        intervals: of the quantity, which the sentences describe.
    """

    scene: str | None
    quantity: str | None
    intervals: tuple[tuple[float, float], ...]
    sentences: tuple[str, ...]


def _all(subjects: str, predicates: str) -> list[str]:
    """Each subject with each predicate; both are separated by bars."""
    return [" ".join(pair) for pair in product(subjects.split("|"), predicates.split("|"))]


_POLE = "the pole|the stick|the rod"
_CAR = "the car|the vehicle|the automobile"

MEANINGS = tuple(
    Meaning(scene, quantity, intervals, tuple(sentences))
    for scene, quantity, intervals, sentences in (
        (CARTPOLE, "angle", ((0, 0),), [
            *_all(_POLE, "stands straight up|is upright|is vertical|points up at the sky|"
                         "is balanced|stands on its end|is in an upright position|"
                         "stays balanced in the air|rises straight up above the wagon|"
                         "is held vertical by the wheels below|is perfectly erect"),
            "balance the pole", "keep the stick upright", "upright", "a vertical rod",
            "an upright pole that keeps its balance", "a trolley that carries a rod straight up",
            "the trolley balances a vertical stick", "straight up", "perfect balance",
            "a stick vertically above a trolley", "vertically balanced rod",
        ]),
        (CARTPOLE, "angle", ((-60, -15),), [
            *_all(_POLE, "leans to the left|tilts left|is tipping over to the left|"
                         "is inclined leftwards"),
            "a pole that leans left", "tilted to the left",
        ]),
        (CARTPOLE, "angle", ((15, 60),), [
            *_all(_POLE, "leans to the right|tilts right|is tipping over to the right|"
                         "is inclined rightwards"),
            "a pole that leans right", "tilted to the right",
        ]),
        (CARTPOLE, "angle", ((-60, -15), (15, 60)), [
            *_all(_POLE, "is tilted|leans to one side|is slanted|is about to fall|is tipping over|"
                         "stands askew"),
            "a slanted stick", "the trolley is losing its stick",
        ]),
        (CARTPOLE, "angle", ((-100, -80), (80, 100)), [
            *_all(_POLE, "is horizontal|lies flat|is level with the track|sticks out sideways"),
            "a horizontal bar",
        ]),
        (CARTPOLE, "angle", ((-180, -110), (110, 180)), [
            *_all(_POLE, "has fallen over|has been dropped|has fallen down|has tipped over"),
            "a cart with a stick that has fallen over", "the cart has dropped the rod",
        ]),
        (CARTPOLE, "angle", ((180, 180),), [
            *_all(_POLE, "hangs down|points down at the ground|dangles|is upside down|"
                         "hangs straight down below the wagon"),
            "a hanging pole", "upside down", "a pendulum at rest",
        ]),
        (CARTPOLE, "cart", ((-2.4, -1.8),), _all(
            "the cart|the wagon|the trolley",
            "is at the left edge|is far to the left of the picture|is at the left end of the track",
        )),
        (CARTPOLE, "cart", ((-0.3, 0.3),), _all(
            "the cart|the wagon|the trolley",
            "is in the centre|is in the middle of the track|is in the middle of the picture")),
        (CARTPOLE, "cart", ((1.8, 2.4),), _all(
            "the cart|the wagon|the trolley",
            "is at the right edge|is far to the right of the picture|"
            "is at the right end of the track")),
        (CARTPOLE, None, (), [
            "a stick and a wagon", "a trolley with a rod", "a pole joined to a trolley",
            "a cart with wheels and a stick", "the cart on its track", "a wagon and its pole",
            "a cart on rails", "a pole on a hinge", "a drawing of a cart with a rod",
            "the classic control task with a cart that carries a pole", "a wagon on a line",
            "an inverted pendulum on a cart", "a bar and a trolley", "a trolley",
            "rod and wagon",
        ]),
        (MOUNTAIN_CAR, "position", ((0.45, 0.53),), [
            *_all(_CAR, "is at the summit|has reached the flag|is on top of the hill|"
                        "has arrived at the flag on the top|stands beside the flag|"
                        "has climbed the hill|is at the goal|is at the highest point|"
                        "is up on the hilltop|has driven all the way up"),
            "the car has reached the flag on top of the hill", "a vehicle on the peak",
            "the summit of the mountain is reached", "reach the flag", "drive up to the flag",
            "the flag is right beside the vehicle", "an automobile at the top near a flag",
            "climb the hill", "on the summit by the flag", "the peak has been reached",
        ]),
        (MOUNTAIN_CAR, "position", ((-0.57, -0.47),), [
            *_all(_CAR, "is in the valley|is at the bottom|is at the lowest point|"
                        "is down between the hills|stands at the foot of the hill|"
                        "is in the dip between two slopes"),
            "down in the valley", "the bottom of the valley",
        ]),
        (MOUNTAIN_CAR, "position", ((-0.1, 0.1),), [
            *_all(_CAR, "is halfway up the right slope|is on the right slope|"
                        "is in the middle of the climb|drives up the right hillside"),
        ]),
        (MOUNTAIN_CAR, "position", ((-1.2, -0.85),), [
            *_all(_CAR, "is on the left hill|is on the left slope|is at the left edge|"
                        "is far to the left|has rolled back up the left hillside"),
        ]),
        (MOUNTAIN_CAR, None, (), [
            "a car and a hill", "a vehicle among hills", "an automobile between two slopes",
            "a car that drives through hilly country", "a road vehicle and a slope", "hills",
            "a picture of a car with hills and a flag", "an automobile in the highlands",
            "a vehicle", "a mountain and an automobile", "a vehicle in a mountain landscape",
            "a slope",
            "the classic control task with a car that is too weak for a slope",
        ]),
        (None, None, (), [
            "a robot arm opens a drawer", "a cat sleeps on a sofa", "press the red button",
            "a plate of food", "a humanoid robot", "a person with both arms raised", "two people",
            "an empty room with a window", "push the block into the box", "a computer program",
            "a dog runs along the beach", "close the door", "a black screen", "letters and numbers",
        ]),
    )
)
TRAINING_SENTENCES = tuple(sentence for meaning in MEANINGS for sentence in meaning.sentences)

# Held out: prompts and baselines. The first of each is the paper's own.
PROMPTS: dict[str, tuple[tuple[str, str], ...]] = {
    CARTPOLE: (
        ("pole vertically upright on top of the cart", "pole and cart"),
        ("a cart balancing a long pole straight upwards", "a picture of the cart and its pole"),
        ("the beam is standing vertically over the little wagon", "a beam and a little wagon"),
    ),
    MOUNTAIN_CAR: (
        ("a car at the peak of the mountain, next to the yellow flag", "a car in the mountain"),
        ("the small car made it to the mountain top where the flag is",
         "the small car in the mountains"),
        ("a black automobile on the crest beside a flagpole",
         "a black automobile in the landscape"),
    ),
}
