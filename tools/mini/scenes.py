"""The pictures that the embedded VLM `mini` learns from and is measured on.

`collect_task` draws a Meta-World task: what its expert, failing experts and random behaviour see,
and pictures in which the robot of one moment meets the objects of another. `collect_invented` draws
scenes that no task has: a body of a few boxes, cylinders and balls that slides, turns or is carried
in front of the robot of a training task. Every picture comes with where the hand and the moving
parts are, so that any two pictures of a scene can be compared (`scene_distance`).
"""

from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from common.envs.metaworld_suite import PHYSICS, make_env
from common.envs.metaworld_tasks import ENV_IDS, MT10
from common.envs.rendering import Camera, Renderer
from common.vlms.mini import CROP_LEFT, CROP_SIZE, CROP_TOP, FRAME_SIZE
from tools.reward_report.episodes import play_episode

DATA = Path("data/mini")
EVALUATION = DATA / "evaluation"  # pictures that nothing is trained on, the scenes' own colours
TRAINING_TASKS = tuple(task for task in ENV_IDS if task not in MT10)
MARGIN = 6  # pixels around what `mini` sees that are kept, so that training can shift its view
STORED_SIZE = CROP_SIZE + 2 * MARGIN
NOISE_LEVELS = (0.0, 0.1, 0.3, 0.5, 0.7)
FRAMES_PER_EPISODE = 24
GROUP = 4  # episodes with one goal, of which the last one fails
FAILURES = ("wander", "drift", "give-up")
ROBOT_JOINTS = ("right_j", "r_close", "l_close")
# What a picture shows. COUNTERFACTUAL: the robot where it is at a late step, the objects where they
# were at the start; MIXED: the robot of any step and the objects of another.
ORDINARY, COUNTERFACTUAL, MIXED = 0, 1, 2
NUM_PARTS = 8  # moving geoms whose places are kept
OBJECT_WEIGHT, GRASP_WEIGHT, HAND_WEIGHT = 5.0, 1.5, 1.0


class Places(NamedTuple):
    """Where things are in n pictures, metres."""

    hand: np.ndarray  # [n, 3]
    parts: np.ndarray  # [n, NUM_PARTS, 4, 3]: centre and three axis tips of each moving geom; NaN


def scene_distance(a: Places, b: Places) -> np.ndarray:
    """How far the pictures `a` [n] are from the goal pictures `b` [n] of the same scene, [n].

    The parts that moved count most, then where the hand is relative to the part that it is nearest
    to in the goal, which leads it to that part before it has moved, and last the hand itself.
    """
    hand = np.linalg.norm(a.hand - b.hand, axis=-1)
    moved = np.linalg.norm(a.parts - b.parts, axis=-1).mean(-1)  # [n, NUM_PARTS]
    moved = np.nan_to_num(moved, nan=0.0).max(-1)
    to_parts = np.linalg.norm(b.parts[:, :, 0] - b.hand[:, None], axis=-1)
    grasped = np.nan_to_num(to_parts, nan=np.inf).argmin(-1)
    rows = np.arange(len(hand))
    offset = (a.hand - a.parts[rows, grasped, 0]) - (b.hand - b.parts[rows, grasped, 0])
    grasp = np.linalg.norm(offset, axis=-1)
    grasp = np.where(np.isnan(grasp), hand, grasp)  # nothing moves in this scene
    return OBJECT_WEIGHT * moved + GRASP_WEIGHT * grasp + HAND_WEIGHT * hand


class Scene:
    """A model that is set to a state and drawn."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData):
        self.model, self.data = model, data
        self.renderer = Renderer(model, Camera(FRAME_SIZE))
        self.robot = np.zeros(model.nq, bool)
        movable = np.zeros(model.nbody, bool)
        for joint in (model.joint(i) for i in range(model.njnt)):
            if joint.name.startswith(ROBOT_JOINTS):
                self.robot[joint.qposadr[0]] = True
            else:
                movable[joint.bodyid[0]] = True
        for body in range(1, model.nbody):  # parents come first
            movable[body] |= movable[model.body_parentid[body]]
        geoms = np.flatnonzero(movable[model.geom_bodyid])
        drawn = geoms[model.geom_group[geoms] < 3]
        size = model.geom_rbound[drawn]
        self.parts = drawn[np.argsort(-size, kind="stable")][:NUM_PARTS]
        self.reach = np.maximum(model.geom_rbound[self.parts], 0.03)
        self._original = {name: getattr(model, name).copy() for name in VARIED}
        pads = ("rightpad_geom", "leftpad_geom")
        self._pads = [mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_GEOM, name) for name in pads]
        self.rows: dict[str, list] = {name: [] for name in (
            "frames", "hand", "grip", "parts", "robot", "episode", "group", "step", "success_step",
            "success", "reward", "kind")}

    def vary(self, rng: np.random.Generator | None) -> None:
        """Other colours, light and camera for the pictures to come; None: the scene's own."""
        for name, value in self._original.items():
            getattr(self.model, name)[:] = value
        if rng is None:
            return
        tint = rng.uniform(0.6, 1.2, (self.model.nmat, 3))
        self.model.mat_rgba[:, :3] = np.clip(self.model.mat_rgba[:, :3] * tint, 0, 1)
        recoloured = rng.random(self.model.ngeom) < 0.4
        colours = rng.uniform(0, 1, (self.model.ngeom, 3))
        self.model.geom_rgba[recoloured, :3] = (
            0.5 * self.model.geom_rgba[recoloured, :3] + 0.5 * colours[recoloured])
        self.model.light_diffuse[:] *= rng.uniform(0.6, 1.2)
        self.model.light_pos[:] += rng.normal(0, 0.3, self.model.light_pos.shape)
        self.model.cam_pos[:] += rng.normal(0, 0.02, self.model.cam_pos.shape)
        self.model.cam_fovy[:] *= rng.uniform(0.97, 1.03)

    def add(self, *, episode: int = 0, group: int = 0, step: int = 0, success_step: int = -1,
            success: bool = False, reward: float = np.nan, kind: int = ORDINARY) -> None:
        """Draw what `data` holds, and keep it."""
        mujoco.mj_forward(self.model, self.data)
        frame = self.renderer.render(self.model, self.data)
        top, left = CROP_TOP - MARGIN, CROP_LEFT - MARGIN
        parts = np.full((NUM_PARTS, 4, 3), np.nan, np.float32)
        centre = self.data.geom_xpos[self.parts]
        axes = self.data.geom_xmat[self.parts].reshape(-1, 3, 3).transpose(0, 2, 1)
        parts[: len(self.parts), 0] = centre
        parts[: len(self.parts), 1:] = centre[:, None] + axes * self.reach[:, None, None]
        pads = self.data.geom_xpos[self._pads]
        values = {
            "frames": frame[top : top + STORED_SIZE, left : left + STORED_SIZE],
            "hand": self.data.body("hand").xpos.copy(),
            "grip": np.linalg.norm(pads[0] - pads[1]), "parts": parts,
            "robot": self.data.qpos[self.robot].copy(), "episode": episode, "group": group,
            "step": step, "success_step": success_step, "success": success, "reward": reward,
            "kind": kind,
        }
        for name, value in values.items():
            self.rows[name].append(value)


VARIED = ("mat_rgba", "geom_rgba", "light_diffuse", "light_pos", "cam_pos", "cam_fovy")


def collect_task(path: Path, episodes: int, seed: int, varied: bool) -> Path:
    """Draw `episodes` episodes of the task after which `path` is named, in groups with one goal.

    Three of a group are the expert's, with different noise; one fails: it wanders, drifts, or is an
    expert that gives up on its way. `varied`: each group has colours, light and camera of its own.
    """
    if path.exists():
        return path
    task = path.stem
    rng = np.random.default_rng((seed, ENV_IDS.index(task)))
    env = make_env(task, seed=seed, index=ENV_IDS.index(task), goal="random", show_goal=True)
    env.reset()
    scene = Scene(env.model, env.data)

    def set_state(physics: np.ndarray, objects: np.ndarray | None = None) -> None:
        mujoco.mj_setState(env.model, env.data, physics, PHYSICS)
        if objects is not None:
            env.data.qpos[~scene.robot] = objects[~scene.robot]

    robots: list[np.ndarray] = []  # states of this group
    for episode in range(episodes):
        group = episode // GROUP
        env._freeze_rand_vec = episode % GROUP > 0  # the first of a group draws its goal
        noise: float | str = NOISE_LEVELS[episode % len(NOISE_LEVELS)]
        give_up = 10_000
        if episode % GROUP == 0:
            robots = []
            scene.vary(rng if varied and rng.random() < 0.6 else None)
        if episode % GROUP == GROUP - 1:
            noise = FAILURES[group % len(FAILURES)]
            if noise == "give-up":
                noise, give_up = 0.1, int(rng.uniform(10, 60))
        states, success, rewards = play_episode(env, task, noise, rng, give_up=give_up)
        success_step = int(np.argmax(success)) if success.any() else -1
        last = success_step if success_step > 0 else len(states) - 1
        steps = np.unique(np.linspace(0, last, FRAMES_PER_EPISODE).round().astype(int))
        after = np.flatnonzero(success)[1::4] if success.any() else []
        objects = []
        about = {"episode": episode, "group": group, "success_step": success_step}
        for step in [*steps, *after]:
            set_state(states[step])
            objects.append(env.data.qpos.copy())
            scene.add(step=step, success=success[step], reward=rewards[step], **about)
        robots += [states[step] for step in steps]
        moved = [np.abs(q - objects[0])[~scene.robot].max(initial=0) > 0.02 for q in objects]
        if success_step > 0 and any(moved):
            for i in [i for i, step in enumerate(steps) if moved[i]][-6:]:
                set_state(states[steps[i]], objects[0])
                scene.add(step=steps[i], kind=COUNTERFACTUAL, **about)
            for _ in range(12):
                set_state(robots[rng.integers(len(robots))], objects[rng.integers(len(objects))])
                scene.add(kind=MIXED, **about)
    scene.renderer.close()
    write(path, {name: np.array(values) for name, values in scene.rows.items()})
    return path


# ------------------------------------------------------------------------ invented scenes

COLOURS = {
    "red": (0.85, 0.1, 0.1), "green": (0.1, 0.6, 0.15), "blue": (0.1, 0.2, 0.85),
    "yellow": (0.9, 0.8, 0.1), "orange": (0.95, 0.5, 0.1), "purple": (0.5, 0.15, 0.6),
    "white": (0.95, 0.95, 0.95), "black": (0.08, 0.08, 0.08), "grey": (0.5, 0.5, 0.5),
    "brown": (0.45, 0.28, 0.12), "pink": (0.95, 0.55, 0.7),
}
BOX, CYLINDER, BALL, ROD = (mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CYLINDER,
                            mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_CAPSULE)
NOUNS = {BOX: ("box", "block", "cube"), CYLINDER: ("cylinder", "can", "drum"),
         BALL: ("ball", "sphere"), ROD: ("rod", "bar", "stick")}
# By the direction in which it goes, as the robot sees it: x to its right, y away from it.
VERBS = {
    (0, 1): ("Slide {} to the right.", "Move {} to the right-hand side."),
    (0, -1): ("Slide {} to the left.", "Move {} to the left-hand side."),
    (1, 1): ("Push {} away from the robot.", "Shove {} forwards."),
    (1, -1): ("Pull {} towards the robot.", "Drag {} back."),
    (2, 1): ("Lift {}.", "Raise {} into the air."),
    (2, -1): ("Press {} down.", "Lower {}."),
}
TURNS = {1: ("Turn {} counter-clockwise.", "Rotate {} anticlockwise."),
         -1: ("Turn {} clockwise.", "Rotate {} clockwise.")}


def random_geom(rng: np.random.Generator, largest: float) -> tuple[int, np.ndarray]:
    kind = (BOX, BOX, CYLINDER, BALL, ROD)[rng.integers(5)]
    size = rng.uniform(0.012, largest, 3)
    if kind == BOX and rng.random() < 0.4:
        size[rng.integers(3)] = 0.008  # a panel
    return kind, size


def invented_model(base: str, rng: np.random.Generator):
    """A training task's robot, table and, half of the time, objects, and an invented mechanism.

    Returns:
        (model; how far its joint goes, m or radians; sentences for going there, and for going back,
        either of which may be none).
    """
    env = make_env(base, seed=0, index=0, goal="random", show_goal=True)
    spec = mujoco.MjSpec.from_file(env.model_name)
    place = np.array([rng.uniform(-0.3, 0.3), rng.uniform(0.45, 0.85), 0.0])
    for _ in range(rng.integers(0, 3)):  # a frame that does not move
        kind, size = random_geom(rng, 0.1)
        spec.worldbody.add_geom(
            type=kind, size=size, pos=place + np.array([*rng.uniform(-0.12, 0.12, 2), size[-1]]),
            rgba=[*rng.uniform(0, 1, 3), 1], contype=0, conaffinity=0)
    mode = ("slide", "slide", "hinge", "carry")[rng.integers(4)]
    height = rng.uniform(0.02, 0.2) if mode != "carry" else 0.02
    body = spec.worldbody.add_body(name="invented", pos=[*place[:2], height], mass=1,
                                   inertia=[1, 1, 1])
    body.explicitinertial = True
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    rgb = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 0.05, 3), 0, 1)
    lever = rng.uniform(0.04, 0.14) if mode == "hinge" else 0.0
    turn = rng.uniform(0, 2 * np.pi)
    arm = lever * np.array([np.cos(turn), np.sin(turn), 0])
    main_kind, main_size = random_geom(rng, 0.035 if mode == "carry" else 0.08)
    body.add_geom(type=main_kind, size=main_size, pos=arm, rgba=[*rgb, 1], contype=0,
                  conaffinity=0, mass=0.1)
    for _ in range(rng.integers(0, 2)):
        kind, size = random_geom(rng, 0.05)
        body.add_geom(type=kind, size=size, pos=arm + rng.uniform(-0.06, 0.06, 3), contype=0,
                      rgba=[*rng.uniform(0, 1, 3), 1], conaffinity=0, mass=0.1)
    handle = arm * rng.uniform(0.8, 1.5) + (
        rng.uniform(-0.07, 0.07, 3) if mode != "carry" else np.zeros(3))
    kind, size = random_geom(rng, 0.025)
    body.add_geom(name="invented_handle", type=kind, size=size, pos=handle, contype=0,
                  rgba=[*(rgb if rng.random() < 0.5 else rng.uniform(0, 1, 3)), 1], conaffinity=0,
                  mass=0.1)
    noun = f"the {colour} {rng.choice(NOUNS[main_kind])}"
    axis_number, sign = rng.integers(3), int(rng.choice((-1, 1)))
    if mode == "hinge":
        joint, extent = mujoco.mjtJoint.mjJNT_HINGE, rng.uniform(0.6, 1.8)
        axis_number = 2 if rng.random() < 0.7 else rng.integers(2)
        axis = np.eye(3)[axis_number] * sign
        there, back = (TURNS[sign], TURNS[-sign]) if axis_number == 2 else ((), ())
    else:
        joint = mujoco.mjtJoint.mjJNT_SLIDE
        extent = rng.uniform(0.06, 0.25) if axis_number < 2 else rng.uniform(0.04, 0.18)
        axis = np.eye(3)[axis_number] * sign + rng.normal(0, 0.15, 3)
        axis /= np.linalg.norm(axis)
        there, back = VERBS[axis_number, sign], VERBS[axis_number, -sign]
    body.add_joint(name="invented_joint", type=joint, axis=axis, pos=[0, 0, 0])
    model = spec.compile()
    # Objects of the training task are clutter, or not there; goal markers never are.
    if rng.random() < 0.5:
        own = [model.joint(i).bodyid[0] for i in range(model.njnt)
               if not model.joint(i).name.startswith((*ROBOT_JOINTS, "invented"))]
        hidden = np.isin(model.geom_bodyid, own)
        model.geom_rgba[hidden, 3], model.geom_matid[hidden] = 0, -1
    model.site_rgba[:, 3] = 0
    return model, extent, tuple([verb.format(noun) for verb in way] for way in (there, back))


def draw_invented(
    rng: np.random.Generator, robots: np.ndarray, hands: np.ndarray, group: int
) -> tuple[dict[str, np.ndarray], tuple[list[str], list[str]]]:
    """55 pictures of one invented scene, and its sentences there and back.

    `step` is 100 x how far the joint has gone; `success`: it is at its end and the hand is there.

    Args:
        robots: joint positions [n, 9] that occur in training tasks, and where they bring the hand.
        group: number of the scene.
    """
    model, extent, sentences = invented_model(str(rng.choice(TRAINING_TASKS)), rng)
    data = mujoco.MjData(model)
    scene = Scene(model, data)
    scene.parts = np.flatnonzero(model.geom_bodyid == model.body("invented").id)[:NUM_PARTS]
    scene.reach = np.maximum(model.geom_rbound[scene.parts], 0.03)
    scene.vary(rng)
    joint, handle = model.joint("invented_joint"), model.geom("invented_handle").id
    start = data.qpos.copy()

    def pose(share: float, robot: np.ndarray) -> None:
        data.qpos[:] = start
        data.qpos[joint.qposadr[0]] = share * extent
        data.qpos[scene.robot] = robot

    def at_handle(share: float) -> np.ndarray:
        """A robot whose hand is at the handle, as near as those that there are."""
        pose(share, robots[0])
        mujoco.mj_kinematics(model, data)
        target = data.geom_xpos[handle] + [0, 0, 0.06] + rng.normal(0, 0.015, 3)
        nearest = np.argsort(np.linalg.norm(hands - target, axis=-1))[:3]
        return robots[rng.choice(nearest)]

    def anywhere() -> np.ndarray:
        return robots[rng.integers(len(robots))]

    def add(share: float, robot: np.ndarray, kind: int, success: bool = False) -> None:
        pose(share, robot)
        scene.add(group=group, step=round(100 * share), kind=kind, success=success)

    for share in np.linspace(0, 1, 8).repeat(2):
        add(share, at_handle(share), ORDINARY)
    for _ in range(4):
        add(1.0, at_handle(1.0), ORDINARY, success=True)
    for share in rng.uniform(0.4, 1, 8):
        add(0.0, at_handle(share), COUNTERFACTUAL)
    add(rng.uniform(0, 0.5), at_handle(1.0), COUNTERFACTUAL)
    for _ in range(8):
        add(0.0, anywhere(), ORDINARY)
    for _ in range(18):
        add(rng.uniform(0, 1), anywhere(), MIXED)
    scene.renderer.close()
    return {name: np.array(values) for name, values in scene.rows.items()}, sentences


def collect_invented(path: Path, number: int, per_file: int) -> Path:
    """Draw `per_file` invented scenes; a scene is a group."""
    if path.exists():
        return path
    rng = np.random.default_rng((99, number))
    robots, hands = [], []
    for task in rng.choice(TRAINING_TASKS, 8, replace=False):
        with np.load(DATA / f"{task}.npz") as rows:
            robots.append(rows["robot"])
            hands.append(rows["hand"])
    scenes = [
        draw_invented(rng, np.concatenate(robots), np.concatenate(hands), number * per_file + k)
        for k in range(per_file)
    ]
    columns = {name: np.concatenate([rows[name] for rows, _ in scenes]) for name in scenes[0][0]}
    there, back = (np.array(["|".join(sentences[way]) for _, sentences in scenes])
                   for way in (0, 1))
    write(path, columns | {"there": there, "back": back})
    return path


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
