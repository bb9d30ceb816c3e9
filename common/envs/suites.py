"""Which suite an environment's id belongs to: Gymnasium's, or else Meta-World's.

A suite is a module of this folder. Workers use of it what `workers.Suite` says, scripts
`resolve_env_id`, `make_vec`, `prompt_for`, `baseline_prompt_for`, `evaluated_on` and the constants
`CAMERAS`, `DEFAULT_CAMERA`, `CUTS_BORDER`, `EPISODES_DIFFER` and `REWARD_SHIFT`.
"""

from types import ModuleType

from common.envs import gymnasium, metaworld


def suite_for(env_id: str) -> ModuleType:
    """The module of the suite; an id that nobody knows is Meta-World's, which says so."""
    return gymnasium if gymnasium.knows(env_id) else metaworld
