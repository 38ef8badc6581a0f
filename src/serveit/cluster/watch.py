"""How snapshots reach proxies, drivers and replicas: one long-lived watch each, no polling."""
