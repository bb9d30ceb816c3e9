"""Raw VLM rewards, one agent: VLM-RM, VLM-RM with goal-baseline regularisation, LIV and LIV-Proj.

A frozen VLM scores the picture of the scene against the instruction, and SAC maximises the score,
alone (VLM-RM: Rocamonde et al., ICLR 2024, arXiv 2310.12921) or added to the sparse reward (LIV:
Fu et al., ICML 2024, Eq. 1). Baselines 2 to 5 of the FuRL paper's section 5.1:

    python vlm_rm_baseline.py                            # VLM-RM: the cosine similarity alone
    python vlm_rm_baseline.py --alpha 0.5                # VLM-RM-GB: goal-baseline regularisation
    python vlm_rm_baseline.py --task-reward              # LIV (with --vlm clip: CLIP)
    python vlm_rm_baseline.py --task-reward --projection # LIV-Proj: random, fixed projection heads

each with --env-id drawer-open-v3, and with --vlm liv --quality paper for the paper's own.
docs/baselines.md explains every metric.

Deviations from the paper, whose Table 5 is the default, and choices where it is silent, as in
furl_sac_state.py:
 1. Eight environments, one update per environment step in total. Updates lag one iteration behind
    the data, so that environments step and draw while the last frames are embedded and learned.
 2. 10,000 random steps before learning, as in the authors' code; the paper does not say.
 3. The temperature starts at 0.1, DrQ's value (authors: 1; the paper does not say): at 1, 30,000
    updates pass before the sparse reward counts for more than entropy.
 4. The default VLM is the embedded `mini`, which needs no download. For the paper's: --vlm liv. It
    sees the part of the picture that the FuRL authors keep, as RGB, where they feed it BGR. Prompts
    have Table 4's capitals and full stop.
 5. VLM-RM's reward has no weight and no shift; the FuRL paper does not give VLM-RM's alpha.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from common import replay
from common.cli import (
    Fraction,
    NotNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveInts,
    Share,
    check_args,
    run_script,
)
from common.envs import VecMetaWorld
from common.errors import UserError
from common.evaluate import Evaluator
from common.rendering import gl_info, view_for
from common.replay import Ring, Sizes, Transition
from common.run import start_run
from common.tasks import baseline_prompt_for, prompt_for
from common.vlm import VLM, load_vlm

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
ACTION_STREAM = 0  # of random numbers on the host, beside the seed


@dataclass(frozen=True)
class Args:
    # --- run
    env_id: str = "drawer-open-v3"  # any Meta-World v3 task; v2 names are aliases
    seed: int = 0  # seed of everything: goals, networks, exploration, sampling
    total_timesteps: int = 1_000_000  # environment steps, summed over the environments
    eval_every: int = 10_000  # environment steps between evaluations of the mean action
    eval_episodes: int = 0  # per evaluation; 0: 1 with a fixed goal (deterministic), else 10
    checkpoint_every: int = 50_000  # environment steps between checkpoints; 0: only at the end
    log_every: int = 1_000  # environment steps between rows of metrics
    run_dir: str | None = None  # default: runs/<env>__<script>__<seed>__<time>
    resume: str | None = None  # run folder to continue, with the arguments it was started with
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)
    wandb_project: str = "furl"  # project for --track
    wandb_entity: str | None = None  # user or team that the project belongs to; default: yours
    capture_video: bool = False  # a video of each evaluation in <run folder>/videos
    drop_replay: bool = False  # delete the replay's files when the run has finished
    # --- environment
    goal: Literal["fixed", "random", "random-hidden"] = "fixed"  # fixed: hidden, one per seed
    engine: Literal["metaworld"] = "metaworld"  # the official environments; frames need them
    num_envs: int = 8  # environments stepped side by side
    quality: Literal["fast", "paper"] = "fast"  # of frames; paper: MuJoCo's default, slow
    camera_id: int = 2  # camera of the VLM's frames
    # --- SAC
    learning_starts: int = 10_000  # steps of uniformly random actions before the first update
    utd: float = 1.0  # updates per environment step
    buffer_size: int = 1_000_000  # transitions in the replay
    batch_size: PositiveInt = 256  # samples per update
    learning_rate: PositiveFloat = 1e-4  # Adam's, for all networks
    gamma: Fraction = 0.99  # discount factor
    tau: Fraction = 0.01  # step of the target critics
    init_temperature: PositiveFloat = 0.1  # temperature before learning
    hidden_features: PositiveInts = (256, 256)  # hidden layers of actor and critics
    # --- VLM reward
    vlm: str = "mini"  # mini, liv, clip, or an open_clip pair such as ViT-B-32/openai
    vlm_weights: str | None = None  # local weights file for --vlm
    pretrained: bool = True  # --no-pretrained: same encoder, randomly initialised (Figure 9)
    prompt: str | None = None  # default: Table 4's; short, long: Table 6's; or any text
    rho: NotNegativeFloat = 0.05  # weight of the VLM reward beside the task reward (Eq. 1)
    # --- method
    task_reward: bool = False  # add the sparse reward: LIV, CLIP; without it: VLM-RM
    alpha: Share = 0.0  # strength of goal-baseline regularisation, 0 to 1
    baseline_prompt: str | None = None  # the scene, whatever the goal; default: the task's own
    projection: bool = False  # through randomly initialised, fixed projection heads: LIV-Proj
    projection_features: PositiveInts = (256, 64)  # layers of both projection heads

    @property
    def updates_per_iteration(self) -> int:
        return round(self.utd * self.num_envs)


# ------------------------------------------------------------------------------ state


@struct.dataclass
class AgentState:
    params: dict  # actor, critic, log_alpha
    target_critic: dict
    opt: optax.OptState
    actor: nn.Module = struct.field(pytree_node=False)
    critic: nn.Module = struct.field(pytree_node=False)


class Buffers(NamedTuple):
    transitions: Ring  # of Transition


class VLMInputs(NamedTuple):
    text: jax.Array  # Phi_L(l) [embed_dim]
    baseline: jax.Array  # Phi_L(b) [embed_dim]
    projection: dict  # W_L and W_I, never updated


# --------------------------------------------------------------------------- networks


class MLP(nn.Module):
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in self.features[:-1]:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.features[-1])(x)


class Actor(nn.Module):
    """obs [..., obs_dim] -> mean and log std of the Gaussian before tanh, [..., action_dim]."""

    action_dim: int
    hidden_features: tuple[int, ...]

    @nn.compact
    def __call__(self, obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = MLP((*self.hidden_features, 2 * self.action_dim))(obs)
        mean, log_std = jnp.split(output, 2, axis=-1)
        return mean, jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)


class CriticPair(nn.Module):
    """obs [batch, obs_dim], action [batch, action_dim] -> Q of both critics [2, batch]."""

    hidden_features: tuple[int, ...]

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        ensemble = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
        )
        x = jnp.concatenate([obs, action], axis=-1)
        return ensemble((*self.hidden_features, 1))(x).squeeze(-1)


class Projection(nn.Module):
    """The heads f_{W_L} and f_{W_I} of Eq. 3: (text [D], images [n, D]) -> ([P], [n, P])."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, text: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        language_head = MLP(self.features, name="language")
        image_head = MLP(self.features, name="image")
        return language_head(text), image_head(images)


def sample_action(
    actor: Actor, actor_params: dict, obs: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A tanh-squashed Gaussian sample [batch, action_dim] and its log-probability [batch]."""
    mean, log_std = actor.apply(actor_params, obs)
    noise = jax.random.normal(key, mean.shape)
    pre_tanh = mean + jnp.exp(log_std) * noise
    gaussian = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    # log(1 - tanh(x)^2), in a form that does not underflow for large |x|.
    squash = 2 * (jnp.log(2.0) - pre_tanh - nn.softplus(-2 * pre_tanh))
    return jnp.tanh(pre_tanh), (gaussian - squash).sum(-1)


# ------------------------------------------------------------------------- SAC losses


def critic_loss(
    critic_params: dict, agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array,
    args: Args,
) -> tuple[jax.Array, dict]:
    """Soft Bellman error of both critics against the smaller target Q (Haarnoja et al., 2018)."""
    next_action, next_log_prob = sample_action(
        agent.actor, agent.params["actor"], batch.next_obs, key
    )
    next_q = agent.critic.apply(agent.target_critic, batch.next_obs, next_action).min(0)
    next_value = next_q - jnp.exp(agent.params["log_alpha"]) * next_log_prob
    target = reward + args.gamma * (1 - batch.terminated) * next_value
    q = agent.critic.apply(critic_params, batch.obs, batch.action)  # [2, batch]
    loss = ((q - target) ** 2).mean(1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(
    actor_params: dict, agent: AgentState, batch: Transition, key: jax.Array
) -> tuple[jax.Array, dict]:
    """alpha log pi - min Q, for actions of the current policy."""
    action, log_prob = sample_action(agent.actor, actor_params, batch.obs, key)
    q = agent.critic.apply(agent.params["critic"], batch.obs, action).min(0)
    loss = (jnp.exp(agent.params["log_alpha"]) * log_prob - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def alpha_loss(
    log_alpha: jax.Array, entropy: jax.Array, action_dim: int
) -> tuple[jax.Array, dict]:
    """Moves the temperature so that the entropy approaches its target, -|A|/2 (Table 5)."""
    alpha = jnp.exp(log_alpha)
    return alpha * (jax.lax.stop_gradient(entropy) + action_dim / 2), {"alpha": alpha}


def sac_loss(
    params: dict, agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array,
    args: Args,
) -> tuple[jax.Array, dict]:
    """The three losses as one: each moves its own parameters and sees the others fixed."""
    critic_key, actor_key = jax.random.split(key)
    critic, critic_metrics = critic_loss(
        params["critic"], agent, batch, reward, critic_key, args
    )
    actor, actor_metrics = actor_loss(params["actor"], agent, batch, actor_key)
    alpha, alpha_metrics = alpha_loss(
        params["log_alpha"], actor_metrics["entropy"], batch.action.shape[-1]
    )
    return critic + actor + alpha, critic_metrics | actor_metrics | alpha_metrics


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
    """images [n, D] -> r_VLM [n] of the method that the flags choose."""
    text, baseline = vlm.text, vlm.baseline
    if args.projection:  # Eq. 3 of the FuRL paper, with heads that nobody trains
        heads = Projection(args.projection_features)
        baseline, _ = heads.apply(vlm.projection, baseline, images)
        text, images = heads.apply(vlm.projection, text, images)
    if args.alpha > 0:
        return goal_baseline_reward(text, baseline, images, args.alpha)
    return cosine_similarity(text, images)


# ---------------------------------------------------------------------------- updates


def descend(loss_fn, params, opt_state, args: Args):
    """One Adam step on `loss_fn(params) -> (loss, metrics)`."""
    gradients, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optax.adam(args.learning_rate).update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, metrics


@partial(jax.jit, static_argnames=("sizes", "args"))  # eagerly it takes twice as long
def init_agent(key: jax.Array, sizes: Sizes, args: Args) -> AgentState:
    actor = Actor(sizes.action, args.hidden_features)
    critic = CriticPair(args.hidden_features)
    actor_key, critic_key = jax.random.split(key)
    obs, action = jnp.zeros((1, sizes.obs)), jnp.zeros((1, sizes.action))
    params = {
        "actor": actor.init(actor_key, obs),
        "critic": critic.init(critic_key, obs, action),
        # float32 by name: a weak type lasts until the first update, and then all compiles again.
        "log_alpha": jnp.log(jnp.float32(args.init_temperature)),
    }
    target_critic = jax.tree.map(jnp.copy, params["critic"])
    opt = optax.adam(args.learning_rate).init(params)
    return AgentState(params, target_critic, opt, actor, critic)


def update_agent(
    agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One SAC update; all gradients are taken from the networks as they were before it."""
    params, opt, metrics = descend(
        lambda p: sac_loss(p, agent, batch, reward, key, args), agent.params, agent.opt, args
    )
    target = optax.incremental_update(params["critic"], agent.target_critic, args.tau)
    return agent.replace(params=params, target_critic=target, opt=opt), metrics


def init_buffers(sizes: Sizes, args: Args) -> Buffers:
    scalar = np.zeros((), np.float32)
    obs, action = np.zeros(sizes.obs, np.float32), np.zeros(sizes.action, np.float32)
    # Embeddings of a network with random weights differ by less than float16 can tell.
    embedding = np.zeros(sizes.embedding, np.float16 if args.pretrained else np.float32)
    transition = Transition(obs, action, obs, scalar, scalar, embedding)
    return Buffers(replay.init_ring(transition, args.buffer_size))


def update_once(
    agent: AgentState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One SAC update on one batch."""
    sample_key, agent_key = jax.random.split(key)
    slots = replay.sample_slots(buffers.transitions, sample_key, args.batch_size)
    batch: Transition = replay.take(buffers.transitions, slots)
    reward = fuzzy = vlm_reward(batch.embedding.astype(jnp.float32), vlm, args)
    if args.task_reward:
        task_reward = batch.sparse_reward - 1  # constant shaping (B.2)
        reward = task_reward + args.rho * fuzzy  # Eq. 1
    agent, metrics = update_agent(agent, batch, reward, agent_key, args)
    metrics = {f"losses/{name}": value for name, value in metrics.items()}
    metrics |= {"reward/vlm_mean": fuzzy.mean(), "reward/vlm_std": fuzzy.std()}
    return agent, metrics | {"reward/sparse_mean": batch.sparse_reward.mean()}


@partial(jax.jit, static_argnames="args", donate_argnames="agent")
def update(
    agent: AgentState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, env_steps: int, args: Args
) -> tuple[AgentState, dict]:
    """All updates of an iteration in one dispatch; the means of their metrics."""
    agent, metrics = jax.lax.scan(
        lambda carry, update_key: update_once(carry, buffers, vlm, update_key, args),
        agent,
        jax.random.split(jax.random.fold_in(key, env_steps), args.updates_per_iteration),
    )
    return agent, jax.tree.map(jnp.mean, metrics)


@jax.jit
def act(agent: AgentState, obs: jax.Array, key: jax.Array, env_steps: int) -> jax.Array:
    """Exploration: a sampled action for each observation [n, obs_dim]."""
    key = jax.random.fold_in(key, env_steps)
    return sample_action(agent.actor, agent.params["actor"], obs, key)[0]


# --------------------------------------------- what evaluation and tools use of a script

init_state = init_agent


@jax.jit
def policy(agent: AgentState, obs: jax.Array) -> jax.Array:
    """The agent's mean action for obs [n, obs_dim]: [n, action_dim]."""
    mean, _ = agent.actor.apply(agent.params["actor"], obs)
    return jnp.tanh(mean)


def embed_task(vlm: VLM, args: Args) -> VLMInputs:
    """What the reward compares pictures with; the heads of LIV-Proj are drawn from the seed."""
    prompts = [prompt_for(args.env_id, args.prompt),
               baseline_prompt_for(args.env_id, args.baseline_prompt)]
    text, baseline = (jnp.asarray(x) for x in vlm.embed_text(prompts))
    if args.alpha > 0 and cosine_similarity(text, baseline[None])[0] > 0.9999:
        raise UserError(f"--baseline-prompt {prompts[1]!r} means the same as the prompt "
                        f"{prompts[0]!r} to this VLM: there is no line through both")
    key = jax.random.split(jax.random.key(args.seed), 4)[3]  # the others are those of `main`
    projection = Projection(args.projection_features).init(key, text, text[None])
    return VLMInputs(text, baseline, projection)


def load_reward(agent: AgentState, vlm: VLM, args: Args) -> Callable[[jax.Array], jax.Array]:
    """The VLM reward of the run: embeddings [n, D] -> [n]."""
    return jax.jit(partial(vlm_reward, vlm=embed_task(vlm, args), args=args))


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    args = check_args(args)
    prompt = prompt_for(args.env_id, args.prompt)
    baseline_prompt = baseline_prompt_for(args.env_id, args.baseline_prompt)
    if args.baseline_prompt is not None and args.alpha == 0:
        raise UserError("--baseline-prompt has no effect without --alpha: give one above 0")
    vlm = load_vlm(args.vlm, weights=args.vlm_weights, pretrained=args.pretrained, seed=args.seed)
    vlm_inputs = embed_task(vlm, args)
    view = view_for(vlm)
    drawing = {"camera_id": args.camera_id, "quality": args.quality}
    envs = VecMetaWorld(
        args.env_id, args.num_envs, seed=args.seed, goal=args.goal, frame_size=view.size, **drawing
    )
    evaluate = Evaluator(
        args.env_id, seed=args.seed, goal=args.goal, num_episodes=args.eval_episodes,
        capture_video=args.capture_video, **drawing,
    )
    sizes = Sizes(envs.obs_dim, envs.action_dim, vlm.embed_dim)
    init_key, act_key, update_key = jax.random.split(jax.random.key(args.seed), 3)
    agent, buffers = init_agent(init_key, sizes, args), init_buffers(sizes, args)
    run = start_run(
        args, buffers, sizes=sizes, evaluation=evaluate.settings, engine=envs.engine,
        prompt=prompt, baseline_prompt=baseline_prompt, vlm=vlm.settings, vlm_id=vlm.id,
        view=view._asdict(), gl=gl_info(),
    )
    envs.reset()
    env_steps, agent, buffers, obs = run.begin(agent, buffers, envs)

    def store(buffers: Buffers, transition: Transition, frames: np.ndarray) -> Buffers:
        transition = transition._replace(embedding=vlm.embed_images(view.crop(frames)))
        return Buffers(replay.add_rows(buffers.transitions, transition))

    newest = None  # the last step, until its frames are embedded and it is stored
    metrics: dict[str, jax.Array] = {}
    while env_steps < args.total_timesteps:
        # Act, and let the environments step and draw ...
        if env_steps < args.learning_starts:
            rng = np.random.default_rng((args.seed, ACTION_STREAM, env_steps))
            action = rng.uniform(-1, 1, (args.num_envs, sizes.action)).astype(np.float32)
        else:
            action = np.asarray(act(agent, obs, act_key, env_steps))  # waits for the updates before
            run.check_finite(env_steps, action, metrics)
        envs.step_async(action)

        # ... while the frames of the step before are embedded, stored and learned from.
        if newest is not None:
            buffers = store(buffers, *newest)
        if env_steps >= max(args.learning_starts, 1):
            agent, metrics = update(agent, buffers, vlm_inputs, update_key, env_steps, args)

        step = envs.step_wait()
        env_steps += args.num_envs
        terminated = step.terminated.astype(np.float32)
        transition = Transition(obs, action, step.final_obs, step.sparse_reward, terminated)
        newest, obs = (transition, step.frames), step.obs

        # Measure and save.
        run.count_episodes(step.success, step.truncated)
        if run.is_due(args.eval_every, env_steps):
            run.log_evaluation(
                env_steps, evaluate(partial(policy, agent), run.video_path(env_steps))
            )
        if run.is_due(args.log_every, env_steps):
            run.log_training(env_steps, "vlm" if metrics else "random", {
                **metrics, "charts/num_updates": agent.opt[0].count,
            })
        if run.must_save(env_steps):
            buffers, newest = store(buffers, *newest), None
            run.save(env_steps, agent, buffers, envs)

    for thing in (run, evaluate, envs):
        thing.close()
    return run.evaluation


if __name__ == "__main__":
    run_script(main, Args)
