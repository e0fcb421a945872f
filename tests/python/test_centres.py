"""Query centres: a model's rotation as the library reads it, what is measured, who refuses."""

from __future__ import annotations

import ctypes
import dataclasses

import gguf
import gguf_factory
import numpy as np
import pytest
from engine import Engine, random_centres
from llama_cpp import llama_cpp as lib
from numpy_model import NumpyModel

from py_reasonalloc import BudgetConfig, ConfigError, ProfileError, ReasonLlama
from py_reasonalloc.commands.run import run as run_cli
from py_reasonalloc.engine import bindings as c
from py_reasonalloc.engine.errors import ContextError
from py_reasonalloc.engine.ggml import load_ggml
from py_reasonalloc.eval.cases.methods import Arm, Common, profile_digest, profile_of, setup_of
from py_reasonalloc.profile.files import load_profile
from py_reasonalloc.run.calibrate import Settings, calibrate
from py_reasonalloc.run.centres import rotated_pairs, unrotated
from py_reasonalloc.session.generate import Generation, Sampling

NORM, NEOX = 0, 2
GREEDY = Settings(steps=40, sampling=Sampling(temp=0.0), kv_type="f32", n_threads=1)


pytestmark = pytest.mark.usefixtures("cache")


# --- the rotation, against ggml's own op ---------------------------------------------------------


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Graph:
    """A few nodes of ggml on the CPU."""

    def __init__(self) -> None:
        self.ggml = load_ggml()
        self.ctx = self.call("ggml_init", _InitParams(1 << 20, None, True))
        self.backend = self.call("ggml_backend_init_by_type", 0, None)
        self.inputs: list[tuple[int, np.ndarray]] = []

    def call(self, name: str, *args):
        """Call a function that takes pointers, int32 and floats, and returns a pointer."""
        function = getattr(self.ggml, name)
        function.restype = ctypes.c_void_p
        kinds = {int: ctypes.c_void_p, float: ctypes.c_float}
        return function(*(kinds[type(a)](a) if type(a) in kinds else a for a in args))

    def node(self, name: str, *args) -> int:
        """Add a node; whole numbers among the arguments are pointers, others come as ctypes."""
        return self.call(name, self.ctx, *args)

    def tensor(self, values: np.ndarray) -> int:
        """Add an input, its fastest dimension last."""
        kind = {"float32": 0, "int32": 26}[values.dtype.name]
        ne = [ctypes.c_int64(n) for n in (values.shape[::-1] + (1, 1))[:3]]
        tensor = self.node("ggml_new_tensor_3d", ctypes.c_int(kind), *ne)
        if values.ndim == 1:
            tensor = self.node("ggml_new_tensor_1d", ctypes.c_int(kind), ne[0])
        self.inputs.append((tensor, values))
        return tensor

    def compute(self, node: int) -> None:
        """Allocate, set and run."""
        gf = self.node("ggml_new_graph")
        self.call("ggml_build_forward_expand", gf, node)
        assert self.call("ggml_backend_alloc_ctx_tensors", self.ctx, self.backend)
        for tensor, values in self.inputs:
            data = np.ascontiguousarray(values)
            size = ctypes.c_size_t(data.nbytes)
            self.call("ggml_backend_tensor_set", tensor, data.ctypes.data, ctypes.c_size_t(0), size)
        self.call("ggml_backend_graph_compute", self.backend, gf)

    def close(self) -> None:
        self.call("ggml_backend_free", self.backend)
        self.call("ggml_free", self.ctx)


@pytest.fixture
def graph():
    made = Graph()
    yield made
    made.close()


HEAD_DIM, N_HEAD = 32, 3
POSITIONS = np.array([0, 1, 2, 7, 100, 1000, 9000, 60000], np.int32)


def rope_node(graph: Graph, q: np.ndarray, **kind) -> int:
    """Q rotated as llama.cpp's models do it."""
    kind = {
        "n_rot": HEAD_DIM, "mode": NORM, "n_ctx": 4096, "base": 10000.0, "scale": 1.0, "ext": 0.0,
        "factors": None, "offset": 0, **kind,
    }  # fmt: skip
    factors = kind["factors"]
    node = graph.node(
        "ggml_rope_ext",
        graph.tensor(q),
        graph.tensor(POSITIONS),
        None if factors is None else graph.tensor(factors),
        *(ctypes.c_int(kind[name]) for name in ("n_rot", "mode", "n_ctx")),
        kind["base"], kind["scale"], kind["ext"], 1.0, 32.0, 1.0,
    )  # fmt: skip
    if kind["offset"]:
        node = graph.call("ggml_rope_set_offset", node, ctypes.c_int(kind["offset"]))
    return node


def attended(graph: Graph, rows: int) -> int:
    """The product with some keys, as llama.cpp's attention makes it."""
    axes = [ctypes.c_int(i) for i in (0, 2, 1, 3)]
    keys = graph.tensor(np.ones((N_HEAD, 5, HEAD_DIM), np.float32))
    return graph.node("ggml_mul_mat", keys, graph.node("ggml_permute", rows, *axes))


def read(kq: int, n_q: int) -> tuple[int, c.ra_rope, np.ndarray]:
    rope, freq = c.ra_rope(), (c.c_float * (HEAD_DIM // 2))()
    q = np.zeros((len(POSITIONS), N_HEAD, HEAD_DIM), np.float32)
    out = q.ctypes.data_as(ctypes.POINTER(c.c_float))
    status = c.ra_read_queries(kq, rope, freq, len(freq), out, n_q)
    rope.freq = freq
    return status, rope, q


def random_q() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((len(POSITIONS), N_HEAD, HEAD_DIM)).astype(np.float32)


FACTORS = np.linspace(1.0, 40.0, HEAD_DIM // 2).astype(np.float32)


@pytest.mark.parametrize("mode", [NORM, NEOX])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"base": 500000.0, "factors": FACTORS},
        {"scale": 0.25},
        {"scale": 0.25, "ext": 1.0},
        {"scale": 0.125, "ext": 0.5, "base": 1e6, "factors": FACTORS, "n_ctx": 256},
        {"n_rot": 12},
        {"n_rot": 12, "offset": 20},
        {"n_rot": 12, "offset": 8, "scale": 0.25, "ext": 1.0, "n_ctx": 512},
    ],
)
def test_what_ggml_rotates_we_rotate_back(graph: Graph, mode: int, kind: dict) -> None:
    q = random_q()
    kq = attended(graph, rope_node(graph, q, mode=mode, **kind))
    graph.compute(kq)
    status, rope, rotated = read(kq, q.size)
    assert status == c.RA_STATUS_OK, c.last_error()
    n_rot = kind.get("n_rot", HEAD_DIM)
    assert (rope.n_rot, rope.offset, rope.is_neox) == (n_rot, kind.get("offset", 0), mode == NEOX)
    pairs = rotated_pairs(rope)
    back = unrotated(rotated, POSITIONS, pairs, rope.freq[: n_rot // 2])
    # what YaRN scales is scaled in the queries as they are attended with, too
    is_yarn = kind.get("ext", 0.0) != 0.0
    factor = 1.0 + 0.1 * np.log(1.0 / kind["scale"]) if is_yarn else 1.0
    expected = q.astype(np.float64)
    expected[..., pairs] *= factor
    # a position of 60000 times a frequency of up to 1, in float32, is off by up to 0.004
    allowed = 1e-5 + 2e-7 * POSITIONS[:, None, None]
    assert (np.abs(back - expected) < allowed * np.abs(expected).max()).all()
    assert np.abs(rotated - expected).max() > 1.0


def test_what_happens_after_the_rotation(graph: Graph) -> None:
    """Rows that are scaled or copied are fine, rows that are mixed are not."""
    rope = rope_node(graph, random_q())
    scaled = graph.node("ggml_cont", graph.node("ggml_scale", rope, 0.5))
    fine = attended(graph, scaled)
    graph.compute(fine)
    status, found, q = read(fine, random_q().size)
    assert (status, found.n_rot) == (c.RA_STATUS_OK, HEAD_DIM)
    back = unrotated(q, POSITIONS, rotated_pairs(found), found.freq[: HEAD_DIM // 2])
    assert np.abs(back - 0.5 * random_q())[:4].max() < 1e-5
    normed = graph.node("ggml_rms_norm", rope, 1e-5)
    status = read(attended(graph, normed), random_q().size)[0]
    assert c.ra_status_name(status) == b"RA_STATUS_UNSUPPORTED"
    assert read(fine, 7)[0] != c.RA_STATUS_OK and "values" in c.last_error()
    assert read(rope, 7)[0] != c.RA_STATUS_OK and "no product" in c.last_error()


# --- calibration ---------------------------------------------------------------------------------


def numpy_centres(path, tokens: list[int]) -> np.ndarray:
    """Centres from the forward pass of NumPy, whose rotation is undone by its inverse."""
    model = NumpyModel(path)
    half = model.head_dim // 2
    angle = np.arange(len(tokens))[:, None] * model.rope_base ** (-np.arange(half) / half)
    rows = []
    for layer in model.forward(tokens)[1]:
        is_norm = model.arch == "llama"
        even, odd = (slice(0, None, 2), slice(1, None, 2)) if is_norm else (
            slice(0, half), slice(half, None)
        )  # fmt: skip
        z = (layer.q[..., even] + 1j * layer.q[..., odd]) * np.exp(-1j * angle)
        q = np.empty_like(layer.q)
        q[..., even], q[..., odd] = z.real, z.imag
        rows.append(np.concatenate([q.mean(axis=1), np.abs(z).mean(axis=1)], axis=1))
    return np.stack(rows)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_centres_are_numpys(make_gguf, arch: str) -> None:
    path = make_gguf(arch=arch, n_layer=3)
    prompts = ["how many primes?", "why?"]
    found = np.frombuffer(calibrate(path, prompts, GREEDY).centres, "<f4")
    sums, n = 0.0, 0
    with ReasonLlama(path, None, n_ctx=256, type_k="f32", type_v="f32", n_threads=1) as llama:
        for prompt in prompts:
            generation = Generation(llama, llama.tokenize(prompt.encode()), 40, Sampling(temp=0.0))
            assert len(list(generation)) > 0
            tokens = generation.prompt + generation.tokens[:-1]  # the last one is never decoded
            sums, n = sums + len(tokens) * numpy_centres(path, tokens), n + len(tokens)
            llama.clear()
    expected = sums / n
    assert np.abs(found.reshape(expected.shape) - expected).max() < 2e-3 * np.abs(expected).max()


def test_a_layer_without_attention_has_no_centres(make_gguf) -> None:
    path = make_gguf(arch="deci", n_layer=3, n_head_kv=(4, 0, 1))
    centres = np.frombuffer(calibrate(path, ["hello"], GREEDY).centres, "<f4")
    assert centres.size == 2 * 4 * 48
    config = {"policy": "triattention", "buffer": 16, "n_centres": centres.size}
    table = (c.c_float * centres.size)(*centres)
    with Engine(path, 40, config={**config, "centres": table}) as engine:
        engine.decode_each(list(range(100, 220)))
        assert engine.stats().n_compressions > 3


# --- configuration and refusals ------------------------------------------------------------------


@pytest.fixture
def measured(make_gguf, tmp_path):
    """A model and its profile."""
    path = make_gguf()
    calibrate(path, ["hello"], GREEDY).save(tmp_path / "p.json")
    return path, load_profile(tmp_path / "p.json")


def test_a_profile_keeps_its_centres(measured, tmp_path) -> None:
    path, profile = measured
    assert len(profile.centres) == 4 * 2 * 4 * 48  # float32, layers, heads, 3 / 2 of a head's 32
    assert profile.to_json()["format_version"] == 2
    older = dataclasses.replace(profile, centres=b"")
    older.save(tmp_path / "older.json")
    assert load_profile(tmp_path / "older.json") == older
    for text, message in (("AAA", "no base64 of float32"), ("AADAfw==", "finite numbers")):
        changed = (tmp_path / "p.json").read_text()
        start = changed.index('"centres": "') + 12
        end = changed.index('"', start)
        (tmp_path / "bad.json").write_text(changed[:start] + text + changed[end:])
        with pytest.raises(ProfileError, match=message):
            load_profile(tmp_path / "bad.json")


def test_a_session_by_profile(measured) -> None:
    path, profile = measured
    with ReasonLlama(path, BudgetConfig(32, "triattention", buffer=16, profile=profile)) as llama:
        list(Generation(llama, [5, 6, 7], 100, Sampling(temp=0.0)))
        assert llama.kv_stats().n_compressions > 3
    arguments = {"policy": "triattention", "buffer": 16, "layers": "uniform"}
    with ReasonLlama(path, 32, profile=profile, **arguments) as llama:
        list(Generation(llama, [5, 6, 7], 100, Sampling(temp=0.0)))
        assert llama.kv_stats().n_compressions > 3


def test_who_is_refused(measured, make_gguf) -> None:
    path, profile = measured
    older = dataclasses.replace(profile, centres=b"", source="older.json")
    with pytest.raises(ProfileError, match="needs query centres, which the profile older.json"):
        BudgetConfig(policy="triattention", profile=older)
    needs = "'triattention' needs the query centres of this model: calibrate a profile"
    with pytest.raises(ContextError, match=needs):
        ReasonLlama(path, BudgetConfig(policy="triattention"))
    other = make_gguf(n_head=8, n_head_kv=2)
    with pytest.raises(ContextError, match=r"needs the query .* \(384 numbers given, .* has 768\)"):
        ReasonLlama(other, BudgetConfig(policy="triattention", profile=profile))
    config = c.ra_config_default_params()
    config.centres = (c.c_float * 2)(1.0, float("nan"))
    config.n_centres = 2
    assert c.ra_config_check(config) != c.RA_STATUS_OK and "centres[1]" in c.last_error()


def write_gpt2(path) -> None:
    """A random GPT-2: learned positions, no rotation."""
    spec, rng = gguf_factory.ModelSpec(n_ctx_train=256), np.random.default_rng(0)
    n, n_ff = spec.n_embd, spec.n_ff
    shapes = {"token_embd": (gguf_factory.N_VOCAB, n), "position_embd": (256, n)}
    block = {"attn_qkv": (3 * n, n), "attn_output": (n, n), "ffn_up": (n_ff, n)}
    block |= {"ffn_down": (n, n_ff), "attn_norm": (n,), "ffn_norm": (n,)}
    writer = gguf.GGUFWriter(str(path), "gpt2")
    gguf_factory._add_tokenizer(writer, spec)
    gguf_factory._add_parameters(writer, dataclasses.replace(spec, n_head_kv=spec.n_head))
    writer.add_layer_norm_eps(1e-5)
    shapes["output_norm"] = (n,)
    for il in range(spec.n_layer):
        shapes |= {f"blk.{il}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) / shape[-1] ** 0.5
        writer.add_tensor(f"{name}.weight", (values + (len(shape) == 1)).astype(np.float32))
        if not name.endswith("_embd"):
            writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_without_rotation(tmp_path) -> None:
    """It is refused by name, and its profile has no centres; other policies serve it."""
    path = tmp_path / "gpt2.gguf"
    write_gpt2(path)
    with Engine(path, 40, config={"buffer": 16}) as engine:
        engine.decode_each(list(range(100, 220)))
        assert engine.stats().n_compressions > 3
    with pytest.raises(RuntimeError, match="'triattention' needs rotary .* 'gpt2' does not have"):
        Engine(path, 40, config={"policy": "triattention"})
    assert calibrate(path, ["hello"], GREEDY).centres == b""


def run_command(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        run_cli([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return caught.value.code, out, err


def test_the_command(measured, tmp_path, capsys) -> None:
    path, profile = measured
    common = (
        path,
        "-p",
        "hi",
        "-n",
        90,
        "--budget",
        32,
        "--buffer",
        16,
        "--policy",
        "triattention",
    )
    code, _, err = run_command(capsys, *common)
    assert code == 2 and "needs a profile with query centres, and none fits" in err
    code, out, _ = run_command(capsys, *common, "--profile", tmp_path / "p.json", "--json")
    assert code == 0 and '"layers": "wave"' in out
    uniform = ("--layers", "uniform", "--profile", tmp_path / "p.json", "--json")
    code, out, _ = run_command(capsys, *common, *uniform)
    assert code == 0 and '"layers": "uniform"' in out


def test_a_method_of_evaluations(measured) -> None:
    _, profile = measured
    common = Common(16, 4, 8, 0, "f16", profile)
    setup = setup_of(Arm("triattention", 64), common)
    assert setup.config is not None and setup.config.profile == profile
    assert setup.config.layers == "uniform"
    assert profile_of("triattention") == "" == profile_of("wave+policy=triattention")
    assert profile_of("rkv") is None
    digest = profile_digest(setup)
    moved = dataclasses.replace(profile, centres=bytes(len(profile.centres)))
    other = profile_digest(setup_of(Arm("triattention", 64), common._replace(profile=moved)))
    assert digest is not None and other is not None and digest != other
    with pytest.raises(ConfigError, match="triattention needs a profile, and none fits"):
        setup_of(Arm("triattention", 64), common._replace(profile=None))


def test_random_centres_fit(make_gguf) -> None:
    with Engine(make_gguf()) as engine:
        assert random_centres(engine.model).shape == (2, 4, 48)
        assert lib.llama_model_n_layer(engine.model) == 2
