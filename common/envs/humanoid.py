"""The humanoid of the VLM-RM paper in eight poses (Rocamonde et al., ICLR 2024, appendix C.2).

Gymnasium's Humanoid-v5 (the paper: v4) with episodes of 100 steps, no termination, other colours
and a camera that stands still. An environment's own reward is 1 while the robot holds the pose and
0 otherwise, so an episode's return is the number of steps in the pose; from 50 on the episode is a
success (Table 2). A VLM's reward knows nothing of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv

EPISODE_LENGTH = 100
STEPS_FOR_SUCCESS = 50  # of an episode, in the pose
BASELINE_PROMPT = "a humanoid robot"  # Table 3
# Pictures: the original's, other colours, and these with a camera that stands still (Figure 3).
Look = Literal["original", "textured", "camera"]
LOOKS: tuple[Look, ...] = get_args(Look)
STILL_CAMERA = {  # from the front, a little to the side
    "distance": 2.9, "lookat": np.array((0.0, 0.0, 0.8)), "elevation": -15.0, "azimuth": 150.0,
}
FLOOR = 0.05  # metres: what is lower than this touches the floor
COLOURS = {  # of the geoms that have this in their name, RGB
    "head": (0.85, 0.87, 0.9), "torso": (0.75, 0.77, 0.8), "waist": (0.25, 0.26, 0.3),
    "butt": (0.55, 0.57, 0.6), "thigh": (0.75, 0.77, 0.8), "shin": (0.3, 0.45, 0.65),
    "foot": (0.2, 0.2, 0.22), "uarm": (0.75, 0.77, 0.8), "larm": (0.3, 0.45, 0.65),
    "hand": (0.2, 0.2, 0.22),
}


class Body:
    """What the poses' conditions look at: places in metres, angles in degrees, of one state."""

    SIDES = ("right", "left")

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData):
        self.model, self.data = model, data

    def joint(self, name: str) -> float:
        """A hinge's angle, degrees."""
        return float(np.degrees(self.data.joint(name).qpos[0]))

    def bottom(self, geom: str) -> float:
        """Height of a sphere's or capsule's lowest point above the floor."""
        end = self.model.geom(geom).size[1] * abs(self.data.geom(geom).xmat[8])
        if self.model.geom(geom).type[0] == mujoco.mjtGeom.mjGEOM_SPHERE:
            end = 0
        return float(self.data.geom(geom).xpos[2] - end - self.model.geom(geom).size[0])

    def knee(self, side: str) -> np.ndarray:
        """Where the knee is, [3]."""
        return self.data.joint(f"{side}_knee").xanchor

    def seen_from(self, part: str, place: np.ndarray) -> np.ndarray:
        """A place in the axes of a part of the body: forward, left, up of its centre, [3]."""
        body = self.data.body(part)
        return body.xmat.reshape(3, 3).T @ (place - body.xpos)

    def hand(self, side: str, part: str = "torso") -> np.ndarray:
        """A hand in the axes of a part of the body, [3]."""
        return self.seen_from(part, self.data.geom(f"{side}_hand").xpos)

    def elbow(self, side: str) -> float:
        """How far an arm is bent, degrees; 0: straight."""
        upper = self.data.body(f"{side}_lower_arm").xpos - self.data.body(f"{side}_upper_arm").xpos
        lower = self.data.geom(f"{side}_hand").xpos - self.data.body(f"{side}_lower_arm").xpos
        cosine = upper @ lower / np.linalg.norm(upper) / np.linalg.norm(lower)
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    @cached_property
    def upright(self) -> float:
        """1: the torso points up; -1: down."""
        return float(self.data.body("torso").xmat[8])

    @cached_property
    def speed(self) -> float:
        """Of the torso, metres a second."""
        return float(np.linalg.norm(self.data.qvel[:3]))

    def on_floor(self, geom: str) -> bool:
        return self.bottom(geom) < FLOOR

    def thigh(self, side: str) -> np.ndarray:
        """The thigh's direction in the pelvis's axes, from hip to knee, a unit vector [3]."""
        hip = self.data.body(f"{side}_thigh").xpos
        direction = self.seen_from("pelvis", self.knee(side)) - self.seen_from("pelvis", hip)
        return direction / np.linalg.norm(direction)


# Table 2's conditions. Its rater looked at videos; these look at the state.


def kneels(body: Body) -> bool:
    """Both knees on the floor, the seat off it, upright, and not falling."""
    return (
        all(body.knee(side)[2] < 0.06 + FLOOR and body.joint(f"{side}_knee") < -60
            for side in body.SIDES)
        and not body.on_floor("butt") and body.upright > 0.8 and body.speed < 1
    )


def sits_in_lotus(body: Body) -> bool:
    """Seated, knees bent and outwards, feet inwards.

    Table 2 wants the knees on the floor. This body's hips can turn a thigh about its length by 25
    degrees only, too little for shins that lie flat before it: knees below 45 cm are enough.
    """
    feet = [body.seen_from("torso", body.data.geom(f"{side}_foot").xpos)[1] for side in body.SIDES]
    knees = [body.seen_from("torso", body.knee(side))[1] for side in body.SIDES]
    return (
        body.bottom("butt") < 0.15 and body.upright > 0.7
        and all(body.joint(f"{side}_knee") < -90 and body.knee(side)[2] < 0.45
                for side in body.SIDES)
        and knees[1] - knees[0] > 0.5 and abs(feet[1] - feet[0]) < 0.7 * (knees[1] - knees[0])
    )


def stands(body: Body) -> bool:
    """Upright, a foot on the floor, legs straight enough to be high, not falling.

    The torso is 1.29 m above the floor when the legs are straight.
    """
    return (
        body.upright > 0.9 and body.speed < 1
        and any(body.on_floor(f"{side}_foot") for side in body.SIDES)
        and body.data.body("torso").xpos[2] > 1.2
    )


def raises_arms(body: Body) -> bool:
    """Standing, both hands higher than the head's top."""
    return stands(body) and all(body.hand(side)[2] > 0.28 for side in body.SIDES)


def does_splits(body: Body) -> bool:
    """Seated, legs straight, on the floor, to the sides and more than 100 degrees apart."""
    right, left = (body.thigh(side) for side in body.SIDES)
    angle = np.degrees(np.arccos(np.clip(right @ left, -1, 1)))
    return (
        body.bottom("butt") < 0.15 and body.upright > 0.5
        and angle > 100 and right[1] < -0.5 and left[1] > 0.5
        and all(body.joint(f"{side}_knee") > -30 and body.bottom(f"{side}_foot") < 0.2
                for side in body.SIDES)
    )


def has_hands_on_hips(body: Body) -> bool:
    """Standing, arms bent, each hand within 12 cm of the outer side of its hip."""
    return stands(body) and all(
        body.elbow(side) > 40
        and np.linalg.norm(body.hand(side, "pelvis") - (0.0, outwards, 0.0)) < 0.12
        for side, outwards in (("right", -0.2), ("left", 0.2))
    )


def crosses_arms(body: Body) -> bool:
    """Standing, hands before the chest, each of them past the middle on the other's side."""
    right, left = (body.hand(side) for side in body.SIDES)
    return (
        stands(body) and right[1] > 0.02 and left[1] < -0.02
        and all(hand[0] > 0.08 and -0.25 < hand[2] < 0.15 for hand in (right, left))
    )


def stands_on_one_leg(body: Body) -> bool:
    """Standing, one foot on the floor and the other at least 15 cm above it."""
    low, high = sorted(body.bottom(f"{side}_foot") for side in body.SIDES)
    return stands(body) and low < FLOOR and high > 0.15


@dataclass(frozen=True)
class Pose:
    """One of Table 1's tasks.

    Attributes:
        prompt: Table 3's.
        holds: Table 2's condition.
        joints: an example, in degrees; joints that are not named are straight. A joint without a
            side is mirrored to both.
    """

    prompt: str
    holds: Callable[[Body], bool]
    joints: dict[str, float]


POSES = {
    "Kneeling": Pose("a humanoid robot kneeling", kneels, {"knee": -95.0}),
    "Lotus": Pose(
        "a humanoid robot seated down, meditating in the lotus position", sits_in_lotus,
        {"hip_x": -20.0, "hip_y": -107.0, "hip_z": -52.0, "knee": -159.0},
    ),
    "StandingUp": Pose("a humanoid robot standing up", stands, {}),
    "ArmsRaised": Pose(
        "a humanoid robot standing up, with both arms raised", raises_arms,
        {"shoulder1": -80.0, "shoulder2": 20.0, "elbow": -85.0},
    ),
    "Splits": Pose(
        "a humanoid robot practicing gymnastics, doing the side splits", does_splits,
        {"hip_x": -22.0, "hip_y": -85.0, "hip_z": -58.0},
    ),
    "HandsOnHips": Pose(
        "a humanoid robot standing up with hands on hips", has_hands_on_hips,
        {"shoulder1": 48.0, "shoulder2": -64.0, "elbow": -31.0},
    ),
    "ArmsCrossed": Pose(
        "a humanoid robot standing up, with its arms crossed", crosses_arms,
        {"shoulder1": 57.0, "shoulder2": 20.0, "elbow": -20.0},
    ),
    "OneLeg": Pose(
        "a humanoid robot standing up on one leg", stands_on_one_leg,
        {"right_hip_y": -60.0, "right_knee": -80.0},
    ),
}


class PosingHumanoid(HumanoidEnv):
    """Gymnasium's humanoid, rewarded with 1 for each step in which it holds a pose.

    Args:
        pose: one of `POSES`.
        look: one of `LOOKS`.
        options: of HumanoidEnv.
    """

    def __init__(self, pose: str, look: Look = "camera", **options: Any):
        self.holds = POSES[pose].holds
        self.steps_in_pose = 0  # of the running episode
        if look == "camera":
            options["default_camera_config"] = STILL_CAMERA
        super().__init__(terminate_when_unhealthy=False, **options)
        if look != "original":
            _paint(self.model)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, _, _, _, info = super().step(action)
        mujoco.mj_kinematics(self.model, self.data)  # places as they are after the last substep
        holds = bool(self.holds(Body(self.model, self.data)))
        self.steps_in_pose += holds
        success = self.steps_in_pose >= STEPS_FOR_SUCCESS
        return obs, float(holds), False, False, info | {"success": success}

    def reset_model(self) -> np.ndarray:
        self.steps_in_pose = 0
        return super().reset_model()


def set_pose(
    env: PosingHumanoid, pose: str, share: float = 1.0, rng: np.random.Generator | None = None,
    noise: float = 0.0,
) -> bool:
    """Put the robot into a pose, on the floor and at rest; whether the condition of `env` holds.

    Args:
        pose: one of `POSES`.
        share: of the way to it from standing.
        noise: standard deviation that is added to each joint, degrees, from `rng`: most of it
            alike on both sides, so that both knees can touch the floor.
    """
    model, data = env.model, env.data
    qpos = model.qpos0.copy()
    angles, alike = POSES[pose].joints, {}
    for joint in range(1, model.njnt):  # 0: the free joint of the torso
        name = model.joint(joint).name
        side, _, part = name.partition("_")
        angle = share * angles.get(name, angles.get(part, 0.0))
        if noise:
            angle += alike.setdefault(part, rng.normal(0, noise)) + rng.normal(0, noise / 5)
        if side == "left" and part.startswith("shoulder"):  # whose axes are not mirrored
            angle = -angle
        qpos[model.jnt_qposadr[joint]] = np.clip(np.radians(angle), *model.jnt_range[joint])
    data.qpos[:], data.qvel[:] = qpos, 0
    mujoco.mj_kinematics(model, data)
    body = Body(model, data)
    data.qpos[2] -= min(body.bottom(model.geom(i).name) for i in range(1, model.ngeom))
    mujoco.mj_forward(model, data)
    return env.holds(Body(model, data))


def _paint(model: mujoco.MjModel) -> None:
    """Other colours for robot, floor and sky, in the drawing only; no texture file is needed.

    Neither shadows nor multisampling, which take nine tenths of the time without a GPU.
    """
    model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
    for i in range(model.ngeom):
        for part, colour in COLOURS.items():
            if part in model.geom(i).name:
                model.geom_matid[i] = -1
                model.geom_rgba[i, :3] = colour
    floor = model.material("MatPlane")
    floor.reflectance = 0.0
    floor.texrepeat = (30, 30)
    model.geom("floor").rgba = (1, 1, 1, 1)
    for texture in range(model.ntex):
        start = model.tex_adr[texture]
        shape = (model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture])
        pixels = model.tex_data[start : start + np.prod(shape)].reshape(shape)
        if model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
            pixels[:] = (176, 205, 232)
        elif model.tex_type[texture] == mujoco.mjtTexture.mjTEXTURE_2D:
            dark = pixels.mean(-1) < 100
            pixels[dark], pixels[~dark] = (150, 128, 100), (172, 150, 120)


def env_id(pose: str, look: Look = "camera") -> str:
    """`HumanoidKneeling-v0`; `HumanoidKneelingOriginal-v0` and `...Textured-v0` for Figure 3."""
    return f"Humanoid{pose}{'' if look == 'camera' else look.capitalize()}-v0"


def register() -> None:
    """Make the environments known to Gymnasium."""
    for pose in POSES:
        for look in LOOKS:
            gymnasium.register(
                env_id(pose, look), PosingHumanoid, max_episode_steps=EPISODE_LENGTH,
                kwargs={"pose": pose, "look": look},
            )
