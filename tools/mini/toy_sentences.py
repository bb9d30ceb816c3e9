"""What `toy` and `poses` are told about the pictures of VLM-RM's environments, and what they are
tested with.

No training sentence is a prompt or baseline of the VLM-RM paper's Table 3, one of the paraphrases,
or a near copy of one (tests/test_toy.py compares their content words).
"""

from itertools import product
from typing import NamedTuple

from common.envs.humanoid import BASELINE_PROMPT, POSES

CARTPOLE, MOUNTAIN_CAR, HUMANOID = "CartPole", "MountainCar", "Humanoid"


class Meaning(NamedTuple):
    """Sentences that describe the same states.

    Attributes:
        scene: what is to be seen; None: nothing that they know.
        quantity: the state that counts: angle (degrees, to the right), cart or position (the
            environment's), height (of the torso, metres), or a pose's name (how far from it, see
            `pretrain_toy.distances_to_poses`); None: the sentences describe every picture of the
            scene.
        intervals: of the quantity, which the sentences describe.
    """

    scene: str | None
    quantity: str | None
    intervals: tuple[tuple[float, float], ...]
    sentences: tuple[str, ...]


def _all(subjects: str, predicates: str, *others: str) -> list[str]:
    """Each subject with each predicate, both separated by bars; and other sentences."""
    pairs = product(subjects.split("|"), predicates.split("|"))
    return [*(" ".join(pair) for pair in pairs), *others]


_POLE = "the pole|the stick|the rod"
_CAR = "the car|the vehicle|the automobile"
_ROBOT = "the robot|the android|the figure|the mechanical man"
_IN_POSE = ((0.0, 0.05),)  # metres

_POSES = {
    "Kneeling": _all(
        _ROBOT, "is on its knees|kneels on the floor|is down on both knees|has sunk to its knees|"
                "rests on bent knees",
        "kneeling on the ground", "on its knees", "an android that kneels", "kneel down"),
    "Lotus": _all(
        _ROBOT, "sits cross-legged|sits on the ground with folded legs|meditates with crossed legs|"
                "sits like a monk|is in a yoga seat",
        "a cross-legged seat", "yoga on the floor", "a seated figure with folded legs",
        "an android that meditates", "meditation", "the lotus seat of yoga"),
    "StandingUp": _all(
        _ROBOT, "stands|stands on both feet|stands straight|is on its feet|stands tall and upright",
        "standing", "stand on both legs", "an android that stands",
        "upright on two straight legs"),
    "ArmsRaised": _all(
        _ROBOT, "holds its hands above its head|has its hands in the air|"
                "stretches its arms upwards|reaches for the ceiling|lifts its arms to the sky",
        "hands up", "raised arms", "arms above the head", "an android that lifts its hands"),
    "Splits": _all(
        _ROBOT, "does the splits|sits with its legs spread wide apart|"
                "stretches its legs out to the sides|straddles the floor|"
                "sits in a gymnast's straddle",
        "legs wide apart on the floor", "a gymnast's splits", "a straddle", "gymnastics",
        "an android with spread legs"),
    "HandsOnHips": _all(
        _ROBOT, "has its hands at its waist|stands with arms akimbo|puts its fists on its hips|"
                "holds its waist with both hands|"
                "stands there with bent elbows and hands on the waist",
        "arms akimbo", "hands at the hips", "an android with its hands at its waist"),
    "ArmsCrossed": _all(
        _ROBOT, "folds its arms|has its arms folded in front of the chest|"
                "crosses its forearms before its chest|hugs itself|keeps its arms folded",
        "folded arms", "crossed forearms", "an android with folded arms"),
    "OneLeg": _all(
        _ROBOT, "balances on a single foot|lifts a knee|stands like a stork|has a foot in the air|"
                "holds up a bent leg",
        "on a single leg", "a raised knee", "an android that balances on a foot"),
}

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
        *((HUMANOID, pose, _IN_POSE, sentences) for pose, sentences in _POSES.items()),
        (HUMANOID, "height", ((0.0, 0.3),), [
            *_all(_ROBOT, "lies on the ground|has fallen over|lies flat on its back|"
                          "is down on the floor|has collapsed"),
            "lying flat", "an android that has fallen", "a body on the floor",
        ]),
        (HUMANOID, None, (), [
            "a robot with arms and legs", "a machine shaped like a person", "an android",
            "a mechanical body", "a picture of an android", "a figure on a brown floor",
            "an artificial human before a blue sky", "a mannequin", "a puppet",
            "the walking robot of a physics simulator", "two legs and two arms", "a metal person",
            "a figure with a head, a torso, arms and legs", "a human-like machine",
        ]),
        (None, None, (), [
            "a robot arm opens a drawer", "a cat sleeps on a sofa", "press the red button",
            "a plate of food", "a bowl of fruit", "a boat at sea", "two people",
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
    HUMANOID: tuple((pose.prompt, BASELINE_PROMPT) for pose in POSES.values()),
}
