"""What two scripts both define is the same, byte for byte, unless this file says why it is not.

The scripts that are compared are those of docs/paper.md; a user's own may be as they like.
"""

import ast
import importlib
from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, paper_scripts

from common.envs.registry import METAWORLD
from common.pixels import PICTURE_SIZE
from common.replay import Sizes, Transition

SCRIPTS = paper_scripts()

# Definitions that are not the same in all scripts that have them: in how many versions, and why.
DEFINITIONS = {
    "Args": (7, "each script has flags of its own; shared ones are compared below"),
    "AgentState": (2, "on pixels the encoder is part of it, and has a target too"),
    "Buffers": (5, "FuRL keeps positives and negatives too, on pixels pictures, plus first ones"),
    "Actor": (2, "on pixels there is a neck between the encoder's features and the MLP"),
    "CriticPair": (2, "as Actor"),
    "critic_loss": (3, "on pixels features, and the encoder's gradient; FuRL plus: n steps"),
    "actor_loss": (3, "on pixels it is given features; FuRL plus: n steps"),
    "sac_loss": (3, "VLM-RM's temperature can be kept as it is; FuRL plus: n steps"),
    "FuRLState": (2, "FuRL plus: an averaged actor"),
    "check_flags": (2, "FuRL plus has limits of its own"),
    "Phase": (2, "FuRL plus searches also without a relay"),
    "choose_phase": (2, "as Phase"),
    "vlm_reward": (2, "Eq. 3 of FuRL; the rewards of VLM-RM"),
    "init_agent": (3, "on pixels with the encoder; VLM-RM has --init-q beside a task reward only"),
    "update_agent": (3, "on pixels with the encoder; FuRL plus: n steps"),
    "init_state": (4, "two agents and heads, two agents, one agent; FuRL plus: an averaged actor"),
    "init_buffers": (6, "as Buffers, and SAC and DrQ store no embeddings"),
    "update_once": (7, "the method"),
    "update": (4, "it hands on what update_once needs"),
    "act": (6, "one agent or two that relay, on pixels stacks; FuRL plus: held noise"),
    "policy": (6, "as act; FuRL plus: the averaged actor"),
    "load_reward": (3, "learned heads, Eq. 2, or the rewards of VLM-RM"),
    "main": (7, "the method"),
}
# The same for the lines and properties of Args.
FIELDS = {
    "camera_id": (3, "on pixels the policy sees the frames as well; VLM-RM has other suites"),
    "init_q": (3, "as init_agent; FuRL plus its own"),
    "vlm": (2, "VLM-RM has other suites, with an embedded VLM of their own"),
    "prompt": (2, "as vlm"),
    "buffer_size": (2, "on pixels 2e5 pictures, Table 5"),
    "batch_size": (3, "FuRL's ranking losses sample as many; FuRL plus its own"),
    "hidden_features": (2, "on pixels three layers, Table 5"),
    "rho": (3, "VLM-RM has no task reward beside it by default; FuRL plus its own"),
    "lag": (2, "on pixels an action is repeated"),
    "learning_rate": (2, "FuRL plus has defaults of its own, as in what follows"),
    "init_temperature": (2, ""),
    "layer_norm": (2, ""),
    "stage2_after": (2, ""),
    "draw_every": (2, ""),
    "relay": (2, "FuRL plus searches also without a relay"),
}
# What every script has, by whatever method it learns: the agent, and what tools look for.
EVERYWHERE = {
    "Args", "AgentState", "Buffers", "MLP", "Actor", "CriticPair", "sample_action", "critic_loss",
    "actor_loss", "adam_step", "init_agent", "update_agent", "init_state",
    "init_buffers", "update_once", "update", "act", "policy", "main", "LOG_STD_MIN", "LOG_STD_MAX",
}


def definitions(script: str) -> dict[str, str]:
    """Source of each function, class and constant at the top level, by name."""
    text = (ROOT / f"{script}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = [ast.get_source_segment(text, d) for d in node.decorator_list]
            found[node.name] = "\n".join([*decorators, ast.get_source_segment(text, node)])
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            targets, values = node.targets, [node.value]
            if isinstance(targets[0], ast.Tuple):
                targets, values = targets[0].elts, node.value.elts
            for target, value in zip(targets, values, strict=True):
                found[target.id] = ast.get_source_segment(text, value)
    return found


def fields(script: str) -> dict[str, str]:
    """The lines of Args with their one-line help, and its properties, by name."""
    text = (ROOT / f"{script}.py").read_text()
    [args] = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "Args"]
    lines = text.splitlines()
    return {
        node.target.id: "\n".join(lines[node.lineno - 1 : node.end_lineno]).strip()
        for node in args.body if isinstance(node, ast.AnnAssign)
    } | {
        node.name: ast.get_source_segment(text, node)
        for node in args.body if isinstance(node, ast.FunctionDef)
    }


def test_scripts_are_found():
    assert len(SCRIPTS) > 1
    for script in SCRIPTS:
        assert (ROOT / f"{script}.py").exists(), f"docs/paper.md has commands of {script}.py"


@pytest.mark.parametrize(("read", "table"), [
    pytest.param(definitions, DEFINITIONS, id="definitions"),
    pytest.param(fields, FIELDS, id="fields"),
])
def test_scripts_agree(read, table):
    """Each name has as many versions as the table says, one if it does not stand there."""
    versions = defaultdict(lambda: defaultdict(list))
    for script in SCRIPTS:
        for name, source in read(script).items():
            versions[name][source].append(script)
    differing = {name: list(found.values()) for name, found in versions.items() if len(found) > 1}
    numbers = {name: len(groups) for name, groups in differing.items()}
    assert numbers == {name: number for name, (number, _) in table.items()}, differing


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_every_script_has(script):
    assert EVERYWHERE <= definitions(script).keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_update_leaves_the_types_as_they_were(script):
    """Else the second update of a run, and what acts on it, would be compiled anew."""
    module = importlib.import_module(script)
    args, sizes = module.Args(), Sizes(obs=39, action=4, embedding=8)
    obs = jnp.zeros((2, sizes.obs))
    if hasattr(args, "frame_stack"):
        size = PICTURE_SIZE
        obs = jnp.zeros((2, size, size, 3 * args.frame_stack), jnp.uint8)
    action, zeros = jnp.zeros((2, sizes.action)), jnp.zeros(2)
    batch = (Transition(obs, action, obs, zeros, zeros), zeros)
    if hasattr(module, "Batch"):  # which has the reward as well
        batch = (module.Batch(obs, action, obs, zeros, zeros, (zeros, zeros), 1.0),)

    def before_and_after(key):
        agent = module.init_agent(key, sizes, args)
        return agent, module.update_agent(agent, *batch, key, args)[0]

    before, after = jax.eval_shape(before_and_after, jax.random.key(0))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(before)]
    types = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
             for tree in (before, after)]
    assert len(paths) > 20
    assert dict(zip(paths, types[0], strict=True)) == dict(zip(paths, types[1], strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_layer_norm_is_in_the_critics(script):
    """A scale for each hidden layer of both, and nowhere else."""
    module = importlib.import_module(script)
    sizes = Sizes(obs=39, action=4, embedding=8)
    counts = []
    for layer_norm in (False, True):
        args = replace(module.Args(), layer_norm=layer_norm, hidden_features=(16, 8))
        agent = jax.eval_shape(partial(module.init_agent, sizes=sizes, args=args),
                               jax.random.key(0))
        counts.append({
            name: [leaf.shape for path, leaf in jax.tree.leaves_with_path(part)
                   if "MLP" in jax.tree_util.keystr(path) and "scale" in jax.tree_util.keystr(path)]
            for name, part in agent.params.items()
        })
    assert not any(counts[0].values())
    assert counts[1].pop("critic") == [(2, 16), (2, 8)] and not any(counts[1].values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_init_q_is_added_to_what_critics_say(script):
    """In VLM-RM only where the task's reward is learned from, too."""
    module = importlib.import_module(script)
    changes = {"init_q": -100.0, "hidden_features": (8,)}
    if with_task := hasattr(module.Args(), "task_reward"):
        changes["task_reward"] = True
    args, sizes = replace(module.Args(), **changes), Sizes(obs=39, action=4, embedding=8)
    agent = module.init_agent(jax.random.key(0), sizes, args)
    zero = agent.critic.clone(init_q=0.0)
    width = sizes.obs
    if hasattr(args, "frame_stack"):  # of the encoder's features
        pictures = jnp.zeros((2, PICTURE_SIZE, PICTURE_SIZE, 3 * args.frame_stack), jnp.uint8)
        encode = partial(module.encode, agent.encoder, agent.params["encoder"])
        width = jax.eval_shape(encode, pictures).shape[-1]
    obs, action = jnp.ones((2, width)), jnp.ones((2, sizes.action))
    with_q, without = (critic.apply(agent.params["critic"], obs, action)
                       for critic in (agent.critic, zero))
    assert jnp.allclose(with_q, without - 100, atol=1e-4)
    if with_task:
        alone = module.init_agent(jax.random.key(0), sizes, replace(args, task_reward=False))
        assert alone.critic.init_q == 0


class FirstActions(Exception):
    """Ends a script's `main`; its argument: what it is raised with."""


class Environments:
    """What a `main` asks of its environments before the first step."""

    obs_dim, action_dim, episode_length = 39, 4, 500

    def __init__(self, env_id: str, num_envs: int, **settings):
        self.num_envs, self.discrete = num_envs, "CartPole" in env_id

    def reset(self):
        size = PICTURE_SIZE
        return jnp.zeros((self.num_envs, 39)), np.zeros((self.num_envs, size, size, 3), np.uint8)

    def step_async(self, action):
        raise FirstActions(action)


def networks_and_first_actions(script, args, monkeypatch) -> tuple[list, np.ndarray]:
    """What `main` makes of its seed before it takes a step, all else replaced."""
    states = []

    def begin(state, buffers, envs):
        states.append(state)
        return state, buffers, envs.reset()[0]

    def embed(inputs):
        return np.zeros((len(inputs), 8), np.float32)

    vlm = SimpleNamespace(embed_dim=8, embed_images=embed, embed_text=embed)
    view = SimpleNamespace(size=PICTURE_SIZE, camera=lambda *where: None)
    run = SimpleNamespace(begin=begin, iterations=lambda: [0], check_finite=lambda *found: None)
    for name, value in {
        "load_vlm": vlm, "load_inputs": None, "embed_task": None, "view_for": view,
        "Camera": None, "Evaluator": None, "start_run": run,
    }.items():
        monkeypatch.setattr(script, name, lambda *a, value=value, **k: value, raising=False)
    for name in {"METAWORLD", "GYMNASIUM"} & vars(script).keys():
        suite = replace(getattr(script, name), make_vec=Environments)
        monkeypatch.setattr(script, name, suite)
    suite = replace(METAWORLD, make_vec=Environments)
    monkeypatch.setattr(script, "suite_for", lambda env_id: suite, raising=False)
    with pytest.raises(FirstActions) as stopped:
        script.main(args)
    return jax.tree.leaves(states[0].params if hasattr(states[0], "params") else states[0]), (
        stopped.value.args[0])


@pytest.mark.parametrize("script", [*SCRIPTS, "vlm_rm_dqn"])
def test_seeds_have_networks_and_random_actions_of_their_own(script, monkeypatch):
    module = importlib.import_module(script)
    small = replace(module.Args(), buffer_size=40_000, hidden_features=(16,))
    if hasattr(small, "encoder_features"):
        small = replace(small, encoder_features=(4, 4))
    found = [networks_and_first_actions(module, replace(small, seed=seed), monkeypatch)
             for seed in (0, 1, 0)]
    (networks, actions), (others, other_actions), (again, actions_again) = found
    assert all((a == b).all() for a, b in zip(networks, again, strict=True))
    assert any((a != b).any() for a, b in zip(networks, others, strict=True))
    np.testing.assert_array_equal(actions, actions_again)
    assert (actions != other_actions).any()
    if not module.__name__.endswith("dqn"):
        assert -1 <= actions.min() < -0.5 and 0.5 < actions.max() <= 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_no_other_script(script):
    others = {path.stem for path in ROOT.glob("*.py")}
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        if isinstance(node, ast.Import):
            assert not others & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in others
