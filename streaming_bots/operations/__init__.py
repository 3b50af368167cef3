"""What operators see and decide: metrics, autoscaling, draining."""
