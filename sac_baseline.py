"""SAC (soft actor-critic) on Meta-World's sparse reward: the baseline that FuRL is compared with.

Nothing but the success of the task is rewarded, and nothing is drawn. Haarnoja et al., 2018,
arXiv 1812.05905, with the settings of the FuRL paper (Fu et al., ICML 2024, Table 5).

    python sac_baseline.py --env-id drawer-close-v3 --learning-rate 3e-4
    python sac_baseline.py --env-id reach-v3 --goal random --engine envpool --num-envs 32 --utd 0.25

docs/sac_baseline.md has metrics, deviations and results.

Deviations from the paper, and choices where it is silent, are those of furl_sac_state.py:
 1. Eight environments, one update per environment step in total. Updates lag one iteration behind
    the data, so that environments step while the agent learns.
 2. 10,000 random steps before learning, as in the authors' code; the paper does not say.
 3. The temperature starts at 0.1, DrQ's value (authors: 1; the paper does not say): at 1, 30,000
    updates pass before the sparse reward counts for more than entropy.
"""

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
from common.envs.metaworld_envpool import EnvPoolMetaWorld
from common.envs.registry import METAWORLD, suite_for
from common.errors import UserError
from common.evaluate import Evaluator
from common.replay import Ring, Sizes, Transition
from common.run import start_run

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
ACTION_STREAM = 0  # with the seed: name of a stream of random numbers on the host


@dataclass(frozen=True)
class Args(flags.RunArgs):  # env_id, seed, total_timesteps, num_envs, utd, logs: common/flags.py
    # --- environment
    goal: flags.Goal = "fixed"  # fixed: hidden, one per seed
    engine: Literal["metaworld", "envpool"] = "metaworld"  # envpool: faster, random goals only
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


# ------------------------------------------------------------------------------ state


@struct.dataclass
class AgentState:
    params: dict  # actor, critic, log_alpha
    target_critic: dict
    opt: optax.OptState
    actor: nn.Module = struct.field(pytree_node=False)
    critic: nn.Module = struct.field(pytree_node=False)


class Buffers(NamedTuple):
    transitions: Ring  # of Transition, without embeddings


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


def init_buffers(sizes: Sizes, args: Args) -> Buffers:
    return Buffers(replay.init_ring(replay.example_transition(sizes), args.buffer_size))


def update_once(
    agent: AgentState, buffers: Buffers, key: jax.Array, args: Args
) -> tuple[AgentState, dict]:
    """One SAC update on one batch."""
    sample_key, agent_key = jax.random.split(key)
    slots = replay.sample_slots(buffers.transitions, sample_key, args.batch_size)
    batch: Transition = replay.take(buffers.transitions, slots)
    task_reward = batch.reward + args.reward_shift
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


# ------------------------------------------------------------------------------- main


def main(args: Args) -> dict[str, float]:
    """Train, and return the last evaluation."""
    suite = suite_for(args.env_id)  # Meta-World or Gymnasium
    args = flags.check_args(args, suite)
    flags.check_replay(args, args.buffer_size, args.learning_starts)
    if args.engine == "envpool" and suite is not METAWORLD:
        raise UserError(f"--engine envpool has Meta-World's tasks, not {args.env_id}")
    make_vec = EnvPoolMetaWorld if args.engine == "envpool" else suite.make_vec
    envs = make_vec(args.env_id, args.num_envs, seed=args.seed, goal=args.goal)
    if envs.discrete:
        raise UserError(f"{args.env_id} has discrete actions: use vlm_rm_dqn.py --no-vlm-reward")
    evaluate = Evaluator(
        args.env_id, seed=args.seed, goal=args.goal, num_episodes=args.eval_episodes,
        capture_video=args.capture_video,
    )
    sizes = Sizes(envs.obs_dim, envs.action_dim)
    init_key, act_key, update_key = jax.random.split(jax.random.key(args.seed), 3)
    agent, buffers = init_agent(init_key, sizes, args), init_buffers(sizes, args)
    run = start_run(args, buffers, sizes, envs, evaluate)
    envs.reset()
    agent, buffers, obs = run.begin(agent, buffers, envs)

    # Environments step while the device learns, so a step is stored and learned from one iteration
    # later, when the next one is under way. Until then it is `previous`.
    previous, metrics = None, {}
    for env_steps in run.iterations():  # steps done so far
        # Act, and let the environments step ...
        if env_steps < args.learning_starts:
            rng = np.random.default_rng((args.seed, ACTION_STREAM, env_steps))
            action = rng.uniform(-1, 1, (args.num_envs, sizes.action)).astype(np.float32)
        else:
            action = np.asarray(act(agent, obs, act_key, env_steps))  # waits for the updates before
            run.check_finite(action, metrics)
        envs.step_async(action)

        # ... while the step before is stored and learned from.
        if previous is not None:
            buffers = Buffers(replay.add_rows(buffers.transitions, previous))
        if env_steps >= max(args.learning_starts, 1):
            agent, metrics = update(agent, buffers, update_key, env_steps, args)

        step = envs.step_wait()
        previous = Transition(obs, action, step.final_obs, step.reward, step.terminated)
        obs = step.obs

        # Measure and save.
        run.count_episodes(step)
        if run.is_due(args.eval_every):
            run.evaluate(policy, agent)
        if run.is_due(args.log_every):
            run.log_training("sac" if metrics else "random", {
                **metrics, "charts/num_updates": agent.opt[0].count,
            })
        if run.must_save():
            buffers, previous = Buffers(replay.add_rows(buffers.transitions, previous)), None
            run.save(agent, buffers, envs)

    run.close()
    return run.evaluation


if __name__ == "__main__":
    run_script(main, Args)
