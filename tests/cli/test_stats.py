"""--stats and /stats: memory, and reads from the disk."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from tiny_chat import make_chat_model

from mlxarch.planner.plan import Request
from mlxarch.quantization.scheme import Quantization
from mlxarch.store.lookup import plan_folder
from tiny_moe import make_moe

MEMORY = r"peak memory \S+ .?B of \S+ .?B planned · in MLX's arrays \S+ .?B of \S+ .?B planned"
EXPERTS = (
    r"experts from the disk: \S+ .?B a token · (\d+)% were in memory, (\d+)% for the last 64 tokens · "
    r"\S+ s reading, \S+ s computing experts, \S+ s waiting for routers"
)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A mixture of experts of which most is experts, and memory in which a half of them has no place."""
    folder = tmp_path_factory.mktemp("models") / "sparse"
    chat = make_chat_model(folder.with_name("chat"))
    make_moe(
        folder,
        packed=Quantization(4, 32),
        vocab_size=112,
        moe_intermediate_size=512,
        num_experts=64,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(chat / name, folder / name)
    plan = plan_folder(folder, Request(context=64))
    shorter = plan_folder(
        folder,
        Request(context=64, expert_cache_bytes=0, memory=plan.total - plan.weights["experts"] // 2),
    )
    assert plan.verdict == "resident" and shorter.verdict == "streamed"
    return str(folder), str(plan.total - plan.weights["experts"] // 2)


def test_run_tells_of_memory_and_of_experts_that_were_read(invoke, sparse):
    folder, memory = sparse
    command = ("run", folder, "Hi", "-n", "30", "--temp", "0", "-c", "64", "--stats", "--json")
    resident, streamed = invoke(*command), invoke(*command, "--memory", memory)
    assert resident.exit_code == streamed.exit_code == 0, streamed.stderr
    assert re.search(MEMORY, resident.stderr) and "from the disk" not in resident.stderr
    assert re.search(MEMORY, streamed.stderr) and re.search(EXPERTS, streamed.stderr)
    answers = [json.loads(result.stdout) for result in (resident, streamed)]
    assert answers[0]["text"] == answers[1]["text"]
    assert answers[0]["memory"]["planned_mlx_bytes"] > answers[1]["memory"]["planned_mlx_bytes"]
    told = answers[1]["streaming"]
    assert "streaming" not in answers[0] and told["bytes_read"] > 29 * told["bytes_per_token"] > 0
    assert 0 < told["hit_rate"] < 1 and 0 < told["recent_hit_rate"] < 1
    assert min(told[f"{what}_seconds"] for what in ("read", "router", "expert")) > 0


def test_a_chat_tells_it_when_asked(invoke, sparse, tiny):
    folder, memory = sparse
    talk = "Hi\n/stats\n"
    resident = invoke("chat", tiny, "-n", "5", input=talk).stderr
    assert re.search(MEMORY, resident) and "from the disk" not in resident
    streamed = invoke("chat", folder, "-n", "5", "-c", "64", "--memory", memory, input=talk).stderr
    assert re.search(MEMORY, streamed) and re.search(EXPERTS, streamed)
    assert "peak memory" not in invoke("chat", tiny, "-n", "5", "--stats", input="Hi\n").stderr, (
        "not in each line"
    )


def test_the_peak_is_the_process_own_and_not_its_parents():
    """Linux hands the most that a parent had in memory down to whom it starts, as getrusage counts."""
    child = (
        "import resource; from mlxarch.cli.stats import process_peak_bytes; "
        "print(process_peak_bytes() >> 20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)"
    )
    parent = f"import subprocess, sys; held = b'x' * (500 << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True
    )
    own, counted = map(int, done.stdout.split())
    assert 5 < own < 250 and (counted > 500 or sys.platform != "linux")
