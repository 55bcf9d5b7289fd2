"""Trainings on several devices: the same losses on any mesh, and experts that share nothing."""

import functools
import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_training import (
    CONFIG,
    MODEL,
    SHARES,
    SOURCES,
    TEXT,
    Interrupt,
    assert_same_bits,
    interrupt_at,
    losses,
)

from clustering.errors import UserError
from xelm.data.masking import masked_per_row
from xelm.models.parameters import fresh_parameters
from xelm.settings import vary
from xelm.training.compiled import compile_steps
from xelm.training.expert_axis import expert_mesh, stack, unstack
from xelm.training.loop import train, train_together
from xelm.training.metrics import read_metrics
from xelm.training.sharding import make_mesh, parameter_shardings
from xelm.training.trainer import DivergedError, TrainingSpec

AXES = ("expert", "data", "fsdp", "tensor")
# Every way to cut eight devices, in powers of two.
MESHES = [
    mesh for mesh in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(mesh, dtype=int) == 8
]
QUICK = [(2, 1, 2, 2)]
ENCODER = replace(MODEL, causal=False, head_transform=True, head_bias=True, positions="learned")


def slow_but(quick, every):
    return [
        each if each in quick else pytest.param(*each, marks=pytest.mark.slow) for each in every
    ]


def configured(mesh, config=CONFIG):
    return vary(config, {f"runtime.mesh_{axis}": size for axis, size in zip(AXES, mesh)})


def batch_of(
    model, expert: int, step: int, length: int = CONFIG.sequence_length
) -> dict[str, np.ndarray]:
    """Random text of two documents a row."""
    draw = np.random.default_rng([expert, step])
    columns = length + model.causal
    shape = (CONFIG.batch_size, columns)
    tokens = draw.integers(0, model.vocabulary_size, shape).astype(np.int32)
    cut = draw.integers(1, columns, (shape[0], 1))
    places = np.broadcast_to(np.arange(columns, dtype=np.int32), shape)
    batch = {
        "tokens": tokens,
        "segments": np.where(places < cut, 1, 2).astype(np.int32),
        "positions": np.where(places < cut, places, places - cut).astype(np.int32),
    }
    if not model.causal:
        hidden = masked_per_row(columns, CONFIG.data.mask_share)
        batch["inputs"] = np.where(draw.random(shape) < 0.2, 3, tokens).astype(np.int32)
        batch["places"] = draw.permuted(places, axis=1)[:, :hidden]
        batch["chosen"] = draw.random((shape[0], hidden)) < 0.9
    return batch


def losses_on(mesh, model, *, config=CONFIG, steps=3):
    """Losses of the steps and, last, that which is measured after them, float [steps + 1, experts];
    and the parameters of each expert after them."""
    experts = mesh[0]
    config = configured(mesh, config)
    devices = make_mesh(config, experts)
    assert tuple(devices.shape.items()) == tuple(zip(AXES, mesh))
    functions = compile_steps(model, config, devices)
    states, found = [], []
    for number, placed in enumerate(functions.whole):
        with jax.set_mesh(expert_mesh(devices, number)):
            fresh = jax.tree.map(np.asarray, fresh_parameters(model, number))
            states.append(functions.create[number](jax.device_put(fresh, placed)))
    with jax.set_mesh(devices):
        state = stack(states, functions.state)
        for step in range(steps):
            parts = [batch_of(model, number, step) for number in range(experts)]
            batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            batch = jax.device_put(batch, functions.batch_sharding)
            state, metrics = functions.step(state, batch, np.full(experts, 3e-3, np.float32))
            found.append(np.asarray(metrics.loss))
        found.append(measured(functions, state, batch))
        assert np.asarray(functions.finite(state.parameters)).tolist() == [True] * experts
    return np.stack(found), [masters_of(functions, state, each) for each in range(experts)]


@functools.cache
def alone(model, number: int, config):
    """The same of an expert on one device."""
    config = configured((1, 1, 1, 1), config)
    devices = make_mesh(config)
    functions = compile_steps(model, config, devices)
    found = []
    with jax.set_mesh(devices):
        state = functions.create[0](fresh_parameters(model, number))
        state = stack([state], functions.state)
        for step in range(3):
            batch = jax.device_put(batch_of(model, number, step), functions.batch_sharding)
            state, metrics = functions.step(state, batch, np.full(1, 3e-3, np.float32))
            found.append(np.asarray(metrics.loss)[0])
        found.append(measured(functions, state, batch)[0])
    return found, masters_of(functions, state, 0)


def measured(functions, state, batch):
    """Mean loss of each expert over its part of a batch."""
    nats, targets = functions.measure(state, batch)
    experts = len(functions.alone)
    assert np.asarray(targets).sum() > 0
    return np.reshape(nats, (experts, -1)).sum(1) / np.reshape(targets, (experts, -1)).sum(1)


def masters_of(functions, state, number):
    one = unstack(state, functions.alone[number])
    return jax.tree.map(np.asarray, functions.master_weights(one.parameters, one.remainders))


def assert_as_alone(mesh, model, config=CONFIG):
    found, parameters = losses_on(mesh, model, config=config)
    for number in range(mesh[0]):
        wanted, others = alone(model, number, vary(config, {"runtime.accumulation_steps": 1}))
        np.testing.assert_allclose(found[:, number], wanted, atol=2e-5)
        # Of signs of tiny gradients Adam makes whole steps, so few entries may be further apart.
        far = jax.tree.map(lambda a, b: np.abs(a - b) > 1e-4, parameters[number], others)
        entries = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(far)])
        assert entries.mean() < 1e-3


@pytest.mark.parametrize(AXES, slow_but(QUICK, MESHES))
def test_losses_are_those_of_one_device(expert, data, fsdp, tensor):
    assert_as_alone((expert, data, fsdp, tensor), MODEL)


@pytest.mark.parametrize(AXES, slow_but([], [(1, 2, 2, 2), (2, 1, 2, 2), (2, 2, 2, 1)]))
def test_losses_of_an_encoder_are_those_of_one_device(expert, data, fsdp, tensor):
    assert_as_alone((expert, data, fsdp, tensor), ENCODER)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        # No mesh axis divides it; and every device has entries that are no tokens.
        {"vocabulary_size": 49},
        {"vocabulary_size": 49, "tie_embeddings": False, "head_bias": True, "logit_cap": 5.0},
    ],
)
def test_any_vocabulary_is_spread(changes):
    assert_as_alone((1, 2, 2, 2), replace(MODEL, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            **{"activation": "xielu", "gated": False, "norm": "layer", "parallel": "one norm"},
            **{"head_norm": True, "head_norm_form": "each", "nope_layers": (0,)},
            **{"logit_scale": 0.3, "residual_scale": 0.5},
        },
        {
            **{"norm_placement": "result", "head_norm": True, "head_norm_form": "joint"},
            **{"expert_count": 3, "experts_per_token": 2, "expert_weights_sum_to_one": False},
            **{"tie_embeddings": False, "query_bias": True},
        },
    ],
    ids=["as Apertus and Cohere", "as OLMo and OLMoE"],
)
def test_layers_of_recent_families_are_spread(changes):
    assert_as_alone((1, 2, 2, 2), replace(MODEL, **changes))


@pytest.mark.slow
def test_parts_of_a_batch_are_accumulated_on_a_mesh():
    mesh = (1, 2, 2, 2)
    assert_as_alone(mesh, MODEL, vary(CONFIG, {"runtime.accumulation_steps": 2}))


@pytest.mark.slow
def test_adafactor_knows_rows_and_columns_that_are_spread():
    wide = replace(MODEL, width=128, feedforward_width=256)
    assert_as_alone((2, 1, 2, 2), wide, vary(CONFIG, {"optimizer.name": "adafactor"}))


@pytest.mark.slow
def test_half_precision_is_spread():
    """Sums of bfloat16 in another order: its steps are 2^-8 of what is added."""
    config = vary(CONFIG, {"runtime.dtype": "bfloat16", "runtime.moments_dtype": "bfloat16"})
    found, _ = losses_on((2, 1, 2, 2), MODEL, config=config)
    for number in range(2):
        np.testing.assert_allclose(found[:, number], alone(MODEL, number, config)[0], rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"lora.rank": 4}, {"frozen_layers": "1"}, {"optimizer.pull": 5.0}],
    ids=["adapters", "frozen layers", "pull"],
)
def test_what_is_trained_and_what_is_fixed_are_spread(changes):
    assert_as_alone((2, 1, 2, 2), MODEL, vary(CONFIG, changes))


def test_parameters_are_spread_as_the_mesh_says():
    shardings = parameter_shardings(MODEL, make_mesh(configured((1, 2, 2, 2))))
    up = shardings["blocks"]["up"]["weight"]
    assert up.shard_shape((2, 16, 24)) == (2, 8, 12)
    assert shardings["embedding"].shard_shape((48, 16)) == (48, 4)


@pytest.mark.parametrize(("batch_size", "data"), [(8, 8), (12, 6), (7, 7), (16, 8), (1, 1)])
def test_a_small_batch_takes_as_many_devices_as_divide_it_and_says_so(batch_size, data, capsys):
    mesh = make_mesh(vary(CONFIG, {"runtime.mesh_data": None, "batch_size": batch_size}))
    said = capsys.readouterr().err
    if data == 8:
        assert said == ""
    else:
        assert said == (
            f"batch_size {batch_size} is spread over {data} of 8 devices, the others are idle: "
            "a batch_size that is a multiple of 8 uses 8\n"
        )
    assert mesh.shape["data"] == data


def test_devices_that_the_mesh_does_not_divide_are_told(capsys):
    assert (
        make_mesh(
            vary(CONFIG, {"runtime.mesh_data": None, "runtime.mesh_fsdp": 3, "batch_size": 12})
        ).size
        == 6
    )
    assert "over 6 of 8 devices, the others are idle: expert x fsdp x tensor = 3 does not" in (
        capsys.readouterr().err
    )


def test_fewer_experts_get_more_devices_each():
    config = vary(CONFIG, {"runtime.mesh_data": None})
    assert [make_mesh(config, experts).shape["data"] for experts in (1, 2, 4, 8)] == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("changes", "experts", "fault"),
    [
        (
            {"runtime.mesh_data": 16},
            1,
            "expert 1 x data 16 x fsdp 1 x tensor 1 needs 16 devices; there",
        ),
        (
            {"runtime.mesh_data": None},
            16,
            "expert 16 x data 1 x fsdp 1 x tensor 1 needs 16 devices; there",
        ),
        ({"runtime.mesh_data": 3}, 1, "must be a multiple of data x fsdp = 3; got 8"),
        ({"runtime.mesh_data": 4, "runtime.accumulation_steps": 4}, 1, "data x fsdp = 4; got 2"),
    ],
)
def test_a_mesh_that_cannot_be_made_is_a_users_mistake(changes, experts, fault):
    with pytest.raises(UserError, match=fault):
        make_mesh(vary(CONFIG, changes), experts)


def test_a_model_that_the_mesh_does_not_divide_is_a_users_mistake():
    mesh = make_mesh(vary(CONFIG, {"runtime.mesh_tensor": 7}))
    with pytest.raises(UserError, match=r"must be a multiple of mesh axis tensor = 7; got \d+"):
        parameter_shardings(MODEL, mesh)


# What passes between devices


def groups_of(line: str) -> list[list[int]]:
    """Devices between which one collective of compiled HLO passes something."""
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{('[^}]*')\}", line)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        over = [list(sizes).index(name.strip(" '")) for name in named.group(2).split(",")]
        devices = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        devices = np.moveaxis(devices, over, range(-len(over), 0))
        return devices.reshape(-1, np.prod(devices.shape[-len(over) :])).tolist()
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", line)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if pairs or listed:
        inside = (pairs or listed).group(1)
        return [list(map(int, part.split(","))) for part in re.findall(r"\{([\d,]*)\}", inside)]
    assert counted, line
    shape, source, order = (
        tuple(map(int, part.split(","))) if part else None for part in counted.groups()
    )
    devices = np.arange(np.prod(source)).reshape(source)
    if order:
        devices = devices.transpose(order)
    return devices.reshape(shape).tolist()


COLLECTIVE = re.compile(
    r"= .* (?:ragged-)?(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|"
    r"collective-broadcast)(?:-start)?\("
)


def collectives(compiled) -> list[list[list[int]]]:
    """Groups of devices of every collective of a compiled function."""
    return [groups_of(line) for line in compiled.as_text().splitlines() if COLLECTIVE.search(line)]


def crossing(compiled, experts: int) -> list[list[int]]:
    """Groups in which devices of different experts meet."""
    each = 8 // experts
    groups = [group for groups in collectives(compiled) for group in groups]
    return [group for group in groups if len({device // each for device in group}) > 1]


def compiled_step(mesh, model, length=CONFIG.sequence_length):
    return lowered_step(mesh, model, length=length).compile()


def lowered_step(mesh, model, config=CONFIG, length=CONFIG.sequence_length):
    config = configured(mesh, config)
    devices = make_mesh(config, mesh[0])
    functions = compile_steps(model, config, devices)
    batch = {
        name: jax.ShapeDtypeStruct(
            (mesh[0] * len(array), *array.shape[1:]), array.dtype, sharding=functions.batch_sharding
        )
        for name, array in batch_of(model, 0, 0, length).items()
    }
    rates = jax.ShapeDtypeStruct((mesh[0],), jnp.float32)
    with jax.set_mesh(devices):
        return functions.step.lower(functions.state, batch, rates)


@pytest.mark.parametrize(
    AXES, slow_but([(2, 1, 2, 2)], [(2, 1, 2, 2), (2, 4, 1, 1), (2, 2, 2, 1), (4, 1, 1, 2)])
)
def test_nothing_passes_between_experts(expert, data, fsdp, tensor):
    compiled = compiled_step((expert, data, fsdp, tensor), MODEL)
    assert len(collectives(compiled)) > 3  # within experts
    assert crossing(compiled, expert) == []


def test_each_device_attends_for_its_own_rows():
    """No array has the queries, keys or values of two rows, or gradients of them, though a row is
    so long that they are summed over blocks: heads alone are of size 12."""
    model = replace(MODEL, head_size=12, max_length=192)
    text = compiled_step((1, 2, 4, 1), model, length=192).as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    of_heads = [np.prod(shape) for shape in shapes if shape[-1] == 12]
    # What is kept of a row by both layers.
    assert max(of_heads) == model.layer_count * model.head_count * 192 * 12


def collectives_in(compiled, scope: str) -> list[str]:
    """Kinds of the collectives of a compiled function whose operation is in this scope."""
    lines = [line for line in compiled.as_text().splitlines() if scope in line]
    return [found[1] for line in lines if (found := COLLECTIVE.search(line))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_pass_between_devices_once(dtype):
    """They leave the backward pass spread as parameters and averages are, so that the optimiser
    works on what each device has; and each device sums the rows of the embedding that its own
    tokens looked up, for its own columns."""
    wide = replace(MODEL, width=32, feedforward_width=64)
    config = vary(CONFIG, {"runtime.dtype": dtype})
    compiled = lowered_step((1, 2, 4, 1), wide, config).compile()
    assert collectives_in(compiled, "/optimizer/") == []
    backward = collectives_in(compiled, "transpose(jvp(embedding))")
    assert "all-gather" not in backward
    # Columns for rows of what was looked up, and back; and columns of the table for its entries,
    # and back: the gradients by the head and by the look-ups are added as columns.
    assert collectives_in(compiled, "").count("all-to-all") == 4


def test_matrices_pass_between_devices_in_the_dtype_of_products():
    """Of what is summed over devices by hand, only vectors and the loss are float32."""
    config = vary(CONFIG, {"runtime.dtype": "bfloat16"})
    text = lowered_step((1, 2, 2, 2), MODEL, config).as_text()
    types = re.findall(r"stablehlo\.all_reduce.*?\) : \((tensor<.*?>)\) ->", text, re.DOTALL)
    found = {each for each in types if "48x" in each or "24x" in each or "12x" in each}
    assert found == {"tensor<12x16xbf16>", "tensor<48x4xbf16>"}  # of the head and the embedding


def test_eight_experts_on_eight_devices_pass_nothing_at_all():
    assert collectives(compiled_step((8, 1, 1, 1), MODEL)) == []


@pytest.mark.parametrize("out", [PartitionSpec(), PartitionSpec(("data", "expert"))])
def test_what_passes_between_experts_would_be_seen(out):
    mesh = make_mesh(configured((2, 2, 2, 1)), 2)
    array = jax.ShapeDtypeStruct(
        (8, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("expert"))
    )
    function = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, out))
    assert crossing(function.lower(array).compile(), 2)


# Several trainings in one program


def training(tmp_path, label: str, number: int, **changes) -> TrainingSpec:
    config = vary(CONFIG, changes)
    return TrainingSpec(
        label=label,
        start=lambda shardings: jax.device_put(
            jax.tree.map(np.asarray, fresh_parameters(MODEL, number)), shardings
        ),
        sources=SOURCES[number : number + 2],
        config=config,
        directory=tmp_path / label,
    )


BUDGETS = {"long": 20 * 128, "short": 9 * 128}


def both(tmp_path, **changes):
    return [
        training(tmp_path, label, number, tokens=tokens, **changes)
        for number, (label, tokens) in enumerate(BUDGETS.items())
    ]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    return [train(each, MODEL, TEXT) for each in both(tmp_path_factory.mktemp("apart"))]


@pytest.mark.slow
def test_each_ends_as_it_would_alone(apart, tmp_path):
    found = train_together(both(tmp_path), MODEL, TEXT)
    for one, other in zip(found, apart, strict=True):
        assert_same_bits(one, other)
    steps = [len(read_metrics(tmp_path / label / "metrics.jsonl")) for label in BUDGETS]
    assert steps == [20, 9]


@pytest.mark.slow
def test_experts_that_were_interrupted_together_go_on_apart(apart, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 15)
        train_together(both(tmp_path), MODEL, TEXT)
    for each, wanted in zip(both(tmp_path), apart, strict=True):
        assert_same_bits(train(each, MODEL, TEXT), wanted)


@pytest.mark.slow
def test_experts_that_were_interrupted_apart_go_on_together(apart, tmp_path, monkeypatch):
    trainings = both(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        interrupt_at(patch, 15)
        train(trainings[0], MODEL, TEXT)
    for one, other in zip(train_together(trainings, MODEL, TEXT), apart, strict=True):
        assert_same_bits(one, other)


@pytest.mark.slow
def test_experts_go_on_together_of_which_one_was_saved_in_another_dtype(tmp_path, monkeypatch):
    changes = {"runtime.dtype": "bfloat16", "runtime.moments_dtype": "bfloat16"}
    for place in ("apart", "together"):
        with monkeypatch.context() as patch:
            interrupt_at(patch, 8)
            for each in (both(tmp_path / place)[0], both(tmp_path / place, **changes)[1]):
                with pytest.raises(Interrupt):
                    train(each, MODEL, TEXT)
    for each in both(tmp_path / "apart", **changes):
        train(each, MODEL, TEXT)
    train_together(both(tmp_path / "together", **changes), MODEL, TEXT)
    for label in BUDGETS:
        # In bfloat16 two programs round differently.
        wanted, found = (
            losses(read_metrics(tmp_path / place / label / "metrics.jsonl"))
            for place in ("apart", "together")
        )
        assert found[:6] == wanted[:6]
        np.testing.assert_allclose(found, wanted, atol=5e-4)


@pytest.mark.slow
def test_one_that_fails_leaves_the_others_alone(apart, tmp_path):
    trainings = both(tmp_path)
    spoilt = jax.tree.map(lambda x: x * np.float32("nan"), fresh_parameters(MODEL, 0))
    trainings[0] = replace(trainings[0], start=lambda shardings: jax.device_put(spoilt, shardings))
    failed, trained = train_together(trainings, MODEL, TEXT)
    assert isinstance(failed, UserError) and not isinstance(failed, DivergedError)
    assert "long has loss nan" in str(failed)
    assert_same_bits(trained, apart[1])


def test_trainings_of_one_program_have_the_same_settings(tmp_path):
    first, second = both(tmp_path)
    second = replace(second, config=vary(second.config, {"optimizer.learning_rate": 1.0}))
    with pytest.raises(ValueError, match="the same settings but for tokens"):
        train_together([first, second], MODEL, TEXT)


@pytest.mark.slow
def test_losses_of_a_training_do_not_depend_on_the_mesh(trained):
    short = replace(CONFIG, tokens=6 * 128)
    _, wanted = trained(short, "one device")
    _, metrics = trained(configured((1, 2, 2, 2), short), "mesh")
    np.testing.assert_allclose(losses(metrics), losses(wanted), atol=1e-4)
    assert sum(SHARES.values()) == 1
