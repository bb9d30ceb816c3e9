r"""VLM-RM with DQN: a frozen VLM's score as the only reward, for environments of discrete actions.

The score of a picture against a sentence, with or without goal-baseline regularisation, is what
DQN (Mnih et al., 2015) maximises: CartPole in Rocamonde et al., ICLR 2024, arXiv 2310.12921,
section 4.2. vlm_rm_baseline.py is the same with SAC, for continuous actions.

    python vlm_rm_dqn.py --total-timesteps 20000 --learning-starts 5000 --learning-rate 5e-4 \
        --target-update-every 500 --batch-size 64 --layer-norm
    python vlm_rm_dqn.py --vlm ViT-B-32/openai --alpha 0.5
    python vlm_rm_dqn.py --env-id Acrobot-v1 --no-vlm-reward  # DQN on the environment's own reward

docs/vlm_rm.md has metrics, deviations and results.

Defaults are the paper's appendix C, where it is silent stable-baselines3's. Deviations (the page
has all of them):
 1. Eight environments, one update per environment step in total (the paper: 200 every 200 steps).
 2. Frames are embedded as they come (Algorithm 1: 3,200 at once).
 3. The default VLM is the embedded `toy`, which needs no download.
 4. The target is copied every 10,000 steps; the authors' code moves it by 0.005 at every step.
 5. Episodes have 500 steps (200) and are truncated; in the authors' code they terminate.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from common import flags, replay
from common.cli import run_script
from common.envs.registry import GYMNASIUM
from common.envs.workers import Step
from common.errors import UserError
from common.evaluate import Evaluator
from common.replay import Ring, Sizes, Transition
from common.run import start_run
from common.vlms import VLM, load_vlm, view_for

ACTION_STREAM = 0  # with the seed: name of a stream of random numbers on the host
MAX_GRADIENT_NORM = 10.0  # stable-baselines3's


@dataclass(frozen=True)
class Args(flags.RunArgs):  # seed, total_timesteps, num_envs, utd, logs: common/flags.py
    env_id: str = "CartPoleEndless-v1"  # any Gymnasium environment with discrete actions
    total_timesteps: flags.PositiveInt = 3_000_000  # environment steps, over all environments
    # --- DQN
    learning_starts: flags.NotNegativeInt = 75_000  # random steps before the first update
    buffer_size: flags.PositiveInt = 1_000_000  # transitions in the replay
    batch_size: flags.PositiveInt = 32  # samples per update
    learning_rate: flags.PositiveFloat = 2.3e-3  # Adam's
    gamma: flags.Fraction = 0.99  # discount factor
    target_update_every: flags.PositiveInt = 10_000  # environment steps
    epsilon: flags.Share = 0.05  # share of random actions in the end
    exploration: flags.Share = 0.1  # share of the steps in which epsilon falls from 1
    hidden_features: flags.PositiveInts = (256, 256)  # hidden layers of the Q network
    layer_norm: bool = False  # in them, against overestimated values (Ball et al., 2023)
    # --- VLM reward
    vlm: str | None = None  # default: the embedded toy; liv, clip, or an open_clip pair
    vlm_weights: str | None = None  # local weights file for --vlm
    pretrained: bool = True  # --no-pretrained: same encoder, randomly initialised
    prompt: str | None = None  # default: Table 3's; or any text
    alpha: flags.Share = 0.0  # strength of goal-baseline regularisation, 0 to 1
    baseline_prompt: str | None = None  # the scene, whatever the goal; default: Table 3's
    draw_every: flags.PositiveInt = 1  # a frame is drawn every K-th step, and stands until the next
    vlm_reward: bool = True  # --no-vlm-reward: the environment's own reward, and no VLM


# ------------------------------------------------------------------------------ state


@struct.dataclass
class AgentState:
    params: dict
    target: dict
    opt: optax.OptState
    network: nn.Module = struct.field(pytree_node=False)


class Buffers(NamedTuple):
    transitions: Ring  # of Transition, whose actions are [n, 1]


class VLMInputs(NamedTuple):
    text: jax.Array  # [embed_dim]
    baseline: jax.Array  # [embed_dim]


# --------------------------------------------------------------------------- networks


class MLP(nn.Module):
    features: tuple[int, ...]
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in self.features[:-1]:
            x = nn.Dense(features)(x)
            x = nn.relu(nn.LayerNorm()(x) if self.layer_norm else x)
        return nn.Dense(self.features[-1])(x)


# ------------------------------------------------------------------------------- loss


def q_loss(
    params: dict, agent: AgentState, batch: Transition, reward: jax.Array, args: Args
) -> tuple[jax.Array, dict]:
    """Huber loss of Q(s, a) against r + gamma max_a' Q_target(s', a') (Mnih et al., 2015)."""
    next_q = agent.network.apply(agent.target, batch.next_obs).max(-1)
    target = reward + args.gamma * (1 - batch.terminated) * next_q
    action = batch.action.astype(jnp.int32)  # [batch, 1]
    q = jnp.take_along_axis(agent.network.apply(params, batch.obs), action, -1).squeeze(-1)
    loss = optax.huber_loss(q, target).mean()
    return loss, {"q_loss": loss, "q": q.mean()}


# ------------------------------------------------------------------------- VLM reward


def cosine_similarity(text: jax.Array, images: jax.Array) -> jax.Array:
    """Eq. 2: text [D], images [n, D] -> [n]; 0, with finite gradients, for a zero vector."""
    squares = (text**2).sum() * (images**2).sum(-1)
    return images @ text * jax.lax.rsqrt(squares + 1e-12)


def goal_baseline_reward(
    text: jax.Array, baseline: jax.Array, images: jax.Array, alpha: float
) -> jax.Array:
    """Goal-baseline regularisation, Definition 1 and Eq. 3 of the VLM-RM paper.

    The image is moved by `alpha` towards its projection onto the line through the embeddings of the
    baseline and the goal, which leaves out what has nothing to do with the goal.

    Args:
        text, baseline: embeddings [D] of goal l and baseline b; they must differ.
        images: [n, D].
        alpha: 0: the cosine similarity (all vectors have unit length here); 1: only the position
            along the line counts.

    Returns:
        [n], at most 1.
    """
    goal, base = text / jnp.linalg.norm(text), baseline / jnp.linalg.norm(baseline)
    state = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
    direction = (goal - base) / jnp.linalg.norm(goal - base)
    projected = base + ((state - base) @ direction)[:, None] * direction
    return 1 - 0.5 * ((alpha * projected + (1 - alpha) * state - goal) ** 2).sum(-1)


def vlm_reward(images: jax.Array, vlm: VLMInputs, args: Args) -> jax.Array:
    """images [n, D] -> r_VLM [n]."""
    if args.alpha > 0:
        return goal_baseline_reward(vlm.text, vlm.baseline, images, args.alpha)
    return cosine_similarity(vlm.text, images)


# ---------------------------------------------------------------------------- updates


def optimizer(args: Args) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(MAX_GRADIENT_NORM)
    return optax.chain(clip, optax.adam(args.learning_rate))


@partial(jax.jit, static_argnames=("sizes", "args"))
def init_agent(key: jax.Array, sizes: Sizes, args: Args) -> AgentState:
    network = MLP((*args.hidden_features, sizes.action), args.layer_norm)
    params = network.init(key, jnp.zeros((1, sizes.obs)))
    return AgentState(params, jax.tree.map(jnp.copy, params), optimizer(args).init(params), network)


def init_buffers(sizes: Sizes, args: Args) -> Buffers:
    # An action is one number. Random weights' embeddings differ by less than float16 can tell.
    transition = replay.example_transition(sizes._replace(action=1), exact=not args.pretrained)
    return Buffers(replay.init_ring(transition, args.buffer_size))


def update_once(
    agent: AgentState, buffers: Buffers, vlm: VLMInputs | None, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One DQN update on one batch."""
    slots = replay.sample_slots(buffers.transitions, key, args.batch_size)
    batch: Transition = replay.take(buffers.transitions, slots)
    reward, rewards = batch.reward, {"reward/task_mean": batch.reward.mean()}
    if vlm is not None:
        reward = vlm_reward(batch.embedding.astype(jnp.float32), vlm, args)
        rewards |= {"reward/vlm_mean": reward.mean(), "reward/vlm_std": reward.std()}
    gradients, metrics = jax.grad(q_loss, has_aux=True)(agent.params, agent, batch, reward, args)
    updates, opt = optimizer(args).update(gradients, agent.opt)
    agent = agent.replace(params=optax.apply_updates(agent.params, updates), opt=opt)
    return agent, rewards | {f"losses/{name}": value for name, value in metrics.items()}


@partial(jax.jit, static_argnames="args", donate_argnames="agent")
def update(
    agent: AgentState, buffers: Buffers, vlm: VLMInputs | None, key: jax.Array, env_steps: int,
    args: Args,
) -> tuple[AgentState, dict]:
    """All updates of an iteration in one dispatch, after the target's if that is due; the means of
    their metrics."""
    is_due = env_steps % args.target_update_every < args.num_envs
    target = jax.tree.map(partial(jnp.where, is_due), agent.params, agent.target)
    keys = jax.random.split(jax.random.fold_in(key, env_steps), args.updates_per_iteration)
    agent, metrics = jax.lax.scan(
        lambda agent, key: update_once(agent, buffers, vlm, key, args),
        agent.replace(target=target), keys,
    )
    return agent, jax.tree.map(jnp.mean, metrics)


def epsilon(env_steps: int, args: Args) -> float:
    """Share of random actions: falls linearly from 1 at the first step to --epsilon, then stays;
    but 1 before learning."""
    if env_steps < args.learning_starts:
        return 1.0
    progress = env_steps / max(args.exploration * args.total_timesteps, 1)
    return 1 + min(progress, 1) * (args.epsilon - 1)


def act(agent: AgentState, obs: np.ndarray, env_steps: int, args: Args) -> np.ndarray:
    """Epsilon-greedy actions [n] for obs [n, obs_dim]; waits for the updates before."""
    rng = np.random.default_rng((args.seed, ACTION_STREAM, env_steps))
    actions = agent.network.features[-1]
    random, explores = rng.integers(0, actions, len(obs)), rng.random(len(obs))
    share = epsilon(env_steps, args)
    return random if share == 1 else np.where(explores < share, random, policy(agent, obs))


# --------------------------------------------- what evaluation and tools use of a script

init_state = init_agent


@jax.jit
def policy(agent: AgentState, obs: jax.Array) -> jax.Array:
    """The best action for each observation [n, obs_dim], int [n]."""
    return agent.network.apply(agent.params, obs).argmax(-1)


def prompts_of(args: Args) -> tuple[str, str]:
    """Goal and baseline, which is empty where nothing looks at it."""
    prompt = GYMNASIUM.prompt_for(args.env_id, args.prompt)
    if args.alpha > 0:
        return prompt, GYMNASIUM.baseline_prompt_for(args.env_id, args.baseline_prompt)
    if args.baseline_prompt is not None:
        raise UserError("--baseline-prompt has no effect without --alpha: give one above 0")
    return prompt, ""


def embed_task(vlm: VLM, args: Args) -> VLMInputs:
    """What the reward compares pictures with."""
    prompts = prompts_of(args)
    embedded = jnp.asarray(vlm.embed_text([prompt for prompt in prompts if prompt]))
    text, baseline = embedded[0], embedded[-1]  # the same where nothing looks at the baseline
    if args.alpha > 0 and cosine_similarity(text, baseline[None])[0] > 0.9999:
        raise UserError(f"--baseline-prompt {prompts[1]!r} means the same as the prompt "
                        f"{prompts[0]!r} to this VLM: there is no line through both")
    return VLMInputs(text, baseline)


def load_reward(agent: AgentState, vlm: VLM, args: Args) -> Callable[[jax.Array], jax.Array]:
    """The VLM reward of the run: embeddings [n, D] -> [n]."""
    return jax.jit(partial(vlm_reward, vlm=embed_task(vlm, args), args=args))


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    args = flags.check_args(args, GYMNASIUM)
    flags.check_replay(args, args.buffer_size, args.learning_starts)
    flags.note_idle(args, vlm_reward="vlm_weights pretrained draw_every")
    if args.vlm is None:
        args = replace(args, vlm=GYMNASIUM.default_vlm(args.env_id))
    if not args.vlm_reward and (args.prompt or args.baseline_prompt or args.alpha):
        raise UserError("--prompt, --baseline-prompt and --alpha have no effect with "
                        "--no-vlm-reward")
    if args.target_update_every >= args.total_timesteps:
        print(f"note: --target-update-every {args.target_update_every} is never due in "
              f"{args.total_timesteps} steps: the target stays as it began")
    vlm = vlm_inputs = view = camera = None
    facts = {}
    if args.vlm_reward:
        facts["prompt"], facts["baseline_prompt"] = prompts_of(args)
        vlm = load_vlm(
            args.vlm, weights=args.vlm_weights, pretrained=args.pretrained, seed=args.seed
        )
        vlm_inputs = embed_task(vlm, args)
        view = view_for(vlm, GYMNASIUM)
        camera = view.camera(GYMNASIUM.default_camera, "fast")
    envs = GYMNASIUM.make_vec(
        args.env_id, args.num_envs, seed=args.seed, camera=camera, draw_every=args.draw_every
    )
    if not envs.discrete:
        other = "vlm_rm_baseline.py" if args.vlm_reward else "sac_baseline.py"
        raise UserError(f"{args.env_id} has continuous actions, which DQN cannot choose from: use "
                        f"{other}")
    evaluate = Evaluator(
        args.env_id, seed=args.seed, goal="fixed", num_episodes=args.eval_episodes,
        capture_video=args.capture_video,
    )
    sizes = Sizes(envs.obs_dim, envs.action_dim, vlm.embed_dim if vlm else 0)
    init_key, update_key = jax.random.split(jax.random.key(args.seed))
    agent, buffers = init_agent(init_key, sizes, args), init_buffers(sizes, args)
    run = start_run(args, buffers, sizes, envs, evaluate, vlm=vlm, view=view, **facts)
    envs.reset()
    agent, buffers, obs = run.begin(agent, buffers, envs)

    def store(buffers: Buffers, transition: Transition, step: Step) -> Buffers:
        if vlm is not None:
            embedding = replay.embed_drawn(vlm, step.frames, step.drawn, buffers.transitions)
            transition = transition._replace(embedding=embedding)
        return Buffers(replay.add_rows(buffers.transitions, transition))

    # Environments step while the device learns, so a step is stored and learned from one iteration
    # later, when the next one is under way. Until then it is `previous`.
    previous, metrics = None, {}
    for env_steps in run.iterations():  # steps done so far
        # Act, and let the environments step and draw ...
        action = act(agent, obs, env_steps, args)
        envs.step_async(action)

        # ... while the frames of the step before are embedded, stored and learned from.
        if previous is not None:
            buffers = store(buffers, *previous)
        if env_steps >= max(args.learning_starts, 1):
            agent, metrics = update(agent, buffers, vlm_inputs, update_key, env_steps, args)

        step = envs.step_wait()
        transition = Transition(
            obs, action[:, None].astype(np.float32), step.final_obs, step.reward, step.terminated
        )
        previous, obs = (transition, step), step.obs

        # Measure and save.
        run.count_episodes(step)
        if run.is_due(args.eval_every):
            run.evaluate(policy, agent)
        if run.is_due(args.log_every):
            run.log_training("dqn" if metrics else "random", {
                **metrics, "charts/epsilon": epsilon(env_steps, args),
            })
        if run.must_save():
            buffers, previous = store(buffers, *previous), None
            run.save(agent, buffers, envs)

    run.close()
    return run.evaluation


if __name__ == "__main__":
    run_script(main, Args)
