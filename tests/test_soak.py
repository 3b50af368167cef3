"""Two thousand requests, of which many fail or are cancelled. None is lost or leaks anything."""

import asyncio
import itertools
import json
import random
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any, NamedTuple

import psutil
import pytest
import ray
import requests
from ray import serve
from soak_bots import SOAKED, Report
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from streaming_bots.chat.protocol import CHAT_V1
from streaming_bots.models.source import BUNDLED
from streaming_bots.settings import BatchSettings

REQUESTS = dict.fromkeys(SOAKED, 400)
CLIENTS = 24  # at once, fewer than any limit of the bots
LEAVE = 0.35  # of the visits, in one of these phases or a little later
PHASES = ["queue", "prefill", "first", "last", "random"]
REFUSED = 0.04
LONGEST_CHAT = 6
MAX_NEW_TOKENS = 24
SAMPLE_EVERY = 50  # requests
OUTCOMES = ["finished", "failed", "cancelled", "refused"]
# 2 % of a replica. The allocator moves memory by up to 4 MB, in both directions. A leak of 30 kB in
# each of a bot's 400 requests would show.
GROWTH_MB = 7
# Serve's batching holds the last batch until the next, and thread pools fill up late. If requests
# leaked, there would be hundreds of objects.
ALLOWANCE = 2 * BatchSettings().max_batch_size
HANG_S = 60  # only bounds a hang
REPORTED_S = 60  # Ray reports counters every few seconds

PROMPTS = ["Tell me a joke.", "Tell me a story about dogs.", "What is your name?", "I like apples."]
BLANK = "  "
TOO_LONG = "word " * 600
BINARY = "binary"

# What clients saw, by request id: an outcome for each prompt, or that they left before it. A
# WebSocket has one request id. "unheard": they left before they heard anything.
Seen = dict[str, list[str]]


class Leave(NamedTuple):
    """When and how a client leaves: after some seconds or pieces of text, or in a phase."""

    seconds: float | None = None
    pieces: int | None = None
    # "prefill", when the model begins to read the prompt, or "last", when all text is there
    phase: str = ""
    how: str = "close"  # or "reset", or "stop", which only ends the reply


STAY = Leave()


def is_chat(bot: str) -> bool:
    return bot.endswith("chatbot")


@dataclass
class Visit:
    """What one client does."""

    bot: str
    prompts: list[str]
    leave: Leave = STAY
    json: bool = False  # speaks chat.v1
    ahead: bool = False  # sends all prompts at once


def plan(numbers: dict[str, int], dice: random.Random) -> list[Visit]:
    """Plan this many requests for each bot, in random visits."""
    visits = []
    for bot, left in numbers.items():
        while left:
            number = min(left, dice.randint(1, LONGEST_CHAT)) if is_chat(bot) else 1
            visit = Visit(bot, [])
            visit.json = is_chat(bot) and dice.random() < 0.5
            visit.ahead = visit.json and dice.random() < 0.5
            wrong = [BLANK, TOO_LONG] if not is_chat(bot) else [BINARY, TOO_LONG]
            for _ in range(number):
                kinds = wrong if dice.random() < REFUSED else PROMPTS
                visit.prompts.append(dice.choice(kinds))
            if dice.random() < LEAVE:
                visit.leave = moment(visit, dice)
            elif visit.json and dice.random() < 0.1:
                visit.leave = Leave(pieces=dice.randint(1, 12), how="stop")
            visits.append(visit)
            left -= number
    dice.shuffle(visits)
    return visits


def moment(visit: Visit, dice: random.Random) -> Leave:
    """Choose when a client leaves.

    That may be before the bot has the request, while it waits, in its prefill, or in its reply.
    """
    how, phase = dice.choice(["close", "reset"]), dice.choice(PHASES)
    if phase == "first":
        return Leave(pieces=1, how=how)
    if phase == "random":
        return Leave(pieces=dice.randint(2, 6), how=how)
    if phase == "last":
        return Leave(phase=phase, how=how)
    # A reset may destroy what the other side has not read yet. For HTTP, Serve's counters show it.
    # For a prompt over a WebSocket, nothing shows whether it arrived.
    how = "close" if is_chat(visit.bot) else how
    if phase == "prefill":
        return Leave(phase=phase, how=how)
    return Leave(seconds=dice.choice([0.005, 0.05, 0.5]) * dice.random(), how=how)


class Clients:
    """Clients that ask the bots at an address, and note what they see."""

    def __init__(
        self,
        port: int,
        begun: socket.socket,  # where the bots report which requests their models begin to read
        after_each: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.port = port
        self.begun = begun
        self.when_begun: dict[str, Callable[[], None]] = {}  # by request id
        self.replies: dict[str, str] = {}  # by prompt, as far as they are known
        self.after_each = after_each  # called with the number of requests that are over
        self.numbers = itertools.count()
        self.seen: dict[str, Seen] = {bot: {} for bot in REQUESTS}
        self.done = 0

    async def run(self, visits: list[Visit]) -> None:
        """Make all visits, a few at a time."""
        waiting = iter(visits)
        loop = asyncio.get_running_loop()
        loop.add_reader(self.begun, self.hear_of_one)
        async with asyncio.timeout(600), asyncio.TaskGroup() as tasks:
            for _ in range(CLIENTS):
                tasks.create_task(self.visit_all(waiting))
        loop.remove_reader(self.begun)

    def hear_of_one(self) -> None:
        self.when_begun.pop(self.begun.recv(1000).decode(), lambda: None)()

    def leave_when_begun(self, name: str, leave: Leave, limit: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()
        if leave.phase == "prefill":
            self.when_begun[name] = lambda: limit.reschedule(loop.time())

    async def visit_all(self, visits: Iterator[Visit]) -> None:
        for visit in visits:
            prompts, leave = visit.prompts, visit.leave
            while prompts:  # another client asks what a failure or an early leave left over
                name = f"soak-{id(self)}-{next(self.numbers)}"
                if is_chat(visit.bot):
                    outcomes = await self.chat(name, visit, prompts, leave)
                else:
                    outcomes = [await self.post(name, visit, leave)]
                self.seen[visit.bot][name] = outcomes
                prompts, leave = prompts[len(outcomes) :], STAY
                for _ in outcomes:
                    self.done += 1
                    self.after_each(self.done)

    async def post(self, name: str, visit: Visit, leave: Leave) -> str:
        """Send one prompt over HTTP, by hand, to see exactly where a body breaks off."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        prompt = visit.prompts[0]
        body = json.dumps({"prompt": prompt}).encode()
        head = [
            f"POST /soak_{visit.bot}/ HTTP/1.1",
            "Host: localhost",
            f"X-Request-ID: {name}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        ]
        writer.write("\r\n".join([*head, "", ""]).encode() + body)
        pieces, text = 0, b""
        try:
            async with asyncio.timeout(leave.seconds) as limit:
                self.leave_when_begun(name, leave, limit)
                status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
                if status != 200:
                    await reader.read()
                    return "refused" if status < 500 else "failed"
                while size := int(await reader.readuntil(b"\r\n"), 16):
                    text += (await reader.readexactly(size + 2))[:-2]
                    pieces += 1
                    if pieces == leave.pieces:
                        return "left"
                    if leave.phase == "last" and text.decode() == self.replies.get(prompt):
                        return "left"
                self.replies[prompt] = text.decode()
                return "finished"
        except TimeoutError:
            return "left" if pieces else "unheard"
        except (asyncio.IncompleteReadError, ConnectionError):
            return "failed"
        finally:
            self.when_begun.pop(name, None)
            if leave.how == "reset":
                reset(writer.transport)
            writer.close()

    async def chat(self, name: str, visit: Visit, prompts: list[str], leave: Leave) -> list[str]:
        """Send prompts over a WebSocket until it closes; return an outcome for each sent one."""
        async with connect(
            f"ws://127.0.0.1:{self.port}/soak_{visit.bot}/",
            additional_headers={"X-Request-ID": name},
            subprotocols=[CHAT_V1] if visit.json else None,
            compression=None,
        ) as websocket:
            outcomes: list[str] = []
            if visit.ahead:
                for prompt in prompts:
                    await websocket.send(frame(prompt, visit.json))
                    outcomes.append("left")
            leaves_at = asyncio.get_running_loop().time() + (leave.seconds or HANG_S)
            pieces, text = 0, ""
            for number, prompt in enumerate(prompts):
                if not visit.ahead:
                    await websocket.send(frame(prompt, visit.json))
                    outcomes.append("left")
                try:
                    async with asyncio.timeout_at(leaves_at) as limit:
                        self.leave_when_begun(name, leave, limit)
                        while not isinstance(seen := await receive(websocket, visit.json), Outcome):
                            pieces, text = pieces + 1, text + seen
                            complete = number == 0 and text == self.replies.get(prompt)
                            if pieces != leave.pieces and not (leave.phase == "last" and complete):
                                continue
                            if leave.how == "stop":
                                await websocket.send('{"type": "stop"}')
                                continue
                            if leave.how == "reset" and number == len(outcomes) - 1:
                                reset(websocket.transport)
                            return outcomes
                except TimeoutError:
                    assert leave.seconds is not None or leave.phase == "prefill", (
                        f"{visit} hangs, {leave}"
                    )
                    return outcomes
                except ConnectionClosed as closed:
                    outcomes[number] = "failed" if closed.rcvd.code == 1011 else "refused"
                    return outcomes
                outcomes[number] = seen.name
            return outcomes


def reset(transport: asyncio.BaseTransport) -> None:
    """End a TCP connection with a reset."""
    linger_not = struct.pack("ii", 1, 0)
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
    transport.abort()


def frame(prompt: str, as_json: bool) -> str | bytes:
    if prompt == BINARY:
        return prompt.encode()
    return json.dumps({"type": "prompt", "prompt": prompt}) if as_json else prompt


class Outcome(NamedTuple):
    name: str


async def receive(websocket: ClientConnection, as_json: bool) -> Outcome | str:
    """Return a piece of a reply, or its outcome."""
    text = await websocket.recv()
    if not as_json:
        return Outcome("finished") if text == "<>" else text
    match message := json.loads(text):
        case {"type": "done", "finish_reason": "cancelled"}:
            return Outcome("cancelled")
        case {"type": "done"}:
            return Outcome("finished")
        case {"type": "error", "detail": detail}:
            return Outcome("failed" if detail.startswith("the reply failed") else "refused")
    return message.get("text", "")


class Counts(NamedTuple):
    """What Ray's Prometheus endpoint counts for each bot."""

    outcomes: dict[str, Counter[str]]  # by us
    proxy: dict[str, int]  # by Serve's proxy: HTTP requests and WebSockets
    replica: dict[str, int]  # by Serve's replica: the same

    @property
    def served(self) -> dict[str, int]:
        """Serve's counts, by proxy or replica, whichever misses none.

        The proxy misses some WebSockets that clients reset. The replica misses some cancelled HTTP
        requests.
        """
        return self.proxy | {bot: self.replica[bot] for bot in REQUESTS if is_chat(bot)}

    def since(self, earlier: "Counts") -> "Counts":
        return Counts(
            *(
                {bot: now[bot] - before[bot] for bot in now}
                for now, before in zip(self, earlier, strict=True)
            )
        )


def read_counts() -> Counts:
    port = ray.nodes()[0]["MetricsExportPort"]
    text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S).text
    outcomes: dict[str, Counter[str]] = {bot: Counter() for bot in REQUESTS}
    proxy, replica = dict.fromkeys(REQUESTS, 0), dict.fromkeys(REQUESTS, 0)
    for name, labels, value in re.findall(r"^ray_(\w+)_total\{(.*)\} (\S+)$", text, re.M):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        bot = tags.get("application", "").removeprefix("soak_")
        if bot not in REQUESTS:
            continue
        number = int(float(value))
        # Serve counts our own calls, too, which have no route.
        from_clients = tags.get("route", "").startswith(f"/soak_{bot}")
        if name == "bot_requests":
            outcomes[bot][tags["outcome"]] += number
        elif name == "serve_num_http_requests" and from_clients:
            proxy[bot] += number
        elif name.startswith(("serve_deployment_request_", "serve_deployment_error_")):
            replica[bot] += number * from_clients
    return Counts(outcomes, proxy, replica)


def until(read: Callable[[], Any], expected: Any) -> Any:
    """Read until the value is as expected or time is up; return the value."""
    deadline = time.monotonic() + REPORTED_S
    while (value := read()) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    return value


def connections(port: int) -> int:
    """Count the clients that Serve's proxy holds."""
    return sum(
        connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
        for connection in psutil.net_connections("tcp")
    )


class Soak:
    """The bots, and what Ray has counted for them."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.begun = socket.socket(type=socket.SOCK_DGRAM)
        self.begun.bind(("127.0.0.1", 0))
        targets = []
        for bot, (soaked, original, arguments) in SOAKED.items():
            app = original.options(func_or_class=soaked).bind(
                begun_port=self.begun.getsockname()[1],
                model=BUNDLED,
                max_new_tokens=MAX_NEW_TOKENS,
                num_cpus=1,  # of the cores that five bots share
                **arguments,
            )
            name = f"soak_{bot}"
            targets.append(serve.RunTarget(app, name=name, route_prefix=f"/{name}"))
        self.handles = dict(zip(REQUESTS, serve.run_many(targets), strict=True))
        self.ask_replicas()
        self.total = self.counted = read_counts()

    def ask_replicas(self) -> dict[str, Report]:
        asked = {bot: handle.report.remote() for bot, handle in self.handles.items()}
        return {bot: report.result(timeout_s=HANG_S) for bot, report in asked.items()}

    def run(self, clients: Clients, visits: list[Visit]) -> dict[str, Report]:
        """Have the clients make their visits; wait until they are over and have been counted."""
        asyncio.run(clients.run(visits))
        before = self.total
        ended = {bot: before.served[bot] + len(clients.seen[bot]) for bot in REQUESTS}
        until(lambda: read_counts().served, ended)
        reports = self.ask_replicas()
        noted = {
            bot: before.outcomes[bot] + Counter(itertools.chain(*report.outcomes.values()))
            for bot, report in reports.items()
        }
        until(lambda: read_counts().outcomes, noted)
        self.total = read_counts()
        self.counted = self.total.since(before)
        return reports


def mismatches(seen: Seen, report: Report) -> list[tuple[str, list[str], list[str]]]:
    """Return the requests whose counted outcomes differ from what clients saw."""
    found = []
    for name in seen.keys() | report.outcomes.keys() | report.arrived.keys():
        saw, counted = seen.get(name, []), report.outcomes.get(name, [])
        never_came = saw == ["unheard"] and name not in report.arrived
        # A client that has left cannot know.
        as_seen = len(saw) == len(counted) and all(
            one in ("left", "unheard", other) for one, other in zip(saw, counted, strict=True)
        )
        if not (never_came and not counted) and not (as_seen and report.arrived.get(name) == 1):
            found.append((name, saw, counted))
    return found


def cells(label: str, values: Iterable[Any]) -> str:
    return f"{label:42}" + "".join(f"{value!s:>12}" for value in values)


@pytest.mark.slow
def test_nothing_of_2000_requests_is_lost_or_left_over(port, capsys):
    soak = Soak(port)
    some = plan(dict.fromkeys(REQUESTS, 70), random.Random(1))
    before = soak.run(Clients(port, soak.begun), some)
    processes = {bot: psutil.Process(report.pid) for bot, report in before.items()}
    memory: dict[str, dict[int, float]] = {bot: {} for bot in REQUESTS}

    def measure(done: int) -> None:
        if done % SAMPLE_EVERY == 0:
            for bot, process in processes.items():
                memory[bot][done] = process.memory_full_info().uss / 1e6

    clients = Clients(port, soak.begun, measure)
    after = soak.run(clients, plan(REQUESTS, random.Random(2)))

    counted, seen = soak.counted, clients.seen
    saw = {bot: Counter(itertools.chain(*seen[bot].values())) for bot in REQUESTS}
    left = {bot: saw[bot]["left"] + saw[bot]["unheard"] for bot in REQUESTS}
    never_came = {bot: len(seen[bot].keys() - after[bot].arrived.keys()) for bot in REQUESTS}
    noted = {bot: Counter(itertools.chain(*after[bot].outcomes.values())) for bot in REQUESTS}
    wrong = {bot: mismatches(seen[bot], after[bot]) for bot in REQUESTS}
    trend = {bot: trend_of_second_thousand(memory[bot]) for bot in REQUESTS}
    open_at_end = until(lambda: connections(port), 0)
    soak.begun.close()

    numbers: dict[str, dict[str, int]] = {
        "prompts sent": {bot: saw[bot].total() for bot in REQUESTS},
        **{f"  clients saw: {o}": {bot: saw[bot][o] for bot in REQUESTS} for o in OUTCOMES},
        "  clients left": left,
        **{f"  we counted: {o}": {b: counted.outcomes[b][o] for b in REQUESTS} for o in OUTCOMES},
        "  nobody: left before the bot had it": never_came,
        "HTTP requests, WebSockets": {bot: len(seen[bot]) for bot in REQUESTS},
        "  Serve's proxy counted": counted.proxy,
        "  Serve's replica counted": counted.replica,
        "generations": {bot: after[bot].generations for bot in REQUESTS},
        "  made to fail": {bot: after[bot].failures for bot in REQUESTS},
        "    in the middle of so many replies": {bot: after[bot].failing for bot in REQUESTS},
        **{
            f"left, or stopped: {phase}": {b: after[b].left_in.get(phase, 0) for b in REQUESTS}
            for phase in ("queue", "prefill", "tokens", "end")
        },
    }
    states: dict[str, Callable[[Report], int]] = {
        "threads of Python, before and after": lambda report: len(report.threads),
        "all threads": lambda report: report.native_threads,
        "tasks": lambda report: len(report.tasks),
        "our objects, and queues": lambda report: sum(report.objects.values()),
        "sockets": lambda report: report.sockets,
    }
    with capsys.disabled():
        print("\n" + cells("", [*REQUESTS, "all"]))
        for label, row in numbers.items():
            print(cells(label, [*row.values(), sum(row.values())]))
        for label, state in states.items():
            print(cells(label, [f"{state(before[b])}, {state(after[b])}" for b in REQUESTS]))
        for done in (SAMPLE_EVERY, 1000, 2000):
            print(cells(f"memory at {done}", [f"{memory[bot][done]:.1f} MB" for bot in REQUESTS]))
        print(cells("  trend from 1000 to 2000", [f"{trend[bot]:+.1f} MB" for bot in REQUESTS]))

    holds = {"no client is still connected": open_at_end == 0}
    for bot in REQUESTS:
        came = saw[bot].total() - never_came[bot]
        claims = {
            f"each request has one outcome, as its client saw it {wrong[bot][:3]}": not wrong[bot],
            f"some leave in each phase {after[bot].left_in}": all(
                after[bot].left_in.get(phase) for phase in ("queue", "prefill", "tokens")
            ),
            "all outcomes occur": all(counted.outcomes[bot][outcome] for outcome in OUTCOMES),
            f"Ray's counters have what was counted {noted[bot]}": counted.outcomes[bot]
            == noted[bot],
            "nothing failed but what was made to": counted.outcomes[bot]["failed"]
            <= after[bot].failing,
            "all were sent": saw[bot].total() == REQUESTS[bot],
            "our counters add up": counted.outcomes[bot].total() == came,
            "Serve's counters add up": counted.served[bot] == len(seen[bot]),
            f"no thread is left over {after[bot].threads}": after[bot].threads
            == before[bot].threads
            and after[bot].native_threads <= before[bot].native_threads + ALLOWANCE,
            f"no task is left over {after[bot].tasks}": after[bot].tasks == before[bot].tasks,
            f"no queue is left over {after[bot].objects}": max(after[bot].objects.values())
            <= ALLOWANCE,
            "no socket is left over": after[bot].sockets <= before[bot].sockets,
            "no memory is left over": trend[bot] < GROWTH_MB,
        }
        holds |= {f"{bot}: {claim}": it_does for claim, it_does in claims.items()}
    broken = [claim for claim, it_does in holds.items() if not it_does]
    assert not broken, "\n".join(["does not hold:", *broken])


def trend_of_second_thousand(memory: dict[int, float]) -> float:
    """Return the MB per 1000 requests, by a line through all measurements."""
    second = {done: size for done, size in memory.items() if done >= 1000}
    return 1000 * linear_regression([*second], [*second.values()]).slope
