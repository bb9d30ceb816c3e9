"""FuRL on pixels: DrQ instead of SAC, on three stacked pictures instead of states.

Section 5.4 of Fu et al., ICML 2024, arXiv 2406.00645. The agents are DrQ (Kostrikov et al., 2021,
arXiv 2004.13649): SAC behind a convolutional encoder that the critics train, on pictures shifted at
random. FuRL itself is that of furl_sac_state.py; drq_baseline.py is DrQ alone.

    python furl_drq_pixels.py --env-id window-open-v3 --goal random

docs/furl_drq_pixels.md has metrics, deviations and results.

Defaults are the paper's Table 5. Deviations are those of furl_sac_state.py, and (the page has all):
 1. One picture serves both: drawn in the VLM's size, all of it scaled down for the policy.
 2. A step is a physics step. An action is repeated for two of them, learned from once, and one
    frame is drawn, of which success at either is one success; --lag counts frames.
 3. Each agent has an encoder of its own, of which its actor uses the convolutions. Pictures are
    divided by 255, less 0.5, and layers have flax's LeCun initialisation (DrQ: orthogonal).
"""

from collections.abc import Callable
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
from common.replay import LaggedFrames, Ring, Sizes, Transition
from common.run import start_run
from common.vlms import VLM, load_vlm, view_for
from common.vlms.task import VLMInputs, load_inputs

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
ACTION_STREAM, RELAY_STREAM = 0, 1  # with the seed: names of streams of random numbers on the host


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
    batch_size: flags.PositiveInt = 256  # per update, of the agents and of each ranking loss
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
    # --- VLM reward
    vlm: str = "mini"  # mini, liv, clip, or an open_clip pair such as ViT-B-32/openai
    vlm_weights: str | None = None  # local weights file for --vlm
    pretrained: bool = True  # --no-pretrained: same encoder, randomly initialised (Figure 9)
    prompt: str | None = None  # default: Table 4's; short, long: Table 6's (2 tasks); or any text
    embed_every: flags.PositiveInt = 1  # a frame is embedded every K-th action, for those after it
    rho: flags.NotNegativeFloat = 0.05  # weight of the VLM reward (Eq. 1)
    # --- alignment
    align: bool = True  # --no-align: the raw VLM reward of Eq. 2, no projection heads
    goal_image: bool = True  # --no-goal-image: no Eq. 5 (stage 1): no alignment before a success
    stage2: bool = True  # --no-stage2: no Eq. 4, Eq. 5 only
    stage2_after: flags.PositiveInt = 1  # positives (after k steps) at which Eq. 4 replaces Eq. 5
    projection_features: flags.PositiveInts = (256, 64)  # layers of both projection heads
    lag: flags.PositiveInt = 10  # k of Eq. 4, frames
    reward_margin: flags.NotNegativeFloat = 0.1  # delta of Eqs. 4 and 5
    l2_margin: flags.NotNegativeFloat = 0.2  # margin on the distance to the goal image in Eq. 5
    embedding_buffer_size: flags.PositiveInt = 100_000  # frames kept of positives, of negatives
    # --- relay
    relay: bool = True  # --no-relay: the VLM agent explores alone
    relay_periods: flags.PositiveInts = (50, 100, 150, 200)  # T_s: steps until the agents change
    relay_until: flags.NotNegativeInt = 2_500  # positive samples at which relaying ends (Figure 5)
    relay_noise: flags.NotNegativeFloat = 0.2  # std of the noise on the relay agent's actions

    @property
    def steps_per_iteration(self) -> int:
        return self.num_envs * self.action_repeat

    @property
    def layout(self) -> pixels.Layout:
        length = pixels.actions_per_episode(MAX_EPISODE_STEPS, self.action_repeat)
        return pixels.Layout(self.num_envs, length, self.frame_stack)


def check_flags(args: Args, episode_length: int) -> None:
    """Name flags without effect; UserError if the alignment could never begin."""
    flags.note_idle(args, align="stage2_after projection_features lag reward_margin l2_margin",
                    goal_image="l2_margin", stage2="stage2_after lag",
                    relay="relay_periods relay_until relay_noise")
    if args.align and not args.stage2 and not args.goal_image:
        print("note: --no-goal-image --no-stage2 leave nothing to align with: the projection "
              "heads stay random")
    needed = args.stage2_after if args.align and args.stage2 else 0
    flags.check_positives(args.embedding_buffer_size, args.lag, needed, episode_length)


# ------------------------------------------------------------------------------ state


@struct.dataclass
class AgentState:
    params: dict  # encoder, actor, critic, log_alpha
    target: dict  # encoder, critic
    opt: optax.OptState
    encoder: nn.Module = struct.field(pytree_node=False)
    actor: nn.Module = struct.field(pytree_node=False)
    critic: nn.Module = struct.field(pytree_node=False)


class FuRLState(NamedTuple):
    furl: AgentState  # learns from r_task + rho r_VLM, and is evaluated
    relay: AgentState  # learns from r_task
    projection: dict  # W_L and W_I
    projection_opt: optax.OptState


class Buffers(NamedTuple):
    steps: Ring  # of pixels.PixelStep, num_envs rows at a time
    positives: Ring  # of EmbeddedFrame
    negatives: Ring  # of EmbeddedFrame


class Phase(NamedTuple):
    """What is trained: static, so that each phase compiles to exactly its own work."""

    relaying: bool
    alignment: Literal["none", "goal-image", "success"]  # nothing, Eq. 5, Eq. 4

    @property
    def name(self) -> str:
        return "relay" if self.relaying else "vlm" if self.alignment == "none" else "aligned"


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


class Projection(nn.Module):
    """The heads f_{W_L} and f_{W_I} of Eq. 3: (text [D], images [n, D]) -> ([P], [n, P])."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, text: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        language_head = MLP(self.features, name="language")
        image_head = MLP(self.features, name="image")
        return language_head(text), image_head(images)


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


# ----------------------------------------------------------------------- FuRL's losses


def cosine_similarity(text: jax.Array, images: jax.Array) -> jax.Array:
    """Eq. 2: text [D], images [n, D] -> [n]; 0, with finite gradients, for a zero vector."""
    squares = (text**2).sum() * (images**2).sum(-1)
    return images @ text * jax.lax.rsqrt(squares + 1e-12)


def vlm_reward(projection_params: dict, images: jax.Array, vlm: VLMInputs, args: Args) -> jax.Array:
    """Eq. 3, images [n, D] -> r_VLM [n]; the raw similarity of Eq. 2 with --no-align."""
    images = images.astype(jnp.float32)
    if not args.align:
        return cosine_similarity(vlm.text, images)
    return cosine_similarity(
        *Projection(args.projection_features).apply(projection_params, vlm.text, images)
    )


def ranking_loss(better: jax.Array, worse: jax.Array, margin: float, mask: jax.Array) -> jax.Array:
    """l_delta of Eq. 4, the mean of max(0, worse - better + margin) over the pairs in `mask`."""
    losses = nn.relu(worse - better + margin) * mask
    return losses.sum() / jnp.maximum(mask.sum(), 1)


def negatives_loss(
    projection_params: dict, images: jax.Array, vlm: VLMInputs, args: Args
) -> tuple[jax.Array, dict]:
    """Eq. 5: of two failures, the one nearer to the goal image by the margin is the better.

    All pairs of the images [batch, D] are ranked, as in the authors' code.
    """
    reward = vlm_reward(projection_params, images, vlm, args)  # [batch]
    distance = jnp.linalg.norm(images - vlm.goal, axis=-1)  # [batch]
    nearer = distance[:, None] < distance - args.l2_margin  # [batch, batch]: row than column
    loss = ranking_loss(reward[:, None], reward, args.reward_margin, nearer)
    # The matrix has each pair in both orders, of which the mask has one at most.
    return loss, {"neg_neg_loss": loss, "neg_neg_pairs": 2 * nearer.mean()}


def positives_loss(
    projection_params: dict, positives: LaggedFrames, negatives: jax.Array,
    negatives_exist: jax.Array, vlm: VLMInputs, args: Args,
) -> tuple[jax.Array, dict]:
    """Eq. 4: successes above failures, later above earlier in one success; images [batch, D].

    Positives from an episode's first k steps are not `old_enough` and take no part.
    """
    images = jnp.concatenate([positives.embedding, positives.earlier, negatives])
    positive, earlier, negative = jnp.split(vlm_reward(projection_params, images, vlm, args), 3)
    may_rank = positives.old_enough & negatives_exist
    pos_neg = ranking_loss(positive, negative, args.reward_margin, may_rank)
    pos_pos = ranking_loss(positive, earlier, args.reward_margin, positives.has_earlier)
    return pos_neg + pos_pos, {"pos_neg_loss": pos_neg, "pos_pos_loss": pos_pos}


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


def init_state(key: jax.Array, sizes: Sizes, args: Args) -> FuRLState:
    furl_key, relay_key, projection_key = jax.random.split(key, 3)
    text, images = jnp.zeros(sizes.embedding), jnp.zeros((1, sizes.embedding))
    projection = Projection(args.projection_features).init(projection_key, text, images)
    opt = optax.adam(args.learning_rate).init(projection)
    furl, relay = (init_agent(agent_key, sizes, args) for agent_key in (furl_key, relay_key))
    return FuRLState(furl, relay, projection, opt)


def init_buffers(sizes: Sizes, args: Args) -> Buffers:
    # Embeddings of a network with random weights differ by less than float16 can tell.
    exact = not args.pretrained
    step, frame = pixels.example_step(sizes, exact), replay.example_frame(sizes, exact)
    capacity, flag = args.embedding_buffer_size, "--embedding-buffer-size"
    positives, negatives = (replay.init_ring(frame, capacity, flag) for _ in range(2))
    return Buffers(replay.init_ring(step, args.buffer_size), positives, negatives)


def update_projection(
    state: FuRLState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, args: Args, phase: Phase
) -> tuple[FuRLState, dict]:
    """One step of the alignment that belongs to the phase: Eq. 5 or Eq. 4."""
    negatives_key, positives_key = jax.random.split(key)
    slots = replay.sample_slots(buffers.negatives, negatives_key, args.batch_size)
    negatives = buffers.negatives.data.embedding[slots]
    if phase.alignment == "goal-image":
        loss_fn = partial(negatives_loss, images=negatives, vlm=vlm, args=args)
    else:
        slots = replay.sample_slots(buffers.positives, positives_key, args.batch_size)
        positives = replay.lagged_frames(buffers.positives, slots, args.lag)
        loss_fn = partial(positives_loss, positives=positives, negatives=negatives,
                          negatives_exist=buffers.negatives.size > 0, vlm=vlm, args=args)
    projection, opt, metrics = adam_step(loss_fn, state.projection, state.projection_opt, args)
    return state._replace(projection=projection, projection_opt=opt), metrics


def update_once(
    state: FuRLState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, args: Args, phase: Phase
) -> tuple[FuRLState, dict]:
    """One pass of Algorithm 1's updates on one batch that both agents share."""
    sample_key, furl_key, relay_key, projection_key = jax.random.split(key, 4)
    metrics = {}
    if phase.alignment != "none":
        state, metrics = update_projection(state, buffers, vlm, projection_key, args, phase)
    batch = sample_batch(buffers.steps, sample_key, args)
    vlm_rewards = vlm_reward(state.projection, batch.embedding, vlm, args)
    task_reward = batch.reward - 1  # constant shaping (B.2)
    shaped_reward = task_reward + args.rho * vlm_rewards  # Eq. 1
    furl, furl_metrics = update_agent(state.furl, batch, shaped_reward, furl_key, args)
    relay, relay_metrics = state.relay, {}
    if phase.relaying:
        relay, relay_metrics = update_agent(state.relay, batch, task_reward, relay_key, args)
    metrics = (
        {f"losses/{name}": value for name, value in (metrics | furl_metrics).items()}
        | {f"losses/relay_{name}": value for name, value in relay_metrics.items()}
        | {"reward/vlm_mean": vlm_rewards.mean(), "reward/vlm_std": vlm_rewards.std()}
        | {"reward/task_mean": batch.reward.mean()}
    )
    return state._replace(furl=furl, relay=relay), metrics


@partial(jax.jit, static_argnames=("args", "phase"), donate_argnames="state")
def update(
    state: FuRLState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, env_steps: int,
    args: Args, phase: Phase,
) -> tuple[FuRLState, dict]:
    """All updates of an iteration in one dispatch; the means of their metrics."""
    keys = jax.random.split(jax.random.fold_in(key, env_steps), args.updates_per_iteration)
    state, metrics = jax.lax.scan(
        lambda state, key: update_once(state, buffers, vlm, key, args, phase), state, keys
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


def choose_phase(buffers: Buffers, args: Args) -> Phase:
    """Algorithm 1's branches, from the samples collected so far; waits for the device."""
    alignment, positives = "none", buffers.positives
    old_enough = (positives.data.time >= args.lag).sum()
    # A full buffer has dropped positives, so their number may fall: it has had enough before.
    enough = 1 if positives.total >= positives.capacity else args.stage2_after
    if args.align and args.stage2 and old_enough >= enough:
        alignment = "success"
    elif args.align and args.goal_image and buffers.negatives.total > 0:
        alignment = "goal-image"
    return Phase(args.relay and int(positives.total) < args.relay_until, alignment)


def explore(agent: AgentState, pictures: jax.Array, key: jax.Array) -> jax.Array:
    """A sampled action [n, action_dim] for stacks uint8 [n, 84, 84, 9]."""
    features = encode(agent.encoder, agent.params["encoder"], pictures)
    return sample_action(agent.actor, agent.params["actor"], features, key)[0]


@partial(jax.jit, static_argnames=("args", "relaying"))
def act(
    state: FuRLState, obs: jax.Array, use_relay: jax.Array, key: jax.Array, env_steps: int,
    args: Args, relaying: bool,
) -> jax.Array:
    """Both agents sample for stacks uint8 [n, 84, 84, 9], a mask [n] selects: [n, action_dim]."""
    furl_key, relay_key, noise_key = jax.random.split(jax.random.fold_in(key, env_steps), 3)
    furl_action = explore(state.furl, obs, furl_key)
    if not relaying:
        return furl_action
    relay_action = explore(state.relay, obs, relay_key)
    noise = args.relay_noise * jax.random.normal(noise_key, relay_action.shape)
    relay_action = jnp.clip(relay_action + noise, -1, 1)
    return jnp.where(use_relay[:, None], relay_action, furl_action)


# --------------------------------------------- what evaluation and tools use of a script


@jax.jit
def policy(state: FuRLState, frames: jax.Array) -> jax.Array:
    """The evaluated agent's mean action for stacked frames of any size: [n, action_dim]."""
    agent = state.furl
    features = encode(agent.encoder, agent.params["encoder"], pixels.scale_down(frames))
    mean, _ = agent.actor.apply(agent.params["actor"], features)
    return jnp.tanh(mean)


def load_reward(state: FuRLState, vlm: VLM, args: Args) -> Callable[[jax.Array], jax.Array]:
    """The VLM reward that was learned, before its weight rho: embeddings [n, D] -> [n]."""
    return jax.jit(partial(vlm_reward, state.projection, vlm=load_inputs(vlm, args), args=args))


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    args = flags.check_args(args, METAWORLD)
    length = args.layout.episode_length
    flags.check_replay(args, args.buffer_size, args.learning_starts, length)
    args = replace(args, buffer_size=pixels.whole_blocks(args.buffer_size, args.layout))
    METAWORLD.check_camera(args.camera_id)
    check_flags(args, length)
    prompt = METAWORLD.prompt_for(args.env_id, args.prompt)
    vlm = load_vlm(args.vlm, weights=args.vlm_weights, pretrained=args.pretrained, seed=args.seed)
    view = view_for(vlm, METAWORLD)
    camera = Camera(view.size, args.camera_id, args.quality)  # all of it: the policy sees it too
    vlm_inputs = load_inputs(vlm, args)
    envs = METAWORLD.make_vec(
        args.env_id, args.num_envs, seed=args.seed, goal=args.goal, camera=camera,
        action_repeat=args.action_repeat, draw_resets=True,
    )
    evaluate = Evaluator(
        args.env_id, seed=args.seed, goal=args.goal, num_episodes=args.eval_episodes,
        camera=camera, capture_video=args.capture_video, frame_stack=args.frame_stack,
        action_repeat=args.action_repeat,
    )
    sizes = Sizes(envs.obs_dim, envs.action_dim, vlm.embed_dim)
    init_key, act_key, update_key = jax.random.split(jax.random.key(args.seed), 3)
    state, buffers = init_state(init_key, sizes, args), init_buffers(sizes, args)
    run = start_run(args, buffers, sizes, envs, evaluate, vlm=vlm, view=view, prompt=prompt)
    first = np.asarray(pixels.scale_down(envs.reset()[1]))
    buffers = buffers._replace(steps=pixels.add_first(buffers.steps, first))
    state, buffers, _ = run.begin(state, buffers, envs)

    def store(buffers: Buffers, step: pixels.PixelStep, first, frames, is_new: bool) -> Buffers:
        seen, drawn = view.crop(frames), np.full(args.num_envs, is_new)
        step = step._replace(embedding=replay.embed_drawn(vlm, seen, drawn, buffers.steps))
        return buffers._replace(steps=pixels.add_step(buffers.steps, step, first))

    phase = choose_phase(buffers, args)
    obs = np.asarray(pixels.newest_stack(buffers.steps, args.layout))
    # Environments step while the device learns, so a step is stored and learned from one iteration
    # later, when the next one is under way. Until then it is `previous`.
    previous, metrics = None, {}
    for env_steps in run.iterations():  # steps done so far
        # Act, and let the environments step and draw ...
        episode, time = divmod(env_steps // args.steps_per_iteration, envs.episode_length)
        if env_steps < args.learning_starts:
            rng = np.random.default_rng((args.seed, ACTION_STREAM, env_steps))
            action = rng.uniform(-1, 1, (args.num_envs, sizes.action)).astype(np.float32)
        else:
            use_relay = relay_acts(episode, time * args.action_repeat, args)
            action = act(state, obs, use_relay, act_key, env_steps, args, phase.relaying)
            action = np.asarray(action)  # waits for the updates before
            run.check_finite(action, metrics)
        envs.step_async(action)

        # ... while the frames of the step before are embedded, stored and learned from.
        if previous is not None:
            buffers = store(buffers, *previous)
        if time == 0 and episode > 0:  # all episodes end together
            ended = pixels.without_first(buffers.steps, args.layout)
            buffers = replay.sort_episodes(buffers, ended, args.num_envs, envs.episode_length)
            phase = choose_phase(buffers, args)
        if env_steps >= max(args.learning_starts, 1):
            state, metrics = update(state, buffers, vlm_inputs, update_key, env_steps, args, phase)

        step = envs.step_wait()
        obs, picture, first = pixels.observe(obs, step, args.frame_stack)
        pixel_step = pixels.PixelStep(picture, action, step.reward, step.terminated)
        # The first of an episode always: the row before it has no embedding to go on with.
        is_new = time == 0 or (time + 1) % args.embed_every == 0 or first is not None
        previous = (pixel_step, first, step.frames, is_new)

        # Measure and save.
        run.count_episodes(step)
        if run.is_due(args.eval_every):
            run.evaluate(policy, state)
        if run.is_due(args.log_every):
            run.log_training(phase.name if metrics else "random", {
                **metrics, "charts/relaying": phase.relaying,
                "charts/num_updates": state.furl.opt[0].count,
                "charts/num_positives": buffers.positives.total,
                "charts/num_negatives": buffers.negatives.total,
            })
        if run.must_save():
            buffers, previous = store(buffers, *previous), None
            run.save(state, buffers, envs)

    run.close()
    return run.evaluation


if __name__ == "__main__":
    run_script(main, Args)
