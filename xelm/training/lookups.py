"""Look-ups in arrays that are spread over an expert's part of the mesh, and kernels on them."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from xelm.models.fused_attention import Kernel
from xelm.models.tpu_attention import LANES
from xelm.training.sharding import BATCH, RULES


def spread_lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of a table whose columns are spread over an expert's part of the mesh.

    Each device looks up its columns for all tokens of its `data`; then columns are exchanged for
    rows. So the gradient of the table is made in place, spread as the table is.
    """
    spread = jax.lax.with_sharding_constraint
    tokens = spread(tokens, PartitionSpec("data"))
    columns = spread(_rows(table, tokens), PartitionSpec("data", None, RULES["columns"]))
    # In two steps: for both at once XLA would gather everything everywhere.
    columns = spread(columns, PartitionSpec("data", None, "fsdp"))
    return spread(columns, PartitionSpec(BATCH))


@jax.custom_vjp
def _rows(table, tokens):
    return table[tokens]


def _rows_forward(table, tokens):
    return table[tokens], (table, tokens)


def _rows_backward(found, gradient):
    table, tokens = found

    # By hand: XLA would bring the gradients of all tokens to every device, in float32.
    def own_tokens(tokens, gradient):
        # Summed in float32: a token met a thousand times would lose most of its gradient in
        # bfloat16. There are few devices, so that what passes between them may be rounded.
        sums = jnp.zeros((len(table), gradient.shape[-1]), jnp.float32)
        sums = sums.at[tokens].add(gradient.astype(jnp.float32)).astype(table.dtype)
        return sums if ways == 1 else jax.lax.psum(sums, "data")

    ways, columns = jax.sharding.get_abstract_mesh().shape["data"], RULES["columns"]
    summed = jax.shard_map(
        own_tokens,
        in_specs=(PartitionSpec("data"), PartitionSpec("data", None, columns)),
        out_specs=PartitionSpec(None, columns),
        axis_names={*BATCH, "tensor"},
        check_vma=False,
    )
    return summed(tokens, gradient), None


_rows.defvjp(_rows_forward, _rows_backward)


def states_at(states: Float[Array, "B T D"], places: Int[Array, "B P"]) -> Float[Array, "B P D"]:
    """States at P places of each row: every device takes those of its own rows."""

    # By hand: for TPUs XLA's partitioner fails at it where `fsdp` and `tensor` are both used.
    def take(states, places):
        return jnp.take_along_axis(states, places[..., None], axis=1)

    rows = PartitionSpec(BATCH)
    axes = {*BATCH, "tensor"}
    taken = jax.shard_map(take, in_specs=(rows, rows), out_specs=rows, axis_names=axes)
    return taken(states, places)


def on_own_rows(kernel: Kernel) -> Kernel:
    """A kernel of attention, for arrays that are spread over an expert's part of the mesh: every
    device computes it for its own rows and, if these are whole columns of the kernel, heads."""

    def spread(query, key, value, segments, local):
        mesh = jax.sharding.get_abstract_mesh()
        ways = mesh.shape["tensor"]
        whole = query.shape[2] * query.shape[3] % (LANES * ways) == 0
        heads = "tensor" if whole and key.shape[2] % ways == 0 else None
        rows, headed = PartitionSpec(BATCH), PartitionSpec(BATCH, None, heads)
        compute = jax.shard_map(
            kernel,
            in_specs=(headed, headed, headed, rows, PartitionSpec()),
            out_specs=headed,
            axis_names={*BATCH, "tensor"},
            check_vma=False,
        )
        return compute(query, key, value, segments, local)

    return spread
