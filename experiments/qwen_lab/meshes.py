"""Which devices a command uses: the flag, the mesh it asks for, the model on it, a word on devices left idle."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import qwen_eqx
from qwen_eqx import sharding
from qwen_lab import allocation, cli
from qwen_lab.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnMesh:
    """The flag of commands that run a model."""

    mesh: str | None = None
    """Devices to use: data=4,model=2 deals rows to four and splits weights in two, auto takes all. Without it one. Processes
    that compute as one take all of theirs."""

    def open_mesh(self) -> Mesh | None:
        """The mesh asked for; None for one device, and then a line if that leaves accelerators idle."""
        if jax.process_count() > 1:
            return self._of_all_processes()
        if self.mesh is not None:
            return qwen_eqx.make_mesh(self.mesh)
        there = jax.local_devices()
        if len(there) > 1 and there[0].platform != "cpu":  # one CPU device uses all cores
            cli.console.print(f"using 1 of {len(there)} devices; --mesh auto uses all", markup=False)
        return None

    def open_model(
        self, name: str, dtype: str, revision: str | None = None
    ) -> tuple[qwen_eqx.Qwen, qwen_eqx.Tokenizer]:
        """A model on that mesh, and its tokenizer; what the process takes up from here on it keeps for its next step."""
        loaded = qwen_eqx.from_pretrained(name, revision=revision, dtype=jnp.dtype(dtype), mesh=self.open_mesh())
        allocation.keep()
        return loaded

    def check_mesh(self) -> None:
        """Raises for a mesh that is larger than the devices; opens none."""
        if self.mesh is not None:
            sharding.sizes(self.mesh, jax.device_count())

    def _of_all_processes(self) -> Mesh:
        mesh = qwen_eqx.make_mesh(self.mesh or "auto")
        idle = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
        if idle:
            found = f"{self.mesh!r}, which takes {mesh.size} of {jax.device_count()} devices and none of process {min(idle)}"
            raise InputError(f"--mesh: found {found}, expected devices of each process, such as auto")
        return mesh


def beside(model: qwen_eqx.Qwen, other: qwen_eqx.Qwen) -> qwen_eqx.Qwen:
    """Another model on the devices of the first."""
    mesh = sharding.mesh_of(model)
    return other if mesh is None else qwen_eqx.shard(other, mesh)
