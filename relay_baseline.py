"""Relay: two SAC agents take turns, one of them with the raw VLM reward; nothing is aligned.

The sixth baseline of the FuRL paper (Fu et al., ICML 2024, section 5.1; relay after Lan et al.,
2023): FuRL without its projection heads. The VLM agent learns from r_task + rho r_VLM, where r_VLM
is the cosine similarity of Eq. 2, the relay agent from r_task; both share one replay.

    python relay_baseline.py --env-id drawer-close-v3 --learning-rate 3e-4
    python relay_baseline.py --env-id drawer-open-v3 --vlm liv --quality paper --track

docs/baselines.md explains every metric. `furl_sac_state.py --no-align` computes the same, number by
number: a test holds both to it.

Deviations from the paper, whose Table 5 is the default, and choices where it is silent, as in
furl_sac_state.py:
 1. Eight environments, one update per environment step in total. Updates lag one iteration behind
    the data, so that environments step and draw while the last frames are embedded and learned.
 2. Each environment draws its own relay period and its own first policy.
 3. Relaying ends at 2,500 positives, frames of an episode up to its last success (Figure 5). The
    authors' code for Relay counts steps in success instead.
 4. As in the authors' code, where the paper does not say: 10,000 random steps before learning, and
    noise of 0.2 on the relay agent's actions.
 5. The temperature starts at 0.1, DrQ's value (authors: 1; the paper does not say): at 1, 30,000
    updates pass before the sparse reward counts for more than entropy.
 6. The default VLM is the embedded `mini`, which needs no download. For the paper's: --vlm liv. It
    sees the part of the picture that the authors keep for FuRL (their Relay keeps all of it), as
    RGB, where they feed it BGR. Prompts have Table 4's capitals and full stop.
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
    NotNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveInts,
    check_args,
    check_episodes_fit,
    run_script,
)
from common.envs import MAX_EPISODE_STEPS, VecMetaWorld
from common.evaluate import Evaluator
from common.rendering import gl_info, view_for
from common.replay import Ring, Sizes, Transition
from common.run import start_run
from common.tasks import prompt_for
from common.vlm import VLM, load_vlm

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
ACTION_STREAM, RELAY_STREAM = 0, 1  # of random numbers on the host, beside the seed


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
    rho: NotNegativeFloat = 0.05  # weight of the VLM reward (Eq. 1)
    # --- relay
    relay_periods: PositiveInts = (50, 100, 150, 200)  # T_s: steps until the agents change
    relay_until: NotNegativeInt = 2_500  # positive samples at which relaying ends (Figure 5)
    relay_noise: NotNegativeFloat = 0.2  # std of the noise on the relay agent's actions

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


class RelayState(NamedTuple):
    furl: AgentState  # learns from r_task + rho r_VLM, and is evaluated
    relay: AgentState  # learns from r_task
    num_positives: jax.Array  # int32, frames of successful episodes so far


class Buffers(NamedTuple):
    transitions: Ring  # of Transition


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


def init_state(key: jax.Array, sizes: Sizes, args: Args) -> RelayState:
    furl, relay = (init_agent(agent_key, sizes, args) for agent_key in jax.random.split(key))
    return RelayState(furl, relay, jnp.zeros((), jnp.int32))


def init_buffers(sizes: Sizes, args: Args) -> Buffers:
    scalar = np.zeros((), np.float32)
    obs, action = np.zeros(sizes.obs, np.float32), np.zeros(sizes.action, np.float32)
    # Embeddings of a network with random weights differ by less than float16 can tell.
    embedding = np.zeros(sizes.embedding, np.float16 if args.pretrained else np.float32)
    transition = Transition(obs, action, obs, scalar, scalar, embedding)
    return Buffers(replay.init_ring(transition, args.buffer_size))


def update_once(
    state: RelayState, buffers: Buffers, text: jax.Array, key: jax.Array, args: Args,
    relaying: bool,
) -> tuple[RelayState, dict]:
    """One update of both agents on one batch that they share; text is Phi_L(l) [embed_dim]."""
    sample_key, furl_key, relay_key = jax.random.split(key, 3)
    slots = replay.sample_slots(buffers.transitions, sample_key, args.batch_size)
    batch: Transition = replay.take(buffers.transitions, slots)
    fuzzy = cosine_similarity(text, batch.embedding.astype(jnp.float32))
    task_reward = batch.sparse_reward - 1  # constant shaping (B.2)
    shaped_reward = task_reward + args.rho * fuzzy  # Eq. 1
    furl, furl_metrics = update_agent(state.furl, batch, shaped_reward, furl_key, args)
    relay, relay_metrics = state.relay, {}
    if relaying:
        relay, relay_metrics = update_agent(state.relay, batch, task_reward, relay_key, args)
    metrics = (
        {f"losses/{name}": value for name, value in furl_metrics.items()}
        | {f"losses/relay_{name}": value for name, value in relay_metrics.items()}
        | {"reward/vlm_mean": fuzzy.mean(), "reward/vlm_std": fuzzy.std()}
        | {"reward/sparse_mean": batch.sparse_reward.mean()}
    )
    return state._replace(furl=furl, relay=relay), metrics


@partial(jax.jit, static_argnames=("args", "relaying"), donate_argnames="state")
def update(
    state: RelayState, buffers: Buffers, text: jax.Array, key: jax.Array, env_steps: int,
    args: Args, relaying: bool,
) -> tuple[RelayState, dict]:
    """All updates of an iteration in one dispatch; the means of their metrics."""
    state, metrics = jax.lax.scan(
        lambda carry, update_key: update_once(carry, buffers, text, update_key, args, relaying),
        state,
        jax.random.split(jax.random.fold_in(key, env_steps), args.updates_per_iteration),
    )
    return state, jax.tree.map(jnp.mean, metrics)


# ------------------------------------------------------------------------------ relay


class RelaySchedule(NamedTuple):
    period: np.ndarray  # [num_envs] int, steps until the agents change
    relay_first: np.ndarray  # [num_envs] bool


def draw_schedule(episode: int, args: Args) -> RelaySchedule:
    """Each environment's own T_i and first agent in its episode number `episode`."""
    rng = np.random.default_rng((args.seed, RELAY_STREAM, episode))
    return RelaySchedule(
        rng.choice(args.relay_periods, args.num_envs), rng.random(args.num_envs) < 0.5
    )


def relay_acts(schedule: RelaySchedule, episode_time: int) -> np.ndarray:
    """Where the relay agent acts at step `episode_time` of the episodes, bool [num_envs]."""
    return ((episode_time // schedule.period) % 2 == 0) == schedule.relay_first


@partial(jax.jit, static_argnames=("args", "relaying"))
def act(
    state: RelayState, obs: jax.Array, use_relay: jax.Array, key: jax.Array, env_steps: int,
    args: Args, relaying: bool,
) -> jax.Array:
    """Both agents sample for all obs [n, obs_dim], a mask [n] selects: [n, action_dim]."""
    furl_key, relay_key, noise_key = jax.random.split(jax.random.fold_in(key, env_steps), 3)
    furl_action, _ = sample_action(state.furl.actor, state.furl.params["actor"], obs, furl_key)
    if not relaying:
        return furl_action
    relay_action, _ = sample_action(state.relay.actor, state.relay.params["actor"], obs, relay_key)
    noise = args.relay_noise * jax.random.normal(noise_key, relay_action.shape)
    relay_action = jnp.clip(relay_action + noise, -1, 1)
    return jnp.where(use_relay[:, None], relay_action, furl_action)


# --------------------------------------------- what evaluation and tools use of a script


@jax.jit
def policy(state: RelayState, obs: jax.Array) -> jax.Array:
    """The evaluated agent's mean action for obs [n, obs_dim]: [n, action_dim]."""
    mean, _ = state.furl.actor.apply(state.furl.params["actor"], obs)
    return jnp.tanh(mean)


def load_reward(state: RelayState, vlm: VLM, args: Args) -> Callable[[jax.Array], jax.Array]:
    """The VLM reward of the run, before its weight rho: embeddings [n, D] -> [n]."""
    text = jnp.asarray(vlm.embed_text([prompt_for(args.env_id, args.prompt)])[0])
    return jax.jit(partial(cosine_similarity, text))


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    args = check_args(args)
    check_episodes_fit(args, MAX_EPISODE_STEPS)
    prompt = prompt_for(args.env_id, args.prompt)
    vlm = load_vlm(args.vlm, weights=args.vlm_weights, pretrained=args.pretrained, seed=args.seed)
    text = jnp.asarray(vlm.embed_text([prompt])[0])
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
    state, buffers = init_state(init_key, sizes, args), init_buffers(sizes, args)
    run = start_run(
        args, buffers, sizes=sizes, evaluation=evaluate.settings, engine=envs.engine,
        prompt=prompt, vlm=vlm.settings, vlm_id=vlm.id, view=view._asdict(), gl=gl_info(),
    )
    envs.reset()
    env_steps, state, buffers, obs = run.begin(state, buffers, envs)

    def store(buffers: Buffers, transition: Transition, frames: np.ndarray) -> Buffers:
        transition = transition._replace(embedding=vlm.embed_images(view.crop(frames)))
        return Buffers(replay.add_rows(buffers.transitions, transition))

    relaying = bool(state.num_positives < args.relay_until)
    newest = None  # the last step, until its frames are embedded and it is stored
    metrics: dict[str, jax.Array] = {}
    while env_steps < args.total_timesteps:
        # Act, and let the environments step and draw ...
        episode, time = divmod(env_steps // args.num_envs, envs.episode_length)
        if env_steps < args.learning_starts:
            rng = np.random.default_rng((args.seed, ACTION_STREAM, env_steps))
            action = rng.uniform(-1, 1, (args.num_envs, sizes.action)).astype(np.float32)
        else:
            use_relay = relay_acts(draw_schedule(episode, args), time)
            action = np.asarray(  # waits for the updates before
                act(state, obs, use_relay, act_key, env_steps, args, relaying)
            )
            run.check_finite(env_steps, action, metrics)
        envs.step_async(action)

        # ... while the frames of the step before are embedded, stored and learned from.
        if newest is not None:
            buffers = store(buffers, *newest)
        if time == 0 and episode > 0:  # all episodes end together
            num_positives = state.num_positives + replay.count_positives(
                buffers.transitions, args.num_envs, envs.episode_length
            )
            state = state._replace(num_positives=num_positives)
            relaying = bool(num_positives < args.relay_until)
        if env_steps >= max(args.learning_starts, 1):
            state, metrics = update(state, buffers, text, update_key, env_steps, args, relaying)

        step = envs.step_wait()
        env_steps += args.num_envs
        terminated = step.terminated.astype(np.float32)
        transition = Transition(obs, action, step.final_obs, step.sparse_reward, terminated)
        newest, obs = (transition, step.frames), step.obs

        # Measure and save.
        run.count_episodes(step.success, step.truncated)
        if run.is_due(args.eval_every, env_steps):
            run.log_evaluation(
                env_steps, evaluate(partial(policy, state), run.video_path(env_steps))
            )
        if run.is_due(args.log_every, env_steps):
            stage = "relay" if relaying else "vlm"
            run.log_training(env_steps, stage if metrics else "random", {
                **metrics, "charts/relaying": relaying,
                "charts/num_updates": state.furl.opt[0].count,
                "charts/num_positives": state.num_positives,
            })
        if run.must_save(env_steps):
            buffers, newest = store(buffers, *newest), None
            run.save(env_steps, state, buffers, envs)

    for thing in (run, evaluate, envs):
        thing.close()
    return run.evaluation


if __name__ == "__main__":
    run_script(main, Args)
