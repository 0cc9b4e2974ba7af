"""Load the app on 127.0.0.1: does its memory stay flat, and does an attacker keep others waiting?

    python benchmarks/app_load.py                     # 200 new sessions, then 20 visitors without and with an attacker
    python benchmarks/app_load.py --num_sessions 40 --num_visitors 6

* Memory: each session asks once what is like a point. Printed is the resident memory of the server; it should not
  grow by more than 50 MB after the first quarter of them.
* Waiting: all visitors upload a photo of their own at once and wait for its islands; then again, beside an attacker in
  four sessions, who names pipes and uploads pictures that would decode to 170 megapixels as fast as they are refused.
  Nobody should wait more than twice as long as the one who waited longest before.

The server is a process of its own, with the embedded model, and is ended in the end.
"""

import argparse
import io
import json
import os
import socket
import struct
import sys
import tempfile
import threading
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from apm_hf.data.scenes import make_scene

_GROWTH = 50  # MB, in which Gradio's first hundred sessions are filled
_ATTACKERS = 4  # sessions of the attacker, each of which has one request in the queue at any time


class Session:
    """A session of the page, without a browser."""

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=600, trust_env=False)
        self.session = uuid.uuid4().hex
        self.config = self.http.get("/config").json()
        self.ids = {part["props"].get("elem_id"): part["id"] for part in self.config["components"]}
        parts = {part["id"]: part for part in self.config["components"]}
        self.scene = parts[self.ids["islands-photo"]]["props"]["value"]

    def upload(self, name: str, data: bytes) -> dict[str, Any]:
        """Upload a file; returns what a browser then sends as the photo."""
        path = self.http.post("/gradio_api/upload", files={"files": (name, data)}).json()[0]
        return {"path": path, "meta": {"_type": "gradio.FileData"}}

    def use(self, element: str, *values: Any, how: str = "click") -> list[Any]:
        """Click a button, or change a number, wait, and return what the event outputs.

        Raises:
            RuntimeError: where the app refuses the event, as when its queue is full.
        """
        event = next(e for e in self.config["dependencies"] if [self.ids[element], how] in e["targets"])
        # Versions before a public API had one input more, of the session.
        values = (None,) * (len(event["inputs"]) - len(values)) + values
        body = {"fn_index": event["id"], "data": values, "session_hash": self.session}
        if self.http.post("/gradio_api/queue/join", json=body).status_code != 200:
            raise RuntimeError("the queue is full")
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return message["output"].get("data") or []
        raise RuntimeError("the stream ended before the event")


def memory_of_sessions(server: psutil.Process, address: str, num_sessions: int) -> list[tuple[int, float]]:
    """Return the server's resident memory, in MB, after every tenth of the sessions."""
    measured = []
    for number in range(1, num_sessions + 1):
        visitor = Session(address)
        visitor.use("point-show", visitor.scene, 0.1, 0.2)
        visitor.http.close()
        if number % max(1, num_sessions // 8) == 0:
            measured.append((number, server.memory_info().rss / 1e6))
    return measured


def waiting_times(address: str, num_visitors: int, seed: int) -> list[float]:
    """Return how many seconds each of the visitors waits who come at once, each with a photo of their own."""

    def wait(number: int) -> float:
        file = io.BytesIO()
        make_scene(number, seed=seed, image_size=96).image.save(file, format="PNG")
        visitor = Session(address)
        photo = visitor.upload("photo.png", file.getvalue())
        start.wait()
        begin = time.monotonic()
        shown = visitor.use("num-Wholes", photo, 2, 6, 20, how="change")
        assert any("<img" in str(html) for html in shown), "a visitor got no islands"
        return time.monotonic() - begin

    start = threading.Barrier(num_visitors)
    with ThreadPoolExecutor(num_visitors) as visitors:
        return sorted(visitors.map(wait, range(num_visitors)))


def attack(address: str, pipes: list[Path], stop: threading.Event) -> int:
    """Name pipes and upload bombs until told to stop; returns how many requests were refused."""
    attacker, num_refused = Session(address), 0
    bomb = attacker.upload("bomb.ico", icon_bomb())
    while not stop.is_set():
        for photo in [*({"path": str(pipe)} for pipe in pipes), bomb]:
            try:
                attacker.use("num-Wholes", photo, 2, 6, 20, how="change")
            except RuntimeError:
                time.sleep(0.1)
            num_refused += 1
    return num_refused


def icon_bomb() -> bytes:
    """Make an ICO file that says it is 256 pixels wide and holds a PNG of 170 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = 13_000, 13_100
    packer, row = zlib.compressobj(9), bytes(1 + width)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png


def run(num_sessions: int, num_visitors: int) -> bool:
    """Print the figures; returns whether both goals are met."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        folder = Path(name)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        pipes = [folder / "pipe", folder / "uploads" / "pipe"]
        pipes[1].parent.mkdir()
        for pipe in pipes:
            os.mkfifo(pipe)
        settings = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", f"from apm_hf.app import launch; launch(port={port})"]
        with (folder / "log").open("w") as log:
            server = psutil.Popen(command, env=settings, stdout=log, stderr=log)
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                if server.poll() is not None:
                    raise RuntimeError((folder / "log").read_text())
                time.sleep(0.2)
            return report(server, f"http://127.0.0.1:{port}", pipes, num_sessions, num_visitors)
        finally:
            server.terminate()
            server.wait()


def report(server: psutil.Process, address: str, pipes: list[Path], num_sessions: int, num_visitors: int) -> bool:
    """Measure, print, and return whether both goals are met."""
    measured = memory_of_sessions(server, address, num_sessions)
    for number, megabytes in measured:
        print(f"{number:4d} sessions: {megabytes:7.1f} MB", flush=True)
    after = next(megabytes for number, megabytes in measured if number >= num_sessions / 4)
    growth = measured[-1][1] - after
    flat = growth < _GROWTH
    print(f"after the first quarter: {growth:+.1f} MB; flat: {flat}", flush=True)

    alone = waiting_times(address, num_visitors, seed=1)
    stop = threading.Event()
    with ThreadPoolExecutor(_ATTACKERS) as attackers:
        refused = [attackers.submit(attack, address, pipes, stop) for _ in range(_ATTACKERS)]
        try:
            beside = waiting_times(address, num_visitors, seed=2)
        finally:
            stop.set()
    for name, times in (("alone", alone), ("beside an attacker", beside)):
        print(f"{num_visitors} visitors {name}: {times[len(times) // 2]:.1f} s median, {times[-1]:.1f} s longest")
    fair = beside[-1] <= 2 * alone[-1]
    print(f"{sum(one.result() for one in refused)} requests of the attacker refused")
    print(f"the longest wait is {beside[-1] / alone[-1]:.2f} times as long; fair: {fair}")
    return flat and fair


def main() -> None:
    """Parse the command line, measure, and fail where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_sessions", type=int, default=200, help="new sessions, one after the other")
    parser.add_argument(
        "--num_visitors", type=int, default=20, help="visitors at once, at most 30: the queue takes 32"
    )
    options = parser.parse_args()
    sys.exit(not run(options.num_sessions, options.num_visitors))


if __name__ == "__main__":
    main()
