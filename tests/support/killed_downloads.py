"""Kill a download of 64 MB at 50 random moments; as a program: it says how much was fetched twice.

    python tests/support/killed_downloads.py [KILLS]

Each process is ended by SIGKILL, SIGTERM or SIGINT, in turn, and the next one goes on. What arrived must never shrink,
and the file must be right in the end.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fake_hub import FakeHub, Repo, environment

DATA = random.Random(0).randbytes(64 << 20)
DOWNLOAD = """
import time
from mlxarch.hub import hub_client
began = False
def progress(label, done, total):
    global began
    if label.startswith("downloading") and done > 1000 and not began:
        began = True
        print("begin", flush=True)  # bytes of the weights arrive
    time.sleep(0.002)
hub_client.download(hub_client.fetch_repository_info("org/model"), progress)
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(places: dict[str, str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD],
        env=os.environ | places,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout
    process.stdout.readline()
    return process


def received(home: Path) -> int:
    return max((path.stat().st_size for path in home.rglob("*.incomplete")), default=0)


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    server = FakeHub()
    server.repos["org/model"] = Repo(
        {"config.json": b'{"model_type": "llama"}', "model.safetensors": DATA}
    )
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        places = environment(home, server.url)
        before = 0
        for number in range(kills):
            process = start(places)
            time.sleep(random.uniform(0, 0.1))
            process.send_signal(SIGNALS[number % len(SIGNALS)])
            process.wait()
            now = received(home)
            assert now >= before, f"kill {number + 1}: {now} bytes of {before} are left"
            before = now
        final = start(places)
        assert final.wait() == 0
        [file] = home.rglob("snapshots/*/model.safetensors")
        assert file.read_bytes() == DATA
    asked = [span for method, path, span in server.requests if "safetensors" in path and span]
    assert asked or not kills, "each kill came before the first byte"
    print(f"{kills} kills, {len(asked)} requests for a rest, {before} bytes before the last; right")
    server.close()


if __name__ == "__main__":
    main()
