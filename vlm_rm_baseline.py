"""Raw VLM rewards, one agent: VLM-RM, VLM-RM with goal-baseline regularisation, LIV and LIV-Proj.

A frozen VLM scores the picture of the scene against the instruction, and SAC maximises the score,
alone (VLM-RM: Rocamonde et al., ICLR 2024, arXiv 2310.12921) or added to the sparse reward (LIV:
Fu et al., ICML 2024, Eq. 1). Baselines 2 to 5 of the FuRL paper's section 5.1:

    python vlm_rm_baseline.py                            # VLM-RM: the cosine similarity alone
    python vlm_rm_baseline.py --alpha 0.5                # VLM-RM-GB: goal-baseline regularisation
    python vlm_rm_baseline.py --task-reward              # LIV (with --vlm clip: CLIP)
    python vlm_rm_baseline.py --task-reward --projection # LIV-Proj: random, fixed projection heads

each with --env-id drawer-open-v3, and with --vlm liv --quality paper for the paper's own.
docs/vlm_rm_baseline.md has metrics and results.

Deviations from the paper, whose Table 5 is the default, and choices where it is silent, as in
furl_sac_state.py (the page has all of them):
 1. Eight environments, one update per environment step in total, one iteration behind the data.
 2. 10,000 random steps before learning, as in the authors' code; the temperature starts at 0.1.
 3. The default VLM is the embedded `mini`, which needs no download. For the paper's: --vlm liv.
 4. VLM-RM's reward has no weight and no shift; the FuRL paper does not give VLM-RM's alpha.
 5. The SAC is FuRL's on the VLM-RM paper's environments too; docs/vlm_rm.md has what differs.
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

from common import flags, replay
from common.cli import run_script
from common.envs.registry import suite_for
from common.envs.workers import Step
from common.errors import UserError
from common.evaluate import Evaluator
from common.replay import Ring, Sizes, Transition
from common.run import start_run
from common.vlms import VLM, load_vlm, view_for

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
ACTION_STREAM = 0  # with the seed: name of a stream of random numbers on the host


@dataclass(frozen=True)
class Args(flags.RunArgs):  # env_id, seed, total_timesteps, num_envs, utd, logs: common/flags.py
    # --- environment
    goal: flags.Goal = "fixed"  # fixed: hidden, one per seed
    quality: Literal["fast", "paper"] = "fast"  # of frames; paper: MuJoCo's default, slow
    camera_id: flags.NotNegativeInt | None = None  # of the VLM's frames; default: 2 on Meta-World
    # --- SAC
    learning_starts: flags.NotNegativeInt = 10_000  # random steps before the first update
    buffer_size: flags.PositiveInt = 1_000_000  # transitions in the replay
    batch_size: flags.PositiveInt = 256  # samples per update
    learning_rate: flags.PositiveFloat = 1e-4  # Adam's, for all networks
    gamma: flags.Fraction = 0.99  # discount factor
    tau: flags.Fraction = 0.01  # step of the target critics
    init_temperature: flags.PositiveFloat = 0.1  # temperature before learning
    init_q: flags.FiniteFloat = 0.0  # with --task-reward: added to the critics' output
    tune_temperature: bool = True  # --no-tune-temperature: it stays as it was, as in VLM-RM
    hidden_features: flags.PositiveInts = (256, 256)  # hidden layers of actor and critics
    layer_norm: bool = False  # in the critics, against overestimated values (Ball et al., 2023)
    # --- VLM reward
    vlm: str | None = None  # default: the task's embedded one; liv, clip, or an open_clip pair
    vlm_weights: str | None = None  # local weights file for --vlm
    pretrained: bool = True  # --no-pretrained: same encoder, randomly initialised (Figure 9)
    prompt: str | None = None  # default: the task's; short, long: Table 6's (2 tasks); or any text
    rho: flags.NotNegativeFloat = 0.05  # weight of the VLM reward beside the task reward (Eq. 1)
    # --- method
    task_reward: bool = False  # add the task's reward: LIV, CLIP; without it: VLM-RM
    alpha: flags.Share = 0.0  # strength of goal-baseline regularisation, 0 to 1
    baseline_prompt: str | None = None  # the scene, whatever the goal; default: the task's own
    draw_every: flags.PositiveInt = 1  # a frame is drawn every K-th step, and stands until the next
    projection: bool = False  # through randomly initialised, fixed projection heads: LIV-Proj
    projection_features: flags.PositiveInts = (256, 64)  # layers of both projection heads


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
    return critic + actor + alpha * excess * args.tune_temperature, metrics


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


def adam_step(loss_fn, params, opt_state, args: Args):
    """One Adam step on `loss_fn(params) -> (loss, metrics)`."""
    gradients, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optax.adam(args.learning_rate).update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, metrics


@partial(jax.jit, static_argnames=("sizes", "args"))  # eagerly it takes twice as long
def init_agent(key: jax.Array, sizes: Sizes, args: Args) -> AgentState:
    actor = Actor(sizes.action, args.hidden_features)
    init_q = args.init_q if args.task_reward else 0.0
    critic = CriticPair(args.hidden_features, init_q, args.layer_norm)
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


def init_buffers(sizes: Sizes, args: Args) -> Buffers:
    # Embeddings of a network with random weights differ by less than float16 can tell.
    transition = replay.example_transition(sizes, exact=not args.pretrained)
    return Buffers(replay.init_ring(transition, args.buffer_size))


def update_once(
    agent: AgentState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One SAC update on one batch."""
    sample_key, agent_key = jax.random.split(key)
    slots = replay.sample_slots(buffers.transitions, sample_key, args.batch_size)
    batch: Transition = replay.take(buffers.transitions, slots)
    reward = vlm_rewards = vlm_reward(batch.embedding.astype(jnp.float32), vlm, args)
    if args.task_reward:
        reward = batch.reward + args.reward_shift + args.rho * vlm_rewards  # Eq. 1
    agent, metrics = update_agent(agent, batch, reward, agent_key, args)
    metrics = {f"losses/{name}": value for name, value in metrics.items()}
    metrics |= {"reward/vlm_mean": vlm_rewards.mean(), "reward/vlm_std": vlm_rewards.std()}
    return agent, metrics | {"reward/task_mean": batch.reward.mean()}


@partial(jax.jit, static_argnames="args", donate_argnames="agent")
def update(
    agent: AgentState, buffers: Buffers, vlm: VLMInputs, key: jax.Array, env_steps: int, args: Args
) -> tuple[AgentState, dict]:
    """All updates of an iteration in one dispatch; the means of their metrics."""
    keys = jax.random.split(jax.random.fold_in(key, env_steps), args.updates_per_iteration)
    agent, metrics = jax.lax.scan(
        lambda agent, key: update_once(agent, buffers, vlm, key, args), agent, keys
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


def prompts_of(args: Args) -> tuple[str, str]:
    """Goal and baseline, which is empty where nothing looks at it."""
    suite = suite_for(args.env_id)
    prompt = suite.prompt_for(args.env_id, args.prompt)
    if args.alpha > 0:
        return prompt, suite.baseline_prompt_for(args.env_id, args.baseline_prompt)
    if args.baseline_prompt is not None:
        raise UserError("--baseline-prompt has no effect without --alpha: give one above 0")
    return prompt, ""


def embed_task(vlm: VLM, args: Args) -> VLMInputs:
    """What the reward compares pictures with; the heads of LIV-Proj are drawn from the seed."""
    prompts = prompts_of(args)
    embedded = jnp.asarray(vlm.embed_text([prompt for prompt in prompts if prompt]))
    text, baseline = embedded[0], embedded[-1]  # the same where nothing looks at the baseline
    if args.alpha > 0 and cosine_similarity(text, baseline[None])[0] > 0.9999:
        raise UserError(f"--baseline-prompt {prompts[1]!r} means the same as the prompt "
                        f"{prompts[0]!r} to this VLM: there is no line through both")
    key = jax.random.fold_in(jax.random.key(args.seed), 3)  # none of those that `main` splits off
    projection = Projection(args.projection_features).init(key, text, text[None])
    return VLMInputs(text, baseline, projection)


def load_reward(agent: AgentState, vlm: VLM, args: Args) -> Callable[[jax.Array], jax.Array]:
    """The VLM reward of the run: embeddings [n, D] -> [n]."""
    return jax.jit(partial(vlm_reward, vlm=embed_task(vlm, args), args=args))


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    suite = suite_for(args.env_id)  # Meta-World or Gymnasium
    args = flags.check_args(args, suite)
    flags.check_replay(args, args.buffer_size, args.learning_starts)
    if args.vlm is None:
        args = replace(args, vlm=suite.default_vlm(args.env_id))
    if args.camera_id is None:
        args = replace(args, camera_id=suite.default_camera)
    suite.check_camera(args.camera_id)
    flags.note_idle(args, task_reward="rho init_q", projection="projection_features")
    prompt, baseline_prompt = prompts_of(args)
    vlm = load_vlm(args.vlm, weights=args.vlm_weights, pretrained=args.pretrained, seed=args.seed)
    vlm_inputs = embed_task(vlm, args)
    view = view_for(vlm, suite)
    camera = view.camera(args.camera_id, args.quality)
    envs = suite.make_vec(
        args.env_id, args.num_envs, seed=args.seed, goal=args.goal, camera=camera,
        draw_every=args.draw_every,
    )
    if envs.discrete:
        raise UserError(f"{args.env_id} has discrete actions, which SAC cannot choose: use "
                        "vlm_rm_dqn.py")
    evaluate = Evaluator(
        args.env_id, seed=args.seed, goal=args.goal, num_episodes=args.eval_episodes,
        camera=camera, capture_video=args.capture_video,
    )
    sizes = Sizes(envs.obs_dim, envs.action_dim, vlm.embed_dim)
    init_key, act_key, update_key = jax.random.split(jax.random.key(args.seed), 3)
    agent, buffers = init_agent(init_key, sizes, args), init_buffers(sizes, args)
    run = start_run(
        args, buffers, sizes, envs, evaluate, vlm=vlm, view=view, prompt=prompt,
        baseline_prompt=baseline_prompt,
    )
    envs.reset()
    agent, buffers, obs = run.begin(agent, buffers, envs)

    def store(buffers: Buffers, transition: Transition, step: Step) -> Buffers:
        embedding = replay.embed_drawn(vlm, step.frames, step.drawn, buffers.transitions)
        transition = transition._replace(embedding=embedding)
        return Buffers(replay.add_rows(buffers.transitions, transition))

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

        # ... while the frames of the step before are embedded, stored and learned from.
        if previous is not None:
            buffers = store(buffers, *previous)
        if env_steps >= max(args.learning_starts, 1):
            agent, metrics = update(agent, buffers, vlm_inputs, update_key, env_steps, args)

        step = envs.step_wait()
        transition = Transition(obs, action, step.final_obs, step.reward, step.terminated)
        previous, obs = (transition, step), step.obs

        # Measure and save.
        run.count_episodes(step)
        if run.is_due(args.eval_every):
            run.evaluate(policy, agent)
        if run.is_due(args.log_every):
            run.log_training("vlm" if metrics else "random", {
                **metrics, "charts/num_updates": agent.opt[0].count,
            })
        if run.must_save():
            buffers, previous = store(buffers, *previous), None
            run.save(agent, buffers, envs)

    run.close()
    return run.evaluation


if __name__ == "__main__":
    run_script(main, Args)
