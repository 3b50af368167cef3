"""Serves bots side by side for the experiments in this folder. Their model may be slow or fail."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from socket import create_server
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment


def instrumented(
    bot: Deployment, step_s: float = 0.0, failing_step: int | None = None
) -> Deployment:
    """Return a bot that counts the steps of its model: one for each token of a reply.

    Each step takes `step_s` seconds more, as a larger model's would. Step `failing_step` fails.
    """

    class Instrumented(bot.func_or_class):
        async def __init__(self, *arguments: Any, **options: Any) -> None:
            await super().__init__(*arguments, **options)
            self.steps = 0
            self.model.register_forward_pre_hook(self.before_step)

        def before_step(self, *_: Any) -> None:
            self.steps += 1
            time.sleep(step_s)
            if self.steps == failing_step:
                raise RuntimeError(f"step {failing_step} was told to fail")

        async def count_steps(self) -> int:
            return self.steps

    return bot.options(func_or_class=Instrumented)


@contextmanager
def served(*apps: Application) -> Iterator[list[str]]:
    """Run applications on a Serve of their own, and yield their addresses, without the scheme."""
    with create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init("local", num_cpus=len(apps), include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        names = [f"bot{number}" for number in range(len(apps))]
        serve.run_many(
            [
                serve.RunTarget(app, name=name, route_prefix=f"/{name}")
                for app, name in zip(apps, names, strict=True)
            ]
        )
        yield [f"127.0.0.1:{port}/{name}/" for name in names]
    finally:
        ray.shutdown()


def steps_in_all(address: str) -> int:
    """Return how many steps an instrumented bot's model took, once it takes none for 2 seconds."""
    handle = serve.get_app_handle(address.strip("/").rpartition("/")[2])
    steps = -1
    while (now := handle.count_steps.remote().result()) != steps:
        steps = now
        time.sleep(2)
    return steps
