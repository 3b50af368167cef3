"""The code that concerns operators: metrics, autoscaling, draining."""
