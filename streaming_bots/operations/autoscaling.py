"""Decides how many replicas a Chatbot needs."""

from typing import Any

from ray.serve.config import AutoscalingContext


def replies_in_progress(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return how many replicas suit the replies in progress, whatever the open sockets.

    Serve averages each replica's `record_autoscaling_stats` over `look_back_period_s`. This aims
    at `target_ongoing_requests` replies per replica. Serve then applies bounds, delays and factors.
    """
    replies = sum((ctx.aggregated_metrics or {}).get("replies", {}).values())
    return replies / ctx.config.target_ongoing_requests, {}
