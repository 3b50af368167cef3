"""Decides how many replicas a Chatbot needs."""

from typing import Any

from ray.serve.config import AutoscalingContext


def replies_in_progress(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """An autoscaling policy that follows the replies in progress, not the open sockets.

    It adds up the "replies" that the replicas' `record_autoscaling_stats` return, on average over
    `look_back_period_s`. It aims at `target_ongoing_requests` of them per replica. Serve applies
    the other settings (bounds, delays, factors) to the number that this returns.
    """
    replies = sum((ctx.aggregated_metrics or {}).get("replies", {}).values())
    return replies / ctx.config.target_ongoing_requests, {}
