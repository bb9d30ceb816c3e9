"""Measure how fast every part is, and how near to what the machine allows: one table.

    python -m tools.dev.benchmark                   # about an hour on two cores
    python -m tools.dev.benchmark --only updates    # one part
    python -m tools.dev.benchmark --output measured.md

`tools.benchmark` times whole runs of any scripts.

Figures are medians of several rounds; parts that are compared take turns within a round, so that a
noisy machine disturbs them alike. End-to-end figures are the median of one real run's log rows.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import drq_baseline as drq
import furl_sac_state as furl
from common import checkpoint, convolution, replay
from common.cores import num_cores, share_cores
from common.envs.metaworld_suite import ACTION_DIM, OBS_DIM, VecMetaWorld
from common.envs.rendering import Camera, Renderer
from common.errors import UserError
from common.pixels import PICTURE_SIZE
from common.replay import Sizes
from common.vlms import load_vlm
from common.vlms.openclip_vlm import fast_precision
from tools import ROOT
from tools.benchmark import Row, tabulate, time_run
from tools.dev.peer import PACKAGES
from tools.grid.paper_tables import DRQ, FURL, PIXELS, RELAY, SAC, VLM_RM

Part = Literal["environments", "frames", "workers", "embeddings", "precision", "updates", "scaling",
               "checkpoints", "furl", "baselines", "pixels", "peers"]
PARTS: tuple[Part, ...] = get_args(Part)
TASK = "drawer-open-v3"


@dataclass(frozen=True)
class Args:
    only: tuple[Part, ...] = PARTS
    """parts to measure"""
    rounds: int = 5
    """rounds that the medians are taken over"""
    output: Path | None = None
    """Markdown file to write the table to"""


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function; they take turns, after one warm-up call each."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(timed(function))
    return {name: float(np.median(values)) for name, values in seconds.items()}


def measure_environments(rounds: int) -> Iterator[Row]:
    """Environment steps per second without frames, by number of environments."""
    for num_envs in (1, 8, 32):
        envs = VecMetaWorld(TASK, num_envs, seed=0)
        envs.reset()
        actions = np.random.default_rng(0).uniform(-1, 1, (num_envs, 4)).astype(np.float32)
        steps = max(20, 400 // num_envs)

        def play(envs=envs, actions=actions, steps=steps) -> None:
            for _ in range(steps):
                envs.step(actions)

        seconds = medians({"play": play}, rounds)["play"]
        envs.close()
        yield (f"environment steps/s, {num_envs} environments",
               f"{num_envs * steps / seconds:,.0f}", "physics alone")


def measure_frames(rounds: int) -> Iterator[Row]:
    """Milliseconds per frame on one core."""
    from common.envs.metaworld_suite import make_env

    env = make_env(TASK, seed=0, index=0, goal="fixed", show_goal=False)
    for quality in ("fast", "paper"):
        for size in (84, 112, 176, 224):
            renderer = Renderer(env.model, Camera(size, quality=quality))
            count = 20 if quality == "fast" else 3

            def draw(renderer=renderer, count=count) -> None:
                for _ in range(count):
                    renderer.render(env.model, env.data)

            seconds = medians({"draw": draw}, rounds)["draw"] / count
            renderer.close()
            yield (f"frame, {quality}, {size} px", f"{seconds * 1e3:.1f} ms",
                   f"{1 / seconds:,.0f} a second and core")


def measure_workers(rounds: int) -> Iterator[Row]:
    """Environment steps per second by number of workers at once, each step drawn or none."""
    cores = num_cores()
    for num_workers in (n for n in (1, 2, 4, 8, 16, 32) if n <= cores):
        for camera, steps in ((None, 200), (Camera(176), 100), (Camera(224), 100),
                              (Camera(224, quality="paper"), 4)):
            envs = VecMetaWorld(TASK, 2 * num_workers, seed=0, num_workers=num_workers,
                                camera=camera)
            envs.reset()
            actions = np.zeros((envs.num_envs, ACTION_DIM), np.float32)

            def play(envs=envs, actions=actions, steps=steps) -> None:
                for _ in range(steps):
                    envs.step(actions)

            seconds = medians({"play": play}, rounds)["play"]
            envs.close()
            drawn = f"drawn, {camera.quality}, {camera.size} px" if camera else "not drawn"
            yield (f"steps/s, {drawn}, {num_workers} workers",
                   f"{envs.num_envs * steps / seconds:,.0f}", "two environments each")


def measure_embeddings(rounds: int) -> Iterator[Row]:
    """Milliseconds per image, by how many are embedded at once (`--num-envs`)."""
    for name, label in (("mini", "mini"), ("clip", "RN50 (CLIP's, random weights)"),
                        ("ViT-B-32", "ViT-B-32 (CLIP's, random weights)")):
        vlm = load_vlm(name, pretrained=name == "mini")
        size = (64, vlm.frame_size, vlm.frame_size, 3)
        frames = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)

        def embed(batch: int, vlm=vlm, frames=frames) -> None:
            jax.block_until_ready(vlm.embed_images(frames[:batch]))

        batches = {str(batch): partial(embed, batch) for batch in (1, 8, 16, 64)}
        for batch, seconds in medians(batches, rounds).items():
            yield (f"image embedding, {label}, batch {batch}",
                   f"{seconds / int(batch) * 1e3:.2f} ms",
                   f"D = {vlm.embed_dim}, {vlm.frame_size} px, {vlm.device.type}")


def measure_precision(_rounds: int) -> Iterator[Row]:
    """Embeddings in this machine's fast precision against float32 on the CPU.

    `mini` as a run has it. CLIP's RN50 has random weights here, and is made to use the precision
    that runs use with trained ones.
    """
    for name, pretrained in (("mini", True), ("clip", False)):
        exact_vlm = load_vlm(name, pretrained=pretrained, device="cpu")
        fast_vlm = load_vlm(name, pretrained=pretrained)
        if not pretrained:
            fast_vlm._precision = fast_precision(fast_vlm.device)
        envs = VecMetaWorld(TASK, 4, seed=0, camera=Camera(exact_vlm.frame_size))
        rng = np.random.default_rng(0)
        steps = [envs.step(rng.uniform(-1, 1, (4, ACTION_DIM)).astype(np.float32))
                 for _ in range(8)]
        envs.close()
        frames = np.concatenate([step.frames for step in steps])
        exact, fast = (np.asarray(vlm.embed_images(frames)) for vlm in (exact_vlm, fast_vlm))
        text = exact_vlm.embed_text(["Open a drawer."])[0]
        unit_exact, unit_fast, unit_text = (
            x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (exact, fast, text)
        )
        similarities = unit_exact @ unit_text, unit_fast @ unit_text
        distances = np.linalg.norm(exact[:, None] - exact, axis=-1)
        moved = np.linalg.norm(exact - fast, axis=1).max() / np.median(distances[distances > 0])
        label = "mini" if pretrained else "RN50 (CLIP's, random weights)"
        precision = getattr(fast_vlm, "_precision", None) or "float32"
        yield (f"embeddings, {label}, {precision} on {fast_vlm.device.type}",
               f"cosine {(unit_exact * unit_fast).sum(1).min():.6f} or more",
               f"to float32 on the CPU; similarity to a text differs by at most "
               f"{np.abs(similarities[0] - similarities[1]).max():.1e}, an embedding by "
               f"{moved:.2%} of the median distance between frames")


def sac_flops(args: furl.Args) -> float:
    """Floating-point operations of the matrix products in one SAC update.

    Two forward passes of the actor and six of a critic, and what their gradients need.
    """
    hidden, batch = args.hidden_features[0], args.batch_size
    obs, act = OBS_DIM, ACTION_DIM
    actor = obs * hidden + hidden * hidden + hidden * 2 * act
    critic = (obs + act) * hidden + hidden * hidden + hidden
    critic_inner = hidden * hidden + hidden  # what passes a gradient between layers
    products = (
        actor + 2 * critic  # target: next action, both target critics
        + 2 * (2 * critic + critic_inner)  # critics: forward, weights' and layers' gradients
        + 2 * actor + (hidden * hidden + hidden * 2 * act)  # actor: the same
        + 2 * 2 * critic  # critics under the actor: forward and back to the action
    )
    return 2.0 * batch * products


def projection_flops(args: furl.Args, embed_dim: int, phase: furl.Phase) -> float:
    """The same for the image head: the batch's rewards and, in an alignment phase, its update."""
    hidden, out = args.projection_features
    forward = embed_dim * hidden + hidden * out  # per picture
    backward = forward + hidden * out  # the weights' gradients, and the one between the layers
    pictures = {"none": 0, "goal-image": 1, "success": 3}[phase.alignment]
    return 2.0 * args.batch_size * (forward + pictures * (forward + backward))


PRODUCT_FLOPS = 200 * 2 * 256**3


@jax.jit
def products() -> jax.Array:
    """200 matrix products of 256 x 256 x 256, one after another: the floor of the updates."""
    weights = jnp.ones((256, 256)) / 256
    return jax.lax.fori_loop(0, 200, lambda _, y: y @ weights, weights)


PHASES = {"SAC": furl.Phase(False, "none"), "relaying": furl.Phase(True, "goal-image"),
          "relaying, Eq. 4": furl.Phase(True, "success"), "aligned": furl.Phase(False, "success")}


def filled_buffers(embed_dim: int, num_rows: int, args: furl.Args) -> furl.Buffers:
    """Buffers with `num_rows` random transitions and a few trajectories of either kind."""
    rng = np.random.default_rng(0)
    buffers = furl.init_buffers(Sizes(OBS_DIM, ACTION_DIM, embed_dim), args)
    time = np.arange(500, dtype=np.int32)
    for _ in range(4):
        images = rng.normal(size=(500, embed_dim)).astype(np.float16)
        frames = replay.EmbeddedFrame(images, time, np.full(500, True), time)
        buffers = buffers._replace(
            positives=replay.add_rows(buffers.positives, frames),
            negatives=replay.add_rows(buffers.negatives, frames._replace(embedding=images[::-1])),
        )
    n = 5000
    block = furl.Transition(
        rng.normal(size=(n, 39)).astype(np.float32),
        rng.uniform(-1, 1, (n, 4)).astype(np.float32),
        rng.normal(size=(n, 39)).astype(np.float32),
        np.zeros(n, np.float32), np.zeros(n, np.float32),
        rng.normal(size=(n, embed_dim)).astype(np.float16),
    )
    transitions = buffers.transitions
    for _ in range(num_rows // n):
        transitions = replay.add_rows(transitions, block)
    return buffers._replace(transitions=transitions)


def updating(
    buffers: furl.Buffers, embed_dim: int, args: furl.Args, phase: furl.Phase
) -> Callable[[], None]:
    """A function that does one iteration's updates, each time on from the last."""
    inputs = furl.VLMInputs(jnp.ones(embed_dim), jnp.zeros(embed_dim))
    state = furl.init_state(jax.random.key(0), Sizes(OBS_DIM, ACTION_DIM, embed_dim), args)

    def run() -> None:
        nonlocal state
        state, _ = furl.update(state, buffers, inputs, jax.random.key(1), 0, args, phase)
        jax.block_until_ready(state)

    return run


def measure_updates(rounds: int) -> Iterator[Row]:
    """Milliseconds per update in each phase, beside the same matrix products alone."""
    args = furl.Args(buffer_size=100_000)
    functions: dict[str, Callable[[], object]] = {
        "floor": lambda: jax.block_until_ready(products())
    }
    flops = {}
    for embed_dim in (128, 1024):
        buffers = filled_buffers(embed_dim, 5000, args)
        for phase_name, phase in PHASES.items():
            name = f"{phase_name}, D = {embed_dim}"
            functions[name] = updating(buffers, embed_dim, args, phase)
            agents = 2 if phase.relaying else 1
            flops[name] = agents * sac_flops(args) + projection_flops(args, embed_dim, phase)
    seconds = medians(functions, rounds * 3)
    flops_per_second = PRODUCT_FLOPS / seconds.pop("floor")
    yield ("matrix products 256 x 256 x 256 alone", f"{flops_per_second / 1e9:.0f} GFLOP/s",
           "the floor of the updates")
    for name, total in seconds.items():
        per_update = total / args.updates_per_iteration
        share = flops[name] / flops_per_second / per_update
        yield (f"update, {name}", f"{per_update * 1e3:.2f} ms",
               f"{share:.0%} of it is its matrix products at that speed")


SIZES = (10_000, 100_000, 1_000_000)  # transitions in the replay
NUM_ENVS = (1, 2, 4, 8, 16, 32)


def storing(buffers: furl.Buffers, num_envs: int) -> Callable[[], None]:
    """A function that stores one iteration's transitions, 50 times."""
    ring = buffers.transitions
    rows = jax.tree.map(lambda x: np.asarray(x[:num_envs]), ring.data)
    ring = jax.tree.map(jnp.copy, ring)  # `add_rows` takes it over

    def run() -> None:
        nonlocal ring
        for _ in range(50):
            ring = replay.add_rows(ring, rows)
        jax.block_until_ready(ring)

    return run


def measure_scaling(rounds: int) -> Iterator[Row]:
    """What a step costs by transitions in the replay, and steps/s by number of environments."""
    for embed_dim in (128, 1024):
        updates, stores = {}, {}
        for size in SIZES:
            args = furl.Args(buffer_size=size)
            buffers = filled_buffers(embed_dim, size, args)
            updates[size] = updating(buffers, embed_dim, args, PHASES["relaying, Eq. 4"])
            stores[size] = storing(buffers, args.num_envs)
        for what, functions, calls in (
            ("update, relaying, Eq. 4", updates, furl.Args().updates_per_iteration),
            ("storing 8 transitions", stores, 50),
        ):
            seconds = medians({str(k): v for k, v in functions.items()}, rounds * 3)
            for size in SIZES:
                yield (f"{what}, D = {embed_dim}, {size:,} transitions in the replay",
                       f"{seconds[str(size)] / calls * 1e3:.3g} ms", "")
    for num_envs in NUM_ENVS:
        yield run_script(
            # Without alignment, whose phases come at other steps with other numbers of episodes.
            FURL, f"mini, relaying, --no-align, {num_envs} environments",
            ["--num-envs", str(num_envs), "--relay-until", ALWAYS, "--no-align"], 3200,
            warm_up=1600,
        )


def measure_checkpoints(rounds: int) -> Iterator[Row]:
    """A checkpoint at its default interval: a full replay, of which 50,000 transitions are new."""
    args = furl.Args()
    new = args.checkpoint_every
    for embed_dim in (128, 1024):
        buffers = filled_buffers(embed_dim, args.buffer_size, args)
        state = furl.init_state(jax.random.key(0), Sizes(OBS_DIM, ACTION_DIM, embed_dim), args)
        rows = jax.tree.map(lambda x: np.asarray(x[:new]), buffers.transitions.data)
        seconds = []
        with tempfile.TemporaryDirectory(dir=".") as folder:
            for number in range(min(rounds, 3) + 1):
                save = partial(checkpoint.save, Path(folder), number, state, buffers._asdict(), {})
                seconds.append(timed(save))
                buffers = buffers._replace(transitions=replay.add_rows(buffers.transitions, rows))
                jax.block_until_ready(buffers)
        row_bytes = sum(x.nbytes for x in jax.tree.leaves(rows))
        yield (f"checkpoint, D = {embed_dim}, {new:,} new of {args.buffer_size:,} transitions",
               f"{np.median(seconds[1:]):.2f} s", f"{row_bytes / 2**20:.0f} MiB of new rows; all "
               f"rows at once take {seconds[0]:.1f} s")


def plot_scaling(rows: list[Row], path: Path) -> None:
    """Both halves of `measure_scaling` as one picture."""
    from tools.shared.plots import plt

    figures = {what: float(figure.split()[0].replace(",", ""))
               for what, figure, _ in rows if figure != "-"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for embed_dim, marker in ((128, "o"), (1024, "s")):
        for what in ("update, relaying, Eq. 4", "storing 8 transitions"):
            name = f"{what}, D = {embed_dim}"
            ms = [figures[f"{name}, {size:,} transitions in the replay"] for size in SIZES]
            left.plot(SIZES, ms, marker=marker, label=name)
    left.set(xscale="log", yscale="log", xlabel="transitions in the replay", ylabel="ms")
    left.legend(fontsize=7)
    script = f"{FURL}, mini, relaying, --no-align"
    speeds = [figures[f"{script}, {n} environments"] for n in NUM_ENVS]
    right.plot(NUM_ENVS, speeds, marker="o")
    right.set(xscale="log", xlabel="--num-envs", ylabel="environment steps/s", ylim=(0, None))
    right.set_xticks(NUM_ENVS, [str(n) for n in NUM_ENVS])
    right.minorticks_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def drq_flops(args: drq.Args) -> float:
    """Floating-point operations of the convolutions in one agent's update."""
    size, channels, one_picture = PICTURE_SIZE, 3 * args.frame_stack, 0
    for i, features in enumerate(args.encoder_features):
        size = (size - 3) // (2 if i == 0 else 1) + 1
        one_picture += 2 * size**2 * 9 * channels * features
        channels = features
    # Forward of both encoders for the next pictures, forward and two gradients for the present.
    return 5.0 * args.batch_size * one_picture


def measure_pixels(rounds: int) -> Iterator[Row]:
    """One DrQ agent's update, with XLA's convolutions in turns on a CPU, and real runs."""
    args = drq.Args()
    n, zeros = args.batch_size, jnp.zeros(args.batch_size)
    shape = (n, PICTURE_SIZE, PICTURE_SIZE, 3 * args.frame_stack)
    pictures = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    batch = drq.Transition(pictures, jnp.zeros((n, ACTION_DIM)), pictures, zeros, zeros)
    agent = drq.init_agent(jax.random.key(0), Sizes(OBS_DIM, ACTION_DIM, 1), args)

    def twice(agent: drq.AgentState) -> drq.AgentState:  # in a loop, as in a run
        step = lambda a, key: (drq.update_agent(a, batch, zeros, key, args)[0], None)  # noqa: E731
        return jax.lax.scan(step, agent, jax.random.split(jax.random.PRNGKey(1), 2))[0]

    functions: dict[str, Callable[[], object]] = {
        "floor": lambda: jax.block_until_ready(products())
    }
    on_cpu = convolution.on_cpu
    versions = {"DrQ": on_cpu, "DrQ with XLA's convolutions": lambda: False}
    for name, convolution.on_cpu in versions.items():
        jax.clear_caches()  # what is traced depends on it
        compiled = jax.jit(twice).lower(agent).compile()
        functions[name] = lambda run=compiled: jax.block_until_ready(run(agent))
        if not on_cpu():
            break
    convolution.on_cpu = on_cpu
    jax.clear_caches()
    seconds = medians(functions, min(rounds, 2))
    floor = drq_flops(args) / (PRODUCT_FLOPS / seconds.pop("floor"))
    for name, total in seconds.items():
        yield (f"update, {name}, batch {n}", f"{total / 2 * 1e3:,.0f} ms",
               f"{floor / (total / 2):.0%} of it is the convolutions at the floor's speed")
    for script, name, flags in (
        (DRQ, "no VLM", []),
        (PIXELS, "mini, relaying", ["--relay-until", ALWAYS]),
    ):
        yield run_script(
            script, name, [*flags, "--learning-starts", "160", "--log-every", "80"], 400,
            warm_up=240,
        )


ALWAYS, NEVER = "1000000000", "0"  # for --relay-until


def measure_furl(_rounds: int) -> Iterator[Row]:
    """Steps per second and peak memory of real runs, after compilation."""
    rn50 = ["--vlm", "clip", "--no-pretrained"]
    for name, flags, steps in (
        ("mini, relaying", ["--relay-until", ALWAYS], 8000),
        ("mini, aligned", ["--relay-until", NEVER], 8000),
        ("RN50, relaying", [*rn50, "--relay-until", ALWAYS], 6000),
        ("RN50, aligned", [*rn50, "--relay-until", NEVER], 6000),
    ):
        # From step 4,000 on there are failed episodes, and so projection heads to train.
        yield run_script(FURL, name, flags, steps, warm_up=4500)


def measure_baselines(_rounds: int) -> Iterator[Row]:
    """The same for the baselines."""
    native = ["--engine", "envpool", "--goal", "random"]
    for script, name, flags, steps in (
        (RELAY, "mini, relaying", ["--relay-until", ALWAYS], 5000),
        (VLM_RM, "mini", [], 5000),
        (SAC, "one update per step", [], 8000),
        (SAC, "--utd 0.25", ["--utd", "0.25"], 20000),
        (SAC, "--utd 0.25, EnvPool", ["--utd", "0.25", *native], 20000),
    ):
        yield run_script(script, name, flags, steps)


PEERS = (  # script, its flags, the peers' algorithm, task, samples per update
    (SAC, "", "SAC", "drawer-close-v3", 256),
    (SAC, "", "SAC", "Pendulum-v1", 256),
    ("vlm_rm_dqn.py", "--no-vlm-reward", "DQN", "CartPole-v1", 32),
)


def own_speed(script: str, flags: list[str]) -> float:
    """Steps a second of one run of a script."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags, "--total-timesteps", "5000"]
        return time_run(ROOT / script, flags, Path(folder) / "run", warm_up=2000)[0]


def peer_speed(package: str, flags: list[str]) -> float:
    """Steps a second of one run of another library's algorithm."""
    command = [sys.executable, "-m", "tools.dev.peer", "--package", package, *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{package} failed: {result.stderr[-500:]}")
    return float(result.stdout.splitlines()[-1])


def measure_peers(rounds: int) -> Iterator[Row]:
    """SAC and DQN in turns with those of the other libraries that are installed."""
    installed = [package for package in PACKAGES if importlib.util.find_spec(package)]
    for package in set(PACKAGES) - set(installed):
        yield package, "-", "not installed (see tools/dev/peer.py)"
    for script, flags, algorithm, task, batch_size in PEERS:
        same = ["--env-id", task, "--batch-size", str(batch_size)]
        contenders = {script: partial(own_speed, script, [*flags.split(), *same])}
        for package in installed:
            name = {"sbx": "sbx-rl"}.get(package, package)
            contenders[f"{name} {metadata.version(name)}"] = partial(
                peer_speed, package, ["--algorithm", algorithm, *same]
            )
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(min(rounds, 3)):
            for name, run in contenders.items():
                speeds[name].append(run())
        for name, values in speeds.items():
            yield (f"{algorithm} on {task}, batch {batch_size}: {name}",
                   f"{np.median(values):.0f} steps/s",
                   f"{min(values):.0f} to {max(values):.0f} in {len(values)} runs, in turns")


def run_script(
    script: str, name: str, flags: list[str], num_steps: int, warm_up: int = 2000
) -> Row:
    """Median steps/s of the rows after step `warm_up`, and peak memory (PSS, workers included)."""
    flags = [*flags, "--total-timesteps", str(num_steps)]
    with tempfile.TemporaryDirectory() as folder:
        speed, memory = time_run(ROOT / script, flags, Path(folder) / "run", warm_up)
    return (f"{script}, {name}", f"{speed:,.0f} steps/s" if speed > 20 else f"{speed:.1f} steps/s",
            f"peak memory {memory / 2**30:.1f} GiB with its workers")


def main(args: Args) -> None:
    share_cores()
    measures = {"environments": measure_environments, "frames": measure_frames,
                "workers": measure_workers, "embeddings": measure_embeddings,
                "precision": measure_precision, "updates": measure_updates,
                "scaling": measure_scaling, "checkpoints": measure_checkpoints,
                "furl": measure_furl, "baselines": measure_baselines, "pixels": measure_pixels,
                "peers": measure_peers}
    rows = chain.from_iterable(measures[part](args.rounds) for part in args.only)
    results = tabulate(rows, "tools.dev.benchmark", args.output)
    if args.output and "scaling" in args.only:
        plot_scaling(results, args.output.with_name("scaling.png"))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
