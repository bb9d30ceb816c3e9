"""The policies of a run's evaluations, kept: a good one stays if later training spoils it.

`policies/<env_steps>.npz` holds the arrays of the state that the script's `policy` acts by, under
their names in the state, such as `furl/params/actor/params/MLP_0/Dense_0/kernel`. What else is in a
state (critics, optimizers, projection heads) is in checkpoints alone.
"""

import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from common import checkpoint
from common.checkpoint import CheckpointError
from common.errors import UserError
from common.run_folder import kept_policies, policy_file, read_metrics

MOST = 100  # policies kept
MOST_BYTES = 200 * 2**20  # of them together: 24 of those of furl_drq_pixels.py


def names_used(policy: Callable, state: Any, obs: Any) -> list[str]:
    """The names of the arrays of `state` that `policy(state, obs)` depends on.

    JAX's own program of the policy tells which they are, so no script has to.
    """
    names = list(named_arrays(state))
    try:
        program = jax.make_jaxpr(policy)(state, obs).jaxpr
        _, used = dce_jaxpr(program, [True] * len(program.outvars))
    except Exception:  # JAX cannot look into every function: this one may use them all
        return names
    return [name for name, is_used in zip(names, used, strict=False) if is_used]


def named_arrays(state: Any) -> dict[str, Any]:
    """The arrays of a state by their names in it."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree.leaves_with_path(state)}


def save(run_dir: Path, env_steps: int, arrays: dict[str, jax.Array], eval_every: int) -> None:
    """Write the policy of an evaluation whose rows are in metrics.csv, and thin out what is there.

    Args:
        run_dir: the run folder.
        env_steps: of the policy.
        arrays: what it acts by, see `names_used`.
        eval_every: steps from one evaluation to the next.

    Raises:
        OSError: the disk is full or read-only; what was saved before is untouched.
    """
    path = policy_file(run_dir, env_steps)
    path.parent.mkdir(exist_ok=True)
    checkpoint.write_npz(path, arrays)
    _thin_out(run_dir, env_steps, eval_every, max(1, min(MOST, MOST_BYTES // path.stat().st_size)))


def _thin_out(run_dir: Path, newest: int, eval_every: int, most: int) -> None:
    """Keep at most `most` policies: the best one of each 2, 4, 8 ... evaluations in a row.

    So the best of all always stays, and what stays does not depend on where a run was resumed.
    """
    def number(env_steps: int) -> int:  # of the evaluation, from 0
        return max(env_steps // eval_every - 1, 0)

    stretch = 1
    while number(newest) // stretch >= most:
        stretch *= 2
    if stretch == 1:
        return
    kept, of, none = kept_policies(run_dir), scores(run_dir), (-np.inf, -np.inf)
    for _, group in itertools.groupby(kept, lambda steps: number(steps) // stretch):
        *worse, _ = sorted(group, key=lambda steps: (of.get(steps, none), steps))
        for env_steps in worse:
            kept[env_steps].unlink()


def scores(run_dir: Path) -> dict[int, tuple[float, float]]:
    """(success_at_end, return) of a run's own evaluations by their steps; of two the larger is the
    better one."""
    rows = read_metrics(run_dir).rows
    success, returns = ({steps: value for steps, key, value in rows if key == name}
                        for name in ("eval/success_at_end", "eval/return"))
    return {steps: (success[steps], returns[steps]) for steps in success.keys() & returns.keys()}


def drop_after(run_dir: Path, env_steps: int) -> None:
    """Delete the policies that a run made beyond the checkpoint from which it goes on."""
    for steps, path in kept_policies(run_dir).items():
        if steps > env_steps:
            path.unlink()


def read(run_dir: Path, env_steps: int) -> dict[str, np.ndarray]:
    """The arrays of a policy that is kept, by their names.

    Raises:
        UserError: the file is damaged, or cannot be read.
    """
    path = policy_file(run_dir, env_steps)
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def unflatten(arrays: dict[str, np.ndarray], tree: Any) -> Any:
    """The state, in the structure of `tree`, of which a policy's `arrays` are known.

    The rest is NaN, or 0 in whole numbers, so that whatever depends on it can be told.

    Raises:
        CheckpointError: a shape differs, or there is no place for an array.
    """
    rest, leaves = dict(arrays), []
    for name, x in named_arrays(tree).items():
        unknown = np.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
        leaves.append(jnp.asarray(rest.pop(name, np.full(x.shape, unknown, x.dtype))))
    if rest:
        raise CheckpointError(f"this script's state has no {', '.join(rest)}")
    return checkpoint.unflatten(leaves, tree)
