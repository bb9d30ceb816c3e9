r"""FuRL: vision-language models as fuzzy rewards for reinforcement learning, on state observations.

A frozen VLM scores the picture of the scene against the instruction; this dense but fuzzy reward is
added to the sparse one. Two small projection heads are trained online to align it with what the
task rewards (ranking losses), and a second SAC agent, which sees the sparse reward alone, relays
with the VLM agent until successes have been found. Fu et al., ICML 2024, arXiv 2406.00645.

    python furl_sac_state.py --env-id drawer-close-v3 --total-timesteps 24000 \
        --learning-starts 4000 --learning-rate 3e-4
    python furl_sac_state.py --env-id drawer-open-v3 --vlm liv --quality paper --track

docs/furl_sac_state.md explains every metric and shows measured curves with their wall-clock.

Deviations from the paper, whose Table 5 is the default, and choices where it is silent:
 1. Eight environments, one update per environment step in total. Updates lag one iteration behind
    the data, so that environments step and draw while the last frames are embedded and learned.
 2. Each environment draws its own relay period and its own first policy.
 3. Eq. 4 replaces Eq. 5 once an episode with a success has ended; relaying ends at 2,500 positives
    (Figure 5).
 4. Positives are an episode's frames up to its last success; what follows is in the replay, but is
    neither positive nor negative. Negatives are the frames of whole failed episodes. The ranking
    losses draw from the latest 100,000 frames of either kind.
 5. Lag pairs (Eq. 4) are k steps apart in one trajectory, and end at its first success: later is
    not better from there on.
 6. 10,000 random steps before learning, as in the authors' code; the paper does not say.
 7. The temperature starts at 0.1 (DrQ's value; the paper does not say): at 1, 30,000 updates pass
    before the sparse reward counts for more than entropy.
 8. The default VLM is the embedded `mini`, which needs no download. For the paper's: --vlm liv.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from common import replay
from common.cli import check_args, run_script
from common.envs import VecMetaWorld, goal_image
from common.evaluate import Evaluator
from common.rendering import gl_info
from common.replay import Frame, Ring, Transition
from common.run import start_run
from common.tasks import prompt_for
from common.vlm import load_vlm

SCRIPT = "furl_sac_state"
OBS_DIM, ACTION_DIM = 39, 4  # every Meta-World task
MAX_EPISODE_STEPS = 500
LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0


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
    capture_video: bool = False  # a video of each evaluation in <run folder>/videos
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
    batch_size: int = 256  # samples per update, of the agents and of each ranking loss
    learning_rate: float = 1e-4  # Adam's, for all networks
    gamma: float = 0.99  # discount factor
    tau: float = 0.01  # step of the target critics
    init_temperature: float = 0.1  # temperature before learning
    hidden_features: tuple[int, ...] = (256, 256)  # hidden layers of actor and critics
    # --- VLM reward
    vlm: str = "mini"  # mini, liv, clip, or an open_clip pair such as ViT-B-32/openai
    vlm_weights: str | None = None  # local weights file for --vlm
    pretrained: bool = True  # --no-pretrained: same encoder, randomly initialised (Figure 9)
    prompt: str | None = None  # default: Table 4's; short, long: Table 6's; or any text
    rho: float = 0.05  # weight of the VLM reward (Eq. 1)
    # --- alignment
    align: bool = True  # --no-align: the raw VLM reward of Eq. 2, no projection heads
    goal_image: bool = True  # --no-goal-image: no Eq. 5, so no alignment before a success
    stage1: bool = True  # --no-stage1: without Eq. 5
    stage2: bool = True  # --no-stage2: Eq. 5 only
    projection_features: tuple[int, ...] = (256, 64)  # layers of both projection heads
    lag: int = 10  # k of Eq. 4, environment steps
    reward_margin: float = 0.1  # delta of Eqs. 4 and 5
    l2_margin: float = 0.2  # margin on the distance to the goal image in Eq. 5
    embedding_buffer_size: int = 100_000  # frames for the ranking losses, of either kind
    # --- relay
    relay: bool = True  # --no-relay: the VLM agent explores alone
    relay_periods: tuple[int, ...] = (50, 100, 150, 200)  # T_s: steps until the agents change
    relay_until: int = 2_500  # positive samples at which relaying ends (Figure 5)

    @property
    def updates_per_iteration(self) -> int:
        return round(self.utd * self.num_envs)

    @property
    def uses_goal_image(self) -> bool:
        return self.align and self.stage1 and self.goal_image


# ------------------------------------------------------------------------------ state


class AgentState(NamedTuple):
    params: dict  # actor, critic, log_alpha
    target_critic: dict
    opt: optax.OptState


class FuRLState(NamedTuple):
    furl: AgentState  # learns from r_task + rho r_VLM, and is evaluated
    relay: AgentState  # learns from r_task
    projection: dict  # W_L and W_I
    projection_opt: optax.OptState


class Buffers(NamedTuple):
    transitions: Ring  # of Transition
    positives: Ring  # of Frame
    negatives: Ring  # of Frame


class Phase(NamedTuple):
    """What is trained: static, so that each phase compiles to exactly its own work."""

    relaying: bool
    alignment: Literal["none", "goal-image", "success"]  # nothing, Eq. 5, Eq. 4


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


def networks(args: Args) -> tuple[Actor, CriticPair]:
    return Actor(ACTION_DIM, args.hidden_features), CriticPair(args.hidden_features)


def sample_action(
    actor_params: dict, obs: jax.Array, key: jax.Array, args: Args
) -> tuple[jax.Array, jax.Array]:
    """A tanh-squashed Gaussian sample [batch, action_dim] and its log-probability [batch]."""
    mean, log_std = networks(args)[0].apply(actor_params, obs)
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
    critic = networks(args)[1]
    next_action, next_log_prob = sample_action(agent.params["actor"], batch.next_obs, key, args)
    next_q = critic.apply(agent.target_critic, batch.next_obs, next_action).min(0)
    next_value = next_q - jnp.exp(agent.params["log_alpha"]) * next_log_prob
    target = reward + args.gamma * (1 - batch.terminated) * next_value
    q = critic.apply(critic_params, batch.obs, batch.action)  # [2, batch]
    loss = ((q - target) ** 2).mean(1).sum()
    return loss, {"critic_loss": loss, "q": q.mean()}


def actor_loss(
    actor_params: dict, agent: AgentState, batch: Transition, key: jax.Array, args: Args
) -> tuple[jax.Array, dict]:
    """alpha log pi - min Q, for actions of the current policy."""
    action, log_prob = sample_action(actor_params, batch.obs, key, args)
    q = networks(args)[1].apply(agent.params["critic"], batch.obs, action).min(0)
    loss = (jnp.exp(agent.params["log_alpha"]) * log_prob - q).mean()
    return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}


def alpha_loss(log_alpha: jax.Array, entropy: jax.Array) -> tuple[jax.Array, dict]:
    """Moves the temperature so that the entropy approaches its target, -|A|/2 (Table 5)."""
    alpha = jnp.exp(log_alpha)
    return alpha * (jax.lax.stop_gradient(entropy) + ACTION_DIM / 2), {"alpha": alpha}


def sac_loss(
    params: dict, agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array,
    args: Args,
) -> tuple[jax.Array, dict]:
    """The three losses as one: each moves its own parameters and sees the others fixed."""
    critic_key, actor_key = jax.random.split(key)
    critic, critic_metrics = critic_loss(
        params["critic"], agent, batch, reward, critic_key, args
    )
    actor, actor_metrics = actor_loss(params["actor"], agent, batch, actor_key, args)
    alpha, alpha_metrics = alpha_loss(params["log_alpha"], actor_metrics["entropy"])
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
    projection_params: dict, images_i: jax.Array, images_j: jax.Array, vlm: VLMInputs, args: Args
) -> tuple[jax.Array, dict]:
    """Eq. 5: of two failures, the one nearer to the goal image by the margin is the better."""
    distance_i = jnp.linalg.norm(images_i - vlm.goal, axis=-1)  # [batch]
    distance_j = jnp.linalg.norm(images_j - vlm.goal, axis=-1)
    rewards = vlm_reward(projection_params, jnp.concatenate([images_i, images_j]), vlm, args)
    reward_i, reward_j = jnp.split(rewards, 2)
    # Either member of a pair may be the nearer one: the expectation is over ordered pairs.
    sign = jnp.sign(distance_j - distance_i)  # 1: i is the better; -1: their roles change
    mask = jnp.abs(distance_i - distance_j) > args.l2_margin
    loss = ranking_loss(sign * reward_i, sign * reward_j, args.reward_margin, mask)
    return loss, {"neg_neg_loss": loss, "neg_neg_pairs": mask.mean()}


def positives_loss(
    projection_params: dict, positives: jax.Array, earlier: jax.Array, earlier_exists: jax.Array,
    negatives: jax.Array, negatives_exist: jax.Array, vlm: VLMInputs, args: Args,
) -> tuple[jax.Array, dict]:
    """Eq. 4: successes above failures, later above earlier in one success; images [batch, D]."""
    images = jnp.concatenate([positives, earlier, negatives])
    positive, lagged, negative = jnp.split(vlm_reward(projection_params, images, vlm, args), 3)
    all_or_none = jnp.full(positive.shape, negatives_exist)
    pos_neg = ranking_loss(positive, negative, args.reward_margin, all_or_none)
    pos_pos = ranking_loss(positive, lagged, args.reward_margin, earlier_exists)
    return pos_neg + pos_pos, {"pos_neg_loss": pos_neg, "pos_pos_loss": pos_pos}


# ---------------------------------------------------------------------------- updates


def descend(loss_fn, params, opt_state, args: Args):
    """One Adam step on `loss_fn(params) -> (loss, metrics)`."""
    gradients, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optax.adam(args.learning_rate).update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, metrics


@partial(jax.jit, static_argnames="args")  # eagerly it takes twice as long
def init_agent(key: jax.Array, args: Args) -> AgentState:
    actor, critic = networks(args)
    actor_key, critic_key = jax.random.split(key)
    obs, action = jnp.zeros((1, OBS_DIM)), jnp.zeros((1, ACTION_DIM))
    params = {
        "actor": actor.init(actor_key, obs),
        "critic": critic.init(critic_key, obs, action),
        # float32 by name: a weak type lasts until the first update, and then all compiles again.
        "log_alpha": jnp.log(jnp.float32(args.init_temperature)),
    }
    target_critic = jax.tree.map(jnp.copy, params["critic"])
    return AgentState(params, target_critic, optax.adam(args.learning_rate).init(params))


def update_agent(
    agent: AgentState, batch: Transition, reward: jax.Array, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One SAC update; all gradients are taken from the networks as they were before it."""
    params, opt, metrics = descend(
        lambda p: sac_loss(p, agent, batch, reward, key, args), agent.params, agent.opt, args
    )
    target = optax.incremental_update(params["critic"], agent.target_critic, args.tau)
    return AgentState(params, target, opt), metrics


def init_state(key: jax.Array, embed_dim: int, args: Args) -> FuRLState:
    furl_key, relay_key, projection_key = jax.random.split(key, 3)
    text, images = jnp.zeros(embed_dim), jnp.zeros((1, embed_dim))
    projection = Projection(args.projection_features).init(projection_key, text, images)
    opt = optax.adam(args.learning_rate).init(projection)
    return FuRLState(init_agent(furl_key, args), init_agent(relay_key, args), projection, opt)


def init_buffers(embed_dim: int, args: Args) -> Buffers:
    scalar, number = np.zeros((), np.float32), np.zeros((), np.int32)
    obs, action = np.zeros(OBS_DIM, np.float32), np.zeros(ACTION_DIM, np.float32)
    embedding = np.zeros(embed_dim, np.float16)
    transition = Transition(obs, action, obs, scalar, scalar, embedding)
    frame = Frame(embedding, trajectory=number, time=number)
    return Buffers(
        replay.init_ring(transition, args.buffer_size),
        replay.init_ring(frame, args.embedding_buffer_size),
        replay.init_ring(frame, args.embedding_buffer_size),
    )


def update_projection(
    state: FuRLState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, args: Args, phase: Phase
) -> tuple[FuRLState, dict]:
    """One step of the alignment that belongs to the phase: Eq. 5 or Eq. 4."""
    first_key, second_key = jax.random.split(key)

    def images(ring: Ring, slots: jax.Array) -> jax.Array:
        return ring.data.embedding[slots].astype(jnp.float32)  # [batch, D]

    def sample(ring: Ring, sample_key: jax.Array) -> jax.Array:
        return replay.sample_slots(ring, sample_key, args.batch_size)

    negatives = images(buffers.negatives, sample(buffers.negatives, first_key))
    if phase.alignment == "goal-image":
        others = images(buffers.negatives, sample(buffers.negatives, second_key))
        loss_fn = partial(negatives_loss, images_i=negatives, images_j=others, vlm=vlm, args=args)
    else:
        slots = sample(buffers.positives, second_key)
        earlier_slots, earlier_exists = replay.lagged_slots(buffers.positives, slots, args.lag)
        positives = images(buffers.positives, slots)
        loss_fn = partial(
            positives_loss, positives=positives, earlier=images(buffers.positives, earlier_slots),
            earlier_exists=earlier_exists, negatives=negatives,
            negatives_exist=buffers.negatives.size > 0, vlm=vlm, args=args,
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
    slots = replay.sample_slots(buffers.transitions, sample_key, args.batch_size)
    batch: Transition = replay.take(buffers.transitions, slots)
    fuzzy = vlm_reward(state.projection, batch.embedding.astype(jnp.float32), vlm, args)
    task_reward = batch.sparse_reward - 1  # constant shaping (B.2)
    shaped_reward = task_reward + args.rho * fuzzy  # Eq. 1
    furl, furl_metrics = update_agent(state.furl, batch, shaped_reward, furl_key, args)
    relay, relay_metrics = state.relay, {}
    if phase.relaying:
        relay, relay_metrics = update_agent(state.relay, batch, task_reward, relay_key, args)
    metrics = (
        {f"losses/{name}": value for name, value in metrics.items()}
        | {f"losses/furl_{name}": value for name, value in furl_metrics.items()}
        | {f"losses/relay_{name}": value for name, value in relay_metrics.items()}
        | {"reward/vlm_mean": fuzzy.mean(), "reward/vlm_std": fuzzy.std()}
        | {"reward/sparse_mean": batch.sparse_reward.mean()}
    )
    return state._replace(furl=furl, relay=relay), metrics


@partial(jax.jit, static_argnames=("args", "phase"), donate_argnames="state")
def update(
    state: FuRLState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, args: Args, phase: Phase
) -> tuple[FuRLState, jax.Array, dict]:
    """All updates of an iteration in one dispatch: the next key, and the means of the metrics."""
    key, scan_key = jax.random.split(key)
    state, metrics = jax.lax.scan(
        lambda carry, update_key: update_once(carry, buffers, vlm, update_key, args, phase),
        state,
        jax.random.split(scan_key, args.updates_per_iteration),
    )
    return state, key, jax.tree.map(jnp.mean, metrics)


# ------------------------------------------------------------------------------ relay


class RelaySchedule(NamedTuple):
    period: np.ndarray  # [num_envs] int, steps until the agents change
    relay_first: np.ndarray  # [num_envs] bool


def draw_schedule(rng: np.random.Generator, num_envs: int, args: Args) -> RelaySchedule:
    """Each environment's own T_i and first agent, drawn when its episode starts."""
    return RelaySchedule(rng.choice(args.relay_periods, num_envs), rng.random(num_envs) < 0.5)


def relay_acts(schedule: RelaySchedule, episode_time: int) -> np.ndarray:
    """Where the relay agent acts at step `episode_time` of the episodes, bool [num_envs]."""
    return ((episode_time // schedule.period) % 2 == 0) == schedule.relay_first


def choose_phase(num_positives: int, num_negatives: int, args: Args) -> Phase:
    """Algorithm 1's branches, from the samples collected so far."""
    alignment = "none"
    if args.align and args.stage2 and num_positives > 0:
        alignment = "success"
    elif args.uses_goal_image and num_negatives > 0:
        alignment = "goal-image"
    return Phase(args.relay and num_positives < args.relay_until, alignment)


@partial(jax.jit, static_argnames=("args", "relaying"))
def act(
    furl_actor: dict, relay_actor: dict, obs: jax.Array, use_relay: jax.Array, key: jax.Array,
    args: Args, relaying: bool,
) -> tuple[jax.Array, jax.Array]:
    """Both agents sample for all obs [n, obs_dim], a mask [n] selects; returns the next key too."""
    key, act_key = jax.random.split(key)
    furl_key, relay_key = jax.random.split(act_key)
    furl_action, _ = sample_action(furl_actor, obs, furl_key, args)
    if not relaying:
        return furl_action, key
    relay_action, _ = sample_action(relay_actor, obs, relay_key, args)
    return jnp.where(use_relay[:, None], relay_action, furl_action), key


@partial(jax.jit, static_argnames="args")
def act_mean(actor_params: dict, obs: jax.Array, *, args: Args) -> jax.Array:
    """Evaluation: tanh of the mean, [n, action_dim]."""
    mean, _ = networks(args)[0].apply(actor_params, obs)
    return jnp.tanh(mean)


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    args = check_args(args)
    prompt = prompt_for(args.env_id, args.prompt)
    vlm = load_vlm(args.vlm, weights=args.vlm_weights, pretrained=args.pretrained, seed=args.seed)
    drawing = {"camera_id": args.camera_id, "quality": args.quality}
    text = vlm.embed_text([prompt])[0]
    goal = np.zeros_like(text)
    if args.uses_goal_image:
        picture = goal_image(
            args.env_id, seed=args.seed, goal=args.goal, size=vlm.frame_size, **drawing
        )
        goal = vlm.embed_images(picture[None])[0]
    vlm_inputs = VLMInputs(jnp.asarray(text), jnp.asarray(goal))
    envs = VecMetaWorld(
        args.env_id, args.num_envs, seed=args.seed, goal=args.goal, frame_size=vlm.frame_size,
        max_episode_steps=MAX_EPISODE_STEPS, **drawing,
    )
    evaluate = Evaluator(
        args.env_id, seed=args.seed, goal=args.goal, num_episodes=args.eval_episodes,
        quality=args.quality, capture_video=args.capture_video,
    )

    # Everything that changes during the run: checkpoints hold all of it.
    key, init_key = jax.random.split(jax.random.PRNGKey(args.seed))
    state = init_state(init_key, vlm.embed_dim, args)
    buffers = init_buffers(vlm.embed_dim, args)
    rng = np.random.default_rng(args.seed)  # random actions and relay schedules
    schedule = draw_schedule(rng, args.num_envs, args)
    obs = envs.reset()[0]
    last_success = np.full(args.num_envs, -1)  # its time in the running episodes; -1: none
    waiting = None  # the last step, until its frames are embedded
    counts = {"updates": 0, "positives": 0, "negatives": 0}
    env_steps = 0

    run = start_run(
        args, SCRIPT, buffers._asdict(), engine=envs.engine, prompt=prompt, vlm_id=vlm.id,
        gl=gl_info(),
    )
    if args.resume:
        (state, key), rings, host = run.load((state, key), buffers._asdict())
        buffers, obs = Buffers(**rings), envs.set_state(host["envs"])
        rng.bit_generator.state = host["rng"]
        env_steps, counts, last_success, waiting, schedule = host["loop"]
        schedule = RelaySchedule(*schedule)
    # Committed to the device, as embeddings are: else all compiles again after the first step.
    state, key, buffers = jax.device_put((state, key, buffers), jax.devices()[0])

    def save() -> None:
        loop = env_steps, counts, last_success, waiting, schedule
        run.save(env_steps, (state, key), buffers._asdict(), {
            "envs": envs.get_state(), "rng": rng.bit_generator.state, "loop": loop,
        })

    if not args.resume:
        save()  # so that a run that dies early can be resumed too
    metrics: dict[str, jax.Array] = {}
    while env_steps < args.total_timesteps:
        # Act, and let the environments step and draw ...
        episode_time = env_steps // args.num_envs % MAX_EPISODE_STEPS
        phase = choose_phase(counts["positives"], counts["negatives"], args)
        if env_steps < args.learning_starts:
            action = rng.uniform(-1, 1, (args.num_envs, ACTION_DIM)).astype(np.float32)
        else:
            action, key = act(
                state.furl.params["actor"], state.relay.params["actor"], obs,
                relay_acts(schedule, episode_time), key, args, phase.relaying,
            )
            action = np.asarray(action)  # waits for the updates before
            run.check_finite(env_steps, action, metrics)
        envs.step_async(action)

        # ... while the frames of the step before are embedded, stored and learned from.
        if waiting is not None:
            embedding = vlm.embed_images(waiting["frames"])
            transition = Transition(embedding=embedding, **waiting["transition"])
            buffers = buffers._replace(transitions=replay.add_rows(buffers.transitions, transition))
            if episode_time == 0:  # that step was the last of all episodes
                positives, negatives = last_success + 1, MAX_EPISODE_STEPS * (last_success < 0)
                for kind, lengths in (("positives", positives), ("negatives", negatives)):
                    ring = replay.add_episodes(
                        getattr(buffers, kind), buffers.transitions, lengths, MAX_EPISODE_STEPS
                    )
                    buffers = buffers._replace(**{kind: ring})
                    counts[kind] += int(lengths.sum())
                last_success = np.full(args.num_envs, -1)
            if env_steps >= args.learning_starts:
                state, key, metrics = update(state, buffers, vlm_inputs, key, args, phase)
                counts["updates"] += args.updates_per_iteration

        step = envs.step_wait()
        env_steps += args.num_envs
        last_success = np.where(step.success, episode_time, last_success)
        waiting = {
            "transition": {
                "obs": obs, "action": action, "next_obs": step.final_obs,
                "sparse_reward": step.sparse_reward,
                "terminated": step.terminated.astype(np.float32),
            },
            "frames": step.frames,
        }
        obs = step.obs
        if step.truncated.all():  # time alone ends episodes: all end together
            schedule = draw_schedule(rng, args.num_envs, args)

        # Measure and save.
        run.count_episodes(step.success, step.truncated)
        if run.is_due(args.eval_every, env_steps):
            policy = partial(act_mean, state.furl.params["actor"], args=args)
            run.log_evaluation(env_steps, evaluate(policy, run.video_path(env_steps)))
        if run.is_due(args.log_every, env_steps):
            stage = "relay" if phase.relaying else "aligned"
            run.log_training(env_steps, stage if counts["updates"] else "random", {
                **metrics, "charts/relaying": phase.relaying,
                **{f"charts/num_{name}": count for name, count in counts.items()},
            })
        if run.must_save(env_steps):
            save()

    for thing in (run, evaluate, envs):
        thing.close()
    return run.evaluation


if __name__ == "__main__":
    run_script(main, Args)
