"""Draining: how a Chatbot's replica notices that Serve is stopping it."""

import asyncio
import time

from ray import serve

LONGEST_REPLY_S = 120.0  # for Serve: how long a replica may take to finish when it is stopped
HEALTH_CHECK_PERIOD_S = 2.0  # for Serve: how often it asks replicas whether they are healthy
SILENCE_S = 10.0  # several of these periods; a busy machine alone seldom causes that
LOOK_EVERY_S = 2.0


class Drain:
    """Notices that Serve is stopping this replica, for which Serve has no callback.

    Serve waits `graceful_shutdown_timeout_s` for the requests of a replica that it stops, and then
    kills it. An open WebSocket is a request, so a late reply on it would be cut. Serve does not
    check the health of a stopping replica. So after SILENCE_S without a check, this reads Serve's
    status. If it shows a stop, `begun` is set until the next check. Create it in the replica.
    """

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.asked = time.monotonic()
        self.task = asyncio.create_task(self._watch())  # ends with the replica

    def health_was_asked(self) -> None:
        self.asked = time.monotonic()
        self.begun.clear()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            asked = self.asked
            if time.monotonic() - asked < SILENCE_S:
                continue
            if await asyncio.to_thread(is_stopping) and self.asked == asked:  # still no check
                self.begun.set()


def is_stopping() -> bool:
    """Whether Serve is stopping replicas of this deployment, maybe this one."""
    replica = serve.get_replica_context()
    try:
        application = serve.status().applications[replica.app_name]
    except Exception:  # there is no controller to ask
        return False
    deployment = application.deployments.get(replica.deployment)
    stopping = deployment is not None and deployment.replica_states.get("STOPPING", 0) > 0
    return stopping or application.status == "DELETING"
