"""What people expect of a llama.cpp runner: sampling, stops, grammars, the hub, split files."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import gguf
import pytest
from conftest import ROOT, TIMEOUT

from py_reasonalloc import ReasonLlama
from py_reasonalloc.engine.errors import ConfigError, ModelFileError
from py_reasonalloc.run.hub import check_hub, choose_file
from py_reasonalloc.session.marks import StopStrings

FAILURE, USAGE = 1, 2
SYSTEM_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
)


def found(done) -> dict:
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["--top-k", -1], r"--top-k = -1 is out of range"),
        (["--min-p", 1.5], r"--min-p = 1\.5 is out of range"),
        (["--stop", ""], r"--stop is empty"),
        (["--system", " "], r"--system is empty"),
        (["--system", "Be brief."], r"system is for a chat template, but the model has none"),
        (["--grammar", 'root ::= "a" b'], r"--grammar = 'root .*' cannot be .* identifier 'b'$"),
        (["--grammar", 'top ::= "a"'], r"--grammar = 'top .*' cannot be parsed.*root"),
        (["--grammar", "@no.gbnf"], r"no\.gbnf: cannot be read: No such file"),
        (["--grammar", ""], r"--grammar is empty"),
        (["--json-schema", "{"], r"--json-schema = '\{' is not JSON"),
        (["--json-schema", "[]"], r"--json-schema = '\[\]' is not a schema: it must be an object"),
        (["--json-schema", '{"type": 3}'], r"is not a schema: 3 is not valid"),
        (["--json-schema", '{"$ref": "#/no"}'], r"cannot be made a grammar: .+"),
        (["--json-schema", "{}", "--grammar", "x"], r"--grammar and --json-schema exclude"),
        (["--json-schema", "{}", "--think", 3], r"--json-schema and --think exclude each other"),
        (["--batch", 0], r"'--batch': 0 is not in the range"),
        (["--hf", "a/b"], r"MODEL and --hf exclude each other"),
        (["--budget-swa", -1], r"--budget-swa = -1 is out of range"),
        (["--budget-swa", 3], r"budget_swa 3 is too small"),
        (["--budget-swa", 64, "--no-budget"], r"--no-budget and --budget-swa exclude"),
        (["--budget-swa", 64, "--budget", "auto"], r"--budget auto and --budget-swa exclude"),
    ],
)  # fmt: skip
def test_refused(cli, make_gguf, arguments, pattern) -> None:
    done = cli(make_gguf(), "-p", "hi", *arguments)
    assert (done.returncode, done.stdout) == (USAGE, ""), done
    (line,) = done.stderr.splitlines()
    assert re.search(pattern, line), line


def test_a_bad_grammar_is_an_error_in_python_too(make_gguf) -> None:
    """The bindings crash on it."""
    import llama_cpp

    code = (
        "import llama_cpp, sys\nfrom py_reasonalloc import ReasonLlama\n"
        "llama = ReasonLlama(sys.argv[1])\n"
        "try: llama('x', grammar=llama_cpp.LlamaGrammar.from_string('root ::= x'))\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(make_gguf())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert done.stdout.startswith("grammar = 'root ::= x' cannot be parsed"), done
    good = llama_cpp.LlamaGrammar.from_string('root ::= "yes"')
    with ReasonLlama(make_gguf()) as llama:
        assert llama("x", grammar=good, max_tokens=9)["choices"][0]["text"] == "yes"


def test_a_system_message_that_a_template_leaves_out(cli) -> None:
    done = cli("demo", "-p", "hi", "--system", "Be brief.")
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "takes no system message" in done.stderr


def test_huggingface_hub_that_is_missing(make_gguf) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import importlib.util as u; former = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'huggingface_hub' else former(name)\n"
        "from py_reasonalloc.commands.run import run; run(['--hf', 'a/b', '-p', 'hi'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr.startswith("reasonalloc-run: --hf needs huggingface_hub: pip install")
    assert len(done.stderr.splitlines()) == 1


# --- taken ----------------------------------------------------------------------------------------


def test_sampling(cli, make_gguf) -> None:
    common = (make_gguf(), "-p", "hello", "-n", 30, "--json", "--seed", 5)
    plain = found(cli(*common, "--temp", 1.5))
    greedy = found(cli(*common, "--temp", 0))
    for options in (("--top-k", 1), ("--min-p", 1)):
        assert found(cli(*common, "--temp", 1.5, *options))["text"] == greedy["text"]
    assert plain["text"] != greedy["text"]
    assert (greedy["top_k"], greedy["min_p"]) == (0, 0.0)


def test_stop(cli, make_gguf) -> None:
    common = (make_gguf(), "-p", "hello", "-n", 60, "--json", "--temp", 0)
    text = found(cli(*common))["text"]
    stop = text[20:24]
    cut = found(cli(*common, "--stop", "not in it", "--stop", stop))
    assert cut["text"] == text[: text.index(stop)]
    assert cut["stop_reason"] == "stop_string"
    assert found(cli(*common, "--stop", "not in it"))["text"] == text
    done = cli(*common[:-3], "--temp", 0, "--stop", stop)
    assert "end: a text of --stop" in done.stderr


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_strings_over_pieces(size) -> None:
    text = "one two two tea for twenty"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for stops, wanted in {
        ("two t",): "one ",
        ("two te",): "one two ",
        ("twelve",): text,
        ("twenty-one", "nty?"): text,
        ("x", "for", "tea"): "one two two ",
        (): text,
    }.items():
        finder = StopStrings(stops)
        assert "".join(map(finder.feed, pieces)) + finder.rest() == wanted
        assert finder.is_met == (wanted != text)


def test_system(cli, make_gguf) -> None:
    common = (make_gguf(chat_template=SYSTEM_TEMPLATE), "-p", "hi", "-n", 1, "--json")
    plain, asked = found(cli(*common)), found(cli(*common, "--system", "Be brief."))
    # a byte is a token, and the tags of this vocabulary are one: <|system|> is none of them
    assert asked["n_prompt"] - plain["n_prompt"] == len("<|system|>") + len("Be brief.")


def test_grammars(cli, make_gguf, tmp_path) -> None:
    common = (make_gguf(), "-p", "hello", "--json", "-n", 200, "--temp", 1.5)
    word = found(cli(*common, "--grammar", 'root ::= ("yes" | "no") "."'))
    assert word["text"] in ("yes.", "no.") and word["stop_reason"] == "stop"
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    for text in (json.dumps(schema), f"@{file}"):
        done = found(cli(*common, "--json-schema", text))
        assert json.loads(done["text"])["n"] in (1, 22)


def test_ways_to_load_give_the_same_text(cli, make_gguf) -> None:
    common = (make_gguf(), "-p", "hello " * 20, "-n", 20, "--json", "--temp", 0)
    plain = found(cli(*common))["text"]
    for options in (["--no-mmap"], ["--mlock"], ["--batch", 16]):
        done = cli(*common, *options)
        assert json.loads(done.stdout)["text"] == plain, options
    dry = [found(cli(*common, "--dry-run", "--batch", n)) for n in (16, 128)]
    assert dry[0]["compute_bytes"] < dry[1]["compute_bytes"]


# --- split files ----------------------------------------------------------------------------------


def split(model: Path, folder: Path, n_tensors: int) -> list[Path]:
    """Write a model as several files of at most so many tensors, with the gguf package."""
    reader = gguf.GGUFReader(model)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(folder / f"{model.stem}.gguf", arch, split_max_tensors=n_tensors)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            of = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, of)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{model.stem}-0*.gguf"))


@pytest.fixture(scope="module")
def parts(demo_model, tmp_path_factory) -> list[Path]:
    return split(demo_model, tmp_path_factory.mktemp("split"), 30)


def test_a_split_model(cli, parts, demo_model) -> None:
    assert len(parts) == 3 and parts[0].name.endswith("-00001-of-00003.gguf")
    common = ("-p", "Given P is three; P plus five gives W. What is W?", "--temp", 0, "--json")
    whole = found(cli(demo_model, *common))
    done = found(cli(parts[0], *common))
    assert done["text"] == whole["text"]
    assert done["weights_bytes"] == whole["weights_bytes"]
    dry = found(cli(parts[0], *common, "--dry-run"))
    assert dry["weights_bytes"] == whole["weights_bytes"]


def test_not_the_first_part_or_not_all(cli, parts, tmp_path) -> None:
    done = cli(parts[1], "-p", "hi")
    assert (done.returncode, done.stdout) == (FAILURE, "")
    (line,) = done.stderr.splitlines()
    assert "must be loaded with the first split" in line
    alone = tmp_path / parts[0].name
    alone.write_bytes(parts[0].read_bytes())
    done = cli(alone, "-p", "hi")
    assert (done.returncode, done.stdout) == (FAILURE, "")
    assert len(done.stderr.splitlines()) == 1


# --- the hub --------------------------------------------------------------------------------------

NAMES = ["README.md", "m-Q8_0.gguf", "m-Q4_K_M.gguf", "big/m-f16-00001-of-00002.gguf",
         "big/m-f16-00002-of-00002.gguf"]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("", ["m-Q4_K_M.gguf"]),
        ("m-Q8_0.gguf", ["m-Q8_0.gguf"]),
        ("*q8_0*", ["m-Q8_0.gguf"]),
        ("*f16*", NAMES[3:]),
        ("big/m-f16-00001-of-00002.gguf", NAMES[3:]),
    ],
)
def test_which_file_of_a_repository(pattern, wanted) -> None:
    assert choose_file(NAMES, pattern) == wanted
    assert choose_file(["only.gguf"], "") == ["only.gguf"]


@pytest.mark.parametrize(
    ("names", "pattern", "reason"),
    [
        (NAMES, "*Q*", "means several files: m-Q4_K_M.gguf, m-Q8_0.gguf"),
        (NAMES, "*q2*", "FILE = '\\*q2\\*' means no GGUF file"),
        (NAMES[:1], "", "the repository has no GGUF file"),
        (NAMES[1:2] + NAMES[3:], "", "REPO:FILE must say which file: big/"),
        (NAMES[:4], "*f16*", "00002-of-00002.gguf is not in the repository"),
    ],
)
def test_no_file_of_a_repository(names, pattern, reason) -> None:
    with pytest.raises(ModelFileError, match=reason):
        choose_file(names, pattern)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as huggingface_hub asks for: a repository's files, and their bytes."""

    files: dict[str, bytes] = {}
    COMMIT = "0" * 40

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        resolved = re.fullmatch(r"/own/er/resolve/[^/]+/(.+)", path)
        if path.startswith("/api/models/own/er/tree/"):
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in self.files.items()
            ]
            self.answer(200, json.dumps(tree).encode(), "application/json")
        elif path.startswith("/api/models/own/er"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": "own/er", "sha": self.COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode(), "application/json")
        elif resolved and resolved[1] in self.files:
            self.answer(200, self.files[resolved[1]], "application/octet-stream")
        else:
            self.answer(404, b"{}", "application/json")

    def answer(self, code: int, data: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of this machine, and an empty cache."""
    pytest.importorskip("huggingface_hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def hub_models(*specs: str) -> list[str]:
    """Return the path or the error for each; huggingface_hub reads its settings when imported."""
    code = (
        "import sys\nfrom py_reasonalloc.run.hub import hub_model\n"
        "for spec in sys.argv[1:]:\n"
        "    try: print(hub_model(spec))\n"
        "    except ValueError as error: print(f'{type(error).__name__}: {error}')"
    )
    command = [sys.executable, "-c", code, *specs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.splitlines()


def test_a_model_from_the_hub(cli, hub, parts, demo_model, monkeypatch) -> None:
    hub.files = {f"f16/{part.name}": part.read_bytes() for part in parts}
    hub.files["demo-q8.gguf"] = demo_model.read_bytes()
    common = ("-p", "Given P is three; P plus five gives W. What is W?", "--temp", 0, "--json")
    taken = found(cli("--hf", "own/er:*-of-*", *common))
    assert taken["text"] == found(cli(demo_model, *common))["text"]
    assert taken["model"].endswith(parts[0].name)
    whole, none, missing = hub_models("own/er:demo-q8.gguf", "own/er", "no/one")
    assert Path(whole).read_bytes() == demo_model.read_bytes()
    assert none.startswith("ModelFileError: own/er: REPO:FILE must say which file: demo-q8")
    assert missing.startswith("ModelFileError: no/one: cannot be taken from the hub: ")
    # what is in the cache needs no hub
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again, other = hub_models("own/er:demo-q8.gguf", "own/er:other.gguf")
    assert again == whole and other.startswith("ModelFileError: own/er: cannot be taken")


def test_checks_of_the_hub_name(cli) -> None:
    for spec in ("noslash", "a/b/c", "a b/c", ":f.gguf"):
        with pytest.raises(ConfigError, match=r"is not REPO\[:FILE\]"):
            check_hub(spec)
    done = cli("--hf", "noslash", "-p", "hi")
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "is not REPO[:FILE]" in done.stderr and len(done.stderr.splitlines()) == 1


def test_sampling_in_python() -> None:
    with pytest.raises(ConfigError):
        from py_reasonalloc.session.steering import Sampling

        Sampling(top_k=-2)
