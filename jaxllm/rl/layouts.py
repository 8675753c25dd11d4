"""Programs that run on a mesh of their own.

The policy trains on the stage's mesh. Other roles may use the same devices as another mesh, because what is fast differs:
training shards parameters over `fsdp`, while sampling one token after the other wants them over `tensor`.

A program on another mesh receives its arguments there and returns its results to the mesh they came from. Arrays move
between devices directly, never through the host.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxllm.rl.config import PPOConfig
from jaxllm.runtime.mesh import planned_mesh
from jaxllm.runtime.transfer import reshard_across_meshes
from jaxllm.sharding import activation, check_batch, replicated

ROLES = ("policy", "rollout", "reference", "reward", "critic", "teacher")

# How an argument or a result travels between two meshes. A tree of shardings says it leaf by leaf.
STAY = "stay"  # it is on the program's mesh already, or on the host
ROWS = "rows"  # its leading dimension is the batch
REPLICATED = "replicated"  # every device holds all of it

# (tree, mesh, one sharding for all leaves or a tree of them) -> the tree on that mesh
Move = Callable[[Any, Any, Any], Any]


class MeshProgram(NamedTuple):
    """A jitted function, the mesh it runs on, and what `jaxllm plan` wants to know about it."""

    name: str
    function: Callable[..., Any]
    """Jitted, if it computes; called under `mesh`."""
    mesh: Any
    """Where it runs."""
    home: Any
    """Where its arguments come from and its results return to."""
    arguments: tuple[Any, ...]
    """How each positional argument travels to `mesh`. Keyword arguments are there already."""
    results: Any = STAY
    """How the result travels home; a tuple where the function returns a tuple of different kinds."""
    flops: float = 0.0
    """FLOPs the model needs, over all devices. Programs with 0 are bookkeeping, which is not planned."""
    computes: bool = True
    """False for a function that only picks parts of its arguments, and works on shapes as well."""

    def __call__(self, *arguments: Any, **resident: Any) -> Any:
        """Run the program; arguments and results are on the home mesh."""
        if self.mesh is self.home:
            return self.function(*arguments, **resident)
        # Parameters are on this mesh already; only rows and small arrays travel.
        moved = [
            travel(argument, how, self.mesh)
            for argument, how in zip(arguments, self.arguments, strict=True)
        ]
        # Sharding constraints inside the program name axes of its own mesh.
        with jax.set_mesh(self.mesh):
            results = self.function(*moved, **resident)
        return travel(results, self.results, self.home)


def travel(value: Any, how: Any, mesh: Any, move: Move = reshard_across_meshes) -> Any:
    """`value` on another mesh: STAY, ROWS, REPLICATED, a tuple of these for a tuple, or a tree of shardings.

    move: how a tree gets there, which is different for arrays and for their shapes.
    """
    if how == STAY:
        return value
    if how == ROWS:
        return move(value, mesh, activation(mesh, "batch"))
    if how == REPLICATED:
        return move(value, mesh, replicated(mesh))
    if isinstance(how, tuple):
        return tuple(travel(part, kind, mesh, move) for part, kind in zip(value, how, strict=True))
    return move(value, mesh, how)


def role_meshes(config: PPOConfig, mesh: Any) -> dict[str, Any]:
    """The mesh of every role: its own over the same devices, or the stage's, on which the policy trains.

    Raises:
      InputError: where the rows of a role do not divide over its mesh.
    """
    if isinstance(mesh, jax.sharding.AbstractMesh):
        devices: Any = mesh.size
    else:
        devices = mesh.devices.flatten().tolist()
    meshes: dict[str, Any] = dict.fromkeys(ROLES, mesh)
    for layout in config.meshes:
        # The same devices, possibly in another order: some shapes of a TPU slice need that.
        meshes[layout.role] = planned_mesh(layout, devices)
        rows, noun = _rows_of(layout.role, config)
        check_batch(meshes[layout.role], rows, f"{noun} in meshes, role {layout.role},")
    return meshes


def _rows_of(role: str, config: PPOConfig) -> tuple[int, str]:
    """(rows of the smallest batch that a role gets, what they are)."""
    if role == "rollout":
        return config.num_prompts, "prompts"
    if role == "critic":
        return config.minibatch_size // config.num_micro, "responses of a microbatch"
    return config.batch_size, "responses"
