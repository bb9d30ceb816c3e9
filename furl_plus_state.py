"""FuRL plus: FuRL that keeps what it finds, on state observations.

FuRL as in furl_sac_state.py (Fu et al., ICML 2024, arXiv 2406.00645), with parts of its own:
n-step returns, a share of each batch from successes, clipped targets, the VLM's reward as a
potential, held noise, a relay agent that is also rewarded for moving the object, and, off by
default, demonstrations: docs/furl_plus_state.md. Its defaults are not the paper's.

    python furl_plus_state.py --env-id drawer-open-v3
    python furl_plus_state.py --env-id pick-place-v3 --demos 3
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
from common.envs.metaworld_suite import ACTION_DIM, MAX_EPISODE_STEPS, OBJECT, Experts
from common.envs.registry import METAWORLD
from common.envs.workers import Step
from common.errors import UserError
from common.evaluate import Evaluator
from common.replay import LaggedFrames, Ring, Sizes, Transition
from common.run import start_run
from common.vlms import VLM, load_vlm, view_for
from common.vlms.task import VLMInputs, load_inputs

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
RELAY_STREAM = 1  # with the seed: name of a stream of random numbers on the host


@dataclass(frozen=True)
class Args(flags.RunArgs):  # env_id, seed, total_timesteps, num_envs, utd, logs: common/flags.py
    total_timesteps: flags.PositiveInt = 80_000  # environment steps, summed over the environments
    eval_every: flags.PositiveInt = 2_000  # environment steps between evaluations
    checkpoint_every: flags.NotNegativeInt = 10_000  # steps between checkpoints; 0: only at the end
    # --- environment
    goal: flags.Goal = "fixed"  # fixed: hidden, one per seed
    quality: Literal["fast", "paper"] = "fast"  # of frames; paper: MuJoCo's default, slow
    camera_id: flags.NotNegativeInt = 2  # camera of the VLM's frames
    # --- SAC
    learning_starts: flags.NotNegativeInt = 10_000  # random steps before the first update
    buffer_size: flags.PositiveInt = 1_000_000  # transitions in the replay
    batch_size: flags.PositiveInt = 64  # per update, of the agents and of each ranking loss
    learning_rate: flags.PositiveFloat = 3e-4  # Adam's, for all networks
    gamma: flags.Fraction = 0.99  # discount factor
    tau: flags.Fraction = 0.01  # step of the target critics
    actor_tau: flags.Fraction = 0.001  # of the averaged actor, which is evaluated; 1: no average
    init_temperature: flags.PositiveFloat = 0.01  # temperature before learning
    init_q: flags.FiniteFloat = -100.0  # added to the critics' output: values before learning
    hidden_features: flags.PositiveInts = (256, 256)  # hidden layers of actor and critics
    layer_norm: bool = True  # in the critics, against overestimated values (Ball et al., 2023)
    # --- VLM reward
    vlm: str = "mini"  # mini, liv, clip, or an open_clip pair such as ViT-B-32/openai
    vlm_weights: str | None = None  # local weights file for --vlm
    pretrained: bool = True  # --no-pretrained: same encoder, randomly initialised (Figure 9)
    prompt: str | None = None  # default: Table 4's; short, long: Table 6's (2 tasks); or any text
    draw_every: flags.PositiveInt = 4  # a frame is drawn every K-th step, and stands until the next
    rho: flags.NotNegativeFloat = 0.05  # weight of the VLM reward (Eq. 1) during the search
    rho_always: bool = False  # keep it after the search, as in the paper
    kappa: flags.NotNegativeFloat = 5.0  # weight of the VLM reward as a potential
    # --- returns and targets
    n_step: flags.PositiveInt = 8  # steps whose rewards are summed before the value follows
    success_share: flags.Share = 0.25  # of each batch, from successful episodes
    clip_targets: bool = True  # to the values that the task's reward allows
    entropy: Literal["never", "search", "always"] = "search"  # when targets count the entropy
    # --- exploration
    hold_steps: flags.PositiveInts = (1, 2, 4, 8, 1, 2, 4, 16)  # of the same noise, by environment
    quiet_envs: flags.NotNegativeInt = 2  # environments in which the evaluated policy acts
    demos: flags.NotNegativeInt = 0  # environments whose first episode the scripted expert plays
    # --- alignment
    align: bool = True  # --no-align: the raw VLM reward of Eq. 2, no projection heads
    goal_image: bool = True  # --no-goal-image: no Eq. 5 (stage 1): no alignment before a success
    stage2: bool = True  # --no-stage2: no Eq. 4, Eq. 5 only
    stage2_after: flags.PositiveInt = 2_500  # positives (after k steps) for Eq. 4 in place of Eq. 5
    projection_features: flags.PositiveInts = (256, 64)  # layers of both projection heads
    lag: flags.PositiveInt = 10  # k of Eq. 4, steps of an episode
    reward_margin: flags.NotNegativeFloat = 0.1  # delta of Eqs. 4 and 5
    l2_margin: flags.NotNegativeFloat = 0.2  # margin on the distance to the goal image in Eq. 5
    embedding_buffer_size: flags.PositiveInt = 100_000  # frames kept of positives, of negatives
    # --- the search, and relay
    search_until: flags.NotNegativeInt = 2_500  # positive samples at which the search ends
    relay: bool = True  # --no-relay: the FuRL agent searches alone
    relay_periods: flags.PositiveInts = (50, 100, 150, 200)  # T_s: steps until the agents change
    relay_noise: flags.NotNegativeFloat = 0.2  # std of the noise on the relay agent's actions
    relay_bonus: flags.NotNegativeFloat = 1.0  # weight of displaced objects in its reward


def check_flags(args: Args) -> None:
    """Name flags without effect; UserError if their values cannot work."""
    flags.note_idle(args, align="stage2_after projection_features lag reward_margin l2_margin",
                    goal_image="l2_margin", stage2="stage2_after lag",
                    relay="relay_periods relay_noise relay_bonus")
    if args.align and not args.stage2 and not args.goal_image:
        print("note: --no-goal-image --no-stage2 leave nothing to align with: the projection "
              "heads stay random")
    needed = args.stage2_after if args.align and args.stage2 else 0
    flags.check_positives(args.embedding_buffer_size, args.lag, needed, MAX_EPISODE_STEPS)
    flags.check_at_most(args, "demos", args.num_envs, "--num-envs")
    flags.check_at_most(args, "quiet_envs", args.num_envs - 1, "below --num-envs")
    flags.check_at_most(args, "n_step", MAX_EPISODE_STEPS, "the steps of an episode")
    if args.clip_targets and args.gamma == 1:
        raise UserError("--gamma must be below 1, or there are no bounds for --clip-targets")


# ------------------------------------------------------------------------------ state


@struct.dataclass
class AgentState:
    params: dict  # actor, critic, log_alpha
    target_critic: dict
    opt: optax.OptState
    actor: nn.Module = struct.field(pytree_node=False)
    critic: nn.Module = struct.field(pytree_node=False)


class FuRLState(NamedTuple):
    furl: AgentState  # learns from r_task and the VLM's reward
    mean_actor: dict  # its actor, averaged over updates, which is evaluated
    relay: AgentState  # learns from r_task and the object's displacement
    projection: dict  # W_L and W_I
    projection_opt: optax.OptState


class Buffers(NamedTuple):
    transitions: Ring  # of Transition
    starts: Ring  # of the embeddings of the episodes' first pictures
    positives: Ring  # of EmbeddedFrame
    negatives: Ring  # of EmbeddedFrame


class Batch(NamedTuple):
    """n steps as one: what an agent learns from; leaves [batch, ...]."""

    obs: jax.Array
    action: jax.Array
    next_obs: jax.Array  # after the last of the m <= n steps that there are
    reward: jax.Array  # their discounted sum
    discount: jax.Array  # of the value that follows: gamma^m, or 0 where nothing follows
    bounds: tuple  # lowest and highest target, each a number or [batch]
    entropy_weight: float  # 1: the value that follows counts the entropy; 0: it does not


class Phase(NamedTuple):
    """What is trained: static, so that each phase compiles to exactly its own work."""

    searching: bool  # until enough successes have been found
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
    critic_params: dict, agent: AgentState, batch: Batch, key: jax.Array
) -> tuple[jax.Array, dict]:
    """Soft Bellman error of both critics against the smaller target Q, after n steps."""
    next_action, next_log_prob = sample_action(
        agent.actor, agent.params["actor"], batch.next_obs, key
    )
    next_q = agent.critic.apply(agent.target_critic, batch.next_obs, next_action).min(0)
    next_value = next_q - batch.entropy_weight * jnp.exp(agent.params["log_alpha"]) * next_log_prob
    target = jnp.clip(batch.reward + batch.discount * next_value, *batch.bounds)
    q = agent.critic.apply(critic_params, batch.obs, batch.action)  # [2, batch]
    loss = ((q - target) ** 2).mean(1).sum()
    return loss, {"critic_loss": loss, "q": q.mean(), "q_max": q.max()}


def actor_loss(
    actor_params: dict, agent: AgentState, batch: Batch, key: jax.Array
) -> tuple[jax.Array, dict]:
    """alpha log pi - min Q, for actions of the current policy."""
    action, log_prob = sample_action(agent.actor, actor_params, batch.obs, key)
    q = agent.critic.apply(agent.params["critic"], batch.obs, action).min(0)
    loss = (jnp.exp(agent.params["log_alpha"]) * log_prob - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def sac_loss(
    params: dict, agent: AgentState, batch: Batch, key: jax.Array
) -> tuple[jax.Array, dict]:
    """The three losses as one: each moves its own parameters and sees the others fixed."""
    critic_key, actor_key = jax.random.split(key)
    critic, critic_metrics = critic_loss(params["critic"], agent, batch, critic_key)
    actor, actor_metrics = actor_loss(params["actor"], agent, batch, actor_key)
    # The temperature alpha moves so that the entropy approaches its target, -|A|/2 (Table 5).
    excess = jax.lax.stop_gradient(actor_metrics["entropy"]) + batch.action.shape[-1] / 2
    alpha = jnp.exp(params["log_alpha"])
    metrics = critic_metrics | actor_metrics | {"alpha": alpha}
    return critic + actor + alpha * excess, metrics


# ------------------------------------------------ FuRL's losses, and what is learned from


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


def displacement(obs: jax.Array, early_obs: jax.Array) -> jax.Array:
    """How far the object is from where it was at `early_obs`, d / (d + 0.1 m), obs [..., 39]."""
    distance = jnp.linalg.norm((obs - early_obs)[..., OBJECT], axis=-1)
    return distance / (distance + 0.1)


def value_bounds(most_added: float, args: Args) -> tuple[float, float]:
    """Lowest and highest value, where a step's reward is -1 to 0 plus at most `most_added`.

    From below looser, by rho and kappa: before the first success every policy has the least value,
    and a tight bound would at once undo what the potential guides with.
    """
    if not args.clip_targets:
        return -jnp.inf, jnp.inf
    horizon = 1 / (1 - args.gamma)  # sum of all gamma^k
    return -(1 + args.rho) * horizon - args.kappa, most_added * horizon


def make_batches(
    projection_params: dict, buffers: Buffers, slots: jax.Array, vlm: VLMInputs, args: Args,
    phase: Phase,
) -> tuple[Batch, Batch, dict]:
    """What the FuRL agent and the relay agent learn from, of the sampled steps at `slots` [batch].

    With the VLM's reward phi (Eq. 3) as a potential, kappa (gamma^m phi(s_m) - phi(s_0)) is added
    to the return of m steps (Ng et al., 1999). The value is V - kappa phi(s_0) then, and so are its
    bounds. During the search rho r_VLM (Eq. 1) guides as well, which a potential cannot replace.
    """
    ring = buffers.transitions
    rows: Transition = ring.data
    steps = replay.following_steps(ring, slots, args.n_step, args.num_envs, MAX_EPISODE_STEPS)
    discount = args.gamma ** steps.exists.sum(0) * (1 - rows.terminated[steps.last])
    task_return = steps.discounted_sum(rows.reward[steps.slots] - 1, args.gamma)  # shift: B.2
    entropy = float(args.entropy == "always" or (args.entropy == "search" and phase.searching))
    # Not since rows.obs: in an episode's first one the object may be where the reset found it.
    displaced = displacement(rows.next_obs[steps.slots], rows.next_obs[steps.first])
    bonus = args.relay_bonus * steps.discounted_sum(displaced, args.gamma)
    relay = Batch(rows.obs[slots], rows.action[slots], rows.next_obs[steps.last],
                  task_return + bonus, discount, value_bounds(args.relay_bonus, args), entropy)

    starts = buffers.starts.data[steps.episode % buffers.starts.capacity]
    before = jnp.where((steps.time == 0)[:, None], starts, rows.embedding[steps.before])
    phi_first, phi_last = (vlm_reward(projection_params, embeddings, vlm, args)
                           for embeddings in (before, rows.embedding[steps.last]))
    shaped_return = task_return + args.kappa * (discount * phi_last - phi_first)
    guided = args.rho > 0 and (phase.searching or args.rho_always)
    if guided:  # r_VLM changes little in n steps: the mean of both ends stands for all
        shaped_return += args.rho * steps.discounted_sum((phi_first + phi_last) / 2, args.gamma)
    bounds = tuple(b - args.kappa * phi_first for b in value_bounds(args.rho * guided, args))
    furl = relay._replace(reward=shaped_return, bounds=bounds)
    vlm_metrics = {"reward/vlm_mean": phi_last.mean(), "reward/vlm_std": phi_last.std()}
    return furl, relay, vlm_metrics | {"reward/displacement": displaced[0].mean()}


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
    agent: AgentState, batch: Batch, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One SAC update; all gradients are taken from the networks as they were before it."""
    params, opt, metrics = adam_step(
        lambda p: sac_loss(p, agent, batch, key), agent.params, agent.opt, args
    )
    target = optax.incremental_update(params["critic"], agent.target_critic, args.tau)
    return agent.replace(params=params, target_critic=target, opt=opt), metrics


def init_state(key: jax.Array, sizes: Sizes, args: Args) -> FuRLState:
    furl_key, relay_key, projection_key = jax.random.split(key, 3)
    text, images = jnp.zeros(sizes.embedding), jnp.zeros((1, sizes.embedding))
    projection = Projection(args.projection_features).init(projection_key, text, images)
    opt = optax.adam(args.learning_rate).init(projection)
    furl, relay = (init_agent(agent_key, sizes, args) for agent_key in (furl_key, relay_key))
    return FuRLState(furl, jax.tree.map(jnp.copy, furl.params["actor"]), relay, projection, opt)


def init_buffers(sizes: Sizes, args: Args) -> Buffers:
    # Embeddings of a network with random weights differ by less than float16 can tell.
    exact = not args.pretrained
    transition, frame = replay.example_transition(sizes, exact), replay.example_frame(sizes, exact)
    capacity, flag = args.embedding_buffer_size, "--embedding-buffer-size"
    positives, negatives = (replay.init_ring(frame, capacity, flag) for _ in range(2))
    num_episodes = args.buffer_size // (args.num_envs * MAX_EPISODE_STEPS) + 2  # in the replay
    starts = replay.init_ring(frame.embedding, num_episodes * args.num_envs)
    return Buffers(replay.init_ring(transition, args.buffer_size), starts, positives, negatives)


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
    slots = replay.sample_with_successes(
        buffers.transitions, buffers.positives, sample_key, args.batch_size, args.success_share
    )
    batches = make_batches(state.projection, buffers, slots, vlm, args, phase)
    furl_batch, relay_batch, reward_metrics = batches
    furl, furl_metrics = update_agent(state.furl, furl_batch, furl_key, args)
    relay, relay_metrics = state.relay, {}
    if phase.relaying:
        relay, relay_metrics = update_agent(state.relay, relay_batch, relay_key, args)
    metrics = {f"losses/{name}": value for name, value in (metrics | furl_metrics).items()}
    metrics |= {f"losses/relay_{name}": value for name, value in relay_metrics.items()}
    metrics |= reward_metrics | {"reward/task_mean": buffers.transitions.data.reward[slots].mean()}
    average = optax.incremental_update(furl.params["actor"], state.mean_actor, args.actor_tau)
    return state._replace(furl=furl, mean_actor=average, relay=relay), metrics


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


# ---------------------------------------------------------------- relay, and how to act


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
    searching = int(positives.total) < args.search_until
    return Phase(searching, searching and args.relay, alignment)


@partial(jax.jit, static_argnames=("draw", "args"))
def held_noise(draw: Callable, key: jax.Array, env_steps: int, args: Args) -> jax.Array:
    """`draw(key, shape)` for each environment, held for as many steps as its --hold-steps says."""
    hold = jnp.resize(jnp.array(args.hold_steps), args.num_envs)
    number = jnp.arange(args.num_envs) + args.num_envs * (env_steps // args.num_envs // hold)
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i), (ACTION_DIM,)))(number)


@partial(jax.jit, static_argnames=("args", "relaying"))
def act(
    state: FuRLState, obs: jax.Array, use_relay: jax.Array, key: jax.Array, env_steps: int,
    args: Args, relaying: bool,
) -> jax.Array:
    """Both agents sample for all obs [num_envs, obs_dim], a mask [num_envs] selects.

    In quiet environments the FuRL agent acts as it is evaluated: the replay sees where that leads.
    """
    furl_noise, relay_noise, more_noise = (
        held_noise(jax.random.normal, k, env_steps, args) for k in jax.random.split(key, 3)
    )

    def explore(agent: AgentState, noise: jax.Array) -> jax.Array:
        mean, log_std = agent.actor.apply(agent.params["actor"], obs)
        return jnp.tanh(mean + jnp.exp(log_std) * noise)

    quiet = jnp.arange(args.num_envs)[:, None] < args.quiet_envs
    furl_action = jnp.where(quiet, policy(state, obs), explore(state.furl, furl_noise))
    if not relaying:
        return furl_action
    relay_action = explore(state.relay, relay_noise) + args.relay_noise * more_noise
    return jnp.where(use_relay[:, None], jnp.clip(relay_action, -1, 1), furl_action)


@jax.jit
def policy(state: FuRLState, obs: jax.Array) -> jax.Array:
    """The averaged actor's mean action for obs [n, obs_dim]: [n, action_dim]."""
    mean, _ = state.furl.actor.apply(state.mean_actor, obs)
    return jnp.tanh(mean)


def load_reward(state: FuRLState, vlm: VLM, args: Args) -> Callable[[jax.Array], jax.Array]:
    """The VLM reward that was learned, before its weight rho: embeddings [n, D] -> [n]."""
    return jax.jit(partial(vlm_reward, state.projection, vlm=load_inputs(vlm, args), args=args))


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    args = flags.check_args(args, METAWORLD)
    flags.check_replay(args, args.buffer_size, args.learning_starts, MAX_EPISODE_STEPS)
    METAWORLD.check_camera(args.camera_id)
    check_flags(args)
    prompt = METAWORLD.prompt_for(args.env_id, args.prompt)
    vlm = load_vlm(args.vlm, weights=args.vlm_weights, pretrained=args.pretrained, seed=args.seed)
    view = view_for(vlm, METAWORLD)
    camera = view.camera(args.camera_id, args.quality)
    vlm_inputs = load_inputs(vlm, args)
    experts = Experts(args.env_id, args.demos, seed=args.seed, goal=args.goal)
    envs = METAWORLD.make_vec(
        args.env_id, args.num_envs, seed=args.seed, goal=args.goal, camera=camera,
        draw_resets=True, draw_every=args.draw_every,
    )
    evaluate = Evaluator(args.env_id, seed=args.seed, goal=args.goal, camera=camera,
                         num_episodes=args.eval_episodes, capture_video=args.capture_video)
    sizes = Sizes(envs.obs_dim, envs.action_dim, vlm.embed_dim)
    init_key, random_key, act_key, update_key = jax.random.split(jax.random.key(args.seed), 4)
    state, buffers = init_state(init_key, sizes, args), init_buffers(sizes, args)
    run = start_run(args, buffers, sizes, envs, evaluate, vlm=vlm, view=view, prompt=prompt)

    def store(buffers: Buffers, transition: Transition, step: Step) -> Buffers:
        embedding = replay.embed_drawn(vlm, step.frames, step.drawn, buffers.transitions)
        transition = transition._replace(embedding=embedding)
        buffers = buffers._replace(transitions=replay.add_rows(buffers.transitions, transition))
        return start_episodes(buffers, step.reset_frames) if step.ended.all() else buffers

    def start_episodes(buffers: Buffers, frames: np.ndarray) -> Buffers:
        return buffers._replace(starts=replay.add_rows(buffers.starts, vlm.embed_images(frames)))

    state, buffers, obs = run.begin(state, start_episodes(buffers, envs.reset()[1]), envs)
    phase = choose_phase(buffers, args)
    # Environments step while the device learns: a step, `previous`, is stored one iteration later.
    previous, metrics = None, {}
    for env_steps in run.iterations():  # steps done so far
        # Act, and let the environments step and draw ...
        episode, time = divmod(env_steps // args.num_envs, MAX_EPISODE_STEPS)
        if env_steps < args.learning_starts:
            action = 2 * held_noise(jax.random.uniform, random_key, env_steps, args) - 1
        else:
            use_relay = relay_acts(episode, time, args)
            action = act(state, obs, use_relay, act_key, env_steps, args, phase.relaying)
        action = np.array(action)  # waits for the updates before
        run.check_finite(action, metrics)
        if episode == 0:
            action[: args.demos] = experts(obs, time)
        envs.step_async(action)

        # ... while the frames of the step before are embedded, stored and learned from.
        if previous is not None:
            buffers = store(buffers, *previous)
        if time == 0 and episode > 0:  # all episodes end together
            steps = buffers.transitions
            buffers = replay.sort_episodes(buffers, steps, args.num_envs, MAX_EPISODE_STEPS)
            phase = choose_phase(buffers, args)
        if env_steps >= max(args.learning_starts, 1):
            state, metrics = update(state, buffers, vlm_inputs, update_key, env_steps, args, phase)

        step = envs.step_wait()
        transition = Transition(obs, action, step.final_obs, step.reward, step.terminated)
        previous, obs = (transition, step), step.obs

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
