"""What an operator installs: manifests, dashboards, proxies, and the recipes of docs/operations.md."""
