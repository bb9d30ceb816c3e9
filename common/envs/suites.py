"""Which suite an environment's id belongs to: Gymnasium's, or else Meta-World's.

A suite is a module of this folder. Workers use of it what `workers.Suite` says, scripts
`resolve_env_id`, `make_vec`, `prompt_for`, `baseline_prompt_for`, `evaluated_on`, `default_vlm` and
the constants `CAMERAS`, `DEFAULT_CAMERA`, `CUTS_BORDER`, `EPISODES_DIFFER` and `REWARD_SHIFT`.
"""

import difflib
from types import ModuleType

from common.envs import gymnasium, metaworld
from common.errors import UserError


def suite_for(env_id: str) -> ModuleType:
    """The module of the suite.

    Raises:
        UserError: neither knows the id; names the closest ones of both.
    """
    if gymnasium.knows(env_id):
        return gymnasium
    try:
        metaworld.resolve_env_id(env_id)
    except UserError as error:
        others = difflib.get_close_matches(env_id, gymnasium.ids(), n=3, cutoff=0.6)
        hint = f" Or, of Gymnasium, {', '.join(others)}?" if others else ""
        raise UserError(f"{error}{hint}") from None
    return metaworld
