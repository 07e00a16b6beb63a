"""The benchmark of serving: our server on a tiny model beside stand-ins for the peers; its judgements."""

from __future__ import annotations

import collections
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from propeller.errors import BadRequest
from propeller.service.wire import decode_request

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]

# Stands in for the interpreters of both peers. As infinity it is healthy, and its clients say that all took
# 1000 s; as sentence-transformers it takes 500 s for whatever it is asked, and its vectors are all the same.
PEER = f"""#!{sys.executable}
import http.server, json, os, sys
import numpy as np
flag = lambda name: sys.argv[sys.argv.index(name) + 1]
if "infinity_emb.cli" in sys.argv:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
    http.server.HTTPServer((flag("--host"), int(flag("--port"))), Handler).serve_forever()
elif sys.argv[1].endswith("serve_load_http.py"):
    texts = json.load(open(flag("--job")))["texts"]
    np.save(os.path.splitext(flag("--out"))[0] + ".npy", np.ones((len(texts), 32), np.float32))
    json.dump(dict(seconds=1e3, latencies=[1.0], client_cpu_seconds=1.0), open(flag("--out"), "w"))
else:
    print(json.dumps(dict(ready=dict(peer="1"))), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        texts = json.load(open(message["work"]))["texts"]
        np.save(message["out"], np.ones((len(texts), 32), np.float32))
        print(json.dumps(dict(seconds=[500.0])), flush=True)
"""

Bench = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT that knows all letters, as sentence-transformers keeps one."""
    folder = tmp_path_factory.mktemp("bench") / "model"
    shutil.copytree(Path(__file__).parents[1] / "data/bert_tiny", folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


@pytest.fixture
def bench(root: Path, model: Path) -> Bench:
    """Runs the benchmark; exports are kept beside the model."""

    def run(*flags: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, root / "script/bench/serve.py", "--model", model, "--quick", *flags]
        environment = {**os.environ, "XDG_CACHE_HOME": str(model.parent)}
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=120, env=environment
        )

    return run


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script; they are no packages and import each other from their own folder."""
    monkeypatch.syspath_prepend(str(root / "script/bench"))
    return importlib.import_module


def rows_of(output: str, heading: str) -> dict[str, list[str]]:
    """The cells of the first table that begins with this cell, by each row's first."""
    table = output[output.index(f"| {heading}|") :].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]
    return {name: cells for name, *cells in rows}


def test_beside_stand_ins(bench, tmp_path):
    python = tmp_path / "python"
    python.write_text(PEER)
    python.chmod(0o755)
    done = bench(
        "--parts", "equal", "throughput", "latency", "--only", "fp32", "--clients", "2", "--rows", "4",
        "--infinity-python", python, "--sentence-transformers-python", python,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "equal: NOT as asked for" in done.stdout, "the stand-in's vectors are all the same"
    assert "2 clients, 4 texts a request, 4 in flight each" in done.stdout
    speeds = rows_of(done.stdout, "clients x texts a request ")
    bare = [name for name in speeds if "bare predictor fp32" in name]
    ours = ["propeller fp32", "propeller fp32, client tokenises"]
    assert sorted(speeds) == sorted([*bare, *ours, "infinity fp32", "sentence-transformers fp32"])
    assert all(float(speeds[name][0].split()[0]) > 0 for name in (*bare, *ours))
    ratios = rows_of(done.stdout, "")
    asked, ratio, verdict = ratios["propeller fp32 / infinity fp32"]
    assert (asked, verdict) == ("2.5", "yes") and float(ratio) > 100
    assert float(ratios["propeller fp32 / sentence-transformers fp32"][1]) == pytest.approx(
        float(ratio) / 2, rel=0.01
    )
    (against_bare,) = (name for name in ratios if "bare" in name)
    assert "(best: " in against_bare
    assert "at most +1.5" in done.stdout.partition("one text of")[2]


def test_chaos(bench):
    done = bench("--parts", "chaos", "--requests", "60", "--kill-every", "25", "--threads", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "workers killed: 2; server restarted 1 time(s)" in done.stdout
    assert "chaos: as asked for" in done.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--rounds", "0"), "--rounds 0: expected at least 1"),
        (("--clients", "4", "0"), "--clients 0: expected at least 1"),
        (("--bad-share", "0.9"), "--bad-share 0.9: expected 0 to 0.5"),
        (("--data", "nowhere"), "--data nowhere: expected the GLUE folder"),
        (("--model", "nowhere"), "--model nowhere: expected a folder with vocab.txt"),
        (("--parts", "equal", "--only", "nobody"), "--only 'nobody': no contender is called so"),
    ],
)
def test_bad_flags(bench, flags, message):
    done = bench(*flags)
    assert done.returncode != 0
    assert message in done.stderr


def test_texts(script, tmp_path):
    texts = script("serve_texts")
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE/train.tsv").write_text(
        'index\tsentence1\tsentence2\tlabel\n0\ta "quoted\tb\t0\n1\tb\t \t1\n'
    )
    assert sorted(texts.read_texts(tmp_path)) == ['a "quoted', "b"], "each once, quotes are text"
    made_up = texts.read_texts(None)
    assert made_up == texts.read_texts(None)
    assert len({len(text.split()) for text in made_up}) > 50
    assert texts.piece("abcde", 3, 3) == ["e", "a", "b"]
    with pytest.raises(FileNotFoundError, match="has none of SST-2"):
        texts.read_texts(tmp_path / "RTE")


@pytest.mark.parametrize(
    "clients, rows, in_flight, uncounted", [(1, 1, 32, 32), (4, 1, 8, 32), (1, 8, 4, 4), (32, 64, 1, 32)]
)
def test_few_clients_keep_several_requests_in_flight(script, clients, rows, in_flight, uncounted):
    load = script("serve_speed").make_load(["a"] * 65, clients, rows, 32, 10)
    assert (load.in_flight, load.uncounted) == (in_flight, uncounted)
    assert sum(map(len, load.requests)) == 65


def test_batches_are_dealt_evenly(script):
    batches = [{"input_ids": np.zeros((rows, 16))} for rows in (1, 9, 3, 5, 2)]
    hands = script("serve_batches").deal(batches, 2)
    assert sorted(sum(len(batch["input_ids"]) for batch in hand) for hand in hands) == [10, 10]


def test_vectors_of_other_shapes_are_an_error(script):
    similarity = script("serve_speed").similarity
    cosines = similarity(np.array([[1.0, 0.0], [2.0, 2.0]]), np.array([[3.0, 0.0], [0.0, 1.0]]))
    assert cosines == pytest.approx([1, 0.5**0.5])
    with pytest.raises(RuntimeError, match=r"\(2, 2\) beside \(1, 2\)"):
        similarity(np.ones((2, 2)), np.ones((1, 2)))


@pytest.mark.parametrize(
    "rss, num_fds, p99, flat",
    [
        (lambda minute: 1000, lambda minute: 70, lambda minute: 1.0, True),
        (lambda minute: min(1000, 600 + 100 * minute), lambda minute: 70, lambda minute: 1.0, True),
        (lambda minute: 1000 + minute, lambda minute: 70, lambda minute: 1.0, True),
        (lambda minute: 1000 + 3 * minute, lambda minute: 70, lambda minute: 1.0, False),
        (lambda minute: 1000, lambda minute: 70 + minute, lambda minute: 1.0, False),
        (lambda minute: 1000, lambda minute: 70, lambda minute: 1.0 + minute / 20, False),
    ],
)
def test_a_soak_is_judged_after_its_first_quarter(script, rss, num_fds, p99, flat):
    long, processes = script("serve_long"), script("serve_processes")
    minutes = [
        long.Minute(10, np.array([p99(n)]), processes.Usage(rss(n) << 20, num_fds(n), 0.0, 4))
        for n in range(20)
    ]
    assert long.judge(minutes) is flat


def test_chaos_is_judged(script, capsys):
    chaos, raw = script("serve_chaos"), script("serve_raw")
    tally = raw.Tally()
    tally.add("ErnieClient", "right", 1.0, limit=45.0)
    tally.add("raw", "WorkerDied", 2.0, limit=45.0)
    tally.replies = collections.Counter({"a": 1, "b": 1})
    tally.unanswered = [105.0]
    assert chaos.report(tally, hanging=0, down=(100.0, 110.0))
    assert not chaos.report(tally, hanging=1, down=(100.0, 110.0))
    assert not chaos.report(tally, hanging=0, down=(0.0, 0.0)), "there was a server"
    tally.unanswered, tally.replies["b"] = [], 2
    assert not chaos.report(tally, hanging=0, down=(0.0, 0.0))
    assert "requests answered twice: 1" in capsys.readouterr().out
    tally.replies["b"] = 1
    tally.add("ErnieClient", "WRONG", 50.0, limit=45.0)
    assert not chaos.report(tally, hanging=0, down=(0.0, 0.0))
    assert "wrong answers: 1" in (said := capsys.readouterr().out)
    assert "longer than 45 s: 1" in said


def test_bad_requests_are_bad_each_in_its_way(script):
    specs = [{"name": name, "dtype": "int64"} for name in ("input_ids", "token_type_ids")]
    bad = script("serve_raw").BadRequests(specs)
    refused, for_the_model = [], 0
    for way in range(len(bad)):
        frames, addressed = bad.make(way, f"id{way}")
        try:
            decode_request(frames)
            for_the_model += 1
        except BadRequest as error:
            refused.append(str(error))
            assert (error.request_id is not None) == addressed
    assert len(set(refused)) == len(refused) >= 7
    assert for_the_model + len(refused) == len(bad)


def test_processes_are_counted_with_all_below_them(script):
    processes = script("serve_processes")
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(flush=True); input()'])"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        ((_, depth),) = processes.descendants(child.pid).items()
        used = processes.usage(child.pid)
        child.communicate(b"\n")
    assert depth == 1
    assert used.num_processes == 2 and used.num_fds >= 6 and used.rss_bytes > 1 << 20


def test_a_process_that_fails_says_why(script):
    processes = script("serve_processes")
    failing = processes.Process(
        "the peer", [sys.executable, "-c", "print('no such luck'); raise SystemExit(3)"]
    )
    with pytest.raises(RuntimeError, match=r"(?s)the peer did not get ready \(exit status 3\).*no such luck"):
        failing.wait_ready()
    silent = processes.Process("the peer", [sys.executable, "-c", "raise SystemExit('out of words')"], True)
    with pytest.raises(RuntimeError, match=r"(?s)the peer gave no answer.*out of words"):
        silent.ask(None)
