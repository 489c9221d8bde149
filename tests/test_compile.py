"""`instap compile`: topologies by name, programs really compiled for TPUs, what a user is told."""

import contextlib
import json
import math
import re
from pathlib import Path
from unittest.mock import Mock, call

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas
from jax.experimental.pallas import tpu
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from tiny import tiny_config

from instap_jax import main, sharding
from instap_jax.aot import compiling, hlo, kernels, lowering, topology
from instap_jax.errors import UserError
from instap_jax.models import attention_backends, depth
from instap_jax.models.layers import Bias, PreNormBlock, exact_gelu
from instap_jax.progress import Progress
from instap_jax.train.feed import abstract_batch
from instap_jax.train.flops import peak_flops
from instap_jax.train.state import with_sharding
from instap_jax.types import Kind


@pytest.mark.parametrize(
    "text, name, chips",
    [
        ("v5e:16x16", "v5e:16x16", 256),
        ("v5litepod-256", "v5e:16x16", 256),
        ("V5E-8", "v5e:2x4", 8),
        ("v6e-256", "v6e:16x16", 256),
        ("v5p-128", "v5p:4x4x4", 64),  # TensorCores, two a chip
        ("v4-16", "v4:2x2x2", 8),
        ("v5p:4x8x8", "v5p:4x8x8", 256),
    ],
)
def test_topologies_by_name(text, name, chips):
    found = topology.parse(text)
    assert (found.name, found.chips) == (name, chips)
    assert topology.parse(text, slices=2).chips == 2 * chips


@pytest.mark.parametrize(
    "text", ["", "v5e", "v5e-255", "v7:2x2", "v5p:4x4", "v5e:32x16", "v5e:0x4"]
)
def test_unknown_topologies_are_answered_with_the_list(text):
    with pytest.raises(UserError, match=r"v5litepod-1\|4.*v5p-8\|16.*v6e-1") as error:
        topology.parse(text)
    assert "\n" not in str(error.value)


def test_every_cloud_name_has_its_chips():
    for name, ours in topology.cloud_names().items():
        generation, number = name.split("-")
        cores = 2 if generation in ("v4", "v5p") else 1
        assert topology.parse(ours).chips * cores == int(number)


def test_missing_compiler_is_one_line_with_the_command(monkeypatch):
    def version(name: str):
        raise topology.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(topology.importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"^[^\n]*pip install -e '\.\[compile\]'[^\n]*$"):
        topology.devices(topology.parse("v5e:2x2"))


def compile_layers(where: topology.Topology, replica: int, fsdp: int) -> list[hlo.Visit]:
    """Gradient of 6 scanned layers [512, 512], gathered in bfloat16, for a batch of 1024."""
    devices = topology.devices(where)
    config = tiny_config("stage1").mesh
    config.update(replica=replica, fsdp=fsdp, slices=where.slices)
    mesh = sharding.make_mesh(config, devices)

    def loss(weights, x):
        def layer(x, weight):
            weight = jax.lax.with_sharding_constraint(weight.astype(jnp.bfloat16), P())
            y = jnp.tanh(jnp.dot(x, weight, precision="default"))
            return jax.lax.with_sharding_constraint(y, P(("replica", "fsdp"))), None

        return (jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2).sum()

    weights = jax.ShapeDtypeStruct(
        (6, 512, 512), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))
    )
    x = jax.ShapeDtypeStruct(
        (1024, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P(("replica", "fsdp")))
    )
    with jax.set_mesh(mesh), topology.compiler_environment():
        step = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
        text = step.trace(weights, x).lower(lowering_platforms=("tpu",)).compile().as_text()
    return list(hlo.walk(hlo.parse(text)))


def total(found: list[hlo.Collective], **which) -> float:
    return sum(
        one.bytes for one in found if all(getattr(one, name) == v for name, v in which.items())
    )


def test_traffic_of_a_compiled_program():
    where = topology.parse("v5e:2x4")
    visits = compile_layers(where, replica=2, fsdp=4)
    found = hlo.collectives(visits, {"replica": 2, "fsdp": 4, "tensor": 1})
    layer = 512 * 512 * 2
    assert total(found, kind="all-gather") == 6 * layer * 3 / 4
    assert {one.axes for one in found if one.kind == "all-gather"} == {"fsdp"}
    # The gradient, in bfloat16, summed over all chips.
    assert total(found, kind="all-reduce", axes="replica+fsdp") >= 6 * layer * 2 * 7 / 8


def test_estimated_time_of_a_large_product():
    where = topology.parse("v5e:1x1")
    (device,) = topology.devices(where)
    array = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
    product = jax.jit(
        lambda a, b: jnp.dot(a, b, precision="default"), in_shardings=SingleDeviceSharding(device)
    )
    with topology.compiler_environment():
        compiled = product.trace(array, array).lower(lowering_platforms=("tpu",)).compile()
    cycles = hlo.cycles(list(hlo.walk(hlo.parse(compiled.as_text()))))
    at_peak = 2 * 8192**3 / peak_flops(device)
    assert at_peak < cycles / where.chip.clock < 1.3 * at_peak


def test_traffic_between_slices_of_a_compiled_program():
    where = topology.parse("v5e:2x2", slices=2)
    visits = compile_layers(where, replica=2, fsdp=4)
    found = hlo.collectives(visits, {"replica": 2, "fsdp": 4, "tensor": 1}, slices=2)
    layer = 512 * 512 * 2
    # Of every gradient a chip sends its quarter to the other slice.
    assert total(found, network="DCN") == 6 * layer / 4
    assert total(found, network="ICI", kind="all-gather") == 6 * layer * 3 / 4


def compile_stack(remat: str) -> tuple[hlo.Module, jax.stages.Compiled]:
    """Gradient of 4 blocks of width 128 with our kernel, for 16 sequences of 256 on 4 chips."""
    mesh = sharding.make_mesh(
        tiny_config("stage1").mesh, topology.devices(topology.parse("v5e:2x2"))
    )
    options = {"mlp_ratio": 4, "bias": Bias.FULL, "activation": exact_gelu, "eps": 1e-6}
    options |= {"dtype": jnp.bfloat16, "backend": "pallas"}
    blocks = nnx.eval_shape(
        lambda: depth.stack(lambda rngs: PreNormBlock(128, 2, **options, rngs=rngs), 4, nnx.Rngs(0))
    )
    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        graphdef, params = nnx.split(blocks)
        params = with_sharding(params, mesh)

        def loss(params, x):
            y, _ = depth.scan_blocks(nnx.merge(graphdef, params), x, remat=remat)
            return (y.astype(jnp.float32) ** 2).sum()

        split = sharding.batch_sharding(mesh)
        x = jax.ShapeDtypeStruct((16, 256, 128), jnp.bfloat16, sharding=split)
        traced = jax.jit(jax.grad(loss)).trace(params, x)
        lowered = traced.lower(lowering_platforms=("tpu",))
    with topology.compiler_environment():
        compiled = lowered.compile()
    return hlo.parse(compiled.as_text()), compiled


def test_the_gradient_of_attention_fits_the_memory_of_a_v4():
    """At 18 frames of 224 px, whose blocks of a v5e's size would not."""
    mesh = sharding.make_mesh(
        tiny_config("stage1").mesh, topology.devices(topology.parse("v4:2x2x1"))
    )
    tokens, split = 18 * 196, sharding.batch_sharding(mesh)
    x = jax.ShapeDtypeStruct((4, tokens, 1024), jnp.bfloat16, sharding=split)
    mask = jax.ShapeDtypeStruct((4, tokens), bool, sharding=split)

    def loss(q, k, v, mask):
        sizes = {"samples": 4, "queries": tokens, "keys": tokens, "heads": 16, "width": 1024}
        assert attention_backends.choose("auto", q.dtype, **sizes) == "pallas"
        y = attention_backends.attend("pallas", q, k, v, heads=16, mask=mask)
        return y.astype(jnp.float32).sum()

    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, x, mask)
        lowered = traced.lower(lowering_platforms=("tpu",))
    with topology.compiler_environment():
        lowered.compile()  # or RESOURCE_EXHAUSTED


def test_what_a_stack_offloads_goes_to_the_host_and_comes_back(monkeypatch):
    monkeypatch.setattr(depth, "OFFLOADED_FROM", 4 * 256 * 128 * 2)
    module, compiled = compile_stack("offload")
    kept = 2 * 4 * (16 // 4) * 256 * 128 * 2  # inputs and results of attention, of a chip
    assert hlo.host_traffic(module, list(hlo.walk(module))) == {"out": kept, "in": kept}
    assert compiled.memory_analysis().host_temp_size_in_bytes >= kept


def test_small_inputs_stay_on_the_device(monkeypatch):
    monkeypatch.setattr(depth, "OFFLOADED_FROM", 4 * 256 * 128 * 2 + 1)
    module, compiled = compile_stack("offload")
    assert hlo.host_traffic(module, list(hlo.walk(module))) == {"out": 0, "in": 0}
    assert compiled.memory_analysis().host_temp_size_in_bytes == 0


def test_kernels_are_found_counted_and_bounded():
    """A product of 512 x 512 in 4 blocks of rows, in a loop of 3."""

    def kernel(x, w, out):
        out[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32).astype(out.dtype)

    rows = pallas.BlockSpec((128, 512), lambda i: (i, 0))
    whole = pallas.BlockSpec((512, 512), lambda i: (0, 0))
    product = pallas.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((512, 512), jnp.bfloat16),
        grid=(4,),
        in_specs=[rows, whole],
        out_specs=rows,
        name="product",
    )

    def step(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, y: product(y, w), x)

    array = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    where = topology.parse("v5e:1x1")
    with jax.default_matmul_precision("default"):
        jaxpr = jax.make_jaxpr(step)(array, array).jaxpr
    (call,) = kernels.measure(jaxpr, where)
    assert (call.name, call.grid, call.times) == ("product", (4,), 3)
    at_peak = 2 * 512**3 / 197e12 * where.chip.clock
    assert at_peak < call.cycles < 4 * at_peak
    assert kernels.measure(jax.make_jaxpr(jnp.dot)(array, array).jaxpr, where) == []


@pytest.mark.parametrize(("chip", "share"), [("v5p:1x1x1", 2), ("v5e:1x1", 1)])
def test_a_parallel_axis_is_shared_by_the_cores_of_a_chip(chip, share):
    def kernel(x, out):
        y = x[...]
        for _ in range(20):  # the memory must not be what is waited for
            y = jnp.tanh(y)
        out[...] = y

    def cycles(semantics: str) -> int:
        block = pallas.BlockSpec((256, 256), lambda i: (i, 0))
        array = jax.ShapeDtypeStruct((2048, 256), jnp.float32)
        params = tpu.CompilerParams(dimension_semantics=(semantics,))
        call = pallas.pallas_call(
            kernel, out_shape=array, grid=(8,), in_specs=[block], out_specs=block,
            compiler_params=params,
        )  # fmt: skip
        (call,) = kernels.measure(jax.make_jaxpr(call)(array).jaxpr, topology.parse(chip))
        return call.cycles

    assert cycles("arbitrary") == pytest.approx(share * cycles("parallel"), rel=0.1)


def test_a_kernel_that_only_copies_takes_as_long_as_the_memory():
    def kernel(x, out):
        out[...] = x[...]

    rows = pallas.BlockSpec((256, 1024), lambda i: (i, 0))
    array = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    copy = pallas.pallas_call(kernel, out_shape=array, grid=(16,), in_specs=[rows], out_specs=rows)
    (call,) = kernels.measure(jax.make_jaxpr(copy)(array).jaxpr, topology.parse("v5e:1x1"))
    assert call.cycles == int(2 * 4096 * 1024 * 4 / 819e9 * 1.5e9)


@pytest.fixture(scope="module")
def step() -> lowering.LoweredStep:
    return lowering.lower(tiny_config("stage1"), topology.parse("v5e:2x2"), Kind.VIDEO)


def test_bytes_of_arguments_by_class(step):
    config = tiny_config("stage1")
    mesh = step.mesh
    batch = abstract_batch(config, mesh, Kind.VIDEO)
    assert batch["frames"].shape == (4, 2, config.data.frames, 24, 32, 3)
    whole = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(batch))
    assert step.argument_bytes["batch"] == whole // 4
    # Adam's two moments are placed like the parameters; two counters beside them at most.
    moments = 2 * step.argument_bytes["parameters"]
    assert 0 <= step.argument_bytes["optimizer"] - moments <= 16
    assert step.samples == 8


def test_flops_with_and_without_rematerialisation(step):
    assert step.executed_flops == step.model_flops
    config = tiny_config("stage1", **{"compute.remat": "none"})
    again = lowering.lower(config, topology.parse("v5e:2x2"), Kind.VIDEO)
    assert again.executed_flops > 1.05 * again.model_flops
    assert again.model_flops == step.model_flops


def test_kinds_are_those_of_the_corpora_or_of_the_stage():
    config = tiny_config("stage2")
    assert lowering.kinds(config) == (Kind.VIDEO, Kind.IMAGE)
    config.data.images = "DIR:train"
    assert lowering.kinds(config) == (Kind.IMAGE,)
    assert lowering.kinds(tiny_config("stage1")) == (Kind.VIDEO,)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(
        "from tiny import tiny_config\n\ndef get_config():\n    return tiny_config('stage1')\n"
    )
    return path


def run(config_file, *flags: str) -> int:
    return main.main(["compile", f"--config={config_file}", "--topology=v5litepod-4", *flags])


def test_a_stage_is_compiled_once(config_file, tmp_path, capsys, monkeypatch):
    flags = (f"--json={tmp_path}/out.json", f"--cache={tmp_path}/cache")
    waiting = Mock(side_effect=lambda _: contextlib.nullcontext())
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "waiting", lambda _, what: waiting(what))
        assert run(config_file, *flags) == 0
    assert waiting.mock_calls == [call("tracing the video step"), call("compiling the video step")]
    table = capsys.readouterr().out
    assert "v5e:2x2: 4 chips" in table and "estimate" in table
    first = json.loads((tmp_path / "out.json").read_text())
    (one,) = first["steps"]
    hbm = one["hbm"]
    parts = sum(hbm[name] for name in ("parameters", "optimizer", "teacher", "batch"))
    # The program leaves out what it does not read, and pads small arrays to its tiles.
    assert 0.5 * parts < hbm["arguments"] < 10 * parts
    assert hbm["peak"] == (
        hbm["arguments"] + hbm["outputs"] - hbm["aliased"] + hbm["temporary"] + hbm["code"]
    )
    assert one["fits"] and 0 < one["spare"] < 1 and hbm["temporary"] > 0
    assert one["cycles"] > 0 and one["ici_bytes"] > 0 and one["dcn_bytes"] == 0
    assert 0 < one["utilisation_exposed"] < one["utilisation_hidden"] < 1

    def compile_again(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiling, "_measure", compile_again)
    assert run(config_file, *flags) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == first
    assert capsys.readouterr().out == table
    with pytest.raises(AssertionError, match="compiled again"):
        run(config_file, *flags, "--config.vision.drop_path=0.25")


def test_out_of_memory_says_how_much_and_what_to_change(config_file, tmp_path, capsys):
    flags = (f"--json={tmp_path}/out.json", "--cache=", "--config.data.batch_size=8000000")
    assert run(config_file, *flags) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    found = re.search(r"needs ([\d.]+) GiB a chip, ([\d.]+) more than there are \(15.75\)", message)
    assert float(found[1]) - float(found[2]) == pytest.approx(15.75, abs=0.02)
    smaller = int(re.search(r"data.batch_size=(\d+)", message)[1])
    assert 0 < smaller < 8_000_000 and smaller % 4 == 0
    (one,) = json.loads((tmp_path / "out.json").read_text())["steps"]
    assert not one["fits"] and one["hbm"]["peak"] > one["limit"] and one["largest"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--topology=v5e-7",), "v5litepod-1"),
        (("--kinds=film",), "choose from image, video"),
        (("--json=/no/such/dir/x.json",), "/no/such/dir"),
        (("--cache=/dev/null/x",), "--cache=/dev/null/x: Not a directory"),
        (("--config.data.batch_size=7",), "choose a multiple of 4"),
        (("--config.mesh.fsdp=3",), "config.mesh"),
    ],
)
def test_faults_are_one_line(config_file, capsys, flags, said):
    assert run(config_file, *flags) == 2
    out, err = capsys.readouterr()
    assert said in err and len(err.splitlines()) == 1 and not out
