"""DrQ on Meta-World's sparse reward: the baseline that FuRL on pixels is compared with (Figure 7).

SAC behind a convolutional encoder that the critics train, on three stacked pictures that are
shifted at random (Kostrikov et al., 2021, arXiv 2004.13649), with the settings of the FuRL paper
(Fu et al., ICML 2024, Table 5). No VLM, no relay.

    python drq_baseline.py --env-id window-open-v3 --goal random

docs/drq_baseline.md says what a run costs, and where its metrics are explained.

Deviations from the paper, and choices where it is silent, are those of furl_drq_pixels.py:
 1. Eight environments, one update per action in total, one iteration behind the data.
 2. A step is a physics step: an action is repeated for two of them, is learned from once, and one
    picture is drawn. Success at either counts as one success.
 3. 10,000 random steps before learning; the temperature starts at 0.1, DrQ's value.
 4. One random shift per picture, where DrQ's own code averages two; docs/furl_drq_pixels.md lists
    what else differs from it (5).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from common import flags, pixels, replay
from common.cli import run_script
from common.convolution import convolve, few_at_a_time
from common.envs.metaworld_suite import MAX_EPISODE_STEPS
from common.envs.registry import METAWORLD
from common.envs.rendering import Camera
from common.evaluate import Evaluator
from common.replay import Ring, Sizes, Transition
from common.run import start_run

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
ACTION_STREAM = 0  # with the seed: name of a stream of random numbers on the host


@dataclass(frozen=True)
class Args(flags.RunArgs):  # env_id, seed, total_timesteps, num_envs, utd, logs: common/flags.py
    # --- environment
    goal: flags.Goal = "fixed"  # fixed: hidden, one per seed
    quality: Literal["fast", "paper"] = "fast"  # of frames; paper: MuJoCo's default, slow
    camera_id: flags.NotNegativeInt = 2  # camera of the frames
    action_repeat: flags.PositiveInt = 2  # physics steps per action
    # --- DrQ
    learning_starts: flags.NotNegativeInt = 10_000  # random steps before the first update
    buffer_size: flags.PositiveInt = 200_000  # pictures in the replay
    batch_size: flags.PositiveInt = 256  # samples per update
    learning_rate: flags.PositiveFloat = 1e-4  # Adam's, for all networks
    gamma: flags.Fraction = 0.99  # discount factor
    tau: flags.Fraction = 0.01  # step of the target critics
    init_temperature: flags.PositiveFloat = 0.1  # temperature before learning
    init_q: flags.FiniteFloat = 0.0  # added to the critics' output: their values before learning
    hidden_features: flags.PositiveInts = (256, 256, 256)  # hidden layers of actor and critics
    layer_norm: bool = False  # in the critics, against overestimated values (Ball et al., 2023)
    frame_stack: flags.PositiveInt = 3  # pictures that the policy sees, the newest last
    shift: flags.PositiveInt = 4  # pixels by which pictures are shifted at random
    encoder_features: flags.PositiveInts = (32, 32, 32, 32)  # 3 x 3 convolutions; stride 2, then 1
    encoder_dim: flags.PositiveInt = 50  # numbers that actor and critics get of a stack of pictures

    @property
    def steps_per_iteration(self) -> int:
        return self.num_envs * self.action_repeat

    @property
    def layout(self) -> pixels.Layout:
        length = pixels.actions_per_episode(MAX_EPISODE_STEPS, self.action_repeat)
        return pixels.Layout(self.num_envs, length, self.frame_stack)


# ------------------------------------------------------------------------------ state


@struct.dataclass
class AgentState:
    params: dict  # encoder, actor, critic, log_alpha
    target: dict  # encoder, critic
    opt: optax.OptState
    encoder: nn.Module = struct.field(pytree_node=False)
    actor: nn.Module = struct.field(pytree_node=False)
    critic: nn.Module = struct.field(pytree_node=False)


class Buffers(NamedTuple):
    steps: Ring  # of pixels.PixelStep, num_envs rows at a time


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


class Encoder(nn.Module):
    """uint8 [..., 84, 84, 9] -> [..., 35 * 35 * 32]: convolutions (DrQ, Table 5)."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        x = pictures.astype(jnp.float32) / 255 - 0.5
        for i, features in enumerate(self.features):
            x = nn.relu(nn.Conv(
                features, (3, 3), 2 if i == 0 else 1, padding="VALID", conv_general_dilated=convolve
            )(x))
        return x.reshape(*x.shape[:-3], -1)


class Neck(nn.Module):
    """Features of the encoder [batch, n] -> [batch, encoder_dim], in -1 to 1."""

    encoder_dim: int

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        return nn.tanh(nn.LayerNorm()(nn.Dense(self.encoder_dim)(features)))


class Actor(nn.Module):
    """features -> mean and log std of the Gaussian before tanh, [batch, action_dim]."""

    action_dim: int
    hidden_features: tuple[int, ...]
    encoder_dim: int

    @nn.compact
    def __call__(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = Neck(self.encoder_dim)(features)
        output = MLP((*self.hidden_features, 2 * self.action_dim))(x)
        mean, log_std = jnp.split(output, 2, axis=-1)
        return mean, jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)


class CriticPair(nn.Module):
    """features, action [batch, action_dim] -> Q of both critics, which share a neck, [2, batch]."""

    hidden_features: tuple[int, ...]
    encoder_dim: int
    init_q: float
    layer_norm: bool

    @nn.compact
    def __call__(self, features: jax.Array, action: jax.Array) -> jax.Array:
        ensemble = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
        )
        x = jnp.concatenate([Neck(self.encoder_dim)(features), action], axis=-1)
        return self.init_q + ensemble((*self.hidden_features, 1), self.layer_norm)(x).squeeze(-1)


def encode(encoder: Encoder, params: dict, pictures: jax.Array) -> jax.Array:
    """Stacked pictures uint8 [batch, 84, 84, 9] -> features [batch, n]."""
    return few_at_a_time(partial(encoder.apply, params), pictures)


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


# ---------------------------------------------------------------------- pictures


def random_shift(pictures: jax.Array, key: jax.Array, shift: int) -> jax.Array:
    """DrQ's augmentation: each sample of [batch, height, width, channels] moved by up to `shift`
    pixels in both directions, all of its channels alike; the border is repeated."""
    batch, height, width, channels = pictures.shape
    padded = jnp.pad(pictures, ((0, 0), (shift, shift), (shift, shift), (0, 0)), "edge")
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * shift + 1)

    def crop(picture: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(picture, (*offset, 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def sample_batch(steps: Ring, key: jax.Array, args: Args) -> Transition:
    """Uniform transitions, their stacks shifted: obs and next_obs uint8 [batch, 84, 84, 9]."""
    step_key, env_key, shift_key, next_shift_key = jax.random.split(key, 4)
    batch = pixels.sample(steps, step_key, env_key, args.batch_size, args.layout)
    return batch._replace(
        obs=random_shift(batch.obs, shift_key, args.shift),
        next_obs=random_shift(batch.next_obs, next_shift_key, args.shift),
    )


# ------------------------------------------------------------------------- DrQ losses


def critic_loss(
    params: dict, agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array,
    args: Args,
) -> tuple[jax.Array, tuple[jax.Array, dict]]:
    """Soft Bellman error of both critics; also returns the features [batch, n] for the actor."""
    next_features = encode(agent.encoder, agent.params["encoder"], batch.next_obs)
    next_action, next_log_prob = sample_action(
        agent.actor, agent.params["actor"], next_features, key
    )
    next_features = encode(agent.encoder, agent.target["encoder"], batch.next_obs)
    next_q = agent.critic.apply(agent.target["critic"], next_features, next_action).min(0)
    next_value = next_q - jnp.exp(agent.params["log_alpha"]) * next_log_prob
    target = reward + args.gamma * (1 - batch.terminated) * next_value
    features = encode(agent.encoder, params["encoder"], batch.obs)
    q = agent.critic.apply(params["critic"], features, batch.action)  # [2, batch]
    loss = ((q - target) ** 2).mean(1).sum()
    return loss, (features, {"critic_loss": loss, "q": q.mean()})


def actor_loss(
    actor_params: dict, agent: AgentState, features: jax.Array, key: jax.Array
) -> tuple[jax.Array, dict]:
    """alpha log pi - min Q, for actions of the current policy."""
    action, log_prob = sample_action(agent.actor, actor_params, features, key)
    q = agent.critic.apply(agent.params["critic"], features, action).min(0)
    loss = (jnp.exp(agent.params["log_alpha"]) * log_prob - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def drq_loss(
    params: dict, agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array,
    args: Args,
) -> tuple[jax.Array, dict]:
    """The three losses as one; the encoder is moved by the critics alone."""
    critic_key, actor_key = jax.random.split(key)
    critic, (features, critic_metrics) = critic_loss(params, agent, batch, reward, critic_key, args)
    features = jax.lax.stop_gradient(features)
    actor, actor_metrics = actor_loss(params["actor"], agent, features, actor_key)
    # The temperature alpha moves so that the entropy approaches its target, -|A|/2 (Table 5).
    excess = jax.lax.stop_gradient(actor_metrics["entropy"]) + batch.action.shape[-1] / 2
    alpha = jnp.exp(params["log_alpha"])
    metrics = critic_metrics | actor_metrics | {"alpha": alpha}
    return critic + actor + alpha * excess, metrics


# ---------------------------------------------------------------------------- updates


def adam_step(loss_fn, params, opt_state, args: Args):
    """One Adam step on `loss_fn(params) -> (loss, metrics)`."""
    gradients, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optax.adam(args.learning_rate).update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, metrics


@partial(jax.jit, static_argnames=("sizes", "args"))  # eagerly it takes twice as long
def init_agent(key: jax.Array, sizes: Sizes, args: Args) -> AgentState:
    encoder = Encoder(args.encoder_features)
    actor = Actor(sizes.action, args.hidden_features, args.encoder_dim)
    critic = CriticPair(args.hidden_features, args.encoder_dim, args.init_q, args.layer_norm)
    encoder_key, actor_key, critic_key = jax.random.split(key, 3)
    shape = (1, pixels.PICTURE_SIZE, pixels.PICTURE_SIZE, 3 * args.frame_stack)
    pictures = jnp.zeros(shape, jnp.uint8)
    encoder_params = encoder.init(encoder_key, pictures)
    features = encode(encoder, encoder_params, pictures)
    params = {
        "encoder": encoder_params,
        "actor": actor.init(actor_key, features),
        "critic": critic.init(critic_key, features, jnp.zeros((1, sizes.action))),
        # float32 by name: a weak type would change in the first update, and all compile anew.
        "log_alpha": jnp.log(jnp.float32(args.init_temperature)),
    }
    target = jax.tree.map(jnp.copy, {name: params[name] for name in ("encoder", "critic")})
    opt = optax.adam(args.learning_rate).init(params)
    return AgentState(params, target, opt, encoder, actor, critic)


def update_agent(
    agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One DrQ update; all gradients are taken from the networks as they were before it."""
    params, opt, metrics = adam_step(
        lambda p: drq_loss(p, agent, batch, reward, key, args), agent.params, agent.opt, args
    )
    new = {name: params[name] for name in agent.target}
    target = optax.incremental_update(new, agent.target, args.tau)
    return agent.replace(params=params, target=target, opt=opt), metrics


def init_buffers(sizes: Sizes, args: Args) -> Buffers:
    return Buffers(replay.init_ring(pixels.example_step(sizes), args.buffer_size))


def update_once(
    agent: AgentState, buffers: Buffers, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One DrQ update on one batch."""
    sample_key, agent_key = jax.random.split(key)
    batch = sample_batch(buffers.steps, sample_key, args)
    task_reward = batch.reward - 1  # constant shaping (B.2)
    agent, metrics = update_agent(agent, batch, task_reward, agent_key, args)
    metrics = {f"losses/{name}": value for name, value in metrics.items()}
    return agent, metrics | {"reward/task_mean": batch.reward.mean()}


@partial(jax.jit, static_argnames="args", donate_argnames="agent")
def update(
    agent: AgentState, buffers: Buffers, key: jax.Array, env_steps: int, args: Args
) -> tuple[AgentState, dict]:
    """All updates of an iteration in one dispatch; the means of their metrics."""
    keys = jax.random.split(jax.random.fold_in(key, env_steps), args.updates_per_iteration)
    agent, metrics = jax.lax.scan(
        lambda agent, key: update_once(agent, buffers, key, args), agent, keys
    )
    return agent, jax.tree.map(jnp.mean, metrics)


def explore(agent: AgentState, pictures: jax.Array, key: jax.Array) -> jax.Array:
    """A sampled action [n, action_dim] for stacks uint8 [n, 84, 84, 9]."""
    features = encode(agent.encoder, agent.params["encoder"], pictures)
    return sample_action(agent.actor, agent.params["actor"], features, key)[0]


@jax.jit
def act(agent: AgentState, obs: jax.Array, key: jax.Array, env_steps: int) -> jax.Array:
    """Exploration: a sampled action [n, action_dim] for stacks uint8 [n, 84, 84, 9]."""
    return explore(agent, obs, jax.random.fold_in(key, env_steps))


# --------------------------------------------- what evaluation and tools use of a script

init_state = init_agent


@jax.jit
def policy(agent: AgentState, frames: jax.Array) -> jax.Array:
    """The agent's mean action for stacked frames of any size: [n, action_dim]."""
    features = encode(agent.encoder, agent.params["encoder"], pixels.scale_down(frames))
    mean, _ = agent.actor.apply(agent.params["actor"], features)
    return jnp.tanh(mean)


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    args = flags.check_args(args, METAWORLD)
    length = args.layout.episode_length
    flags.check_replay(args, args.buffer_size, args.learning_starts, length)
    args = replace(args, buffer_size=pixels.whole_blocks(args.buffer_size, args.layout))
    METAWORLD.check_camera(args.camera_id)
    # Drawn larger and scaled down, as FuRL's frames are: else only the baseline's edges are jagged.
    camera = Camera(2 * pixels.PICTURE_SIZE, args.camera_id, args.quality)
    envs = METAWORLD.make_vec(
        args.env_id, args.num_envs, seed=args.seed, goal=args.goal, camera=camera,
        action_repeat=args.action_repeat, draw_resets=True,
    )
    evaluate = Evaluator(
        args.env_id, seed=args.seed, goal=args.goal, num_episodes=args.eval_episodes,
        camera=camera, capture_video=args.capture_video, frame_stack=args.frame_stack,
        action_repeat=args.action_repeat,
    )
    sizes = Sizes(envs.obs_dim, envs.action_dim)
    init_key, act_key, update_key = jax.random.split(jax.random.key(args.seed), 3)
    agent, buffers = init_agent(init_key, sizes, args), init_buffers(sizes, args)
    run = start_run(args, buffers, sizes, envs, evaluate)
    first = np.asarray(pixels.scale_down(envs.reset()[1]))
    buffers = Buffers(pixels.add_first(buffers.steps, first))
    agent, buffers, _ = run.begin(agent, buffers, envs)

    obs = np.asarray(pixels.newest_stack(buffers.steps, args.layout))
    # Environments step while the device learns, so a step is stored and learned from one iteration
    # later, when the next one is under way. Until then it is `previous`.
    previous, metrics = None, {}
    for env_steps in run.iterations():  # steps done so far
        # Act, and let the environments step and draw ...
        if env_steps < args.learning_starts:
            rng = np.random.default_rng((args.seed, ACTION_STREAM, env_steps))
            action = rng.uniform(-1, 1, (args.num_envs, sizes.action)).astype(np.float32)
        else:
            action = np.asarray(act(agent, obs, act_key, env_steps))  # waits for the updates before
            run.check_finite(action, metrics)
        envs.step_async(action)

        # ... while the step before is stored and learned from.
        if previous is not None:
            buffers = Buffers(pixels.add_step(buffers.steps, *previous))
        if env_steps >= max(args.learning_starts, 1):
            agent, metrics = update(agent, buffers, update_key, env_steps, args)

        step = envs.step_wait()
        obs, picture, first = pixels.observe(obs, step, args.frame_stack)
        previous = pixels.PixelStep(picture, action, step.reward, step.terminated), first

        # Measure and save.
        run.count_episodes(step)
        if run.is_due(args.eval_every):
            run.evaluate(policy, agent)
        if run.is_due(args.log_every):
            run.log_training("drq" if metrics else "random", {
                **metrics, "charts/num_updates": agent.opt[0].count,
            })
        if run.must_save():
            buffers, previous = Buffers(pixels.add_step(buffers.steps, *previous)), None
            run.save(agent, buffers, envs)

    run.close()
    return run.evaluation


if __name__ == "__main__":
    run_script(main, Args)
