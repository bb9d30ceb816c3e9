"""FuRL on pixels: DrQ instead of SAC, on three stacked pictures instead of states.

Section 5.4 of Fu et al., ICML 2024, arXiv 2406.00645. FuRL itself is that of furl_sac_state.py; the
agents are DrQ (Kostrikov et al., 2021, arXiv 2004.13649): SAC behind a convolutional encoder that
the critics train, on pictures shifted at random. With --no-vlm it is DrQ on the sparse reward, the
baseline of Figure 7.

    python furl_drq_pixels.py --env-id window-open-v3 --goal random
    python furl_drq_pixels.py --env-id window-open-v3 --goal random --no-vlm

docs/furl_drq_pixels.md explains every metric and says what a run costs.

Deviations from the paper, whose Table 5 is the default, and choices where it is silent:
 1. Those of furl_sac_state.py: eight environments, relay and alignment, random steps, temperature.
 2. One picture serves both: it is drawn in the VLM's size and scaled down for the policy.
 3. A step is a physics step: an action is repeated for two of them, is learned from once, and one
    frame is drawn. Success at either counts as one success.
 4. --lag counts frames, as many as --action-repeat steps apart.
 5. Each agent has an encoder of its own, of which its actor uses the convolutions.
 6. Pictures are divided by 255, less 0.5, and layers have flax's LeCun initialisation; DrQ's own
    code divides by 255 and initialises orthogonally.
 7. The policy sees the whole picture, also where the VLM sees a part of it.
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
from common.convolution import convolve, few_at_a_time
from common.envs import MAX_EPISODE_STEPS, VecMetaWorld, goal_image
from common.errors import UserError
from common.evaluate import Evaluator
from common.rendering import gl_info, view_for
from common.replay import Frame, Ring, Sizes, Transition
from common.run import start_run
from common.tasks import prompt_for
from common.vlm import VLM, load_vlm

PICTURE_SIZE = 84  # pixels, width and height of what the policy sees
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
    camera_id: int = 2  # camera of the frames
    action_repeat: PositiveInt = 2  # physics steps per action
    # --- DrQ
    learning_starts: int = 10_000  # steps of uniformly random actions before the first update
    utd: float = 1.0  # updates per action
    buffer_size: int = 200_000  # pictures in the replay
    batch_size: PositiveInt = 256  # samples per update, of the agents and of each ranking loss
    learning_rate: PositiveFloat = 1e-4  # Adam's, for all networks
    gamma: Fraction = 0.99  # discount factor
    tau: Fraction = 0.01  # step of the target critics
    init_temperature: PositiveFloat = 0.1  # temperature before learning
    hidden_features: PositiveInts = (256, 256, 256)  # hidden layers of actor and critics
    frame_stack: PositiveInt = 3  # pictures that the policy sees, the newest last
    shift: PositiveInt = 4  # pixels by which pictures are shifted at random
    encoder_features: PositiveInts = (32, 32, 32, 32)  # 3 x 3 convolutions, the first by 2
    encoder_dim: PositiveInt = 50  # numbers that actor and critics get of a stack of pictures
    no_vlm: bool = False  # DrQ alone: no VLM, no relay
    # --- VLM reward
    vlm: str = "mini"  # mini, liv, clip, or an open_clip pair such as ViT-B-32/openai
    vlm_weights: str | None = None  # local weights file for --vlm
    pretrained: bool = True  # --no-pretrained: same encoder, randomly initialised (Figure 9)
    prompt: str | None = None  # default: Table 4's; short, long: Table 6's; or any text
    rho: NotNegativeFloat = 0.05  # weight of the VLM reward (Eq. 1)
    # --- alignment
    align: bool = True  # --no-align: the raw VLM reward of Eq. 2, no projection heads
    goal_image: bool = True  # --no-goal-image: no Eq. 5, so no alignment before a success
    stage1: bool = True  # --no-stage1: without Eq. 5
    stage2: bool = True  # --no-stage2: Eq. 5 only
    projection_features: PositiveInts = (256, 64)  # layers of both projection heads
    lag: PositiveInt = 10  # k of Eq. 4, frames
    reward_margin: NotNegativeFloat = 0.1  # delta of Eqs. 4 and 5
    l2_margin: NotNegativeFloat = 0.2  # margin on the distance to the goal image in Eq. 5
    embedding_buffer_size: PositiveInt = 100_000  # frames for the ranking losses, of either kind
    # --- relay
    relay: bool = True  # --no-relay: the VLM agent explores alone
    relay_periods: PositiveInts = (50, 100, 150, 200)  # T_s: steps until the agents change
    relay_until: NotNegativeInt = 2_500  # positive samples at which relaying ends (Figure 5)
    relay_noise: NotNegativeFloat = 0.2  # std of the noise on the relay agent's actions

    @property
    def updates_per_iteration(self) -> int:
        return round(self.utd * self.num_envs)

    @property
    def uses_goal_image(self) -> bool:
        return self.align and self.stage1 and self.goal_image

    @property
    def episode_length(self) -> int:  # actions
        return MAX_EPISODE_STEPS // self.action_repeat


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


class PixelStep(NamedTuple):
    """What is stored of a step: the picture reached, and what led there."""

    picture: jax.Array  # [n, 84, 84, 3] uint8
    action: jax.Array  # [n, action_dim] float32
    sparse_reward: jax.Array  # [n] float32
    terminated: jax.Array  # [n] float32
    embedding: jax.Array | None = None  # [n, embed_dim]


class Buffers(NamedTuple):
    pixels: Ring  # of PixelStep, num_envs rows at a time
    positives: Ring  # of Frame
    negatives: Ring  # of Frame


class Phase(NamedTuple):
    """What is trained: static, so that each phase compiles to exactly its own work."""

    relaying: bool
    alignment: Literal["none", "goal-image", "success"]  # nothing, Eq. 5, Eq. 4

    @property
    def name(self) -> str:
        return "relay" if self.relaying else "vlm" if self.alignment == "none" else "aligned"


class VLMInputs(NamedTuple):
    text: jax.Array  # Phi_L(l) [embed_dim]
    goal: jax.Array  # Phi_I(o_g) [embed_dim]; zeros without a goal image


# --------------------------------------------------------------------------- networks


class MLP(nn.Module):
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in self.features[:-1]:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.features[-1])(x)


class Encoder(nn.Module):
    """uint8 [..., 84, 84, 9] -> [..., 35 * 35 * 32]: convolutions (DrQ, Table 5)."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, pictures: jax.Array) -> jax.Array:
        x = pictures.astype(jnp.float32) / 255 - 0.5
        for i, features in enumerate(self.features):
            shape = (3, 3, x.shape[-1], features)
            kernel = self.param(f"kernel_{i}", nn.initializers.lecun_normal(), shape)
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (features,))
            x = nn.relu(convolve(x, kernel, 2 if i == 0 else 1) + bias)
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

    @nn.compact
    def __call__(self, features: jax.Array, action: jax.Array) -> jax.Array:
        ensemble = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
        )
        x = jnp.concatenate([Neck(self.encoder_dim)(features), action], axis=-1)
        return ensemble((*self.hidden_features, 1))(x).squeeze(-1)


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


@jax.jit
def scale_down(frames: jax.Array) -> jax.Array:
    """uint8 [n, height, width, channels] -> uint8 [n, 84, 84, channels], antialiased."""
    if frames.shape[1] == PICTURE_SIZE:
        return frames
    shape = (frames.shape[0], PICTURE_SIZE, PICTURE_SIZE, frames.shape[3])
    resized = jax.image.resize(frames.astype(jnp.float32), shape, "linear", antialias=True)
    return resized.round().clip(0, 255).astype(jnp.uint8)


def random_shift(pictures: jax.Array, key: jax.Array, shift: int) -> jax.Array:
    """DrQ's augmentation: each sample of [batch, height, width, channels] moved by up to `shift`
    pixels in both directions, all of its channels alike; the border is repeated."""
    batch, height, width, channels = pictures.shape
    padded = jnp.pad(pictures, ((0, 0), (shift, shift), (shift, shift), (0, 0)), "edge")
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * shift + 1)

    def crop(picture: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(picture, (*offset, 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def stack(ring: Ring, block: jax.Array, env: jax.Array, args: Args) -> jax.Array:
    """The pictures up to row `block` [n] of environment `env` [n]: [n, 84, 84, 3 frame_stack].

    All episodes begin and end together, so rows come in blocks of `num_envs`: block 0 of each
    `episode_length + 1` holds the episodes' first pictures, each other one a step. A stack never
    reaches beyond the first picture of its episode, which is repeated.
    """
    time = block % (args.episode_length + 1)
    ages = jnp.minimum(jnp.arange(args.frame_stack - 1, -1, -1), time[:, None])
    slots = ((block[:, None] - ages) * args.num_envs + env[:, None]) % ring.capacity
    pictures = ring.data.picture[slots]  # [n, frame_stack, 84, 84, 3]
    return jnp.moveaxis(pictures, 1, -2).reshape(*pictures.shape[:1], *pictures.shape[2:4], -1)


@partial(jax.jit, static_argnames="args")
def newest_stack(ring: Ring, args: Args) -> jax.Array:
    """What the policy sees now, in all environments: [num_envs, 84, 84, 3 frame_stack]."""
    newest = ring.total // args.num_envs - 1
    return stack(ring, jnp.full(args.num_envs, newest), jnp.arange(args.num_envs), args)


def sample_batch(ring: Ring, key: jax.Array, args: Args) -> Transition:
    """Uniform transitions, stacked as they are read and shifted: obs and next_obs uint8
    [batch, 84, 84, 9]."""
    transition_key, env_key, shift_key, next_shift_key = jax.random.split(key, 4)
    length = args.episode_length
    blocks = ring.total // args.num_envs
    # The pictures before the oldest blocks have been overwritten.
    oldest = jnp.maximum(0, blocks - ring.capacity // args.num_envs + args.frame_stack)

    def steps_before(block: jax.Array) -> jax.Array:
        return block - -(-block // (length + 1))

    number = jax.random.randint(
        transition_key, (args.batch_size,), steps_before(oldest), steps_before(blocks)
    )
    block = number + number // length + 1  # never an episode's first
    env = jax.random.randint(env_key, (args.batch_size,), 0, args.num_envs)
    rows = replay.take(ring, (block * args.num_envs + env) % ring.capacity)
    return Transition(  # XLA drops what is not used of the rows: their pictures
        obs=random_shift(stack(ring, block - 1, env, args), shift_key, args.shift),
        action=rows.action,
        next_obs=random_shift(stack(ring, block, env, args), next_shift_key, args.shift),
        sparse_reward=rows.sparse_reward,
        terminated=rows.terminated,
        embedding=rows.embedding,
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


def alpha_loss(
    log_alpha: jax.Array, entropy: jax.Array, action_dim: int
) -> tuple[jax.Array, dict]:
    """Moves the temperature so that the entropy approaches its target, -|A|/2 (Table 5)."""
    alpha = jnp.exp(log_alpha)
    return alpha * (jax.lax.stop_gradient(entropy) + action_dim / 2), {"alpha": alpha}


def drq_loss(
    params: dict, agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array,
    args: Args,
) -> tuple[jax.Array, dict]:
    """The three losses as one; the encoder is moved by the critics alone."""
    critic_key, actor_key = jax.random.split(key)
    critic, (features, critic_metrics) = critic_loss(
        params, agent, batch, reward, critic_key, args
    )
    features = jax.lax.stop_gradient(features)
    actor, actor_metrics = actor_loss(params["actor"], agent, features, actor_key)
    alpha, alpha_metrics = alpha_loss(
        params["log_alpha"], actor_metrics["entropy"], batch.action.shape[-1]
    )
    return critic + actor + alpha, critic_metrics | actor_metrics | alpha_metrics


# ----------------------------------------------------------------------- FuRL's losses


def cosine_similarity(text: jax.Array, images: jax.Array) -> jax.Array:
    """Eq. 2: text [D], images [n, D] -> [n]; 0, with finite gradients, for a zero vector."""
    squares = (text**2).sum() * (images**2).sum(-1)
    return images @ text * jax.lax.rsqrt(squares + 1e-12)


def vlm_reward(projection_params: dict, images: jax.Array, vlm: VLMInputs, args: Args) -> jax.Array:
    """Eq. 3, images [n, D] -> r_VLM [n]; the raw similarity of Eq. 2 with --no-align."""
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
    # Of a pair in both orders, one can be in the mask.
    return loss, {"neg_neg_loss": loss, "neg_neg_pairs": 2 * nearer.mean()}


def positives_loss(
    projection_params: dict, positives: jax.Array, old_enough: jax.Array, earlier: jax.Array,
    earlier_exists: jax.Array, negatives: jax.Array, negatives_exist: jax.Array, vlm: VLMInputs,
    args: Args,
) -> tuple[jax.Array, dict]:
    """Eq. 4: successes above failures, later above earlier in one success; images [batch, D].

    Positives from an episode's first k steps are not `old_enough` and take no part.
    """
    images = jnp.concatenate([positives, earlier, negatives])
    positive, lagged, negative = jnp.split(vlm_reward(projection_params, images, vlm, args), 3)
    pos_neg = ranking_loss(positive, negative, args.reward_margin, old_enough & negatives_exist)
    pos_pos = ranking_loss(positive, lagged, args.reward_margin, earlier_exists)
    return pos_neg + pos_pos, {"pos_neg_loss": pos_neg, "pos_pos_loss": pos_pos}


# ---------------------------------------------------------------------------- updates


def descend(loss_fn, params, opt_state, args: Args):
    """One Adam step on `loss_fn(params) -> (loss, metrics)`."""
    gradients, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optax.adam(args.learning_rate).update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, metrics


@partial(jax.jit, static_argnames=("sizes", "args"))  # eagerly it takes twice as long
def init_agent(key: jax.Array, sizes: Sizes, args: Args) -> AgentState:
    encoder = Encoder(args.encoder_features)
    actor = Actor(sizes.action, args.hidden_features, args.encoder_dim)
    critic = CriticPair(args.hidden_features, args.encoder_dim)
    encoder_key, actor_key, critic_key = jax.random.split(key, 3)
    pictures = jnp.zeros((1, PICTURE_SIZE, PICTURE_SIZE, 3 * args.frame_stack), jnp.uint8)
    encoder_params = encoder.init(encoder_key, pictures)
    features = encode(encoder, encoder_params, pictures)
    params = {
        "encoder": encoder_params,
        "actor": actor.init(actor_key, features),
        "critic": critic.init(critic_key, features, jnp.zeros((1, sizes.action))),
        # float32 by name: a weak type lasts until the first update, and then all compiles again.
        "log_alpha": jnp.log(jnp.float32(args.init_temperature)),
    }
    target = jax.tree.map(jnp.copy, {name: params[name] for name in ("encoder", "critic")})
    opt = optax.adam(args.learning_rate).init(params)
    return AgentState(params, target, opt, encoder, actor, critic)


def update_agent(
    agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One DrQ update; all gradients are taken from the networks as they were before it."""
    params, opt, metrics = descend(
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
    scalar, number = np.zeros((), np.float32), np.zeros((), np.int32)
    picture = np.zeros((PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    action = np.zeros(sizes.action, np.float32)
    # Embeddings of a network with random weights differ by less than float16 can tell.
    embedding = np.zeros(sizes.embedding, np.float16 if args.pretrained else np.float32)
    frame = Frame(embedding, number, number, np.zeros((), bool))
    return Buffers(
        replay.init_ring(PixelStep(picture, action, scalar, scalar, embedding), args.buffer_size),
        replay.init_ring(frame, args.embedding_buffer_size),
        replay.init_ring(frame, args.embedding_buffer_size),
    )


def store_first(buffers: Buffers, pictures: np.ndarray) -> Buffers:
    """Write the rows that begin an episode, pictures [num_envs, 84, 84, 3]: no step leads there."""
    nothing = jax.tree.map(
        lambda x: np.zeros((len(pictures), *x.shape[1:]), x.dtype), buffers.pixels.data
    )
    rows = nothing._replace(picture=pictures)
    return buffers._replace(pixels=replay.add_rows(buffers.pixels, rows))


def update_projection(
    state: FuRLState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, args: Args, phase: Phase
) -> tuple[FuRLState, dict]:
    """One step of the alignment that belongs to the phase: Eq. 5 or Eq. 4."""
    negatives_key, positives_key = jax.random.split(key)

    def images(ring: Ring, slots: jax.Array) -> jax.Array:
        return ring.data.embedding[slots].astype(jnp.float32)  # [batch, D]

    slots = replay.sample_slots(buffers.negatives, negatives_key, args.batch_size)
    negatives = images(buffers.negatives, slots)
    if phase.alignment == "goal-image":
        loss_fn = partial(negatives_loss, images=negatives, vlm=vlm, args=args)
    else:
        slots = replay.sample_slots(buffers.positives, positives_key, args.batch_size)
        earlier_slots, earlier_exists = replay.lagged_slots(buffers.positives, slots, args.lag)
        loss_fn = partial(
            positives_loss, positives=images(buffers.positives, slots),
            old_enough=buffers.positives.data.time[slots] >= args.lag,
            earlier=images(buffers.positives, earlier_slots), earlier_exists=earlier_exists,
            negatives=negatives, negatives_exist=buffers.negatives.size > 0, vlm=vlm, args=args,
        )
    projection, opt, metrics = descend(loss_fn, state.projection, state.projection_opt, args)
    return state._replace(projection=projection, projection_opt=opt), metrics


def update_once(
    state: FuRLState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, args: Args, phase: Phase
) -> tuple[FuRLState, dict]:
    """One pass of Algorithm 1's updates on one batch that both agents share."""
    sample_key, furl_key, relay_key, projection_key = jax.random.split(key, 4)
    metrics = {}
    if phase.alignment != "none":
        state, metrics = update_projection(state, buffers, vlm, projection_key, args, phase)
    batch = sample_batch(buffers.pixels, sample_key, args)
    fuzzy = vlm_reward(state.projection, batch.embedding.astype(jnp.float32), vlm, args)
    task_reward = batch.sparse_reward - 1  # constant shaping (B.2)
    shaped_reward = task_reward + args.rho * fuzzy  # Eq. 1
    furl, furl_metrics = update_agent(state.furl, batch, shaped_reward, furl_key, args)
    relay, relay_metrics = state.relay, {}
    if phase.relaying:
        relay, relay_metrics = update_agent(state.relay, batch, task_reward, relay_key, args)
    metrics = (
        {f"losses/{name}": value for name, value in (metrics | furl_metrics).items()}
        | {f"losses/relay_{name}": value for name, value in relay_metrics.items()}
        | {"reward/vlm_mean": fuzzy.mean(), "reward/vlm_std": fuzzy.std()}
        | {"reward/sparse_mean": batch.sparse_reward.mean()}
    )
    return state._replace(furl=furl, relay=relay), metrics


@partial(jax.jit, static_argnames=("args", "phase"), donate_argnames="state")
def update(
    state: FuRLState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, env_steps: int,
    args: Args, phase: Phase,
) -> tuple[FuRLState, dict]:
    """All updates of an iteration in one dispatch; the means of their metrics."""
    state, metrics = jax.lax.scan(
        lambda carry, update_key: update_once(carry, buffers, vlm, update_key, args, phase),
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


def choose_phase(buffers: Buffers, args: Args) -> Phase:
    """Algorithm 1's branches, from the samples collected so far; waits for the device."""
    positives = buffers.positives
    alignment = "none"
    if args.align and args.stage2 and (positives.data.time >= args.lag).any():
        alignment = "success"
    elif args.uses_goal_image and buffers.negatives.total > 0:
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
    features = encode(agent.encoder, agent.params["encoder"], scale_down(frames))
    mean, _ = agent.actor.apply(agent.params["actor"], features)
    return jnp.tanh(mean)


def load_reward(state: FuRLState, vlm: VLM, args: Args) -> Callable[[jax.Array], jax.Array]:
    """The VLM reward that was learned, before its weight rho: embeddings [n, D] -> [n]."""
    text = jnp.asarray(vlm.embed_text([prompt_for(args.env_id, args.prompt)])[0])
    inputs = VLMInputs(text, goal=jnp.zeros_like(text))  # which only Eq. 5 looks at
    return jax.jit(partial(vlm_reward, state.projection, vlm=inputs, args=args))


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    args = check_pixel_args(check_args(args))
    drawing = {"camera_id": args.camera_id, "quality": args.quality}
    if args.no_vlm:  # embeddings of one zero, whose similarity is 0
        vlm, prompt, view, embed_dim, frame_size = None, None, None, 1, PICTURE_SIZE
        text = goal = np.zeros(1, np.float32)
    else:
        prompt = prompt_for(args.env_id, args.prompt)
        vlm = load_vlm(
            args.vlm, weights=args.vlm_weights, pretrained=args.pretrained, seed=args.seed
        )
        view, embed_dim = view_for(vlm), vlm.embed_dim
        frame_size = view.size
        text = vlm.embed_text([prompt])[0]
        goal = np.zeros_like(text)
    if args.uses_goal_image:
        picture = goal_image(
            args.env_id, seed=args.seed, goal=args.goal, size=frame_size, **drawing
        )
        goal = vlm.embed_images(view.crop(picture[None]))[0]
    vlm_inputs = VLMInputs(jnp.asarray(text), jnp.asarray(goal))
    envs = VecMetaWorld(
        args.env_id, args.num_envs, seed=args.seed, goal=args.goal, frame_size=frame_size,
        action_repeat=args.action_repeat, draw_resets=True, **drawing,
    )
    evaluate = Evaluator(
        args.env_id, seed=args.seed, goal=args.goal, num_episodes=args.eval_episodes,
        capture_video=args.capture_video, frame_stack=args.frame_stack, frame_size=frame_size,
        action_repeat=args.action_repeat, **drawing,
    )
    sizes = Sizes(envs.obs_dim, envs.action_dim, embed_dim)
    init_key, act_key, update_key = jax.random.split(jax.random.key(args.seed), 3)
    state, buffers = init_state(init_key, sizes, args), init_buffers(sizes, args)
    run = start_run(
        args, buffers, sizes=sizes, evaluation=evaluate.settings, engine=envs.engine,
        prompt=prompt, vlm=vlm and vlm.settings, vlm_id=vlm and vlm.id,
        view=view and view._asdict(), gl=gl_info(),
    )
    buffers = store_first(buffers, np.asarray(scale_down(envs.reset()[1])))
    env_steps, state, buffers, _ = run.begin(state, buffers, envs)

    def store(
        buffers: Buffers, rows: PixelStep, frames: np.ndarray, first: np.ndarray | None
    ) -> Buffers:
        embedding = np.zeros((len(frames), 1)) if vlm is None else vlm.embed_images(
            view.crop(frames))
        rows = rows._replace(embedding=embedding)
        buffers = buffers._replace(pixels=replay.add_rows(buffers.pixels, rows))
        return buffers if first is None else store_first(buffers, first)

    phase = choose_phase(buffers, args)
    obs = np.asarray(newest_stack(buffers.pixels, args))
    newest = None  # the last step, until its frames are embedded and it is stored
    metrics: dict[str, jax.Array] = {}
    while env_steps < args.total_timesteps:
        # Act, and let the environments step and draw ...
        episode, action_number = divmod(
            env_steps // (args.num_envs * args.action_repeat), envs.episode_length
        )
        if env_steps < args.learning_starts:
            rng = np.random.default_rng((args.seed, ACTION_STREAM, env_steps))
            action = rng.uniform(-1, 1, (args.num_envs, sizes.action)).astype(np.float32)
        else:
            use_relay = relay_acts(
                draw_schedule(episode, args), action_number * args.action_repeat
            )
            action = np.asarray(  # waits for the updates before
                act(state, obs, use_relay, act_key, env_steps, args, phase.relaying)
            )
            run.check_finite(env_steps, action, metrics)
        envs.step_async(action)

        # ... while the frames of the step before are embedded, stored and learned from.
        if newest is not None:
            buffers = store(buffers, *newest)
        if action_number == 0 and episode > 0:  # all episodes end together
            # The newest rows are the first pictures of the new episodes.
            ended = buffers.pixels._replace(total=buffers.pixels.total - args.num_envs)
            positives, negatives = replay.sort_episodes(
                buffers.positives, buffers.negatives, ended, args.num_envs, envs.episode_length
            )
            buffers = buffers._replace(positives=positives, negatives=negatives)
            phase = choose_phase(buffers, args)
        if env_steps >= max(args.learning_starts, 1):
            state, metrics = update(
                state, buffers, vlm_inputs, update_key, env_steps, args, phase
            )

        step = envs.step_wait()
        env_steps += args.num_envs * args.action_repeat
        picture = np.asarray(scale_down(step.frames))
        terminated = step.terminated.astype(np.float32)
        rows, first = PixelStep(picture, action, step.sparse_reward, terminated), None
        obs = np.concatenate([obs[..., 3:], picture], -1)
        if step.truncated.all():  # episodes end at the time limit alone, so all end together
            first = np.asarray(scale_down(step.reset_frames))
            obs = np.concatenate([first] * args.frame_stack, -1)
        newest = rows, step.frames, first

        # Measure and save.
        run.count_episodes(step.success, step.truncated)
        if run.is_due(args.eval_every, env_steps):
            run.log_evaluation(
                env_steps, evaluate(partial(policy, state), run.video_path(env_steps))
            )
        if run.is_due(args.log_every, env_steps):
            stage = "drq" if args.no_vlm else phase.name
            run.log_training(env_steps, stage if metrics else "random", {
                **metrics, "charts/relaying": phase.relaying,
                "charts/num_updates": state.furl.opt[0].count,
                "charts/num_positives": buffers.positives.total,
                "charts/num_negatives": buffers.negatives.total,
            })
        if run.must_save(env_steps):
            buffers, newest = store(buffers, *newest), None
            run.save(env_steps, state, buffers, envs)

    for thing in (run, evaluate, envs):
        thing.close()
    return run.evaluation


def check_pixel_args(args: Args) -> Args:
    """`args`, with --no-vlm spelt out and room for whole steps of all environments in the replay.

    Raises:
        UserError: names the flag whose value cannot work, and what can.
    """
    if MAX_EPISODE_STEPS % args.action_repeat:
        raise UserError(f"--action-repeat must divide {MAX_EPISODE_STEPS}, the steps of an "
                        f"episode, not {args.action_repeat}")
    check_episodes_fit(args, args.episode_length)
    whole = -(-args.buffer_size // args.num_envs) * args.num_envs
    if whole != args.buffer_size:
        print(f"note: --buffer-size {args.buffer_size} becomes {whole}, whole steps of "
              f"{args.num_envs} environments")
    # An episode with its first picture, and stacks that end in its last two.
    least = args.num_envs * (max(args.episode_length, args.frame_stack) + 2)
    if whole < least:
        raise UserError(f"--buffer-size must hold the pictures of an episode of each of "
                        f"{args.num_envs} environments, {least} or more, not {whole}")
    if args.no_vlm:
        args = replace(args, relay=False, align=False)
    return replace(args, buffer_size=whole)


if __name__ == "__main__":
    run_script(main, Args)
