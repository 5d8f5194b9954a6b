"""Ray clusters: joining or starting one, jobs, stop requests, probes of nodes, the process group, Prometheus."""
