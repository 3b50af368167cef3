"""Bots on a socket of this process: their own ASGI apps and constructors, without Ray.

Serve's proxy, its limits, and the replacement of replicas are missing. Tests on a real Serve cover
them.
"""

import asyncio
import inspect
import socket
import sys
import threading
import time
from contextvars import ContextVar
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from ray import serve
from ray.serve import Application
from starlette.types import Receive, Scope, Send

from streaming_bots.operations import drain

MODULES = ("textbot", "chatbot", "batchbot", "continuousbot", "stepped_bots")
CURRENT: ContextVar[SimpleNamespace] = ContextVar("replica")  # the replica that runs now
HANG_S = 60  # only bounds a hang
HEALTH_CHECK_PERIOD_S = 1.0


class LocalServe:
    """Runs applications by their route prefixes, "" or "/name", on one event loop in a thread."""

    def __init__(self, port: int = 0) -> None:
        self.socket = socket.create_server(("127.0.0.1", port))  # any free port by default
        self.port = self.socket.getsockname()[1]
        self.replicas: dict[str, SimpleNamespace] = {}
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(serve, "get_replica_context", CURRENT.get)
        self.patches.setattr(drain, "is_stopping", lambda: False)
        self.longest_s = 0.0  # longest time that the loop computed without a pause
        run_callback = asyncio.Handle._run

        def run_and_time(handle: asyncio.Handle) -> None:
            began = time.thread_time()  # this clock stops while others use the core
            run_callback(handle)
            if threading.current_thread() is self.thread:
                self.longest_s = max(self.longest_s, time.thread_time() - began)

        self.patches.setattr(asyncio.Handle, "_run", run_and_time)
        config = uvicorn.Config(self, lifespan="off", log_config=None, access_log=False)
        self.server = uvicorn.Server(config)
        self.started = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=(self._run(),))
        self.thread.start()
        assert self.started.wait(HANG_S)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.call_soon(self.started.set)
        await self.server.serve([self.socket])

    def stop(self) -> None:
        """End the server, and the sockets that tests have left open."""
        self.server.should_exit = self.server.force_exit = True
        self.thread.join()
        self.patches.undo()

    def run(self, app: Application, prefix: str) -> None:
        """Construct the bot of an application as a replica does, and serve it.

        Raises what the constructor raises.
        """
        asyncio.run_coroutine_threadsafe(self._start(app, prefix), self.loop).result()

    async def _start(self, app: Application, prefix: str) -> None:
        deployment = app._bound_deployment
        bot_class = own_class(deployment.func_or_class)
        replica = SimpleNamespace(
            servable_object=bot_class.__new__(bot_class),
            _deployment_config=deployment._deployment_config,  # read by @serve.batch
        )
        CURRENT.set(replica)
        bot = replica.servable_object
        await bot.__init__(*deployment.init_args, **deployment.init_kwargs)
        if deployment.user_config is not None:
            bot.reconfigure(deployment.user_config)
        replica.health_checks = asyncio.create_task(self._check_health(bot))
        self.replicas[prefix] = replica

    async def _check_health(self, bot: Any) -> None:
        """Check until the bot is unhealthy. Serve would then replace it."""
        while True:
            await asyncio.sleep(HEALTH_CHECK_PERIOD_S)
            try:
                await call(bot.check_health)
            except Exception:
                return

    def call(self, prefix: str, method: str, *arguments: Any) -> Any:
        """Call a method of a bot on its event loop; return or raise what the method does."""

        async def call_method() -> Any:
            CURRENT.set(self.replicas[prefix])
            return await call(getattr(self.replicas[prefix].servable_object, method), *arguments)

        return asyncio.run_coroutine_threadsafe(call_method(), self.loop).result(HANG_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prefixes = [
            prefix
            for prefix in self.replicas
            if scope["path"].startswith(f"{prefix}/") or scope["path"] == prefix
        ]
        replica = self.replicas[max(prefixes, key=len)]
        CURRENT.set(replica)
        scope["root_path"] = max(prefixes, key=len)
        await replica.servable_object(scope, receive, send)


def own_class(shared: type) -> type:
    """Import the class again, so that each bot has its own, as in a replica.

    The bot's FastAPI app and the queue of its batches belong to the class.
    """
    imported = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    try:
        own = getattr(import_module(shared.__module__), shared.__name__)
    finally:
        sys.modules.update(imported)
    return own.func_or_class if isinstance(own, serve.Deployment) else own


async def call(method: Any, *arguments: Any) -> Any:
    result = method(*arguments)
    return await result if inspect.isawaitable(result) else result
