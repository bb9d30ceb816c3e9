"""Relay: two SAC agents take turns, one of them with the raw VLM reward; nothing is aligned.

The sixth baseline of the FuRL paper (Fu et al., ICML 2024, section 5.1; relay after Lan et al.,
2023): FuRL without its projection heads. The VLM agent learns from r_task + rho r_VLM, where r_VLM
is the cosine similarity of Eq. 2, the relay agent from r_task; both share one replay.

    python relay_baseline.py --env-id drawer-close-v3 --learning-rate 3e-4
    python relay_baseline.py --env-id drawer-open-v3 --vlm liv --quality paper --track

docs/relay_baseline.md has metrics and results. `furl_sac_state.py --no-align` computes the same,
number by number: a test holds both to it.

Deviations from the paper, whose Table 5 is the default, and choices where it is silent, as in
furl_sac_state.py (the page has all of them):
 1. Eight environments, one update per environment step in total, one iteration behind the data.
    Each environment draws its own relay period and its own first policy.
 2. Relaying ends at 2,500 positives, frames of an episode up to its last success (Figure 5). The
    authors' code for Relay counts steps in success instead.
 3. 10,000 random steps before learning and noise of 0.2 on the relay agent's actions, as in the
    authors' code. The temperature starts at 0.1 (authors: 1).
 4. The default VLM is the embedded `mini`, which needs no download. For the paper's: --vlm liv.
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

from common import flags, replay
from common.cli import run_script
from common.envs.metaworld_suite import MAX_EPISODE_STEPS
from common.envs.registry import METAWORLD
from common.envs.workers import Step
from common.evaluate import Evaluator
from common.replay import Ring, Sizes, Transition
from common.run import start_run
from common.vlms import VLM, load_vlm, view_for

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
ACTION_STREAM, RELAY_STREAM = 0, 1  # with the seed: names of streams of random numbers on the host


@dataclass(frozen=True)
class Args(flags.RunArgs):  # env_id, seed, total_timesteps, num_envs, utd, logs: common/flags.py
    # --- environment
    goal: flags.Goal = "fixed"  # fixed: hidden, one per seed
    quality: Literal["fast", "paper"] = "fast"  # of frames; paper: MuJoCo's default, slow
    camera_id: flags.NotNegativeInt = 2  # camera of the VLM's frames
    # --- SAC
    learning_starts: flags.NotNegativeInt = 10_000  # random steps before the first update
    buffer_size: flags.PositiveInt = 1_000_000  # transitions in the replay
    batch_size: flags.PositiveInt = 256  # samples per update
    learning_rate: flags.PositiveFloat = 1e-4  # Adam's, for all networks
    gamma: flags.Fraction = 0.99  # discount factor
    tau: flags.Fraction = 0.01  # step of the target critics
    init_temperature: flags.PositiveFloat = 0.1  # temperature before learning
    init_q: flags.FiniteFloat = 0.0  # added to the critics' output: their values before learning
    hidden_features: flags.PositiveInts = (256, 256)  # hidden layers of actor and critics
    layer_norm: bool = False  # in the critics, against overestimated values (Ball et al., 2023)
    # --- VLM reward
    vlm: str = "mini"  # mini, liv, clip, or an open_clip pair such as ViT-B-32/openai
    vlm_weights: str | None = None  # local weights file for --vlm
    pretrained: bool = True  # --no-pretrained: same encoder, randomly initialised (Figure 9)
    prompt: str | None = None  # default: Table 4's; short, long: Table 6's (2 tasks); or any text
    draw_every: flags.PositiveInt = 1  # a frame is drawn every K-th step, and stands until the next
    rho: flags.NotNegativeFloat = 0.05  # weight of the VLM reward (Eq. 1)
    # --- relay
    relay_periods: flags.PositiveInts = (50, 100, 150, 200)  # T_s: steps until the agents change
    relay_until: flags.NotNegativeInt = 2_500  # positive samples at which relaying ends (Figure 5)
    relay_noise: flags.NotNegativeFloat = 0.2  # std of the noise on the relay agent's actions


# ------------------------------------------------------------------------------ state


@struct.dataclass
class AgentState:
    params: dict  # actor, critic, log_alpha
    target_critic: dict
    opt: optax.OptState
    actor: nn.Module = struct.field(pytree_node=False)
    critic: nn.Module = struct.field(pytree_node=False)


class RelayState(NamedTuple):
    furl: AgentState  # as FuRL's: learns from r_task + rho r_VLM, and is evaluated
    relay: AgentState  # learns from r_task
    num_positives: jax.Array  # int32, frames of successful episodes so far


class Buffers(NamedTuple):
    transitions: Ring  # of Transition


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
    init_q: float
    layer_norm: bool

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        ensemble = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
        )
        x = jnp.concatenate([obs, action], axis=-1)
        return self.init_q + ensemble((*self.hidden_features, 1), self.layer_norm)(x).squeeze(-1)


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


def sac_loss(
    params: dict, agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array,
    args: Args,
) -> tuple[jax.Array, dict]:
    """The three losses as one: each moves its own parameters and sees the others fixed."""
    critic_key, actor_key = jax.random.split(key)
    critic, critic_metrics = critic_loss(params["critic"], agent, batch, reward, critic_key, args)
    actor, actor_metrics = actor_loss(params["actor"], agent, batch, actor_key)
    # The temperature alpha moves so that the entropy approaches its target, -|A|/2 (Table 5).
    excess = jax.lax.stop_gradient(actor_metrics["entropy"]) + batch.action.shape[-1] / 2
    alpha = jnp.exp(params["log_alpha"])
    metrics = critic_metrics | actor_metrics | {"alpha": alpha}
    return critic + actor + alpha * excess, metrics


# ------------------------------------------------------------------------- VLM reward


def cosine_similarity(text: jax.Array, images: jax.Array) -> jax.Array:
    """Eq. 2: text [D], images [n, D] -> [n]; 0, with finite gradients, for a zero vector."""
    squares = (text**2).sum() * (images**2).sum(-1)
    return images @ text * jax.lax.rsqrt(squares + 1e-12)


@partial(jax.jit, static_argnums=(1, 2))
def count_positives(steps: Ring, num_envs: int, episode_length: int) -> jax.Array:
    """Frames of the episodes that have just ended up to their last success, int32 []."""

    def count(env: jax.Array) -> jax.Array:
        rows = replay.newest_episode(steps, env, num_envs, episode_length)
        return jnp.where(rows.reward > 0, jnp.arange(episode_length) + 1, 0).max()

    return jax.vmap(count)(jnp.arange(num_envs)).sum()


# ---------------------------------------------------------------------------- updates


def adam_step(loss_fn, params, opt_state, args: Args):
    """One Adam step on `loss_fn(params) -> (loss, metrics)`."""
    gradients, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optax.adam(args.learning_rate).update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, metrics


@partial(jax.jit, static_argnames=("sizes", "args"))  # eagerly it takes twice as long
def init_agent(key: jax.Array, sizes: Sizes, args: Args) -> AgentState:
    actor = Actor(sizes.action, args.hidden_features)
    critic = CriticPair(args.hidden_features, args.init_q, args.layer_norm)
    actor_key, critic_key = jax.random.split(key)
    obs, action = jnp.zeros((1, sizes.obs)), jnp.zeros((1, sizes.action))
    params = {
        "actor": actor.init(actor_key, obs),
        "critic": critic.init(critic_key, obs, action),
        # float32 by name: a weak type would change in the first update, and all compile anew.
        "log_alpha": jnp.log(jnp.float32(args.init_temperature)),
    }
    target_critic = jax.tree.map(jnp.copy, params["critic"])
    opt = optax.adam(args.learning_rate).init(params)
    return AgentState(params, target_critic, opt, actor, critic)


def update_agent(
    agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One SAC update; all gradients are taken from the networks as they were before it."""
    params, opt, metrics = adam_step(
        lambda p: sac_loss(p, agent, batch, reward, key, args), agent.params, agent.opt, args
    )
    target = optax.incremental_update(params["critic"], agent.target_critic, args.tau)
    return agent.replace(params=params, target_critic=target, opt=opt), metrics


def init_state(key: jax.Array, sizes: Sizes, args: Args) -> RelayState:
    furl, relay = (init_agent(agent_key, sizes, args) for agent_key in jax.random.split(key))
    return RelayState(furl, relay, jnp.zeros((), jnp.int32))


def init_buffers(sizes: Sizes, args: Args) -> Buffers:
    # Embeddings of a network with random weights differ by less than float16 can tell.
    transition = replay.example_transition(sizes, exact=not args.pretrained)
    return Buffers(replay.init_ring(transition, args.buffer_size))


def update_once(
    state: RelayState, buffers: Buffers, text: jax.Array, key: jax.Array, args: Args,
    relaying: bool,
) -> tuple[RelayState, dict]:
    """One update of both agents on one batch that they share; text is Phi_L(l) [embed_dim]."""
    sample_key, furl_key, relay_key = jax.random.split(key, 3)
    slots = replay.sample_slots(buffers.transitions, sample_key, args.batch_size)
    batch: Transition = replay.take(buffers.transitions, slots)
    vlm_rewards = cosine_similarity(text, batch.embedding.astype(jnp.float32))
    task_reward = batch.reward - 1  # constant shaping (B.2)
    shaped_reward = task_reward + args.rho * vlm_rewards  # Eq. 1
    furl, furl_metrics = update_agent(state.furl, batch, shaped_reward, furl_key, args)
    relay, relay_metrics = state.relay, {}
    if relaying:
        relay, relay_metrics = update_agent(state.relay, batch, task_reward, relay_key, args)
    metrics = (
        {f"losses/{name}": value for name, value in furl_metrics.items()}
        | {f"losses/relay_{name}": value for name, value in relay_metrics.items()}
        | {"reward/vlm_mean": vlm_rewards.mean(), "reward/vlm_std": vlm_rewards.std()}
        | {"reward/task_mean": batch.reward.mean()}
    )
    return state._replace(furl=furl, relay=relay), metrics


@partial(jax.jit, static_argnames=("args", "relaying"), donate_argnames="state")
def update(
    state: RelayState, buffers: Buffers, text: jax.Array, key: jax.Array, env_steps: int,
    args: Args, relaying: bool,
) -> tuple[RelayState, dict]:
    """All updates of an iteration in one dispatch; the means of their metrics."""
    keys = jax.random.split(jax.random.fold_in(key, env_steps), args.updates_per_iteration)
    state, metrics = jax.lax.scan(
        lambda state, key: update_once(state, buffers, text, key, args, relaying), state, keys
    )
    return state, jax.tree.map(jnp.mean, metrics)


# ------------------------------------------------------------------------------ relay


def relay_acts(episode: int, time: int, args: Args) -> np.ndarray:
    """Where the relay agent acts at step `time` of an episode, bool [num_envs].

    In each episode each environment draws its own T_i and which agent comes first.
    """
    rng = np.random.default_rng((args.seed, RELAY_STREAM, episode))
    period = rng.choice(args.relay_periods, args.num_envs)
    relay_first = rng.random(args.num_envs) < 0.5
    return ((time // period) % 2 == 0) == relay_first


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
    text = jnp.asarray(vlm.embed_text([METAWORLD.prompt_for(args.env_id, args.prompt)])[0])
    return jax.jit(partial(cosine_similarity, text))


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    args = flags.check_args(args, METAWORLD)
    flags.check_replay(args, args.buffer_size, args.learning_starts, MAX_EPISODE_STEPS)
    METAWORLD.check_camera(args.camera_id)
    prompt = METAWORLD.prompt_for(args.env_id, args.prompt)
    vlm = load_vlm(args.vlm, weights=args.vlm_weights, pretrained=args.pretrained, seed=args.seed)
    text = jnp.asarray(vlm.embed_text([prompt])[0])
    view = view_for(vlm, METAWORLD)
    camera = view.camera(args.camera_id, args.quality)
    envs = METAWORLD.make_vec(
        args.env_id, args.num_envs, seed=args.seed, goal=args.goal, camera=camera,
        draw_every=args.draw_every,
    )
    evaluate = Evaluator(
        args.env_id, seed=args.seed, goal=args.goal, num_episodes=args.eval_episodes,
        camera=camera, capture_video=args.capture_video,
    )
    sizes = Sizes(envs.obs_dim, envs.action_dim, vlm.embed_dim)
    init_key, act_key, update_key = jax.random.split(jax.random.key(args.seed), 3)
    state, buffers = init_state(init_key, sizes, args), init_buffers(sizes, args)
    run = start_run(args, buffers, sizes, envs, evaluate, vlm=vlm, view=view, prompt=prompt)
    envs.reset()
    state, buffers, obs = run.begin(state, buffers, envs)

    def store(buffers: Buffers, transition: Transition, step: Step) -> Buffers:
        embedding = replay.embed_drawn(vlm, step.frames, step.drawn, buffers.transitions)
        transition = transition._replace(embedding=embedding)
        return Buffers(replay.add_rows(buffers.transitions, transition))

    relaying = bool(state.num_positives < args.relay_until)
    # Environments step while the device learns, so a step is stored and learned from one iteration
    # later, when the next one is under way. Until then it is `previous`.
    previous, metrics = None, {}
    for env_steps in run.iterations():  # steps done so far
        # Act, and let the environments step and draw ...
        episode, time = divmod(env_steps // args.num_envs, envs.episode_length)
        if env_steps < args.learning_starts:
            rng = np.random.default_rng((args.seed, ACTION_STREAM, env_steps))
            action = rng.uniform(-1, 1, (args.num_envs, sizes.action)).astype(np.float32)
        else:
            use_relay = relay_acts(episode, time, args)
            action = act(state, obs, use_relay, act_key, env_steps, args, relaying)
            action = np.asarray(action)  # waits for the updates before
            run.check_finite(action, metrics)
        envs.step_async(action)

        # ... while the frames of the step before are embedded, stored and learned from.
        if previous is not None:
            buffers = store(buffers, *previous)
        if time == 0 and episode > 0:  # all episodes end together
            num_positives = state.num_positives + count_positives(
                buffers.transitions, args.num_envs, envs.episode_length
            )
            state = state._replace(num_positives=num_positives)
            relaying = bool(num_positives < args.relay_until)
        if env_steps >= max(args.learning_starts, 1):
            state, metrics = update(state, buffers, text, update_key, env_steps, args, relaying)

        step = envs.step_wait()
        transition = Transition(obs, action, step.final_obs, step.reward, step.terminated)
        previous, obs = (transition, step), step.obs

        # Measure and save.
        run.count_episodes(step)
        if run.is_due(args.eval_every):
            run.evaluate(policy, state)
        if run.is_due(args.log_every):
            stage = "relay" if relaying else "vlm"
            run.log_training(stage if metrics else "random", {
                **metrics, "charts/relaying": relaying,
                "charts/num_updates": state.furl.opt[0].count,
                "charts/num_positives": state.num_positives,
            })
        if run.must_save():
            buffers, previous = store(buffers, *previous), None
            run.save(state, buffers, envs)

    run.close()
    return run.evaluation


if __name__ == "__main__":
    run_script(main, Args)
