"""Check in less than a minute that this machine can train: one line per part, and what to do.

    python -m tools.doctor                                        # exit status 1: a line is red
    python -m tools.doctor --vlm liv --vlm-weights model.pt       # with another VLM
    python -m tools.doctor --prompt "Open it."                    # whether mini knows its words
    python -m tools.doctor --json                                 # for machines

A check is a function of the arguments that returns a `Finding`; what it raises is a red line too.
Packages are imported where they are used, so that a missing one spoils only what needs it.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from common.cores import num_cores, share_cores
from common.errors import UserError
from common.memory import host_memory
from common.system import GL_REMEDY
from tools import ROOT
from tools.setup.lock import PYTHONS, pins

GIB = 2**30

# Packages that training can do without. They are for EnvPool's engine, --track, videos, curves,
# statistics, reports and tests.
OPTIONAL = {"envpool", "wandb", "wandb-workspaces", "jinja2", "imageio", "imageio-ffmpeg",
            "matplotlib", "scipy", "pytest", "pytest-xdist", "hypothesis", "ruff", "uv"}
SLOW_FRAME = 20.0  # ms at 176 px in "fast": an idle core draws it in 4, a GPU in less
SEEDS = (0, 1)
MINI_ID = "mini-5fd8be6a9107-"  # begins with the hash of the shipped weights
# Cosine similarity of each golden frame ("fast"), as if mini saw all of it, and its instruction.
MINI_SCORES = {"drawer-open-v3": -0.1033, "window-close-v3": -0.1165, "pick-place-v3": 0.1121}
MINI_TOLERANCE = 0.005  # rounding as TF32 does gives 0.0001, a shift by a pixel 0.007 and more
# What a run takes beside its transitions, with its workers and FuRL's 200,000 frames of successes
# and failures (docs/benchmark.md): with mini, with an RN50.
PROCESSES, PROCESSES_RN50 = 1.95 * GIB, 3.1 * GIB

INSTALL = "make setup (or: pip install -r requirements.txt)"
NVIDIA_GL = ("install the driver's EGL (Debian, Ubuntu: libnvidia-gl-<driver version>); in a "
             "container set NVIDIA_DRIVER_CAPABILITIES=all")


@dataclass(frozen=True)
class Args:
    vlm: str = "mini"
    """VLM to load: mini, liv, clip, or an open_clip pair such as ViT-B-32/openai"""
    vlm_weights: str | None = None
    """local weights file for it"""
    prompt: str | None = None
    """also check that the VLM knows a word of it"""
    json: bool = False
    """print one JSON object instead of the table"""


class Finding(NamedTuple):
    """What a check has found; `remedy` says what to do about a status other than ok."""

    status: Literal["ok", "warn", "FAIL"]
    finding: str
    remedy: str = ""


class Check(NamedTuple):
    """`remedy` is for what `function` raises."""

    name: str
    function: Callable[[Args], Finding]
    remedy: str


# ---------------------------------------------------------------------------- packages


def read_pins(path: Path) -> dict[str, str]:
    """Package -> version of each `name==version` in a requirements file and those it includes."""
    found = (re.match(r"([\w.-]+)(?:\[\S+\])?==([^\s;]+)", line) for line in pins(path))
    return {pin[1]: pin[2] for pin in found if pin}


def check_packages(_args: Args) -> Finding:
    """Installed versions against the pins; the file for GPUs holds those for CPUs and JAX's."""
    wanted = read_pins(ROOT / "requirements-gpu.txt")
    wrong = {}
    for name, pin in wanted.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong[name] = f"{name} is not installed"
            continue
        if installed.split("+")[0] != pin:  # torch's builds are 2.15.0+cpu and the like
            wrong[name] = f"{name} {installed} is not the pinned {pin}"
    python = ".".join(map(str, sys.version_info[:3]))
    if python.rpartition(".")[0] not in PYTHONS:
        wrong["python"] = f"Python {python} is not one of {', '.join(PYTHONS)}"
    if not wrong:
        return Finding("ok", f"all {len(wanted)} as pinned in requirements.txt; Python {python}")
    status = "warn" if wrong.keys() <= OPTIONAL else "FAIL"
    return Finding(status, f"{'; '.join(wrong.values())} ({len(wanted)} pinned)", INSTALL)


# ----------------------------------------------------------------------------- drawing


@cache
def probe_gl() -> dict[str, str | bool]:
    """`gl_info()` of a process of its own, because a broken driver can crash it.

    Raises:
        UserError: it has crashed, or cannot draw.
    """
    code = "import json; from common.envs.rendering import gl_info; print(json.dumps(gl_info()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        reason = last.partition("UserError: ")[2]
        raise UserError(reason or f"drawing crashes (status {result.returncode}): {last[:200]}")
    return json.loads(result.stdout.splitlines()[-1])


def check_drawing(_args: Args) -> Finding:
    """Who draws, and milliseconds a frame on one core."""
    info = probe_gl()
    from common.envs.rendering import Camera, Renderer
    from tools.shared import golden

    env = golden.scene(golden.TASKS[0])
    ms = {}
    for quality in ("fast", "paper"):
        for size in (176, 224):
            renderer = Renderer(env.model, Camera(size, quality=quality))
            ms[quality, size] = 1e3 * median_seconds(
                partial(renderer.render, env.model, env.data), 15 if quality == "fast" else 3
            )
            renderer.close()
    speeds = ", ".join(f"{quality} {ms[quality, 176]:.3g}/{ms[quality, 224]:.3g}"
                       for quality in ("fast", "paper"))
    text = f"{info['vendor']}, {info['renderer']}; ms a frame at 176/224 px: {speeds}"
    if info["software"] and info["gpu_present"]:
        return Finding("FAIL", f"THE GPU DOES NOT DRAW, software does, 50 times slower: {text}",
                       NVIDIA_GL)
    if ms["fast", 176] > SLOW_FRAME:
        return Finding("warn", f"slow: {text}", "leave the cores to the run: an idle one takes "
                       "4 ms in software")
    return Finding("ok", text)


def check_golden_frames(_args: Args) -> Finding:
    """Fixed scenes against the stored pictures, in both qualities."""
    probe_gl()
    from tools.shared import golden

    worst, wrong = 0.0, []
    for task in golden.TASKS:
        for quality in ("fast", "paper"):
            picture, stored = golden.draw(task, quality), golden.read(task, quality)
            off = golden.difference(picture, stored)
            worst = max(worst, off)
            if off < golden.TOLERANCE:
                continue
            kind = {"upside down": picture[::-1], "mirrored": picture[:, ::-1],
                    "blue and red exchanged": picture[..., ::-1]}
            known = [name for name, changed in kind.items()
                     if golden.difference(changed, stored) < golden.TOLERANCE]
            wrong.append(f"{task} {quality} {', '.join(known) or f'differs by {off:.1f}'}")
    if wrong:
        return Finding(
            "FAIL", f"{len(wrong)} of {2 * len(golden.TASKS)} frames: {'; '.join(wrong)} (allowed "
            f"{golden.TOLERANCE:g} of 255)", "git status tests/golden common/envs; with both "
            "unchanged the GL driver is at fault: update it, or set LIBGL_ALWAYS_SOFTWARE=1")
    return Finding("ok", f"{2 * len(golden.TASKS)} frames as stored, so upright and RGB; mean "
                   f"difference at most {worst:.2f} of 255 (allowed {golden.TOLERANCE:g})")


# ------------------------------------------------------------------------ environments


def steps_to_success(env_id: str) -> int | None:
    """Steps that the scripted expert needs in `VecMetaWorld`; None: it has failed."""
    from common.envs import metaworld_tasks as tasks
    from common.envs.metaworld_suite import MAX_EPISODE_STEPS, VecMetaWorld

    policy = tasks.expert_policy(env_id)
    with contextlib.closing(VecMetaWorld(env_id, 1, seed=0, show_goal=True)) as envs:
        obs, _ = envs.reset()
        for number in range(1, MAX_EPISODE_STEPS + 1):
            step = envs.step(tasks.expert_action(policy, obs[0])[None])
            if step.success[0]:
                return number
            obs = step.obs
    return None


def check_experts(_args: Args) -> Finding:
    """Every scripted expert of MT10 succeeds."""
    from common.envs.metaworld_tasks import MT10

    with ThreadPoolExecutor(num_cores()) as pool:  # each waits for a worker process of its own
        steps = dict(zip(MT10, pool.map(steps_to_success, MT10), strict=True))
    failed = [env_id for env_id, count in steps.items() if count is None]
    if failed:
        return Finding("FAIL", f"{len(failed)} of {len(MT10)} experts fail: {', '.join(failed)}",
                       f"the simulation is not the tested one: {INSTALL}")
    return Finding("ok", f"{len(MT10)} of {len(MT10)} succeed on MT10, in {min(steps.values())} "
                   f"to {max(steps.values())} steps")


def check_determinism(_args: Args) -> Finding:
    """Environments of one seed agree bit by bit across processes, those of two seeds differ."""
    probe_gl()
    import numpy as np

    from common.envs.metaworld_suite import VecMetaWorld
    from common.envs.rendering import Camera

    actions = np.random.default_rng(0).uniform(-1, 1, (20, 4)).astype(np.float32)
    runs = []
    for seed in SEEDS:
        with contextlib.closing(VecMetaWorld(
            "pick-place-v3", 2, seed=seed, camera=Camera(64), num_workers=2, show_goal=True
        )) as envs:
            obs, frames = envs.reset()
            steps = [envs.step(np.stack([action, action])) for action in actions]
        obs = np.stack([obs, *(step.final_obs for step in steps)], 1)  # [2, 1 + steps, 39]
        frames = np.stack([frames, *(step.frames for step in steps)], 1)
        runs.append({"goals": obs[..., 36:], "trajectories": obs[..., :36], "frames": frames})
    problems = []
    for name in runs[0]:
        if any(first.tobytes() != second.tobytes() for first, second in (r[name] for r in runs)):
            problems.append(f"{name} of one seed differ")
        if np.array_equal(runs[0][name], runs[1][name]):
            problems.append(f"{name} of two seeds are the same")
    if problems:
        return Finding("FAIL", "; ".join(problems),
                       f"runs could not be repeated or resumed: {INSTALL}; update the GL driver")
    return Finding("ok", "goals, trajectories and frames: of one seed the same bit by bit in two "
                   "processes, of two seeds different")


# ------------------------------------------------------------------------------ models


@cache
def loaded_vlm(args: Args):
    from common.vlms import load_vlm

    return load_vlm(args.vlm, weights=args.vlm_weights)


def check_vlm(args: Args) -> Finding:
    """The VLM loads and embeds; for mini, as recorded."""
    import numpy as np

    from common.cache import cache_dir
    from common.envs.metaworld_tasks import MT10_INSTRUCTIONS
    from tools.shared import golden

    vlm = loaded_vlm(args)

    def embed(frames: np.ndarray) -> np.ndarray:  # as numpy: a GPU has finished then
        return np.asarray(vlm.embed_images(frames))

    images = embed(np.stack([golden.read(task, "fast") for task in MINI_SCORES]))
    texts = vlm.embed_text([MT10_INSTRUCTIONS[task] for task in MINI_SCORES])  # [3, D]
    frames = np.zeros((8, vlm.frame_size, vlm.frame_size, 3), np.uint8)
    ms = 1e3 / 8 * median_seconds(partial(embed, frames), 3)
    text = f"{vlm.id} on {vlm.device}, D = {vlm.embed_dim}, {ms:.1f} ms an image"
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    if not (np.isfinite(images).all() and np.isfinite(texts).all() and lengths.all()):
        return Finding("FAIL", f"embeddings are not finite, or zero: {text}",
                       "the weights are damaged: fetch them again")
    if args.prompt is not None and not vlm.knows(args.prompt):
        return Finding("warn", f"{vlm.name} knows no word of {args.prompt!r}: all such prompts are "
                       f"the same to it: {text}", "write the prompt in English words, or use "
                       "another --vlm")
    scores = (images * texts).sum(1) / lengths
    if vlm.name != "mini":
        return Finding("ok", f"{text}; embeddings are finite")
    if not vlm.id.startswith(MINI_ID):
        return Finding("FAIL", f"the weights are not the shipped ones ({MINI_ID}...): {text}",
                       "git checkout common/vlms, and leave out --vlm-weights")
    off = np.abs(scores - np.array(list(MINI_SCORES.values()))).max()
    if not off < MINI_TOLERANCE:
        return Finding("FAIL", f"scores of known pictures are off by {off:.3f} (allowed "
                       f"{MINI_TOLERANCE:g}): {text}", f"{INSTALL}; remove the cached prompts in "
                       f"{cache_dir() / 'prompts'}")
    return Finding("ok", f"{text}; {len(scores)} known pictures score as recorded")


def check_devices(_args: Args) -> Finding:
    """JAX and torch compute, on the GPU where there is one."""
    import jax
    import jax.numpy as jnp
    import torch

    from common.cli import check_device
    from common.envs.rendering import gpu_present
    from tools.setup.detect_gpu import problem

    check_device()
    torch_device = "cuda" if torch.cuda.is_available() else "cpu"
    text = (f"JAX {jax.__version__} on {', '.join(map(str, jax.devices()))}; torch "
            f"{torch.__version__} on {torch_device}")
    products = {"JAX": float((jnp.ones((64, 64)) @ jnp.ones((64, 64))).sum()),
                "torch": float((torch.ones(64, 64, device=torch_device) @
                                torch.ones(64, 64, device=torch_device)).sum())}
    wrong = [name for name, value in products.items() if value != 64**3]
    if wrong:
        return Finding("FAIL", f"{' and '.join(wrong)} computes wrong: {text}", INSTALL)
    if gpu_present() and jax.default_backend() == "cpu":
        return Finding("FAIL", f"there is a GPU that JAX does not see: {text}",
                       problem() or "make setup GPU=1 (or: pip install -r requirements-gpu.txt)")
    if gpu_present() and torch_device == "cpu":
        return Finding("warn", f"there is a GPU that torch does not see: {text}",
                       problem() or INSTALL)
    return Finding("ok", text)


# ------------------------------------------------------------------------------- space


def embed_dim(args: Args) -> int:
    """D of the VLM; of the paper's RN50 if it does not load, which is for its own line to say."""
    try:
        return loaded_vlm(args).embed_dim
    except Exception:
        return 1024


def replay_shapes(embed_dim: int) -> Any:
    """Shapes and dtypes of the ring that holds all transitions of a run; nothing is allocated."""
    import jax

    from common.envs.metaworld_suite import ACTION_DIM, OBS_DIM
    from common.flags import RunArgs
    from common.replay import Sizes, empty_ring, example_transition

    row = example_transition(Sizes(OBS_DIM, ACTION_DIM, embed_dim))
    return jax.eval_shape(partial(empty_ring, row, RunArgs.total_timesteps))


def check_memory(args: Args) -> Finding:
    """Memory for a default run's replay, which lies where JAX computes."""
    import jax

    from common.cli import check_device

    check_device()
    num_dims = embed_dim(args)
    leaves = jax.tree.leaves(replay_shapes(num_dims))
    replay = sum(x.size * x.dtype.itemsize for x in leaves)
    processes = PROCESSES if args.vlm == "mini" else PROCESSES_RN50
    free = host_memory().free
    places = {"memory": (free, replay + processes)}
    if device := jax.devices()[0].memory_stats():  # None on a CPU
        places = {"memory": (free, processes),
                  "GPU memory": (device["bytes_limit"] - device["bytes_in_use"], replay)}
    text = "; ".join(f"{free / GIB:.1f} GiB of {name} free, {need / GIB:.1f} needed"
                     for name, (free, need) in places.items())
    text += f" (the default replay at D = {num_dims}: {replay / GIB:.1f})"
    if any(free < need for free, need in places.values()):
        return Finding("FAIL", text, "end other programs, or train with a smaller --buffer-size")
    return Finding("ok", text)


def check_disk(args: Args) -> Finding:
    """Disk for the default run's last checkpoint."""
    from common.checkpoint import check_space, free_space, space_needed
    from common.flags import RunArgs

    rings, runs = {"transitions": replay_shapes(embed_dim(args))}, Path("runs")
    steps = RunArgs.total_timesteps
    check_space(runs, rings, steps)
    return Finding("ok", f"{free_space(runs) / GIB:.1f} GiB free for runs/, "
                   f"{space_needed(rings, steps) / GIB:.1f} needed for checkpoints")


CHECKS = (
    Check("packages", check_packages, INSTALL),
    Check("drawing", check_drawing, f"{GL_REMEDY}; with an NVIDIA GPU: {NVIDIA_GL}"),
    Check("golden frames", check_golden_frames,
          "mend 'drawing' first, then git checkout tests/golden"),
    Check("experts", check_experts, INSTALL),
    Check("determinism", check_determinism, f"mend 'drawing' first, then {INSTALL}"),
    Check("VLM", check_vlm, "check --vlm and --vlm-weights; for mini: git checkout common/vlms"),
    Check("devices", check_devices, f"{INSTALL}; without a working GPU: make setup GPU=0"),
    Check("memory", check_memory, INSTALL),
    Check("disk", check_disk, "free some space, or train with another --run-dir"),
)


# -------------------------------------------------------------------------------- main


def median_seconds(function: Callable[[], object], rounds: int) -> float:
    """Median seconds of a call, after one to warm up."""
    return median(timeit.repeat(function, number=1, repeat=rounds + 1)[1:])


def run_check(check: Check, args: Args) -> dict[str, Any]:
    """The check's line: name, status, finding, remedy, seconds."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # the table, or the JSON, is alone on stdout
        try:
            finding = check.function(args)
        except Exception as error:
            remedy = INSTALL if isinstance(error, ImportError) else check.remedy
            finding = Finding("FAIL", one_line(error), remedy)
    seconds = round(time.perf_counter() - start, 1)
    return {"name": check.name, **finding._asdict(), "seconds": seconds}


def one_line(error: Exception) -> str:
    """An error's first line; a worker's, which ends in a colon, with the last of its traceback."""
    lines = str(error).strip().splitlines() or ["no message"]
    text = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def as_text(line: dict[str, Any], colour: bool, width: int = 10_000) -> str:
    """A line of the table, and one below it for what to do; both wrapped at `width` characters."""
    status = f"{line['status']:<4}"
    if colour:
        status = f"\033[{ {'ok': 32, 'warn': 33, 'FAIL': 31}[line['status']]}m{status}\033[0m"
    remedy = f"to do: {line['remedy']}" if line["remedy"] else ""
    texts = [part for text in (line["finding"], remedy)
             for part in textwrap.wrap(text, max(40, width - 30), break_on_hyphens=False)]
    text = f"\n{'':30}".join(texts)
    return f"{status}  {line['name']:<13}  {line['seconds']:>5.1f} s  {text}"


def main(args: Args) -> int:
    """Run all checks and print them; the exit status."""
    share_cores()
    terminal = sys.stdout.isatty() and not args.json
    colour = terminal and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size().columns if terminal else 10_000
    lines = []
    for check in CHECKS:
        if terminal:
            print(f"...   {check.name}", end="\r", flush=True)
        lines.append(run_check(check, args))
        if not args.json:
            print(as_text(lines[-1], colour, width), flush=True)
    red, warned = ([x["name"] for x in lines if x["status"] == s] for s in ("FAIL", "warn"))
    if args.json:
        print(json.dumps({"ok": not red, "checks": lines}))
    elif red:
        print(f"{len(red)} of {len(lines)} checks FAIL: {', '.join(red)}")
    else:
        warnings = f", warnings: {', '.join(warned)}" if warned else ""
        print(f"ready to train: no check has failed{warnings}")
    return 1 if red else 0


if __name__ == "__main__":
    try:
        from common.flags import parse

        raise SystemExit(main(parse(Args)))
    except ImportError as error:  # parsing needs packages, too
        raise SystemExit(f"error: {error}: {INSTALL}") from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
