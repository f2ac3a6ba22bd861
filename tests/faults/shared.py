"""What several faults do to the processes, the files and the queue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

from tests.acceptance.system import Process
from tests.faults.stage import SECONDS, Stage, Try

QUEUE = "forwardfill"
SEVERAL = 3


@contextmanager
def another_worker(stage: Stage) -> Iterator[None]:
    """Another worker, for as long as a block runs."""
    other = Process(["worker"], stage.system.environment, stage.worker.log, stage.system.spawn)
    try:
        yield
    finally:
        other.kill()


def is_completed(run: Try) -> bool:
    try:
        return bool(run.document()["state"] == "completed")
    except (AssertionError, httpx.TransportError):  # the database is not back yet
        return False


def segments_of(stage: Stage, run: Try) -> int:
    return int(stage.api.http.get(f"/galleries/{run.world.gallery}").json()["segments"])


def damage(stage: Stage, name: str) -> str:
    """Turn one bit of a file's last byte but one."""
    with stage.files.path(name).open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-2, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    return name


def waiting_messages(stage: Stage) -> list[str]:
    """What waits in the queue."""
    if stage.redis is not None:
        return [message.decode() for message in stage.redis.client.lrange(QUEUE, 0, -1)]
    found = []
    for path in (stage.system.data / "broker" / "messages").glob("*.msg"):
        with suppress(FileNotFoundError):  # taken meanwhile
            found.append(path.read_text())
    return found


def sent_again(stage: Stage, messages: list[str]) -> list[str]:
    """Put messages into the queue as if they had been sent once more."""
    for at, message in enumerate(messages):
        if stage.redis is not None:
            stage.redis.client.lpush(QUEUE, message)
        else:
            folder = stage.system.data / "broker" / "messages"
            part = folder / f"{QUEUE}.{at:020d}.again.part"
            part.write_text(json.dumps(json.loads(message)))
            part.rename(part.with_suffix(".msg"))
    return messages


def repair(stage: Stage, run: Try) -> None:
    assert command(stage, "verify", "--repair", run.world.gallery) == 0, stage.worker.log.read_text()[-2000:]


def collect(stage: Stage) -> bool:
    """Collect every file that no row names, however young; False if the catalog was busy all the time."""
    code = command(stage, "gc", "--delete", "--older-than", "0.001")
    assert code in (0, 2), stage.worker.log.read_text()[-2000:]
    return code == 0


def command(stage: Stage, *words: str) -> int:
    """As an operator gives it, beside all that goes on; its exit code."""
    return Process(list(words), stage.system.environment, stage.worker.log, stage.system.spawn).popen.wait(SECONDS)
