"""A Ray cluster of several nodes on this machine. It ends when this program's input ends.

    python local_cluster.py DASHBOARD_PORT CPUS [CPUS ...]

The head has no CPUs. Each CPUS adds a node. Once all nodes are up, the program prints their metrics
ports as a JSON object. For each line of its input, a node's id, it kills that node.
"""

import json
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    dashboard_port, *cpus = map(int, sys.argv[1:])
    head = {
        "num_cpus": 0,
        "include_dashboard": True,
        "dashboard_port": dashboard_port,
        "dashboard_agent_listen_port": 0,  # any free one
        "_system_config": {"metrics_report_interval_ms": 2000},  # tests read the metrics
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = {node.node_id: node for node in [cluster.add_node(num_cpus=n) for n in cpus]}
        print(json.dumps({id: node.metrics_export_port for id, node in nodes.items()}), flush=True)
        for line in sys.stdin:
            cluster.remove_node(nodes[line.strip()], allow_graceful=False)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
